package ipam

import (
	"net/netip"
	"testing"
)

func TestBlockBits(t *testing.T) {
	for _, tt := range []struct {
		subnet string
		want   int
	}{
		{"10.0.0.0/8", 26}, {"10.0.0.0/24", 26}, {"10.0.0.0/25", 27}, {"10.0.0.0/26", 28}, {"10.0.0.0/28", 30}, {"10.0.0.0/29", 30},
		{"10.0.0.0/30", 30}, {"10.0.0.0/31", 31}, {"10.0.0.0/32", 32},
		{"fd00::/48", 80}, {"fd00::/64", 80}, {"fd00::/78", 80}, {"fd00::/80", 82}, {"fd00::/124", 126}, {"fd00::/126", 126}, {"fd00::/128", 128},
	} {
		if got := BlockBits(prefix(tt.subnet)); got != tt.want {
			t.Errorf("BlockBits(%s) = %d, want %d", tt.subnet, got, tt.want)
		}
	}
}

// TestBlockAt: blocks and their numbers belong together.
func TestBlockAt(t *testing.T) {
	for _, s := range []string{"10.0.0.0/8", "10.9.8.0/24", "192.0.2.8/29", "192.0.2.8/32", "fd00::/48", "fd00:1:2:3::/64", "2001::/8", "fd00::/80", "fd00::40/122", "fd00::5/128"} {
		subnet := prefix(s)
		n := blocksIn(subnet)
		for _, i := range []uint64{0, 1, 2, n / 3, n / 2, n - 2, n - 1} {
			if i >= n {
				continue
			}
			p := blockAt(subnet, i)
			if p != p.Masked() || !subnet.Contains(p.Addr()) || !subnet.Contains(last(p)) {
				t.Fatalf("block %d of %s is %s", i, s, p)
			}
			for _, a := range []netip.Addr{p.Addr(), last(p)} {
				if got := indexOf(subnet, a); got != i {
					t.Errorf("%s is in block %d of %s, want %d", a, got, s, i)
				}
			}
			if off := offset(p, last(p)); p.Addr().BitLen()-p.Bits() <= 48 && off != sizeOf(p)-1 {
				t.Errorf("offset of %s in %s is %d", last(p), p, off)
			}
		}
		if n < 1<<maxIndexBits && last(blockAt(subnet, n-1)) != last(subnet) {
			t.Errorf("the last block of %s is %s", s, blockAt(subnet, n-1))
		}
	}
}

func TestOffered(t *testing.T) {
	o := overlay("o", "10.0.0.0/24", "fd00::/64")
	o.Gateways, o.Reserved = []netip.Addr{addr("10.0.0.9")}, []netip.Prefix{prefix("10.0.0.64/26")}
	for a, want := range map[string][2]bool{ // offered, askable
		"10.0.0.0": {}, "10.0.0.1": {true, true}, "10.0.0.9": {}, "10.0.0.63": {true, true}, "10.0.0.64": {false, true}, "10.0.0.127": {false, true},
		"10.0.0.128": {true, true}, "10.0.0.255": {}, "10.0.1.0": {}, "fd00::": {}, "fd00::1": {}, "fd00::2": {true, true}, "fd00::ffff:ffff:ffff:ffff": {true, true},
	} {
		if got := [2]bool{offered(o, addr(a)), askable(o, addr(a)) == nil}; got != want {
			t.Errorf("%s: offered, askable = %v, want %v", a, got, want)
		}
	}
	for s, want := range map[string]string{"10.0.0.0/31": "10.0.0.0", "10.0.0.4/30": "10.0.0.5", "fd00::4/126": "fd00::5", "fd00::4/127": "fd00::4"} {
		if got := gatewayOf(overlay("x", s), prefix(s)); got != addr(want) {
			t.Errorf("gateway of %s is %s, want %s", s, got, want)
		}
	}
	if got := gatewayOf(overlay("x", "10.0.0.1/32"), prefix("10.0.0.1/32")); got.IsValid() {
		t.Errorf("gateway of a /32 is %s", got)
	}
}

// TestFree: the search goes round, past leased blocks and huge reserved ranges.
func TestFree(t *testing.T) {
	o := overlay("o", "fd00::/32")
	o.Reserved = []netip.Prefix{prefix("fd00::/33"), prefix("fd00:0:8000::/34")}
	b := &book{overlay: o, blocks: map[netip.Prefix]*holder{}, fixed: map[netip.Addr]*holder{}}
	for range 300 {
		p, ok := b.free(o.Subnets[0], 77, "n", "s")
		if !ok || o.Reserved[0].Overlaps(p) || o.Reserved[1].Overlaps(p) || b.blocks[p] != nil {
			t.Fatalf("%s, %v", p, ok)
		}
		b.blocks[p] = &holder{}
	}
	o.Reserved = append(o.Reserved, prefix("fd00::/32"))
	if p, ok := b.free(o.Subnets[0], 1<<60, "n", "s"); ok {
		t.Errorf("%s of a subnet that is all reserved", p)
	}
	// A block that was leased with another size is not leased again.
	o = overlay("o", "10.0.0.0/24")
	b = &book{overlay: o, blocks: map[netip.Prefix]*holder{prefix("10.0.0.0/25"): {}, prefix("10.0.0.130/32"): {}}}
	if p, ok := b.free(o.Subnets[0], 1, "n", "s"); !ok || p != prefix("10.0.0.192/26") {
		t.Errorf("%s, %v", p, ok)
	}
}
