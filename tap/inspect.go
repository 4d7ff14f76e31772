package tap

import (
	"errors"
	"fmt"
	"net/netip"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/tulle-net/tulle/ether"
)

// State is what a device is at the moment, whoever made it.
type State struct {
	MAC       ether.MAC
	MTU       int
	Up        bool
	Addresses []netip.Prefix
	Routes    []Route // through the device; a default route has a Dst of length 0
}

// ErrNoDevice: the namespace has no device of that name.
var ErrNoDevice = errors.New("there is no such device")

// Inspect looks at a device in the network namespace at a path, or here if that is
// empty. The error is ErrNoDevice, or what opening the namespace ended with.
func Inspect(netns, name string) (State, error) {
	s, err := inspect(netns, name)
	if err != nil {
		return State{}, fmt.Errorf("tap: inspect %s: %w", printable(name), err)
	}
	return s, nil
}

func inspect(netns, name string) (s State, err error) {
	h, err := handleIn(netns)
	if err != nil {
		return s, err
	}
	defer h.Close()
	dev, err := h.LinkByName(name)
	switch {
	case errors.As(err, new(netlink.LinkNotFoundError)):
		return s, ErrNoDevice
	case err != nil:
		return s, err
	}
	a := dev.Attrs()
	s.MTU, s.Up = a.MTU, a.RawFlags&unix.IFF_UP != 0
	if len(a.HardwareAddr) == 6 {
		s.MAC = ether.MACFrom(a.HardwareAddr)
	}
	addresses, err := h.AddrList(dev, netlink.FAMILY_ALL)
	if err != nil {
		return s, fmt.Errorf("addresses: %w", err)
	}
	for _, a := range addresses {
		ip, ok := netip.AddrFromSlice(a.IP)
		if bits, _ := a.Mask.Size(); ok {
			s.Addresses = append(s.Addresses, netip.PrefixFrom(ip.Unmap(), bits))
		}
	}
	routes, err := h.RouteList(dev, netlink.FAMILY_ALL)
	if err != nil {
		return s, fmt.Errorf("routes: %w", err)
	}
	for _, r := range routes {
		via, _ := netip.AddrFromSlice(r.Gw)
		out := Route{Via: via.Unmap()}
		switch {
		case r.Dst != nil:
			ip, ok := netip.AddrFromSlice(r.Dst.IP)
			bits, _ := r.Dst.Mask.Size()
			if !ok {
				continue
			}
			out.Dst = netip.PrefixFrom(ip.Unmap(), bits)
		case r.Family == netlink.FAMILY_V6:
			out.Dst = netip.PrefixFrom(netip.IPv6Unspecified(), 0)
		default:
			out.Dst = netip.PrefixFrom(netip.IPv4Unspecified(), 0)
		}
		s.Routes = append(s.Routes, out)
	}
	return s, nil
}
