package ether_test

import (
	"bytes"
	"net/netip"
	"testing"

	"github.com/tulle-net/tulle/ether"
	"github.com/tulle-net/tulle/ether/ethertest"
)

// TestMarkCE: what is ECN-capable gets CE with all else as it was, whatever its headers
// are; what is not stays as it is.
func TestMarkCE(t *testing.T) {
	v6 := netip.MustParseAddrPort("[fd00::1]:1")
	for _, shape := range []ethertest.TCP{
		{Payload: make([]byte, 100)},
		{Src: v6, Dst: v6, FlowLabel: 0xfffff, Payload: make([]byte, 100)},
		{VLANs: []uint16{7, 8}, IPOptions: []byte{1, 1, 1, 0}, ID: 0xffff, Payload: make([]byte, 3)},
		{Src: v6, Dst: v6, VLANs: []uint16{7}},
	} {
		for tos := range 256 {
			shape.TOS = byte(tos)
			frame := shape.Frame()
			want := bytes.Clone(frame)
			if tos&3 != 0 {
				shape.TOS |= 3
				want = shape.Frame()
			}
			h, ok := ether.ParseHeaders(frame)
			if !ok {
				t.Fatalf("%+v has no headers", shape)
			}
			if got := ether.MarkCE(frame, h); got != (tos&3 != 0) || !bytes.Equal(frame, want) {
				t.Fatalf("TOS %#x: MarkCE = %t,\n%x, want\n%x", tos, got, frame, want)
			}
		}
	}
	arp := ethertest.ARPRequest(1, netip.MustParseAddr("10.32.0.1"), netip.MustParseAddr("10.32.0.2"))
	h, _ := ether.ParseHeaders(arp)
	if was := bytes.Clone(arp); ether.MarkCE(arp, h) || !bytes.Equal(arp, was) {
		t.Error("ARP was marked")
	}
}

// TestSkip: the other segments are what they would have been.
func TestSkip(t *testing.T) {
	payload := bytes.Repeat([]byte("0123456789"), 500)
	v6 := netip.MustParseAddrPort("[fd00::1]:1")
	for _, shape := range []ethertest.TCP{
		{Seq: 0xfffffff0, ID: 0xffff, Flags: ether.TCPAck | ether.TCPPsh | ether.TCPFin, Payload: payload},
		{Src: v6, Dst: v6, Payload: payload},
		{VLANs: []uint16{7, 8}, IPOptions: []byte{1, 1, 1, 0}, Flags: ether.TCPAck | ether.TCPCwr, Options: make([]byte, 12), Payload: payload},
		{Src: v6, Dst: v6, Extensions: []ethertest.Extension{ethertest.Padded(0, 16)}, Payload: payload},
	} {
		for _, segment := range []int{30, 1000, 1448, 4999} {
			for _, unfilled := range []bool{false, true} {
				s := ether.Segmenter{Unfilled: unfilled}
				frame, m := shape.Super(segment)
				want := cut(t, &s, frame, m)[1:]
				if err := s.Reset(frame, m); err != nil {
					t.Fatal(err)
				}
				s.Skip()
				if s.Count() != len(want) {
					t.Fatalf("Count() = %d after Skip, want %d", s.Count(), len(want))
				}
				var got [][]byte
				for b := make([]byte, s.MaxLen()); ; {
					n := s.Next(b)
					if n == 0 {
						break
					}
					got = append(got, bytes.Clone(b[:n]))
				}
				compareFrames(t, got, want)

				head := behind(8, frame)
				if err := s.Reset(head[8:], m); err != nil {
					t.Fatal(err)
				}
				s.Skip()
				got = got[:0]
				for b := s.NextInPlace(head); b != nil; b = s.NextInPlace(head) {
					got = append(got, bytes.Clone(b[8:]))
				}
				compareFrames(t, got, want)
			}
		}
	}
}
