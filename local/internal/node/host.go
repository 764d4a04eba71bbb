package node

import (
	"os"
	"path/filepath"
	"strings"

	"k8s.io/kubernetes/pkg/kubelet"
	kubecontainer "k8s.io/kubernetes/pkg/kubelet/container"

	"tuneward.dev/local/internal/layout"
)

// logLinks is where the kubelet links every container's log for log collectors, whatever its settings say.
const logLinks = kubelet.DefaultContainerLogsDir

// keepLogLinksInside keeps the kubelet from making /var/log/containers: it does not start where it may
// not, and the machine is not ours where it may.
func keepLogLinksInside(dir layout.Dir) {
	kubelet.ContainerLogsDir = filepath.Join(dir.Kubelet(), "log-links")
}

// untouchedOS is the kubelet's file access without those links. Nobody collects logs here, the links
// would outlive the cluster, and two clusters would clear away each other's.
type untouchedOS struct{ kubecontainer.RealOS }

func (o untouchedOS) Symlink(oldname, newname string) error {
	if isLogLink(newname) {
		return nil
	}
	return o.RealOS.Symlink(oldname, newname)
}

func (o untouchedOS) Remove(path string) error {
	if isLogLink(path) {
		return os.ErrNotExist
	}
	return o.RealOS.Remove(path)
}

func (o untouchedOS) Glob(pattern string) ([]string, error) {
	if isLogLink(pattern) {
		return nil, nil
	}
	return o.RealOS.Glob(pattern)
}

func isLogLink(path string) bool { return strings.HasPrefix(path, logLinks+"/") }
