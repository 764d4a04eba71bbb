package server

import (
	"bytes"
	"flag"
	"io"
	"os"

	"golang.org/x/sys/unix"
	"k8s.io/klog/v2"
)

// maxLog is when a start begins a new log; the last one is kept as local.log.1.
const maxLog = 64 << 20

// redirectOutput sends what the components print to the log, panics too, and returns the terminal's
// standard output for the ready line.
func redirectOutput(path string) (terminal *os.File, err error) {
	if info, err := os.Stat(path); err == nil && info.Size() > maxLog {
		_ = os.Rename(path, path+".1")
	}
	log, err := os.OpenFile(path, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, err
	}
	saved, err := unix.FcntlInt(1, unix.F_DUPFD_CLOEXEC, 3)
	if err != nil {
		return nil, err
	}
	for _, fd := range []int{1, 2} {
		if err := unix.Dup3(int(log.Fd()), fd, 0); err != nil {
			return nil, err
		}
	}
	if err := configureKlog(log); err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(saved), "stdout"), nil
}

func configureKlog(log io.Writer) error {
	flags := flag.NewFlagSet("klog", flag.ContinueOnError)
	klog.InitFlags(flags)
	// Each entry once: by default an error is written as error, warning and info, and to stderr.
	for name, value := range map[string]string{"logtostderr": "false", "one_output": "true", "stderrthreshold": "FATAL"} {
		if err := flags.Set(name, value); err != nil {
			return err
		}
	}
	klog.SetOutput(filteredLog{log})
	return nil
}

// expected are lines that say nothing here, some of them every 10 seconds.
var expected = [][]byte{
	// The kubelet refuses loopback addresses for its node; the node package patches one in.
	[]byte("Failed to set some node status fields"),
	[]byte("can't be loopback address"),
	// Containers have no cgroups of their own.
	[]byte("failed to read memory cgroup"),
	[]byte("failed to construct signal"),
	// The API server's start: retired versions, and etcd's connections as each resource tries its own.
	[]byte("because it has no resources"),
	[]byte("/proc/self/cwd/etcd.sock"),
	[]byte("The manifest file is empty, ignoring"),
}

type filteredLog struct{ to io.Writer }

// Write gets one entry a call, as klog writes them.
func (f filteredLog) Write(entry []byte) (int, error) {
	for _, text := range expected {
		if bytes.Contains(entry, text) {
			return len(entry), nil
		}
	}
	return f.to.Write(entry)
}
