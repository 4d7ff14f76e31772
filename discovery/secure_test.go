package discovery

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/tulle-net/tulle/crypto"
)

func TestSecureNodesMeet(t *testing.T) {
	t.Parallel()
	c := newTestCluster(t)
	c.hidden["b"] = "secret"
	var extra atomic.Value
	extra.Store([]byte("first"))
	acfg := c.secureConfig("a", c.identity("a", crypto.NewPrivateKey(), true, time.Now()))
	acfg.Secure.Extra = func() []byte { return extra.Load().([]byte) }
	var got floods
	acfg.OnFlood = got.take
	a := c.start(acfg)
	if err := a.SetOverlays([]Overlay{{7, "x", "required"}, {9, "secret", "required"}}); err != nil {
		t.Fatal(err)
	}
	heard := make(chan string, 10)
	bcfg := c.secureConfig("b", nil, a)
	bcfg.Secure.OnExtra = func(name string, extra []byte) { heard <- name + " " + string(extra) }
	b := c.start(bcfg)
	if err := b.SetOverlays([]Overlay{{7, "x", "required"}}); err != nil {
		t.Fatal(err)
	}
	third := c.start(c.secureConfig("c", nil, b))
	meet(t, a, b, third)

	b.await(3*time.Second, "the part of a's overlays that it may see", func() bool {
		return slices.Equal(b.member("a").Overlays, []Overlay{{7, "x", "required"}})
	})
	third.await(3*time.Second, "a's overlays", func() bool { return len(third.member("a").Overlays) == 2 })
	m := b.member("a")
	if m.VTEP != acfg.VTEP || m.Gossip != a.Gossip() || !m.Keeper || m.Passport == nil || m.Passport.Name != "a" {
		t.Errorf("b sees %+v", m)
	}
	if self := a.member("a"); !self.Keeper || self.Passport == nil || b.member("b").Keeper {
		t.Errorf("a sees itself as %+v", self)
	}
	if text := <-heard; text != "a first" {
		t.Errorf("b hears %q", text)
	}
	extra.Store([]byte("second"))
	if err := a.Announce(); err != nil {
		t.Fatal(err)
	}
	if text := <-heard; text != "a second" {
		t.Errorf("b hears %q", text)
	}
	if got := string(b.member("a").Extra) + string(a.member("a").Extra); got != "secondsecond" {
		t.Errorf("a's Extra is shown as %q", got)
	}
	// A change of a list has it pulled again, and again only that.
	if err := b.SetOverlays([]Overlay{{7, "x", "required"}, {11, "y", "required"}}); err != nil {
		t.Fatal(err)
	}
	a.await(3*time.Second, "b's new overlay", func() bool { return len(a.member("b").Overlays) == 2 })
	if !b.Flood(11, []byte("frame")) {
		t.Fatal("Flood was refused")
	}
	a.await(3*time.Second, "the flood", func() bool { return got.count() == 1 })
	for _, n := range []*testNode{a, b, third} {
		if s := n.Stats(); s.PassportsRefused != 0 || len(n.Conflicts()) != 0 {
			t.Errorf("%s: %+v, conflicts %q", n.cfg.Name, s, n.Conflicts())
		}
	}
	begin := time.Now()
	third.cancel()
	a.sees(time.Second-time.Since(begin), "c", Left)
}

// A list that changes and changes back while it is pulled: what was told in between
// is not taken for what stands now.
func TestSecureListThereAndBack(t *testing.T) {
	t.Parallel()
	c := newTestCluster(t)
	one := []Overlay{{7, "x", "required"}}
	both := append(slices.Clone(one), Overlay{9, "y", "required"})
	a := c.start(c.secureConfig("a", nil))
	set := func(overlays []Overlay) {
		if err := a.SetOverlays(overlays); err != nil {
			t.Error(err)
		}
	}
	set(one)
	var b *testNode
	var armed atomic.Bool
	cfg := c.secureConfig("b", nil, a)
	pull := cfg.Secure.Pull
	cfg.Secure.Pull = func(ctx context.Context, from string) ([]byte, func(string) bool, error) {
		if !armed.CompareAndSwap(true, false) {
			return pull(ctx, from)
		}
		set(one)
		list, may, err := pull(ctx, from)
		set(both)
		last := a.own.Load().Sequence
		knows := func() bool {
			b.mu.Lock()
			defer b.mu.Unlock()
			return b.peers["a"].passport.Sequence >= last
		}
		for !knows() && ctx.Err() == nil { // gossip overtakes the answer
			time.Sleep(time.Millisecond)
		}
		return list, may, err
	}
	b = c.start(cfg)
	meet(t, a, b)
	armed.Store(true)
	set(both)
	b.await(3*time.Second, "what a carries now", func() bool {
		return !armed.Load() && slices.Equal(b.member("a").Overlays, both)
	})
}

// One node of ten keeps its name, key and certificate and moves, and then back.
func TestMovedNode(t *testing.T) {
	t.Parallel()
	c := newTestCluster(t)
	a := c.start(c.secureConfig("a", nil))
	others := []*testNode{a}
	for i := range 8 {
		others = append(others, c.start(c.secureConfig(fmt.Sprintf("n%d", i), nil, a)))
	}
	meet(t, others...)
	id := c.identity("m", crypto.NewPrivateKey(), false, time.Now())
	move := func(at netip.AddrPort, from *testNode) *testNode {
		if from != nil {
			from.moveAway()
			if m := a.member("m"); m.Status != Alive {
				t.Errorf("m has gone for a: %+v", m)
			}
		}
		cfg := c.secureConfig("m", id, a)
		if at.IsValid() {
			cfg.Listen = at
		}
		begin := time.Now()
		n := c.start(cfg)
		for _, other := range others {
			other.await(5*time.Second, "m at its new address", func() bool {
				m := other.member("m")
				return m.Confirmed && m.Gossip == n.Gossip() && m.VTEP == cfg.VTEP
			})
		}
		t.Logf("followed after %v", time.Since(begin))
		meet(t, a, n)
		return n
	}
	first := move(netip.AddrPort{}, nil)
	second := move(netip.AddrPort{}, first)
	move(first.Gossip(), second)
	var failed bool
	end := time.After(300 * time.Millisecond)
	for waiting := true; waiting; {
		select {
		case <-a.Changed():
			failed = failed || a.member("m").Status != Alive
		case <-end:
			waiting = false
		}
	}
	if failed {
		t.Error("m seemed to have failed")
	}
	for _, n := range others {
		if got := n.Conflicts(); len(got) != 0 {
			t.Errorf("%s: conflicts %q", n.cfg.Name, got)
		}
	}
}

// bury kills n, and has the others told that it is dead before they find out.
func (n *testNode) bury(other *testNode) {
	n.t.Helper()
	n.kill()
	dead := slices.Concat([]byte{5}, packMap(3), packText("Incarnation"), packInt(1000),
		packText("Node"), packText(record(n.cfg.Name, n.self)), packText("From"), packText("somebody"))
	other.hit(sealed(n.t, n.cfg.Secure.Keys[0], sealVersion, dead, nil))
	other.sees(3*time.Second, n.cfg.Name, Failed)
}

// moveAway ends n as the change of its address does.
func (n *testNode) moveAway() { n.end(func() { n.shift(ErrMoved) }) }

// Revoked, expired and forged members that are still listed by others keep
// nobody out, nor does a dead one.
func TestJoinBesideBadMembers(t *testing.T) {
	t.Parallel()
	c := newTestCluster(t)
	a := c.start(c.secureConfig("a", nil))
	id := c.identity("revoked", crypto.NewPrivateKey(), false, time.Now())
	revoked := c.start(c.secureConfig("revoked", id, a))
	old := c.identity("expired", crypto.NewPrivateKey(), false, time.Now().Add(-crypto.Lifetime+time.Minute))
	expired := c.start(c.secureConfig("expired", old, a))
	dead := c.start(c.secureConfig("dead", nil, a))
	// One that everybody but the new node believes.
	lenient := func(*crypto.Passport) error { return nil }
	other := newTestCluster(t)
	forged := c.secureConfig("forged", other.identity("forged", crypto.NewPrivateKey(), false, time.Now()), a)
	forged.Secure.Verify = lenient
	meet(t, a, revoked, expired, dead)
	a.passports.mu.Lock()
	a.passports.verify = lenient
	a.passports.mu.Unlock()
	f := c.start(forged)
	meet(t, a, f)
	dead.bury(a)

	c.revoke(id.Key().PublicKey())
	c.ahead.Store(int64(time.Hour)) // a does not look until it is told to
	n := c.start(c.secureConfig("new", nil, a))
	n.await(3*time.Second, "a confirmed", func() bool { return n.member("a").Confirmed })
	a.await(3*time.Second, "new confirmed", func() bool { return a.member("new").Confirmed })
	for _, name := range []string{"revoked", "expired", "forged"} {
		if a.member(name).Status != Alive {
			t.Errorf("a does not list %s any more: %v", name, a.member(name))
		}
		if m := n.member(name); m.Name != "" {
			t.Errorf("the new node lists %s: %+v", name, m)
		}
	}
	if got := n.Stats().PassportsRefused; got < 3 {
		t.Errorf("%d passports refused, want 3", got)
	}
	text := n.log.String()
	for _, want := range []string{"revoked", "expired", "another cluster"} {
		if !strings.Contains(text, want) {
			t.Errorf("the log does not say %q", want)
		}
	}
}

func TestReverify(t *testing.T) {
	t.Parallel()
	c := newTestCluster(t)
	a := c.start(c.secureConfig("a", nil))
	id := c.identity("b", crypto.NewPrivateKey(), false, time.Now())
	b := c.start(c.secureConfig("b", id, a))
	meet(t, a, b)
	c.revoke(id.Key().PublicKey())
	for len(a.Changed()) > 0 {
		<-a.Changed()
	}
	a.Reverify()
	if m := a.Members(); len(m) != 1 {
		t.Errorf("a still sees %v", m)
	}
	select {
	case <-a.Changed():
	default:
		t.Error("the bell did not ring")
	}
	// The machine joins again with a new key: the name is free.
	b.kill()
	again := c.start(c.secureConfig("b", nil, a))
	meet(t, a, again)
	// And the revocation goes: nothing of the former comes back.
	c.revoked.Store(nil)
	a.Reverify()
	a.await(2*time.Second, "b with its new key", func() bool {
		m := a.member("b")
		return m.Confirmed && m.Passport.Key != id.Key().PublicKey()
	})
}

func TestFind(t *testing.T) {
	t.Parallel()
	c := newTestCluster(t)
	a := c.start(c.secureConfig("a", nil))
	cfg := c.secureConfig("b", nil)
	var asked atomic.Int32
	cfg.Secure.Find = func(context.Context) []netip.AddrPort {
		if asked.Add(1) == 1 {
			return nil
		}
		return []netip.AddrPort{a.Gossip()}
	}
	b := c.start(cfg)
	meet(t, a, b)
	n := asked.Load()
	j := &joiner{d: b.Discovery, s: b.serf.Load(), was: settled}
	j.step(t.Context())
	if asked.Load() != n {
		t.Error("Find is asked by a node that lacks nobody")
	}
}

// A node that is killed and starts again at its address is found by what it
// kept, at once and after it was seen to fail; so with a renewed certificate.
func TestSecureRestart(t *testing.T) {
	t.Parallel()
	c := newTestCluster(t)
	a := c.start(c.secureConfig("a", nil))
	key := crypto.NewPrivateKey()
	cfg := c.secureConfig("b", c.identity("b", key, false, time.Now()), a)
	cfg.StateDir = t.TempDir()
	b := c.start(cfg)
	meet(t, a, b)
	b.await(2*time.Second, "the state file", func() bool {
		m := openMemory(cfg.StateDir, quiet)
		return slices.Equal(m.remembered, []netip.AddrPort{a.Gossip()})
	})
	at := b.Gossip()
	for _, failed := range []bool{false, true} {
		if failed {
			b.bury(a)
		} else {
			b.kill()
		}
		again := c.secureConfig("b", c.identity("b", key, true, time.Now()))
		again.StateDir, again.Listen, again.VTEP = cfg.StateDir, at, cfg.VTEP
		b = c.start(again)
		boot := b.boot
		a.await(3*time.Second, "b in its new boot", func() bool {
			m := a.member("b")
			return m.Confirmed && m.Keeper && binary.BigEndian.Uint32(m.Passport.Extra) == boot
		})
		meet(t, a, b)
	}
}

func TestSecureIPv6(t *testing.T) {
	t.Parallel()
	c := newTestCluster(t)
	var nodes []*testNode
	for i := range 2 {
		cfg := c.secureConfig(fmt.Sprintf("n%d", i), nil, nodes...)
		cfg.Listen, cfg.Advertise = netip.MustParseAddrPort("[::1]:0"), netip.IPv6Loopback()
		cfg.VTEP = netip.AddrPortFrom(netip.IPv6Loopback(), cfg.VTEP.Port())
		if d, err := New(cfg); err != nil {
			t.Skipf("no IPv6 here: %v", err)
		} else {
			d.Close()
		}
		nodes = append(nodes, c.start(cfg))
	}
	meet(t, nodes...)
}

// A second node of the same name, by identity: another key's or a copy of this one's.
func TestSecureNamesakes(t *testing.T) {
	t.Parallel()
	c := newTestCluster(t)
	a := c.start(c.secureConfig("a", nil))
	id := c.identity("pi4", crypto.NewPrivateKey(), false, time.Now())
	first := c.start(c.secureConfig("pi4", id, a))
	meet(t, a, first)
	second := c.start(c.secureConfig("pi4", nil, a)) // as no keeper would let it
	second.await(3*time.Second, "a conflict", func() bool {
		got := second.Conflicts()
		return len(got) == 1 && strings.Contains(got[0], "is taken by "+first.Gossip().String())
	})
	if m := a.member("pi4"); m.Gossip != first.Gossip() || m.Passport.Key != id.Key().PublicKey() {
		t.Errorf("a sees %+v", m)
	}
	second.kill()
	c.start(c.secureConfig("pi4", id, a))
	first.await(3*time.Second, "a conflict", func() bool {
		got := first.Conflicts()
		return len(got) == 1 && strings.Contains(got[0], "runs with the identity of this node")
	})
}

func TestNewRefusesSecure(t *testing.T) {
	c := newTestCluster(t)
	for what, change := range map[string]func(*Secure){
		"0 gossip keys":         func(s *Secure) { s.Keys = nil },
		"has 16 bytes":          func(s *Secure) { s.Keys = [][]byte{make([]byte, 16)} },
		"Sign, Verify and Pull": func(s *Secure) { s.Pull = nil },
	} {
		cfg := c.secureConfig("x", nil)
		change(cfg.Secure)
		if d, err := New(cfg); err == nil {
			d.Close()
			t.Errorf("New accepts what should be refused with %q", what)
		} else if !strings.Contains(err.Error(), what) {
			t.Errorf("New says %q, want %q in it", err, what)
		}
	}
	for what, change := range map[string]func(*Config){
		"at most":    func(c *Config) { c.Secure.Extra = func() []byte { return make([]byte, MaxExtra+1) } },
		"is that of": func(c *Config) { c.Name = "y" },
		"out of order": func(c *Config) {
			c.Secure.Sign = func(crypto.Statement) ([]byte, error) { return nil, errors.New("out of order") }
		},
		"malformed": func(c *Config) { c.Secure.Sign = func(crypto.Statement) ([]byte, error) { return []byte("x"), nil } },
	} {
		cfg := c.secureConfig("x", nil)
		change(&cfg)
		d, err := New(cfg)
		if err != nil {
			t.Fatal(err)
		}
		if err := d.Run(t.Context()); err == nil || !strings.Contains(err.Error(), what) {
			t.Errorf("Run says %v, want %q in it", err, what)
		}
	}
}

// A node that lists an overlay that its certificate does not grant does not
// carry it for anybody: else it would get the frames of one that is not sealed.
func TestSecureListsWithinGrants(t *testing.T) {
	t.Parallel()
	c := newTestCluster(t)
	acfg := c.secureConfig("a", nil)
	acfg.Secure.Pull = func(_ context.Context, from string) ([]byte, func(string) bool, error) {
		list, err := c.pull("a", from)
		return list, func(overlay string) bool { return overlay == "x" }, err
	}
	a := c.start(acfg)
	b := c.start(c.secureConfig("b", nil, a))
	if err := b.SetOverlays([]Overlay{{7, "x", "none"}, {9, "secret", "none"}}); err != nil {
		t.Fatal(err)
	}
	a.await(3*time.Second, "what b may carry", func() bool {
		return slices.Equal(a.member("b").Overlays, []Overlay{{7, "x", "none"}})
	})
}
