package underlay

import (
	"bytes"
	"encoding/binary"
	"errors"
	"net"
	"net/netip"
	"runtime"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var loopback4 = netip.MustParseAddr("127.0.0.1")

// open returns a Conn that is closed at the end of the test.
func open(t testing.TB, cfg Config) *conn {
	t.Helper()
	if !cfg.Listen.IsValid() {
		cfg.Listen = netip.MustParseAddrPort("127.0.0.1:0")
	}
	c, err := Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c.(*conn)
}

// skipEmulated skips under qemu-user, which passes on no error queue and no
// drop counter; every Linux has them.
func skipEmulated(t *testing.T) {
	t.Helper()
	fd, err := udpSocket(v4)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RXQ_OVFL, 1) == unix.ENOPROTOOPT {
		t.Skip("an emulated kernel does not tell of drops and errors")
	}
}

// datagram is one received datagram, cut out of its slot.
type datagram struct {
	src netip.AddrPort
	b   []byte
}

// receive reads want datagrams from r, or fails.
func receive(t testing.TB, r Receiver, want int) []datagram {
	t.Helper()
	got := make([]datagram, 0, want)
	var b Batch
	stop := time.AfterFunc(10*time.Second, func() {
		r.(*receiver).file.Close() // Wait returns: a test never hangs
	})
	defer stop.Stop()
	for len(got) < want {
		if err := r.Wait(); err != nil {
			t.Fatalf("Wait after %d of %d datagrams: %v", len(got), want, err)
		}
		if err := r.Receive(&b); err != nil {
			t.Fatalf("Receive: %v", err)
		}
		for _, s := range b.Slots {
			got = appendSlot(got, s)
		}
	}
	return got
}

func appendSlot(got []datagram, s Slot) []datagram {
	rest := s.B
	for {
		n := len(rest)
		if s.SegmentLen != 0 {
			n = min(n, s.SegmentLen)
		}
		got = append(got, datagram{s.Src, bytes.Clone(rest[:n])})
		if rest = rest[n:]; len(rest) == 0 {
			return got
		}
	}
}

// put commits one datagram.
func put(s Sender, dst netip.AddrPort, flow uint32, b []byte) {
	copy(s.Reserve(len(b)), b)
	s.Commit(dst, flow, len(b))
}

// pattern returns n bytes that tell which datagram they are.
func pattern(i, n int) []byte {
	b := make([]byte, max(n, 4))
	binary.BigEndian.PutUint32(b, uint32(i))
	for j := 4; j < n; j++ {
		b[j] = byte(i*31 + j)
	}
	return b
}

func TestTrainsExactBytes(t *testing.T) {
	sizes := []int{
		1400, 1400, 1400, 900, // a train and its tail
		1400,             // after a shorter one: a new train
		4, 4, 4, 4, 1400, // a longer one ends it
		65507,      // the largest
		65507, 100, // no room in a train
		1, 1,
		9000, 9000, 9000, 9000, 9000, 9000, 9000, 9000, // more than 65,507 bytes
	}
	for range 200 { // more than maxSegments
		sizes = append(sizes, 60)
	}
	for _, tc := range []struct {
		name         string
		noGSO, noGRO bool
	}{{"gso gro", false, false}, {"gso", false, true}, {"gro", true, false}, {"neither", true, true}} {
		t.Run(tc.name, func(t *testing.T) {
			// An MTU of 65,536 lets the largest datagram pass the loopback.
			c := open(t, Config{NoGSO: tc.noGSO, NoGRO: tc.noGRO})
			s := c.NewSender()
			for i, n := range sizes {
				put(s, c.LocalAddrs()[0], 7, pattern(i, n)[:max(n, 1)])
			}
			s.Flush()
			total := 0
			for i, g := range receive(t, c.Receivers()[0], len(sizes)) {
				if want := pattern(i, sizes[i])[:sizes[i]]; !bytes.Equal(g.b, want) {
					t.Fatalf("datagram %d: got %d bytes %x…, want %d bytes %x…", i, len(g.b), g.b[:min(8, len(g.b))], len(want), want[:min(8, len(want))])
				}
				total += sizes[i]
			}
			st := c.Stats()
			if n := st.TxDatagrams.Load(); n != uint64(len(sizes)) {
				t.Errorf("TxDatagrams = %d, want %d", n, len(sizes))
			}
			if n := st.RxDatagrams.Load(); n != uint64(len(sizes)) {
				t.Errorf("RxDatagrams = %d, want %d", n, len(sizes))
			}
			if tx, rx := st.TxBytes.Load(), st.RxBytes.Load(); tx != uint64(total) || rx != uint64(total) {
				t.Errorf("TxBytes = %d, RxBytes = %d, want %d", tx, rx, total)
			}
			trains, datagrams := st.TxTrains.Load(), st.TxDatagrams.Load()
			if tc.noGSO && trains != datagrams {
				t.Errorf("GSO is off and %d datagrams left in %d messages", datagrams, trains)
			}
			if !tc.noGSO && trains > 20 {
				t.Errorf("GSO is on and %d datagrams left in %d messages", datagrams, trains)
			}
			if slots := st.RxSlots.Load(); !tc.noGSO && !tc.noGRO && slots > 20 {
				t.Errorf("GRO is on and %d datagrams came in %d slots", datagrams, slots)
			}
			o := c.Offloads()
			if (o.GSO == "on") == tc.noGSO || (o.GRO == "on") == tc.noGRO {
				t.Errorf("Offloads = %+v", o)
			}
		})
	}
}

// Several flows and destinations between each other: each flow in its order,
// from one port, and still in trains.
func TestFlowsKeepPortAndOrder(t *testing.T) {
	a := open(t, Config{SourcePorts: 4})
	b := open(t, Config{})
	s := a.NewSender()
	const flows, each = 8, 50
	for i := range each {
		for f := range flows {
			dst := a.LocalAddrs()[0]
			if f%2 == 1 {
				dst = b.LocalAddrs()[0]
			}
			put(s, dst, uint32(f), pattern(f<<16|i, 200))
		}
	}
	s.Flush()
	ports := map[uint16]bool{}
	for side, c := range []*conn{a, b} {
		next, srcs := map[int]int{}, map[int]netip.AddrPort{}
		for _, g := range receive(t, c.Receivers()[0], flows/2*each) {
			id := int(binary.BigEndian.Uint32(g.b))
			f, i := id>>16, id&0xffff
			if f%2 != side || i != next[f] || !bytes.Equal(g.b, pattern(id, 200)) {
				t.Fatalf("side %d: got datagram %d of flow %d, want %d", side, i, f, next[f])
			}
			next[f]++
			if src, ok := srcs[f]; ok && src != g.src {
				t.Fatalf("flow %d came from %s and %s", f, src, g.src)
			}
			srcs[f] = g.src
			ports[g.src.Port()] = true
			if p := g.src.Port(); p < 49152 {
				t.Errorf("source port %d is below 49152", p)
			}
		}
	}
	if len(ports) != 4 {
		t.Errorf("%d source ports were used, want 4", len(ports))
	}
	if n := a.Stats().TxTrains.Load(); n > 16 {
		t.Errorf("%d datagrams of interleaved flows left in %d messages, want at most 16", flows*each, n)
	}
}

// 100,000 datagrams in lockstep with the receiver, so that none may be lost.
func TestManyDatagrams(t *testing.T) {
	c := open(t, Config{})
	s, r := c.NewSender(), c.Receivers()[0]
	sizes := []int{1400, 1400, 1400, 60, 800, 800, 1, 1400}
	const total, round = 100_000, 500
	for base := 0; base < total; base += round {
		for i := base; i < base+round; i++ {
			put(s, c.LocalAddrs()[0], 1, pattern(i, sizes[i%len(sizes)]))
		}
		s.Flush()
		for i, g := range receive(t, r, round) {
			if !bytes.Equal(g.b, pattern(base+i, sizes[(base+i)%len(sizes)])) {
				t.Fatalf("datagram %d is wrong", base+i)
			}
		}
	}
	if st := c.Stats(); st.TxDatagrams.Load() != total || st.RxDatagrams.Load() != total || st.RxOverflow.Load() != 0 {
		t.Errorf("sent %d, received %d, overflow %d; want %d, %[4]d, 0", st.TxDatagrams.Load(), st.RxDatagrams.Load(), st.RxOverflow.Load(), total)
	}
}

func TestDualStack(t *testing.T) {
	c := open(t, Config{Listen: netip.MustParseAddrPort("[::]:0")})
	if len(c.LocalAddrs()) == 1 {
		t.Skip("this host has no IPv6")
	}
	a4, a6 := c.LocalAddrs()[0], c.LocalAddrs()[1]
	if !a4.Addr().Is4() || !a6.Addr().Is6() || a4.Port() != a6.Port() {
		t.Fatalf("LocalAddrs = %v, want one port on both families", c.LocalAddrs())
	}
	s := c.NewSender()
	for i, dst := range []string{"127.0.0.1", "::1", "::ffff:127.0.0.1"} {
		put(s, netip.AddrPortFrom(netip.MustParseAddr(dst), a4.Port()), 0, pattern(i, 100))
	}
	s.Flush()
	got4 := receive(t, c.Receivers()[0], 2)
	for _, g := range got4 {
		if g.src.Addr() != loopback4 {
			t.Errorf("IPv4 source = %s, want 127.0.0.1 and not IPv4-mapped", g.src)
		}
	}
	if indexOf(netip.IPv6Loopback()) == 0 { // IPv6 is disabled: then it is counted
		if n := c.Stats().TxUnreachable.Load(); n != 1 {
			t.Errorf("TxUnreachable = %d, want 1", n)
		}
	} else {
		if g := receive(t, c.Receivers()[1], 1)[0]; g.src.Addr() != netip.IPv6Loopback() {
			t.Errorf("IPv6 source = %s, want ::1", g.src)
		}
	}
}

func TestPoolDropsWhatArrives(t *testing.T) {
	c := open(t, Config{SourcePorts: 2})
	s := c.NewSender()
	put(s, c.LocalAddrs()[0], 0, []byte("x"))
	s.Flush()
	src := receive(t, c.Receivers()[0], 1)[0].src
	put(s, src, 0, []byte("answer to a port that only sends"))
	put(s, c.LocalAddrs()[0], 0, []byte("y"))
	s.Flush()
	receive(t, c.Receivers()[0], 1) // the answer was delivered before
	for _, fd := range c.pools[v4].Load().fds {
		if _, _, err := unix.Recvfrom(fd, make([]byte, 64), unix.MSG_DONTWAIT); err != unix.EAGAIN {
			t.Errorf("a source port has something to read: %v", err)
		}
		at, err := localAddr(fd)
		if err != nil || at.Port() < minSourcePort {
			t.Errorf("source port %v, %v; want %d to %d", at, err, minSourcePort, maxSourcePort)
		}
	}
}

func TestSourceAddress(t *testing.T) {
	c := open(t, Config{Listen: netip.MustParseAddrPort("0.0.0.0:0"), Source: netip.MustParseAddr("127.1.2.3")})
	s := c.NewSender()
	put(s, netip.AddrPortFrom(loopback4, c.LocalAddrs()[0].Port()), 0, []byte("x"))
	s.Flush()
	if g := receive(t, c.Receivers()[0], 1)[0]; g.src.Addr() != netip.MustParseAddr("127.1.2.3") {
		t.Errorf("source = %s, want 127.1.2.3", g.src)
	}
	// An address of another host: the kernel's choice.
	c = open(t, Config{Source: netip.MustParseAddr("203.0.113.7")})
	s = c.NewSender()
	put(s, c.LocalAddrs()[0], 0, []byte("x"))
	s.Flush()
	if g := receive(t, c.Receivers()[0], 1)[0]; g.src.Addr() != loopback4 {
		t.Errorf("source = %s, want 127.0.0.1", g.src)
	}
}

func TestCloseWakesWait(t *testing.T) {
	c := open(t, Config{Listen: netip.MustParseAddrPort("[::]:0")})
	done := make(chan error)
	rs := c.Receivers()
	for _, r := range rs {
		go func() { done <- r.Wait() }()
	}
	runtime.Gosched()
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	for range rs {
		select {
		case err := <-done:
			if err != ErrClosed {
				t.Errorf("Wait = %v, want ErrClosed", err)
			}
		case <-time.After(5 * time.Second):
			t.Fatal("Wait did not return after Close")
		}
	}
	var b Batch
	if err := rs[0].Receive(&b); err != ErrClosed {
		t.Errorf("Receive after Close = %v, want ErrClosed", err)
	}
	s := c.NewSender() // sends into nothing, and must not touch others' descriptors
	put(s, netip.AddrPortFrom(loopback4, 9), 0, []byte("x"))
	s.Flush()
	if n := c.Stats().TxDatagrams.Load(); n != 0 {
		t.Errorf("%d datagrams were sent after Close", n)
	}
	if err := c.Close(); err != nil {
		t.Errorf("second Close: %v", err)
	}
}

func TestReceiveNeverBlocks(t *testing.T) {
	c := open(t, Config{})
	var b Batch
	if err := c.Receivers()[0].Receive(&b); err != nil || len(b.Slots) != 0 {
		t.Errorf("Receive = %v with %d slots, want none", err, len(b.Slots))
	}
}

// A datagram of no bytes is a slot of no bytes.
// A batch that is full says so.
func TestReceiveMore(t *testing.T) {
	c := open(t, Config{})
	from, err := net.DialUDP("udp4", nil, net.UDPAddrFromAddrPort(c.LocalAddrs()[0]))
	if err != nil {
		t.Fatal(err)
	}
	defer from.Close()
	for i := range 2*rxSlots + 3 { // of sizes that the kernel does not merge
		if _, err := from.Write(make([]byte, 1+i%2)); err != nil {
			t.Fatal(err)
		}
	}
	var b Batch
	for _, want := range []int{rxSlots, rxSlots, 3, 0} {
		if err := c.Receivers()[0].Receive(&b); err != nil || len(b.Slots) != want || b.More != (want == rxSlots) {
			t.Errorf("Receive: %d slots, more %t, %v; want %d", len(b.Slots), b.More, err, want)
		}
	}
}

func TestEmptyDatagram(t *testing.T) {
	c := open(t, Config{})
	fd, err := udpSocket(v4)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if err := unix.Sendto(fd, nil, 0, sockaddr(c.LocalAddrs()[0])); err != nil {
		t.Fatal(err)
	}
	if g := receive(t, c.Receivers()[0], 1); len(g) != 1 || len(g[0].b) != 0 {
		t.Errorf("got %v", g)
	}
}

func TestReserveWithoutCommitIsVoid(t *testing.T) {
	c := open(t, Config{})
	s := c.NewSender()
	copy(s.Reserve(1000), bytes.Repeat([]byte("void"), 250))
	copy(s.Reserve(10), "committed!")
	s.Commit(c.LocalAddrs()[0], 0, 6)
	s.Reserve(50)
	s.Flush()
	if g := receive(t, c.Receivers()[0], 1)[0]; string(g.b) != "commit" {
		t.Errorf("got %q, want %q", g.b, "commit")
	}
}

func TestRoutes(t *testing.T) {
	c := open(t, Config{})
	if mtu, err := c.PathMTU(loopback4); err != nil || mtu < 1500 {
		t.Errorf("PathMTU(127.0.0.1) = %d, %v", mtu, err)
	}
	if a, err := SourceFor(netip.MustParseAddr("127.0.0.9")); err != nil || a != loopback4 {
		t.Errorf("SourceFor(127.0.0.9) = %s, %v; want 127.0.0.1", a, err)
	}
	if _, err := SourceFor(netip.Addr{}); err == nil {
		t.Error("SourceFor of nothing: no error")
	}
	if !IsVirtual(loopback4) || IsVirtual(netip.MustParseAddr("203.0.113.7")) {
		t.Error("IsVirtual: want the loopback, not an address of another host")
	}
}

func TestSockaddrRoundTrip(t *testing.T) {
	for _, s := range []string{"192.0.2.1:4789", "[2001:db8::1]:65535", "[::1]:1", "0.0.0.0:0", "[fe80::1%3]:4789"} {
		a := netip.MustParseAddrPort(s)
		var sa unix.RawSockaddrInet6
		putSockaddr(&sa, a, scopeOf(a.Addr().Zone()))
		if got := addrPortOf(&sa); got != a {
			t.Errorf("%s became %s", a, got)
		}
	}
	sa := unix.RawSockaddrInet6{Family: unix.AF_INET6, Addr: netip.MustParseAddr("::ffff:192.0.2.1").As16()}
	if got := addrPortOf(&sa); got.Addr() != netip.MustParseAddr("192.0.2.1") {
		t.Errorf("an IPv4-mapped address became %s", got)
	}
}

func TestNoAllocs(t *testing.T) {
	for _, listen := range []string{"127.0.0.1:0", "[::1]:0"} {
		c, err := Open(Config{Listen: netip.MustParseAddrPort(listen)})
		if errors.Is(err, unix.EADDRNOTAVAIL) || errors.Is(err, unix.EAFNOSUPPORT) {
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		s, r, dst := c.NewSender(), c.Receivers()[0], c.LocalAddrs()[0]
		var b Batch
		round := func() {
			for i := range 50 {
				s.Reserve(1400)
				s.Commit(dst, uint32(i/25), 1400)
			}
			s.Flush()
			// Without Wait: what waiting costs is the concern of internal/ready.
			for got, tries := 0, 0; got < 50*1400; tries++ {
				if r.Receive(&b) != nil || tries > 1_000_000 {
					panic("a datagram was lost")
				}
				for _, slot := range b.Slots {
					got += len(slot.B)
				}
			}
		}
		round()
		if n := testing.AllocsPerRun(100, round); n != 0 {
			t.Errorf("%s: %v allocations for 50 datagrams sent and received, want 0", listen, n)
		}
		// Errors do not allocate either.
		bad := netip.MustParseAddrPort("255.255.255.255:9")
		fail := func() {
			for range 3 {
				s.Reserve(10)
				s.Commit(bad, 0, 10)
			}
			s.Flush()
		}
		fail()
		if n := testing.AllocsPerRun(100, fail); n != 0 {
			t.Errorf("%s: %v allocations for an error, want 0", listen, n)
		}
	}
}

func BenchmarkSendReceive(b *testing.B) {
	for _, bc := range []struct {
		name     string
		n, bytes int
		noGSO    bool
	}{{"train of 46x1400", 46, 1400, false}, {"one by one 46x1400", 46, 1400, true}, {"64 of 64 bytes", 64, 64, false}, {"one of 64 bytes", 1, 64, false}} {
		b.Run(bc.name, func(b *testing.B) {
			c := open(b, Config{NoGSO: bc.noGSO})
			s, r, dst := c.NewSender(), c.Receivers()[0], c.LocalAddrs()[0]
			var batch Batch
			b.SetBytes(int64(bc.n * bc.bytes))
			b.ReportAllocs()
			for b.Loop() {
				for range bc.n {
					s.Reserve(bc.bytes)
					s.Commit(dst, 1, bc.bytes)
				}
				s.Flush()
				for got, tries := 0, 0; got < bc.n*bc.bytes; tries++ {
					if r.Receive(&batch) != nil || tries > 1_000_000 {
						b.Fatal("a datagram was lost")
					}
					for _, slot := range batch.Slots {
						got += len(slot.B)
					}
				}
			}
		})
	}
}

func BenchmarkCommit(b *testing.B) {
	c := open(b, Config{})
	s := newSender(c)
	s.grow()
	dst := netip.MustParseAddrPort("192.0.2.1:4789")
	b.SetBytes(1400)
	b.ReportAllocs()
	for b.Loop() {
		s.Reserve(1400)
		s.Commit(dst, 1, 1400)
		if s.used > arenaLen-1400 { // without the calls: only the building
			s.used, s.messages, s.pieces, s.inUse = 0, s.messages[:0], s.pieces[:0], s.inUse[:0]
			s.queues[v4][1].used = false
		}
	}
}
