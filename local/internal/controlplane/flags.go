package controlplane

import (
	"fmt"
	"path/filepath"

	"tuneward.dev/local/internal/pki"
)

func apiServerFlags(config Config) []string {
	keys := pki.Dir(config.Dir.PKI())
	return []string{
		"--etcd-servers=" + etcdSocket,
		"--bind-address=127.0.0.1",
		fmt.Sprintf("--secure-port=%d", config.Addresses.APIPort),
		// The Service `kubernetes` would need an endpoint, and a loopback address is refused as one.
		"--advertise-address=127.0.0.1",
		"--endpoint-reconciler-type=none",
		"--external-hostname=localhost",
		"--service-cluster-ip-range=" + config.Addresses.ServiceCIDR(),
		"--allow-privileged=true",
		"--authorization-mode=Node,RBAC",
		"--client-ca-file=" + keys.Path("ca.crt"),
		"--tls-cert-file=" + keys.Path("apiserver.crt"),
		"--tls-private-key-file=" + keys.Path("apiserver.key"),
		"--kubelet-certificate-authority=" + keys.Path("ca.crt"),
		"--kubelet-client-certificate=" + keys.Path("apiserver-kubelet.crt"),
		"--kubelet-client-key=" + keys.Path("apiserver-kubelet.key"),
		"--kubelet-preferred-address-types=InternalIP",
		"--service-account-issuer=https://kubernetes.default.svc.cluster.local",
		"--service-account-key-file=" + keys.Path("tokens.pub"),
		"--service-account-signing-key-file=" + keys.Path("tokens.key"),
		"--profiling=false",
	}
}

func managerFlags(config Config) []string {
	keys := pki.Dir(config.Dir.PKI())
	return []string{
		"--kubeconfig=" + config.Dir.Kubeconfig(),
		"--secure-port=0",
		"--leader-elect=false",
		// The first three are refused loopback pod addresses; our Service proxy reads pods itself.
		"--controllers=*,-endpoints-controller,-endpointslice-controller,-endpointslice-mirroring-controller",
		"--service-account-private-key-file=" + keys.Path("tokens.key"),
		"--root-ca-file=" + keys.Path("ca.crt"),
		"--cluster-signing-cert-file=" + keys.Path("ca.crt"),
		"--cluster-signing-key-file=" + keys.Path("ca.key"),
		// With the default of 20 requests a second, its own start takes 5 s of the cluster's 8.
		"--kube-api-qps=500",
		"--kube-api-burst=1000",
		// By default it makes a directory under /usr/libexec.
		"--flex-volume-plugin-dir=" + filepath.Join(config.Dir.Kubelet(), "flexvolume"),
		"--profiling=false",
	}
}

func schedulerFlags(config Config) []string {
	return []string{
		"--kubeconfig=" + config.Dir.Kubeconfig(),
		"--secure-port=0",
		"--leader-elect=false",
		"--kube-api-qps=500",
		"--kube-api-burst=1000",
		"--profiling=false",
	}
}
