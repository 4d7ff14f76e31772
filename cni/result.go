package cni

import (
	"encoding/json"
	"fmt"
	"net"
	"net/netip"

	"github.com/containernetworking/cni/pkg/types"
	current "github.com/containernetworking/cni/pkg/types/100"
	"github.com/containernetworking/cni/pkg/types/create"
)

// result is what ADD answers, in the newest version.
type result struct{ current.Result }

// as converts it to a version.
func (r *result) as(version string) (any, error) {
	out, err := r.GetAsVersion(version)
	if err != nil {
		return nil, faultf(types.ErrInternal, "the result in version %s: %v", version, err)
	}
	return out, nil
}

// previous returns what the plugin before this one, or ADD, has returned; nil: nothing.
func (c *config) previous() (*current.Result, error) {
	if len(c.PrevResult) == 0 || string(c.PrevResult) == "null" {
		return nil, nil
	}
	// Results of 0.x may leave their version out: it is the configuration's.
	var keys map[string]json.RawMessage
	err := json.Unmarshal(c.PrevResult, &keys)
	if err == nil && keys["cniVersion"] == nil {
		keys["cniVersion"], _ = json.Marshal(c.CNIVersion) // a string always can be
	}
	var out *current.Result
	if err == nil {
		var b []byte
		if b, err = json.Marshal(keys); err == nil {
			var r types.Result
			if r, err = create.Create(c.CNIVersion, b); err == nil {
				out, err = current.NewResultFromResult(r)
			}
		}
	}
	if err != nil {
		return nil, faultf(types.ErrDecodingFailure, "prevResult: %v", err)
	}
	return out, nil
}

// resultOf is what ADD answers: what came before, and the endpoint behind it.
func (c *call) resultOf(e Endpoint, ipam *current.Result) (*result, error) {
	before, err := c.conf.previous()
	if err != nil {
		return nil, err
	}
	out := &result{}
	if before != nil {
		out.Result = *before
	}
	out.CNIVersion = newest
	index := len(out.Interfaces)
	out.Interfaces = append(out.Interfaces, &current.Interface{Name: c.ifname, Mac: e.MAC.String(), Mtu: e.MTU, Sandbox: c.netns})
	for _, p := range e.IPs {
		out.IPs = append(out.IPs, &current.IPConfig{Interface: current.Int(index), Address: *ipNet(p), Gateway: gatewayIn(p, e)})
	}
	for _, g := range e.Gateways {
		out.Routes = append(out.Routes, &types.Route{Dst: *ipNet(everywhere(g)), GW: g.AsSlice()})
	}
	for _, r := range e.Routes {
		if r.Dst.Bits() == 0 {
			continue // its gateway is above
		}
		route := &types.Route{Dst: *ipNet(r.Dst)}
		if r.Via.IsValid() {
			route.GW = r.Via.AsSlice()
		}
		out.Routes = append(out.Routes, route)
	}
	switch {
	case !c.conf.DNS.IsEmpty():
		out.DNS = c.conf.DNS
	case ipam != nil && !ipam.DNS.IsEmpty():
		out.DNS = ipam.DNS
	case e.NameServer.IsValid() && out.DNS.IsEmpty(): // it may be of a plugin before this one
		out.DNS = types.DNS{Nameservers: []string{e.NameServer.String()}, Search: e.Search, Options: []string{"ndots:2"}}
	}
	return out, nil
}

// gatewayIn returns the endpoint's gateway in a subnet, or nil.
func gatewayIn(p netip.Prefix, e Endpoint) net.IP {
	for _, g := range e.Gateways {
		if p.Contains(g) {
			return g.AsSlice()
		}
	}
	return nil
}

// everywhere is the destination of a default route of an address's family.
func everywhere(a netip.Addr) netip.Prefix {
	if a.Is4() {
		return netip.PrefixFrom(netip.IPv4Unspecified(), 0)
	}
	return netip.PrefixFrom(netip.IPv6Unspecified(), 0)
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

// prefixOf is the inverse of ipNet.
func prefixOf(n net.IPNet) (netip.Prefix, error) {
	ip, ok := netip.AddrFromSlice(n.IP)
	bits, total := n.Mask.Size()
	if !ok || total == 0 {
		return netip.Prefix{}, fmt.Errorf("%v is no address with a prefix length", n)
	}
	return netip.PrefixFrom(ip.Unmap(), bits), nil
}
