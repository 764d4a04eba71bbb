package cli

import (
	"errors"
	"fmt"
	"os"
	"syscall"
	"time"

	"tuneward.dev/local/internal/layout"
)

// stopDeadline is above the 4 s a server takes at most.
const stopDeadline = 10 * time.Second

// Down ends the cluster and, with --purge, removes it. endContainers ends what the runtime left running.
func Down(options DownOptions, endContainers func(dir layout.Dir) error) error {
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
	if err := endContainers(dir); err != nil {
		return fmt.Errorf("cannot end the containers of %s: %w", dir, err)
	}
	if !options.Purge {
		return nil
	}
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
