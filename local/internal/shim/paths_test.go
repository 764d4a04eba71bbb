package shim

import (
	"os"
	"path/filepath"
	"testing"
)

func mapped(t *testing.T, spec *Spec) (*pathMap, string) {
	t.Helper()
	skeleton := t.TempDir()
	m, err := newPathMap(spec, skeleton)
	if err != nil {
		t.Fatal(err)
	}
	return m, skeleton
}

func TestPathsBelowVolumesAreFoundByTheLongestTarget(t *testing.T) {
	data, inner := realDir(t), realDir(t)
	m, _ := mapped(t, &Spec{Mounts: []Mount{{Source: data, Target: "/mnt/x"}, {Source: inner, Target: "/mnt/x/in/ner/"}}})
	for path, want := range map[string]string{
		"/mnt/x":              data,
		"/mnt/x/a/../b":       data + "/b",
		"/mnt/x/in":           data + "/in",
		"/mnt/x/in/ner/c":     inner + "/c",
		"/mnt/x/in/ner/../y":  data + "/in/y",
		"/mnt/xy":             "/mnt/xy",
		"/mnt/x/../../etc/fs": "/etc/fs",
	} {
		got, changed := m.real(path)
		if got != want || changed != (filepath.Clean(path) != want) {
			t.Errorf("%s: got %s, %v", path, got, changed)
		}
	}
	for path, want := range map[string]string{
		data + "/a": "/mnt/x/a", inner: "/mnt/x/in/ner", "/etc": "/etc", data + "x": data + "x",
	} {
		if got := m.seen(path); got != want {
			t.Errorf("%s is seen as %s, want %s", path, got, want)
		}
	}
}

func TestDirectoriesOnTheWayToAVolumeExistOnlyInTheSkeleton(t *testing.T) {
	data, machine := realDir(t), realDir(t)
	m, skeleton := mapped(t, &Spec{
		Cwd:    machine + "/work/here",
		Mounts: []Mount{{Source: data, Target: machine + "/a/b/c"}, {Source: data, Target: machine + "/d"}},
	})
	for path, want := range map[string]string{
		machine + "/a":         skeleton + machine + "/a",
		machine + "/a/b/other": skeleton + machine + "/a/b/other",
		machine + "/a/b/c/f":   data + "/f",
		machine + "/d":         data,
		machine + "/work/here": skeleton + machine + "/work/here",
		machine:                machine,
	} {
		if got, _ := m.real(path); got != want {
			t.Errorf("%s: got %s, want %s", path, got, want)
		}
	}
	if _, err := os.Stat(filepath.Join(skeleton, machine, "a/b")); err != nil {
		t.Error(err)
	}
	if entries, _ := os.ReadDir(machine); len(entries) != 0 {
		t.Errorf("made on the machine: %v", entries)
	}
}

func TestVolumeBelowALinkHasBothNames(t *testing.T) {
	data, machine := realDir(t), realDir(t)
	if err := os.Mkdir(machine+"/run", 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(machine+"/run", machine+"/var-run"); err != nil {
		t.Fatal(err)
	}
	m, _ := mapped(t, &Spec{Mounts: []Mount{{Source: data, Target: machine + "/var-run/secret"}}})
	for _, path := range []string{machine + "/var-run/secret/x", machine + "/run/secret/x"} {
		if got, _ := m.real(path); got != data+"/x" {
			t.Errorf("%s: got %s", path, got)
		}
	}
}

func TestWholeMachineAsAVolumeIsNotSeenEverywhere(t *testing.T) {
	m, _ := mapped(t, &Spec{Mounts: []Mount{{Source: "/", Target: "/host"}}})
	if got, _ := m.real("/host/etc"); got != "/etc" {
		t.Errorf("got %s", got)
	}
	if got := m.seen("/etc"); got != "/etc" {
		t.Errorf("got %s", got)
	}
}

func TestFilterIsSmallEnoughForTheKernel(t *testing.T) {
	if length := len(filter(1)); length > 4096 {
		t.Errorf("%d instructions", length)
	}
}

func realDir(t *testing.T) string {
	t.Helper()
	dir, err := filepath.EvalSymlinks(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	return dir
}
