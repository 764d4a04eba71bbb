// Package server runs a cluster in the foreground: the control plane, then the node, until a signal.
package server

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"syscall"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/klog/v2"

	"tuneward.dev/local/internal/cli"
	"tuneward.dev/local/internal/controlplane"
	"tuneward.dev/local/internal/cri"
	"tuneward.dev/local/internal/layout"
	"tuneward.dev/local/internal/node"
	"tuneward.dev/local/internal/pki"
)

// nodeName is the one node's name.
const nodeName = "local"

// Config is what a foreground cluster needs to know.
type Config struct {
	Options cli.UpOptions
	Dir     layout.Dir
	// Way is empty without a node.
	Way      cri.Way
	ShimPath string
}

// Run serves until SIGTERM or SIGINT.
func Run(config Config) error {
	dir := config.Dir
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	lock, err := dir.Lock()
	if err != nil {
		return err
	}
	defer lock.Close()
	_ = os.Remove(dir.Ready())
	raiseFileLimit()
	// etcd's socket is named relative to it.
	if err := os.Chdir(string(dir)); err != nil {
		return err
	}
	addresses, err := dir.Addresses()
	if err != nil {
		return err
	}
	defer addresses.Release()
	if err := writeKeys(dir, addresses.State); err != nil {
		return err
	}
	log := config.Options.LogPath(dir)
	terminal, err := redirectOutput(log)
	if err != nil {
		return fmt.Errorf("cannot write the log %s: %w", log, err)
	}
	return serve(ctx, config, addresses.State, terminal)
}

func writeKeys(dir layout.Dir, addresses layout.State) error {
	keys := pki.Dir(dir.PKI())
	if err := pki.Ensure(keys, addresses.ServiceIP(), nodeName); err != nil {
		return err
	}
	server := apiURL(addresses)
	if err := pki.WriteKubeconfig(keys, "kubelet", server, keys.Path("kubelet.kubeconfig")); err != nil {
		return err
	}
	return pki.WriteKubeconfig(keys, "admin", server, dir.Kubeconfig())
}

func apiURL(addresses layout.State) string {
	return fmt.Sprintf("https://127.0.0.1:%d", addresses.APIPort)
}

func serve(ctx context.Context, config Config, addresses layout.State, terminal *os.File) error {
	started := time.Now()
	dir := config.Dir
	plane, err := controlplane.Start(ctx, controlplane.Config{
		Dir: dir, Addresses: addresses, NoFsync: config.Options.NoFsync, Log: config.Options.LogPath(dir),
	})
	if err != nil {
		return logged(err, config)
	}
	if err := awaitUsable(ctx, config, addresses, plane); err != nil {
		plane.Stop()
		return logged(err, config)
	}
	info := layout.ReadyInfo{
		PID: os.Getpid(), APIURL: apiURL(addresses), StartedAt: started.UTC().Format(time.RFC3339),
		Way: string(config.Way), Version: layout.Version,
	}
	if err := dir.WriteReady(info); err != nil {
		return err
	}
	fmt.Fprintln(terminal, cli.ReadyLine(dir.Kubeconfig()))
	klog.InfoS("The cluster is usable", "seconds", time.Since(started).Seconds())

	select {
	case <-ctx.Done():
		err = nil
	case err = <-plane.Failed:
	}
	_ = os.Remove(dir.Ready())
	endWithin(3500 * time.Millisecond)
	plane.Stop()
	if err != nil {
		return logged(err, config)
	}
	return nil
}

func awaitUsable(ctx context.Context, config Config, addresses layout.State, plane *controlplane.ControlPlane) error {
	local := node.Config{
		NodeName: nodeName, Dir: config.Dir, Addresses: addresses, Client: plane.Client,
		Way: config.Way, ShimPath: config.ShimPath,
		PathPrefix: config.Options.PathPrefix, Images: config.Options.Images, FakeGPUs: config.Options.FakeGPUs,
	}
	if config.Way != "" {
		if err := node.Start(context.WithoutCancel(ctx), local); err != nil {
			return fmt.Errorf("the node does not start: %w", err)
		}
	}
	if err := awaitDefaultAccount(ctx, plane.Client); err != nil {
		return err
	}
	if config.Way == "" {
		return nil
	}
	return poll(ctx, "the node", func() error { return node.Ready(ctx, local) })
}

// endWithin is for a component that does not let go: a restart finds everything it needs in etcd.
func endWithin(limit time.Duration) {
	time.AfterFunc(limit, func() { os.Exit(0) })
}

func logged(err error, config Config) error {
	klog.ErrorS(err, "The cluster ends")
	return fmt.Errorf("%w; the components' log is %s", err, config.Options.LogPath(config.Dir))
}

// awaitDefaultAccount waits for what the first pod needs, the controllers' first work.
func awaitDefaultAccount(ctx context.Context, client kubernetes.Interface) error {
	return poll(ctx, "the ServiceAccount default", func() error {
		_, err := client.CoreV1().ServiceAccounts("default").Get(ctx, "default", metav1.GetOptions{})
		return err
	})
}

func poll(ctx context.Context, what string, check func() error) error {
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		err := check()
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("stopped before %s was ready: %w", what, err)
		case <-tick.C:
		}
	}
}

// raiseFileLimit takes what the machine allows: etcd, watches and pods' logs are open files.
func raiseFileLimit() {
	var limit syscall.Rlimit
	if syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit) == nil {
		limit.Cur = limit.Max
		_ = syscall.Setrlimit(syscall.RLIMIT_NOFILE, &limit)
	}
}
