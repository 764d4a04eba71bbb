package pki

import (
	"os"

	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"
)

// WriteKubeconfig writes a kubeconfig with its certificates inside, so that it can be copied away.
// user names the certificate: "admin" or "kubelet".
func WriteKubeconfig(d Dir, user, server, path string) error {
	ca, err := os.ReadFile(d.Path("ca.crt"))
	if err != nil {
		return err
	}
	cert, err := os.ReadFile(d.Path(user + ".crt"))
	if err != nil {
		return err
	}
	key, err := os.ReadFile(d.Path(user + ".key"))
	if err != nil {
		return err
	}
	config := clientcmdapi.NewConfig()
	config.Clusters["tuneward"] = &clientcmdapi.Cluster{Server: server, CertificateAuthorityData: ca}
	config.AuthInfos[user] = &clientcmdapi.AuthInfo{ClientCertificateData: cert, ClientKeyData: key}
	config.Contexts["tuneward"] = &clientcmdapi.Context{Cluster: "tuneward", AuthInfo: user}
	config.CurrentContext = "tuneward"
	return clientcmd.WriteToFile(*config, path)
}
