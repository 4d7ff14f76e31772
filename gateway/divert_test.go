package gateway

import (
	"errors"
	"net"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tulle-net/tulle/internal/lab"
	"github.com/tulle-net/tulle/internal/lab/labtest"
)

// TestDivert: what is sent to a diverted address arrives inside the namespace, also
// where no route leads there, answers come from whom was asked, and nothing else changes.
func TestDivert(t *testing.T) {
	l := labtest.New(t)
	h, err := l.AddHost("c")
	if err != nil {
		t.Fatal(err)
	}
	x, err := l.AddHost("x")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := l.AddSwitch("in", lab.Underlay{Prefix4: in4, Cable: true}, h, x); err != nil {
		t.Fatal(err)
	}
	inside := netip.MustParseAddrPort("169.254.53.53:53")
	if err := h.AddAddr("lo", netip.PrefixFrom(inside.Addr(), 32)); err != nil {
		t.Fatal(err)
	}
	if err := h.SetUp("lo", true); err != nil {
		t.Fatal(err)
	}
	udp, err := h.ListenPacket(inside.String())
	if err != nil {
		t.Fatal(err)
	}
	defer udp.Close()
	tcp, err := h.Listen(inside.String())
	if err != nil {
		t.Fatal(err)
	}
	defer tcp.Close()
	go echo(udp)
	go func() {
		for {
			c, err := tcp.Accept()
			if err != nil {
				return
			}
			_, _ = c.Write([]byte("tcp"))
			_ = c.Close()
		}
	}()
	ask := func(network, to string) (string, error) {
		c, err := h.Dial(t.Context(), network, to)
		if err != nil {
			return "", err
		}
		defer c.Close()
		_ = c.SetDeadline(time.Now().Add(5 * time.Second))
		if network == "udp" {
			if _, err := c.Write([]byte("udp")); err != nil {
				return "", err
			}
		}
		b := make([]byte, 16)
		n, err := c.Read(b) // the socket is connected: of the one who was asked
		return string(b[:n]), err
	}
	unreachable := func(to string) {
		t.Helper()
		if got, err := ask("udp", to); !errors.Is(err, unix.ENETUNREACH) {
			t.Errorf("%s answers %q, %v; want no route", to, got, err)
		}
	}
	asked := []netip.Addr{at(out4, 53), at(far4, 53), at(in4, 2)}
	ns, err := os.Open(h.Path())
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	unreachable("192.0.2.53:53")
	d, err := Divert(int(ns.Fd()), testTable, asked, inside)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	for _, a := range asked {
		for _, network := range []string{"udp", "tcp"} {
			if got, err := ask(network, netip.AddrPortFrom(a, 53).String()); err != nil || got != network {
				t.Errorf("%s to %s: %q, %v", network, a, got, err)
			}
		}
	}
	unreachable("192.0.2.54:53")
	if _, err := Divert(int(ns.Fd()), testTable, asked, inside); err == nil {
		t.Error("two have one table")
	}
	run := func(args ...string) string {
		t.Helper()
		out, err := h.Run(t.Context(), args[0], args[1:]...)
		if err != nil {
			t.Fatalf("%v: %v: %s", args, err, out)
		}
		return out
	}
	run("nft", "flush", "ruleset")
	if got, err := ask("udp", "192.0.2.53:53"); err != nil || got != "udp" {
		t.Errorf("after a flush of others' rules: %q, %v", got, err)
	}
	// A route of the namespace's own goes before.
	if err := h.AddRoute(netip.MustParsePrefix("0.0.0.0/0"), at(in4, 2)); err != nil {
		t.Fatal(err)
	}
	if out := run("ip", "route", "get", "192.0.2.53"); !strings.Contains(out, "via "+at(in4, 2).String()) {
		t.Errorf("the way is %s", out)
	}
	if got, err := ask("udp", "192.0.2.53:53"); err != nil || got != "udp" {
		t.Errorf("with a route: %q, %v", got, err)
	}
	run("ip", "route", "del", "default")
	if err := d.Close(); err != nil {
		t.Error(err)
	}
	if err := d.Close(); err != nil {
		t.Errorf("a second time: %v", err)
	}
	unreachable("192.0.2.53:53")
	if out := run("nft", "list", "ruleset") + run("sh", "-c", "ip route show table default 2>/dev/null || true"); strings.TrimSpace(out) != "" {
		t.Errorf("left: %s", out)
	}
}

// echo answers each datagram with itself, until its socket is closed.
func echo(c net.PacketConn) {
	b := make([]byte, 16)
	for {
		n, from, err := c.ReadFrom(b)
		if err != nil {
			return
		}
		_, _ = c.WriteTo(b[:n], from)
	}
}
