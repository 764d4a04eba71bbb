package node

import (
	"context"
	"fmt"
	"syscall"
	"time"

	"go.opentelemetry.io/otel/trace/noop"
	v1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	kubeletapp "k8s.io/kubernetes/cmd/kubelet/app"
	"k8s.io/kubernetes/cmd/kubelet/app/options"
	"k8s.io/kubernetes/pkg/kubelet"
	kubeletconfig "k8s.io/kubernetes/pkg/kubelet/apis/config"
	"k8s.io/kubernetes/pkg/kubelet/server"
	kubeletutil "k8s.io/kubernetes/pkg/kubelet/util"
	"k8s.io/kubernetes/pkg/util/oom"

	"tuneward.dev/local/internal/cri"
	"tuneward.dev/local/internal/gpu"
	"tuneward.dev/local/internal/pki"
)

// maxPods is above the default of 110, which is meant for real machines' networks.
const maxPods = 500

// startKubelet runs the real kubelet over our runtime, as kubemark's hollow node does over a fake one.
func startKubelet(ctx context.Context, config Config, runtime *cri.Runtime, gpus *gpu.Assigner) error {
	flags := options.NewKubeletFlags()
	flags.RootDirectory = config.Dir.Kubelet()
	flags.HostnameOverride = config.NodeName
	// Refused as loopback, which is said in the log and filtered there; unset, it would be the machine's
	// address of the day.
	flags.NodeIP = "127.0.0.1"
	settings, err := kubeletSettings(config)
	if err != nil {
		return err
	}
	keepLogLinksInside(config.Dir)
	dependencies, err := kubeletDependencies(config, settings, runtime, gpus)
	if err != nil {
		return err
	}
	return kubeletapp.RunKubelet(ctx, &options.KubeletServer{
		KubeletFlags: *flags, KubeletConfiguration: *settings,
	}, dependencies)
}

func kubeletSettings(config Config) (*kubeletconfig.KubeletConfiguration, error) {
	c, err := options.NewKubeletConfiguration()
	if err != nil {
		return nil, err
	}
	keys := pki.Dir(config.Dir.PKI())
	c.Address = "127.0.0.1"
	c.Port = int32(config.Addresses.KubeletPort)
	c.ReadOnlyPort, c.HealthzPort = 0, 0
	c.TLSCertFile, c.TLSPrivateKeyFile = keys.Path("kubelet-serving.crt"), keys.Path("kubelet-serving.key")
	c.Authentication.X509.ClientCAFile = keys.Path("ca.crt")
	c.Authentication.Anonymous.Enabled = false
	c.ClusterDomain = "cluster.local"
	// Nobody listens there and the runtime hands it to nobody; without one, each pod gets a warning.
	c.ClusterDNS = []string{config.Addresses.ServiceIP()}
	c.PodLogsDir = config.Dir.PodLogs()
	c.MaxPods = maxPods
	// The defaults (5 a second) make forty pods of one Job take twice as long; nothing is pulled here.
	c.RegistryPullQPS, c.EventRecordQPS = 0, 0
	c.SerializeImagePulls = false
	// No cgroups of our own; and a laptop whose disk is nine tenths full should not lose its pods.
	c.CgroupsPerQOS, c.EnforceNodeAllocatable = false, nil
	// As root it would write chains into the machine's own firewall, for a kube-proxy that is not here.
	c.MakeIPTablesUtilChains = false
	c.EvictionHard = map[string]string{}
	c.ImageGCHighThresholdPercent = 100
	c.FailSwapOn = false
	c.EnableControllerAttachDetach = false
	c.SyncFrequency.Duration = 10 * time.Second
	c.MaxOpenFiles = openFiles()
	return c, nil
}

// openFiles leaves the process's own limit alone.
func openFiles() int64 {
	var limit syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
		return 1024
	}
	return int64(limit.Max)
}

func kubeletDependencies(config Config, settings *kubeletconfig.KubeletConfiguration, runtime *cri.Runtime, gpus *gpu.Assigner) (*kubelet.Dependencies, error) {
	client, heartbeat, err := kubeletClients(config, settings)
	if err != nil {
		return nil, err
	}
	auth, _, err := kubeletapp.BuildAuth("", client, *settings)
	if err != nil {
		return nil, fmt.Errorf("the kubelet's server: %w", err)
	}
	mounts := newMounts(config.Way)
	return &kubelet.Dependencies{
		Auth:                      auth,
		TLSOptions:                &server.TLSOptions{CertFile: settings.TLSCertFile, KeyFile: settings.TLSPrivateKeyFile, ClientCAFile: settings.Authentication.X509.ClientCAFile},
		KubeClient:                client,
		HeartbeatClient:           heartbeat,
		EventClient:               client.CoreV1(),
		RemoteRuntimeService:      runtime,
		RemoteImageService:        runtime,
		CAdvisorInterface:         &machine{dir: string(config.Dir)},
		ContainerManager:          newContainerManager(string(config.Dir), gpus),
		OSInterface:               untouchedOS{},
		OOMAdjuster:               oom.NewFakeOOMAdjuster(),
		Mounter:                   mounts.mounter,
		Subpather:                 mounts.subpather,
		HostUtil:                  mounts.hostUtil,
		VolumePlugins:             volumePlugins(),
		PodStartupLatencyTracker:  kubeletutil.NewPodStartupLatencyTracker(),
		NodeStartupLatencyTracker: kubeletutil.NewNodeStartupLatencyTracker(),
		TracerProvider:            noop.NewTracerProvider(),
	}, nil
}

func kubeletClients(config Config, settings *kubeletconfig.KubeletConfiguration) (client, heartbeat *kubernetes.Clientset, err error) {
	keys := pki.Dir(config.Dir.PKI())
	restConfig, err := clientcmd.BuildConfigFromFlags("", keys.Path("kubelet.kubeconfig"))
	if err != nil {
		return nil, nil, err
	}
	restConfig.QPS, restConfig.Burst = -1, -1
	restConfig.ContentType = "application/vnd.kubernetes.protobuf"
	if client, err = kubernetes.NewForConfig(restConfig); err != nil {
		return nil, nil, err
	}
	limited := rest.CopyConfig(restConfig)
	limited.Timeout = settings.NodeStatusUpdateFrequency.Duration
	heartbeat, err = kubernetes.NewForConfig(limited)
	return client, heartbeat, err
}

// patchAddresses gives the node its address: the kubelet refuses loopback ones, and keeps what it finds.
func patchAddresses(ctx context.Context, client kubernetes.Interface, name string) error {
	patch := fmt.Sprintf(`{"status":{"addresses":[{"type":"InternalIP","address":"127.0.0.1"},{"type":"Hostname","address":%q}]}}`, name)
	_, err := client.CoreV1().Nodes().PatchStatus(ctx, name, []byte(patch))
	return err
}

func nodeReady(ctx context.Context, client kubernetes.Interface, name string) error {
	node, err := client.CoreV1().Nodes().Get(ctx, name, metav1.GetOptions{})
	if err != nil {
		return err
	}
	if len(node.Status.Addresses) == 0 {
		if err := patchAddresses(ctx, client, name); err != nil {
			return err
		}
	}
	for _, condition := range node.Status.Conditions {
		if condition.Type == v1.NodeReady && condition.Status == v1.ConditionTrue {
			return nil
		}
	}
	return fmt.Errorf("node %s is not ready", name)
}
