package e2e

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/tulle-net/tulle/internal/lab"
	"github.com/tulle-net/tulle/node"
)

//	a (keeper) ──┐
//	b ───────────┼─[ul]── each carries the sealed overlay blue; one of them is thrown out
//	c ───────────┤
//	d ───────────┘

// nodesOf returns what the keepers know, by name.
func (n *tulle) nodesOf() map[string]node.ClusterNode {
	n.t.Helper()
	var list node.Nodes
	if err := n.try("/v1/nodes", &list); err != nil {
		n.t.Fatal(err)
	}
	m := map[string]node.ClusterNode{}
	for _, c := range list.Nodes {
		m[c.Name] = c
	}
	return m
}

// TestSecureRevoke revokes from a node that is no keeper, while one node is away.
func TestSecureRevoke(t *testing.T) {
	t.Parallel()
	_, _, nodes, _ := secureCluster(t, 4, 0)
	a, b, c, d := nodes[0], nodes[1], nodes[2], nodes[3]
	reachable(t, 10*time.Second, nodes...)
	d.kill() // it does not hear of it
	epoch := a.status().Node.GossipEpoch

	start := time.Now()
	said := make(chan string, 1)
	go func() {
		status, stdout, stderr := b.command("node", "revoke", "c")
		said <- fmt.Sprintf("status %d after %v: %s%s", status, time.Since(start).Round(time.Millisecond), stdout, stderr)
	}()
	vtep := c.status().Node.VTEP.Addr()
	for _, n := range []*tulle{a, b} {
		n.eventually(5*time.Second, "has done with c", func() bool {
			_, there := n.session("c", "blue")
			return n.sees("c") == "" && !there && !n.floods(vtep)
		})
		gone := time.Since(start)
		n.eventually(5*time.Second-gone, "has another gossip key", func() bool { return n.status().Node.GossipEpoch > epoch+1 }) // promoted
		t.Logf("%s has done with c after %v, and another gossip key after %v", n.name, gone.Round(time.Millisecond), time.Since(start).Round(time.Millisecond))
	}
	out := <-said
	t.Logf("tulle node revoke: %s", out)
	if !strings.HasPrefix(out, "status 0") || !strings.Contains(out, "told when they are back: d") {
		t.Errorf("tulle node revoke: %q, want status 0, and that d is told later", out)
	}
	noPing(t, c.host, address(1), 1500*time.Millisecond)
	noPing(t, b.host, address(3), 1500*time.Millisecond)
	ping(t, b.host, address(1), 5*time.Second)
	if n := a.nodesOf()["c"]; !n.Revoked {
		t.Errorf("node ls says of c: %+v", n)
	}
	if got := c.status().Node.GossipEpoch; got > epoch {
		t.Errorf("c got the new gossip keys: epoch %d, and it was %d", got, epoch)
	}

	// d returns, with the keys of before.
	d.start()
	took := meet(t, 15*time.Second, a, b, d)
	if s := d.sees("c"); s != "" {
		t.Errorf("d, which was away, sees c %s", s)
	}
	d.eventually(5*time.Second, "has the new keys", func() bool { return d.status().Node.GossipEpoch == a.status().Node.GossipEpoch })
	ping(t, d.host, address(1), 10*time.Second)
	noPing(t, d.host, address(3), 1500*time.Millisecond)
	t.Logf("d, which was away, is back after %v", took.Round(time.Millisecond))

	// c does not come back by itself; its name is taken until it is removed.
	c.stop()
	status, _, stderr := runTulle(t, c.host, c.args...) // with the token that it came by
	wantRefusal(t, status, stderr, "token was removed", "tulle token create")
	at := slices.Index(c.args, "--token")
	c.args = slices.Delete(slices.Clone(c.args), at, at+2)
	c.start()
	noPing(t, c.host, address(1), 2*time.Second)
	for _, n := range []*tulle{a, b, d} {
		if s := n.sees("c"); s != "" {
			t.Errorf("%s sees c %s after its restart", n.name, s)
		}
	}
	c.eventually(10*time.Second, "its log says what to do", func() bool { return strings.Contains(c.proc.Log(), "tulle node rm") })
	c.stop()
	again := append(slices.Clone(c.args), "--token", a.token())
	status, _, stderr = runTulle(t, c.host, again...)
	wantRefusal(t, status, stderr, "c is revoked", "tulle node rm c", "--name")

	b.do("node", "rm", "c")
	if n, there := a.nodesOf()["c"]; there {
		t.Errorf("node ls says of c, which was removed: %+v", n)
	}
	c.args = append(c.args[:len(c.args):len(c.args)], "--token", a.token())
	c.start()
	meet(t, 15*time.Second, nodes...)
	reachable(t, 15*time.Second, nodes...)
}

// TestSecureRotate changes the gossip keys, twice, and the overlay's key once,
// while pings pass.
func TestSecureRotate(t *testing.T) {
	t.Parallel()
	_, _, nodes, _ := secureCluster(t, 3, 0)
	reachable(t, 10*time.Second, nodes...)
	stop := watchPings(t, nodes[2].host)
	epoch := nodes[0].status().Node.GossipEpoch
	for i, from := range []*tulle{nodes[1], nodes[0]} {
		start := time.Now()
		from.do("gossip", "rotate-key")
		for _, n := range nodes {
			n.eventually(5*time.Second, "has the new epoch", func() bool { return n.status().Node.GossipEpoch >= epoch+uint64(i)+1 })
		}
		t.Logf("gossip keys changed by %s in %v", from.name, time.Since(start).Round(time.Millisecond))
		epoch = nodes[0].status().Node.GossipEpoch
	}
	nodes[1].do("overlay", "rotate-key", "blue")
	end := time.Now().Add(3 * time.Second) // a lost one would be suspected by now
	for time.Now().Before(end) {
		for _, n := range nodes {
			for _, m := range nodes {
				if n != m && n.sees(m.name) != "alive" {
					t.Fatalf("%s sees %s %q", n.name, m.name, n.sees(m.name))
				}
			}
		}
		time.Sleep(100 * time.Millisecond)
	}
	answered, longest := stop()
	t.Logf("%d pings answered meanwhile, the longest gap %v", answered, longest.Round(time.Millisecond))
	if answered == 0 || longest > 2*time.Second {
		t.Errorf("%d pings answered, the longest gap %v", answered, longest)
	}
	reachable(t, 10*time.Second, nodes...)
}

// watchPings pings host 1 over the overlay until it is stopped.
func watchPings(t *testing.T, h *lab.Host) (stop func() (answered int, longest time.Duration)) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	type result struct {
		n       int
		longest time.Duration
	}
	done := make(chan result, 1)
	go func() {
		var r result
		for last := time.Now(); ctx.Err() == nil; {
			if _, err := h.WaitPing(ctx, address(1)); err == nil {
				r.n++
				r.longest, last = max(r.longest, time.Since(last)), time.Now()
			}
			select {
			case <-time.After(20 * time.Millisecond):
			case <-ctx.Done():
			}
		}
		done <- r
	}()
	return func() (int, time.Duration) { cancel(); r := <-done; return r.n, r.longest }
}

// TestSecureNarrowToken: a node may join what its token said, and be called so.
func TestSecureNarrowToken(t *testing.T) {
	t.Parallel()
	l, _, nodes, spare := secureCluster(t, 1, 1)
	a := nodes[0]
	h := spare[0]
	token := a.token("--overlays", "blue", "--name", "web-*")
	// up names a node after its host, and the last flag wins.
	w := up(t, l, h, "--name", "web-1", "--token", token, "--overlay", secured(2),
		"--overlay", "name=red,vni=200,tap=red0,address=10.33.0.2/16")
	w.eventually(10*time.Second, "is seen", func() bool { return a.sees("web-1") == "alive" && w.sees("a") == "alive" })
	ping(t, h, address(1), 10*time.Second)
	w.eventually(10*time.Second, "says that red is not granted", func() bool {
		return slices.ContainsFunc(w.status().Node.Conflicts, func(s string) bool {
			return strings.Contains(s, "red") && strings.Contains(s, "--overlays red")
		})
	})
	if got := a.nodesOf()["web-1"].Overlays; !slices.Equal(got, []string{"blue"}) {
		t.Errorf("node ls: web-1 may join %q, want blue", got)
	}
	for _, args := range [][]string{{"node", "revoke", "a"}, {"gossip", "rotate-key"}, {"overlay", "rotate-key", "red"}, {"token", "create"}, {"token", "create", "--overlays", "red"}} {
		status, _, stderr := w.command(args...)
		wantRefusal(t, status, stderr, "web-1")
	}
	narrower := w.token("--overlays", "blue") // within what it has
	if narrower == "" {
		t.Error("no token")
	}
	w.stop()
	w.start() // the grant outlives a restart
	ping(t, h, address(1), 10*time.Second)
}
