package bridge

import (
	"encoding/binary"
	"net/netip"

	"github.com/puzpuzpuz/xsync/v4"

	"github.com/tulle-net/tulle/ether"
	"github.com/tulle-net/tulle/tap"
)

// What stations ask and tell each other of their addresses is answered here, from what
// the tables say, where that is possible (RFC 9161, section 3).

// Of questions and news that the tables do not know, a port floods so many a second, and
// so many at once.
const (
	neighboursPerSecond = 50
	neighbourBurst      = 100
)

// askedFor is how long, in ticks, the owner of an address may defend it in the tunnel.
const askedFor = 3 * second

// reach is who gets a frame that is flooded.
type reach uint8

const (
	everyone reach = iota
	// untold: every local port, and whom the tables do not tell the same: foreign VTEPs,
	// groups, peers that are not complete.
	untold
	// strangers: who may have a station that no table names.
	strangers
	nobody
)

// toGroup switches a frame to a group: what is about addresses is answered where that is
// possible, multicast goes to members, and the rest to everybody, within the bounds on that.
func (p *Port) toGroup(l *lane, f *tap.Frame) {
	who := p.neighbour(l, f)
	if who == nobody || p.multicast(l, f, who) || !p.mayFlood(f, l.now) {
		return
	}
	p.floodFrame(l, f, who)
}

// unknownUnicast says who gets a frame whose destination has no place.
func (p *Port) unknownUnicast() reach {
	if p.bridge.dir.certain.Load() {
		return strangers
	}
	return everyone
}

// neighbour says who gets a group-addressed frame, which may be about addresses. What
// has a VLAN tag, is malformed, or something else, everyone gets.
func (p *Port) neighbour(l *lane, f *tap.Frame) reach {
	if f.Meta != (ether.Meta{}) {
		return everyone
	}
	switch binary.BigEndian.Uint16(f.B[12:]) {
	case ether.EtherTypeARP:
		return p.arp(l, f.B)
	case ether.EtherTypeIPv6:
		return p.nd(l, f.B)
	}
	return everyone
}

func (p *Port) arp(l *lane, frame []byte) reach {
	a, err := ether.ParseARP(frame[ethernetHeader:])
	if err != nil {
		return everyone
	}
	p.heardOf(a.SenderIP(), a.SenderMAC(), l.now)
	switch ip, mac, target := a.SenderIP(), a.SenderMAC(), a.TargetIP(); {
	case a.Op() == ether.ARPRequest && ip != target:
		// A question, or with 0.0.0.0 a probe (RFC 5227, section 2.1.1).
		c, to := p.asked(l, target, mac)
		if c != nil {
			l.answer = ether.AppendARP(l.answer[:0], ether.MACFrom(frame[6:]), ether.ARPReply, c.mac, target, mac, ip)
			p.answer(l)
		}
		return to
	case a.Op() == ether.ARPRequest, a.Op() == ether.ARPReply:
		return p.told(l, ip, mac)
	}
	return everyone
}

func (p *Port) nd(l *lane, frame []byte) reach {
	ip, n := parseND(frame)
	if n == nil {
		return everyone
	}
	src, target := ether.MACFrom(frame[6:]), n.Target()
	link, ok := n.LinkLayer()
	if !ok {
		link = src
	}
	if n.IsAdvertisement() {
		p.heardOf(target, link, l.now)
		return p.told(l, target, link)
	}
	p.heardOf(ip.Src(), link, l.now)
	c, to := p.asked(l, target, link)
	if c != nil {
		asker := ip.Src()
		if asker.IsUnspecified() {
			asker = netip.Addr{} // who looks for duplicates is told with all (RFC 4861, section 7.2.4)
		}
		l.answer = ether.AppendAdvertisement(l.answer[:0], link, c.mac, asker, target)
		p.answer(l)
	}
	return to
}

// parseND returns the neighbour discovery message of a frame of EtherTypeIPv6, or nil.
func parseND(frame []byte) (ether.IPv6, ether.ND) {
	const nextHeader = ethernetHeader + 6
	if len(frame) <= nextHeader || frame[nextHeader] != ether.ProtoICMPv6 {
		return nil, nil
	}
	ip, err := ether.ParseIPv6(frame[ethernetHeader:])
	if err != nil {
		return nil, nil
	}
	n, err := ether.ParseND(ip)
	if err != nil {
		return nil, nil
	}
	return ip, n
}

// asked returns who has the address that a station with this MAC asks for, if it is to
// be answered, else who is to hear the question.
func (p *Port) asked(l *lane, target netip.Addr, mac ether.MAC) (*claimant, reach) {
	c, ok := p.bridge.dir.index.Load(target)
	switch {
	case !ok:
		return nil, p.unanswered(l)
	case c.mac == mac: // it looks whether somebody else has its address, too
		return nil, untold
	case p.local && !c.local: // out of its reach: who is told where it is sends in vain
		return nil, p.unanswered(l)
	}
	return c, nobody
}

// told says who is to hear that an address is that MAC's.
func (p *Port) told(l *lane, ip netip.Addr, mac ether.MAC) reach {
	c, ok := p.bridge.dir.index.Load(ip)
	switch {
	case !ok:
		return p.unanswered(l)
	case c.asked.Load() > l.now: // somebody defends the address against who looks for duplicates
		return everyone
	case c.mac != mac:
		p.bridge.tunnel.drops.add(DropSpoofedNeighbour)
		return nobody
	}
	return untold
}

// heardOf notes where a station here says that an address is: if that is the port's own,
// at another MAC than the tables say, the station has changed its MAC.
func (p *Port) heardOf(ip netip.Addr, mac ether.MAC, now int64) {
	b := p.bridge
	c, ok := b.dir.index.Load(ip)
	if !ok || !c.local || c.mac == mac || b.cfg.Readdressed == nil || !mac.IsValid() || b.fdb.lookup(c.mac) != p.at || b.fdb.lookup(mac) != p.at {
		return
	}
	if next := p.readdress.Load(); now >= next && p.readdress.CompareAndSwap(next, now+second) {
		// Who asks here is answered rightly from now on, and who has asked is told, until the tables say the same.
		b.dir.index.Compute(ip, func(old *claimant, loaded bool) (*claimant, xsync.ComputeOp) {
			if !loaded || old != c {
				return old, xsync.CancelOp
			}
			return &claimant{mac: mac, local: true}, xsync.UpdateOp
		})
		b.correct(ip, mac)
		b.cfg.Readdressed(c.mac, mac)
	}
}

// maxNeighbour is the longest frame that asks for one neighbour, in bytes.
const maxNeighbour = 14 + 40 + 24 + 8

// verified answers a station that asks whether a neighbour is still there, which it does
// by unicast (RFC 1122, section 2.3.2.1; RFC 4861, section 7.3.3), if the tables say so.
func (p *Port) verified(l *lane, frame []byte, dst ether.MAC) bool {
	switch binary.BigEndian.Uint16(frame[12:]) {
	case ether.EtherTypeARP:
		a, err := ether.ParseARP(frame[ethernetHeader:])
		if err != nil || a.Op() != ether.ARPRequest {
			return false
		}
		if c, ok := p.bridge.dir.index.Load(a.TargetIP()); !ok || c.mac != dst {
			return false
		}
		l.answer = ether.AppendARP(l.answer[:0], ether.MACFrom(frame[6:]), ether.ARPReply, dst, a.TargetIP(), a.SenderMAC(), a.SenderIP())
	case ether.EtherTypeIPv6:
		ip, n := parseND(frame)
		if n == nil || n.IsAdvertisement() || ip.Src().IsUnspecified() {
			return false
		}
		if c, ok := p.bridge.dir.index.Load(n.Target()); !ok || c.mac != dst {
			return false
		}
		l.answer = ether.AppendAdvertisement(l.answer[:0], ether.MACFrom(frame[6:]), dst, ip.Src(), n.Target())
	default:
		return false
	}
	p.answer(l)
	return true
}

// unanswered takes it from the port's bound that the tables do not know the address.
func (p *Port) unanswered(l *lane) reach {
	if !p.neighbours.take(l.now, 1, neighboursPerSecond, neighbourBurst) {
		p.bridge.tunnel.drops.add(DropNeighbourLimit)
		return nobody
	}
	return everyone
}

// answer writes l.answer to the port's device.
func (p *Port) answer(l *lane) {
	l.parts[0] = l.answer
	p.WriteFrame(ether.Meta{}, l.parts[:])
	p.bridge.Answered.Add(1)
}

// overhear looks at a group-addressed frame from the tunnel: where a station there looks
// for duplicates of an address that one here has, whose answer is a multicast, that is
// for the tunnel (RFC 4862, section 5.4.4). ARP's answer is not.
func (b *Bridge) overhear(frame []byte, now int64) {
	if binary.BigEndian.Uint16(frame[12:]) != ether.EtherTypeIPv6 {
		return
	}
	if ip, n := parseND(frame); n != nil && n.IsSolicitation() && ip.Src().IsUnspecified() {
		// Or its own, which somebody here has whom no table names.
		if c, ok := b.dir.index.Load(n.Target()); ok && (c.local || c.mac == ether.MACFrom(frame[6:])) {
			c.asked.Store(now + askedFor)
		}
	}
}
