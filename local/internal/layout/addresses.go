package layout

import (
	"errors"
	"fmt"
	"hash/fnv"
	"net"
	"os"
	"slices"
)

// slots is how many clusters of one machine can have networks of their own: a slot is a /20 out of
// 127.64.0.0/11 for pods and one out of 127.96.0.0/11 for Services.
const slots = 512

// State is what a cluster keeps from one start to the next.
type State struct {
	Slot        int `json:"slot"`
	APIPort     int `json:"apiPort"`
	KubeletPort int `json:"kubeletPort"`
}

// PodCIDR is the network of the cluster's pods.
func (s State) PodCIDR() string { return s.network(64) + "/20" }

// ServiceCIDR is the network of the cluster's Services.
func (s State) ServiceCIDR() string { return s.network(96) + "/20" }

// ServiceIP is the address of the Service `kubernetes`: the API server takes the network's first.
func (s State) ServiceIP() string {
	ip := net.ParseIP(s.network(96)).To4()
	ip[3] = 1
	return ip.String()
}

func (s State) network(base int) string {
	return fmt.Sprintf("127.%d.%d.0", base+s.Slot/16, s.Slot%16*16)
}

// Addresses is the state of a running cluster, with the claim on its networks.
type Addresses struct {
	State
	claim net.Listener
}

// Release gives the networks back.
func (a *Addresses) Release() { a.claim.Close() }

// Addresses loads the state or makes it, claims its networks and finds free ports for this start.
func (d Dir) Addresses() (*Addresses, error) {
	var state State
	err := readJSON(d.state(), &state)
	known := err == nil
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("%s is not readable (%w); run `tuneward-local down --purge --data %s` and start anew", d.state(), err, d)
	}
	if !known {
		state.Slot = firstSlot(string(d))
	}
	claim, err := claimNetworks(&state, known)
	if err != nil {
		return nil, err
	}
	if state.APIPort, err = freePort(state.APIPort); err != nil {
		return nil, err
	}
	if state.KubeletPort, err = freePort(state.KubeletPort, state.APIPort); err != nil {
		return nil, err
	}
	return &Addresses{State: state, claim: claim}, writeJSON(d.state(), state)
}

// firstSlot spreads clusters by their directory, so that most never meet.
func firstSlot(path string) int {
	hash := fnv.New32a()
	hash.Write([]byte(path))
	return int(hash.Sum32() % slots)
}

// claimNetworks holds a listener on an address of the Service network that no Service gets (the
// network's own, .0), which is how two clusters see each other whoever their users are.
func claimNetworks(state *State, fixed bool) (net.Listener, error) {
	for range slots {
		claim, err := net.Listen("tcp", net.JoinHostPort(state.network(96), "19096"))
		if err == nil {
			return claim, nil
		}
		if fixed {
			return nil, fmt.Errorf("another cluster uses this one's Service network %s (%w); stop it, or start this one in a new directory", state.ServiceCIDR(), err)
		}
		state.Slot = (state.Slot + 1) % slots
	}
	return nil, errors.New("no loopback network in 127.96.0.0/11 is free; stop a cluster with `tuneward-local down`")
}

// freePort returns the wanted port when nothing listens there, else one the kernel chooses.
func freePort(wanted int, taken ...int) (int, error) {
	for _, port := range []int{wanted, 0, 0} {
		listener, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", port))
		if err != nil {
			continue
		}
		got := listener.Addr().(*net.TCPAddr).Port
		listener.Close()
		if !slices.Contains(taken, got) {
			return got, nil
		}
	}
	return 0, errors.New("no free TCP port on 127.0.0.1")
}
