package peer

import (
	"context"
	"fmt"
	"hash/maphash"
	"math/rand/v2"
	"net"
	"net/netip"
	"runtime"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/quic-go/quic-go"

	"github.com/tulle-net/tulle/peer/peertest"
)

// initialTo makes a datagram that looks like a client's first (RFC 9000, section 17.2.2).
func initialTo(b []byte, r *rand.Rand, token int) []byte {
	b = append(b[:0], 0xc0, 0, 0, 0, 1, 8)
	for range 8 {
		b = append(b, byte(r.Uint32()))
	}
	b = append(b, 4, 1, 2, 3, 4, byte(token))
	for range token {
		b = append(b, byte(r.Uint32()))
	}
	b = append(b, 0x44, 0x98) // length 1,176
	for len(b) < 1200 {
		b = append(b, byte(r.Uint32()))
	}
	return b
}

func TestInitial(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 1))
	for _, x := range []struct {
		b         []byte
		token, ok bool
	}{
		{initialTo(nil, r, 0), false, true},
		{initialTo(nil, r, 50), true, true},
		{append([]byte{0xe0}, make([]byte, 50)...), false, false}, // Handshake
		{append([]byte{0x40}, make([]byte, 50)...), false, false}, // short header
		{[]byte{0xc0, 0, 0}, false, false},
		{nil, false, false},
	} {
		if token, ok := initial(x.b); token != x.token || ok != x.ok {
			t.Errorf("initial(%.20x) = %v, %v, want %v, %v", x.b, token, ok, x.token, x.ok)
		}
	}
	whole := initialTo(nil, r, 3)
	for i := range whole {
		initial(whole[:i]) // must not panic
		destination(whole[:i])
	}
	whole[5] = 255
	initial(whole[:100])
	if got := destination(whole[:100]); got != nil {
		t.Errorf("destination of a truncated datagram: %x", got)
	}
}

// What this process gave out it recognises, in both headers; nothing else.
func TestConnectionIDs(t *testing.T) {
	i := ids{maphash.MakeSeed()}
	for range 100 {
		id, err := i.GenerateConnectionID()
		if err != nil {
			t.Fatal(err)
		}
		short := append([]byte{0x40}, id.Bytes()...)
		long := append([]byte{0xc0, 0, 0, 0, 1, byte(id.Len())}, id.Bytes()...)
		for _, d := range [][]byte{short, long} {
			if !i.own(destination(d)) {
				t.Fatalf("%x is not recognised", d)
			}
			d[len(d)-1] ^= 1
			if i.own(destination(d)) {
				t.Fatalf("%x is taken for one", d)
			}
			for n := range d {
				if i.own(destination(d[:n])) {
					t.Fatalf("truncated to %d bytes", n)
				}
			}
		}
	}
}

// Bounds of handshakes from others.
func TestGuard(t *testing.T) {
	l, err := Limits{Handshakes: 4, HandshakesPerSource: 2, RetryAbove: 1}.validated()
	if err != nil {
		t.Fatal(err)
	}
	g := newGuard(&l, &Stats{})
	addr := func(s string) net.Addr { return net.UDPAddrFromAddrPort(netip.MustParseAddrPort(s)) }
	var ends []context.CancelFunc
	begin := func(s string, verified bool) bool {
		ctx, cancel := context.WithCancel(context.Background())
		ends = append(ends, cancel)
		_, err := g.begin(ctx, &quic.ClientInfo{RemoteAddr: addr(s), AddrVerified: verified})
		return err == nil
	}
	for n, x := range []struct {
		from     string
		verified bool
		want     bool
	}{
		{"192.0.2.1:1", false, true}, {"192.0.2.1:2", true, true}, {"192.0.2.1:3", true, true},
		{"192.0.2.1:4", true, false}, {"[2001:db8::1]:1", true, true}, {"[2001:db8:1::1]:1", true, false},
	} {
		if g.verify(addr(x.from)) != (n > 0) {
			t.Errorf("step %d: Retry asked for: %v", n, n == 0)
		}
		if got := begin(x.from, x.verified); got != x.want {
			t.Errorf("step %d: begin(%s) = %v, want %v", n, x.from, got, x.want)
		}
	}
	for _, end := range ends {
		end()
	}
	eventually(t, "all places are free", func() bool {
		g.mu.Lock()
		defer g.mu.Unlock()
		return g.total == 0 && g.unverified == 0 && len(g.sources) == 0
	})
}

func TestDeliverNoAllocs(t *testing.T) {
	s := newSocket(&Config{Known: func(netip.Addr) bool { return false }, Limits: Limits{InitialRate: 1}}, &Stats{})
	from := netip.MustParseAddrPort("192.0.2.1:4789")
	id, err := s.ids.GenerateConnectionID()
	if err != nil {
		t.Fatal(err)
	}
	first, later := initialTo(nil, rand.New(rand.NewPCG(1, 1)), 0), append(append([]byte{0x40}, id.Bytes()...), make([]byte, 1000)...)
	stray := append([]byte{0x40}, make([]byte, 1000)...)
	for len(s.lane) < cap(s.lane) {
		s.deliver(from, later)
	}
	for range 2 * initialLaneSize {
		s.deliver(from, first)
	}
	if s.stats.RxLimited.Load() == 0 || len(s.initials) == 0 {
		t.Errorf("limited %d, taken %d", s.stats.RxLimited.Load(), len(s.initials))
	}
	if n := testing.AllocsPerRun(100, func() {
		s.deliver(from, first)
		s.deliver(from, later)
		s.deliver(from, stray)
	}); n != 0 {
		t.Errorf("a flood costs %v allocations a datagram", n)
	}
	if s.stats.RxQueueFull.Load() == 0 {
		t.Error("nothing was dropped")
	}
}

func heap() uint64 {
	runtime.GC()
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapAlloc + m.StackInuse
}

// 20,000 spoofed first datagrams: memory stays bounded, sources must show that
// they receive, connections that stand and members are not disturbed, and a
// stranger still gets in.
func TestSpoofedInitials(t *testing.T) {
	c := newCluster(t, peertest.NewNet(40))
	members := map[netip.Addr]bool{}
	target := c.node("target", func(cfg *Config) {
		cfg.Known = func(a netip.Addr) bool { return members[a] }
	})
	c.node("friend")
	member := newAddr()
	members[member.Addr()] = true
	c.addrs["member"] = member
	ctx := within(t, 30*time.Second)
	friend, late, stranger := c.node("other"), c.node("member"), c.node("stranger")
	if _, err := friend.Whoami(ctx, "target"); err != nil {
		t.Fatal(err)
	}
	before, start := heap(), time.Now()
	var most uint64
	r := rand.New(rand.NewPCG(3, 3))
	var b []byte
	for i := range 20000 {
		token := 0
		if i%2 == 0 {
			token = 60
		}
		b = initialTo(b, r, token)
		target.Deliver(netip.AddrPortFrom(netip.AddrFrom4([4]byte{203, byte(r.Uint32()), byte(r.Uint32()), byte(r.Uint32())}), uint16(r.Uint32())), b)
		if i%2000 == 1999 {
			begin := time.Now()
			if _, err := friend.Whoami(ctx, "target"); err != nil || time.Since(begin) > time.Second {
				t.Errorf("after %d: %v in %v", i, err, time.Since(begin))
			}
			most = max(most, heap())
		}
	}
	s := target.Stats()
	t.Logf("limited %d, queue full %d, Retries %d, handshakes begun %d, refused %d; memory %d KiB before, at most %d KiB",
		s.RxLimited.Load(), s.RxQueueFull.Load(), s.Retries.Load(), s.HandshakesBegun.Load(), s.HandshakesRefused.Load(), before>>10, most>>10)
	if most > before+24<<20 {
		t.Errorf("the flood costs %d KiB", (most-before)>>10)
	}
	if s.Retries.Load() == 0 || s.RxLimited.Load() == 0 {
		t.Error("nothing held the flood back")
	}
	// Those that were begun without proof last one timeout.
	rounds := 1 + uint64(time.Since(start)/target.cfg.HandshakeTimeout)
	if begun := s.HandshakesBegun.Load(); begun > rounds*uint64(target.cfg.RetryAbove)+1 {
		t.Errorf("%d handshakes for sources that showed nothing", begun)
	}
	begin := time.Now()
	if _, err := late.Whoami(ctx, "target"); err != nil {
		t.Errorf("a member: %v", err)
	}
	member1 := time.Since(begin)
	if _, err := stranger.Whoami(ctx, "target"); err != nil {
		t.Errorf("a stranger, by a Retry: %v", err)
	}
	t.Logf("a member connects in %v, a stranger in %v", member1, time.Since(begin)-member1)
}

// The handshake of a real client goes through a Retry when it must.
func TestRetry(t *testing.T) {
	c := newCluster(t, peertest.NewNet(41))
	e := c.node("a")
	target := c.node("b")
	target.guard.unverified = 1000
	if _, err := e.Whoami(within(t, 5*time.Second), "b"); err != nil {
		t.Fatal(err)
	}
	if target.Stats().Retries.Load() == 0 {
		t.Error("no Retry")
	}
	target.guard.mu.Lock()
	defer target.guard.mu.Unlock()
	if target.guard.total != 0 || len(target.guard.sources) != 0 || target.guard.unverified != 1000 {
		t.Errorf("places are left taken: %d, %v, %d", target.guard.total, target.guard.sources, target.guard.unverified)
	}
}

// 1,000 peers: what an idle connection costs. Both ends are in this process, so
// a node pays half.
func TestMemory(t *testing.T) {
	if testing.Short() {
		t.Skip("1,000 handshakes")
	}
	const peers = 1000
	c := newCluster(t, peertest.NewNet(42))
	hub := c.node("hub", func(cfg *Config) { cfg.Limits.HandshakeRate = 100000 })
	all := make([]*Endpoint, peers)
	for i := range all {
		all[i] = c.node(fmt.Sprintf("n%d", i))
	}
	before, goroutines := heap(), runtime.NumGoroutine()
	ctx := within(t, 60*time.Second)
	var wg sync.WaitGroup
	var next atomic.Int64
	for range 8 {
		wg.Go(func() {
			for i := next.Add(1) - 1; i < peers; i = next.Add(1) - 1 {
				if _, err := all[i].Whoami(ctx, "hub"); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
	if n := len(hub.Conns()); n != peers {
		t.Fatalf("%d connections", n)
	}
	after := heap()
	each := (after - before) / peers / 2
	t.Logf("%d connections: %d KiB and %.1f goroutines each end", peers, each>>10, float64(runtime.NumGoroutine()-goroutines)/peers/2)
	if each*peers > 100<<20 {
		t.Errorf("1,000 peers cost a node %d MiB, want less than 100", each*peers>>20)
	}
}

func cpu() time.Duration {
	var u syscall.Rusage
	_ = syscall.Getrusage(syscall.RUSAGE_SELF, &u)
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// A handshake, one request and the end of it; CPU of both ends together.
func BenchmarkHandshake(b *testing.B) {
	c := newCluster(b, peertest.NewNet(50))
	big := func(cfg *Config) { cfg.Limits.HandshakeRate = 1 << 20 }
	e, other := c.node("a"), c.node("b", big)
	ctx := within(b, time.Minute)
	begin := cpu()
	for b.Loop() {
		if _, err := e.Whoami(ctx, "b"); err != nil {
			b.Fatal(err)
		}
		e.Disconnect("b")
		for len(e.Conns())+len(other.Conns()) != 0 {
			runtime.Gosched()
		}
	}
	b.ReportMetric(float64(cpu()-begin)/float64(b.N)/1e6, "cpu-ms/op")
}

func BenchmarkRequest(b *testing.B) {
	c := newCluster(b, peertest.NewNet(51))
	e := c.node("a")
	c.node("b")
	ctx := within(b, time.Minute)
	for b.Loop() {
		if _, err := e.Whoami(ctx, "b"); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkDeliverFlood(b *testing.B) {
	c := newCluster(b, peertest.NewNet(52))
	e := c.node("a")
	d := initialTo(nil, rand.New(rand.NewPCG(1, 1)), 0)
	from := netip.MustParseAddrPort("192.0.2.1:4789")
	b.SetBytes(int64(len(d)))
	for b.Loop() {
		e.Deliver(from, d)
	}
}
