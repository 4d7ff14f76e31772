package e2e

import (
	"context"
	"net/netip"
	"testing"
	"time"

	"github.com/tulle-net/tulle/internal/lab"
)

// TestAQM: where somebody pings beside a transfer it loses segments for that, and arrives
// whole; with `aqm: off` it loses none.
func TestAQM(t *testing.T) {
	t.Parallel()
	for _, value := range []string{"off", "on"} {
		t.Run(value, func(t *testing.T) {
			l, sw, h := hosts(t, 2, lab.Underlay{})
			file := settings(t, l, "aqm: "+value)
			nodes := []*tulle{
				up(t, l, h[0], "--config", file, "--overlay", overlay(1)),
				up(t, l, h[1], "--config", file, "--overlay", overlay(2), "--join", seed(sw.Addr(h[0]))),
			}
			ping(t, h[0], address(2), 5*time.Second)
			heartbeat(t, h[0], address(2))
			shed := func() (n uint64) {
				for _, node := range nodes {
					d := node.status().Drops
					n += d["aqm"] + d["aqm_marked"]
				}
				return n
			}
			limit := time.Now().Add(3 * time.Second)
			if value == "on" {
				limit = limit.Add(20 * time.Second) // it stands at once, but who knows
			}
			for time.Now().Before(limit) && shed() == 0 {
				ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
				if _, err := l.Transfer(ctx, h[0], h[1], netip.AddrPortFrom(address(2), 0), lab.Amount{For: time.Second}); err != nil {
					t.Fatal(err)
				}
				cancel()
			}
			if n := shed(); (n > 0) != (value == "on") {
				t.Errorf("%d segments were dropped or marked", n)
			}
		})
	}
}
