package bridge

import (
	"net/netip"
	"sync/atomic"
	"time"

	"github.com/tulle-net/tulle/ether"
	"github.com/tulle-net/tulle/internal/ready"
	"github.com/tulle-net/tulle/tap"
	"github.com/tulle-net/tulle/underlay"
)

// Where somebody waits in a queue beside those who fill it, the worker works as FQ-CoDel
// does (RFC 8290) with two queues: it reads on before it works on what is large, and what
// is small goes ahead, unless something of its own flow is held, which it may not overtake.
// It gives way to other threads, too, for who waits needs the processors of both nodes
// several times. Without anybody who waits it is first come, first served: reading on
// leaves a stream's bytes to get cold in the cache, and giving way costs it turns.
const (
	// companyFor is how long somebody is thought to be there after a small frame: who
	// comes more seldom than that is not worth it.
	companyFor = int64(100 * time.Millisecond)
	// keepFor is how long after that the memory for it is kept.
	keepFor = int64(10 * time.Second)
	// wayEvery is how often a worker gives way.
	wayEvery = int64(300 * time.Microsecond)
	// maxAhead bounds how much goes ahead before the oldest that is held goes.
	maxAhead = 64
	// heldFlows is how many flows are told apart, by a hash.
	heldFlows = 1 << 10
	// apartFor is how long a flow has source ports of those with large frames, after one.
	apartFor = second
	// maxHeld bounds what an egress worker holds: 4 MiB in batches of 128 KiB, each of
	// which has a super-frame, or 64 frames.
	maxHeld = 32
	// heldMemory is what an ingress worker holds.
	heldMemory = 4 << 20
	// heldTurn is how much of it is delivered before the worker reads on: two super-frames.
	heldTurn = 128 << 10
)

// company remembers when a queue last had a small frame that somebody waits for.
type company struct {
	last int64 // nanoseconds; 0: never
	way  int64 // when the worker last gave way
}

// sees is told of a frame.
func (c *company) sees(frame []byte, now int64) {
	if len(frame) < largeLen && len(frame) >= ethernetHeader && now != c.last && waits(frame) {
		c.last = now
	}
}

// there reports whether somebody waits.
func (c *company) there(now int64) bool { return c.last != 0 && now-c.last < companyFor }

// gone reports whether nobody has waited for so long that no memory is kept for it.
func (c *company) gone(now int64) bool { return now-c.last >= keepFor }

// giveWay lets others have the worker's processor, if they want it.
func (c *company) giveWay(now int64) {
	if c.there(now) && now-c.way >= wayEvery {
		c.way = now
		ready.Yield()
	}
}

// backlog is what an egress worker has read and not forwarded yet.
type backlog struct {
	held  []*tap.Batch // the oldest first; a frame that went ahead has no B
	free  []*tap.Batch
	flows [heldFlows]uint16 // frames held
}

// spare returns memory for another Read.
func (l *backlog) spare() *tap.Batch {
	n := len(l.free)
	if n == 0 {
		return tap.NewBatch()
	}
	b := l.free[n-1]
	l.free = l.free[:n-1]
	return b
}

// oldest takes the batch that was held longest; done gives it back.
func (l *backlog) oldest() *tap.Batch {
	b := l.held[0]
	l.held = l.held[:copy(l.held, l.held[1:])]
	return b
}

func (l *backlog) done(b *tap.Batch) { l.free = append(l.free, b) }

// trim gives up the memory for more than one Read.
func (l *backlog) trim() {
	clear(l.free[1:])
	l.free = l.free[:1]
}

// full reports whether the worker has read on far enough.
func (l *backlog) full() bool { return len(l.held) >= maxHeld }

// passes reports whether a frame may go ahead of what is held; if not, it is held.
func (l *backlog) passes(frame []byte) bool {
	n := &l.flows[ether.FlowHash(frame)%heldFlows]
	if *n == 0 && len(frame) < largeLen {
		return true
	}
	*n++
	return false
}

// leaves: a frame that passes has held is to be forwarded.
func (l *backlog) leaves(frame []byte) { l.flows[ether.FlowHash(frame)%heldFlows]-- }

// heldSlots is what an ingress worker has received and not delivered yet. They are copies:
// the slots that it receives into are of 64 KiB each, whatever is in them.
type heldSlots struct {
	slots  []heldSlot // the oldest first
	memory []byte     // theirs: a ring
	tail   int        // where in it the newest ends
	bytes  int
	flows  [heldFlows]uint16 // slots, by where they are from
}

type heldSlot struct {
	underlay.Slot
	at int // where in the ring it begins
}

// passes reports whether a slot may go ahead of what is held: it is small, and nothing is
// held from its source port, which stands for the flow (RFC 7348, section 5).
func (h *heldSlots) passes(s *underlay.Slot) bool {
	return len(s.B) < largeLen && h.flows[sourceOf(s.Src)] == 0 || len(s.B) == 0
}

// hold keeps a copy of a slot that is not empty; false: there is no room.
func (h *heldSlots) hold(s *underlay.Slot) bool {
	if h.memory == nil {
		h.memory = make([]byte, heldMemory)
	}
	n, at := len(s.B), 0
	if len(h.slots) > 0 {
		switch head := h.slots[0].at; { // never where the newest ends: that would be an empty ring
		case h.tail > head && n <= len(h.memory)-h.tail, h.tail < head && n < head-h.tail:
			at = h.tail
		case h.tail > head && n < head:
		default:
			return false
		}
	}
	h.tail = at + copy(h.memory[at:], s.B)
	h.slots = append(h.slots, heldSlot{underlay.Slot{Src: s.Src, B: h.memory[at:h.tail:h.tail], SegmentLen: s.SegmentLen}, at})
	h.bytes += n
	h.flows[sourceOf(s.Src)]++
	return true
}

// full reports whether the worker has read on far enough: there is room for as much again.
func (h *heldSlots) full() bool { return h.bytes >= heldMemory/2 }

// leaves: the n oldest have been delivered.
func (h *heldSlots) leaves(n int) {
	for _, s := range h.slots[:n] {
		h.bytes -= len(s.B)
		h.flows[sourceOf(s.Src)]--
	}
	h.slots = h.slots[:copy(h.slots, h.slots[n:])]
}

// sourceOf is a hash of an address and port, of heldFlows values.
func sourceOf(a netip.AddrPort) uint16 {
	ip := a.Addr().As16()
	return (a.Port() ^ uint16(ip[15])<<2) % heldFlows
}

// apart knows which flows have large frames, of all workers: these get half of the source
// ports, and all others the other half, so that what is small may go ahead at the receiver,
// too. The index is a flow's hash, the value the tick until which it is one of them.
type apart [heldFlows]atomic.Int64

// entropy returns what chooses the source port of a frame.
func (a *apart) entropy(frame []byte, flow uint32, now int64) uint32 {
	until := &a[flow%heldFlows]
	if t := until.Load(); len(frame) < largeLen {
		if t <= now {
			return flow << 1
		}
	} else if next := now + apartFor; t < next { // a store a tick is enough
		until.Store(next)
	}
	return flow<<1 | 1
}
