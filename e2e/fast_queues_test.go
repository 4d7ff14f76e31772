package e2e

import (
	"context"
	bin "encoding/binary"
	"errors"
	"net"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tulle-net/tulle/internal/lab"
)

//	a (queues=4) ──[ul]── b (queues=4)      many flows both ways at once

// TestQueuesKeepOrder: with four queues no flow is ever reordered. Each UDP flow
// runs in both directions between the same two ports: by itself the kernel would send
// a flow to the queue that its answers came from, and move it when they begin.
func TestQueuesKeepOrder(t *testing.T) {
	t.Parallel()
	l, sw, h := hosts(t, 2, lab.Underlay{Prefix4: underlay4, Offloads: lab.NIC})
	a := up(t, l, h[0], "--overlay", overlay(1, "queues=4", "driver=offload"))
	b := up(t, l, h[1], "--join", seed(sw.Addr(h[0])), "--overlay", overlay(2, "queues=4", "driver=offload"))
	for _, n := range []*tulle{a, b} {
		if out := runIn(t, n.host, "ip", "-details", "link", "show", "dev", "blue0"); !strings.Contains(out, "numqueues 4") {
			t.Fatalf("%s: blue0 has not four queues:\n%s", n.name, out)
		}
	}
	ping(t, h[0], address(2), 5*time.Second)

	const flows = 12
	end := time.Now().Add(3 * time.Second)
	var wg sync.WaitGroup
	var out, in, late atomic.Uint64
	for i := range flows {
		ends := [2]netip.AddrPort{netip.AddrPortFrom(address(1), uint16(10000+i)), netip.AddrPortFrom(address(2), uint16(10000+i))}
		train, size := 0, 60+i*100
		if i%2 == 1 {
			train = 300 * (i%4 + 1)
			size = train
		}
		for side := range 2 {
			c := flowSocket(t, h[side], ends[side], ends[1-side], train)
			wg.Go(func() {
				// The other side joins in while the flow is under way.
				time.Sleep(time.Duration(side*i) * 100 * time.Millisecond)
				out.Add(sendFlow(t, c, uint32(i), size, train > 0, end))
			})
			wg.Go(func() {
				n, wrong, first := receiveFlow(t, c, uint32(i), end.Add(500*time.Millisecond))
				in.Add(n)
				if late.Add(wrong); wrong > 0 {
					t.Errorf("UDP flow %d to %s: %d of %d datagrams came behind a later one, the first is number %d", i, ends[side], wrong, n, first)
				}
			})
		}
	}
	for range 2 { // TCP between them, whose content is compared
		for side := range 2 {
			wg.Go(func() {
				ctx, cancel := context.WithTimeout(t.Context(), 25*time.Second)
				defer cancel()
				dst := netip.AddrPortFrom(address(2-side), 0)
				if _, err := l.Transfer(ctx, h[side], h[1-side], dst, lab.Amount{For: 2500 * time.Millisecond}); err != nil {
					t.Error(err)
				}
			})
		}
	}
	wg.Wait()
	t.Logf("of %d datagrams %d arrived, %d of them late", out.Load(), in.Load(), late.Load())
	if in.Load() < 20_000 {
		t.Errorf("%d datagrams arrived: too few to tell", in.Load())
	}
	unharmed(t, h...)
}

// flowSocket returns a connected UDP socket, which sends trains of segments of
// train bytes if that is not 0.
func flowSocket(t *testing.T, h *lab.Host, local, remote netip.AddrPort, train int) *net.UDPConn {
	t.Helper()
	d := net.Dialer{LocalAddr: net.UDPAddrFromAddrPort(local), Control: func(_, _ string, raw syscall.RawConn) (err error) {
		return errors.Join(raw.Control(func(fd uintptr) {
			err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 16<<20)
			if train > 0 {
				err = errors.Join(err, unix.SetsockoptInt(int(fd), unix.SOL_UDP, unix.UDP_SEGMENT, train))
			}
		}), err)
	}}
	var c net.Conn
	err := h.Do(func() (err error) {
		c, err = d.DialContext(t.Context(), "udp", remote.String())
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return c.(*net.UDPConn)
}

// sendFlow sends datagrams of size bytes, numbered from 1, in bursts of 16 or in
// trains of as many.
func sendFlow(t *testing.T, c *net.UDPConn, flow uint32, size int, train bool, end time.Time) (n uint64) {
	const burst = 16
	b := make([]byte, burst*size)
	for time.Now().Before(end) {
		for i := range burst {
			n++
			bin.BigEndian.PutUint32(b[i*size:], flow)
			bin.BigEndian.PutUint64(b[i*size+4:], n)
		}
		for off := 0; off < len(b); {
			piece := b[off : off+size]
			if train {
				piece = b
			}
			if _, err := c.Write(piece); err != nil && !errors.Is(err, unix.ENOBUFS) && !errors.Is(err, unix.ECONNREFUSED) {
				t.Error(err)
				return n
			}
			off += len(piece)
		}
		time.Sleep(2 * time.Millisecond)
	}
	return n
}

// receiveFlow counts what comes, and what comes behind its successor; first is
// the number of the first such datagram.
func receiveFlow(t *testing.T, c *net.UDPConn, flow uint32, end time.Time) (n, late, first uint64) {
	_ = c.SetReadDeadline(end)
	var last uint64
	for b := make([]byte, 65536); ; {
		got, err := c.Read(b)
		if errors.Is(err, unix.ECONNREFUSED) {
			continue
		}
		if err != nil {
			return n, late, first
		}
		if got < 12 || bin.BigEndian.Uint32(b) != flow {
			t.Errorf("flow %d was given %d bytes of another", flow, got)
			return n, late, first
		}
		seq := bin.BigEndian.Uint64(b[4:])
		n++
		if seq <= last {
			if late++; late == 1 {
				first = seq
			}
		}
		last = max(last, seq)
	}
}
