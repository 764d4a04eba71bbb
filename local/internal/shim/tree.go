package shim

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// tree is something of the old root that is to appear in the new one.
type tree struct {
	name string
	mode os.FileMode // only the type bits
	link string      // of a symbolic link
	fd   int         // a detached copy of the mounts below it; -1 if there is nothing to bind
}

// openTree opens an entry for a mirror. An entry that vanished, or that even root may not enter (FUSE of
// another user), becomes an empty directory or file.
func openTree(at int, path, name string, mode os.FileMode, sealed bool) (tree, error) {
	t := tree{name: name, mode: mode.Type(), fd: -1}
	if t.mode&os.ModeSymlink != 0 {
		buffer := make([]byte, unix.PathMax)
		n, err := unix.Readlinkat(at, path, buffer)
		if err != nil {
			return t, err
		}
		t.link = string(buffer[:n])
		return t, nil
	}
	fd, err := cloneTree(at, path)
	if err != nil {
		if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EACCES) || errors.Is(err, unix.ENOTCONN) {
			return t, nil
		}
		return t, err
	}
	t.fd = fd
	if sealed {
		return t, readOnly(fd, true)
	}
	return t, nil
}

// attach makes the entry at path, which lies in a tmpfs of ours.
func (t tree) attach(path string) error {
	if t.mode&os.ModeSymlink != 0 {
		return os.Symlink(t.link, path)
	}
	if err := makeEntry(path, t.mode.IsDir()); err != nil {
		return err
	}
	if t.fd < 0 {
		return nil
	}
	return moveTree(t.fd, path)
}

func makeEntry(path string, directory bool) error {
	if directory {
		return os.Mkdir(path, 0o755)
	}
	file, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	return file.Close()
}

// cloneTree is a recursive bind that is mounted nowhere yet. Never without AT_RECURSIVE: in a user
// namespace the mounts below are locked to their parent, and a copy without them is refused.
func cloneTree(at int, path string) (int, error) {
	return unix.OpenTree(at, path, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_RECURSIVE)
}

// moveTree mounts a detached tree at target and closes it.
func moveTree(fd int, target string) error {
	err := unix.MoveMount(fd, "", unix.AT_FDCWD, target, unix.MOVE_MOUNT_F_EMPTY_PATH)
	unix.Close(fd)
	if err != nil {
		return fmt.Errorf("move_mount: %w", err)
	}
	return nil
}

func readOnly(fd int, recursive bool) error {
	flags := uint(unix.AT_EMPTY_PATH)
	if recursive {
		flags |= unix.AT_RECURSIVE
	}
	return unix.MountSetattr(fd, "", flags, &unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY})
}
