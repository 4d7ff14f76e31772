package bridge

import (
	"sync"
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

// Limits bound what a port carries. Frames from the device wait in its own queue, of
// which its worker reads no more than may pass. Those to it are copied and wait here,
// for their worker has others' frames to attend to; what finds no room is dropped
// (DropPortLimit).
type Limits struct{ ToDevice, FromDevice Rate }

const (
	// minBurst holds one super-frame, in bytes.
	minBurst = 64 << 10
	// maxRate in bits a second: more is no limit to any device, and less than what a
	// clock of nanoseconds can tell of small frames.
	maxRate = 100e9
	// minRoom and maxRoom bound what may wait for a device, in bytes; in between it is
	// a tenth of a second's.
	minRoom = 4 * minBurst
	maxRoom = 64 * minBurst
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
	rate := r.BitsPerSecond
	if rate == 0 || rate > maxRate {
		return nil
	}
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
	to   *shaper
	from *bucket
	gone chan struct{} // the port's
}

func newPortLimits(l Limits, gone chan struct{}) *portLimits {
	if l == (Limits{}) {
		return nil
	}
	now := time.Now()
	out := &portLimits{from: newBucket(l.FromDevice, now), gone: gone}
	if b := newBucket(l.ToDevice, now); b != nil {
		room := int(min(max(b.rate/8/10, minRoom), maxRoom))
		out.to = &shaper{bucket: b, room: room, kick: make(chan struct{}, 1)}
	}
	return out
}

// wireLen is what a frame of n bytes is on the wire: a super-frame stands for frames
// that have its headers each.
func wireLen(n int, m ether.Meta) int {
	if m.GSO == ether.GSONone || m.SegmentLen == 0 || int(m.HeaderLen) >= n {
		return n
	}
	return n + (n-int(m.HeaderLen)-1)/int(m.SegmentLen)*int(m.HeaderLen)
}

// shaper holds frames to a device until its bucket lets them pass. Dropping them at
// once would be simpler, but leaves TCP a quarter of the rate.
type shaper struct {
	bucket *bucket
	room   int           // bytes that may wait
	kick   chan struct{} // something waits

	mu    sync.Mutex
	queue []shapedFrame
	bytes int // in queue
}

// shapedFrame is a copy of a frame that waits.
type shapedFrame struct {
	meta ether.Meta
	b    []byte
}

// pass writes a frame, or has it wait; one that finds no room is dropped. The parts
// are borrowed. Writing under the lock keeps the order.
func (s *shaper) pass(p *Port, m ether.Meta, parts [][]byte) {
	n := 0
	for _, part := range parts {
		n += len(part)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.queue) == 0 && s.bucket.take(wireLen(n, m)) {
		p.write(m, parts)
		return
	}
	if s.bytes+n > s.room {
		p.bridge.tunnel.drops.add(DropPortLimit)
		return
	}
	f := shapedFrame{m, make([]byte, 0, n)}
	for _, part := range parts {
		f.b = append(f.b, part...)
	}
	s.queue = append(s.queue, f)
	s.bytes += n
	select {
	case s.kick <- struct{}{}:
	default:
	}
}

// run writes what waits, until the port is removed.
func (s *shaper) run(p *Port) {
	defer p.done.Done()
	t := time.NewTimer(0)
	defer t.Stop()
	for {
		select {
		case <-s.kick:
		case <-t.C:
		case <-p.limits.gone:
			return
		}
		if wait := s.drain(p); wait > 0 {
			t.Reset(wait)
		}
	}
}

// drain writes as much as may pass, and returns how long to wait for the rest; 0:
// there is none.
func (s *shaper) drain(p *Port) time.Duration {
	s.mu.Lock()
	defer s.mu.Unlock()
	var parts [1][]byte
	done := 0
	for done < len(s.queue) && s.bucket.take(wireLen(len(s.queue[done].b), s.queue[done].meta)) {
		f := &s.queue[done]
		parts[0] = f.b
		p.write(f.meta, parts[:])
		s.bytes -= len(f.b)
		f.b = nil
		done++
	}
	if s.queue = s.queue[done:]; len(s.queue) == 0 {
		s.queue = nil
		return 0
	}
	return max(s.bucket.wait(), time.Microsecond)
}

// owes notes frames that the port's worker has read; true: it has to pause after them.
func (p *Port) owes(frames []tap.Frame) bool {
	from := p.limits.from
	if from == nil {
		return false
	}
	bytes := 0
	for i := range frames {
		bytes += wireLen(len(frames[i].B), frames[i].Meta)
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
