package ether_test

import (
	"bytes"
	"testing"

	"pgregory.net/rapid"

	"github.com/tulle-net/tulle/ether"
	"github.com/tulle-net/tulle/ether/ethertest"
	_ "github.com/tulle-net/tulle/internal/proptest"
)

func TestPartialMeta(t *testing.T) {
	v6 := ethertest.DefaultSrc6
	ext := []ethertest.Extension{ethertest.Padded(ether.ProtoHopByHop, 8)}
	for _, tt := range []struct {
		name          string
		frame         []byte
		start, offset uint16 // 0: it is false
	}{
		{"TCP", ethertest.TCP{Partial: true, Payload: pattern(10)}.Frame(), 34, 16},
		{"TCP, filled all the same", ethertest.TCP{Payload: pattern(10)}.Frame(), 34, 16},
		{"TCP, padded", ethertest.TCP{Partial: true, Padding: 6}.Frame(), 34, 16},
		{"UDP", ethertest.UDP{Partial: true, VLANs: []uint16{1, 2}, IPOptions: make([]byte, 4)}.Frame(), 46, 6},
		{"TCP, IPv6", ethertest.TCP{Partial: true, Src: v6}.Frame(), 54, 16},
		{"UDP, IPv6", ethertest.UDP{Partial: true, Src: v6, Extensions: ext}.Frame(), 62, 6},
		{"ICMP", ethertest.Echo{}.Frame(), 0, 0},
		{"ARP", ethertest.ARPRequest(macA, ethertest.DefaultSrc.Addr(), ethertest.DefaultDst.Addr()), 0, 0},
		{"fragment", patch(ethertest.UDP{Payload: pattern(100), Partial: true}.Frame(), 20, 0x20), 0, 0},
		{"nothing", nil, 0, 0},
	} {
		want := ether.Meta{Checksum: ether.ChecksumPartial, ChecksumStart: tt.start, ChecksumOffset: tt.offset}
		if tt.start == 0 {
			want = ether.Meta{}
		}
		if m, ok := ether.PartialMeta(tt.frame); m != want || ok != (tt.start != 0) {
			t.Errorf("%s: PartialMeta = %+v, %t, want %+v", tt.name, m, ok, want)
		}
	}
	whole := ethertest.TCP{Partial: true, Src: v6, Extensions: ext, VLANs: []uint16{3}}.Frame()
	for n := range whole {
		if m, ok := ether.PartialMeta(whole[:n]); ok || m != (ether.Meta{}) {
			t.Errorf("cut at %d: PartialMeta = %+v, %t", n, m, ok)
		}
	}
}

// TestPartialElsewhere: a guest's tunnel has the inner checksum unfilled, and no
// receiver would find it. It is filled before the wire.
func TestPartialElsewhere(t *testing.T) {
	s := ether.Segmenter{Unfilled: true}
	tunnelled := func(inner []byte) []byte {
		return ethertest.UDP{Payload: append(pattern(8), inner...), NoChecksum: true}.Frame()
	}
	tcp, udp := ethertest.TCP{Payload: pattern(100)}, ethertest.UDP{Payload: pattern(100)}
	for _, tt := range []struct {
		want   []byte
		offset uint16
		inner  func(segmentLen int) ([]byte, ether.Meta)
	}{{tunnelled(tcp.Frame()), 16, tcp.Super}, {tunnelled(udp.Frame()), 6, udp.Super}} {
		inner, _ := tt.inner(0)
		m := ether.Meta{Checksum: ether.ChecksumPartial, ChecksumStart: 50 + 34, ChecksumOffset: tt.offset}
		for _, got := range [][][]byte{cut(t, &s, tunnelled(inner), m), cutInPlace(t, &s, 8, tunnelled(inner), m)} {
			if s.Partial() {
				t.Error("Partial() = true for a checksum that PartialMeta does not find")
			}
			compareFrames(t, got, [][]byte{tt.want})
		}
	}
	// And what no PartialMeta describes: another protocol (SCTP's own sum is a
	// CRC, which a kernel fills itself).
	icmp := ethertest.Echo{Payload: pattern(50)}.Frame()
	m := ether.Meta{Checksum: ether.ChecksumPartial, ChecksumStart: 34, ChecksumOffset: 2}
	compareFrames(t, cut(t, &s, patch(icmp, 36, 0, 0), m), [][]byte{icmp})
}

// TestSealedPath: cut unfilled and merged again as on the other side of a wire
// that authenticates, the super-frame is the same, what stays alone still asks
// for its checksum, and finished all of them are right.
func TestSealedPath(t *testing.T) {
	s := ether.Segmenter{Unfilled: true}
	c := ether.NewCoalescer(65535)
	rapid.Check(t, func(t *rapid.T) {
		shape := drawTCP(t)
		shape.IPOptions, shape.Extensions = nil, nil
		shape.Flags = ether.TCPAck | shape.Flags&(ether.TCPEce|ether.TCPPsh|ether.TCPFin)
		n := rapid.IntRange(1, 1460).Draw(t, "segment")
		shape.Payload = pattern(rapid.IntRange(n+1, min(n*ether.MaxSegments, 65535-100)).Draw(t, "bytes"))
		frame, m := shape.Super(n)
		lone, lm := ethertest.UDP{Src: shape.Src, VLANs: shape.VLANs, Payload: pattern(30)}.Super(0)
		sink := &collector{}
		for _, f := range append(cutInPlace(t, &s, 8, frame, m), lone) {
			pm, ok := ether.PartialMeta(f)
			if !ok || pm.ChecksumStart != m.ChecksumStart {
				t.Fatalf("PartialMeta(%x) = %+v, %t", f, pm, ok)
			}
			c.Add(sink, f, pm)
		}
		c.Flush()
		if len(sink.got) != 2 {
			t.Fatalf("%d frames, want a super-frame and the lone one", len(sink.got))
		}
		if got := sink.got[0]; got.m != m || !bytes.Equal(got.frame, frame) {
			t.Fatalf("super-frame %+v, want %+v", got.m, m)
		}
		if got := sink.got[1]; got.m != lm || !bytes.Equal(got.frame, lone) || got.first != &lone[0] {
			t.Fatalf("lone frame %+v, want %+v as it was", got.m, lm)
		}
		for _, f := range sink.frames(t) {
			if err := ethertest.Verify(f); err != nil {
				t.Fatal(err)
			}
		}
	})
}

// TestPartialIsNotSummed: no sum over a payload on the way, or this one, which
// changes between cutting and merging, would be seen.
func TestPartialIsNotSummed(t *testing.T) {
	s := ether.Segmenter{Unfilled: true}
	frame, m := ethertest.TCP{Payload: pattern(3000)}.Super(1000)
	segments := cut(t, &s, frame, m)
	for _, f := range segments {
		f[100] ^= 0xff
	}
	if out := merge(ether.Meta{Checksum: ether.ChecksumPartial, ChecksumStart: 34, ChecksumOffset: 16}, segments...); len(out.got) != 1 || out.got[0].m != m {
		t.Errorf("%d frames, want one super-frame", len(out.got))
	}
	// With the zero Meta, which is for filled ones, nothing of the kind merges.
	if out := merge(ether.Meta{}, segments...); len(out.got) != 3 || out.got[0].m != (ether.Meta{}) {
		t.Errorf("not said to be partial: %d frames, want 3", len(out.got))
	}
}

func TestPartialNoAllocs(t *testing.T) {
	c, sink := ether.NewCoalescer(65535), &forget{}
	in := tcpSegments(ethertest.TCP{Payload: pattern(5000)}, 1000, true)
	batch := func() {
		for _, f := range in {
			m, _ := ether.PartialMeta(f)
			c.Add(sink, f, m)
		}
		c.Flush()
	}
	batch()
	if n := testing.AllocsPerRun(10, batch); n != 0 {
		t.Errorf("%v allocations, want 0", n)
	}
}

func BenchmarkPartialMeta(b *testing.B) {
	f := ethertest.TCP{Payload: pattern(1400), Partial: true}.Frame()
	b.SetBytes(int64(len(f)))
	for b.Loop() {
		if _, ok := ether.PartialMeta(f); !ok {
			b.Fatal("no")
		}
	}
}
