package node

import (
	"bytes"
	"context"
	"os"
	"runtime"
	"strings"
	"time"

	cadvisorapi "github.com/google/cadvisor/info/v1"
	cadvisorapiv2 "github.com/google/cadvisor/info/v2"
	"golang.org/x/sys/unix"
	cadvisortest "k8s.io/kubernetes/pkg/kubelet/cadvisor/testing"
)

// machine answers what the kubelet asks cAdvisor. The real one would watch every cgroup of the machine,
// of which none is ours, and needs root.
type machine struct {
	cadvisortest.Fake
	dir string
}

func (m *machine) MachineInfo() (*cadvisorapi.MachineInfo, error) {
	return &cadvisorapi.MachineInfo{
		NumCores:       runtime.NumCPU(),
		MemoryCapacity: memoryCapacity(),
		MachineID:      readLine("/etc/machine-id"),
		SystemUUID:     readLine("/etc/machine-id"),
		// By another BootID the kubelet knows that the machine was started anew.
		BootID: readLine("/proc/sys/kernel/random/boot_id"),
	}, nil
}

func (m *machine) VersionInfo() (*cadvisorapi.VersionInfo, error) {
	return &cadvisorapi.VersionInfo{
		KernelVersion:      readLine("/proc/sys/kernel/osrelease"),
		ContainerOsVersion: osName(),
	}, nil
}

func (m *machine) RootFsInfo() (cadvisorapiv2.FsInfo, error) { return fsInfo(m.dir) }

func (m *machine) ImagesFsInfo(context.Context) (cadvisorapiv2.FsInfo, error) { return fsInfo(m.dir) }

func (m *machine) ContainerFsInfo(context.Context) (cadvisorapiv2.FsInfo, error) {
	return fsInfo(m.dir)
}

func (m *machine) GetDirFsInfo(path string) (cadvisorapiv2.FsInfo, error) { return fsInfo(path) }

// ContainerInfoV2 gives the machine one sample: without one, the kubelet's summary logs an error each time.
func (m *machine) ContainerInfoV2(name string, _ cadvisorapiv2.RequestOptions) (map[string]cadvisorapiv2.ContainerInfo, error) {
	used := memoryCapacity() - memoryAvailable()
	now := time.Now()
	return map[string]cadvisorapiv2.ContainerInfo{name: {
		Spec: cadvisorapiv2.ContainerSpec{CreationTime: now, HasCpu: true, HasMemory: true},
		Stats: []*cadvisorapiv2.ContainerStats{{
			Timestamp: now,
			Cpu:       &cadvisorapi.CpuStats{},
			Memory:    &cadvisorapi.MemoryStats{Usage: used, WorkingSet: used},
		}},
	}}, nil
}

func fsInfo(path string) (cadvisorapiv2.FsInfo, error) {
	var stat unix.Statfs_t
	if err := unix.Statfs(path, &stat); err != nil {
		return cadvisorapiv2.FsInfo{}, err
	}
	size := uint64(stat.Bsize)
	inodes, free := stat.Files, stat.Ffree
	return cadvisorapiv2.FsInfo{
		Timestamp: time.Now(), Device: path, Mountpoint: path,
		Capacity: stat.Blocks * size, Available: stat.Bavail * size, Usage: (stat.Blocks - stat.Bfree) * size,
		Inodes: &inodes, InodesFree: &free,
	}, nil
}

// memoryCapacity is the machine's or, in a container with a limit, the container's.
func memoryCapacity() uint64 {
	total := meminfo("MemTotal:")
	if limit := parseUint(readLine("/sys/fs/cgroup/memory.max")); limit != 0 && limit < total {
		return limit
	}
	return total
}

func memoryAvailable() uint64 { return min(meminfo("MemAvailable:"), memoryCapacity()) }

func meminfo(key string) uint64 {
	data, _ := os.ReadFile("/proc/meminfo")
	for _, line := range bytes.Split(data, []byte("\n")) {
		fields := strings.Fields(string(line))
		if len(fields) >= 2 && fields[0] == key {
			return parseUint(fields[1]) * 1024
		}
	}
	return 0
}

func parseUint(text string) uint64 {
	var value uint64
	for _, digit := range []byte(text) {
		if digit < '0' || digit > '9' {
			return 0
		}
		value = value*10 + uint64(digit-'0')
	}
	return value
}

func readLine(path string) string {
	data, _ := os.ReadFile(path)
	line, _, _ := strings.Cut(string(data), "\n")
	return line
}

func osName() string {
	data, _ := os.ReadFile("/etc/os-release")
	for _, line := range strings.Split(string(data), "\n") {
		if name, found := strings.CutPrefix(line, "PRETTY_NAME="); found {
			return strings.Trim(name, `"`)
		}
	}
	return "Linux"
}
