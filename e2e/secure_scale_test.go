//go:build soak

package e2e

import (
	"fmt"
	"testing"
	"time"

	"github.com/tulle-net/tulle/internal/lab"
)

//	n0 (keeper) ─┬─[ul]─ n1 … n49      50 nodes on one machine

// TestSoakSecureKilled is TestSecureKilled, longer.
func TestSoakSecureKilled(t *testing.T) { killAtRandom(t, 200) }

// TestSoakFiftyNodes measures how long the last of 50 nodes takes to join, and
// until all see it.
func TestSoakFiftyNodes(t *testing.T) {
	const count = 50
	l, _, nodes := fifty(t, count)
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
	h, err := l.AddHost("last")
	if err != nil {
		t.Fatal(err)
	}
	if err := nodes[0].sw.Attach(h); err != nil {
		t.Fatal(err)
	}
	token := nodes[7].token()
	start = time.Now()
	last := up(t, l, h, "--token", token)
	joined := time.Since(start)
	last.eventually(time.Minute, "sees all", func() bool { return last.status().Node.Peers == count-1 })
	sees := time.Since(start)
	eventually(t, time.Minute, "all see it", func() bool {
		for _, n := range nodes {
			if n.sees("last") != "alive" {
				return false
			}
		}
		return true
	})
	t.Logf("node %d joined after %v, saw all others after %v, and was seen by all after %v; the keeper has %d MiB",
		count, joined.Round(time.Millisecond), sees.Round(time.Millisecond), time.Since(start).Round(time.Millisecond), resident(t, nodes[0].tulle)>>20)
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

// placed is a node and the switch that it is at.
type placed struct {
	*tulle
	sw *lab.Switch
}

// fifty starts count-1 nodes, one after the other.
func fifty(t *testing.T, count int) (*lab.Lab, *lab.Switch, []placed) {
	t.Helper()
	l, sw, h := hosts(t, 1, lab.Underlay{Prefix4: underlay4})
	nodes := []placed{{up(t, l, h[0]), sw}}
	token := nodes[0].token("--uses", fmt.Sprint(count))
	start := time.Now()
	for i := 1; i < count-1; i++ {
		host, err := l.AddHost(fmt.Sprintf("n%d", i))
		if err != nil {
			t.Fatal(err)
		}
		if err := sw.Attach(host); err != nil {
			t.Fatal(err)
		}
		nodes = append(nodes, placed{up(t, l, host, "--token", token), sw})
	}
	t.Logf("%d nodes joined one after the other in %v", count-2, time.Since(start).Round(time.Millisecond))
	return l, sw, nodes
}
