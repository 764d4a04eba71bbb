package cri

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"time"

	utilexec "k8s.io/utils/exec"

	"tuneward.dev/local/internal/shim"
)

// leftoverTime is how long output is still read after a command ended: one that left a background process
// behind would keep its pipes open for ever.
const leftoverTime = 2 * time.Second

// ExecSync runs a command in a container and returns its output: probes and lifecycle hooks. A command that
// fails is a utilexec.ExitError, by which the kubelet tells it from a broken runtime.
func (r *Runtime) ExecSync(ctx context.Context, id string, args []string, timeout time.Duration) (stdout, stderr []byte, err error) {
	if timeout > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, timeout)
		defer cancel()
	}
	command, err := r.execCommand(ctx, id, args, false)
	if err != nil {
		return nil, nil, err
	}
	var out, errOut bytes.Buffer
	command.Stdout, command.Stderr = &out, &errOut
	err = exitError(runCommand(command))
	if errors.Is(ctx.Err(), context.DeadlineExceeded) {
		fmt.Fprintf(&errOut, "command %q timed out after %s", args, timeout)
		err = utilexec.CodeExitError{Err: ctx.Err(), Code: shim.LostCode}
	}
	return out.Bytes(), errOut.Bytes(), err
}

// execCommand prepares `tuneward-shim exec`, which joins the container's namespaces. Where ctx ends first it is
// not killed but told, by the end of its request: only it can collect the command it kills, and a container
// cannot end before every process in it is collected.
func (r *Runtime) execCommand(ctx context.Context, id string, args []string, terminal bool) (*exec.Cmd, error) {
	c, err := r.container(id)
	if err != nil {
		return nil, err
	}
	if len(args) == 0 {
		return nil, errors.New("exec: no command")
	}
	init, err := c.process()
	if err != nil {
		return nil, err
	}
	spec := &shim.Spec{}
	if err := shim.ReadJSON(filepath.Join(c.dir, shim.SpecFile), spec); err != nil {
		return nil, err
	}
	request, hold, err := requestPipe(shim.ExecRequest{
		Init: init, Args: args, Env: spec.Env, Cwd: spec.Cwd,
		User: spec.User != nil, NoNewPrivs: spec.NoNewPrivs, Terminal: terminal,
		Directory: c.dir, Notify: spec.Notify,
	})
	if err != nil {
		return nil, err
	}
	command := exec.CommandContext(ctx, r.cfg.ShimPath, "exec")
	command.Dir, command.Env = "/", shimEnvironment(spec.Notify)
	command.ExtraFiles = []*os.File{request}
	command.Cancel = hold.Close
	command.WaitDelay = leftoverTime
	command.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	return command, nil
}

// requestPipe holds the request, and stays open after it. A pipe takes 64 KiB before it blocks and an
// environment may be larger, so it is written in the background; a reader that dies ends that with EPIPE.
func requestPipe(request shim.ExecRequest) (reader, writer *os.File, err error) {
	reader, writer, err = os.Pipe()
	if err != nil {
		return nil, nil, err
	}
	go func() { _ = json.NewEncoder(writer).Encode(request) }()
	return reader, writer, nil
}

// runCommand starts a prepared command, closes our copies of what it was given, and waits for it.
func runCommand(command *exec.Cmd, given ...*os.File) error {
	defer func() { _ = command.Cancel() }()
	err := command.Start()
	for _, file := range append(given, command.ExtraFiles...) {
		file.Close()
	}
	if err != nil {
		return err
	}
	return command.Wait()
}

// exitError translates the end of `tuneward-shim exec`.
func exitError(err error) error {
	var exit *exec.ExitError
	switch {
	case errors.As(err, &exit):
		return utilexec.CodeExitError{Err: err, Code: exit.ExitCode()}
	case errors.Is(err, exec.ErrWaitDelay):
		return nil // it ended well, and left a background process
	default:
		return err
	}
}

// streamCommand runs a command with a client's streams. The client's input may never end, so its copy is
// not waited for.
func streamCommand(command *exec.Cmd, in io.Reader, out, errOut io.Writer) error {
	if out != nil {
		command.Stdout = out
	}
	if errOut != nil {
		command.Stderr = errOut
	}
	if in == nil {
		return exitError(runCommand(command))
	}
	stdin, stdinW, err := os.Pipe()
	if err != nil {
		return err
	}
	command.Stdin = stdin
	go func() {
		defer stdinW.Close()
		_, _ = io.Copy(stdinW, in)
	}()
	// Closed after the end: a command that does not read must not block the copy for ever.
	defer stdin.Close()
	return exitError(runCommand(command))
}
