package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/tulle-net/tulle/crypto"
	"github.com/tulle-net/tulle/internal/lab"
	"github.com/tulle-net/tulle/node"
)

//	a (keeper) ──┐
//	b (keeper) ──┼─[ul]── pings all the time: a → b, b → c, c → a
//	c ───────────┤
//	d ───────────┘ joins afterwards
//
// The cluster's CA is replaced while traffic flows.

// countPings pings dst from h, 20 times a second, until stop.
func countPings(t *testing.T, h *lab.Host, dst netip.Addr) (stop func() (sent, lost int)) {
	t.Helper()
	p, err := h.NewPinger(dst, lab.PingOptions{})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	type result struct{ sent, lost int }
	done := make(chan result, 1)
	go func() {
		defer p.Close()
		var r result
		for ctx.Err() == nil {
			one, end := context.WithTimeout(ctx, 500*time.Millisecond)
			if _, err := p.Ping(one); ctx.Err() == nil {
				r.sent++
				if err != nil {
					r.lost++
					t.Logf("%s: lost a ping to %s at %s: %v", h.Name(), dst, time.Now().Format("15:04:05.000"), err)
				}
			}
			end()
			select {
			case <-time.After(50 * time.Millisecond):
			case <-ctx.Done():
			}
		}
		done <- r
	}()
	return func() (int, int) { cancel(); r := <-done; return r.sent, r.lost }
}

// askAlways has a node ask the keepers again and again, until stop; each request
// must be answered.
func askAlways(t *testing.T, n *tulle) (stop func() (asked int, longest time.Duration)) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	type result struct {
		n       int
		longest time.Duration
	}
	done := make(chan result, 1)
	go func() {
		var r result
		for ; ctx.Err() == nil; r.n++ {
			start := time.Now()
			if err := n.try("/v1/nodes", &node.Nodes{}); err != nil && ctx.Err() == nil {
				t.Errorf("a request to the keepers: %v", err)
			}
			r.longest = max(r.longest, time.Since(start))
			time.Sleep(20 * time.Millisecond)
		}
		done <- r
	}()
	return func() (int, time.Duration) { cancel(); r := <-done; return r.n, r.longest }
}

// ca is what a node says of the cluster's CA.
func (n *tulle) ca() (c node.CA) {
	n.t.Helper()
	if err := n.try("/v1/ca", &c); err != nil {
		n.t.Fatal(err)
	}
	return c
}

// issuer is the CA of the certificate in a node's state folder, and which CAs it
// believes by that.
func (n *tulle) issuer() (issuer crypto.KeyID, roots []string) {
	n.t.Helper()
	n.eventually(5*time.Second, "its state can be read", func() bool {
		dir, err := crypto.OpenDir(n.stateDir())
		if err != nil {
			return false
		}
		s, err := dir.Load()
		if err != nil {
			return false // it is written at this moment
		}
		id, err := s.Identity(time.Now())
		if err != nil {
			n.t.Fatal(err)
		}
		issuer, roots = id.Certificate().Issuer, nil
		for _, f := range id.Roots().Fingerprints() {
			roots = append(roots, f.String())
		}
		return true
	})
	return issuer, roots
}

// TestSecureRotateCA replaces the CA of a running cluster with two keepers.
func TestSecureRotateCA(t *testing.T) {
	t.Parallel()
	l, _, nodes, spare := secureCluster(t, 3, 2)
	a, b, c := nodes[0], nodes[1], nodes[2]
	reachable(t, 10*time.Second, nodes...)
	old := a.token("--uses", "5")
	a.do("node", "promote", "b")
	b.eventually(10*time.Second, "is a keeper", func() bool { return b.status().Node.Keeper })
	before := a.ca()
	if before.Stage != "settled" || len(before.Roots) != 1 {
		t.Fatalf("before: %+v", before)
	}
	oldIssuer, _ := c.issuer()

	var stops []func() (int, int)
	for i, n := range nodes {
		stops = append(stops, countPings(t, n.host, address((i+1)%3+1)))
	}
	asked := askAlways(t, c)
	time.Sleep(500 * time.Millisecond)
	start := time.Now()
	status, stdout, stderr := c.command("ca", "rotate")
	t.Logf("tulle ca rotate: status %d after %v: %s%s", status, time.Since(start).Round(time.Millisecond), stdout, stderr)
	if status != 0 || !strings.HasPrefix(stdout, "the CA is ") {
		t.Fatalf("tulle ca rotate: status %d, %s%s\na:\n%s\nb:\n%s", status, stdout, stderr, a.proc.Log(), b.proc.Log())
	}
	time.Sleep(time.Second)
	n, longest := asked()
	t.Logf("%d requests to the keepers meanwhile, the longest took %v", n, longest.Round(time.Millisecond))
	for i, stop := range stops {
		sent, lost := stop()
		t.Logf("%s: %d pings, %d lost", nodes[i].name, sent, lost)
		if sent < 20 || lost > 2 {
			t.Errorf("%s: %d of %d pings are lost", nodes[i].name, lost, sent)
		}
	}

	after := a.ca()
	if after.Stage != "settled" || len(after.Roots) != 1 || after.Roots[0].Fingerprint == before.Roots[0].Fingerprint || len(after.Left) != 0 {
		t.Errorf("afterwards: %+v, before: %+v", after, before)
	}
	believes(t, nodes, oldIssuer, after.Roots[0].Fingerprint)
	for _, n := range nodes {
		if s := n.proc.Log(); strings.Contains(s, "do not believe") {
			t.Errorf("%s was not believed for a while:\n%s", n.name, s)
		}
	}
	for _, n := range []*tulle{a, b} {
		pem, err := os.ReadFile(filepath.Join(n.stateDir(), "store", "tls", "ca.pem"))
		if err != nil || strings.Count(string(pem), "BEGIN") != 1 {
			t.Errorf("%s: its member of the store believes %d CAs (%v)", n.name, strings.Count(string(pem), "BEGIN"), err)
		}
		next, err := filepath.Glob(filepath.Join(n.stateDir(), "ca.next*"))
		if err != nil || len(next) != 0 {
			t.Errorf("%s still has %v", n.name, next)
		}
	}
	quorum(t, a, b)

	// The old token is none any more, and a new one is.
	status, _, stderr = runTulle(t, spare[0], "up", "--name", "x", "--state-dir", filepath.Join(l.Dir(), "state-x"), "--socket", filepath.Join(l.Dir(), "x.sock"), "--token", old)
	wantRefusal(t, status, stderr, "token")
	d := up(t, l, spare[0], "--token", b.token(), "--overlay", secured(4))
	all := append(slices.Clone(nodes), d)
	meet(t, 10*time.Second, all...)
	reachable(t, 10*time.Second, all...)

	// Each starts again, with the token that it joined with; then all at once.
	for _, n := range all {
		n.stop()
		n.start()
		took := meet(t, 20*time.Second, all...)
		reachable(t, 10*time.Second, all...)
		t.Logf("%s is back after %v", n.name, took.Round(time.Millisecond))
	}
	for _, n := range all {
		n.kill()
	}
	for _, n := range all {
		n.start()
	}
	meet(t, 30*time.Second, all...)
	reachable(t, 10*time.Second, all...)
	quorum(t, a, b)
	believes(t, all, oldIssuer, after.Roots[0].Fingerprint)
}

// believes checks that all nodes believe the one CA and have a certificate of it.
func believes(t *testing.T, nodes []*tulle, not crypto.KeyID, want string) {
	t.Helper()
	for _, n := range nodes {
		n.eventually(5*time.Second, "has a certificate of the new CA and believes no other", func() bool {
			issuer, roots := n.issuer()
			return issuer != not && issuer.String() == want[:8] && slices.Equal(roots, []string{want})
		})
	}
}

// quorum waits until all members of the store are there.
func quorum(t *testing.T, keepers ...*tulle) {
	t.Helper()
	for _, n := range keepers {
		n.eventually(20*time.Second, "its store is whole", func() bool {
			var s node.StoreStatus
			_, stdout, _ := n.command("store", "status", "-o", "json")
			if json.Unmarshal([]byte(stdout), &s) != nil || !s.Quorum || len(s.Members) != len(keepers) {
				return false
			}
			return !slices.ContainsFunc(s.Members, func(m node.StoreMember) bool { return !m.Healthy })
		})
	}
}

// TestSecureRotateCAAway: a node that is away keeps the old CA alive, and is back
// by itself; one that is left behind joins again as the same node.
func TestSecureRotateCAAway(t *testing.T) {
	t.Parallel()
	_, _, nodes, _ := secureCluster(t, 3, 0)
	a, b, c := nodes[0], nodes[1], nodes[2]
	reachable(t, 10*time.Second, nodes...)
	for round, finish := range []bool{false, true} {
		c.stop()
		a.eventually(20*time.Second, "sees that c is gone", func() bool { return a.sees("c") != "alive" })
		status, stdout, stderr := b.command("ca", "rotate")
		t.Logf("tulle ca rotate: %s%s", stdout, stderr)
		if status != 0 || !strings.Contains(stdout, "stage signing") || !strings.Contains(stderr, "c (away)") {
			t.Fatalf("tulle ca rotate: status %d, %s%s", status, stdout, stderr)
		}
		if ca := b.ca(); len(ca.Roots) != 2 || len(ca.Waiting) != 1 || ca.Waiting[0].Name != "c" || ca.Waiting[0].Alive {
			t.Errorf("tulle ca status: %+v", ca)
		}
		if finish {
			if out := b.do("ca", "rotate", "--finish"); !strings.HasPrefix(out, "the CA is ") {
				t.Errorf("tulle ca rotate --finish: %s", out)
			}
			c.args = append(c.args, "--token", a.token())
		}
		c.start()
		meet(t, 20*time.Second, nodes...)
		reachable(t, 10*time.Second, nodes...)
		b.eventually(20*time.Second, "the change is over", func() bool { return b.ca().Stage == "settled" })
		if left := b.ca().Left; (len(left) == 1) != finish {
			t.Errorf("round %d: left behind: %v", round, left)
		}
		if got := a.nodesOf()["c"]; got.Status != "alive" {
			t.Errorf("round %d: c is %s", round, fmt.Sprint(got))
		}
	}
}

// TestSecureRotateCAKilled kills the only keeper, at moments that are spread over
// the change; the change is completed each time, and nobody else notices.
func TestSecureRotateCAKilled(t *testing.T) {
	t.Parallel()
	_, _, nodes, _ := secureCluster(t, 3, 0)
	a, b, c := nodes[0], nodes[1], nodes[2]
	reachable(t, 10*time.Second, nodes...)
	stop := countPings(t, b.host, address(3))
	for _, after := range []time.Duration{50, 200, 500, 1000, 1600} {
		before := c.ca().Roots[0].Fingerprint
		said := make(chan string, 1)
		go func() {
			_, stdout, stderr := c.command("ca", "rotate")
			said <- stdout + stderr
		}()
		time.Sleep(after * time.Millisecond)
		a.kill()
		a.start()
		meet(t, 20*time.Second, nodes...)
		out := <-said
		if c.ca().Stage == "settled" && c.ca().Roots[0].Fingerprint == before {
			t.Logf("killed after %d ms: nothing was begun: %s", after, out)
			continue
		}
		c.eventually(30*time.Second, "the change is over", func() bool {
			var ca node.CA
			return c.try("/v1/ca", &ca) == nil && ca.Stage == "settled" && len(ca.Roots) == 1 && ca.Roots[0].Fingerprint != before
		})
		t.Logf("killed after %d ms: completed", after)
		reachable(t, 10*time.Second, nodes...)
	}
	sent, lost := stop()
	t.Logf("b → c: %d pings, %d lost", sent, lost)
	if lost > 2 {
		t.Errorf("b → c: %d of %d pings are lost", lost, sent)
	}
}
