package shim

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"syscall"
)

// Probe runs a throwaway container with everything pods use: a volume where the machine has no directory
// (a mirror of /dev, which is the strictest one), a read-only root and a user of its own. `unshare` alone
// would succeed on machines where the mounts are refused later.
func Probe(way string) error {
	notify := way == "notify"
	if notify && !NotifySupported {
		return errors.New("containers without namespaces need an x86-64 machine")
	}
	directory, err := os.MkdirTemp("", "tuneward-probe-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(directory)
	spec := Spec{
		ID: "probe", Root: "/", Cwd: "/", Hostname: "probe",
		// execve of our own file, found by its open descriptor: the one program sure to exist.
		Args:         []string{"/proc/self/exe", "version"},
		Mounts:       []Mount{{Source: directory, Target: "/dev/tuneward-probe", ReadOnly: true}},
		User:         &User{UID: 65532, GID: 65532},
		ReadOnlyRoot: true,
		NoNewPrivs:   true,
		Notify:       notify,
	}
	if notify {
		// The shim itself, as a file of a volume that the machine has nowhere.
		spec.Args, spec.User = []string{"/tuneward-probe/exe", "version"}, nil
		spec.Mounts = []Mount{{Source: "/proc/self/exe", Target: "/tuneward-probe/exe"}}
	}
	if err := WriteJSON(filepath.Join(directory, SpecFile), spec); err != nil {
		return err
	}
	log, err := openLog(filepath.Join(directory, "log"))
	if err != nil {
		return err
	}
	c := &container{log: log, notify: notify}
	if err := c.launch(directory, &spec); err != nil {
		return sentence(err)
	}
	c.waitAll()
	if !c.command.ProcessState.Success() {
		said, _ := os.ReadFile(filepath.Join(directory, "log"))
		return fmt.Errorf("the probe container failed: %s\n%.2000s", c.command.ProcessState, said)
	}
	return nil
}

// sentence adds what usually stands behind a refusal.
func sentence(err error) error {
	if errors.Is(err, syscall.EPERM) || errors.Is(err, syscall.EACCES) {
		return fmt.Errorf("%w: this machine does not let us make namespaces", err)
	}
	return err
}
