package cri

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"

	internalapi "k8s.io/cri-api/pkg/apis"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"tuneward.dev/local/internal/shim"
)

// Name is the runtime's name as nodes report it (containerRuntimeVersion).
const Name = "tuneward"

var (
	_ internalapi.RuntimeService      = (*Runtime)(nil)
	_ internalapi.ImageManagerService = (*Runtime)(nil)
)

// Runtime runs pods as processes. It keeps what it must know in Config.StateDir, one directory for each
// sandbox and container, and a copy in memory. Its methods are safe for concurrent use.
type Runtime struct {
	cfg       Config
	addresses *addressPool
	images    *imageList
	streams   *streams

	mu         sync.Mutex
	sandboxes  map[string]*sandboxRecord
	containers map[string]*container
}

// New opens the state directory, adopts the containers that still run, and starts the streaming server.
func New(cfg Config) (*Runtime, error) {
	addresses, err := newAddressPool(cfg.PodCIDR)
	if err != nil {
		return nil, err
	}
	r := &Runtime{
		cfg:        cfg,
		addresses:  addresses,
		images:     newImageList(),
		sandboxes:  map[string]*sandboxRecord{},
		containers: map[string]*container{},
	}
	if err := errors.Join(makeDir(r.sandboxDir("")), makeDir(r.containerDir(""))); err != nil {
		return nil, err
	}
	if err := r.loadSandboxes(); err != nil {
		return nil, err
	}
	if err := r.loadContainers(); err != nil {
		return nil, err
	}
	if r.streams, err = startStreams(r); err != nil {
		return nil, err
	}
	return r, nil
}

func (r *Runtime) sandboxDir(id string) string   { return filepath.Join(r.cfg.StateDir, "sandboxes", id) }
func (r *Runtime) containerDir(id string) string { return containerDir(r.cfg.StateDir, id) }

func containerDir(stateDir, id string) string { return filepath.Join(stateDir, "containers", id) }

func (r *Runtime) loadSandboxes() error {
	return eachRecord(r.sandboxDir(""), func(dir string) error {
		record := &sandboxRecord{}
		if err := shim.ReadJSON(filepath.Join(dir, recordFile), record); err != nil {
			return err
		}
		r.sandboxes[record.ID] = record
		if record.IP != "" && !record.Stopped {
			r.addresses.reserve(record.IP)
		}
		return nil
	})
}

func (r *Runtime) loadContainers() error {
	return eachRecord(r.containerDir(""), func(dir string) error {
		record := containerRecord{}
		if err := shim.ReadJSON(filepath.Join(dir, recordFile), &record); err != nil {
			return err
		}
		c := newContainer(record, dir)
		r.containers[c.ID] = c
		r.images.add(c.Image)
		running := shim.Running{}
		err := shim.ReadJSON(filepath.Join(dir, shim.RunFile), &running)
		_, exitErr := os.Stat(filepath.Join(dir, shim.ExitFile))
		switch {
		case exitErr == nil || (err == nil && !running.Shim.Alive()):
			c.running, c.started = running, true
			c.finish()
		case err == nil:
			r.cfg.Logf("adopted container %s (%s), process %d", c.Name, c.ID[:12], running.Init.PID)
			c.follow(running, nil)
		}
		return nil
	})
}

// eachRecord visits the directories of a kind. One without a record was being made or removed when the
// program was killed; nothing runs in it, and it is swept away.
func eachRecord(parent string, visit func(dir string) error) error {
	entries, err := os.ReadDir(parent)
	if err != nil {
		return err
	}
	for _, entry := range entries {
		dir := filepath.Join(parent, entry.Name())
		err := visit(dir)
		if errors.Is(err, os.ErrNotExist) {
			err = os.RemoveAll(dir)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// Close ends the streaming server. Containers run on; a New over the same directory adopts them.
func (r *Runtime) Close(context.Context) error { return r.streams.close() }

// Version names the runtime.
func (r *Runtime) Version(context.Context, string) (*runtimeapi.VersionResponse, error) {
	return &runtimeapi.VersionResponse{
		Version: "0.1.0", RuntimeName: Name, RuntimeVersion: "0.1.0", RuntimeApiVersion: "v1",
	}, nil
}

// Status is always ready: there is no daemon and no network plugin to wait for.
func (r *Runtime) Status(context.Context, bool) (*runtimeapi.StatusResponse, error) {
	return &runtimeapi.StatusResponse{Status: &runtimeapi.RuntimeStatus{
		Conditions: []*runtimeapi.RuntimeCondition{
			{Type: runtimeapi.RuntimeReady, Status: true},
			{Type: runtimeapi.NetworkReady, Status: true},
		},
	}}, nil
}

// RuntimeConfig tells the kubelet a cgroup driver, which it asks for although we use none.
func (r *Runtime) RuntimeConfig(context.Context) (*runtimeapi.RuntimeConfigResponse, error) {
	linux := &runtimeapi.LinuxRuntimeConfiguration{CgroupDriver: runtimeapi.CgroupDriver_CGROUPFS}
	return &runtimeapi.RuntimeConfigResponse{Linux: linux}, nil
}

// UpdateRuntimeConfig would tell a pod CIDR of the node; ours comes with Config.
func (r *Runtime) UpdateRuntimeConfig(context.Context, *runtimeapi.RuntimeConfig) error { return nil }

// CheckpointContainer is not supported.
func (r *Runtime) CheckpointContainer(context.Context, *runtimeapi.CheckpointContainerRequest) error {
	return unsupported("checkpoints")
}

// GetContainerEvents is not supported; the kubelet then lists containers once a second.
func (r *Runtime) GetContainerEvents(context.Context, chan *runtimeapi.ContainerEventResponse,
	func(runtimeapi.RuntimeService_GetContainerEventsClient)) error {
	return unsupported("container events")
}

func unsupported(what string) error {
	return fmt.Errorf("the local Kubernetes has no %s", what)
}

func (r *Runtime) sandbox(id string) (*sandboxRecord, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if s, ok := r.sandboxes[id]; ok {
		return s, nil
	}
	return nil, notFound("pod sandbox", id)
}

func (r *Runtime) container(id string) (*container, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if c, ok := r.containers[id]; ok {
		return c, nil
	}
	return nil, notFound("container", id)
}
