// Package outward is the way out of an overlay by this user's own sockets, and in by published ports, without a right on the host.
//
//	endpoint → bridge → Way (a tap.Device) → netstack ends the connection → a socket of this process → the host's networks
//
// A Way has the addresses and the MAC of an overlay's gateway. What endpoints send to
// it by TCP and UDP ends in a TCP/IP stack (gVisor's), and is sent on by ordinary
// sockets; echo requests are by the kernel's unprivileged ping sockets. So others see
// the host's address, as with masquerading, and an endpoint sees the gateway's as the
// source of what comes in by a published port. It serves the endpoints that it is
// told of, each with its own MAC, and nobody else. It forwards no packet: what is
// neither TCP, UDP nor an echo request goes nowhere.
package outward

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv6"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/udp"

	"github.com/tulle-net/tulle/ether"
	"github.com/tulle-net/tulle/tap"
)

// Limits of one Way.
const (
	// MaxTCP and MaxUDP flows are under way at once; more are refused.
	MaxTCP, MaxUDP = 1024, 1024
	// MaxEchoes requests wait for their answers at once.
	MaxEchoes = 64
	// depth is how many packets wait for the bridge.
	depth = 256
)

// Config of a Way.
type Config struct {
	// Name is what status and logs call it.
	Name string
	MAC  ether.MAC
	// Gateways are its addresses, at most one of a family, each in one of Subnets,
	// which are the overlay's.
	Gateways []netip.Addr
	Subnets  []netip.Prefix
	MTU      int // in bytes, 68 to 65535
	Log      *slog.Logger
}

// Endpoint is whom a Way serves.
type Endpoint struct {
	Addr netip.Addr
	MAC  ether.MAC
}

// Way is one overlay's. It is a tap.Device, whose host is the netstack; its WriteFrame
// copies, and allocates. Its methods are safe for concurrent use.
type Way struct {
	cfg   Config
	stack *stack.Stack
	link  *link
	out   chan packet   // to the bridge
	done  chan struct{} // closed by Close
	once  sync.Once
	held  *packet // what Wait took; of the reader
	mtu   atomic.Int64
	drops [dropCount]atomic.Uint64

	serves  atomic.Pointer[map[netip.Addr]ether.MAC]
	tunnels atomic.Pointer[[]uint16]

	tcp, udp, echoes chan struct{} // a token for each that is under way
	noPing           sync.Once
	ctx              context.Context // of flows
	stop             context.CancelFunc
	running          sync.WaitGroup

	mu    sync.Mutex
	flows map[*flow]struct{}
}

var (
	_ tap.Device = (*Way)(nil)
	_ tap.Queue  = (*Way)(nil)
)

const nic tcpip.NICID = 1

// New makes a Way, which serves nobody yet.
func New(cfg Config) (*Way, error) {
	if !cfg.MAC.IsValid() || len(cfg.Gateways) == 0 || cfg.MTU < 68 || cfg.MTU > 65535 {
		return nil, fmt.Errorf("outward: %s: want a MAC, a gateway's address and an MTU, have %v, %v and %d", cfg.Name, cfg.MAC, cfg.Gateways, cfg.MTU)
	}
	w := &Way{
		cfg: cfg, out: make(chan packet, depth), done: make(chan struct{}), flows: map[*flow]struct{}{},
		tcp: make(chan struct{}, MaxTCP), udp: make(chan struct{}, MaxUDP), echoes: make(chan struct{}, MaxEchoes),
	}
	w.ctx, w.stop = context.WithCancel(context.Background())
	w.mtu.Store(int64(cfg.MTU))
	w.serves.Store(&map[netip.Addr]ether.MAC{})
	w.tunnels.Store(&[]uint16{})
	w.link = &link{way: w}
	w.stack = stack.New(stack.Options{
		NetworkProtocols:   []stack.NetworkProtocolFactory{ipv4.NewProtocol, ipv6.NewProtocol},
		TransportProtocols: []stack.TransportProtocolFactory{tcp.NewProtocol, udp.NewProtocol},
		HandleLocal:        false,
	})
	if err := w.setUp(); err != nil {
		_ = w.Close()
		return nil, fmt.Errorf("outward: %s: %w", cfg.Name, err)
	}
	return w, nil
}

// setUp has the stack take what is for any address, and answer from any.
func (w *Way) setUp() error {
	if err := w.stack.CreateNIC(nic, w.link); err != nil {
		return errors.New(err.String())
	}
	var routes []tcpip.Route
	for _, g := range w.cfg.Gateways {
		proto, zero := ipv4.ProtocolNumber, netip.PrefixFrom(netip.IPv4Unspecified(), 0)
		if g.Is6() {
			proto, zero = ipv6.ProtocolNumber, netip.PrefixFrom(netip.IPv6Unspecified(), 0)
		}
		at := tcpip.ProtocolAddress{Protocol: proto, AddressWithPrefix: tcpip.AddressWithPrefix{Address: addressOf(g), PrefixLen: g.BitLen()}}
		if err := w.stack.AddProtocolAddress(nic, at, stack.AddressProperties{}); err != nil {
			return errors.New(err.String())
		}
		to, err := tcpip.NewSubnet(addressOf(zero.Addr()), tcpip.MaskFromBytes(make([]byte, g.BitLen()/8)))
		if err != nil {
			return err
		}
		routes = append(routes, tcpip.Route{Destination: to, NIC: nic})
	}
	w.stack.SetRouteTable(routes)
	for _, err := range []tcpip.Error{w.stack.SetPromiscuousMode(nic, true), w.stack.SetSpoofing(nic, true), tune(w.stack)} {
		if err != nil {
			return errors.New(err.String())
		}
	}
	w.stack.SetTransportProtocolHandler(tcp.ProtocolNumber, tcp.NewForwarder(w.stack, 0, MaxTCP, w.forwardTCP).HandlePacket)
	w.stack.SetTransportProtocolHandler(udp.ProtocolNumber, udp.NewForwarder(w.stack, w.forwardUDP).HandlePacket)
	return nil
}

// tune has a stack's TCP be as good as a host's. Its RACK is switched off: after a burst
// is lost it sends one segment again a timeout.
func tune(s *stack.Stack) tcpip.Error {
	sack, moderate, rack := tcpip.TCPSACKEnabled(true), tcpip.TCPModerateReceiveBufferOption(true), tcpip.TCPRecovery(0)
	cubic := tcpip.CongestionControlOption("cubic")
	for _, o := range []tcpip.SettableTransportProtocolOption{&sack, &moderate, &rack, &cubic} {
		if err := s.SetTransportProtocolOption(tcp.ProtocolNumber, o); err != nil {
			return err
		}
	}
	return nil
}

func addressOf(a netip.Addr) tcpip.Address { return tcpip.AddrFromSlice(a.AsSlice()) }

func addrPort(a tcpip.Address, port uint16) netip.AddrPort {
	ip, _ := netip.AddrFromSlice(a.AsSlice())
	return netip.AddrPortFrom(ip, port)
}

// Serve says whom the Way serves from now on: flows of others end. To the UDP ports
// tunnels nothing is sent: from this host's address it could be taken for its own VXLAN.
func (w *Way) Serve(list []Endpoint, tunnels []uint16) {
	serves := make(map[netip.Addr]ether.MAC, len(list))
	for _, e := range list {
		serves[e.Addr] = e.MAC
	}
	w.serves.Store(&serves)
	t := slices.Clone(tunnels)
	w.tunnels.Store(&t)
	w.mu.Lock()
	defer w.mu.Unlock()
	for f := range w.flows {
		if _, stays := serves[f.endpoint]; !stays {
			f.end()
		}
	}
}

// isGateway reports whether an address is the Way's own.
func (w *Way) isGateway(a netip.Addr) bool { return slices.Contains(w.cfg.Gateways, a) }

// mayReach reports whether endpoints may send to an address: what the host alone may
// reach, and what is no single host's, they may not.
func (w *Way) mayReach(a netip.Addr) bool {
	a = a.Unmap()
	switch {
	case !a.IsValid(), a.IsUnspecified(), a.IsLoopback(), a.IsMulticast(), a.IsLinkLocalUnicast(), a == netip.AddrFrom4([4]byte{255, 255, 255, 255}):
		return false
	}
	return !slices.ContainsFunc(w.cfg.Subnets, func(s netip.Prefix) bool { return s.Contains(a) })
}

func (w *Way) Name() string        { return w.cfg.Name }
func (w *Way) MAC() ether.MAC      { return w.cfg.MAC }
func (w *Way) MTU() int            { return int(w.mtu.Load()) }
func (w *Way) Queues() []tap.Queue { return []tap.Queue{w} }

// SetMTU changes what new segments fit.
func (w *Way) SetMTU(bytes int) error {
	if bytes < 68 || bytes > 65535 {
		return fmt.Errorf("outward: %s: MTU %d: choose 68 to 65535", w.cfg.Name, bytes)
	}
	w.mtu.Store(int64(bytes))
	return nil
}

// Offloads returns what the Way takes and gives.
func (w *Way) Offloads() tap.Offloads {
	return tap.Offloads{Driver: "outward", Checksum: "on", TSO4: "on", TSO6: "on", USO: "the stack makes single datagrams", GRO: "on"}
}

// SetOffload changes nothing: nobody outside of this process sees its super-frames.
func (w *Way) SetOffload(_, _, _ bool) error { return nil }

// Dropped returns how many packets found no room on their way to endpoints.
func (w *Way) Dropped() uint64 { return w.drops[dropQueue].Load() }

// Close ends all flows and waits for them.
func (w *Way) Close() error {
	w.once.Do(func() {
		close(w.done)
		w.mu.Lock()
		w.stop()
		for f := range w.flows {
			f.end()
		}
		w.mu.Unlock()
		w.stack.Destroy()
		w.running.Wait()
		for {
			p, ok := w.next()
			if !ok {
				return
			}
			p.release()
		}
	})
	return nil
}
