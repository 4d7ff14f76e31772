package bridge

import (
	"github.com/tulle-net/tulle/crypto"
	"github.com/tulle-net/tulle/ether"
	"github.com/tulle-net/tulle/tap"
	"github.com/tulle-net/tulle/underlay"
	"github.com/tulle-net/tulle/vxlan"
)

// The functions in this file stand in the order in which a frame passes them.

// lane is the memory of an egress worker that is awake; an idle one holds none,
// so that hundreds of TAPs cost little.
type lane struct {
	backlog
	tx    underlay.Sender
	cut   ether.Segmenter
	parts [1][]byte
	now   int64
	from  *Port // whose frames these are
	queue *aqm  // the queue that they come from, while it stands

	scratch crypto.Scratch
	answer  []byte // memory of what the sender of a frame that is too large is told
}

// egress is one worker: a queue of a TAP → tunnel.
type egress struct {
	q       tap.Queue
	queue   aqm
	company company
}

// run is the worker of one queue, until the device is gone.
func (p *Port) run(q tap.Queue) {
	defer p.done.Done()
	defer p.ended()
	t := p.bridge.tunnel
	w := &egress{q: q}
	for q.Wait() == nil {
		if p.limits != nil && p.pause() {
			continue // the device may be gone meanwhile
		}
		l := t.lanes.Get().(*lane)
		there := p.drain(w, l)
		l.queue = nil
		if !there {
			return
		}
		t.lanes.Put(l)
	}
}

// drain forwards what waits in the queue, or as much of it as the port's limit lets
// through; it reports whether the device is still there.
func (p *Port) drain(w *egress, l *lane) bool {
	t := p.bridge.tunnel
	for {
		there, enough := p.readOn(w, l)
		if len(l.held) == 0 {
			if there && !enough {
				w.queue.drained()
			}
			return there
		}
		b := l.oldest(&t.batches)
		for i := range b.Frames {
			if f := &b.Frames[i]; f.B != nil {
				l.leaves(f.B) // first: forwarding changes it
				p.forward(l, f)
			}
		}
		l.tx.Flush()
		l.done(&t.batches, b)
		w.company.giveWay(t.nanos())
	}
}

// readOn reads until the queue is empty or enough is held, and forwards what need not
// wait: all, where nobody waits. It reports whether the device is there, and whether the
// port's limit ended it.
func (p *Port) readOn(w *egress, l *lane) (there, enough bool) {
	t := p.bridge.tunnel
	limited := p.limits != nil && p.limits.from != nil
	for ahead := 0; len(l.held) == 0 || !l.full(&t.batches) && ahead < maxAhead; {
		b := l.spare(&t.batches)
		if err := w.q.Read(b); err != nil {
			if err == tap.ErrClosed {
				return false, false
			}
			t.drops.add(DropTapRead)
		}
		if len(b.Frames) == 0 {
			l.done(&t.batches, b)
			return true, false
		}
		nanos := t.nanos()
		l.now, l.from = nanos/int64(tick), p
		w.notes(t, b.Frames, nanos)
		// A port with a limit reads no more than that: its queue is not seen empty.
		if l.queue = nil; !t.cfg.NoAQM && !limited && w.queue.stands(nanos) {
			l.queue = &w.queue
		}
		if limited {
			enough = p.owes(b.Frames) // first: forwarding changes them
		}
		if len(l.held) == 0 && (limited || !w.company.there(nanos)) {
			for i := range b.Frames {
				p.forward(l, &b.Frames[i])
			}
			// Now, not with the next frames: a super-frame fills a train, and the
			// receiver should work on it while we read on.
			l.tx.Flush()
			l.done(&t.batches, b)
		} else {
			ahead += p.goAhead(l, b)
		}
		if enough {
			return true, true
		}
	}
	return true, false
}

// goAhead forwards those frames that need not wait, and holds the others; it returns how
// many it has forwarded.
func (p *Port) goAhead(l *lane, b *tap.Batch) (ahead int) {
	for i := range b.Frames {
		if f := &b.Frames[i]; l.passes(f.B) {
			p.forward(l, f)
			f.B = nil
			ahead++
		}
	}
	if ahead > 0 {
		l.tx.Flush()
	}
	if all := &p.bridge.tunnel.batches; ahead == len(b.Frames) {
		l.done(all, b)
	} else {
		l.hold(all, b)
	}
	return ahead
}

// forward switches one frame from the port p.
func (p *Port) forward(l *lane, f *tap.Frame) {
	b := p.bridge
	if len(f.B) < ethernetHeader {
		b.tunnel.drops.add(DropShortFrame)
		return
	}
	dst, src := ether.MACFrom(f.B), ether.MACFrom(f.B[6:])
	if !src.IsValid() {
		b.tunnel.drops.add(DropBadSource)
		return
	}
	if (dst == loopGroup || p.blocked.Load()) && p.guarded(f.B, l.now) {
		return
	}
	switch b.fdb.learn(src, p.at, l.now) {
	case fresh, moved:
		p.stranger(l.now)
	case fixed: // the MAC of another of our ports
		b.tunnel.drops.add(DropOwnFrame)
		return
	case claimed:
		b.tunnel.drops.add(DropMovedSource)
		return
	case frozen:
		b.tunnel.drops.add(DropFrozen)
		return
	case limited:
		b.tunnel.drops.add(DropMACLimit)
	}
	var to *place
	if !dst.IsMulticast() {
		to = b.fdb.lookup(dst)
	}
	switch {
	case to == nil:
		if dst.IsMulticast() {
			p.toGroup(l, f)
		} else if who := p.unknownUnicast(); p.mayFlood(f, l.now) {
			p.floodFrame(l, f, who)
		}
	case to == p.at:
		b.tunnel.drops.add(DropSamePort)
	case to.port != nil:
		// Local: the super-frame passes whole.
		l.parts[0] = f.B
		to.port.WriteFrame(f.Meta, l.parts[:])
	case p.local:
		b.tunnel.drops.add(DropLocalOnly)
	case len(f.B) <= maxNeighbour && p.verified(l, f.B, dst):
	default:
		b.encap(l, to, f, ether.FlowHash(f.B), true)
	}
}

// floodFrame sends a BUM frame to every other port and, unless its own is local, to
// the flood list: to those of them that who says.
func (p *Port) floodFrame(l *lane, f *tap.Frame, who reach) {
	b := p.bridge
	l.parts[0] = f.B
	left := 0
	for _, other := range *b.ports.Load() {
		if other != p && (who != strangers || other.at.strangers.Load() > 0) {
			other.WriteFrame(f.Meta, l.parts[:])
			left++
		}
	}
	list := *b.flood.Load()
	if who != everyone && !p.local {
		left += incomplete(list)
	}
	if who == strangers && left == 0 {
		b.tunnel.drops.add(DropUnknownUnicast)
		return
	}
	p.floodTunnel(l, f, who)
}

// floodTunnel sends a BUM frame to those of the flood list that who says, unless the
// port is local.
func (p *Port) floodTunnel(l *lane, f *tap.Frame, who reach) {
	b := p.bridge
	if p.local {
		return
	}
	// Before the list is looked at: whoever joins it in between may get the frame
	// twice, as broadcasts may, but not never.
	b.early.remember(l, f)
	list := *b.flood.Load()
	n := len(list)
	if who != everyone {
		n = incomplete(list)
	}
	if n == 0 {
		return
	}
	b.Flooded.Add(1)
	// Gossip reaches all: what is not for all goes by itself.
	byGossip := f.Meta == (ether.Meta{}) && n == len(list) && b.floodGossip(f.B)
	if byGossip {
		b.sent(1, len(f.B))
	}
	flow := ether.FlowHash(f.B)
	for i, to := range list {
		// A foreign VTEP hears no gossip.
		if (!byGossip || to.listed) && (who == everyone || !to.complete.Load()) {
			b.encap(l, to, f, flow, i == len(list)-1)
		}
	}
}

// incomplete counts those whose tables do not name all their stations.
func incomplete(list []*place) (n int) {
	for _, p := range list {
		if !p.complete.Load() {
			n++
		}
	}
	return n
}

// encap cuts a frame into what the wire takes and commits each piece, with its
// VXLAN header, to the train for to; last: f is not needed any more.
func (b *Bridge) encap(l *lane, to *place, f *tap.Frame, flow uint32, last bool) {
	if b.clamp.Load() {
		b.clampMSS(f.B, f.Meta, to)
	}
	if b.cfg.Sealed {
		b.encapSealed(l, to, f, flow, last)
		return
	}
	l.cut.Unfilled = false
	shed := l.sheds(b, f.B, flow)
	if l.cut.Reset(f.B, f.Meta) != nil {
		b.tunnel.drops.add(DropMalformed)
		return
	}
	room := vxlan.HeaderLen + l.cut.MaxLen()
	if room > to.path.most() {
		b.tooLarge(l, to, f)
		return
	}
	if shed && l.shed(b) {
		return
	}
	entropy := l.entropy(b, f, flow)
	frames, bytes := 0, 0
	for {
		d := l.tx.Reserve(room)
		n := l.cut.Next(d[vxlan.HeaderLen:])
		if n == 0 {
			break
		}
		vxlan.Put(d, b.cfg.VNI)
		l.tx.Commit(to.vtep, entropy, vxlan.HeaderLen+n)
		frames++
		bytes += n
	}
	b.sent(frames, bytes)
	to.sent(frames, bytes)
}

// entropy returns what chooses the source port of a frame. Where its flow gets another one,
// it sends what was committed first: the sender has a train of each port.
func (l *lane) entropy(b *Bridge, f *tap.Frame, flow uint32) uint32 {
	entropy, changed := b.tunnel.apart.entropy(f.B, flow, l.now)
	if changed {
		l.tx.Flush()
	}
	return entropy
}
