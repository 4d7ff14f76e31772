package e2e

import (
	bin "encoding/binary"
	"errors"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"testing"
	"time"

	"golang.org/x/net/ipv4"
	"golang.org/x/sys/unix"

	"github.com/tulle-net/tulle/internal/lab"
)

//	a (keeper) ──┐
//	b ───────────┼─[ul]── x sends a QUIC Initials, each from an address that it made up
//	x, y ────────┘
//
// The flood's sender takes a good part of the same cores. So the throughput
// under it is compared with that under the same flood at y, which has no node.
// Not parallel: it compares throughputs.

const (
	initialLen = 1200
	initialTTL = 64
)

// spoofer sends IPv4 packets, headers and all.
type spoofer struct {
	conn *ipv4.PacketConn
	to   netip.AddrPort
	rand *rand.Rand
	msgs []ipv4.Message
}

func newSpoofer(t *testing.T, h *lab.Host, to netip.AddrPort) *spoofer {
	t.Helper()
	var conn net.PacketConn
	err := h.Do(func() error {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.IPPROTO_RAW)
		if err != nil {
			return os.NewSyscallError("socket", err)
		}
		f := os.NewFile(uintptr(fd), "spoofer")
		defer f.Close() // FilePacketConn makes a copy
		if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, 8<<20); err != nil {
			return os.NewSyscallError("setsockopt", err)
		}
		conn, err = net.FilePacketConn(f)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	x := &spoofer{conn: ipv4.NewPacketConn(conn), to: to, rand: rand.New(rand.NewPCG(7, 7)), msgs: make([]ipv4.Message, 100)}
	for i := range x.msgs {
		x.msgs[i] = ipv4.Message{Buffers: [][]byte{x.initial()}, Addr: &net.IPAddr{IP: to.Addr().AsSlice()}}
	}
	return x
}

// initial is a packet with the first datagram of a QUIC connection, as far as
// anybody can tell without decrypting it.
func (x *spoofer) initial() []byte {
	b := random(x.rand, make([]byte, 28+initialLen))
	ip, udp, q := b[:20], b[20:28], b[28:]
	copy(ip, []byte{0x45, 0, 0, 0, 0, 0, 0, 0, initialTTL, unix.IPPROTO_UDP, 0, 0})
	bin.BigEndian.PutUint16(ip[2:], uint16(len(b)))
	to := x.to.Addr().As4()
	copy(ip[16:], to[:])
	bin.BigEndian.PutUint16(udp[2:], x.to.Port())
	bin.BigEndian.PutUint16(udp[4:], 8+initialLen)
	copy(q, []byte{0xc0, 0, 0, 0, 1, 8})
	copy(q[14:], []byte{4, 1, 2, 3, 4, 0, 0x44, 0x95}) // no token; length 1,173
	return b
}

// strike sends at rate packets a second, each from another address of
// 192.168.0.0/16, until end; it returns how many left.
func (x *spoofer) strike(rate int, end time.Time) (sent int, err error) {
	for start := time.Now(); time.Now().Before(end); {
		if due := int(time.Since(start).Seconds() * float64(rate)); sent >= due {
			time.Sleep(time.Millisecond)
			continue
		}
		for i := range x.msgs {
			b := x.msgs[i].Buffers[0]
			r := x.rand.Uint64()
			copy(b[12:16], []byte{192, 168, byte(r)&0x7f | 0x80, byte(r >> 8)})
			bin.BigEndian.PutUint16(b[20:], uint16(r>>16)|0x400)
			bin.BigEndian.PutUint16(b[26:], 0)                      // no UDP checksum
			bin.BigEndian.PutUint64(b[28+6:], r*0x9e3779b97f4a7c15) // the connection's id
		}
		for rest := x.msgs; len(rest) > 0; {
			n, err := x.conn.WriteBatch(rest, 0)
			if err != nil && !errors.Is(err, unix.ENOBUFS) {
				return sent, err
			}
			if n <= 0 {
				break
			}
			sent, rest = sent+n, rest[n:]
		}
	}
	return sent, nil
}

// TestSecureInitialFlood: Initials from spoofed addresses, 100,000 a second or as
// many as the sender manages beside the rest, cost less than half of a sealed TCP
// stream's throughput, and bounded memory.
func TestSecureInitialFlood(t *testing.T) {
	l, sw, h := hosts(t, 4, lab.Underlay{Prefix4: netip.MustParsePrefix("192.168.0.0/16")})
	a := up(t, l, h[0], "--overlay", secured(1))
	b := up(t, l, h[1], "--token", a.token(), "--overlay", secured(2))
	meet(t, 10*time.Second, a, b)
	reachable(t, 10*time.Second, a, b)
	const rate, span = 100_000, 3 * time.Second
	stream := func() float64 {
		t.Helper()
		got, err := l.Transfer(t.Context(), b.host, a.host, netip.AddrPortFrom(address(1), 0), lab.Amount{For: span})
		if err != nil {
			t.Fatal(err)
		}
		return got.BitsPerSecond() / 1e6
	}
	port := a.status().Node.VTEP.Port()
	// under measures the stream while a host is flooded.
	under := func(at netip.Addr) (mbits, perSecond float64) {
		t.Helper()
		x := newSpoofer(t, h[2], netip.AddrPortFrom(at, port))
		type struck struct {
			sent int
			err  error
		}
		done := make(chan struck, 1)
		go func() {
			sent, err := x.strike(rate, time.Now().Add(span))
			done <- struck{sent, err}
		}()
		mbits = stream()
		s := <-done
		if s.err != nil {
			t.Fatal(s.err)
		}
		return mbits, float64(s.sent) / span.Seconds()
	}
	ping(t, h[2], sw.Addr(h[0]), 5*time.Second) // x knows both MACs
	ping(t, h[2], sw.Addr(h[3]), 5*time.Second)
	ratio := 0.0
	// The machine may have had other work: one good look is enough.
	for try := 0; try < 3 && ratio < 0.5; try++ {
		rss, calm := resident(t, a), stream()
		beside, besideRate := under(sw.Addr(h[3]))
		flooded, floodRate := under(sw.Addr(h[0]))
		after := resident(t, a)
		ratio = flooded / beside
		t.Logf("%.0f Mbit/s; %.0f while %.0f Initials a second hit another host, %.0f while %.0f hit a: %.0f %%; a's memory %d MiB, then %d",
			calm, beside, besideRate, flooded, floodRate, 100*ratio, rss>>20, after>>20)
		if after > rss+64<<20 {
			t.Errorf("a's resident memory grew from %d to %d MiB", rss>>20, after>>20)
		}
	}
	if ratio < 0.5 {
		t.Errorf("the flood leaves %.0f %% of the throughput, want half or more", 100*ratio)
	}
	t.Logf("drops: %v", dropped(a))
	// It is over, and a answers again.
	c := up(t, l, h[2], "--token", a.token(), "--overlay", secured(3))
	meet(t, 10*time.Second, a, b, c)
}

// dropped returns the reasons that a node counted.
func dropped(n *tulle) map[string]uint64 {
	m := map[string]uint64{}
	for reason, count := range n.status().Drops {
		if count > 0 {
			m[reason] = count
		}
	}
	return m
}
