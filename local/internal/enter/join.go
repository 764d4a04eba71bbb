package enter

import (
	"fmt"
	"os"
	"runtime"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// child is all that the forked process needs, made before the fork: after it, no Go code may allocate,
// grow its stack or meet the scheduler.
type child struct {
	userNS, mountNS uintptr
	directory       *byte
	argv, envv      **byte
	path            *byte
	signals         unix.Sigset_t
}

// joinUser runs the program in the user and mount namespaces of pid. A process with threads may not join
// a user namespace, and a Go process always has threads; its fork has one.
func joinUser(pid int, program []string) (int, error) {
	prepared, files, err := prepareChild(pid, program)
	if err != nil {
		return 1, err
	}
	runtime.LockOSThread()
	forked, errno := fork(prepared)
	runtime.KeepAlive(files)
	if errno != 0 {
		return 1, fmt.Errorf("cannot fork: %w", errno)
	}
	stop := forwardSignals(forked)
	defer stop()
	var status syscall.WaitStatus
	for {
		_, err := syscall.Wait4(forked, &status, 0, nil)
		if err == syscall.EINTR {
			continue
		}
		if err != nil {
			return 1, err
		}
		return statusCode(status), nil
	}
}

func prepareChild(pid int, program []string) (*child, []*os.File, error) {
	user, err := os.Open(fmt.Sprintf("/proc/%d/ns/user", pid))
	if err != nil {
		return nil, nil, err
	}
	mounts, err := os.Open(fmt.Sprintf("/proc/%d/ns/mnt", pid))
	if err != nil {
		return nil, nil, err
	}
	argv, err := syscall.SlicePtrFromStrings(program)
	if err != nil {
		return nil, nil, err
	}
	envv, err := syscall.SlicePtrFromStrings(os.Environ())
	if err != nil {
		return nil, nil, err
	}
	directory, err := os.Getwd()
	if err != nil {
		return nil, nil, err
	}
	directoryPointer, err := syscall.BytePtrFromString(directory)
	if err != nil {
		return nil, nil, err
	}
	return &child{
		userNS: user.Fd(), mountNS: mounts.Fd(), directory: directoryPointer,
		argv: &argv[0], envv: &envv[0], path: argv[0],
	}, []*os.File{user, mounts}, nil
}

// fork blocks signals around the clone: a Go signal handler must not run in the child.
func fork(c *child) (pid int, errno syscall.Errno) {
	var all unix.Sigset_t
	for i := range all.Val {
		all.Val[i] = ^uint64(0)
	}
	if err := unix.PthreadSigmask(unix.SIG_SETMASK, &all, &c.signals); err != nil {
		return 0, err.(syscall.Errno)
	}
	pid, errno = forkAndExec(c)
	_ = unix.PthreadSigmask(unix.SIG_SETMASK, &c.signals, nil)
	return pid, errno
}

// The exit code of a child that could not become the program: 120 and the step that failed.
const (
	exitUserNS = 121 + iota
	exitMountNS
	exitDirectory
	exitExec
)

//go:nosplit
//go:norace
func forkAndExec(c *child) (int, syscall.Errno) {
	pid, _, errno := syscall.RawSyscall6(syscall.SYS_CLONE, uintptr(syscall.SIGCHLD), 0, 0, 0, 0, 0)
	if errno != 0 || pid != 0 {
		return int(pid), errno
	}
	var code uintptr
	if _, _, errno = syscall.RawSyscall(unix.SYS_SETNS, c.userNS, unix.CLONE_NEWUSER, 0); errno != 0 {
		code = exitUserNS
	} else if _, _, errno = syscall.RawSyscall(unix.SYS_SETNS, c.mountNS, unix.CLONE_NEWNS, 0); errno != 0 {
		code = exitMountNS
	} else if _, _, errno = syscall.RawSyscall(unix.SYS_CHDIR, uintptr(unsafe.Pointer(c.directory)), 0, 0); errno != 0 {
		code = exitDirectory
	} else {
		syscall.RawSyscall(unix.SYS_PRCTL, unix.PR_SET_PDEATHSIG, uintptr(syscall.SIGKILL), 0)
		syscall.RawSyscall6(unix.SYS_RT_SIGPROCMASK, unix.SIG_SETMASK, uintptr(unsafe.Pointer(&c.signals)), 0, 8, 0, 0)
		syscall.RawSyscall(unix.SYS_EXECVE, uintptr(unsafe.Pointer(c.path)),
			uintptr(unsafe.Pointer(c.argv)), uintptr(unsafe.Pointer(c.envv)))
		code = exitExec
	}
	for {
		syscall.RawSyscall(unix.SYS_EXIT_GROUP, code, 0, 0)
	}
}
