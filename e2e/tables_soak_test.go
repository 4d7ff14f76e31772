//go:build soak

package e2e

import (
	"context"
	bin "encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"golang.org/x/time/rate"

	"github.com/tulle-net/tulle/internal/lab"
	"github.com/tulle-net/tulle/node"
)

// wireCount counts what passes a host's device on the underlay: VXLAN datagrams, and ARP
// frames in them.
type wireCount struct {
	datagrams, arp atomic.Int64
	lastARP        atomic.Int64 // Unix time, ms
	strict         atomic.Bool  // ARP is a fault, and the first frames are told
}

func watchWire(t *testing.T, h *lab.Host) *wireCount {
	t.Helper()
	var fd int
	if err := h.Do(func() (err error) {
		// ETH_P_ALL, in network byte order.
		fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, int(bin.NativeEndian.Uint16([]byte{0, unix.ETH_P_ALL})))
		return err
	}); err != nil {
		t.Fatal(err)
	}
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Usec: 100000}); err != nil {
		t.Fatal(err)
	}
	w := &wireCount{}
	w.lastARP.Store(time.Now().UnixMilli())
	ctx, stop := context.WithCancel(context.Background())
	var done sync.WaitGroup
	done.Go(func() {
		defer unix.Close(fd)
		b := make([]byte, 65536)
		for ctx.Err() == nil {
			n, _, err := unix.Recvfrom(fd, b, 0)
			// Ethernet, IPv4 without options, UDP to 4789, VXLAN.
			if err != nil || n < 14+20+8+8+14 || b[12] != 8 || b[13] != 0 || b[14] != 0x45 || b[23] != unix.IPPROTO_UDP || bin.BigEndian.Uint16(b[36:]) != 4789 || b[42] != 8 {
				continue
			}
			w.datagrams.Add(1)
			if inner := b[14+20+8+8 : n]; bin.BigEndian.Uint16(inner[12:]) == unix.ETH_P_ARP && len(inner) >= 42 {
				w.lastARP.Store(time.Now().UnixMilli())
				if w.strict.Load() && w.arp.Add(1) <= 5 {
					t.Errorf("%s: ARP on the underlay: %x → %x, operation %d, %x %v asks or tells %x %v", h.Name(), inner[6:12], inner[:6],
						inner[21], inner[22:28], net.IP(inner[28:32]), inner[32:38], net.IP(inner[38:42]))
				}
			}
		}
	})
	t.Cleanup(func() { stop(); done.Wait() })
	return w
}

// TestSoakPairs: 500 endpoints on 5 nodes, 5,000 random pairs that cover every endpoint
// and every pair of nodes reach each other, without an ARP frame on the underlay.
func TestSoakPairs(t *testing.T) {
	const perNode, pairs = 100, 5000
	l, _, h := hosts(t, 5, lab.Underlay{Prefix4: underlay4, Offloads: lab.Wire})
	nodes := joined(t, l, h, nil)
	nodes[0].do("overlay", "create", "blue", "--subnet", "10.32.0.0/16", "--encryption", "none")
	known(t, 5*time.Second, "blue", true, nodes...)
	type station struct {
		host *lab.Host
		ip   netip.Addr
		node int
	}
	var stations []station
	began := time.Now()
	for i := range perNode * len(nodes) {
		c := containers(t, l, fmt.Sprintf("c%d", i))[0]
		e, err := nodes[i%len(nodes)].tryAttach(node.AttachRequest{Overlay: "blue", Netns: c.Path(), Name: fmt.Sprintf("c%d", i)})
		if err != nil {
			t.Fatal(err)
		}
		stations = append(stations, station{c, e.IPs[0].Addr(), i % len(nodes)})
	}
	t.Logf("%d endpoints are up after %v", len(stations), time.Since(began).Round(time.Second))
	eventually(t, 10*time.Second, "every node lists all", func() bool {
		return !slices.ContainsFunc(nodes, func(n *tulle) bool { return len(get[node.Endpoints](n, "/v1/endpoints").Endpoints) != len(stations) })
	})
	settled(t, "blue", nodes...)
	var wires []*wireCount
	for _, host := range h {
		wires = append(wires, watchWire(t, host))
	}
	// Who was attached last is still asking whether its address is anybody else's,
	// with a probe a second.
	eventually(t, 10*time.Second, "checks for duplicates are over", func() bool {
		return !slices.ContainsFunc(wires, func(w *wireCount) bool { return time.Now().UnixMilli()-w.lastARP.Load() < 1500 })
	})
	for _, w := range wires {
		w.strict.Store(true)
	}
	type pair struct{ from, to int }
	var list []pair
	seen := map[pair]bool{}
	add := func(p pair) {
		if p.from != p.to && !seen[p] {
			seen[p], list = true, append(list, p)
		}
	}
	for i := range stations { // everybody sends, and gets
		add(pair{i, (i + 1) % len(stations)})
	}
	for from := range nodes { // from every node to every node; station i is at node i % 5
		for to := range nodes {
			add(pair{from, to + len(nodes)})
		}
	}
	for len(list) < pairs {
		add(pair{rand.IntN(len(stations)), rand.IntN(len(stations))})
	}
	covered, between := map[int]bool{}, map[pair]bool{}
	for _, p := range list {
		covered[p.from], covered[p.to] = true, true
		between[pair{stations[p.from].node, stations[p.to].node}] = true
	}
	if len(covered) != len(stations) || len(between) != 25 {
		t.Fatalf("the pairs cover %d endpoints and %d pairs of nodes", len(covered), len(between))
	}
	// Each pair is two entries in the kernel's table of neighbours, which has room for 1,024
	// of all namespaces and keeps those of the last 5 s at all cost: both are removed, so that
	// each pair resolves anew.
	pace := rate.NewLimiter(80, 1)
	var failed atomic.Int32
	work := make(chan pair)
	var wg sync.WaitGroup
	for range 32 {
		wg.Go(func() {
			for p := range work {
				ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
				from, to := stations[p.from], stations[p.to]
				if _, err := from.host.WaitPing(ctx, to.ip); err != nil {
					if failed.Add(1) < 10 {
						t.Errorf("c%d → c%d: %v", p.from, p.to, err)
					}
				}
				cancel()
				if err := errors.Join(from.host.ForgetNeighbour("eth0", to.ip), to.host.ForgetNeighbour("eth0", from.ip)); err != nil {
					t.Error(err)
				}
			}
		})
	}
	for _, p := range list {
		if err := pace.Wait(t.Context()); err != nil {
			t.Fatal(err)
		}
		work <- p
	}
	close(work)
	wg.Wait()
	var datagrams, arp int64
	for _, w := range wires {
		datagrams += w.datagrams.Load()
		arp += w.arp.Load()
	}
	t.Logf("%d of %d pairs reach each other; %d VXLAN datagrams seen, %d of them ARP", len(list)-int(failed.Load()), len(list), datagrams, arp)
	if arp > 0 {
		t.Errorf("%d ARP frames on the underlay", arp)
	}
	if datagrams < 2*pairs { // nobody looked
		t.Errorf("only %d datagrams were seen", datagrams)
	}
}
