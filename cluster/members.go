package cluster

import (
	"context"
	"encoding/json"
	"net/netip"
	"slices"
	"time"

	"github.com/tulle-net/tulle/crypto"
	"github.com/tulle-net/tulle/keeper"
	"github.com/tulle-net/tulle/peer"
)

const (
	// maxRemembered members are kept over a restart, the keepers first.
	maxRemembered = 256
	// findPatience is how long Find waits for a keeper where other nodes are
	// known, who may be there though it is away.
	findPatience = 500 * time.Millisecond
)

// SetMembers says who is there, without this node. What is worth it is kept for
// the next start: see Save.
func (p *Place) SetMembers(list []Member) {
	next := make(map[string]Member, len(list))
	addrs := make(map[netip.Addr]struct{}, len(list))
	for _, m := range list {
		next[m.Name] = m
		if m.Alive {
			addrs[m.VTEP.Addr()] = struct{}{}
		}
	}
	p.addrs.Store(&addrs)
	p.membersMu.Lock()
	before := p.members
	p.members = next
	p.membersMu.Unlock()
	for name, m := range next {
		if old, ok := before[name]; ok && m.Alive && old.VTEP.Addr() != m.VTEP.Addr() && p.e != nil {
			p.e.Moved(name, m.VTEP.Addr())
		}
	}
}

// SetSeeds says at which data addresses a keeper may be that is not where it was.
func (p *Place) SetSeeds(seeds []netip.AddrPort) {
	p.membersMu.Lock()
	defer p.membersMu.Unlock()
	p.seeds = slices.Clone(seeds)
}

// loadMembers takes what an earlier run remembered; damage costs no more than that.
func (p *Place) loadMembers() {
	var list []peer.Member
	if json.Unmarshal(p.state.Files[fileMembers], &list) == nil {
		p.learn(list)
	}
}

// learn adds members that a keeper told of, the keepers first: they are the last
// to be forgotten where there are too many.
func (p *Place) learn(list []peer.Member) {
	p.membersMu.Lock()
	defer p.membersMu.Unlock()
	for _, m := range slices.Backward(list) {
		if m.Name == p.cfg.Name || !m.VTEP.IsValid() {
			continue
		}
		p.remembered = slices.DeleteFunc(p.remembered, func(o peer.Member) bool { return o.Name == m.Name })
		p.remembered = append(p.remembered, m)
	}
	if extra := len(p.remembered) - 2*maxRemembered; extra > 0 {
		p.remembered = slices.Delete(p.remembered, 0, extra)
	}
}

// known returns whom this node knows, who is there first, then the keepers.
func (p *Place) known() []peer.Member {
	p.membersMu.Lock()
	defer p.membersMu.Unlock()
	var list []peer.Member
	for _, m := range p.members {
		if m.Alive {
			list = append(list, m.Member)
		}
	}
	rank := func(m peer.Member) int {
		n := 0
		if !p.members[m.Name].Alive {
			n += 2
		}
		if !m.Keeper {
			n++
		}
		return n
	}
	for _, m := range p.members {
		if !m.Alive {
			list = append(list, m.Member)
		}
	}
	for _, m := range p.remembered {
		if _, listed := p.members[m.Name]; !listed {
			list = append(list, m)
		}
	}
	slices.SortFunc(list, func(a, b peer.Member) int {
		if d := rank(a) - rank(b); d != 0 {
			return d
		}
		if a.Name < b.Name {
			return -1
		}
		return 1
	})
	return list
}

// save keeps members in the state, if they are others than before.
func (p *Place) save() error {
	list := p.known()
	keeper.KeepersFirst(list)
	list = list[:min(len(list), maxRemembered)]
	if len(list) == 0 {
		return nil // a node that knows nobody keeps what it remembers
	}
	b, err := json.Marshal(list)
	if err != nil {
		return err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.state == nil || slices.Equal(b, p.state.Files[fileMembers]) {
		return nil
	}
	return p.updateLocked(func(s *crypto.State) error { s.Files[fileMembers] = b; return nil })
}

// Resolve returns where a node may be, best first. Who answers there has to prove
// that it is the node.
func (p *Place) Resolve(name string) []netip.AddrPort {
	p.membersMu.Lock()
	defer p.membersMu.Unlock()
	var out []netip.AddrPort
	m, ok := p.members[name]
	isKeeper := m.Keeper
	if ok {
		out = append(out, m.VTEP)
		if m.Alive {
			return out // where it was before, it is not
		}
	}
	for _, m := range p.remembered {
		if m.Name != name {
			continue
		}
		isKeeper = isKeeper || m.Keeper
		if !slices.Contains(out, m.VTEP) {
			out = append(out, m.VTEP)
		}
	}
	if isKeeper {
		for _, a := range p.seeds {
			if !slices.Contains(out, a) {
				out = append(out, a)
			}
		}
	}
	return out
}

// Met takes a keeper that answered where another node was expected: it took its
// place, with a name of its own.
func (p *Place) Met(m peer.Member) {
	p.membersMu.Lock()
	_, is := p.members[m.Name]
	p.membersMu.Unlock()
	if !is { // gossip knows better
		p.learn([]peer.Member{m})
	}
}

// Addrs returns where members may be, best first: for the way to them.
func (p *Place) Addrs() []netip.AddrPort {
	var out []netip.AddrPort
	for _, m := range p.known() {
		if m.VTEP.IsValid() {
			out = append(out, m.VTEP)
		}
	}
	return out
}

// Keepers returns the names of the other keepers, those that are there first: who
// shows it in gossip, or was one when a keeper last told.
func (p *Place) Keepers() []string {
	told := map[string]bool{}
	p.membersMu.Lock()
	for _, m := range p.remembered {
		told[m.Name] = m.Keeper
	}
	p.membersMu.Unlock()
	var names []string
	for _, m := range p.known() {
		if m.Keeper || told[m.Name] {
			names = append(names, m.Name)
		}
	}
	return names
}

// otherKeeper reports whether gossip shows another keeper to be there.
func (p *Place) otherKeeper() bool {
	p.membersMu.Lock()
	defer p.membersMu.Unlock()
	for _, m := range p.members {
		if m.Keeper && m.Alive {
			return true
		}
	}
	return false
}

// Known reports whether an address is one of a member that is there.
func (p *Place) Known(a netip.Addr) bool {
	addrs := p.addrs.Load()
	if addrs == nil {
		return false
	}
	_, ok := (*addrs)[a]
	return ok
}

// Find returns gossip addresses of members: those that a keeper tells, and those
// that this node remembers.
func (p *Place) Find(ctx context.Context) []netip.AddrPort {
	ask, cancel := ctx, context.CancelFunc(func() {})
	if p.knowsNode() {
		ask, cancel = context.WithTimeout(ctx, findPatience)
	}
	err := p.Refresh(ask)
	cancel()
	if err != nil {
		p.cfg.Log.Debug("no keeper tells who is there", "err", err)
	}
	var out []netip.AddrPort
	for _, m := range p.known() {
		if m.Gossip.IsValid() && !slices.Contains(out, m.Gossip) {
			out = append(out, m.Gossip)
		}
	}
	return out[:min(len(out), maxRemembered)]
}

// knowsNode reports whether a node that is no keeper is known: where the keepers
// are away, it may tell who is there.
func (p *Place) knowsNode() bool {
	return slices.ContainsFunc(p.known(), func(m peer.Member) bool { return !m.Keeper && m.Gossip.IsValid() })
}
