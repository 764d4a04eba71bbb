package shim

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sort"
	"strings"

	"golang.org/x/sys/unix"
)

// stage is where the new root is put together. /proc is the one directory of the old root that is not
// bound into the new one; anywhere else, a recursive bind would copy the half-built root into itself.
const stage = "/proc"

// rootfs is the filesystem of one container while it is made, seen from inside its mount namespace.
type rootfs struct {
	spec *Spec
	// own holds the device numbers of the tmpfs we mounted: only there may a missing directory simply be
	// made. The type says nothing, /dev and /run are tmpfs on many machines.
	own map[uint64]bool
	// sealed are descriptors of our tmpfs that become read-only with the root.
	sealed []int
	// placed are the mounts made so far; a directory missing below one is made in that volume, as
	// every runtime does.
	placed []string
}

// buildRoot makes the container's filesystem and enters it. The calling process must be alone in new
// mount and PID namespaces. Nothing is created on the machine.
func buildRoot(spec *Spec) error {
	// Without this, what we mount would appear outside wherever / is shared (systemd makes it so).
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("making mounts private: %w", err)
	}
	r := &rootfs{spec: spec, own: map[uint64]bool{}}
	// Volumes are opened first, by their paths in the old root, and placed last, by their paths in the new
	// one: /var/run is often an absolute link to /run, which only means the right thing after pivot_root.
	volumes, err := openVolumes(spec.Mounts)
	if err != nil {
		return err
	}
	if err := r.mirrorRoot(); err != nil {
		return err
	}
	if err := pivot(stage); err != nil {
		return err
	}
	if err := r.ownTmpfs("/"); err != nil {
		return err
	}
	return r.furnish(volumes)
}

// furnish does what is left after pivot_root.
func (r *rootfs) furnish(volumes []volume) error {
	if err := r.sharedMemory(); err != nil {
		return err
	}
	for _, v := range volumes {
		if err := r.place(v); err != nil {
			return fmt.Errorf("mounting %s at %s: %w", v.Source, v.Target, err)
		}
	}
	if r.spec.Cwd != "" {
		if _, err := r.ensure(r.spec.Cwd, true); err != nil {
			return fmt.Errorf("working directory %s: %w", r.spec.Cwd, err)
		}
	}
	return r.seal()
}

// mirrorRoot fills a tmpfs at stage with a bind of every entry of the image's root.
func (r *rootfs) mirrorRoot() error {
	entries, err := os.ReadDir(r.spec.Root)
	if err != nil {
		return fmt.Errorf("root of the image: %w", err)
	}
	trees, err := openRootTrees(r.spec, entries)
	if err != nil {
		return err
	}
	if err := unix.Mount("tmpfs", stage, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "mode=755"); err != nil {
		return fmt.Errorf("mounting the new root: %w", err)
	}
	for _, t := range trees {
		if err := t.attach(filepath.Join(stage, t.name)); err != nil {
			return fmt.Errorf("binding /%s: %w", t.name, err)
		}
	}
	if err := makeTemporary(filepath.Join(stage, "tmp")); err != nil {
		return err
	}
	proc := filepath.Join(stage, "proc")
	if err := os.MkdirAll(proc, 0o555); err != nil {
		return err
	}
	// Refused in a user namespace of a container whose own /proc is masked.
	if err := unix.Mount("proc", proc, "proc", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, ""); err != nil {
		return fmt.Errorf("mounting /proc: %w", err)
	}
	return nil
}

// openRootTrees opens what the new root shows: the image's entries, and the kernel's own directories from
// the machine.
func openRootTrees(spec *Spec, entries []os.DirEntry) ([]tree, error) {
	var trees []tree
	for _, entry := range entries {
		name := entry.Name()
		if name == "proc" || name == "dev" || name == "sys" {
			continue
		}
		t, err := openTree(unix.AT_FDCWD, filepath.Join(spec.Root, name), name, entry.Type(), spec.ReadOnlyRoot)
		if err != nil {
			return nil, fmt.Errorf("opening %s: %w", filepath.Join(spec.Root, name), err)
		}
		trees = append(trees, t)
	}
	for _, name := range []string{"dev", "sys"} {
		readOnly := name == "sys" && !spec.Privileged
		t, err := openTree(unix.AT_FDCWD, "/"+name, name, os.ModeDir, readOnly)
		if err != nil {
			return nil, fmt.Errorf("opening /%s: %w", name, err)
		}
		trees = append(trees, t)
	}
	return trees, nil
}

// makeTemporary gives an image directory without /tmp one, since nearly every program wants it.
func makeTemporary(path string) error {
	err := os.Mkdir(path, 0o777)
	if errors.Is(err, os.ErrExist) {
		return nil
	}
	if err != nil {
		return err
	}
	return os.Chmod(path, 0o777|os.ModeSticky)
}

// pivot makes root the root of this mount namespace and drops the old one. Stacking the old root on the
// new one ("." twice) needs no directory for it; see pivot_root(2).
func pivot(root string) error {
	if err := unix.Chdir(root); err != nil {
		return err
	}
	if err := unix.PivotRoot(".", "."); err != nil {
		return fmt.Errorf("pivot_root: %w", err)
	}
	if err := unix.Unmount(".", unix.MNT_DETACH); err != nil {
		return fmt.Errorf("detaching the old root: %w", err)
	}
	return unix.Chdir("/")
}

// sharedMemory gives the container a /dev/shm of its own: what a killed process leaves in the machine's
// stays for ever, and torch's data loaders leave gigabytes.
func (r *rootfs) sharedMemory() error {
	info, err := os.Lstat("/dev/shm")
	if err != nil || !info.IsDir() {
		return nil
	}
	if err := unix.Mount("tmpfs", "/dev/shm", "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "mode=1777"); err != nil {
		return fmt.Errorf("mounting /dev/shm: %w", err)
	}
	return nil
}

// seal makes our own tmpfs read-only where the pod asked for a read-only root. The machine's entries were
// bound read-only already.
func (r *rootfs) seal() error {
	if !r.spec.ReadOnlyRoot {
		return nil
	}
	for _, fd := range r.sealed {
		if err := readOnly(fd, false); err != nil {
			return fmt.Errorf("making the root read-only: %w", err)
		}
	}
	return nil
}

// ownTmpfs remembers a tmpfs of ours.
func (r *rootfs) ownTmpfs(path string) error {
	fd, err := unix.Open(path, unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	var stat unix.Stat_t
	if err := unix.Fstat(fd, &stat); err != nil {
		return err
	}
	r.own[stat.Dev] = true
	if !below(path, "/dev") {
		r.sealed = append(r.sealed, fd)
	}
	return nil
}

func below(path, directory string) bool {
	return path == directory || strings.HasPrefix(path, strings.TrimSuffix(directory, "/")+"/")
}

// volume is a mount whose source is open.
type volume struct {
	Mount
	tree tree
}

// openVolumes opens the sources of all mounts, parents before children: a pod may mount /data/sub before
// /data, and the order of the list must not hide one under the other (containerd sorts likewise).
func openVolumes(mounts []Mount) ([]volume, error) {
	mounts = append([]Mount(nil), mounts...)
	sort.SliceStable(mounts, func(i, j int) bool { return depth(mounts[i].Target) < depth(mounts[j].Target) })
	volumes := make([]volume, 0, len(mounts))
	for _, m := range mounts {
		info, err := os.Stat(m.Source)
		if err != nil {
			return nil, fmt.Errorf("volume for %s: %w", m.Target, err)
		}
		fd, err := cloneTree(unix.AT_FDCWD, m.Source)
		if err != nil {
			return nil, fmt.Errorf("volume for %s: opening %s: %w", m.Target, m.Source, err)
		}
		if m.ReadOnly {
			if err := readOnly(fd, m.RecursiveReadOnly); err != nil {
				return nil, fmt.Errorf("volume for %s: read-only: %w", m.Target, err)
			}
		}
		kind := os.FileMode(0)
		if info.IsDir() {
			kind = os.ModeDir
		}
		volumes = append(volumes, volume{m, tree{fd: fd, mode: kind}})
	}
	return volumes, nil
}

func depth(path string) int {
	path = filepath.Clean(path)
	if path == "/" {
		return 0
	}
	return strings.Count(path, "/")
}

// place moves an opened volume to its target, which it makes where it is missing.
func (r *rootfs) place(v volume) error {
	target, err := r.ensure(v.Target, v.tree.mode.IsDir())
	if err != nil {
		return err
	}
	if err := moveTree(v.tree.fd, target); err != nil {
		return err
	}
	r.placed = append(r.placed, target)
	return nil
}
