package cri

import (
	"errors"
	"fmt"
	"net/netip"
	"sync"
)

// addressPool hands out pod addresses. They lie in 127/8, where every address may be bound and reached
// without configuring anything, by anybody.
type addressPool struct {
	mu     sync.Mutex
	prefix netip.Prefix
	last   netip.Addr
	used   map[netip.Addr]bool
}

func newAddressPool(cidr string) (*addressPool, error) {
	prefix, err := netip.ParsePrefix(cidr)
	if err != nil {
		return nil, fmt.Errorf("pod network: %w", err)
	}
	prefix = prefix.Masked()
	return &addressPool{prefix: prefix, last: prefix.Addr(), used: map[netip.Addr]bool{}}, nil
}

func (p *addressPool) reserve(address string) {
	if a, err := netip.ParseAddr(address); err == nil {
		p.mu.Lock()
		defer p.mu.Unlock()
		p.used[a] = true
	}
}

func (p *addressPool) release(address string) {
	if a, err := netip.ParseAddr(address); err == nil {
		p.mu.Lock()
		defer p.mu.Unlock()
		delete(p.used, a)
	}
}

// take goes round the whole network before it gives an address again: clients of a pod that is gone must
// not reach the next one.
func (p *addressPool) take() (string, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	first := p.last
	for {
		p.last = p.last.Next()
		if !p.prefix.Contains(p.last) {
			p.last = p.prefix.Addr().Next()
		}
		if !p.used[p.last] && usable(p.last) {
			p.used[p.last] = true
			return p.last.String(), nil
		}
		if p.last == first {
			return "", errors.New("no pod address is left in " + p.prefix.String())
		}
	}
}

// usable leaves .0 and .255 out, which people and some programs take for networks and broadcasts.
func usable(address netip.Addr) bool {
	bytes := address.As4()
	return bytes[3] != 0 && bytes[3] != 255
}
