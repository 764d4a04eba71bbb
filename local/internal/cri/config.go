// Package cri is a container runtime whose containers are processes of this machine.
//
// It implements the two Go interfaces the kubelet calls (k8s.io/cri-api/pkg/apis RuntimeService and
// ImageManagerService), so the kubelet runs over it in one process, without gRPC. It knows nothing of
// k8s.io/kubernetes, so that its tests do not compile Kubernetes.
package cri

// Way is how containers are separated from the machine. The program tries the ways in this order,
// each by running `tuneward-shim probe WAY`, and takes the first that works.
type Way string

const (
	// WayRoot uses mount, PID, UTS and IPC namespaces with the privileges of root.
	WayRoot Way = "root"
	// WayUserNS uses the same namespaces inside a user namespace; the whole program runs in it as uid 0.
	WayUserNS Way = "userns"
	// WayNotify uses no namespace: a seccomp filter asks the shim about each path.
	WayNotify Way = "notify"
)

// Config is what the program tells the runtime. The program is already inside the namespaces of Way
// (internal/enter) when it calls New.
type Config struct {
	// StateDir (0700, made by New) holds sandboxes and containers; a New over the same directory
	// adopts what still runs there. It may lie deep: AF_UNIX paths end at 108 bytes.
	StateDir string
	// ShimPath is the tuneward-shim binary.
	ShimPath string
	// Way is the way that was probed.
	Way Way

	// PathPrefix are directories put before the PATH a container starts with, in this order.
	PathPrefix []string
	// Env ("K=V") is the environment of an image: what every container starts with before the pod's own
	// variables. PATH and HOME belong to it.
	Env []string
	// EnvOverride replaces the value of a variable the kubelet gave, only where it gave one
	// (KUBERNETES_SERVICE_HOST and _PORT where :443 of the ClusterIP cannot be bound).
	EnvOverride map[string]string

	// Images maps an image name (with or without tag, as pods write it) to a root directory.
	// Every other name means the machine's own filesystem.
	Images map[string]string

	// PodCIDR is the network pod addresses are taken from, one for each sandbox, "127.64.0.0/18".
	PodCIDR string

	// HostsFile, if not nil, is called in CreateContainer when the kubelet mounts a hosts file
	// (mount to /etc/hosts): it appends the cluster's names to hostPath for that pod.
	HostsFile func(podNamespace, podName, podUID, hostPath string) error

	// Logf gets one line a call, for local.log. Never nil.
	Logf func(format string, args ...any)
}

// What the program further expects of this package and of the shim (B's files):
//
//	func New(cfg Config) (*Runtime, error)           // adopts; starts the streaming server on 127.0.0.1:0
//	func (r *Runtime) Close() error                  // ends the streaming server, leaves containers running
//	func LiveShims(stateDir string) ([]int, error)   // pids of live shims, by which a restart joins their namespaces
//	func Clean(ctx context.Context, stateDir string, grace time.Duration) error
//	                                                 // ends every container and shim of stateDir (TERM, grace, KILL), without
//	                                                 // a Runtime and from outside of the namespaces, then removes their state
//
//	tuneward-shim probe WAY     exit 0 when a throwaway container ran in the current namespaces; else 1 and one sentence on stderr
//	tuneward-shim enter ...     main calls enter.Main(os.Args[2:]) of internal/enter (A's), which never returns
