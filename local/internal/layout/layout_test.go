package layout

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func open(t *testing.T) Dir {
	t.Helper()
	dir, err := Open(filepath.Join(t.TempDir(), "data"))
	if err != nil {
		t.Fatal(err)
	}
	return dir
}

func TestADirectoryIsItsUsersAlone(t *testing.T) {
	info, err := os.Stat(string(open(t)))
	if err != nil || info.Mode().Perm() != 0o700 {
		t.Fatalf("mode %v, %v", info.Mode(), err)
	}
}

func TestTheLockNamesItsHolderAndRefusesASecond(t *testing.T) {
	dir := open(t)
	if holder := dir.LockHolder(); holder != 0 {
		t.Fatalf("a fresh directory is held by %d", holder)
	}
	lock, err := dir.Lock()
	if err != nil {
		t.Fatal(err)
	}
	if holder := dir.LockHolder(); holder != os.Getpid() {
		t.Errorf("holder is %d, not %d", holder, os.Getpid())
	}
	if _, err := dir.Lock(); !errors.Is(err, ErrRunning) {
		t.Errorf("a second lock gave %v", err)
	}
	lock.Close()
	if holder := dir.LockHolder(); holder != 0 {
		t.Errorf("still held by %d", holder)
	}
}

func TestAddressesStayFromStartToStart(t *testing.T) {
	dir := open(t)
	first, err := dir.Addresses()
	if err != nil {
		t.Fatal(err)
	}
	first.Release()
	second, err := dir.Addresses()
	if err != nil {
		t.Fatal(err)
	}
	defer second.Release()
	if first.State != second.State {
		t.Errorf("%+v became %+v", first.State, second.State)
	}
}

func TestAPortThatIsTakenIsReplaced(t *testing.T) {
	dir := open(t)
	first, err := dir.Addresses()
	if err != nil {
		t.Fatal(err)
	}
	first.Release()
	squatter, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", first.APIPort))
	if err != nil {
		t.Fatal(err)
	}
	defer squatter.Close()
	second, err := dir.Addresses()
	if err != nil {
		t.Fatal(err)
	}
	defer second.Release()
	if second.APIPort == first.APIPort || second.KubeletPort != first.KubeletPort {
		t.Errorf("%+v became %+v", first.State, second.State)
	}
}

func TestTwoClustersWithOneSlotGetTwoNetworks(t *testing.T) {
	state := State{Slot: slots - 1}
	first, err := claimNetworks(&state, false)
	if err != nil {
		t.Fatal(err)
	}
	defer first.Close()
	other := state
	second, err := claimNetworks(&other, false)
	if err != nil {
		t.Fatal(err)
	}
	defer second.Close()
	if other.PodCIDR() == state.PodCIDR() || other.ServiceCIDR() == state.ServiceCIDR() {
		t.Errorf("both have %s and %s", state.PodCIDR(), state.ServiceCIDR())
	}
	if _, err := claimNetworks(&state, true); err == nil {
		t.Error("a known cluster took a network that is in use")
	}
}

func TestNetworksOfAllSlotsAreApart(t *testing.T) {
	seen := map[string]bool{}
	for slot := range slots {
		state := State{Slot: slot}
		for _, cidr := range []string{state.PodCIDR(), state.ServiceCIDR()} {
			address, network, err := net.ParseCIDR(cidr)
			if err != nil || !address.IsLoopback() || !network.IP.Equal(address) || seen[cidr] {
				t.Fatalf("slot %d: %s: %v", slot, cidr, err)
			}
			seen[cidr] = true
		}
	}
}

func TestReadyIsReadAsWritten(t *testing.T) {
	dir := open(t)
	want := ReadyInfo{PID: 7, APIURL: "https://127.0.0.1:1", Way: "root", Version: Version}
	if err := dir.WriteReady(want); err != nil {
		t.Fatal(err)
	}
	if got, err := dir.ReadReady(); err != nil || got != want {
		t.Errorf("%+v, %v", got, err)
	}
}

func TestAPathTooLongForTheKubeletsSocketsIsRefused(t *testing.T) {
	if err := Dir("/" + strings.Repeat("x", maxNodePath-1)).CheckNodePath(); err != nil {
		t.Error(err)
	}
	if err := Dir("/" + strings.Repeat("x", maxNodePath)).CheckNodePath(); err == nil {
		t.Error("it is accepted")
	}
}
