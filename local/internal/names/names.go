// Package names gives pods the cluster's names through their hosts files.
//
// There is no DNS server: port 53 needs root, and containers share the machine's resolver. What a cluster's
// DNS would answer for Services and for pods of headless Services is written below the kubelet's own
// lines of each pod's /etc/hosts, and rewritten in place when it changes, as a container has the file
// bound by its inode.
package names

import (
	"bytes"
	"fmt"
	"os"
	"sort"
	"strings"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/labels"
)

// domain is the kubelet's ClusterDomain too.
const domain = "cluster.local"

// marker begins our part of a hosts file.
const marker = "# Services and pods of the cluster, kept up to date by tuneward-local.\n"

// entry is one line: an address and the name it has within its namespace.
type entry struct {
	address   string
	name      string
	namespace string
}

// Table is what the cluster's DNS would know.
type Table struct{ entries []entry }

// NewTable reads Services and pods. Their order does not matter.
func NewTable(services []*corev1.Service, pods []*corev1.Pod) Table {
	byNamespace := map[string][]*corev1.Pod{}
	for _, pod := range pods {
		byNamespace[pod.Namespace] = append(byNamespace[pod.Namespace], pod)
	}
	var table Table
	for _, service := range services {
		if service.Spec.ClusterIP == corev1.ClusterIPNone {
			table.addHeadless(service, byNamespace[service.Namespace])
		} else if service.Spec.ClusterIP != "" {
			table.add(service.Spec.ClusterIP, service.Name, service.Namespace)
		}
	}
	sort.Slice(table.entries, func(i, j int) bool { return table.entries[i].key() < table.entries[j].key() })
	return table
}

func (e entry) key() string { return e.namespace + "/" + e.name + "/" + e.address }

func (t *Table) add(address, name, namespace string) {
	t.entries = append(t.entries, entry{address, name, namespace})
}

// addHeadless names the pods a headless Service selects: each by hostname and subdomain, and all by the
// Service's own name.
func (t *Table) addHeadless(service *corev1.Service, pods []*corev1.Pod) {
	if len(service.Spec.Selector) == 0 {
		return
	}
	selector := labels.SelectorFromSet(service.Spec.Selector)
	for _, pod := range pods {
		if !selector.Matches(labels.Set(pod.Labels)) || !reachable(pod, service.Spec.PublishNotReadyAddresses) {
			continue
		}
		t.add(pod.Status.PodIP, service.Name, service.Namespace)
		if pod.Spec.Hostname != "" && pod.Spec.Subdomain == service.Name {
			t.add(pod.Status.PodIP, pod.Spec.Hostname+"."+service.Name, service.Namespace)
		}
	}
}

func reachable(pod *corev1.Pod, evenUnready bool) bool {
	if pod.Status.PodIP == "" || pod.Status.Phase == corev1.PodSucceeded || pod.Status.Phase == corev1.PodFailed {
		return false
	}
	return evenUnready || Ready(pod)
}

// Ready tells whether a pod should get a Service's connections.
func Ready(pod *corev1.Pod) bool {
	if pod.DeletionTimestamp != nil {
		return false
	}
	for _, condition := range pod.Status.Conditions {
		if condition.Type == corev1.PodReady {
			return condition.Status == corev1.ConditionTrue
		}
	}
	return false
}

// For returns the lines for pods of a namespace: names of the own namespace also in short.
func (t Table) For(namespace string) []byte {
	var lines bytes.Buffer
	lines.WriteString(marker)
	for _, e := range t.entries {
		qualified := e.name + "." + e.namespace
		names := []string{qualified, qualified + ".svc", qualified + ".svc." + domain}
		if e.namespace == namespace {
			names = append([]string{e.name}, names...)
		}
		fmt.Fprintf(&lines, "%s\t%s\n", e.address, strings.Join(names, " "))
	}
	return lines.Bytes()
}

// Rewrite puts the lines in place of our part of the file, and leaves the kubelet's. The file is never
// empty in between: the new text is written over the old, then the rest is cut off.
func Rewrite(path string, lines []byte) error {
	file, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer file.Close()
	old, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	kubelets, _, _ := bytes.Cut(old, []byte(marker))
	text := append(bytes.Clone(kubelets), lines...)
	if bytes.Equal(text, old) {
		return nil
	}
	if _, err := file.WriteAt(text, 0); err != nil {
		return err
	}
	return file.Truncate(int64(len(text)))
}
