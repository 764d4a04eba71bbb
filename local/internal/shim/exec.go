package shim

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"

	"golang.org/x/sys/unix"
)

// requestFD is where `tuneward-shim exec` reads its request: an environment may be larger than an
// argument is allowed to be. The pipe stays open as long as the command is wanted.
const requestFD = 3

// NotFoundCode is what a shell exits with when there is no such command.
const NotFoundCode = 127

// ExecRequest asks to run a command inside a running container.
type ExecRequest struct {
	Init       Process  `json:"init"` // the container's first process
	Args       []string `json:"args"`
	Env        []string `json:"env"`
	Cwd        string   `json:"cwd"`
	User       bool     `json:"user"` // the container has a user namespace of its own
	NoNewPrivs bool     `json:"noNewPrivs"`
	Terminal   bool     `json:"terminal"`
	// Directory is the container's; its spec says the rest about one without namespaces.
	Directory string `json:"directory"`
	Notify    bool   `json:"notify"`
}

// Exec runs a command in a container with the caller's descriptors 0 to 2 and returns its exit code. The
// caller must be on the main thread, locked to it, as for Run.
func Exec() int {
	unix.CloseOnExec(requestFD)
	source := os.NewFile(requestFD, "request")
	request := &ExecRequest{}
	if err := json.NewDecoder(source).Decode(request); err != nil {
		fmt.Fprintln(os.Stderr, "reading the request:", err)
		return NotFoundCode
	}
	if request.Notify {
		return execNotify(request, source)
	}
	pid, err := startIn(request)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return NotFoundCode
	}
	go killAtEnd(source, pid)
	return WaitCode(pid)
}

// killAtEnd ends the command when the runtime closes the request, or dies. The runtime does not kill us
// instead: the command would become a child of the machine's init, which in many containers collects nothing,
// and the kernel ends a PID namespace only when all its processes are collected.
func killAtEnd(request *os.File, pid int) {
	pidfd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return // it has ended
	}
	_, _ = io.Copy(io.Discard, request)
	_ = unix.PidfdSendSignal(pidfd, unix.SIGKILL, nil, 0)
}

func startIn(request *ExecRequest) (int, error) {
	pidfd, err := request.Init.Open()
	if errors.Is(err, ErrGone) {
		return 0, errors.New("the container is not running")
	}
	if err != nil {
		return 0, err
	}
	defer unix.Close(pidfd)
	flags := unix.CLONE_NEWNS | unix.CLONE_NEWPID | unix.CLONE_NEWUTS | unix.CLONE_NEWIPC
	if request.User {
		flags |= unix.CLONE_NEWUSER
	}
	if request.Terminal {
		signal.Ignore(syscall.SIGHUP)
	}
	pid, err := Join{
		PIDFD: pidfd, Flags: flags,
		Paths: candidates(request.Args[0], request.Env, request.Cwd),
		Args:  request.Args, Env: request.Env, Cwd: request.Cwd,
		Terminal: request.Terminal, NoNewPrivs: request.NoNewPrivs,
	}.Start()
	if errors.Is(err, unix.ENOENT) {
		return 0, fmt.Errorf("exec: %q: executable file not found in the container", request.Args[0])
	}
	return pid, err
}

// WaitCode waits for a child and gives its exit code as a shell would: 128 and the signal that ended it.
func WaitCode(pid int) int {
	var status unix.WaitStatus
	for {
		_, err := unix.Wait4(pid, &status, 0, nil)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, "wait:", err)
			return NotFoundCode
		}
		if status.Signaled() {
			return 128 + int(status.Signal())
		}
		return status.ExitStatus()
	}
}
