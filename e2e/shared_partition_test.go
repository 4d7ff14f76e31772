package e2e

import (
	"fmt"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/tulle-net/tulle/internal/lab"
)

//	a (keeper) ──┐            ┌── c (keeper)
//	             ├─[u ✂ l]─┼── d (keeper)
//	b ───────────┘            └── e
//
// The network falls apart for 17 s: two of three keepers are on the larger side.

// split drops all that passes between two sets of hosts; mend ends it.
func split(t *testing.T, sw *lab.Switch, one, two []*lab.Host) (mend func()) {
	t.Helper()
	var others []string
	for _, h := range two {
		others = append(others, sw.Addr(h).String())
	}
	set := "{ " + strings.Join(others, ", ") + " }"
	for _, h := range one {
		runIn(t, h, "nft", fmt.Sprintf("add table inet split; "+
			"add chain inet split in { type filter hook input priority 0; }; add rule inet split in ip saddr %s drop; "+
			"add chain inet split out { type filter hook output priority 0; }; add rule inet split out ip daddr %s drop", set, set))
	}
	return func() {
		t.Helper()
		for _, h := range one {
			runIn(t, h, "nft", "delete table inet split")
		}
	}
}

func TestSharedPartition(t *testing.T) {
	t.Parallel()
	l, sw, h := hosts(t, 5, lab.Underlay{Prefix4: underlay4, Offloads: lab.Wire})
	nodes := joined(t, l, h, nil)
	a, b, c, d, e := nodes[0], nodes[1], nodes[2], nodes[3], nodes[4]
	for _, n := range []*tulle{c, d} {
		a.do("node", "promote", n.name)
	}
	for _, n := range []*tulle{a, c, d} {
		n.whole(10*time.Second, "a c d")
	}
	e.do("overlay", "create", "blue")
	var blue []place
	for _, n := range nodes {
		blue = append(blue, place{n, n.exposed("blue").Addr()})
	}
	mesh(t, 10*time.Second, blue...)
	smaller, larger := blue[:2], blue[2:]

	const lasts = 17 * time.Second
	mend := split(t, sw, h[:2], h[2:])
	cut := time.Now()
	t.Logf("the overlay is made on the larger side %v after the cut", e.creates(15*time.Second, "large").Round(time.Millisecond))
	noPing(t, a.host, blue[2].addr, 500*time.Millisecond)
	mesh(t, 5*time.Second, larger...)
	mesh(t, 5*time.Second, smaller...)
	// What needs the keepers is refused on the smaller side: on the keeper that is
	// there, and on the other node.
	var refused sync.WaitGroup
	refused.Go(func() {
		a.refusesAll(30*time.Second, []string{"traffic goes on"},
			[]string{"overlay", "create", "small"}, []string{"token", "create"}, []string{"overlay", "rm", "blue", "--force"}, []string{"node", "rm", "e"})
	})
	refused.Go(func() {
		b.refusesAll(30*time.Second, []string{"store does not answer", "traffic goes on"}, []string{"overlay", "create", "small"}, []string{"token", "create"}, []string{"node", "demote", "c"})
	})
	// On the larger side all of it works.
	d.token()
	large := []place{{c, c.exposed("large").Addr()}, {d, d.exposed("large").Addr()}}
	fixed := netip.PrefixFrom(large[0].addr, 26).Masked().Addr().Next().Next().Next()
	large = append(large, place{e, e.exposed("large", "--ip", fixed.String()).Addr()})
	mesh(t, 10*time.Second, large...)
	// An address of a node on the other side is not to be had: it may be in use there.
	e.do("unexpose", "blue")
	taken := blue[0].addr.String()
	var held sync.WaitGroup // also when the network is whole again
	held.Go(func() { e.refusesAll(30*time.Second, []string{taken}, []string{"expose", "blue", "--ip", taken}) })
	if s := a.store(); s.Quorum || !strings.Contains(s.Error, "majority") {
		t.Errorf("a's store status: %+v, want that there is no majority", s)
	}
	// Within its own blocks a node of the smaller side may do what it likes.
	b.do("unexpose", "blue")
	blue[1].addr = b.exposed("blue").Addr()
	mesh(t, 10*time.Second, smaller...)
	refused.Wait()
	time.Sleep(time.Until(cut.Add(lasts))) // how long it lasts is the matter here
	mesh(t, 5*time.Second, smaller...)
	mesh(t, 5*time.Second, larger[:2]...)
	t.Logf("%v after the cut it is mended", time.Since(cut).Round(time.Millisecond))

	mend()
	healed := time.Now()
	meet(t, 30*time.Second, nodes...)
	t.Logf("all see each other %v after the mend", time.Since(healed).Round(time.Millisecond))
	held.Wait()
	blue[4].addr = e.exposed("blue").Addr()
	mesh(t, 15*time.Second, blue...)
	t.Logf("and traffic passes everywhere after %v", time.Since(healed).Round(time.Millisecond))
	// The connections between the keepers' members are those of before the cut, and
	// TCP tries them again at intervals that have grown as long as it lasted.
	for _, n := range []*tulle{a, c, d} {
		n.whole(90*time.Second, "a c d")
	}
	known(t, 10*time.Second, "large", true, nodes...)
	known(t, time.Second, "small", false, nodes...)
	t.Logf("and the keepers agree after %v", time.Since(healed).Round(time.Millisecond))
	want := c.books()
	for _, n := range nodes {
		if got := n.books(); got != want {
			t.Errorf("%s says %s\nand c %s", n.name, got, want)
		}
	}
	alone(t, nodes...)
	noFindings(t, c)
	large = append(large, place{a, a.exposed("large").Addr()})
	mesh(t, 10*time.Second, large...)
	alone(t, nodes...)
}
