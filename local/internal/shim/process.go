package shim

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// Process names a process for ever: a bare pid may belong to someone else after an hour or a reboot.
type Process struct {
	PID int `json:"pid"`
	// Start is the process's start time in clock ticks since boot, field 22 of /proc/PID/stat.
	Start uint64 `json:"start"`
	Boot  string `json:"boot"`
}

// ErrGone is returned for a process that ended, or whose pid is now another's.
var ErrGone = errors.New("the process is gone")

var bootID = sync.OnceValue(func() string {
	data, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(data))
})

// Identify describes a living process.
func Identify(pid int) (Process, error) {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return Process{}, ErrGone
	}
	state, start, err := parseStat(string(data))
	if err != nil {
		return Process{}, fmt.Errorf("/proc/%d/stat: %w", pid, err)
	}
	if state == "Z" || state == "X" {
		return Process{}, ErrGone
	}
	return Process{PID: pid, Start: start, Boot: bootID()}, nil
}

// parseStat takes state and start time out of a line of /proc/PID/stat. The command's name stands in
// parentheses and may itself hold parentheses and spaces, so fields are counted from the last one.
func parseStat(line string) (state string, start uint64, err error) {
	end := strings.LastIndexByte(line, ')')
	if end < 0 {
		return "", 0, fmt.Errorf("no command name in %q", line)
	}
	fields := strings.Fields(line[end+1:])
	if len(fields) < 20 {
		return "", 0, fmt.Errorf("%d fields after the name, want 20", len(fields))
	}
	start, err = strconv.ParseUint(fields[19], 10, 64)
	return fields[0], start, err
}

// Open gives a pidfd of the process, or ErrGone.
func (p Process) Open() (int, error) {
	if p.PID <= 0 || p.Boot != bootID() {
		return -1, ErrGone
	}
	// Nonblocking, so that the Go runtime's poller takes it and waiting costs no thread.
	fd, err := unix.PidfdOpen(p.PID, unix.PIDFD_NONBLOCK)
	if err != nil {
		return -1, ErrGone
	}
	// Checked after the open: from here on the descriptor cannot come to mean another process.
	now, err := Identify(p.PID)
	if err != nil || now.Start != p.Start {
		unix.Close(fd)
		return -1, ErrGone
	}
	return fd, nil
}

// Signal sends a signal to exactly this process.
func (p Process) Signal(signal unix.Signal) error {
	fd, err := p.Open()
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	err = unix.PidfdSendSignal(fd, signal, nil, 0)
	if errors.Is(err, unix.ESRCH) {
		return ErrGone
	}
	return err
}

// Alive says whether the process still runs.
func (p Process) Alive() bool {
	fd, err := p.Open()
	if err != nil {
		return false
	}
	unix.Close(fd)
	return true
}

// Wait returns when the process has ended. It works for processes that are not our children, which is
// what shims are after a restart.
func (p Process) Wait() {
	fd, err := p.Open()
	if err != nil {
		return
	}
	file := os.NewFile(uintptr(fd), "pidfd")
	defer file.Close()
	connection, err := file.SyscallConn()
	if err != nil {
		return
	}
	_ = connection.Read(func(fd uintptr) bool {
		poll := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		n, err := unix.Poll(poll, 0)
		return err == nil && n > 0
	})
}
