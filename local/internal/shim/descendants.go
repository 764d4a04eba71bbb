package shim

import (
	"crypto/rand"
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// skeletonDir lies in a container's directory; see newPathMap.
const skeletonDir = "skeleton"

// socketFD is where init sends the filter's listener, and cookieVariable how it gets the cookie.
const (
	socketFD       = 4
	cookieVariable = "COOKIE"
)

// sweepTime is how often processes that lost their parent are collected while the container runs, and
// endTime how long the killed ones may take at its end.
const (
	sweepTime = 2 * time.Second
	endTime   = 5 * time.Second
)

// startNotify starts the prepared command under the filter, and the server that answers it.
func (c *container) startNotify(spec *Spec, skeleton string) error {
	paths, err := newPathMap(spec, skeleton)
	if err != nil {
		return err
	}
	// Orphans of the container come to us, not to the machine's init, so that we can end them.
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		return err
	}
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	ours, theirs := pair[0], os.NewFile(uintptr(pair[1]), "listener")
	defer unix.Close(ours)
	cookie := newCookie()
	c.command.ExtraFiles = append(c.command.ExtraFiles, theirs)
	c.command.Env = []string{fmt.Sprintf("%s=%d", cookieVariable, cookie)}
	err = c.command.Start()
	theirs.Close()
	if err != nil {
		return err
	}
	listener, err := receiveListener(ours)
	if err != nil {
		// Why it sent none comes through the other pipe, or not at all.
		return nil
	}
	setSyncWakeUp(listener)
	s := &server{listener: listener, cookie: cookie, paths: paths, hostname: spec.Hostname}
	go s.serve()
	return nil
}

func newCookie() uint64 {
	var random [8]byte
	_, _ = rand.Read(random[:])
	return binary.NativeEndian.Uint64(random[:]) | 1 // never 0, which many calls have there
}

// underFilter is init's part.
func underFilter() error {
	cookie, err := strconv.ParseUint(os.Getenv(cookieVariable), 10, 64)
	if err != nil {
		return fmt.Errorf("cookie: %w", err)
	}
	unix.CloseOnExec(socketFD)
	if err := installFilter(cookie, socketFD); err != nil {
		return err
	}
	return unix.Close(socketFD)
}

// waitDescendants waits for the first process, then ends the rest. The first wait is by pidfd: any wait for
// children would take the stops of threads that rewrite() is attached to.
func (c *container) waitDescendants() {
	first := c.command.Process.Pid
	process, err := Identify(first)
	if err == nil {
		stop := make(chan struct{})
		go sweep(first, stop)
		process.Wait()
		close(stop)
	}
	for deadline := time.Now().Add(endTime); time.Now().Before(deadline); time.Sleep(5 * time.Millisecond) {
		left := 0
		for _, pid := range children() {
			if pid != first {
				left++
				_ = unix.Kill(pid, unix.SIGKILL)
				_, _ = unix.Wait4(pid, nil, unix.WNOHANG, nil)
			}
		}
		if left == 0 {
			return
		}
	}
}

// sweep collects orphans that ended.
func sweep(first int, stop <-chan struct{}) {
	ticker := time.NewTicker(sweepTime)
	defer ticker.Stop()
	for {
		select {
		case <-stop:
			return
		case <-ticker.C:
		}
		for _, pid := range children() {
			if _, err := Identify(pid); err == ErrGone && pid != first {
				_, _ = unix.Wait4(pid, nil, unix.WNOHANG, nil)
			}
		}
	}
}

// children lists our child processes, of whichever thread.
func children() []int {
	files, _ := filepath.Glob("/proc/self/task/*/children")
	var pids []int
	for _, file := range files {
		data, err := os.ReadFile(file)
		if err != nil {
			continue
		}
		for _, field := range strings.Fields(string(data)) {
			if pid, err := strconv.Atoi(field); err == nil {
				pids = append(pids, pid)
			}
		}
	}
	return pids
}

// EndSession kills what is left of a container without namespaces whose shim was killed: its processes by
// their session, which is its first process's.
func EndSession(first Process) {
	if first.PID <= 1 {
		return // none was started; and 0 stands for every session outside of a PID namespace
	}
	stats, _ := filepath.Glob("/proc/[0-9]*/stat")
	for _, file := range stats {
		data, err := os.ReadFile(file)
		if err != nil {
			continue
		}
		line := string(data)
		fields := strings.Fields(line[strings.LastIndexByte(line, ')')+1:])
		pid, err := strconv.Atoi(filepath.Base(filepath.Dir(file)))
		if err != nil || len(fields) < 20 || fields[3] != strconv.Itoa(first.PID) {
			continue
		}
		// A session id is free again after the last member: a member older than the first process is another's.
		if process, err := Identify(pid); err == nil && process.Start >= first.Start && first.Boot == bootID() {
			_ = process.Signal(unix.SIGKILL)
		}
	}
}

// execNotify is Exec for a container without namespaces: a filter and a server of its own.
func execNotify(request *ExecRequest, source *os.File) int {
	code, err := func() (int, error) {
		spec := &Spec{}
		if err := ReadJSON(filepath.Join(request.Directory, SpecFile), spec); err != nil {
			return 0, err
		}
		spec.Args = request.Args
		directory, err := os.MkdirTemp(request.Directory, "exec-")
		if err != nil {
			return 0, err
		}
		defer os.RemoveAll(directory)
		if err := WriteJSON(filepath.Join(directory, SpecFile), spec); err != nil {
			return 0, err
		}
		c := &container{notify: true, terminal: request.Terminal}
		failure, err := c.spawn(directory, filepath.Join(request.Directory, skeletonDir), spec,
			[3]*os.File{os.Stdin, os.Stdout, os.Stderr})
		if err != nil {
			return 0, err
		}
		if err := c.awaitExec(failure); err != nil {
			return 0, err
		}
		go killAtEnd(source, c.command.Process.Pid)
		c.waitAll()
		return int(exitCode(c.command.ProcessState)), nil
	}()
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return NotFoundCode
	}
	return code
}
