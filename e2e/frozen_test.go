package e2e

import (
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/tulle-net/tulle/ether"
	"github.com/tulle-net/tulle/ether/ethertest"
	"github.com/tulle-net/tulle/internal/lab"
	"github.com/tulle-net/tulle/node"
)

//	a ──[ul]── b     one MAC, behind both in turn

// TestFrozenMAC: two stations with one MAC do not take it from each other for ever: it
// stays with one, and the node says so until somebody lets it move again.
func TestFrozenMAC(t *testing.T) {
	t.Parallel()
	_, sw, a, b := pair(t, lab.Underlay{})
	ping(t, a.host, address(2), 5*time.Second)
	const twin ether.MAC = 0x02aa_0000_0077
	injects := []*fastInject{injectTAP(t, a.host, "blue0"), injectTAP(t, b.host, "blue0")}
	speaks := func(i int) {
		injects[i].send(ethertest.Ethernet(ether.Broadcast, twin, nil, 0x88b5, make([]byte, 46)), ether.Meta{})
	}
	row := func(n *tulle) node.FDBEntry {
		list := n.fdb("blue").Entries
		if i := slices.IndexFunc(list, func(e node.FDBEntry) bool { return e.MAC == twin }); i >= 0 {
			return list[i]
		}
		return node.FDBEntry{}
	}
	// b learns it from a, and then it moves to b, back, to b, back, which are four times.
	for i := range 5 {
		speaks(i % 2)
		at := sw.Addr([]*lab.Host{a.host, b.host}[i%2]).String()
		b.eventually(5*time.Second, "learns it", func() bool {
			e := row(b)
			return i%2 == 1 && e.Port == "blue0" || i%2 == 0 && strings.HasPrefix(e.VTEP, at+":")
		})
	}
	if e := row(b); e.Frozen {
		t.Fatalf("frozen after four moves: %+v", e)
	}
	speaks(1)
	b.eventually(5*time.Second, "freezes it", func() bool { return row(b).Frozen })
	speaks(1)
	b.eventually(5*time.Second, "drops what it sends", func() bool { return b.status().Drops["frozen"] == 2 })
	if e := row(b); e.Peer != "a" || e.Static || e.Table {
		t.Errorf("FDB: %+v, want it at a", e)
	}
	if c := b.status().Node.Conflicts; len(c) != 1 || !strings.Contains(c[0], twin.String()) {
		t.Errorf("conflicts: %q, want the MAC", c)
	}
	if out := b.tulle("fdb", "blue"); !strings.Contains(out, ", frozen") {
		t.Errorf("tulle fdb does not show it:\n%s", out)
	}
	b.eventually(5*time.Second, "logs it", func() bool { return strings.Contains(b.proc.Log(), "two places") })
	ping(t, a.host, address(2), 5*time.Second)

	if out := b.tulle("fdb", "unfreeze", "blue", twin.String()); out != twin.String()+" may move again\n" {
		t.Errorf("unfreeze: %q", out)
	}
	if c := b.status().Node.Conflicts; len(c) != 0 {
		t.Errorf("conflicts: %q after it, want none", c)
	}
	speaks(1)
	b.eventually(5*time.Second, "learns it again", func() bool { return row(b).Port == "blue0" })
	if out := b.tulle("fdb", "unfreeze", "blue"); out != "no MAC is frozen in overlay blue\n" {
		t.Errorf("unfreeze of all: %q", out)
	}
}
