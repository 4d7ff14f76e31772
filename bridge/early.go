package bridge

import (
	"slices"
	"sync"

	"github.com/tulle-net/tulle/ether"
	"github.com/tulle-net/tulle/tap"
)

const (
	// maxEarly frames, each of at most maxEarlyBytes, are remembered for those who
	// join the flood list within earlyFor ticks.
	maxEarly      = 16
	maxEarlyBytes = 1518
	earlyFor      = 2 * second
)

// early remembers group-addressed frames of this host that were flooded a moment
// ago, for peers that join the flood list a moment later. The first ARP of a host
// goes out as soon as its device is there, which may be before two nodes have met;
// the kernel would ask again only after a second.
type early struct {
	mu     sync.Mutex
	frames []heldFrame // oldest first; to is not set
}

// remember keeps a copy of a frame. Frames of unknown unicast are none of its
// business: there may be many, and whoever sends them does not stop after one.
func (e *early) remember(l *lane, f *tap.Frame) {
	if len(f.B) > maxEarlyBytes || f.Meta != (ether.Meta{}) || !ether.MACFrom(f.B).IsMulticast() {
		return
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if len(e.frames) == maxEarly {
		e.frames = slices.Delete(e.frames, 0, 1)
	}
	e.frames = append(e.frames, heldFrame{from: l.from, b: slices.Clone(f.B), flow: ether.FlowHash(f.B), at: l.now})
}

// recent returns what was flooded within earlyFor before now, and forgets the rest.
func (e *early) recent(now int64) []heldFrame {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.frames = slices.DeleteFunc(e.frames, func(h heldFrame) bool { return now-h.at > earlyFor })
	return slices.Clone(e.frames)
}

// catchUp sends those that joined the flood list what was flooded just before.
func (b *Bridge) catchUp(joined []*place) {
	frames := b.early.recent(b.tunnel.now())
	if len(joined) == 0 || len(frames) == 0 {
		return
	}
	l := b.tunnel.lanes.Get().(*lane)
	defer b.tunnel.lanes.Put(l)
	for _, h := range frames {
		l.now, l.from = b.tunnel.now(), h.from
		for _, to := range joined {
			b.encap(l, to, &tap.Frame{B: h.b}, h.flow, false)
		}
	}
	l.tx.Flush()
}
