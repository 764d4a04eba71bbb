package cli

import (
	"context"
	"errors"
	"fmt"
	"os"
	"syscall"
	"time"

	"tuneward.dev/local/internal/cri"
	"tuneward.dev/local/internal/layout"
)

// stopDeadline is above the 4 s a server takes at most.
const stopDeadline = 10 * time.Second

// containerGrace is how long `down` lets containers end by themselves after TERM.
const containerGrace = 2 * time.Second

// Down ends the cluster and its containers and, with --purge, removes it. It also ends containers whose
// server was killed.
func Down(options DownOptions) error {
	if _, err := os.Stat(options.Data); errors.Is(err, os.ErrNotExist) {
		return nil
	}
	dir, err := layout.Open(options.Data)
	if err != nil {
		return err
	}
	if err := stopServer(dir); err != nil {
		return err
	}
	// After the server: the kubelet would start ended containers again.
	if err := cri.Clean(context.Background(), dir.Runtime(), containerGrace); err != nil {
		return fmt.Errorf("cannot end the containers of %s: %w", dir, err)
	}
	if !options.Purge {
		return nil
	}
	_ = os.Remove(dir.Ready())
	if err := os.RemoveAll(string(dir)); err != nil {
		return fmt.Errorf("cannot remove %s: %w", dir, err)
	}
	return nil
}

func stopServer(dir layout.Dir) error {
	holder := dir.LockHolder()
	if holder == 0 {
		return nil
	}
	_ = syscall.Kill(holder, syscall.SIGTERM)
	if awaitStopped(dir, stopDeadline) {
		return nil
	}
	_ = syscall.Kill(holder, syscall.SIGKILL)
	if awaitStopped(dir, stopDeadline) {
		return nil
	}
	return fmt.Errorf("the server of %s (pid %d) does not end; end it with `kill -9 %d` as its user", dir, holder, holder)
}

func awaitStopped(dir layout.Dir, limit time.Duration) bool {
	for end := time.Now().Add(limit); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		if dir.LockHolder() == 0 {
			return true
		}
	}
	return false
}

// dyingDeadline is for a server that was killed a moment ago: its lock goes when the kernel has taken its
// memory back, which is after `kill -9` returns.
const dyingDeadline = 2 * time.Second

// AwaitFree refuses to start beside a running server.
func AwaitFree(dir layout.Dir) error {
	if awaitStopped(dir, dyingDeadline) {
		return nil
	}
	return fmt.Errorf("%w (pid %d): %s", layout.ErrRunning, dir.LockHolder(), dir)
}
