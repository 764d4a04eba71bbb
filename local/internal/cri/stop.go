package cri

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"tuneward.dev/local/internal/shim"
)

// killTime is how long a killed container may take to be gone. Only a process in an uninterruptible
// system call (a dead network filesystem) takes longer.
const killTime = 10 * time.Second

// StopContainer ends a container: its stop signal, timeout seconds of grace, SIGKILL. As in every container
// the first process has no default handlers, so a program without one ignores SIGTERM.
func (r *Runtime) StopContainer(ctx context.Context, id string, timeout int64) error {
	c, err := r.container(id)
	if err != nil {
		return nil
	}
	return r.stop(ctx, c, time.Duration(timeout)*time.Second)
}

func (r *Runtime) stop(ctx context.Context, c *container, grace time.Duration) error {
	init, err := c.process()
	if err != nil {
		return nil // it does not run
	}
	if grace > 0 && init.Signal(stopSignal(c.StopSignal)) == nil {
		if waitFor(ctx, c.ended, grace) {
			return nil
		}
		if err := ctx.Err(); err != nil {
			return err
		}
	}
	// Killing the first process makes the kernel kill its whole PID namespace.
	if init.Signal(unix.SIGKILL) == nil && waitFor(ctx, c.ended, killTime) {
		return nil
	}
	// The first process is gone and its shim is not, or there never was one.
	_ = c.shim().Signal(unix.SIGKILL)
	if !waitFor(ctx, c.ended, killTime) {
		return fmt.Errorf("container %s does not end after SIGKILL (process %d)", c.Name, init.PID)
	}
	return nil
}

func waitFor(ctx context.Context, done <-chan struct{}, most time.Duration) bool {
	timer := time.NewTimer(most)
	defer timer.Stop()
	select {
	case <-done:
		return true
	case <-timer.C:
	case <-ctx.Done():
	}
	return false
}

// stopSignal translates the API's number of a signal, which is its own and not the kernel's.
func stopSignal(signal int) unix.Signal {
	if signal != 0 {
		if number := unix.SignalNum(runtimeapi.Signal(signal).String()); number != 0 {
			return number
		}
	}
	return unix.SIGTERM
}

// LiveShims lists the shims of a state directory that still run. Their mount and user namespaces are the
// program's: by joining them, a restarted program sees what its kubelet mounted before.
func LiveShims(stateDir string) ([]int, error) {
	var pids []int
	err := eachRunning(stateDir, func(_ string, running shim.Running) {
		if running.Shim.Alive() {
			pids = append(pids, running.Shim.PID)
		}
	})
	return pids, err
}

// Clean ends every container of a state directory and removes its state. It needs no Runtime and no
// membership in the namespaces, only the right to send the processes signals.
func Clean(ctx context.Context, stateDir string, grace time.Duration) error {
	var running []shim.Running
	err := eachRunning(stateDir, func(_ string, found shim.Running) { running = append(running, found) })
	if err != nil {
		return err
	}
	for _, r := range running {
		_ = r.Init.Signal(unix.SIGTERM)
	}
	limit, cancel := context.WithTimeout(ctx, grace)
	defer cancel()
	allGone := make(chan struct{})
	go func() {
		for _, r := range running {
			r.Shim.Wait()
		}
		close(allGone)
	}()
	select {
	case <-allGone:
	case <-limit.Done():
		killAll(running)
		if !waitFor(ctx, allGone, killTime) {
			return fmt.Errorf("containers of %s do not end after SIGKILL", stateDir)
		}
	}
	return os.RemoveAll(stateDir)
}

func killAll(running []shim.Running) {
	for _, r := range running {
		_ = r.Init.Signal(unix.SIGKILL)
		// A shim without a first process (it was starting) has nothing to record.
		if r.Init.PID == 0 {
			_ = r.Shim.Signal(unix.SIGKILL)
		}
	}
}

// eachRunning visits the containers that were ever started.
func eachRunning(stateDir string, visit func(dir string, running shim.Running)) error {
	directories, err := filepath.Glob(filepath.Join(containerDir(stateDir, "*"), shim.RunFile))
	if err != nil {
		return err
	}
	for _, file := range directories {
		running := shim.Running{}
		if err := shim.ReadJSON(file, &running); err != nil {
			if os.IsNotExist(err) {
				continue
			}
			return err
		}
		visit(filepath.Dir(file), running)
	}
	return nil
}
