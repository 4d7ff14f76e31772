// Package scale simulates clusters of up to thousands of nodes in one process.
//
// The nodes' membership and tables are the real code: discovery, with Serf and its
// exchange, and table. The network is in memory, and time is synctest's: it passes
// when everybody waits, so what is measured of it are timers and the network's delay,
// and no computing. docs/scale.md says what it found. See `make scale`.
package scale

import (
	"errors"
	"flag"
	"fmt"
	"os"
	"runtime"
	"runtime/pprof"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/tulle-net/tulle/discovery/discoverytest"
)

var (
	nodes     = flag.Int("nodes", 10, "simulate that many nodes, and measure")
	endpoints = flag.Int("endpoints", 20, "endpoints of each node")
	overlays  = flag.Int("overlays", 1, "overlays in all")
	verbose   = flag.Bool("progress", false, "tell how far joining is")
	each      = flag.Int("each", 1, "overlays that each node has")
	secure    = flag.Bool("secure", false, "a secure cluster")
	delay     = flag.Duration("delay", time.Millisecond, "what the network takes, one way")
	storm     = flag.Duration("storm", 10*time.Second, "all nodes start within it")
	rate      = flag.Int("rate", 10, "changes a second")
	during    = flag.Duration("during", 10*time.Second, "how long each part is measured")
	heap      = flag.String("heap", "", "write a profile of the memory to this file")
	loss      = flag.Float64("loss", 0.05, "part of the datagrams that is lost in the last part")
)

// The promises of docs/scale.md, with room: 20 nodes, and then 5 % of the datagrams
// lost, which gossip's other copies repair, and what is said again (discovery's sayAgain).
func TestChangesReachAll(t *testing.T) {
	for name, secure := range map[string]bool{"open": false, "secure": true} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				c := newCluster(t, layout{Nodes: 20, Endpoints: 5, Overlays: 4, Each: 2, Secure: secure, Delay: time.Millisecond, Storm: 2 * time.Second})
				c.start()
				defer c.end()
				if took := c.Storm + c.settleAfterStorm(); took > 10*time.Second {
					t.Errorf("all know all %v after the first started", took)
				}
				c.members()
				time.Sleep(5 * time.Second)
				still := c.changing(5, 8*time.Second)
				c.settle(20 * time.Second)
				s := spreadOf(still)
				t.Logf("%d changes: p50 %v, p99 %v", s.Changes, at(s.Last, 0.5), at(s.Last, 0.99))
				if len(s.Last) < s.Changes*9/10 || at(s.Last, 0.5) > 300*time.Millisecond || at(s.Last, 0.9) > 500*time.Millisecond {
					t.Errorf("%d of %d changes reached all, p50 %v, p90 %v", len(s.Last), s.Changes, at(s.Last, 0.5), at(s.Last, 0.9))
				}
				c.net.SetLoss(0.05)
				lossy := c.changing(5, 8*time.Second)
				c.settle(20 * time.Second)
				s = spreadOf(lossy)
				if c.net.Counts().Lost == 0 {
					t.Error("nothing was lost")
				}
				if len(s.Last) < s.Changes*9/10 || at(s.Last, 0.5) > 300*time.Millisecond || at(s.Last, 1) > 20*time.Second {
					t.Errorf("with loss: %d of %d changes reached all, p50 %v, the last %v", len(s.Last), s.Changes, at(s.Last, 0.5), at(s.Last, 1))
				}
			})
		})
	}
}

// TestMeasure measures a cluster as the flags say. `make scale` runs it with many nodes.
func TestMeasure(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t, layout{
			Nodes: *nodes, Endpoints: *endpoints, Overlays: *overlays, Each: *each,
			Secure: *secure, Delay: *delay, Storm: *storm,
		})
		m := &meter{c: c, wall: wallClock()}
		t.Logf("%+v", c.layout)
		c.start()
		defer c.end()
		m.begin()
		after := c.settleAfterStorm()
		m.end(fmt.Sprintf("join storm: all know all %v after the last start", after))
		c.members()
		time.Sleep(20 * time.Second) // what joining has left to say is said
		m.begin()
		time.Sleep(*during)
		m.end("idle")
		m.memory()
		m.begin()
		changes := c.changing(*rate, *during)
		m.end(fmt.Sprintf("%d changes a second", *rate))
		repaired := c.settle(time.Minute)
		m.spread(changes, repaired)
		m.memory()
		c.net.SetLoss(*loss)
		m.begin()
		changes = c.changing(*rate, *during)
		m.end(fmt.Sprintf("%d changes a second, %.0f %% of the datagrams lost", *rate, *loss*100))
		repaired = c.settle(time.Minute)
		m.spread(changes, repaired)
		c.net.SetLoss(0)
		c.members()
	})
}

// settleAfterStorm waits until all nodes have started and know all.
func (c *cluster) settleAfterStorm() time.Duration {
	for begin := time.Now(); time.Since(begin) < c.Storm; {
		time.Sleep(c.Storm / 10)
		c.progress(time.Since(begin))
	}
	return c.settle(5 * time.Minute)
}

// meter measures parts of a simulation.
type meter struct {
	c    *cluster
	wall time.Duration
	at   time.Time
	cpu  time.Duration
	sent sent
}

// sent is what all nodes sent.
type sent struct {
	discoverytest.Counts
	calls, callBytes uint64
	pulls, answers   uint64
}

func (m *meter) sentNow() sent {
	s := sent{Counts: m.c.net.Counts()}
	if a := m.c.secure; a != nil {
		s.calls, s.callBytes = a.calls.Load(), a.bytes.Load()
	}
	for _, n := range m.c.nodes {
		s.pulls += n.pull.Pulls.Load()
		s.answers += n.pull.Bytes.Load()
	}
	return s
}

func (m *meter) begin() {
	m.at, m.wall, m.cpu, m.sent = time.Now(), wallClock(), cpuTime(), m.sentNow()
}

// end reports what was used since begin. Headers are counted in: 28 bytes a datagram,
// and of a stream 8 segments of 40 besides one for each 1,448 bytes.
func (m *meter) end(what string) {
	took, cpu, s := time.Since(m.at), cpuTime()-m.cpu, m.sentNow()
	seconds := took.Seconds() * float64(m.c.Nodes)
	per := func(now, before uint64) float64 { return float64(now-before) / seconds }
	datagrams := per(s.Datagrams, m.sent.Datagrams)
	gossip := per(s.DatagramBytes, m.sent.DatagramBytes) + 28*datagrams
	streams, streamBytes := per(s.Streams, m.sent.Streams), per(s.StreamBytes, m.sent.StreamBytes)
	m.c.t.Logf("%s: %.1f s simulated in %.1f s", what, took.Seconds(), (wallClock() - m.wall).Seconds())
	m.c.t.Logf("    a node: sends %.0f B/s in %.1f datagrams/s, %.0f B/s in %.2f streams/s, %.0f B/s in %.2f calls/s; pulls %.2f/s of %.0f B; CPU %.3f s a minute",
		gossip, datagrams, streamBytes+320*streams+streamBytes/1448*40, streams,
		per(s.callBytes, m.sent.callBytes), per(s.calls, m.sent.calls),
		per(s.pulls, m.sent.pulls), per(s.answers, m.sent.answers)/max(per(s.pulls, m.sent.pulls), 1e-9),
		cpu.Seconds()/seconds*60)
	if d := s.Overflows - m.sent.Overflows; d > 0 {
		m.c.t.Logf("    %d datagrams or streams found no room", d)
	}
}

func (m *meter) spread(changes []*change, repaired time.Duration) {
	s := spreadOf(changes)
	m.c.t.Logf("    %d changes, %d superseded: the last node has it after p50 %v, p90 %v, p99 %v, max %v; any node after p50 %v, p99 %v, p99.9 %v; all settled %v after the last",
		s.Changes, s.Replaced, ms(at(s.Last, 0.5)), ms(at(s.Last, 0.9)), ms(at(s.Last, 0.99)), ms(at(s.Last, 1)),
		ms(at(s.All, 0.5)), ms(at(s.All, 0.99)), ms(at(s.All, 0.999)), repaired)
}

// memory reports what the process holds after a collection, by nodes.
func (m *meter) memory() {
	runtime.GC()
	if *heap != "" {
		f, err := os.Create(*heap)
		if err != nil {
			m.c.t.Fatal(err)
		}
		if err := errors.Join(pprof.Lookup("heap").WriteTo(f, 0), f.Close()); err != nil {
			m.c.t.Fatal(err)
		}
	}
	var s runtime.MemStats
	runtime.ReadMemStats(&s)
	perNode := func(b uint64) float64 { return float64(b) / float64(m.c.Nodes) / (1 << 20) }
	m.c.t.Logf("    memory a node: heap %.2f MB, stacks %.2f MB; %.0f goroutines", perNode(s.HeapAlloc), perNode(s.StackInuse), float64(runtime.NumGoroutine())/float64(m.c.Nodes))
}

func ms(d time.Duration) time.Duration { return d.Round(time.Millisecond) }

// cpuTime is what this process has used.
func cpuTime() time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		panic(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// wallClock is the host's, since time.Now is the bubble's.
func wallClock() time.Duration {
	var t syscall.Timeval
	if err := syscall.Gettimeofday(&t); err != nil {
		panic(err)
	}
	return time.Duration(t.Nano())
}
