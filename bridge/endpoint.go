package bridge

import (
	"net/netip"
	"slices"
	"sync/atomic"

	"github.com/puzpuzpuz/xsync/v4"

	"github.com/tulle-net/tulle/ether"
)

// What the overlay's tables say: certain entries of the FDB, and whose an address is.

// maxFormer bounds the addresses whose last MAC is remembered when nobody has them.
const maxFormer = 4096

// Endpoint is what the overlay's tables say of a MAC: whose it is, and which addresses it answers for.
type Endpoint struct {
	MAC  ether.MAC
	IPs  []netip.Addr
	Peer string         // the node's name; empty: this node
	VTEP netip.AddrPort // the node's; not looked at in sealed overlays, where Peer says who
}

// whom tells peers apart: by name in sealed overlays, by address in plain ones.
type whom struct {
	name string
	at   netip.Addr
}

// whom returns of whom the peer of that name and VTEP is the place in this overlay.
func (b *Bridge) whom(name string, vtep netip.AddrPort) whom {
	if b.cfg.Sealed {
		return whom{name: name}
	}
	return whom{at: vtep.Addr().Unmap()}
}

// directory is what SetEndpoint and SetComplete said. Bridge.mu guards all but index
// and certain.
type directory struct {
	endpoints map[ether.MAC]*Endpoint
	at        map[whom]map[ether.MAC]*Endpoint // those of peers
	complete  map[whom]string                  // whose tables name all that they have, and their names
	flood     bool                             // unknown unicast goes to all
	// claims are the endpoints whose place is there, by address; of several the last has it.
	claims map[netip.Addr][]*Endpoint
	// former is the MAC that had an address which nobody has now.
	former map[netip.Addr]ether.MAC
	// index is who has an address, for the workers; certain: unknown unicast has somewhere
	// not to go.
	index   *xsync.Map[netip.Addr, *claimant]
	certain atomic.Bool
}

// claimant is who has an address.
type claimant struct {
	mac   ether.MAC
	local bool         // of this node
	asked atomic.Int64 // tick until which another node's station may look for duplicates of it
}

func newDirectory(flood bool) directory {
	return directory{
		endpoints: map[ether.MAC]*Endpoint{}, at: map[whom]map[ether.MAC]*Endpoint{}, complete: map[whom]string{}, flood: flood,
		claims: map[netip.Addr][]*Endpoint{}, former: map[netip.Addr]ether.MAC{},
		index: xsync.NewMap[netip.Addr, *claimant](),
	}
}

// SetEndpoint adds e, or replaces what was said of its MAC. One of a peer is in the FDB
// and has its addresses as soon as the peer is there (SetPeers, SetMembers), and as long.
// It neither ages nor moves: frames from its MAC that come from elsewhere are dropped.
// Of endpoints that have one address the last that got it has it; where that changes the
// address's MAC, the local ports are told.
func (b *Bridge) SetEndpoint(e Endpoint) {
	if !e.MAC.IsValid() {
		return
	}
	next := &Endpoint{MAC: e.MAC, IPs: make([]netip.Addr, 0, len(e.IPs)), Peer: e.Peer, VTEP: e.VTEP}
	for _, a := range e.IPs {
		if a = a.Unmap().WithZone(""); a.IsValid() && !slices.Contains(next.IPs, a) {
			next.IPs = append(next.IPs, a)
		}
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.closed {
		return
	}
	b.replaceEndpoint(b.dir.endpoints[e.MAC], next)
}

// RemoveEndpoint takes back what SetEndpoint said of a MAC.
func (b *Bridge) RemoveEndpoint(mac ether.MAC) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if e := b.dir.endpoints[mac]; e != nil {
		b.replaceEndpoint(e, nil)
	}
}

// replaceEndpoint has next stand for old, of the same MAC; either may be nil. b.mu is held.
func (b *Bridge) replaceEndpoint(old, next *Endpoint) {
	d := &b.dir
	if old != nil && old.Peer != "" {
		if w := b.whom(old.Peer, old.VTEP); next == nil || next.Peer == "" || b.whom(next.Peer, next.VTEP) != w {
			if delete(d.at[w], old.MAC); len(d.at[w]) == 0 {
				delete(d.at, w)
			}
		}
	}
	if next == nil {
		delete(d.endpoints, old.MAC)
		b.fdb.setOwn(old.MAC, false)
		b.fdb.removeOne(old.MAC, func(e *entry) bool { return e.table != nil })
		b.reclaim(old, nil)
		return
	}
	d.endpoints[next.MAC] = next
	b.fdb.setOwn(next.MAC, next.Peer == "")
	if next.Peer == "" {
		b.fdb.removeOne(next.MAC, func(e *entry) bool { return e.table != nil })
		b.reclaim(old, next)
		return
	}
	w := b.whom(next.Peer, next.VTEP)
	if d.at[w] == nil {
		d.at[w] = map[ether.MAC]*Endpoint{}
	}
	d.at[w][next.MAC] = next
	p := b.placeOf(w)
	if p == nil { // it waits for its place
		b.fdb.removeOne(next.MAC, func(e *entry) bool { return e.table != nil })
		b.reclaim(old, nil)
		return
	}
	b.fdb.claim(next.MAC, p, next)
	b.reclaim(old, next)
}

// placeOf returns the place of a peer, or nil. One that only plaintext has taught is
// none. b.mu is held.
func (b *Bridge) placeOf(w whom) *place {
	if b.cfg.Sealed {
		p, _ := b.peers.Load(w.name)
		return p
	}
	if p, _ := b.remotes.Load(w.at); p != nil && (p.member || p.listed) {
		return p
	}
	return nil
}

// reclaim has next stand for old where addresses are concerned; either may be nil. b.mu is held.
func (b *Bridge) reclaim(old, next *Endpoint) {
	d := &b.dir
	var ips []netip.Addr
	if old != nil {
		ips = slices.Clone(old.IPs)
	}
	if next != nil {
		for _, a := range next.IPs {
			if !slices.Contains(ips, a) {
				ips = append(ips, a)
			}
		}
	}
	for _, a := range ips {
		list := d.claims[a]
		at := slices.IndexFunc(list, func(e *Endpoint) bool { return e == old || e == next })
		has := next != nil && slices.Contains(next.IPs, a)
		switch {
		case at >= 0 && has:
			list[at] = next
		case at >= 0:
			list = slices.Delete(list, at, at+1)
		case has:
			list = append(list, next)
		}
		if d.claims[a] = list; len(list) == 0 {
			delete(d.claims, a)
		}
		b.decide(a)
	}
}

// decide says who has an address now, to the workers, and to the local ports if another
// MAC had it. b.mu is held.
func (b *Bridge) decide(a netip.Addr) {
	d := &b.dir
	was := ether.MAC(0)
	old, _ := d.index.Load(a)
	if old != nil {
		was = old.mac
	} else {
		was = d.former[a]
	}
	list := d.claims[a]
	if len(list) == 0 {
		d.index.Delete(a)
		if was != 0 {
			if len(d.former) >= maxFormer {
				clear(d.former) // who cached one of them finds out by asking again
			}
			d.former[a] = was
		}
		return
	}
	delete(d.former, a)
	e := list[len(list)-1]
	c := &claimant{mac: e.MAC, local: e.Peer == ""}
	if old != nil && old.mac == c.mac && old.local == c.local {
		return
	}
	d.index.Store(a, c)
	if was != 0 && was != c.mac {
		b.correct(a, c.mac)
	}
}

// correct tells the local ports but the MAC's own that an address is that MAC's (RFC
// 5227, section 3; RFC 4861, section 7.2.6).
func (b *Bridge) correct(a netip.Addr, mac ether.MAC) {
	var parts [1][]byte
	if a.Is4() {
		parts[0] = ether.AppendARP(nil, ether.Broadcast, ether.ARPRequest, mac, a, 0, a)
	} else {
		parts[0] = ether.AppendAdvertisement(nil, 0, mac, netip.Addr{}, a)
	}
	at := b.fdb.lookup(mac)
	for _, p := range *b.ports.Load() {
		if p.at != at {
			p.WriteFrame(ether.Meta{}, parts[:])
		}
	}
}

// arrived gives a place that is new what waits for it. b.mu is held.
func (b *Bridge) arrived(w whom, p *place) {
	if !b.cfg.Sealed && !p.member && !p.listed {
		return
	}
	_, complete := b.dir.complete[w]
	p.complete.Store(complete)
	for mac, e := range b.dir.at[w] {
		b.fdb.claim(mac, p, e)
		b.reclaim(nil, e)
	}
}

// departed has the endpoints of a place that is gone wait for it. b.mu is held.
func (b *Bridge) departed(w whom) {
	for _, e := range b.dir.at[w] {
		b.reclaim(e, nil)
	}
}

// unpinned has a MAC that is no port's any more where the tables say. b.mu is held.
func (b *Bridge) unpinned(mac ether.MAC) {
	if e := b.dir.endpoints[mac]; e != nil && e.Peer != "" {
		if p := b.placeOf(b.whom(e.Peer, e.VTEP)); p != nil {
			b.fdb.claim(mac, p, e)
		}
	}
}

// SetComplete says which peers' tables name every station that they have: unknown unicast
// is not sent to them, nor what a station tells of an address that the tables say is its
// own. When there are any, unknown unicast is for those local ports alone that have
// strangers. Peers are told apart by name in sealed overlays, by VTEP in plain ones.
func (b *Bridge) SetComplete(peers []Peer) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.dir.complete = make(map[whom]string, len(peers))
	for _, p := range peers {
		b.dir.complete[b.whom(p.Name, p.VTEP)] = p.Name
	}
	b.remotes.Range(func(_ netip.Addr, p *place) bool {
		_, complete := b.dir.complete[whom{at: p.vtep.Addr()}]
		p.complete.Store(complete && (p.member || p.listed))
		return true
	})
	b.peers.Range(func(name string, p *place) bool {
		_, complete := b.dir.complete[whom{name: name}]
		p.complete.Store(complete)
		return true
	})
	b.dir.certain.Store(len(peers) > 0 && !b.dir.flood)
}

// SetUnknownUnicast changes Config.UnknownUnicast.
func (b *Bridge) SetUnknownUnicast(flood bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.dir.flood = flood
	b.dir.certain.Store(len(b.dir.complete) > 0 && !flood)
}

// Strangers returns how many MACs of the FDB were learnt at local ports and are neither
// their devices' own nor an Endpoint of this node.
func (b *Bridge) Strangers() int { return int(b.fdb.strangers.Load()) }

// contradicted tells the owner that the place p sent what the tables say is elsewhere: a
// station has moved, or somebody pretends to be it.
func (b *Bridge) contradicted(p *place, now int64) {
	if b.cfg.Contradicted == nil {
		return
	}
	if next := p.contradicts.Load(); now >= next && p.contradicts.CompareAndSwap(next, now+second) {
		b.cfg.Contradicted(b.nameOf(p))
	}
}

// nameOf returns the name of a remote place's node, or its VTEP where nobody told the name.
func (b *Bridge) nameOf(p *place) string {
	if p.peer != nil {
		return p.peer.name
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	w := b.whom("", p.vtep)
	for _, e := range b.dir.at[w] {
		return e.Peer
	}
	if name := b.dir.complete[w]; name != "" {
		return name
	}
	return p.vtep.String()
}
