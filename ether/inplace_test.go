package ether_test

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"fmt"
	"testing"

	"pgregory.net/rapid"

	"github.com/tulle-net/tulle/ether"
	"github.com/tulle-net/tulle/ether/ethertest"
	_ "github.com/tulle-net/tulle/internal/proptest"
)

// behind returns a copy of frame behind free bytes.
func behind(free int, frame []byte) []byte {
	return append(bytes.Repeat([]byte{0xee}, free), frame...)
}

// cutInPlace is cut with NextInPlace. It spoils all that a caller may spoil.
func cutInPlace(t failer, s *ether.Segmenter, free int, frame []byte, m ether.Meta) [][]byte {
	t.Helper()
	head := behind(free, frame)
	if err := s.Reset(head[free:], m); err != nil {
		t.Fatalf("Reset(%x, %+v): %v", frame[:min(len(frame), 128)], m, err)
	}
	h, _ := ether.ParseHeaders(frame)
	var out [][]byte
	count, start := s.Count(), 0
	for {
		left, maxLen := s.Count(), s.MaxLen()
		b := s.NextInPlace(head)
		if left != count-len(out) || len(b) == 0 && left != 0 {
			t.Fatalf("Count() = %d after %d of %d frames", left, len(out), count)
		}
		if len(b) == 0 {
			return out
		}
		if len(b) != free+maxLen || cap(b) != len(b) || &b[0] != &head[start] {
			t.Fatalf("frame %d: %d bytes with %d free ones, MaxLen() was %d; or not at %d", len(out), len(b), free, maxLen, start)
		}
		for i := max(0, start-100); i < start+free; i++ {
			head[i] = 0xdd // of what was used, and all that is free
		}
		out = append(out, bytes.Clone(b[free:]))
		start += len(b) - free - int(h.Payload) // of the next: its payload follows this one's
	}
}

// TestInPlace: NextInPlace gives what Next gives, whatever the super-frame, also
// where headers are longer than a segment's payload.
func TestInPlace(t *testing.T) {
	var s ether.Segmenter
	rapid.Check(t, func(t *rapid.T) {
		shape := drawTCP(t)
		n := rapid.OneOf(rapid.IntRange(1, 60), rapid.IntRange(1, 1500)).Draw(t, "segment")
		frame, m := shape.Super(n)
		if rapid.Bool().Draw(t, "UDP") {
			frame, m = ethertest.UDP{
				Src: shape.Src, FlowLabel: shape.FlowLabel, Extensions: shape.Extensions, ID: shape.ID, DF: shape.DF,
				IPOptions: shape.IPOptions, VLANs: shape.VLANs, TOS: shape.TOS, TTL: shape.TTL, Payload: shape.Payload,
			}.Super(n)
		}
		s.Unfilled = rapid.Bool().Draw(t, "unfilled")
		want := cut(t, &s, frame, m)
		partial := s.Partial()
		free := rapid.SampledFrom([]int{0, 8, 8, 300}).Draw(t, "free")
		compareFrames(t, cutInPlace(t, &s, free, frame, m), want)
		if s.Partial() != partial {
			t.Fatalf("Partial() = %t, with Next %t", s.Partial(), partial)
		}
	})
}

// TestInPlaceKinds: the corner cases of the other tests of Segmenter.
func TestInPlaceKinds(t *testing.T) {
	var s ether.Segmenter
	check := func(frame []byte, m ether.Meta) {
		t.Helper()
		for _, s.Unfilled = range []bool{false, true} {
			compareFrames(t, cutInPlace(t, &s, 8, frame, m), cut(t, &s, frame, m))
		}
	}
	for _, n := range []int{1, 88, 1448, 65000} {
		check(ethertest.TCP{Payload: pattern(65535 - 40), ID: 65000, Seq: 1<<32 - 5000, Flags: ether.TCPAck | ether.TCPCwr}.Super(n))
		check(ethertest.TCP{Src: ethertest.DefaultSrc6, Payload: pattern(65535 - 20), VLANs: []uint16{1, 2}}.Super(n))
	}
	for _, payload := range []int{0, 1, 99, 100, 101} {
		whole, m := ethertest.TCP{Payload: pattern(payload), Flags: ether.TCPAck | ether.TCPPsh | ether.TCPFin}.Super(0)
		m.GSO, m.SegmentLen = ether.GSOTCPv4, 100
		check(whole, m)
	}
	// Filled, without a checksum, ordinary, and no packet at all.
	check(ethertest.TCP{Payload: pattern(1000)}.Frame(), ether.Meta{GSO: ether.GSOTCPv4, SegmentLen: 300})
	check(ethertest.UDP{Payload: pattern(1000), NoChecksum: true}.Frame(), ether.Meta{GSO: ether.GSOUDP, SegmentLen: 3})
	check(ethertest.TCP{Payload: pattern(100), Padding: 4}.Super(0))
	check(ethertest.TCP{Payload: pattern(100)}.Frame(), ether.Meta{})
	check(make([]byte, 14), ether.Meta{})
	// The longest headers that are walked, over the shortest segments.
	long := []ethertest.Extension{ethertest.Padded(ether.ProtoHopByHop, 2048), ethertest.Padded(ether.ProtoDestOpts, 2048)}
	check(ethertest.TCP{Src: ethertest.DefaultSrc6, Extensions: long, Payload: pattern(50), Options: pattern(40)}.Super(1))

	if s.Reset(make([]byte, 13), ether.Meta{}) == nil || s.NextInPlace(make([]byte, 21)) != nil {
		t.Error("after a failed Reset NextInPlace gives something")
	}
}

func TestInPlaceMisusePanics(t *testing.T) {
	frame, m := ethertest.TCP{Payload: pattern(300)}.Super(100)
	for name, head := range map[string][]byte{"other memory": behind(8, frame), "less than the frame": frame[1:], "more behind": append(bytes.Clone(frame), 0)} {
		func() {
			defer func() {
				if recover() == nil {
					t.Errorf("%s: no panic", name)
				}
			}()
			var s ether.Segmenter
			if err := s.Reset(frame, m); err != nil {
				t.Fatal(err)
			}
			s.NextInPlace(head)
		}()
	}
}

func TestInPlaceNoAllocs(t *testing.T) {
	tcp, tm := ethertest.TCP{Payload: pattern(60000)}.Super(1448)
	udp, um := ethertest.UDP{Payload: pattern(60000)}.Super(12)
	small, sm := ethertest.TCP{}.Super(0)
	head := behind(8, tcp)
	s := ether.Segmenter{Unfilled: true}
	if n := testing.AllocsPerRun(10, func() {
		for i, f := range [][]byte{tcp, udp, small} {
			h := head[:8+len(f)]
			copy(h[8:], f)
			for s.Reset(h[8:], []ether.Meta{tm, um, sm}[i]); s.NextInPlace(h) != nil; {
			}
		}
	}); n != 0 {
		t.Errorf("%v allocations, want 0", n)
	}
}

// BenchmarkInPlace is a super-frame on its way into a train, with Next and in
// place; "sealed" with AES-256-GCM, which a copy costs less than it would alone
// because it brings the payload into the cache.
func BenchmarkInPlace(b *testing.B) {
	block, err := aes.NewCipher(make([]byte, 32))
	if err != nil {
		b.Fatal(err)
	}
	aead, err := cipher.NewGCM(block)
	if err != nil {
		b.Fatal(err)
	}
	const free = 8
	p := ethertest.TCP{Payload: pattern(45 * 1406), Options: make([]byte, 12)}
	frame, m := p.Super(1406)
	train, nonce := make([]byte, 128<<10), make([]byte, 12)
	for _, sealed := range []bool{false, true} {
		for _, inPlace := range []bool{false, true} {
			name := fmt.Sprintf("%s, %s", map[bool]string{false: "headers alone", true: "sealed"}[sealed], map[bool]string{false: "Next", true: "in place"}[inPlace])
			b.Run(name, func(b *testing.B) {
				s := ether.Segmenter{Unfilled: true}
				head := behind(free, frame)
				headers := bytes.Clone(frame[:m.HeaderLen])
				b.SetBytes(int64(len(frame)))
				for b.Loop() {
					copy(head[free:], headers) // the payload's ends are spoiled, which nobody looks at
					if err := s.Reset(head[free:], m); err != nil {
						b.Fatal(err)
					}
					for d := train; ; {
						var plain []byte
						if inPlace {
							plain = s.NextInPlace(head)
						} else if n := s.Next(d[free:]); n > 0 {
							plain = d[:free+n]
						}
						if plain == nil {
							break
						}
						if sealed {
							aead.Seal(d[:0], nonce, plain, nil)
						}
						d = d[len(plain)+16:]
					}
				}
			})
		}
	}
}
