package node

import (
	"cmp"
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/tulle-net/tulle/gateway"
	"github.com/tulle-net/tulle/store"
)

// maxPublish bounds the ports of one endpoint.
const maxPublish = 64

// Publish is a port of the host that leads to an endpoint.
type Publish struct {
	// HostIP is where it is on the host; absent: at each of the host's addresses.
	HostIP   netip.Addr `json:"host_ip,omitzero"`
	HostPort uint16     `json:"host_port"`
	Port     uint16     `json:"port"` // the endpoint's
	// Protocol is tcp or udp.
	Protocol string `json:"protocol"`
}

// String is as it is asked for: [HOSTIP:]HOSTPORT:PORT/PROTOCOL.
func (p Publish) String() string {
	s := fmt.Sprintf("%d:%d/%s", p.HostPort, p.Port, p.Protocol)
	if p.HostIP.IsValid() {
		s = netip.AddrPortFrom(p.HostIP, p.HostPort).String() + fmt.Sprintf(":%d/%s", p.Port, p.Protocol)
	}
	return s
}

// clashes reports whether two would have one port of the host.
func (p Publish) clashes(o Publish) bool {
	same := p.HostIP == o.HostIP || !p.HostIP.IsValid() || !o.HostIP.IsValid() ||
		p.HostIP.IsUnspecified() && p.HostIP.BitLen() == o.HostIP.BitLen() || o.HostIP.IsUnspecified() && p.HostIP.BitLen() == o.HostIP.BitLen()
	return p.HostPort == o.HostPort && p.Protocol == o.Protocol && same
}

// mayPublish checks what an endpoint asks for before anything is made.
func mayPublish(def *store.Overlay, e *endpoint) error {
	if len(e.Publish) > maxPublish {
		return bad{fmt.Errorf("%d published ports: an endpoint has %d at most", len(e.Publish), maxPublish)}
	}
	for i := range e.Publish {
		p := &e.Publish[i]
		p.HostIP = p.HostIP.Unmap()
		p.Protocol = cmp.Or(p.Protocol, "tcp")
		switch {
		case p.HostPort == 0 || p.Port == 0:
			return bad{fmt.Errorf("publish %s: want ports from 1 to 65535", p)}
		case p.Protocol != "tcp" && p.Protocol != "udp":
			return bad{fmt.Errorf("publish %d:%d/%.20q: want the protocol tcp or udp", p.HostPort, p.Port, p.Protocol)}
		case p.HostIP.IsMulticast() || p.HostIP.Zone() != "" || p.HostIP == netip.IPv6Loopback():
			return bad{fmt.Errorf("publish %s: want an address of this host without a zone, and not ::1, which the kernel sends nowhere else: 127.0.0.1 works", p)}
		case slices.ContainsFunc(e.Publish[:i], p.clashes):
			return bad{fmt.Errorf("publish %s: that port of the host is asked for twice", p)}
		}
	}
	switch {
	case len(e.Publish) == 0:
		return nil
	case !def.Gateway:
		return bad{fmt.Errorf("publish %s: overlay %s has no gateway through which an endpoint could answer: `tulle overlay set %s --gateway true` gives it one", e.Publish[0], def.Name, def.Name)}
	case !e.answers(true) && !e.answers(false) || slices.ContainsFunc(e.Routes, func(r Route) bool { return r.everywhere() && !slices.Contains(def.Gateways, r.Via) }):
		return bad{fmt.Errorf("publish %s: the endpoint answers through its default route, which has to lead to the overlay's gateway: do not ask for an endpoint without one, or with another", e.Publish[0])}
	}
	return nil
}

// answers reports whether an endpoint that may publish has a default route of a
// family, by which it answers.
func (e *endpoint) answers(v4 bool) bool {
	return e.DefaultRoute || slices.ContainsFunc(e.Routes, func(r Route) bool { return r.everywhere() && r.Via.Is4() == v4 })
}

// targets returns which addresses of the endpoint a published port leads to, and
// where it is on the host: one a family.
func (p Publish) targets(e *endpoint) (list []gateway.Port) {
	for _, ip := range e.IPs {
		host := p.HostIP
		if host.IsUnspecified() && host.BitLen() == ip.Addr().BitLen() {
			host = netip.Addr{}
		} else if host.IsValid() && host.BitLen() != ip.Addr().BitLen() {
			continue
		}
		if !e.answers(ip.Addr().Is4()) {
			continue
		}
		list = append(list, gateway.Port{Host: netip.AddrPortFrom(host, p.HostPort), Protocol: p.Protocol, To: netip.AddrPortFrom(ip.Addr(), p.Port)})
	}
	return list
}

// ports are those of the host that lead to an overlay's endpoints.
func (o *overlay) ports() (list []gateway.Port) {
	for _, d := range o.list() {
		if d.of == nil || d.live.Load() == nil || !d.of.reserved {
			continue
		}
		for _, p := range d.of.Publish {
			list = append(list, p.targets(d.of)...)
		}
	}
	return list
}

// reserve takes an endpoint's ports of the host, all or none, unless it has them.
// Called by New and Run's goroutine.
func (n *Node) reserve(e *endpoint) error {
	if len(e.Publish) == 0 || e.reserved {
		return nil
	}
	var files []held
	fail := func(err error) error {
		for _, f := range files {
			_ = f.Close()
		}
		return err
	}
	count := len(e.Publish)
	for o := range n.ports {
		count += len(o.Publish)
		for _, p := range e.Publish {
			if i := slices.IndexFunc(o.Publish, p.clashes); i >= 0 {
				return tellf(errExists, "publish %s: %s has published %s on this host already: take another port", p, o, o.Publish[i])
			}
		}
	}
	if 2*count > gateway.MaxPorts { // of two families
		return tellf(errExists, "publish %s: %d ports of this host are published, and no more can be", e.Publish[0], count-len(e.Publish))
	}
	for _, p := range e.Publish {
		targets := p.targets(e)
		if len(targets) == 0 {
			return fail(bad{fmt.Errorf("publish %s: the endpoint has %s, of which none is of that family and has a default route", p, joinPrefixes(e.IPs))})
		}
		for _, t := range targets {
			at := t.Host
			if !at.Addr().IsValid() {
				at = netip.AddrPortFrom(unspecified(t.To.Addr()), at.Port())
			}
			f, err := n.hold(at, p.Protocol)
			switch {
			case errors.Is(err, gateway.ErrPortTaken):
				return fail(tellf(errExists, "publish %s: a program on this host has the port (`ss -lnp` shows which): end it, or take another port", p))
			case errors.Is(err, gateway.ErrNoAddress):
				return fail(bad{fmt.Errorf("publish %s: %s is no address of this host (`ip addr` shows them)", p, p.HostIP)})
			case err != nil:
				return fail(err)
			}
			files = append(files, held{f, t.To})
		}
	}
	if n.ports == nil {
		n.ports = map[*endpoint][]held{}
	}
	n.ports[e] = files
	e.reserved = true
	return nil
}

func unspecified(of netip.Addr) netip.Addr {
	if of.Is4() {
		return netip.IPv4Unspecified()
	}
	return netip.IPv6Unspecified()
}

// unreserve gives an endpoint's ports of the host back.
func (n *Node) unreserve(e *endpoint) {
	for _, f := range n.ports[e] {
		_ = f.Close()
	}
	delete(n.ports, e)
	e.reserved = false
}

// setPublishFault notes why ports of the host do not lead to an endpoint; nil: they do.
func (h *endpoints) setPublishFault(e *endpoint, err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	text := ""
	if err != nil {
		text = oneLine(err)
	}
	if text != e.publishFault && text != "" {
		h.n.log.Error("ports of this host do not lead to "+e.String()+": "+text, "overlay", e.Overlay)
	}
	e.publishFault = text
}

// publish reserves an endpoint's ports. Of one that is known an error is noted, and
// its device is made all the same: the ports are tried again by follow.
func (n *Node) publish(e *endpoint) error {
	if e.host() || len(e.Publish) == 0 {
		return nil
	}
	err := n.reserve(e)
	if n.endpoints.at(e.place()) != e {
		return err
	}
	if err == nil && e.publishFault != "" {
		n.followGateways() // they lead to it before it is said that they do
	}
	n.endpoints.setPublishFault(e, err)
	return nil
}

// unpublish gives the ports of a new endpoint back.
func (n *Node) unpublish(e *endpoint) {
	if !e.host() && n.endpoints.at(e.place()) != e {
		n.unreserve(e)
	}
}

// published takes back a new endpoint whose ports do not lead to it, because the
// overlay's exit cannot be made; a known one waits for it.
func (n *Node) published(e *endpoint) error {
	if e.host() || len(e.Publish) == 0 {
		return nil
	}
	err := n.exitFault(e.Overlay)
	if err == nil || n.endpoints.at(e.place()) == e {
		return nil
	}
	return errors.Join(fmt.Errorf("publish %s: %w", e.Publish[0], err), n.leaveShared(e))
}
