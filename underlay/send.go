package underlay

import (
	"net/netip"

	"golang.org/x/sys/unix"
)

const (
	// arenaLen holds four long trains.
	arenaLen = 256 << 10
	// maxPieces and maxMessages bound what one Flush sends.
	maxPieces   = 512
	maxMessages = 512
	// minMaxSegments is the most datagrams of a train that every Linux sends
	// (UDP_MAX_SEGMENTS is 64, and 128 from 6.9: one less is on the safe side).
	minMaxSegments  = 63
	longMaxSegments = 127
)

// sender is the Sender of one worker.
//
// Datagrams lie behind each other in the arena. Those of one socket with one
// destination and size form a message even if others lie between them: a
// message is a list of pieces. A socket's messages are a list too, so that they
// leave in the order in which their datagrams were committed.
type sender struct {
	c        *conn
	arena    []byte
	used     int
	reserved int // length of the room that the last Reserve gave
	messages []message
	pieces   []piece
	queues   [2][maxSourcePorts]queue // by family and socket
	inUse    []*queue                 // those that have messages, in order of first use
	scope    scopeCache
	out      outbox
}

// queue is what waits for one socket: indexes into messages, valid if it is in use.
type queue struct {
	first, last int32
	family      family
	socket      uint8
	used        bool
}

// message is what one msghdr carries: a datagram or a train.
type message struct {
	dst         netip.AddrPort
	next        int32 // message of the same socket, or -1
	first, last int32 // pieces
	segmentLen  int32 // of each datagram but the last
	bytes       int32
	datagrams   int32
	full        bool // takes no more: the last datagram was shorter
}

// piece is one or more whole datagrams that lie together.
type piece struct {
	off, end int32
	next     int32 // piece of the same message, or -1
}

var _ Sender = (*sender)(nil)

func newSender(c *conn) *sender {
	s := &sender{c: c}
	for f := range s.queues {
		for i := range s.queues[f] {
			s.queues[f][i].family, s.queues[f][i].socket = family(f), uint8(i)
		}
	}
	return s
}

// grow makes the memory on the first use: a Sender that never sends costs nothing.
func (s *sender) grow() {
	s.arena = make([]byte, arenaLen)
	s.messages = make([]message, 0, maxMessages)
	s.pieces = make([]piece, 0, maxPieces)
	s.inUse = make([]*queue, 0, len(s.queues)*maxSourcePorts)
	s.out.init()
}

func (s *sender) Reserve(n int) []byte {
	if n < 1 || n > MaxSend {
		panic("underlay: Reserve: length is not 1 to 65507")
	}
	if s.arena == nil {
		s.grow()
	}
	if s.used+n > len(s.arena) {
		s.Flush()
	}
	s.reserved = n
	return s.arena[s.used : s.used+n : s.used+n]
}

func (s *sender) Commit(dst netip.AddrPort, flow uint32, n int) {
	if n < 1 || n > s.reserved {
		panic("underlay: Commit: more or less than was reserved")
	}
	s.reserved = 0
	if dst.Addr().Is4In6() {
		dst = unmap(dst)
	}
	off := int32(s.used)
	s.used += n
	q := &s.queues[familyOf(dst.Addr())][flow%uint32(s.c.cfg.SourcePorts)]
	if !q.used || !s.extend(&s.messages[q.last], dst, off, int32(n)) {
		s.begin(q, dst, off, int32(n))
	}
	if len(s.pieces) == maxPieces || len(s.messages) == maxMessages {
		s.Flush()
	}
}

// extend adds the datagram at off to m, if it can travel with it.
func (s *sender) extend(m *message, dst netip.AddrPort, off, n int32) bool {
	if m.full || n > m.segmentLen || m.bytes+n > MaxSend || int(m.datagrams) == s.c.maxSegments ||
		m.dst != dst || !s.c.gso.Load() {
		return false
	}
	m.datagrams++
	m.bytes += n
	m.full = n < m.segmentLen
	last := &s.pieces[m.last]
	if last.end == off {
		last.end += n
		return true
	}
	last.next = int32(len(s.pieces))
	m.last = last.next
	s.pieces = append(s.pieces, piece{off: off, end: off + n, next: -1})
	return true
}

// begin makes a message of the datagram at off.
func (s *sender) begin(q *queue, dst netip.AddrPort, off, n int32) {
	i, p := int32(len(s.messages)), int32(len(s.pieces))
	s.pieces = append(s.pieces, piece{off: off, end: off + n, next: -1})
	s.messages = append(s.messages, message{dst: dst, next: -1, first: p, last: p, segmentLen: n, bytes: n, datagrams: 1})
	if q.used {
		s.messages[q.last].next = i
	} else {
		q.used, q.first = true, i
		s.inUse = append(s.inUse, q)
	}
	q.last = i
}

func (s *sender) Flush() {
	s.reserved = 0
	if len(s.messages) == 0 {
		return
	}
	s.out.begin()
	s.c.closing.RLock()
	for _, q := range s.inUse {
		q.used = false
		if s.c.closed {
			continue
		}
		p, err := s.c.pool(q.family)
		if err != nil {
			s.drop(q)
			continue
		}
		s.send(p.fds[q.socket], q.first)
	}
	s.c.closing.RUnlock()
	s.out.count(&s.c.stats)
	s.used = 0
	s.messages, s.pieces, s.inUse = s.messages[:0], s.pieces[:0], s.inUse[:0]
}

// drop counts what q holds: its family has no sockets.
func (s *sender) drop(q *queue) {
	for i := q.first; i >= 0; i = s.messages[i].next {
		s.out.unreachable += uint64(s.messages[i].datagrams)
	}
}

// send hands the list of messages that starts at first to the kernel.
func (s *sender) send(fd int, first int32) {
	for next := first; next >= 0; {
		n := 0
		s.out.iovUsed = 0
		for ; next >= 0 && n < maxMmsg; n++ {
			s.put(n, next)
			next = s.messages[next].next
		}
		s.sendAll(fd, n)
	}
}

// put writes header n for message i.
func (s *sender) put(n int, i int32) {
	m, o := &s.messages[i], &s.out
	o.message[n] = i
	h := &o.hdrs[n].hdr
	h.Iov = &o.iovs[o.iovUsed]
	iovs := 0
	for p := m.first; p >= 0; p = s.pieces[p].next {
		v := &o.iovs[o.iovUsed+iovs]
		v.Base = &s.arena[s.pieces[p].off]
		v.SetLen(int(s.pieces[p].end - s.pieces[p].off))
		iovs++
	}
	o.iovUsed += iovs
	h.SetIovlen(iovs)
	h.Namelen = putSockaddr(&o.names[n], m.dst, s.scope.of(m.dst))
	segmentLen := 0
	if m.datagrams > 1 {
		segmentLen = int(m.segmentLen)
	}
	o.control(n, segmentLen, s.ttl(m.dst), m.dst.Addr().Is4())
}

// ttl returns the TTL to ask for, 0 for the socket's: 1 for multicast.
func (s *sender) ttl(dst netip.AddrPort) int {
	if !dst.Addr().IsMulticast() {
		return 0
	}
	return s.c.cfg.GroupTTL[dst.Addr()]
}

// sendAll sends headers 0 to n-1 in order. Where the kernel stops, its error is
// that of the first one that is left.
func (s *sender) sendAll(fd, n int) {
	o := &s.out
	tries := 0
	for i := 0; i < n; {
		sent, errno := o.call(fd, i, n)
		if errno == 0 {
			for _, mi := range o.message[i : i+sent] {
				o.sent(uint64(s.messages[mi].datagrams), uint64(s.messages[mi].bytes))
			}
			i += sent
			tries = 0
			continue
		}
		if o.again(s.c, fd, errno, &tries) {
			continue
		}
		tries = 0
		m := &s.messages[o.message[i]]
		switch {
		case m.datagrams > 1 && isTrainError(errno):
			s.split(fd, i, errno)
		default:
			o.failed(errno, uint64(m.datagrams))
			s.c.noteTooBig(errno)
		}
		i++
	}
}

// isTrainError reports whether a train may have failed for being one.
func isTrainError(errno unix.Errno) bool {
	return errno == unix.EIO || errno == unix.EINVAL || errno == unix.EOPNOTSUPP || errno == unix.EMSGSIZE
}

// split sends the train of header i datagram by datagram. If all of them go,
// the kernel or the device cannot cut trains: no more of them.
func (s *sender) split(fd, i int, cause unix.Errno) {
	o := &s.out
	m := &s.messages[o.message[i]]
	o.single(i)
	var sent int32
	for p := m.first; p >= 0; p = s.pieces[p].next {
		for off := s.pieces[p].off; off < s.pieces[p].end; off += m.segmentLen {
			b := s.arena[off:min(off+m.segmentLen, s.pieces[p].end)]
			o.singleIov.Base = &b[0]
			o.singleIov.SetLen(len(b))
			errno := o.callSingle(s.c, fd)
			if errno == 0 {
				o.sent(1, uint64(len(b)))
				sent++
				continue
			}
			o.failed(errno, 1)
			s.c.noteTooBig(errno)
		}
	}
	if sent == m.datagrams && cause != unix.EMSGSIZE {
		s.c.stopGSO(cause)
	}
}

// noteTooBig rings the bell if errno says so.
func (c *conn) noteTooBig(errno unix.Errno) {
	if errno != unix.EMSGSIZE || c.cfg.TooBig == nil {
		return
	}
	select {
	case c.cfg.TooBig <- struct{}{}:
	default:
	}
}

// stopGSO switches trains off for good.
func (c *conn) stopGSO(cause unix.Errno) {
	if c.gso.CompareAndSwap(true, false) {
		c.setGSO("switched off: the kernel refused a train (" + cause.Error() + ")")
		c.cfg.Log.Warn("sending datagrams one by one: the device or the kernel refused a train (UDP_SEGMENT)", "err", cause)
	}
}

// scopeCache remembers the last zone.
type scopeCache struct {
	addr  netip.Addr
	scope uint32
}

// of returns the interface index that dst's zone names.
func (c *scopeCache) of(dst netip.AddrPort) uint32 {
	a := dst.Addr()
	if a.Is4() || a.Zone() == "" {
		return 0
	}
	if a != c.addr {
		c.addr, c.scope = a, scopeOf(a.Zone())
	}
	return c.scope
}
