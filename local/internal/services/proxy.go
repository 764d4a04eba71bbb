// Package services makes ClusterIPs answer: a TCP proxy in this process listens on each Service's own
// loopback address. Endpoints would need non-loopback pod addresses and iptables would need root; this
// needs neither, and what it forwards to it reads from pods itself.
package services

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
	"syscall"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/client-go/informers"
	corelisters "k8s.io/client-go/listers/core/v1"
	"k8s.io/client-go/tools/cache"
)

// Proxy serves the cluster's Services.
type Proxy struct {
	services corelisters.ServiceLister
	pods     corelisters.PodLister
	// apiAddress is where the Service default/kubernetes leads.
	apiAddress string
	// warn says something about a Service where its owner looks: as an event of it.
	warn    func(service *corev1.Service, message string)
	logf    func(string, ...any)
	changed chan struct{}

	mu        sync.Mutex
	listeners map[string]net.Listener
	refused   map[string]bool
}

// NewProxy registers for changes; Run does the work.
func NewProxy(factory informers.SharedInformerFactory, apiAddress string,
	warn func(*corev1.Service, string), logf func(string, ...any)) (*Proxy, error) {
	p := &Proxy{
		services:   factory.Core().V1().Services().Lister(),
		pods:       factory.Core().V1().Pods().Lister(),
		apiAddress: apiAddress,
		warn:       warn,
		logf:       logf,
		changed:    make(chan struct{}, 1),
		listeners:  map[string]net.Listener{},
		refused:    map[string]bool{},
	}
	_, err := factory.Core().V1().Services().Informer().AddEventHandler(cache.ResourceEventHandlerFuncs{
		AddFunc:    func(any) { p.notify() },
		UpdateFunc: func(any, any) { p.notify() },
		DeleteFunc: func(any) { p.notify() },
	})
	return p, err
}

func (p *Proxy) notify() {
	select {
	case p.changed <- struct{}{}:
	default:
	}
}

// Run serves until the context ends.
func (p *Proxy) Run(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-p.changed:
			p.sync()
		}
	}
}

// frontend is one address that has to answer.
type frontend struct {
	address string
	service *corev1.Service
	port    corev1.ServicePort
}

// isAPI is the Service `kubernetes`, which has no pods.
func (f frontend) isAPI() bool {
	return f.service.Namespace == corev1.NamespaceDefault && f.service.Name == "kubernetes"
}

func (p *Proxy) sync() {
	services, err := p.services.List(labels.Everything())
	if err != nil {
		p.logf("services: %v", err)
		return
	}
	wanted := Frontends(services)
	p.mu.Lock()
	defer p.mu.Unlock()
	for address, listener := range p.listeners {
		if _, still := wanted[address]; !still {
			listener.Close()
			delete(p.listeners, address)
		}
	}
	for address, front := range wanted {
		if _, served := p.listeners[address]; !served {
			p.listen(front)
		}
	}
}

// Frontends are the TCP ports of Services with an address of their own, by address.
func Frontends(services []*corev1.Service) map[string]frontend {
	fronts := map[string]frontend{}
	for _, service := range services {
		if service.Spec.ClusterIP == "" || service.Spec.ClusterIP == corev1.ClusterIPNone {
			continue
		}
		for _, port := range service.Spec.Ports {
			if port.Protocol != corev1.ProtocolTCP && port.Protocol != "" {
				continue
			}
			address := net.JoinHostPort(service.Spec.ClusterIP, fmt.Sprint(port.Port))
			fronts[address] = frontend{address, service, port}
		}
	}
	return fronts
}

func (p *Proxy) listen(front frontend) {
	listener, err := net.Listen("tcp", front.address)
	if err != nil {
		p.refuse(front, err)
		return
	}
	p.listeners[front.address] = listener
	go p.accept(listener, front.address)
}

// refuse tells once that a Service will not answer.
func (p *Proxy) refuse(front frontend, err error) {
	if p.refused[front.address] {
		return
	}
	p.refused[front.address] = true
	p.logf("Service %s/%s does not answer at %s: %v", front.service.Namespace, front.service.Name, front.address, err)
	// Pods get another address for the API then.
	if !front.isAPI() {
		p.warn(front.service, refusal(front, err))
	}
}

func refusal(front frontend, err error) string {
	if errors.Is(err, syscall.EACCES) {
		return fmt.Sprintf("port %d does not answer: without root, ports below 1024 cannot be opened; use a port above 1023, or run the cluster as root", front.port.Port)
	}
	return fmt.Sprintf("port %d does not answer at %s: %v", front.port.Port, front.address, err)
}

func (p *Proxy) accept(listener net.Listener, address string) {
	for {
		client, err := listener.Accept()
		if err != nil {
			return
		}
		go p.forward(client, address)
	}
}

func (p *Proxy) forward(client net.Conn, address string) {
	defer client.Close()
	server, err := p.dial(address)
	if err != nil {
		p.logf("Service at %s: %v", address, err)
		return
	}
	defer server.Close()
	splice(client, server)
}

// dial tries the Service's ready pods in random order, as kube-proxy picks at random.
func (p *Proxy) dial(address string) (net.Conn, error) {
	backends, err := p.backends(address)
	if err != nil {
		return nil, err
	}
	var failures []error
	for _, backend := range backends {
		connection, err := net.DialTimeout("tcp", backend, dialTimeout)
		if err == nil {
			return connection, nil
		}
		failures = append(failures, err)
	}
	return nil, errors.Join(append(failures, errors.New("no ready pod answers"))...)
}

// backends are read anew for each connection: a Service's selector and ports may have changed.
func (p *Proxy) backends(address string) ([]string, error) {
	services, err := p.services.List(labels.Everything())
	if err != nil {
		return nil, err
	}
	front, found := Frontends(services)[address]
	if !found {
		return nil, errors.New("the Service is gone")
	}
	if front.isAPI() {
		return []string{p.apiAddress}, nil
	}
	service := front.service
	if len(service.Spec.Selector) == 0 {
		return nil, nil
	}
	pods, err := p.pods.Pods(service.Namespace).List(labels.SelectorFromSet(service.Spec.Selector))
	if err != nil {
		return nil, err
	}
	return Backends(pods, front.port, service.Spec.PublishNotReadyAddresses), nil
}
