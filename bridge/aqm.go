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
	// aqmMemory is how long the pace outlives a queue that has run empty.
	aqmMemory = 16 * aqmAfter
	// aqmMost and aqmShare bound the pace, for senders that do not listen: 800 a second,
	// and one large frame of so many.
	aqmMost  = 64
	aqmShare = 32
	// bulkLen: a flow with frames of so many bytes fills queues.
	bulkLen = 1000
	// aqmFlows is how many flows are told apart, by their hash.
	aqmFlows = 256
	// aqmRecent is how long a flow is bulk after a large frame, and how long somebody else
	// is thought to be there after a frame.
	aqmRecent = int64(time.Second)
)

// aqm is active queue management (RFC 7567) of one queue that a worker reads. Where TCP
// streams have the queue stand and others wait in it, too, the streams are told to slow
// down: a segment is marked (RFC 3168), or dropped where its ends do not speak ECN. A
// stream that has the queue for itself is left alone: it would only get slower.
type aqm struct {
	now   int64 // nanoseconds, of this batch
	since int64 // when the queue was first seen not to be empty; 0: it is empty
	told  int64 // since, when a sender was last told
	next  int64 // when one may be told again
	count int   // how often one was, without a pause
	large int   // frames since one was

	bulk      *[aqmFlows]int64 // when flows, by their hash, had a large frame; nil: it never stood
	other     int64            // when a flow that is not bulk had a frame; 0: never
	otherFlow uint32
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
	if q.bulk == nil {
		q.bulk = new([aqmFlows]int64)
	}
	return true
}

// picks reports whether the sender of the frame is to be told to slow down.
func (q *aqm) picks(frame []byte, flow uint32) bool {
	if len(frame) < bulkLen {
		if q.now != q.other && !q.isBulk(flow) && waits(frame) {
			q.other, q.otherFlow = q.now, flow
		}
		return false
	}
	q.bulk[flow%aqmFlows] = q.now
	q.large++
	if q.now < q.next || q.large < aqmShare || q.other == 0 || q.now-q.other > aqmRecent || q.isBulk(q.otherFlow) {
		return false
	}
	if h, ok := ether.ParseHeaders(frame); !ok || h.Proto != ether.ProtoTCP {
		return false
	}
	if q.told != q.since { // it was empty in between
		q.told, q.count = q.since, max(q.count-2, 0)
		if q.now-q.next > aqmMemory {
			q.count = 0
		}
	}
	q.count, q.large = min(q.count+1, aqmMost), 0
	q.next = q.now + int64(float64(aqmAfter)/math.Sqrt(float64(q.count)))
	return true
}

func (q *aqm) isBulk(flow uint32) bool {
	at := q.bulk[flow%aqmFlows]
	return at != 0 && q.now-at <= aqmRecent
}

// waits reports whether somebody waits for what the frame carries: it is IP, and more than
// an acknowledgement.
func waits(frame []byte) bool {
	h, ok := ether.ParseHeaders(frame)
	if !ok {
		return h.L4 != 0
	}
	return h.Proto != ether.ProtoTCP || uint32(h.Payload) < h.End
}

// marked tells the ends of a TCP frame, if they speak ECN, and reports whether they do.
func (t *Tunnel) marked(frame []byte) bool {
	h, ok := ether.ParseHeaders(frame)
	if !ok || !ether.MarkCE(frame, h) {
		return false
	}
	t.drops.add(DropAQMMarked)
	return true
}

// sheds reports whether the frame, which is yet to be cut, is to lose its first segment.
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
