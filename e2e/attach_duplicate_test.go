package e2e

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/tulle-net/tulle/internal/lab"
	"github.com/tulle-net/tulle/node"
)

//	a ──┬─[ul]─┬── b
//	    │      │
//	 a1 a2 a3  b1       b1 takes addresses that nobody gave it

// TestAttachDuplicate: an address that a station has without having asked is not
// given to another one, and who has it is named.
func TestAttachDuplicate(t *testing.T) {
	t.Parallel()
	l, _, h := hosts(t, 2, lab.Underlay{Prefix4: underlay4, Offloads: lab.Wire})
	nodes := joined(t, l, h, nil)
	a, b := nodes[0], nodes[1]
	c := containers(t, l, "a1", "a2", "a3", "b1")
	a1, a2, a3, b1 := c[0], c[1], c[2], c[3]
	take := func(dev string, p netip.Prefix) {
		t.Helper()
		if err := b1.AddAddr(dev, p); err != nil {
			t.Fatal(err)
		}
	}
	name := func(h *lab.Host) string { return h.Path()[strings.LastIndexByte(h.Path(), '/')+1:] }
	a.do("overlay", "create", "blue", "--subnet", "10.32.0.0/16")
	a.do("overlay", "create", "six", "--subnet", "fd40::/64")
	known(t, 5*time.Second, "six", true, nodes...)

	at1 := a.attaches("blue", "--netns", a1.Path())
	atB := b.attaches("blue", "--netns", b1.Path())
	mac := b.attached(isNamed(name(b1)))[0].MAC.String()
	ping(t, a1, atB.Addr(), 10*time.Second)
	var taken []netip.Prefix
	for ip := at1.Addr(); len(taken) < 3; { // fewer than an attach passes over
		ip = ip.Next()
		taken = append(taken, netip.PrefixFrom(ip, at1.Bits()))
		take("eth0", taken[len(taken)-1])
	}

	// Asked for, one is refused.
	used := a.used("blue")
	a.refuses([]string{taken[0].Addr().String(), mac, "--ip"}, "attach", "blue", "--netns", a2.Path(), "--ip", taken[0].Addr().String())
	if now := a.used("blue"); now != used || len(a.attached(isNamed(name(a2)))) != 0 {
		t.Errorf("after it was refused %d addresses are used, %d before", now, used)
	}
	// Not asked for, they are passed over, unless the answer is late: then it is told.
	told := func(of *lab.Host, words ...string) {
		t.Helper()
		a.eventually(10*time.Second, fmt.Sprintf("it is told that %v", words), func() bool {
			list := a.attached(isNamed(name(of)))
			return len(list) == 1 && list[0].Up && !slices.ContainsFunc(words, func(w string) bool { return !strings.Contains(list[0].Error, w) })
		})
	}
	var at2 netip.Prefix
	for range 10 {
		if at2 = a.attaches("blue", "--netns", a2.Path()); !slices.Contains(taken, at2) {
			break
		}
		told(a2, at2.Addr().String(), mac)
		a.do("detach", "blue", "--netns", a2.Path())
	}
	if slices.Contains(taken, at2) {
		t.Errorf("a2 has %v, and b1 %v", at2, taken)
	}
	t.Logf("passed over: %d of %v", strings.Count(a.proc.Log(), "another address is taken"), taken)
	ping(t, a2, atB.Addr(), 10*time.Second)

	// Linux answers for any address that it has, by any of its devices: a namespace that
	// gets a second one while the first is still asked for is no other station.
	a.attaches("blue", "--netns", a3.Path(), "--ifname", "eth1")
	a.attaches("blue", "--netns", a3.Path(), "--ifname", "eth2")
	time.Sleep(2700 * time.Millisecond) // it is asked for that long
	for _, e := range a.attached(isNamed(name(a3))) {
		if e.Error != "" {
			t.Errorf("%s of a3: %s", e.Tap, e.Error)
		}
	}
	a.do("detach", "blue", "--netns", a3.Path(), "--ifname", "eth1")
	a.do("detach", "blue", "--netns", a3.Path(), "--ifname", "eth2")

	// Who was out of reach when it was asked is told of later.
	b.attaches("six", "--netns", b1.Path(), "--ifname", "eth1")
	take("eth1", netip.MustParsePrefix("fd40::77/64"))
	if status, _, stderr := a.command("attach", "six", "--netns", a3.Path(), "--ip", "fd40::77"); status != 0 {
		// The answer came in time, so it is refused; the tests of package bridge have the late one.
		if !strings.Contains(stderr, "fd40::77 is another station's") {
			t.Errorf("attach: %s", stderr)
		}
		return
	}
	mac6 := b.attached(func(e node.Endpoint) bool { return e.Overlay == "six" })[0].MAC.String()
	told(a3, "fd40::77", mac6)
	if healthy := a.attached(func(e node.Endpoint) bool { return e.Error == "" }); len(healthy) != 2 {
		t.Errorf("%v have no error, want a1 and a2", healthy)
	}
}
