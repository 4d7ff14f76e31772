package e2e

import (
	"testing"
	"time"

	"github.com/tulle-net/tulle/ether"
	"github.com/tulle-net/tulle/internal/lab"
)

//	                ┌── a (tulle, driver=offload)
//	c (tulle) ──[ul]┤
//	                └── b (tulle, driver=plain)
//
// c's kernel sends to nobody's MAC, so each frame goes sealed to both, and must
// come out of both as it would have without a tunnel. Once c cuts super-frames
// itself (offload), and once its kernel does (plain).

// TestSealedDifferential: super-frames, frames with unfilled checksums, damaged
// ones and any others come out of each driver with every bit right, each flow in
// order, and no kernel finds a wrong checksum that was not sent.
func TestSealedDifferential(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct{ driver, cipher string }{{"offload", "auto"}, {"plain", "auto"}, {"offload", "chacha20-poly1305"}} {
		t.Run(tt.driver+" "+tt.cipher, func(t *testing.T) {
			l, sw, h := hosts(t, 3, lab.Underlay{Prefix4: underlay4, MTU: 1640}) // room for two VLAN tags
			s := &sealed{t: t, l: l, sw: sw}
			cipher, conf := "cipher="+tt.cipher, settings(t, l, nothingShed)
			a := s.start(h[0], sealedOverlay(1, "driver=offload", "bum-limit=0", "unknown-unicast=flood", cipher), "--config", conf)
			b := s.start(h[1], sealedOverlay(2, "driver=plain", "bum-limit=0", "unknown-unicast=flood", cipher), "--config", conf)
			c := s.start(h[2], sealedOverlay(3, "driver="+tt.driver, "bum-limit=0", "unknown-unicast=flood", cipher), "--config", conf)
			inOrder(t, s.nodes...)
			s.meet()
			c.eventually(5*time.Second, "floods to both", func() bool { return len(c.status().Overlays[0].FloodList) == 2 })
			ends := []*tulle{a, b}
			captures := []*fastCapture{captureTAP(t, a.host, "blue0"), captureTAP(t, b.host, "blue0")}
			ledgers := []*fastLedger{newLedger(canonical), newLedger(canonical)}
			inject := injectTAP(t, c.host, "blue0")
			g := newGen(11, 96, 0)
			start, supers, unfilled, total := time.Now(), 0, 0, 0
			var cut ether.Segmenter
			for total < 8_000 && !t.Failed() {
				for range 20 { // a burst is no more than all buffers on the way hold
					flow, frame, m := g.outgoing()
					if m.GSO != ether.GSONone {
						supers++
					}
					if m.Checksum == ether.ChecksumPartial {
						unfilled++
					}
					inject.send(frame, m)
					if err := cut.Reset(frame, m); err != nil {
						t.Fatal(err)
					}
					for cut.Count() > 0 {
						seg := make([]byte, cut.MaxLen())
						seg = seg[:cut.Next(seg)]
						for _, l := range ledgers {
							l.sent(flow, seg)
						}
						total++
					}
				}
				for i, c := range captures {
					if got := c.taken(total, generated, patience); len(got) != total {
						t.Errorf("%s: %d frames came out, want %d", ends[i].name, len(got), total)
					}
				}
			}
			for i, c := range captures {
				for _, f := range c.taken(total, generated, 0) {
					ledgers[i].came(f)
				}
				for _, fault := range ledgers[i].missing() {
					t.Errorf("%s: %s", ends[i].name, fault)
				}
				c.mu.Lock()
				t.Logf("%s: %d frames, %d of what came were super-frames, the longest of %d bytes", ends[i].name, total, c.supers, c.longest)
				if c.err != nil {
					t.Errorf("%s: %v", ends[i].name, c.err)
				}
				if offload := i == 0; offload && c.supers == 0 || !offload && c.supers > 0 {
					t.Errorf("%s: %d super-frames", ends[i].name, c.supers)
				}
				c.mu.Unlock()
			}
			if supers == 0 || unfilled <= supers/2 {
				t.Errorf("%d super-frames and %d unfilled checksums: this tested less than it should", supers, unfilled)
			}
			s.undisturbed()
			t.Logf("%d super-frames, %d frames to each in %v", supers, total, time.Since(start).Round(time.Millisecond))
		})
	}
}

// TestSealedUnfilled: TCP whose checksums the sender's kernel left to its device
// crosses to a node whose driver cannot hand that on, and the other way: no
// kernel counts a wrong one, and the flag is on the wire.
func TestSealedUnfilled(t *testing.T) {
	t.Parallel()
	l, sw, h := hosts(t, 2, lab.Underlay{Prefix4: underlay4, Offloads: lab.Wire})
	s := &sealed{t: t, l: l, sw: sw}
	a := s.start(h[0], sealedOverlay(1, "driver=offload"))
	b := s.start(h[1], sealedOverlay(2, "driver=plain"))
	ping(t, a.host, address(2), 20*time.Second)
	atB, atA := captureTAP(t, b.host, "ul"), captureTAP(t, a.host, "ul")
	w := &tcpWorld{a: a.host, b: b.host}
	c, srv := w.connect(t, nil)
	bothWays(t, c, srv, 8<<20)
	for _, n := range []*tulle{a, b} {
		unharmed(t, n.host)
	}
	flagged := func(c *fastCapture) (n int) {
		for _, d := range c.sealedOnly() {
			n += int(d.payload[1] & 1)
		}
		return n
	}
	if n := flagged(atB); n < 1000 {
		t.Errorf("%d datagrams of the offload driver say that their checksum is unfilled, want most", n)
	}
	if n := flagged(atA); n != 0 {
		t.Errorf("%d datagrams of the plain driver say that their checksum is unfilled, want none", n)
	}
	s.undisturbed()
}
