package ipam

import (
	"testing"
	"time"

	"github.com/tulle-net/tulle/store"
)

func (n *member) addrOf(owner string) string { return n.s.endpoints[owner].Prefixes[0].Addr().String() }

func TestCheck(t *testing.T) {
	blue, red := overlay("blue", "10.32.0.0/16"), overlay("red", "10.40.0.0/16")
	c := newCluster(t, blue, red)
	a, b, gone := c.node("a"), c.node("b"), c.node("gone")
	a.assign(blue, "e")
	a.assign(blue, "f", "10.32.200.1")
	b.assign(blue, "e")
	b.assign(red, "r")
	reports := func() []Status { return []Status{a.Status(), b.Status()} }
	member := func(n string) bool { return n == "a" || n == "b" }
	check := func(want ...string) []Finding {
		t.Helper()
		found, err := c.r.Check(ctx, reports(), member)
		if err != nil {
			t.Fatal(err)
		}
		var got []string
		for _, f := range found {
			got = append(got, f.Kind+" "+f.What)
			if f.Text == "" {
				t.Errorf("%+v says nothing", f)
			}
		}
		if len(got) != len(want) {
			t.Fatalf("found %q, want %q", got, want)
		}
		for i := range got {
			if got[i] != want[i] {
				t.Fatalf("found %q, want %q", got, want)
			}
		}
		return found
	}
	repair := func(found []Finding, want int) {
		t.Helper()
		if n, err := c.r.Repair(ctx, found); err != nil || n != want {
			t.Fatalf("repaired %d, %v, want %d", n, err, want)
		}
	}
	check()

	gone.assign(blue, "e")
	repair(check("node_gone "+gone.Status().Blocks[0].Prefix.String()), 1)
	check() // removed; it is free when its grace is over

	c.update("red", func(t store.Txn) error { t.Delete(store.OverlayKey("red")); return nil })
	found := check("outside "+b.addrOf("r"), "overlay_gone ")
	repair(found, 1)
	b.must(b.tick(ctx))
	check()

	c.update("blue", func(t store.Txn) error {
		t.Put("ipam/blue/block/10.32.77.0-26", []byte(`{"schema":1,"node":"a","state":"lost","number":1,"since":"2026-01-01T00:00:00Z"}`))
		t.Put("ipam/blue/block/10.32.78.0-26", []byte(`{"schema":1,"node":"a","state":"`+a.s.State+`","number":1,"since":"2026-01-01T00:00:00Z"}`))
		t.Put("ipam/blue/block/10.32.78.64-27", []byte(`{"schema":1,"node":"b","state":"`+b.s.State+`","number":100,"since":"2026-01-01T00:00:00Z"}`))
		t.Put("ipam/blue/block/10.32.78.64-26", []byte(`{"schema":1,"node":"b","state":"`+b.s.State+`","number":100,"since":"2026-01-01T00:00:00Z"}`))
		return nil
	})
	repair(check("leaked 10.32.77.0/26", "overlap 10.32.78.64/26", "unclaimed 10.32.78.0/26", "unclaimed 10.32.78.64/26", "unclaimed 10.32.78.64/27"), 1)
	for range 101 {
		b.must(b.tick(ctx))
	}
	a.must(a.tick(ctx))
	check()
	for range 30 {
		c.pass(time.Hour)
		a.must(a.tick(ctx))
		b.must(b.tick(ctx))
		c.r.Reclaim(ctx, member)
	}
	l, err := c.r.Blocks(ctx, "blue")
	if err != nil || len(l.Blocks) != 2 {
		t.Errorf("%+v, %v", l.Blocks, err)
	}

	// Two that use one address, one of them outside of its blocks.
	s := a.Status()
	s.Node, s.State = "b", b.s.State
	found, err = c.r.Check(ctx, []Status{a.Status(), s}, member)
	kinds := map[string]int{}
	for _, f := range found {
		kinds[f.Kind]++
	}
	if err != nil || kinds[FindTwice] != 2 || kinds[FindOutside] != 2 {
		t.Errorf("%v, %v", kinds, err)
	}

	c.update("blue", func(t store.Txn) error { t.Put("ipam/blue/fixed/x", []byte("{}")); return nil })
	found, err = c.r.Check(ctx, nil, member)
	if err != nil || len(found) != 1 || found[0].Kind != FindUnreadable || found[0].Repairable {
		t.Errorf("%+v, %v", found, err)
	}
}
