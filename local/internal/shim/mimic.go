package shim

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// maxLinks is the kernel's own limit of symbolic links in one path.
const maxLinks = 40

// ensure gives the real path of target (links resolved) and makes it where it is missing, without
// creating anything on the machine: in one of our tmpfs or in a volume of the pod directly, elsewhere by
// first replacing the deepest existing directory by a tmpfs that mirrors it.
func (r *rootfs) ensure(target string, directory bool) (string, error) {
	base, missing, err := resolve(target)
	if err != nil {
		return "", err
	}
	if len(missing) == 0 {
		return base, checkKind(base, directory)
	}
	if err := r.makeWritable(base); err != nil {
		return "", err
	}
	for i, name := range missing {
		base = filepath.Join(base, name)
		if err := makeEntry(base, directory || i < len(missing)-1); err != nil {
			return "", err
		}
	}
	return base, nil
}

func checkKind(path string, directory bool) error {
	info, err := os.Lstat(path)
	if err != nil {
		return err
	}
	if info.IsDir() == directory {
		return nil
	}
	if directory {
		return fmt.Errorf("%s is a file, the volume is a directory", path)
	}
	return fmt.Errorf("%s is a directory, the volume is a file", path)
}

// resolve splits a path into what exists, with every link followed, and the components that do not. A
// dangling link counts as the missing path it names.
func resolve(path string) (base string, missing []string, err error) {
	base = "/"
	rest := components(path)
	for links := 0; len(rest) > 0; {
		name := rest[0]
		next := filepath.Join(base, name)
		info, err := os.Lstat(next)
		switch {
		case errors.Is(err, os.ErrNotExist):
			return base, rest, nil
		case err != nil:
			return "", nil, err
		case info.Mode()&os.ModeSymlink != 0:
			if links++; links > maxLinks {
				return "", nil, fmt.Errorf("%s: %w", path, unix.ELOOP)
			}
			base, rest, err = follow(base, next, rest[1:])
			if err != nil {
				return "", nil, err
			}
			continue
		case len(rest) > 1 && !info.IsDir():
			return "", nil, fmt.Errorf("%s is not a directory", next)
		}
		base, rest = next, rest[1:]
	}
	return base, nil, nil
}

func follow(base, link string, rest []string) (string, []string, error) {
	to, err := os.Readlink(link)
	if err != nil {
		return "", nil, err
	}
	// Cleaning a path with ".." before its links are resolved is not what the kernel does, but links like
	// ../run and /run are all that system roots hold.
	if !filepath.IsAbs(to) {
		to = filepath.Join(base, to)
	}
	return "/", append(components(to), rest...), nil
}

func components(path string) []string {
	path = strings.Trim(filepath.Clean("/"+path), "/")
	if path == "" {
		return nil
	}
	return strings.Split(path, "/")
}

// makeWritable sees to it that entries can be made in an existing directory.
func (r *rootfs) makeWritable(directory string) error {
	for _, placed := range r.placed {
		if below(directory, placed) {
			return nil
		}
	}
	var stat unix.Stat_t
	if err := unix.Stat(directory, &stat); err != nil {
		return err
	}
	if r.own[stat.Dev] {
		return nil
	}
	if err := r.mirror(directory, stat.Mode&0o7777); err != nil {
		return fmt.Errorf("mirroring %s: %w", directory, err)
	}
	return nil
}

// mirror covers a directory with a tmpfs that shows the same entries (snapd calls it a writable mimic).
func (r *rootfs) mirror(directory string, mode uint32) error {
	// Opened before it is covered: entries are then reached under the cover.
	old, err := os.Open(directory)
	if err != nil {
		return err
	}
	defer old.Close()
	entries, err := old.ReadDir(-1)
	if err != nil {
		return err
	}
	options := fmt.Sprintf("mode=%o", mode)
	if err := unix.Mount("tmpfs", directory, "tmpfs", unix.MS_NOSUID, options); err != nil {
		return err
	}
	if err := r.ownTmpfs(directory); err != nil {
		return err
	}
	for _, entry := range entries {
		// No sealing here: a copy of a read-only mount is read-only.
		t, err := openTree(int(old.Fd()), entry.Name(), entry.Name(), entry.Type(), false)
		if errors.Is(err, unix.ENOENT) {
			continue
		}
		if err != nil {
			return err
		}
		if err := t.attach(filepath.Join(directory, entry.Name())); err != nil {
			return err
		}
	}
	return nil
}
