package bridge

import (
	"sync/atomic"
	"time"

	"github.com/tulle-net/tulle/ether"
	"github.com/tulle-net/tulle/tap"
)

// Storm bounds the BUM frames that are flooded, in frames a second; as many may pass at
// once after a pause. 0 is no bound. What a peer sends is bounded by Overlay too, each
// peer's by itself. Of a super-frame all its frames count.
type Storm struct {
	Port    int // from one port
	Overlay int // from all ports
}

// SetStorm changes Config.Storm.
func (b *Bridge) SetStorm(s Storm) { b.storm.Store(&s) }

// meter is a token bucket of frames, on the clock of a worker's batch. The zero meter is
// full. It is safe for concurrent use and takes no lock.
type meter struct {
	full atomic.Int64 // nanoseconds on the Tunnel's clock
}

// take takes frames at the tick now, if anything is left of burst: the last may take more.
func (m *meter) take(now int64, frames, perSecond, burst int) bool {
	now *= int64(tick)
	each := int64(time.Second) / int64(perSecond)
	for {
		full := m.full.Load()
		if full-now >= int64(burst)*each {
			return false
		}
		if m.full.CompareAndSwap(full, max(full, now)+int64(frames)*each) {
			return true
		}
	}
}

// mayFlood takes it from the bounds that a frame of this port is flooded; one that is not
// is counted.
func (p *Port) mayFlood(f *tap.Frame, now int64) bool {
	s, n := p.bridge.storm.Load(), 1
	if f.Meta.GSO != ether.GSONone && f.Meta.SegmentLen > 0 {
		n = max(len(f.B)-int(f.Meta.HeaderLen)-1, 0)/int(f.Meta.SegmentLen) + 1
	}
	if s.Port > 0 && !p.at.bum.take(now, n, s.Port, s.Port) || s.Overlay > 0 && !p.bridge.bum.take(now, n, s.Overlay, s.Overlay) {
		p.bridge.tunnel.drops.add(DropBUMLimit)
		return false
	}
	return true
}

// mayFlood takes it from the sender's bound that a frame from the tunnel goes to all
// ports, and says whether it does: to those with strangers alone, if only is true.
func (in *ingress) mayFlood(group bool) (only, ok bool) {
	b := in.b
	if s := b.storm.Load(); s.Overlay > 0 && !in.from.bum.take(in.now, 1, s.Overlay, s.Overlay) {
		in.t.drops.add(DropBUMLimit)
		return false, false
	}
	if group {
		return false, true
	}
	ports := *b.ports.Load()
	if len(ports) == 0 || !b.dir.certain.Load() {
		return false, true
	}
	for _, p := range ports {
		if !p.local && p.at.strangers.Load() > 0 {
			return true, true
		}
	}
	in.t.drops.add(DropUnknownUnicast)
	return false, false
}
