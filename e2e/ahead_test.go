package e2e

import (
	"math/rand/v2"
	"net"
	"sync"
	"testing"
	"time"

	"github.com/tulle-net/tulle/internal/lab"
)

// TestSmallFramesFirst: while somebody pings beside them, two streams arrive whole, and what
// went ahead of them has not overtaken anything of their own, nor left the replay window.
func TestSmallFramesFirst(t *testing.T) {
	t.Parallel()
	for _, offloads := range []lab.Offloads{lab.NIC, lab.Wire} {
		t.Run(string(offloads), func(t *testing.T) {
			l, sw, h := hosts(t, 2, lab.Underlay{Offloads: offloads})
			s := &sealed{t: t, l: l, sw: sw}
			file := settings(t, l, "aqm: off") // it would lose segments
			for i := range h {
				s.start(h[i], sealedOverlay(i+1), "--config", file)
			}
			s.meet()
			pings := []*beat{heartbeat(t, h[0], address(2)), heartbeat(t, h[1], address(1))}
			w := &tcpWorld{a: h[0], b: h[1]}
			a, b := w.connect(t, nil)
			var both sync.WaitGroup
			both.Go(func() { carries(t, a, b, randomBytes(48<<20), inPieces) })
			both.Go(func() { carries(t, b, a, randomBytes(48<<20+1), inPieces) })
			both.Wait()
			now := time.Now()
			for i, p := range pings {
				if last := time.Unix(0, p.last.Load()); now.Sub(last) > 2*time.Second {
					t.Errorf("host %d: nobody answers since %v", i, now.Sub(last))
				}
			}
			for i, c := range []*net.TCPConn{a, b} {
				if n := tcpInfo(t, c).Reord_seen; n != 0 {
					t.Errorf("end %d: segments were overtaken %d times", i, n)
				}
			}
			s.undisturbed()
		})
	}
}

// inPieces writes data in writes of many lengths: streams have short ends.
func inPieces(c net.Conn, data []byte) error {
	for r := rand.New(rand.NewPCG(1, 2)); len(data) > 0; {
		n := min(1+r.IntN(40_000), len(data))
		if _, err := c.Write(data[:n]); err != nil {
			return err
		}
		data = data[n:]
	}
	return nil
}
