// Package enter puts a program into the namespaces of a cluster: new ones, or those of a live shim, so that
// a restarted cluster sees the mounts its running containers were given.
//
// It is the shim's command (`tuneward-shim enter`), not the cluster's: in a user namespace the process that
// makes it has to stay as a parent, and the shim is 3 MB where the cluster is a hundred.
package enter

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"runtime"
	"strconv"
	"syscall"

	"golang.org/x/sys/unix"
)

// Args are the shim's arguments that run program in the namespaces of way ("root" or "userns");
// join is the pid of a live shim, or 0 for new namespaces.
func Args(way string, join int, program string, args ...string) []string {
	return append([]string{"enter", way, strconv.Itoa(join), program}, args...)
}

// Main runs what Args described and ends with the program's exit code.
func Main(args []string) {
	code, err := run(args)
	if err != nil {
		fmt.Fprintln(os.Stderr, "tuneward-shim enter:", err)
	}
	os.Exit(code)
}

func run(args []string) (int, error) {
	if len(args) < 3 {
		return 2, errors.New("usage: enter root|userns PID PROGRAM ARGS; it is called by tuneward-local")
	}
	join, err := strconv.Atoi(args[1])
	if err != nil {
		return 2, err
	}
	switch program := args[2:]; {
	case args[0] == "root" && join == 0:
		return 1, newMounts(program)
	case args[0] == "root":
		return 1, joinMounts(join, program)
	case args[0] == "userns" && join == 0:
		return newUser(program)
	case args[0] == "userns":
		return joinUser(join, program)
	}
	return 2, fmt.Errorf("%q is not a way to enter", args[0])
}

// newMounts needs no child: one thread may leave the others' mount namespace, and exec keeps its own.
func newMounts(program []string) error {
	runtime.LockOSThread()
	if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
		return fmt.Errorf("no new mount namespace: %w", err)
	}
	// Slave: the machine's later mounts arrive here, ours stay here.
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_SLAVE, ""); err != nil {
		return fmt.Errorf("mounts cannot be made private: %w", err)
	}
	return unix.Exec(program[0], program, os.Environ())
}

func joinMounts(pid int, program []string) error {
	runtime.LockOSThread()
	directory, err := os.Getwd()
	if err != nil {
		return err
	}
	namespace, err := os.Open(fmt.Sprintf("/proc/%d/ns/mnt", pid))
	if err != nil {
		return err
	}
	// The kernel refuses while threads share their root and working directory.
	if err := unix.Unshare(unix.CLONE_FS); err != nil {
		return err
	}
	if err := unix.Setns(int(namespace.Fd()), unix.CLONE_NEWNS); err != nil {
		return fmt.Errorf("cannot join the mounts of the running containers (pid %d): %w", pid, err)
	}
	if err := unix.Chdir(directory); err != nil {
		return err
	}
	return unix.Exec(program[0], program, os.Environ())
}

// newUser starts the program as uid 0 of a user namespace, with the caller's own uid behind it.
func newUser(program []string) (int, error) {
	command := exec.Command(program[0], program[1:]...)
	command.Stdin, command.Stdout, command.Stderr = os.Stdin, os.Stdout, os.Stderr
	command.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  unix.CLONE_NEWUSER | unix.CLONE_NEWNS,
		UidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getuid(), Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getgid(), Size: 1}},
		// A kill -9 of this process is meant for the cluster.
		Pdeathsig: syscall.SIGKILL,
	}
	// Pdeathsig follows the thread that forked.
	runtime.LockOSThread()
	if err := command.Start(); err != nil {
		return 1, fmt.Errorf("no user namespace: %w", err)
	}
	stop := forwardSignals(command.Process.Pid)
	defer stop()
	return exitCode(command.Wait())
}

func exitCode(err error) (int, error) {
	var exit *exec.ExitError
	if !errors.As(err, &exit) {
		return 0, err
	}
	return statusCode(exit.Sys().(syscall.WaitStatus)), nil
}

func statusCode(status syscall.WaitStatus) int {
	if status.Signaled() {
		return 128 + int(status.Signal())
	}
	return status.ExitStatus()
}

func forwardSignals(pid int) (stop func()) {
	signals := make(chan os.Signal, 8)
	signal.Notify(signals, syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP)
	go func() {
		for received := range signals {
			_ = syscall.Kill(pid, received.(syscall.Signal))
		}
	}()
	return func() { signal.Stop(signals) }
}
