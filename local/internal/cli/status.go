package cli

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/clientcmd"

	"tuneward.dev/local/internal/layout"
)

// NotRunning is the exit code of `status` for a cluster that is not usable.
const NotRunning = 3

// StatusReport is the JSON of `status`.
type StatusReport struct {
	Running    bool   `json:"running"`
	PID        int    `json:"pid"`
	Kubeconfig string `json:"kubeconfig"`
	Way        string `json:"way"`
	Version    string `json:"version"`
	Nodes      int    `json:"nodes"`
	Pods       int    `json:"pods"`
}

// Status prints what runs in the data directory and returns the exit code.
func Status(options StatusOptions, out io.Writer) (int, error) {
	dir := layout.Dir(options.Data)
	report := StatusReport{Version: layout.Version}
	// A ready file without its process was left by a kill -9.
	if info, err := dir.ReadReady(); err == nil && dir.LockHolder() == info.PID {
		report = StatusReport{
			Running: true, PID: info.PID, Kubeconfig: dir.Kubeconfig(), Way: info.Way, Version: info.Version,
		}
		if err := count(&report); err != nil {
			return 1, fmt.Errorf("the cluster of %s runs (pid %d) but does not answer: %w; its log is %s", dir, info.PID, err, dir.Log())
		}
	}
	if err := printReport(report, options, out); err != nil {
		return 1, err
	}
	if !report.Running {
		return NotRunning, nil
	}
	return 0, nil
}

func count(report *StatusReport) error {
	config, err := clientcmd.BuildConfigFromFlags("", report.Kubeconfig)
	if err != nil {
		return err
	}
	client, err := kubernetes.NewForConfig(config)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	nodes, err := client.CoreV1().Nodes().List(ctx, metav1.ListOptions{})
	if err != nil {
		return err
	}
	pods, err := client.CoreV1().Pods("").List(ctx, metav1.ListOptions{})
	if err != nil {
		return err
	}
	report.Nodes, report.Pods = len(nodes.Items), len(pods.Items)
	return nil
}

func printReport(report StatusReport, options StatusOptions, out io.Writer) error {
	if options.Output == "json" {
		encoder := json.NewEncoder(out)
		encoder.SetIndent("", "  ")
		return encoder.Encode(report)
	}
	if !report.Running {
		_, err := fmt.Fprintf(out, "not running: %s\n", options.Data)
		return err
	}
	_, err := fmt.Fprintf(out, "running: Kubernetes %s, pid %d, %d node(s), %d pod(s)\nexport KUBECONFIG=%s\n",
		report.Version, report.PID, report.Nodes, report.Pods, report.Kubeconfig)
	return err
}
