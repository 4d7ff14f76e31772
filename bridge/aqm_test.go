package bridge

import (
	"bytes"
	"net/netip"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/tulle-net/tulle/ether"
	"github.com/tulle-net/tulle/ether/ethertest"
	"github.com/tulle-net/tulle/tap"
	"github.com/tulle-net/tulle/underlay"
	"github.com/tulle-net/tulle/underlay/underlaytest"
	"github.com/tulle-net/tulle/vxlan"
)

// scene returns the frames of batch i of a queue; there is one each 0.1 ms.
type scene func(i int) [][]byte

// picked returns at which milliseconds senders were told, of so many from one on. The queue
// is seen empty each empty batches; 0: never.
func (s scene) picked(q *aqm, from, forMS, empty int) (at []int) {
	for i := range forMS * 10 {
		if empty > 0 && i%empty == 0 {
			q.drained()
		}
		if !q.stands(int64(from)*1e6 + int64(i)*1e5) {
			continue
		}
		for _, f := range s(i) {
			if q.picks(f, ether.FlowHash(f)) {
				at = append(at, i/10)
				if h, _ := ether.ParseHeaders(f); h.Proto != ether.ProtoTCP {
					return []int{-1}
				}
			}
		}
	}
	return at
}

// every puts frames into a batch in so many of what is there anyway.
func (s scene) every(n int, frames ...[]byte) scene {
	return func(i int) [][]byte {
		if i%n != 0 {
			return s(i)
		}
		return append(slices.Clone(frames), s(i)...)
	}
}

// stream is a TCP frame of the stream with that port.
func stream(port uint16, payload int) []byte {
	return ethertest.TCP{SrcMAC: macOf(1), DstMAC: macOf(2), Src: netip.AddrPortFrom(address(1), port), Dst: netip.AddrPortFrom(address(2), 80), Payload: make([]byte, payload)}.Frame()
}

func address(i byte) netip.Addr { return netip.AddrFrom4([4]byte{10, 32, 0, i}) }

func TestAQM(t *testing.T) {
	v6 := netip.MustParseAddrPort("[fd00::1]:9")
	datagram := func(payload int) []byte {
		return ethertest.UDP{SrcMAC: macOf(1), DstMAC: macOf(2), Payload: make([]byte, payload)}.Frame()
	}
	echo, query := ethertest.Echo{SrcMAC: macOf(1), DstMAC: macOf(2)}.Frame(), datagram(40)
	group := bytes.Clone(query)
	ether.MAC(0x01005e000001).Put(group)
	nothing := scene(func(int) [][]byte { return nil })
	alone := nothing.every(1, stream(1, 60000))
	four := [][]byte{stream(1, 60000), stream(2, 60000), stream(3, 60000), stream(4, 60000)}
	// One of 100 frames a second, which is no super-frame; with 90,000 others beside it.
	slow := stream(7, 1400)
	var streams [][]byte
	for i := range 300 {
		streams = append(streams, stream(uint16(100+i), 1400))
	}
	many := scene(func(i int) [][]byte { return streams[9*i%297:][:9] })
	largest := func(n int) int { return 10000 / n }
	for _, tt := range []struct {
		name     string
		s        scene
		empty    int
		min, max int // senders told in a second
	}{
		{"a stream by itself", alone, 0, 0, 0},
		{"four by themselves", scene(func(i int) [][]byte { return four[i%4:][:1] }), 0, 0, 0},
		{"a stream and its own last bytes", alone.every(20, stream(1, 10)), 0, 0, 0},
		{"a stream beside acknowledgements", alone.every(20, stream(9, 0)), 0, 0, 0},
		{"a stream beside ARP", alone.every(20, ethertest.ARPRequest(macOf(1), address(1), address(2))), 0, 0, 0},
		{"a stream beside ND", alone.every(20, ethertest.Advertise(macOf(1), v6.Addr(), macOf(2), v6.Addr().Next())), 0, 0, 0},
		{"a stream beside what is for a group", alone.every(20, group), 0, 0, 0},
		{"no stream, but datagrams", nothing.every(1, datagram(1400)).every(20, echo), 0, 0, 0},
		{"a slow stream beside many large datagrams", nothing.every(1, datagram(1400)).every(100, slow).every(20, echo), 0, 0, 0},
		{"a twentieth of the queue is a stream, and the rest large datagrams", nothing.every(1, datagram(1400)).every(20, slow).every(20, echo), 0, 0, 0},
		{"a slow stream beside a flood of small ones", nothing.every(1, slices.Repeat([][]byte{query}, 30)...).every(100, slow).every(20, echo), 0, 0, 0},
		{"a queue that holds bursts", alone.every(20, echo), 90, 0, 0},
		{"a stream beside an echo", alone.every(20, echo), 0, 280, largest(aqmShare)},
		{"a stream beside an echo of IPv6", alone.every(20, ethertest.Echo{SrcMAC: macOf(1), DstMAC: macOf(2), Src: v6.Addr(), Dst: v6.Addr().Next()}.Frame()), 0, 280, largest(aqmShare)},
		{"a stream beside a few queries", alone.every(3000, query), 0, 200, largest(aqmShare)},
		{"a stream beside a request", alone.every(20, stream(9, 200)), 0, 280, largest(aqmShare)},
		{"a stream beside who connects", alone.every(20, ethertest.TCP{SrcMAC: macOf(1), DstMAC: macOf(2), Flags: ether.TCPSyn}.Frame()), 0, 280, largest(aqmShare)},
		{"a stream at 1,000 frames a second beside an echo", nothing.every(10, stream(1, 1400)).every(20, echo), 0, 10, 1000 / aqmShare},
		{"300 streams beside an echo", many.every(20, echo), 0, 300, 800},
		{"a queue that comes to stand now and then", alone.every(20, echo), 200, 30, 160},
	} {
		got := tt.s.picked(&aqm{}, 5000, 1000, tt.empty)
		if len(got) < tt.min || len(got) > tt.max || len(got) > 0 && got[0] < 10 {
			t.Errorf("%s: %d told in a second, want %d to %d; the first at %v ms", tt.name, len(got), tt.min, tt.max, got[:min(len(got), 1)])
		}
	}
	// The pace of CoDel, which is forgotten when nobody was told for some time: the queue
	// ran empty, or whoever waited has left and comes back.
	q := &aqm{}
	beside := alone.every(20, echo)
	check := func(from, first int) {
		t.Helper()
		got := beside.picked(q, from, first+40, 0)
		for i, after := range []int{0, 10, 17, 22, 27, 32, 36} {
			if i >= len(got) || max(got[i]-first-after, first+after-got[i]) > 2 {
				t.Errorf("told after %v ms, want %d, %d, %d, %d …", got, first, first+10, first+17, first+22)
				return
			}
		}
	}
	check(5000, 13)
	q.drained()
	check(6000, 10)
	alone.picked(q, 6053, 1200, 0)
	if got := alone.picked(q, 7260, 1000, 0); len(got) > 0 {
		t.Errorf("%d told because of somebody who is gone", len(got))
	}
	check(8260, 0)
	// One flow that has some large frames now and then is none that fills the queue.
	if got := alone.every(500, stream(9, 1400)).every(20, stream(9, 50)).picked(&aqm{}, 5000, 1000, 0); len(got) < 250 {
		t.Errorf("%d told because of a request with large answers, want about 300", len(got))
	}
}

// standing is a queue that has stood for a second beside somebody who waits.
func standing(t *testing.T) *aqm {
	t.Helper()
	q := &aqm{}
	echo := ethertest.Echo{}.Frame()
	q.stands(1e9)
	if !q.stands(2e9) || q.picks(echo, ether.FlowHash(echo)) {
		t.Fatal("the queue does not stand")
	}
	for i := range q.flows { // whoever sends
		q.flows[i] = aqmFlow{aqmCount{2, aqmBulk, 0}, aqmShare}
	}
	f := ether.FlowHash(echo)
	q.flows[f%aqmFlows] = aqmFlow{}
	return q
}

// TestShed: on the way out, plain and sealed, a super-frame lacks its first segment and an
// ordinary frame is gone, or they are marked; one batch, one sender.
func TestShed(t *testing.T) {
	const segment = 1000
	for _, sealed := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			net := underlaytest.NewNet(1)
			var n []*testNode
			if sealed {
				n, _ = sealedMesh(t, net, 2, Config{})
				bothWays(t, n, 1, 2)
			} else {
				n = mesh(t, net, 2, Config{})
			}
			defer end(n)
			n[1].dev.Inject(frame(macOf(2), ether.Broadcast, "hello"), ether.Meta{})
			synctest.Wait()
			n[0].got()
			p := (*n[0].bridge.ports.Load())[0]
			// send returns the payload that arrives, and the TOS that all of it has.
			send := func(tos byte, size int, q *aqm) (got []byte, mark byte) {
				payload := bytes.Repeat([]byte("0123456789"), size/10)
				b, m := ethertest.TCP{SrcMAC: macOf(1), DstMAC: macOf(2), TOS: tos, Payload: payload}.Super(segment)
				l := &lane{tx: n[0].tunnel.cfg.Conn.NewSender(), queue: q}
				head := append(make([]byte, 8), b...)
				p.forward(l, &tap.Frame{B: head[8:], Meta: m, Head: head})
				l.tx.Flush()
				synctest.Wait()
				for f, ok := n[1].dev.TryNext(); ok; f, ok = n[1].dev.TryNext() {
					h, ok := ether.ParseHeaders(f.B)
					if !ok {
						t.Fatalf("got %x", f.B)
					}
					got, mark = append(got, f.B[h.Payload:h.End]...), f.B[h.L3+1]
				}
				return got, mark
			}
			for _, tt := range []struct {
				tos         byte
				size, want  int
				mark        byte
				drop, marks uint64
			}{
				{0, 5000, 4000, 0, 1, 0},
				{0, segment, 0, 0, 1, 0},
				{0x2, 5000, 5000, 0x3, 0, 1}, // ECT(0)
				{0x2, segment, segment, 0x3, 0, 1},
				{0, 500, 500, 0, 0, 0}, // a small one
			} {
				drops := n[0].tunnel.Drops()
				drop, marks := drops.Count(DropAQM), drops.Count(DropAQMMarked)
				q := standing(t)
				got, mark := send(tt.tos, tt.size, q)
				if drop, marks = drops.Count(DropAQM)-drop, drops.Count(DropAQMMarked)-marks; len(got) != tt.want || mark != tt.mark || drop != tt.drop || marks != tt.marks {
					t.Errorf("sealed %t, TOS %d, %d bytes: %d with TOS %d arrive, %d dropped, %d marked; want %+v", sealed, tt.tos, tt.size, len(got), mark, drop, marks, tt)
				}
				if drop+marks == 0 {
					continue // the next is the first to be picked
				}
				if got, _ := send(tt.tos, 5000, q); len(got) != 5000 {
					t.Errorf("sealed %t, after %+v: of the next super-frame %d bytes arrive", sealed, tt, len(got))
				}
			}
			if got, _ := send(0, 5000, nil); len(got) != 5000 {
				t.Errorf("sealed %t: of a queue that does not stand %d bytes arrive", sealed, len(got))
			}
		})
	}
}

// standingQueue is a queue that gives a super-frame and an echo each millisecond, for 200.
type standingQueue struct {
	nullDevice
	reads int
}

func (q *standingQueue) Read(b *tap.Batch) error {
	time.Sleep(time.Millisecond) // of the bubble's time
	b.Frames = b.Frames[:0]
	if q.reads++; q.reads <= 200 {
		echo := ethertest.Echo{SrcMAC: macOf(1), DstMAC: macOf(2)}.Frame()
		b.Frames = append(b.Frames, tap.Frame{B: echo}, superFrame())
	}
	return nil
}

// TestShedByWorker: the worker of a TAP's queue finds out that it stands, unless that is
// switched off or a limit's doing.
func TestShedByWorker(t *testing.T) {
	for _, tt := range []struct {
		name    string
		off     bool
		limited bool
		want    bool
	}{{"it stands", false, false, true}, {"switched off", true, false, false}, {"limited", false, true, false}} {
		synctest.Test(t, func(t *testing.T) {
			tunnel, _, p := hotBridge(t)
			tunnel.cfg.NoAQM = tt.off
			if tt.limited {
				p.limits = newPortLimits(Limits{FromDevice: Rate{BitsPerSecond: 50e9}}, nil)
			}
			l, w := &lane{tx: &nullSender{}}, &egress{q: &standingQueue{}}
			time.Sleep(time.Hour)
			if !p.drain(w, l) {
				t.Fatal("the device is gone")
			}
			if n := tunnel.Drops().Count(DropAQM); (n > 0) != tt.want || n > 200/aqmShare {
				t.Errorf("%s: %d segments were dropped", tt.name, n)
			}
			if w.queue.since != 0 {
				t.Errorf("%s: it is empty, and stands", tt.name)
			}
		})
	}
}

func TestAQMNoAllocs(t *testing.T) {
	_, _, p := hotBridge(t)
	l := &lane{tx: &nullSender{}, queue: standing(t)}
	super, small := superFrame(), smallFrame()
	if n := testing.AllocsPerRun(100, func() {
		l.queue.stands(l.queue.now + 1e6)
		p.forward(l, &small)
		p.forward(l, &super)
	}); n != 0 {
		t.Errorf("%v allocations for two frames of a queue that stands, want 0", n)
	}
}

// fullSlots makes in receive so many batches of a TCP stream and an echo, for 2 ms each.
func fullSlots(t *testing.T, in *ingress, tos byte, batches int, more bool) {
	tcp := ethertest.TCP{SrcMAC: macOf(2), DstMAC: macOf(1), TOS: tos, Payload: make([]byte, 8900)}.Frame()
	echo := ethertest.Echo{SrcMAC: macOf(2), DstMAC: macOf(1)}.Frame()
	for range batches {
		in.batch.Slots, in.batch.More = in.batch.Slots[:0], more
		for _, f := range [][]byte{tcp, echo, tcp} {
			d := make([]byte, vxlan.HeaderLen, vxlan.HeaderLen+len(f))
			vxlan.Put(d, testVNI)
			in.batch.Slots = append(in.batch.Slots, underlay.Slot{Src: vtepOf(2), B: append(d, f...)})
		}
		in.handle()
		time.Sleep(2 * time.Millisecond) // of the bubble's time
	}
}

// TestShedOnTheWayIn: a socket in front of which datagrams stand is a queue, too.
func TestShedOnTheWayIn(t *testing.T) {
	for _, tt := range []struct {
		name        string
		tos         byte
		more, off   bool
		drop, marks bool
	}{
		{"it stands", 0, true, false, true, false},
		{"its ends speak ECN", 2, true, false, false, true},
		{"it is emptied", 0, false, false, false, false},
		{"switched off", 0, true, true, false, false},
	} {
		synctest.Test(t, func(t *testing.T) {
			tunnel, b, _ := hotBridge(t)
			tunnel.cfg.NoAQM = tt.off
			time.Sleep(time.Hour)
			in := newIngress(tunnel)
			fullSlots(t, in, tt.tos, 50, tt.more)
			drop, marks := tunnel.Drops().Count(DropAQM), tunnel.Drops().Count(DropAQMMarked)
			if (drop > 0) != tt.drop || (marks > 0) != tt.marks || drop+marks > 20 {
				t.Errorf("%s: %d dropped, %d marked", tt.name, drop, marks)
			}
			if all := b.RxFrames.Load() + drop; all != 150 {
				t.Errorf("%s: %d frames of 150 are accounted for", tt.name, all)
			}
		})
	}
}

// An uncut super-frame of a foreign VTEP is marked or let through: it is more than a segment.
func TestSuperFramesAreNotShedOnTheWayIn(t *testing.T) {
	for _, tos := range []byte{0, 2} {
		tunnel, _, _ := hotBridge(t)
		in := newIngress(tunnel)
		in.src, in.queue, in.stands = vtepOf(2), *standing(t), true
		if _, ok := in.resolve(testVNI); !ok {
			t.Fatal("no bridge")
		}
		b, m := ethertest.TCP{SrcMAC: macOf(2), DstMAC: macOf(1), TOS: tos, Payload: make([]byte, 9000)}.Super(1000)
		in.deliver(b, m)
		if drop, marks := tunnel.Drops().Count(DropAQM), tunnel.Drops().Count(DropAQMMarked); drop != 0 || marks != uint64(tos/2) || in.queue.count != 1 {
			t.Errorf("TOS %d: %d dropped, %d marked, picked %d; want it picked, and marked if that is spoken", tos, drop, marks, in.queue.count)
		}
	}
}
