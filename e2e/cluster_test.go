package e2e

import (
	"bytes"
	"net/netip"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/tulle-net/tulle/internal/lab"
)

//	a ──[ul]── b          10.32.0.1 ── blue, VNI 100 ── 10.32.0.2

// pair starts a node on each of two hosts.
func pair(t *testing.T, u lab.Underlay) (*lab.Lab, *lab.Switch, *tulle, *tulle) {
	t.Helper()
	l, sw, h := hosts(t, 2, u)
	a := up(t, l, h[0], "--overlay", overlay(1))
	b := up(t, l, h[1], "--join", seed(sw.Addr(h[0])), "--overlay", overlay(2))
	return l, sw, a, b
}

// seed writes an address as --join takes it.
func seed(a netip.Addr) string { return netip.AddrPortFrom(a, 7946).String() }

func TestTwoHosts(t *testing.T) {
	t.Parallel()
	l, sw, h := hosts(t, 2, lab.Underlay{})
	a := up(t, l, h[0], "--overlay", overlay(1))
	start := time.Now()
	b := up(t, l, h[1], "--join", seed(sw.Addr(h[0])), "--overlay", overlay(2))
	ping(t, h[0], address(2), 3*time.Second)
	t.Logf("first ping %v after the second start", time.Since(start).Round(time.Millisecond))
	if took := time.Since(start); took > 3*time.Second {
		t.Errorf("first ping %v after the second start, want 3 s at most", took)
	}
	// Once more from here, where the neighbour must be resolved through the overlay.
	ping(t, h[1], address(1), time.Second)
	mac, err := h[1].Neighbour("blue0", address(1))
	if err != nil || mac != "02:54:0a:20:00:01" {
		t.Errorf("ARP on b has %q (%v) for 10.32.0.1, want 02:54:0a:20:00:01", mac, err)
	}
	for _, dir := range [][2]*tulle{{a, b}, {b, a}} {
		got := transfer(t, l, dir[0].host, dir[1].host, addressOf(dir[1]), 64<<20)
		t.Logf("TCP %s → %s: %.2f Gbit/s", dir[0].name, dir[1].name, got.BitsPerSecond()/1e9)
	}
	for _, n := range []*tulle{a, b} {
		s := n.status()
		o := s.Overlays[0]
		if o.RxBytes < 64<<20 || o.TxBytes < 64<<20 {
			t.Errorf("%s counts %d bytes out and %d in, want more than 64 MiB each", n.name, o.TxBytes, o.RxBytes)
		}
		for reason, count := range s.Drops {
			if count != 0 && !expected(reason, count) {
				t.Errorf("%s: drop %s = %d, want 0", n.name, reason, count)
			}
		}
		if o.MTU != 1450 {
			t.Errorf("%s: overlay MTU %d, want 1450", n.name, o.MTU)
		}
		if len(n.fdb("blue").Entries) != 2 {
			t.Errorf("%s: FDB %+v, want its own MAC and the other's", n.name, n.fdb("blue").Entries)
		}
	}
}

func addressOf(n *tulle) netip.Addr { return address(int(n.name[0]-'a') + 1) }

func TestLeaveAndCrash(t *testing.T) {
	t.Parallel()
	l, sw, h := hosts(t, 3, lab.Underlay{})
	a := up(t, l, h[0], "--overlay", overlay(1))
	b := up(t, l, h[1], "--join", seed(sw.Addr(h[0])), "--overlay", overlay(2))
	c := up(t, l, h[2], "--join", seed(sw.Addr(h[0])), "--overlay", overlay(3))
	ping(t, h[1], address(3), 5*time.Second)

	// SIGTERM: peers know within 1 s; status 0; nothing is left.
	start := time.Now()
	if err := b.proc.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	a.eventually(time.Second, "b has left", func() bool { return a.sees("b") == "left" && !a.floods(sw.Addr(h[1])) })
	t.Logf("leave seen after %v", time.Since(start).Round(time.Millisecond))
	if err := b.proc.Wait(); err != nil {
		t.Errorf("b ended with %v, want status 0:\n%s", err, b.proc.Log())
	}
	if _, there, err := h[1].Link("blue0"); there || err != nil {
		t.Errorf("blue0 is there after the end of its node (%v)", err)
	}
	if _, err := os.Stat(b.sock); err == nil {
		t.Error("the socket is there after the end of its node")
	}
	b.start()
	a.eventually(5*time.Second, "b is back", func() bool { return a.sees("b") == "alive" })
	ping(t, h[2], address(2), 5*time.Second)

	// kill -9: within 10 s, while the others go on.
	start = time.Now()
	c.proc.Kill()
	<-c.proc.Done()
	eventually(t, time.Second, "the kernel removes blue0", func() bool { _, there, _ := h[2].Link("blue0"); return !there })
	ping(t, h[0], address(2), time.Second)
	a.eventually(10*time.Second, "c has failed", func() bool { return a.sees("c") == "failed" && !a.floods(sw.Addr(h[2])) })
	t.Logf("crash seen after %v", time.Since(start).Round(10*time.Millisecond))
	for _, e := range a.fdb("blue").Entries {
		if e.Peer == "c" {
			t.Errorf("a still has %s at c", e.MAC)
		}
	}
	c.start() // its stale socket is replaced
	ping(t, h[2], address(1), 5*time.Second)

	// The first node, which everybody joined, restarts without seeds of its own.
	a.proc.Kill()
	<-a.proc.Done()
	a.start()
	ping(t, h[0], address(2), 12*time.Second)
	ping(t, h[2], address(1), 12*time.Second)
}

// TestLateSeed: a node retries its join for ever.
func TestLateSeed(t *testing.T) {
	t.Parallel()
	l, sw, h := hosts(t, 2, lab.Underlay{})
	b := up(t, l, h[1], "--join", seed(sw.Addr(h[0])), "--overlay", overlay(2))
	b.eventually(5*time.Second, "says that the seed does not answer", func() bool {
		return strings.Contains(b.proc.Log(), sw.Addr(h[0]).String()) && strings.Contains(b.proc.Log(), "join")
	})
	up(t, l, h[0], "--overlay", overlay(1))
	ping(t, h[1], address(1), 8*time.Second)
}

// TestUnderlays runs the main job on each kind of underlay.
func TestUnderlays(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		u   lab.Underlay
		mtu int
	}{
		"IPv6":                    {lab.Underlay{Prefix6: underlay6}, 1430},
		"IPv4, IPv6 switched off": {lab.Underlay{Prefix4: underlay4, DisableIPv6: true}, 1450},
		"wire":                    {lab.Underlay{Prefix4: underlay4, Offloads: lab.Wire}, 1450},
		"nic":                     {lab.Underlay{Prefix4: underlay4, Offloads: lab.NIC}, 1450},
		"jumbo":                   {lab.Underlay{Prefix4: underlay4, MTU: 9000}, 8950},
	} {
		t.Run(name, func(t *testing.T) {
			l, _, a, b := pair(t, c.u)
			ping(t, a.host, address(2), 5*time.Second)
			transfer(t, l, a.host, b.host, address(2), 16<<20)
			transfer(t, l, b.host, a.host, address(1), 16<<20)
			if got := a.status().Overlays[0].MTU; got != c.mtu {
				t.Errorf("overlay MTU %d, want %d", got, c.mtu)
			}
		})
	}
}

// TestDrivers: every pair of TAP drivers understands each other.
func TestDrivers(t *testing.T) {
	t.Parallel()
	for _, pair := range [][2]string{{"plain", "plain"}, {"plain", "offload"}} {
		t.Run(pair[0]+" "+pair[1], func(t *testing.T) {
			l, sw, h := hosts(t, 2, lab.Underlay{})
			up(t, l, h[0], "--overlay", overlay(1, "driver="+pair[0]))
			up(t, l, h[1], "--join", seed(sw.Addr(h[0])), "--overlay", overlay(2, "driver="+pair[1]))
			ping(t, h[0], address(2), 5*time.Second)
			transfer(t, l, h[0], h[1], address(2), 16<<20)
			transfer(t, l, h[1], h[0], address(1), 16<<20)
		})
	}
}

// TestMTU: the overlay's MTU follows the underlay's; one that cannot fit is refused.
func TestMTU(t *testing.T) {
	t.Parallel()
	l, sw, a, b := pair(t, lab.Underlay{})
	ping(t, a.host, address(2), 5*time.Second)
	for _, mtu := range []int{1400, 1500} {
		for _, n := range []*tulle{a, b} {
			if err := n.host.SetMTU(sw.Dev(), mtu); err != nil {
				t.Fatal(err)
			}
		}
		for _, n := range []*tulle{a, b} {
			n.eventually(3*time.Second, "follows the underlay's MTU", func() bool { return n.status().Overlays[0].MTU == mtu-50 })
			if link, _, err := n.host.Link("blue0"); err != nil || link.MTU != mtu-50 {
				t.Errorf("%s: the device's MTU is %d (%v), want %d", n.name, link.MTU, err, mtu-50)
			}
		}
		transfer(t, l, a.host, b.host, address(2), 4<<20)
	}
	out, err := a.host.Run(t.Context(), binary, "up", "--name", "x", "--listen", ":4999", "--gossip", ":7999", "--state-dir", l.Dir()+"/x", "--socket", l.Dir()+"/x.sock",
		"--overlay", "name=big,vni=7,encryption=none,tap=big0,mtu=1500")
	if err == nil || !strings.Contains(out, "1450") || !strings.Contains(out, "50") {
		t.Errorf("mtu=1500 on an underlay of 1500: %v, %q: want a refusal with the arithmetic", err, out)
	}
	if _, there, _ := a.host.Link("big0"); there {
		t.Error("a refused start left its device behind")
	}
}

// TestNetns: the TAP is handed to a namespace by path, and ends with it.
func TestNetns(t *testing.T) {
	t.Parallel()
	l, sw, h := hosts(t, 2, lab.Underlay{})
	inner, err := l.AddHost("inner")
	if err != nil {
		t.Fatal(err)
	}
	a := up(t, l, h[0], "--overlay", overlay(1, "netns="+inner.Path()))
	up(t, l, h[1], "--join", seed(sw.Addr(h[0])), "--overlay", overlay(2))
	ping(t, inner, address(2), 5*time.Second)
	transfer(t, l, h[1], inner, address(1), 16<<20)
	if _, there, _ := h[0].Link("blue0"); there {
		t.Error("the device is still in the node's namespace")
	}
	if got := a.status().Overlays[0].MTU; got != 1450 {
		t.Errorf("MTU %d, want 1450", got)
	}
}

// TestConflicts: one name with two VNIs, one VNI with two names, one node name twice.
func TestConflicts(t *testing.T) {
	t.Parallel()
	l, sw, h := hosts(t, 4, lab.Underlay{})
	a := up(t, l, h[0], "--overlay", overlay(1))
	b := up(t, l, h[1], "--join", seed(sw.Addr(h[0])), "--overlay", "name=blue,vni=200,encryption=none,address=10.32.0.2/16,tap=blue0")
	c := up(t, l, h[2], "--join", seed(sw.Addr(h[0])), "--overlay", "name=red,vni=100,encryption=none,address=10.32.0.3/16,tap=red0")
	says := func(n *tulle, words ...string) {
		t.Helper()
		n.eventually(5*time.Second, "names the conflict: "+strings.Join(words, " "), func() bool {
			for _, c := range n.status().Node.Conflicts {
				all := true
				for _, w := range words {
					all = all && strings.Contains(c, w)
				}
				if all {
					return true
				}
			}
			return false
		})
	}
	says(a, "blue", "100", "200", "node a", "node b")
	says(b, "blue", "100", "200", "node a", "node b")
	says(a, "VNI 100", "blue", "red", "node c")
	says(c, "VNI 100", "blue", "red", "node a")
	noPing(t, h[2], address(1), 500*time.Millisecond)
	if got := a.status().Drops["overlay_conflict"]; got != 0 {
		t.Logf("a dropped %d frames of c", got) // c does not even send: its flood list is empty
	}
	// A fourth host takes the name a.
	p, err := h[3].Start(exec.Command(binary, "up", "--name", "a", "--join", seed(sw.Addr(h[0])), "--state-dir", l.Dir()+"/d", "--socket", l.Dir()+"/d.sock", "--overlay", overlay(4)))
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, 5*time.Second, "the second a is told whose its name is", func() bool {
		return strings.Contains(p.Log(), sw.Addr(h[0]).String()) && strings.Contains(p.Log(), "--name")
	})
	if a.sees("b") != "alive" {
		t.Error("a lost b")
	}
}

// TestManyOverlays: which node carries which VNI reaches every node, though
// tags hold 512 bytes.
func TestManyOverlays(t *testing.T) {
	t.Parallel()
	l, sw, h := hosts(t, 2, lab.Underlay{})
	const count = 1000
	var file bytes.Buffer
	file.WriteString("overlays:\n")
	for i := range count {
		// A kernel device each would take minutes; the plain ones do.
		file.WriteString("  - {name: o" + strconv.Itoa(i) + ", vni: " + strconv.Itoa(1000+i) + ", encryption: none, tap: o" + strconv.Itoa(i) + "}\n")
	}
	conf := l.Dir() + "/many.yaml"
	if err := os.WriteFile(conf, file.Bytes(), 0o600); err != nil {
		t.Fatal(err)
	}
	start := time.Now()
	up(t, l, h[0], "--config", conf)
	t.Logf("%d overlays are up after %v", count, time.Since(start).Round(10*time.Millisecond))
	b := up(t, l, h[1], "--join", seed(sw.Addr(h[0])), "--overlay", "name=o999,vni=1999,encryption=none,tap=o999")
	b.eventually(5*time.Second, "floods overlay 1999 to a", func() bool { return b.floods(sw.Addr(h[0])) })
}
