package cri

import (
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"tuneward.dev/local/internal/shim"
)

// sandboxRecord is what is kept of a pod sandbox. There is no process behind it: the name, the address and
// the directory are all a sandbox is here, so it survives anything.
type sandboxRecord struct {
	ID          string            `json:"id"`
	Name        string            `json:"name"`
	Namespace   string            `json:"namespace"`
	UID         string            `json:"uid"`
	Attempt     uint32            `json:"attempt"`
	Labels      map[string]string `json:"labels,omitempty"`
	Annotations map[string]string `json:"annotations,omitempty"`
	Handler     string            `json:"handler,omitempty"`
	Hostname    string            `json:"hostname,omitempty"`
	LogDir      string            `json:"logDir,omitempty"`
	HostNetwork bool              `json:"hostNetwork,omitempty"`
	IP          string            `json:"ip,omitempty"`
	CreatedAt   int64             `json:"createdAt"`
	Stopped     bool              `json:"stopped,omitempty"`
}

// containerRecord is what is kept of a container besides the files of its shim.
type containerRecord struct {
	ID          string            `json:"id"`
	SandboxID   string            `json:"sandboxId"`
	Name        string            `json:"name"`
	Attempt     uint32            `json:"attempt"`
	Image       string            `json:"image"`
	ImageID     string            `json:"imageId"`
	Labels      map[string]string `json:"labels,omitempty"`
	Annotations map[string]string `json:"annotations,omitempty"`
	LogPath     string            `json:"logPath"`
	Mounts      []shim.Mount      `json:"mounts,omitempty"`
	StopSignal  int               `json:"stopSignal"`
	CreatedAt   int64             `json:"createdAt"`
}

const recordFile = "record.json"

// container is a container of a running Runtime.
type container struct {
	containerRecord
	dir string

	mu      sync.Mutex
	running shim.Running
	exit    *shim.Exit
	started bool
	// ended is closed when exit is known.
	ended chan struct{}
}

func newContainer(record containerRecord, dir string) *container {
	return &container{containerRecord: record, dir: dir, ended: make(chan struct{})}
}

func (c *container) state() runtimeapi.ContainerState {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case c.exit != nil:
		return runtimeapi.ContainerState_CONTAINER_EXITED
	case c.started:
		return runtimeapi.ContainerState_CONTAINER_RUNNING
	default:
		return runtimeapi.ContainerState_CONTAINER_CREATED
	}
}

// follow takes over a started shim: it waits for its end in the background, for children and adopted shims
// alike, and costs no thread. reap, if not nil, collects a child's status afterwards.
func (c *container) follow(running shim.Running, reap func()) {
	c.mu.Lock()
	c.running, c.started = running, true
	c.mu.Unlock()
	go func() {
		running.Shim.Wait()
		if reap != nil {
			reap()
		}
		c.finish()
	}()
}

// finish takes the exit record, or makes one for a shim that ended without: it was killed, and its
// container with it.
func (c *container) finish() {
	exit := &shim.Exit{}
	path := filepath.Join(c.dir, shim.ExitFile)
	if err := shim.ReadJSON(path, exit); err != nil {
		c.mu.Lock()
		first := c.running.Init
		c.mu.Unlock()
		shim.EndSession(first)
		*exit = shim.Exit{
			Code: shim.LostCode, FinishedAt: time.Now().UnixNano(),
			Reason: "Error", Message: "the container's shim is gone",
		}
		_ = shim.WriteJSON(path, exit)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.exit == nil {
		c.exit = exit
		close(c.ended)
	}
}

// process gives the container's first process, or an error for a container that does not run.
func (c *container) process() (shim.Process, error) {
	if c.state() != runtimeapi.ContainerState_CONTAINER_RUNNING {
		return shim.Process{}, fmt.Errorf("container %s is not running", c.Name)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.running.Init.PID == 0 {
		// The program was killed while the shim was starting; the shim has gone on since.
		_ = shim.ReadJSON(filepath.Join(c.dir, shim.RunFile), &c.running)
	}
	return c.running.Init, nil
}

// shim gives the parent of the container's first process.
func (c *container) shim() shim.Process {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.running.Shim
}

// newID looks like other runtimes' ids, which tools shorten to 12 or 13 characters.
func newID() string {
	var id [32]byte
	_, _ = rand.Read(id[:]) // never fails since Go 1.24
	return hex.EncodeToString(id[:])
}

// makeDir makes the directory of a new sandbox or container.
func makeDir(path string) error {
	if err := os.MkdirAll(path, 0o700); err != nil {
		return fmt.Errorf("state directory: %w", err)
	}
	return nil
}
