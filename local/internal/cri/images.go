package cri

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"sync"
	"time"

	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// imageList holds the names pods asked for. An image is its name here: every name exists, nothing is
// pulled.
type imageList struct {
	mu    sync.Mutex
	names map[string]bool
}

func newImageList() *imageList { return &imageList{names: map[string]bool{}} }

func (l *imageList) add(name string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.names[name] = true
}

// imageID is derived from the name alone, so that it is the same after a restart.
func imageID(name string) string {
	sum := sha256.Sum256([]byte(name))
	return "sha256:" + hex.EncodeToString(sum[:])
}

func image(name string) *runtimeapi.Image {
	return &runtimeapi.Image{
		Id: imageID(name), RepoTags: []string{name}, Size: 1,
		// Without a user the kubelet refuses every runAsNonRoot pod: "image will run as root".
		Uid:  &runtimeapi.Int64Value{Value: imageUser},
		Spec: &runtimeapi.ImageSpec{Image: name},
	}
}

// byID finds the name behind an id, which the kubelet may ask with as well.
func (l *imageList) byID(name string) string {
	l.mu.Lock()
	defer l.mu.Unlock()
	for known := range l.names {
		if imageID(known) == name {
			return known
		}
	}
	return name
}

// ListImages lists the names pods asked for.
func (r *Runtime) ListImages(context.Context, *runtimeapi.ImageFilter) ([]*runtimeapi.Image, error) {
	r.images.mu.Lock()
	defer r.images.mu.Unlock()
	var list []*runtimeapi.Image
	for name := range r.images.names {
		list = append(list, image(name))
	}
	return list, nil
}

// ImageStatus says that the image is here.
func (r *Runtime) ImageStatus(_ context.Context, spec *runtimeapi.ImageSpec, _ bool) (*runtimeapi.ImageStatusResponse, error) {
	name := r.images.byID(spec.GetImage())
	r.images.add(name)
	return &runtimeapi.ImageStatusResponse{Image: image(name)}, nil
}

// PullImage does nothing (imagePullPolicy: Always).
func (r *Runtime) PullImage(_ context.Context, spec *runtimeapi.ImageSpec, _ *runtimeapi.AuthConfig,
	_ *runtimeapi.PodSandboxConfig) (string, error) {
	r.images.add(spec.GetImage())
	return imageID(spec.GetImage()), nil
}

// RemoveImage forgets a name.
func (r *Runtime) RemoveImage(_ context.Context, spec *runtimeapi.ImageSpec) error {
	name := r.images.byID(spec.GetImage())
	r.images.mu.Lock()
	defer r.images.mu.Unlock()
	delete(r.images.names, name)
	return nil
}

// ImageFsInfo describes the filesystem of the state directory, where nothing of an image lies.
func (r *Runtime) ImageFsInfo(context.Context) (*runtimeapi.ImageFsInfoResponse, error) {
	var stat unix.Statfs_t
	if err := unix.Statfs(r.cfg.StateDir, &stat); err != nil {
		return nil, err
	}
	usage := []*runtimeapi.FilesystemUsage{{
		Timestamp:  time.Now().UnixNano(),
		FsId:       &runtimeapi.FilesystemIdentifier{Mountpoint: r.cfg.StateDir},
		UsedBytes:  &runtimeapi.UInt64Value{Value: 0},
		InodesUsed: &runtimeapi.UInt64Value{Value: 0},
	}}
	return &runtimeapi.ImageFsInfoResponse{ImageFilesystems: usage, ContainerFilesystems: usage}, nil
}
