package gateway

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/tulle-net/tulle/internal/lab"
	"github.com/tulle-net/tulle/internal/lab/labtest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// c ──[in]── a ──[out]── x
//            └───[far]── y      a is the host; in is an exit's device, c its endpoint

type world struct {
	t          *testing.T
	lab        *lab.Lab
	a, c, x, y *lab.Host
	g          *Gateway
	kept       []byte // what is remembered
}

const testTable = "tulle-test"

var (
	in4, in6   = netip.MustParsePrefix("10.32.0.0/24"), netip.MustParsePrefix("fd32::/64")
	out4, out6 = netip.MustParsePrefix("192.0.2.0/24"), netip.MustParsePrefix("2001:db8:1::/64")
	far4, far6 = netip.MustParsePrefix("198.51.100.0/24"), netip.MustParsePrefix("2001:db8:2::/64")
)

// at is address number n of a network.
func at(p netip.Prefix, n int) netip.Addr {
	a := p.Addr()
	for range n {
		a = a.Next()
	}
	return a
}

func newWorld(t *testing.T) *world {
	t.Helper()
	l := labtest.New(t)
	w := &world{t: t, lab: l}
	for _, h := range []struct {
		at   **lab.Host
		name string
	}{{&w.a, "a"}, {&w.c, "c"}, {&w.x, "x"}, {&w.y, "y"}} {
		var err error
		if *h.at, err = l.AddHost(h.name); err != nil {
			t.Fatal(err)
		}
	}
	for _, s := range []struct {
		name   string
		v4, v6 netip.Prefix
		other  *lab.Host
	}{{"in", in4, in6, w.c}, {"out", out4, out6, w.x}, {"far", far4, far6, w.y}} {
		if _, err := l.AddSwitch(s.name, lab.Underlay{Prefix4: s.v4, Prefix6: s.v6, Cable: true}, w.a, s.other); err != nil {
			t.Fatal(err)
		}
		for _, zero := range []netip.Prefix{netip.MustParsePrefix("0.0.0.0/0"), netip.MustParsePrefix("::/0")} {
			via := at(s.v4, 1)
			if zero.Addr().Is6() {
				via = at(s.v6, 1)
			}
			if err := s.other.AddRoute(zero, via); err != nil {
				t.Fatal(err)
			}
		}
		w.tell(s.other)
	}
	w.open()
	return w
}

// open is what a node does when it starts.
func (w *world) open() {
	w.t.Helper()
	var err error
	w.g, err = New(Config{
		Table: testTable, Machine: "here", Log: slog.New(slog.DiscardHandler),
		Load: func() ([]byte, error) { return w.kept, nil },
		Save: func(b []byte) error { w.kept = b; return nil },
	})
	if err != nil {
		w.t.Fatal(err)
	}
}

func (w *world) apply(want Want) {
	w.t.Helper()
	if err := w.a.Do(func() error { return w.g.Apply(want) }); err != nil {
		w.t.Fatal(err)
	}
}

func (w *world) run(name string, args ...string) string {
	w.t.Helper()
	out, err := w.a.Run(w.t.Context(), name, args...)
	if err != nil {
		w.t.Fatalf("%s %v: %v: %s", name, args, err, out)
	}
	return out
}

// sysctl returns settings of a, one behind the other.
func (w *world) sysctl(names ...string) string {
	w.t.Helper()
	out := ""
	for _, n := range names {
		out += strings.TrimSpace(w.run("cat", "/proc/sys/"+n))
	}
	return out
}

// tell has a host answer who calls with the address that the call came from.
func (w *world) tell(h *lab.Host) {
	w.t.Helper()
	ln, err := h.Listen(":7000")
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { _ = ln.Close() })
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			_, _ = io.WriteString(c, c.RemoteAddr().String())
			_ = c.Close()
		}
	}()
}

// seen is the address that a call from a host is seen to come from; zero: it is
// not answered.
func (w *world) seen(from *lab.Host, to netip.Addr, port uint16, within time.Duration) netip.Addr {
	ctx, cancel := context.WithTimeout(w.t.Context(), within)
	defer cancel()
	c, err := from.Dial(ctx, "tcp", netip.AddrPortFrom(to, port).String())
	if err != nil {
		return netip.Addr{}
	}
	defer c.Close()
	b, err := io.ReadAll(c)
	if err != nil {
		w.t.Fatal(err)
	}
	return netip.MustParseAddrPort(string(b)).Addr().Unmap()
}

func (w *world) wantSeen(from *lab.Host, to netip.Addr, port uint16, want netip.Addr) {
	w.t.Helper()
	within := 5 * time.Second
	if want == nobody {
		within = 300 * time.Millisecond
	}
	if got := w.seen(from, to, port, within); got != want {
		w.t.Errorf("%s calls %s port %d and is seen as %v, want %v", from.Name(), to, port, got, want)
	}
}

var (
	nobody netip.Addr
	exits  = []Exit{{Device: "in", Subnets: []netip.Prefix{in4, in6}, Anycast: true}}
)

func TestForwarding(t *testing.T) {
	w := newWorld(t)
	settings := []string{forward4, forward6, "net/ipv6/conf/out/accept_ra", "net/ipv6/conf/far/accept_ra"}
	w.wantSeen(w.c, at(out4, 2), 7000, nobody)
	w.apply(Want{Exits: exits})
	w.wantSeen(w.c, at(out4, 2), 7000, at(out4, 1))
	w.wantSeen(w.c, at(out6, 2), 7000, at(out6, 1))
	w.wantSeen(w.c, at(far4, 2), 7000, at(far4, 1))
	// Into the overlay nothing goes, and what the host did not forward it does not.
	w.wantSeen(w.x, at(in4, 2), 7000, nobody)
	w.wantSeen(w.x, at(in6, 2), 7000, nobody)
	w.wantSeen(w.x, at(far4, 2), 7000, nobody)
	w.wantSeen(w.y, at(out6, 2), 7000, nobody)
	if s := w.sysctl(settings...); s != "1122" {
		t.Errorf("%v are %s, want 1122", settings, s)
	}

	// As after a crash: it is remembered what was before.
	w.open()
	w.apply(Want{Exits: exits})
	w.wantSeen(w.c, at(out4, 2), 7000, at(out4, 1))
	w.wantSeen(w.x, at(far4, 2), 7000, nobody)
	w.open()
	w.apply(Want{})
	if s, rules := w.sysctl(settings...), w.run("nft", "list", "ruleset"); s != "0011" || rules != "" || w.kept != nil {
		t.Errorf("after the last exit %v are %s, want 0011; rules %q, kept %q", settings, s, rules, w.kept)
	}

	// A host that was a router stays one, before and after.
	for _, name := range settings[:2] {
		if err := w.a.Sysctl(name, "1"); err != nil {
			t.Fatal(err)
		}
	}
	w.apply(Want{Exits: exits})
	w.wantSeen(w.c, at(out4, 2), 7000, at(out4, 1))
	w.wantSeen(w.x, at(far4, 2), 7000, at(out4, 2))
	w.wantSeen(w.x, at(in4, 2), 7000, nobody)
	// One that is told not to forward while there are exits does so all the same,
	// and for them alone.
	if err := w.a.Sysctl(forward4, "0"); err != nil {
		t.Fatal(err)
	}
	w.wantSeen(w.c, at(out4, 2), 7000, nobody)
	if err := w.a.Do(func() error { w.g.Check(); return w.g.Apply(Want{Exits: exits}) }); err != nil {
		t.Fatal(err)
	}
	w.wantSeen(w.c, at(out4, 2), 7000, at(out4, 1))
	w.wantSeen(w.x, at(far4, 2), 7000, nobody)
	w.apply(Want{})
	if err := w.a.Sysctl(forward4, "1"); err != nil {
		t.Fatal(err)
	}
	w.wantSeen(w.x, at(far4, 2), 7000, at(out4, 2))
	if s := w.sysctl(settings...); s != "1111" {
		t.Errorf("%v are %s, want 1111", settings, s)
	}
}

// TestRouterAdvertisements: a host that has its IPv6 default route from a router
// keeps it when it begins to forward, and goes on taking what the router says.
func TestRouterAdvertisements(t *testing.T) {
	w := newWorld(t)
	fe80 := netip.MustParsePrefix("fe80::1234/64")
	if err := w.x.AddAddr("out", fe80); err != nil {
		t.Fatal(err)
	}
	advertise := func(lifetime byte) {
		t.Helper()
		err := w.x.Do(func() error {
			fd, err := unix.Socket(unix.AF_INET6, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_ICMPV6)
			if err != nil {
				return err
			}
			defer unix.Close(fd)
			dev, err := net.InterfaceByName("out")
			if err != nil {
				return err
			}
			group := netip.MustParseAddr("ff02::1").As16()
			// RFC 4861, section 4.2: the hop limit is 255; lifetime in seconds.
			return errors.Join(
				unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_MULTICAST_HOPS, 255),
				unix.Bind(fd, &unix.SockaddrInet6{Addr: fe80.Addr().As16(), ZoneId: uint32(dev.Index)}),
				unix.Sendto(fd, []byte{134, 0, 0, 0, 64, 0, 0, lifetime, 0, 0, 0, 0, 0, 0, 0, 0}, 0, &unix.SockaddrInet6{Addr: group, ZoneId: uint32(dev.Index)}))
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	route := func() bool {
		return strings.Contains(w.run("ip", "-6", "route", "show", "default"), "via fe80::1234 dev out proto ra")
	}
	await := func(what string, want bool) {
		t.Helper()
		for end := time.Now().Add(5 * time.Second); route() != want; time.Sleep(10 * time.Millisecond) {
			if time.Now().After(end) {
				t.Fatalf("%s: %s", what, w.run("ip", "-6", "route", "show", "default"))
			}
		}
	}
	advertise(200)
	await("the router is not the default", true)
	w.apply(Want{Exits: exits})
	if !route() {
		t.Error("the default route is lost when the host begins to forward")
	}
	advertise(0)
	await("the router is the default still", false)
	advertise(200)
	await("the router is not the default again", true)
	w.apply(Want{})
	if !route() {
		t.Error("the default route is lost when the host ends to forward")
	}
}

func TestRemembered(t *testing.T) {
	for text, want := range map[string]record{
		`{"schema":1,"machine":"here","ipv4":true,"devices":["out"]}`:  {Schema: 1, Machine: "here", IPv4: true, Devices: []string{"out"}},
		`{"schema":1,"machine":"there","ipv4":true,"devices":["out"]}`: {Schema: 1, Machine: "here"},
		`{"schema":9}`: {Schema: 1, Machine: "here"},
		`{`:            {Schema: 1, Machine: "here"},
	} {
		g, err := New(Config{Machine: "here", Log: slog.New(slog.DiscardHandler), Load: func() ([]byte, error) { return []byte(text), nil }})
		if err != nil || fmt.Sprint(*g.rec) != fmt.Sprint(want) {
			t.Errorf("New with %s remembers %+v, %v, want %+v", text, g.rec, err, want)
		}
	}
	if _, err := New(Config{Load: func() ([]byte, error) { return nil, os.ErrPermission }}); !errors.Is(err, os.ErrPermission) {
		t.Errorf("New that cannot read: %v", err)
	}
}

// TestNarrow: who sends more than the host's way out takes is told by ICMP.
func TestNarrow(t *testing.T) {
	w := newWorld(t)
	w.apply(Want{Exits: exits})
	if err := w.a.SetMTU("out", 1280); err != nil {
		t.Fatal(err)
	}
	for _, to := range []netip.Addr{at(out4, 2), at(out6, 2)} {
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		got, err := w.lab.Transfer(ctx, w.c, w.x, netip.AddrPortFrom(to, 0), lab.Amount{Bytes: 1 << 20})
		cancel()
		if err != nil || got.Bytes != 1<<20 {
			t.Errorf("%d bytes to %s: %v", got.Bytes, to, err)
		}
	}
	w.apply(Want{})
}

// TestTune: an exit's device forwards what its overlay has, and answers for itself.
func TestTune(t *testing.T) {
	w := newWorld(t)
	names := []string{"net/ipv4/conf/in/route_localnet", "net/ipv4/conf/in/arp_ignore", "net/ipv4/conf/in/forwarding", "net/ipv6/conf/in/disable_ipv6",
		"net/ipv4/conf/far/arp_ignore", "net/ipv4/conf/far/rp_filter"}
	w.apply(Want{Exits: exits})
	for _, tt := range []struct {
		x    Exit
		want string
	}{
		{Exit{Device: "in", Subnets: []netip.Prefix{in4, in6}}, "001000"},
		{Exit{Device: "none", Subnets: []netip.Prefix{in4}, Anycast: true}, "001000"},
		{Exit{Device: "in", Subnets: []netip.Prefix{in4, in6}, Anycast: true, Own: "far"}, "111012"},
		{Exit{Device: "in", Subnets: []netip.Prefix{in6}, Anycast: true}, "110012"},
		{Exit{Device: "in", Subnets: []netip.Prefix{in4}, Anycast: true}, "110112"},
	} {
		_ = w.a.Do(func() error { w.g.Tune(tt.x); return nil })
		if got := w.sysctl(names...); got != tt.want {
			t.Errorf("after Tune(%+v): %s, want %s", tt.x, got, tt.want)
		}
	}
	w.apply(Want{})
}
