package dns

import (
	"net/netip"
	"slices"
	"strconv"
	"strings"

	wire "github.com/miekg/dns"
)

const (
	arpa4 = ".in-addr.arpa."
	arpa6 = ".ip6.arpa."
)

// reverse answers for a name of an address; false: it is in no overlay.
func (s *Server) reverse(q wire.Question, name string, a asker) (found, bool) {
	p, ok := prefixOf(name)
	if !ok {
		return found{}, false
	}
	seen, owner := false, ""
	var all []wire.RR
	for _, o := range a.view {
		z := s.cfg.Source.Zone(o)
		if z == nil {
			continue
		}
		i := slices.IndexFunc(z.subnets, func(n netip.Prefix) bool { return n.Contains(p.Addr()) && p.Bits() >= n.Bits() })
		if i < 0 {
			continue
		}
		seen, owner = true, reverseZone(name, z.subnets[i])
		if !p.IsSingleIP() {
			continue
		}
		for _, n := range s.cfg.Source.Reverse(o, p.Addr()) {
			all = append(all, &wire.PTR{Hdr: header(q.Name, wire.TypePTR, ttl), Ptr: n + "." + strings.ToLower(o) + "." + zone})
		}
	}
	switch {
	case len(all) > 0:
		return typed(q, owner, all), true
	case seen && !p.IsSingleIP():
		return found{owner: owner}, true
	case seen || p.IsSingleIP() && s.cfg.Source.Within(p.Addr()):
		// Also of an overlay that the asker does not see: nobody else knows it either.
		if owner == "" {
			owner = reverseZone(name, netip.PrefixFrom(p.Addr(), p.Addr().BitLen()-8))
		}
		return found{rcode: wire.RcodeNameError, owner: owner}, true
	}
	return found{}, false
}

// prefixOf reads a name below in-addr.arpa. or ip6.arpa., as much of the address as it
// has. The name is in lower case.
func prefixOf(name string) (netip.Prefix, bool) {
	digits, is6 := strings.CutSuffix(name, arpa6)
	if !is6 {
		digits = strings.TrimSuffix(name, arpa4)
	}
	labels := strings.Split(digits, ".")
	slices.Reverse(labels)
	if !is6 {
		var b [4]byte
		if len(labels) > len(b) {
			return netip.Prefix{}, false
		}
		for i, l := range labels {
			v, err := strconv.ParseUint(l, 10, 8)
			if err != nil || strconv.FormatUint(v, 10) != l {
				return netip.Prefix{}, false
			}
			b[i] = byte(v)
		}
		return netip.PrefixFrom(netip.AddrFrom4(b), 8*len(labels)), true
	}
	var b [16]byte
	if len(labels) > 2*len(b) {
		return netip.Prefix{}, false
	}
	for i, l := range labels {
		v, err := strconv.ParseUint(l, 16, 8)
		if err != nil || len(l) != 1 {
			return netip.Prefix{}, false
		}
		b[i/2] |= byte(v) << (4 * (1 - i%2))
	}
	return netip.PrefixFrom(netip.AddrFrom16(b), 4*len(labels)), true
}

// reverseZone is the part of a reverse name that stands for all of a subnet, or for so
// much of it as a name can.
func reverseZone(name string, subnet netip.Prefix) string {
	step, suffix := 8, 2
	if subnet.Addr().Is6() {
		step = 4
	}
	labels := wire.SplitDomainName(name)
	keep := suffix + (subnet.Bits()+step-1)/step
	return wire.Fqdn(strings.Join(labels[max(0, len(labels)-keep):], "."))
}
