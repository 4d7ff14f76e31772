package discovery

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"time"

	"github.com/hashicorp/memberlist"
)

// Network is what a node's gossip goes over in the place of the host's UDP and TCP,
// as in a simulation (discoverytest.Network). Addresses are *net.UDPAddr and
// *net.TCPAddr.
type Network interface {
	ListenPacket(at netip.AddrPort) (net.PacketConn, error)
	Listen(at netip.AddrPort) (net.Listener, error)
	Dial(ctx context.Context, to netip.AddrPort) (net.Conn, error)
}

// dialer opens a stream.
type dialer func(ctx context.Context, to string) (net.Conn, error)

// dialHost is that of the host's TCP.
func dialHost(ctx context.Context, to string) (net.Conn, error) {
	return new(net.Dialer).DialContext(ctx, "tcp", to)
}

func dialOver(n Network) dialer {
	return func(ctx context.Context, to string) (net.Conn, error) {
		at, err := netip.ParseAddrPort(to)
		if err != nil {
			return nil, err
		}
		return n.Dial(ctx, at)
	}
}

// transport is memberlist's, with the number of its port.
type transport interface {
	memberlist.NodeAwareTransport
	GetAutoBindPort() int
}

var (
	_ transport = (*memberlist.NetTransport)(nil)
	_ transport = (*simulated)(nil)
)

// simulated is memberlist's transport over a Network.
type simulated struct {
	dial     dialer
	packets  net.PacketConn
	listener net.Listener
	packetCh chan *memberlist.Packet
	streamCh chan net.Conn
	done     chan struct{}
	readers  sync.WaitGroup
	number   int
}

func openSimulated(n Network, at netip.AddrPort) (*simulated, error) {
	fail := func(err error) (*simulated, error) {
		return nil, fmt.Errorf("discovery: listen for gossip on %s: %w", at, err)
	}
	packets, err := n.ListenPacket(at)
	if err != nil {
		return fail(err)
	}
	listener, err := n.Listen(at)
	if err != nil {
		_ = packets.Close()
		return fail(err)
	}
	t := &simulated{
		dial: dialOver(n), packets: packets, listener: listener, number: int(at.Port()),
		packetCh: make(chan *memberlist.Packet), streamCh: make(chan net.Conn), done: make(chan struct{}),
	}
	t.readers.Go(t.read)
	t.readers.Go(t.accept)
	return t, nil
}

func (t *simulated) read() {
	b := make([]byte, 2*datagramBytes) // more memberlist does not send
	for {
		n, from, err := t.packets.ReadFrom(b)
		if err != nil {
			return
		}
		p := &memberlist.Packet{Buf: append([]byte(nil), b[:n]...), From: from, Timestamp: time.Now()}
		select {
		case t.packetCh <- p:
		case <-t.done:
			return
		}
	}
}

func (t *simulated) accept() {
	for {
		c, err := t.listener.Accept()
		if err != nil {
			return
		}
		select {
		case t.streamCh <- c:
		case <-t.done:
			_ = c.Close()
			return
		}
	}
}

func (t *simulated) GetAutoBindPort() int { return t.number }

func (t *simulated) FinalAdvertiseAddr(ip string, port int) (net.IP, int, error) {
	a := net.ParseIP(ip)
	if a == nil {
		return nil, 0, errors.New("discovery: no address is advertised")
	}
	if v4 := a.To4(); v4 != nil {
		a = v4
	}
	return a, port, nil
}

func (t *simulated) WriteTo(b []byte, addr string) (time.Time, error) {
	at, err := netip.ParseAddrPort(addr)
	if err != nil {
		return time.Time{}, err
	}
	_, err = t.packets.WriteTo(b, net.UDPAddrFromAddrPort(at))
	return time.Now(), err
}

func (t *simulated) WriteToAddress(b []byte, a memberlist.Address) (time.Time, error) {
	return t.WriteTo(b, a.Addr)
}

func (t *simulated) PacketCh() <-chan *memberlist.Packet { return t.packetCh }
func (t *simulated) StreamCh() <-chan net.Conn           { return t.streamCh }

// port dials by itself; these two are there for the interface.
func (t *simulated) DialTimeout(addr string, timeout time.Duration) (net.Conn, error) {
	return t.DialAddressTimeout(memberlist.Address{Addr: addr}, timeout)
}

func (t *simulated) DialAddressTimeout(a memberlist.Address, timeout time.Duration) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	return t.dial(ctx, a.Addr)
}

func (t *simulated) Shutdown() error {
	close(t.done) // port calls this once
	err := errors.Join(t.packets.Close(), t.listener.Close())
	t.readers.Wait()
	return err
}
