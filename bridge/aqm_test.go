package bridge

import (
	"bytes"
	"net/netip"
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

// queueOf is a queue that a worker has read for some time, a batch each 0.1 ms: a large
// frame of each stream in turn, and now and then a small one behind it.
type queueOf struct {
	streams []tap.Frame
	small   []byte
	every   int // batches between small ones; 0: none
	empty   int // batches between times when it is empty; 0: never is
}

// picked returns when, of so many milliseconds, senders were told.
func (o queueOf) picked(q *aqm, from, forMS int) (at []int) {
	for i := range forMS * 10 {
		now := int64(from)*1e6 + int64(i+1)*1e5
		if o.empty > 0 && i%o.empty == 0 {
			q.drained()
		}
		if !q.stands(now) {
			continue
		}
		f := o.streams[i%len(o.streams)]
		if q.picks(f.B, ether.FlowHash(f.B)) {
			at = append(at, i/10)
		}
		if o.every > 0 && i%o.every == 0 && q.picks(o.small, ether.FlowHash(o.small)) {
			at = append(at, -1) // never
		}
	}
	return at
}

// port is a TCP frame of the stream with that port.
func port(p uint16, payload int) tap.Frame {
	f := ethertest.TCP{SrcMAC: macOf(1), DstMAC: macOf(2), Src: netip.AddrPortFrom(address(1), p), Dst: netip.AddrPortFrom(address(2), 80), Payload: make([]byte, payload)}
	return tap.Frame{B: f.Frame()}
}

func address(i byte) netip.Addr { return netip.AddrFrom4([4]byte{10, 32, 0, i}) }

func TestAQM(t *testing.T) {
	udp := ethertest.UDP{SrcMAC: macOf(1), DstMAC: macOf(2), Payload: make([]byte, 1400)}.Frame()
	echo := ethertest.Echo{}.Frame()
	query := ethertest.UDP{Payload: make([]byte, 40)}.Frame()
	arp := ethertest.ARPRequest(macOf(1), address(1), address(2))
	stream := []tap.Frame{port(1, 1400)}
	for _, tt := range []struct {
		name     string
		q        queueOf
		min, max int // senders told in a second
	}{
		{"a stream by itself", queueOf{streams: stream}, 0, 0},
		{"four by themselves", queueOf{streams: []tap.Frame{port(1, 1400), port(2, 1400), port(3, 1400), port(4, 1400)}}, 0, 0},
		{"a stream and its own last bytes", queueOf{streams: stream, small: port(1, 10).B, every: 20}, 0, 0},
		{"a stream beside acknowledgements", queueOf{streams: stream, small: port(9, 0).B, every: 20}, 0, 0},
		{"a stream beside ARP", queueOf{streams: stream, small: arp, every: 20}, 0, 0},
		{"no stream, but datagrams", queueOf{streams: []tap.Frame{{B: udp}}, small: echo, every: 20}, 0, 0},
		{"a queue that holds bursts", queueOf{streams: stream, small: echo, every: 20, empty: 90}, 0, 0},
		{"a stream beside an echo", queueOf{streams: stream, small: echo, every: 20}, 280, 10000 / aqmShare},
		{"a stream beside queries", queueOf{streams: stream, small: query, every: 3000}, 200, 10000 / aqmShare},
		{"a stream beside a request", queueOf{streams: stream, small: port(9, 200).B, every: 20}, 280, 10000 / aqmShare},
		{"a queue that comes to stand now and then", queueOf{streams: stream, small: echo, every: 20, empty: 200}, 40, 160},
	} {
		if got := tt.q.picked(&aqm{}, 5000, 1000); len(got) < tt.min || len(got) > tt.max {
			t.Errorf("%s: %d told in a second, want %d to %d", tt.name, len(got), tt.min, tt.max)
		} else if first := max(10, tt.q.every/10); len(got) > 0 && (got[0] < first || got[0] > first+aqmShare/10) {
			t.Errorf("%s: first after %d ms, want %d or little more", tt.name, got[0], first)
		}
	}
	// The pace of CoDel, which is forgotten after a pause.
	q := &aqm{}
	beside := queueOf{streams: stream, small: echo, every: 20}
	for _, from := range []int{5000, 6000} {
		got := beside.picked(q, from, 50)
		q.drained()
		if want := []int{10, 20, 27, 32, 37, 42, 46}; len(got) < 6 || len(got) > 8 || got[1]-got[0] < 7 || got[5]-got[4] > 6 {
			t.Errorf("told after %v ms, want about %v", got, want)
		}
	}
	// Whoever waited is gone after a second.
	alone := queueOf{streams: stream}
	q = &aqm{}
	beside.picked(q, 5000, 20)
	alone.picked(q, 5020, 1100)
	if got := alone.picked(q, 6120, 1000); len(got) > 0 {
		t.Errorf("%d told because of somebody who is gone", len(got))
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
	q.large = aqmShare
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

// fullSlots makes in receive so many batches of a TCP stream and an echo, for 2 ms each.
func fullSlots(t *testing.T, in *ingress, tos byte, batches int, more bool) {
	tcp := ethertest.TCP{SrcMAC: macOf(2), DstMAC: macOf(1), TOS: tos, Payload: make([]byte, 1400)}.Frame()
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
