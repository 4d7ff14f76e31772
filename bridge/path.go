package bridge

import (
	"net/netip"
	"sync"
	"sync/atomic"

	"github.com/tulle-net/tulle/crypto"
	"github.com/tulle-net/tulle/ether"
	"github.com/tulle-net/tulle/tap"
	"github.com/tulle-net/tulle/underlay"
	"github.com/tulle-net/tulle/vxlan"
)

// What fits the way to a place, and what the sender of a frame that does not fit
// is told.

// path is how large what reaches a remote place may be. The zero path is one of
// which nothing is known: then the devices' MTU is what bounds a frame. All
// overlays of a sealed peer share one; of a plain overlay each place has its own.
type path struct {
	// short is by how many bytes a datagram must stay below underlay.MaxSend; so
	// asking for it costs a worker one load and a subtraction.
	short atomic.Int32

	mu sync.Mutex
	// The largest IP packet in bytes, 0 where it is not known to be less than what
	// the devices' MTU leads to: as the kernel's routes say, and as probes found.
	kernel, probed int
}

// most returns the bytes of the largest datagram.
func (p *path) most() int { return underlay.MaxSend - int(p.short.Load()) }

// limit returns the bytes of the largest IP packet, 0 for not known. p.mu is held.
func (p *path) limit() int {
	if p.kernel != 0 && p.probed != 0 {
		return min(p.kernel, p.probed)
	}
	return p.kernel + p.probed
}

// set notes what routes or probes say about the way to an address of the family
// of to: the change is made by f. It reports whether the limit is another now.
func (p *path) set(to netip.Addr, f func(*path)) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	was := p.limit()
	f(p)
	limit := p.limit()
	short := 0
	if limit != 0 {
		short = max(underlay.MaxSend-max(limit-ipHeaders(to), 0), 0)
	}
	p.short.Store(int32(short))
	return limit != was
}

// ipHeaders returns the bytes of the IP and UDP headers before a datagram to to.
func ipHeaders(to netip.Addr) int {
	if to.Is4() {
		return 20 + 8
	}
	return 40 + 8
}

// SetPathMTU says that the kernel sends no IP packet larger than this many bytes
// to a VTEP, as underlay.Conn's PathMTU has it: frames that need more are not
// sent, and their senders told. 0: nothing is known. It holds for the VTEPs that
// there are now, so it is called again after SetMembers and SetPeers, and when
// one has moved; calling it with what it knows costs little.
func (t *Tunnel) SetPathMTU(vtep netip.Addr, bytes int) {
	bytes = max(bytes, 0)
	set := func(p *path) bool { return p.set(vtep, func(p *path) { p.kernel = bytes }) }
	changed := false
	if r := (*t.byAddr.Load())[vtep]; r != nil {
		changed = set(&r.path)
	}
	for _, b := range *t.bridges.Load() {
		if p, ok := b.remotes.Load(vtep); ok && set(p.path) {
			changed = true
		}
	}
	if changed {
		t.pathChanged()
	}
}

// PathMTU returns the bytes of the largest IP packet that reaches a peer of a
// sealed overlay; 0 while it is not known to be less than what the devices' MTU
// leads to, and for a peer that there is not.
func (t *Tunnel) PathMTU(peer string) int {
	t.mu.Lock()
	r := t.peers[peer]
	t.mu.Unlock()
	if r == nil {
		return 0
	}
	r.path.mu.Lock()
	defer r.path.mu.Unlock()
	return r.path.limit()
}

func (t *Tunnel) pathChanged() {
	if t.cfg.PathChanged != nil {
		t.cfg.PathChanged()
	}
}

// overhead returns what the overlay's datagrams have besides the inner frame, in bytes.
func (b *Bridge) overhead() int {
	if b.cfg.Sealed {
		return sealedRoom + crypto.TagLen
	}
	return vxlan.HeaderLen
}

// tooLarge drops the frame f, whose pieces would not fit the way to the place to,
// and tells its sender so. A frame is told of once, whatever it would be cut into.
// There is nobody to tell where ether.TooBig says so, above all if the packet is
// IPv4 without DF. It is not fragmented either: an overlay is a link, and what
// fragments is a router, which has addresses and sees to it that the parts take
// one way; the sender's next packet is no smaller for it.
func (b *Bridge) tooLarge(l *lane, to *place, f *tap.Frame) {
	if b.overhead()+l.cut.MaxLen() > underlay.MaxSend {
		b.tunnel.drops.add(DropOversize)
		return
	}
	b.tunnel.drops.add(DropPathMTU)
	// Of a frame that goes to several, one that does not get it speaks for itself only.
	if len(*b.flood.Load()) > 1 && b.fdb.lookup(ether.MACFrom(f.B)) != to {
		return
	}
	if !b.answers.open(l.now) {
		return
	}
	l.cut.Unfilled = false
	if l.cut.Reset(f.B, f.Meta) != nil {
		return
	}
	first := l.tx.Reserve(l.cut.MaxLen()) // and never committed
	first = first[:l.cut.Next(first)]
	answer, ok := ether.TooBig(l.answer[:0], first, b.innerMTU(to, first))
	if !ok {
		return
	}
	l.answer = answer
	if b.answers.take(l.now) {
		l.parts[0] = answer
		l.from.WriteFrame(ether.Meta{}, l.parts[:])
	}
}

// innerMTU returns the bytes of the largest IP packet that fits the way to a
// place behind an Ethernet header like frame's, with its VLAN tags.
func (b *Bridge) innerMTU(to *place, frame []byte) int {
	h, _ := ether.ParseHeaders(frame)
	return to.path.most() - b.overhead() - max(int(h.L3), ethernetHeader)
}

// clampMSS lowers what a TCP SYN to or from a place announces to what fits the
// way there and the devices here. It changes frame.
func (b *Bridge) clampMSS(frame []byte, m ether.Meta, at *place) {
	if !maySYN(frame, m) {
		return
	}
	mtu := b.innerMTU(at, frame)
	if n := b.mtu(); n != 0 {
		mtu = min(mtu, n)
	}
	ether.ClampMSS(frame, m, mtu)
}

// maySYN reports whether frame may be a TCP SYN: false for nearly all that are
// none, at the price of a few loads. What is not plain to see (VLAN tags, IPv6
// extension headers) may be one.
func maySYN(frame []byte, m ether.Meta) bool {
	const tcpFlags = 13
	if m.GSO != ether.GSONone || len(frame) < ethernetHeader+40 {
		return false
	}
	flags := 0
	switch uint16(frame[12])<<8 | uint16(frame[13]) {
	case ether.EtherTypeIPv4:
		if frame[ethernetHeader+9] != ether.ProtoTCP {
			return false
		}
		flags = ethernetHeader + int(frame[ethernetHeader]&0xf)*4 + tcpFlags
	case ether.EtherTypeIPv6:
		switch frame[ethernetHeader+6] {
		case ether.ProtoTCP:
			flags = ethernetHeader + 40 + tcpFlags
		case ether.ProtoUDP, ether.ProtoICMPv6:
			return false
		default:
			return true
		}
	case ether.EtherTypeVLAN, ether.EtherTypeQinQ:
		return true
	default:
		return false
	}
	return flags < len(frame) && frame[flags]&ether.TCPSyn != 0
}

// MaxAnswers is how many messages of one kind, ICMP errors of a bridge (RFC 4443,
// section 2.4 (f)) or answers to a peer's probes, go out at once and then in each
// second.
const MaxAnswers = 100

// limiter is a bucket of MaxAnswers tokens, refilled at MaxAnswers a second. The
// zero limiter is full. It is safe for concurrent use and takes no lock.
type limiter struct {
	// used is when the bucket will be full again, in parts of a second of which
	// there are MaxAnswers, on the Tunnel's clock.
	used atomic.Int64
}

// partsPerTick converts the Tunnel's ticks to the limiter's clock.
const partsPerTick = MaxAnswers / second

// open reports whether there is a token at the tick now.
func (l *limiter) open(now int64) bool { return l.used.Load()-now*partsPerTick < MaxAnswers }

// take takes a token at the tick now, if there is one.
func (l *limiter) take(now int64) bool {
	now *= partsPerTick
	for {
		used := l.used.Load()
		if used-now >= MaxAnswers {
			return false
		}
		if l.used.CompareAndSwap(used, max(used, now)+1) {
			return true
		}
	}
}
