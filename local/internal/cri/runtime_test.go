package cri

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func TestContainerIsPidOneOfItsOwnHostWithThePodsUser(t *testing.T) {
	w := newWorld(t)
	w.needsNamespaces()
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
}

func TestContainerKillsNeitherItsFirstProcessNorItsShim(t *testing.T) {
	w := newWorld(t)
	w.needsNamespaces()
	status := w.end(w.run(restricted("sh", "-c", "kill -9 1; kill -9 0; exit 0"))) // 0: its process group
	if status.ExitCode != 0 || status.Reason != "Completed" {
		t.Errorf("got %v", status)
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
	want := "127.9.9.9 elsewhere\nrefused\nx\ndevice\n"
	if w.cfg.Way == WayNotify {
		want = strings.Replace(want, "refused\n", "", 1)
	}
	if got := w.output(config); got != want {
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
	w.needsNamespaces()
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
	w.needsNamespaces()
	w.output(restricted("sh", "-c", "echo x > /dev/shm/tuneward-test"))
	if _, err := os.Lstat("/dev/shm/tuneward-test"); err == nil {
		t.Error("/dev/shm is the machine's")
	}
}

// A path call that a signal interrupts begins anew; without namespaces the shim changes its registers in
// between and must not mistake the signal handler's for them.
func TestContainerPathCallsSurviveSignals(t *testing.T) {
	if _, err := exec.LookPath("python3"); err != nil {
		t.Skip("there is no python3")
	}
	w := newWorld(t)
	config := restricted("python3", "-c", `
import os, signal, threading
ticks = 0
def tick(*_):
    global ticks
    ticks += 1
signal.signal(signal.SIGALRM, tick)
signal.siginterrupt(signal.SIGALRM, False)
signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
def work(name):
    for i in range(150):
        path = f"/tuneward-data/{name}.{i}"
        with open(path, "w") as file: file.write(path)
        os.rename(path, path + ".new")
        assert open(path + ".new").read() == path
        os.stat(path + ".new"); os.unlink(path + ".new")
threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
[t.start() for t in threads]; work("main"); [t.join() for t in threads]
signal.setitimer(signal.ITIMER_REAL, 0)
print(os.listdir("/tuneward-data"), ticks > 0)
`)
	config.Mounts = []*runtimeapi.Mount{{HostPath: t.TempDir(), ContainerPath: "/tuneward-data"}}
	if got, want := w.output(config), "[] True\n"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
}
