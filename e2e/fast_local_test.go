package e2e

import (
	"context"
	"net/netip"
	"sync"
	"testing"
	"time"

	"github.com/tulle-net/tulle/bridge"
	"github.com/tulle-net/tulle/ether"
	"github.com/tulle-net/tulle/internal/lab"
	"github.com/tulle-net/tulle/internal/lab/labtest"
	"github.com/tulle-net/tulle/tap"
	"github.com/tulle-net/tulle/underlay/underlaytest"
)

//	host a [eth0 10.32.0.1] ── bridge of one overlay in this process ── [eth0 10.32.0.2] host b
//
// Two TAPs of one overlay on one node. The command line has no static form of
// this (a static overlay has one TAP), so the test is the node, as
// examples/embed is.

// localHosts are two hosts on one overlay of a node in this process, and what
// passes the bridge goes through counted.
func localHosts(t testing.TB, driver tap.Driver) (l *lab.Lab, h [2]*lab.Host, tunnel *bridge.Tunnel) {
	t.Helper()
	l = labtest.New(t)
	self := netip.MustParseAddrPort("192.0.2.1:4789")
	conn := underlaytest.NewNet(1).Conn(self)
	tunnel = bridge.NewTunnel(bridge.TunnelConfig{Conn: conn, Self: []netip.Addr{self.Addr()}})
	ctx, stop := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() {
		if err := tunnel.Run(ctx); err != nil {
			t.Error(err)
		}
	})
	br, err := tunnel.Add(bridge.Config{Name: "blue", VNI: 100})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { // before the lab's, which was made first
		stop()
		if err := conn.Close(); err != nil {
			t.Error(err)
		}
		running.Wait()
		if err := br.Close(); err != nil {
			t.Error(err)
		}
	})
	for i := range h {
		if h[i], err = l.AddHost(string(rune('a' + i))); err != nil {
			t.Fatal(err)
		}
		dev, err := tap.Open(tap.Config{Name: "eth0", MAC: ether.MACOf(address(i + 1)), MTU: 1450, Driver: driver, Netns: h[i].Path(),
			Addresses: []netip.Prefix{netip.PrefixFrom(address(i+1), 16), netip.PrefixFrom(addressV6(i+1), 64)}})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := br.AddPort(dev); err != nil {
			t.Fatal(err)
		}
	}
	return l, h, tunnel
}

func TestLocalSwitching(t *testing.T) {
	t.Parallel()
	for _, driver := range []tap.Driver{tap.DriverOffload, tap.DriverPlain} {
		t.Run(string(driver), func(t *testing.T) {
			l, h, tunnel := localHosts(t, driver)
			ping(t, h[0], address(2), 5*time.Second)
			ping(t, h[1], addressV6(1), 5*time.Second)
			transfer(t, l, h[1], h[0], addressV6(1), 16<<20)
			seen := captureTAP(t, h[1], "eth0")
			const n = 16 << 20 // what the capture's buffer holds
			got := transfer(t, l, h[0], h[1], address(2), n)
			t.Logf("%.2f Gbit/s", got.BitsPerSecond()/1e9)
			eventually(t, 10*time.Second, "the capture has seen all", func() bool {
				seen.mu.Lock()
				defer seen.mu.Unlock()
				return seen.bytes >= n
			})
			seen.mu.Lock()
			defer seen.mu.Unlock()
			// Whole means: as long as the kernel made them. Plain ones are as long as
			// the MTU.
			mean := n / max(seen.packets, 1)
			t.Logf("%d packets, %d of them super-frames, the longest of %d bytes, %d bytes of payload in each on average", seen.packets, seen.supers, seen.longest, mean)
			switch {
			case driver == tap.DriverOffload && (mean < 10_000 || seen.longest < 50_000):
				t.Errorf("%d bytes in each packet on average, the longest has %d: want super-frames whole", mean, seen.longest)
			case driver == tap.DriverPlain && seen.supers > 0:
				t.Errorf("%d super-frames through the plain driver", seen.supers)
			}
			tunnel.Drops().Each(func(name string, count uint64) {
				if count != 0 {
					t.Errorf("drop %s = %d, want 0", name, count)
				}
			})
			unharmed(t, h[0], h[1])
		})
	}
}

// BenchmarkLocalSwitching has TCP run between two hosts of one node and between
// the same two over a veth pair, in turn, and reports both rates and their ratio
// (want 0.5 at least). It needs root; one operation is one round.
func BenchmarkLocalSwitching(b *testing.B) {
	l, h, _ := localHosts(b, tap.DriverOffload)
	veth := [2]netip.Addr{netip.MustParseAddr("10.33.0.1"), netip.MustParseAddr("10.33.0.2")}
	if out, err := h[0].Run(b.Context(), "ip", "link", "add", "veth0", "mtu", "1450", "type", "veth", "peer", "name", "veth0", "mtu", "1450", "netns", h[1].Path()); err != nil {
		b.Fatalf("needs iproute2: %v\n%s", err, out)
	}
	for i := range h {
		if err := h[i].AddAddr("veth0", netip.PrefixFrom(veth[i], 24)); err != nil {
			b.Fatal(err)
		}
		if err := h[i].SetUp("veth0", true); err != nil {
			b.Fatal(err)
		}
	}
	rate := func(to netip.Addr) float64 {
		got, err := l.Transfer(b.Context(), h[0], h[1], netip.AddrPortFrom(to, 0), lab.Amount{For: time.Second})
		if err != nil {
			b.Fatal(err)
		}
		return got.BitsPerSecond() / 1e9
	}
	var local, pair float64
	rounds := 0
	for b.Loop() {
		local += rate(address(2))
		pair += rate(veth[1])
		rounds++
	}
	b.ReportMetric(local/float64(rounds), "Gbit/s-local")
	b.ReportMetric(pair/float64(rounds), "Gbit/s-veth")
	b.ReportMetric(local/pair, "local/veth")
	b.ReportMetric(0, "ns/op")
}
