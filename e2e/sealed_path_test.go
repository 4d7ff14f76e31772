package e2e

import (
	"context"
	"net/netip"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/tulle-net/tulle/internal/lab"
	"github.com/tulle-net/tulle/internal/lab/labtest"
	"github.com/tulle-net/tulle/node"
)

//	a ──[ul]── r ──[vl, MTU 1400]── b       a and b cannot see that the way between them is narrower than their devices
//
// A path that is smaller than the devices say, with and without the ICMP that
// tells of it; and a device that loses trains.

// narrow makes a sealed cluster of two hosts behind a router whose far side has
// MTU 1400. black: the router tells nobody.
func narrow(t *testing.T, black bool) *sealed {
	t.Helper()
	l := labtest.New(t)
	var h []*lab.Host
	for _, name := range []string{"a", "b", "r"} {
		x, err := l.AddHost(name)
		if err != nil {
			t.Fatal(err)
		}
		h = append(h, x)
	}
	near, err := l.AddSwitch("ul", lab.Underlay{Prefix4: underlay4, Cable: true}, h[0], h[2])
	if err != nil {
		t.Fatal(err)
	}
	far, err := l.AddSwitch("vl", lab.Underlay{Prefix4: netip.MustParsePrefix("192.168.78.0/24"), Cable: true}, h[1], h[2])
	if err != nil {
		t.Fatal(err)
	}
	if err := h[2].Sysctl("net/ipv4/ip_forward", "1"); err != nil {
		t.Fatal(err)
	}
	anywhere := netip.MustParsePrefix("0.0.0.0/0")
	for i, via := range []netip.Addr{near.Addr(h[2]), far.Addr(h[2])} {
		if err := h[i].AddRoute(anywhere, via); err != nil {
			t.Fatal(err)
		}
	}
	runIn(t, h[2], "ip", "link", "set", "vl", "mtu", "1400")
	if black {
		nft(t, h[2], "table ip t {\n chain o {\n  type filter hook output priority 0\n  icmp type destination-unreachable drop\n }\n}\n")
	}
	s := &sealed{t: t, l: l, sw: near}
	s.start(h[0], sealedOverlay(1))
	s.start(h[1], sealedOverlay(2))
	ping(t, h[0], address(2), 10*time.Second)
	return s
}

func nft(t *testing.T, h *lab.Host, rules string) {
	t.Helper()
	cmd := exec.Command("nft", "-f", "-")
	cmd.Stdin = strings.NewReader(rules)
	p, err := h.Start(cmd)
	if err == nil {
		err = p.Wait()
	}
	if err != nil {
		t.Fatalf("nft: %v\n%s", err, rules)
	}
}

// pathMTU is what n knows of the way to a peer.
func (n *tulle) pathMTU(peer string) int {
	n.t.Helper()
	var p node.Peers
	if err := n.try("/v1/peers", &p); err != nil {
		n.t.Fatal(err)
	}
	for _, m := range p.Peers {
		if m.Name == peer {
			return m.PathMTU
		}
	}
	return 0
}

// tooBig pings with packets of the overlay's full MTU that must not be fragmented,
// and returns what ping said.
func tooBig(t *testing.T, h *lab.Host) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	out, _ := h.Run(ctx, "ping", "-M", "do", "-s", "1390", "-c", "3", "-i", "0.2", "-W", "1", address(2).String()) // none is answered: it fails
	return out
}

// TestPathMTU: where the router tells, the overlay's MTU follows at once.
func TestPathMTU(t *testing.T) {
	t.Parallel()
	s := narrow(t, false)
	a := s.nodes[0]
	tooBig(t, a.host)
	a.eventually(3*time.Second, "its MTU fits the path", func() bool { return a.status().Overlays[0].MTU == 1318 })
	if out := tooBig(t, a.host); !strings.Contains(out, "mtu=1318") {
		t.Errorf("a packet that is too big, and its sender hears nothing:\n%s", out)
	}
	transfer(t, s.l, a.host, s.nodes[1].host, address(2), 16<<20)
	transfer(t, s.l, s.nodes[1].host, a.host, address(1), 16<<20)
}

// TestPathMTUBlackHole: where nobody tells, probes over the session find the
// path, and the sender gets its answer from within the overlay.
func TestPathMTUBlackHole(t *testing.T) {
	t.Parallel()
	s := narrow(t, true)
	a := s.nodes[0]
	start := time.Now()
	a.eventually(20*time.Second, "it knows the path", func() bool {
		tooBig(t, a.host) // only paths that are used are searched
		got := a.pathMTU("b")
		return got >= 1380 && got <= 1400
	})
	t.Logf("found after %v: %d", time.Since(start).Round(time.Millisecond), a.pathMTU("b"))
	runIn(t, a.host, "ip", "route", "flush", "cache")
	if out := tooBig(t, a.host); !strings.Contains(out, "Frag needed") && !strings.Contains(out, "mtu=13") {
		t.Errorf("a packet that is too big, and its sender hears nothing:\n%s", out)
	}
	if a.dropped("path_mtu") == 0 {
		t.Error("path_mtu = 0")
	}
	transfer(t, s.l, a.host, s.nodes[1].host, address(2), 16<<20)
}

// TestTrainsLost: a device that says that it sends trains, and loses them. What
// arrived is told by the peer; without trains everything does.
func TestTrainsLost(t *testing.T) {
	t.Parallel()
	s := sealedCluster(t, 2, lab.Underlay{})
	s.meet()
	a, b := s.nodes[0], s.nodes[1]
	nft(t, a.host, "table netdev t {\n chain e {\n  type filter hook egress device ul priority 0\n  udp dport 4789 meta length > 1600 drop\n }\n}\n")
	start := time.Now()
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Second)
	defer cancel()
	got, err := s.l.Transfer(ctx, a.host, b.host, netip.AddrPortFrom(address(2), 0), lab.Amount{Bytes: 256 << 20})
	if err != nil {
		t.Fatalf("after %v: %v", time.Since(start), err)
	}
	t.Logf("%d MB in %v over a device that loses trains", got.Bytes>>20, time.Since(start).Round(time.Millisecond))
}
