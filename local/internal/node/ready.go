package node

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"

	v1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/rest"

	"tuneward.dev/local/internal/pki"
)

// kubeletKnowsItsPods is for restarts: the node object still says Ready from before, and until the kubelet
// has read its pods, exec and logs answer "pod does not exist".
func kubeletKnowsItsPods(ctx context.Context, config Config) error {
	known, err := kubeletPods(ctx, config)
	if err != nil {
		return err
	}
	assigned, err := config.Client.CoreV1().Pods("").List(ctx, metav1.ListOptions{FieldSelector: "spec.nodeName=" + config.NodeName})
	if err != nil {
		return err
	}
	for _, pod := range assigned.Items {
		if !known[pod.UID] {
			return fmt.Errorf("the kubelet does not know pod %s/%s yet", pod.Namespace, pod.Name)
		}
	}
	return nil
}

// kubeletPods asks the kubelet's own port: the API server's proxy refuses loopback addresses.
func kubeletPods(ctx context.Context, config Config) (map[types.UID]bool, error) {
	keys := pki.Dir(config.Dir.PKI())
	client, err := rest.HTTPClientFor(&rest.Config{TLSClientConfig: rest.TLSClientConfig{
		CAFile: keys.Path("ca.crt"), CertFile: keys.Path("apiserver-kubelet.crt"), KeyFile: keys.Path("apiserver-kubelet.key"),
	}})
	if err != nil {
		return nil, err
	}
	defer client.CloseIdleConnections()
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, fmt.Sprintf("https://127.0.0.1:%d/pods", config.Addresses.KubeletPort), nil)
	if err != nil {
		return nil, err
	}
	response, err := client.Do(request)
	if err != nil {
		return nil, err
	}
	defer response.Body.Close()
	var list v1.PodList
	if err := json.NewDecoder(response.Body).Decode(&list); err != nil {
		return nil, fmt.Errorf("the kubelet answers %s: %w", response.Status, err)
	}
	known := map[types.UID]bool{}
	for _, pod := range list.Items {
		known[pod.UID] = true
	}
	return known, nil
}
