package discovery

import (
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/tulle-net/tulle/discovery/discoverytest"
)

// Who says that it carries something else does not wait until the others know.
func TestSetOverlaysDoesNotWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		net := discoverytest.NewNetwork(time.Millisecond)
		at := func(name, ip string, seeds ...*testNode) *testNode {
			c := testConfig(name, seeds...)
			addr := netip.MustParseAddr(ip)
			c.Listen, c.Advertise, c.VTEP, c.Network = netip.AddrPortFrom(addr, 7946), addr, netip.AddrPortFrom(addr, 4789), net.Host(addr)
			return start(t, c)
		}
		a := at("a", "192.0.2.1")
		b := at("b", "192.0.2.2", a)
		meet(t, a, b)
		const changes = 20
		began := time.Now()
		for i := range changes {
			if err := b.SetOverlays(manyOverlays(i+1, "none")); err != nil {
				t.Fatal(err)
			}
		}
		if took := time.Since(began); took > time.Millisecond {
			t.Errorf("%d changes took %v, want none of that", changes, took)
		}
		a.await(3*time.Second, "the last of them", func() bool { return len(a.member("b").Overlays) == changes })
	})
}

func TestThreeNodesMeetAndPullOverlays(t *testing.T) {
	t.Parallel()
	a := start(t, testConfig("a"))
	c := testConfig("b", a)
	b := start(t, c)
	want, err := newList(manyOverlays(1000, "none"))
	if err != nil {
		t.Fatal(err)
	}
	if err := b.SetOverlays(manyOverlays(1000, "none")); err != nil {
		t.Fatal(err)
	}
	third := start(t, testConfig("c", a)) // it comes after the news
	meet(t, a, b, third)
	for _, n := range []*testNode{a, third} {
		n.await(5*time.Second, "1,000 overlays of b", func() bool { return slices.Equal(n.member("b").Overlays, want.overlays) })
	}
	m := a.member("b")
	if m.VTEP != c.VTEP || m.Gossip != b.Gossip() || m.Self {
		t.Errorf("a sees %v, VTEP want %v, gossip want %v", m, c.VTEP, b.Gossip())
	}
	if self := b.member("b"); !self.Self || self.Status != Alive || !slices.Equal(self.Overlays, want.overlays) {
		t.Errorf("b sees itself as %+v", self)
	}
	if !slices.IsSortedFunc(a.Members(), func(x, y Member) int { return strings.Compare(x.Name, y.Name) }) {
		t.Errorf("members are not sorted: %v", a.Members())
	}

	// A change arrives, by the digest alone.
	if err := b.SetOverlays([]Overlay{{VNI: 7, Name: "green", Encryption: "required"}}); err != nil {
		t.Fatal(err)
	}
	for _, n := range []*testNode{a, third} {
		n.await(3*time.Second, "the changed overlays of b", func() bool {
			o := n.member("b").Overlays
			return len(o) == 1 && o[0] == Overlay{VNI: 7, Name: "green", Encryption: "required"}
		})
	}
	// A node that carries the same needs not be asked.
	pulls := a.Stats().Pulls
	if err := third.SetOverlays([]Overlay{{VNI: 7, Name: "green", Encryption: "required"}}); err != nil {
		t.Fatal(err)
	}
	a.await(3*time.Second, "c carries green", func() bool { return len(a.member("c").Overlays) == 1 })
	if got := a.Stats().Pulls; got != pulls {
		t.Errorf("%d lists pulled for a digest that was known", got-pulls)
	}
}

func TestLeaveIsSeenWithinASecond(t *testing.T) {
	t.Parallel()
	a := start(t, testConfig("a"))
	b := start(t, testConfig("b", a))
	c := start(t, testConfig("c", a))
	meet(t, a, b, c)
	begin := time.Now()
	c.cancel()
	a.sees(time.Second-time.Since(begin), "c", Left)
	b.sees(time.Second-time.Since(begin), "c", Left)
	t.Logf("seen after %v", time.Since(begin))
	c.leave()
	if took := time.Since(begin); took > 1500*time.Millisecond {
		t.Errorf("leaving took %v", took)
	}
	if c.Flood(1, []byte{1}) {
		t.Error("Flood was taken after Run ended")
	}
	if err := c.SetOverlays(manyOverlays(1, "none")); err != nil {
		t.Errorf("SetOverlays after Run ended: %v", err)
	}
}

// A killed node is seen within 10 s; then its name comes back from another
// address.
func TestCrashIsSeenAndTheNameComesBack(t *testing.T) {
	t.Parallel()
	a := start(t, testConfig("a"))
	b := start(t, testConfig("b", a))
	c := start(t, testConfig("c", a))
	meet(t, a, b, c)
	begin := time.Now()
	c.kill()
	a.sees(10*time.Second-time.Since(begin), "c", Failed)
	b.sees(10*time.Second-time.Since(begin), "c", Failed)
	t.Logf("seen after %v", time.Since(begin))

	again := start(t, testConfig("c", a))
	a.await(5*time.Second, "c at its new address", func() bool {
		m := a.member("c")
		return m.Confirmed && m.Gossip == again.Gossip() && m.VTEP == again.cfg.VTEP
	})
	again.await(5*time.Second, "no conflict", func() bool { return len(again.Conflicts()) == 0 })
	meet(t, a, b, again)
}

// A node that is killed and starts again at once, with other overlays and
// without seeds, finds the others by what it kept.
func TestRestartWithoutSeeds(t *testing.T) {
	t.Parallel()
	a := start(t, testConfig("a"))
	c := testConfig("b", a)
	c.StateDir = filepath.Join(t.TempDir(), "state")
	b := start(t, c)
	if err := b.SetOverlays(manyOverlays(3, "none")); err != nil {
		t.Fatal(err)
	}
	meet(t, a, b)
	b.await(2*time.Second, "the state file", func() bool {
		_, err := os.Stat(filepath.Join(c.StateDir, memoryFile))
		return err == nil
	})
	b.kill()

	c.Seeds, c.Listen = nil, b.Gossip()
	again := start(t, c)
	if err := again.SetOverlays(manyOverlays(2, "required")); err != nil {
		t.Fatal(err)
	}
	meet(t, a, again)
	a.await(3*time.Second, "the new overlays of b", func() bool { return len(a.member("b").Overlays) == 2 })

	// And after a leave, from which both sides keep nothing but the file.
	again.leave()
	a.sees(time.Second, "b", Left)
	third := start(t, c)
	meet(t, a, third)
}

func TestRestartWithSeeds(t *testing.T) {
	t.Parallel()
	a := start(t, testConfig("a"))
	c := testConfig("b", a)
	b := start(t, c)
	meet(t, a, b)
	b.kill()
	c.Listen = b.Gossip()
	b = start(t, c)
	meet(t, a, b)
}

// The seed of two nodes goes, and comes back knowing nobody: they find it.
func TestSeedRestartsWithoutMemory(t *testing.T) {
	t.Parallel()
	c := testConfig("seed")
	seed := start(t, c)
	a := start(t, testConfig("a", seed))
	meet(t, seed, a)
	c.Listen = seed.Gossip()
	seed.leave()
	a.sees(time.Second, "seed", Left)
	seed = start(t, c)
	meet(t, seed, a)
}

func TestLateSeed(t *testing.T) {
	t.Parallel()
	late := testConfig("late")
	reserved, err := New(late)
	if err != nil {
		t.Fatal(err)
	}
	late.Listen = reserved.Gossip()
	reserved.Close()
	c := testConfig("early")
	c.Seeds = []string{late.Listen.String()}
	early := start(t, c)
	early.await(3*time.Second, "a warning", func() bool { return strings.Contains(early.log.String(), "cannot join yet") })
	timer := time.NewTimer(time.Second) // the case is a seed that comes a second later
	<-timer.C
	seed := start(t, late)
	begin := time.Now()
	meet(t, early, seed)
	if took := time.Since(begin); took > 2500*time.Millisecond {
		t.Errorf("joined %v after the seed came", took)
	}
	if n := strings.Count(early.log.String(), "cannot join yet"); n != 1 {
		t.Errorf("%d warnings, want 1", n)
	}
}

func TestNameConflict(t *testing.T) {
	t.Parallel()
	seed := start(t, testConfig("seed"))
	first := start(t, testConfig("pi4", seed))
	meet(t, seed, first)
	second := start(t, testConfig("pi4", seed)) // the seed lists its name
	third := start(t, testConfig("pi4", first)) // it meets its namesake itself
	for _, n := range []*testNode{second, third} {
		n.await(3*time.Second, "a conflict", func() bool {
			c := n.Conflicts()
			return len(c) == 1 && strings.Contains(c[0], `node name "pi4" is taken by `+first.Gossip().String())
		})
		if m := n.Members(); len(m) != 1 {
			t.Errorf("the second pi4 sees %v", m)
		}
	}
	first.await(3*time.Second, "a conflict", func() bool { return len(first.Conflicts()) > 0 })
	if m := seed.member("pi4"); m.Gossip != first.Gossip() || m.Status != Alive {
		t.Errorf("the seed sees pi4 as %v, want it at %v", m, first.Gossip())
	}
	// When the first goes, the second gets in by itself.
	third.leave()
	first.leave()
	second.await(8*time.Second, "the seed", func() bool { return second.member("seed").Status == Alive })
	seed.await(3*time.Second, "the second pi4", func() bool { return seed.member("pi4").Gossip == second.Gossip() })
	if c := second.Conflicts(); len(c) != 0 {
		t.Errorf("conflicts after it joined: %v", c)
	}
}

// A node is not kept out by a conflict over a name that is not its own.
func TestNameConflictOfOthers(t *testing.T) {
	t.Parallel()
	seed := start(t, testConfig("seed"))
	first := start(t, testConfig("pi4", seed))
	meet(t, seed, first)
	second := start(t, testConfig("pi4"))
	by := start(t, testConfig("bystander", second, seed))
	meet(t, by, seed)
	if c := by.Conflicts(); len(c) != 0 {
		t.Errorf("the bystander has conflicts %v", c)
	}
}

func TestOtherWireVersionIsLeftOut(t *testing.T) {
	t.Parallel()
	a := start(t, testConfig("a"))
	b := start(t, testConfig("b", a))
	meet(t, a, b)
	// Its error means only that the news is still spreading.
	_ = b.serf.Load().SetTags(map[string]string{tagVersion: "9"})
	a.await(3*time.Second, "b is left out", func() bool { return a.member("b").Name == "" })
	// Each refresh meets it again, and says nothing.
	for range 3 {
		ring(a.moved)
		a.await(time.Second, "a refresh", func() bool { return len(a.moved) == 0 })
	}
	text := a.log.String()
	if n := strings.Count(text, "left out"); n != 1 || !strings.Contains(text, `\"9\"`) || !strings.Contains(text, `\"1\"`) {
		t.Errorf("%d warnings, want one with both versions:\n%s", n, text)
	}
}

func TestIPv6(t *testing.T) {
	t.Parallel()
	c := testConfig("a")
	c.Listen, c.Advertise = netip.MustParseAddrPort("[::1]:0"), netip.IPv6Loopback()
	c.VTEP = netip.MustParseAddrPort("[::1]:4789")
	d, err := New(c)
	if err != nil {
		t.Skipf("no IPv6 here: %v", err)
	}
	d.Close()
	a := start(t, c)
	c = testConfig("b", a)
	c.Listen, c.Advertise = netip.MustParseAddrPort("[::]:0"), netip.IPv6Loopback()
	c.VTEP = netip.MustParseAddrPort("[::1]:4790")
	b := start(t, c)
	if err := b.SetOverlays(manyOverlays(2, "none")); err != nil {
		t.Fatal(err)
	}
	meet(t, a, b)
	a.await(3*time.Second, "overlays", func() bool { return len(a.member("b").Overlays) == 2 })
	if m := a.member("b"); m.VTEP != c.VTEP || m.Gossip != b.Gossip() {
		t.Errorf("a sees %v", m)
	}
}

// [::] is heard over IPv4 too, also on a host with IPv6 disabled.
func TestListenOnAll(t *testing.T) {
	t.Parallel()
	for _, listen := range []string{"[::]:0", "0.0.0.0:0"} {
		c := testConfig("a")
		c.Listen = netip.MustParseAddrPort(listen)
		a := start(t, c)
		b := start(t, testConfig("b", a))
		meet(t, a, b)
	}
}

func TestNewRefuses(t *testing.T) {
	t.Parallel()
	a := start(t, testConfig("a"))
	for what, change := range map[string]func(*Config){
		"is in use":             func(c *Config) { c.Listen = a.Gossip() },
		"node name":             func(c *Config) { c.Name = "-x" },
		"set --advertise":       func(c *Config) { c.Advertise = netip.IPv4Unspecified() },
		"without a zone":        func(c *Config) { c.Advertise = netip.MustParseAddr("fe80::1%eth0") },
		"gossip address is mis": func(c *Config) { c.Listen = netip.AddrPort{} },
		"to one family":         func(c *Config) { c.Advertise = netip.IPv6Loopback() },
		"VTEP":                  func(c *Config) { c.VTEP = netip.MustParseAddrPort("192.0.2.1:0") },
		"which is the one":      func(c *Config) { c.VTEP = netip.MustParseAddrPort("192.0.2.1:4789") },
		"cannot join":           func(c *Config) { c.Seeds = []string{"a:b:c"} },
	} {
		c := testConfig("x")
		change(&c)
		d, err := New(c)
		if err == nil {
			d.Close()
			t.Errorf("New accepts what should be refused with %q", what)
		} else if !strings.Contains(err.Error(), what) {
			t.Errorf("New says %q, want %q in it", err, what)
		}
	}
}

func TestRunsOnce(t *testing.T) {
	t.Parallel()
	d, err := New(testConfig("a"))
	if err != nil {
		t.Fatal(err)
	}
	d.Close()
	d.Close()
	if err := d.Run(t.Context()); err == nil {
		t.Error("Run after Close returned no error")
	}
	if d.Flood(1, []byte{1}) {
		t.Error("Flood was taken with no gossip running")
	}
}
