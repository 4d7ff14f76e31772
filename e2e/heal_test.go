package e2e

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/tulle-net/tulle/internal/lab"
)

//	a ──[ul]── b

// TestTapDeleted: a device that somebody deletes is noticed, and made again.
func TestTapDeleted(t *testing.T) {
	t.Parallel()
	_, _, a, b := pair(t, lab.Underlay{})
	ping(t, b.host, address(1), 5*time.Second)
	if err := a.host.DelLink("blue0"); err != nil {
		t.Fatal(err)
	}
	a.eventually(5*time.Second, "says that the device is gone", func() bool { return strings.Contains(a.proc.Log(), "device is gone") })
	a.eventually(15*time.Second, "has made it again", func() bool { return a.status().Overlays[0].Up })
	ping(t, b.host, address(1), 5*time.Second)
	ping(t, a.host, address(2), 5*time.Second)
}

// TestTapOverflow: what the kernel drops while the node does not read is counted.
func TestTapOverflow(t *testing.T) {
	t.Parallel()
	_, _, a, _ := pair(t, lab.Underlay{})
	ping(t, a.host, address(2), 5*time.Second)
	before := a.status().Drops["tap_overflow"]
	if err := a.proc.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	a.eventually(5*time.Second, "stands still", func() bool { return stopped(t, a.proc.Pid()) })
	c, err := a.host.Dial(t.Context(), "udp", netip.AddrPortFrom(address(2), 9).String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	const sent = 3000
	for range sent {
		_, _ = c.Write([]byte("x")) // refused or dropped: both are the point
	}
	if err := a.proc.Signal(syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	ping(t, a.host, address(2), 5*time.Second)
	if got := a.status().Drops["tap_overflow"] - before; got == 0 || got > sent {
		t.Errorf("tap_overflow grew by %d, want some of %d", got, sent)
	}
}

// stopped reports whether each thread of a process has taken its SIGSTOP.
func stopped(t *testing.T, pid int) bool {
	t.Helper()
	list, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/stat", pid))
	if err != nil || len(list) == 0 {
		t.Fatalf("threads of %d: %v, %v", pid, list, err)
	}
	return !slices.ContainsFunc(list, func(path string) bool {
		text, _ := os.ReadFile(path)
		_, rest, _ := strings.Cut(string(text), ") ")
		return !strings.HasPrefix(rest, "T")
	})
}

// TestUnderlayMoves: the underlay's address moves to a bridge, as when somebody
// sets one up on a running host.
func TestUnderlayMoves(t *testing.T) {
	t.Parallel()
	l, sw, a, b := pair(t, lab.Underlay{})
	ping(t, a.host, address(2), 5*time.Second)
	ip := func(args ...string) {
		t.Helper()
		runIn(t, a.host, "ip", args...)
	}
	addr := netip.PrefixFrom(sw.Addr(a.host), underlay4.Bits()).String()
	ip("link", "add", "br0", "up", "type", "bridge")
	ip("address", "del", addr, "dev", sw.Dev())
	ip("link", "set", sw.Dev(), "master", "br0")
	ip("link", "set", "br0", "mtu", "1400") // joining a port has set it to the port's
	ip("address", "add", addr, "dev", "br0")
	a.eventually(5*time.Second, "follows the MTU of br0", func() bool { return a.status().Overlays[0].MTU == 1350 })
	ping(t, a.host, address(2), 5*time.Second)
	transfer(t, l, a.host, b.host, address(2), 4<<20)
}

// TestMTUDipKeepsIPv6: the kernel takes a device's IPv6 addresses when its MTU
// falls below 1280; they come back with it.
func TestMTUDipKeepsIPv6(t *testing.T) {
	t.Parallel()
	l, sw, h := hosts(t, 2, lab.Underlay{})
	six := func(i string) netip.Addr { return netip.MustParseAddr("fd32::" + i) }
	a := up(t, l, h[0], "--overlay", "name=six,vni=6,encryption=none,tap=six0,address=fd32::1/64")
	up(t, l, h[1], "--join", seed(sw.Addr(h[0])), "--overlay", "name=six,vni=6,encryption=none,tap=six0,address=fd32::2/64")
	ping(t, h[0], six("2"), 5*time.Second)
	for _, c := range []struct{ underlay, overlay int }{{1300, 1250}, {1500, 1450}} {
		if err := h[0].SetMTU(sw.Dev(), c.underlay); err != nil {
			t.Fatal(err)
		}
		a.eventually(5*time.Second, "follows the underlay's MTU", func() bool { return a.status().Overlays[0].MTU == c.overlay })
	}
	ping(t, h[0], six("2"), 5*time.Second)
}

// TestSharedGroup: two overlays flood to one multicast group.
func TestSharedGroup(t *testing.T) {
	t.Parallel()
	l, _, h := hosts(t, 2, lab.Underlay{})
	for i, host := range h {
		n := string(rune('1' + i))
		up(t, l, host,
			"--overlay", "name=blue,vni=100,encryption=none,tap=blue0,flood=multicast,group=239.1.1.1,address=10.32.0."+n+"/16",
			"--overlay", "name=red,vni=200,encryption=none,tap=red0,flood=multicast,group=239.1.1.1,address=10.33.0."+n+"/16")
	}
	ping(t, h[0], netip.MustParseAddr("10.32.0.2"), 5*time.Second)
	ping(t, h[0], netip.MustParseAddr("10.33.0.2"), 5*time.Second)
}
