package tap

import (
	"encoding/binary"
	"math/rand/v2"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/tulle-net/tulle/ether"
)

// station is what a layer 3 device lacks of an Ethernet host: a MAC, neighbours
// that it finds by ARP (RFC 826, RFC 5227) and neighbour discovery (RFC 4861),
// and answers to those who look for it. The functions in this file are about
// packets; those about neighbours are in neighbours.go.
//
//	host → address: an Ethernet header before a packet, or it waits for a neighbour
//	host ← admit:   whether a frame's packet is for the host; ARP and ND end here
type station struct {
	mac      ether.MAC
	prefixes []netip.Prefix // the host's addresses, the link-local one among them
	gateways []netip.Addr
	routes   []Route // further ones, each through an address in a prefix
	drops    [numStationDrops]atomic.Uint64
	// wake tells the worker that there is something to take, tell the host what is
	// in a packet, borrowed, behind 14 bytes. They are called with mu held and do not
	// block.
	wake func()
	tell func(frame []byte)

	mu    sync.Mutex
	table map[netip.Addr]*neighbour
	// lastDst is where the last packet went, by last; nil: it is not known.
	lastDst netip.Addr
	last    *neighbour
	// queue is what waits for the worker, packets how many in it are the host's.
	// heldBytes are those of the host's packets, here and at neighbours.
	queue              []queued
	packets, heldBytes int
	timer              *time.Timer // calls tick
	due                time.Time   // when it does; zero: it does not
	defended           time.Time   // when an address was last defended
	told               int         // how often the host was told in the second from toldSince
	toldSince          time.Time
	scratch            []byte // memory of what it is told
	closed             bool
}

// queued is a frame for the worker, behind Headroom bytes: a packet of the host's,
// or a message of the station.
type queued struct {
	frame  []byte
	packet bool
}

const (
	// maxNeighbours bounds the table; maxQueue the messages that wait for the
	// worker; maxWaiting the packets that wait for one neighbour, maxHeldBytes
	// those that wait for any.
	maxNeighbours = 1024
	maxQueue      = 256
	maxWaiting    = 64
	maxHeldBytes  = 512 << 10
	// maxTold bounds the ICMP errors to the host, a second.
	maxTold = 100

	etherLen = 14
	ipv4Len  = 20
	ipv6Len  = 40
)

// stationDrop is why a layer 3 device has not passed something on.
type stationDrop uint8

const (
	// dropMalformed: no IP packet, or an ARP or ND message that contradicts itself.
	dropMalformed stationDrop = iota
	// dropNotIP: a frame that a layer 3 device has no use for, or has a VLAN tag.
	dropNotIP
	// dropOtherHost: for another MAC, or a packet for one host sent to a group.
	dropOtherHost
	// dropNoRoute: for an address off the device's subnets, and there is no gateway.
	dropNoRoute
	// dropUnreachable: for a neighbour that does not answer.
	dropUnreachable
	// dropNeighbourQueue: waited for a neighbour, and had to make room.
	dropNeighbourQueue
	// dropNeighbourLimit: for a neighbour that the table has no room for.
	dropNeighbourLimit
	// dropAnswerLimit: a message of the station's for which there was no room.
	dropAnswerLimit
	// dropConflict: an ARP or ND message of somebody who has the host's address too.
	dropConflict

	numStationDrops
)

var stationDropNames = [numStationDrops]string{
	dropMalformed:      "tun_malformed",
	dropNotIP:          "tun_not_ip",
	dropOtherHost:      "tun_other_host",
	dropNoRoute:        "tun_no_route",
	dropUnreachable:    "tun_unreachable",
	dropNeighbourQueue: "tun_neighbour_queue",
	dropNeighbourLimit: "tun_neighbour_limit",
	dropAnswerLimit:    "tun_answer_limit",
	dropConflict:       "tun_conflict",
}

func newStation(mac ether.MAC, prefixes []netip.Prefix, gateways []netip.Addr, wake func(), tell func(frame []byte)) *station {
	return &station{mac: mac, prefixes: prefixes, gateways: gateways, wake: wake, tell: tell, table: map[netip.Addr]*neighbour{}}
}

func (s *station) drop(why stationDrop) { s.drops[why].Add(1) }

// has reports whether a is one of the host's addresses.
func (s *station) has(a netip.Addr) bool {
	for _, p := range s.prefixes {
		if p.Addr() == a {
			return true
		}
	}
	return false
}

// source returns the host's address in the subnet of a, which is not valid where
// a is not on the link.
func (s *station) source(a netip.Addr) netip.Addr {
	for _, p := range s.prefixes {
		if p.Contains(a) {
			return p.Addr()
		}
	}
	return netip.Addr{}
}

// isBroadcast reports whether a, an IPv4 address, is a broadcast on this link.
func (s *station) isBroadcast(a netip.Addr) bool {
	b := a.As4()
	v := binary.BigEndian.Uint32(b[:])
	if v == 0xffff_ffff {
		return true
	}
	for _, p := range s.prefixes {
		if p.Addr().Is4() && p.Bits() < 31 && p.Contains(a) && v|^uint32(0)<<(32-p.Bits()) == 0xffff_ffff {
			return true
		}
	}
	return false
}

// address fills the Ethernet header before the packet in frame, whose first 14
// bytes are free. false: frame does not go now. It was copied if it waits for a
// neighbour, else counted. mu is held.
func (s *station) address(frame []byte, now time.Time) bool {
	p := frame[etherLen:]
	var dst netip.Addr
	etherType := uint16(ether.EtherTypeIPv4)
	switch {
	case len(p) >= ipv4Len && p[0]>>4 == 4:
		dst = netip.AddrFrom4([4]byte(p[16:20]))
	case len(p) >= ipv6Len && p[0]>>4 == 6:
		dst = netip.AddrFrom16([16]byte(p[24:40]))
		etherType = ether.EtherTypeIPv6
		fillZero(p)
	default:
		s.drop(dropMalformed)
		return false
	}
	s.mac.Put(frame[6:])
	binary.BigEndian.PutUint16(frame[12:], etherType)
	if nb := s.last; nb != nil && s.lastDst == dst && nb.state == reachable && now.Before(nb.until) && s.packets == 0 {
		nb.used = now
		nb.mac.Put(frame)
		return true
	}
	if dst.IsMulticast() {
		ether.MulticastMAC(dst).Put(frame)
		return true
	}
	if dst.Is4() && s.isBroadcast(dst) {
		ether.Broadcast.Put(frame)
		return true
	}
	next := s.nextHop(dst)
	if !next.IsValid() {
		s.drop(dropNoRoute)
		return false
	}
	nb := s.neighbour(next, now)
	if nb == nil {
		s.drop(dropNeighbourLimit)
		return false
	}
	s.lastDst, s.last = dst, nb
	return s.toNeighbour(nb, frame, now)
}

// nextHop returns the neighbour that leads to dst: dst itself, that of the narrowest
// route, or the gateway.
func (s *station) nextHop(dst netip.Addr) (next netip.Addr) {
	bits := -1
	for _, p := range s.prefixes {
		if p.Contains(dst) && p.Bits() > bits {
			next, bits = dst, p.Bits()
		}
	}
	for _, r := range s.routes {
		if r.Dst.Contains(dst) && r.Dst.Bits() > bits {
			next, bits = r.Via, r.Dst.Bits()
		}
	}
	if bits >= 0 {
		return next
	}
	for _, g := range s.gateways {
		if g.Is4() == dst.Is4() {
			return g
		}
	}
	return netip.Addr{}
}

// fillZero writes the UDP checksum of an IPv6 packet whose sum is 0 as 0xffff (RFC
// 8200, section 8.1), which the library does not. One that has none (RFC 6935)
// stays as it is.
func fillZero(p []byte) {
	const at = ipv6Len + 6
	if p[6] != ether.ProtoUDP || len(p) < ipv6Len+8 || p[at]|p[at+1] != 0 {
		return
	}
	if udp := p[ipv6Len:]; ether.Sum(udp, ether.PseudoSum(ether.ProtoUDP, p[8:24], p[24:40], len(udp))) == 0xffff {
		p[at], p[at+1] = 0xff, 0xff
	}
}

// headLen is what admit looks at: up to the type of an ICMPv6 message.
const headLen = etherLen + ipv6Len + 1

// verdict is what becomes of a frame.
type verdict uint8

const (
	pass     verdict = iota // its packet is for the host
	message                 // ARP or ND, for heard
	unwanted                // counted
)

// admit looks at the begin of a frame, all of it or at least headLen bytes.
func (s *station) admit(frame []byte) verdict {
	dst := ether.MACFrom(frame)
	if dst != s.mac && !dst.IsMulticast() {
		s.drop(dropOtherHost)
		return unwanted
	}
	p := frame[etherLen:]
	group := dst.IsMulticast()
	switch binary.BigEndian.Uint16(frame[12:]) {
	case ether.EtherTypeARP:
		return message
	case ether.EtherTypeIPv4:
		if len(p) < ipv4Len || p[0]>>4 != 4 {
			s.drop(dropMalformed)
			return unwanted
		}
		if !group {
			return pass
		}
		// A group's packet for one host: the kernel would know it by the MAC, and
		// not take it (RFC 1122, section 3.3.6).
		if to := netip.AddrFrom4([4]byte(p[16:20])); !to.IsMulticast() && !s.isBroadcast(to) {
			s.drop(dropOtherHost)
			return unwanted
		}
	case ether.EtherTypeIPv6:
		if len(p) < ipv6Len || p[0]>>4 != 6 {
			s.drop(dropMalformed)
			return unwanted
		}
		if isND(p) {
			return message
		}
		if group && p[24] != 0xff {
			s.drop(dropOtherHost)
			return unwanted
		}
	default:
		s.drop(dropNotIP)
		return unwanted
	}
	return pass
}

// isND reports whether the IPv6 packet p is a neighbour solicitation or
// advertisement, by its type alone.
func isND(p []byte) bool {
	return p[6] == ether.ProtoICMPv6 && len(p) > ipv6Len && (p[ipv6Len] == 135 || p[ipv6Len] == 136)
}

// heard takes in an ARP or ND message: a whole frame, borrowed.
func (s *station) heard(frame []byte, now time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return
	}
	var ok bool
	if binary.BigEndian.Uint16(frame[12:]) == ether.EtherTypeARP {
		ok = s.heardARP(frame, now)
	} else {
		ok = s.heardND(frame, now)
	}
	if !ok {
		s.drop(dropMalformed)
	}
}

// heardARP is false for what is no sound message.
func (s *station) heardARP(frame []byte, now time.Time) bool {
	p, err := ether.ParseARP(frame[etherLen:])
	if err != nil || !p.SenderMAC().IsValid() || p.Op() != ether.ARPRequest && p.Op() != ether.ARPReply {
		return false
	}
	mac, from := p.SenderMAC(), p.SenderIP()
	if mac == s.mac {
		return true // our own, come back
	}
	if s.has(from) {
		s.conflict(from, now)
		return true
	}
	mine := s.has(p.TargetIP())
	asked := mine && p.Op() == ether.ARPRequest
	if s.source(from).IsValid() { // a probe's is 0.0.0.0 (RFC 5227)
		answer := mine && p.Op() == ether.ARPReply && ether.MACFrom(frame) == s.mac
		s.learn(from, mac, asked, answer, now)
	}
	if asked {
		s.send(ether.AppendARP(newFrame(), mac, ether.ARPReply, s.mac, p.TargetIP(), mac, from))
	}
	return true
}

// heardND is heardARP for neighbour discovery.
func (s *station) heardND(frame []byte, now time.Time) bool {
	p, err := ether.ParseIPv6(frame[etherLen:])
	if err != nil {
		return false
	}
	m, err := ether.ParseND(p)
	if err != nil {
		return false
	}
	from := ether.MACFrom(frame[6:])
	if from == s.mac {
		return true
	}
	mac, named := m.LinkLayer()
	if named && !mac.IsValid() || !from.IsValid() {
		return false
	}
	mine := s.has(m.Target())
	switch {
	case m.IsAdvertisement() && mine:
		s.conflict(m.Target(), now)
	case m.IsAdvertisement():
		s.advertised(m, mac, named, now)
	case !mine:
	case p.Src().IsUnspecified(): // who looks for duplicates hears it with all others
		s.send(ether.AppendAdvertisement(newFrame(), 0, s.mac, netip.Addr{}, m.Target()))
	default:
		if !named {
			mac = from // one that is sent to us alone need not name it
		} else if s.source(p.Src()).IsValid() {
			s.learn(p.Src(), mac, true, false, now)
		}
		s.send(ether.AppendAdvertisement(newFrame(), mac, s.mac, p.Src(), m.Target()))
	}
	return true
}

// defendEvery is DEFEND_INTERVAL of RFC 5227.
const defendEvery = 10 * time.Second

// conflict tells everybody, but not for ever, that an address is the host's.
func (s *station) conflict(a netip.Addr, now time.Time) {
	s.drop(dropConflict)
	if !s.defended.IsZero() && now.Sub(s.defended) < defendEvery {
		return
	}
	s.defended = now
	if a.Is4() {
		s.send(ether.AppendARP(newFrame(), ether.Broadcast, ether.ARPRequest, s.mac, a, 0, a))
		return
	}
	s.send(ether.AppendAdvertisement(newFrame(), 0, s.mac, netip.Addr{}, a))
}

// newFrame returns the begin of a message's frame, its headroom.
func newFrame() []byte { return make([]byte, Headroom, Headroom+96) }

// send has the worker send a message, behind Headroom bytes.
func (s *station) send(frame []byte) {
	if len(s.queue)-s.packets >= maxQueue {
		s.drop(dropAnswerLimit)
		return
	}
	s.enqueue(queued{frame: frame})
}

func (s *station) enqueue(q queued) {
	if s.closed {
		return
	}
	s.queue = append(s.queue, q)
	if len(s.queue) == 1 {
		s.wake()
	}
}

// take moves what waits for the worker to b, as much as has room; it reports
// whether that was all. mu is held.
func (s *station) take(b *Batch) bool {
	n := min(len(s.queue), BatchFrames-len(b.Frames))
	for i, q := range s.queue[:n] {
		b.Frames = append(b.Frames, FrameAt(q.frame, len(q.frame)-Headroom))
		if q.packet {
			s.packets--
			s.heldBytes -= len(q.frame)
		}
		s.queue[i] = queued{}
	}
	s.queue = s.queue[n:]
	if len(s.queue) > 0 {
		return false
	}
	s.queue = nil // with its memory
	return true
}

// unreachable drops a packet behind 14 bytes, and tells the host why.
func (s *station) unreachable(frame []byte, now time.Time) {
	s.drop(dropUnreachable)
	if now.Sub(s.toldSince) >= time.Second {
		s.told, s.toldSince = 0, now
	}
	if s.told >= maxTold || s.closed {
		return
	}
	if s.scratch == nil {
		s.scratch = make([]byte, etherLen, etherLen+ether.MaxUnreachable)
	}
	if answer, ok := ether.Unreachable(s.scratch[:etherLen], frame[etherLen:]); ok {
		s.told++
		s.tell(answer)
	}
}

// jitter returns a time of 0.5 to 1.5 times d (RFC 4861, section 6.3.2).
func jitter(d time.Duration) time.Duration { return d/2 + rand.N(d) }

// close ends the timer and forgets what waits.
func (s *station) close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closed = true
	if s.timer != nil {
		s.timer.Stop()
	}
	s.queue, s.table, s.last = nil, map[netip.Addr]*neighbour{}, nil
}
