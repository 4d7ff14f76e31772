package tap

import (
	"bytes"
	"slices"
	"testing"

	"github.com/tulle-net/tulle/ether"
	"github.com/tulle-net/tulle/internal/ready"
)

// TestHeadroom: before each frame there is room that is no other's. Who writes
// over a frame and its room, from the last frame to the first, spoils none.
func TestHeadroom(t *testing.T) {
	eachDriver(t, func(t *testing.T, d Driver) {
		s := newSpace(t)
		dev := s.open(Config{Driver: d})
		q := dev.Queues()[0]
		out := s.packetSocket(dev)
		b := NewBatch()
		for fileOf(q).Readable() { // the stack's own
			if err := q.Read(b); err != nil {
				t.Fatal(err)
			}
		}
		var want [][]byte
		for i := range 20 {
			frame, _ := udpFrame(here, there, pattern(46+i), 0) // behind every end of a cache line
			out.send(t, frame, ether.Meta{})
			want = append(want, frame)
		}
		for len(want) > 0 {
			if err := q.Wait(); err != nil {
				t.Fatal(err)
			}
			if err := q.Read(b); err != nil || len(b.Frames) == 0 {
				t.Fatalf("Read = %d frames, %v", len(b.Frames), err)
			}
			for i, f := range slices.Backward(b.Frames) {
				if len(f.Head) != Headroom+len(f.B) || cap(f.Head) != len(f.Head) || &f.Head[Headroom] != &f.B[0] {
					t.Fatalf("Head has %d bytes (room for %d), B %d, want the same behind %d", len(f.Head), cap(f.Head), len(f.B), Headroom)
				}
				if !bytes.Equal(f.B, want[i]) {
					t.Fatalf("frame %d is damaged: %x", i, f.B)
				}
				for j := range f.Head {
					f.Head[j] = 0xee
				}
			}
			want = want[len(b.Frames):]
		}
	})
}

func TestFrameAt(t *testing.T) {
	buf := pattern(100)
	f := FrameAt(buf, 60)
	if len(f.B) != 60 || len(f.Head) != 68 || cap(f.B) != 60 || cap(f.Head) != 68 || &f.Head[0] != &buf[0] || &f.B[0] != &buf[Headroom] {
		t.Errorf("FrameAt: B has %d bytes of %d, Head %d of %d", len(f.B), cap(f.B), len(f.Head), cap(f.Head))
	}
	if f := FrameAt(buf, 0); len(f.B) != 0 || len(f.Head) != Headroom {
		t.Errorf("FrameAt of nothing: %d, %d bytes", len(f.B), len(f.Head))
	}
}

// fileOf returns the descriptor of a queue.
func fileOf(q Queue) *ready.File {
	if q, ok := q.(*offloadQueue); ok {
		return q.file
	}
	return q.(*plainDevice).file
}
