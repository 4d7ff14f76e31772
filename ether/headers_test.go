package ether_test

import (
	"encoding/binary"
	"net/netip"
	"testing"

	"github.com/tulle-net/tulle/ether"
	"github.com/tulle-net/tulle/ether/ethertest"
)

var (
	addr4a, addr4b = netip.MustParseAddr("10.32.0.1"), netip.MustParseAddr("10.32.0.2")
	addr6a, addr6b = netip.MustParseAddr("fd00:32::1"), netip.MustParseAddr("fd00:32::2")
	macA, macB     = ether.MAC(0x0254_0a20_0001), ether.MAC(0x0254_0a20_0002)
)

// patch returns a copy of b with bytes replaced from offset at.
func patch(b []byte, at int, with ...byte) []byte {
	b = append([]byte(nil), b...)
	copy(b[at:], with)
	return b
}

// fragment6 is an IPv6 fragment header.
func fragment6(offset uint16, more bool) ethertest.Extension {
	body := make([]byte, 7)
	binary.BigEndian.PutUint16(body[1:], offset&^7)
	if more {
		body[2] |= 1
	}
	return ethertest.Extension{Proto: ether.ProtoFragment, Body: body}
}

type headersTest struct {
	name  string
	frame []byte
	want  ether.Headers
	ok    bool
}

func headersTests() []headersTest {
	tcp4 := ethertest.TCP{Payload: make([]byte, 100)}.Frame()
	tcp6 := ethertest.TCP{Src: ethertest.DefaultSrc6, Payload: make([]byte, 100)}.Frame()
	udp4 := ethertest.UDP{Payload: make([]byte, 100)}.Frame()
	opts := ethertest.TCP{
		VLANs: []uint16{5, 4095}, IPOptions: []byte{1, 1, 1, 0}, Options: make([]byte, 40), Padding: 7,
	}.Frame()
	hop, dest := ethertest.Padded(ether.ProtoHopByHop, 8), ethertest.Padded(ether.ProtoDestOpts, 2048)
	routed := ethertest.Padded(ether.ProtoRouting, 24)
	ext := func(e ...ethertest.Extension) []byte {
		return ethertest.UDP{Src: ethertest.DefaultSrc6, Extensions: e}.Frame()
	}
	routeOver := routed
	routeOver.Body = patch(routed.Body, 1, 0, 0) // type 0, no segments left
	routeLeft := routed
	routeLeft.Body = patch(routed.Body, 1, 0, 1)
	nine := make([]ethertest.Extension, 9)
	for i := range nine {
		nine[i] = dest
	}
	type H = ether.Headers
	const v4, v6 = ether.EtherTypeIPv4, ether.EtherTypeIPv6
	none4, none6 := H{EtherType: v4, L3: 14}, H{EtherType: v6, L3: 14}
	bad4 := H{EtherType: v4, L3: 14, L4: 34, End: 154, Proto: 6}
	badUDP4 := H{EtherType: v4, L3: 14, L4: 34, End: 142, Proto: 17}
	frag4 := bad4
	frag4.Fragment = true
	return []headersTest{
		{"TCP4", tcp4, H{EtherType: v4, L3: 14, L4: 34, Payload: 54, End: 154, Proto: 6}, true},
		{"TCP6", tcp6, H{EtherType: v6, L3: 14, L4: 54, Payload: 74, End: 174, Proto: 6, V6: true}, true},
		{"UDP4", udp4, H{EtherType: v4, L3: 14, L4: 34, Payload: 42, End: 142, Proto: 17}, true},
		{"UDP4 empty", ethertest.UDP{Padding: 18}.Frame(), H{EtherType: v4, L3: 14, L4: 34, Payload: 42, End: 42, Proto: 17}, true},
		{"two tags, options, padding", opts, H{EtherType: v4, L3: 22, L4: 46, Payload: 106, End: 106, Proto: 6}, true},
		{"three tags", ethertest.TCP{VLANs: []uint16{1, 2, 3}}.Frame(), H{EtherType: 0x8100, L3: 22}, false},
		{"largest", ethertest.TCP{VLANs: []uint16{1, 2}, Payload: make([]byte, 65535-40)}.Frame(),
			H{EtherType: v4, L3: 22, L4: 42, Payload: 62, End: 65557, Proto: 6}, true},
		{"largest IPv6", ethertest.TCP{Src: ethertest.DefaultSrc6, VLANs: []uint16{1, 2}, Payload: make([]byte, 65535-20)}.Frame(),
			H{EtherType: v6, L3: 22, L4: 62, Payload: 82, End: 65597, Proto: 6, V6: true}, true},

		{"ICMP4", ethertest.Echo{}.Frame(), H{EtherType: v4, L3: 14, L4: 34, End: 42, Proto: 1}, false},
		{"ICMP6", ethertest.Echo{Src: addr6a, Dst: addr6b}.Frame(), H{EtherType: v6, L3: 14, L4: 54, End: 62, Proto: 58, V6: true}, false},
		{"ARP", ethertest.ARPRequest(macA, addr4a, addr4b), H{EtherType: 0x0806, L3: 14}, false},
		{"802.3", ethertest.Ethernet(macB, macA, nil, 3, []byte{0x42, 0x42, 3}), H{EtherType: 3, L3: 14}, false},

		{"IPv4 version", patch(tcp4, 14, 0x65), none4, false},
		{"IPv4 header length", patch(tcp4, 14, 0x44), none4, false},
		{"IPv4 total length below header", patch(tcp4, 16, 0, 19), none4, false},
		{"IPv4 total length 0", patch(tcp4, 16, 0, 0), none4, false},
		{"IPv4 total length beyond frame", patch(tcp4, 16, 0, 141), none4, false},
		{"IPv4 no room for TCP", patch(tcp4, 16, 0, 39), H{EtherType: v4, L3: 14, L4: 34, End: 53, Proto: 6}, false},
		{"IPv4 more fragments", patch(tcp4, 20, 0x20, 0), frag4, false},
		{"IPv4 last fragment", patch(tcp4, 20, 0, 1), frag4, false},
		{"IPv4 don't fragment", patch(tcp4, 20, 0x40, 0), H{EtherType: v4, L3: 14, L4: 34, Payload: 54, End: 154, Proto: 6}, true},
		{"TCP header too short", patch(tcp4, 46, 0x40), bad4, false},
		{"UDP length too short", patch(udp4, 38, 0, 7), badUDP4, false},
		{"UDP length below packet", patch(udp4, 38, 0, 107), badUDP4, false},
		{"UDP length beyond packet", patch(udp4, 38, 0, 109), badUDP4, false},

		{"IPv6 version", patch(tcp6, 14, 0x45), none6, false},
		{"IPv6 payload length 0", patch(tcp6, 18, 0, 0), none6, false},
		{"IPv6 payload length beyond frame", patch(tcp6, 18, 0, 121), none6, false},
		{"IPv6 hop-by-hop, destination", ext(hop, dest), H{EtherType: v6, L3: 14, L4: 2110, Payload: 2118, End: 2118, Proto: 17, V6: true}, true},
		{"IPv6 routed", ext(routeOver), H{EtherType: v6, L3: 14, L4: 78, Payload: 86, End: 86, Proto: 17, V6: true}, true},
		{"IPv6 segments left", ext(routeLeft), H{EtherType: v6, L3: 14, L4: 54, End: 86, Proto: 43, V6: true}, false},
		{"IPv6 eight extensions", ext(nine[:8]...), H{EtherType: v6, L3: 14, L4: 16438, Payload: 16446, End: 16446, Proto: 17, V6: true}, true},
		{"IPv6 nine extensions", ext(nine...), H{EtherType: v6, L3: 14, L4: 16438, End: 18494, Proto: 60, V6: true}, false},
		{"IPv6 fragment", ext(hop, fragment6(8, true)), H{EtherType: v6, L3: 14, L4: 70, End: 78, Proto: 17, V6: true, Fragment: true}, false},
		{"IPv6 atomic fragment", ext(fragment6(0, false)), H{EtherType: v6, L3: 14, L4: 62, End: 70, Proto: 17, V6: true, Fragment: true}, false},
		{"IPv6 no next header", patch(tcp6, 20, 59), H{EtherType: v6, L3: 14, L4: 54, End: 174, Proto: 59, V6: true}, false},
		{"IPv6 extension beyond packet", patch(ext(hop), 55, 2), H{EtherType: v6, L3: 14, L4: 54, End: 70, Proto: 0, V6: true}, false},
	}
}

func TestParseHeaders(t *testing.T) {
	for _, tt := range headersTests() {
		got, ok := ether.ParseHeaders(tt.frame)
		if got != tt.want || ok != tt.ok {
			t.Errorf("%s: ParseHeaders(%x…) = %+v, %t, want %+v, %t",
				tt.name, tt.frame[:min(len(tt.frame), 96)], got, ok, tt.want, tt.ok)
		}
		if short, long := ether.FlowHash(tt.frame), ether.FlowHashLong(tt.frame); short != long {
			t.Errorf("%s: FlowHash %#08x, the long way %#08x", tt.name, short, long)
		}
	}
}

// TestParseHeadersTruncated: a frame that ends before its packet has none.
func TestParseHeadersTruncated(t *testing.T) {
	for _, tt := range headersTests() {
		for n := range len(tt.frame) {
			h, ok := ether.ParseHeaders(tt.frame[:n:n])
			if want := tt.ok && n >= int(tt.want.End); ok != want {
				t.Fatalf("%s cut to %d of %d bytes: %+v, %t", tt.name, n, len(tt.frame), h, ok)
			}
			checkHeaders(t, tt.frame[:n:n], h, ok)
			if short, long := ether.FlowHash(tt.frame[:n:n]), ether.FlowHashLong(tt.frame[:n:n]); short != long {
				t.Fatalf("%s cut to %d: FlowHash %#08x, the long way %#08x", tt.name, n, short, long)
			}
		}
	}
}

// checkHeaders checks what holds for any input.
func checkHeaders(t *testing.T, frame []byte, h ether.Headers, ok bool) {
	t.Helper()
	bad := int(h.L3) > len(frame) || int(h.End) > len(frame)
	if h.L4 != 0 {
		bad = bad || h.L3 < 14 || h.L4 < h.L3+20 || uint32(h.L4) > h.End
	} else {
		bad = bad || h.End != 0 || h.Fragment || h.V6 || h.Proto != 0
	}
	if ok {
		bad = bad || h.Fragment || h.Payload < h.L4+8 || uint32(h.Payload) > h.End || h.Proto != 6 && h.Proto != 17
	} else {
		bad = bad || h.Payload != 0
	}
	if bad {
		t.Fatalf("ParseHeaders(%x) = %+v, %t: offsets out of order", frame, h, ok)
	}
}

// FuzzHeaders also compares the decoder of the hot path with the views.
func FuzzHeaders(f *testing.F) {
	for _, tt := range headersTests() {
		if len(tt.frame) < 3000 {
			f.Add(tt.frame)
		}
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		h, ok := ether.ParseHeaders(b)
		checkHeaders(t, b, h, ok)
		if short, long := ether.FlowHash(b), ether.FlowHashLong(b); short != long {
			t.Fatalf("FlowHash(%x) = %#08x, the long way %#08x", b, short, long)
		}
		if viewsOK := viewsFindTransport(t, b, h); viewsOK != ok {
			t.Fatalf("ParseHeaders(%x) = %+v, %t, but the views say %t", b, h, ok, viewsOK)
		}
		if right := ether.VerifyL4(b, h); ok && right != transportSumRight(b, h) {
			t.Fatalf("VerifyL4(%x, %+v) = %t", b, h, right)
		}
	})
}

// transportSumRight asks ethertest, which sums in its own way.
func transportSumRight(b []byte, h ether.Headers) bool {
	// What Verify would complain of besides: source group and IPv4 header.
	b = append([]byte(nil), b...)
	b[6] &^= 1
	if !h.V6 {
		ether.IPv4(b[h.L3:]).SetChecksum()
	}
	return ethertest.Verify(b) == nil
}

// viewsFindTransport walks b with the views and reports whether they find a
// transport header where h says.
func viewsFindTransport(t *testing.T, b []byte, h ether.Headers) bool {
	f, err := ether.ParseEthernet(b)
	if err != nil {
		return false
	}
	if f.EtherType() != h.EtherType || f.L3() != int(h.L3) {
		t.Fatalf("view of %x: EtherType %#04x, L3 %d, Headers %+v", b, f.EtherType(), f.L3(), h)
	}
	var body []byte
	var proto uint8
	switch f.EtherType() {
	case ether.EtherTypeIPv4:
		p, err := ether.ParseIPv4(f.Payload())
		if err != nil || p.IsFragment() {
			return false
		}
		proto, body = p.Proto(), p.Payload()
	case ether.EtherTypeIPv6:
		p, err := ether.ParseIPv6(f.Payload())
		if err != nil {
			return false
		}
		next, off, ok := p.Transport()
		if !ok || p.IsFragment() {
			return false
		}
		proto, body = next, p[off:]
	}
	switch proto {
	case ether.ProtoTCP:
		s, err := ether.ParseTCP(body)
		return err == nil && len(b)-int(h.Payload) >= len(s.Payload())
	case ether.ProtoUDP:
		d, err := ether.ParseUDP(body)
		return err == nil && len(d) == len(body)
	}
	return false
}

func TestHeadersNoAllocs(t *testing.T) {
	for _, tt := range headersTests() {
		frame := tt.frame
		var sink uint32
		if n := testing.AllocsPerRun(10, func() {
			h, _ := ether.ParseHeaders(frame)
			sink += uint32(h.L4) + ether.FlowHash(frame)
			if ether.VerifyL4(frame, h) {
				sink++
			}
		}); n != 0 {
			t.Errorf("%s: %v allocations, want 0", tt.name, n)
		}
	}
}

func BenchmarkParseHeaders(b *testing.B) {
	for name, frame := range benchFrames() {
		b.Run(name, func(b *testing.B) {
			b.SetBytes(int64(len(frame)))
			for b.Loop() {
				ether.ParseHeaders(frame)
			}
		})
	}
}

func benchFrames() map[string][]byte {
	return map[string][]byte{
		"TCP4": ethertest.TCP{Payload: make([]byte, 1400)}.Frame(),
		"TCP6": ethertest.TCP{Src: ethertest.DefaultSrc6, Payload: make([]byte, 1400)}.Frame(),
		"UDP4": ethertest.UDP{Payload: make([]byte, 18)}.Frame(),
		"ARP":  ethertest.ARPRequest(macA, addr4a, addr4b),
	}
}
