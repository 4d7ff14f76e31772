package ether_test

import (
	"encoding/binary"
	"fmt"
	"testing"

	"github.com/tulle-net/tulle/ether"
	"github.com/tulle-net/tulle/ether/ethertest"
)

// l4Frames returns TCP and UDP frames of every shape, filled or partial.
func l4Frames(payload int, partial bool) map[string][]byte {
	b := make([]byte, payload)
	for i := range b {
		b[i] = byte(i*i + i>>8)
	}
	ext := []ethertest.Extension{ethertest.Padded(ether.ProtoHopByHop, 8)}
	return map[string][]byte{
		"TCP4": ethertest.TCP{Payload: b, Partial: partial}.Frame(),
		"TCP6": ethertest.TCP{Src: ethertest.DefaultSrc6, Payload: b, Partial: partial, Options: make([]byte, 12)}.Frame(),
		"UDP4": ethertest.UDP{Payload: b, Partial: partial, IPOptions: make([]byte, 4), VLANs: []uint16{1}}.Frame(),
		"UDP6": ethertest.UDP{Src: ethertest.DefaultSrc6, Payload: b, Partial: partial, Extensions: ext, VLANs: []uint16{1, 2}}.Frame(),
	}
}

func metaOf(t *testing.T, frame []byte) ether.Meta {
	t.Helper()
	h, ok := ether.ParseHeaders(frame)
	if !ok {
		t.Fatalf("ParseHeaders(%x) is not ok", frame)
	}
	m := ether.Meta{Checksum: ether.ChecksumPartial, ChecksumStart: h.L4, ChecksumOffset: ether.TCPChecksumOffset}
	if h.Proto == ether.ProtoUDP {
		m.ChecksumOffset = ether.UDPChecksumOffset
	}
	return m
}

func TestFinishChecksum(t *testing.T) {
	for _, n := range []int{0, 1, 2, 19, 1400, 60000} {
		want := l4Frames(n, false)
		for name, frame := range l4Frames(n, true) {
			h, _ := ether.ParseHeaders(frame)
			if ether.VerifyL4(frame, h) {
				t.Errorf("%s of %d: partial checksum passes VerifyL4", name, n)
			}
			m := metaOf(t, frame)
			at := m.ChecksumStart + m.ChecksumOffset
			if got, want := binary.BigEndian.Uint16(frame[at:]), ether.PseudoSumOf(frame, h); got != want {
				t.Errorf("%s of %d: partial checksum %#04x, PseudoSumOf %#04x", name, n, got, want)
			}
			if !ether.FinishChecksum(frame, m) {
				t.Errorf("%s of %d: FinishChecksum(%+v) is false", name, n, m)
			}
			ethertest.Check(t, frame)
			if string(frame) != string(want[name]) {
				t.Errorf("%s of %d: finished frame is not the one built whole", name, n)
			}
			if !ether.VerifyL4(frame, h) {
				t.Errorf("%s of %d: finished frame fails VerifyL4", name, n)
			}
		}
	}
}

// TestFinishChecksumZero: a sum of 0 is written as 0xffff for UDP, as 0 for TCP.
func TestFinishChecksumZero(t *testing.T) {
	udp := func(word uint16) []byte {
		return ethertest.UDP{Payload: []byte{byte(word >> 8), byte(word)}, Partial: true}.Frame()
	}
	f := udp(0)
	ether.FinishChecksum(f, metaOf(t, f))
	// The checksum c of a payload of zero is itself the payload that makes it 0.
	f = udp(binary.BigEndian.Uint16(f[40:]))
	ether.FinishChecksum(f, metaOf(t, f))
	if got := binary.BigEndian.Uint16(f[40:]); got != 0xffff {
		t.Errorf("UDP checksum %#04x, want 0xffff", got)
	}
	ethertest.Check(t, f)

	f = ethertest.TCP{}.Frame()
	word := binary.BigEndian.Uint16(f[50:])
	f = ethertest.TCP{Urgent: word, Partial: true}.Frame()
	ether.FinishChecksum(f, metaOf(t, f))
	if got := binary.BigEndian.Uint16(f[50:]); got != 0 {
		t.Errorf("TCP checksum %#04x, want 0", got)
	}
	ethertest.Check(t, f)
	if h, _ := ether.ParseHeaders(f); !ether.VerifyL4(f, h) {
		t.Error("TCP with checksum 0 fails VerifyL4")
	}
}

func TestFinishChecksumBounds(t *testing.T) {
	frame := ethertest.TCP{Payload: []byte("x"), Partial: true}.Frame()
	n := uint16(len(frame))
	for _, tt := range []struct {
		start, offset uint16
		want          bool
	}{{n - 2, 0, true}, {0, n - 2, true}, {n - 1, 0, false}, {n, 0, false}, {0, n - 1, false}, {0xffff, 0xffff, false}, {34, 0xffff, false}} {
		b := append([]byte(nil), frame...)
		m := ether.Meta{Checksum: ether.ChecksumPartial, ChecksumStart: tt.start, ChecksumOffset: tt.offset}
		got := ether.FinishChecksum(b, m)
		if got != tt.want || !got && string(b) != string(frame) {
			t.Errorf("FinishChecksum(%d bytes, start %d, offset %d) = %t, changed %t, want %t",
				n, tt.start, tt.offset, got, string(b) != string(frame), tt.want)
		}
	}
	for _, c := range []ether.Checksum{ether.ChecksumUnknown, ether.ChecksumVerified} {
		b := append([]byte(nil), frame...)
		if !ether.FinishChecksum(b, ether.Meta{Checksum: c, ChecksumStart: 34, ChecksumOffset: 16}) || string(b) != string(frame) {
			t.Errorf("FinishChecksum touched a frame whose checksum is in state %d", c)
		}
	}
}

// TestVerifyL4Corrupt: each wrong bit of the packet, but for those that the
// checksum does not cover, is seen.
func TestVerifyL4Corrupt(t *testing.T) {
	for name, frame := range l4Frames(33, false) {
		h, ok := ether.ParseHeaders(frame)
		if !ok || !ether.VerifyL4(frame, h) {
			t.Fatalf("%s: good frame fails", name)
		}
		for bit := int(h.L4) * 8; bit < int(h.End)*8; bit++ {
			frame[bit/8] ^= 1 << (bit % 8)
			if h, ok := ether.ParseHeaders(frame); ok && ether.VerifyL4(frame, h) {
				t.Errorf("%s: bit %d of byte %d flipped and VerifyL4 is true", name, bit%8, bit/8)
			}
			frame[bit/8] ^= 1 << (bit % 8)
		}
	}
}

func TestVerifyL4NoChecksum(t *testing.T) {
	for _, tt := range []struct {
		frame []byte
		want  bool
	}{
		{ethertest.UDP{NoChecksum: true, Payload: []byte("x")}.Frame(), true},
		{ethertest.UDP{NoChecksum: true, Payload: []byte("x"), Src: ethertest.DefaultSrc6}.Frame(), false},
	} {
		h, ok := ether.ParseHeaders(tt.frame)
		if got := ether.VerifyL4(tt.frame, h); !ok || got != tt.want {
			t.Errorf("VerifyL4 of UDP without checksum, IPv6 %t: %t, want %t", h.V6, got, tt.want)
		}
	}
	echo := ethertest.Echo{}.Frame()
	if h, _ := ether.ParseHeaders(echo); ether.VerifyL4(echo, h) {
		t.Error("VerifyL4 of ICMP is true, want false")
	}
}

// TestVerifyL4Padding: what is behind the packet is not summed.
func TestVerifyL4Padding(t *testing.T) {
	f := ethertest.TCP{Payload: []byte("abc"), Padding: 3}.Frame()
	f[len(f)-1] = 0xee
	if h, ok := ether.ParseHeaders(f); !ok || !ether.VerifyL4(f, h) {
		t.Errorf("VerifyL4 of a frame with padding is false, %+v", h)
	}
}

func FuzzFinishChecksum(f *testing.F) {
	for _, frame := range l4Frames(3, true) {
		h, _ := ether.ParseHeaders(frame)
		f.Add(frame, h.L4, uint16(6))
		f.Add(frame, h.L4, uint16(16))
	}
	f.Add([]byte{}, uint16(0), uint16(0))
	f.Fuzz(func(t *testing.T, b []byte, start, offset uint16) {
		got := ether.FinishChecksum(b, ether.Meta{Checksum: ether.ChecksumPartial, ChecksumStart: start, ChecksumOffset: offset})
		if want := int(start)+int(offset)+2 <= len(b); got != want {
			t.Errorf("FinishChecksum(%d bytes, start %d, offset %d) = %t, want %t", len(b), start, offset, got, want)
		}
	})
}

func TestFinishNoAllocs(t *testing.T) {
	frame, m := ethertest.TCP{Payload: make([]byte, 1400)}.Super(0)
	if n := testing.AllocsPerRun(10, func() { ether.FinishChecksum(frame, m) }); n != 0 {
		t.Errorf("FinishChecksum: %v allocations, want 0", n)
	}
}

func BenchmarkVerifyL4(b *testing.B) {
	for _, n := range []int{0, 1400, 64000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			frame := ethertest.TCP{Payload: make([]byte, n)}.Frame()
			h, _ := ether.ParseHeaders(frame)
			b.SetBytes(int64(len(frame)))
			for b.Loop() {
				if !ether.VerifyL4(frame, h) {
					b.Fatal("VerifyL4 is false")
				}
			}
		})
	}
}
