package node

import (
	"net/netip"
	"testing"
	"time"

	"github.com/tulle-net/tulle/config"
	"github.com/tulle-net/tulle/discovery"
	"github.com/tulle-net/tulle/tap"
)

// TestFit: the first address that a host has left may be the overlay's own.
func TestFit(t *testing.T) {
	at := netip.MustParseAddr("192.0.2.1")
	n := &Node{}
	blue := &overlay{cfg: config.Overlay{Name: "blue"}}
	blue.devices.Store(&[]*device{{cfg: tap.Config{Name: "blue0"}}, {cfg: tap.Config{Name: "eth0", Netns: "/run/netns/c"}}})
	n.overlays.Store(&[]*overlay{blue})
	n.at.Store(&at)
	for _, c := range []struct {
		to, dev string
		want    bool
	}{
		{"192.0.2.2", "eth0", true},
		{"10.32.0.1", "blue0", false},
		{"2001:db8::2", "eth0", false},
	} {
		if got := n.fit(netip.MustParseAddr(c.to), c.dev); got != c.want {
			t.Errorf("fit(%s, %s) = %v, want %v", c.to, c.dev, got, c.want)
		}
	}
}

// TestWithBefore: those that a node knew before it moved stay, until somebody is
// revoked: it may be one of them.
func TestWithBefore(t *testing.T) {
	known := []discovery.Member{{Name: "n1", Self: true}, {Name: "n2", Status: discovery.Alive, Confirmed: true}}
	n := &Node{before: known, movedAt: time.Now()}
	if got := n.withBefore(nil); len(got) != 1 || got[0].Name != "n2" {
		t.Errorf("after a move: %v, want n2", got)
	}
	n.revoked.Store(true)
	if got := n.withBefore(nil); len(got) != 0 || n.before != nil {
		t.Errorf("after a revocation: %v, want nobody", got)
	}
}
