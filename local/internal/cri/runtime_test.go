package cri

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
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
	utilexec "k8s.io/utils/exec"
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

// way is how the tests' own process may make containers, found out as the program does.
var way = sync.OnceValues(func() (Way, error) {
	way := WayRoot
	if os.Getenv(insideUserNS) != "" {
		way = WayUserNS
	}
	output, err := exec.Command(shimPath, "probe", string(way)).CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("%w: %s", err, output)
	}
	return way, nil
})

const insideUserNS = "TUNEWARD_TEST_INSIDE_USER_NAMESPACE"

// TestUnprivileged runs every test of this file again as uid 0 of a user namespace, which is how the
// program runs for people who are not root.
func TestUnprivileged(t *testing.T) {
	if os.Getenv(insideUserNS) != "" {
		t.Skip("this is the inner run")
	}
	command := exec.Command("/proc/self/exe", "-test.run=TestContainer", "-test.v")
	command.Env = append(os.Environ(), insideUserNS+"=1")
	command.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  unix.CLONE_NEWUSER | unix.CLONE_NEWNS,
		UidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getuid(), Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getgid(), Size: 1}},
	}
	output, err := command.CombinedOutput()
	if errors.Is(err, unix.EPERM) {
		t.Skip("user namespaces are not allowed here")
	}
	if err != nil {
		t.Fatalf("%v\n%s", err, output)
	}
	if bytes.Contains(output, []byte("--- SKIP")) {
		t.Skipf("skipped inside:\n%s", output)
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

func TestContainerIsPidOneOfItsOwnHostWithThePodsUser(t *testing.T) {
	w := newWorld(t)
	got := w.output(restricted("sh", "-c", "echo $$; hostname; id -u; grep CapEff /proc/self/status"))
	want := "1\npod-0\n65532\nCapEff:\t0000000000000000\n"
	if got != want {
		t.Errorf("got %q, want %q", got, want)
	}
}

func TestContainerExitCodeAndTimesAreReported(t *testing.T) {
	w := newWorld(t)
	status := w.end(w.run(restricted("sh", "-c", "exit 7")))
	if status.ExitCode != 7 || status.Reason != "Error" || status.FinishedAt < status.StartedAt {
		t.Errorf("got %v", status)
	}
	status = w.end(w.run(restricted("sh", "-c", "kill -9 1; kill -9 0; exit 0"))) // 0: its process group
	if status.ExitCode != 0 || status.Reason != "Completed" {
		t.Errorf("a container must kill neither its first process nor its shim: %v", status)
	}
}

func TestContainerThatCannotStartSaysWhyAndIsExited128(t *testing.T) {
	for command, want := range map[string]string{
		"no-such-program": `exec: "no-such-program": executable file not found in $PATH`,
		"/no/such":        `exec: "/no/such": no such file or directory`,
		"/etc":            "permission denied",
	} {
		t.Run(command, func(t *testing.T) {
			w := newWorld(t)
			id := w.create(restricted(command))
			err := w.runtime.StartContainer(w.ctx, id)
			if err == nil || !strings.Contains(err.Error(), want) {
				t.Errorf("got %v, want %q", err, want)
			}
			status := w.status(id)
			if status.ExitCode != 128 || status.Reason != "StartError" || !strings.Contains(status.Message, want) {
				t.Errorf("got %v", status)
			}
		})
	}
}

func TestContainerWithoutCommandIsRefusedWithASentence(t *testing.T) {
	w := newWorld(t)
	_, err := w.runtime.CreateContainer(w.ctx, w.pod, restricted(), nil)
	want := `container "main" has no command: the local Kubernetes reads no images and so knows no entrypoint of "python"; ` +
		"set the container's command in the pod's spec"
	if err == nil || err.Error() != want {
		t.Errorf("got %v, want %s", err, want)
	}
}

// volumes are mounts at places that do not exist on any machine, below a link, and over a file.
func (w *world) volumes() (directory string, mounts []*runtimeapi.Mount) {
	directory = w.t.TempDir()
	w.must(os.Mkdir(filepath.Join(directory, "sub"), 0o777))
	w.must(os.WriteFile(filepath.Join(directory, "hosts"), []byte("127.9.9.9 elsewhere\n"), 0o644))
	w.must(os.WriteFile(filepath.Join(directory, "message"), nil, 0o666))
	return directory, []*runtimeapi.Mount{
		{HostPath: filepath.Join(directory, "sub"), ContainerPath: "/mnt/tuneward-run/inner/sub"},
		{HostPath: directory, ContainerPath: "/mnt/tuneward-run", Readonly: true},
		{HostPath: directory, ContainerPath: "/var/run/tuneward-secrets/token"},
		{HostPath: filepath.Join(directory, "hosts"), ContainerPath: "/etc/hosts"},
		{HostPath: filepath.Join(directory, "message"), ContainerPath: "/dev/termination-log"},
	}
}

func TestContainerVolumesAppearAndTheMachineStaysAsItWas(t *testing.T) {
	w := newWorld(t)
	directory, mounts := w.volumes()
	// Where a mount lies below a read-only one, its directory has to exist there, as in any runtime.
	w.must(os.MkdirAll(filepath.Join(directory, "inner", "sub"), 0o777))
	before := mountTable(t)
	config := restricted("sh", "-c", `cat /etc/hosts; echo done >/dev/termination-log; echo y >/mnt/tuneward-run/inner/sub/x
		touch /mnt/tuneward-run/no 2>/dev/null || echo refused; ls /run/tuneward-secrets/token/sub; echo n >/dev/null; [ -c /dev/zero ] && echo device`)
	config.Mounts = mounts
	if got, want := w.output(config), "127.9.9.9 elsewhere\nrefused\nx\ndevice\n"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	if message, _ := os.ReadFile(filepath.Join(directory, "message")); string(message) != "done\n" {
		t.Errorf("termination message %q", message)
	}
	for _, path := range []string{"/mnt/tuneward-run", "/run/tuneward-secrets", "/dev/termination-log"} {
		if _, err := os.Lstat(path); err == nil {
			t.Errorf("%s was made on the machine", path)
		}
	}
	if after := mountTable(t); after != before {
		t.Errorf("the machine's mounts changed:\n%s\n%s", before, after)
	}
}

func mountTable(t *testing.T) string {
	t.Helper()
	table, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		t.Fatal(err)
	}
	return string(table)
}

func TestContainerReadOnlyRootIsReadOnlyExceptVolumesAndDev(t *testing.T) {
	w := newWorld(t)
	config := restricted("sh", "-c", `for f in /etc/x /x /tmp/x /usr/x; do touch $f 2>/dev/null && echo wrote $f; done
		echo > /dev/null; touch /dev/shm/x && echo shm; touch /data/x && echo data`)
	config.Mounts = []*runtimeapi.Mount{{HostPath: t.TempDir(), ContainerPath: "/data"}}
	if got, want := w.output(config), "shm\ndata\n"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
}

func TestContainerWorkingDirectoryIsMadeAndLargeEnvironmentArrives(t *testing.T) {
	w := newWorld(t)
	config := restricted("sh", "-c", `pwd; echo ${#A_100}; env | wc -c; echo $HOME`)
	config.WorkingDir = "/no/such/place"
	for i := range 40 {
		config.Envs = append(config.Envs, &runtimeapi.KeyValue{
			Key: fmt.Sprintf("A_%d", 100+i), Value: bytes.Repeat([]byte("x"), 20_000)})
	}
	var length int
	got := w.output(config)
	var pwd, size, home string
	if _, err := fmt.Sscan(got, &pwd, &size, &length, &home); err != nil || pwd != "/no/such/place" || size != "20000" ||
		length < 800_000 || home != "/nowhere" {
		t.Errorf("got %q (%v)", got, err)
	}
}

func TestContainerHasSharedMemoryOfItsOwn(t *testing.T) {
	w := newWorld(t)
	w.output(restricted("sh", "-c", "echo x > /dev/shm/tuneward-test"))
	if _, err := os.Lstat("/dev/shm/tuneward-test"); err == nil {
		t.Error("/dev/shm is the machine's")
	}
}

func TestContainerExecRunsInItsNamespacesWithItsUserAndEnvironment(t *testing.T) {
	w := newWorld(t)
	config := restricted("sleep", "1000")
	config.Mounts = []*runtimeapi.Mount{{HostPath: t.TempDir(), ContainerPath: "/data"}}
	config.Envs = []*runtimeapi.KeyValue{{Key: "A", Value: []byte("b")}}
	config.WorkingDir = "/data"
	id := w.run(config)
	stdout, stderr, err := w.runtime.ExecSync(w.ctx, id,
		[]string{"sh", "-c", "id -u; hostname; pwd; echo $A; tr '\\0' ' ' </proc/1/cmdline; grep CapEff /proc/self/status; echo e >&2; exit 3"}, 0)
	want := "65532\npod-0\n/data\nb\nsleep 1000 CapEff:\t0000000000000000\n"
	var exit utilexec.ExitError
	if string(stdout) != want || string(stderr) != "e\n" || !errors.As(err, &exit) || exit.ExitStatus() != 3 {
		t.Errorf("got %q, %q, %v", stdout, stderr, err)
	}
	_, stderr, err = w.runtime.ExecSync(w.ctx, id, []string{"nothing-like-it"}, 0)
	if !errors.As(err, &exit) || exit.ExitStatus() != 127 || !strings.Contains(string(stderr), "not found") {
		t.Errorf("got %q, %v", stderr, err)
	}
}

func TestContainerExecThatTimesOutIsKilledAndFails(t *testing.T) {
	w := newWorld(t)
	id := w.run(restricted("sleep", "1000"))
	_, stderr, err := w.runtime.ExecSync(w.ctx, id, []string{"sleep", "4321"}, 100*time.Millisecond)
	var exit utilexec.ExitError
	if !errors.As(err, &exit) || !strings.Contains(string(stderr), "timed out after 100ms") {
		t.Errorf("got %q, %v", stderr, err)
	}
	stdout, _, err := w.runtime.ExecSync(w.ctx, id, []string{"sh", "-c", "cat /proc/[0-9]*/cmdline | tr '\\0' ' '"}, 0)
	if err != nil || strings.Contains(string(stdout), "4321") {
		t.Errorf("the command still runs: %q, %v", stdout, err)
	}
	if stdout, _, _ = w.runtime.ExecSync(w.ctx, id, []string{"sh", "-c", "cat /proc/[0-9]*/status"}, 0); bytes.Contains(stdout, []byte("zombie")) {
		t.Errorf("the command was not collected: %s", stdout)
	}
}

func TestContainerExecStreamsInputAndSurvivesAClientThatNeverCloses(t *testing.T) {
	w := newWorld(t)
	id := w.run(restricted("sleep", "1000"))
	in, inW, err := os.Pipe()
	w.must(err)
	defer inW.Close()
	_, err = inW.WriteString("one line\n")
	w.must(err)
	var out closingBuffer
	err = w.runtime.streams.Exec(w.ctx, id, []string{"sh", "-c", "read a; echo got $a; exit 4"}, in, &out, nil, false, nil)
	var exit utilexec.ExitError
	if out.String() != "got one line\n" || !errors.As(err, &exit) || exit.ExitStatus() != 4 {
		t.Errorf("got %q, %v", out.String(), err)
	}
	var terminal closingBuffer
	err = w.runtime.streams.Exec(w.ctx, id, []string{"sh", "-c", "tty >/dev/null && echo terminal"}, nil, &terminal, nil, true, nil)
	if terminal.String() != "terminal\r\n" || err != nil {
		t.Errorf("got %q, %v", terminal.String(), err)
	}
}

type closingBuffer struct{ bytes.Buffer }

func (*closingBuffer) Close() error { return nil }

func TestContainerStopGivesGraceThenKills(t *testing.T) {
	w := newWorld(t)
	id := w.run(restricted("sh", "-c", "trap 'echo bye; exit 0' TERM; echo ready; while :; do sleep 0.05; done"))
	w.awaitLog("ready")
	w.must(w.runtime.StopContainer(w.ctx, id, 999))
	if status := w.status(id); status.ExitCode != 0 || !strings.Contains(w.log(), "bye") {
		t.Errorf("got %v, log %q", status, w.log())
	}
	id = w.run(restricted("sleep", "1000")) // ignores TERM, being pid 1 without a handler
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

func TestContainerPortForwardReachesThePodsAddress(t *testing.T) {
	w := newWorld(t)
	status, err := w.runtime.PodSandboxStatus(w.ctx, w.pod, false)
	w.must(err)
	listener, err := net.Listen("tcp", net.JoinHostPort(status.Status.Network.Ip, "0"))
	w.must(err)
	defer listener.Close()
	go func() {
		connection, err := listener.Accept()
		if err == nil {
			_, _ = connection.Write([]byte("hello"))
			connection.Close()
		}
	}()
	client, server := net.Pipe()
	port := listener.Addr().(*net.TCPAddr).Port
	go func() { _ = w.runtime.streams.PortForward(w.ctx, w.pod, int32(port), server) }()
	answer := make([]byte, 5)
	if _, err := client.Read(answer); err != nil || string(answer) != "hello" {
		t.Errorf("got %q, %v", answer, err)
	}
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
