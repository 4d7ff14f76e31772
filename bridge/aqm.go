package bridge

import (
	"math"
	"time"

	"github.com/tulle-net/tulle/ether"
)

// The control law is CoDel's (RFC 8289, section 3.3) with another measure: neither a TAP
// nor a socket tells how long a frame has waited, so a queue stands while it is not once
// seen empty.
const (
	// aqmAfter is how long a queue stands before a sender is told, then again after
	// aqmAfter/√n. CoDel's interval is ten times that, for the round trips of the
	// Internet; a sender that hears of it later than it is told again slows down once.
	aqmAfter = int64(10 * time.Millisecond)
	// aqmMemory is how long the pace outlives the last telling.
	aqmMemory = 16 * aqmAfter
	// aqmMost bounds the pace, for senders that do not listen: 800 a second.
	aqmMost = 64
	// aqmShare: of a stream it is one large frame in so many at most.
	aqmShare = 32
	// largeLen is a frame that a sender fills; super-frames are longer.
	largeLen = 1000
	// aqmFlows is how many flows are told apart, by their hash.
	aqmFlows = 1024
	// aqmSpan is how long bytes are counted, and how long somebody is thought to be there
	// after a frame; a flow of aqmBulk bytes in it fills the queue.
	aqmSpan = int64(time.Second)
	aqmBulk = 256 << 10
)

// aqm is active queue management (RFC 7567) of one queue that a worker reads. Where it is
// TCP streams that fill the queue, and others wait in it, too, the streams are told to slow
// down: a frame is marked (RFC 3168), or loses a segment where its ends do not speak ECN. A
// stream that has the queue for itself is left alone: it would only get slower.
type aqm struct {
	now   int64 // nanoseconds, of this batch
	since int64 // when the queue was first seen not to be empty; 0: it is empty
	told  int64 // since, when a sender was last told
	next  int64 // when one may be told again
	count int   // how often one was, without a pause of aqmMemory

	flows     *[aqmFlows]aqmFlow // by their hash; nil: the queue never stood
	tcp, all  aqmCount           // what large frames of TCP carry, and all frames
	other     int64              // when a flow that is not bulk had a frame; 0: never
	otherFlow uint32
}

// aqmFlow is what one flow has in the queue, or a few of one hash.
type aqmFlow struct {
	aqmCount
	large uint32 // frames since it was told
}

// aqmCount counts bytes of one span, and remembers those of the span before.
type aqmCount struct {
	span          int64
	bytes, before uint64
}

// add counts bytes at now, and returns how many there were in the last one to two spans.
func (c *aqmCount) add(now int64, n int) uint64 {
	if span := now / aqmSpan; span != c.span {
		if c.before = 0; span == c.span+1 {
			c.before = c.bytes
		}
		c.span, c.bytes = span, 0
	}
	c.bytes += uint64(n)
	return c.bytes + c.before
}

// drained: the queue is empty.
func (q *aqm) drained() { q.since = 0 }

// stands is told of each batch that the queue gives, before it is worked on, and reports
// whether picks wants to see its frames.
func (q *aqm) stands(now int64) bool {
	if q.since == 0 {
		q.since = now
	}
	q.now = now
	if now-q.since < aqmAfter {
		return false
	}
	if q.flows == nil {
		q.flows = new([aqmFlows]aqmFlow)
	}
	return true
}

// picks reports whether the sender of the frame is to be told to slow down.
func (q *aqm) picks(frame []byte, flow uint32) bool {
	f := &q.flows[flow%aqmFlows]
	bulk := f.add(q.now, len(frame)) >= aqmBulk
	all := q.all.add(q.now, len(frame))
	if len(frame) < largeLen {
		if !bulk && q.now != q.other && waits(frame) {
			q.other, q.otherFlow = q.now, flow
		}
		return false
	}
	h, ok := ether.ParseHeaders(frame)
	if !ok || h.Proto != ether.ProtoTCP {
		return false
	}
	f.large++
	if 2*q.tcp.add(q.now, len(frame)) < all || !bulk || f.large < aqmShare || q.now < q.next || !q.shared() {
		return false
	}
	if q.now-q.next > aqmMemory {
		q.count = 0
	} else if q.told != q.since { // it was empty in between
		q.count = max(q.count-2, 0)
	}
	q.count, q.told, f.large = min(q.count+1, aqmMost), q.since, 0
	q.next = q.now + int64(float64(aqmAfter)/math.Sqrt(float64(q.count)))
	return true
}

// shared reports whether somebody waits who does not fill the queue.
func (q *aqm) shared() bool {
	return q.other != 0 && q.now-q.other <= aqmSpan && q.flows[q.otherFlow%aqmFlows].add(q.now, 0) < aqmBulk
}

// waits reports whether somebody waits for what a small frame carries: a packet for one
// host that is no mere acknowledgement, nor a neighbour's message.
func waits(frame []byte) bool {
	if frame[0]&1 != 0 {
		return false
	}
	h, ok := ether.ParseHeaders(frame)
	switch {
	case ok && h.Proto == ether.ProtoTCP:
		return uint32(h.Payload) < h.End || frame[h.L4+13]&ether.TCPSyn != 0
	case h.L4 != 0 && h.Proto == ether.ProtoICMPv6 && h.End > uint32(h.L4):
		return frame[h.L4] == echoRequest6 || frame[h.L4] == echoReply6
	}
	return h.L4 != 0
}

// Echo messages of ICMPv6 (RFC 4443, section 4).
const echoRequest6, echoReply6 = 128, 129

// marked tells the ends of a TCP frame, if they speak ECN, and reports whether they do.
func (t *Tunnel) marked(frame []byte) bool {
	h, ok := ether.ParseHeaders(frame)
	if !ok || !ether.MarkCE(frame, h) {
		return false
	}
	t.drops.add(DropAQMMarked)
	return true
}

// sheds reports whether the frame, which is yet to be cut, is to lose its first segment. It
// is asked before the Segmenter reads the frame, which may get a mark.
func (l *lane) sheds(b *Bridge, frame []byte, flow uint32) bool {
	return l.queue != nil && l.queue.picks(frame, flow) && !b.tunnel.marked(frame)
}

// shed drops the first segment of what is to be cut, and reports whether that was all.
func (l *lane) shed(b *Bridge) bool {
	b.tunnel.drops.add(DropAQM)
	if l.cut.Count() == 1 {
		return true
	}
	l.cut.Skip()
	return false
}
