package node

import (
	v1 "k8s.io/api/core/v1"
	"k8s.io/kubernetes/pkg/volume"
	"k8s.io/kubernetes/pkg/volume/configmap"
	"k8s.io/kubernetes/pkg/volume/downwardapi"
	"k8s.io/kubernetes/pkg/volume/emptydir"
	"k8s.io/kubernetes/pkg/volume/hostpath"
	"k8s.io/kubernetes/pkg/volume/local"
	"k8s.io/kubernetes/pkg/volume/projected"
	"k8s.io/kubernetes/pkg/volume/secret"
)

// volumePlugins leaves out what needs other machines or drivers.
func volumePlugins() []volume.VolumePlugin {
	var plugins []volume.VolumePlugin
	for _, probed := range [][]volume.VolumePlugin{
		emptydir.ProbeVolumePlugins(), secret.ProbeVolumePlugins(), configmap.ProbeVolumePlugins(),
		downwardapi.ProbeVolumePlugins(), projected.ProbeVolumePlugins(),
	} {
		for _, plugin := range probed {
			plugins = append(plugins, unchowned{plugin})
		}
	}
	plugins = append(plugins, hostpath.ProbeVolumePlugins(volume.VolumeConfig{})...)
	return append(plugins, local.ProbeVolumePlugins()...)
}

// unchowned keeps the kubelet from giving a volume's files to runAsUser and fsGroup. Whatever runAsUser
// says, a container's processes are the caller's outside, so a file of uid 65532 would be another's; and
// in a user namespace there is no uid 65532 to give a token to, which fails the whole mount.
type unchowned struct{ volume.VolumePlugin }

func (p unchowned) NewMounter(spec *volume.Spec, pod *v1.Pod) (volume.Mounter, error) {
	mounter, err := p.VolumePlugin.NewMounter(spec, pod)
	if err != nil {
		return nil, err
	}
	return unchownedMounter{mounter}, nil
}

type unchownedMounter struct{ volume.Mounter }

func (m unchownedMounter) SetUp(args volume.MounterArgs) error {
	return m.Mounter.SetUp(withoutOwner(args))
}

func (m unchownedMounter) SetUpAt(dir string, args volume.MounterArgs) error {
	return m.Mounter.SetUpAt(dir, withoutOwner(args))
}

func withoutOwner(args volume.MounterArgs) volume.MounterArgs {
	args.FsUser, args.FsGroup = nil, nil
	return args
}
