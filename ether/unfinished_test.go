package ether_test

import (
	"bytes"
	"encoding/binary"
	"testing"

	"github.com/tulle-net/tulle/ether"
	"github.com/tulle-net/tulle/ether/ethertest"
)

func TestUnfinished(t *testing.T) {
	v6 := ethertest.DefaultSrc6
	ext := []ethertest.Extension{ethertest.Padded(ether.ProtoHopByHop, 8)}
	partial := func(start, offset uint16) ether.Meta {
		return ether.Meta{Checksum: ether.ChecksumPartial, ChecksumStart: start, ChecksumOffset: offset}
	}
	super := func(gso ether.GSO, ecn bool, header, segmentLen, start uint16) ether.Meta {
		m := partial(start, 16)
		m.GSO, m.ECN, m.HeaderLen, m.SegmentLen = gso, ecn, header, segmentLen
		return m
	}
	const cwr = ether.TCPAck | ether.TCPCwr
	for _, tt := range []struct {
		name  string
		frame []byte
		mtu   int
		want  ether.Meta
		ok    bool
	}{
		{"TCP", ethertest.TCP{Payload: pattern(100), Partial: true}.Frame(), 1450, partial(34, 16), true},
		{"TCP, padded", ethertest.TCP{Partial: true, Padding: 6}.Frame(), 1450, partial(34, 16), true},
		{"TCP, IPv6", ethertest.TCP{Payload: pattern(100), Partial: true, Src: v6, VLANs: []uint16{1}}.Frame(), 1450, partial(58, 16), true},
		{"UDP", ethertest.UDP{Payload: pattern(100), Partial: true, IPOptions: make([]byte, 4)}.Frame(), 1450, partial(38, 6), true},
		{"UDP, IPv6", ethertest.UDP{Payload: pattern(100), Partial: true, Src: v6, Extensions: ext}.Frame(), 1450, partial(62, 6), true},
		{"just the MTU", ethertest.TCP{Payload: pattern(1410), Partial: true}.Frame(), 1450, partial(34, 16), true},
		{"one byte more", ethertest.TCP{Payload: pattern(1411), Partial: true}.Frame(), 1450, super(ether.GSOTCPv4, false, 54, 1410, 34), true},
		{"oversize", ethertest.TCP{Payload: pattern(60000), Options: pattern(12), Partial: true, Flags: cwr}.Frame(), 1450, super(ether.GSOTCPv4, true, 66, 1398, 34), true},
		{"oversize, IPv6", ethertest.TCP{Payload: pattern(9000), Src: v6, Extensions: ext, Partial: true}.Frame(), 1418, super(ether.GSOTCPv6, false, 82, 1350, 62), true},
		{"oversize UDP", ethertest.UDP{Payload: pattern(45000), Partial: true}.Frame(), 1450, partial(34, 6), true},
		{"oversize, padded", ethertest.TCP{Payload: pattern(9000), Partial: true, Padding: 1}.Frame(), 1450, partial(34, 16), true},
		{"MTU less than the headers", ethertest.TCP{Payload: pattern(900), Partial: true}.Frame(), 40, partial(34, 16), true},

		{"filled", ethertest.TCP{Payload: pattern(100)}.Frame(), 1450, ether.Meta{}, false},
		{"filled, oversize", ethertest.TCP{Payload: pattern(9000)}.Frame(), 1450, ether.Meta{}, false},
		{"filled, damaged", patch(ethertest.TCP{Payload: pattern(100)}.Frame(), 60, 0xee), 1450, ether.Meta{}, false},
		{"no checksum", ethertest.UDP{Payload: pattern(100), NoChecksum: true}.Frame(), 1450, ether.Meta{}, false},
		{"ICMP", ethertest.Echo{}.Frame(), 1450, ether.Meta{}, false},
		{"IPv4 header damaged", patch(ethertest.TCP{Partial: true}.Frame(), 22, 1), 1450, ether.Meta{}, false},
		{"fragment", patch(ethertest.UDP{Payload: pattern(100), Partial: true}.Frame(), 20, 0x20), 1450, ether.Meta{}, false},
		{"nothing", nil, 1450, ether.Meta{}, false},
	} {
		before := bytes.Clone(tt.frame)
		m, ok := ether.Unfinished(tt.frame, tt.mtu)
		if m != tt.want || ok != tt.ok {
			t.Errorf("%s: Unfinished = %+v, %t, want %+v, %t", tt.name, m, ok, tt.want, tt.ok)
		}
		if !bytes.Equal(before, tt.frame) {
			t.Errorf("%s: the frame was changed", tt.name)
		}
		if !ok || m.GSO != ether.GSONone && m.SegmentLen > 1450 {
			continue
		}
		// It can be cut and finished, and then fits.
		var s ether.Segmenter
		for _, f := range cut(t, &s, tt.frame, m) {
			ethertest.Check(t, f)
			if h, _ := ether.ParseHeaders(f); m.GSO != ether.GSONone && int(h.End)-int(h.L3) > tt.mtu {
				t.Errorf("%s: packet of %d bytes", tt.name, int(h.End)-int(h.L3))
			}
		}
	}
}

// TestUnfinishedByChance: the right checksum of some packets is the sum of the
// pseudo-header. They are finished.
func TestUnfinishedByChance(t *testing.T) {
	found := 0
	for i := range 1 << 16 {
		f := ethertest.TCP{Seq: uint32(i), Payload: []byte{1, 2}}.Frame()
		h, _ := ether.ParseHeaders(f)
		if binary.BigEndian.Uint16(f[50:52]) != ether.PseudoSumOf(f, h) {
			continue
		}
		found++
		ethertest.Check(t, f)
		if m, ok := ether.Unfinished(f, 1450); ok {
			t.Errorf("Unfinished(%x) = %+v, true", f, m)
		}
	}
	if found == 0 {
		t.Error("no such packet in 65,536")
	}
}

func TestUnfinishedNoAllocs(t *testing.T) {
	filled, partial := ethertest.TCP{Payload: pattern(1000)}.Frame(), ethertest.TCP{Payload: pattern(1000), Partial: true}.Frame()
	if n := testing.AllocsPerRun(100, func() {
		ether.Unfinished(filled, 1450)
		ether.Unfinished(partial, 1450)
	}); n != 0 {
		t.Errorf("%v allocations, want 0", n)
	}
}

func BenchmarkUnfinished(b *testing.B) {
	for name, f := range map[string][]byte{
		"filled":  ethertest.TCP{Payload: pattern(1400)}.Frame(),
		"partial": ethertest.TCP{Payload: pattern(1400), Partial: true}.Frame(),
		"super":   ethertest.TCP{Payload: pattern(60000), Partial: true}.Frame(),
	} {
		b.Run(name, func(b *testing.B) {
			b.SetBytes(int64(len(f)))
			for b.Loop() {
				ether.Unfinished(f, 1450)
			}
		})
	}
}
