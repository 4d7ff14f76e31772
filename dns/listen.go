package dns

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"sync"
	"time"

	wire "github.com/miekg/dns"
)

const (
	// maxQuery is the longest query that is read, in bytes. A listener has one buffer of
	// this size, and there are hundreds.
	maxQuery = 1232
	// readBuffer is for a burst of a thousand queries; memory that nobody uses costs nothing.
	readBuffer = 1 << 20
	// maxInFlight queries of one source wait for the host's resolvers at once. In a
	// namespace all is one source: who asks there can choose its address.
	maxInFlight = 1024
	// maxTCP connections are open in all, maxTCPSource of one source.
	maxTCP       = 1024
	maxTCPSource = 64
	// maxPipelined queries of one connection are answered at once.
	maxPipelined = 32
	// tcpIdle is how long a connection is kept without a query, tcpWrite how long its
	// peer may take to read an answer.
	tcpIdle  = 10 * time.Second
	tcpWrite = 5 * time.Second
)

// Listener is where a Server is asked.
type Listener struct {
	s      *Server
	udp    *net.UDPConn
	tcp    *net.TCPListener
	at     netip.AddrPort
	who    func(netip.Addr) (View, bool)
	onHost bool

	ctx    context.Context
	cancel context.CancelFunc
	work   sync.WaitGroup

	mu       sync.Mutex
	closed   bool
	inFlight map[netip.Addr]int // by source
	conns    map[net.Conn]netip.Addr
}

// Listen answers on sockets, which are the listener's from here on. who returns what
// somebody at an address sees; false: it is not answered. onHost: they are sockets of
// the host, where each address is a source of its own.
func (s *Server) Listen(udp *net.UDPConn, tcp *net.TCPListener, who func(from netip.Addr) (View, bool), onHost bool) *Listener {
	at := udp.LocalAddr().(*net.UDPAddr).AddrPort()
	l := &Listener{
		s: s, udp: udp, tcp: tcp, who: who, onHost: onHost, at: netip.AddrPortFrom(at.Addr().Unmap(), at.Port()),
		inFlight: map[netip.Addr]int{}, conns: map[net.Conn]netip.Addr{},
	}
	_ = udp.SetReadBuffer(readBuffer) // as far as the system allows
	l.ctx, l.cancel = context.WithCancel(context.Background())
	s.mu.Lock()
	s.listeners[l] = struct{}{}
	s.mu.Unlock()
	l.work.Go(l.serveUDP)
	l.work.Go(l.serveTCP)
	return l
}

// ListenAt opens sockets of the host, both of one port, and answers on them.
func (s *Server) ListenAt(at netip.AddrPort, who func(from netip.Addr) (View, bool)) (*Listener, error) {
	tcp, err := net.ListenTCP("tcp", net.TCPAddrFromAddrPort(at))
	if err != nil {
		return nil, fmt.Errorf("dns: listen on %s: %w: is another resolver there (`ss -lnp` shows it)?", at, err)
	}
	at = netip.AddrPortFrom(at.Addr(), uint16(tcp.Addr().(*net.TCPAddr).Port)) // where 0 was asked for
	udp, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(at))
	if err != nil {
		tcp.Close()
		return nil, fmt.Errorf("dns: listen on %s: %w: is another resolver there (`ss -lnp` shows it)?", at, err)
	}
	return s.Listen(udp, tcp, who, true), nil
}

// Addr is where the listener is asked.
func (l *Listener) Addr() netip.AddrPort { return l.at }

// UDP is the listener's socket, to find out where it is; not to use otherwise.
func (l *Listener) UDP() *net.UDPConn { return l.udp }

// Close ends the listener, and waits for what it does.
func (l *Listener) Close() {
	l.cancel()
	_ = l.udp.Close()
	_ = l.tcp.Close()
	l.mu.Lock()
	l.closed = true
	for c := range l.conns {
		_ = c.Close()
	}
	l.mu.Unlock()
	l.work.Wait()
	l.s.mu.Lock()
	delete(l.s.listeners, l)
	l.s.mu.Unlock()
}

// source is whom a limit is about.
func (l *Listener) source(from netip.Addr) netip.Addr {
	if l.onHost {
		return from
	}
	return netip.Addr{}
}

// enter takes a place among the queries that wait; false: there is none left.
func (l *Listener) enter(source netip.Addr) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed || l.inFlight[source] >= maxInFlight {
		l.s.Stats.drop(DropInFlight)
		return false
	}
	l.inFlight[source]++
	return true
}

func (l *Listener) leave(source netip.Addr) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.inFlight[source]--; l.inFlight[source] == 0 {
		delete(l.inFlight, source)
	}
}

// serveUDP reads queries. What is known here is answered at once, the rest elsewhere.
func (l *Listener) serveUDP() {
	buf := make([]byte, maxQuery+1)
	for {
		n, from, err := l.udp.ReadFromUDPAddrPort(buf)
		switch {
		case errors.Is(err, net.ErrClosed):
			return
		case err != nil:
			continue // of an answer to somebody who has gone: it is told once
		}
		source := l.source(from.Addr().Unmap())
		a, ok := l.asker(from.Addr())
		if !ok {
			continue
		}
		req := l.parse(buf[:n])
		if req == nil {
			continue
		}
		reply, forwards := l.s.answer(l.ctx, req, a, false)
		if !forwards {
			l.sendUDP(req, reply, from)
			continue
		}
		if !l.enter(source) {
			continue
		}
		l.work.Go(func() {
			defer l.leave(source)
			reply, _ := l.s.answer(l.ctx, req, a, true)
			l.sendUDP(req, reply, from)
		})
	}
}

// asker returns who asks, if it may.
func (l *Listener) asker(from netip.Addr) (asker, bool) {
	view, ok := l.who(from.Unmap())
	if !ok {
		l.s.Stats.drop(DropSource)
	}
	return asker{view: view, at: l.at.Addr()}, ok
}

// parse reads a query; nil: it is none.
func (l *Listener) parse(b []byte) *wire.Msg {
	req := new(wire.Msg)
	if len(b) > maxQuery || req.Unpack(b) != nil || req.Response || len(req.Question) > 1 {
		l.s.Stats.drop(DropMalformed)
		return nil
	}
	l.s.Stats.Queries.Add(1)
	return req
}

// sendUDP sends an answer, cut to what the asker takes.
func (l *Listener) sendUDP(req, reply *wire.Msg, to netip.AddrPort) {
	size := wire.MinMsgSize
	if opt := req.IsEdns0(); opt != nil {
		size = min(max(size, int(opt.UDPSize())), udpSize)
	}
	reply.Truncate(size)
	b, err := reply.Pack()
	if err != nil {
		l.s.cfg.Log.Debug("an answer cannot be written", "err", err)
		return
	}
	_, _ = l.udp.WriteToUDPAddrPort(b, to) // who does not get it asks again
}

func (l *Listener) serveTCP() {
	for {
		c, err := l.tcp.AcceptTCP()
		switch {
		case errors.Is(err, net.ErrClosed):
			return
		case err != nil: // of that connection, or of too many descriptors
			select {
			case <-l.ctx.Done():
				return
			case <-time.After(10 * time.Millisecond):
			}
			continue
		}
		from := c.RemoteAddr().(*net.TCPAddr).AddrPort().Addr().Unmap()
		if _, ok := l.asker(from); !ok || !l.keep(c, l.source(from)) {
			_ = c.Close()
			continue
		}
		l.work.Go(func() {
			defer l.drop(c)
			l.serveConn(c, from)
		})
	}
}

// keep takes a place among the connections; false: there is none left.
func (l *Listener) keep(c net.Conn, source netip.Addr) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	of := 0
	for _, s := range l.conns {
		if s == source {
			of++
		}
	}
	l.s.mu.Lock()
	defer l.s.mu.Unlock()
	if l.closed || of >= maxTCPSource || l.s.tcp >= maxTCP {
		l.s.Stats.drop(DropConnections)
		return false
	}
	l.s.tcp++
	l.conns[c] = source
	return true
}

func (l *Listener) drop(c net.Conn) {
	_ = c.Close()
	l.mu.Lock()
	delete(l.conns, c)
	l.mu.Unlock()
	l.s.mu.Lock()
	l.s.tcp--
	l.s.mu.Unlock()
}

// serveConn answers the queries of a connection, in the order in which the answers are
// there (RFC 7766, section 6.2.1.1). One that sends too many is read no faster.
func (l *Listener) serveConn(c net.Conn, from netip.Addr) {
	source := l.source(from)
	var pending sync.WaitGroup
	defer pending.Wait() // who has sent its last query still reads the answers
	room := make(chan struct{}, maxPipelined)
	var writing sync.Mutex
	for {
		b, err := readTCP(c)
		if err != nil {
			return
		}
		a, ok := l.asker(from) // what it sees may have changed
		if !ok {
			return
		}
		req := l.parse(b)
		if req == nil || !l.enter(source) {
			return
		}
		room <- struct{}{}
		pending.Go(func() {
			defer func() { <-room; l.leave(source) }()
			reply, _ := l.s.answer(l.ctx, req, a, true)
			out, err := reply.Pack()
			if err != nil {
				l.s.cfg.Log.Debug("an answer cannot be written", "err", err)
				return
			}
			writing.Lock()
			defer writing.Unlock()
			_ = c.SetWriteDeadline(time.Now().Add(tcpWrite))
			if _, err := c.Write(append(binary.BigEndian.AppendUint16(nil, uint16(len(out))), out...)); err != nil {
				_ = c.Close()
			}
		})
	}
}

var errLong = errors.New("dns: the query is too long")

// readTCP reads one message.
func readTCP(c net.Conn) ([]byte, error) {
	_ = c.SetReadDeadline(time.Now().Add(tcpIdle))
	var length [2]byte
	if _, err := io.ReadFull(c, length[:]); err != nil {
		return nil, err
	}
	n := binary.BigEndian.Uint16(length[:])
	if n > maxQuery {
		return nil, errLong
	}
	b := make([]byte, n)
	_, err := io.ReadFull(c, b)
	return b, err
}

// Addresses returns those of a name of an overlay, for who sees that overlay alone.
func (s *Server) Addresses(ctx context.Context, overlay, name string) []netip.Addr {
	var list []netip.Addr
	for _, of := range []uint16{wire.TypeA, wire.TypeAAAA} {
		req := new(wire.Msg)
		req.SetQuestion(name+"."+overlay+"."+zone, of)
		reply, _ := s.answer(ctx, req, asker{view: View{overlay}}, true)
		for _, rr := range reply.Answer {
			var b net.IP
			switch rr := rr.(type) {
			case *wire.A:
				b = rr.A
			case *wire.AAAA:
				b = rr.AAAA
			}
			if ip, ok := netip.AddrFromSlice(b); ok {
				list = append(list, ip.Unmap())
			}
		}
	}
	return list
}
