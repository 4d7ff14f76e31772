package underlay

import (
	"bytes"
	"encoding/binary"
	"errors"
	"net/netip"
	"strings"
	"sync"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// control sends from h.
func (h *host) control(c *conn, dst netip.AddrPort, d []byte) (err error) {
	h.do(func() { err = c.SendControl(dst, d) })
	return err
}

func TestControlLeavesFromTheListeningPort(t *testing.T) {
	for _, listen := range []string{"127.0.0.1:0", "[::]:0", "127.0.0.7:0", "[::1]:0"} {
		at := netip.MustParseAddrPort(listen)
		if at.Addr() == netip.IPv6Loopback() && indexOf(at.Addr()) == 0 {
			continue // this host has no IPv6
		}
		a, b := open(t, Config{Listen: at}), open(t, Config{Listen: at})
		for i, dst := range b.LocalAddrs() {
			if dst.Addr().IsUnspecified() {
				dst = netip.AddrPortFrom(map[bool]netip.Addr{true: loopback4, false: netip.IPv6Loopback()}[dst.Addr().Is4()], dst.Port())
			}
			if indexOf(dst.Addr()) == 0 && dst.Addr().Is6() {
				continue
			}
			d := pattern(i, 1200)
			if err := a.SendControl(dst, d); err != nil {
				t.Fatalf("%s: SendControl = %v", dst, err)
			}
			g := receive(t, b.Receivers()[i], 1)[0]
			if !bytes.Equal(g.b, d) || g.src.Port() != a.LocalAddrs()[i].Port() {
				t.Errorf("%s: %d bytes from %s, want 1200 from port %d", dst, len(g.b), g.src, a.LocalAddrs()[i].Port())
			}
			// And the answer comes back to it.
			if err := b.SendControl(g.src, nil); err != nil {
				t.Fatalf("%s: SendControl of nothing = %v", g.src, err)
			}
			if g = receive(t, a.Receivers()[i], 1)[0]; len(g.b) != 0 || g.src.Port() != dst.Port() {
				t.Errorf("the answer: %d bytes from %s, want 0 from %s", len(g.b), g.src, dst)
			}
		}
	}
}

func TestControlErrors(t *testing.T) {
	c := open(t, Config{})
	at := c.LocalAddrs()[0]
	for name, tc := range map[string]struct {
		dst  netip.AddrPort
		d    []byte
		want error
	}{
		"too big":      {at, make([]byte, MaxSend+1), unix.EMSGSIZE},
		"other family": {netip.MustParseAddrPort("[::1]:4789"), []byte("x"), unix.EAFNOSUPPORT},
		"nowhere":      {netip.AddrPort{}, []byte("x"), unix.EAFNOSUPPORT},
		"no port":      {netip.AddrPortFrom(loopback4, 0), []byte("x"), unix.EINVAL},
		"broadcast":    {netip.MustParseAddrPort("255.255.255.255:9"), []byte("x"), unix.EACCES},
	} {
		before := c.Stats().TxControlError.Load()
		if err := c.SendControl(tc.dst, tc.d); !errors.Is(err, tc.want) {
			t.Errorf("%s: SendControl = %v, want %v", name, err, tc.want)
		}
		if n := c.Stats().TxControlError.Load() - before; n != 1 {
			t.Errorf("%s: TxControlError grew by %d, want 1", name, n)
		}
	}
	if err := c.SendControl(netip.AddrPortFrom(netip.MustParseAddr("::ffff:127.0.0.1"), at.Port()), []byte("mapped")); err != nil {
		t.Errorf("SendControl to an IPv4-mapped address = %v", err)
	}
	if g := receive(t, c.Receivers()[0], 1)[0]; string(g.b) != "mapped" {
		t.Errorf("got %q", g.b)
	}
	if st := c.Stats(); st.TxControl.Load() != 1 || st.TxDatagrams.Load() != 0 || st.TxTooBig.Load() != 0 {
		t.Errorf("TxControl %d, TxDatagrams %d, TxTooBig %d, want 1, 0, 0", st.TxControl.Load(), st.TxDatagrams.Load(), st.TxTooBig.Load())
	}
	c.Close()
	if err := c.SendControl(at, []byte("x")); err != ErrClosed {
		t.Errorf("SendControl after Close = %v, want ErrClosed", err)
	}
}

// Nobody takes the control: its ICMP errors stay out of Receive and Wait.
func TestControlToNobodyDoesNotDisturbReceive(t *testing.T) {
	c := open(t, Config{})
	dead := open(t, Config{})
	nobody := dead.LocalAddrs()[0]
	dead.Close()
	r := c.receivers[0]
	var b Batch
	for range 10 {
		for range 10 {
			if err := c.SendControl(nobody, []byte("refused")); err != nil {
				t.Fatalf("SendControl = %v", err)
			}
		}
		if err := r.file.Control(func(fd uintptr) {
			if n, err := unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_ERROR); n != 0 || err != nil {
				t.Errorf("an error waits on the socket: %v, %v", unix.Errno(n), err)
			}
		}); err != nil {
			t.Fatal(err)
		}
		if r.file.Readable() {
			t.Error("the socket is readable with nothing to read")
		}
		if err := r.Receive(&b); err != nil || len(b.Slots) != 0 {
			t.Errorf("Receive = %v, %d slots, want none", err, len(b.Slots))
		}
	}
	if err := c.SendControl(c.LocalAddrs()[0], []byte("x")); err != nil {
		t.Fatal(err)
	}
	receive(t, r, 1)
}

func TestControlSource(t *testing.T) {
	first, second := netip.MustParseAddr("127.1.2.3"), netip.MustParseAddr("127.1.2.4")
	c := open(t, Config{Listen: netip.MustParseAddrPort("0.0.0.0:0"), Source: first})
	at := netip.AddrPortFrom(loopback4, c.LocalAddrs()[0].Port())
	s := c.NewSender()
	from := func(want netip.Addr) {
		t.Helper()
		if err := c.SendControl(at, []byte("control")); err != nil {
			t.Fatalf("SendControl = %v", err)
		}
		put(s, at, 0, []byte("data"))
		s.Flush()
		for _, g := range receive(t, c.Receivers()[0], 2) {
			if g.src.Addr() != want {
				t.Errorf("%s left from %s, want %s", g.b, g.src, want)
			}
		}
	}
	from(first)
	// What this host does not have is refused, and nothing changes: a loopback
	// device has its whole prefix, and tells one address of it.
	for _, bad := range []string{"203.0.113.7", "224.0.0.1", "0.0.0.0", "::", "127.1.2.4"} {
		if err := c.SetSource(netip.MustParseAddr(bad)); err == nil || !strings.HasPrefix(err.Error(), "underlay: ") {
			t.Errorf("SetSource(%s) = %v, want an error", bad, err)
		}
	}
	from(first)
	if err := c.SetSource(netip.MustParseAddr("::ffff:127.0.0.1")); err != nil {
		t.Fatal(err)
	}
	from(loopback4)
	// As if it went away later (a device has it, or SetSource would not take it).
	gone := netip.MustParseAddr("203.0.113.7")
	c.source.Store(&gone)
	if err := c.dropPools(); err != nil {
		t.Fatal(err)
	}
	from(loopback4)
	if n := c.Stats().TxControlError.Load(); n != 0 {
		t.Errorf("TxControlError = %d, want 0", n)
	}
	if err := c.SetSource(netip.Addr{}); err != nil {
		t.Fatal(err)
	}
	from(loopback4)
	c.source.Store(&second)
	if err := c.dropPools(); err != nil {
		t.Fatal(err)
	}
	from(second)
	c.Close()
	if err := c.SetSource(loopback4); err != ErrClosed {
		t.Errorf("SetSource after Close = %v, want ErrClosed", err)
	}
}

func TestControlConcurrent(t *testing.T) {
	c := open(t, Config{})
	const senders, each = 8, 50
	var wg sync.WaitGroup
	for i := range senders {
		wg.Go(func() {
			for j := range each {
				if err := c.SendControl(c.LocalAddrs()[0], pattern(i<<16|j, 100+i)); err != nil {
					t.Errorf("SendControl = %v", err)
				}
			}
		})
	}
	wg.Add(1)
	go func() {
		defer wg.Done()
		for range 20 {
			if err := c.SetSource(loopback4); err != nil {
				t.Errorf("SetSource = %v", err)
			}
		}
	}()
	next := map[int]int{}
	for _, g := range receive(t, c.Receivers()[0], senders*each) {
		id := int(binary.BigEndian.Uint32(g.b))
		i, j := id>>16, id&0xffff
		if j != next[i] || !bytes.Equal(g.b, pattern(id, 100+i)) {
			t.Fatalf("got datagram %d of sender %d, want %d", j, i, next[i])
		}
		next[i]++
	}
	wg.Wait()
}

func TestControlNoAllocs(t *testing.T) {
	if raceEnabled {
		t.Skip("the race detector makes pools drop items")
	}
	c := open(t, Config{Listen: netip.MustParseAddrPort("0.0.0.0:0"), Source: loopback4})
	at := netip.AddrPortFrom(loopback4, c.LocalAddrs()[0].Port())
	d, big := make([]byte, 1200), make([]byte, MaxSend+1)
	var b Batch
	round := func() {
		if c.SendControl(at, d) != nil || c.SendControl(at, big) != unix.EMSGSIZE || c.receivers[0].Receive(&b) != nil {
			panic("control was not sent")
		}
	}
	round()
	if n := testing.AllocsPerRun(100, round); n != 0 {
		t.Errorf("%v allocations, want 0", n)
	}
}

// Two hosts: the peer knows this one by its source address, which is not the
// first of the device; a datagram that does not fit is told, never fragmented.
func TestPrivilegedControl(t *testing.T) {
	ha, hb, an, _ := pair(t)
	for _, tc := range []struct {
		prefix  string
		dst     netip.Addr
		headers int
	}{{"10.9.0.11/24", b4, 28}, {"fd09::11/64", b6, 48}} {
		source := netip.MustParsePrefix(tc.prefix).Addr()
		ha.up(an, tc.prefix)
		ca, cb := ha.open(Config{Listen: anyAddr, Source: source}), hb.open(Config{Listen: anyAddr})
		dst := at(cb, tc.dst)
		fits := 1500 - tc.headers
		if err := ha.control(ca, dst, pattern(1, fits)); err != nil {
			t.Fatalf("%s: SendControl of %d bytes = %v", tc.dst, fits, err)
		}
		g := receive(t, receiverOf(cb, tc.dst), 1)[0]
		if !bytes.Equal(g.b, pattern(1, fits)) || g.src != netip.AddrPortFrom(source, ca.local[0].Port()) {
			t.Errorf("%s: %d bytes from %s, want %d from %s", tc.dst, len(g.b), g.src, fits, source)
		}
		for _, n := range []int{fits + 1, 9000, MaxSend} {
			if err := ha.control(ca, dst, pattern(2, n)); !errors.Is(err, unix.EMSGSIZE) {
				t.Errorf("%s: SendControl of %d bytes = %v, want EMSGSIZE", tc.dst, n, err)
			}
		}
		// The address goes away: control still arrives, from what is left.
		a, err := netlink.ParseAddr(tc.prefix)
		ha.must(err)
		ha.must(ha.nl.AddrDel(ha.link(an), a))
		if err := ha.control(ca, dst, []byte("x")); err != nil {
			t.Fatalf("%s: SendControl without the source address = %v", tc.dst, err)
		}
		if g := receive(t, receiverOf(cb, tc.dst), 1)[0]; g.src.Addr() == source {
			t.Errorf("%s: from %s, which this host has not", tc.dst, g.src)
		}
		// DHCP gave another: data and control leave from it.
		moved := netip.MustParsePrefix(strings.Replace(tc.prefix, "11/", "12/", 1))
		ha.up(an, moved.String())
		ha.do(func() { ha.must(ca.SetSource(moved.Addr())) })
		ha.must(ha.control(ca, dst, []byte("control")))
		s := ca.NewSender()
		put(s, dst, 0, []byte("data"))
		ha.flush(s)
		for _, g := range receive(t, receiverOf(cb, tc.dst), 2) {
			if g.src.Addr() != moved.Addr() {
				t.Errorf("%s: %s from %s, want %s", tc.dst, g.b, g.src, moved.Addr())
			}
		}
		ca.Close()
		cb.Close()
	}
}

func BenchmarkSendControl(b *testing.B) {
	c := open(b, Config{Listen: netip.MustParseAddrPort("0.0.0.0:0"), Source: loopback4})
	at := netip.AddrPortFrom(loopback4, c.LocalAddrs()[0].Port())
	d := make([]byte, 1200)
	var batch Batch
	b.SetBytes(int64(len(d)))
	b.ReportAllocs()
	for b.Loop() {
		if err := c.SendControl(at, d); err != nil {
			b.Fatal(err)
		}
		if err := c.receivers[0].Receive(&batch); err != nil {
			b.Fatal(err)
		}
	}
}
