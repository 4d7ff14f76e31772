package e2e

import (
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/tulle-net/tulle/internal/lab"
	"github.com/tulle-net/tulle/node"
)

//	a (tulle) ──┐
//	b (tulle) ──┼─[ul]── BUM frames go to one multicast group (RFC 7348, section 4.2)
//	c (kernel) ─┘

var groups = []struct {
	name  string
	u     lab.Underlay
	group string
}{
	{"IPv4", lab.Underlay{Prefix4: underlay4, Offloads: lab.Wire}, "239.1.1.1"},
	{"IPv4 virtual", lab.Underlay{Prefix4: underlay4}, "239.1.1.1"},
	{"IPv6 site", lab.Underlay{Prefix6: underlay6}, "ff05::100"},
	{"IPv6 link", lab.Underlay{Prefix6: underlay6}, "ff12::100"},
}

// TestMulticastKernel: two tulle nodes that do not know each other, and the
// kernel's device, are members of one group.
func TestMulticastKernel(t *testing.T) {
	t.Parallel()
	for _, g := range groups {
		t.Run(g.name, func(t *testing.T) {
			l, sw, h := hosts(t, 3, g.u)
			group := netip.MustParseAddr(g.group)
			mtu := 1450
			if group.Is6() {
				mtu = 1430
			}
			kernelVTEP(t, h[2], 3, mtu, lab.VXLAN{Local: sw.Addr(h[2]), Remote: group, Dev: "ul"})
			flood := []string{"flood=multicast", "group=" + g.group}
			a := up(t, l, h[0], "--overlay", overlay(1, flood...))
			b := up(t, l, h[1], "--overlay", overlay(2, flood...))
			if list := a.status().Overlays[0].FloodList; len(list) != 1 || list[0] != netip.AddrPortFrom(group, 4789) {
				t.Errorf("a's flood list is %v, want the group alone", list)
			}

			// Each asks through the group, once.
			asked := watch(t, h[2], "ul", func(f []byte) bool {
				dst, in, ok := inner(f)
				return ok && dst == group && asksFor(address(3))(in)
			})
			ping(t, h[0], address(3), 5*time.Second)
			if asked(time.Second) == nil {
				t.Error("a's ARP request for c did not go to the group")
			}
			ping(t, h[0], address(2), 5*time.Second)
			asked = watch(t, h[0], "ul", func(f []byte) bool {
				dst, in, ok := inner(f)
				return ok && dst == group && asksFor(address(1))(in)
			})
			runIn(t, h[2], "ip", "neigh", "flush", "dev", "vx0")
			ping(t, h[2], address(1), 5*time.Second)
			if asked(time.Second) == nil {
				t.Error("the kernel's ARP request for a did not go to the group")
			}
			ping(t, h[2], address(2), 5*time.Second)
			ping(t, h[1], address(3), 5*time.Second)

			// Who answered was learnt, on both sides; unicast goes there directly.
			for _, n := range []*tulle{a, b} {
				if !learnt(n, sw.Addr(h[2])) {
					t.Errorf("%s did not learn the kernel's VTEP", n.name)
				}
			}
			if !learnt(a, sw.Addr(h[1])) || !learnt(b, sw.Addr(h[0])) {
				t.Error("a and b did not learn each other's VTEPs")
			}
			fdb := runIn(t, h[2], "bridge", "fdb", "show", "dev", "vx0")
			if !strings.Contains(fdb, "02:54:0a:20:00:01 dst "+sw.Addr(h[0]).String()) {
				t.Errorf("the kernel did not learn a's VTEP:\n%s", fdb)
			}
			stray := watch(t, h[1], "ul", func(f []byte) bool {
				_, in, ok := inner(f)
				return ok && string(in[:6]) == string([]byte{0x02, 0x54, 10, 32, 0, 1}) && string(in[6:12]) != string([]byte{0x02, 0x54, 10, 32, 0, 2})
			})
			transfer(t, l, h[0], h[2], address(3), 4<<20)
			transfer(t, l, h[2], h[0], address(1), 4<<20)
			transfer(t, l, h[0], h[1], address(2), 4<<20)
			if f := stray(0); f != nil {
				t.Errorf("c's unicast to a came by b's cable: %x", f)
			}
			intact(t, h...)
			if list := a.status().Overlays[0].FloodList; len(list) != 1 {
				t.Errorf("a's flood list is %v after all that, want the group alone", list)
			}
		})
	}
}

// learnt reports whether n knows vtep as a foreign VTEP of its first overlay.
func learnt(n *tulle, vtep netip.Addr) bool {
	n.t.Helper()
	var p node.Peers
	if err := n.try("/v1/peers", &p); err != nil {
		n.t.Fatal(err)
	}
	return slices.ContainsFunc(p.Foreign, func(f node.ForeignStatus) bool {
		return f.VTEP == netip.AddrPortFrom(vtep, 4789) && f.RxFrames > 0
	})
}
