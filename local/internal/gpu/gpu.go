// Package gpu finds the machine's GPUs and decides which container gets which.
//
// The kubelet only counts: with its stub container manager, the choice of devices (and its memory over a
// restart) is ours.
package gpu

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
)

// Resource is the name under which GPUs are announced.
const Resource = "nvidia.com/gpu"

// Find returns the indexes of the machine's GPUs; none when there is no driver.
func Find(ctx context.Context) []string {
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	output, err := exec.CommandContext(ctx, "nvidia-smi", "--query-gpu=index", "--format=csv,noheader").Output()
	if err != nil {
		return nil
	}
	return parseIndexes(string(output))
}

func parseIndexes(output string) []string {
	var indexes []string
	for _, line := range strings.Split(output, "\n") {
		line = strings.TrimSpace(line)
		if _, err := strconv.Atoi(line); err == nil {
			indexes = append(indexes, line)
		}
	}
	return indexes
}

// Assigner gives GPUs to containers. Its file lets a restarted cluster know what adopted containers hold.
type Assigner struct {
	path    string
	devices []string
	fake    bool

	mu   sync.Mutex
	held map[string]map[string][]string // pod UID, container, devices
}

// NewAssigner reads what was assigned before. Fake GPUs are announced and counted, and no container sees any.
func NewAssigner(path string, devices []string, fake bool) (*Assigner, error) {
	a := &Assigner{path: path, devices: devices, fake: fake, held: map[string]map[string][]string{}}
	data, err := os.ReadFile(path)
	if errors.Is(err, os.ErrNotExist) {
		return a, nil
	}
	if err != nil {
		return nil, err
	}
	return a, json.Unmarshal(data, &a.held)
}

// Count is how many GPUs the node announces.
func (a *Assigner) Count() int { return len(a.devices) }

// Assign returns the container's GPUs; the same again for a container that restarts. active are the UIDs
// of the pods that may still run: what others held is free.
func (a *Assigner) Assign(pod, container string, count int, active []string) ([]string, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if given := a.held[pod][container]; len(given) == count && a.known(given) {
		return given, nil
	}
	delete(a.held[pod], container)
	free := a.free(append(active, pod))
	if len(free) < count {
		return nil, fmt.Errorf("%d of %s are wanted and %d are free; other containers of this pod or of ending ones still hold the rest", count, Resource, len(free))
	}
	given := free[:count]
	if a.held[pod] == nil {
		a.held[pod] = map[string][]string{}
	}
	a.held[pod][container] = given
	return given, a.save()
}

func (a *Assigner) known(devices []string) bool {
	for _, device := range devices {
		if !slices.Contains(a.devices, device) {
			return false
		}
	}
	return true
}

// free forgets the pods that are gone and returns the devices nobody holds.
func (a *Assigner) free(active []string) []string {
	taken := map[string]bool{}
	for pod, containers := range a.held {
		if !slices.Contains(active, pod) {
			delete(a.held, pod)
			continue
		}
		for _, devices := range containers {
			for _, device := range devices {
				taken[device] = true
			}
		}
	}
	var free []string
	for _, device := range a.devices {
		if !taken[device] {
			free = append(free, device)
		}
	}
	return free
}

func (a *Assigner) save() error {
	data, err := json.Marshal(a.held)
	if err != nil {
		return err
	}
	if err := os.WriteFile(a.path+".new", data, 0o600); err != nil {
		return err
	}
	return os.Rename(a.path+".new", a.path)
}

// Environment is what a container with these GPUs gets; with none of them it sees no GPU.
// CUDA counts in another order than nvidia-smi unless told.
func (a *Assigner) Environment(devices []string) map[string]string {
	list := strings.Join(devices, ",")
	visible := list
	if a.fake {
		visible = ""
	}
	shown := list
	if shown == "" {
		shown = "void"
	}
	return map[string]string{
		"CUDA_DEVICE_ORDER":      "PCI_BUS_ID",
		"CUDA_VISIBLE_DEVICES":   visible,
		"NVIDIA_VISIBLE_DEVICES": shown,
	}
}

// Fake returns the indexes of N GPUs that do not exist.
func Fake(count int) []string {
	devices := make([]string, count)
	for i := range devices {
		devices[i] = strconv.Itoa(i)
	}
	return devices
}
