package gateway

import (
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tulle-net/tulle/internal/lab"
)

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
