package ether

import (
	"encoding/binary"
	"net/netip"
	"slices"
	"testing"
	"time"
)

// mldPacket is an IPv6 packet with a router alert and a message whose checksum it fills in.
func mldPacket(t testing.TB, src, message string) []byte {
	t.Helper()
	return sumMLD(netip.MustParseAddr(src), unhex(t, message))
}

func sumMLD(src netip.Addr, m []byte) []byte {
	from, to := src.As16(), netip.MustParseAddr("ff02::16").As16()
	p := []byte{0x60, 0, 0, 0, 0, byte(8 + len(m)), 0, 1}
	p = append(append(p, from[:]...), to[:]...)
	p = append(p, 58, 0, 5, 2, 0, 0, 1, 0)
	p = append(p, m...)
	binary.BigEndian.PutUint16(p[4:], uint16(8+len(m)))
	if m = p[48:]; len(m) >= 4 {
		m[2], m[3] = 0, 0
		binary.BigEndian.PutUint16(m[2:], ^Sum(m, PseudoSum(ProtoICMPv6, from[:], to[:], len(m))))
	}
	return p
}

const mldGroup = "ff15 0000 0000 0000 0000 0000 0000 0042"

func TestMLD(t *testing.T) {
	for name, c := range map[string]struct {
		message string
		query   bool
		told    string
	}{
		"v1 query":           {message: "8200 0000 2710 0000 00000000000000000000000000000000", query: true},
		"v2 query":           {message: "8200 0000 2710 0000 00000000000000000000000000000000 027d0000", query: true},
		"v1 report":          {message: "8300 0000 0000 0000" + mldGroup, told: "+ff15::42"},
		"done":               {message: "8400 0000 0000 0000" + mldGroup, told: "-ff15::42"},
		"is exclude":         {message: "8f00 0000 0000 0001 02 00 0000" + mldGroup, told: "+ff15::42"},
		"to include, none":   {message: "8f00 0000 0000 0001 03 00 0000" + mldGroup, told: "-ff15::42"},
		"to include, of one": {message: "8f00 0000 0000 0001 03 00 0001" + mldGroup + "fd000000000000000000000000000001", told: "+ff15::42"},
		"two": {message: "8f00 0000 0000 0002 04 01 0000" + mldGroup + "deadbeef 06 00 0001" + mldGroup + "fd000000000000000000000000000001",
			told: "+ff15::42 -ff15::42"},
	} {
		p, err := ParseIPv6(mldPacket(t, "fe80::1", c.message))
		if err != nil {
			t.Fatal(err)
		}
		m, err := ParseMLD(p)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if m.IsQuery() != c.query {
			t.Errorf("%s: query %v", name, m.IsQuery())
		}
		if got := told(m.Each); got != c.told {
			t.Errorf("%s: tells %q, want %q", name, got, c.told)
		}
	}
}

func TestMLDRefused(t *testing.T) {
	query, report := "8200 0000 2710 0000 00000000000000000000000000000000", "8f00 0000 0000 0001 02 00 0000"+mldGroup
	for _, whole := range [][]byte{unhex(t, query), unhex(t, report)} {
		for n := range whole {
			if m, err := ParseMLD(sumMLD(netip.MustParseAddr("fe80::1"), whole[:n])); err != ErrShort {
				t.Errorf("%d bytes: ParseMLD = %x, %v, want %v", n, m, err, ErrShort)
			}
		}
	}
	change := func(at int, b byte) []byte {
		p := slices.Clone(mldPacket(t, "fe80::1", report))
		p[at] = b
		return p
	}
	for name, p := range map[string][]byte{
		"a hop limit of 2": change(7, 2), "another protocol": change(40, 17), "a wrong checksum": change(60, 9), "an unknown type": mldPacket(t, "fe80::1", "9900 0000 0000 0000"),
		"a report of a global address": mldPacket(t, "fd00::1", report), "a query of nobody": mldPacket(t, "::", query),
	} {
		if m, err := ParseMLD(p); err != ErrMalformed {
			t.Errorf("%s: ParseMLD = %x, %v, want %v", name, m, err, ErrMalformed)
		}
	}
	// A host without an address yet may report (RFC 3810, section 5.2.13).
	if _, err := ParseMLD(mldPacket(t, "::", report)); err != nil {
		t.Errorf("a report from :: is refused: %v", err)
	}
}

// What is asked is read back.
func TestMLDQuery(t *testing.T) {
	g := netip.MustParseAddr("ff15::42")
	b := AppendMLDQuery(nil, 0x0654756c6c65, g, time.Second, 125*time.Second)
	p, err := ParseIPv6(b[14:])
	if err != nil {
		t.Fatal(err)
	}
	m, err := ParseMLD(p)
	if err != nil || !m.IsQuery() || m.Group() != g || p.Dst() != g || MACFrom(b) != MulticastMAC(g) {
		t.Errorf("ParseMLD = %x, %v", m, err)
	}
}

func FuzzMLD(f *testing.F) {
	for _, m := range []string{"8300 0000 0000 0000" + mldGroup, "8f00 0000 0000 0002 04 01 0000" + mldGroup + "deadbeef 06 00 0001" + mldGroup + "fd000000000000000000000000000001"} {
		f.Add(unhex(f, m))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) > 1400 {
			return
		}
		p, err := ParseIPv6(sumMLD(netip.MustParseAddr("fe80::1"), b))
		if err != nil {
			t.Fatal(err)
		}
		m, err := ParseMLD(p)
		if err != nil {
			return
		}
		n := 0
		m.Each(func(g netip.Addr, _ bool) {
			n++
			if !g.Is6() {
				t.Errorf("a group is %v", g)
			}
		})
		if m.IsQuery() && n > 0 || n > len(b)/20+1 {
			t.Errorf("%x tells %d groups", b, n)
		}
	})
}
