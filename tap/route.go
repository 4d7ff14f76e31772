package tap

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// HostRoutes returns the single addresses that routes through a device of the caller's
// namespace lead to.
func HostRoutes(device string) ([]netip.Addr, error) {
	h, err := handleIn("")
	if err != nil {
		return nil, fmt.Errorf("tap: %s: routes: %w", device, err)
	}
	defer h.Close()
	dev, err := h.LinkByName(device)
	if err != nil {
		return nil, fmt.Errorf("tap: %s: routes: %w", device, err)
	}
	var out []netip.Addr
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		list, err := h.RouteList(dev, family)
		if err != nil {
			return nil, fmt.Errorf("tap: %s: routes: %w", device, err)
		}
		for _, r := range list {
			if r.Dst == nil {
				continue
			}
			ones, bits := r.Dst.Mask.Size()
			if a, ok := netip.AddrFromSlice(r.Dst.IP); ok && ones == bits {
				out = append(out, a.Unmap())
			}
		}
	}
	return out, nil
}

// SetHostRoutes adds routes to single addresses through a device of the caller's
// namespace, which is up, and removes others; one that is gone already is no error.
func SetHostRoutes(device string, add, remove []netip.Addr) error {
	if len(add)+len(remove) == 0 {
		return nil
	}
	h, err := handleIn("")
	if err != nil {
		return fmt.Errorf("tap: %s: routes: %w", device, err)
	}
	defer h.Close()
	dev, err := h.LinkByName(device)
	if err != nil {
		return fmt.Errorf("tap: %s: routes: %w", device, err)
	}
	to := func(a netip.Addr) *netlink.Route {
		return &netlink.Route{
			LinkIndex: dev.Attrs().Index, Scope: netlink.SCOPE_LINK,
			Dst: &net.IPNet{IP: a.AsSlice(), Mask: net.CIDRMask(a.BitLen(), a.BitLen())},
		}
	}
	var errs []error
	for _, a := range remove {
		if err := h.RouteDel(to(a)); err != nil && !errors.Is(err, unix.ESRCH) {
			errs = append(errs, fmt.Errorf("tap: %s: remove the route to %v: %w", device, a, err))
		}
	}
	for _, a := range add {
		if err := h.RouteAdd(to(a)); errors.Is(err, fs.ErrExist) {
			errs = append(errs, fmt.Errorf("tap: %s: this host has another route to %v", device, a))
		} else if err != nil {
			errs = append(errs, fmt.Errorf("tap: %s: route to %v: %w", device, a, err))
		}
	}
	return errors.Join(errs...)
}
