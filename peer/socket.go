package peer

import (
	"crypto/rand"
	"encoding/binary"
	"errors"
	"hash/maphash"
	"net"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/quic-go/quic-go"
)

const (
	// connectionIDLen: long enough that nobody hits another's by chance, also after a restart.
	connectionIDLen = 8
	// maxDatagram is the largest that quic-go makes or takes.
	maxDatagram = 1452
	// The lanes hold at most this many datagrams each, 1.1 MiB in all.
	laneSize        = 512
	initialLaneSize = 256
)

// packet is a datagram that waits.
type packet struct {
	from netip.AddrPort
	n    int
	b    [maxDatagram]byte
}

// socket is the net.PacketConn that quic-go reads from and writes to. It has no
// file descriptor on purpose: the socket belongs to the data path, and its
// options are not to be touched.
type socket struct {
	send  func(netip.AddrPort, []byte) error
	known func(netip.Addr) bool
	stats *Stats

	// What belongs to no connection of this process has a lane of its own, behind rates.
	lane, initials chan *packet
	ids            ids
	// pool holds *packet.
	pool sync.Pool

	strangers, verified, members, lost rate

	closed    chan struct{}
	closeOnce sync.Once
	// expired is closed while a read deadline has passed.
	mu      sync.Mutex
	expired chan struct{}
}

func newSocket(cfg *Config, stats *Stats) *socket {
	s := &socket{
		send: cfg.Send, known: cfg.Known, stats: stats,
		lane: make(chan *packet, laneSize), initials: make(chan *packet, initialLaneSize),
		ids: ids{maphash.MakeSeed()}, closed: make(chan struct{}), expired: make(chan struct{}),
	}
	s.pool.New = func() any { return new(packet) }
	for _, r := range []*rate{&s.strangers, &s.verified, &s.members, &s.lost} {
		r.every = time.Second / time.Duration(cfg.InitialRate)
		r.burst = initialLaneSize * r.every
	}
	return s
}

// deliver takes a datagram in, or drops it and counts. It never blocks; d is
// borrowed until it returns.
func (s *socket) deliver(from netip.AddrPort, d []byte) {
	if len(d) > maxDatagram {
		s.stats.RxOversize.Add(1)
		return
	}
	lane := s.lane
	if !s.ids.own(destination(d)) {
		lane = s.initials
		r := &s.lost // answered with a stateless reset, at best
		if token, ok := initial(d); ok {
			switch {
			case s.known(from.Addr()):
				r = &s.members
			case token:
				r = &s.verified
			default:
				r = &s.strangers
			}
		}
		if !r.allow(time.Now().UnixNano()) {
			s.stats.RxLimited.Add(1)
			return
		}
	}
	if len(lane) == cap(lane) {
		s.stats.RxQueueFull.Add(1)
		return
	}
	p := s.pool.Get().(*packet)
	p.from, p.n = from, copy(p.b[:], d)
	select {
	case lane <- p:
		s.stats.RxDatagrams.Add(1)
		s.stats.RxBytes.Add(uint64(len(d)))
	default:
		s.pool.Put(p)
		s.stats.RxQueueFull.Add(1)
	}
}

// ids makes connection IDs that this process recognises without a look-up: four
// random bytes, and four that follow from them. Nothing depends on it that they
// cannot be forged but who waits behind whom when there is a flood.
type ids struct{ seed maphash.Seed }

func (i ids) tag(random []byte) uint32 { return uint32(maphash.Bytes(i.seed, random)) }

// GenerateConnectionID implements quic.ConnectionIDGenerator.
func (i ids) GenerateConnectionID() (quic.ConnectionID, error) {
	var b [connectionIDLen]byte
	_, _ = rand.Read(b[:4]) // never fails
	binary.BigEndian.PutUint32(b[4:], i.tag(b[:4]))
	return quic.ConnectionIDFromBytes(b[:]), nil
}

// ConnectionIDLen implements quic.ConnectionIDGenerator.
func (ids) ConnectionIDLen() int { return connectionIDLen }

func (i ids) own(id []byte) bool {
	return len(id) == connectionIDLen && binary.BigEndian.Uint32(id[4:]) == i.tag(id[:4])
}

// destination is the connection ID that a datagram is for (RFC 9000, section
// 17), nil if it is too short; a short header does not say its length, which is ours.
func destination(d []byte) []byte {
	switch {
	case len(d) > connectionIDLen && d[0]&0x80 == 0:
		return d[1 : 1+connectionIDLen]
	case len(d) > 5 && d[0]&0x80 != 0 && len(d) >= 6+int(d[5]):
		return d[6 : 6+int(d[5])]
	}
	return nil
}

// initial says whether a datagram begins with an Initial packet, and whether
// that carries a token (RFC 9000, section 17.2.2); what is too short for one is none.
func initial(d []byte) (token, ok bool) {
	const long, typeMask = 0x80, 0x30
	if len(d) < 7 || d[0]&long == 0 || d[0]&typeMask != 0 {
		return false, false
	}
	at := 6 + int(d[5]) // behind the destination connection ID
	if at >= len(d) {
		return false, true
	}
	at += 1 + int(d[at]) // behind the source connection ID
	return at < len(d) && d[at] != 0, true
}

// ReadFrom implements net.PacketConn for the one goroutine of quic-go that reads.
func (s *socket) ReadFrom(b []byte) (int, net.Addr, error) {
	s.mu.Lock()
	expired := s.expired
	s.mu.Unlock()
	var p *packet
	select {
	case p = <-s.lane:
	default:
		select {
		case p = <-s.lane:
		case p = <-s.initials:
		case <-expired:
			return 0, nil, os.ErrDeadlineExceeded
		case <-s.closed:
			return 0, nil, net.ErrClosed
		}
	}
	n, from := copy(b, p.b[:p.n]), net.UDPAddrFromAddrPort(p.from)
	s.pool.Put(p)
	return n, from, nil
}

// WriteTo implements net.PacketConn. A datagram that cannot be sent is a lost
// one: to fail would end the connection, for what may be over in a second.
func (s *socket) WriteTo(b []byte, addr net.Addr) (int, error) {
	to := addr.(*net.UDPAddr).AddrPort() // dialled with one, or from ReadFrom
	to = netip.AddrPortFrom(to.Addr().Unmap(), to.Port())
	if err := s.send(to, b); err != nil {
		s.stats.TxError.Add(1)
		if errors.Is(err, syscall.EMSGSIZE) {
			return 0, err // quic-go begins anew with smaller ones
		}
		return len(b), nil
	}
	s.stats.TxDatagrams.Add(1)
	s.stats.TxBytes.Add(uint64(len(b)))
	return len(b), nil
}

// LocalAddr implements net.PacketConn; nobody asks for more than that there is one.
func (s *socket) LocalAddr() net.Addr { return &net.UDPAddr{} }

// SetReadDeadline implements net.PacketConn as far as quic-go needs it: a time
// that has passed wakes the reader, the zero time lets it wait again.
func (s *socket) SetReadDeadline(t time.Time) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	select {
	case <-s.expired:
		if t.IsZero() {
			s.expired = make(chan struct{})
		}
	default:
		if !t.IsZero() {
			close(s.expired)
		}
	}
	return nil
}

// The rest of net.PacketConn, and what quic-go would set on a UDP socket.

func (s *socket) SetDeadline(t time.Time) error    { return s.SetReadDeadline(t) }
func (s *socket) SetWriteDeadline(time.Time) error { return nil }
func (s *socket) SetReadBuffer(int) error          { return nil }
func (s *socket) SetWriteBuffer(int) error         { return nil }

func (s *socket) Close() error {
	s.closeOnce.Do(func() { close(s.closed) })
	return nil
}

// rate allows an event every so often, and bursts (the generic cell rate
// algorithm, ITU-T I.371). It takes no lock: it is asked on the data path.
type rate struct {
	every, burst time.Duration
	// next is when the bucket would be full again, in Unix nanoseconds.
	next atomic.Int64
}

func (r *rate) allow(now int64) bool {
	for {
		next := r.next.Load()
		at := max(next, now) + int64(r.every)
		if at-now > int64(r.burst) {
			return false
		}
		if r.next.CompareAndSwap(next, at) {
			return true
		}
	}
}
