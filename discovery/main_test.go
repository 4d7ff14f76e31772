package discovery

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/tulle-net/tulle/vxlan"
)

// TestMain looks for goroutines that outlive Run. memberlist's last probe may
// go on for probeInterval × awarenessMax, longer than goleak waits by itself.
func TestMain(m *testing.M) {
	code := m.Run()
	if code == 0 {
		var err error
		for end := time.Now().Add(5 * time.Second); ; {
			if err = goleak.Find(); err == nil || time.Now().After(end) {
				break
			}
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			code = 1
		}
	}
	os.Exit(code)
}

// testNode is a running Discovery on loopback.
type testNode struct {
	*Discovery
	t      *testing.T
	cancel context.CancelFunc
	shift  context.CancelCauseFunc // its address changes
	ended  chan error
	once   sync.Once // closes crash
	log    *logBuffer
}

var testVTEPs atomic.Uint32

// testConfig is that of a node on a free port, with a VTEP of its own.
func testConfig(name string, seeds ...*testNode) Config {
	n := testVTEPs.Add(1)
	c := Config{
		Name:      name,
		Listen:    netip.MustParseAddrPort("127.0.0.1:0"),
		Advertise: netip.MustParseAddr("127.0.0.1"),
		VTEP:      netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), uint16(10000+n)),
	}
	for _, s := range seeds {
		c.Seeds = append(c.Seeds, s.self.String())
	}
	return c
}

// start runs a node until the test ends.
func start(t *testing.T, c Config) *testNode {
	t.Helper()
	n := &testNode{t: t, ended: make(chan error, 1), log: new(logBuffer)}
	c.Log = slog.New(slog.NewTextHandler(n.log, &slog.HandlerOptions{Level: slog.LevelDebug}))
	d, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	n.Discovery = d
	n.run()
	return n
}

func (n *testNode) run() {
	ctx, shift := context.WithCancelCause(context.Background())
	cancel := func() { shift(nil) }
	n.cancel, n.shift = cancel, shift
	go func() { n.ended <- n.Run(ctx) }()
	n.t.Cleanup(func() {
		n.once.Do(func() { close(n.crash) }) // no test need wait for the others' leave
		cancel()
		if err := <-n.ended; err != nil {
			n.t.Errorf("Run of %s: %v", n.cfg.Name, err)
		}
		if n.t.Failed() {
			n.t.Logf("log of %s:\n%s", n.cfg.Name, n.log)
		}
	})
}

// leave ends the node as SIGTERM would, kill as kill -9 would.
func (n *testNode) leave() { n.end(n.cancel) }
func (n *testNode) kill()  { n.end(func() { n.once.Do(func() { close(n.crash) }) }) }

func (n *testNode) end(how func()) {
	n.t.Helper()
	how()
	select {
	case err := <-n.ended:
		n.ended <- err // for the cleanup
	case <-time.After(5 * time.Second):
		n.t.Fatalf("%s does not end", n.cfg.Name)
	}
}

// member returns how n sees name; the zero Member if it does not.
func (n *testNode) member(name string) Member {
	for _, m := range n.Members() {
		if m.Name == name {
			return m
		}
	}
	return Member{}
}

// sees waits until n sees name in that status.
func (n *testNode) sees(within time.Duration, name string, want Status) {
	n.t.Helper()
	n.await(within, fmt.Sprintf("%s %s", name, want), func() bool { return n.member(name).Status == want })
}

// await waits until cond holds; it looks at each ring of the bell.
func (n *testNode) await(within time.Duration, what string, cond func() bool) {
	n.t.Helper()
	end := time.NewTimer(within)
	defer end.Stop()
	for !cond() {
		select {
		case <-n.Changed():
		case <-time.After(10 * time.Millisecond): // what rings no bell
		case <-end.C:
			n.t.Fatalf("%s: not within %v: %s; members %v", n.cfg.Name, within, what, n.Members())
		}
	}
}

// meet waits until all of nodes have confirmed each other.
func meet(t *testing.T, nodes ...*testNode) {
	t.Helper()
	for _, n := range nodes {
		for _, m := range nodes {
			n.await(5*time.Second, m.cfg.Name+" confirmed", func() bool { return n.member(m.cfg.Name).Confirmed })
		}
	}
}

var quiet = slog.New(slog.DiscardHandler)

type logBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *logBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *logBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

func manyOverlays(n int, encryption string) []Overlay {
	out := make([]Overlay, n)
	for i := range out {
		out[i] = Overlay{VNI: vxlan.VNI(100 + i), Name: fmt.Sprintf("overlay-%04d", i), Encryption: encryption}
	}
	slices.Reverse(out)
	return out
}
