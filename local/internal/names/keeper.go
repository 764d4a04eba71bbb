package names

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"sync"
	"time"

	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/client-go/informers"
	corelisters "k8s.io/client-go/listers/core/v1"
	"k8s.io/client-go/tools/cache"
)

// settle is how long the keeper lets changes gather: forty pods of one Job are one rewrite.
const settle = 50 * time.Millisecond

// Keeper rewrites the hosts files of the node's pods when names change.
type Keeper struct {
	// kubelet is the kubelet's root directory, where the hosts files are.
	kubelet  string
	services corelisters.ServiceLister
	pods     corelisters.PodLister
	changed  chan struct{}
	logf     func(string, ...any)
	mu       sync.Mutex // one writer a file
}

// NewKeeper registers for changes; Run does the work.
func NewKeeper(factory informers.SharedInformerFactory, kubelet string, logf func(string, ...any)) (*Keeper, error) {
	k := &Keeper{
		kubelet:  kubelet,
		services: factory.Core().V1().Services().Lister(),
		pods:     factory.Core().V1().Pods().Lister(),
		changed:  make(chan struct{}, 1),
		logf:     logf,
	}
	handler := cache.ResourceEventHandlerFuncs{
		AddFunc:    func(any) { k.notify() },
		UpdateFunc: func(any, any) { k.notify() },
		DeleteFunc: func(any) { k.notify() },
	}
	_, serviceErr := factory.Core().V1().Services().Informer().AddEventHandler(handler)
	_, podErr := factory.Core().V1().Pods().Informer().AddEventHandler(handler)
	return k, errors.Join(serviceErr, podErr)
}

func (k *Keeper) notify() {
	select {
	case k.changed <- struct{}{}:
	default:
	}
}

// Run rewrites until the context ends.
func (k *Keeper) Run(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-k.changed:
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(settle):
		}
		k.rewriteAll()
	}
}

func (k *Keeper) rewriteAll() {
	table, err := k.table()
	if err != nil {
		k.logf("names: %v", err)
		return
	}
	pods, err := k.pods.List(labels.Everything())
	if err != nil {
		k.logf("names: %v", err)
		return
	}
	byNamespace := map[string][]byte{}
	for _, pod := range pods {
		lines, known := byNamespace[pod.Namespace]
		if !known {
			lines = table.For(pod.Namespace)
			byNamespace[pod.Namespace] = lines
		}
		err := k.rewrite(filepath.Join(k.kubelet, "pods", string(pod.UID), "etc-hosts"), lines)
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			k.logf("names of pod %s/%s: %v", pod.Namespace, pod.Name, err)
		}
	}
}

// Write completes one hosts file, which the kubelet writes anew for each container it makes.
func (k *Keeper) Write(namespace, path string) error {
	table, err := k.table()
	if err != nil {
		return err
	}
	return k.rewrite(path, table.For(namespace))
}

func (k *Keeper) rewrite(path string, lines []byte) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	return Rewrite(path, lines)
}

func (k *Keeper) table() (Table, error) {
	services, err := k.services.List(labels.Everything())
	if err != nil {
		return Table{}, err
	}
	pods, err := k.pods.List(labels.Everything())
	if err != nil {
		return Table{}, err
	}
	return NewTable(services, pods), nil
}
