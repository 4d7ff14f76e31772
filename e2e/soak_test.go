//go:build soak

package e2e

import (
	"context"
	bin "encoding/binary"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/tulle-net/tulle/internal/lab"
)

//	a ──[ul, wire]── b      everything at once, for TULLE_SOAK (default 10m)

// soakFor is how long the mixed run takes.
func soakFor(t *testing.T) time.Duration {
	t.Helper()
	text := os.Getenv("TULLE_SOAK")
	if text == "" {
		return 10 * time.Minute
	}
	d, err := time.ParseDuration(text)
	if err != nil || d < 10*time.Second {
		t.Fatalf("TULLE_SOAK=%s: want a duration of 10s or more (%v)", text, err)
	}
	return d
}

// TestSoakMixed: TCP in one and in four streams, UDP of 64 and of 1,400 bytes
// and a ping-pong, all at once. Nothing is damaged, nothing grows, and what TCP
// sends again stands beside what the nodes say they lost.
func TestSoakMixed(t *testing.T) {
	span := soakFor(t)
	l, sw, h := hosts(t, 2, lab.Underlay{Prefix4: underlay4, Offloads: lab.Wire})
	a := up(t, l, h[0], "--overlay", overlay(1))
	b := up(t, l, h[1], "--join", seed(sw.Addr(h[0])), "--overlay", overlay(2))
	nodes := []*tulle{a, b}
	ping(t, h[0], address(2), 5*time.Second)
	end := time.Now().Add(span)
	ctx, cancel := context.WithDeadline(t.Context(), end.Add(time.Minute))
	defer cancel()
	var wg sync.WaitGroup
	var moved [2]atomic.Int64 // bytes by TCP, by direction

	// Bulk: connections of up to 20 s, so that starts and ends are in it too. One
	// stream goes one way, four the other.
	bulk := func(from int) {
		for time.Until(end) > time.Second {
			left := min(time.Until(end), 20*time.Second)
			got, err := l.Transfer(ctx, h[from], h[1-from], netip.AddrPortFrom(address(2-from), 0), lab.Amount{For: left})
			if err != nil {
				t.Error(err)
				return
			}
			moved[from].Add(got.Bytes)
		}
	}
	wg.Go(func() { bulk(0) })
	for range 4 {
		wg.Go(func() { bulk(1) })
	}
	var sent, came, late [2]atomic.Uint64 // UDP, by size
	for i, size := range []int{64, 1400} {
		for side := range 2 {
			ends := [2]netip.AddrPort{netip.AddrPortFrom(address(1), uint16(10000+i)), netip.AddrPortFrom(address(2), uint16(10000+i))}
			c := flowSocket(t, h[side], ends[side], ends[1-side], 0)
			wg.Go(func() { sent[i].Add(sendFlow(t, c, uint32(i), size, false, end)) })
			wg.Go(func() {
				n, wrong, _ := receiveFlow(t, c, uint32(i), end.Add(time.Second))
				came[i].Add(n)
				late[i].Add(wrong)
			})
		}
	}
	var trips []time.Duration
	client, server := (&tcpWorld{a: h[0], b: h[1]}).connect(t, nil)
	if err := client.SetDeadline(end.Add(time.Minute)); err != nil {
		t.Fatal(err)
	}
	if err := server.SetDeadline(end.Add(time.Minute)); err != nil {
		t.Fatal(err)
	}
	wg.Go(func() {
		for buf := make([]byte, 8); ; {
			n, err := server.Read(buf)
			if err == nil {
				_, err = server.Write(buf[:n])
			}
			if err != nil {
				return // the client has closed
			}
		}
	})
	wg.Go(func() {
		defer client.Close()
		buf := make([]byte, 8)
		for i := uint64(0); time.Now().Before(end); i++ {
			bin.BigEndian.PutUint64(buf, i)
			start := time.Now()
			_, err := client.Write(buf)
			if err == nil {
				_, err = client.Read(buf)
			}
			if err != nil || bin.BigEndian.Uint64(buf) != i {
				t.Errorf("ping-pong %d: %v, %v", i, bin.BigEndian.Uint64(buf), err)
				return
			}
			trips = append(trips, time.Since(start))
			time.Sleep(5 * time.Millisecond)
		}
	})

	growth(t, nodes, end)
	wg.Wait()
	slices.Sort(trips)
	if len(trips) > 0 {
		t.Logf("ping-pong under load: %d trips, p50 %v, p99 %v, p99.9 %v", len(trips), trips[len(trips)/2], trips[len(trips)*99/100], trips[len(trips)*999/1000])
	}
	for i, size := range []int{64, 1400} {
		t.Logf("UDP of %d bytes: of %d datagrams %d arrived, %d of them late", size, sent[i].Load(), came[i].Load(), late[i].Load())
		if came[i].Load() == 0 {
			t.Errorf("no UDP datagram of %d bytes arrived", size)
		}
	}
	explain(t, nodes, &moved)
	unharmed(t, h...)
}

// growth watches the nodes until end: after a minute (or a third of a shorter
// run) neither memory nor descriptors grow by more than a fifth.
func growth(t *testing.T, nodes []*tulle, end time.Time) {
	t.Helper()
	settle := min(time.Minute, time.Until(end)/3)
	first := map[*tulle][2]int{}
	begin := time.Now()
	for tick := time.NewTicker(5 * time.Second); time.Now().Before(end); <-tick.C {
		for _, n := range nodes {
			rss, files := memory(t, n.proc.Pid(), "VmRSS"), descriptors(t, n.proc.Pid())
			switch was, ok := first[n]; {
			case time.Since(begin) < settle:
			case !ok:
				first[n] = [2]int{rss, files}
				t.Logf("%s after %v: %.1f MB, %d descriptors", n.name, time.Since(begin).Round(time.Second), float64(rss)/1e6, files)
			// API calls of this test and gossip over TCP come and go.
			case float64(rss) > 1.2*float64(was[0]) || files > was[1]+8:
				t.Errorf("%s after %v: %.1f MB, %d descriptors; it had %.1f MB, %d", n.name, time.Since(begin).Round(time.Second),
					float64(rss)/1e6, files, float64(was[0])/1e6, was[1])
				first[n] = [2]int{rss, files} // say it once for each step
			}
		}
	}
	for _, n := range nodes {
		peak := memory(t, n.proc.Pid(), "VmHWM")
		t.Logf("%s at the end: %.1f MB, %.1f at most, %d descriptors, %d threads", n.name, float64(memory(t, n.proc.Pid(), "VmRSS"))/1e6, float64(peak)/1e6,
			descriptors(t, n.proc.Pid()), threads(t, n.proc.Pid()))
		if peak >= 64e6 {
			t.Errorf("%s held %.1f MB, want less than 64", n.name, float64(peak)/1e6)
		}
	}
}

func descriptors(t *testing.T, pid int) int { return entries(t, fmt.Sprintf("/proc/%d/fd", pid)) }
func threads(t *testing.T, pid int) int     { return entries(t, fmt.Sprintf("/proc/%d/task", pid)) }

func entries(t *testing.T, dir string) int {
	t.Helper()
	list, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	return len(list)
}

// explain sets what TCP sent again beside what was lost, and where. A
// congestion control that looks for the path's rate loses segments by design, so
// the bound is loose: one in a hundred, or what the nodes themselves report. A
// train that is lost is up to 64 segments.
func explain(t *testing.T, nodes []*tulle, moved *[2]atomic.Int64) {
	t.Helper()
	var reported uint64
	for _, n := range nodes {
		for reason, count := range n.status().Drops {
			if count == 0 {
				continue
			}
			t.Logf("%s: %s = %d", n.name, reason, count)
			switch reason {
			case "rx_overflow", "tx_full", "tap_write", "tap_overflow", "aqm":
				reported += count
			default:
				if expected(reason, count) {
					continue
				}
				t.Errorf("%s: drop %s = %d, want 0: no load explains it", n.name, reason, count)
			}
		}
	}
	for i, n := range nodes {
		again, out := netstat(t, n.host, "Tcp.RetransSegs"), netstat(t, n.host, "Tcp.OutSegs")
		t.Logf("%s: %.1f GB sent, %d segments, %d sent again (fast %d, after a timeout %d, without need %d); TAP: %s", n.name, float64(moved[i].Load())/1e9, out, again,
			netstat(t, n.host, "TcpExt.TCPFastRetrans"), netstat(t, n.host, "TcpExt.TCPTimeouts"), netstat(t, n.host, "TcpExt.TCPDSACKRecv"), tapDrops(t, n.host))
		if again > out/100+64*reported+lostAtTAP(t, n.host) {
			t.Errorf("%s: %d of %d segments sent again; the nodes report %d drops: this is not explained", n.name, again, out, reported)
		}
	}
}

// tapDrops is the TAP's line of /proc/net/dev, which counts what did not fit its queue.
func tapDrops(t *testing.T, h *lab.Host) string {
	t.Helper()
	rx, tx := deviceDrops(t, h, "blue0")
	return fmt.Sprintf("%d dropped on the way in, %d on the way out", rx, tx)
}

// lostAtTAP counts segments: a packet there is a super-frame.
func lostAtTAP(t *testing.T, h *lab.Host) uint64 {
	t.Helper()
	rx, tx := deviceDrops(t, h, "blue0")
	return 64 * (rx + tx)
}

// TestSoakPartition: a host that was cut off for 90 s, longer than the others
// keep trying, is found again by all within 65 s of the mend: Serf's own
// reconnecting and the join that is repeated once a minute.
func TestSoakPartition(t *testing.T) {
	l, sw, h := hosts(t, 3, lab.Underlay{})
	var nodes []*tulle
	for i := range h {
		args := []string{"--overlay", overlay(i + 1)}
		if i > 0 {
			args = append(args, "--join", seed(sw.Addr(h[0])))
		}
		nodes = append(nodes, up(t, l, h[i], args...))
	}
	everyone := func(but int) bool {
		for _, n := range nodes {
			for _, m := range nodes {
				if n == m {
					continue
				}
				apart := but >= 0 && (n == nodes[but] || m == nodes[but])
				if (n.sees(m.name) == "alive") == apart {
					return false
				}
			}
		}
		return true
	}
	eventually(t, 10*time.Second, "all see all", func() bool { return everyone(-1) })
	for _, victim := range []int{2, 0} { // one that joined, then the one that all joined
		if err := sw.Cut(h[victim]); err != nil {
			t.Fatal(err)
		}
		cut := time.Now()
		eventually(t, 30*time.Second, nodes[victim].name+" is given up, and gives up the others", func() bool { return everyone(victim) })
		time.Sleep(time.Until(cut.Add(90 * time.Second)))
		if err := sw.Mend(h[victim]); err != nil {
			t.Fatal(err)
		}
		took := eventually(t, 65*time.Second, "all see all again", func() bool { return everyone(-1) })
		t.Logf("%s was away for 90 s; all see all %v after the mend", nodes[victim].name, took.Round(10*time.Millisecond))
		for i := range h {
			for j := range h {
				if i != j {
					ping(t, h[i], address(j+1), 5*time.Second)
				}
			}
		}
	}
}

// deviceDrops reads a device's drops from /proc/net/dev.
func deviceDrops(t *testing.T, h *lab.Host, dev string) (rx, tx uint64) {
	t.Helper()
	text, err := h.ReadProcNet("dev")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(text) {
		name, numbers, ok := strings.Cut(line, ":")
		f := strings.Fields(numbers)
		if !ok || strings.TrimSpace(name) != dev || len(f) < 16 {
			continue
		}
		if rx, err = strconv.ParseUint(f[3], 10, 64); err == nil {
			tx, err = strconv.ParseUint(f[11], 10, 64)
		}
		if err != nil {
			t.Fatal(err)
		}
		return rx, tx
	}
	t.Fatalf("%s has no device %s", h.Name(), dev)
	return 0, 0
}
