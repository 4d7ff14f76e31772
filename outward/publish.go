package outward

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv6"
)

// Port is a port of the host that this process listens on, and which leads to an endpoint.
type Port struct {
	tcp net.Listener
	udp *net.UDPConn
	to  atomic.Pointer[target]
	run sync.WaitGroup

	mu      sync.Mutex
	clients map[netip.AddrPort]chan []byte // of UDP
}

// target is where a port leads.
type target struct {
	way *Way
	at  netip.AddrPort
}

// clientDepth is how many datagrams of a client wait.
const clientDepth = 64

// ErrPrivileged: the port is for root.
var ErrPrivileged = errors.New("ports below net.ipv4.ip_unprivileged_port_start are for root: take one from 1024 on, or `sudo sysctl -w net.ipv4.ip_unprivileged_port_start=80`")

// Listen takes a port of the host: tcp or udp, at one address, or with an unspecified
// one at all of its family. It leads nowhere yet. Errors wrap ErrPrivileged, EADDRINUSE
// or EADDRNOTAVAIL where it is that.
func Listen(at netip.AddrPort, protocol string) (*Port, error) {
	p := &Port{clients: map[netip.AddrPort]chan []byte{}}
	network := protocol + "4"
	if at.Addr().Is6() {
		network = protocol + "6"
	}
	var err error
	if protocol == "udp" {
		p.udp, err = net.ListenUDP(network, net.UDPAddrFromAddrPort(at))
	} else {
		p.tcp, err = (&net.ListenConfig{}).Listen(context.Background(), network, at.String())
	}
	switch {
	case errors.Is(err, unix.EACCES):
		return nil, fmt.Errorf("outward: %s port %s: %w", protocol, at, ErrPrivileged)
	case err != nil:
		return nil, fmt.Errorf("outward: %s port %s: %w", protocol, at, err)
	}
	if p.udp != nil {
		p.run.Go(p.receive)
	} else {
		p.run.Go(p.accept)
	}
	return p, nil
}

// Lead has the port lead to an endpoint by a Way; nil: nowhere. Connections that it has
// taken stay.
func (p *Port) Lead(w *Way, to netip.AddrPort) {
	if w == nil {
		p.to.Store(nil)
		return
	}
	p.to.Store(&target{w, to})
}

// Close gives the port back. Flows through it are the Way's to end.
func (p *Port) Close() error {
	p.to.Store(nil)
	var err error
	if p.udp != nil {
		err = p.udp.Close()
	} else {
		err = p.tcp.Close()
	}
	p.run.Wait()
	return err
}

// accept takes connections until Close.
func (p *Port) accept() {
	for {
		outside, err := p.tcp.Accept()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil { // no descriptor is left, above all
			time.Sleep(acceptPause)
			continue
		}
		t := p.to.Load()
		if t == nil {
			_ = outside.Close()
			continue
		}
		ctx, over := t.way.begin(t.way.tcp, t.at.Addr())
		if ctx == nil {
			_ = outside.Close()
			continue
		}
		go func() {
			defer over()
			defer outside.Close()
			t.take(ctx, outside.(*net.TCPConn))
		}()
	}
}

// acceptPause is between two tries to accept that failed.
const acceptPause = 50 * time.Millisecond

// take connects a caller with the endpoint.
func (t *target) take(ctx context.Context, outside *net.TCPConn) {
	dialing, cancel := context.WithTimeout(ctx, dialTime)
	defer cancel()
	inside, err := gonet.DialContextTCP(dialing, t.way.stack, t.address(), t.protocol())
	if err != nil {
		t.way.drop(dropFailed)
		_ = outside.SetLinger(0) // a reset, as the endpoint's own would be
		return
	}
	defer inside.Close()
	splice(ctx, inside, outside)
}

func (t *target) address() tcpip.FullAddress {
	return tcpip.FullAddress{NIC: nic, Addr: addressOf(t.at.Addr()), Port: t.at.Port()}
}

func (t *target) protocol() tcpip.NetworkProtocolNumber {
	if t.at.Addr().Is6() {
		return ipv6.ProtocolNumber
	}
	return ipv4.ProtocolNumber
}

// receive takes datagrams until Close; each client's are a flow.
func (p *Port) receive() {
	b := make([]byte, maxDatagram)
	for {
		n, from, err := p.udp.ReadFromUDPAddrPort(b)
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			continue // of a client that is gone (ICMP)
		}
		t := p.to.Load()
		if t == nil {
			continue
		}
		in := p.client(t, from)
		if in == nil {
			continue
		}
		select {
		case in <- append([]byte(nil), b[:n]...):
		default:
			t.way.drop(dropQueue)
		}
	}
}

// client returns where a client's datagrams go; nil: nowhere.
func (p *Port) client(t *target, from netip.AddrPort) chan []byte {
	p.mu.Lock()
	defer p.mu.Unlock()
	if in := p.clients[from]; in != nil {
		return in
	}
	ctx, over := t.way.begin(t.way.udp, t.at.Addr())
	if ctx == nil {
		return nil
	}
	to := t.address()
	inside, err := gonet.DialUDP(t.way.stack, nil, &to, t.protocol())
	if err != nil {
		t.way.drop(dropFailed)
		over()
		return nil
	}
	in := make(chan []byte, clientDepth)
	p.clients[from] = in
	go func() {
		defer over()
		exchange(ctx, inside, &client{port: p, at: from, in: in, done: make(chan struct{})})
	}()
	return in
}

// client is the side of a flow of UDP that has no socket of its own.
type client struct {
	net.Conn // of which exchange needs what is below alone
	port     *Port
	at       netip.AddrPort
	in       chan []byte
	done     chan struct{}
	once     sync.Once
}

func (c *client) Read(b []byte) (int, error) {
	select {
	case d := <-c.in:
		return copy(b, d), nil
	case <-c.done:
		return 0, net.ErrClosed
	}
}

func (c *client) Write(b []byte) (int, error) { return c.port.udp.WriteToUDPAddrPort(b, c.at) }

func (c *client) Close() error {
	c.once.Do(func() {
		close(c.done)
		c.port.mu.Lock()
		delete(c.port.clients, c.at)
		c.port.mu.Unlock()
	})
	return nil
}
