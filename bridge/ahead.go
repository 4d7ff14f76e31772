package bridge

import (
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/tulle-net/tulle/crypto"
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
	// keepFor is how long an ingress worker keeps the memory of what it held, in ticks.
	keepFor = 10 * second
	// wayEvery is how often a worker gives way.
	wayEvery = int64(300 * time.Microsecond)
	// maxAhead is how many frames go ahead, and the rest of a read, before the oldest that
	// is held goes.
	maxAhead = 64
	// heldFlows is how many flows are told apart, by a hash.
	heldFlows = 1 << 10
	// apartFor is how long a flow has source ports of those with large frames, after one.
	apartFor = second
	// maxHeld is how many batches the egress workers of a node hold together, but for one
	// each: 4 MiB, and of TUNs 12.
	maxHeld = 32
	// heldMemory is what an ingress worker holds.
	heldMemory = 4 << 20
	// heldDatagrams bounds these, too, and with them those that go ahead of one: they have
	// later counters, and it must not fall out of the replay window meanwhile.
	heldDatagrams = crypto.ReplayWindow / 2
	// heldTurn is how much of it is delivered before the worker reads on: two super-frames.
	heldTurn = 128 << 10
)

// company remembers when a queue last had a small frame that somebody waits for.
type company struct {
	last int64 // nanoseconds; 0: never
	way  int64 // when the worker last gave way
}

// there reports whether somebody waits.
func (c *company) there(now int64) bool { return c.last != 0 && now-c.last < companyFor }

// giveWay lets others have the worker's processor, if they want it.
func (c *company) giveWay(now int64) {
	if c.there(now) && now-c.way >= wayEvery {
		c.way = now
		ready.Yield()
	}
}

// backlog is what an egress worker has read and not forwarded yet.
type backlog struct {
	held  []*tap.Batch      // the oldest first; a frame that went ahead has no B
	own   *tap.Batch        // memory for a Read; nil: it is held, or was never needed
	flows [heldFlows]uint16 // frames held
}

// batches is the memory that backlogs share, beside one batch of each.
type batches struct {
	pool sync.Pool
	held atomic.Int32
}

// spare returns memory for another Read.
func (l *backlog) spare(all *batches) *tap.Batch {
	b := l.own
	if l.own = nil; b != nil {
		return b
	}
	if b, ok := all.pool.Get().(*tap.Batch); ok {
		return b
	}
	return tap.NewBatch()
}

// done gives back what spare or oldest has returned.
func (l *backlog) done(all *batches, b *tap.Batch) {
	if l.own == nil {
		l.own = b
	} else {
		all.pool.Put(b)
	}
}

// hold keeps a batch, some of whose frames passes has held.
func (l *backlog) hold(all *batches, b *tap.Batch) {
	all.held.Add(1)
	l.held = append(l.held, b)
}

// oldest takes the batch that was held longest.
func (l *backlog) oldest(all *batches) *tap.Batch {
	all.held.Add(-1)
	b := l.held[0]
	l.held = slices.Delete(l.held, 0, 1)
	return b
}

// full reports whether the worker has read on far enough.
func (l *backlog) full(all *batches) bool { return len(l.held) > 0 && all.held.Load() >= maxHeld }

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
	used   int64      // tick at which something was last held
	tail   int        // where in the ring the newest ends
	bytes  int
	count  int               // datagrams held
	passed int               // datagrams that went ahead, ever
	flows  [heldFlows]uint16 // slots, by where they are from
	until  [heldFlows]int64  // by the same, the tick until which what is from there is large
}

type heldSlot struct {
	underlay.Slot
	at     int // where in the ring it begins
	count  int // datagrams
	passed int // heldSlots.passed when it came
}

// datagramsOf returns how many a slot has, and how long the first is.
func datagramsOf(s *underlay.Slot) (count, size int) {
	if s.SegmentLen <= 0 || s.SegmentLen >= len(s.B) {
		return 1, len(s.B)
	}
	return (len(s.B) + s.SegmentLen - 1) / s.SegmentLen, s.SegmentLen
}

// large reports whether this slot's datagrams are, or those of its source port lately were.
func (h *heldSlots) large(s *underlay.Slot, now int64) bool {
	until := &h.until[sourceOf(s.Src)]
	if _, size := datagramsOf(s); size >= largeLen {
		*until = now + apartFor
	}
	return now < *until
}

// passes returns how many datagrams of a slot may go ahead of what is held, all or none:
// they are small, and nothing is held from their source port, which stands for the flow
// (RFC 7348, section 5).
func (h *heldSlots) passes(s *underlay.Slot) int {
	count, size := datagramsOf(s)
	switch {
	case len(h.slots) == 0 && size < largeLen, size == 0:
	case size >= largeLen, h.flows[sourceOf(s.Src)] > 0, h.count+h.passed-h.slots[0].passed+count > heldDatagrams:
		return 0
	}
	h.passed += count
	return count
}

// hold keeps a copy of a slot that is not empty; false: there is no room.
func (h *heldSlots) hold(s *underlay.Slot, now int64) bool {
	if h.memory == nil {
		h.memory = make([]byte, heldMemory)
	}
	n, at := len(s.B), 0
	count, _ := datagramsOf(s)
	if len(h.slots) > 0 {
		if h.count+count > heldDatagrams {
			return false
		}
		switch head := h.slots[0].at; { // never where the newest ends: that would be an empty ring
		case h.tail > head && n <= len(h.memory)-h.tail, h.tail < head && n < head-h.tail:
			at = h.tail
		case h.tail > head && n < head:
		default:
			return false
		}
	}
	h.tail = at + copy(h.memory[at:], s.B)
	own := underlay.Slot{Src: s.Src, B: h.memory[at:h.tail:h.tail], SegmentLen: s.SegmentLen}
	h.slots = append(h.slots, heldSlot{own, at, count, h.passed})
	h.used = now
	h.bytes += n
	h.count += count
	h.flows[sourceOf(s.Src)]++
	return true
}

// full reports whether the worker has read on far enough: there is room for as much again.
func (h *heldSlots) full() bool { return h.bytes >= heldMemory/2 || h.count >= heldDatagrams/2 }

// leaves: the n oldest have been delivered.
func (h *heldSlots) leaves(n int) {
	for _, s := range h.slots[:n] {
		h.bytes -= len(s.B)
		h.count -= s.count
		h.flows[sourceOf(s.Src)]--
	}
	h.slots = slices.Delete(h.slots, 0, n)
}

// trim gives up the memory, when it has long not been used.
func (h *heldSlots) trim(now int64) {
	if h.memory != nil && now-h.used >= keepFor {
		h.memory = nil
	}
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

// is reports whether the flow is one of them.
func (a *apart) is(flow uint32, now int64) bool { return now < a[flow%heldFlows].Load() }

// entropy returns what chooses the source port of a frame, and whether its flow has another
// one since the frame before.
func (a *apart) entropy(frame []byte, flow uint32, now int64) (entropy uint32, changed bool) {
	if len(frame) >= largeLen {
		until := &a[flow%heldFlows]
		before := until.Load()
		if before < now+apartFor { // a store a tick is enough
			until.Store(now + apartFor)
		}
		return flow<<1 | 1, before <= now
	}
	if a.is(flow, now) {
		return flow<<1 | 1, false
	}
	return flow << 1, false
}
