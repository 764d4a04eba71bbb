package controlplane

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/spf13/pflag"
	"go.etcd.io/etcd/server/v3/embed"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	cliflag "k8s.io/component-base/cli/flag"
	apiserverapp "k8s.io/kubernetes/cmd/kube-apiserver/app"
	apiserveroptions "k8s.io/kubernetes/cmd/kube-apiserver/app/options"
	managerapp "k8s.io/kubernetes/cmd/kube-controller-manager/app"
	manageroptions "k8s.io/kubernetes/cmd/kube-controller-manager/app/options"
	schedulerapp "k8s.io/kubernetes/cmd/kube-scheduler/app"
	scheduleroptions "k8s.io/kubernetes/cmd/kube-scheduler/app/options"

	"tuneward.dev/local/internal/layout"
)

// Config is what the control plane needs to know.
type Config struct {
	Dir       layout.Dir
	Addresses layout.State
	NoFsync   bool
	// Log is the file etcd logs to.
	Log string
}

// ControlPlane is the running control plane.
type ControlPlane struct {
	// Client is an administrator's.
	Client *kubernetes.Clientset
	// RestConfig is Client's.
	RestConfig *rest.Config
	// Failed gets the first component that ended by itself.
	Failed chan error

	etcd       *embed.Etcd
	stopOthers context.CancelFunc
	stopAPI    context.CancelFunc
}

// Start returns when the API server is ready; the other two have just been started then.
func Start(ctx context.Context, config Config) (*ControlPlane, error) {
	rest.SetDefaultWarningHandler(rest.NoWarnings{})
	restConfig, err := clientcmd.BuildConfigFromFlags("", config.Dir.Kubeconfig())
	if err != nil {
		return nil, err
	}
	restConfig.QPS, restConfig.Burst = -1, -1
	cp := &ControlPlane{RestConfig: restConfig, Failed: make(chan error, 3)}
	if cp.Client, err = kubernetes.NewForConfig(restConfig); err != nil {
		return nil, err
	}
	if cp.etcd, err = startEtcd(config.Dir.Etcd(), config.Log, config.NoFsync); err != nil {
		return nil, err
	}
	apiContext, stopAPI := context.WithCancel(context.WithoutCancel(ctx))
	others, stopOthers := context.WithCancel(context.WithoutCancel(ctx))
	cp.stopAPI, cp.stopOthers = stopAPI, stopOthers

	cp.run(apiContext, "kube-apiserver", func() error { return runAPIServer(apiContext, apiServerFlags(config)) })
	if err := cp.waitReady(ctx); err != nil {
		return nil, err
	}
	cp.run(others, "kube-controller-manager", func() error { return runManager(others, managerFlags(config)) })
	cp.run(others, "kube-scheduler", func() error { return runScheduler(others, schedulerFlags(config)) })
	return cp, nil
}

// Stop ends everything within about 2 s. A graceful end would wait 14 s for open watches and for etcd's
// clients; neither loses anything, as etcd has written what it acknowledged.
func (cp *ControlPlane) Stop() {
	cp.stopOthers()
	cp.stopAPI()
	time.Sleep(time.Second)
	stopped := make(chan struct{})
	go func() {
		cp.etcd.Server.Stop()
		close(stopped)
	}()
	select {
	case <-stopped:
	case <-time.After(time.Second):
	}
}

func (cp *ControlPlane) run(ctx context.Context, name string, component func() error) {
	go func() {
		err := component()
		if ctx.Err() != nil {
			return
		}
		cp.Failed <- fmt.Errorf("%s ended: %w", name, orUnknown(err))
	}()
}

func orUnknown(err error) error {
	if err == nil {
		return errors.New("no reason given")
	}
	return err
}

func (cp *ControlPlane) waitReady(ctx context.Context) error {
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		_, err := cp.Client.Discovery().RESTClient().Get().AbsPath("/readyz").DoRaw(ctx)
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("the API server is not ready: %w", err)
		case err := <-cp.Failed:
			return err
		case <-tick.C:
		}
	}
}

func runAPIServer(ctx context.Context, args []string) error {
	options := apiserveroptions.NewServerRunOptions()
	if err := parse(options.Flags(), args); err != nil {
		return err
	}
	// The feature gates are one registry for all four components and can be set once.
	if err := options.GenericServerRunOptions.ComponentGlobalsRegistry.Set(); err != nil {
		return err
	}
	completed, err := options.Complete(ctx)
	if err != nil {
		return err
	}
	if errs := completed.Validate(); len(errs) != 0 {
		return errors.Join(errs...)
	}
	return apiserverapp.Run(ctx, completed)
}

func runManager(ctx context.Context, args []string) error {
	options, err := manageroptions.NewKubeControllerManagerOptions()
	if err != nil {
		return err
	}
	all, off, aliases := managerapp.KnownControllers(), managerapp.ControllersDisabledByDefault(), managerapp.ControllerAliases()
	flags := options.Flags(all, off, aliases)
	options.ParsedFlags = &flags
	if err := parse(flags, args); err != nil {
		return err
	}
	config, err := options.Config(ctx, all, off, aliases)
	if err != nil {
		return err
	}
	return managerapp.Run(ctx, config.Complete())
}

func runScheduler(ctx context.Context, args []string) error {
	options := scheduleroptions.NewOptions()
	if err := parse(*options.Flags, args); err != nil {
		return err
	}
	config, scheduler, err := schedulerapp.Setup(ctx, options)
	if err != nil {
		return err
	}
	return schedulerapp.Run(ctx, config, scheduler)
}

func parse(sets cliflag.NamedFlagSets, args []string) error {
	all := pflag.NewFlagSet("", pflag.ContinueOnError)
	for _, set := range sets.FlagSets {
		all.AddFlagSet(set)
	}
	return all.Parse(args)
}
