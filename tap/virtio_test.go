package tap

import (
	"bytes"
	"encoding/binary"
	"errors"
	"testing"

	"github.com/tulle-net/tulle/ether"
)

// header returns a virtio header; its integers are in the machine's order.
func header(flags, gso byte, hdrLen, gsoSize, start, offset uint16) []byte {
	h := []byte{flags, gso}
	for _, v := range []uint16{hdrLen, gsoSize, start, offset} {
		h = binary.NativeEndian.AppendUint16(h, v)
	}
	return h
}

// tcpFrame returns n bytes with a TCP data offset of words at l4.
func tcpFrame(n, l4, words int) []byte {
	b := make([]byte, n)
	b[l4+12] = byte(words << 4)
	return b
}

func TestDecodeVirtio(t *testing.T) {
	partial := func(start, offset uint16) ether.Meta {
		return ether.Meta{Checksum: ether.ChecksumPartial, ChecksumStart: start, ChecksumOffset: offset}
	}
	tso := partial(34, 16)
	tso.GSO, tso.SegmentLen, tso.HeaderLen = ether.GSOTCPv4, 1398, 34+32
	tso6 := partial(58, 16) // with a VLAN tag
	tso6.GSO, tso6.SegmentLen, tso6.HeaderLen, tso6.ECN = ether.GSOTCPv6, 1378, 58+20, true
	uso := partial(34, 6)
	uso.GSO, uso.SegmentLen, uso.HeaderLen = ether.GSOUDP, 1200, 42
	for _, c := range []struct {
		what  string
		h     []byte
		frame []byte
		want  ether.Meta
		ok    bool
	}{
		{"ordinary", header(0, 0, 0, 0, 0, 0), make([]byte, 60), ether.Meta{}, true},
		{"stale fields are ignored", header(0, 0, 66, 1398, 34, 16), make([]byte, 60), ether.Meta{}, true},
		{"empty", header(0, 0, 0, 0, 0, 0), nil, ether.Meta{}, true},
		{"verified", header(2, 0, 0, 0, 0, 0), make([]byte, 60), ether.Meta{Checksum: ether.ChecksumVerified}, true},
		{"partial", header(1, 0, 0, 0, 34, 16), make([]byte, 60), partial(34, 16), true},
		{"partial wins", header(3, 0, 0, 0, 34, 6), make([]byte, 60), partial(34, 6), true},
		{"field is the last of the frame", header(1, 0, 0, 0, 34, 6), make([]byte, 42), partial(34, 6), true},
		{"field beyond the frame", header(1, 0, 0, 0, 34, 6), make([]byte, 41), ether.Meta{}, false},
		{"start overflows", header(1, 0, 0, 0, 0xffff, 0xffff), make([]byte, 60), ether.Meta{}, false},
		{"TSO4; hdr_len is a hint", header(1, 1, 1500, 1398, 34, 16), tcpFrame(9000, 34, 8), tso, true},
		{"TSO6 with ECN", header(1, 0x84, 0, 1378, 58, 16), tcpFrame(9000, 58, 5), tso6, true},
		{"USO", header(1, 5, 42, 1200, 34, 6), make([]byte, 9000), uso, true},
		{"GSO without partial checksum", header(0, 1, 66, 1398, 34, 16), tcpFrame(9000, 34, 8), ether.Meta{}, false},
		{"GSO verified", header(2, 1, 66, 1398, 34, 16), tcpFrame(9000, 34, 8), ether.Meta{}, false},
		{"GSO without size", header(1, 1, 66, 0, 34, 16), tcpFrame(9000, 34, 8), ether.Meta{}, false},
		{"UFO", header(1, 3, 42, 1200, 34, 6), make([]byte, 9000), ether.Meta{}, false},
		{"unknown GSO", header(1, 6, 42, 1200, 34, 6), make([]byte, 9000), ether.Meta{}, false},
		{"ECN alone", header(1, 0x80, 42, 1200, 34, 6), make([]byte, 9000), ether.Meta{}, false},
		{"USO with ECN", header(1, 0x85, 42, 1200, 34, 6), make([]byte, 9000), ether.Meta{}, false},
		{"TSO with UDP's offset", header(1, 1, 66, 1398, 34, 6), tcpFrame(9000, 34, 8), ether.Meta{}, false},
		{"USO with TCP's offset", header(1, 5, 42, 1200, 34, 16), make([]byte, 9000), ether.Meta{}, false},
		{"TCP header too short", header(1, 1, 66, 1398, 34, 16), tcpFrame(9000, 34, 4), ether.Meta{}, false},
		{"TCP header cut", header(1, 1, 66, 1398, 34, 16), tcpFrame(53, 34, 5), ether.Meta{}, false},
		{"TCP options cut", header(1, 1, 66, 1398, 34, 16), tcpFrame(66, 34, 15), ether.Meta{}, false},
		{"no payload", header(1, 1, 54, 1398, 34, 16), tcpFrame(54, 34, 5), ether.Meta{}, false},
	} {
		m, err := decodeVirtio(c.h, c.frame)
		if m != c.want || (err == nil) != c.ok || (err != nil && !errors.Is(err, errHeader)) {
			t.Errorf("%s: decodeVirtio(%x) = %+v, %v, want %+v, ok %v", c.what, c.h, m, err, c.want, c.ok)
		}
	}
}

func TestEncodeVirtio(t *testing.T) {
	for _, c := range []struct {
		m    ether.Meta
		want []byte
	}{
		{ether.Meta{}, header(0, 0, 0, 0, 0, 0)},
		{ether.Meta{ECN: true, ChecksumStart: 34, ChecksumOffset: 16}, header(0, 0, 0, 0, 0, 0)},
		{ether.Meta{Checksum: ether.ChecksumVerified, ChecksumStart: 34}, header(2, 0, 0, 0, 0, 0)},
		{ether.Meta{Checksum: ether.ChecksumPartial, ChecksumStart: 34, ChecksumOffset: 16}, header(1, 0, 0, 0, 34, 16)},
		{ether.Meta{GSO: ether.GSOTCPv4, ECN: true, Checksum: ether.ChecksumPartial, ChecksumStart: 34, ChecksumOffset: 16, HeaderLen: 66, SegmentLen: 1398}, header(1, 0x81, 66, 1398, 34, 16)},
		{ether.Meta{GSO: ether.GSOTCPv6, Checksum: ether.ChecksumPartial, ChecksumStart: 54, ChecksumOffset: 16, HeaderLen: 74, SegmentLen: 1378}, header(1, 4, 74, 1378, 54, 16)},
		{ether.Meta{GSO: ether.GSOUDP, Checksum: ether.ChecksumPartial, ChecksumStart: 34, ChecksumOffset: 6, HeaderLen: 42, SegmentLen: 1200}, header(1, 5, 42, 1200, 34, 6)},
	} {
		h := bytes.Repeat([]byte{0xee}, virtioLen) // dirty, as when reused
		encodeVirtio(h, c.m)
		if !bytes.Equal(h, c.want) {
			t.Errorf("encodeVirtio(%+v) = %x, want %x", c.m, h, c.want)
		}
	}
}

func TestProbes(t *testing.T) {
	for _, kind := range []ether.GSO{ether.GSONone, ether.GSOTCPv4, ether.GSOTCPv6, ether.GSOUDP} {
		frame, m := probe(kind, 0x0254_0a20_0001)
		var h [virtioLen]byte
		encodeVirtio(h[:], m)
		if got, err := decodeVirtio(h[:], frame); err != nil || got != m {
			t.Errorf("%s: decodes to %+v, %v, want %+v", kindName(kind), got, err, m)
		}
		var s ether.Segmenter
		if err := s.Reset(frame, m); err != nil {
			t.Fatalf("%s: %v", kindName(kind), err)
		}
		want := 2
		if kind == ether.GSONone {
			want = 1
		}
		if n := s.Count(); n != want {
			t.Errorf("%s: %d segments, want %d", kindName(kind), n, want)
		}
		out := make([]byte, 2000)
		for n := s.Next(out); n > 0; n = s.Next(out) {
			if hs, ok := ether.ParseHeaders(out[:n]); !ok || !ether.VerifyL4(out[:n], hs) {
				t.Errorf("%s: segment %x has a wrong checksum", kindName(kind), out[:n])
			}
		}
	}
}

func FuzzDecodeVirtio(f *testing.F) {
	frame, m := probe(ether.GSOTCPv4, 2)
	h := make([]byte, virtioLen)
	encodeVirtio(h, m)
	f.Add(append(h, frame...))
	f.Add(append(header(1, 5, 42, 1200, 34, 6), make([]byte, 60)...))
	f.Add(append(header(1, 0x84, 0, 1, 0xfffe, 16), make([]byte, 20)...))
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) < virtioLen {
			return
		}
		frame := b[virtioLen:]
		m, err := decodeVirtio(b[:virtioLen], frame)
		if err != nil {
			if m != (ether.Meta{}) {
				t.Fatalf("%+v beside an error", m)
			}
			return
		}
		if m.Checksum == ether.ChecksumPartial && int(m.ChecksumStart)+int(m.ChecksumOffset)+2 > len(frame) {
			t.Fatalf("%+v: checksum beyond %d bytes", m, len(frame))
		}
		if m.GSO != ether.GSONone && (m.SegmentLen == 0 || int(m.HeaderLen) >= len(frame) || m.HeaderLen <= m.ChecksumStart) {
			t.Fatalf("%+v: lengths beyond %d bytes", m, len(frame))
		}
		var again [virtioLen]byte
		encodeVirtio(again[:], m)
		if m2, err := decodeVirtio(again[:], frame); err != nil || m2 != m {
			t.Fatalf("encode and decode of %+v = %+v, %v", m, m2, err)
		}
	})
}
