package node

import (
	"context"
	"sort"

	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	internalapi "k8s.io/cri-api/pkg/apis"
	"k8s.io/kubernetes/pkg/kubelet/cm"
	"k8s.io/kubernetes/pkg/kubelet/config"
	kubecontainer "k8s.io/kubernetes/pkg/kubelet/container"
	"k8s.io/kubernetes/pkg/kubelet/status"

	"tuneward.dev/local/internal/gpu"
)

// containerManager is upstream's stub (no cgroups, no device plugins) with the node's disk and GPUs.
type containerManager struct {
	cm.ContainerManager
	dir        string
	gpus       *gpu.Assigner
	activePods cm.ActivePodsFunc
}

func newContainerManager(dir string, gpus *gpu.Assigner) *containerManager {
	announced := v1.ResourceList{}
	if gpus.Count() > 0 {
		announced[gpu.Resource] = *resource.NewQuantity(int64(gpus.Count()), resource.DecimalSI)
	}
	return &containerManager{
		ContainerManager: cm.NewStubContainerManagerWithDevicePluginResource(announced),
		dir:              dir,
		gpus:             gpus,
		activePods:       func() []*v1.Pod { return nil },
	}
}

func (m *containerManager) Start(ctx context.Context, node *v1.Node, active cm.ActivePodsFunc, getNode cm.GetNodeFunc,
	sources config.SourcesReady, statuses status.PodStatusProvider, runtime internalapi.RuntimeService, localStorage bool) error {
	m.activePods = active
	return m.ContainerManager.Start(ctx, node, active, getNode, sources, statuses, runtime, localStorage)
}

// GetCapacity gives the node its disk: with 0, pods that ask for ephemeral storage stay Pending.
func (m *containerManager) GetCapacity(bool) v1.ResourceList {
	info, err := fsInfo(m.dir)
	if err != nil {
		return v1.ResourceList{}
	}
	return v1.ResourceList{v1.ResourceEphemeralStorage: *resource.NewQuantity(int64(info.Capacity), resource.BinarySI)}
}

// GetDevicePluginResourceCapacity announces 0 where there are none now but may have been: the node object
// in etcd remembers.
func (m *containerManager) GetDevicePluginResourceCapacity() (v1.ResourceList, v1.ResourceList, []string) {
	capacity, allocatable, removed := m.ContainerManager.GetDevicePluginResourceCapacity()
	if m.gpus.Count() == 0 {
		removed = append(removed, gpu.Resource)
	}
	return capacity, allocatable, removed
}

// GetResources is called for each start of a container.
func (m *containerManager) GetResources(_ context.Context, pod *v1.Pod, container *v1.Container) (*kubecontainer.RunContainerOptions, error) {
	wanted := container.Resources.Limits[gpu.Resource]
	var devices []string
	if count := int(wanted.Value()); count > 0 {
		var err error
		if devices, err = m.gpus.Assign(string(pod.UID), container.Name, count, m.activeUIDs()); err != nil {
			return nil, err
		}
	}
	options := &kubecontainer.RunContainerOptions{}
	for name, value := range m.gpus.Environment(devices) {
		options.Envs = append(options.Envs, kubecontainer.EnvVar{Name: name, Value: value})
	}
	sort.Slice(options.Envs, func(i, j int) bool { return options.Envs[i].Name < options.Envs[j].Name })
	return options, nil
}

func (m *containerManager) activeUIDs() []string {
	pods := m.activePods()
	uids := make([]string, 0, len(pods))
	for _, pod := range pods {
		uids = append(uids, string(pod.UID))
	}
	return uids
}
