package ether_test

import (
	"errors"
	"net/netip"
	"testing"

	"github.com/tulle-net/tulle/ether"
	"github.com/tulle-net/tulle/ether/ethertest"
)

func TestEthernet(t *testing.T) {
	for _, tt := range []struct {
		vlans     []uint16
		etherType uint16
		l3        int
		vlan      uint16
	}{
		{nil, ether.EtherTypeIPv4, 14, 0},
		{[]uint16{7<<13 | 42}, ether.EtherTypeIPv4, 18, 42},
		{[]uint16{4095, 1}, ether.EtherTypeIPv4, 22, 4095},
		{[]uint16{1, 2, 3}, ether.EtherTypeVLAN, 22, 1},
	} {
		b := ethertest.Ethernet(macB, macA, tt.vlans, ether.EtherTypeIPv4, []byte{1, 2, 3, 4})
		f, err := ether.ParseEthernet(b)
		if err != nil {
			t.Fatalf("ParseEthernet(%x): %v", b, err)
		}
		vlan, tagged := f.VLAN()
		if f.Dst() != macB || f.Src() != macA || f.EtherType() != tt.etherType || f.L3() != tt.l3 ||
			vlan != tt.vlan || tagged != (tt.vlans != nil) || len(f.Payload()) != len(b)-tt.l3 {
			t.Errorf("ParseEthernet(%x): %v %v %#04x at %d, VLAN %d %t, want EtherType %#04x at %d, VLAN %d",
				b, f.Dst(), f.Src(), f.EtherType(), f.L3(), vlan, tagged, tt.etherType, tt.l3, tt.vlan)
		}
		for n := range tt.l3 {
			if _, err := ether.ParseEthernet(b[:n:n]); !errors.Is(err, ether.ErrShort) {
				t.Errorf("ParseEthernet(%x) = %v, want ErrShort", b[:n], err)
			}
		}
	}
}

// The packets of TestIPv4 and TestIPv6 are written out, so that they do not
// depend on ethertest.
func TestIPv4(t *testing.T) {
	b := []byte{
		0x46, 0xb8, 0x00, 0x1c, 0x12, 0x34, 0x60, 0x0b, 0x40, 0x11, 0x00, 0x00,
		192, 0, 2, 1, 198, 51, 100, 2,
		0x94, 0x04, 0x00, 0x00, // router alert
		1, 2, 3, 4, 0xee, // the last is padding
	}
	p, err := ether.ParseIPv4(b)
	if err != nil {
		t.Fatal(err)
	}
	if p.ChecksumOK() {
		t.Errorf("ChecksumOK with checksum %#04x", p.Checksum())
	}
	p.SetChecksum()
	if !p.ChecksumOK() || p.Checksum() != 0x869e { // summed apart
		t.Errorf("SetChecksum wrote %#04x, want 0x869e", p.Checksum())
	}
	if p.HeaderLen() != 24 || p.TOS() != 0xb8 || p.ID() != 0x1234 || !p.DontFragment() || !p.MoreFragments() ||
		p.FragmentOffset() != 88 || !p.IsFragment() || p.TTL() != 64 || p.Proto() != ether.ProtoUDP ||
		p.Src() != netip.MustParseAddr("192.0.2.1") || p.Dst() != netip.MustParseAddr("198.51.100.2") ||
		len(p) != 28 || string(p.Payload()) != "\x01\x02\x03\x04" {
		t.Errorf("ParseIPv4(%x): %v → %v, header %d, payload %x", b, p.Src(), p.Dst(), p.HeaderLen(), p.Payload())
	}
	for n := range 28 {
		if _, err := ether.ParseIPv4(b[:n:n]); !errors.Is(err, ether.ErrShort) {
			t.Errorf("ParseIPv4 of %d bytes = %v, want ErrShort", n, err)
		}
	}
	for _, tt := range []struct {
		what string
		b    []byte
	}{{"version", patch(b, 0, 0x66)}, {"header length", patch(b, 0, 0x44)}, {"total length", patch(b, 2, 0, 23)}} {
		if _, err := ether.ParseIPv4(tt.b); !errors.Is(err, ether.ErrMalformed) {
			t.Errorf("%s: ParseIPv4(%x) = %v, want ErrMalformed", tt.what, tt.b, err)
		}
	}
}

func TestIPv6(t *testing.T) {
	b := []byte{
		0x6b, 0x8a, 0xbc, 0xde, 0x00, 0x14, 0x00, 0x40,
		0x20, 0x01, 0x0d, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1,
		0x20, 0x01, 0x0d, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2,
		0x3c, 0x00, 0x01, 0x04, 0, 0, 0, 0, // hop-by-hop: PadN
		0x11, 0x00, 0x01, 0x04, 0, 0, 0, 0, // destination options
		1, 2, 3, 4, 0xee, // the last is padding
	}
	p, err := ether.ParseIPv6(b)
	if err != nil {
		t.Fatal(err)
	}
	proto, off, ok := p.Transport()
	if p.TrafficClass() != 0xb8 || p.FlowLabel() != 0xabcde || p.NextHeader() != ether.ProtoHopByHop || p.HopLimit() != 64 ||
		p.Src() != netip.MustParseAddr("2001:db8::1") || p.Dst() != netip.MustParseAddr("2001:db8::2") ||
		len(p) != 60 || len(p.Payload()) != 20 || proto != ether.ProtoUDP || off != 56 || !ok || p.IsFragment() {
		t.Errorf("ParseIPv6(%x): %v → %v, transport %d at %d, %t", b, p.Src(), p.Dst(), proto, off, ok)
	}
	for n := range 60 {
		if _, err := ether.ParseIPv6(b[:n:n]); !errors.Is(err, ether.ErrShort) {
			t.Errorf("ParseIPv6 of %d bytes = %v, want ErrShort", n, err)
		}
	}
	if _, err := ether.ParseIPv6(patch(b, 0, 0x4b)); !errors.Is(err, ether.ErrMalformed) {
		t.Errorf("version 4: %v, want ErrMalformed", err)
	}
	// As headers of their own, cut where a header begins, in one and after it.
	for n := 0; n <= 20; n++ {
		p, err := ether.ParseIPv6(patch(b, 4, 0, byte(n)))
		if err != nil {
			t.Fatal(err)
		}
		if _, _, ok := p.Transport(); ok != (n >= 16) {
			t.Errorf("payload of %d: Transport is %t", n, ok)
		}
	}
	frag := patch(b, 40, ether.ProtoFragment)
	frag = patch(frag, 50, 0, 0)
	p, _ = ether.ParseIPv6(frag)
	if _, _, ok := p.Transport(); ok || !p.IsFragment() {
		t.Errorf("atomic fragment: Transport %t, IsFragment %t", ok, p.IsFragment())
	}
}

func TestTCP(t *testing.T) {
	b := []byte{
		0x00, 0x50, 0x9c, 0x40, 0x01, 0x02, 0x03, 0x04, 0x0a, 0x0b, 0x0c, 0x0d,
		0x61, 0xd8, 0x80, 0x01, 0xbe, 0xef, 0x00, 0x09,
		1, 1, 1, 0, 'x',
	}
	s, err := ether.ParseTCP(b)
	if err != nil {
		t.Fatal(err)
	}
	if s.SrcPort() != 80 || s.DstPort() != 40000 || s.Seq() != 0x01020304 || s.Ack() != 0x0a0b0c0d || s.HeaderLen() != 24 ||
		s.Flags() != ether.TCPCwr|ether.TCPEce|ether.TCPAck|ether.TCPPsh || s.Window() != 0x8001 || s.Checksum() != 0xbeef ||
		s.Urgent() != 9 || len(s.Options()) != 4 || string(s.Payload()) != "x" {
		t.Errorf("ParseTCP(%x): %d → %d, flags %#02x, payload %x", b, s.SrcPort(), s.DstPort(), s.Flags(), s.Payload())
	}
	for n := range 24 {
		if _, err := ether.ParseTCP(b[:n:n]); !errors.Is(err, ether.ErrShort) {
			t.Errorf("ParseTCP of %d bytes = %v, want ErrShort", n, err)
		}
	}
	if _, err := ether.ParseTCP(patch(b, 12, 0x40)); !errors.Is(err, ether.ErrMalformed) {
		t.Errorf("header of 16 bytes: %v, want ErrMalformed", err)
	}
}

func TestUDP(t *testing.T) {
	b := []byte{0x00, 0x35, 0x9c, 0x40, 0x00, 0x0a, 0xbe, 0xef, 'h', 'i', 0xee}
	d, err := ether.ParseUDP(b)
	if err != nil {
		t.Fatal(err)
	}
	if d.SrcPort() != 53 || d.DstPort() != 40000 || d.Checksum() != 0xbeef || string(d.Payload()) != "hi" {
		t.Errorf("ParseUDP(%x): %d → %d, payload %q", b, d.SrcPort(), d.DstPort(), d.Payload())
	}
	for n := range 10 {
		if _, err := ether.ParseUDP(b[:n:n]); !errors.Is(err, ether.ErrShort) {
			t.Errorf("ParseUDP of %d bytes = %v, want ErrShort", n, err)
		}
	}
	for _, n := range []byte{0, 7} {
		if _, err := ether.ParseUDP(patch(b, 5, n)); !errors.Is(err, ether.ErrMalformed) {
			t.Errorf("length %d: %v, want ErrMalformed", n, err)
		}
	}
}

func FuzzViews(f *testing.F) {
	for _, frame := range [][]byte{
		ethertest.TCP{VLANs: []uint16{1, 2}, IPOptions: make([]byte, 4), Options: make([]byte, 4)}.Frame(),
		ethertest.UDP{Src: ethertest.DefaultSrc6, Extensions: []ethertest.Extension{ethertest.Padded(0, 16)}}.Frame(),
		ethertest.ARPReply(macA, addr4a, macB, addr4b),
		ethertest.Solicit(macA, addr6a, addr6b),
		ethertest.Advertise(macA, addr6a, macB, addr6b),
		ethertest.Echo{}.Frame(),
	} {
		f.Add(frame)
	}
	// The bytes are tried as everything, at once and behind each other: an
	// accessor of a view that was had without error must not panic.
	f.Fuzz(func(t *testing.T, b []byte) {
		useAll(b)
		if f, err := ether.ParseEthernet(b); err == nil {
			_, _ = f.Dst(), f.Src()
			f.VLAN()
			useAll(f.Payload())
		}
	})
}

func useAll(b []byte) {
	if p, err := ether.ParseIPv4(b); err == nil {
		_, _, _, _, _ = p.TOS(), p.ID(), p.DontFragment(), p.MoreFragments(), p.FragmentOffset()
		_, _, _, _, _ = p.TTL(), p.Proto(), p.Checksum(), p.Src(), p.Dst()
		p.ChecksumOK()
		useTransport(p.Payload())
	}
	if p, err := ether.ParseIPv6(b); err == nil {
		_, _, _, _, _ = p.TrafficClass(), p.FlowLabel(), p.HopLimit(), p.Src(), p.Dst()
		_, off, _ := p.Transport()
		useTransport(p[off:])
		if n, err := ether.ParseND(p); err == nil {
			_, _, _ = n.Router(), n.Solicited(), n.Override()
			n.LinkLayer()
			ether.SolicitedNode(n.Target())
		}
	}
	if a, err := ether.ParseARP(b); err == nil {
		_, _, _, _, _ = a.Op(), a.SenderMAC(), a.SenderIP(), a.TargetMAC(), a.TargetIP()
	}
}

func useTransport(b []byte) {
	if s, err := ether.ParseTCP(b); err == nil {
		_, _, _, _, _ = s.SrcPort(), s.DstPort(), s.Seq(), s.Ack(), s.Window()
		_, _, _, _, _ = s.Flags(), s.Checksum(), s.Urgent(), s.Options(), s.Payload()
	}
	if d, err := ether.ParseUDP(b); err == nil {
		_, _, _, _ = d.SrcPort(), d.DstPort(), d.Checksum(), d.Payload()
	}
}
