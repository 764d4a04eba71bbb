// Package node is the cluster's one node: the real kubelet over our runtime (internal/cri), with what a
// cloud or a distribution would add (names, ClusterIPs, volumes, GPUs).
package node

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"strings"
	"syscall"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/kubernetes/scheme"
	typedcorev1 "k8s.io/client-go/kubernetes/typed/core/v1"
	"k8s.io/client-go/tools/record"
	"k8s.io/klog/v2"

	"tuneward.dev/local/internal/cri"
	"tuneward.dev/local/internal/gpu"
	"tuneward.dev/local/internal/layout"
	"tuneward.dev/local/internal/names"
	"tuneward.dev/local/internal/services"
	"tuneward.dev/local/internal/volumes"
)

// Config is what the node needs to know.
type Config struct {
	NodeName   string
	Dir        layout.Dir
	Addresses  layout.State
	Client     *kubernetes.Clientset
	Way        cri.Way
	ShimPath   string
	PathPrefix []string
	Images     map[string]string
	// FakeGPUs is negative for the machine's own.
	FakeGPUs int
}

// Start runs the node in the background. Ready tells when it is.
func Start(ctx context.Context, config Config) error {
	for _, dir := range []string{config.Dir.Kubelet(), config.Dir.PodLogs(), config.Dir.Volumes()} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
	}
	gpus, err := newGPUs(ctx, config)
	if err != nil {
		return err
	}
	keeper, err := startHelpers(ctx, config)
	if err != nil {
		return err
	}
	runtime, err := cri.New(runtimeConfig(config, keeper))
	if err != nil {
		return fmt.Errorf("the container runtime does not start: %w", err)
	}
	return startKubelet(ctx, config, runtime, gpus)
}

// Ready returns nil once the node can run pods.
func Ready(ctx context.Context, config Config) error {
	if err := nodeReady(ctx, config.Client, config.NodeName); err != nil {
		return err
	}
	return kubeletKnowsItsPods(ctx, config)
}

func newGPUs(ctx context.Context, config Config) (*gpu.Assigner, error) {
	if config.FakeGPUs >= 0 {
		return gpu.NewAssigner(config.Dir.GPUs(), gpu.Fake(config.FakeGPUs), true)
	}
	return gpu.NewAssigner(config.Dir.GPUs(), gpu.Find(ctx), false)
}

// startHelpers runs what reads the API for the node. Its caches are full when it returns, as the first
// hosts file is written from them.
func startHelpers(ctx context.Context, config Config) (*names.Keeper, error) {
	if err := volumes.EnsureClass(ctx, config.Client); err != nil {
		return nil, err
	}
	factory := informers.NewSharedInformerFactory(config.Client, 0)
	keeper, err := names.NewKeeper(factory, config.Dir.Kubelet(), logf)
	if err != nil {
		return nil, err
	}
	proxy, err := services.NewProxy(factory, apiAddress(config), warnService(ctx, config.Client), logf)
	if err != nil {
		return nil, err
	}
	provisioner, err := volumes.New(config.Client, factory, config.Dir.Volumes(), logf)
	if err != nil {
		return nil, err
	}
	factory.Start(ctx.Done())
	factory.WaitForCacheSync(ctx.Done())
	go keeper.Run(ctx)
	go proxy.Run(ctx)
	go provisioner.Run(ctx)
	return keeper, nil
}

func apiAddress(config Config) string {
	return fmt.Sprintf("127.0.0.1:%d", config.Addresses.APIPort)
}

// warnService writes events, which `kubectl describe service` shows.
func warnService(ctx context.Context, client kubernetes.Interface) func(*corev1.Service, string) {
	broadcaster := record.NewBroadcaster(record.WithContext(ctx))
	broadcaster.StartRecordingToSink(&typedcorev1.EventSinkImpl{Interface: client.CoreV1().Events("")})
	recorder := broadcaster.NewRecorder(scheme.Scheme, corev1.EventSource{Component: "tuneward-local"})
	return func(service *corev1.Service, message string) {
		recorder.Event(service, corev1.EventTypeWarning, "ServiceNotServed", message)
	}
}

func runtimeConfig(config Config, keeper *names.Keeper) cri.Config {
	return cri.Config{
		StateDir:    config.Dir.Runtime(),
		ShimPath:    config.ShimPath,
		Way:         config.Way,
		PathPrefix:  config.PathPrefix,
		Env:         imageEnvironment(os.Environ()),
		EnvOverride: apiEnvironment(config),
		Images:      config.Images,
		PodCIDR:     config.Addresses.PodCIDR(),
		HostsFile: func(namespace, _, _, path string) error {
			return keeper.Write(namespace, path)
		},
		Logf: logf,
	}
}

// apiEnvironment is for clusters whose user may not bind port 443 of the Service `kubernetes`.
func apiEnvironment(config Config) map[string]string {
	probe, err := net.Listen("tcp", net.JoinHostPort(config.Addresses.ServiceIP(), "443"))
	if err == nil {
		probe.Close()
	}
	// Only this one: our own Service proxy may hold the port already.
	if !errors.Is(err, syscall.EACCES) {
		return nil
	}
	port := fmt.Sprint(config.Addresses.APIPort)
	return map[string]string{
		"KUBERNETES_SERVICE_HOST":       "127.0.0.1",
		"KUBERNETES_SERVICE_PORT":       port,
		"KUBERNETES_SERVICE_PORT_HTTPS": port,
	}
}

// inherited are the caller's variables that an image would have: where programs are, the language, and how
// the network is reached. Tokens and KUBECONFIG are not among them; a pod gets those from its own spec.
var inherited = map[string]bool{
	"PATH": true, "HOME": true, "LANG": true, "LC_ALL": true, "TZ": true, "VIRTUAL_ENV": true,
	"LD_LIBRARY_PATH": true, "SSL_CERT_FILE": true, "SSL_CERT_DIR": true, "REQUESTS_CA_BUNDLE": true,
	"HTTP_PROXY": true, "HTTPS_PROXY": true, "NO_PROXY": true,
	"http_proxy": true, "https_proxy": true, "no_proxy": true,
}

func imageEnvironment(environ []string) []string {
	var kept []string
	for _, variable := range environ {
		name, _, _ := strings.Cut(variable, "=")
		if inherited[name] {
			kept = append(kept, variable)
		}
	}
	return kept
}

func logf(format string, args ...any) {
	klog.InfofDepth(1, format, args...)
}
