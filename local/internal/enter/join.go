package enter

import (
	"fmt"
	"os"
	"runtime"

	"golang.org/x/sys/unix"

	"tuneward.dev/local/internal/shim"
)

// joinUser runs the program in the user and mount namespaces of pid. A process with threads may not join
// a user namespace, and a Go process always has threads: so it is forked as a container's commands are.
func joinUser(pid int, program []string) (int, error) {
	directory, err := os.Getwd()
	if err != nil {
		return 1, err
	}
	pidfd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return 1, fmt.Errorf("the running containers (pid %d): %w", pid, err)
	}
	// The program dies with the thread that forked it: a kill -9 of this process is meant for the cluster.
	runtime.LockOSThread()
	child, err := shim.Join{
		PIDFD: pidfd, Flags: unix.CLONE_NEWUSER | unix.CLONE_NEWNS,
		Paths: program[:1], Args: program, Env: os.Environ(), Cwd: directory,
	}.Start()
	unix.Close(pidfd)
	if err != nil {
		return 1, fmt.Errorf("cannot join the running containers (pid %d): %w", pid, err)
	}
	stop := forwardSignals(child)
	defer stop()
	return shim.WaitCode(child), nil
}
