package shim

import (
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"strings"
	"syscall"
	"testing"
	"time"
)

func TestStatLineIsReadPastAnyCommandName(t *testing.T) {
	line := "42 (a) b (c) S 1 " + strings.Repeat("0 ", 17) + "777 0"
	state, start, err := parseStat(line)
	if state != "S" || start != 777 || err != nil {
		t.Errorf("got %q, %d, %v", state, start, err)
	}
	for _, broken := range []string{"", "42 (a", "42 (a) S 1"} {
		if _, _, err := parseStat(broken); err == nil {
			t.Errorf("%q was read", broken)
		}
	}
}

func TestProcessIsItselfOnlyWithItsStartTime(t *testing.T) {
	self, err := Identify(os.Getpid())
	if err != nil || !self.Alive() {
		t.Fatalf("%v, %v", self, err)
	}
	for name, other := range map[string]Process{
		"another start": {PID: self.PID, Start: self.Start + 1, Boot: self.Boot},
		"another boot":  {PID: self.PID, Start: self.Start, Boot: "x"},
		"none":          {},
	} {
		if other.Alive() {
			t.Errorf("%s passes for us", name)
		}
		if err := other.Signal(syscall.SIGKILL); err != ErrGone {
			t.Errorf("%s: got %v", name, err)
		}
	}
}

func TestWaitReturnsWhenAProcessEndsEvenUncollected(t *testing.T) {
	command := exec.Command("sleep", "0.05")
	if err := command.Start(); err != nil {
		t.Fatal(err)
	}
	process, err := Identify(command.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	process.Wait()
	if process.Alive() {
		t.Error("a zombie counts as alive")
	}
	if err := command.Wait(); err != nil {
		t.Error(err)
	}
}

func TestLogLinesAreCutAndTagged(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	log, err := openLog(path)
	if err != nil {
		t.Fatal(err)
	}
	log.now = func() time.Time { return time.Date(2026, 1, 2, 3, 4, 5, 6, time.FixedZone("x", 3600)) }
	long := strings.Repeat("x", maxLogLine)
	log.copyFrom("stdout", strings.NewReader("a\n\n"+long+"yz\nend"))
	got, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var want strings.Builder
	for _, line := range []string{"F a", "F ", "P " + long, "F yz", "P end"} {
		want.WriteString("2026-01-02T02:04:05.000000006Z stdout " + line + "\n")
	}
	if string(got) != want.String() {
		t.Errorf("got %d bytes, want %d:\n%.300q", len(got), want.Len(), got)
	}
}

func TestPathsAreResolvedAsFarAsTheyExist(t *testing.T) {
	dir, err := filepath.EvalSymlinks(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	for _, err := range []error{
		os.MkdirAll(filepath.Join(dir, "real/inner"), 0o755),
		os.WriteFile(filepath.Join(dir, "file"), nil, 0o600),
		os.Symlink(filepath.Join(dir, "real"), filepath.Join(dir, "absolute")),
		os.Symlink("../"+filepath.Base(dir)+"/real", filepath.Join(dir, "relative")),
		os.Symlink("absent/deep", filepath.Join(dir, "dangling")),
		os.Symlink("loop", filepath.Join(dir, "loop")),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	for path, want := range map[string]struct {
		base    string
		missing []string
	}{
		"real/inner":       {"real/inner", nil},
		"absolute/inner":   {"real/inner", nil},
		"relative/new/x":   {"real", []string{"new", "x"}},
		"dangling/more":    {"", []string{"absent", "deep", "more"}},
		"real/../file":     {"file", nil},
		"nothing/at/../it": {"", []string{"nothing", "it"}},
	} {
		base, missing, err := resolve(dir + "/" + path)
		if base != filepath.Join(dir, want.base) || len(missing) != len(want.missing) ||
			len(missing) > 0 && !reflect.DeepEqual(missing, want.missing) || err != nil {
			t.Errorf("%s: got %s, %q, %v", path, base, missing, err)
		}
	}
	for _, path := range []string{"loop/x", "file/below"} {
		if base, missing, err := resolve(filepath.Join(dir, path)); err == nil {
			t.Errorf("%s: got %s, %q", path, base, missing)
		}
	}
}

func TestMountsAreOpenedParentsFirst(t *testing.T) {
	source := t.TempDir()
	targets := []string{"/data/sub/x", "/", "/data", "/etc/hosts", "/data/sub"}
	var depths []int
	for _, target := range targets {
		depths = append(depths, depth(target))
	}
	if want := []int{3, 0, 1, 2, 2}; !reflect.DeepEqual(depths, want) {
		t.Errorf("got %v, want %v", depths, want)
	}
	_, err := openVolumes([]Mount{{Source: filepath.Join(source, "absent"), Target: "/data"}})
	if err == nil || !strings.Contains(err.Error(), "volume for /data") {
		t.Errorf("got %v", err)
	}
}

func TestBelowIsByComponent(t *testing.T) {
	for pair, want := range map[[2]string]bool{
		{"/a/b", "/a"}: true, {"/a", "/a"}: true, {"/ab", "/a"}: false, {"/a", "/"}: true, {"/", "/a"}: false,
	} {
		if got := below(pair[0], pair[1]); got != want {
			t.Errorf("%v: got %v", pair, got)
		}
	}
}

func TestCallerStandsForThePodsUser(t *testing.T) {
	uids, gids := mappings(&User{UID: 65532, GID: 9, Groups: []uint32{9, 10, 100}}, 1000, 100)
	wantUIDs := []syscall.SysProcIDMap{{ContainerID: 65532, HostID: 1000, Size: 1}}
	wantGIDs := []syscall.SysProcIDMap{{ContainerID: 9, HostID: 100, Size: 1}, {ContainerID: 10, HostID: 10, Size: 1}}
	if !reflect.DeepEqual(uids, wantUIDs) || !reflect.DeepEqual(gids, wantGIDs) {
		t.Errorf("got %v, %v", uids, gids)
	}
}

func TestCommandIsLookedUpAlongTheContainersPath(t *testing.T) {
	env := []string{"PATH=/no", "A=b", "PATH=relative:/x:/y"}
	for name, want := range map[string][]string{
		"sh":      {"/x/sh", "/y/sh"},
		"/bin/sh": {"/bin/sh"},
		"./sh":    {"/work/sh"},
	} {
		if got := candidates(name, env, "/work"); !reflect.DeepEqual(got, want) {
			t.Errorf("%s: got %q, want %q", name, got, want)
		}
	}
}

func TestRecordsAreReplacedWhole(t *testing.T) {
	path := filepath.Join(t.TempDir(), "record")
	for code := range int32(2) {
		if err := WriteJSON(path, Exit{Code: code}); err != nil {
			t.Fatal(err)
		}
	}
	var exit Exit
	if err := ReadJSON(path, &exit); err != nil || exit.Code != 1 {
		t.Errorf("got %v, %v", exit, err)
	}
	entries, err := os.ReadDir(filepath.Dir(path))
	if err != nil || len(entries) != 1 {
		t.Errorf("left behind: %v, %v", entries, err)
	}
}
