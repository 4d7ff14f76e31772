package e2e

import (
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/tulle-net/tulle/internal/lab"
	"github.com/tulle-net/tulle/node"
)

//	a (keeper) ──┐
//	b ───────────┼─[ul]── c's address is taken away and another one is given, as DHCP and a change of network do
//	c ───────────┘

// TestSecureAddressChange: the node is back for everybody within 10 s, and what
// flowed in the sealed overlay flows on.
func TestSecureAddressChange(t *testing.T) {
	t.Parallel()
	_, sw, nodes, _ := secureCluster(t, 3, 0)
	reachable(t, 10*time.Second, nodes...)
	a, c := nodes[0], nodes[2]
	stop := watchPings(t, c.host)
	mac := c.status().Overlays[0].MAC
	for i, to := range []string{"192.168.77.203", "192.168.77.204"} {
		time.Sleep(500 * time.Millisecond) // pings pass
		was, now := sw.Addr(c.host), netip.MustParseAddr(to)
		if i > 0 {
			was = netip.MustParseAddr("192.168.77.203")
		}
		start := time.Now()
		if err := c.host.DelAddr("ul", netip.PrefixFrom(was, 24)); err != nil {
			t.Fatal(err)
		}
		time.Sleep(500 * time.Millisecond) // a new network takes its time
		if err := c.host.AddAddr("ul", netip.PrefixFrom(now, 24)); err != nil {
			t.Fatal(err)
		}
		for _, n := range nodes[:2] {
			n.eventually(15*time.Second, "has c at "+to, func() bool { return n.sees("c") == "alive" && n.vtepOf("c").Addr() == now })
			ping(t, n.host, address(3), 10*time.Second)
			ping(t, c.host, address(1), 10*time.Second)
		}
		took := time.Since(start)
		t.Logf("%s → %s: back for everybody, traffic too, %v after the old address went", was, now, took.Round(time.Millisecond))
		if took > 10*time.Second {
			t.Errorf("it took %v, want 10s or less", took)
		}
	}
	time.Sleep(500 * time.Millisecond)
	answered, longest := stop()
	if answered < 20 {
		t.Errorf("%d pings answered in all", answered)
	}
	t.Logf("%d pings answered in all, the longest gap %v", answered, longest.Round(time.Millisecond))
	if got := c.status().Overlays[0].MAC; got != mac {
		t.Errorf("c's MAC was %s and is %s", mac, got)
	}
	for _, n := range nodes[:2] {
		if got := n.names(); got != 2 {
			t.Errorf("%s lists %d peers, want 2", n.name, got)
		}
	}
	// What the moved node is now outlives a restart of the others.
	a.kill()
	a.start()
	meet(t, 15*time.Second, nodes...)
	reachable(t, 10*time.Second, nodes...)
}

// TestSecureAddressChangeFlow: a TCP connection in the sealed overlay outlives
// the change of its end's underlay address.
func TestSecureAddressChangeFlow(t *testing.T) {
	t.Parallel()
	l, _, nodes, _ := secureCluster(t, 2, 0)
	reachable(t, 10*time.Second, nodes...)
	b := nodes[1]
	type result struct {
		got lab.Transferred
		err error
	}
	done := make(chan result, 1)
	go func() {
		got, err := l.Transfer(t.Context(), nodes[0].host, b.host, netip.AddrPortFrom(address(2), 0), lab.Amount{For: 8 * time.Second})
		done <- result{got, err}
	}()
	time.Sleep(time.Second)
	if err := b.host.DelAddr("ul", netip.MustParsePrefix("192.168.77.2/24")); err != nil {
		t.Fatal(err)
	}
	if err := b.host.AddAddr("ul", netip.MustParsePrefix("192.168.77.99/24")); err != nil {
		t.Fatal(err)
	}
	r := <-done
	if r.err != nil {
		t.Fatalf("the connection did not outlive it: %v", r.err)
	}
	t.Logf("%d MiB at %.0f Mbit/s, the change included", r.got.Bytes>>20, r.got.BitsPerSecond()/1e6)
}

// vtepOf is where n has a peer.
func (n *tulle) vtepOf(peer string) netip.AddrPort {
	n.t.Helper()
	var p node.Peers
	if err := n.try("/v1/peers", &p); err != nil {
		n.t.Fatal(err)
	}
	for _, m := range p.Peers {
		if m.Name == peer {
			return m.VTEP
		}
	}
	return netip.AddrPort{}
}

// names is how many peers n lists.
func (n *tulle) names() int {
	n.t.Helper()
	var p node.Peers
	if err := n.try("/v1/peers", &p); err != nil {
		n.t.Fatal(err)
	}
	return len(p.Peers)
}

// TestSecureKeeperMoves: a keeper whose address changes is a member of the store at
// the new one.
func TestSecureKeeperMoves(t *testing.T) {
	t.Parallel()
	_, sw, nodes, _ := secureCluster(t, 3, 0)
	meet(t, 10*time.Second, nodes...)
	a, b, c := nodes[0], nodes[1], nodes[2]
	a.do("node", "promote", "b")
	a.do("node", "promote", "c")
	was, now := sw.Addr(c.host), netip.MustParseAddr("192.168.77.203")
	if err := c.host.DelAddr("ul", netip.PrefixFrom(was, 24)); err != nil {
		t.Fatal(err)
	}
	if err := c.host.AddAddr("ul", netip.PrefixFrom(now, 24)); err != nil {
		t.Fatal(err)
	}
	start := time.Now()
	a.eventually(60*time.Second, "the store has c at its new address", func() bool {
		var s node.StoreStatus
		if err := a.try("/v1/store", &s); err != nil {
			return false
		}
		for _, m := range s.Members {
			if m.Name == "c" {
				return strings.Contains(m.Address, now.String()) && m.Healthy
			}
		}
		return false
	})
	t.Logf("the store has it %v after the change", time.Since(start).Round(time.Millisecond))
	b.proc.Kill() // now nothing goes without c
	a.eventually(30*time.Second, "a change is made by the two that are left", func() bool {
		status, _, _ := a.command("overlay", "create", "green")
		return status == 0
	})
}
