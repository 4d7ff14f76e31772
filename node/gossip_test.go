package node

import (
	"net/netip"
	"testing"

	"github.com/tulle-net/tulle/config"
)

// TestFit: the first address that a host has left may be the overlay's own.
func TestFit(t *testing.T) {
	at := netip.MustParseAddr("192.0.2.1")
	n := &Node{overlays: []*overlay{{cfg: config.Overlay{Name: "blue", Tap: "blue0"}}}}
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
