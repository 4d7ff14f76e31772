package bridge

import (
	"sync/atomic"
	"time"

	"github.com/tulle-net/tulle/ether"
	"github.com/tulle-net/tulle/tap"
)

// Rate is a bound on bandwidth; the zero Rate is none.
type Rate struct {
	BitsPerSecond uint64
	// BurstBits may pass at once after a pause; default: a tenth of a second's. It is
	// a super-frame at least, and one second's at most.
	BurstBits uint64
}

// Limits bound what a port carries. Frames from the device wait in its queue, where
// they are in nobody's way; those to it are dropped (DropPortLimit), for what the
// tunnel brings cannot wait without keeping others waiting.
type Limits struct{ ToDevice, FromDevice Rate }

const (
	// minBurst holds one super-frame, in bytes.
	minBurst = 64 << 10
	// maxRate in bits a second keeps the arithmetic of a bucket within 64 bits.
	maxRate = 1 << 42
	// maxPause bounds one sleep: a worker has to notice that its device is gone.
	maxPause = 100 * time.Millisecond
)

// bucket is a token bucket: lock-free, for several workers. It says when it will be
// full again (the generic cell rate algorithm), which is one number.
type bucket struct {
	full  atomic.Int64 // nanoseconds since start
	start time.Time
	burst int64 // nanoseconds that the burst lasts at the rate
	rate  uint64
}

// newBucket returns nil for no limit.
func newBucket(r Rate, start time.Time) *bucket {
	if r.BitsPerSecond == 0 {
		return nil
	}
	rate := min(r.BitsPerSecond, maxRate)
	burst := r.BurstBits
	if burst == 0 {
		burst = rate / 10
	}
	burst = max(min(burst, rate), minBurst*8)
	b := &bucket{start: start, rate: rate}
	b.burst = int64(float64(burst) / float64(rate) * float64(time.Second))
	return b
}

// cost is how long so many bytes take at the rate.
func (b *bucket) cost(bytes int) int64 {
	return int64(float64(bytes) * 8 / float64(b.rate) * float64(time.Second))
}

// take takes bytes, if anything is left: the last frame may take more than that.
func (b *bucket) take(bytes int) bool {
	now, cost := int64(time.Since(b.start)), b.cost(bytes)
	for {
		full := b.full.Load()
		if full-now > b.burst {
			return false
		}
		if b.full.CompareAndSwap(full, max(full, now)+cost) {
			return true
		}
	}
}

// owe takes bytes that have passed already.
func (b *bucket) owe(bytes int) {
	now, cost := int64(time.Since(b.start)), b.cost(bytes)
	for {
		full := b.full.Load()
		if b.full.CompareAndSwap(full, max(full, now)+cost) {
			return
		}
	}
}

// wait returns how long nothing is left; 0 or less: something is.
func (b *bucket) wait() time.Duration {
	return time.Duration(b.full.Load() - int64(time.Since(b.start)) - b.burst)
}

// portLimits are what a limited port has.
type portLimits struct {
	to, from *bucket
	gone     chan struct{} // closed when the port is removed
}

func newPortLimits(l Limits) *portLimits {
	if l == (Limits{}) {
		return nil
	}
	now := time.Now()
	return &portLimits{to: newBucket(l.ToDevice, now), from: newBucket(l.FromDevice, now), gone: make(chan struct{})}
}

// wireLen is what a frame is on the wire: a super-frame stands for frames that have
// its headers each.
func wireLen(frame []byte, m ether.Meta) int {
	if m.GSO == ether.GSONone || m.SegmentLen == 0 || int(m.HeaderLen) >= len(frame) {
		return len(frame)
	}
	more := (len(frame) - int(m.HeaderLen) - 1) / int(m.SegmentLen)
	return len(frame) + more*int(m.HeaderLen)
}

// admits reports whether a frame may go to the port's device; one that may not is counted.
func (p *Port) admits(frame []byte, m ether.Meta) bool {
	if p.limits == nil || p.limits.to == nil || p.limits.to.take(wireLen(frame, m)) {
		return true
	}
	p.bridge.tunnel.drops.add(DropPortLimit)
	return false
}

// owes notes frames that the port's worker has read; true: it has to pause after them.
func (p *Port) owes(frames []tap.Frame) bool {
	from := p.limits.from
	if from == nil {
		return false
	}
	bytes := 0
	for i := range frames {
		bytes += wireLen(frames[i].B, frames[i].Meta)
	}
	from.owe(bytes)
	return from.wait() > 0
}

// pause waits while nothing may leave the port's device, for maxPause at most, or
// until the port is removed; false: there was nothing to wait for.
func (p *Port) pause() bool {
	from := p.limits.from
	if from == nil {
		return false
	}
	d := from.wait()
	if d <= 0 {
		return false
	}
	t := time.NewTimer(min(d, maxPause))
	defer t.Stop()
	select {
	case <-t.C:
	case <-p.limits.gone:
	}
	return true
}
