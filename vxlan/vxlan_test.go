package vxlan_test

import (
	"bytes"
	"errors"
	"testing"

	"github.com/tulle-net/tulle/vxlan"
)

// Headers as RFC 7348, section 5, draws them: flags, 24 reserved bits, VNI, 8
// reserved bits.
var golden = []struct {
	vni vxlan.VNI
	hdr [vxlan.HeaderLen]byte
}{
	{0, [8]byte{0x08, 0, 0, 0, 0x00, 0x00, 0x00, 0}},
	{1, [8]byte{0x08, 0, 0, 0, 0x00, 0x00, 0x01, 0}},
	{100, [8]byte{0x08, 0, 0, 0, 0x00, 0x00, 0x64, 0}},
	{65536, [8]byte{0x08, 0, 0, 0, 0x01, 0x00, 0x00, 0}},
	{0x123456, [8]byte{0x08, 0, 0, 0, 0x12, 0x34, 0x56, 0}},
	{vxlan.MaxVNI, [8]byte{0x08, 0, 0, 0, 0xff, 0xff, 0xff, 0}},
}

func TestPut(t *testing.T) {
	for _, tt := range golden {
		b := bytes.Repeat([]byte{0xee}, vxlan.HeaderLen+2)
		vxlan.Put(b, tt.vni)
		if want := string(tt.hdr[:]) + "\xee\xee"; string(b) != want {
			t.Errorf("Put(%v) = %x, want %x", tt.vni, b, want)
		}
	}
}

// TestPutLargeVNI: bits beyond 24 never reach the flags.
func TestPutLargeVNI(t *testing.T) {
	var b [vxlan.HeaderLen]byte
	vxlan.Put(b[:], 0xff_123456)
	if want := [8]byte{0x08, 0, 0, 0, 0x12, 0x34, 0x56, 0}; b != want {
		t.Errorf("Put(0xff123456) = %x, want %x", b, want)
	}
}

func TestParse(t *testing.T) {
	for _, tt := range golden {
		for _, inner := range []string{"", "x", "an inner frame"} {
			b := append(tt.hdr[:], inner...)
			vni, frame, err := vxlan.Parse(b)
			if vni != tt.vni || string(frame) != inner || err != nil {
				t.Errorf("Parse(%x) = %v, %q, %v, want %v, %q", b, vni, frame, err, tt.vni, inner)
			}
			if len(inner) > 0 && &frame[0] != &b[vxlan.HeaderLen] {
				t.Errorf("Parse(%x) copied the frame", b)
			}
		}
	}
}

func TestParseTruncated(t *testing.T) {
	hdr := golden[4].hdr[:]
	for n := range hdr {
		if vni, frame, err := vxlan.Parse(hdr[:n:n]); !errors.Is(err, vxlan.ErrShort) || vni != 0 || frame != nil {
			t.Errorf("Parse(%x) = %v, %x, %v, want ErrShort", hdr[:n], vni, frame, err)
		}
	}
}

// TestParseFlags: of all first bytes only 0x08 is a header.
func TestParseFlags(t *testing.T) {
	for c := range 256 {
		hdr := golden[4].hdr
		hdr[0] = byte(c)
		vni, frame, err := vxlan.Parse(hdr[:])
		if c == vxlan.FlagVNI {
			if vni != 0x123456 || err != nil {
				t.Errorf("Parse(%x) = %v, %v, want 0x123456", hdr, vni, err)
			}
		} else if !errors.Is(err, vxlan.ErrFlags) || vni != 0 || frame != nil {
			t.Errorf("Parse(%x) = %v, %x, %v, want ErrFlags", hdr, vni, frame, err)
		}
	}
}

// TestParseReserved: each reserved bit of the other bytes is ignored.
func TestParseReserved(t *testing.T) {
	for _, at := range []int{1, 2, 3, 7} {
		for bit := range 8 {
			hdr := golden[4].hdr
			hdr[at] |= 1 << bit
			if vni, _, err := vxlan.Parse(hdr[:]); vni != 0x123456 || err != nil {
				t.Errorf("Parse(%x) = %v, %v, want 0x123456", hdr, vni, err)
			}
		}
	}
}

func TestVNIString(t *testing.T) {
	if got := vxlan.MaxVNI.String(); got != "16777215" {
		t.Errorf("MaxVNI.String() = %q, want 16777215", got)
	}
}

func TestNoAllocs(t *testing.T) {
	b := make([]byte, 1458)
	var sum int
	if n := testing.AllocsPerRun(100, func() {
		vxlan.Put(b, 100)
		vni, frame, err := vxlan.Parse(b)
		if err == nil {
			sum += int(vni) + len(frame)
		}
		if _, _, err := vxlan.Parse(b[:7]); err != nil {
			sum++
		}
	}); n != 0 || sum != 101*(100+1450+1) {
		t.Errorf("%v allocations, sum %d, want 0 and %d", n, sum, 101*(100+1450+1))
	}
}

// FuzzParse: no input panics, and what is accepted survives Put with its
// reserved bits gone.
func FuzzParse(f *testing.F) {
	for _, tt := range golden {
		f.Add(append(tt.hdr[:], "inner"...))
	}
	f.Add([]byte{})
	f.Add([]byte{0x88, 0, 0, 7, 0, 0, 1, 0})
	f.Add([]byte{0x08, 0xff, 0xff, 0xff, 0, 0, 1, 0xff})
	f.Fuzz(func(t *testing.T, b []byte) {
		vni, frame, err := vxlan.Parse(b)
		if err != nil {
			if len(b) >= vxlan.HeaderLen && b[0] == vxlan.FlagVNI {
				t.Fatalf("Parse(%x) = %v", b, err)
			}
			return
		}
		again := make([]byte, vxlan.HeaderLen, len(b))
		vxlan.Put(again, vni)
		again = append(again, frame...)
		want := bytes.Clone(b)
		want[1], want[2], want[3], want[7] = 0, 0, 0, 0
		if !bytes.Equal(again, want) {
			t.Fatalf("Parse(%x), then Put = %x, want %x", b, again, want)
		}
	})
}

func BenchmarkPut(b *testing.B) {
	buf := make([]byte, vxlan.HeaderLen)
	b.SetBytes(vxlan.HeaderLen)
	for b.Loop() {
		vxlan.Put(buf, 100)
	}
}

func BenchmarkParse(b *testing.B) {
	buf := make([]byte, 1458)
	vxlan.Put(buf, 100)
	b.SetBytes(int64(len(buf)))
	for b.Loop() {
		if _, _, err := vxlan.Parse(buf); err != nil {
			b.Fatal(err)
		}
	}
}
