// Package pki makes a cluster's keys and kubeconfigs.
//
// One authority signs everything: the cluster lies on one machine, in one directory only its user may
// read, so more authorities would separate nothing.
package pki

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"time"
)

// lifetime outlives any local cluster; nothing here is ever renewed.
const lifetime = 10 * 365 * 24 * time.Hour

// Dir is where the keys lie.
type Dir string

// Path returns the file of that name, as the components' flags want it.
func (d Dir) Path(name string) string { return filepath.Join(string(d), name) }

type authority struct {
	cert *x509.Certificate
	key  crypto.Signer
}

// leaf is one certificate of the cluster.
type leaf struct {
	file          string
	user          string
	organizations []string
	names         []string
	addresses     []net.IP
}

// Ensure makes what is missing, and keeps what is there: pods hold tokens signed by these keys.
func Ensure(d Dir, serviceIP, nodeName string) error {
	if err := os.MkdirAll(string(d), 0o700); err != nil {
		return err
	}
	ca, err := ensureAuthority(d)
	if err != nil {
		return fmt.Errorf("the keys in %s are damaged (%w); run `tuneward-local down --purge` and start anew", d, err)
	}
	for _, l := range leaves(serviceIP, nodeName) {
		if err := ensureLeaf(d, ca, l); err != nil {
			return err
		}
	}
	return ensureTokenKey(d)
}

func leaves(serviceIP, nodeName string) []leaf {
	local := net.IPv4(127, 0, 0, 1)
	return []leaf{
		{
			file: "apiserver", user: "kube-apiserver",
			names: []string{"localhost", "kubernetes", "kubernetes.default", "kubernetes.default.svc",
				"kubernetes.default.svc.cluster.local"},
			addresses: []net.IP{local, net.ParseIP(serviceIP)},
		},
		{file: "kubelet-serving", user: "system:node:" + nodeName, organizations: []string{"system:nodes"},
			names: []string{"localhost", nodeName}, addresses: []net.IP{local}},
		{file: "admin", user: "tuneward-admin", organizations: []string{"system:masters"}},
		{file: "apiserver-kubelet", user: "kube-apiserver-kubelet-client", organizations: []string{"system:masters"}},
		{file: "kubelet", user: "system:node:" + nodeName, organizations: []string{"system:nodes"}},
	}
}

func ensureAuthority(d Dir) (authority, error) {
	if _, err := os.Stat(d.Path("ca.crt")); os.IsNotExist(err) {
		if err := makeAuthority(d); err != nil {
			return authority{}, err
		}
	}
	certBlock, err := readPEM(d.Path("ca.crt"))
	if err != nil {
		return authority{}, err
	}
	cert, err := x509.ParseCertificate(certBlock)
	if err != nil {
		return authority{}, err
	}
	keyBlock, err := readPEM(d.Path("ca.key"))
	if err != nil {
		return authority{}, err
	}
	key, err := x509.ParseECPrivateKey(keyBlock)
	return authority{cert, key}, err
}

func makeAuthority(d Dir) error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "tuneward-local"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(lifetime),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature,
	}
	cert, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return err
	}
	return writePair(d, "ca", cert, key)
}

func ensureLeaf(d Dir, ca authority, l leaf) error {
	if _, err := os.Stat(d.Path(l.file + ".crt")); err == nil {
		return nil
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 120))
	if err != nil {
		return err
	}
	template := &x509.Certificate{
		SerialNumber: serial, Subject: pkix.Name{CommonName: l.user, Organization: l.organizations},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(lifetime),
		DNSNames: l.names, IPAddresses: l.addresses,
		KeyUsage:    x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth},
	}
	cert, err := x509.CreateCertificate(rand.Reader, template, ca.cert, key.Public(), ca.key)
	if err != nil {
		return err
	}
	return writePair(d, l.file, cert, key)
}

// ensureTokenKey makes the key of service account tokens: RSA, the one kind every client library checks.
func ensureTokenKey(d Dir) error {
	if _, err := os.Stat(d.Path("tokens.key")); err == nil {
		return nil
	}
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		return err
	}
	public, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		return err
	}
	if err := writePEM(d.Path("tokens.pub"), "PUBLIC KEY", public); err != nil {
		return err
	}
	return writePEM(d.Path("tokens.key"), "RSA PRIVATE KEY", x509.MarshalPKCS1PrivateKey(key))
}

// writePair writes the certificate last: Ensure takes its presence for the whole.
func writePair(d Dir, name string, cert []byte, key *ecdsa.PrivateKey) error {
	encoded, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		return err
	}
	if err := writePEM(d.Path(name+".key"), "EC PRIVATE KEY", encoded); err != nil {
		return err
	}
	return writePEM(d.Path(name+".crt"), "CERTIFICATE", cert)
}

func writePEM(path, kind string, data []byte) error {
	return os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: data}), 0o600)
}

func readPEM(path string) ([]byte, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	block, _ := pem.Decode(data)
	if block == nil {
		return nil, fmt.Errorf("%s is not PEM", path)
	}
	return block.Bytes, nil
}
