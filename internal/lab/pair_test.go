package lab

import (
	"context"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"
)

// TestPrivilegedCable: two hosts and nothing between them, which is also what a
// kernel without bridges gets.
func TestPrivilegedCable(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	l, err := New("tulletest")
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	}()
	a, err := l.AddHost("a")
	if err != nil {
		t.Fatal(err)
	}
	b, err := l.AddHost("b")
	if err != nil {
		t.Fatal(err)
	}
	conf := Underlay{Cable: true, Prefix4: netip.MustParsePrefix("192.0.2.0/24"), Prefix6: netip.MustParsePrefix("2001:db8::/64")}
	for _, hosts := range [][]*Host{nil, {a}, {a, b, a}} {
		if _, err := l.AddSwitch("ul", conf, hosts...); err == nil || !strings.Contains(err.Error(), "joins 2 hosts") {
			t.Errorf("a cable to %d hosts: %v", len(hosts), err)
		}
	}
	if _, err := l.AddSwitch("No Name", conf, a, b); err == nil {
		t.Error("a cable without a good name: no error")
	}
	s, err := l.AddSwitch("ul", conf, a, b)
	if err != nil {
		t.Fatal(err)
	}
	for _, h := range []*Host{a, b} {
		dev, err := h.link("ul")
		if err != nil {
			t.Fatal(err)
		}
		if dev.Type() != "veth" || dev.Attrs().MTU != 1500 {
			t.Errorf("%s has a %s of MTU %d, want a veth of 1500", h.name, dev.Type(), dev.Attrs().MTU)
		}
	}
	if n := len(readNetns(l)); n != 2 {
		t.Errorf("%d namespaces, want the hosts' 2", n)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	for _, dst := range []netip.Addr{s.Addr(b), s.Addr6(b)} {
		if _, err := a.WaitPing(ctx, dst); err != nil {
			t.Fatal(err)
		}
		if err := s.Cut(b); err != nil {
			t.Fatal(err)
		}
		short, cancel := context.WithTimeout(ctx, 50*time.Millisecond)
		if _, err := a.Ping(short, dst); err == nil {
			t.Errorf("a ping to %s passes a cable that is pulled", dst)
		}
		cancel()
		if err := s.Mend(b); err != nil {
			t.Fatal(err)
		}
		if _, err := a.WaitPing(ctx, dst); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Attach(a); err == nil {
		t.Error("Attach to a pair: want an error")
	}
}

// readNetns lists the namespaces of l.
func readNetns(l *Lab) (names []string) {
	for _, n := range readDir(netnsDir) {
		if strings.HasPrefix(n, l.name+"-") {
			names = append(names, n)
		}
	}
	return names
}
