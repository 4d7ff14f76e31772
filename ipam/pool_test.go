package ipam

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"testing"
	"time"

	"github.com/tulle-net/tulle/store"
)

func TestAssign(t *testing.T) {
	blue, six, both := overlay("blue", "10.32.0.0/16"), overlay("six", "fd00::/64"), overlay("both", "10.33.0.0/16", "fd01::/64")
	c := newCluster(t, blue, six, both)
	n := c.node("n1")
	for i, o := range []*store.Overlay{blue, six, both} {
		a := n.assign(o, "e"+strconv.Itoa(i))
		if len(a.Prefixes) != len(o.Subnets) {
			t.Fatalf("%s: %v", o.Name, a)
		}
		for j, p := range a.Prefixes {
			if p.Bits() != o.Subnets[j].Bits() || !o.Subnets[j].Contains(p.Addr()) {
				t.Errorf("%s: %s is not of %s", o.Name, p, o.Subnets[j])
			}
		}
		again := n.assign(o, "e"+strconv.Itoa(i))
		if !slices.Equal(a.Prefixes, again.Prefixes) || a.MAC != again.MAC {
			t.Errorf("asked twice: %v, then %v", a, again)
		}
		first := a.Prefixes[0].Addr()
		if first.Is4() {
			b := first.As4()
			if want := fmt.Sprintf("02:54:%02x:%02x:%02x:%02x", b[0], b[1], b[2], b[3]); a.MAC.String() != want {
				t.Errorf("MAC of %s is %s, want %s", first, a.MAC, want)
			}
		} else if s := a.MAC.String(); s[:5] == "02:54" || s[1] != '2' && s[1] != '6' && s[1] != 'a' && s[1] != 'e' {
			t.Errorf("MAC of %s is %s", first, s)
		}
	}
	if _, err := n.try(six, "e0"); err == nil {
		t.Error("an endpoint of one overlay got an address of another")
	}
	if _, err := n.Assign(ctx, Request{Overlay: both, Owner: "four", Families: []int{4}}); err != nil {
		t.Error(err)
	}
	if _, err := n.Assign(ctx, Request{Overlay: blue, Owner: "six", Families: []int{6}}); err == nil {
		t.Error("an IPv6 address of an overlay without")
	}
}

// TestKeepersAway: a node needs nobody until its block is full.
func TestKeepersAway(t *testing.T) {
	blue := overlay("blue", "10.32.0.0/16")
	c := newCluster(t, blue)
	n := c.node("n1")
	n.assign(blue, "first")
	c.cut.Store(true)
	seen := map[netip.Addr]bool{}
	for i := 0; ; i++ {
		a, err := n.try(blue, strconv.Itoa(i))
		if err != nil {
			if i < 60 {
				t.Fatalf("after %d: %v", i, err)
			}
			break
		}
		if seen[a.Prefixes[0].Addr()] {
			t.Fatalf("%v twice", a)
		}
		seen[a.Prefixes[0].Addr()] = true
	}
	if err := n.Release("0"); err != nil {
		t.Fatal(err)
	}
	n.assign(blue, "again")
	n.start() // as it was, from disk
	if len(n.Owners()) < 60 {
		t.Error("a restart lost endpoints")
	}
	c.cut.Store(false)
	n.assign(blue, "more")
	if got := n.Status(); len(got.Blocks) != 2 {
		t.Errorf("blocks: %+v", got.Blocks)
	}
}

// TestReuse: a released address is given again after all others.
func TestReuse(t *testing.T) {
	blue := overlay("blue", "10.32.0.0/26")
	blue.Gateways, blue.Reserved = []netip.Addr{addr("10.32.0.1")}, []netip.Prefix{prefix("10.32.0.32/27"), prefix("10.32.0.8/31")}
	c := newCluster(t, blue)
	n := c.node("n1")
	a := n.assign(blue, "a").Prefixes[0].Addr()
	b := n.assign(blue, "b").Prefixes[0].Addr()
	if a == b {
		t.Fatal("one address twice")
	}
	n.Release("b")
	n.Release("a")
	n.start()
	var order []netip.Addr
	size := int(sizeOf(n.Status().Blocks[0].Prefix))
	c.cut.Store(true)
	for i := range size {
		x, err := n.try(blue, "x"+strconv.Itoa(i))
		if err != nil {
			break
		}
		order = append(order, x.Prefixes[0].Addr())
	}
	if len(order) < 3 || order[len(order)-2] != b || order[len(order)-1] != a {
		t.Errorf("given in order %v; %s and %s were released, in this order", order, b, a)
	}
	for _, x := range order {
		if !offered(blue, x) {
			t.Errorf("%s was given", x)
		}
	}
}

func TestFixed(t *testing.T) {
	blue := overlay("blue", "10.32.0.0/16")
	blue.Reserved = []netip.Prefix{prefix("10.32.255.0/24")}
	c := newCluster(t, blue)
	a, b := c.node("a"), c.node("b")
	free := a.assign(blue, "somewhere", "10.32.9.9")
	if free.Prefixes[0] != prefix("10.32.9.9/16") {
		t.Fatal(free)
	}
	a.assign(blue, "reserved", "10.32.255.7")
	for _, no := range []string{"10.32.0.0", "10.32.0.1", "10.32.255.255", "10.33.0.1", "fd00::1"} {
		if x, err := a.try(blue, "no", no); err == nil {
			t.Errorf("%s was given: %v", no, x)
		}
	}
	if _, err := b.try(blue, "x", "10.32.9.9"); !errors.Is(err, ErrTaken) {
		t.Errorf("a taken address: %v", err)
	}
	if _, err := a.try(blue, "x", "10.32.9.9"); !errors.Is(err, ErrTaken) {
		t.Errorf("an address that is taken on this node: %v", err)
	}
	own := a.assign(blue, "own").Prefixes[0].Addr()
	// In a's block: used there, then free.
	if _, err := b.try(blue, "x", own.String()); !errors.Is(err, ErrTaken) {
		t.Errorf("an address in use in another node's block: %v", err)
	}
	a.Release("own")
	b.assign(blue, "x", own.String())
	if _, err := a.try(blue, "y", own.String()); !errors.Is(err, ErrTaken) {
		t.Errorf("a ceded address: %v", err)
	}
	next := own.Next()
	c.nodes["a"].Pool = nil
	if _, err := b.try(blue, "z", next.String()); err == nil {
		t.Error("an address in the block of a node that is away")
	}
	c.nodes["a"].start()
	// It goes back to a when b is done.
	b.Release("x")
	if err := b.tick(ctx); err != nil {
		t.Fatal(err)
	}
	if err := a.tick(ctx); err != nil {
		t.Fatal(err)
	}
	a.assign(blue, "y", own.String())
}

// TestCededReturns: an address that was ceded in vain is the owner's again.
func TestCededReturns(t *testing.T) {
	blue := overlay("blue", "10.32.0.0/16")
	c := newCluster(t, blue)
	a, b := c.node("a"), c.node("b")
	first := a.assign(blue, "e").Prefixes[0].Addr()
	want := first.Next()
	c.r.cfg.Cede = func(ctx context.Context, owner string, q CedeRequest) error {
		if err := c.cede(ctx, owner, q); err != nil {
			return err
		}
		return errors.New("the answer was lost")
	}
	if _, err := b.try(blue, "x", want.String()); err == nil {
		t.Fatal("fixed without an answer")
	}
	if got := a.Status().Blocks[0].Holes; got != 1 {
		t.Fatalf("%d holes", got)
	}
	c.cut.Store(true)
	if _, err := a.try(blue, "y", want.String()); err == nil {
		t.Fatal("ceded, and given")
	}
	c.cut.Store(false)
	if err := a.tick(ctx); err != nil {
		t.Fatal(err)
	}
	a.assign(blue, "y", want.String())
}

func TestExpiry(t *testing.T) {
	blue := overlay("blue", "10.32.0.0/16")
	c := newCluster(t, blue)
	a, b := c.node("a"), c.node("b")
	got := a.assign(blue, "e")
	c.cut.Store(true)
	c.pass(22*time.Hour + 59*time.Minute)
	a.stop()
	a.start()
	if !a.Usable() || len(a.lost) > 0 {
		t.Fatal("not usable before grace less margin")
	}
	c.pass(2 * time.Minute)
	a.stop()
	a.stop()
	if a.Usable() || !slices.Equal(a.lost, []string{"e"}) {
		t.Fatalf("usable %v after grace less margin, lost %q", a.Usable(), a.lost)
	}
	if _, err := a.try(blue, "e"); !errors.Is(err, ErrNotUsable) {
		t.Fatalf("Assign without a lease: %v", err)
	}
	c.cut.Store(false)
	if err := a.tick(ctx); err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(a.back, []string{"e"}) || !slices.Equal(a.assign(blue, "e").Prefixes, got.Prefixes) {
		t.Fatalf("back %q", a.back)
	}
	// Away for so long that it is reclaimed and given to others.
	dead := func(string) bool { return false }
	for range 30 {
		if err := c.r.Reclaim(ctx, dead); err != nil {
			t.Fatal(err)
		}
		c.pass(time.Hour)
	}
	if l, err := c.r.Blocks(ctx, "blue"); err != nil || len(l.Blocks) > 0 {
		t.Fatalf("not reclaimed: %+v, %v", l, err)
	}
	b.assign(blue, "theirs", got.Prefixes[0].Addr().String())
	if err := a.tick(ctx); err != nil {
		t.Fatal(err)
	}
	if len(a.Owners()) > 0 || !slices.Equal(a.lost, []string{"e", "e"}) {
		t.Fatalf("owners %q, lost %q", a.Owners(), a.lost)
	}
}

// TestReadmit: what was reclaimed and nobody took is the node's again.
func TestReadmit(t *testing.T) {
	blue := overlay("blue", "10.32.0.0/16")
	c := newCluster(t, blue)
	a := c.node("a")
	a.assign(blue, "e")
	a.assign(blue, "fixed", "10.32.200.1")
	c.update("blue", func(t store.Txn) error { return DropOverlay(t, "blue") }) // as an old snapshot
	if err := a.tick(ctx); err != nil {
		t.Fatal(err)
	}
	l, err := c.r.Blocks(ctx, "blue")
	if err != nil || len(l.Blocks) != 1 || len(l.Fixed) != 1 || len(a.lost) > 0 {
		t.Fatalf("%+v, %v, lost %q", l, err, a.lost)
	}
}

func TestReboot(t *testing.T) {
	for _, tt := range []struct {
		name         string
		off          time.Duration
		wrong        time.Duration
		synchronised bool
		want         bool
	}{
		{"at once", time.Minute, 0, true, true},
		{"after a day", 24 * time.Hour, 0, true, false},
		{"no clock", time.Minute, -1000 * time.Hour, false, false},
		{"unsynchronised, though right", time.Minute, 0, false, false},
		{"clock before the renewal", time.Minute, -time.Hour, true, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			blue := overlay("blue", "10.32.0.0/16")
			c := newCluster(t, blue)
			n := c.node("n")
			n.assign(blue, "e")
			c.pass(tt.off)
			n.clock.boot, n.clock.since = "b2", 20*time.Second
			n.clock.wall, n.clock.sync = n.clock.wall.Add(tt.wrong), tt.synchronised
			n.start()
			if got := n.Usable(); got != tt.want {
				t.Fatalf("usable %v, want %v", got, tt.want)
			}
			n.stop()
			if got := len(n.lost) == 0; got != tt.want {
				t.Errorf("lost %q", n.lost)
			}
			n.clock.pass(22 * time.Hour)
			if tt.want {
				n.clock.wall = n.clock.wall.Add(-1000 * time.Hour)
				if !n.Usable() {
					t.Error("a wall clock that jumps ended the lease")
				}
				n.clock.pass(2 * time.Hour)
				if n.Usable() {
					t.Error("a wall clock that jumped prolonged the lease")
				}
			}
			if err := n.tick(ctx); err != nil || !n.Usable() {
				t.Errorf("not usable after a renewal: %v", err)
			}
		})
	}
}

// TestGiveBack: one spare block while there are endpoints, none after the last.
func TestGiveBack(t *testing.T) {
	blue := overlay("blue", "10.32.0.0/16")
	c := newCluster(t, blue)
	n := c.node("n")
	n.assign(blue, "fixed", "10.32.77.7")
	for i := range 200 {
		n.assign(blue, strconv.Itoa(i))
	}
	if use, err := c.r.InUse(ctx, "blue"); err != nil || !slices.Equal(use, []string{"n"}) {
		t.Fatalf("in use by %q, %v", use, err)
	}
	for i := 1; i < 200; i++ {
		n.Release(strconv.Itoa(i))
	}
	if n.spare(n.now()) {
		t.Error("blocks are given back at once")
	}
	c.pass(2 * time.Minute)
	if !n.spare(n.now()) {
		t.Error("blocks stay")
	}
	n.tick(ctx)
	if got := len(n.Status().Blocks); got != 2 {
		t.Errorf("%d blocks with one endpoint", got)
	}
	n.Release("0")
	n.Release("fixed")
	c.pass(2 * time.Minute)
	n.tick(ctx)
	if got := c.keys(); !slices.Equal(got, []string{"renewal/n"}) {
		t.Errorf("left: %q", got)
	}
	if use, err := c.r.InUse(ctx, "blue"); err != nil || len(use) > 0 {
		t.Errorf("in use by %q, %v", use, err)
	}
}
