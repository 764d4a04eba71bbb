package shim

import (
	"fmt"
	"runtime"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// A process can join a user namespace only while it has a single thread, which a Go program never has. So
// we fork as package syscall does, and between fork and execve the child, which has one thread, makes
// nothing but raw system calls: no allocation, no stack growth, no lock that another thread may hold.

//go:linkname beforeFork syscall.runtime_BeforeFork
func beforeFork()

//go:linkname afterFork syscall.runtime_AfterFork
func afterFork()

//go:linkname afterForkInChild syscall.runtime_AfterForkInChild
func afterForkInChild()

// Join says what to execute in the namespaces of another process.
type Join struct {
	// PIDFD is the process; Flags are the CLONE_NEW* of the namespaces to join.
	PIDFD int
	Flags int
	// Paths are tried in order as in execvp, because only the child sees the files.
	Paths []string
	Args  []string
	Env   []string
	Cwd   string
	// Terminal makes descriptor 0 the controlling terminal of the command's session, which is always new.
	Terminal   bool
	NoNewPrivs bool
}

// joinRaw is Join in the form system calls take.
type joinRaw struct {
	pidfd, flags         uintptr
	paths                []*byte
	argv, envv           []*byte
	cwd                  *byte
	report               uintptr
	terminal, noNewPrivs bool
	failure              [2]uint64
}

// Steps of the child, which it reports with the errno of the one that failed.
const (
	stepNone = iota
	stepJoin
	stepFork
	stepChdir
	stepTerminal
	stepExec
)

var stepNames = map[uint64]string{
	stepJoin:     "entering the container's namespaces",
	stepFork:     "fork",
	stepChdir:    "working directory",
	stepTerminal: "terminal",
	stepExec:     "exec",
}

// Start forks into the namespaces and executes the command, with the caller's descriptors 0 to 2. The
// process is a child of the caller, dies with the calling thread, and is waited for by its pid.
func (j Join) Start() (pid int, err error) {
	raw, err := j.raw()
	if err != nil {
		return 0, err
	}
	var report [2]int
	if err := unix.Pipe2(report[:], unix.O_CLOEXEC); err != nil {
		return 0, err
	}
	defer unix.Close(report[0])
	raw.report = uintptr(report[1])

	helper, errno := fork(raw)
	unix.Close(report[1])
	if errno != 0 {
		return 0, fmt.Errorf("fork: %w", errno)
	}
	failure, pid := collect(report[0], helper)
	if failure != nil {
		return 0, failure
	}
	return pid, nil
}

// collect reads the pid of the command and, if there is one, the failure, until execve closes the pipe.
func collect(report, helper int) (failure error, pid int) {
	var message [2]uint64
	buffer := unsafe.Slice((*byte)(unsafe.Pointer(&message)), unsafe.Sizeof(message))
	for {
		n, err := unix.Read(report, buffer)
		if err == unix.EINTR {
			continue
		}
		if n < len(buffer) {
			break
		}
		if message[0] == stepNone {
			pid = int(message[1])
			continue
		}
		failure = fmt.Errorf("%s: %w", stepNames[message[0]], syscall.Errno(message[1]))
	}
	reap(helper)
	if failure != nil && pid != 0 {
		reap(pid)
	}
	return failure, pid
}

func reap(pid int) {
	for {
		if _, err := unix.Wait4(pid, nil, 0, nil); err != unix.EINTR {
			return
		}
	}
}

func (j Join) raw() (*joinRaw, error) {
	raw := &joinRaw{pidfd: uintptr(j.PIDFD), flags: uintptr(j.Flags), terminal: j.Terminal, noNewPrivs: j.NoNewPrivs}
	var err error
	if raw.paths, err = syscall.SlicePtrFromStrings(j.Paths); err != nil {
		return nil, err
	}
	if raw.argv, err = syscall.SlicePtrFromStrings(j.Args); err != nil {
		return nil, err
	}
	if raw.envv, err = syscall.SlicePtrFromStrings(j.Env); err != nil {
		return nil, err
	}
	cwd := j.Cwd
	if cwd == "" {
		cwd = "/"
	}
	raw.cwd, err = syscall.BytePtrFromString(cwd)
	return raw, err
}

// fork splits off the helper that joins the namespaces. A PID namespace takes only children in, so the
// helper forks once more, with CLONE_PARENT: the command is then our child, not the helper's.
//
//go:norace
func fork(raw *joinRaw) (int, syscall.Errno) {
	syscall.ForkLock.Lock()
	beforeFork()
	pid, _, errno := syscall.RawSyscall6(unix.SYS_CLONE, uintptr(unix.SIGCHLD), 0, 0, 0, 0, 0)
	if errno == 0 && pid == 0 {
		child(raw)
	}
	afterFork()
	syscall.ForkLock.Unlock()
	runtime.KeepAlive(raw)
	return int(pid), errno
}

//go:norace
//go:nosplit
func child(raw *joinRaw) {
	afterForkInChild()
	if _, _, errno := syscall.RawSyscall(unix.SYS_SETNS, raw.pidfd, raw.flags, 0); errno != 0 {
		fail(raw, stepJoin, errno)
	}
	flags := uintptr(unix.CLONE_PARENT) | uintptr(unix.SIGCHLD)
	pid, _, errno := syscall.RawSyscall6(unix.SYS_CLONE, flags, 0, 0, 0, 0, 0)
	if errno != 0 {
		fail(raw, stepFork, errno)
	}
	if pid != 0 {
		tell(raw, stepNone, pid)
		exit(0)
	}
	command(raw)
}

//go:norace
//go:nosplit
func command(raw *joinRaw) {
	syscall.RawSyscall(unix.SYS_PRCTL, unix.PR_SET_PDEATHSIG, uintptr(unix.SIGKILL), 0)
	syscall.RawSyscall(unix.SYS_SETSID, 0, 0, 0)
	if raw.terminal {
		if _, _, errno := syscall.RawSyscall(unix.SYS_IOCTL, 0, unix.TIOCSCTTY, 0); errno != 0 {
			fail(raw, stepTerminal, errno)
		}
	}
	if _, _, errno := syscall.RawSyscall(unix.SYS_CHDIR, uintptr(unsafe.Pointer(raw.cwd)), 0, 0); errno != 0 {
		fail(raw, stepChdir, errno)
	}
	if raw.noNewPrivs {
		syscall.RawSyscall6(unix.SYS_PRCTL, unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0, 0)
	}
	last := unix.ENOENT
	for i := 0; raw.paths[i] != nil; i++ {
		_, _, errno := syscall.RawSyscall(unix.SYS_EXECVE, uintptr(unsafe.Pointer(raw.paths[i])),
			uintptr(unsafe.Pointer(&raw.argv[0])), uintptr(unsafe.Pointer(&raw.envv[0])))
		if errno != unix.ENOENT && errno != unix.ENOTDIR {
			last = errno
		}
	}
	fail(raw, stepExec, last)
}

//go:norace
//go:nosplit
func fail(raw *joinRaw, step uint64, errno syscall.Errno) {
	tell(raw, step, uintptr(errno))
	exit(1)
}

//go:norace
//go:nosplit
func tell(raw *joinRaw, step uint64, value uintptr) {
	raw.failure[0] = step
	raw.failure[1] = uint64(value)
	syscall.RawSyscall(unix.SYS_WRITE, raw.report, uintptr(unsafe.Pointer(&raw.failure[0])), 16)
}

//go:norace
//go:nosplit
func exit(code uintptr) {
	for {
		syscall.RawSyscall(unix.SYS_EXIT_GROUP, code, 0, 0)
	}
}
