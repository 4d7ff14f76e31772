package tap

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/tulle-net/tulle/ether"
)

// In these tests two namespaces have a TAP each, and the test is the wire:
//
//	namespace a            this test             namespace b
//	[TCP] - tap  ==Read==>  cable  ==WriteFrame==>  tap - [TCP]

func (s *space) setDown(dev Device) {
	s.t.Helper()
	h, err := netlink.NewHandleAt(s.ns, unix.NETLINK_ROUTE)
	if err != nil {
		s.t.Fatal(err)
	}
	defer h.Close()
	if err := h.LinkSetDown(s.links()[dev.Name()]); err != nil {
		s.t.Fatal(err)
	}
}

// cable carries frames both ways and counts the super-frames of each kind.
type cable struct {
	super   [4]atomic.Int64 // by ether.GSO
	longest atomic.Int64
	errs    atomic.Int64
	last    atomic.Value // error
	wg      sync.WaitGroup
}

// plug connects all queues of both devices until the test ends.
func plug(t *testing.T, a, b Device) *cable {
	t.Helper()
	c := new(cable)
	for _, way := range [][2]Device{{a, b}, {b, a}} {
		to := way[1].Queues()
		for i, q := range way[0].Queues() {
			c.wg.Go(func() { c.carry(q, to[i%len(to)]) })
		}
	}
	t.Cleanup(func() {
		_, _ = a.Close(), b.Close()
		c.wg.Wait()
		if n := c.errs.Load(); n > 0 {
			t.Errorf("%d frames were lost, the last to %v", n, c.last.Load())
		}
	})
	return c
}

func (c *cable) carry(from, to Queue) {
	parts := make([][]byte, 2)
	_ = pump(from, func(f Frame) {
		c.super[f.Meta.GSO].Add(1)
		for n := int64(len(f.B)); ; {
			if old := c.longest.Load(); n <= old || c.longest.CompareAndSwap(old, n) {
				break
			}
		}
		parts[0], parts[1] = f.B[:14], f.B[14:]
		if err := to.WriteFrame(f.Meta, parts); err != nil && !errors.Is(err, ErrClosed) {
			c.errs.Add(1)
			c.last.Store(err)
		}
	})
}

// transfer sends n random bytes from one namespace to the other over TCP and
// checks that they arrive.
func transfer(t *testing.T, from, to *space, addr netip.Addr, n int) {
	t.Helper()
	var l net.Listener
	to.do(func() (err error) {
		l, err = net.Listen("tcp", netip.AddrPortFrom(addr, 0).String())
		return err
	})
	defer l.Close()
	type result struct {
		sum []byte
		n   int64
		err error
	}
	got := make(chan result, 1)
	go func() {
		conn, err := l.Accept()
		if err != nil {
			got <- result{err: err}
			return
		}
		defer conn.Close()
		_ = conn.SetDeadline(time.Now().Add(30 * time.Second))
		h := sha256.New()
		n, err := io.Copy(h, conn)
		got <- result{h.Sum(nil), n, err}
	}()
	data := make([]byte, n)
	_, _ = rand.NewChaCha8([32]byte{1}).Read(data)
	from.do(func() error {
		conn, err := (&net.Dialer{Timeout: 10 * time.Second}).Dial("tcp", l.Addr().String())
		if err != nil {
			_ = l.Close()
			return err
		}
		defer conn.Close()
		_ = conn.SetDeadline(time.Now().Add(30 * time.Second))
		_, err = conn.Write(data)
		return err
	})
	r := <-got
	if want := sha256.Sum256(data); r.err != nil || r.n != int64(n) || !bytes.Equal(r.sum, want[:]) {
		t.Fatalf("%d of %d bytes arrived (sum right: %v): %v", r.n, n, bytes.Equal(r.sum, want[:]), r.err)
	}
}

func TestTCP(t *testing.T) {
	const n = 8 << 20
	for _, c := range []struct {
		a, b   Driver
		queues int
	}{
		{DriverOffload, DriverOffload, 1},
		{DriverOffload, DriverOffload, 3},
		{DriverPlain, DriverPlain, 1},
		{DriverOffload, DriverPlain, 1},
	} {
		for _, v6 := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s-%s/queues=%d/v6=%v", c.a, c.b, c.queues, v6), func(t *testing.T) {
				sa, sb := newSpace(t), newSpace(t)
				addrA, addrB, kind := "10.32.0.1/16", "10.32.0.2/16", ether.GSOTCPv4
				if v6 {
					addrA, addrB, kind = "fd00:32::1/64", "fd00:32::2/64", ether.GSOTCPv6
				}
				cfg := Config{}
				if c.a == DriverOffload && c.b == DriverOffload {
					cfg.Queues = c.queues
				}
				a, b := sa.station(c.a, addrA, cfg), sb.station(c.b, addrB, cfg)
				w := plug(t, a, b)
				transfer(t, sa, sb, netip.MustParsePrefix(addrB).Addr(), n)
				supers := w.super[kind].Load()
				if c.a == DriverOffload && supers < 20 {
					t.Errorf("%d super-frames, want the bulk of the traffic", supers)
				}
				if longest := w.longest.Load(); c.a == DriverOffload && longest < 20_000 {
					t.Errorf("the longest frame has %d bytes, want a long super-frame", longest)
				}
				if c.a == DriverPlain && (supers != 0 || w.longest.Load() > 1450+14) {
					t.Errorf("plain gave %d super-frames, the longest frame has %d bytes", supers, w.longest.Load())
				}
				before := w.super[kind].Load()
				transfer(t, sb, sa, netip.MustParsePrefix(addrA).Addr(), n)
				if c.b == DriverOffload && w.super[kind].Load()-before < 20 {
					t.Error("no super-frames the other way")
				}
			})
		}
	}
}

// TestTrainFits: no TCP super-frame makes a train that is too long for one UDP send.
func TestTrainFits(t *testing.T) {
	for _, mtu := range []int{1280, 1418, 1450, 8950} {
		sa, sb := newSpace(t), newSpace(t)
		cfg := Config{MTU: mtu, Driver: DriverOffload}
		a, b := sa.station(DriverOffload, "10.32.0.1/16", cfg), sb.station(DriverOffload, "10.32.0.2/16", cfg)
		var worst, segs atomic.Int64
		var wg sync.WaitGroup
		watch := func(from, to Queue) {
			_ = pump(from, func(f Frame) {
				if m := f.Meta; m.GSO != ether.GSONone {
					n := (len(f.B) - int(m.HeaderLen) + int(m.SegmentLen) - 1) / int(m.SegmentLen)
					train := int64(len(f.B) + (n-1)*int(m.HeaderLen) + n*8)
					worst.Store(max(worst.Load(), train))
					segs.Store(max(segs.Load(), int64(n)))
				}
				_ = to.WriteFrame(f.Meta, [][]byte{f.B})
			})
		}
		wg.Go(func() { watch(a.Queues()[0], b.Queues()[0]) })
		wg.Go(func() { watch(b.Queues()[0], a.Queues()[0]) })
		transfer(t, sa, sb, there.Addr(), 8<<20)
		_, _ = a.Close(), b.Close()
		wg.Wait()
		if worst.Load() > udpMax || segs.Load() > gsoMaxSegs {
			t.Errorf("MTU %d: a train of %d bytes, %d segments, want at most %d, %d", mtu, worst.Load(), segs.Load(), udpMax, gsoMaxSegs)
		}
		if worst.Load() < 50_000 {
			t.Errorf("MTU %d: the longest train has %d bytes, want it nearly full", mtu, worst.Load())
		}
	}
}

// TestSwitch switches offloads off and on again while traffic runs.
func TestSwitch(t *testing.T) {
	sa, sb := newSpace(t), newSpace(t)
	a := sa.station(DriverOffload, "10.32.0.1/16", Config{NoTSO: true, NoUSO: true, NoGRO: true})
	b := sb.station(DriverOffload, "10.32.0.2/16", Config{NoGRO: true})
	if o := a.Offloads(); o != (Offloads{DriverOffload, "on", "off", "off", "off", "off"}) {
		t.Errorf("Offloads = %+v, want all but the checksum off", o)
	}
	w := plug(t, a, b)
	for i := range 4 {
		on := i%2 == 1
		before := w.super[ether.GSOTCPv4].Load()
		transfer(t, sa, sb, there.Addr(), 2<<20)
		if n := w.super[ether.GSOTCPv4].Load() - before; (n > 0) != on {
			t.Errorf("%d super-frames with TSO on=%v", n, on)
		}
		if err := errors.Join(a.SetOffload(on, on, on), b.SetOffload(false, false, !on)); err != nil {
			t.Fatal(err)
		}
	}
}

// TestUSO: a UDP train passes whole into the other kernel.
func TestUSO(t *testing.T) {
	for _, to := range drivers {
		t.Run(string(to), func(t *testing.T) {
			const seg, total = 1000, 30_500
			sa, sb := newSpace(t), newSpace(t)
			a, b := sa.station(DriverOffload, "10.32.0.1/16", Config{}), sb.station(to, "10.32.0.2/16", Config{})
			w := plug(t, a, b)
			conn := sb.listenUDP(there)
			payload := pattern(total)
			sa.do(func() error {
				d := net.Dialer{Control: func(_, _ string, raw syscall.RawConn) (err error) {
					cerr := raw.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_UDP, unix.UDP_SEGMENT, seg) })
					return errors.Join(cerr, err)
				}}
				out, err := d.DialContext(context.Background(), "udp", there.String())
				if err != nil {
					return err
				}
				defer out.Close()
				_, err = out.Write(payload)
				return err
			})
			for off := 0; off < total; off += seg {
				if got := receive(t, conn); !bytes.Equal(got, payload[off:min(off+seg, total)]) {
					t.Fatalf("datagram at %d is damaged", off)
				}
			}
			if n := w.super[ether.GSOUDP].Load(); n != 1 {
				t.Errorf("%d UDP super-frames, want 1", n)
			}
		})
	}
}
