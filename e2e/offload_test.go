package e2e

import (
	"strings"
	"testing"
	"time"

	"github.com/tulle-net/tulle/internal/lab"
)

//	a ──[ul]── b

// TestOffloadSwitches: each offload can be switched off and on while traffic flows.
func TestOffloadSwitches(t *testing.T) {
	t.Parallel()
	l, sw, h := hosts(t, 2, lab.Underlay{})
	a := up(t, l, h[0], "--overlay", overlay(1))
	up(t, l, h[1], "--join", seed(sw.Addr(h[0])), "--overlay", overlay(2, "gro=off"))
	ping(t, h[0], address(2), 5*time.Second)
	offload := func(args ...string) string {
		return runIn(t, h[0], binary, append([]string{"offload", "--socket", a.sock}, args...)...)
	}
	for _, c := range []struct {
		name, off, shows string
	}{
		{"blue0", "tso,uso", "tso4 off, tso6 off, uso off, gro on"},
		{"blue0", "gro", "tso4 on, tso6 on, uso on, gro off"},
		{"underlay", "gso,gro", "gso off, gro off"},
	} {
		if out := offload(c.name, "--off", c.off); !strings.Contains(out, c.shows) {
			t.Errorf("offload %s --off %s prints\n%swant %s", c.name, c.off, out, c.shows)
		}
		transfer(t, l, h[0], h[1], address(2), 4<<20)
		transfer(t, l, h[1], h[0], address(1), 4<<20)
		offload(c.name)
	}
	if s := a.status().Offloads; s.Underlay.GSO != "on" || s.Underlay.GRO != "on" || s.Taps["blue0"].GRO != "on" {
		t.Errorf("after switching all on: %+v", s)
	}
	transfer(t, l, h[0], h[1], address(2), 4<<20)
	for _, wrong := range [][]string{{"blue9"}, {"blue0", "--off", "gso"}} {
		if out, err := h[0].Run(t.Context(), binary, append([]string{"offload", "--socket", a.sock}, wrong...)...); err == nil {
			t.Errorf("offload %v: done, want an error: %s", wrong, out)
		}
	}
}
