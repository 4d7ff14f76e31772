package bridge

import (
	"encoding/binary"
	"slices"

	"github.com/tulle-net/tulle/crypto"
	"github.com/tulle-net/tulle/ether"
	"github.com/tulle-net/tulle/tap"
	"github.com/tulle-net/tulle/vxlan"
)

// The functions in this file stand in the order in which a frame passes them.
// What leaves here was written by crypto.Sealer.Seal: there is no other way out
// of a sealed overlay.

const (
	// MaxWaiting frames of MaxWaitingBytes wait for a session with a peer; the
	// oldest make room.
	MaxWaiting      = 64
	MaxWaitingBytes = 256 << 10
	// maxWait is how long a frame waits at most, in ticks.
	maxWait = 5 * second
	// sealedRoom is what a sealed datagram has before the inner frame.
	sealedRoom = crypto.SealedHeaderLen + vxlan.HeaderLen
)

// heldFrame is a frame that waits, and its flow.
type heldFrame struct {
	from *Port
	to   *place
	b    []byte
	meta ether.Meta
	flow uint32
	at   int64 // tick at which it came
}

// encapSealed seals a frame for a peer, or has it wait for a session.
// The last of those that the frame goes to may use up its memory.
func (b *Bridge) encapSealed(l *lane, to *place, f *tap.Frame, flow uint32, last bool) {
	head := f.Head
	if !last {
		head = nil
	}
	if tx := to.tx.Load(); tx != nil && b.seal(l, to, tx, f, head, flow) {
		return
	}
	if tx := to.peer.waiting.hold(b, l.from, to, f, flow); tx != nil { // it came meanwhile
		b.seal(l, to, tx, f, head, flow)
	}
}

// seal cuts a frame into what the wire takes and seals each piece, with its VXLAN
// header, into the train for to. Where head is f's memory with the room before it
// (tap.Frame.Head), it is used up: the payload is then read once, where the TAP
// left it, and written once, sealed. It is false when tx is used up.
func (b *Bridge) seal(l *lane, to *place, tx *crypto.Sealer, f *tap.Frame, head []byte, flow uint32) bool {
	l.cut.Unfilled = true // the AEAD authenticates: nobody need sum the payload
	shed := l.sheds(b, f.B, flow)
	if l.cut.Reset(f.B, f.Meta) != nil {
		b.tunnel.drops.add(DropMalformed)
		return true
	}
	room := sealedRoom + l.cut.MaxLen() + crypto.TagLen
	if room > to.path.most() {
		b.tooLarge(l, to, f)
		return true
	}
	count := l.cut.Count()
	counter, ok := tx.Reserve(count)
	if !ok {
		to.tx.CompareAndSwap(tx, nil)
		return false
	}
	if shed { // its counter is not used
		if l.shed(b) {
			return true
		}
		count--
	}
	flags := byte(0)
	if l.cut.Partial() {
		flags = crypto.FlagUnfilled
	}
	dst, entropy := to.address(), l.entropy(b, f, flow)
	bytes := 0
	for range count {
		d := l.tx.Reserve(room)
		var inner []byte // room for a VXLAN header, and the frame
		if head != nil {
			inner = l.cut.NextInPlace(head)
		} else {
			inner = d[crypto.SealedHeaderLen : sealedRoom+l.cut.Next(d[sealedRoom:])]
		}
		vxlan.Put(inner, b.cfg.VNI)
		n := tx.Seal(&l.scratch, d, counter, flags, inner)
		if n == 0 { // dropped meanwhile, with its key
			b.tunnel.drops.add(DropNoSession)
			return true
		}
		l.tx.Commit(dst, entropy, n)
		counter++
		bytes += len(inner) - vxlan.HeaderLen
	}
	b.sent(count, bytes)
	to.sent(count, bytes)
	return true
}

// hold keeps a copy of the frame, unless there is a session by now, which it returns.
func (w *waiting) hold(b *Bridge, from *Port, to *place, f *tap.Frame, flow uint32) *crypto.Sealer {
	w.mu.Lock()
	defer w.mu.Unlock()
	if tx := to.tx.Load(); tx != nil {
		return tx
	}
	if to.gone.Load() {
		b.tunnel.drops.add(DropNoSession)
		return nil
	}
	w.frames = append(w.frames, heldFrame{from, to, slices.Clone(f.B), f.Meta, flow, b.tunnel.now()})
	w.bytes += len(f.B)
	for len(w.frames) > MaxWaiting || w.bytes > MaxWaitingBytes {
		i := w.oldest()
		w.bytes -= len(w.frames[i].b)
		w.frames = slices.Delete(w.frames, i, i+1)
		b.tunnel.drops.add(DropNoSession)
	}
	if b.tunnel.cfg.Want != nil {
		b.tunnel.cfg.Want(to.peer.name, b.cfg.Name)
	}
	return nil
}

// oldest returns the frame that makes room: the oldest of the overlay that has the
// most waiting, so that one tenant's traffic does not push out another's.
func (w *waiting) oldest() int {
	most, at := 0, 0
	for i := range w.frames {
		if most > 0 && w.frames[i].to == w.frames[at].to {
			continue
		}
		n := 0
		for j := range w.frames {
			if w.frames[j].to == w.frames[i].to {
				n++
			}
		}
		if n > most { // the first of its place: a later one counts no more
			most, at = n, i
		}
	}
	return at
}

// flush seals with tx what waits for to, and then everything that follows.
func (w *waiting) flush(t *Tunnel, to *place, tx *crypto.Sealer) {
	w.mu.Lock()
	defer w.mu.Unlock()
	l := t.lanes.Get().(*lane)
	defer t.lanes.Put(l)
	rest := w.frames[:0]
	for _, h := range w.frames {
		if h.to != to {
			rest = append(rest, h)
			continue
		}
		w.bytes -= len(h.b)
		l.now, l.from = t.now(), h.from
		if l.now-h.at > maxWait { // whoever sent it has given up
			t.drops.add(DropNoSession)
			continue
		}
		if !to.bridge.seal(l, to, tx, &tap.Frame{B: h.b, Meta: h.meta}, nil, h.flow) {
			t.drops.add(DropNoSession)
		}
	}
	clear(w.frames[len(rest):])
	w.frames = rest
	l.tx.Flush()
	to.tx.Store(tx)
}

// count returns how many frames wait for to.
func (w *waiting) count(to *place) (n int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for i := range w.frames {
		if w.frames[i].to == to {
			n++
		}
	}
	return n
}

// drop forgets what waits for to: it is no peer any more.
func (w *waiting) drop(to *place) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.frames = slices.DeleteFunc(w.frames, func(h heldFrame) bool {
		if h.to == to {
			w.bytes -= len(h.b)
		}
		return h.to == to
	})
}

// floodKeys seal and open the frames of an overlay that gossip floods.
type floodKeys struct {
	seal *crypto.FloodSealer
	open *crypto.FloodOpener
}

// SetFloodKey has frames that gossip floods sealed with k, a crypto.FloodKey, of
// which a copy is kept; self is this node's name, and sequences start behind
// after (see crypto.NewFloodSealer). Before, none are flooded by gossip.
func (b *Bridge) SetFloodKey(k crypto.Key, self string, after uint64) error {
	seal, err := crypto.NewFloodSealer(k, self, after)
	if err != nil {
		return err
	}
	open, err := crypto.NewFloodOpener(k, func(sender string) bool {
		_, ok := b.peers.Load(sender)
		return ok
	})
	if err != nil {
		return err
	}
	b.gossip.Store(&floodKeys{seal, open})
	return nil
}

// DropFloodKey ends what SetFloodKey began: this node has the overlay's key no more.
func (b *Bridge) DropFloodKey() { b.gossip.Store(nil) }

// floodGossip offers a BUM frame to gossip, sealed if the overlay is; false: it
// has to go to each member.
func (b *Bridge) floodGossip(frame []byte) bool {
	if b.cfg.FloodGossip == nil {
		return false
	}
	if !b.cfg.Sealed {
		return b.cfg.FloodGossip(b.cfg.VNI, frame)
	}
	keys := b.gossip.Load()
	return keys != nil && b.cfg.FloodGossip(b.cfg.VNI, keys.seal.Seal(nil, frame, b.floodContext()))
}

// floodContext binds a flooded frame to its overlay.
func (b *Bridge) floodContext() []byte { return binary.BigEndian.AppendUint32(nil, uint32(b.cfg.VNI)) }
