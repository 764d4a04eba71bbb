package cri

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// These tests run real containers. They need permission for namespaces, as root or in a user namespace,
// and are skipped where the machine gives neither.

// unrelated is a time no step should come near; one that does has failed.
const unrelated = 60 * time.Second

var shimPath string

func TestMain(m *testing.M) {
	directory, err := os.MkdirTemp("", "local-shim-")
	if err != nil {
		panic(err)
	}
	shimPath = filepath.Join(directory, "tuneward-shim")
	build := exec.Command("go", "build", "-o", shimPath, "tuneward.dev/local/cmd/tuneward-shim")
	if output, err := build.CombinedOutput(); err != nil {
		fmt.Fprintf(os.Stderr, "building the shim: %v\n%s", err, output)
		os.Exit(1)
	}
	code := m.Run()
	os.RemoveAll(directory)
	os.Exit(code)
}

// wayVariable names the way of an inner run; without it the tests' own process makes containers as it is.
const wayVariable = "TUNEWARD_TEST_WAY"

// way is how this process may make containers, found out as the program does.
var way = sync.OnceValues(func() (Way, error) {
	way := Way(os.Getenv(wayVariable))
	if way == "" {
		way = WayRoot
	}
	output, err := exec.Command(shimPath, "probe", string(way)).CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("%w: %s", err, output)
	}
	return way, nil
})

// TestUnprivileged runs every test of containers again as uid 0 of a user namespace, which is how the
// program runs for people who are not root.
func TestUnprivileged(t *testing.T) {
	runAgain(t, WayUserNS, &syscall.SysProcAttr{
		Cloneflags:  unix.CLONE_NEWUSER | unix.CLONE_NEWNS,
		UidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getuid(), Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getgid(), Size: 1}},
	})
}

// TestWithoutNamespaces runs them again where no namespace is allowed.
func TestWithoutNamespaces(t *testing.T) {
	runAgain(t, WayNotify, nil)
}

func runAgain(t *testing.T, way Way, attributes *syscall.SysProcAttr) {
	if os.Getenv(wayVariable) != "" {
		t.Skip("this is the inner run")
	}
	command := exec.Command("/proc/self/exe", "-test.run=TestContainer", "-test.v")
	command.Env = append(os.Environ(), wayVariable+"="+string(way))
	command.SysProcAttr = attributes
	output, err := command.CombinedOutput()
	if errors.Is(err, unix.EPERM) {
		t.Skip("user namespaces are not allowed here")
	}
	if err != nil {
		t.Fatalf("%v\n%s", err, output)
	}
	t.Logf("%s", output)
}

// needsNamespaces skips what the way without namespaces does not promise.
func (w *world) needsNamespaces() {
	w.t.Helper()
	if w.cfg.Way == WayNotify {
		w.t.Skip("not without namespaces")
	}
}

// world is a runtime with one pod.
type world struct {
	t       *testing.T
	ctx     context.Context
	runtime *Runtime
	cfg     Config
	pod     string
	logs    string
}

func newWorld(t *testing.T) *world {
	t.Helper()
	way, err := way()
	if err != nil {
		t.Skip(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), unrelated)
	w := &world{t: t, ctx: ctx, logs: t.TempDir(), cfg: Config{
		StateDir: filepath.Join(t.TempDir(), "state"), ShimPath: shimPath, Way: way,
		Env: []string{"PATH=" + os.Getenv("PATH"), "HOME=/nowhere"}, PodCIDR: "127.64.8.0/24", Logf: t.Logf,
	}}
	w.start()
	w.pod, err = w.runtime.RunPodSandbox(ctx, &runtimeapi.PodSandboxConfig{
		Metadata: &runtimeapi.PodSandboxMetadata{Name: "pod", Namespace: "ns", Uid: "uid"},
		Hostname: "pod-0", LogDirectory: w.logs,
		Linux: &runtimeapi.LinuxPodSandboxConfig{SecurityContext: &runtimeapi.LinuxSandboxSecurityContext{
			NamespaceOptions: &runtimeapi.NamespaceOption{Pid: runtimeapi.NamespaceMode_CONTAINER},
		}},
	}, "")
	w.must(err)
	t.Cleanup(func() {
		defer cancel()
		w.must(w.runtime.RemovePodSandbox(ctx, w.pod))
		w.must(w.runtime.Close(ctx))
	})
	return w
}

// start opens the runtime, as the program does at every start.
func (w *world) start() {
	w.t.Helper()
	runtime, err := New(w.cfg)
	w.must(err)
	w.runtime = runtime
}

func (w *world) must(err error) {
	w.t.Helper()
	if err != nil {
		w.t.Fatal(err)
	}
}

func restricted(command ...string) *runtimeapi.ContainerConfig {
	return &runtimeapi.ContainerConfig{
		Metadata: &runtimeapi.ContainerMetadata{Name: "main"},
		Image:    &runtimeapi.ImageSpec{Image: imageID("python"), UserSpecifiedImage: "python"},
		Command:  command,
		LogPath:  "main.log",
		Linux: &runtimeapi.LinuxContainerConfig{SecurityContext: &runtimeapi.LinuxContainerSecurityContext{
			RunAsUser: &runtimeapi.Int64Value{Value: 65532}, ReadonlyRootfs: true, NoNewPrivs: true,
		}},
	}
}

func (w *world) create(config *runtimeapi.ContainerConfig) string {
	w.t.Helper()
	id, err := w.runtime.CreateContainer(w.ctx, w.pod, config, nil)
	w.must(err)
	return id
}

func (w *world) run(config *runtimeapi.ContainerConfig) string {
	w.t.Helper()
	id := w.create(config)
	w.must(w.runtime.StartContainer(w.ctx, id))
	return id
}

func (w *world) status(id string) *runtimeapi.ContainerStatus {
	w.t.Helper()
	response, err := w.runtime.ContainerStatus(w.ctx, id, false)
	w.must(err)
	return response.Status
}

// end waits until a container has exited.
func (w *world) end(id string) *runtimeapi.ContainerStatus {
	w.t.Helper()
	c, err := w.runtime.container(id)
	w.must(err)
	select {
	case <-c.ended:
	case <-w.ctx.Done():
		w.t.Fatal("the container does not end")
	}
	return w.status(id)
}

// log gives the container's lines of both streams, without times.
func (w *world) log() string {
	w.t.Helper()
	data, err := os.ReadFile(filepath.Join(w.logs, "main.log"))
	w.must(err)
	var text strings.Builder
	for _, line := range strings.SplitAfter(string(data), "\n") {
		if parts := strings.SplitN(line, " ", 4); len(parts) == 4 {
			text.WriteString(parts[3])
		}
	}
	return text.String()
}

func (w *world) output(config *runtimeapi.ContainerConfig) string {
	w.t.Helper()
	w.end(w.run(config))
	return w.log()
}

func (w *world) awaitLog(text string) {
	w.t.Helper()
	for !strings.Contains(w.log(), text) {
		if w.ctx.Err() != nil {
			w.t.Fatalf("the log never showed %q; it is %q", text, w.log())
		}
		time.Sleep(10 * time.Millisecond)
	}
}
