package taptest

import (
	"bytes"
	"context"
	"errors"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"

	"github.com/tulle-net/tulle/ether"
	"github.com/tulle-net/tulle/tap"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func frameOf(n int, fill byte) []byte { return bytes.Repeat([]byte{fill}, n) }

func TestReadBatches(t *testing.T) {
	d := New("t0", 2, 1500, 1)
	q := d.Queues()[0]
	super := ether.Meta{GSO: ether.GSOTCPv4, SegmentLen: 1000, HeaderLen: 54, Checksum: ether.ChecksumPartial}
	for i := range 3 {
		d.Inject(frameOf(60+i, byte(i)), ether.Meta{})
	}
	big := frameOf(ether.MaxFrame, 9)
	d.Inject(big, super)
	big[0] = 0 // injected was a copy
	d.Inject(frameOf(70, 4), ether.Meta{})

	if err := q.Wait(); err != nil {
		t.Fatal(err)
	}
	b := tap.NewBatch()
	if err := q.Read(b); err != nil || len(b.Frames) != 4 {
		t.Fatalf("Read = %d frames, %v, want 4: the super-frame ends the batch", len(b.Frames), err)
	}
	for i, f := range b.Frames[:3] {
		if !bytes.Equal(f.B, frameOf(60+i, byte(i))) || f.Meta != (ether.Meta{}) {
			t.Errorf("frame %d = %x %+v", i, f.B, f.Meta)
		}
	}
	for i, f := range b.Frames { // each with room that is no other's
		if len(f.Head) != tap.Headroom+len(f.B) || cap(f.Head) != len(f.Head) || &f.Head[tap.Headroom] != &f.B[0] {
			t.Fatalf("frame %d: Head has %d bytes, B %d", i, len(f.Head), len(f.B))
		}
		if i < 3 {
			clear(f.Head)
		}
	}
	if f := b.Frames[3]; !bytes.Equal(f.B, frameOf(ether.MaxFrame, 9)) || f.Meta != super {
		t.Errorf("super-frame: %d bytes, %+v, want %d, %+v", len(f.B), f.Meta, ether.MaxFrame, super)
	}
	if err := q.Read(b); err != nil || len(b.Frames) != 1 || len(b.Frames[0].B) != 70 {
		t.Fatalf("second Read = %d frames, %v, want the one behind", len(b.Frames), err)
	}
	if err := q.Read(b); err != nil || len(b.Frames) != 0 {
		t.Fatalf("third Read = %d frames, %v, want none", len(b.Frames), err)
	}
}

func TestWrite(t *testing.T) {
	d := New("t0", 2, 1500, 2)
	m := ether.Meta{Checksum: ether.ChecksumPartial, ChecksumStart: 34, ChecksumOffset: 16}
	part := frameOf(20, 1)
	if err := d.Queues()[1].WriteFrame(m, [][]byte{part, frameOf(5, 2)}); err != nil {
		t.Fatal(err)
	}
	part[0] = 7 // parts were borrowed
	f, err := d.Next(t.Context())
	if want := append(frameOf(20, 1), frameOf(5, 2)...); err != nil || !bytes.Equal(f.B, want) || f.Meta != m {
		t.Errorf("Next = %x %+v, %v, want %x %+v", f.B, f.Meta, err, want, m)
	}
	for _, n := range []int{0, 13, ether.MaxFrame + 1} {
		if err := d.Queues()[0].WriteFrame(ether.Meta{}, [][]byte{frameOf(n, 0)}); !errors.Is(err, syscall.EINVAL) {
			t.Errorf("WriteFrame of %d bytes = %v, want EINVAL", n, err)
		}
	}
	d.SetDown(true)
	if err := d.Queues()[0].WriteFrame(m, [][]byte{part}); !errors.Is(err, syscall.EIO) {
		t.Errorf("WriteFrame while down = %v, want EIO", err)
	}
}

func TestBounds(t *testing.T) {
	d := New("t0", 2, 1500, 1)
	q, f := d.Queues()[0], frameOf(60, 1)
	for range Depth {
		if !d.Inject(f, ether.Meta{}) || q.WriteFrame(ether.Meta{}, [][]byte{f}) != nil {
			t.Fatal("dropped before it was full")
		}
	}
	if d.Inject(f, ether.Meta{}) {
		t.Error("Inject beyond Depth = true, want a drop")
	}
	if err := q.WriteFrame(ether.Meta{}, [][]byte{f}); !IsFull(err) {
		t.Errorf("WriteFrame beyond Depth = %v, want full", err)
	}
	if d.Dropped() != 2 {
		t.Errorf("Dropped = %d, want 2", d.Dropped())
	}
}

// TestClose runs in a bubble: a Wait that is not durably blocked, or not woken,
// ends the test.
func TestClose(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := New("t0", 2, 1500, 1)
		q := d.Queues()[0]
		woken := make(chan error, 2)
		go func() { woken <- q.Wait() }()
		go func() { _, err := d.Next(context.Background()); woken <- err }()
		synctest.Wait()
		ctx, cancel := context.WithTimeout(t.Context(), time.Hour) // at once in here
		defer cancel()
		if _, err := d.Next(ctx); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("Next = %v, want the deadline", err)
		}
		if err := errors.Join(d.Close(), d.Close()); err != nil {
			t.Errorf("Close = %v", err)
		}
		for range 2 {
			if err := <-woken; !errors.Is(err, tap.ErrClosed) {
				t.Errorf("woken with %v, want ErrClosed", err)
			}
		}
		b := tap.NewBatch()
		for what, err := range map[string]error{
			"Wait": q.Wait(), "Read": q.Read(b), "SetMTU": d.SetMTU(1400),
			"WriteFrame": q.WriteFrame(ether.Meta{}, [][]byte{frameOf(60, 1)}),
		} {
			if !errors.Is(err, tap.ErrClosed) {
				t.Errorf("%s after Close = %v, want ErrClosed", what, err)
			}
		}
		if d.Inject(frameOf(60, 1), ether.Meta{}) {
			t.Error("Inject after Close = true")
		}
	})
}

func TestState(t *testing.T) {
	d := New("t0", 0x0254_0a20_0001, 1450, 0)
	if d.Name() != "t0" || d.MAC() != 0x0254_0a20_0001 || d.MTU() != 1450 || len(d.Queues()) != 1 {
		t.Errorf("New = %s %v %d, %d queues", d.Name(), d.MAC(), d.MTU(), len(d.Queues()))
	}
	if err := d.SetMTU(1400); err != nil || d.MTU() != 1400 {
		t.Errorf("SetMTU(1400) = %v, MTU %d", err, d.MTU())
	}
	if err := d.SetMTU(67); err == nil || d.MTU() != 1400 {
		t.Errorf("SetMTU(67) = %v, MTU %d, want an error, 1400", err, d.MTU())
	}
	if err := d.SetOffload(true, false, true); err != nil {
		t.Fatal(err)
	}
	if o := d.Offloads(); o.TSO4 != "off" || o.TSO6 != "off" || o.USO != "on" || o.GRO != "off" {
		t.Errorf("Offloads = %+v", o)
	}
}
