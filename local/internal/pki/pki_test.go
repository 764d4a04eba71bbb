package pki

import (
	"crypto/x509"
	"os"
	"path/filepath"
	"testing"

	"k8s.io/client-go/tools/clientcmd"
)

func certificate(t *testing.T, d Dir, name string) *x509.Certificate {
	t.Helper()
	block, err := readPEM(d.Path(name))
	if err != nil {
		t.Fatal(err)
	}
	parsed, err := x509.ParseCertificate(block)
	if err != nil {
		t.Fatal(err)
	}
	return parsed
}

func ensured(t *testing.T) Dir {
	t.Helper()
	d := Dir(filepath.Join(t.TempDir(), "pki"))
	if err := Ensure(d, "127.96.0.1", "local"); err != nil {
		t.Fatal(err)
	}
	return d
}

func TestTheServersCertificateIsGoodForEveryNameClientsUse(t *testing.T) {
	d := ensured(t)
	roots := x509.NewCertPool()
	roots.AddCert(certificate(t, d, "ca.crt"))
	server := certificate(t, d, "apiserver.crt")
	for _, name := range []string{"127.0.0.1", "127.96.0.1", "localhost", "kubernetes.default.svc"} {
		if _, err := server.Verify(x509.VerifyOptions{DNSName: name, Roots: roots}); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestKeysStayFromStartToStart(t *testing.T) {
	d := ensured(t)
	before := map[string]string{}
	for _, name := range []string{"ca.crt", "apiserver.crt", "admin.key", "tokens.key"} {
		data, _ := os.ReadFile(d.Path(name))
		before[name] = string(data)
	}
	if err := Ensure(d, "127.96.0.1", "local"); err != nil {
		t.Fatal(err)
	}
	for name, data := range before {
		if after, _ := os.ReadFile(d.Path(name)); string(after) != data {
			t.Errorf("%s changed", name)
		}
	}
}

func TestAKubeconfigHoldsAllItNeeds(t *testing.T) {
	d := ensured(t)
	path := filepath.Join(t.TempDir(), "kubeconfig")
	if err := WriteKubeconfig(d, "admin", "https://127.0.0.1:1", path); err != nil {
		t.Fatal(err)
	}
	if err := os.RemoveAll(string(d)); err != nil {
		t.Fatal(err)
	}
	config, err := clientcmd.BuildConfigFromFlags("", path)
	if err != nil || config.Host != "https://127.0.0.1:1" || len(config.CertData) == 0 || len(config.CAData) == 0 {
		t.Errorf("%v", err)
	}
	if info, _ := os.Stat(path); info.Mode().Perm() != 0o600 {
		t.Errorf("mode %v", info.Mode())
	}
}
