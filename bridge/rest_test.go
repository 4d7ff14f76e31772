package bridge

import (
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/tulle-net/tulle/ether"
	"github.com/tulle-net/tulle/ether/ethertest"
	"github.com/tulle-net/tulle/tap"
	"github.com/tulle-net/tulle/underlay"
)

// script is a receiver that has these batches, then is closed.
type script struct {
	batches []underlay.Batch
	before  func(i int) // told of each batch before it is received
	i       int
	rested  []int // after which batches the worker rested
}

func (s *script) Wait() error {
	if s.i == len(s.batches) {
		return underlay.ErrClosed
	}
	return nil
}

func (s *script) Receive(b *underlay.Batch) error {
	if b.Slots, b.More = b.Slots[:0], false; s.i == len(s.batches) {
		return underlay.ErrClosed
	}
	if s.before != nil {
		s.before(s.i)
	}
	b.Slots, b.More = append(b.Slots, s.batches[s.i].Slots...), s.batches[s.i].More
	s.i++
	return nil
}

func (s *script) Rest(d time.Duration) {
	s.rested = append(s.rested, s.i-1)
	time.Sleep(d)
}

// oneFrame is a queue of a TAP that has one frame.
type oneFrame struct {
	nullDevice
	frame []byte
}

func (q *oneFrame) Read(b *tap.Batch) error {
	b.Frames = b.Frames[:0]
	if q.frame != nil {
		b.Frames = append(b.Frames, tap.Frame{B: q.frame})
	}
	q.frame = nil
	return nil
}

// TestRests: a worker rests after much, once the socket is empty, and while the node has
// sent nothing but acknowledgements.
func TestRests(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		tunnel, _, p := hotBridge(t)
		train, small := trainOf(t, superFrame()), trainOf(t, smallFrame())
		much := underlay.Batch{Slots: []underlay.Slot{train}}
		half := underlay.Batch{Slots: []underlay.Slot{{Src: train.Src, SegmentLen: train.SegmentLen, B: train.B[:4*train.SegmentLen]}}}
		full := underlay.Batch{Slots: half.Slots, More: true}
		s := &script{batches: []underlay.Batch{
			much, {Slots: []underlay.Slot{small}}, half, half, full, half, {}, // rests after 0, and after 5: two halves of one burst
			much, much, much, much, // not after 8 and 9: something was sent
		}}
		sends := map[int]struct {
			frame []byte
			then  time.Duration
		}{
			7:  {stream(1, 0), 0},
			8:  {stream(1, 1), 0},
			9:  {stream(1, 0), time.Duration(restQuiet) - time.Millisecond},
			10: {stream(1, 0), 2 * time.Millisecond},
		}
		s.before = func(i int) {
			if send, ok := sends[i]; ok {
				if !p.drain(&egress{q: &oneFrame{frame: send.frame}}, &lane{tx: &nullSender{}}) {
					t.Fatal("the device is gone")
				}
				time.Sleep(send.then)
			}
		}
		time.Sleep(time.Second)
		newIngress(tunnel).run(s)
		if want := []int{0, 5, 7, 10}; !slices.Equal(s.rested, want) {
			t.Errorf("rested after batches %v, want %v", s.rested, want)
		}
	})
}

// TestNotes: who waits, for what a node has sent and in a queue of it.
func TestNotes(t *testing.T) {
	ack, syn := stream(1, 0), stream(1, 0)
	syn[14+20+13] = 2
	arp := ethertest.ARPReply(macOf(1), address(1), macOf(2), address(2))
	for _, tt := range []struct {
		name           string
		frames         [][]byte
		apart          bool // the first frame's flow has had large ones
		spoke, company bool
	}{
		{"nothing", nil, false, false, false},
		{"acknowledgements", [][]byte{ack, ack}, false, false, false},
		{"a request behind one", [][]byte{ack, stream(1, 1)}, false, true, true},
		{"SYN", [][]byte{syn}, false, true, true},
		{"an echo", [][]byte{ethertest.Echo{SrcMAC: macOf(1), DstMAC: macOf(2)}.Frame()}, false, true, true},
		{"a datagram", [][]byte{smallFrame().B}, false, true, true},
		{"... behind an acknowledgement", [][]byte{ack, smallFrame().B}, false, true, true},
		{"a super-frame", [][]byte{superFrame().B}, false, true, false},
		{"the short end of a stream", [][]byte{stream(1, 1)}, true, true, false},
		{"... and somebody else", [][]byte{stream(1, 1), smallFrame().B}, true, true, true},
		{"ARP", [][]byte{arp}, false, false, false},
		{"a large frame that is not IP", [][]byte{append(arp[:12:12], make([]byte, largeLen)...)}, false, true, false},
		{"an empty frame", [][]byte{{}}, false, false, false},
	} {
		tunnel, _, _ := hotBridge(t)
		now := int64(time.Hour)
		var frames []tap.Frame
		for _, b := range tt.frames {
			frames = append(frames, tap.Frame{B: b})
		}
		if tt.apart {
			tunnel.apart.entropy(make([]byte, largeLen), ether.FlowHash(tt.frames[0]), now/int64(tick))
		}
		var w egress
		w.notes(tunnel, frames, now)
		if got := tunnel.spoke.Load() == now; got != tt.spoke {
			t.Errorf("%s: spoke = %v, want %v", tt.name, got, tt.spoke)
		}
		if got := w.company.there(now); got != tt.company {
			t.Errorf("%s: somebody waits: %v, want %v", tt.name, got, tt.company)
		}
	}
}
