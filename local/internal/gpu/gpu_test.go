package gpu

import (
	"path/filepath"
	"slices"
	"testing"
)

func assigner(t *testing.T, path string, devices ...string) *Assigner {
	t.Helper()
	a, err := NewAssigner(path, devices, false)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func assign(t *testing.T, a *Assigner, pod string, count int, active ...string) []string {
	t.Helper()
	given, err := a.Assign(pod, "main", count, active)
	if err != nil {
		t.Fatal(err)
	}
	return given
}

func TestNoTwoPodsGetOneDevice(t *testing.T) {
	a := assigner(t, filepath.Join(t.TempDir(), "gpus.json"), "0", "1", "2")
	one := assign(t, a, "one", 2, "one")
	two := assign(t, a, "two", 1, "one", "two")
	if slices.Contains(one, two[0]) {
		t.Errorf("both have %v", two)
	}
	if _, err := a.Assign("three", "main", 1, []string{"one", "two", "three"}); err == nil {
		t.Error("a fourth device was found among three")
	}
}

func TestAContainerKeepsItsDevicesOverRestarts(t *testing.T) {
	path := filepath.Join(t.TempDir(), "gpus.json")
	first := assigner(t, path, "0", "1")
	assign(t, first, "gone", 1, "gone")
	kept := assign(t, first, "stays", 1, "gone", "stays")
	restarted := assigner(t, path, "0", "1")
	if again := assign(t, restarted, "stays", 1, "stays"); !slices.Equal(kept, again) {
		t.Errorf("%v became %v", kept, again)
	}
	if fresh := assign(t, restarted, "new", 1, "stays", "new"); slices.Equal(fresh, kept) {
		t.Errorf("both have %v", fresh)
	}
}

func TestDevicesOfPodsThatAreGoneAreFree(t *testing.T) {
	a := assigner(t, filepath.Join(t.TempDir(), "gpus.json"), "0")
	assign(t, a, "old", 1, "old")
	if given := assign(t, a, "new", 1, "new"); !slices.Equal(given, []string{"0"}) {
		t.Error(given)
	}
}

func TestWithoutGPUsAContainerSeesNone(t *testing.T) {
	a := assigner(t, filepath.Join(t.TempDir(), "gpus.json"), "0")
	if seen, set := a.Environment(nil)["CUDA_VISIBLE_DEVICES"]; !set || seen != "" {
		t.Errorf("%q", seen)
	}
	if seen := a.Environment([]string{"1", "3"})["CUDA_VISIBLE_DEVICES"]; seen != "1,3" {
		t.Errorf("%q", seen)
	}
}

func TestIndexesAreReadFromNvidiaSMI(t *testing.T) {
	if got := parseIndexes("0\n 1\nNo devices were found\n"); !slices.Equal(got, []string{"0", "1"}) {
		t.Error(got)
	}
}
