// Package discoverytest is a network in memory that discovery's gossip can go over.
//
// It delays what is sent, loses datagrams where that is asked for, and counts. There
// are no links: nothing queues, and nothing is too fast. It runs in a synctest bubble.
package discoverytest

import (
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"time"
)

const (
	// maxDatagrams wait for a reader, as in a socket's buffer.
	maxDatagrams = 512
	// maxPending streams wait to be accepted.
	maxPending = 256
)

// Network connects hosts. Its methods are safe for concurrent use.
type Network struct {
	delay time.Duration // of everything, one way
	loss  atomic.Uint32 // datagrams lost, of a million

	datagrams, datagramBytes, streams, streamBytes, lost, overflows atomic.Uint64

	mu        sync.RWMutex
	packets   map[netip.AddrPort]*packetConn
	listeners map[netip.AddrPort]*listener
}

// Counts are what was sent since NewNetwork. Bytes are those of payloads.
type Counts struct {
	Datagrams, DatagramBytes uint64
	Streams, StreamBytes     uint64
	Lost                     uint64 // datagrams, as SetLoss says
	Overflows                uint64 // datagrams for which a reader had no room, and streams
}

// NewNetwork returns one without hosts, on which everything takes delay one way.
func NewNetwork(delay time.Duration) *Network {
	return &Network{delay: delay, packets: map[netip.AddrPort]*packetConn{}, listeners: map[netip.AddrPort]*listener{}}
}

// SetLoss has a part of the datagrams get lost from now on, 0 to 1.
func (n *Network) SetLoss(part float64) { n.loss.Store(uint32(part * 1e6)) }

// Counts returns the counters.
func (n *Network) Counts() Counts {
	return Counts{
		Datagrams: n.datagrams.Load(), DatagramBytes: n.datagramBytes.Load(),
		Streams: n.streams.Load(), StreamBytes: n.streamBytes.Load(),
		Lost: n.lost.Load(), Overflows: n.overflows.Load(),
	}
}

// Host returns the host with an address: a discovery.Network.
func (n *Network) Host(addr netip.Addr) *Host { return &Host{net: n, addr: addr} }

// Host is one host's view of a Network.
type Host struct {
	net  *Network
	addr netip.Addr
	last atomic.Uint32 // port that a dial came from
}

var errInUse = errors.New("address already in use")

// ListenPacket opens a port for datagrams.
func (h *Host) ListenPacket(at netip.AddrPort) (net.PacketConn, error) {
	n := h.net
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.packets[at] != nil {
		return nil, &net.OpError{Op: "listen", Net: "udp", Err: errInUse}
	}
	c := &packetConn{net: n, at: at, in: make(chan datagram, maxDatagrams), closed: make(chan struct{})}
	n.packets[at] = c
	return c, nil
}

// Listen opens a port for streams.
func (h *Host) Listen(at netip.AddrPort) (net.Listener, error) {
	n := h.net
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.listeners[at] != nil {
		return nil, &net.OpError{Op: "listen", Net: "tcp", Err: errInUse}
	}
	l := &listener{net: n, at: at, in: make(chan net.Conn, maxPending), closed: make(chan struct{})}
	n.listeners[at] = l
	return l, nil
}

var errRefused = errors.New("connection refused")

// Dial opens a stream, which takes a round trip.
func (h *Host) Dial(ctx context.Context, to netip.AddrPort) (net.Conn, error) {
	n := h.net
	fail := func(err error) (net.Conn, error) {
		return nil, &net.OpError{Op: "dial", Net: "tcp", Addr: net.TCPAddrFromAddrPort(to), Err: err}
	}
	t := time.NewTimer(2 * n.delay)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
		return fail(ctx.Err())
	}
	n.mu.RLock()
	l := n.listeners[to]
	n.mu.RUnlock()
	if l == nil {
		return fail(errRefused)
	}
	n.streams.Add(1)
	from := netip.AddrPortFrom(h.addr, uint16(32768+h.last.Add(1)%28000))
	there, back := newHalf(n), newHalf(n)
	l.push(&stream{local: to, remote: from, in: there, out: back})
	return &stream{local: from, remote: to, in: back, out: there}, nil
}

type datagram struct {
	b    []byte
	from netip.AddrPort
}

// packetConn is a port for datagrams. It has no deadlines.
type packetConn struct {
	net    *Network
	at     netip.AddrPort
	in     chan datagram
	closed chan struct{}
	once   sync.Once
}

func (c *packetConn) ReadFrom(b []byte) (int, net.Addr, error) {
	select {
	case <-c.closed:
		return 0, nil, net.ErrClosed
	default:
	}
	select {
	case d := <-c.in:
		return copy(b, d.b), net.UDPAddrFromAddrPort(d.from), nil
	case <-c.closed:
		return 0, nil, net.ErrClosed
	}
}

// WriteTo sends a datagram, b borrowed.
func (c *packetConn) WriteTo(b []byte, to net.Addr) (int, error) {
	n := c.net
	n.datagrams.Add(1)
	n.datagramBytes.Add(uint64(len(b)))
	if rand.Uint32N(1e6) < n.loss.Load() {
		n.lost.Add(1)
		return len(b), nil
	}
	at := to.(*net.UDPAddr).AddrPort()
	d := datagram{append([]byte(nil), b...), c.at}
	time.AfterFunc(n.delay, func() {
		n.mu.RLock()
		dst := n.packets[at]
		n.mu.RUnlock()
		if dst == nil {
			return
		}
		select {
		case dst.in <- d:
		default:
			n.overflows.Add(1)
		}
	})
	return len(b), nil
}

func (c *packetConn) Close() error {
	c.once.Do(func() {
		c.net.mu.Lock()
		delete(c.net.packets, c.at)
		c.net.mu.Unlock()
		close(c.closed)
	})
	return nil
}

func (c *packetConn) LocalAddr() net.Addr              { return net.UDPAddrFromAddrPort(c.at) }
func (c *packetConn) SetDeadline(time.Time) error      { return errors.ErrUnsupported }
func (c *packetConn) SetReadDeadline(time.Time) error  { return errors.ErrUnsupported }
func (c *packetConn) SetWriteDeadline(time.Time) error { return errors.ErrUnsupported }

// listener is a port for streams.
type listener struct {
	net    *Network
	at     netip.AddrPort
	in     chan net.Conn
	closed chan struct{}
	once   sync.Once
}

func (l *listener) push(s *stream) {
	select {
	case l.in <- s:
	default:
		l.net.overflows.Add(1)
		_ = s.Close()
	}
}

func (l *listener) Accept() (net.Conn, error) {
	select {
	case c := <-l.in:
		return c, nil
	case <-l.closed:
		return nil, net.ErrClosed
	}
}

func (l *listener) Close() error {
	l.once.Do(func() {
		l.net.mu.Lock()
		delete(l.net.listeners, l.at)
		l.net.mu.Unlock()
		close(l.closed)
		for {
			select {
			case c := <-l.in:
				_ = c.Close()
			default:
				return
			}
		}
	})
	return nil
}

func (l *listener) Addr() net.Addr { return net.TCPAddrFromAddrPort(l.at) }

// stream is one end of a stream.
type stream struct {
	local, remote netip.AddrPort
	in, out       *half
}

func (s *stream) Read(b []byte) (int, error)         { return s.in.read(b) }
func (s *stream) Write(b []byte) (int, error)        { return s.out.write(b) }
func (s *stream) LocalAddr() net.Addr                { return net.TCPAddrFromAddrPort(s.local) }
func (s *stream) RemoteAddr() net.Addr               { return net.TCPAddrFromAddrPort(s.remote) }
func (s *stream) SetDeadline(t time.Time) error      { return s.SetReadDeadline(t) }
func (s *stream) SetReadDeadline(t time.Time) error  { return s.in.expire(t) }
func (s *stream) SetWriteDeadline(_ time.Time) error { return nil } // a write never waits

func (s *stream) Close() error {
	s.in.abandon()
	s.out.end()
	return nil
}

// half is one direction of a stream: a queue without bound. One goroutine at a time
// reads it.
type half struct {
	net  *Network
	bell chan struct{} // something is another way than it was

	mu       sync.Mutex
	queue    []segment
	ended    bool // the writer writes no more
	over     time.Time
	dropped  bool // the reader reads no more
	deadline time.Time
}

type segment struct {
	b   []byte
	due time.Time
}

func newHalf(n *Network) *half { return &half{net: n, bell: make(chan struct{}, 1)} }

func (h *half) ring() {
	select {
	case h.bell <- struct{}{}:
	default:
	}
}

func (h *half) write(b []byte) (int, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.ended || h.dropped {
		return 0, net.ErrClosed
	}
	h.net.streamBytes.Add(uint64(len(b)))
	h.queue = append(h.queue, segment{append([]byte(nil), b...), time.Now().Add(h.net.delay)})
	h.ring()
	return len(b), nil
}

func (h *half) end() {
	h.mu.Lock()
	defer h.mu.Unlock()
	if !h.ended {
		h.ended, h.over = true, time.Now().Add(h.net.delay)
		h.ring()
	}
}

func (h *half) abandon() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.dropped, h.queue = true, nil
	h.ring()
}

func (h *half) expire(t time.Time) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.deadline = t
	h.ring()
	return nil
}

func (h *half) read(b []byte) (int, error) {
	for {
		n, wait, err := h.take(b)
		if n > 0 || err != nil || len(b) == 0 {
			return n, err
		}
		var due <-chan time.Time
		var t *time.Timer
		if wait > 0 {
			t = time.NewTimer(wait)
			due = t.C
		}
		select {
		case <-h.bell:
		case <-due:
		}
		if t != nil {
			t.Stop()
		}
	}
}

// take reads what has arrived, or says how long to wait, for ever if it is zero.
func (h *half) take(b []byte) (n int, wait time.Duration, err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	now := time.Now()
	var next time.Time
	switch {
	case h.dropped:
		return 0, 0, net.ErrClosed
	case !h.deadline.IsZero() && !now.Before(h.deadline):
		return 0, 0, os.ErrDeadlineExceeded
	case len(h.queue) > 0 && !now.Before(h.queue[0].due):
		s := &h.queue[0]
		n = copy(b, s.b)
		if s.b = s.b[n:]; len(s.b) == 0 {
			h.queue[0] = segment{}
			h.queue = h.queue[1:]
		}
		return n, 0, nil
	case len(h.queue) > 0:
		next = h.queue[0].due
	case h.ended && !now.Before(h.over):
		return 0, 0, io.EOF
	case h.ended:
		next = h.over
	}
	if !h.deadline.IsZero() && (next.IsZero() || h.deadline.Before(next)) {
		next = h.deadline
	}
	if next.IsZero() {
		return 0, 0, nil
	}
	return 0, max(next.Sub(now), 1), nil
}
