package e2e

import (
	"encoding/json"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/tulle-net/tulle/internal/lab"
	"github.com/tulle-net/tulle/node"
)

//	a (the only keeper, kill -9) ──┐
//	b ─────────────────────────────┼─[ul]── all are in the shared overlay blue
//	c ─────────────────────────────┘
//
// What the cluster does without its only keeper, and what it does not.

// books are what the keepers know of a cluster, as text: overlays, the blocks
// and fixed addresses, and the nodes.
func (n *tulle) books() string {
	n.t.Helper()
	list := get[node.SharedOverlays](n, "/v1/shared").Overlays
	for i := range list {
		list[i].Joined = false // n's own
	}
	addresses := get[node.IPAM](n, "/v1/ipam")
	if addresses.Stale {
		n.t.Fatalf("%s: no keeper tells of addresses", n.name)
	}
	for i := range addresses.Overlays {
		o := &addresses.Overlays[i]
		for j := range o.Blocks {
			o.Blocks[j].Used, o.Blocks[j].Renewed = 0, time.Time{}
		}
	}
	var names []string
	for name := range n.nodesOf() {
		names = append(names, name)
	}
	slices.Sort(names)
	b, err := json.MarshalIndent([]any{list, addresses.Overlays, names}, "", " ")
	if err != nil {
		n.t.Fatal(err)
	}
	return string(b)
}

// alone checks that a set of nodes has each address once.
func alone(t *testing.T, nodes ...*tulle) {
	t.Helper()
	has := map[string]string{}
	for _, n := range nodes {
		for _, e := range get[node.Endpoints](n, "/v1/endpoints?local=true").Endpoints {
			for _, p := range e.IPs {
				key := e.Overlay + " " + p.Addr().String()
				if other, taken := has[key]; taken {
					t.Errorf("%s and %s both have %s", other, n.name, key)
				}
				has[key] = n.name
			}
		}
	}
}

// noFindings: what the keepers and the nodes say of addresses is one.
func noFindings(t *testing.T, n *tulle) {
	t.Helper()
	if check := asked[node.IPAMCheck](n, "ipam", "check"); len(check.Findings)+len(check.Silent) > 0 {
		t.Errorf("%s: ipam check: %+v", n.name, check)
	}
}

func TestSharedKeeperDead(t *testing.T) {
	t.Parallel()
	l, _, h := hosts(t, 3, lab.Underlay{Prefix4: underlay4, Offloads: lab.Wire})
	nodes := joined(t, l, h, nil)
	a, b, c := nodes[0], nodes[1], nodes[2]
	b.do("overlay", "create", "blue")
	b.do("overlay", "create", "green", "--subnet", "10.40.0.0/16", "--subnet", "fd40::/48")
	var blue []place
	for _, n := range nodes {
		blue = append(blue, place{n, n.exposed("blue").Addr()})
	}
	green := c.exposes("green")
	mesh(t, 10*time.Second, blue...)
	before := a.books()
	a.kill()
	rest := blue[1:]
	untoken(b, c)

	part(t, "traffic", nodes, func(t *testing.T) {
		mesh(t, 2*time.Second, rest...)
		transfer(t, l, b.host, c.host, blue[2].addr, 4<<20)
	})

	part(t, "restart", nodes, func(t *testing.T) {
		// One after the other: each makes new sessions with what the other is; then both at once.
		for _, together := range []bool{false, true} {
			for _, n := range []*tulle{b, c} {
				n.kill()
				if together {
					b.kill()
					c.kill()
					b.start()
					c.start()
				} else {
					n.start()
				}
				took := meet(t, 20*time.Second, b, c)
				took += mesh(t, 15*time.Second, rest...)
				t.Logf("kill -9 of %s, of both: %v: traffic again %v after the start", n.name, together, took.Round(time.Millisecond))
				for i, n := range []*tulle{b, c} {
					n.device("blue", netip.PrefixFrom(rest[i].addr, 16))
				}
				c.device("green", green...)
				if together {
					break
				}
			}
		}
		if o, is := b.knows("blue"); !is || !o.Joined || o.VNI != 65536 {
			t.Errorf("overlay ls: blue is %+v", o)
		}
	})

	part(t, "own blocks", nodes, func(t *testing.T) {
		b.do("unexpose", "blue")
		p := b.exposed("blue")
		rest[0].addr, blue[1].addr = p.Addr(), p.Addr()
		blocks := asked[node.IPAM](b, "ipam")
		if !blocks.Stale {
			t.Error("ipam does not say that no keeper answers")
		}
		if len(blocks.Overlays) == 0 || !slices.ContainsFunc(blocks.Overlays, func(o node.OverlayIPAM) bool {
			return o.Overlay == "blue" && len(o.Blocks) == 1 && o.Blocks[0].Node == "b" && o.Blocks[0].Prefix.Contains(p.Addr())
		}) {
			t.Errorf("b has %s, and its blocks are %+v", p, blocks.Overlays)
		}
		mesh(t, 10*time.Second, rest...)
	})

	part(t, "changes", nodes, func(t *testing.T) {
		b.refusesAll(10*time.Second, []string{"no keeper answers", "start a keeper", "traffic goes on"},
			[]string{"overlay", "create", "red"}, []string{"overlay", "rm", "green"}, []string{"overlay", "set", "blue", "--mtu", "1300"},
			[]string{"node", "rm", "a"}, []string{"token", "create"}, []string{"node", "promote", "b"},
			[]string{"expose", "green"}, // where a node has no block it gets none
		)
	})

	part(t, "return", nodes, func(t *testing.T) {
		a.start()
		took := meet(t, 20*time.Second, nodes...)
		took += mesh(t, 15*time.Second, blue...)
		t.Logf("all is as before %v after the keeper's start", took.Round(time.Millisecond))
		for i, n := range nodes {
			n.device("blue", netip.PrefixFrom(blue[i].addr, 16))
		}
		var after string
		a.eventually(20*time.Second, "its books are as before", func() bool { after = a.books(); return after == before })
		if got := b.books(); got != before {
			t.Errorf("b is told %s\nand before it was\n%s", got, before)
		}
		alone(t, nodes...)
		noFindings(t, a)
		b.do("overlay", "create", "red")
		known(t, 3*time.Second, "red", true, nodes...)
	})
}
