package e2e

import (
	"fmt"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/tulle-net/tulle/internal/lab"
	"github.com/tulle-net/tulle/node"
	"github.com/tulle-net/tulle/tap"
)

//	x ──[ul]── a ── blue, with a gateway: the host, and containers
//
// What a gateway's device on the host meets of other capabilities: the check for
// duplicate addresses, limits of bandwidth, layer 3 devices with routes.

func TestGatewayMeets(t *testing.T) {
	t.Parallel()
	l, sw, h := hosts(t, 2, lab.Underlay{Prefix4: underlay4, Offloads: lab.NIC})
	a, x := joined(t, l, h[:1], nil)[0], h[1]
	nodes := []*tulle{a}
	a.do("overlay", "create", "blue", "--subnet", "10.32.0.0/16", "--subnet", "fd32::/64", "--gateway", "true")
	telling(t, x, 7000)
	attach := func(t *testing.T, h *lab.Host, r node.AttachRequest) node.Endpoint {
		t.Helper()
		r.Overlay, r.Netns = "blue", h.Path()
		e, err := a.tryAttach(r)
		if err != nil {
			t.Fatal(err)
		}
		return e
	}

	part(t, "duplicates", nodes, func(t *testing.T) {
		a.exposes("blue")
		c := containers(t, l, "d1", "d2", "d3", "d4", "d5")
		first := attach(t, c[0], node.AttachRequest{})
		for i, h := range c[1:] {
			r := node.AttachRequest{}
			if i%2 == 0 { // asked for, for which an answer is waited for longest
				r.IPs = []netip.Addr{netip.AddrFrom4([4]byte{10, 32, 200, byte(i)}), netip.MustParseAddr(fmt.Sprintf("fd32::c8:%x", i+1))}
			}
			attach(t, h, r)
		}
		ping(t, c[4], first.IPs[0].Addr(), 5*time.Second)
		// The last was asked for three times within 2.5 s.
		time.Sleep(2600 * time.Millisecond)
		for _, e := range a.attached(func(e node.Endpoint) bool { return e.Netns != "" }) {
			if !e.Up || e.Error != "" {
				t.Errorf("the host's own devices answer for an endpoint's address: %+v", e)
			}
		}
		// What the host does have is found.
		runIn(t, h[0], "ip", "addr", "add", "10.32.201.1/32", "dev", "tg-blue")
		a.refuses([]string{"10.32.201.1 is another station's", blueGateway.String()}, "attach", "blue", "--netns", c[0].Path(), "--ifname", "eth1", "--ip", "10.32.201.1")
		a.do("unexpose", "blue")
	})

	part(t, "limits", nodes, func(t *testing.T) {
		const rate, bytes = 80e6, 4 << 20
		c := containers(t, l, "l1")[0]
		e := attach(t, c, node.AttachRequest{Limits: &node.Limits{IngressRate: rate, IngressBurst: 8, EgressRate: rate, EgressBurst: 8}})
		for what, got := range map[string]lab.Transferred{
			"out by the gateway":  transfer(t, l, c, x, sw.Addr(x), bytes),
			"in from the gateway": transfer(t, l, h[0], c, e.IPs[0].Addr(), bytes),
		} {
			if bps := got.BitsPerSecond(); bps > 1.1*rate || bps < rate/4 {
				t.Errorf("%s: %.0f Mbit/s of %.0f", what, bps/1e6, rate/1e6)
			}
		}
	})

	part(t, "layer 3 with routes", nodes, func(t *testing.T) {
		c := containers(t, l, "r1", "r2")
		router := attach(t, c[0], node.AttachRequest{})
		behind := netip.MustParsePrefix("198.51.100.0/24")
		runIn(t, c[0], "ip", "addr", "add", "198.51.100.7/32", "dev", "lo")
		e := attach(t, c[1], node.AttachRequest{Driver: tap.DriverTun, Routes: []node.Route{{Dst: behind, Via: router.IPs[0].Addr()}}})
		if !slices.Contains(e.Gateways, netip.MustParseAddr("10.32.0.1")) {
			t.Errorf("the endpoint has no default route: %+v", e)
		}
		ping(t, c[1], netip.MustParseAddr("198.51.100.7"), 5*time.Second)
		wantTold(t, c[1], "tcp", port(sw.Addr(x), 7000), sw.Addr(h[0]))
		if n := a.status().Drops["tun_no_route"]; n != 0 {
			t.Errorf("tun_no_route is %d", n)
		}
	})
}

// TestPublishNothingLeft: the overlay cannot be here at all, so its ports are not taken either.
func TestPublishNothingLeft(t *testing.T) {
	t.Parallel()
	l, _, h := hosts(t, 2, lab.Underlay{Prefix4: underlay4, Offloads: lab.Wire})
	a := up(t, l, h[0])
	a.do("overlay", "create", "green", "--subnet", "10.34.0.0/16", "--vni", "70000", "--gateway", "true")
	b := up(t, l, h[1], "--token", a.token(), "--overlay", "name=own,vni=70000,encryption=none,tap=own0,address=10.99.0.1/16")
	known(t, 10*time.Second, "green", true, b)
	c := containers(t, l, "c")[0]
	b.refuses([]string{"VNI 70000 belongs to overlay own"}, "attach", "green", "--netns", c.Path(), "--publish", "8080:80")
	free(t, h[1], 8080)
}
