package bridge

import (
	"errors"
	"net/netip"

	"github.com/tulle-net/tulle/crypto"
	"github.com/tulle-net/tulle/ether"
	"github.com/tulle-net/tulle/underlay"
	"github.com/tulle-net/tulle/vxlan"
)

// The functions in this file stand in the order in which a datagram passes them.

// maxSuperFrame is the most bytes of a merged IP packet.
const maxSuperFrame = 65535

const ethernetHeader = 14

// noMAC is no address: it has 49 bits.
const noMAC ether.MAC = 1 << 48

// ingress is one worker: underlay → TAPs. It owns its memory.
type ingress struct {
	t     *Tunnel
	batch *underlay.Batch
	merge *ether.Coalescer
	nanos int64 // of this batch
	now   int64 // the same in ticks

	// What the previous datagram of this batch had: the next one mostly has
	// the same. b is nil when there is none.
	src     netip.AddrPort
	vni     vxlan.VNI
	b       *Bridge
	from    *place
	lastSrc ether.MAC
	lastDst ether.MAC
	to      *Port // where lastDst lives; nil when unknown

	// The session that b and from were found by; nil: by a plain VNI.
	session *session
	scratch crypto.Scratch

	queue   aqm
	stands  bool // the queue does, so it is told of all frames
	burst   int  // bytes received since the socket was last empty
	company company
	held    heldSlots
	large   bool // the slot is, or others from its source port are

	// Counted since the last flush for b and from.
	frames, bytes int
}

func newIngress(t *Tunnel) *ingress {
	return &ingress{t: t, batch: &underlay.Batch{}, merge: ether.NewCoalescer(maxSuperFrame), lastSrc: noMAC, lastDst: noMAC}
}

// run receives until the Conn is closed.
func (in *ingress) run(r underlay.Receiver) {
	for {
		if r.Wait() != nil || !in.serve(r) {
			return
		}
		if in.rests() {
			r.Rest(restFor)
		}
	}
}

// serve delivers what waits in the socket; false: it is closed.
func (in *ingress) serve(r underlay.Receiver) bool {
	for {
		open := in.receive(r)
		if len(in.held.slots) == 0 {
			return open
		}
		in.deliverHeld()
		in.company.giveWay(in.t.nanos())
		if len(in.held.slots) == 0 && open {
			if !in.batch.More {
				in.queue.drained()
			}
			return true
		}
	}
}

// receive receives once, or, where somebody waits, until the socket is empty or enough is
// held or went ahead, and delivers what need not wait: all, where nobody waits. It is false
// when the socket is closed.
func (in *ingress) receive(r underlay.Receiver) bool {
	for ahead := 0; !in.held.full() && (len(in.held.slots) == 0 || ahead < maxAhead); {
		if err := r.Receive(in.batch); err != nil {
			if errors.Is(err, underlay.ErrClosed) {
				return false
			}
			in.t.drops.add(DropReceive)
			return true
		}
		if len(in.held.slots) == 0 && !in.company.there(in.t.nanos()) {
			in.handle()
			in.held.trim(in.now)
			return true
		}
		ahead += in.goAhead()
		if !in.batch.More {
			return true
		}
	}
	return true
}

// begin notes what there is to note of each batch.
func (in *ingress) begin() {
	in.nanos = in.t.nanos()
	in.now = in.nanos / int64(tick)
	in.stands = false
	if !in.batch.More && len(in.held.slots) == 0 {
		in.queue.drained()
	} else if !in.t.cfg.NoAQM {
		in.stands = in.queue.stands(in.nanos)
	}
	for i := range in.batch.Slots {
		in.burst += len(in.batch.Slots[i].B)
	}
}

// handle delivers the batch.
func (in *ingress) handle() {
	in.begin()
	for i := range in.batch.Slots {
		in.slot(&in.batch.Slots[i])
	}
	in.flush()
}

// goAhead delivers those slots of the batch that need not wait, and holds the others; it
// returns how many datagrams it has delivered.
func (in *ingress) goAhead() (ahead int) {
	in.begin()
	for i := range in.batch.Slots {
		s := &in.batch.Slots[i]
		if n := in.held.passes(s); n > 0 {
			in.slot(s)
			ahead += n
			continue
		}
		for !in.held.hold(s, in.now) {
			in.deliverHeld()
		}
	}
	if ahead > 0 {
		in.flush()
	}
	return ahead
}

// deliverHeld delivers the oldest of what is held.
func (in *ingress) deliverHeld() {
	n := 0
	for bytes := 0; n < len(in.held.slots) && bytes < heldTurn; n++ {
		s := &in.held.slots[n].Slot
		bytes += len(s.B)
		in.slot(s)
	}
	in.flush()
	in.held.leaves(n)
}

// flush writes what was merged.
func (in *ingress) flush() {
	in.merge.Flush()
	// Nothing remembered survives the batch: bridges and places may go.
	in.forget()
}

// slot takes apart what one receive delivered: each datagram of a train says
// for itself what it is.
func (in *ingress) slot(s *underlay.Slot) {
	if s.Src != in.src {
		in.forget()
		in.src = s.Src
	}
	in.large = in.held.large(s, in.now)
	step := s.SegmentLen
	if step <= 0 {
		step = len(s.B)
	}
	for rest := s.B; ; {
		d := rest[:min(step, len(rest))]
		in.datagram(d)
		if rest = rest[len(d):]; len(rest) == 0 {
			return
		}
	}
}

// datagram demultiplexes by the first byte.
func (in *ingress) datagram(d []byte) {
	if len(d) == 0 {
		in.t.drops.add(DropShort)
		return
	}
	switch c := d[0]; {
	case c == vxlan.FlagVNI:
		in.plain(d)
	case c == crypto.SealedByte:
		in.sealed(d)
	case c&0x40 != 0: // RFC 9443: QUIC has the fixed bit set
		if in.t.cfg.Control == nil {
			in.t.drops.add(DropControl)
			return
		}
		in.t.cfg.Control(in.src, d)
	default:
		in.t.drops.add(DropUnknownType)
	}
}

// plain takes an RFC 7348 datagram.
func (in *ingress) plain(d []byte) {
	vni, frame, err := vxlan.Parse(d)
	if err != nil {
		in.t.drops.add(DropShort)
		return
	}
	if in.b == nil || vni != in.vni || in.session != nil {
		if drop, ok := in.resolve(vni); !ok {
			in.t.drops.add(drop)
			return
		}
	}
	if in.from.member || !in.t.cfg.Unfinished {
		in.deliver(frame, ether.Meta{})
		return
	}
	m, _ := ether.Unfinished(frame, in.b.mtu())
	in.deliver(frame, m)
}

// sealed takes a datagram that a peer sealed. What it carries is used only when
// the session's AEAD has authenticated it.
func (in *ingress) sealed(d []byte) {
	index, ok := crypto.ParseSealed(d)
	if !ok {
		in.t.drops.add(DropSealedMalformed)
		return
	}
	if in.session == nil || in.session.rx.Index() != index {
		in.forget()
		s, ok := in.t.sessions.Load(index)
		if !ok {
			in.t.unknown(in.src.Addr(), in.now)
			return
		}
		in.session, in.b, in.from, in.vni = s, s.b, s.from, s.b.cfg.VNI
	}
	s := in.session
	plaintext, flags, counter, err := s.rx.Open(&in.scratch, d)
	if err != nil {
		in.t.drops.add(dropOf(err))
		return
	}
	if in.src.Addr() != in.from.peer.at.Load().Addr() && counter == s.rx.Highest() {
		in.t.moved(in.from.peer, in.src.Addr(), in.now)
	}
	if flags&crypto.FlagControl != 0 {
		in.control(plaintext, flags)
		return
	}
	vni, frame, err := vxlan.Parse(plaintext)
	if err != nil || vni != in.vni {
		in.t.drops.add(DropVNIMismatch)
		return
	}
	m := ether.Meta{}
	if flags&crypto.FlagUnfilled != 0 {
		if m, ok = ether.PartialMeta(frame); !ok {
			in.t.drops.add(DropMalformed)
			return
		}
	}
	in.deliver(frame, m)
}

// dropOf says why crypto.Opener.Open refused a datagram.
func dropOf(err error) Drop {
	switch err {
	case crypto.ErrSealedReplay:
		return DropReplay
	case crypto.ErrSealedForged:
		return DropForged
	case crypto.ErrSealedDropped:
		return DropUnknownSession
	}
	return DropSealedMalformed
}

// refusePlaintext notes which peer's address plaintext came from.
func (b *Bridge) refusePlaintext(src netip.Addr) {
	if r := (*b.tunnel.byAddr.Load())[src]; r != nil {
		if p, ok := b.peers.Load(r.name); ok {
			p.plaintext.Add(1)
		}
	}
}

// resolve finds bridge and place for a datagram from in.src.
func (in *ingress) resolve(vni vxlan.VNI) (Drop, bool) {
	in.forget()
	b := (*in.t.bridges.Load())[vni]
	if b == nil {
		return DropUnknownVNI, false
	}
	if b.cfg.Sealed {
		b.refusePlaintext(in.src.Addr())
		return DropPlaintextRefused, false
	}
	if _, own := (*in.t.self.Load())[in.src.Addr()]; own {
		return DropOwnFrame, false
	}
	from, ok := b.remotes.Load(in.src.Addr())
	if !ok {
		var drop Drop
		if from, drop = b.admit(in.src); from == nil {
			return drop, false
		}
	}
	in.vni, in.b, in.from = vni, b, from
	return 0, true
}

// forget ends the run of datagrams that share bridge and source.
func (in *ingress) forget() {
	in.settle()
	in.b, in.from, in.to, in.session = nil, nil, nil, nil
	in.lastSrc, in.lastDst = noMAC, noMAC
}

// settle adds what was counted to the shared counters: once a run, not once a frame.
func (in *ingress) settle() {
	if in.frames == 0 {
		return
	}
	in.b.received(in.frames, in.bytes)
	in.from.received(in.frames, in.bytes)
	in.frames, in.bytes = 0, 0
}

// deliver hands a frame from the tunnel to the ports; never back into the
// tunnel (split horizon). frame is borrowed until the batch is flushed.
func (in *ingress) deliver(frame []byte, m ether.Meta) {
	if len(frame) < ethernetHeader {
		in.t.drops.add(DropShortFrame)
		return
	}
	dst, src := ether.MACFrom(frame), ether.MACFrom(frame[6:])
	if dst == loopGroup && in.probe(frame) {
		return
	}
	if src != in.lastSrc {
		if !in.learn(src) {
			return
		}
		in.lastSrc = src
	}
	if dst != in.lastDst {
		in.lastDst, in.to = dst, nil
		if !dst.IsMulticast() {
			if p := in.b.fdb.lookup(dst); p != nil {
				if p.port == nil {
					in.lastDst = noMAC
					in.t.drops.add(DropSplitHorizon)
					return
				}
				if p.port.local {
					in.lastDst = noMAC
					in.t.drops.add(DropLocalOnly)
					return
				}
				in.to = p.port
			}
		}
	}
	if in.to == nil {
		in.flood(frame, m, dst.IsMulticast())
		return
	}
	if in.b.clamp.Load() {
		in.b.clampMSS(frame, m, in.from)
	}
	// An uncut super-frame of a foreign VTEP is more than a segment.
	if in.stands && in.queue.picks(frame, ether.FlowHash(frame)) && !in.t.marked(frame) && m.GSO == ether.GSONone {
		in.t.drops.add(DropAQM)
		return
	}
	if !in.large && in.nanos != in.company.last && len(frame) < largeLen && waits(frame) {
		in.company.last = in.nanos
	}
	in.frames++
	in.bytes += len(frame)
	in.merge.Add(in.to, frame, m)
}

// flood hands a frame that is for no port alone to those that may want it.
func (in *ingress) flood(frame []byte, m ether.Meta, group bool) {
	if group {
		in.b.overhear(frame, in.now)
	}
	ports := *in.b.ports.Load()
	members := group && len(ports) > 0 && in.multicast(frame, m)
	only := false
	if !members {
		var ok bool
		if only, ok = in.mayFlood(group); !ok {
			return
		}
	}
	in.frames++
	in.bytes += len(frame)
	switch {
	case members:
		return
	case len(ports) == 0:
		in.t.drops.add(DropNoPort)
	case in.b.clamp.Load():
		in.b.clampMSS(frame, m, in.from)
	}
	for _, p := range ports {
		if !p.local && (!only || p.at.strangers.Load() > 0) {
			in.merge.Add(p, frame, m)
		}
	}
}

// learn notes the source of a frame and says whether the frame may go on.
func (in *ingress) learn(src ether.MAC) bool {
	if !src.IsValid() {
		in.t.drops.add(DropBadSource)
		return false
	}
	switch in.b.fdb.learn(src, in.from, in.now) {
	case fixed: // the MAC of one of our own devices
		in.t.drops.add(DropOwnFrame)
		return false
	case claimed:
		in.t.drops.add(DropMovedSource)
		in.b.contradicted(in.from, in.now)
		return false
	case frozen:
		in.t.drops.add(DropFrozen)
		return false
	case limited:
		in.t.drops.add(DropMACLimit)
	}
	return true
}

// DeliverFlood takes a BUM frame that the VTEP from flooded by gossip. frame is
// borrowed until it returns, and may be changed.
func (t *Tunnel) DeliverFlood(from netip.AddrPort, vni vxlan.VNI, frame []byte) {
	in := newIngress(t)
	in.now, in.src = t.now(), from
	if b := t.Bridge(vni); b != nil && b.cfg.Sealed {
		in.flooded(b, frame)
		return
	}
	if drop, ok := in.resolve(vni); !ok {
		t.drops.add(drop)
		return
	}
	in.deliver(frame, ether.Meta{})
	in.settle()
	in.merge.Flush()
}

// flooded takes a frame of a sealed overlay that gossip brought.
func (in *ingress) flooded(b *Bridge, sealed []byte) {
	keys := b.gossip.Load()
	if keys == nil {
		in.t.drops.add(DropUnknownSession)
		return
	}
	f, err := keys.open.Open(sealed, b.floodContext())
	if err != nil {
		in.t.drops.add(dropOf(err))
		return
	}
	from, ok := b.peers.Load(f.Sender)
	if !ok {
		in.t.drops.add(DropUnknownVTEP)
		return
	}
	in.b, in.from, in.vni = b, from, b.cfg.VNI
	in.deliver(f.Frame, ether.Meta{})
	in.settle()
	in.merge.Flush()
}
