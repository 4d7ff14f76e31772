package ether

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"
)

// igmpPacket is an IPv4 packet with a message whose checksum it fills in.
func igmpPacket(t testing.TB, message string) []byte {
	t.Helper()
	m := unhex(t, message)
	if len(m) >= 4 {
		binary.BigEndian.PutUint16(m[2:], ^Sum(m, 0))
	}
	p := append(unhex(t, "46c0 0000 0000 0000 01 02 0000 0a200001 e0000016 94040000"), m...)
	binary.BigEndian.PutUint16(p[2:], uint16(len(p)))
	IPv4(p).SetChecksum()
	return p
}

// told lists what a message tells: "+group" joined, "-group" left.
func told(each func(func(netip.Addr, bool))) string {
	var list []string
	each(func(g netip.Addr, joined bool) {
		list = append(list, map[bool]string{true: "+", false: "-"}[joined]+g.String())
	})
	return strings.Join(list, " ")
}

func TestIGMP(t *testing.T) {
	for name, c := range map[string]struct {
		message string
		query   bool
		group   string
		told    string
	}{
		"v1 query":             {message: "1100 0000 00000000", query: true, group: "0.0.0.0"},
		"v2 query of a group":  {message: "1164 0000 ef010203", query: true, group: "239.1.2.3"},
		"v3 query":             {message: "1164 0000 00000000 027d 0000", query: true, group: "0.0.0.0"},
		"v1 report":            {message: "1200 0000 ef010203", group: "239.1.2.3", told: "+239.1.2.3"},
		"v2 report":            {message: "1600 0000 ef010203", group: "239.1.2.3", told: "+239.1.2.3"},
		"leave":                {message: "1700 0000 ef010203", group: "239.1.2.3", told: "-239.1.2.3"},
		"v3 without a record":  {message: "2200 0000 0000 0000", group: "0.0.0.0"},
		"is exclude":           {message: "2200 0000 0000 0001 02 00 0000 ef010203", told: "+239.1.2.3"},
		"is include, none":     {message: "2200 0000 0000 0001 01 00 0000 ef010203"},
		"is include, of one":   {message: "2200 0000 0000 0001 01 00 0001 ef010203 0a000001", told: "+239.1.2.3"},
		"to include, none":     {message: "2200 0000 0000 0001 03 00 0000 ef010203", told: "-239.1.2.3"},
		"to include, of one":   {message: "2200 0000 0000 0001 03 00 0001 ef010203 0a000001", told: "+239.1.2.3"},
		"to exclude, but one":  {message: "2200 0000 0000 0001 04 00 0001 ef010203 0a000001", told: "+239.1.2.3"},
		"allow":                {message: "2200 0000 0000 0001 05 00 0001 ef010203 0a000001", told: "+239.1.2.3"},
		"allow none":           {message: "2200 0000 0000 0001 05 00 0000 ef010203"},
		"block":                {message: "2200 0000 0000 0001 06 00 0001 ef010203 0a000001", told: "-239.1.2.3"},
		"an unknown record":    {message: "2200 0000 0000 0001 07 00 0000 ef010203"},
		"two and what follows": {message: "2200 0000 0000 0002 04 01 0000 ef010203 deadbeef 03 00 0000 ef010204 ffff", told: "+239.1.2.3 -239.1.2.4"},
	} {
		p, err := ParseIPv4(igmpPacket(t, c.message))
		if err != nil {
			t.Fatal(err)
		}
		m, err := ParseIGMP(p)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if m.IsQuery() != c.query || c.group != "" && m.Group().String() != c.group {
			t.Errorf("%s: query %v, group %v, want %v, %s", name, m.IsQuery(), m.Group(), c.query, c.group)
		}
		if got := told(m.Each); got != c.told {
			t.Errorf("%s: tells %q, want %q", name, got, c.told)
		}
	}
}

func TestIGMPRefused(t *testing.T) {
	whole := igmpPacket(t, "2200 0000 0000 0002 04 01 0000 ef010203 deadbeef 03 00 0001 ef010204 0a000001")
	for n := range whole[24:] {
		p := slices.Clone(whole[:24+n])
		binary.BigEndian.PutUint16(p[2:], uint16(len(p)))
		if len(p) >= 28 {
			p[26], p[27] = 0, 0
			binary.BigEndian.PutUint16(p[26:], ^Sum(p[24:], 0))
		}
		if m, err := ParseIGMP(p); err != ErrShort {
			t.Errorf("%d bytes: ParseIGMP = %x, %v, want %v", n, m, err, ErrShort)
		}
	}
	change := func(at int, b byte) []byte {
		p := slices.Clone(whole)
		p[at] = b
		return p
	}
	for name, p := range map[string][]byte{
		"another protocol": change(9, 17), "a fragment": change(6, 0x20), "a wrong checksum": change(len(whole)-1, 2),
		"an unknown type": igmpPacket(t, "1300 0000 00000000"), // DVMRP
	} {
		if m, err := ParseIGMP(p); err != ErrMalformed {
			t.Errorf("%s: ParseIGMP = %x, %v, want %v", name, m, err, ErrMalformed)
		}
	}
}

// The bytes of queries, as in RFC 3376, section 4.1, and RFC 3810, section 5.1.
func TestQueries(t *testing.T) {
	const mac = MAC(0x0654756c6c65)
	for name, c := range map[string]struct {
		got  []byte
		want string
	}{
		"IGMP, all": {AppendIGMPQuery(nil, mac, netip.Addr{}, 10*time.Second, 125*time.Second),
			"01005e000001 0654756c6c65 0800 46c0 0024 0000 0000 01 02 4413 00000000 e0000001 94040000 11 64 ec1e 00000000 02 7d 0000"},
		"IGMP, one": {AppendIGMPQuery([]byte{}, mac, netip.MustParseAddr("239.129.2.3"), time.Second, 125*time.Second),
			"01005e010203 0654756c6c65 0800 46c0 0024 0000 0000 01 02 3290 00000000 ef810203 94040000 11 0a faf3 ef810203 02 7d 0000"},
		"MLD, all": {AppendMLDQuery(nil, mac, netip.Addr{}, 10*time.Second, 125*time.Second),
			"333300000001 0654756c6c65 86dd 60000000 0024 00 01 fe80000000000000045475fffe6c6c65 ff020000000000000000000000000001" +
				"3a00050200000100 82 00 7171 2710 0000 00000000000000000000000000000000 02 7d 0000"},
	} {
		if want := unhex(t, c.want); !bytes.Equal(c.got, want) {
			t.Errorf("%s:\n%x, want\n%x", name, c.got, want)
		}
	}
}

func TestFloatCode(t *testing.T) {
	for _, c := range []struct {
		n        time.Duration
		mantissa int
		want     uint16
	}{
		{0, 4, 1}, {100, 4, 100}, {127, 4, 127}, {128, 4, 0x80}, {136, 4, 0x81}, {255, 4, 0x8f}, {256, 4, 0x90}, {31744, 4, 0xff}, {99999, 4, 0xff},
		{10000, 12, 10000}, {32768, 12, 0x8000}, {65536, 12, 0x9000}, {8387584, 12, 0xffff},
	} {
		if got := floatCode(c.n, c.mantissa); got != c.want {
			t.Errorf("floatCode(%d, %d) = %#x, want %#x", c.n, c.mantissa, got, c.want)
		}
	}
}

func FuzzIGMP(f *testing.F) {
	for _, m := range []string{"1164 0000 ef010203", "1700 0000 ef010203", "2200 0000 0000 0002 04 01 0000 ef010203 deadbeef 03 00 0001 ef010204 0a000001"} {
		f.Add(igmpPacket(f, m)[24:])
	}
	f.Fuzz(func(t *testing.T, m []byte) {
		if len(m) < 4 || len(m) > 1400 {
			return
		}
		p := append(unhex(t, "45c0 0000 0000 0000 01 02 0000 0a200001 e0000016"), m...)
		m = p[20:]
		m[2], m[3] = 0, 0 // or almost nothing would get past the checksum
		binary.BigEndian.PutUint16(m[2:], ^Sum(m, 0))
		binary.BigEndian.PutUint16(p[2:], uint16(len(p)))
		v4, err := ParseIPv4(p)
		if err != nil {
			t.Fatal(err)
		}
		igmp, err := ParseIGMP(v4)
		if err != nil {
			return
		}
		n := 0
		igmp.Each(func(g netip.Addr, _ bool) {
			n++
			if !g.Is4() {
				t.Errorf("a group is %v", g)
			}
		})
		if igmp.IsQuery() && n > 0 || n > len(m)/8 {
			t.Errorf("%x tells %d groups", m, n)
		}
	})
}

func unhex(t testing.TB, s string) []byte {
	t.Helper()
	b, err := hex.DecodeString(strings.ReplaceAll(s, " ", ""))
	if err != nil {
		t.Fatal(err)
	}
	return b
}
