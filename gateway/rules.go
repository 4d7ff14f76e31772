package gateway

import (
	"net/netip"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// The table of a family, as `nft list table` shows it. Exits' devices are in the
// set gateways, the host's other devices in overlays in others; before has those
// that the host had when forwarding was switched on here.
//
//	arriving   prerouting, raw      drop what claims an overlay's address and comes from elsewhere, what
//	                                comes from an overlay and claims another, and what an endpoint
//	                                sends to or from the host's loopback
//	calls_in   prerouting, dstnat   to an address of this host: ports
//	calls_out  output, dstnat       the same for the host's own
//	ports      –                    dnat to endpoints
//	input      input, filter        drop what is for tunnels, or for the host's addresses in other overlays
//	forward    forward, filter      nothing is for tunnels; established passes; into an overlay only what ports has changed;
//	                                out of one what is the overlay's, but not to others
//	output     output, filter       drop ICMP redirects: an endpoint has one gateway
//	leaving    postrouting, srcnat  masquerade; into an overlay only what would be answered past the host
type table struct {
	c                        *nftables.Conn
	t                        *nftables.Table
	v6                       bool
	gateways, others, before *nftables.Set
}

const chainPorts = "ports"

var (
	loopback4 = netip.MustParsePrefix("127.0.0.0/8")
	linkLocal = netip.MustParsePrefix("fe80::/10")
)

// build fills a table that was just made.
func build(c *nftables.Conn, t *nftables.Table, w Want, rec *record) error {
	b := &table{c: c, t: c.AddTable(t), v6: t.Family == nftables.TableFamilyIPv6}
	var gateways []string
	for _, x := range w.Exits {
		gateways = append(gateways, x.Device)
	}
	var before []string
	if b.v6 && rec.IPv6 || !b.v6 && rec.IPv4 {
		before = rec.Devices
	}
	for _, s := range []struct {
		at      **nftables.Set
		name    string
		devices []string
	}{{&b.gateways, "gateways", gateways}, {&b.others, "others", w.Others}, {&b.before, "before", before}} {
		*s.at = &nftables.Set{Table: b.t, Name: s.name, KeyType: nftables.TypeIFName, KeyByteOrder: binaryutil.NativeEndian}
		var all []nftables.SetElement
		for _, d := range s.devices {
			all = append(all, nftables.SetElement{Key: ifname(d)})
		}
		if err := c.AddSet(*s.at, all); err != nil {
			return err
		}
	}
	b.arriving(w)
	b.calls()
	b.ports(w)
	b.input(w)
	b.forward(w, b.v6 && rec.IPv6 || !b.v6 && rec.IPv4)
	b.output()
	b.leaving(w)
	return nil
}

func (b *table) chain(name string, kind nftables.ChainType, hook *nftables.ChainHook, priority *nftables.ChainPriority) *nftables.Chain {
	return b.c.AddChain(&nftables.Chain{Name: name, Table: b.t, Type: kind, Hooknum: hook, Priority: priority})
}

func (b *table) rule(ch *nftables.Chain, parts ...[]expr.Any) {
	r := &nftables.Rule{Table: b.t, Chain: ch}
	for _, p := range parts {
		r.Exprs = append(r.Exprs, p...)
	}
	b.c.AddRule(r)
}

// subnets calls f with each exit's subnet of the table's family.
func (b *table) subnets(w Want, f func(x Exit, s netip.Prefix)) {
	for _, x := range w.Exits {
		for _, s := range x.Subnets {
			if s.Addr().Is6() == b.v6 {
				f(x, s)
			}
		}
	}
}

func (b *table) arriving(w Want) {
	ch := b.chain("arriving", nftables.ChainTypeFilter, nftables.ChainHookPrerouting, nftables.ChainPriorityRaw)
	if !b.v6 {
		// For the sake of published ports at 127.0.0.1 their devices route it.
		b.rule(ch, iifIn(b.gateways), b.source(loopback4, true), drop())
		b.rule(ch, iifIn(b.gateways), b.destination(loopback4, true), drop())
	}
	b.subnets(w, func(x Exit, s netip.Prefix) {
		elsewhere := [][]expr.Any{b.source(s, true), iif(x.Device, false), iif("lo", false)}
		if x.Own != "" {
			elsewhere = append(elsewhere, iif(x.Own, false))
		}
		b.rule(ch, append(elsewhere, drop())...)
	})
	for _, x := range w.Exits {
		if !x.Anycast {
			continue // whatever else is in such an overlay may talk to the host
		}
		from := [][]expr.Any{iif(x.Device, true)}
		for _, s := range x.Subnets {
			if s.Addr().Is6() == b.v6 {
				from = append(from, b.source(s, false))
			}
		}
		if b.v6 {
			from = append(from, b.source(linkLocal, false), b.source(netip.PrefixFrom(netip.IPv6Unspecified(), 128), false))
		}
		b.rule(ch, append(from, drop())...)
	}
}

func (b *table) calls() {
	b.c.AddChain(&nftables.Chain{Name: chainPorts, Table: b.t})
	in := b.chain("calls_in", nftables.ChainTypeNAT, nftables.ChainHookPrerouting, nftables.ChainPriorityNATDest)
	out := b.chain("calls_out", nftables.ChainTypeNAT, nftables.ChainHookOutput, nftables.ChainPriorityNATDest)
	b.rule(in, local(), jump(chainPorts))
	if b.v6 { // the kernel routes no ::1 to a device
		one := netip.PrefixFrom(netip.IPv6Loopback(), 128)
		b.rule(out, b.destination(one, false), local(), jump(chainPorts))
	} else {
		b.rule(out, local(), jump(chainPorts))
	}
}

// ports fills the chain that is there, and empty.
func (b *table) ports(w Want) {
	ch := &nftables.Chain{Name: chainPorts, Table: b.t}
	for _, p := range w.Ports {
		if p.To.Addr().Is6() != b.v6 {
			continue
		}
		var at []expr.Any
		if a := p.Host.Addr(); a.IsValid() {
			at = b.destination(netip.PrefixFrom(a, a.BitLen()), true)
		}
		b.rule(ch, at, protocol(p.Protocol), dport(p.Host.Port()), b.dnat(p.To))
	}
}

func (b *table) input(w Want) {
	ch := b.chain("input", nftables.ChainTypeFilter, nftables.ChainHookInput, nftables.ChainPriorityFilter)
	b.tunnels(ch, w, b.gateways)
	b.tunnels(ch, w, b.others) // Tune lets more in there
	b.subnets(w, func(x Exit, s netip.Prefix) {
		b.rule(ch, iif(x.Device, true), b.destination(s, true), accept())
	})
	b.subnets(w, func(_ Exit, s netip.Prefix) {
		b.rule(ch, iifIn(b.gateways), b.destination(s, true), drop())
	})
}

// forward; ours: the host forwards for the sake of overlays alone.
func (b *table) forward(w Want, ours bool) {
	ch := b.chain("forward", nftables.ChainTypeFilter, nftables.ChainHookForward, nftables.ChainPriorityFilter)
	b.tunnels(ch, w, b.gateways)
	for _, by := range [][]expr.Any{iifIn(b.gateways), oifIn(b.gateways)} {
		b.rule(ch, by, state(expr.CtStateBitINVALID), drop())
		b.rule(ch, by, state(expr.CtStateBitESTABLISHED|expr.CtStateBitRELATED), accept())
	}
	own := map[string]bool{}
	b.subnets(w, func(x Exit, s netip.Prefix) {
		own[x.Device] = true
		b.rule(ch, iif(x.Device, true), b.source(s, false), drop())
	})
	for _, x := range w.Exits {
		if !own[x.Device] { // it has no addresses of this family
			b.rule(ch, iif(x.Device, true), drop())
		}
	}
	b.rule(ch, oifIn(b.gateways), changedByDNAT(), accept())
	b.rule(ch, oifIn(b.gateways), drop())
	b.rule(ch, iifIn(b.gateways), oifIn(b.others), drop())
	b.rule(ch, iifIn(b.gateways), accept())
	if ours {
		b.rule(ch, iifIn(b.others), drop())
		b.rule(ch, oifIn(b.others), drop())
		b.rule(ch, iifIn(b.before), oifIn(b.before), drop())
	}
}

func (b *table) tunnels(ch *nftables.Chain, w Want, from *nftables.Set) {
	for _, p := range w.Tunnels {
		b.rule(ch, iifIn(from), protocol("udp"), dport(p), drop())
	}
}

func (b *table) output() {
	ch := b.chain("output", nftables.ChainTypeFilter, nftables.ChainHookOutput, nftables.ChainPriorityFilter)
	const redirect4, redirect6 = 5, 137 // RFC 792; RFC 4861, section 4.5
	kind, number := byte(unix.IPPROTO_ICMP), byte(redirect4)
	if b.v6 {
		kind, number = unix.IPPROTO_ICMPV6, redirect6
	}
	b.rule(ch, oifIn(b.gateways), l4proto(kind), icmpType(number), drop())
}

func (b *table) leaving(w Want) {
	ch := b.chain("leaving", nftables.ChainTypeNAT, nftables.ChainHookPostrouting, nftables.ChainPriorityNATSource)
	b.subnets(w, func(x Exit, s netip.Prefix) {
		// From one endpoint by the host to another: without the host in between,
		// the answer would come from somebody whom the caller has not asked.
		b.rule(ch, oif(x.Device, true), changedByDNAT(), b.source(s, true), masquerade())
	})
	if !b.v6 {
		b.rule(ch, oifIn(b.gateways), b.source(loopback4, true), masquerade())
	}
	b.rule(ch, oifIn(b.gateways), accept())
	b.rule(ch, oifIn(b.others), accept())
	b.rule(ch, oif("lo", true), accept())
	b.subnets(w, func(_ Exit, s netip.Prefix) {
		b.rule(ch, b.source(s, true), masquerade())
	})
}
