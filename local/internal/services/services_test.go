package services

import (
	"io"
	"net"
	"strings"
	"syscall"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
)

func pod(address string, ready bool) *corev1.Pod {
	status := corev1.ConditionFalse
	if ready {
		status = corev1.ConditionTrue
	}
	return &corev1.Pod{
		Spec: corev1.PodSpec{Containers: []corev1.Container{{Ports: []corev1.ContainerPort{{Name: "http", ContainerPort: 8080}}}}},
		Status: corev1.PodStatus{
			PodIP: address, Conditions: []corev1.PodCondition{{Type: corev1.PodReady, Status: status}},
		},
	}
}

func TestOnlyReadyPodsGetConnections(t *testing.T) {
	pods := []*corev1.Pod{pod("127.64.0.1", true), pod("127.64.0.2", false), pod("", true)}
	port := corev1.ServicePort{Port: 80}
	if got := Backends(pods, port, false); len(got) != 1 || got[0] != "127.64.0.1:80" {
		t.Error(got)
	}
	if got := Backends(pods, port, true); len(got) != 2 {
		t.Error(got)
	}
}

func TestATargetPortIsANumberOrAName(t *testing.T) {
	for _, c := range []struct {
		target intstr.IntOrString
		want   int32
	}{
		{intstr.FromInt32(0), 80},
		{intstr.FromInt32(9000), 9000},
		{intstr.FromString("http"), 8080},
		{intstr.FromString("missing"), 0},
	} {
		if got := targetPort(pod("127.64.0.1", true), corev1.ServicePort{Port: 80, TargetPort: c.target}); got != c.want {
			t.Errorf("%v gives %d, not %d", c.target, got, c.want)
		}
	}
}

func TestHeadlessServicesAndOtherProtocolsHaveNoFrontend(t *testing.T) {
	made := func(address string, protocol corev1.Protocol) *corev1.Service {
		return &corev1.Service{
			ObjectMeta: metav1.ObjectMeta{Name: "s"},
			Spec:       corev1.ServiceSpec{ClusterIP: address, Ports: []corev1.ServicePort{{Port: 80, Protocol: protocol}}},
		}
	}
	fronts := Frontends([]*corev1.Service{
		made("127.96.0.2", corev1.ProtocolTCP), made("127.96.0.3", corev1.ProtocolUDP), made(corev1.ClusterIPNone, corev1.ProtocolTCP),
	})
	if _, found := fronts["127.96.0.2:80"]; !found || len(fronts) != 1 {
		t.Error(fronts)
	}
}

func TestAClientThatHasSentEverythingStillGetsItsAnswer(t *testing.T) {
	client, proxied := connected(t)
	server, backend := connected(t)
	go splice(proxied, server)
	if _, err := client.Write([]byte("question")); err != nil {
		t.Fatal(err)
	}
	if err := client.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if asked, err := io.ReadAll(backend); err != nil || string(asked) != "question" {
		t.Fatalf("%q, %v", asked, err)
	}
	if _, err := backend.Write([]byte("answer")); err != nil {
		t.Fatal(err)
	}
	backend.Close()
	if answered, err := io.ReadAll(client); err != nil || string(answered) != "answer" {
		t.Fatalf("%q, %v", answered, err)
	}
}

// connected returns the two ends of a TCP connection.
func connected(t *testing.T) (dialed, accepted *net.TCPConn) {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	one, err := net.Dial("tcp", listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	other, err := listener.Accept()
	if err != nil {
		t.Fatal(err)
	}
	return one.(*net.TCPConn), other.(*net.TCPConn)
}

func TestARefusedPortIsToldOnceAndSaysWhatToDo(t *testing.T) {
	var told []string
	proxy := &Proxy{
		refused: map[string]bool{},
		warn:    func(_ *corev1.Service, message string) { told = append(told, message) },
		logf:    func(string, ...any) {},
	}
	front := frontend{"127.96.0.2:80", &corev1.Service{}, corev1.ServicePort{Port: 80}}
	proxy.refuse(front, syscall.EACCES)
	proxy.refuse(front, syscall.EACCES)
	if len(told) != 1 || !strings.Contains(told[0], "port 80") || !strings.Contains(told[0], "above 1023") {
		t.Error(told)
	}
}

func TestTheServiceOfTheAPIIsNoWarning(t *testing.T) {
	proxy := &Proxy{
		refused: map[string]bool{},
		warn:    func(*corev1.Service, string) { t.Error("told") },
		logf:    func(string, ...any) {},
	}
	service := &corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: "kubernetes"}}
	proxy.refuse(frontend{"127.96.0.1:443", service, corev1.ServicePort{Port: 443}}, syscall.EACCES)
}
