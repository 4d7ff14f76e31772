package ether_test

import (
	"bytes"
	"fmt"
	"testing"

	"pgregory.net/rapid"

	"github.com/tulle-net/tulle/ether"
	"github.com/tulle-net/tulle/ether/ethertest"
	_ "github.com/tulle-net/tulle/internal/proptest"
)

// pattern returns n bytes that differ from place to place.
func pattern(n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(i ^ i>>8*7)
	}
	return b
}

// failer is the part of testing.TB that rapid.T has as well.
type failer interface {
	Helper()
	Fatal(...any)
	Fatalf(string, ...any)
}

// cut returns what s makes of a frame, and checks Count and MaxLen on the way.
func cut(t failer, s *ether.Segmenter, frame []byte, m ether.Meta) [][]byte {
	t.Helper()
	before := bytes.Clone(frame)
	if err := s.Reset(frame, m); err != nil {
		t.Fatalf("Reset(%x, %+v): %v", frame[:min(len(frame), 128)], m, err)
	}
	var out [][]byte
	count, maxLen := s.Count(), s.MaxLen()
	for {
		left := s.Count()
		dst := bytes.Repeat([]byte{0xaa}, s.MaxLen()+1)
		n := s.Next(dst[:s.MaxLen()])
		if left != count-len(out) {
			t.Fatalf("Count() = %d after %d of %d frames", left, len(out), count)
		}
		if n == 0 {
			break
		}
		if n != len(dst)-1 || len(out) == 0 && n != maxLen || n > maxLen || dst[n] != 0xaa {
			t.Fatalf("frame %d: Next() = %d, MaxLen() was %d, at first %d", len(out), n, len(dst)-1, maxLen)
		}
		out = append(out, dst[:n:n])
	}
	if len(out) != count || s.MaxLen() != 0 {
		t.Fatalf("%d frames, Count() was %d; MaxLen() at the end = %d", len(out), count, s.MaxLen())
	}
	if !bytes.Equal(before, frame) {
		t.Fatal("the super-frame was changed")
	}
	return out
}

// tcpSegments builds the segments of p one by one: what cutting must give.
func tcpSegments(p ethertest.TCP, segmentLen int, partial bool) [][]byte {
	var out [][]byte
	payload, flags := p.Payload, p.Flags
	for first := true; first || len(payload) > 0; first = false {
		n := min(segmentLen, len(payload))
		p.Payload, payload = payload[:n], payload[n:]
		p.Flags, p.Partial = flags, partial
		if !first {
			p.Flags &^= ether.TCPCwr
		}
		if len(payload) > 0 {
			p.Flags &^= ether.TCPFin | ether.TCPPsh
		}
		out = append(out, p.Frame())
		p.Seq += uint32(n)
		p.ID++
	}
	return out
}

// udpSegments is tcpSegments for UDP.
func udpSegments(p ethertest.UDP, segmentLen int, partial bool) [][]byte {
	var out [][]byte
	payload := p.Payload
	for first := true; first || len(payload) > 0; first = false {
		n := min(segmentLen, len(payload))
		p.Payload, payload = payload[:n], payload[n:]
		p.Partial = partial
		out = append(out, p.Frame())
		p.ID++
	}
	return out
}

func compareFrames(t failer, got, want [][]byte) {
	t.Helper()
	if len(got) != len(want) {
		t.Fatalf("%d frames, want %d", len(got), len(want))
	}
	for i := range got {
		if !bytes.Equal(got[i], want[i]) {
			t.Fatalf("frame %d of %d:\n got %x\nwant %x", i, len(got), got[i][:min(128, len(got[i]))], want[i][:min(128, len(want[i]))])
		}
	}
}

// drawShape draws what stands before the transport header.
func drawShape(t *rapid.T) (p ethertest.TCP) {
	if rapid.Bool().Draw(t, "v6") {
		p.Src, p.FlowLabel = ethertest.DefaultSrc6, rapid.Uint32Range(0, 0xfffff).Draw(t, "label")
		for range rapid.IntRange(0, 2).Draw(t, "extensions") {
			proto := rapid.SampledFrom([]uint8{ether.ProtoHopByHop, ether.ProtoDestOpts}).Draw(t, "extension")
			p.Extensions = append(p.Extensions, ethertest.Padded(proto, rapid.SampledFrom([]int{8, 24}).Draw(t, "length")))
		}
	} else {
		p.ID, p.DF = rapid.Uint16().Draw(t, "id"), rapid.Bool().Draw(t, "DF")
		p.IPOptions = make([]byte, rapid.SampledFrom([]int{0, 0, 4, 40}).Draw(t, "IP options"))
		for i := range p.IPOptions {
			p.IPOptions[i] = 1
		}
	}
	p.VLANs = rapid.SampledFrom([][]uint16{nil, {7}, {8, 9}}).Draw(t, "VLANs")
	p.TOS, p.TTL = rapid.Uint8().Draw(t, "TOS"), rapid.Uint8Range(1, 255).Draw(t, "TTL")
	p.Payload = pattern(rapid.IntRange(0, 3000).Draw(t, "payload"))
	return p
}

func drawTCP(t *rapid.T) ethertest.TCP {
	p := drawShape(t)
	p.Seq, p.Ack = rapid.Uint32().Draw(t, "seq"), rapid.Uint32().Draw(t, "ack")
	p.Flags = rapid.Uint8().Draw(t, "flags") | ether.TCPAck
	p.Window, p.Urgent = rapid.Uint16Min(1).Draw(t, "window"), rapid.Uint16().Draw(t, "urgent")
	p.Options = pattern(rapid.SampledFrom([]int{0, 12, 40}).Draw(t, "options"))
	return p
}

func drawUDP(t *rapid.T) ethertest.UDP {
	p := drawShape(t)
	return ethertest.UDP{
		Src: p.Src, FlowLabel: p.FlowLabel, Extensions: p.Extensions, ID: p.ID, DF: p.DF, IPOptions: p.IPOptions,
		VLANs: p.VLANs, TOS: p.TOS, TTL: p.TTL, Payload: p.Payload,
	}
}

// TestSegmentTCP: what is cut is what the sender would have sent in segments.
func TestSegmentTCP(t *testing.T) {
	var s ether.Segmenter
	rapid.Check(t, func(t *rapid.T) {
		p := drawTCP(t)
		n := rapid.IntRange(1, 1500).Draw(t, "segment")
		frame, m := p.Super(n)
		m.HeaderLen = rapid.Uint16().Draw(t, "hint") // means nothing
		if m.GSO == ether.GSONone {
			m.HeaderLen, n = 0, len(p.Payload)
		}
		s.Unfilled = rapid.Bool().Draw(t, "unfilled")
		compareFrames(t, cut(t, &s, frame, m), tcpSegments(p, max(n, 1), s.Unfilled))
		if s.Partial() != s.Unfilled {
			t.Fatalf("Partial() = %t, Unfilled is %t", s.Partial(), s.Unfilled)
		}
	})
}

func TestSegmentUDP(t *testing.T) {
	var s ether.Segmenter
	rapid.Check(t, func(t *rapid.T) {
		p := drawUDP(t)
		n := rapid.IntRange(1, 1500).Draw(t, "segment")
		frame, m := p.Super(n)
		if m.GSO == ether.GSONone {
			n = len(p.Payload)
		}
		s.Unfilled = rapid.Bool().Draw(t, "unfilled")
		compareFrames(t, cut(t, &s, frame, m), udpSegments(p, max(n, 1), s.Unfilled))
	})
}

// TestSegmentLargest: 64 KiB, in the usual segments and in the smallest.
func TestSegmentLargest(t *testing.T) {
	var s ether.Segmenter
	for _, n := range []int{1, 88, 1448, 65000} {
		p := ethertest.TCP{Payload: pattern(65535 - 40), ID: 65000, Seq: 1<<32 - 5000, Flags: ether.TCPAck | ether.TCPPsh}
		frame, m := p.Super(n)
		compareFrames(t, cut(t, &s, frame, m), tcpSegments(p, n, false))
		p = ethertest.TCP{Src: ethertest.DefaultSrc6, Payload: pattern(65535 - 20), Flags: ether.TCPAck, VLANs: []uint16{1, 2}}
		frame, m = p.Super(n)
		compareFrames(t, cut(t, &s, frame, m), tcpSegments(p, n, false))
	}
}

// TestSegmentWhole: a super-frame that fits one segment, or has no payload, is
// one frame.
func TestSegmentWhole(t *testing.T) {
	var s ether.Segmenter
	for _, payload := range []int{0, 1, 99, 100} {
		p := ethertest.TCP{Payload: pattern(payload), Flags: ether.TCPAck | ether.TCPPsh | ether.TCPFin | ether.TCPCwr}
		frame, m := p.Super(0)
		m.GSO, m.SegmentLen = ether.GSOTCPv4, 100
		compareFrames(t, cut(t, &s, frame, m), [][]byte{p.Frame()})
		d := ethertest.UDP{Src: ethertest.DefaultSrc6, Payload: pattern(payload)}
		frame, m = d.Super(0)
		m.GSO, m.SegmentLen = ether.GSOUDP, 100
		compareFrames(t, cut(t, &s, frame, m), [][]byte{d.Frame()})
	}
}

// TestSegmentZeroSum: a datagram whose sum comes to 0 gets 0xffff.
func TestSegmentZeroSum(t *testing.T) {
	// The first two bytes of the second segment are such that all adds up.
	p := ethertest.UDP{Payload: make([]byte, 20), ID: 3}
	d := ethertest.UDP{Payload: make([]byte, 10), ID: 4}.Frame()
	copy(p.Payload[10:], d[40:42]) // its checksum, as data
	frame, m := p.Super(10)
	var s ether.Segmenter
	got := cut(t, &s, frame, m)
	if len(got) != 2 || got[1][40] != 0xff || got[1][41] != 0xff {
		t.Fatalf("checksum of %x is not 0xffff", got[1])
	}
	ethertest.Check(t, got...)
}

// TestSegmentFilled: the checksum of a super-frame that is not partial.
func TestSegmentFilled(t *testing.T) {
	var s ether.Segmenter
	p := ethertest.TCP{Payload: pattern(1000)}
	frame := p.Frame()
	for _, sum := range []ether.Checksum{ether.ChecksumUnknown, ether.ChecksumVerified} {
		m := ether.Meta{GSO: ether.GSOTCPv4, SegmentLen: 300, Checksum: sum}
		compareFrames(t, cut(t, &s, frame, m), tcpSegments(p, 300, false))
	}
	for i := 26; i < len(frame); i++ { // from the addresses on
		bad := patch(frame, i, frame[i]^0x10)
		if s.Reset(bad, ether.Meta{GSO: ether.GSOTCPv4, SegmentLen: 300}) == nil {
			t.Fatalf("byte %d changed: Reset finds no fault", i)
		}
		if n := s.Next(make([]byte, 2000)); n != 0 || s.Count() != 0 || s.MaxLen() != 0 {
			t.Fatalf("after a failed Reset Next() = %d, Count() = %d, MaxLen() = %d", n, s.Count(), s.MaxLen())
		}
	}
	// UDP without a checksum stays so, also if it may be left unfilled.
	d := ethertest.UDP{Payload: pattern(1000), NoChecksum: true}
	for _, s.Unfilled = range []bool{false, true} {
		for _, sum := range []ether.Checksum{ether.ChecksumUnknown, ether.ChecksumVerified} {
			m := ether.Meta{GSO: ether.GSOUDP, SegmentLen: 300, Checksum: sum}
			compareFrames(t, cut(t, &s, d.Frame(), m), udpSegments(d, 300, false))
			if s.Partial() {
				t.Error("Partial() = true for UDP without a checksum")
			}
		}
		// And one after it that has one gets it.
		full := ethertest.UDP{Payload: pattern(1000)}
		partial, m := full.Super(300)
		compareFrames(t, cut(t, &s, partial, m), udpSegments(full, 300, s.Unfilled))
	}
}

// TestSegmentOrdinary: a frame that is no super-frame comes out once, finished.
func TestSegmentOrdinary(t *testing.T) {
	var s ether.Segmenter
	p := ethertest.TCP{Payload: pattern(100), Padding: 4}
	partial, m := p.Super(0)
	compareFrames(t, cut(t, &s, partial, m), [][]byte{p.Frame()})
	s.Unfilled = true
	compareFrames(t, cut(t, &s, partial, m), [][]byte{partial})
	if !s.Partial() {
		t.Error("Partial() = false for an unfilled frame")
	}
	bad := patch(p.Frame(), 60, 0xee)
	for _, frame := range [][]byte{p.Frame(), bad, make([]byte, 14), bytes.Repeat([]byte{0xff}, 9000)} {
		compareFrames(t, cut(t, &s, frame, ether.Meta{}), [][]byte{frame})
		if s.Partial() {
			t.Error("Partial() = true for a frame that is not")
		}
	}
}

func TestSegmentRefuses(t *testing.T) {
	tcp, tm := ethertest.TCP{Payload: pattern(500)}.Super(100)
	udp, um := ethertest.UDP{Payload: pattern(500), Src: ethertest.DefaultSrc6}.Super(100)
	with := func(m ether.Meta, f func(*ether.Meta)) ether.Meta { f(&m); return m }
	for _, tt := range []struct {
		name  string
		frame []byte
		m     ether.Meta
	}{
		{"nothing", nil, ether.Meta{}},
		{"less than a header", tcp[:13], ether.Meta{}},
		{"checksum outside", tcp[:60], ether.Meta{Checksum: ether.ChecksumPartial, ChecksumStart: 50, ChecksumOffset: 9}},
		{"checksum far outside", tcp, ether.Meta{Checksum: ether.ChecksumPartial, ChecksumStart: 65535, ChecksumOffset: 65535}},
		{"no segment length", tcp, with(tm, func(m *ether.Meta) { m.SegmentLen = 0 })},
		{"IPv4 as IPv6", tcp, with(tm, func(m *ether.Meta) { m.GSO = ether.GSOTCPv6 })},
		{"TCP as UDP", tcp, with(tm, func(m *ether.Meta) { m.GSO = ether.GSOUDP })},
		{"UDP as TCP", udp, with(um, func(m *ether.Meta) { m.GSO = ether.GSOTCPv6 })},
		{"unknown kind", tcp, with(tm, func(m *ether.Meta) { m.GSO = 9 })},
		{"checksum elsewhere", tcp, with(tm, func(m *ether.Meta) { m.ChecksumStart += 2 })},
		{"checksum at another offset", udp, with(um, func(m *ether.Meta) { m.ChecksumOffset = 16 })},
		{"cut short", tcp[:len(tcp)-1], tm},
		{"padding", append(bytes.Clone(tcp), 0), tm},
		{"TCP header too short", patch(tcp, 46, 0x40), tm},
		{"TCP header too long", patch(tcp[:54:54], 46, 0xf0), tm},
		{"IPv4 header too short", patch(tcp, 14, 0x44), tm},
		{"fragment", patch(tcp, 20, 0x20), tm},
		{"UDP length", patch(udp, 59, udp[59]^1), um},
		{"ICMP", ethertest.Echo{Payload: pattern(500)}.Frame(), tm},
		{"ARP", ethertest.ARPRequest(macA, ethertest.DefaultSrc.Addr(), ethertest.DefaultDst.Addr()), tm},
	} {
		var s ether.Segmenter
		if err := s.Reset(tt.frame, tt.m); err == nil {
			t.Errorf("%s: Reset finds no fault", tt.name)
		}
		if n := s.Next(make([]byte, ether.MaxFrame)); n != 0 {
			t.Errorf("%s: Next() = %d after an error", tt.name, n)
		}
	}
}

// FuzzSegment: whatever a frame and its Meta are, the pieces are whole frames,
// and their payloads are the payload of the frame.
func FuzzSegment(f *testing.F) {
	add := func(frame []byte, m ether.Meta) {
		f.Add(frame, byte(m.GSO), byte(m.Checksum), m.SegmentLen, m.ChecksumStart, m.ChecksumOffset, false)
	}
	ext := []ethertest.Extension{ethertest.Padded(ether.ProtoHopByHop, 16)}
	add(ethertest.TCP{Payload: pattern(300), VLANs: []uint16{1}}.Super(100))
	add(ethertest.TCP{Payload: pattern(300), Src: ethertest.DefaultSrc6, Extensions: ext}.Super(70))
	add(ethertest.UDP{Payload: pattern(300), IPOptions: make([]byte, 8)}.Super(100))
	add(ethertest.UDP{Payload: pattern(100), Src: ethertest.DefaultSrc6}.Super(0))
	add(ethertest.UDP{Payload: pattern(300)}.Frame(), ether.Meta{GSO: ether.GSOUDP, SegmentLen: 9})
	add(ethertest.TCP{Payload: pattern(9)}.Frame(), ether.Meta{})
	add(ethertest.UDP{Payload: pattern(99), Src: ethertest.DefaultSrc6, Extensions: ext}.Super(2))
	f.Fuzz(func(t *testing.T, frame []byte, gso, sum byte, segmentLen, start, offset uint16, unfilled bool) {
		m := ether.Meta{GSO: ether.GSO(gso % 5), Checksum: ether.Checksum(sum % 3), SegmentLen: segmentLen, ChecksumStart: start, ChecksumOffset: offset}
		s := ether.Segmenter{Unfilled: unfilled}
		if s.Reset(frame, m) != nil {
			return
		}
		got := cut(t, &s, frame, m)
		compareFrames(t, cutInPlace(t, &s, len(frame)%9, frame, m), got)
		if m.GSO == ether.GSONone {
			want := bytes.Clone(frame)
			if !s.Partial() {
				ether.FinishChecksum(want, m)
			}
			compareFrames(t, got, [][]byte{want})
			return
		}
		h, _ := ether.ParseHeaders(frame)
		var payload []byte
		for i, g := range got {
			gh, ok := ether.ParseHeaders(g)
			if !ok || gh.Payload != h.Payload || int(gh.End) != len(g) {
				t.Fatalf("segment %d: ParseHeaders(%x) = %+v, %v", i, g, gh, ok)
			}
			if !unfilled && !(m.Checksum == ether.ChecksumVerified && !ether.VerifyL4(frame, h)) && !h.V6 && !ether.VerifyL4(g, gh) {
				t.Fatalf("segment %d: wrong checksum: %x", i, g)
			}
			if ip, err := ether.ParseIPv4(g[gh.L3:]); !gh.V6 && (err != nil || !ip.ChecksumOK()) {
				t.Fatalf("segment %d: IPv4 header: %x", i, g)
			}
			payload = append(payload, g[gh.Payload:]...)
		}
		if !bytes.Equal(payload, frame[h.Payload:]) {
			t.Fatalf("payload of %d bytes, want %d", len(payload), len(frame)-int(h.Payload))
		}
	})
}

func TestSegmentNoAllocs(t *testing.T) {
	var s ether.Segmenter
	dst := make([]byte, 2000)
	tcp, tm := ethertest.TCP{Payload: pattern(60000)}.Super(1448)
	udp, um := ethertest.UDP{Payload: pattern(60000)}.Super(1200)
	if n := testing.AllocsPerRun(10, func() {
		for s.Reset(tcp, tm); s.Next(dst) != 0; {
		}
		for s.Reset(udp, um); s.Next(dst) != 0; {
		}
		s.Reset(tcp[:20], tm)
	}); n != 0 {
		t.Errorf("%v allocations, want 0", n)
	}
}

func BenchmarkSegment(b *testing.B) {
	opts := make([]byte, 12)
	tcp4, tm4 := ethertest.TCP{Payload: pattern(45 * 1448), Options: opts}.Super(1448)
	tcp6, tm6 := ethertest.TCP{Payload: pattern(45 * 1428), Options: opts, Src: ethertest.DefaultSrc6}.Super(1428)
	udp, um := ethertest.UDP{Payload: pattern(45 * 1400)}.Super(1400)
	for _, bb := range []struct {
		name     string
		frame    []byte
		m        ether.Meta
		unfilled bool
	}{{"TCPv4", tcp4, tm4, false}, {"TCPv6", tcp6, tm6, false}, {"UDPv4", udp, um, false}, {"TCPv4 unfilled", tcp4, tm4, true}} {
		b.Run(fmt.Sprintf("%s/45", bb.name), func(b *testing.B) {
			s := ether.Segmenter{Unfilled: bb.unfilled}
			// A train: the segments stand behind each other, as in a send.
			dst := make([]byte, 128<<10)
			b.SetBytes(int64(len(bb.frame)))
			segments := 0
			for b.Loop() {
				if err := s.Reset(bb.frame, bb.m); err != nil {
					b.Fatal(err)
				}
				for d := dst; ; segments++ {
					n := s.Next(d)
					if n == 0 {
						break
					}
					d = d[n+8:]
				}
			}
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(segments), "ns/segment")
		})
	}
	small, m := ethertest.TCP{}.Super(0)
	b.Run("small", func(b *testing.B) {
		var s ether.Segmenter
		dst := make([]byte, 128)
		b.SetBytes(int64(len(small)))
		for b.Loop() {
			if s.Reset(small, m) != nil || s.Next(dst) == 0 {
				b.Fatal("nothing")
			}
		}
	})
}
