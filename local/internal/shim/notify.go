package shim

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The way without namespaces, for machines that allow none (an ordinary Docker container). A seccomp filter
// stops each system call that takes a path and asks us. Nearly always we let it go on. For a path below
// a volume we attach to the thread for this one call and point the argument at where the volume really is
// (rewrite.go). Not enforced here: read-only mounts, a read-only root, runAsUser.

// server answers the filter of one container.
type server struct {
	listener int
	cookie   uint64
	paths    *pathMap
	hostname string
}

// serve answers until nobody can ask any more. It needs a thread of its own: the wait is a blocking ioctl.
func (s *server) serve() {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	for {
		asked := notification{}
		err := ioctl(s.listener, unix.SECCOMP_IOCTL_NOTIF_RECV, unsafe.Pointer(&asked))
		if err == unix.EINTR || err == unix.ENOENT { // ENOENT: the asking thread is gone
			continue
		}
		if err != nil {
			return
		}
		s.answer(&asked)
	}
}

func (s *server) answer(asked *notification) {
	switch asked.NR {
	case unix.SYS_UNAME:
		if buffer, err := utsname(s.hostname); err == nil && writeMemory(asked.PID, asked.Args[0], buffer) == nil {
			s.reply(answer{ID: asked.ID})
			return
		}
	case unix.SYS_GETCWD:
		if s.getcwd(asked) {
			return
		}
	default:
		if changes := s.changes(asked); len(changes) > 0 {
			// Off this thread: a call may block for ever in the kernel (opening a FIFO) while others ask.
			go s.rewrite(*asked, changes)
			return
		}
	}
	s.reply(answer{ID: asked.ID, Flags: unix.SECCOMP_USER_NOTIF_FLAG_CONTINUE})
}

func (s *server) reply(a answer) {
	// ENOENT: the thread was interrupted and will ask again.
	_ = ioctl(s.listener, unix.SECCOMP_IOCTL_NOTIF_SEND, unsafe.Pointer(&a))
}

// getcwd answers for directories inside volumes.
func (s *server) getcwd(asked *notification) bool {
	real, err := os.Readlink(fmt.Sprintf("/proc/%d/cwd", asked.PID))
	if err != nil {
		return false
	}
	seen := s.paths.seen(real)
	if seen == real {
		return false
	}
	buffer := append([]byte(seen), 0)
	if uint64(len(buffer)) > asked.Args[1] {
		s.reply(answer{ID: asked.ID, Error: -int32(unix.ERANGE)})
		return true
	}
	if writeMemory(asked.PID, asked.Args[0], buffer) != nil {
		return false
	}
	s.reply(answer{ID: asked.ID, Value: int64(len(buffer))})
	return true
}

// change is an argument that has to name another path.
type change struct {
	argument int
	path     string
}

// changes lists the paths of a call that lie below volumes.
func (s *server) changes(asked *notification) []change {
	var changes []change
	for _, pair := range pathCalls[asked.NR].pairs {
		path, err := readString(asked.PID, asked.Args[pair[1]])
		if err != nil || path == "" {
			continue
		}
		absolute, err := s.absolute(asked, pair[0], path)
		if err != nil {
			continue
		}
		real, changed := s.paths.real(absolute)
		if !changed {
			continue
		}
		// A trailing slash asks for a directory, and makes the kernel follow a link.
		if strings.HasSuffix(path, "/") || strings.HasSuffix(path, "/.") {
			real += "/"
		}
		changes = append(changes, change{pair[1], real})
	}
	return changes
}

// absolute gives the container's path for an argument.
func (s *server) absolute(asked *notification, dirArgument int, path string) (string, error) {
	if strings.HasPrefix(path, "/") {
		return path, nil
	}
	link := fmt.Sprintf("/proc/%d/cwd", asked.PID)
	if dirArgument != cwd && int32(asked.Args[dirArgument]) != unix.AT_FDCWD {
		link = fmt.Sprintf("/proc/%d/fd/%d", asked.PID, int32(asked.Args[dirArgument]))
	}
	base, err := os.Readlink(link)
	if err != nil {
		return "", err
	}
	seen := s.paths.seen(base)
	absolute := filepath.Join(seen, path)
	if seen != base {
		// Already inside the volume: only a path that leaves it, or enters another, has to be changed.
		if real, _ := s.paths.real(absolute); real == filepath.Join(base, path) {
			return "", unix.ENOENT
		}
	}
	return absolute, nil
}

// readString reads a path of another process. It stops at a page's end before it asks for the next: what
// follows may not be mapped.
func readString(tid uint32, address uint64) (string, error) {
	var path []byte
	pageSize := uint64(os.Getpagesize())
	for len(path) < unix.PathMax {
		chunk := make([]byte, min(pageSize-address%pageSize, 256))
		n, err := transfer(unix.ProcessVMReadv, tid, address, chunk)
		if err != nil {
			return "", err
		}
		if end := bytes.IndexByte(chunk[:n], 0); end >= 0 {
			return string(append(path, chunk[:end]...)), nil
		}
		path = append(path, chunk[:n]...)
		address += uint64(n)
	}
	return "", unix.ENAMETOOLONG
}

func writeMemory(tid uint32, address uint64, data []byte) error {
	n, err := transfer(unix.ProcessVMWritev, tid, address, data)
	if err == nil && n < len(data) {
		return unix.EFAULT
	}
	return err
}

type transferCall func(pid int, local []unix.Iovec, remote []unix.RemoteIovec, flags uint) (int, error)

func transfer(call transferCall, tid uint32, address uint64, data []byte) (int, error) {
	local := unix.Iovec{Base: &data[0]}
	local.SetLen(len(data))
	remote := unix.RemoteIovec{Base: uintptr(address), Len: len(data)}
	n, err := call(int(tid), []unix.Iovec{local}, []unix.RemoteIovec{remote}, 0)
	if err == nil && n == 0 {
		err = unix.EFAULT
	}
	return n, err
}
