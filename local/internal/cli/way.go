package cli

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"

	"tuneward.dev/local/internal/cri"
	"tuneward.dev/local/internal/enter"
	"tuneward.dev/local/internal/layout"
)

const (
	// insideVariable tells the program that it is in the namespaces of this way already.
	insideVariable = "TUNEWARD_LOCAL_INSIDE"
	// wayVariable is for tests and for bug reports: take this way, and no other.
	wayVariable = "TUNEWARD_LOCAL_WAY"
)

// ShimPath is the shim beside this program.
func ShimPath() (string, error) {
	self, err := os.Executable()
	if err != nil {
		return "", err
	}
	if self, err = filepath.EvalSymlinks(self); err != nil {
		return "", err
	}
	shim := filepath.Join(filepath.Dir(self), "tuneward-shim")
	if _, err := os.Stat(shim); err != nil {
		return "", fmt.Errorf("tuneward-shim must lie beside tuneward-local: %w; build both with local/build.sh", err)
	}
	return shim, nil
}

// EnterWay chooses how containers are separated and puts this program into the namespaces for it: it
// returns in the program that runs there, and otherwise only with an error.
func EnterWay(dir layout.Dir, shim string) (cri.Way, error) {
	if inside := os.Getenv(insideVariable); inside != "" {
		return cri.Way(inside), os.Unsetenv(insideVariable)
	}
	way, join, err := chooseWay(dir, shim)
	if err != nil {
		return "", err
	}
	if err := os.WriteFile(dir.Way(), []byte(way), 0o600); err != nil {
		return "", err
	}
	if way == cri.WayNotify {
		fmt.Fprintln(os.Stderr, "this machine allows no namespaces: read-only mounts and runAsUser are not enforced")
		return way, nil
	}
	if err := os.Setenv(insideVariable, string(way)); err != nil {
		return "", err
	}
	self, err := os.Executable()
	if err != nil {
		return "", err
	}
	// Named after this program, whose stand-in it is: whoever looks for containers' shims must not find it.
	arguments := append([]string{"tuneward-local"}, enter.Args(string(way), join, self, os.Args[1:]...)...)
	return "", syscall.Exec(shim, arguments, os.Environ())
}

// chooseWay keeps the way of containers that still run, and joins them; otherwise it takes the first
// that works.
func chooseWay(dir layout.Dir, shim string) (way cri.Way, join int, err error) {
	live, err := cri.LiveShims(dir.Runtime())
	if err != nil {
		return "", 0, err
	}
	if recorded, err := os.ReadFile(dir.Way()); err == nil && len(live) > 0 {
		return cri.Way(recorded), live[0], nil
	}
	candidates := []cri.Way{cri.WayRoot, cri.WayUserNS, cri.WayNotify}
	if os.Geteuid() != 0 {
		candidates = candidates[1:]
	}
	if wanted := os.Getenv(wayVariable); wanted != "" {
		candidates = []cri.Way{cri.Way(wanted)}
	}
	way, err = firstWay(candidates, func(way cri.Way) error { return probe(shim, way) })
	return way, 0, err
}

func firstWay(candidates []cri.Way, probe func(cri.Way) error) (cri.Way, error) {
	var refusals []error
	for _, way := range candidates {
		err := probe(way)
		if err == nil {
			return way, nil
		}
		refusals = append(refusals, fmt.Errorf("%s: %w", way, err))
	}
	return "", fmt.Errorf("no way to run containers works here:\n%w\nuse --control-plane-only, or a cluster of your own by KUBECONFIG", errors.Join(refusals...))
}

// probe runs a throwaway container the whole way: `unshare` alone succeeds on machines that refuse the
// mounts later.
func probe(shim string, way cri.Way) error {
	arguments := []string{"probe", string(way)}
	if way != cri.WayNotify {
		arguments = enter.Args(string(way), 0, shim, arguments...)
	}
	output, err := exec.Command(shim, arguments...).CombinedOutput()
	if err != nil {
		return errors.New(orDefault(strings.TrimSpace(string(output)), err.Error()))
	}
	return nil
}
