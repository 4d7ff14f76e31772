package ipam

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"slices"
	"strconv"
	"sync/atomic"
	"testing"
	"time"

	"github.com/tulle-net/tulle/store"
	"github.com/tulle-net/tulle/store/storetest"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) {
	runKillChild()
	goleak.VerifyTestMain(m)
}

var ctx = context.Background()

func addr(s string) netip.Addr     { return netip.MustParseAddr(s) }
func prefix(s string) netip.Prefix { return netip.MustParsePrefix(s) }

// fakeClock is a machine's clock that a test sets.
type fakeClock struct {
	boot  string
	since time.Duration
	wall  time.Time
	sync  bool
}

func newClock() *fakeClock {
	return &fakeClock{boot: "b1", since: time.Hour, wall: time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC), sync: true}
}

func (c *fakeClock) Boot() (string, time.Duration) { return c.boot, c.since }
func (c *fakeClock) Wall() (time.Time, bool)       { return c.wall, c.sync }

func (c *fakeClock) pass(d time.Duration) {
	c.since += d
	c.wall = c.wall.Add(d)
}

// cluster is some nodes and a keeper, in one process.
type cluster struct {
	t     testing.TB
	mem   *storetest.Memory
	r     *Registry
	clock *fakeClock
	nodes map[string]*member
	cut   atomic.Bool // all nodes from the keeper
}

type member struct {
	*Pool
	c      *cluster
	name   string
	clock  *fakeClock
	disk   []byte
	broken error
	lost   []string
	back   []string
}

func newCluster(t testing.TB, overlays ...*store.Overlay) *cluster {
	c := &cluster{t: t, mem: storetest.New(), clock: newClock(), nodes: map[string]*member{}}
	var err error
	c.r, err = NewRegistry(RegistryConfig{Store: c.mem, Now: func() time.Time { return c.clock.wall }, Clock: c.clock, Cede: c.cede})
	if err != nil {
		t.Fatal(err)
	}
	for _, o := range overlays {
		c.define(o)
	}
	return c
}

func (c *cluster) define(o *store.Overlay) {
	c.t.Helper()
	b, err := o.Encode()
	if err != nil {
		c.t.Fatal(err)
	}
	c.update(o.Name, func(t store.Txn) error {
		t.Put(store.OverlayKey(o.Name), b)
		return nil
	})
}

func (c *cluster) update(overlay string, f func(store.Txn) error) {
	c.t.Helper()
	if err := c.mem.Update(ctx, []string{"overlay/" + overlay}, f); err != nil {
		c.t.Fatal(err)
	}
}

func (c *cluster) cede(_ context.Context, owner string, q CedeRequest) error {
	n := c.nodes[owner]
	if n == nil || n.Pool == nil {
		return errors.New("no answer")
	}
	return n.Cede(q)
}

func (c *cluster) node(name string) *member {
	c.t.Helper()
	n := &member{c: c, name: name, clock: newClock()}
	c.nodes[name] = n
	n.start()
	return n
}

func (n *member) start() {
	n.c.t.Helper()
	var err error
	n.Pool, err = NewPool(PoolConfig{Node: n.name, Source: memberSource{n}, Clock: n.clock,
		Load: func() ([]byte, error) {
			if n.disk == nil {
				return nil, fs.ErrNotExist
			}
			return n.disk, nil
		},
		Save: func(b []byte) error {
			if n.broken == nil {
				n.disk = slices.Clone(b)
			}
			return n.broken
		},
		Lost: func(o string) { n.lost = append(n.lost, o) }, Back: func(o string) { n.back = append(n.back, o) }})
	if err != nil {
		n.c.t.Fatal(err)
	}
}

func (c *cluster) pass(d time.Duration) {
	c.clock.pass(d)
	for _, n := range c.nodes {
		n.clock.pass(d)
	}
}

func (n *member) assign(o *store.Overlay, owner string, want ...string) Assignment {
	n.c.t.Helper()
	out, err := n.try(o, owner, want...)
	if err != nil {
		n.c.t.Fatalf("%s: Assign(%s, %v): %v", n.name, owner, want, err)
	}
	return out
}

func (n *member) try(o *store.Overlay, owner string, want ...string) (Assignment, error) {
	q := Request{Overlay: o, Owner: owner}
	for _, w := range want {
		q.Want = append(q.Want, addr(w))
	}
	return n.Assign(ctx, q)
}

type memberSource struct{ n *member }

func (s memberSource) there() error {
	if s.n.c.cut.Load() {
		return errors.New("no keeper answers")
	}
	return nil
}

func (s memberSource) Take(ctx context.Context, q TakeRequest) (Block, error) {
	if err := s.there(); err != nil {
		return Block{}, err
	}
	return s.n.c.r.Take(ctx, s.n.name, q)
}
func (s memberSource) Renew(ctx context.Context, q RenewRequest) (RenewAnswer, error) {
	if err := s.there(); err != nil {
		return RenewAnswer{}, err
	}
	return s.n.c.r.Renew(ctx, s.n.name, q)
}
func (s memberSource) Return(ctx context.Context, q ReturnRequest) error {
	return errors.Join(s.there(), s.n.c.r.Return(ctx, s.n.name, q))
}
func (s memberSource) Fix(ctx context.Context, q FixRequest) error {
	if err := s.there(); err != nil {
		return err
	}
	return s.n.c.r.Fix(ctx, s.n.name, q)
}
func (s memberSource) Unfix(ctx context.Context, q UnfixRequest) error {
	return errors.Join(s.there(), s.n.c.r.Unfix(ctx, s.n.name, q))
}

func overlay(name string, subnets ...string) *store.Overlay {
	o := &store.Overlay{Schema: 1, Name: name, VNI: 65536, Encryption: "required", Flood: "unicast", ID: name + "-1"}
	for _, s := range subnets {
		o.Subnets = append(o.Subnets, prefix(s))
	}
	return o
}

// keys returns all of the store's keys that concern addresses.
func (c *cluster) keys() []string {
	var out []string
	c.mem.View(ctx, func(t store.Reader) error {
		for _, p := range []string{"ipam/", "renewal/"} {
			items, err := t.List(p)
			if err != nil {
				return err
			}
			for _, i := range items {
				out = append(out, i.Key)
			}
		}
		return nil
	})
	return out
}

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

func TestDiskFull(t *testing.T) {
	blue := overlay("blue", "10.32.0.0/16")
	c := newCluster(t, blue)
	n := c.node("n")
	a := n.assign(blue, "a")
	n.broken = errors.New("no space left on device")
	if _, err := n.try(blue, "b"); err == nil {
		t.Fatal("given and not on disk")
	}
	if err := n.Release("a"); err == nil {
		t.Fatal("released and not on disk")
	}
	if err := n.Cede(CedeRequest{"blue", blue.ID, a.Prefixes[0].Addr().Next()}); err == nil {
		t.Fatal("ceded and not on disk")
	}
	n.broken = nil
	if got := n.Owners(); !slices.Equal(got, []string{"a"}) {
		t.Fatalf("owners %q", got)
	}
	if got := n.assign(blue, "a"); !slices.Equal(got.Prefixes, a.Prefixes) {
		t.Fatal(got)
	}
	n.assign(blue, "b", a.Prefixes[0].Addr().Next().String())
}

func TestDamagedFile(t *testing.T) {
	blue := overlay("blue", "10.32.0.0/16", "fd00::/64")
	c := newCluster(t, blue)
	n := c.node("n")
	n.assign(blue, "a")
	n.assign(blue, "b")
	whole := slices.Clone(n.disk)
	load := func(b []byte) error {
		_, err := loadState(func() ([]byte, error) { return b, nil }, newID)
		return err
	}
	if err := load(whole); err != nil {
		t.Fatal(err)
	}
	for i := 1; i < len(whole); i++ {
		if load(whole[:i]) == nil {
			t.Fatalf("the first %d of %d bytes were taken", i, len(whole))
		}
	}
	for _, b := range []string{"null", "{}", `{"schema":2,"state":"x"}`, `{"schema":1}`, `{"schema":1,"state":"x","endpoints":[{"owner":"e","prefixes":["10.0.0.1/8"]}]}`} {
		if load([]byte(b)) == nil {
			t.Errorf("%s was taken", b)
		}
	}
}

// TestUnknownFields: a later release's fields stay, in the file and in the store.
func TestUnknownFields(t *testing.T) {
	blue := overlay("blue", "10.32.0.0/16")
	c := newCluster(t, blue)
	n := c.node("n")
	n.assign(blue, "a")
	edit := func(b []byte, old, new string) []byte {
		if bytes.Count(b, []byte(old)) != 1 {
			t.Fatalf("%q is not once in %s", old, b)
		}
		return bytes.Replace(b, []byte(old), []byte(new), 1)
	}
	n.disk = edit(n.disk, `"owner":"a"`, `"owner":"a","future1":1`)
	n.disk = edit(n.disk, `"next":`, `"future2":2,"next":`)
	n.disk = edit(n.disk, `],"schema":1`, `],"future3":3,"schema":1`)
	n.start()
	for _, key := range c.keys() {
		f := func(txn store.Txn) error {
			b, err := txn.Get(key)
			txn.Put(key, edit(b, `{"schema":1`, `{"future4":4,"schema":1`))
			return err
		}
		if err := c.mem.Update(ctx, []string{store.Domain(key)}, f); err != nil {
			t.Fatal(err)
		}
	}
	n.assign(blue, "b")
	n.tick(ctx)
	for i := range 3 {
		if want := fmt.Sprintf(`"future%d":%d`, i+1, i+1); bytes.Count(n.disk, []byte(want)) != 1 {
			t.Errorf("%s is gone from %s", want, n.disk)
		}
	}
	c.mem.View(ctx, func(r store.Reader) error {
		for _, key := range c.keys() {
			if b, _ := r.Get(key); bytes.Count(b, []byte(`"future4":4`)) != 1 {
				t.Errorf("a field is gone from %s: %s", key, b)
			}
		}
		return nil
	})
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
