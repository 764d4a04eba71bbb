package cri

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"tuneward.dev/local/internal/shim"
)

// defaultPath is what images have when they say nothing else.
const defaultPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// imageUser is the user of every image: one that is not root, so that pods with runAsNonRoot are
// admitted, and the one most images of this kind (distroless) use.
const imageUser = 65532

// containerSpec translates the kubelet's request into the shim's.
func (r *Runtime) containerSpec(id string, config *runtimeapi.ContainerConfig, s *sandboxRecord) (*shim.Spec, error) {
	if len(config.GetCommand()) == 0 {
		return nil, fmt.Errorf("container %q has no command: the local Kubernetes reads no images and so knows no "+
			"entrypoint of %q; set the container's command in the pod's spec",
			config.GetMetadata().GetName(), imageName(config))
	}
	mounts, err := r.mounts(config)
	if err != nil {
		return nil, err
	}
	security := config.GetLinux().GetSecurityContext()
	root := r.imageRoot(imageName(config))
	if root != "/" && r.cfg.Way == WayNotify {
		return nil, fmt.Errorf("image %q is the directory %s, which needs namespaces, and this machine allows none",
			imageName(config), root)
	}
	spec := &shim.Spec{
		ID:           id,
		Root:         root,
		Args:         append(append([]string{}, config.GetCommand()...), config.GetArgs()...),
		Env:          r.environment(config, s.Hostname),
		Cwd:          config.GetWorkingDir(),
		Hostname:     s.Hostname,
		Mounts:       mounts,
		User:         r.user(security),
		ReadOnlyRoot: security.GetReadonlyRootfs(),
		Privileged:   security.GetPrivileged(),
		NoNewPrivs:   security.GetNoNewPrivs(),
		Notify:       r.cfg.Way == WayNotify,
	}
	if spec.Cwd == "" {
		spec.Cwd = "/"
	}
	if config.GetLogPath() != "" {
		spec.LogPath = filepath.Join(s.LogDir, config.GetLogPath())
	}
	return spec, nil
}

// imageName is the name as the pod wrote it; Image is what ImageStatus made of it, an id.
func imageName(config *runtimeapi.ContainerConfig) string {
	if name := config.GetImage().GetUserSpecifiedImage(); name != "" {
		return name
	}
	return config.GetImage().GetImage()
}

// imageRoot gives the root directory of an image name, which may be listed with or without its tag.
func (r *Runtime) imageRoot(name string) string {
	for _, key := range []string{name, repository(name)} {
		if root, ok := r.cfg.Images[key]; ok {
			return root
		}
	}
	return "/"
}

// repository cuts tag and digest off an image name; a colon before the last slash is a registry's port.
func repository(name string) string {
	name, _, _ = strings.Cut(name, "@")
	if colon := strings.LastIndexByte(name, ':'); colon > strings.LastIndexByte(name, '/') {
		return name[:colon]
	}
	return name
}

func (r *Runtime) mounts(config *runtimeapi.ContainerConfig) ([]shim.Mount, error) {
	var mounts []shim.Mount
	for _, m := range config.GetMounts() {
		source := m.GetHostPath()
		if image := m.GetImage().GetImage(); image != "" {
			root := r.imageRoot(image)
			if root == "/" {
				return nil, fmt.Errorf("image volume at %s: no directory is known for the image %q", m.GetContainerPath(), image)
			}
			source = filepath.Join(root, m.GetImageSubPath())
		}
		mounts = append(mounts, shim.Mount{
			Source: source, Target: m.GetContainerPath(),
			ReadOnly: m.GetReadonly() || m.GetImage().GetImage() != "", RecursiveReadOnly: m.GetRecursiveReadOnly(),
		})
	}
	return mounts, nil
}

// user maps the pod's uid and gid to the caller. With no runAsGroup the fsGroup takes its place, so that
// what the container writes belongs to the group its other pods expect.
func (r *Runtime) user(security *runtimeapi.LinuxContainerSecurityContext) *shim.User {
	uid := security.GetRunAsUser().GetValue()
	if uid == 0 || r.cfg.Way == WayNotify {
		return nil
	}
	user := &shim.User{UID: uint32(uid)}
	groups := security.GetSupplementalGroups()
	switch {
	case security.GetRunAsGroup() != nil:
		user.GID = uint32(security.GetRunAsGroup().GetValue())
	case len(groups) > 0:
		user.GID = uint32(groups[0])
	}
	if r.cfg.Way != WayRoot {
		return user
	}
	seen := map[uint32]bool{user.GID: true, uint32(os.Getgid()): true}
	for _, group := range groups {
		if !seen[uint32(group)] {
			seen[uint32(group)] = true
			user.Groups = append(user.Groups, uint32(group))
		}
	}
	return user
}

// environment is the image's, then what every runtime adds, then the pod's own, each replacing the former.
func (r *Runtime) environment(config *runtimeapi.ContainerConfig, hostname string) []string {
	env := newEnvironment()
	env.set("PATH", defaultPath)
	for _, entry := range r.cfg.Env {
		if key, value, ok := strings.Cut(entry, "="); ok {
			env.set(key, value)
		}
	}
	env.set("PATH", strings.Join(append(append([]string{}, r.cfg.PathPrefix...), env.values["PATH"]), ":"))
	env.set("HOSTNAME", hostname)
	for _, entry := range config.GetEnvs() {
		value := string(entry.GetValue())
		if override, ok := r.cfg.EnvOverride[entry.GetKey()]; ok {
			value = override
		}
		env.set(entry.GetKey(), value)
	}
	return env.list()
}

// environment keeps the order of first mention, which makes specs comparable.
type environment struct {
	keys   []string
	values map[string]string
}

func newEnvironment() *environment { return &environment{values: map[string]string{}} }

func (e *environment) set(key, value string) {
	if _, ok := e.values[key]; !ok {
		e.keys = append(e.keys, key)
	}
	e.values[key] = value
}

func (e *environment) list() []string {
	list := make([]string, len(e.keys))
	for i, key := range e.keys {
		list[i] = key + "=" + e.values[key]
	}
	return list
}
