package ether_test

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"testing"

	"github.com/tulle-net/tulle/ether"
	"github.com/tulle-net/tulle/ether/ethertest"
)

// flows returns n frames of different flows that differ as little as real ones
// do: one field, counted up.
func flows(kind string, n int) [][]byte {
	frames := make([][]byte, n)
	for i := range frames {
		src4 := netip.AddrFrom4([4]byte{10, 32, byte(i >> 8), byte(i)})
		b := addr6a.As16()
		binary.BigEndian.PutUint32(b[12:], uint32(i))
		src6 := netip.AddrFrom16(b)
		port := uint16(i)
		switch kind {
		case "TCP4 source ports":
			frames[i] = ethertest.TCP{Src: netip.AddrPortFrom(addr4a, 30000+port)}.Frame()
		case "TCP6 source ports":
			frames[i] = ethertest.TCP{Src: netip.AddrPortFrom(addr6a, 30000+port)}.Frame()
		case "UDP4 destination ports":
			frames[i] = ethertest.UDP{Dst: netip.AddrPortFrom(addr4b, 5000+port)}.Frame()
		case "UDP4 addresses":
			frames[i] = ethertest.UDP{Src: netip.AddrPortFrom(src4, 53)}.Frame()
		case "UDP6 addresses":
			frames[i] = ethertest.UDP{Src: netip.AddrPortFrom(src6, 53)}.Frame()
		case "ICMP4 addresses":
			frames[i] = ethertest.Echo{Src: src4}.Frame()
		case "ICMP6 addresses":
			frames[i] = ethertest.Echo{Src: src6, Dst: addr6b}.Frame()
		case "MACs":
			frames[i] = ethertest.Ethernet(macB, macA+ether.MAC(i), nil, 0x88cc, nil)
		}
	}
	return frames
}

var flowKinds = []string{
	"TCP4 source ports", "TCP6 source ports", "UDP4 destination ports", "UDP4 addresses", "UDP6 addresses",
	"ICMP4 addresses", "ICMP6 addresses", "MACs",
}

// TestFlowHashSpread: flows spread over M ports as chance would have it, by
// remainder and by the high bits.
func TestFlowHashSpread(t *testing.T) {
	const n, ports = 16000, 16
	for _, kind := range flowKinds {
		var low, high, odd [ports]int
		for _, f := range flows(kind, n) {
			h := ether.FlowHash(f)
			low[h%ports]++
			high[uint64(h)*ports>>32]++
			odd[h%(ports-1)]++
		}
		// The 0.01 % point of chi-squared is 44.3 for 15 degrees, 42.6 for 14.
		for how, c := range map[string][]int{"low bits": low[:], "high bits": high[:], "modulo 15": odd[:ports-1]} {
			want, chi := float64(n)/float64(len(c)), 0.0
			for _, k := range c {
				chi += (float64(k) - want) * (float64(k) - want) / want
			}
			if chi > 44.3 {
				t.Errorf("%s by %s: %v, chi-squared %.1f, want below 44.3", kind, how, c, chi)
			}
		}
	}
}

// TestFlowHashCollisions: as few as chance allows (n²/2³³ pairs, about 0.03).
func TestFlowHashCollisions(t *testing.T) {
	for _, kind := range flowKinds {
		seen := make(map[uint32]bool)
		for _, f := range flows(kind, 16000) {
			seen[ether.FlowHash(f)] = true
		}
		if len(seen) < 16000-3 {
			t.Errorf("%s: %d hashes of 16000 flows", kind, len(seen))
		}
	}
}

// TestFlowHashStable pins values: a change moves every flow to another port
// and, while versions are mixed, reorders it.
func TestFlowHashStable(t *testing.T) {
	for _, tt := range []struct {
		name  string
		frame []byte
		want  uint32
	}{
		{"TCP4", ethertest.TCP{}.Frame(), 0x3633e9e7},
		{"TCP6", ethertest.TCP{Src: ethertest.DefaultSrc6}.Frame(), 0xd7da4a37},
		{"ICMP4", ethertest.Echo{}.Frame(), 0xe877a501},
		{"ARP", ethertest.ARPRequest(macA, addr4a, addr4b), 0x69a66c08},
	} {
		if got := ether.FlowHash(tt.frame); got != tt.want {
			t.Errorf("%s: FlowHash = %#08x, want %#08x", tt.name, got, tt.want)
		}
	}
}

// TestFlowHashSame: what does not name the flow does not change the hash.
func TestFlowHashSame(t *testing.T) {
	one := ethertest.TCP{Seq: 1}.Frame()
	for name, other := range map[string][]byte{
		"super-frame":        ethertest.TCP{Payload: make([]byte, 60000), Partial: true}.Frame(),
		"options":            ethertest.TCP{Options: make([]byte, 12), IPOptions: make([]byte, 8), Flags: ether.TCPFin}.Frame(),
		"VLAN":               ethertest.TCP{VLANs: []uint16{7}}.Frame(),
		"TTL, TOS, ID":       ethertest.TCP{TTL: 3, TOS: 0xb8, ID: 77}.Frame(),
		"malformed TCP":      patch(one, 46, 0),
		"MACs":               ethertest.TCP{SrcMAC: macB, DstMAC: macA}.Frame(),
		"trailing padding":   ethertest.TCP{Padding: 6}.Frame(),
		"ports, header only": patch(one, 16, 0, 24),
	} {
		if got, want := ether.FlowHash(other), ether.FlowHash(one); got != want {
			t.Errorf("%s: FlowHash = %#08x, want %#08x", name, got, want)
		}
	}
}

// TestFlowHashOfHeaders: a super-frame in parts has the hash of the whole, which
// the IP header's length goes far beyond.
func TestFlowHashOfHeaders(t *testing.T) {
	exts := []ethertest.Extension{ethertest.Padded(ether.ProtoHopByHop, 16), ethertest.Padded(ether.ProtoDestOpts, 8)}
	for name, frame := range map[string][]byte{
		"TCP4":            ethertest.TCP{Payload: make([]byte, 60000)}.Frame(),
		"TCP6":            ethertest.TCP{Src: ethertest.DefaultSrc6, Payload: make([]byte, 60000)}.Frame(),
		"UDP4":            ethertest.UDP{Payload: make([]byte, 60000)}.Frame(),
		"UDP6":            ethertest.UDP{Src: ethertest.DefaultSrc6, Payload: make([]byte, 60000)}.Frame(),
		"TCP4 VLAN":       ethertest.TCP{VLANs: []uint16{7}, Payload: make([]byte, 60000)}.Frame(),
		"UDP4 two VLANs":  ethertest.UDP{VLANs: []uint16{7, 8}, Payload: make([]byte, 60000)}.Frame(),
		"TCP6 VLAN":       ethertest.TCP{VLANs: []uint16{7}, Src: ethertest.DefaultSrc6, Payload: make([]byte, 60000)}.Frame(),
		"TCP4 options":    ethertest.TCP{Options: make([]byte, 12), IPOptions: make([]byte, 8), Payload: make([]byte, 60000)}.Frame(),
		"TCP6 extensions": ethertest.TCP{Src: ethertest.DefaultSrc6, Extensions: exts, Payload: make([]byte, 60000)}.Frame(),
		"UDP6 extensions": ethertest.UDP{Src: ethertest.DefaultSrc6, Extensions: exts, Payload: make([]byte, 60000)}.Frame(),
	} {
		h, ok := ether.ParseHeaders(frame)
		if !ok {
			t.Fatalf("%s: ParseHeaders is not ok", name)
		}
		want := ether.FlowHash(frame)
		for n := int(h.L4) + 4; n <= int(h.Payload)+1; n++ {
			if got := ether.FlowHash(frame[:n:n]); got != want {
				t.Errorf("%s: FlowHash of %d bytes, headers being %d = %#08x, of the frame %#08x", name, n, h.Payload, got, want)
			}
		}
		other := patch(frame, int(h.L4)+1, frame[h.L4+1]+1)
		if got := ether.FlowHash(other[:h.Payload:h.Payload]); got == want {
			t.Errorf("%s: the headers of another flow have its hash", name)
		}
	}
}

func TestFlowHashFragments(t *testing.T) {
	first := patch(ethertest.UDP{Payload: make([]byte, 16)}.Frame(), 20, 0x20, 0)
	second := patch(ethertest.UDP{Src: netip.MustParseAddrPort("10.32.0.1:1"), Payload: make([]byte, 16)}.Frame(), 20, 0, 2)
	if a, b := ether.FlowHash(first), ether.FlowHash(second); a != b {
		t.Errorf("fragments of one datagram hash to %#08x and %#08x", a, b)
	}
	at := func(port uint16, e ethertest.Extension) []byte {
		return ethertest.UDP{Src: netip.AddrPortFrom(addr6a, port), Extensions: []ethertest.Extension{e}}.Frame()
	}
	if a, b := ether.FlowHash(at(1, fragment6(0, true))), ether.FlowHash(at(2, fragment6(8, false))); a != b {
		t.Errorf("IPv6 fragments of one datagram hash to %#08x and %#08x", a, b)
	}
}

// TestFlowHashDiffers: each part of the flow changes it.
func TestFlowHashDiffers(t *testing.T) {
	seen := make(map[uint32]string)
	for _, f := range []struct {
		name  string
		frame []byte
	}{
		{"TCP", ethertest.TCP{}.Frame()},
		{"back", ethertest.TCP{Src: ethertest.DefaultDst, Dst: ethertest.DefaultSrc}.Frame()},
		{"UDP", ethertest.UDP{}.Frame()},
		{"ICMP", ethertest.Echo{}.Frame()},
		{"source port", ethertest.TCP{Src: netip.AddrPortFrom(addr4a, 1)}.Frame()},
		{"destination port", ethertest.TCP{Dst: netip.AddrPortFrom(addr4b, 1)}.Frame()},
		{"destination", ethertest.TCP{Dst: netip.AddrPortFrom(addr4a, 80)}.Frame()},
		{"TCP6", ethertest.TCP{Src: ethertest.DefaultSrc6}.Frame()},
		{"TCP6 back", ethertest.TCP{Src: ethertest.DefaultDst6, Dst: ethertest.DefaultSrc6}.Frame()},
		{"UDP6", ethertest.UDP{Src: ethertest.DefaultSrc6}.Frame()},
		{"ARP", ethertest.ARPRequest(macA, addr4a, addr4b)},
		{"ARP to A", ethertest.Ethernet(macA, macA, nil, 0x0806, nil)},
		{"LLDP", ethertest.Ethernet(ether.Broadcast, macA, nil, 0x88cc, nil)},
	} {
		h := ether.FlowHash(f.frame)
		if other, ok := seen[h]; ok {
			t.Errorf("%s and %s hash to %#08x", f.name, other, h)
		}
		seen[h] = f.name
	}
}

func BenchmarkFlowHash(b *testing.B) {
	for name, frame := range benchFrames() {
		b.Run(name, func(b *testing.B) {
			b.SetBytes(int64(len(frame)))
			for b.Loop() {
				ether.FlowHash(frame)
			}
		})
	}
}

func ExampleFlowHash() {
	frame := ethertest.TCP{}.Frame()
	pool := []uint16{49152, 49153, 49154, 49155}
	fmt.Println(pool[uint64(ether.FlowHash(frame))*uint64(len(pool))>>32])
	// Output: 49152
}
