package discovery

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/memberlist"
)

const (
	// maxStreams and maxStreamsPerPeer bound the incoming streams that are open
	// at once, in all and from one address.
	maxStreams        = 256
	maxStreamsPerPeer = 32
	// firstByteTimeout is how long a peer may take to say what it wants.
	firstByteTimeout = 2 * time.Second
)

// port is the gossip port: memberlist's transport, with a second protocol on
// its TCP side, told apart by a stream's first byte.
type port struct {
	transport
	dial    dialer
	serve   func(net.Conn) // the second protocol; must end by the deadline it sets
	streams chan net.Conn  // for memberlist
	done    chan struct{}  // closed when the listeners are
	dials   context.Context
	hangUp  context.CancelFunc // ends all outgoing streams and dials
	once    sync.Once
	wg      sync.WaitGroup
	refused atomic.Uint64

	// packets are those for memberlist, if the gossip is sealed; nil: all are.
	packets chan *memberlist.Packet
	ready   chan struct{} // closed by begin

	mu      sync.Mutex
	open    map[*stream]struct{} // incoming
	perPeer map[netip.Addr]int
}

var _ memberlist.NodeAwareTransport = (*port)(nil)

// openPort listens as c says, TCP and UDP; of a secure cluster memberlist gets sealed
// gossip only, see sealed.go. It gets nothing before begin.
func openPort(c *Config, serve func(net.Conn)) (*port, error) {
	p := &port{
		dial:    dialHost,
		serve:   serve,
		streams: make(chan net.Conn),
		done:    make(chan struct{}),
		ready:   make(chan struct{}),
		open:    make(map[*stream]struct{}),
		perPeer: make(map[netip.Addr]int),
	}
	var err error
	if c.Network != nil {
		p.dial = dialOver(c.Network)
		p.transport, err = openSimulated(c.Network, c.Listen)
	} else {
		p.transport, err = listenOn(c.Listen, c.Advertise, c.Log)
	}
	if err != nil {
		return nil, err
	}
	p.dials, p.hangUp = context.WithCancel(context.Background())
	if c.Secure != nil {
		p.packets = make(chan *memberlist.Packet) // before accept, which looks at it
		p.wg.Go(p.sift)
	}
	p.wg.Go(p.accept)
	return p, nil
}

// listenOn opens the host's ports.
func listenOn(listen netip.AddrPort, advertise netip.Addr, l *slog.Logger) (*memberlist.NetTransport, error) {
	// Go makes of 0.0.0.0 a socket for both families, and one for IPv4 where
	// IPv6 is off; of :: it makes an error there.
	bind := listen.Addr().String()
	if listen.Addr().IsUnspecified() {
		bind = "0.0.0.0"
		if advertise.Is6() {
			probe, err := net.ListenUDP("udp6", nil)
			if err != nil {
				return nil, fmt.Errorf("discovery: advertise %s: this host has no IPv6: %w", advertise, err)
			}
			_ = probe.Close()
		}
	}
	cfg := &memberlist.NetTransportConfig{BindAddrs: []string{bind}, BindPort: int(listen.Port()), Logger: serfLogger(l)}
	nt, err := memberlist.NewNetTransport(cfg)
	// A port that the kernel chose for TCP may be taken for UDP.
	for try := 0; err != nil && listen.Port() == 0 && try < 10; try++ {
		nt, err = memberlist.NewNetTransport(cfg)
	}
	if err != nil {
		// memberlist keeps the text of the cause only.
		if strings.Contains(err.Error(), "address already in use") {
			return nil, fmt.Errorf("discovery: gossip port %s is in use, perhaps by another tulle, Serf, Consul or Docker Swarm: stop that or choose another with --gossip: %w", listen, err)
		}
		return nil, fmt.Errorf("discovery: listen for gossip on %s: %w", listen, err)
	}
	return nt, nil
}

// begin lets memberlist have what arrives.
func (p *port) begin() { close(p.ready) }

// number returns the UDP and TCP port number.
func (p *port) number() uint16 { return uint16(p.GetAutoBindPort()) }

// accept takes each incoming stream and sorts it without waiting for it.
func (p *port) accept() {
	for {
		select {
		case c := <-p.transport.StreamCh():
			if s := p.admit(c); s != nil {
				p.wg.Go(func() { p.sort(s) })
			} else {
				p.refused.Add(1)
				_ = c.Close()
			}
		case <-p.done:
			return
		}
	}
}

// admit counts c until it is closed, or returns nil if there are too many.
func (p *port) admit(c net.Conn) *stream {
	var from netip.Addr
	if a, ok := c.RemoteAddr().(*net.TCPAddr); ok {
		from = a.AddrPort().Addr().Unmap()
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.open) >= maxStreams || p.perPeer[from] >= maxStreamsPerPeer {
		return nil
	}
	s := &stream{Conn: c, port: p, from: from}
	p.open[s] = struct{}{}
	p.perPeer[from]++
	return s
}

// sort reads the first byte, and serves the stream or hands it to memberlist.
func (p *port) sort(s *stream) {
	var first [1]byte
	_ = s.SetDeadline(time.Now().Add(firstByteTimeout))
	if _, err := io.ReadFull(s.Conn, first[:]); err != nil {
		_ = s.Close()
		return
	}
	if first[0] == exchangeMagic {
		p.serve(s)
		_ = s.Close()
		return
	}
	s.peeked, s.first = true, first[0]
	_ = s.SetDeadline(time.Time{}) // memberlist sets its own
	var c net.Conn = s
	if p.packets != nil {
		c = &sealedConn{Conn: s}
	}
	select {
	case <-p.ready:
	case <-p.done:
	}
	select {
	case p.streams <- c:
	case <-p.done:
		_ = s.Close()
	}
}

// StreamCh gives memberlist the streams that are its own.
func (p *port) StreamCh() <-chan net.Conn { return p.streams }

// DialTimeout is DialAddressTimeout without a name.
func (p *port) DialTimeout(addr string, timeout time.Duration) (net.Conn, error) {
	return p.DialAddressTimeout(memberlist.Address{Addr: addr}, timeout)
}

// DialAddressTimeout opens a stream, which hangUp ends.
func (p *port) DialAddressTimeout(a memberlist.Address, timeout time.Duration) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(p.dials, timeout)
	defer cancel()
	c, err := p.dial(ctx, a.Addr)
	if err != nil {
		return nil, err // as it is: memberlist looks at its type
	}
	out := &outgoing{Conn: c, stop: context.AfterFunc(p.dials, func() { _ = c.Close() })}
	if p.packets != nil {
		return &sealedConn{Conn: out}, nil
	}
	return out, nil
}

// Shutdown closes the sockets and every stream, and waits for all of them.
func (p *port) Shutdown() error {
	p.once.Do(func() {
		// The UDP listener may be waiting for a reader that never was.
		drained := make(chan struct{})
		go func() {
			for {
				select {
				case <-p.transport.PacketCh():
				case <-drained:
					return
				}
			}
		}()
		_ = p.transport.Shutdown()
		close(drained)
		close(p.done)
		p.hangUp()
		p.mu.Lock()
		for s := range p.open {
			_ = s.Conn.Close()
		}
		p.mu.Unlock()
		p.wg.Wait()
	})
	return nil
}

// stream is an incoming stream, with its first byte put back.
type stream struct {
	net.Conn
	port   *port
	from   netip.Addr
	peeked bool
	first  byte
	closed sync.Once
}

func (s *stream) Read(b []byte) (int, error) {
	if s.peeked && len(b) > 0 {
		b[0], s.peeked = s.first, false
		return 1, nil
	}
	return s.Conn.Read(b)
}

func (s *stream) Close() error {
	s.closed.Do(func() {
		p := s.port
		p.mu.Lock()
		delete(p.open, s)
		if p.perPeer[s.from]--; p.perPeer[s.from] == 0 {
			delete(p.perPeer, s.from)
		}
		p.mu.Unlock()
	})
	return s.Conn.Close()
}

// outgoing is a stream that this node opened.
type outgoing struct {
	net.Conn
	stop func() bool
}

func (o *outgoing) Close() error {
	o.stop()
	return o.Conn.Close()
}
