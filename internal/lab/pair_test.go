package lab

import (
	"context"
	"net/netip"
	"os"
	"testing"
	"time"
)

// TestPrivilegedPair is what a kernel without bridges gets.
func TestPrivilegedPair(t *testing.T) {
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
	s := &Switch{name: "ul", conf: Underlay{MTU: 1500,
		Prefix4: netip.MustParsePrefix("192.0.2.0/24"), Prefix6: netip.MustParsePrefix("2001:db8::/64")}}
	if err := s.pair(a, b); err != nil {
		t.Fatal(err)
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
