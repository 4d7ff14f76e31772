package node

import (
	"errors"
	"fmt"
	"io"
	"net/netip"

	"golang.org/x/sys/unix"

	"github.com/tulle-net/tulle/gateway"
	"github.com/tulle-net/tulle/outward"
)

// The functions in this file give overlays with a gateway theirs on a rootless node,
// where a TCP/IP stack and this user's sockets stand for the host's device and
// nftables. They are called by New and Run's goroutine.

// held is a port of the host that leads to an endpoint, once the gateway is there.
type held struct {
	io.Closer
	to netip.AddrPort
}

// hold takes a port of the host.
func (n *Node) hold(at netip.AddrPort, protocol string) (io.Closer, error) {
	if !n.cfg.Rootless {
		return gateway.Reserve(at, protocol)
	}
	p, err := outward.Listen(at, protocol)
	switch {
	case err == nil:
		return p, nil
	case errors.Is(err, unix.EADDRINUSE):
		return nil, gateway.ErrPortTaken
	case errors.Is(err, unix.EADDRNOTAVAIL):
		return nil, gateway.ErrNoAddress
	case errors.Is(err, outward.ErrPrivileged):
		return nil, bad{fmt.Errorf("publish port %d: %w", at.Port(), outward.ErrPrivileged)}
	}
	return nil, err
}

// followOutward brings the ways out, and the ports that lead in, in step with the
// overlays and endpoints of now.
func (n *Node) followOutward() {
	tunnels := n.tunnelPorts()
	for _, ov := range n.list() {
		name, wants := ov.wantsExit()
		if !wants {
			n.lead(ov, nil)
			n.closeExit(ov)
			continue
		}
		x := ov.exit.Load()
		if x == nil || x.live == nil {
			a, err := n.openWay(ov, name)
			if err != nil {
				n.failExit(ov, name, err)
				continue
			}
			n.log.Info("this node is the gateway of its endpoints, by this user's sockets", "overlay", ov.cfg.Name, "port", name, "mac", a.dev.MAC())
			x = &exit{device: name, live: a}
			ov.exit.Store(x)
		}
		way, is := x.live.dev.(*outward.Way)
		if !is {
			continue // which cannot be: openWay makes no other
		}
		var list []outward.Endpoint
		for _, d := range ov.list() {
			a := d.live.Load()
			if d.own() || a == nil {
				continue
			}
			for _, p := range d.cfg.Addresses {
				list = append(list, outward.Endpoint{Addr: p.Addr(), MAC: a.dev.MAC()})
			}
		}
		way.Serve(list, tunnels)
		n.lead(ov, way)
	}
}

// lead has the ports of an overlay's endpoints lead to them by a way; nil: nowhere.
func (n *Node) lead(ov *overlay, way *outward.Way) {
	for _, d := range ov.list() {
		for _, h := range n.ports[d.of] {
			if p, is := h.Closer.(*outward.Port); is {
				p.Lead(way, h.to)
			}
		}
	}
}

// openWay makes an overlay's way out.
func (n *Node) openWay(ov *overlay, name string) (*attachment, error) {
	mtu, err := n.fitMTU(ov.cfg)
	if err != nil {
		return nil, err
	}
	way, err := outward.New(outward.Config{
		Name: name, MAC: gatewayMAC(ov.shared), Gateways: ov.shared.Gateways, Subnets: ov.subnets(), MTU: mtu, Log: n.log,
	})
	if err != nil {
		return nil, err
	}
	port, err := ov.br.AddLocalPort(way)
	if err != nil {
		return nil, errors.Join(err, way.Close())
	}
	return &attachment{way, port}, nil
}
