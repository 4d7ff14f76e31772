//go:build soak

package e2e

import (
	"testing"
	"time"
)

//	a ──[ul]── m ──[vl]── b      datagrams each way, counted, while sessions are renewed as they age

// TestSoakSealedRenewal: in five minutes each session is renewed twice, over a
// cable that loses and reorders what agrees on them, or not; not one datagram of
// the overlay is lost.
func TestSoakSealedRenewal(t *testing.T) {
	for name, percent := range map[string]int{"good cable": 0, "bad cable": 20} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := tapped(t)
			s := &sealed{t: t, l: w.l}
			s.start(w.a, sealedOverlay(1))
			s.start(w.b, sealedOverlay(2))
			s.meet()
			lost, late := w.bad(percent, isQUIC)
			flow := countFlow(t, w.a, 1, w.b, 2)
			var renewed [2]int
			var age [2]float64
			for end := time.Now().Add(5 * time.Minute); time.Now().Before(end); time.Sleep(100 * time.Millisecond) {
				for i, n := range s.nodes {
					st, ok := n.session(s.nodes[1-i].name, sealedName)
					if !ok {
						t.Errorf("%s has no session", n.name)
					}
					if st.AgeSeconds < age[i] {
						renewed[i]++
						t.Logf("%s has renewed a session of %.1f s", n.name, age[i])
					}
					age[i] = st.AgeSeconds
				}
			}
			flow.settle("five minutes")
			t.Logf("%d packets of QUIC lost, %d late", lost.Load(), late.Load())
			for i, n := range s.nodes {
				if renewed[i] < 2 {
					t.Errorf("%s has renewed its session %d times in five minutes, want twice at least", n.name, renewed[i])
				}
				if d := n.dropped("forged") + n.dropped("replay") + n.dropped("unknown_session") + n.dropped("no_session"); d != 0 {
					t.Errorf("%s: drops %v", n.name, n.status().Drops)
				}
			}
		})
	}
}
