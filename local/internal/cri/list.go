package cri

import (
	"context"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// ListContainers lists containers.
func (r *Runtime) ListContainers(_ context.Context, filter *runtimeapi.ContainerFilter) ([]*runtimeapi.Container, error) {
	var list []*runtimeapi.Container
	for _, c := range r.snapshot() {
		state := c.state()
		if !c.matches(filter, state) {
			continue
		}
		list = append(list, &runtimeapi.Container{
			Id: c.ID, PodSandboxId: c.SandboxID, Metadata: c.metadata(), State: state, CreatedAt: c.CreatedAt,
			Image: c.imageSpec(), ImageRef: c.ImageID, ImageId: c.ImageID,
			Labels: c.Labels, Annotations: c.Annotations,
		})
	}
	return list, nil
}

// snapshot copies the list of containers, so that no lock is held while they are looked at.
func (r *Runtime) snapshot() []*container {
	r.mu.Lock()
	defer r.mu.Unlock()
	list := make([]*container, 0, len(r.containers))
	for _, c := range r.containers {
		list = append(list, c)
	}
	return list
}

func (c *container) matches(filter *runtimeapi.ContainerFilter, state runtimeapi.ContainerState) bool {
	if id := filter.GetId(); id != "" && id != c.ID {
		return false
	}
	if id := filter.GetPodSandboxId(); id != "" && id != c.SandboxID {
		return false
	}
	if want := filter.GetState(); want != nil && want.State != state {
		return false
	}
	return selected(c.Labels, filter.GetLabelSelector())
}

// ContainerStatus describes a container.
func (r *Runtime) ContainerStatus(_ context.Context, id string, _ bool) (*runtimeapi.ContainerStatusResponse, error) {
	c, err := r.container(id)
	if err != nil {
		return nil, err
	}
	state := c.state()
	status := &runtimeapi.ContainerStatus{
		Id: c.ID, Metadata: c.metadata(), State: state, CreatedAt: c.CreatedAt,
		Image: c.imageSpec(), ImageRef: c.ImageID, ImageId: c.ImageID,
		Labels: c.Labels, Annotations: c.Annotations, LogPath: c.LogPath,
		StopSignal: runtimeapi.Signal(c.StopSignal),
	}
	for _, m := range c.Mounts {
		status.Mounts = append(status.Mounts, &runtimeapi.Mount{
			HostPath: m.Source, ContainerPath: m.Target, Readonly: m.ReadOnly, RecursiveReadOnly: m.RecursiveReadOnly,
		})
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	status.StartedAt = c.running.StartedAt
	if c.exit != nil {
		status.FinishedAt, status.ExitCode = c.exit.FinishedAt, c.exit.Code
		status.Reason, status.Message = c.exit.Reason, c.exit.Message
		// A start error has no start; the kubelet would print 1970.
		if status.StartedAt == 0 {
			status.StartedAt = c.exit.FinishedAt
		}
	}
	return &runtimeapi.ContainerStatusResponse{Status: status}, nil
}

func (c *container) metadata() *runtimeapi.ContainerMetadata {
	return &runtimeapi.ContainerMetadata{Name: c.Name, Attempt: c.Attempt}
}

func (c *container) imageSpec() *runtimeapi.ImageSpec {
	return &runtimeapi.ImageSpec{Image: c.Image, UserSpecifiedImage: c.Image}
}
