package shim

import "golang.org/x/sys/unix"

// NotifySupported says whether this build knows the registers and numbers of the machine's system calls.
const NotifySupported = true

// pathCall says which arguments of a system call are paths.
type pathCall struct {
	// pairs are (directory descriptor, path) argument positions; a directory of cwd means none.
	pairs [][2]int
	// emptyFlag is the argument that may hold AT_EMPTY_PATH, which makes the call one about a descriptor.
	emptyFlag int
}

const cwd = -1

func one(path int) pathCall              { return pathCall{pairs: [][2]int{{cwd, path}}} }
func two(a, b int) pathCall              { return pathCall{pairs: [][2]int{{cwd, a}, {cwd, b}}} }
func at(dir, path int) pathCall          { return pathCall{pairs: [][2]int{{dir, path}}} }
func twoAt(a, b [2]int) pathCall         { return pathCall{pairs: [][2]int{a, b}} }
func flagged(c pathCall, f int) pathCall { c.emptyFlag = f; return c }

// pathCalls are the system calls that take paths. None takes six arguments: the last one is free for the
// cookie by which the filter knows a call that was rewritten.
var pathCalls = map[int32]pathCall{
	unix.SYS_OPEN: one(0), unix.SYS_CREAT: one(0), unix.SYS_STAT: one(0), unix.SYS_LSTAT: one(0), unix.SYS_ACCESS: one(0),
	unix.SYS_READLINK: one(0), unix.SYS_MKDIR: one(0), unix.SYS_RMDIR: one(0), unix.SYS_UNLINK: one(0),
	unix.SYS_RENAME: two(0, 1), unix.SYS_LINK: two(0, 1), unix.SYS_SYMLINK: one(1),
	unix.SYS_CHMOD: one(0), unix.SYS_CHOWN: one(0), unix.SYS_LCHOWN: one(0), unix.SYS_TRUNCATE: one(0),
	unix.SYS_STATFS: one(0), unix.SYS_UTIME: one(0), unix.SYS_UTIMES: one(0), unix.SYS_CHDIR: one(0),
	unix.SYS_MKNOD: one(0), unix.SYS_EXECVE: one(0), unix.SYS_INOTIFY_ADD_WATCH: one(1),
	unix.SYS_SETXATTR: one(0), unix.SYS_LSETXATTR: one(0), unix.SYS_GETXATTR: one(0), unix.SYS_LGETXATTR: one(0),
	unix.SYS_LISTXATTR: one(0), unix.SYS_LLISTXATTR: one(0), unix.SYS_REMOVEXATTR: one(0), unix.SYS_LREMOVEXATTR: one(0),

	unix.SYS_OPENAT: at(0, 1), unix.SYS_OPENAT2: at(0, 1), unix.SYS_NEWFSTATAT: flagged(at(0, 1), 3),
	unix.SYS_STATX: flagged(at(0, 1), 2), unix.SYS_FACCESSAT: at(0, 1), unix.SYS_FACCESSAT2: flagged(at(0, 1), 3),
	unix.SYS_READLINKAT: at(0, 1), unix.SYS_MKDIRAT: at(0, 1), unix.SYS_UNLINKAT: at(0, 1),
	unix.SYS_RENAMEAT: twoAt([2]int{0, 1}, [2]int{2, 3}), unix.SYS_RENAMEAT2: twoAt([2]int{0, 1}, [2]int{2, 3}),
	unix.SYS_LINKAT: flagged(twoAt([2]int{0, 1}, [2]int{2, 3}), 4), unix.SYS_SYMLINKAT: at(1, 2),
	unix.SYS_FCHMODAT: at(0, 1), unix.SYS_FCHMODAT2: flagged(at(0, 1), 3), unix.SYS_FCHOWNAT: flagged(at(0, 1), 4),
	unix.SYS_UTIMENSAT: at(0, 1), unix.SYS_FUTIMESAT: at(0, 1), unix.SYS_MKNODAT: at(0, 1),
	unix.SYS_EXECVEAT: flagged(at(0, 1), 4),
}

const auditArch = unix.AUDIT_ARCH_X86_64

// argument gives the register of a system call's argument.
func argument(r *unix.PtraceRegs, i int) *uint64 {
	return [...]*uint64{&r.Rdi, &r.Rsi, &r.Rdx, &r.R10, &r.R8, &r.R9}[i]
}

func stackPointer(r *unix.PtraceRegs) uint64 { return r.Rsp }

// redZone is what the ABI lets a function use below its stack pointer without moving it.
const redZone = 128

func result(r *unix.PtraceRegs) int64 { return int64(r.Rax) }

func callNumber(r *unix.PtraceRegs) int32 { return int32(r.Orig_rax) }

func instruction(r *unix.PtraceRegs) uint64 { return r.Rip }
