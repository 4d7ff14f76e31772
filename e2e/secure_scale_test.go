//go:build soak

package e2e

import (
	"fmt"
	"net/netip"
	"testing"
	"time"

	"github.com/tulle-net/tulle/internal/lab"
	"github.com/tulle-net/tulle/internal/lab/labtest"
)

//	n0 (keeper) ──[u0]──┐
//	n1 ───────────[u1]──┼── r routes      50 nodes on one machine
//	…                   │
//	n49 ─────────[u49]──┘
//
// Routed, because all namespaces share the kernel's one table of neighbours,
// which has room for 1,024.

// TestSoakSecureKilled is TestSecureKilled, longer.
func TestSoakSecureKilled(t *testing.T) { killAtRandom(t, 200) }

// TestSoakFiftyNodes measures how long the last of 50 nodes takes to join, and
// until all see it.
func TestSoakFiftyNodes(t *testing.T) {
	const count = 50
	l, place, nodes := fifty(t, count)
	start := time.Now()
	eventually(t, time.Minute, "the first node sees all", func() bool { return nodes[0].status().Node.Peers == len(nodes)-1 })
	eventually(t, time.Minute, "all see all", func() bool {
		for _, n := range nodes {
			if n.status().Node.Peers != len(nodes)-1 {
				return false
			}
		}
		return true
	})
	t.Logf("%d nodes see each other %v after the last but one joined", len(nodes), time.Since(start).Round(time.Millisecond))
	h := place(count - 1)
	token := nodes[7].token()
	start = time.Now()
	last := up(t, l, h, "--token", token)
	joined := time.Since(start)
	last.eventually(time.Minute, "sees all", func() bool { return last.status().Node.Peers == count-1 })
	sees := time.Since(start)
	eventually(t, time.Minute, "all see it", func() bool {
		for _, n := range nodes {
			if n.sees(last.name) != "alive" {
				return false
			}
		}
		return true
	})
	t.Logf("node %d joined after %v, saw all others after %v, and was seen by all after %v; the keeper has %d MiB",
		count, joined.Round(time.Millisecond), sees.Round(time.Millisecond), time.Since(start).Round(time.Millisecond), resident(t, nodes[0])>>20)
	start = time.Now()
	nodes[20].do("node", "revoke", "n10")
	t.Logf("a revocation takes %v", time.Since(start).Round(time.Millisecond))
	eventually(t, 5*time.Second, "nobody sees n10", func() bool {
		for i, n := range nodes {
			if i != 10 && n.sees("n10") != "" {
				return false
			}
		}
		return true
	})
	t.Logf("and is effective everywhere after %v", time.Since(start).Round(time.Millisecond))
}

// fifty starts count-1 nodes, one after the other; place makes the host of one more.
func fifty(t *testing.T, count int) (l *lab.Lab, place func(i int) *lab.Host, nodes []*tulle) {
	t.Helper()
	l = labtest.New(t)
	r, err := l.AddHost("r")
	if err != nil {
		t.Fatal(err)
	}
	if err := r.Sysctl("net/ipv4/ip_forward", "1"); err != nil {
		t.Fatal(err)
	}
	place = func(i int) *lab.Host {
		t.Helper()
		h, err := l.AddHost(fmt.Sprintf("n%d", i))
		if err != nil {
			t.Fatal(err)
		}
		p := netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 77, byte(i), 0}), 30)
		if _, err := l.AddSwitch(fmt.Sprintf("u%d", i), lab.Underlay{Prefix4: p, Cable: true}, h, r); err != nil {
			t.Fatal(err)
		}
		if err := h.AddRoute(netip.MustParsePrefix("0.0.0.0/0"), netip.AddrFrom4([4]byte{10, 77, byte(i), 2})); err != nil {
			t.Fatal(err)
		}
		return h
	}
	nodes = []*tulle{up(t, l, place(0))}
	token := nodes[0].token("--uses", fmt.Sprint(count))
	start := time.Now()
	for i := 1; i < count-1; i++ {
		nodes = append(nodes, up(t, l, place(i), "--token", token))
	}
	t.Logf("%d nodes joined one after the other in %v", count-2, time.Since(start).Round(time.Millisecond))
	return l, place, nodes
}
