package cri

import (
	"bytes"
	"errors"
	"net"
	"os"
	"strings"
	"testing"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	utilexec "k8s.io/utils/exec"
)

func TestContainerExecRunsInItsFilesystemWithItsEnvironment(t *testing.T) {
	w := newWorld(t)
	config := restricted("sleep", "1000")
	config.Mounts = []*runtimeapi.Mount{{HostPath: t.TempDir(), ContainerPath: "/data"}}
	config.Envs = []*runtimeapi.KeyValue{{Key: "A", Value: []byte("b")}}
	config.WorkingDir = "/data"
	id := w.run(config)
	stdout, stderr, err := w.runtime.ExecSync(w.ctx, id,
		[]string{"sh", "-c", "hostname; pwd; echo $A; echo e >&2; exit 3"}, 0)
	want := "pod-0\n/data\nb\n"
	var exit utilexec.ExitError
	if string(stdout) != want || string(stderr) != "e\n" || !errors.As(err, &exit) || exit.ExitStatus() != 3 {
		t.Errorf("got %q, %q, %v", stdout, stderr, err)
	}
	_, stderr, err = w.runtime.ExecSync(w.ctx, id, []string{"nothing-like-it"}, 0)
	if !errors.As(err, &exit) || exit.ExitStatus() != 127 || !strings.Contains(string(stderr), "not found") {
		t.Errorf("got %q, %v", stderr, err)
	}
}

func TestContainerExecIsTheContainersUserAmongItsProcesses(t *testing.T) {
	w := newWorld(t)
	w.needsNamespaces()
	id := w.run(restricted("sleep", "1000"))
	stdout, _, err := w.runtime.ExecSync(w.ctx, id,
		[]string{"sh", "-c", "id -u; tr '\\0' ' ' </proc/1/cmdline; grep CapEff /proc/self/status"}, 0)
	want := "65532\nsleep 1000 CapEff:\t0000000000000000\n"
	if string(stdout) != want || err != nil {
		t.Errorf("got %q, %v", stdout, err)
	}
}

// The command says its own process id, and only that one is looked for: without a process namespace a container
// sees every process of the machine, and others may be zombies there.
func TestContainerExecThatTimesOutIsKilledAndFails(t *testing.T) {
	w := newWorld(t)
	id := w.run(restricted("sleep", "1000"))
	stdout, stderr, err := w.runtime.ExecSync(w.ctx, id, []string{"sh", "-c", "echo $$; exec sleep 1000"}, time.Second)
	var exit utilexec.ExitError
	if !errors.As(err, &exit) || !strings.Contains(string(stderr), "timed out after 1s") {
		t.Errorf("got %q, %v", stderr, err)
	}
	pid := strings.TrimSpace(string(stdout))
	if pid == "" {
		t.Fatal("the command never started")
	}
	// Its directory is there until it is collected.
	stdout, stderr, err = w.runtime.ExecSync(w.ctx, id, []string{"cat", "/proc/" + pid + "/status"}, 0)
	if !errors.As(err, &exit) {
		t.Errorf("the command still runs, or was not collected: %s%s%v", stdout, stderr, err)
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
