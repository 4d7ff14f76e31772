package e2e

import (
	"bytes"
	"context"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/tulle-net/tulle/internal/lab"
)

//	a ──[ul]── b      500 overlays on a, none of them busy; ten on each, all of them busy

// memory reads a line of /proc/PID/status in bytes: VmRSS, VmHWM.
func memory(t *testing.T, pid int, line string) int {
	t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	for l := range strings.Lines(string(text)) {
		if f := strings.Fields(l); len(f) == 3 && f[0] == line+":" {
			kib, err := strconv.Atoi(f[1])
			if err != nil {
				t.Fatal(err)
			}
			return kib << 10
		}
	}
	t.Fatalf("/proc/%d/status has no %s", pid, line)
	return 0
}

// cpuTime is what a process has used so far, in user and kernel, to 10 ms.
func cpuTime(t *testing.T, pid int) time.Duration {
	t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		t.Fatal(err)
	}
	f := strings.Fields(string(text[bytes.LastIndexByte(text, ')')+1:]))
	var ticks int
	for _, v := range f[11:13] { // utime, stime
		n, err := strconv.Atoi(v)
		if err != nil {
			t.Fatal(err)
		}
		ticks += n
	}
	return time.Duration(ticks) * 10 * time.Millisecond // USER_HZ is 100 everywhere
}

// manyConfig writes a file with overlays o0, o1, … of VNIs from 1000 on; host i
// has the address 10.64.N.i in overlay N, where addressed.
func manyConfig(t *testing.T, l *lab.Lab, count, i int, addressed bool) string {
	t.Helper()
	var file bytes.Buffer
	file.WriteString("overlays:\n")
	for n := range count {
		fmt.Fprintf(&file, "  - {name: o%d, vni: %d, encryption: none, driver: offload", n, 1000+n)
		if addressed {
			fmt.Fprintf(&file, ", address: 10.64.%d.%d/24", n, i)
		}
		file.WriteString("}\n")
	}
	conf := filepath.Join(l.Dir(), fmt.Sprintf("many-%d.yaml", i))
	if err := os.WriteFile(conf, file.Bytes(), 0o600); err != nil {
		t.Fatal(err)
	}
	return conf
}

// TestIdleTAPs: a node with 500 TAPs stays under 100 MB and takes next to no CPU: 2 %
// of one core at most, with a gossip partner at its side (0.2 to 0.6 % was
// measured on a quiet machine).
func TestIdleTAPs(t *testing.T) {
	t.Parallel()
	const count = 500
	l, sw, h := hosts(t, 2, lab.Underlay{})
	up(t, l, h[1], "--overlay", overlay(2))
	start := time.Now()
	// Its API answers when all TAPs are there.
	a := up(t, l, h[0], "--join", seed(sw.Addr(h[1])), "--config", manyConfig(t, l, count, 1, false))
	t.Logf("%d TAPs are up after %v", count, time.Since(start).Round(10*time.Millisecond))
	if got := len(a.status().Overlays); got != count {
		t.Fatalf("%d overlays, want %d", got, count)
	}
	pid := a.proc.Pid()
	// Each kernel device says hello (MLD, router solicitations) for some seconds
	// after it came up: one idle span of three will do.
	const span, bound = 5 * time.Second, 100 * time.Millisecond
	var used time.Duration
	for range 3 {
		before := cpuTime(t, pid)
		time.Sleep(span) // the measurement itself
		if used = cpuTime(t, pid) - before; used <= bound {
			break
		}
	}
	rss := memory(t, pid, "VmRSS")
	t.Logf("idle: %v of CPU in %v, %d MB resident, %d at most", used, span, rss/1e6, memory(t, pid, "VmHWM")/1e6)
	if used > bound {
		t.Errorf("%v of CPU in %v while idle, want %v at most", used, span, bound)
	}
	if rss >= 100e6 {
		t.Errorf("%d MB resident with %d TAPs, want less than 100", rss/1e6, count)
	}
}

// TestTenBusyOverlays: under full load on ten overlays at once a node never
// holds 64 MB or more.
func TestTenBusyOverlays(t *testing.T) {
	t.Parallel()
	const count = 10
	l, sw, h := hosts(t, 2, lab.Underlay{})
	nodes := []*tulle{
		up(t, l, h[0], "--config", manyConfig(t, l, count, 1, true)),
		up(t, l, h[1], "--config", manyConfig(t, l, count, 2, true), "--join", seed(sw.Addr(h[0]))),
	}
	inner := func(overlay, host int) netip.Addr { return netip.AddrFrom4([4]byte{10, 64, byte(overlay), byte(host)}) }
	for n := range count {
		ping(t, h[0], inner(n, 2), 5*time.Second)
	}
	var wg sync.WaitGroup
	var mu sync.Mutex
	var bits float64
	for n := range count {
		for from := range 2 {
			wg.Go(func() {
				ctx, cancel := context.WithTimeout(t.Context(), 25*time.Second)
				defer cancel()
				got, err := l.Transfer(ctx, h[from], h[1-from], netip.AddrPortFrom(inner(n, 2-from), 0), lab.Amount{For: 3 * time.Second})
				if err != nil {
					t.Error(err)
					return
				}
				mu.Lock()
				defer mu.Unlock()
				bits += got.BitsPerSecond()
			})
		}
		// Small datagrams fill other buffers than super-frames do.
		c := flowSocket(t, h[0], netip.AddrPortFrom(inner(n, 1), 9000), netip.AddrPortFrom(inner(n, 2), 9000), 0)
		wg.Go(func() {
			sendFlow(t, c, uint32(n), 64, false, time.Now().Add(3*time.Second))
		})
	}
	wg.Wait()
	t.Logf("%.2f Gbit/s in all", bits/1e9)
	for _, n := range nodes {
		peak := memory(t, n.proc.Pid(), "VmHWM")
		t.Logf("%s: %.1f MB resident at most", n.name, float64(peak)/1e6)
		if peak >= 64e6 {
			t.Errorf("%s: %.1f MB resident under load, want less than 64", n.name, float64(peak)/1e6)
		}
	}
	unharmed(t, h...)
}
