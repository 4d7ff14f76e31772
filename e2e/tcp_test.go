package e2e

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tulle-net/tulle/internal/lab"
)

//	a ──[ul]── b           direct: two nodes, a cluster
//	a ──[ul]── c ──[ul]── b    relayed: c loses, reorders and marks
//
// The corners of TCP between two real kernels across the overlay.

// tcpWorld is two hosts on an overlay.
type tcpWorld struct {
	a, b  *lab.Host
	v6    bool
	relay *fastRelay // nil: none
}

// addr is what b listens on.
func (w *tcpWorld) addr() netip.AddrPort {
	if w.v6 {
		return netip.AddrPortFrom(addressV6(2), 0)
	}
	return netip.AddrPortFrom(address(2), 0)
}

// connect opens a connection from a to b, after set has prepared each end's socket.
func (w *tcpWorld) connect(t *testing.T, set func(fd int) error) (client, server *net.TCPConn) {
	t.Helper()
	var ln net.Listener
	err := w.b.Do(func() (err error) {
		ln, err = (&net.ListenConfig{Control: setting(set)}).Listen(t.Context(), "tcp", w.addr().String())
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	c := dialTCP(t, w.a, ln.Addr().String(), set)
	s, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _, _ = c.Close(), s.Close() })
	for _, conn := range []net.Conn{c, s} {
		if err := conn.SetDeadline(time.Now().Add(20 * time.Second)); err != nil {
			t.Fatal(err)
		}
	}
	return c, s.(*net.TCPConn)
}

// setting turns set, which may be nil, into what package net calls for each new socket.
func setting(set func(fd int) error) func(_, _ string, raw syscall.RawConn) error {
	return func(_, _ string, raw syscall.RawConn) (err error) {
		if set == nil {
			return nil
		}
		failed := raw.Control(func(fd uintptr) { err = set(int(fd)) })
		return errors.Join(failed, err)
	}
}

// dialTCP connects from a host, after set has prepared the socket.
func dialTCP(t *testing.T, h *lab.Host, to string, set func(fd int) error) *net.TCPConn {
	t.Helper()
	var c net.Conn
	err := h.Do(func() (err error) {
		c, err = (&net.Dialer{Control: setting(set), Timeout: 10 * time.Second}).DialContext(t.Context(), "tcp", to)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return c.(*net.TCPConn)
}

// randomBytes are the same for the same n.
func randomBytes(n int) []byte {
	b := make([]byte, n)
	_, _ = rand.NewChaCha8([32]byte{byte(n), byte(n >> 8), byte(n >> 16)}).Read(b)
	return b
}

// carries sends data with write (nil: in one piece) and compares what arrives.
func carries(t *testing.T, from, to *net.TCPConn, data []byte, write func(net.Conn, []byte) error) {
	t.Helper()
	if write == nil {
		write = func(c net.Conn, b []byte) error { _, err := c.Write(b); return err }
	}
	failed := make(chan error, 1)
	go func() { failed <- write(from, data) }()
	h := sha256.New()
	n, err := io.CopyN(h, to, int64(len(data)))
	if want := sha256.Sum256(data); err != nil || !bytes.Equal(h.Sum(nil), want[:]) {
		t.Errorf("%d of %d bytes arrived, right: %v, %v", n, len(data), bytes.Equal(h.Sum(nil), want[:]), err)
	}
	if err := <-failed; err != nil {
		t.Errorf("write: %v", err)
	}
}

// bothWays is carries in both directions at once.
func bothWays(t *testing.T, c, s *net.TCPConn, n int) {
	t.Helper()
	var wg sync.WaitGroup
	wg.Go(func() { carries(t, c, s, randomBytes(n), nil) })
	wg.Go(func() { carries(t, s, c, randomBytes(n+1), nil) })
	wg.Wait()
}

func tcpInfo(t *testing.T, c *net.TCPConn) (info *unix.TCPInfo) {
	t.Helper()
	control(t, c, func(fd int) (err error) {
		info, err = unix.GetsockoptTCPInfo(fd, unix.IPPROTO_TCP, unix.TCP_INFO)
		return err
	})
	return info
}

// Options of TCP_INFO (linux/tcp.h).
const (
	infoTimestamps = 1
	infoSACK       = 2
	infoWScale     = 4
	infoECN        = 8
)

// sysctls sets TCP settings on both hosts until the test ends.
func (w *tcpWorld) sysctls(t *testing.T, name, value, standard string) {
	t.Helper()
	set := func(v string) error {
		return errors.Join(w.a.Sysctl("net/ipv4/"+name, v), w.b.Sysctl("net/ipv4/"+name, v))
	}
	if err := set(value); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := set(standard); err != nil {
			t.Error(err)
		}
	})
}

// tcpCases are run over IPv4 and IPv6, directly and through the relay.
var tcpCases = []struct {
	name string
	run  func(t *testing.T, w *tcpWorld)
}{
	{"both ways at once", func(t *testing.T, w *tcpWorld) {
		c, s := w.connect(t, nil)
		bothWays(t, c, s, 6<<20)
	}},
	{"timestamps off", func(t *testing.T, w *tcpWorld) {
		option(t, w, "tcp_timestamps", infoTimestamps)
	}},
	{"window scaling off", func(t *testing.T, w *tcpWorld) {
		option(t, w, "tcp_window_scaling", infoWScale)
	}},
	{"SACK off", func(t *testing.T, w *tcpWorld) {
		option(t, w, "tcp_sack", infoSACK)
	}},
	{"urgent data", urgent},
	{"reset", reset},
	{"zero window", zeroWindow},
	{"tiny MSS", tinyMSS},
	{"half close", halfClose},
	{"one byte at a time", func(t *testing.T, w *tcpWorld) {
		c, s := w.connect(t, nil) // Go sets TCP_NODELAY
		carries(t, c, s, randomBytes(3000), func(c net.Conn, b []byte) error {
			for i := range b {
				if _, err := c.Write(b[i : i+1]); err != nil {
					return err
				}
			}
			return nil
		})
	}},
	{"MSG_MORE", more},
}

// option checks that a TCP option is there by default, and not when both hosts
// have it switched off; content arrives both times.
func option(t *testing.T, w *tcpWorld, sysctl string, bit uint8) {
	for _, on := range []bool{true, false} {
		if !on {
			w.sysctls(t, sysctl, "0", "1")
		}
		c, s := w.connect(t, nil)
		if got := tcpInfo(t, c).Options&bit != 0; got != on {
			t.Errorf("%s: option in use: %v, want %v", sysctl, got, on)
		}
		bothWays(t, c, s, 1<<20)
	}
}

// urgent sends bulk with an urgent byte in the middle; the mark stays where it was.
func urgent(t *testing.T, w *tcpWorld) {
	c, s := w.connect(t, nil)
	control(t, s, func(fd int) error { return unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_OOBINLINE, 1) })
	before, after := randomBytes(300_000), randomBytes(200_000)
	failed := make(chan error, 1)
	go func() {
		_, err := c.Write(before)
		raw, rawErr := c.SyscallConn()
		err = errors.Join(err, rawErr)
		if err == nil {
			err = errors.Join(err, raw.Write(func(fd uintptr) bool {
				sendErr := unix.Send(int(fd), []byte{'!'}, unix.MSG_OOB)
				if sendErr == unix.EAGAIN {
					return false
				}
				err = sendErr
				return true
			}))
		}
		_, last := c.Write(after)
		failed <- errors.Join(err, last)
	}()
	// A read stops at the mark, if the mark has come by then: so look for it only
	// when the next byte is there, and before that is read.
	raw, err := s.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	var got []byte
	mark := -1
	for buf := make([]byte, 64<<10); len(got) < len(before)+1+len(after); {
		var n int
		var err error
		failed := raw.Read(func(fd uintptr) bool {
			if n, _, err = unix.Recvfrom(int(fd), buf[:1], unix.MSG_PEEK); err != nil || n == 0 {
				return err != unix.EAGAIN
			}
			var at int
			if at, err = unix.IoctlGetInt(int(fd), unix.SIOCATMARK); at != 0 {
				mark = len(got)
			}
			if err == nil {
				n, err = unix.Read(int(fd), buf)
			}
			return true
		})
		if err = errors.Join(failed, err); err != nil || n == 0 {
			t.Fatalf("after %d bytes: %v", len(got), err)
		}
		got = append(got, buf[:n]...)
	}
	if err := <-failed; err != nil {
		t.Fatal(err)
	}
	whole := slices.Concat(before, []byte{'!'}, after)
	if mark != len(before) || !bytes.Equal(got, whole) {
		t.Errorf("the mark is at %d, want %d; content right: %v", mark, len(before), bytes.Equal(got, whole))
	}
}

// reset: a closed port refuses, and an abort reaches the other end.
func reset(t *testing.T, w *tcpWorld) {
	c, s := w.connect(t, nil)
	carries(t, c, s, randomBytes(100_000), nil)
	closed := c.RemoteAddr().String() // the listener is gone
	if _, err := w.a.Dial(t.Context(), "tcp", closed); !errors.Is(err, unix.ECONNREFUSED) {
		t.Errorf("connect to a closed port: %v, want that it is refused", err)
	}
	if err := errors.Join(c.SetLinger(0), c.Close()); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Read(make([]byte, 1)); !errors.Is(err, unix.ECONNRESET) {
		t.Errorf("read after an abort: %v, want a reset", err)
	}
}

// zeroWindow lets a receiver's buffer run full, and reads on only then.
func zeroWindow(t *testing.T, w *tcpWorld) {
	c, s := w.connect(t, func(fd int) error {
		return unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF, 16<<10)
	})
	closed, opened := netstat(t, w.b, "TcpExt.TCPToZeroWindowAdv"), netstat(t, w.b, "TcpExt.TCPFromZeroWindowAdv")
	data := randomBytes(500_000)
	failed := make(chan error, 1)
	go func() {
		_, err := c.Write(data)
		failed <- errors.Join(err, c.CloseWrite())
	}()
	eventually(t, 10*time.Second, "b closes its window", func() bool { return netstat(t, w.b, "TcpExt.TCPToZeroWindowAdv") > closed })
	got, err := io.ReadAll(s)
	if err = errors.Join(err, <-failed); err != nil || !bytes.Equal(got, data) {
		t.Errorf("%d bytes arrived, want %d; right: %v, %v", len(got), len(data), bytes.Equal(got, data), err)
	}
	if netstat(t, w.b, "TcpExt.TCPFromZeroWindowAdv") == opened {
		t.Error("b never opened its window again")
	}
}

// tinyMSS: trains of far more segments than one UDP send takes.
func tinyMSS(t *testing.T, w *tcpWorld) {
	for _, mss := range []int{88, 216, 536} {
		c, s := w.connect(t, func(fd int) error { return unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_MAXSEG, mss) })
		var longest atomic.Int64
		if w.relay != nil {
			w.relay.through(t, func(_ bool, d []byte) bool {
				if seg, _, ok := innerTCP(d); ok {
					longest.Store(max(longest.Load(), int64(len(seg.Payload())+len(seg.Options()))))
				}
				return true
			})
		}
		if got := int(tcpInfo(t, c).Snd_mss); got > mss || got < mss-12 {
			t.Errorf("segments of %d bytes, want %d less the timestamps", got, mss)
		}
		bothWays(t, c, s, 600_000)
		if got := longest.Load(); w.relay != nil && got != int64(mss) {
			t.Errorf("the longest segment on the wire has %d bytes with its options, want %d", got, mss)
		}
	}
	if w.relay != nil {
		w.relay.through(t, nil)
	}
}

// halfClose: the server answers after the client's FIN.
func halfClose(t *testing.T, w *tcpWorld) {
	c, s := w.connect(t, nil)
	carries(t, c, s, randomBytes(200_000), nil)
	if err := c.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if n, err := s.Read(make([]byte, 1)); n != 0 || err != io.EOF {
		t.Errorf("read after the FIN: %d, %v, want the end", n, err)
	}
	carries(t, s, c, randomBytes(3<<20), nil)
	if err := s.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if n, err := c.Read(make([]byte, 1)); n != 0 || err != io.EOF {
		t.Errorf("read after the second FIN: %d, %v, want the end", n, err)
	}
}

// more sends pieces of odd sizes that the kernel may join.
func more(t *testing.T, w *tcpWorld) {
	c, s := w.connect(t, nil)
	carries(t, c, s, randomBytes(400_000), func(c net.Conn, b []byte) error {
		raw, err := c.(*net.TCPConn).SyscallConn()
		if err != nil {
			return err
		}
		for size := 1; len(b) > 0; size = size*7%1009 + 1 {
			piece, flags := b[:min(size, len(b))], unix.MSG_MORE
			if size%5 == 0 || len(piece) == len(b) {
				flags = 0
			}
			var sent int
			var failed error
			if err := raw.Write(func(fd uintptr) bool {
				sent, failed = unix.SendmsgN(int(fd), piece, nil, nil, flags)
				return failed != unix.EAGAIN
			}); err != nil || failed != nil {
				return errors.Join(err, failed)
			}
			b = b[sent:]
		}
		return nil
	})
}

func TestTCPDirect(t *testing.T) {
	t.Parallel()
	_, _, a, b := pair(t, lab.Underlay{Prefix4: underlay4, Offloads: lab.NIC})
	for i, n := range []*tulle{a, b} {
		if err := n.host.AddAddr("blue0", netip.PrefixFrom(addressV6(i+1), 64)); err != nil {
			t.Fatal(err)
		}
	}
	everyTCPCase(t, &tcpWorld{a: a.host, b: b.host})
	unharmed(t, a.host, b.host)
}

func TestTCPRelayed(t *testing.T) {
	t.Parallel()
	_, r, a, b := relayed(t, lab.Underlay{}, "off", nil, nil)
	w := &tcpWorld{a: a.host, b: b.host, relay: r}
	everyTCPCase(t, w)
	for _, v6 := range []bool{false, true} {
		w.v6 = v6
		t.Run(fmt.Sprintf("loss v6=%v", v6), func(t *testing.T) { loss(t, w) })
		t.Run(fmt.Sprintf("reordering v6=%v", v6), func(t *testing.T) { reordering(t, w) })
		t.Run(fmt.Sprintf("ECN v6=%v", v6), func(t *testing.T) { congestion(t, w) })
	}
	unharmed(t, a.host, b.host)
}

func everyTCPCase(t *testing.T, w *tcpWorld) {
	ping(t, w.a, address(2), 5*time.Second)
	ping(t, w.a, addressV6(2), 5*time.Second)
	for _, w.v6 = range []bool{false, true} {
		for _, c := range tcpCases {
			t.Run(fmt.Sprintf("%s v6=%v", c.name, w.v6), func(t *testing.T) { c.run(t, w) })
		}
	}
}
