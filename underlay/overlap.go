package underlay

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"os"
	"syscall"
)

// Overlap returns a route of this host's main tables, no default route, whose
// destination overlaps p and that does not lead to one of the devices own, and
// the name of its device; the zero Prefix: there is none.
func Overlap(p netip.Prefix, own ...string) (netip.Prefix, string, error) {
	family := syscall.AF_INET
	if p.Addr().Is6() {
		family = syscall.AF_INET6
	}
	rib, err := syscall.NetlinkRIB(syscall.RTM_GETROUTE, family)
	if err != nil {
		return netip.Prefix{}, "", fmt.Errorf("underlay: list routes: %w", os.NewSyscallError("RTM_GETROUTE", err))
	}
	msgs, err := syscall.ParseNetlinkMessage(rib)
	if err != nil {
		return netip.Prefix{}, "", fmt.Errorf("underlay: list routes: %w", os.NewSyscallError("RTM_GETROUTE", err))
	}
	for i := range msgs {
		to, index, ok := routeOf(&msgs[i])
		if !ok || !to.Overlaps(p) {
			continue
		}
		name := ""
		if d, err := deviceAt(index); err == nil {
			name = d.Name
		}
		mine := false
		for _, o := range own {
			mine = mine || o == name
		}
		if !mine {
			return to, name, nil
		}
	}
	return netip.Prefix{}, "", nil
}

// routeOf reads a unicast route of the main table that is no default route.
func routeOf(m *syscall.NetlinkMessage) (to netip.Prefix, index int, ok bool) {
	// struct rtmsg: family, length of the destination, …, table (4), protocol, scope, type (7)
	if m.Header.Type != syscall.RTM_NEWROUTE || len(m.Data) < syscall.SizeofRtMsg {
		return netip.Prefix{}, 0, false
	}
	bits, table, kind := int(m.Data[1]), m.Data[4], m.Data[7]
	if bits == 0 || table != syscall.RT_TABLE_MAIN || kind != syscall.RTN_UNICAST {
		return netip.Prefix{}, 0, false
	}
	attrs, err := syscall.ParseNetlinkRouteAttr(m)
	if err != nil {
		return netip.Prefix{}, 0, false
	}
	for _, a := range attrs {
		switch a.Attr.Type {
		case syscall.RTA_DST:
			if addr, is := netip.AddrFromSlice(a.Value); is {
				to = netip.PrefixFrom(addr, bits)
			}
		case syscall.RTA_OIF:
			if len(a.Value) == 4 {
				index = int(binary.NativeEndian.Uint32(a.Value))
			}
		}
	}
	return to, index, to.IsValid() && index != 0 && !to.Addr().IsLinkLocalUnicast()
}
