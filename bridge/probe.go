package bridge

import (
	"encoding/binary"
	"net/netip"

	"github.com/tulle-net/tulle/crypto"
)

// Probes and their acknowledgements travel in the sessions of sealed overlays,
// marked crypto.FlagControl, so that nobody else can make them up:
//
//	 0      1   2         4           6
//	| type | 0 | id (16) | size (16) | padding, zero
//
// size is of the IP packet that the probe is; the acknowledgement repeats id and size.
const (
	controlLen   = 6
	controlProbe = 1
	controlAck   = 2
)

// control is such a message.
type control struct {
	kind byte
	id   uint16
	size int
}

// put writes c to b, which is all padding behind it.
func (c control) put(b []byte) {
	clear(b)
	b[0] = c.kind
	binary.BigEndian.PutUint16(b[2:], c.id)
	binary.BigEndian.PutUint16(b[4:], uint16(c.size))
}

// parseControl reads a message; false: too short, or none of this release. What
// the padding holds is nobody's concern.
func parseControl(b []byte) (c control, ok bool) {
	if len(b) < controlLen || b[0] != controlProbe && b[0] != controlAck || b[1] != 0 {
		return control{}, false
	}
	return control{b[0], binary.BigEndian.Uint16(b[2:]), int(binary.BigEndian.Uint16(b[4:]))}, true
}

// control takes a message of the peer whose session it came under.
func (in *ingress) control(b []byte, flags byte) {
	c, ok := parseControl(b)
	if !ok || flags != crypto.FlagControl {
		in.t.drops.add(DropControlMessage)
		return
	}
	r := in.from.peer
	if c.kind == controlAck {
		r.search.acknowledged(c.id, c.size)
		return
	}
	// One that claims to be larger than it is would be believed to fit.
	if c.size != len(b)+crypto.SealedOverhead+ipHeaders(in.src.Addr()) || !r.acks.take(in.now) {
		in.t.drops.add(DropControlMessage)
		return
	}
	l := in.t.lanes.Get().(*lane)
	c.kind = controlAck
	l.control(in.from, c, controlLen)
	l.tx.Flush()
	in.t.lanes.Put(l)
}

// control seals c, n bytes with its padding, into the train for the place to. If
// there is no session to send under, nothing is sent: then nothing else is either.
func (l *lane) control(to *place, c control, n int) {
	tx := to.tx.Load()
	if tx == nil {
		return
	}
	counter, ok := tx.Reserve(1)
	if !ok {
		to.tx.CompareAndSwap(tx, nil) // used up: the next frame asks for another
		return
	}
	d := l.tx.Reserve(n + crypto.SealedOverhead)
	body := d[crypto.SealedHeaderLen:][:n]
	c.put(body)
	if n := tx.Seal(&l.scratch, d, counter, crypto.FlagControl, body); n > 0 {
		// Always the same flow, and so one source port: where paths of several MTUs
		// are shared out by flow, probes see one of them.
		// It is one of those of large frames: small ones do not wait behind probes.
		l.tx.Commit(to.address(), 1, n)
	}
}

// prober sends the probes. It belongs to Tunnel.Run.
type prober struct {
	t     *Tunnel
	peers map[*remote]prospect
}

// prospect is what a peer's overlays together say of it.
type prospect struct {
	at     *place // one with a session
	most   int    // bytes of the largest IP packet that the devices' MTU leads to
	frames uint64 // that were sent to it
}

// tick is called once a second, the PROBE_TIMER (RFC 8899, section 5.1.1).
func (p *prober) tick(now int64) {
	if p.peers == nil {
		p.peers = map[*remote]prospect{}
	}
	clear(p.peers)
	for _, b := range *p.t.bridges.Load() {
		mtu := b.mtu()
		if !b.cfg.Sealed || mtu == 0 {
			continue
		}
		b.peers.Range(func(_ string, at *place) bool {
			if at.tx.Load() != nil {
				v := p.peers[at.peer]
				v.at = at
				v.most = max(v.most, mtu+ethernetHeader+b.overhead()+ipHeaders(at.address().Addr()))
				v.frames += at.TxFrames.Load()
				p.peers[at.peer] = v
			}
			return true
		})
	}
	for r, v := range p.peers {
		p.probe(r, v, now)
	}
}

// probe takes one peer's search a step further.
func (p *prober) probe(r *remote, v prospect, now int64) {
	to := v.at.address().Addr()
	r.path.mu.Lock()
	kernel := r.path.kernel
	r.path.mu.Unlock()
	if kernel != 0 {
		v.most = min(v.most, kernel) // more would not even leave this host
	}
	sizes, id, limit := r.search.step(now, min(v.most, maxPacket), v.frames)
	if limit != unchanged && r.path.set(to, func(p *path) { p.probed = limit }) {
		p.t.pathChanged()
	}
	if len(sizes) == 0 {
		return
	}
	l := p.t.lanes.Get().(*lane)
	for _, size := range sizes {
		l.control(v.at, control{controlProbe, id, size}, size-ipHeaders(to)-crypto.SealedOverhead)
	}
	l.tx.Flush()
	p.t.lanes.Put(l)
}

// startOver forgets what is known of the way to r, which is elsewhere now.
func (r *remote) startOver(at netip.Addr) (changed bool) {
	r.search.reset()
	return r.path.set(at, func(p *path) { p.kernel, p.probed = 0, 0 })
}
