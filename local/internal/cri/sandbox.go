package cri

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"tuneward.dev/local/internal/shim"
)

// RunPodSandbox gives a pod its address.
func (r *Runtime) RunPodSandbox(_ context.Context, config *runtimeapi.PodSandboxConfig, handler string) (string, error) {
	record, err := r.newSandbox(config, handler)
	if err != nil {
		return "", err
	}
	dir := r.sandboxDir(record.ID)
	err = errors.Join(makeDir(dir), makeLogDir(record.LogDir))
	if err == nil {
		err = shim.WriteJSON(filepath.Join(dir, recordFile), record)
	}
	if err != nil {
		r.addresses.release(record.IP)
		return "", errors.Join(err, os.RemoveAll(dir))
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.sandboxes[record.ID] = record
	return record.ID, nil
}

func (r *Runtime) newSandbox(config *runtimeapi.PodSandboxConfig, handler string) (*sandboxRecord, error) {
	meta := config.GetMetadata()
	network := config.GetLinux().GetSecurityContext().GetNamespaceOptions().GetNetwork()
	record := &sandboxRecord{
		ID: newID(), Name: meta.GetName(), Namespace: meta.GetNamespace(), UID: meta.GetUid(), Attempt: meta.GetAttempt(),
		Labels: config.GetLabels(), Annotations: config.GetAnnotations(), Handler: handler,
		Hostname: config.GetHostname(), LogDir: config.GetLogDirectory(),
		HostNetwork: network == runtimeapi.NamespaceMode_NODE,
		CreatedAt:   time.Now().UnixNano(),
	}
	// A POD or NODE namespace for processes would need a process that holds it; nothing here has asked for one.
	if pid := config.GetLinux().GetSecurityContext().GetNamespaceOptions().GetPid(); pid != runtimeapi.NamespaceMode_CONTAINER {
		r.cfg.Logf("pod %s/%s shares processes (%s): its containers get a process namespace each all the same",
			record.Namespace, record.Name, pid)
	}
	if record.HostNetwork {
		return record, nil
	}
	var err error
	record.IP, err = r.addresses.take()
	return record, err
}

func makeLogDir(dir string) error {
	if dir == "" {
		return nil
	}
	return os.MkdirAll(dir, 0o755)
}

// StopPodSandbox kills what still runs in a sandbox and gives its address back. The kubelet has stopped
// the containers with their grace before.
func (r *Runtime) StopPodSandbox(ctx context.Context, id string) error {
	record, err := r.sandbox(id)
	if err != nil {
		return nil // gone is stopped
	}
	for _, c := range r.containersOf(id) {
		if err := r.stop(ctx, c, 0); err != nil {
			return err
		}
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if record.Stopped {
		return nil
	}
	stopped := *record
	stopped.Stopped = true
	if err := shim.WriteJSON(filepath.Join(r.sandboxDir(id), recordFile), stopped); err != nil {
		return err
	}
	// Replaced, not changed: lists made earlier may still be read.
	r.sandboxes[id] = &stopped
	r.addresses.release(record.IP)
	return nil
}

// RemovePodSandbox forgets a sandbox and its containers.
func (r *Runtime) RemovePodSandbox(ctx context.Context, id string) error {
	if _, err := r.sandbox(id); err != nil {
		return nil
	}
	if err := r.StopPodSandbox(ctx, id); err != nil {
		return err
	}
	for _, c := range r.containersOf(id) {
		if err := r.RemoveContainer(ctx, c.ID); err != nil {
			return err
		}
	}
	if err := os.RemoveAll(r.sandboxDir(id)); err != nil {
		return err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.sandboxes, id)
	return nil
}

func (r *Runtime) containersOf(sandboxID string) []*container {
	r.mu.Lock()
	defer r.mu.Unlock()
	var found []*container
	for _, c := range r.containers {
		if c.SandboxID == sandboxID {
			found = append(found, c)
		}
	}
	return found
}

// PodSandboxStatus describes a sandbox.
func (r *Runtime) PodSandboxStatus(_ context.Context, id string, _ bool) (*runtimeapi.PodSandboxStatusResponse, error) {
	s, err := r.sandbox(id)
	if err != nil {
		return nil, err
	}
	network := runtimeapi.NamespaceMode_POD
	if s.HostNetwork {
		network = runtimeapi.NamespaceMode_NODE
	}
	return &runtimeapi.PodSandboxStatusResponse{Status: &runtimeapi.PodSandboxStatus{
		Id: s.ID, Metadata: s.metadata(), State: s.state(), CreatedAt: s.CreatedAt,
		Labels: s.Labels, Annotations: s.Annotations, RuntimeHandler: s.Handler,
		Network: &runtimeapi.PodSandboxNetworkStatus{Ip: s.IP},
		Linux: &runtimeapi.LinuxPodSandboxStatus{Namespaces: &runtimeapi.Namespace{
			Options: &runtimeapi.NamespaceOption{Network: network, Pid: runtimeapi.NamespaceMode_CONTAINER},
		}},
	}}, nil
}

// ListPodSandbox lists sandboxes.
func (r *Runtime) ListPodSandbox(_ context.Context, filter *runtimeapi.PodSandboxFilter) ([]*runtimeapi.PodSandbox, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	var list []*runtimeapi.PodSandbox
	for _, s := range r.sandboxes {
		if !s.matches(filter) {
			continue
		}
		list = append(list, &runtimeapi.PodSandbox{
			Id: s.ID, Metadata: s.metadata(), State: s.state(), CreatedAt: s.CreatedAt,
			Labels: s.Labels, Annotations: s.Annotations, RuntimeHandler: s.Handler,
		})
	}
	return list, nil
}

func (s *sandboxRecord) matches(filter *runtimeapi.PodSandboxFilter) bool {
	if id := filter.GetId(); id != "" && id != s.ID {
		return false
	}
	if want := filter.GetState(); want != nil && want.State != s.state() {
		return false
	}
	return selected(s.Labels, filter.GetLabelSelector())
}

func (s *sandboxRecord) state() runtimeapi.PodSandboxState {
	if s.Stopped {
		return runtimeapi.PodSandboxState_SANDBOX_NOTREADY
	}
	return runtimeapi.PodSandboxState_SANDBOX_READY
}

func (s *sandboxRecord) metadata() *runtimeapi.PodSandboxMetadata {
	return &runtimeapi.PodSandboxMetadata{Name: s.Name, Namespace: s.Namespace, Uid: s.UID, Attempt: s.Attempt}
}

// selected says whether labels hold every pair of a selector.
func selected(labels, selector map[string]string) bool {
	for key, value := range selector {
		if own, ok := labels[key]; !ok || own != value {
			return false
		}
	}
	return true
}

// UpdatePodSandboxResources is a no-op: there are no cgroups.
func (r *Runtime) UpdatePodSandboxResources(context.Context, *runtimeapi.UpdatePodSandboxResourcesRequest) (
	*runtimeapi.UpdatePodSandboxResourcesResponse, error) {
	return &runtimeapi.UpdatePodSandboxResourcesResponse{}, nil
}
