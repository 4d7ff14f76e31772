package e2e

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/tulle-net/tulle/crypto"
	"github.com/tulle-net/tulle/internal/lab"
	"github.com/tulle-net/tulle/node"
)

//	a (first node, keeper) ──────┐
//	b (promoted) ────────────────┤
//	c (promoted) ────────────────┼─[ul]
//	d ───────────────────────────┤
//	e, f (machines without node) ┘
//
// Three keepers: any one may die, two are too many.

// keepers are the names of the keepers, as n is told.
func (n *tulle) keepers() string {
	n.t.Helper()
	var names []string
	for name, c := range n.nodesOf() {
		if c.Keeper {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return strings.Join(names, " ")
}

// store is the state of the store, as a keeper sees it.
func (n *tulle) store() node.StoreStatus {
	n.t.Helper()
	return asked[node.StoreStatus](n, "store", "status")
}

// members are the names and roles of the store's members.
func members(s node.StoreStatus) string {
	var list []string
	for _, m := range s.Members {
		list = append(list, m.Name)
	}
	slices.Sort(list)
	return strings.Join(list, " ")
}

// whole waits until n sees a store of these members, all of them healthy.
func (n *tulle) whole(within time.Duration, names string) time.Duration {
	n.t.Helper()
	var last string
	start := time.Now()
	for {
		var s node.StoreStatus
		err := n.try("/v1/store", &s)
		if err == nil && s.Quorum && members(s) == names && !slices.ContainsFunc(s.Members, func(m node.StoreMember) bool { return !m.Healthy || m.Role == "learner" }) {
			return time.Since(start)
		}
		last = fmt.Sprintf("%+v %v", s, err)
		if time.Since(start) > within {
			n.t.Fatalf("%s: not within %v: the store's members are %s, all there; it says %s", n.name, within, names, last)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// secrets are what a node's state has of a keeper's.
func (n *tulle) secrets() (files []string) {
	n.t.Helper()
	dir, err := crypto.OpenDir(n.stateDir())
	if err != nil {
		n.t.Fatal(err)
	}
	s, err := dir.Load()
	if err != nil {
		n.t.Fatal(err)
	}
	for _, f := range []string{crypto.FileCAKey, crypto.FileRootSecret} {
		if s.Files[f] != nil {
			files = append(files, f)
		}
	}
	// And as files of any name.
	for _, name := range []string{"ca.key", "root.secret"} {
		found, err := filepath.Glob(filepath.Join(n.stateDir(), "*", name))
		if err != nil {
			n.t.Fatal(err)
		}
		if _, err := os.Stat(filepath.Join(n.stateDir(), name)); err == nil {
			found = append(found, name)
		}
		files = append(files, found...)
	}
	return files
}

// creates makes an overlay on n, trying for a while; it returns how long it took.
func (n *tulle) creates(within time.Duration, overlay string) time.Duration {
	n.t.Helper()
	start, said := time.Now(), ""
	for {
		status, _, stderr := n.command("overlay", "create", overlay)
		if status == 0 {
			return time.Since(start)
		}
		said = stderr
		if time.Since(start) > within {
			n.t.Fatalf("%s: no overlay can be made within %v: %s", n.name, within, said)
		}
		time.Sleep(50 * time.Millisecond)
	}
}

func TestSharedThreeKeepers(t *testing.T) {
	t.Parallel()
	l, _, h := hosts(t, 6, lab.Underlay{Prefix4: underlay4, Offloads: lab.Wire})
	nodes := joined(t, l, h[:4], nil)
	a, b, c, d := nodes[0], nodes[1], nodes[2], nodes[3]
	a.do("overlay", "create", "blue")
	var blue []place
	for _, n := range nodes {
		blue = append(blue, place{n, n.exposed("blue").Addr()})
	}
	mesh(t, 10*time.Second, blue...)
	untoken(nodes...)

	part(t, "promote", nodes, func(t *testing.T) {
		a.refuses([]string{"only keeper", "cannot be taken out"}, "node", "demote", "a")
		d.refuses([]string{"no node", "nobody"}, "node", "promote", "nobody")
		for _, n := range []*tulle{b, c} {
			start := time.Now()
			d.do("node", "promote", n.name)
			t.Logf("%s is a keeper after %v", n.name, time.Since(start).Round(time.Millisecond))
			n.eventually(5*time.Second, "says that it is a keeper", func() bool { return n.status().Node.Keeper })
			if len(n.secrets()) == 0 {
				t.Errorf("%s has no CA key and root secret", n.name)
			}
			private(t, n.stateDir())
		}
		for _, n := range []*tulle{a, b, c} {
			n.whole(10*time.Second, "a b c")
		}
		if got := d.keepers(); got != "a b c" {
			t.Errorf("the keepers are %q, want a b c", got)
		}
		d.refuses([]string{"no keeper"}, "store", "status")
	})

	part(t, "one use", nodes, func(t *testing.T) {
		token := d.token()
		parsed, err := crypto.ParseToken(token)
		if err != nil {
			t.Fatal(err)
		}
		if len(parsed.Keepers) != 3 {
			t.Errorf("the token has the addresses %v, want all three keepers'", parsed.Keepers)
		}
		// At once, and each asks another keeper first.
		var procs []*lab.Process
		for i, host := range h[4:] {
			p, err := host.Start(exec.Command(binary, "up", "--name", host.Name(), "--state-dir", filepath.Join(l.Dir(), "state-"+host.Name()),
				"--socket", filepath.Join(l.Dir(), host.Name()+".sock"), "--token", token, "--join", fmt.Sprintf("192.168.77.%d", 2+i)))
			if err != nil {
				t.Fatal(err)
			}
			procs = append(procs, p)
		}
		ended := func(p *lab.Process) bool {
			select {
			case <-p.Done():
				return true
			default:
				return false
			}
		}
		eventually(t, 20*time.Second, "one of the two is refused", func() bool { return ended(procs[0]) || ended(procs[1]) })
		in, out := 0, 1
		if ended(procs[0]) {
			in, out = 1, 0
		}
		if log := procs[out].Log(); !strings.Contains(log, "token") || !strings.Contains(log, "used") {
			t.Errorf("the one that is refused says %q, want that the token is used up", log)
		}
		d.eventually(10*time.Second, "sees the other", func() bool { return d.sees(h[4+in].Name()) == "alive" })
		if ended(procs[in]) {
			t.Errorf("both were refused: %s", procs[in].Log())
		}
		known := d.nodesOf()
		if _, there := known[h[4+out].Name()]; there || len(known) != 5 {
			t.Errorf("the nodes are %v, want a b c d %s", known, h[4+in].Name())
		}
		if err := procs[in].Stop(15 * time.Second); err != nil {
			t.Error(err)
		}
		d.do("node", "rm", h[4+in].Name())
	})

	part(t, "one dies", nodes, func(t *testing.T) {
		for i, n := range []*tulle{a, b, c} {
			leader := ""
			for _, m := range a.store().Members {
				if m.Role == "leader" {
					leader = m.Name
				}
			}
			n.kill()
			took := d.creates(15*time.Second, fmt.Sprintf("without-%s", n.name))
			t.Logf("kill -9 of %s (%s leads): an overlay is made after %v", n.name, leader, took.Round(time.Millisecond))
			if took > 10*time.Second { // 4 until the one that asks gives up the dead one
				t.Errorf("it took %v, want 10s or less", took)
			}
			var rest []place
			for j, p := range blue {
				if j != i {
					rest = append(rest, p)
				}
			}
			mesh(t, 5*time.Second, rest...)
			d.token()
			n.start()
			n.whole(20*time.Second, "a b c")
			known(t, 5*time.Second, "without-"+n.name, true, nodes...)
		}
		mesh(t, 10*time.Second, blue...)
		if got, want := b.books(), a.books(); got != want {
			t.Errorf("b says %s\na %s", got, want)
		}
	})

	part(t, "demote", nodes, func(t *testing.T) {
		start := time.Now()
		a.do("node", "demote", "c")
		t.Logf("c is no keeper after %v", time.Since(start).Round(time.Millisecond))
		a.whole(5*time.Second, "a b")
		c.eventually(10*time.Second, "says that it is no keeper", func() bool { return !c.status().Node.Keeper })
		c.eventually(10*time.Second, "has no CA key and root secret", func() bool { return len(c.secrets()) == 0 })
		if _, err := os.Stat(filepath.Join(c.stateDir(), "store")); !os.IsNotExist(err) {
			t.Errorf("c has the store's data still (%v)", err)
		}
		c.do("overlay", "create", "by-c") // asks another
		c.kill()
		c.start()
		if c.status().Node.Keeper {
			t.Error("c is a keeper after a restart")
		}
		meet(t, 15*time.Second, nodes...)
		a.refuses([]string{"c is no keeper"}, "node", "demote", "c")
		a.do("node", "promote", "c")
		a.whole(10*time.Second, "a b c")
	})

	part(t, "replace", nodes, func(t *testing.T) {
		b.kill() // for good
		start := time.Now()
		a.do("node", "promote", "d", "--replace", "b")
		t.Logf("d is a keeper in b's place after %v", time.Since(start).Round(time.Millisecond))
		for _, n := range []*tulle{a, c, d} {
			n.whole(15*time.Second, "a c d")
		}
		if got := d.keepers(); got != "a c d" {
			t.Errorf("the keepers are %q, want a c d", got)
		}
	})

	part(t, "recover", nodes, func(t *testing.T) {
		before := d.books()
		a.kill()
		c.kill() // for good, both
		d.eventually(15*time.Second, "says that there is no majority", func() bool {
			s := d.store()
			return !s.Quorum && strings.Contains(s.Error, "majority") && strings.Contains(s.Error, "tulle store recover")
		})
		status, _, stderr := d.command("store", "recover")
		if status != 2 || !strings.Contains(stderr, "--yes") {
			t.Errorf("store recover without --yes: status %d, %q", status, stderr)
		}
		start := time.Now()
		d.do("store", "recover", "--yes")
		t.Logf("the store goes on alone after %v", time.Since(start).Round(time.Millisecond))
		d.whole(5*time.Second, "d")
		if got := d.books(); got != before {
			t.Errorf("after the recovery %s\nand before it was\n%s", got, before)
		}
		d.creates(5*time.Second, "alone")
		d.refuses([]string{"its majority", "nothing to recover"}, "store", "recover", "--yes")
		d.refuses([]string{"only keeper", "cannot be taken out"}, "node", "demote", "d")
		for _, name := range []string{"a", "b", "c"} {
			d.do("node", "rm", name)
		}
		e, f := up(t, l, h[4], "--token", d.token(), "--state-dir", filepath.Join(l.Dir(), "new-e")), up(t, l, h[5], "--token", d.token(), "--state-dir", filepath.Join(l.Dir(), "new-f"))
		for _, n := range []*tulle{e, f} {
			d.do("node", "promote", n.name)
		}
		for _, n := range []*tulle{d, e, f} {
			n.whole(15*time.Second, "d e f")
		}
		d.kill()
		e.creates(15*time.Second, "again")
		mesh(t, 10*time.Second, place{e, e.exposed("blue").Addr()}, place{f, f.exposed("blue").Addr()})
	})
}
