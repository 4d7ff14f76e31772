package gateway

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
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

func TestPorts(t *testing.T) {
	w := newWorld(t)
	to4, to6 := netip.AddrPortFrom(at(in4, 2), 7000), netip.AddrPortFrom(at(in6, 2), 7000)
	w.apply(Want{Exits: exits, Ports: []Port{
		{netip.AddrPortFrom(netip.Addr{}, 80), "tcp", to4},
		{netip.AddrPortFrom(netip.Addr{}, 80), "tcp", to6},
		{netip.AddrPortFrom(at(out4, 1), 81), "tcp", to4},
	}})
	w.wantSeen(w.x, at(out4, 1), 80, at(out4, 2))
	w.wantSeen(w.x, at(out6, 1), 80, at(out6, 2))
	w.wantSeen(w.x, at(far4, 1), 80, at(out4, 2))
	w.wantSeen(w.x, at(out4, 1), 81, at(out4, 2))
	w.wantSeen(w.x, at(far4, 1), 81, nobody)
	w.wantSeen(w.x, at(in4, 2), 7000, nobody)
	w.wantSeen(w.c, at(out4, 1), 80, at(in4, 1))
	w.wantSeen(w.a, at(out4, 1), 80, at(out4, 1))
	// What passes through the host to the port of another is none of ours.
	if err := w.a.Sysctl(forward4, "1"); err != nil {
		t.Fatal(err)
	}
	w.wantSeen(w.c, at(out4, 2), 80, nobody)
	w.apply(Want{Exits: exits})
	w.wantSeen(w.x, at(out4, 1), 80, nobody)
	w.wantSeen(w.c, at(out4, 2), 7000, at(out4, 1))
	// Ports alone have changed, and the table is gone.
	w.run("nft", "flush", "ruleset")
	w.apply(Want{Exits: exits, Ports: []Port{{netip.AddrPortFrom(netip.Addr{}, 80), "tcp", to4}}})
	w.wantSeen(w.x, at(out4, 1), 80, at(out4, 2))
	w.wantSeen(w.c, at(out4, 2), 7000, at(out4, 1))
	var many []Port
	for range MaxPorts + 1 {
		many = append(many, Port{netip.AddrPortFrom(netip.Addr{}, 80), "tcp", to4})
	}
	if err := w.a.Do(func() error { return w.g.Apply(Want{Exits: exits, Ports: many}) }); err == nil || w.run("nft", "list", "ruleset") != "" {
		t.Errorf("more than MaxPorts: %v", err)
	}
	w.apply(Want{Exits: exits, Ports: many[:MaxPorts]})
	if n := strings.Count(w.run("nft", "list", "ruleset"), "dnat to 10.32.0.2:7000"); n != MaxPorts {
		t.Errorf("%d ports, want %d", n, MaxPorts)
	}
	w.apply(Want{})
}

// TestFirewalls: other programs' rules have a say too.
func TestFirewalls(t *testing.T) {
	w := newWorld(t)
	w.run("iptables", "-P", "FORWARD", "DROP")
	w.run("ip6tables", "-P", "FORWARD", "DROP")
	w.run("iptables", "-A", "FORWARD", "-i", "none0", "-j", "ACCEPT") // somebody's
	foreign := w.run("iptables", "-S", "FORWARD")
	want := Want{Exits: exits}
	w.apply(want)
	w.wantSeen(w.c, at(out4, 2), 7000, at(out4, 1))
	w.wantSeen(w.c, at(out6, 2), 7000, at(out6, 1))
	w.wantSeen(w.x, at(in4, 2), 7000, nobody)
	// iptables can read them, and when it has forgotten them they come back.
	if out := w.run("iptables", "-S", "FORWARD"); strings.Count(out, "-i in") != 1 || strings.Count(out, "-o in") != 1 {
		t.Errorf("iptables shows:\n%s", out)
	}
	w.run("iptables", "-F", "FORWARD")
	w.wantSeen(w.c, at(out4, 2), 7000, nobody)
	check := func() {
		t.Helper()
		if err := w.a.Do(func() error { w.g.Check(); return w.g.Apply(want) }); err != nil {
			t.Fatal(err)
		}
	}
	check()
	w.wantSeen(w.c, at(out4, 2), 7000, at(out4, 1))
	w.run("iptables", "-A", "FORWARD", "-i", "none0", "-j", "ACCEPT")
	w.open() // a crash, and a start
	w.apply(want)
	if out := w.run("iptables", "-S", "FORWARD"); strings.Count(out, "-i in") != 1 {
		t.Errorf("after a crash iptables shows:\n%s", out)
	}

	blocked := func() (list []string) {
		t.Helper()
		_ = w.a.Do(func() error { list = w.g.Blocked(); return nil })
		return list
	}
	if b := blocked(); len(b) != 0 {
		t.Errorf("blocked by %q", b)
	}
	w.run("nft", "add table inet wall; add chain inet wall through { type filter hook forward priority 0; policy drop; }")
	w.run("iptables-legacy", "-P", "FORWARD", "DROP")
	if b := fmt.Sprint(blocked()); b != "[inet wall through iptables-legacy filter FORWARD]" {
		t.Errorf("blocked by %s", b)
	}
	w.wantSeen(w.c, at(out4, 2), 7000, nobody)
	w.run("ip6tables-legacy", "-P", "FORWARD", "DROP")
	if b := fmt.Sprint(blocked()); !strings.Contains(b, "ip6tables-legacy") {
		t.Errorf("blocked by %s", b)
	}
	w.run("iptables-legacy", "-P", "FORWARD", "ACCEPT")
	w.run("ip6tables-legacy", "-P", "FORWARD", "ACCEPT")
	w.run("nft", "delete table inet wall")
	if b := blocked(); len(b) != 0 {
		t.Errorf("blocked by %q still", b)
	}

	// Who flushes all rules gets ours back.
	w.run("nft", "flush", "ruleset")
	check()
	w.wantSeen(w.c, at(out4, 2), 7000, at(out4, 1))
	w.run("iptables", "-P", "FORWARD", "DROP")
	w.run("iptables", "-A", "FORWARD", "-i", "none0", "-j", "ACCEPT")
	check()
	w.wantSeen(w.c, at(out4, 2), 7000, at(out4, 1))
	w.apply(Want{})
	if out := w.run("sh", "-c", "iptables -S FORWARD 2>/dev/null"); out != foreign {
		t.Errorf("iptables' chain is\n%s\nand was\n%s", out, foreign)
	}
}

// TestWithout: what a kernel or a user has not is said, and nothing is left.
func TestWithout(t *testing.T) {
	w := newWorld(t)
	err := w.a.Do(func() error {
		header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
		var all, less [2]unix.CapUserData
		if err := unix.Capget(&header, &all[0]); err != nil {
			return err
		}
		less = all
		less[0].Effective &^= 1 << unix.CAP_NET_ADMIN
		if err := unix.Capset(&header, &less[0]); err != nil {
			return err
		}
		err := w.g.Apply(Want{Exits: exits})
		return errors.Join(err, unix.Capset(&header, &all[0]))
	})
	if !errors.Is(err, fs.ErrPermission) || !strings.Contains(fmt.Sprint(err), "CAP_NET_ADMIN") {
		t.Errorf("without CAP_NET_ADMIN: %v", err)
	}
	if s, rules := w.sysctl(forward4, forward6), w.run("nft", "list", "ruleset"); s != "00" || rules != "" {
		t.Errorf("left: forwarding %s, rules %q", s, rules)
	}
	for _, errno := range []error{unix.EPROTONOSUPPORT, unix.ENOENT, unix.EOPNOTSUPP} {
		if err := explain(errno); !errors.Is(err, errno) || !strings.Contains(err.Error(), "CONFIG_NFT_NAT") {
			t.Errorf("explain(%v) = %v", errno, err)
		}
	}
	w.apply(Want{Exits: exits})
	w.wantSeen(w.c, at(out4, 2), 7000, at(out4, 1))
	w.apply(Want{})
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

func TestReserve(t *testing.T) {
	w := newWorld(t)
	reserve := func(at, protocol string) (f *os.File, err error) {
		err = w.a.Do(func() error { f, err = Reserve(netip.MustParseAddrPort(at), protocol); return err })
		return f, err
	}
	ln, err := w.a.Listen(":90")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	for _, tt := range []struct {
		at, protocol string
		want         error
	}{
		{"0.0.0.0:90", "tcp", ErrPortTaken},
		{"[::]:90", "tcp", ErrPortTaken},
		{"192.0.2.1:90", "tcp", ErrPortTaken},
		{"192.0.2.7:91", "tcp", ErrNoAddress},
		{"[2001:db8::7]:91", "udp", ErrNoAddress},
	} {
		if f, err := reserve(tt.at, tt.protocol); !errors.Is(err, tt.want) {
			t.Errorf("Reserve(%s, %s) = %v, want %v", tt.at, tt.protocol, err, tt.want)
			_ = f.Close()
		}
	}
	for _, at := range []string{"0.0.0.0:91", "[::]:91", "192.0.2.1:92"} {
		for _, protocol := range []string{"tcp", "udp"} {
			f, err := reserve(at, protocol)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := reserve(at, protocol); !errors.Is(err, ErrPortTaken) {
				t.Errorf("%s port %s twice: %v", protocol, at, err)
			}
			// Go's listeners share ports with what has ended, as most servers do.
			err = w.a.Do(func() error {
				if protocol == "udp" {
					c, err := net.ListenPacket("udp", at)
					if err == nil {
						c.Close()
					}
					return err
				}
				ln, err := net.Listen("tcp", at)
				if err == nil {
					ln.Close()
				}
				return err
			})
			if !errors.Is(err, unix.EADDRINUSE) {
				t.Errorf("a program takes %s port %s that is reserved: %v", protocol, at, err)
			}
			if err := f.Close(); err != nil {
				t.Error(err)
			}
		}
	}
	// What a server that has ended leaves is no obstacle.
	c, err := w.x.Dial(t.Context(), "tcp", "192.0.2.1:90")
	if err != nil {
		t.Fatal(err)
	}
	s, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	_ = s.Close() // first: it waits for a minute
	if _, err := io.ReadAll(c); err != nil {
		t.Fatal(err)
	}
	_ = c.Close()
	_ = ln.Close()
	if out := w.run("ss", "-Htan", "sport", "=", ":90"); !strings.Contains(out, "TIME-WAIT") {
		t.Fatalf("nothing is left of a connection: %q", out)
	}
	f, err := reserve("0.0.0.0:90", "tcp")
	if err != nil {
		t.Errorf("a port that a server had: %v", err)
	} else {
		_ = f.Close()
	}
}

// TestFlows: a sender of UDP that does not pause is heard where the port leads now.
func TestFlows(t *testing.T) {
	w := newWorld(t)
	hears := func(h *lab.Host, at string) <-chan string {
		t.Helper()
		pc, err := h.ListenPacket(at)
		if err != nil {
			t.Fatal(err)
		}
		heard, b := make(chan string, 1), make([]byte, 64)
		t.Cleanup(func() { _ = pc.Close() })
		go func() {
			for {
				n, from, err := pc.ReadFrom(b)
				if err != nil {
					return
				}
				select {
				case heard <- string(b[:n]) + " from " + from.(*net.UDPAddr).IP.String():
				default:
				}
			}
		}()
		return heard
	}
	host, first, second := hears(w.a, ":53"), hears(w.c, ":53"), hears(w.c, ":54")
	c, err := w.x.Dial(t.Context(), "udp", netip.AddrPortFrom(at(out4, 1), 53).String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	send := func(text string, to <-chan string) {
		t.Helper()
		if _, err := io.WriteString(c, text); err != nil {
			t.Fatal(err)
		}
		select {
		case got := <-to:
			if got != text+" from "+at(out4, 2).String() {
				t.Errorf("sent %q, heard %q", text, got)
			}
		case <-time.After(3 * time.Second):
			t.Errorf("%q is not heard", text)
		}
	}
	port := func(to uint16) Want {
		return Want{Exits: exits, Ports: []Port{{netip.AddrPortFrom(netip.Addr{}, 53), "udp", netip.AddrPortFrom(at(in4, 2), to)}}}
	}
	w.apply(Want{Exits: exits})
	send("to the host", host)
	w.apply(port(53))
	send("to an endpoint", first)
	w.apply(port(54))
	send("to another port", second)
	w.apply(Want{})
	send("to the host again", host)
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

// TestOthers: the host's devices in overlays without a gateway are somebody else's,
// and an overlay's addresses are believed from nowhere but from it.
func TestOthers(t *testing.T) {
	for _, router := range []bool{false, true} {
		w := newWorld(t)
		if router {
			if err := errors.Join(w.a.Sysctl(forward4, "1"), w.a.Sysctl(forward6, "1")); err != nil {
				t.Fatal(err)
			}
			w.wantSeen(w.y, at(in4, 2), 7000, at(far4, 2))
		}
		w.apply(Want{Exits: exits, Others: []string{"far"}, Tunnels: []uint16{4789}})
		w.wantSeen(w.c, at(out4, 2), 7000, at(out4, 1))
		for _, far := range []netip.Prefix{far4, far6} {
			w.wantSeen(w.c, at(far, 2), 7000, nobody)
		}
		w.wantSeen(w.y, at(in4, 2), 7000, nobody)
		w.wantSeen(w.y, at(in6, 2), 7000, nobody)
		between := nobody
		if router { // as it was
			between = at(far4, 2)
		}
		w.wantSeen(w.y, at(out4, 2), 7000, between)

		dropped := func() int {
			return strings.Count(w.run("nft", "list", "table", "ip", testTable), "packets 0 bytes 0 drop")
		}
		before := dropped()
		w.tell(w.a)
		pc, err := w.a.ListenPacket(":4789")
		if err != nil {
			t.Fatal(err)
		}
		far, err := w.x.ListenPacket(":4789")
		if err != nil {
			t.Fatal(err)
		}
		for _, to := range []netip.Addr{at(out4, 1), at(out4, 2), at(out6, 1), at(out6, 2), at(far4, 1)} {
			by := w.c
			if to == at(far4, 1) {
				by = w.y
			}
			c, err := by.Dial(t.Context(), "udp", netip.AddrPortFrom(to, 4789).String())
			if err == nil {
				_, err = io.WriteString(c, "as if from the host")
				_ = c.Close()
			}
			if err != nil {
				t.Fatal(err)
			}
		}
		if err := w.x.AddAddr("lo", netip.PrefixFrom(at(in4, 77), 32)); err != nil {
			t.Fatal(err)
		}
		if err := w.a.Sysctl("net/ipv4/conf/all/rp_filter", "0"); err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		_, err = w.x.Run(ctx, "ping", "-c", "1", "-W", "1", "-I", at(in4, 77).String(), at(out4, 1).String())
		cancel()
		if err == nil || dropped() != before-4 {
			t.Errorf("an overlay's address from outside, and datagrams to tunnels: %v, %d rules have dropped nothing, before %d", err, dropped(), before)
		}
		for _, c := range []net.PacketConn{pc, far} {
			b := make([]byte, 64)
			_ = c.SetReadDeadline(time.Now().Add(100 * time.Millisecond))
			if n, from, err := c.ReadFrom(b); err == nil {
				t.Errorf("%q arrives at a tunnel, from %s", b[:n], from)
			}
			_ = c.Close()
		}
		w.apply(Want{})
	}
}
