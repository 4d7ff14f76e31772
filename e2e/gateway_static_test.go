package e2e

import (
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/tulle-net/tulle/internal/lab"
	"github.com/tulle-net/tulle/node"
)

//	e ··[blue]·· a ──[ul]── x      a's own device in blue is the gateway of e, whose
//	             └── b ─┘          device is a static one of b's, in a namespace

// TestStaticGateway: a host is the gateway of a static overlay at its own address.
func TestStaticGateway(t *testing.T) {
	t.Parallel()
	l, sw, h := hosts(t, 3, lab.Underlay{Prefix4: underlay4})
	e := containers(t, l, "e")[0]
	a := up(t, l, h[0], "--overlay", overlay(1, "gateway=true"), "--overlay", "name=red,vni=101,encryption=none,tap=red0,address=10.33.0.1/16")
	b := up(t, l, h[1], "--join", sw.Addr(h[0]).String(), "--overlay", overlay(2, "netns="+e.Path()), "--overlay", "name=red,vni=101,encryption=none,tap=red0,address=10.33.0.2/16")
	telling(t, h[2], 7000)
	telling(t, e, 7000)
	telling(t, h[1], 7003)
	at := port(sw.Addr(h[2]), 7000)
	ping(t, e, address(1), 10*time.Second)
	if _, err := told(e, "tcp", at, time.Second); err == nil {
		t.Error("without a route there is an answer")
	}
	if err := e.AddRoute(netip.MustParsePrefix("0.0.0.0/0"), address(1)); err != nil {
		t.Fatal(err)
	}
	wantTold(t, e, "tcp", at, sw.Addr(h[0]))
	wantTold(t, e, "udp", at, sw.Addr(h[0]))
	wantTold(t, h[0], "tcp", port(address(2), 7000), address(1))
	// The host has another overlay, without a gateway: that is somebody else's.
	ping(t, h[1], netip.MustParseAddr("10.33.0.1"), 10*time.Second)
	wantSilence(t, e, "tcp", netip.MustParseAddrPort("10.33.0.2:7003"))
	runIn(t, h[1], "ip", "route", "add", "10.32.0.0/16", "via", "10.33.0.1")
	wantSilence(t, h[1], "tcp", port(address(2), 7000))
	if g := a.gateway("blue"); g == nil || !g.Up || g.Device != "blue0" || a.gateway("red") != nil {
		t.Errorf("gateway of blue: %+v, of red: %+v", g, a.gateway("red"))
	}
	b.stop()
	a.stop()
	if rules := ruleset(t, h[0]); rules != "" {
		t.Errorf("left after the stop:\n%s", rules)
	}
}

// TestGatewayRefused: a node that may not change its host's settings, as in a
// container, is no gateway, says so, and its overlays work.
func TestGatewayRefused(t *testing.T) {
	t.Parallel()
	l, sw, h := hosts(t, 2, lab.Underlay{Prefix4: underlay4})
	program := []string{"unshare", "--mount", "--propagation", "slave", "sh", "-c", `mount --bind /proc/sys /proc/sys && mount -o remount,bind,ro /proc/sys && exec "$0" "$@"`, binary}
	a := upAs(t, l, h[0], program)
	c := containers(t, l, "c1", "c2", "c3")
	a.do("overlay", "create", "blue", "--subnet", "10.32.0.0/16", "--gateway", "true")
	a.attaches("blue", "--netns", c[0].Path())
	at := a.attaches("blue", "--netns", c[1].Path())
	ping(t, c[0], at.Addr(), 5*time.Second)
	if g := a.gateway("blue"); g == nil || g.Up || !strings.Contains(g.Error, "sysctl -w net/ipv4/ip_forward=1") {
		t.Errorf("gateway: %+v", g)
	}
	a.refuses([]string{"8080:80/tcp", "sysctl -w net/ipv4/ip_forward=1"}, "attach", "blue", "--netns", c[2].Path(), "--publish", "8080:80")
	a.refuses([]string{"8080:80/tcp", "default route already"}, "attach", "blue", "--netns", c[1].Path(), "--ifname", "eth1", "--publish", "8080:80")
	if list := a.attached(func(node.Endpoint) bool { return true }); len(list) != 2 {
		t.Errorf("left of what was refused: %+v", list)
	}
	if rules := ruleset(t, h[0]); rules != "" {
		t.Errorf("half of it is there:\n%s", rules)
	}
	if _, there, _ := h[0].Link("tg-blue"); there {
		t.Error("half of it is there: tg-blue")
	}
	if status, checks, _ := a.doctor(); status != 1 || checks["gateway"].Result != "failed" {
		t.Errorf("doctor: %d, %+v", status, checks["gateway"])
	}
	// Whoever may does it, and all is well.
	if err := h[0].Sysctl("net/ipv4/ip_forward", "1"); err != nil {
		t.Fatal(err)
	}
	a.do("overlay", "set", "blue", "--reserve", "10.32.0.0/24") // or within 10 s
	a.eventually(5*time.Second, "it is a gateway", func() bool { g := a.gateway("blue"); return g != nil && g.Up })
	telling(t, h[1], 7000)
	wantTold(t, c[0], "tcp", port(sw.Addr(h[1]), 7000), sw.Addr(h[0]))
	if _, checks, _ := a.doctor(); checks["gateway"].Result != "ok" {
		t.Errorf("doctor: %+v", checks["gateway"])
	}
	a.stop()
	if f := forwards(t, h[0]); f[0] != '1' || ruleset(t, h[0]) != "" {
		t.Errorf("after the stop forwarding is %s, rules are %q", f, ruleset(t, h[0]))
	}
}
