// Package shim runs one container: it is the parent of the container's first process, outlives the
// program that started it, and is the only writer of the container's log and exit record.
//
// Runtime (internal/cri) and shim talk through files in the container's directory, not through a socket:
// a program that is killed and started again finds everything it has to know there, and a directory may
// lie deeper than the 108 bytes of an AF_UNIX path. The package imports the standard library and
// golang.org/x/sys only; its binary is started twice for each container and has to be small.
package shim

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
)

// Files of a container's directory. The runtime writes the first, the shim the others.
const (
	SpecFile = "spec.json"
	RunFile  = "run.json"
	ExitFile = "exit.json"
	// MessagesFile holds what the shim itself says; it is empty unless something is wrong with it.
	MessagesFile = "shim.log"
)

// StartErrorCode is the exit code of a container whose command was never executed. It is runc's, and
// what people find when they search for it.
const StartErrorCode = 128

// LostCode is the exit code of a container that ended with its shim, as if it had been killed.
const LostCode = 137

// Spec is everything the shim has to know to run a container.
type Spec struct {
	ID string `json:"id"`
	// Root is the directory that holds the container's filesystem; "/" is the machine's own.
	Root     string   `json:"root"`
	Args     []string `json:"args"`
	Env      []string `json:"env"`
	Cwd      string   `json:"cwd"`
	Hostname string   `json:"hostname"`
	Mounts   []Mount  `json:"mounts"`
	// User is nil where the container runs as the caller, without a user namespace of its own.
	User         *User `json:"user,omitempty"`
	ReadOnlyRoot bool  `json:"readOnlyRoot,omitempty"`
	Privileged   bool  `json:"privileged,omitempty"`
	NoNewPrivs   bool  `json:"noNewPrivs,omitempty"`
	// Notify runs the container without namespaces; see notify.go.
	Notify  bool   `json:"notify,omitempty"`
	LogPath string `json:"logPath"`
}

// Mount places a file or directory of the machine into the container.
type Mount struct {
	Source            string `json:"source"`
	Target            string `json:"target"`
	ReadOnly          bool   `json:"readOnly,omitempty"`
	RecursiveReadOnly bool   `json:"recursiveReadOnly,omitempty"`
}

// User is who the container believes to be. On the machine it is always the caller.
type User struct {
	UID uint32 `json:"uid"`
	GID uint32 `json:"gid"`
	// Groups are supplementary groups that exist in the container under their own number. Only real root
	// may map them; elsewhere the list is empty.
	Groups []uint32 `json:"groups,omitempty"`
}

// Running says which processes a started container has. Init is zero until the command was executed.
type Running struct {
	Shim      Process `json:"shim"`
	Init      Process `json:"init"`
	StartedAt int64   `json:"startedAt"` // nanoseconds since 1970
}

// Exit says how a container ended.
type Exit struct {
	Code       int32  `json:"code"`
	FinishedAt int64  `json:"finishedAt"` // nanoseconds since 1970
	Reason     string `json:"reason,omitempty"`
	Message    string `json:"message,omitempty"`
}

// StartResult is the one line the shim writes to descriptor 3 when the command runs, or cannot.
type StartResult struct {
	Error string `json:"error,omitempty"`
}

// ReadJSON reads a record of a container's directory.
func ReadJSON(path string, into any) error {
	data, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	if err := json.Unmarshal(data, into); err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	return nil
}

// WriteJSON replaces a record in one step, so that a reader after a kill finds the old or the new one.
func WriteJSON(path string, value any) error {
	data, err := json.Marshal(value)
	if err != nil {
		return err
	}
	temporary := filepath.Join(filepath.Dir(path), "."+filepath.Base(path)+".new")
	if err := os.WriteFile(temporary, data, 0o600); err != nil {
		return err
	}
	return os.Rename(temporary, path)
}
