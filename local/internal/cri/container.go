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

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"tuneward.dev/local/internal/shim"
)

// startTime is how long a shim may take to get its command running. It takes 20 ms; minutes mean a mount
// source that hangs (a dead network filesystem).
const startTime = 2 * time.Minute

// CreateContainer writes down what is to run; nothing runs yet.
func (r *Runtime) CreateContainer(_ context.Context, sandboxID string, config *runtimeapi.ContainerConfig,
	_ *runtimeapi.PodSandboxConfig) (string, error) {
	s, err := r.sandbox(sandboxID)
	if err != nil {
		return "", err
	}
	id := newID()
	spec, err := r.containerSpec(id, config, s)
	if err != nil {
		return "", err
	}
	if err := r.nameHosts(s, spec.Mounts); err != nil {
		return "", err
	}
	record := newRecord(spec, config, sandboxID)
	dir := r.containerDir(id)
	err = makeDir(dir)
	for file, value := range map[string]any{shim.SpecFile: spec, recordFile: record} {
		err = errors.Join(err, shim.WriteJSON(filepath.Join(dir, file), value))
	}
	if err != nil {
		return "", errors.Join(err, os.RemoveAll(dir))
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.containers[id] = newContainer(record, dir)
	return id, nil
}

func newRecord(spec *shim.Spec, config *runtimeapi.ContainerConfig, sandboxID string) containerRecord {
	meta := config.GetMetadata()
	return containerRecord{
		ID: spec.ID, SandboxID: sandboxID, Name: meta.GetName(), Attempt: meta.GetAttempt(),
		Image: imageName(config), ImageID: imageID(imageName(config)),
		Labels: config.GetLabels(), Annotations: config.GetAnnotations(),
		LogPath: spec.LogPath, Mounts: spec.Mounts,
		StopSignal: int(config.GetStopSignal()), CreatedAt: time.Now().UnixNano(),
	}
}

// nameHosts lets the program add the cluster's names to the hosts file the kubelet made for the pod.
func (r *Runtime) nameHosts(s *sandboxRecord, mounts []shim.Mount) error {
	if r.cfg.HostsFile == nil {
		return nil
	}
	for _, m := range mounts {
		if m.Target == "/etc/hosts" {
			return r.cfg.HostsFile(s.Namespace, s.Name, s.UID, m.Source)
		}
	}
	return nil
}

// StartContainer starts the shim, in a session of its own so that neither a terminal's signals nor our end
// reach it, and returns when the command runs.
func (r *Runtime) StartContainer(ctx context.Context, id string) error {
	c, err := r.container(id)
	if err != nil {
		return err
	}
	if state := c.state(); state != runtimeapi.ContainerState_CONTAINER_CREATED {
		return fmt.Errorf("container %s is %s, it cannot be started", c.Name, state)
	}
	command, status, err := r.startShim(c)
	if err != nil {
		return err
	}
	defer status.Close()
	reap := func() { _ = command.Wait() }
	if err := awaitStart(ctx, status); err != nil {
		// The shim has ended, or hangs: either way nothing of it may stay.
		_ = command.Process.Kill()
		reap()
		c.finish()
		return fmt.Errorf("%w%s", err, messages(c.dir))
	}
	running := shim.Running{}
	if err := shim.ReadJSON(filepath.Join(c.dir, shim.RunFile), &running); err != nil {
		return err
	}
	c.follow(running, reap)
	return nil
}

func (r *Runtime) startShim(c *container) (*exec.Cmd, *os.File, error) {
	status, statusW, err := os.Pipe()
	if err != nil {
		return nil, nil, err
	}
	defer statusW.Close()
	log, err := os.OpenFile(filepath.Join(c.dir, shim.MessagesFile), os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		status.Close()
		return nil, nil, err
	}
	defer log.Close()
	command := &exec.Cmd{
		Path: r.cfg.ShimPath, Args: []string{"tuneward-shim", "run", c.dir},
		Dir: "/", Env: shimEnvironment(r.cfg.Way == WayNotify), Stdout: log, Stderr: log,
		ExtraFiles:  []*os.File{statusW},
		SysProcAttr: &syscall.SysProcAttr{Setsid: true},
	}
	if err := command.Start(); err != nil {
		status.Close()
		return nil, nil, fmt.Errorf("starting the shim: %w", err)
	}
	return command, status, nil
}

// shimEnvironment keeps a shim small. Without namespaces it answers every call that takes a path, and threads
// that wait in the kernel must not hold the others up.
func shimEnvironment(notify bool) []string {
	if notify {
		return []string{"GOMAXPROCS=4"}
	}
	return []string{"GOMAXPROCS=2"}
}

// awaitStart reads the shim's one line.
func awaitStart(ctx context.Context, status *os.File) error {
	deadline := time.Now().Add(startTime)
	if d, ok := ctx.Deadline(); ok && d.Before(deadline) {
		deadline = d
	}
	_ = status.SetReadDeadline(deadline)
	result := shim.StartResult{}
	err := json.NewDecoder(status).Decode(&result)
	switch {
	case errors.Is(err, os.ErrDeadlineExceeded):
		return errors.New("the container did not start in time: does a volume's filesystem hang?")
	case errors.Is(err, io.EOF):
		return errors.New("the container's shim ended without a word")
	case err != nil:
		return err
	case result.Error != "":
		return errors.New(result.Error)
	}
	return nil
}

// messages is what the shim itself had to say, normally nothing.
func messages(dir string) string {
	text, err := os.ReadFile(filepath.Join(dir, shim.MessagesFile))
	if err != nil || len(text) == 0 {
		return ""
	}
	const most = 1000
	return ": " + string(bytes.TrimSpace(text[:min(len(text), most)]))
}

// RemoveContainer kills a container that still runs, and forgets it. Its log stays: the kubelet removes it.
func (r *Runtime) RemoveContainer(ctx context.Context, id string) error {
	c, err := r.container(id)
	if err != nil {
		return nil
	}
	if err := r.stop(ctx, c, 0); err != nil {
		return err
	}
	// The record first: a directory without one is swept away by the next New.
	if err := os.Remove(filepath.Join(c.dir, recordFile)); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	if err := os.RemoveAll(c.dir); err != nil {
		return err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.containers, id)
	return nil
}

// UpdateContainerResources is a no-op: there are no cgroups.
func (r *Runtime) UpdateContainerResources(context.Context, string, *runtimeapi.ContainerResources) error {
	return nil
}

// ReopenContainerLog is called after the kubelet renamed a log that grew large.
func (r *Runtime) ReopenContainerLog(_ context.Context, id string) error {
	c, err := r.container(id)
	if err != nil {
		return err
	}
	if _, err := c.process(); err != nil {
		return err
	}
	return c.shim().Signal(syscall.SIGUSR1)
}
