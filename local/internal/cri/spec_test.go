package cri

import (
	"os"
	"reflect"
	"testing"

	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"tuneward.dev/local/internal/shim"
)

func TestImageRootIsFoundWithAndWithoutTag(t *testing.T) {
	r := &Runtime{cfg: Config{Images: map[string]string{"registry:5000/a/b": "/b", "c:1": "/c1"}}}
	for name, want := range map[string]string{
		"registry:5000/a/b":                "/b",
		"registry:5000/a/b:v1":             "/b",
		"registry:5000/a/b:v1@sha256:0123": "/b",
		"c:1":                              "/c1",
		"c:2":                              "/",
		"registry:5000/other":              "/",
	} {
		if got := r.imageRoot(name); got != want {
			t.Errorf("%s: got %s, want %s", name, got, want)
		}
	}
}

func TestEnvironmentLayersImageRuntimeAndPod(t *testing.T) {
	r := &Runtime{cfg: Config{
		PathPrefix:  []string{"/venv/bin", "/tools"},
		Env:         []string{"PATH=/bin", "HOME=/h", "A=image"},
		EnvOverride: map[string]string{"KUBERNETES_SERVICE_PORT": "6443", "NOT_GIVEN": "x"},
	}}
	config := &runtimeapi.ContainerConfig{Envs: []*runtimeapi.KeyValue{
		{Key: "A", Value: []byte("pod")}, {Key: "KUBERNETES_SERVICE_PORT", Value: []byte("443")}, {Key: "EMPTY"},
	}}
	got := r.environment(config, "host-0")
	want := []string{"PATH=/venv/bin:/tools:/bin", "HOME=/h", "A=pod", "HOSTNAME=host-0", "KUBERNETES_SERVICE_PORT=6443", "EMPTY="}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got %q\nwant %q", got, want)
	}
}

func TestUserIsMappedWithItsGroups(t *testing.T) {
	uid := &runtimeapi.Int64Value{Value: 1234}
	gid := &runtimeapi.Int64Value{Value: 55}
	own := int64(os.Getgid())
	for name, test := range map[string]struct {
		way      Way
		security *runtimeapi.LinuxContainerSecurityContext
		want     *shim.User
	}{
		"root is the caller":        {WayRoot, &runtimeapi.LinuxContainerSecurityContext{RunAsUser: &runtimeapi.Int64Value{}}, nil},
		"no user is the caller":     {WayRoot, nil, nil},
		"notify maps nothing":       {WayNotify, &runtimeapi.LinuxContainerSecurityContext{RunAsUser: uid}, nil},
		"the group is root's":       {WayRoot, &runtimeapi.LinuxContainerSecurityContext{RunAsUser: uid}, &shim.User{UID: 1234}},
		"fsGroup without runAsUser": {WayRoot, &runtimeapi.LinuxContainerSecurityContext{SupplementalGroups: []int64{9}}, nil},
		"fsGroup is the group": {WayUserNS, &runtimeapi.LinuxContainerSecurityContext{RunAsUser: uid, SupplementalGroups: []int64{9, 10}},
			&shim.User{UID: 1234, GID: 9}},
		"root maps the other groups too": {WayRoot, &runtimeapi.LinuxContainerSecurityContext{
			RunAsUser: uid, RunAsGroup: gid, SupplementalGroups: []int64{9, 55, 9, own}}, &shim.User{UID: 1234, GID: 55, Groups: []uint32{9}}},
	} {
		t.Run(name, func(t *testing.T) {
			r := &Runtime{cfg: Config{Way: test.way}}
			if got := r.user(test.security); !reflect.DeepEqual(got, test.want) {
				t.Errorf("got %v, want %v", got, test.want)
			}
		})
	}
}

func TestStopSignalIsTranslatedByNameNotByNumber(t *testing.T) {
	for given, want := range map[runtimeapi.Signal]unix.Signal{
		runtimeapi.Signal_RUNTIME_DEFAULT: unix.SIGTERM,
		runtimeapi.Signal_SIGUSR1:         unix.SIGUSR1,
		runtimeapi.Signal_SIGINT:          unix.SIGINT,
	} {
		if got := stopSignal(int(given)); got != want {
			t.Errorf("%v: got %v, want %v", given, got, want)
		}
	}
}

func TestAddressesGoRoundTheNetworkAndEnd(t *testing.T) {
	pool, err := newAddressPool("127.64.3.252/30")
	if err != nil {
		t.Fatal(err)
	}
	pool.reserve("127.64.3.253")
	first, _ := pool.take()
	if first != "127.64.3.254" {
		t.Errorf("got %s", first)
	}
	// .252 is the network's own address, .255 looks like a broadcast.
	if another, err := pool.take(); err == nil {
		t.Errorf("got %s from a full network", another)
	}
	pool.release("127.64.3.253")
	if again, err := pool.take(); err != nil || again != "127.64.3.253" {
		t.Errorf("got %s, %v", again, err)
	}
}

func TestLabelsAreSelectedWhole(t *testing.T) {
	labels := map[string]string{"a": "1", "b": "2"}
	if !selected(labels, nil) || !selected(labels, map[string]string{"a": "1"}) || selected(labels, map[string]string{"a": "1", "c": ""}) {
		t.Error("wrong selection")
	}
}
