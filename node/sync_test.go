package node

import (
	"net/netip"
	"reflect"
	"strings"
	"testing"

	"github.com/tulle-net/tulle/discovery"
	"github.com/tulle-net/tulle/vxlan"
)

func vtep(i byte) netip.AddrPort {
	return netip.AddrPortFrom(netip.AddrFrom4([4]byte{192, 0, 2, i}), vxlan.Port)
}

func member(name string, i byte, overlays ...discovery.Overlay) discovery.Member {
	return discovery.Member{Name: name, Status: discovery.Alive, Confirmed: true, VTEP: vtep(i), Overlays: overlays}
}

func TestViewOf(t *testing.T) {
	blue := discovery.Overlay{VNI: 100, Name: "blue", Encryption: "none"}
	red := discovery.Overlay{VNI: 200, Name: "red", Encryption: "none"}
	mine := []discovery.Overlay{blue, red}
	self := member("a", 1, mine...)
	self.Self = true
	failed := member("f", 6, blue)
	failed.Status = discovery.Failed

	unconfirmed := member("u", 7, blue)
	unconfirmed.Confirmed = false
	v6 := member("b", 2, blue)
	v6.VTEP = netip.MustParseAddrPort("[2001:db8::2]:4789")

	for name, c := range map[string]struct {
		members   []discovery.Member
		vteps     []netip.AddrPort
		flood     map[vxlan.VNI][]netip.AddrPort
		refused   map[vxlan.VNI][]netip.Addr
		conflicts []string // words that the conflict at this place has
	}{
		"alone": {members: []discovery.Member{self}},
		"who carries what": {
			members: []discovery.Member{self, member("b", 2, blue), member("c", 3, blue, red), member("d", 4)},
			vteps:   []netip.AddrPort{vtep(2), vtep(3), vtep(4)},
			flood:   map[vxlan.VNI][]netip.AddrPort{100: {vtep(2), vtep(3)}, 200: {vtep(3)}},
		},
		"failed": {members: []discovery.Member{self, failed}},
		"one name, two VNIs": {
			members:   []discovery.Member{self, member("b", 2, discovery.Overlay{VNI: 300, Name: "blue", Encryption: "none"})},
			vteps:     []netip.AddrPort{vtep(2)},
			refused:   map[vxlan.VNI][]netip.Addr{100: {vtep(2).Addr()}},
			conflicts: []string{"overlay blue has VNI 100 on node a and VNI 300 on node b"},
		},
		"one VNI, two names": {
			members:   []discovery.Member{self, member("b", 2, discovery.Overlay{VNI: 100, Name: "green", Encryption: "none"})},
			vteps:     []netip.AddrPort{vtep(2)},
			refused:   map[vxlan.VNI][]netip.Addr{100: {vtep(2).Addr()}},
			conflicts: []string{"VNI 100 is overlay blue on node a and overlay green on node b"},
		},
		"names swapped": {
			members: []discovery.Member{self, member("b", 2,
				discovery.Overlay{VNI: 100, Name: "red", Encryption: "none"}, discovery.Overlay{VNI: 200, Name: "blue", Encryption: "none"})},
			vteps:     []netip.AddrPort{vtep(2)},
			refused:   map[vxlan.VNI][]netip.Addr{100: {vtep(2).Addr(), vtep(2).Addr()}, 200: {vtep(2).Addr(), vtep(2).Addr()}},
			conflicts: []string{"overlay red", "VNI 100", "overlay blue", "VNI 200"},
		},
		"encryption differs": {
			members:   []discovery.Member{self, member("b", 2, discovery.Overlay{VNI: 100, Name: "blue", Encryption: "required"})},
			vteps:     []netip.AddrPort{vtep(2)},
			refused:   map[vxlan.VNI][]netip.Addr{100: {vtep(2).Addr()}},
			conflicts: []string{"encryption none on node a and required on node b"},
		},
		"not confirmed": {members: []discovery.Member{self, unconfirmed}},
		"our address": {
			members:   []discovery.Member{self, member("b", 1, blue)},
			conflicts: []string{"nodes a and b both have the VTEP address 192.0.2.1"},
		},
		"another family": {
			members:   []discovery.Member{self, v6},
			conflicts: []string{"node a has the VTEP 192.0.2.1 and node b 2001:db8::2"},
		},
		"one address, two nodes": {
			members:   []discovery.Member{self, member("b", 2, blue), member("c", 2, blue)},
			vteps:     []netip.AddrPort{vtep(2)},
			flood:     map[vxlan.VNI][]netip.AddrPort{100: {vtep(2)}},
			conflicts: []string{"nodes b and c both have the VTEP address 192.0.2.2"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			if c.flood == nil {
				c.flood = map[vxlan.VNI][]netip.AddrPort{}
			}
			if c.refused == nil {
				c.refused = map[vxlan.VNI][]netip.Addr{}
			}
			v := viewOf("a", vtep(1), mine, c.members)
			if !reflect.DeepEqual(v.vteps, c.vteps) || !reflect.DeepEqual(v.flood, c.flood) || !reflect.DeepEqual(v.refused, c.refused) {
				t.Errorf("viewOf = %+v, want vteps %v, flood %v, refused %v", v, c.vteps, c.flood, c.refused)
			}
			if len(v.conflicts) != len(c.conflicts) {
				t.Fatalf("conflicts %q, want %d", v.conflicts, len(c.conflicts))
			}
			for i, words := range c.conflicts {
				if !strings.Contains(v.conflicts[i], words) {
					t.Errorf("conflict %q does not say %q", v.conflicts[i], words)
				}
			}
		})
	}
}
