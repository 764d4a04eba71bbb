package services

import (
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	"tuneward.dev/local/internal/names"
)

// dialTimeout is long for a loopback address; it ends a connection to a pod whose backlog is full.
const dialTimeout = 5 * time.Second

// Backends are the addresses of the pods that may answer for a Service port, in random order.
func Backends(pods []*corev1.Pod, port corev1.ServicePort, evenUnready bool) []string {
	var backends []string
	for _, pod := range pods {
		if pod.Status.PodIP == "" || !(evenUnready || names.Ready(pod)) {
			continue
		}
		if number := targetPort(pod, port); number != 0 {
			backends = append(backends, net.JoinHostPort(pod.Status.PodIP, fmt.Sprint(number)))
		}
	}
	rand.Shuffle(len(backends), func(i, j int) { backends[i], backends[j] = backends[j], backends[i] })
	return backends
}

// targetPort is 0 for a pod without a port of the wanted name.
func targetPort(pod *corev1.Pod, port corev1.ServicePort) int32 {
	target := port.TargetPort
	if target.Type == intstr.Int && target.IntVal != 0 {
		return target.IntVal
	}
	if target.Type == intstr.Int {
		return port.Port
	}
	for _, container := range pod.Spec.Containers {
		for _, candidate := range container.Ports {
			if candidate.Name == target.StrVal {
				return candidate.ContainerPort
			}
		}
	}
	return 0
}

// splice copies both ways until both ends have said that they are done: a client that closes its sending
// half still waits for the answer.
func splice(a, b net.Conn) {
	done := make(chan struct{}, 2)
	half := func(to, from net.Conn) {
		_, _ = io.Copy(to, from)
		if tcp, ok := to.(*net.TCPConn); ok {
			_ = tcp.CloseWrite()
		}
		done <- struct{}{}
	}
	go half(a, b)
	go half(b, a)
	<-done
	<-done
}
