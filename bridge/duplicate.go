package bridge

import (
	"context"
	"net/netip"
	"slices"
	"time"

	"github.com/tulle-net/tulle/ether"
	"github.com/tulle-net/tulle/tap"
)

// Duplicate is an address of a port's device that another station of the overlay
// says is its own.
type Duplicate struct {
	IP  netip.Addr
	MAC ether.MAC
}

// watch is what the frames to a port are looked at for while its addresses are probed.
type watch struct {
	own   func(ether.MAC) bool
	addrs []netip.Addr
	found chan Duplicate // of one; more are of no interest
}

// Others reports who else is in the overlay and could answer a probe: other devices of
// this node, or whoever is behind its tunnel.
func (p *Port) Others() (here, away bool) {
	return len(*p.bridge.ports.Load()) > 1, len(*p.bridge.flood.Load()) > 0
}

// Probe asks the overlay whose these addresses of the port's device are, by ARP
// probes (RFC 5227, section 2.1.1) and neighbour solicitations for duplicates (RFC
// 4862, section 5.4.2): at once, and other nodes each time that much later. It returns
// the first that is another station's, or false when ctx ends; what the tables know is
// not asked for. Not another station's
// are the MACs that sibling says yes to: of the host's other devices in the overlay,
// by which Linux answers for any address that it has. It must not block. One that has
// our MAC as well is not found: its frames are dropped as our own. One Probe of a port
// runs at a time; it ends with the port.
func (p *Port) Probe(ctx context.Context, addrs []netip.Addr, sibling func(ether.MAC) bool, every time.Duration) (Duplicate, bool) {
	if !p.hold() {
		return Duplicate{}, false
	}
	defer p.done.Done()
	own := p.dev.MAC()
	w := &watch{own: func(m ether.MAC) bool { return m == own || sibling(m) }, addrs: addrs, found: make(chan Duplicate, 1)}
	p.watch.Store(w)
	defer p.watch.CompareAndSwap(w, nil)
	again := time.NewTicker(every)
	defer again.Stop()
	for send := p.broadcast; ; send = p.repeat {
		if d, found := p.known(addrs, w.own); found {
			return d, true
		}
		p.flood(addrs, send, func(a netip.Addr) []byte {
			if a.Is4() {
				return ether.AppendARP(nil, ether.Broadcast, ether.ARPRequest, own, netip.IPv4Unspecified(), 0, a)
			}
			return ether.AppendSolicitation(nil, 0, own, netip.IPv6Unspecified(), a)
		})
		select {
		case d := <-w.found:
			return d, true
		case <-ctx.Done():
			return Duplicate{}, false
		case <-p.gone: // else it would ask for what is another node's by now
			return Duplicate{}, false
		case <-again.C:
		}
	}
}

// known returns the first of the addresses that the tables say is another station's.
func (p *Port) known(addrs []netip.Addr, own func(ether.MAC) bool) (Duplicate, bool) {
	for _, a := range addrs {
		// Its own, at the MAC that it has by now, is no other station's.
		if c, ok := p.bridge.dir.index.Load(a); ok && !own(c.mac) && !(c.local && p.bridge.fdb.lookup(c.mac) == p.at) {
			return Duplicate{a, c.mac}, true
		}
	}
	return Duplicate{}, false
}

// hold has RemovePort wait for p.done, unless the port has ended.
func (p *Port) hold() bool {
	p.bridge.mu.Lock()
	defer p.bridge.mu.Unlock()
	if p.at.gone.Load() {
		return false
	}
	p.done.Add(1)
	return true
}

// Announce tells the overlay that these addresses are the device's (RFC 5227,
// section 2.3; RFC 4861, section 7.2.6): who had them elsewhere sends here. Nobody is
// told what the tables say, when they are complete.
func (p *Port) Announce(addrs []netip.Addr) {
	own := p.dev.MAC()
	said := func(a netip.Addr) bool {
		c, ok := p.bridge.dir.index.Load(a)
		return ok && c.mac == own
	}
	frameOf := func(a netip.Addr) []byte {
		if a.Is4() {
			return ether.AppendARP(nil, ether.Broadcast, ether.ARPRequest, own, a, 0, a)
		}
		return ether.AppendAdvertisement(nil, 0, own, netip.Addr{}, a)
	}
	p.flood(slices.DeleteFunc(slices.Clone(addrs), said), p.broadcast, frameOf)
	if incomplete(*p.bridge.flood.Load()) > 0 {
		p.flood(slices.DeleteFunc(slices.Clone(addrs), func(a netip.Addr) bool { return !said(a) }), p.tell, frameOf)
	}
}

// flood sends a frame for each address, as if the device had.
func (p *Port) flood(addrs []netip.Addr, send func(*lane, *tap.Frame), frameOf func(netip.Addr) []byte) {
	l := p.bridge.tunnel.lanes.Get().(*lane)
	defer p.bridge.tunnel.lanes.Put(l)
	l.now, l.from = p.bridge.tunnel.now(), p
	for _, a := range addrs {
		send(l, &tap.Frame{B: frameOf(a)})
	}
	l.tx.Flush()
}

// broadcast sends a frame to everyone whom it may concern, tell to those whom the
// tables do not tell the same.
func (p *Port) broadcast(l *lane, f *tap.Frame) { p.floodTo(l, f, everyone) }
func (p *Port) tell(l *lane, f *tap.Frame)      { p.floodTo(l, f, untold) }

// repeat sends to other nodes what local ports have got: nothing is lost on the way to
// those, of which there may be hundreds.
func (p *Port) repeat(l *lane, f *tap.Frame) { p.floodTunnel(l, f, everyone) }

func (p *Port) floodTo(l *lane, f *tap.Frame, who reach) {
	if !p.multicast(l, f, who) {
		p.floodFrame(l, f, who)
	}
}

// see looks at a frame to the port. It is borrowed.
func (w *watch) see(frame []byte) {
	ip, mac, ok := claim(frame)
	if ok && slices.Contains(w.addrs, ip) && !w.own(mac) {
		select {
		case w.found <- Duplicate{ip, mac}:
		default:
		}
	}
}

// claim returns the address that a frame says, or asks as one who wants it, to be
// its sender's (RFC 5227, section 2.1.1; RFC 4862, sections 5.4.3 and 5.4.4).
func claim(frame []byte) (netip.Addr, ether.MAC, bool) {
	f, err := ether.ParseEthernet(frame)
	if err != nil {
		return netip.Addr{}, 0, false
	}
	switch f.EtherType() {
	case ether.EtherTypeARP:
		a, err := ether.ParseARP(f.Payload())
		if err != nil {
			return netip.Addr{}, 0, false
		}
		if a.SenderIP().IsUnspecified() {
			return a.TargetIP(), a.SenderMAC(), true
		}
		return a.SenderIP(), a.SenderMAC(), true
	case ether.EtherTypeIPv6:
		ip, err := ether.ParseIPv6(f.Payload())
		if err != nil {
			return netip.Addr{}, 0, false
		}
		n, err := ether.ParseND(ip)
		if err != nil || n.IsSolicitation() && !ip.Src().IsUnspecified() {
			return netip.Addr{}, 0, false
		}
		return n.Target(), f.Src(), true
	}
	return netip.Addr{}, 0, false
}
