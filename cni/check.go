package cni

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/containernetworking/cni/pkg/invoke"
	"github.com/containernetworking/cni/pkg/types"
	current "github.com/containernetworking/cni/pkg/types/100"

	"github.com/tulle-net/tulle/tap"
)

const (
	// settle is how long a device that the node makes again may take.
	settle      = time.Second
	settleRetry = 50 * time.Millisecond
)

// check compares what ADD said, and what the node has, with what there is.
func (p *Plugin) check(ctx context.Context, c *call) (*result, error) {
	before, err := c.conf.previous()
	if err != nil {
		return nil, err
	}
	if before == nil {
		return nil, faultf(types.ErrInvalidNetworkConfig, "CHECK needs what ADD returned, as prevResult")
	}
	if err := c.ipam(ctx, "CHECK", invoke.DelegateCheck); err != nil {
		return nil, err
	}
	for until := time.Now().Add(settle); ; {
		away, err := c.compare(ctx, before)
		if !away || time.Now().After(until) {
			return nil, err
		}
		select {
		case <-time.After(settleRetry):
		case <-ctx.Done():
			return nil, err
		}
	}
}

// compare reports as well whether the device is away, which may be for a moment.
func (c *call) compare(ctx context.Context, before *current.Result) (away bool, err error) {
	list, err := c.node.Endpoints(ctx)
	if err != nil {
		return false, err
	}
	i := slices.IndexFunc(list, func(e Endpoint) bool { return e.Container == c.key() && e.Ifname == c.ifname })
	if i < 0 {
		return false, faultf(types.ErrUnknownContainer, "the node has no endpoint %s of container %s in network %s", c.ifname, c.container, c.conf.Name)
	}
	e := list[i]
	switch {
	case !e.Up:
		return true, faultf(codeAmiss, "the device %s is not there: %s", c.ifname, e.Error)
	case e.PublishError != "":
		return true, faultf(codeAmiss, "ports of this host do not lead to the container: %s", e.PublishError)
	case e.Overlay != c.conf.Overlay:
		return false, faultf(codeAmiss, "the container is attached to overlay %s, and not to %s", e.Overlay, c.conf.Overlay)
	}
	dev, err := tap.Inspect(c.netns, c.ifname)
	if errors.Is(err, tap.ErrNoDevice) {
		return true, faultf(codeAmiss, "%s has no device %s", c.netns, c.ifname)
	}
	if err != nil {
		return false, faultf(types.ErrUnknownContainer, "%v", err)
	}
	if err := c.sameDevice(dev, e, before); err != nil {
		return false, faultf(codeAmiss, "%s in %s: %v", c.ifname, c.netns, err)
	}
	return false, nil
}

// sameDevice compares the device with what ADD returned. What a later plugin of the
// chain has changed is in there too; routes that it took away are its own business.
func (c *call) sameDevice(dev tap.State, e Endpoint, before *current.Result) error {
	at := slices.IndexFunc(before.Interfaces, func(i *current.Interface) bool { return i.Name == c.ifname && i.Sandbox == c.netns })
	if at < 0 {
		return errors.New("prevResult has no such interface")
	}
	said := before.Interfaces[at]
	switch {
	case !dev.Up:
		return errors.New("it is down")
	case said.Mac != "" && !strings.EqualFold(said.Mac, dev.MAC.String()):
		return fmt.Errorf("its MAC is %s, and was %s", dev.MAC, said.Mac)
	case dev.MTU > e.MTU || said.Mtu != 0 && dev.MTU != said.Mtu && dev.MTU != e.MTU:
		// The node follows the underlay. Before 1.1 nobody says that he made it smaller.
		return fmt.Errorf("its MTU is %d, want %d", dev.MTU, e.MTU)
	}
	ours, routes := 0, slices.Clone(e.Routes)
	for _, ip := range before.IPs {
		if ip.Interface == nil || *ip.Interface != at {
			continue
		}
		p, err := prefixOf(ip.Address)
		if err != nil {
			return err
		}
		if !slices.Contains(dev.Addresses, p) {
			return fmt.Errorf("it has not the address %s", p)
		}
		// What ADD said is in there, also where the node has left it out meanwhile.
		if g, ok := netip.AddrFromSlice(ip.Gateway); ok {
			routes = append(routes, Route{Dst: everywhere(g.Unmap()), Via: g.Unmap()})
		}
		ours++
	}
	if ours == 0 {
		return errors.New("prevResult has no address of it")
	}
	for _, r := range before.Routes {
		dst, err := prefixOf(r.Dst)
		if err != nil {
			return err
		}
		via, _ := netip.AddrFromSlice(r.GW)
		want := Route{Dst: dst, Via: via.Unmap()}
		if slices.Contains(routes, want) && !slices.Contains(dev.Routes, tap.Route(want)) {
			return fmt.Errorf("there is no route to %s through it", dst)
		}
	}
	return nil
}
