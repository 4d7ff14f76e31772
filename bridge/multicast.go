package bridge

import (
	"encoding/binary"
	"net/netip"
	"slices"

	"github.com/tulle-net/tulle/ether"
	"github.com/tulle-net/tulle/tap"
)

// The way of multicast, where it is not that of a broadcast. Frames with a VLAN tag, and
// all that is no IP, are not looked into.

const (
	protoIGMP = 2
	protoPIM  = 103
)

var allPIMRouters = [2]netip.Addr{netip.MustParseAddr("224.0.0.13"), netip.MustParseAddr("ff02::d")}

// groupOf returns the IP group that a frame to a group is for, and whether the packet is
// of a protocol that speaks of groups, or may be. The frame is borrowed; it has a whole
// Ethernet header.
func groupOf(b []byte) (g netip.Addr, control, ok bool) {
	const l3 = ethernetHeader
	switch binary.BigEndian.Uint16(b[12:]) {
	case ether.EtherTypeIPv4:
		if len(b) < l3+20 {
			return g, false, false
		}
		g, control = netip.AddrFrom4([4]byte(b[l3+16:])), b[l3+9] == protoIGMP || b[l3+9] == protoPIM
	case ether.EtherTypeIPv6:
		if len(b) < l3+40 {
			return g, false, false
		}
		// MLD has a hop-by-hop header, with a router alert.
		g, control = netip.AddrFrom16([16]byte(b[l3+24:])), b[l3+6] == 0 || b[l3+6] == protoPIM
	}
	return g, control, g.IsMulticast()
}

// multicast switches a frame to a group from the port p; false: it goes where
// broadcasts go.
func (p *Port) multicast(l *lane, f *tap.Frame, who reach) bool {
	s := p.bridge.snoop
	if !s.on {
		return false
	}
	a, control, ok := groupOf(f.B)
	if !ok {
		return false
	}
	if control {
		switch s.hear(p, f.B, l.now) {
		case forRouters:
			p.toRouters(l, f)
			return true
		case forNobody:
			return true
		}
	}
	switch kindOf(a) {
	case solicited:
		if !p.mayFlood(f, l.now) {
			return true
		}
		g, _ := s.groups.Load(a)
		l.parts[0] = f.B
		for _, other := range *p.bridge.ports.Load() {
			if other != p && other.solicited(g, l.now) {
				other.WriteFrame(f.Meta, l.parts[:])
			}
		}
		p.floodTunnel(l, f, who)
		return true
	case joinable:
		return p.toMembers(l, f, a)
	}
	return false
}

// solicited reports whether a port gets solicitations for a group: it has joined, or it
// is new, or there may be stations that do not say what they join.
func (p *Port) solicited(g *group, now int64) bool {
	c := &p.cast
	return c.nodes.Load() == 0 || now < c.settled || p.hasStrangers() || g != nil && slices.Contains(g.members(), p)
}

// toRouters sends a report on to where multicast routers are, and to peers that may
// have some.
func (p *Port) toRouters(l *lane, f *tap.Frame) {
	s := p.bridge.snoop
	l.parts[0] = f.B
	for _, other := range *s.takers.Load() {
		if other != p && other.cast.router.Load() {
			other.WriteFrame(f.Meta, l.parts[:])
		}
	}
	if !p.local {
		l.encapAll(p.bridge, f, s.look().always, nil)
	}
}

// toMembers sends a frame to the members of the group a and to multicast routers.
// False: nobody is known to have joined, and such frames go where broadcasts go.
func (p *Port) toMembers(l *lane, f *tap.Frame, a netip.Addr) bool {
	s := p.bridge.snoop
	g, known := s.groups.Load(a)
	if !known && UnknownMulticast(s.unknown.Load()) == MulticastFlood {
		return false
	}
	l.parts[0] = f.B
	takers := *s.takers.Load()
	sent := 0
	for _, other := range takers {
		if other != p {
			other.WriteFrame(f.Meta, l.parts[:])
			sent++
		}
	}
	var peers []*place
	if known {
		for _, other := range g.members() {
			if other != p && !slices.Contains(takers, other) {
				other.WriteFrame(f.Meta, l.parts[:])
			}
		}
	}
	if !p.local {
		v := s.look()
		if known {
			peers = g.awayIn(v)
		}
		sent += l.encapAll(p.bridge, f, v.always, peers)
	}
	if !known && sent == 0 {
		p.bridge.tunnel.drops.add(DropUnknownMulticast)
	}
	return true
}

// encapAll sends a frame to the places of two lists, and returns how many they are.
func (l *lane) encapAll(b *Bridge, f *tap.Frame, always, some []*place) int {
	n := len(always) + len(some)
	if n == 0 {
		return 0
	}
	flow := ether.FlowHash(f.B)
	for i, to := range always {
		b.encap(l, to, f, flow, i == n-1)
	}
	for i, to := range some {
		b.encap(l, to, f, flow, len(always)+i == n-1)
	}
	return n
}

// multicast hands a frame to a group, from the tunnel, to the ports that are to have it;
// false: to all of them.
func (in *ingress) multicast(frame []byte, m ether.Meta) bool {
	s := in.b.snoop
	if !s.on {
		return false
	}
	a, control, ok := groupOf(frame)
	if !ok {
		return false
	}
	if control {
		switch s.hear(nil, frame, in.now) {
		case forRouters:
			for _, p := range *s.takers.Load() {
				if !p.local && p.cast.router.Load() {
					in.merge.Add(p, frame, m)
				}
			}
			return true
		case forNobody:
			return true
		}
	}
	g, known := s.groups.Load(a)
	switch kindOf(a) {
	case everywhere:
		return false
	case solicited:
		if _, ok := in.mayFlood(true); !ok {
			return true
		}
		for _, p := range *in.b.ports.Load() {
			if !p.local && p.solicited(g, in.now) {
				in.merge.Add(p, frame, m)
			}
		}
		return true
	}
	if !known && UnknownMulticast(s.unknown.Load()) == MulticastFlood {
		return false
	}
	takers, sent := *s.takers.Load(), 0
	for _, p := range takers {
		if !p.local {
			in.merge.Add(p, frame, m)
			sent++
		}
	}
	if !known {
		if sent == 0 {
			in.t.drops.add(DropUnknownMulticast)
		}
		return true
	}
	for _, p := range g.members() {
		if !p.local && !slices.Contains(takers, p) {
			in.merge.Add(p, frame, m)
		}
	}
	return true
}

// heard says what becomes of a message about groups.
type heard uint8

const (
	forAll     heard = iota // it is none, or is for everybody
	forRouters              // a report: for nobody else, who would not report what others have (RFC 4541, section 2.1.1)
	forNobody               // a query of somebody who asks for itself
)

// hear takes note of a message about groups, from a station at the port p or, where p
// is nil, behind the tunnel. The frame is borrowed.
func (s *snoop) hear(p *Port, b []byte, now int64) heard {
	m, ok := readMessage(b)
	if !ok {
		return forAll
	}
	s.mu.Lock()
	changed := false
	out := forAll
	switch {
	case m.query && m.real:
		until, family := now+s.times.other, 0
		if m.v6 {
			family = 1
		}
		if p == nil {
			s.heardAway[family] = until
			break
		}
		s.heard[family] = until
		changed = s.routerAt(p, now)
	case m.query:
		out = forNobody
	case m.router:
		if p != nil {
			changed = s.routerAt(p, now)
		}
	default:
		out = forRouters
		if p == nil {
			break // its own node asks it
		}
		m.each(func(g netip.Addr, joined bool) {
			if joined {
				changed = s.join(p, g, now) || changed
			} else {
				s.leave(p, g, now)
			}
		})
	}
	s.mu.Unlock()
	s.ring(changed)
	return out
}

// message is what was said about groups.
type message struct {
	query, router bool
	real          bool // a query of a router, and not of a switch
	v6            bool
	each          func(func(group netip.Addr, joined bool)) // reports
}

// readMessage reads IGMP, MLD, and that there is a PIM router (RFC 7761, section 4.9.2:
// its hello); false: it is none of them, or malformed.
func readMessage(b []byte) (message, bool) {
	f := ether.Frame(b)
	if f.EtherType() == ether.EtherTypeIPv4 {
		p, err := ether.ParseIPv4(f.Payload())
		if err != nil {
			return message{}, false
		}
		if p.Proto() == protoPIM {
			return message{router: true}, isHello(p.Payload(), p.Dst())
		}
		m, err := ether.ParseIGMP(p)
		if err != nil {
			return message{}, false
		}
		return message{query: m.IsQuery(), real: !p.Src().IsUnspecified() && f.Src() != querierMAC, each: m.Each}, true
	}
	p, err := ether.ParseIPv6(f.Payload())
	if err != nil {
		return message{}, false
	}
	if p.NextHeader() == protoPIM {
		return message{router: true, v6: true}, isHello(p.Payload(), p.Dst())
	}
	m, err := ether.ParseMLD(p)
	if err != nil {
		return message{}, false
	}
	return message{query: m.IsQuery(), real: f.Src() != querierMAC, v6: true, each: m.Each}, true
}

func isHello(pim []byte, to netip.Addr) bool {
	return len(pim) >= 4 && pim[0] == 0x20 && slices.Contains(allPIMRouters[:], to)
}
