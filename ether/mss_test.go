package ether_test

import (
	"bytes"
	"testing"

	"pgregory.net/rapid"

	"github.com/tulle-net/tulle/ether"
	"github.com/tulle-net/tulle/ether/ethertest"
	_ "github.com/tulle-net/tulle/internal/proptest"
)

// TestClampMSSGolden: a SYN byte by byte, MSS 1460 to 1378; the difference of 82
// goes to the checksum, and nothing else changes.
func TestClampMSSGolden(t *testing.T) {
	before := unhex(t, "0200 0000 0002  0200 0000 0001  0800"+
		"4500 002c 0001 4000 4006 b6c7 c000 0201 c000 0202"+
		"9c40 0050 0000 0001 0000 0000 6002 ffff 7791 0000 0204 05b4")
	after := unhex(t, "0200 0000 0002  0200 0000 0001  0800"+
		"4500 002c 0001 4000 4006 b6c7 c000 0201 c000 0202"+
		"9c40 0050 0000 0001 0000 0000 6002 ffff 77e3 0000 0204 0562")
	ethertest.Check(t, before, after)
	got := bytes.Clone(before)
	if !ether.ClampMSS(got, ether.Meta{}, 1418) || !bytes.Equal(got, after) {
		t.Errorf("ClampMSS gives %x,\nwant           %x", got, after)
	}
	if ether.ClampMSS(got, ether.Meta{}, 1418) || !bytes.Equal(got, after) {
		t.Errorf("a second ClampMSS gives %x, want no change", got)
	}
}

// mss is the option.
func mss(v int) []byte { return []byte{2, 4, byte(v >> 8), byte(v)} }

// TestClampMSS: a SYN comes out as if its sender had announced less, wherever
// the option stands and whatever the state of the checksum.
func TestClampMSS(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		p := drawShape(t)
		p.Flags = ether.TCPSyn | rapid.SampledFrom([]uint8{0, ether.TCPAck, ether.TCPEce | ether.TCPCwr}).Draw(t, "flags")
		p.Seq, p.Window = rapid.Uint32().Draw(t, "seq"), rapid.Uint16Min(1).Draw(t, "window")
		// Also at an odd place, and twice.
		options := func(v int) []byte {
			b := bytes.Repeat([]byte{1}, rapid.IntRange(0, 3).Draw(t, "NOPs"))
			if rapid.Bool().Draw(t, "timestamps") {
				b = append(b, 8, 10, 1, 2, 3, 4, 5, 6, 7, 8)
			}
			b = append(b, mss(v)...)
			if rapid.Bool().Draw(t, "odd") {
				b = append(b, 3, 3, 7)
			}
			if rapid.Bool().Draw(t, "twice") {
				b = append(b, mss(v)...)
			}
			return append(b, make([]byte, -len(b)&3)...)
		}
		v, mtu := rapid.IntRange(0, 65535).Draw(t, "MSS"), rapid.IntRange(61, 9000).Draw(t, "mtu")
		most := mtu - 40
		if p.Src.Addr().Is6() {
			most = mtu - 60
		}
		p.Options = options(v)
		p.Partial = rapid.Bool().Draw(t, "partial")
		frame := p.Frame()
		m := ether.Meta{Checksum: rapid.SampledFrom([]ether.Checksum{ether.ChecksumUnknown, ether.ChecksumVerified}).Draw(t, "state")}
		if p.Partial {
			m, _ = ether.PartialMeta(frame)
		}
		p.Options = bytes.ReplaceAll(p.Options, mss(v), mss(min(v, most)))
		want := p.Frame()
		if got := ether.ClampMSS(frame, m, mtu); got != (v > most) {
			t.Fatalf("ClampMSS = %t for MSS %d, at most %d", got, v, most)
		}
		if !bytes.Equal(frame, want) {
			t.Fatalf("ClampMSS gives\n     %x,\nwant %x", frame[:min(len(frame), 200)], want[:min(len(want), 200)])
		}
	})
}

func TestClampMSSLeavesAlone(t *testing.T) {
	syn := ethertest.TCP{Flags: ether.TCPSyn, Options: mss(1460)}
	with := func(f func(*ethertest.TCP)) []byte { p := syn; f(&p); return p.Frame() }
	options := func(b ...byte) []byte { return with(func(p *ethertest.TCP) { p.Options = b }) }
	partial, _ := ether.PartialMeta(syn.Frame())
	elsewhere := partial
	elsewhere.ChecksumStart += 20
	fragment := patch(syn.Frame(), 20, 0x20)
	for _, tt := range []struct {
		name  string
		frame []byte
		m     ether.Meta
		mtu   int
	}{
		{"announces just that", syn.Frame(), ether.Meta{}, 1500},
		{"announces nothing", with(func(p *ethertest.TCP) { p.Options = nil }), ether.Meta{}, 1400},
		{"no SYN", with(func(p *ethertest.TCP) { p.Flags = ether.TCPAck }), ether.Meta{}, 1400},
		{"SYN and RST", with(func(p *ethertest.TCP) { p.Flags |= ether.TCPRst }), ether.Meta{}, 1400},
		{"UDP", ethertest.UDP{Payload: append(make([]byte, 12), mss(1460)...)}.Frame(), ether.Meta{}, 1400},
		{"behind the end of options", options(0, 0, 0, 0, 2, 4, 5, 180), ether.Meta{}, 1400},
		{"in another option", options(99, 8, 2, 4, 5, 180, 0, 0), ether.Meta{}, 1400},
		{"in the payload", with(func(p *ethertest.TCP) { p.Options, p.Payload = nil, mss(1460) }), ether.Meta{}, 1400},
		{"another length", options(2, 5, 5, 180, 0, 0, 0, 0), ether.Meta{}, 1400},
		{"an option of no length", options(99, 0, 2, 4, 5, 180, 0, 0), ether.Meta{}, 1400},
		{"an option of one byte", options(99, 1, 2, 4, 5, 180, 0, 0), ether.Meta{}, 1400},
		{"an option that is cut", options(1, 99, 9, 2, 2, 4, 5, 180), ether.Meta{}, 1400},
		{"the MSS is cut", options(1, 1, 2, 4), ether.Meta{}, 1400},
		{"a lone kind at the end", options(1, 1, 1, 2), ether.Meta{}, 1400},
		{"partial elsewhere", syn.Frame(), elsewhere, 1400},
		{"a super-frame", syn.Frame(), ether.Meta{GSO: ether.GSOTCPv4, SegmentLen: 9}, 1400},
		{"no room", syn.Frame(), ether.Meta{}, 40},
		{"a fragment", fragment, ether.Meta{}, 1400},
		{"nothing", nil, ether.Meta{}, 1400},
	} {
		got := bytes.Clone(tt.frame)
		if ether.ClampMSS(got, tt.m, tt.mtu) || !bytes.Equal(got, tt.frame) {
			t.Errorf("%s: ClampMSS changed %x to %x", tt.name, tt.frame, got)
		}
	}
	whole := syn.Frame()
	for n := range whole {
		if ether.ClampMSS(bytes.Clone(whole[:n]), ether.Meta{}, 1400) {
			t.Errorf("cut at %d: ClampMSS = true", n)
		}
	}
	// A wrong checksum is as wrong as before, and not laundered.
	for _, at := range []int{34, 38, 50, 51} {
		bad := patch(whole, at, whole[at]^0x10)
		if !ether.ClampMSS(bad, ether.Meta{}, 1400) {
			t.Fatal("ClampMSS = false")
		}
		if h, _ := ether.ParseHeaders(bad); ether.VerifyL4(bad, h) {
			t.Errorf("byte %d damaged: the checksum is right after ClampMSS", at)
		}
	}
}

// FuzzClampMSS: a right checksum stays right and a wrong one wrong, and nothing
// but the option and the checksum changes.
func FuzzClampMSS(f *testing.F) {
	for _, p := range []ethertest.TCP{
		{Flags: ether.TCPSyn, Options: mss(1460)},
		{Flags: ether.TCPSyn | ether.TCPAck, Options: append([]byte{1}, append(mss(9000), 3, 3, 7)...), Src: ethertest.DefaultSrc6},
		{Flags: ether.TCPSyn, Options: []byte{2, 0, 2, 4}, VLANs: []uint16{1}},
	} {
		f.Add(p.Frame(), uint16(1418), byte(0))
		p.Partial = true
		f.Add(p.Frame(), uint16(1418), byte(1))
	}
	f.Fuzz(func(t *testing.T, frame []byte, mtu uint16, state byte) {
		m := ether.Meta{Checksum: ether.Checksum(state % 3)}
		h, ok := ether.ParseHeaders(frame)
		if m.Checksum == ether.ChecksumPartial {
			m, _ = ether.PartialMeta(frame)
		}
		before := bytes.Clone(frame)
		right := ether.VerifyL4(frame, h)
		if !ether.ClampMSS(frame, m, int(mtu)) {
			if !bytes.Equal(frame, before) {
				t.Fatalf("changed: %x to %x", before, frame)
			}
			return
		}
		if !ok || frame[h.L4+13]&ether.TCPSyn == 0 {
			t.Fatalf("changed, but no SYN: %x", before)
		}
		for i := range frame {
			sum := i == int(h.L4)+16 || i == int(h.L4)+17
			option := i >= int(h.L4)+22 && i < int(h.Payload)
			if frame[i] != before[i] && !option && (!sum || m.Checksum == ether.ChecksumPartial) {
				t.Fatalf("byte %d changed: %x to %x", i, before, frame)
			}
		}
		if m.Checksum != ether.ChecksumPartial && ether.VerifyL4(frame, h) != right {
			t.Fatalf("checksum right before: %t, after: %t: %x", right, !right, frame)
		}
	})
}

func TestClampMSSNoAllocs(t *testing.T) {
	syn := ethertest.TCP{Flags: ether.TCPSyn, Options: append([]byte{1}, append(mss(1460), 3, 3, 7)...)}.Frame()
	mtu := 1500
	if n := testing.AllocsPerRun(100, func() {
		mtu--
		if !ether.ClampMSS(syn, ether.Meta{}, mtu) {
			panic("not clamped")
		}
	}); n != 0 {
		t.Errorf("%v allocations, want 0", n)
	}
}

func BenchmarkClampMSS(b *testing.B) {
	for name, p := range map[string]ethertest.TCP{
		"SYN":  {Flags: ether.TCPSyn, Options: append(mss(1400), 4, 2, 8, 10, 1, 2, 3, 4, 5, 6, 7, 8, 1, 3, 3, 7)},
		"data": {Payload: pattern(1400)},
	} {
		b.Run(name, func(b *testing.B) {
			f := p.Frame()
			b.SetBytes(int64(len(f)))
			for b.Loop() {
				if ether.ClampMSS(f, ether.Meta{}, 1450) {
					b.Fatal("clamped")
				}
			}
		})
	}
}
