package table

import (
	"net/netip"
	"slices"
	"time"

	"github.com/tulle-net/tulle/ether"
)

// change is one change of an overlay's view; finish tells what came of it. The
// Directory's lock is held from begin to end.
type change struct {
	d    *Directory
	v    *view
	name string
	at   time.Time
	ips  map[netip.Addr]*Entry // who had them before
	macs map[ether.MAC]struct{}
}

func (d *Directory) change(overlay string) *change {
	v := d.views[overlay]
	if v == nil {
		v = &view{
			byIP: map[netip.Addr][]*claim{}, byMAC: map[ether.MAC][]*claim{}, byName: map[string][]*Entry{}, last: map[netip.Addr]uint32{},
			contestedIP: map[netip.Addr]struct{}{}, contestedMAC: map[ether.MAC]struct{}{},
		}
		d.views[overlay] = v
	}
	return &change{d: d, v: v, name: overlay, at: d.cfg.Now(), ips: map[netip.Addr]*Entry{}, macs: map[ether.MAC]struct{}{}}
}

// put has a node hold an entry, in place of that of its key.
func (ch *change) put(h *held, e *Entry) {
	ch.remove(h, e.Key)
	h.records[e.Key] = e
	c := &claim{e, ch.at}
	for _, ip := range e.IPs {
		ch.touch(ip)
		ch.v.byIP[ip] = insert(ch.v.byIP[ip], c)
	}
	ch.macs[e.MAC] = struct{}{}
	ch.v.byMAC[e.MAC] = insert(ch.v.byMAC[e.MAC], c)
	for _, n := range e.names() {
		ch.v.byName[n] = append(ch.v.byName[n], e)
	}
}

// insert keeps claims in order.
func insert(claims []*claim, c *claim) []*claim {
	at, _ := slices.BinarySearchFunc(claims, c, func(a, b *claim) int {
		if a.before(b.Entry) {
			return -1
		}
		return 1
	})
	return slices.Insert(claims, at, c)
}

func (ch *change) remove(h *held, key string) {
	e := h.records[key]
	if e == nil {
		return
	}
	delete(h.records, key)
	for _, ip := range e.IPs {
		ch.touch(ip)
		ch.v.byIP[ip] = without(ch.v.byIP[ip], e)
	}
	ch.macs[e.MAC] = struct{}{}
	ch.v.byMAC[e.MAC] = without(ch.v.byMAC[e.MAC], e)
	for _, n := range e.names() {
		list := slices.DeleteFunc(ch.v.byName[n], func(o *Entry) bool { return o == e })
		if ch.v.byName[n] = list; len(list) == 0 {
			delete(ch.v.byName, n)
		}
	}
}

func without(claims []*claim, e *Entry) []*claim {
	return slices.DeleteFunc(claims, func(c *claim) bool { return c.Entry == e })
}

// touch notes who has an address before the change.
func (ch *change) touch(ip netip.Addr) {
	if _, been := ch.ips[ip]; !been {
		ch.ips[ip] = first(ch.v.byIP[ip])
	}
}

// finish tells who has what now.
func (ch *change) finish() {
	v := ch.v
	for ip, was := range ch.ips {
		claims := v.byIP[ip]
		is := first(claims)
		if is != nil {
			ch.macs[is.MAC] = struct{}{}
		}
		if was != nil {
			ch.macs[was.MAC] = struct{}{} // it may be another one's at the same MAC
		}
		ch.tell(ip, was, is)
		if r := rival(claims); r != nil {
			if _, told := v.contestedIP[ip]; !told {
				v.contestedIP[ip] = struct{}{}
				ch.d.cfg.Event(Event{ch.at, ch.name, Contested, ip, r.MAC, r.Name, r.Node, is.Node, is.MAC})
			}
		} else {
			delete(v.contestedIP, ip)
		}
		if len(claims) == 0 {
			delete(v.byIP, ip)
			if was != nil {
				v.remember(ip, was.Sequence)
			}
		}
	}
	for mac := range ch.macs {
		ch.station(mac)
	}
}

// tell reports what has become of an address.
func (ch *change) tell(ip netip.Addr, was, is *Entry) {
	e := Event{At: ch.at, Overlay: ch.name, IP: ip}
	switch {
	case was == nil && is == nil:
		return
	case was == nil:
		e.What = Appeared
	case is == nil:
		e.What, e.MAC, e.Name, e.Node = Gone, was.MAC, was.Name, was.Node
		ch.d.cfg.Event(e)
		return
	case was.Node == is.Node && was.MAC == is.MAC && was.Name == is.Name:
		return
	default:
		e.What, e.Was, e.WasMAC = Moved, was.Node, was.MAC
	}
	e.MAC, e.Name, e.Node = is.MAC, is.Name, is.Node
	ch.d.cfg.Event(e)
}

// rival returns the first of another node than the one that has it, or nil.
func rival(claims []*claim) *claim {
	for _, c := range claims {
		if c.Node != claims[0].Node {
			return c
		}
	}
	return nil
}

// station tells where a MAC is, and with which addresses.
func (ch *change) station(mac ether.MAC) {
	v, s := ch.v, Station{Overlay: ch.name, MAC: mac}
	claims := v.byMAC[mac]
	delete(v.contestedMAC, mac)
	if rival(claims) != nil {
		v.contestedMAC[mac] = struct{}{}
	}
	if len(claims) == 0 {
		delete(v.byMAC, mac)
	} else {
		s.Node = claims[0].Node
	}
	for _, c := range claims {
		for _, ip := range c.IPs {
			if c.Node == s.Node && first(v.byIP[ip]) == c.Entry {
				s.IPs = append(s.IPs, ip)
			}
		}
	}
	ch.d.cfg.Station(s)
}
