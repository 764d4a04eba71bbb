// Package controlplane runs etcd, the API server, the controller manager and the scheduler in this
// process. It calls their options and Run functions, not their cobra commands: two of these install the
// process's one signal handler, which panics at the second call.
package controlplane

import (
	"fmt"
	"net/url"
	"os"
	"time"

	"go.etcd.io/etcd/server/v3/embed"
)

// etcdSocket is where etcd listens. Programs may give AF_UNIX paths of up to 108 bytes only, and data
// directories of tests are longer; the program's working directory is the data directory.
const etcdSocket = "unix:///proc/self/cwd/etcd.sock"

// startEtcd serves on a unix socket in the data directory, whose mode (0700) is its access control.
func startEtcd(dir, logPath string, noFsync bool) (*embed.Etcd, error) {
	config := embed.NewConfig()
	config.Dir = dir
	config.Name = "tuneward"
	config.UnsafeNoFsync = noFsync
	config.LogLevel = "warn"
	// Zero, its value outside of etcd's own main, logs every request.
	config.WarningUnaryRequestDuration = time.Second
	config.LogOutputs = []string{logPath}

	socket, err := url.Parse(etcdSocket)
	if err != nil {
		return nil, err
	}
	// One member has no peers; but what it would advertise must look like host:port, or it does not start.
	placeholder := url.URL{Scheme: "http", Host: "127.0.0.1:2380"}
	config.ListenPeerUrls = nil
	config.ListenClientUrls = []url.URL{*socket}
	config.AdvertisePeerUrls = []url.URL{placeholder}
	config.AdvertiseClientUrls = []url.URL{placeholder}
	config.InitialCluster = config.InitialClusterFromName(config.Name)

	// A socket left by a kill -9 would be taken for a running etcd.
	if err := os.Remove("etcd.sock"); err != nil && !os.IsNotExist(err) {
		return nil, err
	}
	etcd, err := embed.StartEtcd(config)
	if err != nil {
		return nil, fmt.Errorf("etcd does not start in %s: %w", dir, err)
	}
	select {
	case <-etcd.Server.ReadyNotify():
		return etcd, nil
	case err := <-etcd.Err():
		return nil, fmt.Errorf("etcd ended: %w", err)
	case <-time.After(60 * time.Second):
		return nil, fmt.Errorf("etcd is not ready after 60 s; is the disk of %s full or very slow?", dir)
	}
}
