package bridge

import (
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/puzpuzpuz/xsync/v4"
)

// What a bridge knows of multicast groups: at which of its ports there are members, by
// what they report (RFC 4541), and which peers have some, by what they tell. Source
// filters (RFC 3376) are not kept: whoever has joined a group gets all that is sent to it.

const (
	// MaxGroupsPerPort bounds the groups that a port has joined, MaxGroups those, but
	// for solicited-node ones, of all ports of an overlay. A port that has joined more
	// is given all multicast.
	MaxGroupsPerPort = 256
	MaxGroups        = 4096
	// maxPeerGroups bounds the groups that SetGroups tells; with more, peers get all.
	maxPeerGroups = 16 * MaxGroups
	// settling is how long a new port is given all solicitations: its host may have
	// joined before the port was there, and answers within a second of the first query.
	settling = 10 * second
)

// UnknownMulticast says what becomes of frames for a group that nobody is known to
// have joined.
type UnknownMulticast uint8

const (
	MulticastFlood UnknownMulticast = iota // as broadcasts
	MulticastDrop                          // but to where routers are, and to peers that do not tell
)

// snoop is what a bridge knows of groups. Workers read it without a lock.
type snoop struct {
	b       *Bridge
	on      bool
	times   times
	unknown atomic.Uint32 // UnknownMulticast
	groups  *xsync.Map[netip.Addr, *group]
	takers  atomic.Pointer[[]*Port] // that get all: a router is there, or it has joined too much
	view    atomic.Pointer[view]
	due     atomic.Int64 // tick at which attend has something to do

	mu      sync.Mutex // serialises changes
	version uint64     // of what peers have told
	seen    atomic.Uint64
	told    map[Peer]struct{} // by key: they tell their groups
	routers map[Peer]struct{} // by key
	all     bool              // peers have told more than maxPeerGroups
	count   int               // groups of the kind joinable that are joined at ports
	// heard is until when others ask, IPv4 and IPv6: somebody behind a port, or behind
	// the tunnel.
	heard, heardAway [2]int64
}

// group is one that is joined somewhere.
type group struct {
	ports atomic.Pointer[[]*Port]
	peers atomic.Pointer[[]Peer] // keys
	fan   atomic.Pointer[fan]

	away int // of the ports, those that are not local; under snoop.mu
}

// portCast is what a port's multicast is about.
type portCast struct {
	takes   atomic.Bool  // among snoop.takers
	router  atomic.Bool  // a multicast router is there
	nodes   atomic.Int32 // solicited-node groups that it has joined
	settled int64        // tick at which it is told of those only

	// Under snoop.mu.
	joined      map[netip.Addr]*membership
	others      int   // of joined, those that are no solicited-node groups
	routerUntil int64 // tick
	overUntil   int64 // tick until which it has joined too much
	startup     int   // queries that are left of its first ones
	next        int64 // tick of the next query
	due         int64 // tick at which attend has to look at it
}

// membership of a port in a group.
type membership struct {
	until int64
	asks  int   // queries that are still to be sent, since somebody has left
	askAt int64 // the next of them
}

// kind of a group.
type kind uint8

const (
	everywhere kind = iota // never pruned, and not kept
	solicited              // RFC 4291, section 2.7.1
	joinable
)

// kindOf says what to do about a group: 224.0.0.0/24 and ff02::1 go everywhere (RFC
// 4541, sections 2.1.2 and 3); scopes 0 and 1 of IPv6 never leave a host that keeps to
// RFC 4291, and are reported by nobody.
func kindOf(g netip.Addr) kind {
	if g.Is4() {
		if b := g.As4(); !g.IsMulticast() || b[0] == 224 && b[1] == 0 && b[2] == 0 {
			return everywhere
		}
		return joinable
	}
	b := g.As16()
	switch scope := b[1] & 0xf; {
	case b[0] != 0xff, scope < 2, g == netip.IPv6LinkLocalAllNodes():
		return everywhere
	case [13]byte(b[:13]) == [13]byte{0: 0xff, 1: 2, 11: 1, 12: 0xff}:
		return solicited
	}
	return joinable
}

func newSnoop(b *Bridge, cfg Config) *snoop {
	s := &snoop{b: b, on: cfg.Snooping, times: timesOf(cfg.QueryInterval), groups: xsync.NewMap[netip.Addr, *group]()}
	s.unknown.Store(uint32(cfg.UnknownMulticast))
	s.takers.Store(&[]*Port{})
	s.due.Store(never)
	return s
}

// SetUnknownMulticast changes Config.UnknownMulticast.
func (b *Bridge) SetUnknownMulticast(u UnknownMulticast) { b.snoop.unknown.Store(uint32(u)) }

// Groups returns the multicast groups that stations at this node's ports have joined
// and that others have to know of (not 224.0.0.0/24, ff02::1, nor solicited-node
// groups), sorted; and whether a multicast router is at one of them, or a port that is
// to get all multicast for having joined too many groups.
func (b *Bridge) Groups() (groups []netip.Addr, router bool) {
	s := b.snoop
	s.mu.Lock()
	defer s.mu.Unlock()
	s.groups.Range(func(a netip.Addr, g *group) bool {
		if g.away > 0 && kindOf(a) == joinable {
			groups = append(groups, a)
		}
		return true
	})
	slices.SortFunc(groups, netip.Addr.Compare)
	return groups, slices.ContainsFunc(*s.takers.Load(), func(p *Port) bool { return !p.local })
}

// SetGroups says which peers have members of which groups, and which have multicast
// routers, which get all of them. What it is given is copied.
func (b *Bridge) SetGroups(members map[netip.Addr][]Peer, routers []Peer) {
	s := b.snoop
	s.mu.Lock()
	defer s.mu.Unlock()
	s.routers = b.keys(routers)
	s.all = len(members) > maxPeerGroups
	s.groups.Range(func(a netip.Addr, g *group) bool {
		if len(members[a]) == 0 && g.peers.Swap(nil) != nil {
			s.tidy(a, g)
		}
		return true
	})
	kept := 0
	for a, peers := range members {
		if len(peers) == 0 || kindOf(a) != joinable {
			continue
		}
		if kept++; kept > maxPeerGroups {
			break // all get all
		}
		list := make([]Peer, len(peers))
		for i, p := range peers {
			list[i] = b.key(p)
		}
		s.group(a).peers.Store(&list)
	}
	s.changed()
}

// SetSnooped says which peers tell their groups. The others get all multicast: older
// nodes, foreign VTEPs, multicast groups of the underlay. What it is given is copied.
func (b *Bridge) SetSnooped(peers []Peer) {
	s := b.snoop
	s.mu.Lock()
	defer s.mu.Unlock()
	s.told = b.keys(peers)
	names := make([]string, len(peers))
	for i, p := range peers {
		names[i] = p.Name
	}
	b.names.Store(&names)
	s.changed()
}

// key is how a peer is told here: by its name in a sealed overlay, by its VTEP in others.
func (b *Bridge) key(p Peer) Peer {
	if b.cfg.Sealed {
		return Peer{Name: p.Name}
	}
	return Peer{VTEP: p.VTEP}
}

func (b *Bridge) keys(peers []Peer) map[Peer]struct{} {
	m := make(map[Peer]struct{}, len(peers))
	for _, p := range peers {
		m[b.key(p)] = struct{}{}
	}
	return m
}

// changed has look see what peers have told. s.mu is held.
func (s *snoop) changed() {
	s.version++
	s.seen.Store(s.version)
}

// group returns the group a, which is made if need be. s.mu is held.
func (s *snoop) group(a netip.Addr) *group {
	g, _ := s.groups.LoadOrCompute(a, func() (*group, bool) { return &group{}, false })
	return g
}

// tidy forgets a group without members. s.mu is held.
func (s *snoop) tidy(a netip.Addr, g *group) {
	if g.ports.Load() == nil && g.peers.Load() == nil {
		s.groups.Delete(a)
	}
}

// members returns the ports that have joined.
func (g *group) members() []*Port {
	if ports := g.ports.Load(); ports != nil {
		return *ports
	}
	return nil
}

// join notes that a station at p is a member of the group a; it reports whether what
// Groups returns has changed.
func (s *snoop) join(p *Port, a netip.Addr, now int64) (changed bool) {
	k := kindOf(a)
	if k == everywhere || p.at.gone.Load() {
		return false
	}
	c := &p.cast
	until := now + s.times.member
	if k == solicited {
		until = now + s.times.idleMember
	}
	if m := c.joined[a]; m != nil {
		*m = membership{until: until}
		return false
	}
	g, known := s.groups.Load(a)
	first := k == joinable && (!known || g.ports.Load() == nil)
	if len(c.joined) >= MaxGroupsPerPort || first && s.count >= MaxGroups {
		s.b.tunnel.drops.add(DropGroupLimit)
		c.overUntil = until
		s.wake(p, until)
		return s.setTakers(now)
	}
	if c.joined == nil {
		c.joined = map[netip.Addr]*membership{}
	}
	c.joined[a] = &membership{until: until}
	s.wake(p, until)
	g = s.group(a)
	ports := append(slices.Clone(g.members()), p)
	g.ports.Store(&ports)
	if k == solicited {
		c.nodes.Add(1)
		return false
	}
	if c.others++; c.others == 1 { // from now on it is asked often
		c.next = min(c.next, now+s.times.query)
		s.wake(p, c.next)
	}
	if first {
		s.count++
	}
	if !p.local {
		g.away++
	}
	return g.away == 1 && !p.local
}

// leave notes that a station at p has left the group a. Others may not have: they are
// asked, and the membership ends if nobody answers (RFC 3376, section 6.4.2).
func (s *snoop) leave(p *Port, a netip.Addr, now int64) {
	m := p.cast.joined[a]
	if m == nil || m.asks > 0 {
		return
	}
	m.asks, m.askAt = lastMemberQueries, now
	m.until = min(m.until, now+lastMemberTime)
	s.wake(p, now)
}

// forget ends the membership of p in the group a; it reports whether what Groups
// returns has changed. s.mu is held.
func (s *snoop) forget(p *Port, a netip.Addr) (changed bool) {
	c := &p.cast
	delete(c.joined, a)
	g := s.group(a)
	if ports := slices.DeleteFunc(slices.Clone(g.members()), func(q *Port) bool { return q == p }); len(ports) > 0 {
		g.ports.Store(&ports)
	} else {
		g.ports.Store(nil)
	}
	if kindOf(a) == solicited {
		c.nodes.Add(-1)
	} else {
		c.others--
		if g.ports.Load() == nil {
			s.count--
		}
		if !p.local {
			g.away--
			changed = g.away == 0
		}
	}
	s.tidy(a, g)
	return changed
}

// setTakers derives who gets all multicast; it reports whether what Groups returns has
// changed. s.mu is held.
func (s *snoop) setTakers(now int64) (changed bool) {
	was := slices.ContainsFunc(*s.takers.Load(), func(p *Port) bool { return !p.local })
	list := []*Port{}
	is := false
	for _, p := range *s.b.ports.Load() {
		c := &p.cast
		c.router.Store(c.routerUntil > now)
		takes := c.routerUntil > now || c.overUntil > now
		c.takes.Store(takes)
		if takes {
			list = append(list, p)
			is = is || !p.local
		}
	}
	s.takers.Store(&list)
	return was != is
}

// routerAt notes that a multicast router is behind p.
func (s *snoop) routerAt(p *Port, now int64) (changed bool) {
	c := &p.cast
	was := c.routerUntil > now
	c.routerUntil = now + s.times.member
	s.wake(p, c.routerUntil)
	return !was && s.setTakers(now)
}

// addPort begins to ask at a new port.
func (s *snoop) addPort(p *Port) {
	now := s.b.tunnel.now()
	s.mu.Lock()
	defer s.mu.Unlock()
	p.cast.settled = now + settling
	p.cast.startup, p.cast.next = startupQueries, now
	s.wake(p, now)
}

// removePort forgets a port, which is not among the bridge's any more.
func (s *snoop) removePort(p *Port) {
	s.mu.Lock()
	changed := false
	for a := range p.cast.joined {
		changed = s.forget(p, a) || changed
	}
	changed = s.setTakers(s.b.tunnel.now()) || changed
	s.mu.Unlock()
	s.ring(changed)
}

// ring calls Config.GroupsChanged. s.mu is not held.
func (s *snoop) ring(changed bool) {
	if changed && s.b.cfg.GroupsChanged != nil {
		s.b.cfg.GroupsChanged()
	}
}

// view is which peers get what, for a flood list and what peers have told.
type view struct {
	flood   *[]*place
	version uint64
	always  []*place        // that get all multicast
	some    map[Peer]*place // by key: that get what they have joined
}

// fan is where a group's frames go, in a view.
type fan struct {
	view  *view
	peers []*place
}

// look returns the view of now.
func (s *snoop) look() *view {
	if v := s.view.Load(); v != nil && v.flood == s.b.flood.Load() && v.version == s.seen.Load() {
		return v
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	v := &view{flood: s.b.flood.Load(), version: s.version, some: map[Peer]*place{}}
	for _, p := range *v.flood {
		key := Peer{VTEP: p.vtep}
		if p.peer != nil {
			key = Peer{Name: p.peer.name}
		}
		_, tells := s.told[key]
		_, router := s.routers[key]
		if p.member && tells && !router && !s.all {
			v.some[key] = p
		} else {
			v.always = append(v.always, p)
		}
	}
	s.view.Store(v)
	return v
}

// away returns the peers with members of the group, but for those that get all.
func (g *group) awayIn(v *view) []*place {
	if f := g.fan.Load(); f != nil && f.view == v {
		return f.peers
	}
	f := &fan{view: v}
	if keys := g.peers.Load(); keys != nil {
		for _, key := range *keys {
			if p := v.some[key]; p != nil && !slices.Contains(f.peers, p) {
				f.peers = append(f.peers, p)
			}
		}
	}
	g.fan.Store(f)
	return f.peers
}

// times of the protocol in ticks (RFC 3376, section 8), derived from its query interval.
type times struct {
	query   int64 // between general queries, where a group is joined
	idle    int64 // … where none is
	startup int64 // between the first ones of a port
	within  int64 // the answers to one come within this
	member  int64 // a membership that is not renewed
	other   int64 // another querier that is not heard
	// idleMember is how long a solicited-node membership lives: those alone are
	// reason to ask seldom.
	idleMember int64
}

const idleFactor = 10

func timesOf(query time.Duration) times {
	if query == 0 {
		query = 125 * time.Second
	}
	q := max(int64(query/tick), 1)
	t := times{query: q, idle: idleFactor * q, startup: max(q/25, 1), within: max(q*2/25, 1)}
	t.member = 2*q + t.within
	t.other = 2*q + t.within/2
	t.idleMember = 2*t.idle + t.within
	return t
}
