package cri

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func TestContainerStopGivesGraceThenKills(t *testing.T) {
	w := newWorld(t)
	id := w.run(restricted("sh", "-c", "trap 'echo bye; exit 0' TERM; echo ready; while :; do sleep 0.05; done"))
	w.awaitLog("ready")
	w.must(w.runtime.StopContainer(w.ctx, id, 999))
	if status := w.status(id); status.ExitCode != 0 || !strings.Contains(w.log(), "bye") {
		t.Errorf("got %v, log %q", status, w.log())
	}
	id = w.run(restricted("sh", "-c", "trap '' TERM; echo deaf; while :; do sleep 0.05; done"))
	w.awaitLog("deaf")
	w.must(w.runtime.StopContainer(w.ctx, id, 1))
	if status := w.status(id); status.ExitCode != 137 {
		t.Errorf("got %v", status)
	}
}

func TestContainerRunsOnWhenTheProgramEndsAndIsAdopted(t *testing.T) {
	w := newWorld(t)
	config := restricted("sh", "-c", "echo ready; while [ ! -e /data/go ]; do sleep 0.02; done; echo went; exit 5")
	config.Mounts = []*runtimeapi.Mount{{HostPath: t.TempDir(), ContainerPath: "/data"}}
	id := w.run(config)
	before := w.status(id)
	w.must(w.runtime.Close(w.ctx))
	w.start()
	after := w.status(id)
	if after.State != runtimeapi.ContainerState_CONTAINER_RUNNING || after.StartedAt != before.StartedAt {
		t.Fatalf("got %v", after)
	}
	if _, _, err := w.runtime.ExecSync(w.ctx, id, []string{"touch", "/data/go"}, 0); err != nil {
		t.Fatal("exec into an adopted container:", err)
	}
	if status := w.end(id); status.ExitCode != 5 || !strings.Contains(w.log(), "went") {
		t.Errorf("got %v, log %q", status, w.log())
	}
	w.start()
	if status := w.status(id); status.ExitCode != 5 {
		t.Errorf("after another restart: %v", status)
	}
}

func TestContainerDiesWithItsShim(t *testing.T) {
	w := newWorld(t)
	id := w.run(restricted("sh", "-c", "setsid sleep 1234 & sleep 1000"))
	c, err := w.runtime.container(id)
	w.must(err)
	first, err := c.process()
	w.must(err)
	w.must(c.shim().Signal(unix.SIGKILL))
	status := w.end(id)
	if status.ExitCode != 137 || status.Message != "the container's shim is gone" {
		t.Errorf("got %v", status)
	}
	for first.Alive() {
		if w.ctx.Err() != nil {
			t.Fatal("the first process outlives its shim")
		}
		time.Sleep(10 * time.Millisecond)
	}
}

func TestContainerLostWhileTheProgramWasAwayIsExited137(t *testing.T) {
	w := newWorld(t)
	id := w.run(restricted("sleep", "1000"))
	w.must(w.runtime.Close(w.ctx))
	pids, err := LiveShims(w.cfg.StateDir)
	w.must(err)
	if len(pids) != 1 {
		t.Fatalf("live shims: %v", pids)
	}
	w.must(unix.Kill(pids[0], unix.SIGKILL))
	w.end(id) // the first runtime still watches; a real one would be gone
	w.must(os.Remove(filepath.Join(w.runtime.containerDir(id), "exit.json")))
	w.start()
	if status := w.end(id); status.ExitCode != 137 {
		t.Errorf("got %v", status)
	}
}

func TestContainerCleanEndsEverythingWithoutARuntime(t *testing.T) {
	w := newWorld(t)
	id := w.run(restricted("sleep", "1000"))
	c, err := w.runtime.container(id)
	w.must(err)
	w.must(Clean(w.ctx, w.cfg.StateDir, 50*time.Millisecond))
	if c.shim().Alive() {
		t.Error("the shim still runs")
	}
	if _, err := os.Stat(w.cfg.StateDir); !errors.Is(err, os.ErrNotExist) {
		t.Error("the state is still there")
	}
	w.must(os.MkdirAll(w.runtime.sandboxDir(w.pod), 0o700)) // for the clean-up
}

func TestContainerLogIsReopenedAfterRotation(t *testing.T) {
	w := newWorld(t)
	id := w.run(restricted("sh", "-c", "while :; do echo tick; sleep 0.02; done"))
	w.awaitLog("tick")
	w.must(os.Rename(filepath.Join(w.logs, "main.log"), filepath.Join(w.logs, "main.log.1")))
	w.must(w.runtime.ReopenContainerLog(w.ctx, id))
	for {
		if _, err := os.Stat(filepath.Join(w.logs, "main.log")); err == nil {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	w.awaitLog("tick")
}

func TestContainersStartQuicklyInNumbers(t *testing.T) {
	w := newWorld(t)
	const count = 40
	var group sync.WaitGroup
	errs := make(chan error, count)
	for i := range count {
		group.Add(1)
		go func() {
			defer group.Done()
			config := restricted("sleep", "1000")
			config.LogPath = fmt.Sprintf("%d.log", i)
			id, err := w.runtime.CreateContainer(w.ctx, w.pod, config, nil)
			if err == nil {
				err = w.runtime.StartContainer(w.ctx, id)
			}
			errs <- err
		}()
	}
	group.Wait()
	for range count {
		w.must(<-errs)
	}
	list, err := w.runtime.ListContainers(w.ctx, &runtimeapi.ContainerFilter{PodSandboxId: w.pod})
	w.must(err)
	if len(list) != count {
		t.Errorf("%d containers", len(list))
	}
}
