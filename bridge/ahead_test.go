package bridge

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"errors"
	"math"
	"net/netip"
	"runtime"
	"slices"
	"testing"
	"testing/synctest"
	"time"
	"weak"

	"github.com/tulle-net/tulle/crypto"
	"github.com/tulle-net/tulle/ether"
	"github.com/tulle-net/tulle/ether/ethertest"
	_ "github.com/tulle-net/tulle/internal/proptest"
	"github.com/tulle-net/tulle/tap"
	"github.com/tulle-net/tulle/underlay"
	"github.com/tulle-net/tulle/vxlan"
	"pgregory.net/rapid"
)

// flowFrame is a UDP frame of the flow, of n bytes and more, with a number to know it by.
func flowFrame(from, to, flow, number, n int) []byte {
	payload := make([]byte, max(4, n-42))
	binary.BigEndian.PutUint32(payload, uint32(number))
	src := netip.AddrPortFrom(address(byte(from)), uint16(1000+flow))
	return ethertest.UDP{Src: src, Dst: netip.AddrPortFrom(address(byte(to)), 9), SrcMAC: macOf(from), DstMAC: macOf(to), Payload: payload}.Frame()
}

// flowOf returns flow and number of such a frame.
func flowOf(frame []byte) (flow, number int) {
	return int(binary.BigEndian.Uint16(frame[34:])) - 1000, int(binary.BigEndian.Uint32(frame[42:]))
}

// listSender notes what is sent, in order.
type listSender struct {
	buf     [65536]byte
	sent    [][]byte // frames
	entropy []uint32
}

func (s *listSender) Reserve(n int) []byte { return s.buf[:n] }
func (s *listSender) Commit(_ netip.AddrPort, flow uint32, n int) {
	s.sent, s.entropy = append(s.sent, bytes.Clone(s.buf[vxlan.HeaderLen:n])), append(s.entropy, flow)
}
func (s *listSender) Flush() {}

// numbers returns those of the frames that were sent.
func (s *listSender) numbers() (all []int) {
	for _, f := range s.sent {
		_, n := flowOf(f)
		all = append(all, n)
	}
	return all
}

// reads is a queue that gives these batches, then nothing, then is gone.
type reads struct {
	nullDevice
	batches [][][]byte
	gone    bool
	slow    time.Duration // a Read takes so long
}

func (q *reads) Read(b *tap.Batch) error {
	b.Frames = b.Frames[:0]
	time.Sleep(q.slow)
	if len(q.batches) == 0 {
		if q.gone {
			return tap.ErrClosed
		}
		return nil
	}
	for _, f := range q.batches[0] {
		b.Frames = append(b.Frames, tap.Frame{B: bytes.Clone(f)})
	}
	q.batches = q.batches[1:]
	return nil
}

// TestSmallGoesAhead: what a worker of a TAP's queue sends, and in which order.
func TestSmallGoesAhead(t *testing.T) {
	const stream, other, third = 1, 2, 3
	large := func(flow, number int) []byte { return flowFrame(1, 2, flow, number, largeLen) }
	small := func(flow, number int) []byte { return flowFrame(1, 2, flow, number, 64) }
	ack := ethertest.TCP{SrcMAC: macOf(1), DstMAC: macOf(2)}.Frame()
	behind := [][][]byte{{large(stream, 1)}, {large(stream, 2)}, {small(other, 3)}}
	for _, tt := range []struct {
		name    string
		before  []byte // a frame, so long ago
		ago     time.Duration
		limited bool
		batches [][][]byte
		want    []int
	}{
		{"nobody waits", nil, 0, false, behind, []int{1, 2, 3}},
		{"acknowledgements are nobody", ack, 0, false, behind, []int{1, 2, 3}},
		{"somebody waits", small(third, 0), 0, false, behind, []int{3, 1, 2}},
		{"lately somebody did", small(third, 0), time.Duration(companyFor) - 1, false, behind, []int{3, 1, 2}},
		{"long ago somebody did", small(third, 0), time.Duration(companyFor), false, behind, []int{1, 2, 3}},
		{"the first that waits", nil, 0, false, [][][]byte{{small(other, 1), large(stream, 2)}, {large(stream, 3)}, {small(other, 4)}}, []int{1, 4, 2, 3}},
		{"within one read", small(third, 0), 0, false, [][][]byte{{large(stream, 1), small(other, 2), large(stream, 3), small(other, 4)}}, []int{2, 4, 1, 3}},
		{"not past its own flow", small(third, 0), 0, false, [][][]byte{{large(stream, 1)}, {small(stream, 2), small(other, 3)}, {large(other, 4)}, {small(other, 5)}}, []int{3, 1, 2, 4, 5}},
		{"not what is large", small(third, 0), 0, false, [][][]byte{{large(stream, 1)}, {large(other, 2)}, {small(third, 3)}}, []int{3, 1, 2}},
		{"a limit's queue", small(third, 0), 0, true, behind[1:], []int{2, 3}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				_, _, p := hotBridge(t)
				if tt.limited {
					p.limits = newPortLimits(Limits{FromDevice: Rate{BitsPerSecond: 50e9}}, nil)
				}
				time.Sleep(time.Hour)
				s := &listSender{}
				w, l := &egress{q: &reads{}}, &lane{tx: s}
				if tt.before != nil {
					w.q = &reads{batches: [][][]byte{{tt.before}}}
					p.drain(w, l)
				}
				time.Sleep(tt.ago)
				s.sent = nil
				for w.q = (&reads{batches: tt.batches}); len(w.q.(*reads).batches) > 0; { // a limit ends it early
					if !p.drain(w, l) {
						t.Fatal("the device is gone")
					}
				}
				if got := s.numbers(); !slices.Equal(got, tt.want) {
					t.Errorf("sent %v, want %v", got, tt.want)
				}
				if w.queue.since != 0 && !tt.limited {
					t.Error("the queue is empty, and stands")
				}
			})
		})
	}
}

// TestSmallStarvesNobody: a large frame waits for so many small ones, and no more.
func TestSmallStarvesNobody(t *testing.T) {
	_, _, p := hotBridge(t)
	time.Sleep(time.Millisecond) // 0 is no time
	q, number := &reads{batches: [][][]byte{{flowFrame(1, 2, 0, 0, 64), flowFrame(1, 2, 1, 0, 9000)}}}, 0
	for range 10 {
		var batch [][]byte
		for range 40 {
			number++
			batch = append(batch, flowFrame(1, 2, 0, number, 64))
		}
		q.batches = append(q.batches, batch)
	}
	s := &listSender{}
	p.drain(&egress{q: q}, &lane{tx: s})
	at := slices.IndexFunc(s.sent, func(f []byte) bool { return len(f) >= largeLen })
	if at < 2 || at > maxAhead+tap.BatchFrames || len(s.sent) != 2+number {
		t.Errorf("the large frame left as number %d of %d", at, len(s.sent))
	}
}

// TestHeldWhileNobodyWaits: what comes when nobody waits any more does not pass what is held.
func TestHeldWhileNobodyWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		_, _, p := hotBridge(t)
		time.Sleep(time.Hour)
		q := &reads{slow: time.Duration(companyFor) / 2}
		q.batches = [][][]byte{{flowFrame(1, 2, 0, 0, 64)}, {flowFrame(1, 2, 1, 1, 9000)}, {flowFrame(1, 2, 1, 2, 9000)}, {flowFrame(1, 2, 1, 3, 64)}}
		s := &listSender{}
		p.drain(&egress{q: q}, &lane{tx: s})
		if got := s.numbers(); !slices.Equal(got, []int{0, 1, 2, 3}) {
			t.Errorf("sent %v", got)
		}
	})
}

// drawn is a frame of a property test.
type drawn struct{ flow, n int }

// drawBatches draws what a queue gives: small and large frames of a few flows.
func drawBatches(t *rapid.T, most int) [][]drawn {
	one := rapid.Custom(func(t *rapid.T) drawn {
		n := rapid.SampledFrom([]int{64, 64, 300, largeLen - 1, largeLen, 1400, 9000, 60000})
		return drawn{rapid.IntRange(0, 5).Draw(t, "flow"), n.Draw(t, "bytes")}
	})
	return rapid.SliceOfN(rapid.SliceOfN(one, 1, most), 1, 60).Draw(t, "batches")
}

// checkOrder checks that so many frames came, once each, and each flow's in order.
func checkOrder(t *rapid.T, frames [][]byte, all int) {
	last, seen := map[int]int{}, map[int]bool{}
	for _, f := range frames {
		flow, number := flowOf(f)
		if before, ok := last[flow]; ok && before >= number {
			t.Fatalf("flow %d: %d after %d", flow, number, before)
		}
		last[flow], seen[number] = number, true
	}
	if len(seen) != all || len(frames) != all {
		t.Fatalf("%d frames, %d of them different, want %d", len(frames), len(seen), all)
	}
}

// TestFlowsStayInOrder: whatever a TAP gives, no frame is lost, doubled or overtaken in its
// flow, also when the device goes while some are held.
func TestFlowsStayInOrder(t *testing.T) {
	tunnel, _, p := hotBridge(t)
	rapid.Check(t, func(t *rapid.T) {
		s := &listSender{}
		q, all := &reads{gone: rapid.Bool().Draw(t, "gone")}, 0
		for _, batch := range drawBatches(t, tap.BatchFrames) {
			var frames [][]byte
			for _, d := range batch {
				frames = append(frames, flowFrame(1, 2, d.flow, all, d.n))
				all++
			}
			q.batches = append(q.batches, frames)
		}
		l := &lane{tx: s}
		if there := p.drain(&egress{q: q}, l); there == q.gone {
			t.Fatalf("the device is there: %v", there)
		}
		checkOrder(t, s.sent, all)
		if n := tunnel.batches.held.Load(); len(l.held) != 0 || n != 0 || l.flows != [heldFlows]uint16{} {
			t.Fatalf("%d batches are held, %d in all", len(l.held), n)
		}
	})
}

// listDevice notes what it is given.
type listDevice struct {
	nullDevice
	frames [][]byte
}

func (d *listDevice) WriteFrame(_ ether.Meta, parts [][]byte) error {
	d.frames = append(d.frames, slices.Concat(parts...))
	return nil
}

// slotBatch is what a socket gives at once, from a VTEP whose flows have a port each.
func slotBatch(more bool, frames ...[]byte) underlay.Batch {
	b := underlay.Batch{More: more}
	for _, f := range frames {
		flow, _ := flowOf(f)
		src := netip.AddrPortFrom(vtepOf(2).Addr(), uint16(50000+flow))
		b.Slots = append(b.Slots, underlay.Slot{Src: src, B: datagram(testVNI, f)})
	}
	return b
}

// TestSmallGoesAheadOnTheWayIn: what a worker of a socket delivers, and in which order.
func TestSmallGoesAheadOnTheWayIn(t *testing.T) {
	large := func(flow, number int) []byte { return flowFrame(2, 1, flow, number, 60000) }
	small := func(flow, number int) []byte { return flowFrame(2, 1, flow, number, 64) }
	asks := slotBatch(false, small(9, 0))
	for _, tt := range []struct {
		name    string
		then    time.Duration // after the first
		batches []underlay.Batch
		want    []int
	}{
		{"nobody waits", 0, []underlay.Batch{slotBatch(false, large(1, 1), small(2, 2))}, []int{1, 2}},
		{"somebody waits", 0, []underlay.Batch{asks, slotBatch(true, large(1, 1), large(1, 2), small(2, 3)), slotBatch(false, small(2, 4))}, []int{0, 3, 4, 1, 2}},
		{"long ago somebody did", time.Duration(companyFor), []underlay.Batch{asks, slotBatch(false, large(1, 1), small(2, 2))}, []int{0, 1, 2}},
		{"not past its own flow", 0, []underlay.Batch{asks, slotBatch(false, large(1, 1), small(1, 2), small(3, 3))}, []int{0, 3, 1, 2}},
		{"the short end of a stream", 0, []underlay.Batch{slotBatch(false, large(1, 1)), slotBatch(false, small(1, 2)), slotBatch(false, large(1, 3), small(2, 4))}, []int{1, 2, 3, 4}},
		{"while it delivers", 0, []underlay.Batch{asks, slotBatch(false, large(1, 1), large(1, 2), large(1, 3), large(1, 4)), slotBatch(false, small(2, 5))}, []int{0, 1, 2, 3, 5, 4}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				tunnel, _, p := hotBridge(t)
				d := &listDevice{}
				p.queues = []tap.Queue{d}
				time.Sleep(time.Hour)
				s := &script{batches: tt.batches, before: func(i int) {
					if i == 1 {
						time.Sleep(tt.then)
					}
				}}
				in := newIngress(tunnel)
				in.run(s)
				var got []int
				for _, f := range d.frames {
					_, n := flowOf(f)
					got = append(got, n)
				}
				if !slices.Equal(got, tt.want) {
					t.Errorf("delivered %v, want %v", got, tt.want)
				}
			})
		})
	}
}

// TestBoundsOnTheWayIn: what is large waits for so many small frames, and no more; and the
// worker does not read on without end.
func TestBoundsOnTheWayIn(t *testing.T) {
	tunnel, _, p := hotBridge(t)
	d := &listDevice{}
	p.queues = []tap.Queue{d}
	time.Sleep(time.Millisecond) // 0 is no time
	s, number := &script{}, 0
	batch := func(flow, n int) {
		var frames [][]byte
		for range 32 {
			frames = append(frames, flowFrame(2, 1, flow, number, n))
			number++
		}
		s.batches = append(s.batches, slotBatch(true, frames...))
	}
	batch(0, 64)
	batch(1, 9000)
	for range 10 {
		batch(0, 64)
	}
	for range 10 {
		batch(1, 60000)
	}
	in, most := newIngress(tunnel), 0
	s.before = func(int) { most = max(most, in.held.bytes) }
	in.run(s)
	at := slices.IndexFunc(d.frames, func(f []byte) bool { return len(f) >= largeLen })
	if at < 64 || at > 32+maxAhead+32 || len(d.frames) != number {
		t.Errorf("the first large frame was delivered as number %d of %d", at, len(d.frames))
	}
	if most >= heldMemory/2 || most < heldMemory/4 {
		t.Errorf("%d bytes were held when it read on", most)
	}
}

// TestSourcesStayInOrder: whatever a socket gives, nothing is lost, doubled, changed or
// overtaken by what is from the same port.
func TestSourcesStayInOrder(t *testing.T) {
	tunnel, _, p := hotBridge(t)
	d := &listDevice{}
	p.queues = []tap.Queue{d}
	rapid.Check(t, func(t *rapid.T) {
		d.frames = nil
		s, sent := &script{}, [][]byte(nil)
		for _, batch := range drawBatches(t, 32) {
			var frames [][]byte
			for _, one := range batch {
				frames = append(frames, flowFrame(2, 1, one.flow, len(sent), one.n))
				sent = append(sent, frames[len(frames)-1])
			}
			s.batches = append(s.batches, slotBatch(rapid.Bool().Draw(t, "more"), frames...))
		}
		in := newIngress(tunnel)
		in.run(s)
		checkOrder(t, d.frames, len(sent))
		for _, f := range d.frames {
			if _, n := flowOf(f); !bytes.Equal(f, sent[n]) {
				t.Fatalf("frame %d has changed", n)
			}
		}
		if len(in.held.slots) != 0 || in.held.bytes != 0 || in.held.flows != [heldFlows]uint16{} {
			t.Fatalf("%d slots of %d bytes are held", len(in.held.slots), in.held.bytes)
		}
	})
}

// TestHeldSlots: the ring against a list of copies.
func TestHeldSlots(t *testing.T) {
	pattern := make([]byte, underlay.MaxDatagram+256)
	for i := range pattern {
		pattern[i] = byte(i ^ i>>8)
	}
	rapid.Check(t, func(t *rapid.T) {
		var h heldSlots
		var want []underlay.Slot
		for s := (underlay.Slot{Src: vtepOf(2), B: pattern[:underlay.MaxDatagram]}); h.hold(&s, 0); {
			want = append(want, s)
		}
		if h.bytes < heldMemory-underlay.MaxDatagram {
			t.Fatalf("full with %d bytes", h.bytes)
		}
		for i := range rapid.IntRange(1, 200).Draw(t, "steps") {
			if n := rapid.IntRange(-2, 8).Draw(t, "deliver"); n > 0 && len(want) > 0 {
				n = min(n, len(want))
				h.leaves(n)
				want = want[n:]
			}
			size := rapid.SampledFrom([]int{1, 1400, 60000, underlay.MaxDatagram}).Draw(t, "bytes")
			s := underlay.Slot{Src: vtepOf(2), SegmentLen: rapid.SampledFrom([]int{0, 100, 1400}).Draw(t, "segment"), B: pattern[i%256:][:size]}
			if h.hold(&s, 0) {
				want = append(want, s)
			} else if h.bytes < heldMemory/2 && h.count+size/100 < heldDatagrams {
				t.Fatalf("no room for %d bytes beside %d in %d datagrams", size, h.bytes, h.count)
			}
		}
		var all heldSlots
		for i, s := range want {
			if got := h.slots[i].Slot; !bytes.Equal(got.B, s.B) || got.SegmentLen != s.SegmentLen {
				t.Fatalf("slot %d of %d has changed", i, len(want))
			}
			all.bytes += len(s.B)
			all.count += max(1, int(math.Ceil(float64(len(s.B))/float64(cmp.Or(s.SegmentLen, len(s.B))))))
			all.flows[sourceOf(s.Src)]++
		}
		if len(h.slots) != len(want) || h.bytes != all.bytes || h.count != all.count || h.flows != all.flows || h.count > heldDatagrams {
			t.Fatalf("%d slots of %d bytes in %d datagrams, want %d of %d in %d", len(h.slots), h.bytes, h.count, len(want), all.bytes, all.count)
		}
	})
}

// TestAheadWithinWindow: what goes ahead does not move the replay window past what it went
// ahead of, however many datagrams that is.
func TestAheadWithinWindow(t *testing.T) {
	tunnel, p, tx := hotSealed(t, crypto.ChaCha20Poly1305)
	time.Sleep(time.Millisecond) // 0 is no time
	scratch := new(crypto.Scratch)
	sealed := func(port uint16, datagrams, n int) (s underlay.Slot) {
		d := datagram(testVNI, flowFrame(2, 1, 1, 1, n))
		plain := underlay.Slot{Src: vtepOf(2), SegmentLen: len(d), B: bytes.Repeat(d, datagrams)}
		s.B = make([]byte, 0, len(plain.B)+datagrams*crypto.SealedOverhead)
		sealedTrain(t, tx, &plain, &s, scratch)
		s.Src = netip.AddrPortFrom(s.Src.Addr(), port)
		return s
	}
	s, want := &script{}, 0
	add := func(more bool, port uint16, slots, datagrams, n int) {
		b := underlay.Batch{More: more}
		for range slots {
			b.Slots = append(b.Slots, sealed(port, datagrams, n))
		}
		want += slots * datagrams
		s.batches = append(s.batches, b)
	}
	add(false, 1, 1, 1, 64)   // somebody waits
	add(true, 2, 1, 1, 1400)  // something is held,
	add(true, 1, 32, 300, 64) // and many want to go ahead
	add(true, 2, 1, 1, 1400)
	add(true, 2, 31, 300, 64) // many are held,
	add(false, 1, 1, 1, 64)   // and one wants to go ahead
	for range 8 {
		add(true, 2, 32, 20, 1400) // much is held,
	}
	for range 300 {
		add(true, 1, 32, 4, 64) // and a few go ahead, over and over
	}
	newIngress(tunnel).run(s)
	if got, n := int(p.bridge.RxFrames.Load()), tunnel.Drops().Count(DropReplay); got != want || n != 0 {
		t.Errorf("%d frames of %d were received, %d taken for replays", got, want, n)
	}
}

// TestHeldSlotsExact: the ring is never filled so that it looks empty.
func TestHeldSlotsExact(t *testing.T) {
	var h heldSlots
	slot := func(n int) *underlay.Slot { return &underlay.Slot{Src: vtepOf(2), B: make([]byte, n)} }
	if !h.hold(slot(1000), 0) || !h.hold(slot(heldMemory-1500), 0) {
		t.Fatal("no room in an empty ring")
	}
	h.leaves(1)
	for _, tt := range []struct {
		n    int
		want bool
	}{{1000, false}, {999, true}, {1, false}} {
		if got := h.hold(slot(tt.n), 0); got != tt.want {
			t.Errorf("%d bytes where 1,000 are free: %v", tt.n, got)
		}
	}
}

// TestEntropy: flows with large frames have other source ports than all others.
func TestEntropy(t *testing.T) {
	var a apart
	large, small := make([]byte, largeLen), make([]byte, largeLen-1)
	const flow, odd, even = 7, 15, 14
	for i, step := range []struct {
		frame   []byte
		now     int64
		want    uint32
		changed bool
	}{
		{small, 0, even, false}, {large, 5, odd, true}, {small, 5, odd, false}, {large, 5, odd, false},
		{small, 5 + apartFor - 1, odd, false}, {small, 5 + apartFor, even, false},
		{large, 6 + apartFor, odd, true}, {large, 5, odd, false}, {small, 5 + 2*apartFor, odd, false}, {small, 6 + 2*apartFor, even, false},
	} {
		if got, changed := a.entropy(step.frame, flow, step.now); got != step.want || changed != step.changed {
			t.Errorf("step %d: %d, changed %v, want %d, %v", i, got, changed, step.want, step.changed)
		}
	}
	if got, _ := a.entropy(small, flow+1, 5); got != even+2 {
		t.Errorf("another flow: %d, want %d", got, even+2)
	}
}

// flushSender notes after how many frames it was flushed.
type flushSender struct {
	listSender
	flushed []int
}

func (s *flushSender) Flush() { s.flushed = append(s.flushed, len(s.sent)) }

// TestFlushBeforeOtherPort: a flow that gets another source port does not overtake itself
// in the sender, which sends port by port.
func TestFlushBeforeOtherPort(t *testing.T) {
	_, _, p := hotBridge(t)
	s := &flushSender{}
	l := &lane{tx: s}
	for i, n := range []int{64, 64, largeLen, 64, largeLen} {
		p.forward(l, &tap.Frame{B: flowFrame(1, 2, 1, i, n)})
	}
	if !slices.Equal(s.flushed, []int{2}) {
		t.Errorf("flushed after %v frames, want after 2", s.flushed)
	}
	for i, want := range []uint32{0, 0, 1, 1, 1} {
		if s.entropy[i]&1 != want {
			t.Errorf("frame %d has port %d of its flow, want %d", i, s.entropy[i]&1, want)
		}
	}
}

// TestSmallTrains: what is small is so also where the kernel has merged it.
func TestSmallTrains(t *testing.T) {
	var h heldSlots
	train := underlay.Slot{Src: vtepOf(2), SegmentLen: 100, B: make([]byte, 2010)}
	long := underlay.Slot{Src: vtepOf(3), SegmentLen: largeLen, B: make([]byte, 2010)}
	if h.large(&train, 1) || !h.large(&long, 1) || !h.large(&underlay.Slot{Src: vtepOf(3), B: make([]byte, 9)}, apartFor) || h.large(&underlay.Slot{Src: vtepOf(3), B: make([]byte, 9)}, 1+apartFor) {
		t.Error("a train of small datagrams is large, or a large one is not, for a second")
	}
	if n := h.passes(&long); n != 0 || !h.hold(&long, 1) {
		t.Errorf("%d large datagrams pass", n)
	}
	if n := h.passes(&train); n != 21 {
		t.Errorf("%d datagrams of a train pass, want 21", n)
	}
	train.Src = long.Src
	if n := h.passes(&train); n != 0 {
		t.Errorf("%d datagrams pass what is held from their port", n)
	}
}

// TestAQMBesideHeld: a socket whose queue is emptied by what was held does not stand.
func TestAQMBesideHeld(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		tunnel, _, _ := hotBridge(t)
		time.Sleep(time.Hour)
		in := newIngress(tunnel)
		ask, large := flowFrame(2, 1, 0, 0, 64), flowFrame(2, 1, 1, 1, 9000)
		in.serve(&script{batches: []underlay.Batch{slotBatch(false, ask), {}}})
		in.serve(&failing{script: script{batches: []underlay.Batch{slotBatch(true, large, large), slotBatch(false, large)}}})
		if len(in.held.slots) != 0 || in.queue.since != 0 {
			t.Errorf("%d slots are held, the queue stands since %d", len(in.held.slots), in.queue.since)
		}
		// One that stays full stands, also when a receive takes all there is.
		long := flowFrame(2, 1, 1, 2, 60000)
		f := &failing{script: script{batches: []underlay.Batch{slotBatch(true, slices.Repeat([][]byte{long}, 20)...)}}}
		for range 4 {
			f.batches = append(f.batches, slotBatch(false, long))
		}
		var since []int64
		f.before = func(int) {
			since = append(since, in.queue.since)
			time.Sleep(time.Millisecond)
		}
		in.serve(f)
		if len(since) != 5 || since[1] == 0 || slices.ContainsFunc(since[1:], func(at int64) bool { return at != since[1] }) {
			t.Errorf("the queue stands since %v", since)
		}
		in.serve(&failing{script: script{batches: []underlay.Batch{slotBatch(true, large), slotBatch(true, large)}}, fail: 1})
		if n := tunnel.Drops().Count(DropReceive); len(in.held.slots) != 0 || n != 1 || in.frames != 0 {
			t.Errorf("%d slots are held after %d errors", len(in.held.slots), n)
		}
	})
}

// failing is a script that fails once, and blocks no one when it is over.
type failing struct {
	script
	fail int // before which batch; 0: never
}

func (f *failing) Receive(b *underlay.Batch) error {
	if f.fail > 0 && f.i == f.fail {
		b.Slots, b.More, f.fail = b.Slots[:0], false, 0
		return errors.New("short of memory")
	}
	if f.i == len(f.batches) {
		b.Slots, b.More = b.Slots[:0], false
		return nil
	}
	return f.script.Receive(b)
}

// TestHeldNoAllocs: neither worker allocates for what it holds.
func TestHeldNoAllocs(t *testing.T) {
	tunnel, _, p := hotBridge(t)
	super, small := superFrame(), smallFrame()
	time.Sleep(time.Millisecond) // 0 is no time
	q := &once{frames: []tap.Frame{small, super}}
	w, l := &egress{q: q}, &lane{tx: &nullSender{}}
	if n := testing.AllocsPerRun(100, func() {
		q.there = true
		p.drain(w, l)
	}); n != 0 {
		t.Errorf("a TAP's: %v allocations, want 0", n)
	}
	in := newIngress(tunnel)
	s := &script{batches: slices.Repeat([]underlay.Batch{{Slots: []underlay.Slot{trainOf(t, small), trainOf(t, super)}}}, 102)}
	if n := testing.AllocsPerRun(100, func() { in.serve(s) }); n != 0 {
		t.Errorf("a socket's: %v allocations, want 0", n)
	}
	if w.company.last == 0 || in.company.last == 0 || in.held.memory == nil {
		t.Error("nobody waited")
	}
}

// once is a queue that has the same frames whenever it is refilled.
type once struct {
	nullDevice
	frames []tap.Frame
	there  bool
}

func (q *once) Read(b *tap.Batch) error {
	b.Frames = b.Frames[:0]
	if q.there {
		b.Frames = append(b.Frames, q.frames...)
	}
	q.there = false
	return nil
}

// TestMemoryIsGivenBack: what a socket's worker held needs no memory when nothing was for
// long.
func TestMemoryIsGivenBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		tunnel, _, _ := hotBridge(t)
		time.Sleep(time.Hour)
		in := newIngress(tunnel)
		receives := func(flow, n int) {
			in.serve(&failing{script: script{batches: []underlay.Batch{slotBatch(false, flowFrame(2, 1, flow, 0, n))}}})
		}
		receives(0, 64)
		receives(1, 9000)
		ring := weak.Make(&in.held.memory[0])
		for _, tt := range []struct {
			after time.Duration
			held  bool
		}{{time.Duration(keepFor-second) * tick, true}, {time.Duration(second) * tick, false}} {
			time.Sleep(tt.after)
			receives(1, 9000)
			runtime.GC()
			if got := ring.Value() != nil; got != tt.held {
				t.Errorf("after %v more it has its memory: %v", tt.after, got)
			}
		}
	})
}

// counting is a queue of so many large frames of one flow, one a Read.
type counting struct {
	nullDevice
	left   int
	before func() // told of each Read
}

func (q *counting) Read(b *tap.Batch) error {
	q.before()
	b.Frames = b.Frames[:0]
	if q.left > 0 {
		b.Frames = append(b.Frames, tap.Frame{B: flowFrame(1, 2, 1, q.left, 9000)})
		q.left--
	}
	return nil
}

// TestHeldByAll: workers read on so far all together, and one batch always.
func TestHeldByAll(t *testing.T) {
	for _, tt := range []struct{ others, want int }{{0, maxHeld}, {maxHeld - 10, 10}, {maxHeld, 1}} {
		tunnel, _, p := hotBridge(t)
		time.Sleep(time.Millisecond) // 0 is no time
		w, l, most := &egress{q: &reads{batches: [][][]byte{{flowFrame(1, 2, 0, 0, 64)}}}}, &lane{tx: &nullSender{}}, 0
		p.drain(w, l)
		tunnel.batches.held.Add(int32(tt.others))
		w.q = &counting{left: 100, before: func() { most = max(most, len(l.held)+1) }}
		p.drain(w, l)
		if n := int(tunnel.batches.held.Load()); most != tt.want || n != tt.others {
			t.Errorf("beside %d of others %d are held at most, want %d; in the end %d", tt.others, most, tt.want, n)
		}
	}
}
