package ipam

import (
	"context"
	"errors"
	"io/fs"
	"net/netip"
	"slices"
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
