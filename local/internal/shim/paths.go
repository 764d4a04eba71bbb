package shim

import (
	"os"
	"path/filepath"
	"strings"
)

// pathMap says where the paths of a container without namespaces really are. It is built once and only read
// afterwards.
type pathMap struct {
	entries []pathEntry // longest target first
}

type pathEntry struct {
	target, source string
	// skeleton marks a directory that only exists to hold mount points.
	skeleton bool
}

// newPathMap maps every mount, and every directory above one that the machine lacks: `mkdir -p` or a listing
// on the way to a volume must find it, and must not make it on the machine. Those lie below skeleton.
func newPathMap(spec *Spec, skeleton string) (*pathMap, error) {
	m := &pathMap{}
	for _, mount := range spec.Mounts {
		source, err := filepath.EvalSymlinks(mount.Source)
		if err != nil {
			return nil, err
		}
		m.add(pathEntry{target: filepath.Clean(mount.Target), source: source})
		// The same place by its real name (/var/run is often /run), as a program that resolves links asks for it.
		if base, missing, err := resolve(mount.Target); err == nil {
			real := filepath.Join(append([]string{base}, missing...)...)
			m.add(pathEntry{target: real, source: source})
		}
	}
	wanted := []string{spec.Cwd}
	for _, mount := range spec.Mounts {
		wanted = append(wanted, filepath.Dir(filepath.Clean(mount.Target)))
	}
	for _, path := range wanted {
		if err := m.addSkeleton(path, skeleton); err != nil {
			return nil, err
		}
	}
	return m, nil
}

func (m *pathMap) add(entry pathEntry) {
	at := len(m.entries)
	for i, other := range m.entries {
		if other.target == entry.target {
			return
		}
		if len(other.target) < len(entry.target) && at == len(m.entries) {
			at = i
		}
	}
	m.entries = append(m.entries[:at], append([]pathEntry{entry}, m.entries[at:]...)...)
}

// addSkeleton provides a directory that may be missing, unless it lies inside a volume.
func (m *pathMap) addSkeleton(path, skeleton string) error {
	if path == "" {
		return nil
	}
	base, missing, err := resolve(path)
	if err != nil || len(missing) == 0 {
		return err
	}
	for _, entry := range m.entries {
		if !entry.skeleton && below(path, entry.target) {
			return nil
		}
	}
	if err := os.MkdirAll(filepath.Join(skeleton, path), 0o755); err != nil {
		return err
	}
	top := filepath.Join(base, missing[0])
	m.add(pathEntry{target: top, source: filepath.Join(skeleton, top), skeleton: true})
	return nil
}

// real gives the machine's path for an absolute path of the container, and whether they differ.
func (m *pathMap) real(path string) (string, bool) {
	path = filepath.Clean(path)
	for _, entry := range m.entries {
		if below(path, entry.target) {
			return filepath.Join(entry.source, strings.TrimPrefix(path, entry.target)), true
		}
	}
	return path, false
}

// seen is the inverse: the container's path for one of the machine. A volume that is the whole machine has
// none, every path would be below it.
func (m *pathMap) seen(path string) string {
	best, found := pathEntry{}, false
	for _, entry := range m.entries {
		if entry.source != "/" && below(path, entry.source) && (!found || len(entry.source) > len(best.source)) {
			best, found = entry, true
		}
	}
	if !found {
		return path
	}
	return filepath.Join(best.target, strings.TrimPrefix(path, best.source))
}
