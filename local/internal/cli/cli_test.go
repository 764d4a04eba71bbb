package cli

import (
	"bytes"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"tuneward.dev/local/internal/cri"
)

func TestUpReadsItsOptions(t *testing.T) {
	root := t.TempDir()
	o, err := ParseUp([]string{
		"--data", "d", "--fake-gpus", "3", "--path-prefix", "/a", "--path-prefix=/b", "--image", "x:1=" + root, "--no-fsync",
	})
	if err != nil {
		t.Fatal(err)
	}
	if o.Data != "d" || o.FakeGPUs != 3 || !o.NoFsync || o.Detach || o.Images["x:1"] != root || !slices.Equal(o.PathPrefix, []string{"/a", "/b"}) {
		t.Errorf("%+v", o)
	}
}

func TestUpTakesTheMachinesGPUsUnlessTold(t *testing.T) {
	if o, err := ParseUp([]string{"--data", "d"}); err != nil || o.FakeGPUs >= 0 {
		t.Errorf("%+v, %v", o, err)
	}
}

func TestAWrongOptionIsNamed(t *testing.T) {
	for named, args := range map[string][]string{
		"--data":      {},
		"--fake-gpus": {"--data", "d", "--fake-gpus", "-3"},
		"NAME=DIR":    {"--data", "d", "--image", "x"},
		"--nonsense":  {"--data", "d", "--nonsense"},
		`"extra"`:     {"--data", "d", "extra"},
	} {
		if _, err := ParseUp(args); !errors.Is(err, ErrUsage) || !strings.Contains(err.Error(), named) {
			t.Errorf("%v gives %v", args, err)
		}
	}
}

func TestDetachRunsTheSameCommandInTheForeground(t *testing.T) {
	got := withoutDetach([]string{"up", "--detach", "--data", "d", "--detach=true"})
	if !slices.Equal(got, []string{"up", "--data", "d"}) {
		t.Error(got)
	}
}

func TestTheFirstWayThatWorksIsTaken(t *testing.T) {
	var tried []cri.Way
	way, err := firstWay([]cri.Way{cri.WayRoot, cri.WayUserNS, cri.WayNotify}, func(way cri.Way) error {
		tried = append(tried, way)
		if way == cri.WayUserNS {
			return nil
		}
		return errors.New("refused")
	})
	if err != nil || way != cri.WayUserNS || len(tried) != 2 {
		t.Errorf("%s after %v, %v", way, tried, err)
	}
}

func TestWhereNoWayWorksEachRefusalIsShown(t *testing.T) {
	_, err := firstWay([]cri.Way{cri.WayUserNS, cri.WayNotify}, func(way cri.Way) error { return errors.New(string(way) + " is forbidden") })
	if err == nil || !strings.Contains(err.Error(), "userns is forbidden") || !strings.Contains(err.Error(), "notify is forbidden") {
		t.Error(err)
	}
}

func TestStatusOfNothingIsNotRunning(t *testing.T) {
	data := filepath.Join(t.TempDir(), "none")
	var out bytes.Buffer
	code, err := Status(StatusOptions{Data: data, Output: "json"}, &out)
	if err != nil || code != NotRunning {
		t.Fatalf("%d, %v", code, err)
	}
	var report StatusReport
	if err := json.Unmarshal(out.Bytes(), &report); err != nil || report.Running {
		t.Errorf("%s: %v", out.String(), err)
	}
	if _, err := os.Stat(data); err == nil {
		t.Error("asking made the directory")
	}
}

func TestAReadyFileWithoutItsProcessIsNotRunning(t *testing.T) {
	data := t.TempDir()
	if err := os.WriteFile(filepath.Join(data, "ready"), []byte(`{"pid": 1}`), 0o600); err != nil {
		t.Fatal(err)
	}
	if code, err := Status(StatusOptions{Data: data, Output: "text"}, &bytes.Buffer{}); err != nil || code != NotRunning {
		t.Errorf("%d, %v", code, err)
	}
}
