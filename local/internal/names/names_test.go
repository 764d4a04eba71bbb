package names

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

func service(namespace, name, address string, labels map[string]string) *corev1.Service {
	return &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name},
		Spec:       corev1.ServiceSpec{ClusterIP: address, Selector: labels},
	}
}

func pod(namespace, hostname, subdomain, address string, ready bool) *corev1.Pod {
	status := corev1.ConditionFalse
	if ready {
		status = corev1.ConditionTrue
	}
	return &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: hostname + "-x", Labels: map[string]string{"job": "j"}},
		Spec:       corev1.PodSpec{Hostname: hostname, Subdomain: subdomain},
		Status: corev1.PodStatus{
			PodIP: address, Phase: corev1.PodRunning,
			Conditions: []corev1.PodCondition{{Type: corev1.PodReady, Status: status}},
		},
	}
}

var job = map[string]string{"job": "j"}

func TestAServiceHasItsShortNameInItsNamespaceOnly(t *testing.T) {
	table := NewTable([]*corev1.Service{service("a", "web", "127.96.0.9", job)}, nil)
	const qualified = "web.a web.a.svc web.a.svc.cluster.local\n"
	if text := string(table.For("a")); !strings.Contains(text, "127.96.0.9\tweb "+qualified) {
		t.Error(text)
	}
	if text := string(table.For("b")); !strings.Contains(text, "127.96.0.9\t"+qualified) {
		t.Error(text)
	}
}

func TestPodsOfAHeadlessServiceAreNamedByHostname(t *testing.T) {
	headless := service("a", "ddp", corev1.ClusterIPNone, job)
	pods := []*corev1.Pod{
		pod("a", "ddp-0", "ddp", "127.64.0.1", true),
		pod("a", "ddp-1", "ddp", "127.64.0.2", false),
		pod("a", "other", "elsewhere", "127.64.0.3", true),
		pod("b", "ddp-0", "ddp", "127.64.0.4", true),
	}
	text := string(NewTable([]*corev1.Service{headless}, pods).For("a"))
	for _, line := range []string{"127.64.0.1\tddp-0.ddp ddp-0.ddp.a ", "127.64.0.1\tddp ", "127.64.0.3\tddp "} {
		if !strings.Contains(text, line) {
			t.Errorf("%q is missing in\n%s", line, text)
		}
	}
	for _, address := range []string{"127.64.0.2", "127.64.0.4", "other"} {
		if strings.Contains(text, address) {
			t.Errorf("%s is in\n%s", address, text)
		}
	}
}

func TestUnreadyPodsAreNamedWhereTheServiceSaysSo(t *testing.T) {
	headless := service("a", "ddp", corev1.ClusterIPNone, job)
	headless.Spec.PublishNotReadyAddresses = true
	ended := pod("a", "ddp-2", "ddp", "127.64.0.3", false)
	ended.Status.Phase = corev1.PodSucceeded
	text := string(NewTable([]*corev1.Service{headless}, []*corev1.Pod{pod("a", "ddp-1", "ddp", "127.64.0.2", false), ended}).For("a"))
	if !strings.Contains(text, "127.64.0.2\tddp-1.ddp ") || strings.Contains(text, "127.64.0.3") {
		t.Error(text)
	}
}

func TestAHostsFileIsRewrittenInPlaceAndKeepsTheKubeletsLines(t *testing.T) {
	path := filepath.Join(t.TempDir(), "etc-hosts")
	if err := os.WriteFile(path, []byte("127.64.0.1\tme\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	before, _ := os.Stat(path)
	long := NewTable([]*corev1.Service{service("a", "web", "127.96.0.9", job), service("a", "api", "127.96.0.8", job)}, nil)
	short := NewTable(nil, nil)
	for _, table := range []Table{long, short} {
		if err := Rewrite(path, table.For("a")); err != nil {
			t.Fatal(err)
		}
	}
	after, _ := os.Stat(path)
	if !os.SameFile(before, after) {
		t.Error("the file was replaced: containers have the old one bound")
	}
	if text, _ := os.ReadFile(path); string(text) != "127.64.0.1\tme\n"+marker {
		t.Errorf("%q", text)
	}
}
