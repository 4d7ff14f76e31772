package cni

import (
	"context"
	"errors"
	"fmt"
	"net/netip"

	"github.com/containernetworking/cni/pkg/invoke"
	"github.com/containernetworking/cni/pkg/types"
	current "github.com/containernetworking/cni/pkg/types/100"
)

// The functions in this file are about a delegated plugin, which chooses addresses in
// Tulle's place (section 4). Tulle leases what it chose all the same, so that nobody
// else in the cluster gets it.

// delegate has another plugin choose, and writes its choice into what is asked for.
func (c *call) delegate(ctx context.Context, a *Attachment) (*current.Result, error) {
	r, err := invoke.DelegateAdd(ctx, c.conf.IPAM.Type, c.conf.raw, nil)
	if err != nil {
		return nil, errors.Join(c.ipamFault("ADD", err), c.ipamDel(ctx))
	}
	out, err := current.NewResultFromResult(r)
	if err == nil {
		err = c.take(a, out)
	}
	if err != nil {
		return nil, errors.Join(faultf(types.ErrInvalidNetworkConfig, "what IPAM plugin %s chose: %v", c.conf.IPAM.Type, err), c.ipamDel(ctx))
	}
	return out, nil
}

// take fills in addresses and routes of an IPAM plugin's result.
func (c *call) take(a *Attachment, r *current.Result) error {
	a.IPs, a.Routes = nil, nil
	if len(r.IPs) == 0 {
		return errors.New("no address")
	}
	via := map[bool]netip.Addr{} // by family: is it IPv4?
	for _, ip := range r.IPs {
		p, err := prefixOf(ip.Address)
		if err != nil {
			return err
		}
		a.IPs = append(a.IPs, p.Addr())
		if g, ok := netip.AddrFromSlice(ip.Gateway); ok {
			via[p.Addr().Is4()] = g.Unmap()
		}
	}
	everywhereElse := false
	for _, rt := range r.Routes {
		dst, err := prefixOf(rt.Dst)
		if err != nil {
			return err
		}
		if rt.MTU != 0 || rt.AdvMSS != 0 || rt.Priority != 0 || rt.Table != nil || rt.Scope != nil {
			return fmt.Errorf("route to %s has an mtu, advmss, priority, table or scope, which is not supported here", dst)
		}
		out := Route{Dst: dst.Masked(), Via: via[dst.Addr().Is4()]}
		if g, ok := netip.AddrFromSlice(rt.GW); ok {
			out.Via = g.Unmap()
		}
		everywhereElse = everywhereElse || dst.Bits() == 0
		a.Routes = append(a.Routes, out)
	}
	if a.DefaultRoute && !everywhereElse {
		for _, g := range via {
			a.Routes = append(a.Routes, Route{Dst: everywhere(g), Via: g})
			everywhereElse = true
		}
	}
	// What the plugin says of a gateway comes before the overlay's own.
	if everywhereElse {
		a.DefaultRoute, a.NoDefaultRoute = false, true
	}
	return nil
}

// ipamDel has the delegated plugin, if there is one, free what it chose.
func (c *call) ipamDel(ctx context.Context) error {
	return c.ipam(ctx, "DEL", invoke.DelegateDel)
}

// ipam passes a call on to the delegated plugin, if there is one.
func (c *call) ipam(ctx context.Context, command string, to func(context.Context, string, []byte, invoke.Exec) error) error {
	if !c.conf.delegated() {
		return nil
	}
	if err := to(ctx, c.conf.IPAM.Type, c.conf.raw, nil); err != nil {
		return c.ipamFault(command, err)
	}
	return nil
}

// ipamFault keeps the code that the delegated plugin gave.
func (c *call) ipamFault(command string, err error) error {
	code := uint(types.ErrInternal)
	if f, ok := errors.AsType[*types.Error](err); ok {
		code = f.Code
	}
	return faultf(code, "IPAM plugin %s, %s: %v", c.conf.IPAM.Type, command, err)
}
