package shim

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// drainTime bounds the wait for a stream's end after the first process ended. The kernel has killed the
// container's PID namespace by then, so only a descriptor passed to the outside can keep a stream open.
const drainTime = 2 * time.Second

// statusFD is where the runtime waits for the StartResult.
const statusFD = 3

// Run is the life of the shim of the container in directory; it returns when the container ended. The
// caller must be on the main thread, locked to it: the container's first process gets SIGKILL when the
// *thread* that made it ends (PR_SET_PDEATHSIG), which must be when the shim ends and no earlier.
func Run(directory string) error {
	status := os.NewFile(statusFD, "status")
	unix.CloseOnExec(statusFD)
	// The runtime may die while we start: a SIGPIPE on its pipe must not take the container along.
	signal.Ignore(syscall.SIGHUP, syscall.SIGINT, syscall.SIGTERM, syscall.SIGPIPE)

	spec := &Spec{}
	if err := ReadJSON(filepath.Join(directory, SpecFile), spec); err != nil {
		return report(status, directory, err)
	}
	c, err := start(directory, spec)
	if err != nil {
		return report(status, directory, err)
	}
	_ = json.NewEncoder(status).Encode(StartResult{})
	status.Close()
	return c.wait(directory)
}

// report tells the runtime, and whoever reads the directory later, that the command never ran.
func report(status io.WriteCloser, directory string, failure error) error {
	exit := Exit{Code: StartErrorCode, FinishedAt: time.Now().UnixNano(), Reason: "StartError", Message: failure.Error()}
	err := WriteJSON(filepath.Join(directory, ExitFile), exit)
	_ = json.NewEncoder(status).Encode(StartResult{Error: failure.Error()})
	status.Close()
	return err
}

// container is a started container, as its shim sees it.
type container struct {
	command *exec.Cmd
	log     *logFile
	streams sync.WaitGroup
	// notify is set for a container without namespaces, terminal for a command on one (exec only).
	notify, terminal bool
}

// waitAll returns when the first process and all its descendants have ended. A PID namespace sees to the
// descendants itself.
func (c *container) waitAll() {
	if c.notify {
		c.waitDescendants()
	}
	_ = c.command.Wait()
}

func start(directory string, spec *Spec) (*container, error) {
	log, err := openLog(spec.LogPath)
	if err != nil {
		return nil, fmt.Errorf("log: %w", err)
	}
	reopenOnSignal(log)
	// Written before the container exists: a program killed between the two still finds the shim.
	if err := writeRun(directory, 0); err != nil {
		return nil, err
	}
	c := &container{log: log, notify: spec.Notify}
	if err := c.launch(directory, spec); err != nil {
		return nil, err
	}
	if err := writeRun(directory, c.command.Process.Pid); err != nil {
		_ = c.command.Process.Kill()
		return nil, err
	}
	return c, nil
}

// writeRun writes the file that tells a later runtime which processes are ours.
func writeRun(directory string, initPID int) error {
	shim, err := Identify(os.Getpid())
	if err != nil {
		return err
	}
	run := Running{Shim: shim}
	if initPID != 0 {
		run.StartedAt = time.Now().UnixNano()
		// A command may end at once; then there is nobody left to signal.
		run.Init, _ = Identify(initPID)
	}
	return WriteJSON(filepath.Join(directory, RunFile), run)
}

func reopenOnSignal(log *logFile) {
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGUSR1)
	go func() {
		for range signals {
			if err := log.reopen(); err != nil {
				fmt.Fprintln(os.Stderr, "reopening the log:", err)
			}
		}
	}()
}

// launch starts the container's first process with its streams in the log, and returns when it has become
// the command.
func (c *container) launch(directory string, spec *Spec) error {
	stdout, stdoutW, err := os.Pipe()
	if err != nil {
		return err
	}
	stderr, stderrW, err := os.Pipe()
	if err != nil {
		return err
	}
	failure, err := c.spawn(directory, filepath.Join(directory, skeletonDir), spec, [3]*os.File{nil, stdoutW, stderrW})
	stdoutW.Close()
	stderrW.Close()
	if err != nil {
		return err
	}
	c.copyStreams(stdout, stderr)
	return c.awaitExec(failure)
}

// spawn starts `tuneward-shim init` for the spec in directory, in new namespaces or under the filter. What
// can be read from the returned pipe is why it failed.
func (c *container) spawn(directory, skeleton string, spec *Spec, streams [3]*os.File) (*os.File, error) {
	failure, failureW, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer failureW.Close()
	c.command = &exec.Cmd{
		Path:        "/proc/self/exe", // not os.Executable: a rebuild may have replaced the file
		Args:        []string{"tuneward-shim", "init", directory},
		Env:         []string{},
		ExtraFiles:  []*os.File{failureW},
		SysProcAttr: attributes(spec),
	}
	c.command.SysProcAttr.Setctty = c.terminal
	c.setStreams(streams)
	if spec.Notify {
		err = c.startNotify(spec, skeleton)
	} else {
		err = c.command.Start()
	}
	if err != nil {
		failure.Close()
		return nil, fmt.Errorf("creating the container: %w", err)
	}
	return failure, nil
}

// setStreams leaves nil files out: a nil *os.File would not be a nil io.Reader.
func (c *container) setStreams(streams [3]*os.File) {
	if streams[0] != nil {
		c.command.Stdin = streams[0]
	}
	if streams[1] != nil {
		c.command.Stdout = streams[1]
	}
	if streams[2] != nil {
		c.command.Stderr = streams[2]
	}
}

func (c *container) copyStreams(stdout, stderr *os.File) {
	for stream, file := range map[string]*os.File{"stdout": stdout, "stderr": stderr} {
		c.streams.Add(1)
		go func() {
			defer c.streams.Done()
			c.log.copyFrom(stream, file)
		}()
	}
}

// awaitExec reads the pipe that execve closes. What comes through it is why there was no execve.
func (c *container) awaitExec(failure *os.File) error {
	defer failure.Close()
	message, err := io.ReadAll(failure)
	if err != nil {
		return err
	}
	if len(message) == 0 {
		return nil
	}
	_ = c.command.Wait()
	return errors.New(string(bytes.TrimSpace(message)))
}

// attributes are the namespaces of a container. Without a User the first process keeps the caller's
// identity; with one, a user namespace maps that uid to the caller. setuid would be wrong twice: in a user
// namespace the number is unmapped (EINVAL), and as real root it would lose what the caller can read.
func attributes(spec *Spec) *syscall.SysProcAttr {
	attr := &syscall.SysProcAttr{
		Cloneflags: unix.CLONE_NEWNS | unix.CLONE_NEWPID | unix.CLONE_NEWUTS | unix.CLONE_NEWIPC,
		Pdeathsig:  syscall.SIGKILL,
		// A command that signals its process group (kill 0) must not meet its shim there.
		Setsid: true,
	}
	if spec.Notify {
		attr.Cloneflags = 0
		return attr
	}
	if spec.User == nil {
		return attr
	}
	attr.Cloneflags |= unix.CLONE_NEWUSER
	attr.UidMappings, attr.GidMappings = mappings(spec.User, os.Getuid(), os.Getgid())
	attr.GidMappingsEnableSetgroups = len(spec.User.Groups) > 0
	// execve drops every capability of a uid other than 0, except ambient ones; init needs these to build
	// the root and gives them up before it executes the command.
	attr.AmbientCaps = []uintptr{unix.CAP_SYS_ADMIN, unix.CAP_SYS_CHROOT, unix.CAP_DAC_OVERRIDE, unix.CAP_SETGID}
	return attr
}

// mappings lets the container's uid and gid stand for the caller's, and each supplementary group for itself.
func mappings(user *User, uid, gid int) (uids, gids []syscall.SysProcIDMap) {
	uids = []syscall.SysProcIDMap{{ContainerID: int(user.UID), HostID: uid, Size: 1}}
	gids = []syscall.SysProcIDMap{{ContainerID: int(user.GID), HostID: gid, Size: 1}}
	for _, group := range user.Groups {
		if int(group) != gid && group != user.GID {
			gids = append(gids, syscall.SysProcIDMap{ContainerID: int(group), HostID: int(group), Size: 1})
		}
	}
	return uids, gids
}

// wait records how the container ended, after its last line is in the log: who sees the exit record may
// read the log at once.
func (c *container) wait(directory string) error {
	c.waitAll()
	finished := time.Now()
	drained := make(chan struct{})
	go func() {
		c.streams.Wait()
		close(drained)
	}()
	select {
	case <-drained:
	case <-time.After(drainTime):
	}
	exit := Exit{Code: exitCode(c.command.ProcessState), FinishedAt: finished.UnixNano(), Reason: "Completed"}
	if exit.Code != 0 {
		exit.Reason = "Error"
	}
	return WriteJSON(filepath.Join(directory, ExitFile), exit)
}

func exitCode(state *os.ProcessState) int32 {
	status, ok := state.Sys().(syscall.WaitStatus)
	if ok && status.Signaled() {
		return int32(128 + status.Signal())
	}
	return int32(state.ExitCode())
}
