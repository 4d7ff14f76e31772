package discovery

import (
	"net/netip"
	"testing"
	"time"
)

// TestRunGoesOn: a Discovery that follows another one is the same run to others, and its
// clock does not go back.
func TestRunGoesOn(t *testing.T) {
	local := netip.MustParseAddr("127.0.0.1")
	cfg := Config{Name: "a", Listen: netip.AddrPortFrom(local, 0), Advertise: local, VTEP: netip.AddrPortFrom(local, 4789)}
	first, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer first.Close()
	stamp := first.stamp()
	cfg.Run = first.Incarnation()
	next, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer next.Close()
	if next.boot != first.boot || next.stamp() < stamp {
		t.Errorf("the next one is run %08x at %d, want %08x at %d or later", next.boot, next.stamp(), first.boot, stamp)
	}
	cfg.Run = Run{}
	other, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	if other.boot == first.boot || time.Since(other.born) > time.Minute {
		t.Errorf("a new one is run %08x, as the first", other.boot)
	}
}
