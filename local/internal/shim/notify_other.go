//go:build !amd64

package shim

import "golang.org/x/sys/unix"

// NotifySupported is false: registers and numbers of the other architectures are not written down yet.
const NotifySupported = false

type pathCall struct {
	pairs     [][2]int
	emptyFlag int
}

const cwd = -1

var pathCalls = map[int32]pathCall{}

const (
	auditArch = 0
	redZone   = 0
)

func argument(*unix.PtraceRegs, int) *uint64 { return new(uint64) }
func stackPointer(*unix.PtraceRegs) uint64   { return 0 }
func result(*unix.PtraceRegs) int64          { return 0 }
func callNumber(*unix.PtraceRegs) int32      { return 0 }

func instruction(*unix.PtraceRegs) uint64 { return 0 }
