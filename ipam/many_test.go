package ipam

import (
	"fmt"
	"testing"
	"time"

	"github.com/tulle-net/tulle/store"
)

// A node in as many overlays as one may be in renews in all of them, and gets
// into no more, also when it has lost the state that is in some.
func TestMostOverlays(t *testing.T) {
	var all []*store.Overlay
	for i := range MaxOverlays + 1 {
		all = append(all, overlay(fmt.Sprintf("o%d", i), "10.32.0.0/24"))
	}
	c := newCluster(t, all...)
	n := c.node("n1")
	for _, o := range all[:MaxOverlays/2] {
		n.assign(o, "e-"+o.Name)
	}
	n.disk = nil // its file is lost, and its blocks with it, until they are reclaimed
	n.start()
	for _, o := range all[MaxOverlays/2 : MaxOverlays] {
		n.assign(o, "e-"+o.Name)
	}
	if _, err := n.try(all[MaxOverlays], "one more"); err == nil {
		t.Errorf("%d overlays", MaxOverlays+1)
	}
	for passed := time.Duration(0); passed < DefaultGrace+6*time.Hour; passed += time.Hour {
		for range 12 { // silence is counted by who looks often
			c.pass(5 * time.Minute)
			if err := c.r.Reclaim(t.Context(), func(string) bool { return true }); err != nil {
				t.Fatal(err)
			}
		}
		if err := n.renew(t.Context()); err != nil {
			t.Fatalf("in %d overlays, after %v: %v", MaxOverlays, passed, err)
		}
		if !n.Usable() {
			t.Fatal("renewed, and its addresses may not be used")
		}
	}
	n.assign(all[MaxOverlays], "one more") // what was lost is free by now
}
