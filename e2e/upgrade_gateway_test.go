package e2e

import (
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/tulle-net/tulle/internal/lab"
)

//	a ──[ul]── x        a1 is on a's overlay, x is outside, and stands for the Internet
//	│
//	a3 a2 a1

// TestUpgradeGateway: what endpoints have with hosts outside goes on, too, when their
// node is upgraded, and who calls a published port afterwards is answered. The
// overlay's first endpoint has no Ethernet, and its gateway has one all the same.
func TestUpgradeGateway(t *testing.T) {
	t.Parallel()
	l, sw, h := hosts(t, 2, lab.Underlay{Prefix4: underlay4, Offloads: lab.Wire})
	nodes := joined(t, l, h[:1], nil)
	a, x := nodes[0], h[1]
	c := containers(t, l, "a1", "a2", "a3")
	a1, a2, a3 := c[0], c[1], c[2]
	a.do("overlay", "create", "blue", "--subnet", "10.32.0.0/16", "--gateway", "true")
	a.attaches("blue", "--netns", a2.Path(), "--driver", "tun")
	a.attaches("blue", "--netns", a1.Path(), "--publish", "8080:7000")
	telling(t, a1, 7000)
	telling(t, x, 7000)
	wantTold(t, a2, "tcp", port(sw.Addr(x), 7000), sw.Addr(h[0]))
	out := streams(t, a1, x, sw.Addr(x))
	wantTold(t, x, "tcp", port(sw.Addr(h[0]), 8080), sw.Addr(x))
	for range 2 {
		pause()
		out.longest()
		if status, text, errs := a.tries(); status != 0 {
			t.Fatalf("upgrade: status %d: %s%s", status, text, errs)
		}
		gap := out.longest()
		t.Logf("the longest gap of a connection through the gateway: %v", gap)
		if gap >= time.Second {
			t.Errorf("a connection through the gateway stood still for %v, want less than 1 s", gap)
		}
		wantTold(t, x, "tcp", port(sw.Addr(h[0]), 8080), sw.Addr(x))
		wantTold(t, a2, "tcp", port(sw.Addr(x), 7000), sw.Addr(h[0]))
		if rules := ruleset(t, h[0]); strings.Count(rules, "table ip tulle-") != 1 {
			t.Errorf("not one table:\n%s", rules)
		}
	}
	if forwards(t, h[0])[0] != '1' {
		t.Error("a does not forward")
	}
	// Routes that somebody has removed come back.
	runIn(t, h[0], "ip", "route", "flush", "dev", "tg-blue")
	a.eventually(15*time.Second, "the route to a1 is there again", func() bool {
		return strings.Count(runIn(t, h[0], "ip", "route", "show", "dev", "tg-blue"), "\n") == 2
	})
	wantTold(t, x, "tcp", port(sw.Addr(h[0]), 8080), sw.Addr(x))
	// One that loses its device and has got another default route does without.
	a.attaches("blue", "--netns", a3.Path())
	runIn(t, a3, "ip", "link", "add", "own0", "type", "veth", "peer", "name", "own1")
	runIn(t, a3, "ip", "link", "set", "own0", "up")
	runIn(t, a3, "ip", "route", "replace", "default", "dev", "own0")
	runIn(t, a3, "ip", "link", "del", "eth0")
	a.eventually(15*time.Second, "the endpoint is up again, and has yielded", func() bool {
		list := a.attached(isNamed(filepath.Base(a3.Path())))
		return len(list) == 1 && list[0].Up && !list[0].DefaultRoute
	})
	a.stop()
	if rules := ruleset(t, h[0]); rules != "" {
		t.Errorf("rules are left: %s", rules)
	}
	if forwards(t, h[0])[0] != '0' {
		t.Error("a forwards still")
	}
}
