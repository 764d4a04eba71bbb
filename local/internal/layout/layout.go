// Package layout says where a cluster keeps what in its data directory, and which ports and loopback
// networks it uses. Everything that outlives a start is here, so that a restart finds its addresses again.
package layout

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"syscall"
	"time"
)

// Version is the Kubernetes release in the program; build.sh stamps the same into component-base.
const Version = "v1.36.3"

// Dir is a data directory; its methods are the paths in it.
type Dir string

// Open makes the directory (0700: it holds the cluster's keys) and returns its absolute path.
func Open(path string) (Dir, error) {
	abs, err := filepath.Abs(path)
	if err != nil {
		return "", err
	}
	if err := os.MkdirAll(abs, 0o700); err != nil {
		return "", fmt.Errorf("cannot make the data directory %s (%w); choose another with --data", abs, err)
	}
	// Links resolved: the kubelet compares mount points with the paths it made.
	real, err := filepath.EvalSymlinks(abs)
	return Dir(real), err
}

// maxNodePath keeps the kubelet's socket DIR/kubelet/pod-resources/<10 digits> within the 107 bytes that
// the kernel allows; the kubelet ends the process where it does not fit.
const maxNodePath = 107 - len("/kubelet/pod-resources/0123456789")

// CheckNodePath refuses a directory that lies too deep for a node.
func (d Dir) CheckNodePath() error {
	if len(d) > maxNodePath {
		return fmt.Errorf("the data directory's path has %d bytes and sockets in it allow %d: %s; choose a shorter one with --data", len(d), maxNodePath, d)
	}
	return nil
}

func (d Dir) join(elem ...string) string {
	return filepath.Join(append([]string{string(d)}, elem...)...)
}

func (d Dir) Kubeconfig() string { return d.join("kubeconfig") }
func (d Dir) Ready() string      { return d.join("ready") }
func (d Dir) Log() string        { return d.join("local.log") }
func (d Dir) Etcd() string       { return d.join("etcd") }
func (d Dir) PKI() string        { return d.join("pki") }
func (d Dir) Kubelet() string    { return d.join("kubelet") }
func (d Dir) PodLogs() string    { return d.join("pod-logs") }
func (d Dir) Runtime() string    { return d.join("run") }
func (d Dir) Volumes() string    { return d.join("volumes") }
func (d Dir) GPUs() string       { return d.join("gpus.json") }
func (d Dir) Way() string        { return d.join("way") }
func (d Dir) state() string      { return d.join("state.json") }
func (d Dir) lock() string       { return d.join("lock") }

// ErrRunning means that another process holds the data directory.
var ErrRunning = errors.New("a cluster runs in this data directory already")

// Lock takes the directory for this process. The lock goes with the process, however that ends.
func (d Dir) Lock() (*os.File, error) {
	f, err := os.OpenFile(d.lock(), os.O_CREATE|os.O_RDWR|syscall.O_CLOEXEC, 0o600)
	if err != nil {
		return nil, fmt.Errorf("cannot lock the data directory %s: %w", d, err)
	}
	if err := flockWithin(f, lockPatience); err != nil {
		f.Close()
		return nil, fmt.Errorf("%w: %s (see `tuneward-local status --data %s`)", ErrRunning, d, d)
	}
	_ = f.Truncate(0)
	_, err = fmt.Fprintf(f, "%d\n", os.Getpid())
	return f, err
}

// lockPatience outlasts the moment in which `status` looks who holds the lock.
const lockPatience = 500 * time.Millisecond

func flockWithin(f *os.File, patience time.Duration) error {
	for end := time.Now().Add(patience); ; time.Sleep(10 * time.Millisecond) {
		err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
		if err == nil || time.Now().After(end) {
			return err
		}
	}
}

// LockHolder is the pid of the process that holds the lock, 0 when none does. The pid alone would not
// do: after a kill -9 it may be another program's.
func (d Dir) LockHolder() int {
	f, err := os.OpenFile(d.lock(), os.O_RDWR, 0o600)
	if err != nil {
		return 0
	}
	defer f.Close()
	if syscall.Flock(int(f.Fd()), syscall.LOCK_SH|syscall.LOCK_NB) == nil {
		return 0
	}
	var pid int
	if _, err := fmt.Fscan(f, &pid); err != nil {
		return 0
	}
	return pid
}

// ReadyInfo is the file that says that the cluster is usable.
type ReadyInfo struct {
	PID       int    `json:"pid"`
	APIURL    string `json:"apiURL"`
	StartedAt string `json:"startedAt"`
	Way       string `json:"way"`
	Version   string `json:"version"`
}

// WriteReady writes the file in one step: whoever sees it sees all of it.
func (d Dir) WriteReady(info ReadyInfo) error {
	return writeJSON(d.Ready(), info)
}

// ReadReady returns what WriteReady wrote.
func (d Dir) ReadReady() (ReadyInfo, error) {
	var info ReadyInfo
	return info, readJSON(d.Ready(), &info)
}

func writeJSON(path string, value any) error {
	data, err := json.MarshalIndent(value, "", "  ")
	if err != nil {
		return err
	}
	temporary := path + ".new"
	if err := os.WriteFile(temporary, append(data, '\n'), 0o600); err != nil {
		return err
	}
	return os.Rename(temporary, path)
}

func readJSON(path string, value any) error {
	data, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	return json.Unmarshal(data, value)
}
