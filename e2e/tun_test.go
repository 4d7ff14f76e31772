package e2e

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/tulle-net/tulle/ether"
	"github.com/tulle-net/tulle/internal/lab"
	"github.com/tulle-net/tulle/node"
)

//	a (tulle, driver=tun) ──[ul]── b (the kernel's vxlan device)
//	10.32.0.1  blue0 (a TUN) ───── vx0  10.32.0.2              VNI 100

// TestTunKernelVTEP: a host without Ethernet and the kernel's Ethernet do all that
// hosts do.
func TestTunKernelVTEP(t *testing.T) {
	t.Parallel()
	for _, offloads := range []lab.Offloads{lab.Virtual, lab.Wire} {
		t.Run(fmt.Sprint("offloads ", offloads), func(t *testing.T) {
			l, sw, h := hosts(t, 2, lab.Underlay{Prefix4: underlay4, Offloads: offloads})
			kernelVTEP(t, h[1], 2, 1450, lab.VXLAN{Local: sw.Addr(h[1]), Remote: sw.Addr(h[0])})
			a := up(t, l, h[0], "--overlay", overlay(1, "driver=tun", "peer="+sw.Addr(h[1]).String()))
			if out := runIn(t, h[0], "ip", "-d", "link", "show", "blue0"); !strings.Contains(out, "tun type tun") || !strings.Contains(out, "link/none") {
				t.Fatalf("blue0 is no device of layer 3: %s", out)
			}
			o := a.status().Overlays[0]
			if taps := a.status().Offloads.Taps; taps["blue0"].Driver != "tun" || o.MAC != ether.MACOf(address(1)) || o.MTU != 1450 {
				t.Errorf("status has %+v, MAC %s, MTU %d", taps["blue0"], o.MAC, o.MTU)
			}
			tunResolve(t, a, h[1])
			traffic(t, l, a, h[1], 1450)
			tunMoves(t, a, h[1])
		})
	}
}

// tunResolve has each end find the other.
func tunResolve(t *testing.T, a *tulle, b *lab.Host) {
	t.Helper()
	asked := watch(t, b, "vx0", asksFor(address(2)))
	t.Logf("the first ping is answered after %v", ping(t, a.host, address(2), 5*time.Second))
	if asked(time.Second) == nil {
		t.Error("no ARP request of a arrived at the kernel's device")
	}
	runIn(t, b, "ip", "neigh", "flush", "dev", "vx0")
	ping(t, b, address(1), 5*time.Second)
	if mac, err := b.Neighbour("vx0", address(1)); mac != "02:54:0a:20:00:01" {
		t.Errorf("b resolved %s to %q (%v), want 02:54:0a:20:00:01", address(1), mac, err)
	}
	// Nothing of it reaches the host, which has no neighbours.
	if out := runIn(t, a.host, "ip", "neigh", "show", "dev", "blue0"); strings.Contains(out, "lladdr") {
		t.Errorf("a's kernel has neighbours: %s", out)
	}
}

// tunMoves has the kernel's device change its MAC, take an address of a's, and be away.
func tunMoves(t *testing.T, a *tulle, b *lab.Host) {
	t.Helper()
	runIn(t, b, "sysctl", "-q", "-w", "net.ipv4.conf.vx0.arp_notify=1")
	ping(t, a.host, address(2), 5*time.Second)
	runIn(t, b, "ip", "link", "set", "vx0", "address", "02:00:00:00:00:99") // and it says so
	took := ping(t, a.host, address(2), 5*time.Second)
	t.Logf("with its new MAC it answers after %v", took)
	if took > 2*time.Second {
		t.Errorf("with its new MAC it answers after %v, want what a gratuitous ARP brings", took)
	}
	ll := ether.LinkLocal(ether.MACOf(address(1))).String()
	ping6(t, b, ll+"%vx0")
	// The lab has switched the search for duplicates off.
	runIn(t, b, "sysctl", "-q", "-w", "net.ipv6.conf.all.accept_dad=1", "net.ipv6.conf.vx0.accept_dad=1", "net.ipv6.conf.vx0.dad_transmits=1")
	runIn(t, b, "ip", "addr", "add", ll+"/64", "dev", "vx0")
	a.eventually(5*time.Second, "b finds the duplicate address", func() bool {
		return strings.Contains(runIn(t, b, "ip", "-6", "addr", "show", "dev", "vx0", "dadfailed"), ll)
	})
	noPing(t, a.host, netip.MustParseAddr("10.32.0.3"), 3500*time.Millisecond)
	a.eventually(2*time.Second, "who does not answer is counted", func() bool { return a.status().Drops["tun_unreachable"] > 0 })
}

// ping6 pings an address with a zone.
func ping6(t *testing.T, h *lab.Host, addr string) {
	t.Helper()
	runIn(t, h, "ping", "-6", "-c", "1", "-W", "5", addr)
}

//	a (a TUN) ──[ul]── b (a TAP)
//	    │
//	   a1 (a TUN in its namespace)

// TestTunShared: in a shared overlay, by `tulle expose` and `tulle attach`, with both
// families, over a restart, and when the device is deleted.
func TestTunShared(t *testing.T) {
	t.Parallel()
	l, _, h := hosts(t, 2, lab.Underlay{Prefix4: underlay4, Offloads: lab.Wire})
	nodes := joined(t, l, h, nil)
	a, b := nodes[0], nodes[1]
	a1 := containers(t, l, "a1")[0]
	a.do("overlay", "create", "blue", "--subnet", "10.32.0.0/16", "--subnet", "fd32::/64")
	known(t, 5*time.Second, "blue", true, nodes...)
	if status, _, stderr := a.command("expose", "blue", "--driver", "water"); status != 2 || !strings.Contains(stderr, "auto, offload, plain or tun") {
		t.Errorf("a driver that there is not: status %d, %s", status, stderr)
	}
	at := a.exposes("blue", "--driver", "tun")
	to := b.exposes("blue")
	in := strings.Fields(a.do("attach", "blue", "--netns", a1.Path(), "--name", "one", "--driver", "tun"))
	if len(at) != 2 || len(to) != 2 || len(in) != 2 {
		t.Fatalf("addresses %v, %v, %v, want two each", at, to, in)
	}
	a.refuses([]string{"with the driver tun", "tulle unexpose"}, "expose", "blue", "--driver", "offload")
	check := func(within time.Duration) {
		t.Helper()
		for i := range at {
			ping(t, h[0], to[i].Addr(), within)
			ping(t, h[1], at[i].Addr(), within)
			ping(t, a1, to[i].Addr(), within)
			ping(t, a1, at[i].Addr(), within) // on one node
		}
		taps := a.status().Offloads.Taps
		if len(taps) != 2 || taps["blue"].Driver != "tun" || taps["one"].Driver != "tun" {
			t.Errorf("offloads are %+v, want those of two TUNs", taps)
		}
	}
	check(10 * time.Second)
	for i := range at {
		transfer(t, l, h[0], h[1], to[i].Addr(), 8<<20)
		transfer(t, l, h[1], h[0], at[i].Addr(), 8<<20)
		transfer(t, l, a1, h[0], at[i].Addr(), 8<<20)
	}
	if err := dfPing(t, h[0], to[0].Addr(), 1418); err != nil {
		t.Errorf("a packet of the MTU: %v", err)
	}
	bulk(t, h[0], h[1], to[0].Addr(), 64, 1300, 8000)
	intact(t, h[0], h[1], a1)
	for reason, n := range a.status().Drops {
		if strings.HasPrefix(reason, "tun_") && n > 0 {
			t.Errorf("drop %s = %d, want 0", reason, n)
		}
	}

	if err := h[0].DelLink("blue"); err != nil {
		t.Fatal(err)
	}
	a.eventually(2*time.Second, "the device is made again", func() bool {
		link, there, err := h[0].Link("blue")
		return err == nil && there && link.Up && slices.Contains(link.Addrs, at[0])
	})
	check(5 * time.Second)

	untoken(a)
	a.proc.Kill()
	<-a.proc.Done()
	a.start()
	check(10 * time.Second)
	for _, e := range get[node.Endpoints](a, "/v1/endpoints?local=true").Endpoints {
		if !e.Up || e.Driver != "tun" {
			t.Errorf("endpoint %+v, want it up with the driver tun", e)
		}
	}
}
