package ether_test

import (
	"encoding/binary"
	"errors"
	"net/netip"
	"testing"

	"github.com/tulle-net/tulle/ether"
	"github.com/tulle-net/tulle/ether/ethertest"
)

func TestARP(t *testing.T) {
	b := []byte{
		0x00, 0x01, 0x08, 0x00, 0x06, 0x04, 0x00, 0x02,
		0x02, 0x54, 0x0a, 0x20, 0x00, 0x01, 10, 32, 0, 1,
		0x02, 0x54, 0x0a, 0x20, 0x00, 0x02, 10, 32, 0, 2,
		0xee, // padding
	}
	a, err := ether.ParseARP(b)
	if err != nil {
		t.Fatal(err)
	}
	if a.Op() != ether.ARPReply || a.SenderMAC() != macA || a.SenderIP() != addr4a ||
		a.TargetMAC() != macB || a.TargetIP() != addr4b || len(a) != 28 {
		t.Errorf("ParseARP(%x): op %d, %v %v → %v %v", b, a.Op(), a.SenderMAC(), a.SenderIP(), a.TargetMAC(), a.TargetIP())
	}
	for n := range 28 {
		if _, err := ether.ParseARP(b[:n:n]); !errors.Is(err, ether.ErrShort) {
			t.Errorf("ParseARP of %d bytes = %v, want ErrShort", n, err)
		}
	}
	for at, what := range map[int]string{0: "hardware", 1: "hardware", 2: "protocol", 3: "protocol", 4: "hardware length", 5: "protocol length"} {
		bad := patch(b, at, b[at]^1)
		if _, err := ether.ParseARP(bad); !errors.Is(err, ether.ErrMalformed) {
			t.Errorf("%s: ParseARP(%x) = %v, want ErrMalformed", what, bad, err)
		}
	}
	f := ethertest.ARPReply(macA, addr4a, macB, addr4b)
	if got := f[14:]; string(got) != string(b[:28]) {
		t.Errorf("ethertest.ARPReply = %x, want %x", got, b[:28])
	}
}

// ndMessage returns the IPv6 packet of frame.
func ndMessage(t *testing.T, frame []byte) ether.IPv6 {
	t.Helper()
	p, err := ether.ParseIPv6(frame[14:])
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func TestNDSolicitation(t *testing.T) {
	// As Linux sends it: fe80::54:aff:fe20:1 asks for fd00:32::2.
	p := ether.IPv6{
		0x60, 0, 0, 0, 0, 32, 58, 255,
		0xfe, 0x80, 0, 0, 0, 0, 0, 0, 0x00, 0x54, 0x0a, 0xff, 0xfe, 0x20, 0x00, 0x01,
		0xff, 0x02, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0xff, 0, 0, 2,
		135, 0, 0x67, 0xfd, 0, 0, 0, 0,
		0xfd, 0x00, 0x00, 0x32, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2,
		1, 1, 0x02, 0x54, 0x0a, 0x20, 0x00, 0x01,
	}
	n, err := ether.ParseND(p)
	if err != nil {
		t.Fatal(err)
	}
	mac, ok := n.LinkLayer()
	if !n.IsSolicitation() || n.IsAdvertisement() || n.Target() != addr6b || mac != macA || !ok ||
		n.Router() || n.Solicited() || n.Override() {
		t.Errorf("ParseND(%x): target %v, link layer %v %t", p, n.Target(), mac, ok)
	}
	built := ethertest.Solicit(macA, p.Src(), addr6b)
	if string(built[14:]) != string(p) {
		t.Errorf("ethertest.Solicit = %x, want %x", built[14:], []byte(p))
	}
	if f, _ := ether.ParseEthernet(built); f.Dst() != 0x3333_ff00_0002 {
		t.Errorf("solicitation goes to %v, want 33:33:ff:00:00:02", f.Dst())
	}
}

func TestNDAdvertisement(t *testing.T) {
	for _, tt := range []struct {
		router, solicited, override bool
	}{{}, {router: true}, {solicited: true}, {override: true}, {true, true, true}} {
		na := ethertest.NA{
			Dst: addr6a, SrcMAC: macB, Target: addr6b, LinkLayer: macB,
			Router: tt.router, Solicited: tt.solicited, Override: tt.override,
		}
		n, err := ether.ParseND(ndMessage(t, na.Frame()))
		if err != nil {
			t.Fatal(err)
		}
		mac, ok := n.LinkLayer()
		if !n.IsAdvertisement() || n.Router() != tt.router || n.Solicited() != tt.solicited || n.Override() != tt.override ||
			n.Target() != addr6b || mac != macB || !ok {
			t.Errorf("%+v: target %v, link layer %v %t, flags %t %t %t", na, n.Target(), mac, ok, n.Router(), n.Solicited(), n.Override())
		}
	}
	n, err := ether.ParseND(ndMessage(t, ethertest.NA{Target: addr6b}.Frame()))
	if err != nil {
		t.Fatal(err)
	}
	if mac, ok := n.LinkLayer(); ok {
		t.Errorf("advertisement without option has link layer %v", mac)
	}
}

// resum writes the checksum of the ICMPv6 message at 40.
func resum(p []byte) ether.IPv6 {
	binary.BigEndian.PutUint16(p[42:], 0)
	sum := ^ether.Sum(p[40:], ether.PseudoSum(ether.ProtoICMPv6, p[8:24], p[24:40], len(p)-40))
	binary.BigEndian.PutUint16(p[42:], sum)
	return p
}

// TestNDRefused: each check of RFC 4861, sections 7.1.1 and 7.1.2.
func TestNDRefused(t *testing.T) {
	ns := ndMessage(t, ethertest.Solicit(macA, addr6a, addr6b))
	na := ndMessage(t, ethertest.Advertise(macB, addr6b, macA, addr6a))
	group := netip.MustParseAddr("ff02::1").As16()
	allNodes := netip.IPv6LinkLocalAllNodes()
	unspecified := netip.IPv6Unspecified()
	for _, tt := range []struct {
		name string
		p    ether.IPv6
		want error
	}{
		{"solicitation", ns, nil},
		{"advertisement", na, nil},
		{"hop limit 254", resum(patch(ns, 7, 254)), ether.ErrMalformed},
		{"checksum", patch(ns, 42, ns[42]^1), ether.ErrMalformed},
		{"code", resum(patch(ns, 41, 1)), ether.ErrMalformed},
		{"router solicitation", resum(patch(ns, 40, 133)), ether.ErrMalformed},
		{"redirect", resum(patch(ns, 40, 137)), ether.ErrMalformed},
		{"UDP", patch(ns, 6, 17), ether.ErrMalformed},
		{"group as target", resum(patch(ns, 48, group[:]...)), ether.ErrMalformed},
		{"option of length 0", resum(patch(ns, 65, 0)), ether.ErrMalformed},
		{"option too long", resum(patch(ns, 65, 2)), ether.ErrShort},
		{"half an option", resum(patch(ns, 4, 0, 25)[:65]), ether.ErrShort},
		{"23 bytes", resum(patch(ns, 4, 0, 23)[:63]), ether.ErrShort},
		{"other option alone", resum(patch(ns, 64, 14)), nil},
		{"duplicate detection", ndMessage(t, ethertest.NS{Src: unspecified, SrcMAC: macA, Target: addr6b}.Frame()), nil},
		{"duplicate detection, option", ndMessage(t, ethertest.NS{Src: unspecified, SrcMAC: macA, Target: addr6b, LinkLayer: macA}.Frame()), ether.ErrMalformed},
		{"duplicate detection, to the target", ndMessage(t, ethertest.NS{Src: unspecified, SrcMAC: macA, Dst: addr6b, Target: addr6b}.Frame()), ether.ErrMalformed},
		{"unsolicited to all", ndMessage(t, ethertest.NA{SrcMAC: macB, Target: addr6b, LinkLayer: macB}.Frame()), nil},
		{"solicited to all", ndMessage(t, ethertest.NA{Dst: allNodes, SrcMAC: macB, Target: addr6b, Solicited: true}.Frame()), ether.ErrMalformed},
	} {
		if n, err := ether.ParseND(tt.p); !errors.Is(err, tt.want) {
			t.Errorf("%s: ParseND(%x) = %x, %v, want error %v", tt.name, []byte(tt.p), []byte(n), err, tt.want)
		}
	}
}

func TestSolicitedNode(t *testing.T) {
	a := netip.MustParseAddr("4037::01:800:200e:8c6c") // the example of RFC 4291, section 2.7.1
	if got, want := ether.SolicitedNode(a), netip.MustParseAddr("ff02::1:ff0e:8c6c"); got != want {
		t.Errorf("SolicitedNode(%v) = %v, want %v", a, got, want)
	}
}

func TestNeighbourNoAllocs(t *testing.T) {
	arp := ethertest.ARPRequest(macA, addr4a, addr4b)
	ns := ethertest.Solicit(macA, addr6a, addr6b)
	var seen int
	if n := testing.AllocsPerRun(10, func() {
		f, _ := ether.ParseEthernet(arp)
		if a, err := ether.ParseARP(f.Payload()); err == nil && a.TargetIP() == addr4b {
			seen++
		}
		p, _ := ether.ParseIPv6(ns[14:])
		if n, err := ether.ParseND(p); err == nil && n.Target() == addr6b {
			seen++
		}
	}); n != 0 || seen != 22 {
		t.Errorf("%v allocations, %d packets seen, want 0 and 22", n, seen)
	}
}

func BenchmarkParseND(b *testing.B) {
	ns := ethertest.Solicit(macA, addr6a, addr6b)
	b.SetBytes(int64(len(ns)))
	for b.Loop() {
		p, _ := ether.ParseIPv6(ns[14:])
		if _, err := ether.ParseND(p); err != nil {
			b.Fatal(err)
		}
	}
}
