package e2e

import (
	"context"
	"fmt"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/tulle-net/tulle/internal/lab"
	"github.com/tulle-net/tulle/node"
)

//	a ──[ul]── b          a1 is limited by the capability `bandwidth`; a2, and b1 on the other host, are not
//	├── a1
//	└── a2     b1

// TestCNIBandwidth: a limit holds within 15 % in both directions, on one host and on
// two, and binds nobody else.
func TestCNIBandwidth(t *testing.T) {
	t.Parallel()
	l, _, h := hosts(t, 2, lab.Underlay{Prefix4: underlay4, Offloads: lab.Wire})
	nodes := joined(t, l, h, nil)
	a, b := nodes[0], nodes[1]
	box := containers(t, l, "a1", "a2", "b1")
	a.do("overlay", "create", "blue", "--subnet", "10.32.0.0/16")
	known(t, 5*time.Second, "blue", true, nodes...)
	at2, atB := a.attaches("blue", "--netns", box[1].Path()), b.attaches("blue", "--netns", box[2].Path())
	c := cniNetwork(t, a, "net-1", "blue", "1.1.0")

	// Reno fills the queue that it finds; what is the host's default may spare it.
	for _, b := range box {
		if err := b.Sysctl("net/ipv4/tcp_congestion_control", "reno"); err != nil {
			t.Fatal(err)
		}
	}
	move := func(from, to *lab.Host, dst netip.Addr, bits int64) float64 {
		t.Helper()
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		defer cancel()
		got, err := l.Transfer(ctx, from, to, netip.AddrPortFrom(dst, 0), lab.Amount{Bytes: bits / 8})
		if err != nil {
			t.Fatalf("TCP %s → %s: %v", from.Name(), to.Name(), err)
		}
		return got.BitsPerSecond()
	}
	for _, rate := range []int64{10e6, 100e6} {
		burst := rate / 20
		limits := object{"runtimeConfig": object{"bandwidth": object{"ingressRate": rate, "ingressBurst": burst, "egressRate": rate, "egressBurst": burst}}}
		a1 := attachment{fmt.Sprint("limited", rate), box[0].Path(), "eth0", ""}
		at1 := c.add(a1, limits).IPs[0].Address.Addr()
		for _, way := range []struct {
			name     string
			from, to *lab.Host
			dst      netip.Addr
		}{
			{"egress to another host", box[0], box[2], atB.Addr()}, {"ingress from another host", box[2], box[0], at1},
			{"egress on the host", box[0], box[1], at2.Addr()}, {"ingress on the host", box[1], box[0], at1},
		} {
			low, high := 0.85*float64(rate), 1.15*float64(rate)
			// A machine that is busy with other tests may be slower, never faster.
			for try := 1; ; try++ {
				got := move(way.from, way.to, way.dst, rate*6/5)
				t.Logf("%s, limited to %d Mbit/s: %.1f Mbit/s of payload", way.name, rate/1e6, got/1e6)
				if got > high || got < low && try == 3 {
					t.Errorf("%s: %.1f Mbit/s, want %d within 15 %%", way.name, got/1e6, rate/1e6)
				}
				if got >= low || try == 3 {
					break
				}
			}
		}
		c.done("DEL", a1, limits)
	}

	part(t, "after a restart", nodes, func(t *testing.T) {
		const rate = 50e6
		a1 := attachment{"restarted", box[0].Path(), "eth0", ""}
		limits := object{"runtimeConfig": object{"bandwidth": object{"ingressRate": int64(rate), "egressRate": int64(rate)}}}
		at1 := c.add(a1, limits).IPs[0].Address.Addr()
		a.kill()
		a.start()
		ping(t, box[2], at1, 10*time.Second)
		for i, got := range []float64{move(box[0], box[2], atB.Addr(), rate), move(box[2], box[0], at1, rate)} {
			if got > 1.25*rate { // of a second or so, of which a tenth may be a burst
				t.Errorf("direction %d: %.1f Mbit/s after a restart, limited to %d", i, got/1e6, int(rate/1e6))
			}
		}
		c.done("DEL", a1, limits)
	})

	part(t, "who waits keeps nobody else waiting", nodes, func(t *testing.T) {
		limits := object{"runtimeConfig": object{"bandwidth": object{"egressRate": 8e6, "egressBurst": 8e5}}}
		a1 := attachment{"slow", box[0].Path(), "eth0", ""}
		c.add(a1, limits)
		if list := a.askedBy("net-1", "slow"); len(list) != 1 || list[0].Limits == nil || *list[0].Limits != (node.Limits{EgressRate: 8e6, EgressBurst: 8e5}) {
			t.Errorf("the node says of its limits: %+v", list)
		}
		ctx, cancel := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		wg.Go(func() { // as much as it can, until it is cancelled
			_, _ = l.Transfer(ctx, box[0], box[2], netip.AddrPortFrom(atB.Addr(), 0), lab.Amount{Bytes: 1 << 40})
		})
		free := move(box[1], box[2], atB.Addr(), 400e6)
		t.Logf("beside it, without a limit: %.0f Mbit/s", free/1e6)
		if free < 80e6 {
			t.Errorf("an endpoint without a limit gets %.1f Mbit/s beside one with 8", free/1e6)
		}
		// A queue of a thousand super-frames would be one of a minute.
		out := runIn(t, box[0], "ping", "-c", "8", "-i", "0.2", "-W", "5", atB.Addr().String())
		_, rtt, _ := strings.Cut(out, "rtt ")
		t.Logf("a ping beside TCP that fills the limit: %s", strings.TrimSpace(rtt))
		var low, mean, most float64
		if _, err := fmt.Sscanf(rtt, "min/avg/max/mdev = %f/%f/%f/", &low, &mean, &most); err != nil || mean > 300 {
			t.Errorf("a ping takes %v ms (%v): %s", mean, err, out)
		}
		// DEL does not wait for what waits.
		start := time.Now()
		c.done("DEL", a1)
		if took := time.Since(start); took > time.Second {
			t.Errorf("DEL of an endpoint that waits takes %v", took)
		}
		cancel()
		wg.Wait()
	})
}
