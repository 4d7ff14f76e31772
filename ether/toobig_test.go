package ether_test

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"net/netip"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"github.com/tulle-net/tulle/ether"
	"github.com/tulle-net/tulle/ether/ethertest"
	_ "github.com/tulle-net/tulle/internal/proptest"
)

// unhex returns the bytes that s names in hexadecimal digits, spaces aside.
func unhex(t *testing.T, s string) []byte {
	t.Helper()
	b, err := hex.DecodeString(strings.Join(strings.Fields(s), ""))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// TestTooBigGolden: the answers byte by byte.
func TestTooBigGolden(t *testing.T) {
	zeros := func(n int) string { return strings.Repeat("00", n) }
	for _, tt := range []struct {
		name       string
		mtu        int
		frame      string
		want       string
		wantQuoted int
	}{
		{
			"IPv4, tagged", 68,
			"0200 0000 0002  0200 0000 0001  8100 0007  0800" +
				"4500 0050 0001 4000 40fd b5ac c000 0201 c000 0202" + zeros(60),
			"0200 0000 0001  0200 0000 0002  8100 0007  0800" +
				"45c0 006c 0000 4000 4001 b5cd c000 0202 c000 0201" +
				"0304 fcb7 0000 0044", 80,
		},
		{
			"IPv6", 1280,
			"0200 0000 0002  0200 0000 0001  86dd" +
				"6000 0000 04d9 fd40 2001 0db8 " + zeros(11) + "01 2001 0db8 " + zeros(11) + "02" + zeros(1241),
			"0200 0000 0001  0200 0000 0002  86dd" +
				"6000 0000 04d8 3a40 2001 0db8 " + zeros(11) + "02 2001 0db8 " + zeros(11) + "01" +
				"0200 dae8 0000 0500", 1232,
		},
	} {
		frame := unhex(t, tt.frame)
		h, _ := ether.ParseHeaders(frame)
		want := append(unhex(t, tt.want), frame[h.L3:][:tt.wantQuoted]...)
		got, ok := ether.TooBig(nil, frame, tt.mtu)
		if !ok || !bytes.Equal(got, want) {
			t.Errorf("%s: TooBig = %t,\n     %x,\nwant %x", tt.name, ok, got[:min(len(got), 128)], want[:min(len(want), 128)])
		}
		ethertest.Check(t, frame, want)
	}
}

// TestTooBig: whatever the packet, the answer is a right one to its sender.
func TestTooBig(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		p := drawTCP(t)
		p.DF = true
		frame := p.Frame()
		if rapid.Bool().Draw(t, "super-frame") {
			frame, _ = p.Super(100)
		}
		h, _ := ether.ParseHeaders(frame)
		frame = append(frame, make([]byte, rapid.IntRange(0, 9).Draw(t, "padding"))...)
		size, least, quoted := int(h.End)-int(h.L3), 68, 548
		if h.V6 {
			least, quoted = 1280, 1232
		}
		mtu := rapid.IntRange(0, 3200).Draw(t, "mtu")
		before := bytes.Clone(frame)
		dst := pattern(rapid.IntRange(0, 20).Draw(t, "before"))
		got, ok := ether.TooBig(dst, frame, mtu)
		if want := mtu >= least && mtu < size; ok != want {
			t.Fatalf("TooBig of %d bytes, MTU %d = %t, want %t", size, mtu, ok, want)
		}
		if !bytes.Equal(frame, before) || !bytes.HasPrefix(got, dst) || !ok && len(got) != len(dst) {
			t.Fatalf("the frame or what stood before the answer was changed: %x", got)
		}
		if !ok {
			return
		}
		got = got[len(dst):]
		if err := ethertest.Verify(got); err != nil || len(got) > ether.MaxTooBig {
			t.Fatalf("%v: %d bytes, %x", err, len(got), got)
		}
		checkTooBig(t, got, frame, h, mtu, quoted)
	})
}

// checkTooBig: got answers frame.
func checkTooBig(t failer, got, frame []byte, h ether.Headers, mtu, quoted int) {
	t.Helper()
	e, err := ether.ParseEthernet(got)
	f, _ := ether.ParseEthernet(frame)
	if err != nil || e.Dst() != f.Src() || e.Src() != f.Dst() || !bytes.Equal(got[12:h.L3], frame[12:h.L3]) {
		t.Fatalf("Ethernet header %x to %x", got[:h.L3], frame[:h.L3])
	}
	g, _ := ether.ParseHeaders(got)
	a, b, n, proto := 12, 16, 4, uint8(ether.ProtoICMP)
	if h.V6 {
		a, b, n, proto = 8, 24, 16, ether.ProtoICMPv6
	}
	ip, to := got[g.L3:], frame[h.L3:h.End]
	if g.Proto != proto || !bytes.Equal(ip[a:a+n], to[b:b+n]) || !bytes.Equal(ip[b:b+n], to[a:a+n]) {
		t.Fatalf("IP header %x to %x", ip[:40], to[:40])
	}
	icmp := got[g.L4:g.End]
	kind, tells := uint16(0x0304), int(binary.BigEndian.Uint16(icmp[6:]))
	if h.V6 {
		kind, tells = 0x0200, int(binary.BigEndian.Uint32(icmp[4:]))
	}
	if binary.BigEndian.Uint16(icmp) != kind || tells != mtu {
		t.Fatalf("ICMP header %x, MTU %d", icmp[:8], mtu)
	}
	if want := to[:min(len(to), quoted)]; !bytes.Equal(icmp[8:], want) {
		t.Fatalf("quoted %d bytes, want %d of the packet", len(icmp)-8, len(want))
	}
}

func TestTooBigRefuses(t *testing.T) {
	v4 := ethertest.UDP{Payload: pattern(1400), DF: true}
	v6 := ethertest.UDP{Payload: pattern(1400), Src: ethertest.DefaultSrc6}
	with := func(d ethertest.UDP, f func(*ethertest.UDP)) []byte { f(&d); return d.Frame() }
	port := netip.MustParseAddrPort
	sum4 := func(f []byte) []byte { ether.IPv4(f[14:]).SetChecksum(); return f }
	// icmp turns an echo request to another type; of DF and the sums alone.
	icmp4 := func(kind byte) []byte {
		return sum4(patch(patch(ethertest.Echo{Payload: pattern(1400)}.Frame(), 34, kind), 20, 0x40))
	}
	icmp6 := func(kind byte, exts ...ethertest.Extension) []byte {
		f := ethertest.UDP{Src: ethertest.DefaultSrc6, Payload: pattern(1400), Extensions: exts}.Frame()
		at := 20 // next header of the fixed one
		for range exts {
			f[at], at = exts[0].Proto, 54
		}
		return patch(patch(f, at, ether.ProtoICMPv6), 54+len(exts)*8, kind)
	}
	exts := func(e ...ethertest.Extension) []byte {
		return with(v6, func(d *ethertest.UDP) { d.Extensions = e })
	}
	padded := ethertest.Padded(ether.ProtoDestOpts, 8)
	routing := ethertest.Extension{Proto: ether.ProtoRouting, Body: []byte{0, 4, 1, 0, 0, 0, 0}}
	for _, tt := range []struct {
		name  string
		frame []byte
		ok    bool
	}{
		{"IPv4", v4.Frame(), true},
		{"IPv6", v6.Frame(), true},
		{"no DF", with(v4, func(d *ethertest.UDP) { d.DF = false }), false},
		{"nothing", nil, false},
		{"ARP", ethertest.ARPRequest(macA, ethertest.DefaultSrc.Addr(), ethertest.DefaultDst.Addr()), false},
		{"IPv4 header checksum", patch(v4.Frame(), 24, 0, 1), false},
		{"broadcast MAC", patch(v4.Frame(), 0, 255, 255, 255, 255, 255, 255), false},
		{"from a group's MAC", patch(v4.Frame(), 6, 1), false},
		{"from no MAC", patch(v4.Frame(), 6, 0, 0, 0, 0, 0, 0), false},
		{"to a group", with(v4, func(d *ethertest.UDP) { d.Dst, d.DstMAC = port("239.1.1.1:9"), 2 }), false},
		{"to all", with(v4, func(d *ethertest.UDP) { d.Dst, d.DstMAC = port("255.255.255.255:9"), 2 }), false},
		{"from all", with(v4, func(d *ethertest.UDP) { d.Src, d.SrcMAC = port("255.255.255.255:9"), 2 }), false},
		{"from nobody", with(v4, func(d *ethertest.UDP) { d.Src, d.SrcMAC = port("0.0.0.0:68"), 2 }), false},
		{"from a loopback", with(v4, func(d *ethertest.UDP) { d.Src = port("127.0.0.1:9") }), false},
		{"to a group, IPv6", with(v6, func(d *ethertest.UDP) { d.Dst, d.DstMAC = port("[ff02::1]:9"), 2 }), false},
		{"from nobody, IPv6", with(v6, func(d *ethertest.UDP) { d.Src, d.SrcMAC = port("[::]:9"), 2 }), false},
		{"from a loopback, IPv6", with(v6, func(d *ethertest.UDP) { d.Src = port("[::1]:9") }), false},
		{"first fragment", sum4(patch(v4.Frame(), 20, 0x60)), true},
		{"later fragment", sum4(patch(v4.Frame(), 20, 0x60, 1)), false},
		{"last fragment", sum4(patch(v4.Frame(), 20, 0x40, 1)), false},
		{"first fragment, IPv6", exts(fragment6(0, true)), true},
		{"later fragment, IPv6", exts(fragment6(8, true)), false},
		{"last fragment, IPv6", exts(padded, fragment6(1200, false)), false},
		{"first fragment with more headers", exts(fragment6(0, true), padded), false},
		{"headers", exts(padded, padded), true},
		{"segments left", exts(routing), false},
		{"echo", icmp4(8), true},
		{"echo reply", icmp4(0), true},
		{"unreachable", icmp4(3), false},
		{"source quench", icmp4(4), false},
		{"redirect", icmp4(5), false},
		{"time exceeded", icmp4(11), false},
		{"parameter problem", icmp4(12), false},
		{"ICMP of an unknown type", icmp4(42), false},
		{"echo, IPv6", icmp6(128), true},
		{"echo behind a header", icmp6(129, padded), true},
		{"unreachable, IPv6", icmp6(1), false},
		{"too big, IPv6", icmp6(2), false},
		{"an unknown error, IPv6", icmp6(127), false},
		{"an error behind a header", icmp6(1, padded), false},
		{"an error in a first fragment", icmp6(1, fragment6(0, true)), false},
		{"redirect, IPv6", icmp6(137), false},
	} {
		got, ok := ether.TooBig(nil, tt.frame, 1300)
		if ok != tt.ok || !ok && got != nil {
			t.Errorf("%s: TooBig = %x, %t, want %t", tt.name, got[:min(len(got), 64)], ok, tt.ok)
		}
		if ok {
			ethertest.Check(t, got)
		}
	}
	for _, f := range [][]byte{v4.Frame(), exts(padded)} {
		for n := range f {
			if got, ok := ether.TooBig(nil, f[:n], 1300); ok {
				t.Fatalf("cut at %d: TooBig = %x", n, got)
			}
		}
	}
	if _, ok := ether.TooBig(nil, v4.Frame(), 1428); ok { // its very size
		t.Error("TooBig of a packet that just fits")
	}
	if _, ok := ether.TooBig(nil, v4.Frame(), 67); ok {
		t.Error("TooBig with less than any link has, IPv4")
	}
	if _, ok := ether.TooBig(nil, v6.Frame(), 1279); ok {
		t.Error("TooBig with less than any link has, IPv6")
	}
}

// FuzzTooBig: an answer is a right one, and never one to an answer.
func FuzzTooBig(f *testing.F) {
	f.Add(ethertest.TCP{Payload: pattern(100), DF: true, VLANs: []uint16{1, 2}}.Frame(), uint16(70))
	f.Add(ethertest.TCP{Payload: pattern(1400), Src: ethertest.DefaultSrc6}.Frame(), uint16(1280))
	f.Add(ethertest.UDP{Payload: pattern(1400), Src: ethertest.DefaultSrc6, Extensions: []ethertest.Extension{fragment6(0, true)}}.Frame(), uint16(1300))
	answer, _ := ether.TooBig(nil, ethertest.TCP{Payload: pattern(600), DF: true}.Frame(), 500)
	f.Add(answer, uint16(100))
	answer, _ = ether.TooBig(nil, ethertest.TCP{Payload: pattern(1400), Src: ethertest.DefaultSrc6}.Frame(), 1280)
	f.Add(answer, uint16(1280))
	f.Fuzz(func(t *testing.T, frame []byte, mtu uint16) {
		got, ok := ether.TooBig(nil, frame, int(mtu))
		if !ok {
			return
		}
		ethertest.Check(t, got)
		h, _ := ether.ParseHeaders(frame)
		quoted := 548
		if h.V6 {
			quoted = 1232
		}
		checkTooBig(t, got, frame, h, int(mtu), quoted)
		if again, ok := ether.TooBig(nil, got, 68); ok {
			t.Fatalf("an answer to an answer: %x", again)
		}
	})
}

func TestTooBigNoAllocs(t *testing.T) {
	v4, v6 := ethertest.TCP{Payload: pattern(1400), DF: true}.Frame(), ethertest.TCP{Payload: pattern(1400), Src: ethertest.DefaultSrc6}.Frame()
	dst := make([]byte, 0, ether.MaxTooBig)
	if n := testing.AllocsPerRun(100, func() {
		ether.TooBig(dst, v4, 1300)
		ether.TooBig(dst, v6, 1300)
		ether.TooBig(dst, v6, 1500)
	}); n != 0 {
		t.Errorf("%v allocations, want 0", n)
	}
}

func BenchmarkTooBig(b *testing.B) {
	for name, f := range map[string][]byte{
		"IPv4": ethertest.TCP{Payload: pattern(1400), DF: true}.Frame(),
		"IPv6": ethertest.TCP{Payload: pattern(1400), Src: ethertest.DefaultSrc6}.Frame(),
	} {
		b.Run(name, func(b *testing.B) {
			dst := make([]byte, 0, ether.MaxTooBig)
			b.SetBytes(int64(len(f)))
			for b.Loop() {
				if _, ok := ether.TooBig(dst, f, 1300); !ok {
					b.Fatal("no answer")
				}
			}
		})
	}
}
