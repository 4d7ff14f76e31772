package ipam

import (
	"errors"
	"slices"
	"strconv"
	"testing"
	"time"

	"github.com/tulle-net/tulle/store"
)

func TestFull(t *testing.T) {
	tiny := overlay("tiny", "10.32.0.0/28")
	c := newCluster(t, tiny)
	names := []string{"a", "b", "c", "d", "e"}
	given, full := 0, 0
	for _, name := range names {
		n := c.node(name)
		for i := range 16 {
			if _, err := n.try(tiny, strconv.Itoa(i)); err == nil {
				given++
			} else if errors.Is(err, ErrFull) {
				full++
			} else {
				t.Fatal(err)
			}
		}
	}
	if given != 13 { // 16 less network, gateway, broadcast
		t.Errorf("%d addresses of a /28 were given, want 13; %d times full", given, full)
	}
}

func TestForget(t *testing.T) {
	blue := overlay("blue", "10.32.0.0/16")
	c := newCluster(t, blue)
	a, b := c.node("a"), c.node("b")
	a.assign(blue, "e")
	b.assign(blue, "e")
	if err := c.r.Forget(ctx, "a", false); err != nil {
		t.Fatal(err)
	}
	alive := func(string) bool { return true }
	c.r.Reclaim(ctx, alive)
	if l, _ := c.r.Blocks(ctx, "blue"); len(l.Blocks) != 2 {
		t.Fatal("blocks are free while the node may use them")
	}
	if err := a.tick(ctx); err == nil || len(a.Owners()) > 0 || !slices.Equal(a.lost, []string{"e"}) {
		t.Fatalf("a removed node renewed: %v, %q", err, a.lost)
	}
	c.pass(26 * time.Hour)
	b.tick(ctx)
	if err := c.r.Reclaim(ctx, alive); err != nil {
		t.Fatal(err)
	}
	if l, _ := c.r.Blocks(ctx, "blue"); len(l.Blocks) != 1 || l.Blocks[0].Node != "b" {
		t.Fatalf("%+v", l)
	}
	if err := c.r.Forget(ctx, "b", true); err != nil {
		t.Fatal(err)
	}
	if got := c.keys(); len(got) > 0 {
		t.Errorf("left: %q", got)
	}
}

// TestStateLost: a node without its file begins anew, and what it had is not
// given to anybody, it included, until its grace is over.
func TestStateLost(t *testing.T) {
	blue := overlay("blue", "10.32.0.0/16")
	c := newCluster(t, blue)
	n := c.node("n")
	before := n.assign(blue, "e")
	n.disk = nil
	n.start()
	after := n.assign(blue, "e")
	if before.Prefixes[0] == after.Prefixes[0] {
		t.Fatal("given again")
	}
	for range 30 {
		c.pass(time.Hour)
		n.tick(ctx)
		c.r.Reclaim(ctx, func(string) bool { return true })
	}
	if l, _ := c.r.Blocks(ctx, "blue"); len(l.Blocks) != 1 {
		t.Errorf("%+v", l)
	}
}

// TestOldCopy: a file from a backup is not believed.
func TestOldCopy(t *testing.T) {
	blue := overlay("blue", "10.32.0.0/16")
	c := newCluster(t, blue)
	n := c.node("n")
	n.assign(blue, "e")
	old := n.disk
	n.tick(ctx)
	n.tick(ctx)
	n.disk = old
	n.start()
	if err := n.tick(ctx); err == nil || len(n.lost) != 1 || len(n.Owners()) > 0 {
		t.Fatalf("%v, lost %q", err, n.lost)
	}
	if err := n.tick(ctx); err != nil {
		t.Fatal(err)
	}
}

func TestBadRecords(t *testing.T) {
	blue := overlay("blue", "10.32.0.0/16")
	c := newCluster(t, blue)
	n := c.node("n")
	c.update("blue", func(t store.Txn) error {
		t.Put("ipam/blue/block/10.32.0.0-26", []byte(`{"schema":9}`))
		return nil
	})
	if _, err := n.try(blue, "a"); !errors.Is(err, errRecord) {
		t.Errorf("a record of a later schema: %v", err)
	}
}

func TestNames(t *testing.T) {
	c := newCluster(t, overlay("blue", "10.32.0.0/16"))
	for _, name := range []string{"", "a/b", "blue/block", "ä", string(make([]byte, 64))} {
		if _, err := c.r.Take(ctx, "n", TakeRequest{Caller: Caller{"s", 1}, Overlay: name, Family: 4, Nonce: "x"}); err == nil {
			t.Errorf("Take(%q)", name)
		}
		if _, err := c.r.Renew(ctx, name, RenewRequest{Caller: Caller{"s", 1}}); err == nil {
			t.Errorf("Renew of %q", name)
		}
	}
	if _, err := c.r.Take(ctx, "n", TakeRequest{Caller: Caller{"", 1}, Overlay: "blue", OverlayID: "blue-1", Family: 4, Nonce: "x"}); err == nil {
		t.Error("Take without a state")
	}
}

func TestOverlayGone(t *testing.T) {
	blue := overlay("blue", "10.32.0.0/16")
	c := newCluster(t, blue)
	n := c.node("n")
	n.assign(blue, "a")
	c.update("blue", func(t store.Txn) error {
		t.Delete(store.OverlayKey("blue"))
		return DropOverlay(t, "blue")
	})
	if got := c.keys(); !slices.Equal(got, []string{"renewal/n"}) {
		t.Errorf("left: %q", got)
	}
	if _, err := n.try(blue, "b", "10.32.250.1"); err == nil {
		t.Error("an address of an overlay that is gone")
	}
	n.tick(ctx)
	if !slices.Equal(n.lost, []string{"a"}) || len(n.Status().Blocks) > 0 {
		t.Errorf("lost %q", n.lost)
	}
	again := overlay("blue", "10.32.0.0/16")
	again.ID = "blue-2"
	c.define(again)
	n.assign(again, "a")
}
