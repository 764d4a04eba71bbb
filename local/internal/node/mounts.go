package node

import (
	"errors"
	"os"
	"path/filepath"
	"strings"

	"k8s.io/kubernetes/pkg/volume/util/hostutil"
	"k8s.io/kubernetes/pkg/volume/util/subpath"
	"k8s.io/mount-utils"

	"tuneward.dev/local/internal/cri"
)

// mounts is what the kubelet mounts with.
type mounts struct {
	mounter   mount.Interface
	subpather subpath.Interface
	hostUtil  hostutil.HostUtils
}

// newMounts gives the kubelet real mounts where the program has a mount namespace of its own. Elsewhere
// volumes in memory become directories on disk, and subPaths plain paths.
func newMounts(way cri.Way) mounts {
	if way != cri.WayNotify {
		mounter := mount.New("")
		return mounts{mounter, subpath.New(mounter), hostutil.NewHostUtil()}
	}
	return mounts{mount.NewFakeMounter(nil), plainSubpaths{}, unsharedHost{hostutil.NewHostUtil()}}
}

// plainSubpaths does without the bind mounts by which the kubelet keeps a container from swapping a
// subPath for a link to elsewhere: here, containers can reach elsewhere anyway.
type plainSubpaths struct{}

func (plainSubpaths) CleanSubPaths(string, string) error { return nil }

func (plainSubpaths) PrepareSafeSubpath(path subpath.Subpath) (string, func(), error) {
	return path.Path, nil, nil
}

// SafeMakeDir gives each directory it makes the volume's mode, as upstream does: a pod of another user
// must be able to write beside the first one's.
func (plainSubpaths) SafeMakeDir(subdir, base string, perm os.FileMode) error {
	path := base
	for _, name := range strings.Split(filepath.Clean(subdir), string(filepath.Separator)) {
		path = filepath.Join(path, name)
		err := os.Mkdir(path, perm)
		if errors.Is(err, os.ErrExist) {
			continue
		}
		if err != nil {
			return err
		}
		if err := os.Chmod(path, perm); err != nil {
			return err
		}
	}
	return nil
}

type unsharedHost struct{ *hostutil.HostUtil }

// MakeRShared would need CAP_SYS_ADMIN, which root in a container lacks.
func (unsharedHost) MakeRShared(string) error { return nil }
