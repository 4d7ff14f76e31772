package e2e

import (
	bin "encoding/binary"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"

	"github.com/tulle-net/tulle/ether"
	"github.com/tulle-net/tulle/ether/ethertest"
)

// fastGen makes random traffic: many flows that interleave, most of it the kind
// that merges, with everything in between that must not.
type fastGen struct {
	rng   *rand.Rand
	flows []*genFlow
	last  int
	// base keeps the addresses of one generator's flows apart from another's.
	base int
}

// genFlow is a flow, which must stay in order.
type genFlow struct {
	kind     string
	tcp      ethertest.TCP
	udp      ethertest.UDP
	size     int // of a full segment
	sameID   bool
	src, dst ether.MAC
	n        uint16
}

// genMACs are the only sources of generated frames: from 02:99:00:00:00:00 on.
const genMACs ether.MAC = 0x0299_0000_0000

func generated(m ether.MAC) bool { return m&^0xffff == genMACs }

// genKinds with their shares of the flows.
var genKinds = []string{"tcp", "tcp", "tcp", "tcp", "udp", "udp", "udp", "udp", "icmp", "arp", "fragment", "other"}

func newGen(seed uint64, flows, base int) *fastGen {
	g := &fastGen{rng: rand.New(rand.NewPCG(seed, 1)), base: base}
	for i := range flows {
		g.flows = append(g.flows, g.flow(i))
	}
	return g
}

func (g *fastGen) one(in int) bool { return g.rng.IntN(in) == 0 }

func (g *fastGen) bytes(n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(g.rng.Uint32())
	}
	return b
}

func (g *fastGen) flow(i int) *genFlow {
	f := &genFlow{kind: genKinds[i%len(genKinds)], sameID: g.one(4)}
	f.src = genMACs | ether.MAC(g.rng.IntN(4))
	f.dst = 0x0298_0000_0000 | ether.MAC(g.rng.IntN(4))
	n := byte(i)
	src, dst := netip.AddrFrom4([4]byte{198, 18, byte(g.base), n}), netip.AddrFrom4([4]byte{198, 19, byte(g.base), n})
	v6 := g.one(2)
	if v6 {
		src, dst = v6Of(src), v6Of(dst)
	}
	from, to := netip.AddrPortFrom(src, uint16(1024+g.rng.IntN(60000))), netip.AddrPortFrom(dst, uint16(1+g.rng.IntN(60000)))
	var vlans []uint16
	if g.one(4) {
		vlans = []uint16{uint16(1 + g.rng.IntN(4094))}
		if g.one(2) {
			vlans = append(vlans, uint16(1+g.rng.IntN(4094)))
		}
	}
	ttl, tos, label, id := uint8(1+g.rng.IntN(255)), uint8(g.rng.IntN(256)), g.rng.Uint32()&0xfffff, uint16(g.rng.Uint32())
	var options []byte
	var exts []ethertest.Extension
	if g.one(12) { // these never merge
		if v6 {
			exts = []ethertest.Extension{ethertest.Padded(ether.ProtoHopByHop, 8), ethertest.Padded(ether.ProtoDestOpts, 16)}
		} else {
			options = []byte{1, 1, 1, 0, 148, 4, 0, 0}
		}
	}
	f.size = []int{1, 37, 64, 511, 1000, 1379, 1400}[g.rng.IntN(7)]
	f.tcp = ethertest.TCP{Src: from, Dst: to, SrcMAC: f.src, DstMAC: f.dst, VLANs: vlans, TOS: tos, TTL: ttl, ID: id, DF: g.one(2), FlowLabel: label,
		IPOptions: options, Extensions: exts, Seq: g.rng.Uint32(), Ack: g.rng.Uint32(), Window: uint16(g.rng.Uint32() | 1)}
	if g.one(2) {
		f.tcp.Options = append([]byte{1, 1, 8, 10}, g.bytes(8)...)
	}
	f.udp = ethertest.UDP{Src: from, Dst: to, SrcMAC: f.src, DstMAC: f.dst, VLANs: vlans, TOS: tos, TTL: ttl, ID: id, DF: f.tcp.DF, FlowLabel: label,
		IPOptions: options, Extensions: exts, NoChecksum: g.one(8) && !v6}
	return f
}

// v6Of maps the generators' IPv4 addresses into one IPv6 network.
func v6Of(a netip.Addr) netip.Addr {
	b, v4 := netip.MustParseAddr("fd98::").As16(), a.As4()
	copy(b[12:], v4[:])
	return netip.AddrFrom16(b)
}

// noFlow is the flow of a frame that has other MACs or tags than the rest of its
// flow, or whose addresses or ports may be damaged: it has no place in any order.
const noFlow = -1

// next returns a frame and the number of its flow.
func (g *fastGen) next() (int, []byte) {
	if g.one(5) {
		g.last = g.rng.IntN(len(g.flows))
	}
	f := g.flows[g.last]
	f.n++
	var b []byte
	moved := false
	switch f.kind {
	case "tcp":
		b, moved = g.tcp(f)
	case "udp":
		b, moved = g.udp(f)
	case "icmp":
		b = ethertest.Echo{Src: f.udp.Src.Addr(), Dst: f.udp.Dst.Addr(), SrcMAC: f.src, DstMAC: f.dst, VLANs: f.udp.VLANs,
			Reply: g.one(2), Ident: uint16(g.last), Seq: f.n, Payload: g.bytes(g.rng.IntN(1400))}.Frame()
	case "arp":
		b = ethertest.ARP{Op: uint16(1 + g.last%2), SenderMAC: f.src, TargetMAC: f.dst, SrcMAC: f.src, SenderIP: netip.AddrFrom4([4]byte{198, 18, byte(g.base), byte(g.last)}),
			TargetIP: netip.AddrFrom4([4]byte{198, 19, byte(f.n >> 8), byte(f.n)}), VLANs: f.udp.VLANs, Padding: g.rng.IntN(20)}.Frame()
	case "fragment":
		b = g.fragment(f)
	default:
		// A type of its own, an IEEE 802.3 length, or IP that is none.
		types := []uint16{0x88b5, 0x0040, ether.EtherTypeIPv4, ether.EtherTypeIPv6}
		b = ethertest.Ethernet(f.dst, f.src, f.udp.VLANs, types[g.last%len(types)],
			append([]byte{0x70, byte(g.base), byte(g.last)}, g.bytes(g.rng.IntN(1400))...))
	}
	b, same := g.spoil(b)
	if moved || !same {
		return noFlow, b
	}
	return g.last, b
}

// tcp returns a segment, and whether it is of another flow.
func (g *fastGen) tcp(f *genFlow) (b []byte, moved bool) {
	s := f.tcp
	s.Payload = g.bytes(f.size)
	switch g.rng.IntN(100) {
	case 0:
		s.Payload = s.Payload[:g.rng.IntN(f.size)] // a short one ends a train
	case 1:
		s.Payload = nil
	case 2, 3, 4:
		s.Flags = ether.TCPAck | uint8(1<<g.rng.IntN(8))
		s.Urgent = uint16(g.rng.IntN(100))
	case 5:
		f.tcp.Window = uint16(g.rng.Uint32() | 1)
	case 6:
		f.tcp.Ack += uint32(1 + g.rng.IntN(5000))
	case 7:
		s.TTL ^= 3
	case 8:
		s.TOS ^= uint8(1 + g.rng.IntN(255))
	case 9:
		f.tcp.Seq += uint32(1 + g.rng.IntN(3000)) // a gap
		s.Seq = f.tcp.Seq
	case 10:
		f.tcp.ID++
		s.ID++
	case 11:
		s.Options = append([]byte{1, 1, 8, 10}, g.bytes(8)...)
	case 12:
		s.Padding = 1 + g.rng.IntN(40)
	case 13:
		s.FlowLabel ^= 1
	case 14:
		s.DF = !s.DF
	case 15:
		s.SrcMAC, moved = s.SrcMAC^1, true
	case 16:
		s.DstMAC, moved = s.DstMAC^1, true
	case 17:
		s.VLANs, moved = otherTag(s.VLANs), true
	case 18:
		s.Seq -= uint32(g.rng.IntN(3000)) // once more
	}
	f.tcp.Seq += uint32(len(s.Payload))
	if !f.sameID {
		f.tcp.ID++
	}
	return s.Frame(), moved
}

// otherTag changes the inner tag, or adds one.
func otherTag(vlans []uint16) []uint16 {
	if len(vlans) == 0 {
		return []uint16{77}
	}
	vlans = slices.Clone(vlans)
	vlans[len(vlans)-1] ^= 1
	return vlans
}

// udp returns a datagram, and whether it is of another flow.
func (g *fastGen) udp(f *genFlow) (b []byte, moved bool) {
	d := f.udp
	d.Payload = g.bytes(f.size)
	switch g.rng.IntN(100) {
	case 0:
		d.Payload = d.Payload[:g.rng.IntN(f.size)]
	case 1:
		d.Payload = g.bytes(g.rng.IntN(1400))
	case 2:
		d.TTL ^= 3
	case 3:
		f.udp.ID++
		d.ID++
	case 4:
		d.Padding = 1 + g.rng.IntN(40)
	case 5:
		d.NoChecksum = d.Src.Addr().Is4()
	case 6:
		d.TOS ^= uint8(1 + g.rng.IntN(255))
	case 7:
		d.FlowLabel ^= 1
	case 8:
		d.DF = !d.DF
	case 9:
		d.DstMAC, moved = d.DstMAC^1, true
	case 10:
		d.VLANs, moved = otherTag(d.VLANs), true
	}
	if !f.sameID {
		f.udp.ID++
	}
	return d.Frame(), moved
}

func (g *fastGen) fragment(f *genFlow) []byte {
	d := f.udp
	d.Payload = g.bytes(8 + 8*g.rng.IntN(100))
	place := uint16(g.rng.IntN(8)) * 64 // in units of 8 bytes
	more := uint16(g.rng.IntN(2))
	if d.Src.Addr().Is6() {
		word := place<<3 | more
		d.Extensions = []ethertest.Extension{{Proto: ether.ProtoFragment, Body: []byte{0, byte(word >> 8), byte(word), 0, 0, byte(f.n >> 8), byte(f.n)}}}
		return d.Frame()
	}
	d.DF, d.ID = false, f.n
	b := d.Frame()
	ip := ipv4In(b)
	bin.BigEndian.PutUint16(ip[6:], place|more<<13)
	ip.SetChecksum()
	return b
}

// ipv4In returns the IPv4 packet of a frame that has one, or nil.
func ipv4In(b []byte) ether.IPv4 {
	f, err := ether.ParseEthernet(b)
	if err != nil || f.EtherType() != ether.EtherTypeIPv4 {
		return nil
	}
	ip, err := ether.ParseIPv4(f.Payload())
	if err != nil {
		return nil
	}
	return ip
}

// spoil damages some frames: such a frame passes as it is, or the test of
// trap 2 (a bad checksum that comes out right) fails. It reports whether the
// frame still belongs to its flow.
func (g *fastGen) spoil(b []byte) ([]byte, bool) {
	switch g.rng.IntN(50) {
	case 0: // anywhere behind the addresses and tags
		if at := 22 + g.rng.IntN(max(len(b)-22, 1)); at < len(b) {
			b[at] ^= byte(1 + g.rng.IntN(255))
			return b, at > 110 // behind all headers
		}
	case 1: // in the transport's checksum
		if h, ok := ether.ParseHeaders(b); ok {
			at := int(h.L4) + ether.TCPChecksumOffset
			if h.Proto == ether.ProtoUDP {
				at = int(h.L4) + ether.UDPChecksumOffset
			}
			b[at+g.rng.IntN(2)] ^= byte(1 + g.rng.IntN(255))
		}
	case 2: // in the IPv4 header's
		if ip := ipv4In(b); ip != nil {
			ip[10+g.rng.IntN(2)] ^= byte(1 + g.rng.IntN(255))
		}
	case 3: // the end is missing
		if len(b) > 80 {
			b = b[:len(b)-1-g.rng.IntN(20)]
		}
	}
	return b, true
}

// canonical is the form in which frames are compared: their bytes, but for one
// thing. In a packet with DF the identification means nothing (RFC 6864,
// section 4.1), so trains of one and the same are merged, as the kernel's GRO
// does, and cut to consecutive ones. Where the header checksum is right, both
// are blanked; where it is wrong, nothing is.
func canonical(b []byte) string {
	c := append([]byte(nil), b...)
	if ip := ipv4In(c); ip != nil && ip.DontFragment() && ip.ChecksumOK() {
		ip[4], ip[5] = 0, 0
		ip.SetChecksum()
	}
	return string(c)
}

// exact compares every bit.
func exact(b []byte) string { return string(b) }

// fastLedger knows what was sent and checks what comes out: each frame once,
// none altered, each flow in order.
type fastLedger struct {
	waiting map[string][]sent
	next    map[int]int // by flow
	reached map[int]int // by flow
	faults  []string
	form    func(frame []byte) string // in which frames are compared
}

type sent struct{ flow, number int }

func newLedger(form func([]byte) string) *fastLedger {
	return &fastLedger{waiting: map[string][]sent{}, next: map[int]int{}, reached: map[int]int{}, form: form}
}

// sent notes a frame that must come out.
func (l *fastLedger) sent(flow int, frame []byte) {
	key := l.form(frame)
	l.waiting[key] = append(l.waiting[key], sent{flow, l.next[flow]})
	l.next[flow]++
}

// came takes a frame that came out.
func (l *fastLedger) came(frame []byte) {
	key := l.form(frame)
	w := l.waiting[key]
	if len(w) == 0 {
		l.fault("nobody sent %d bytes: %x", len(frame), frame[:min(len(frame), 100)])
		return
	}
	if l.waiting[key] = w[1:]; len(w) == 1 {
		delete(l.waiting, key)
	}
	if w[0].flow == noFlow {
		return
	}
	if w[0].number < l.reached[w[0].flow] {
		l.fault("flow %d: frame %d came behind frame %d", w[0].flow, w[0].number, l.reached[w[0].flow]-1)
		return
	}
	l.reached[w[0].flow] = w[0].number + 1
}

func (l *fastLedger) fault(format string, args ...any) {
	if len(l.faults) < 10 {
		l.faults = append(l.faults, fmt.Sprintf(format, args...))
	}
}

// missing adds a fault for what never came.
func (l *fastLedger) missing() []string {
	for key, w := range l.waiting {
		l.fault("lost: frame %d of flow %d, %d bytes: %x", w[0].number, w[0].flow, len(key), key[:min(len(key), 100)])
	}
	return l.faults
}
