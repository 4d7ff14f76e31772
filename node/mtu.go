package node

import (
	"fmt"
	"net"
	"net/netip"

	"github.com/tulle-net/tulle/config"
	"github.com/tulle-net/tulle/underlay"
	"github.com/tulle-net/tulle/vxlan"
)

// What plain VXLAN adds to an inner IP packet, in bytes.
const (
	overheadInner = 14 + vxlan.HeaderLen + 8 // Ethernet, VXLAN, UDP
	overheadIPv4  = overheadInner + 20
	overheadIPv6  = overheadInner + 40
	minMTU        = 68 // RFC 791
	maxMTU        = 65535 - overheadIPv6
)

func overhead(underlayAddr netip.Addr) int {
	if underlayAddr.Is4() {
		return overheadIPv4
	}
	return overheadIPv6
}

// fitMTU returns the MTU that overlay o starts with: the one that it asks for,
// if it fits the underlay, else the largest that does.
func (n *Node) fitMTU(o config.Overlay) (int, error) {
	dev, deviceMTU, err := deviceOf(n.cfg.Advertise)
	if err != nil {
		return 0, err
	}
	fits := n.largestMTU(deviceMTU, o.Peers)
	if o.MTU == 0 {
		return fits, nil
	}
	if o.MTU > fits {
		ip := "20 IPv4"
		if !n.cfg.Advertise.Is4() {
			ip = "40 IPv6"
		}
		return 0, fmt.Errorf("node: overlay %s: mtu %d does not fit the underlay: %d of %s less %d (%s + 8 UDP + 8 VXLAN + 14 Ethernet) leaves %d: give mtu %d or less, or none",
			o.Name, o.MTU, fits+overhead(n.cfg.Advertise), dev, overhead(n.cfg.Advertise), ip, fits, fits)
	}
	return o.MTU, nil
}

// largestMTU returns the largest overlay MTU that fits the underlay's device
// and the route to each VTEP.
func (n *Node) largestMTU(deviceMTU int, vteps []netip.AddrPort) int {
	mtu := deviceMTU - overhead(n.cfg.Advertise)
	for _, a := range vteps {
		if path, err := n.conn.PathMTU(a.Addr()); err == nil {
			mtu = min(mtu, path-overhead(a.Addr()))
		}
	}
	return min(max(mtu, minMTU), maxMTU)
}

// followMTU sets the devices to what the underlay carries now.
func (n *Node) followMTU(flood map[vxlan.VNI][]netip.AddrPort) {
	_, deviceMTU, err := deviceOf(n.cfg.Advertise)
	if err != nil {
		return // the address is gone; it may come back
	}
	for _, o := range n.overlays {
		mtu := n.largestMTU(deviceMTU, append(flood[o.cfg.VNI], o.cfg.Peers...))
		if o.cfg.MTU != 0 && o.cfg.MTU < mtu {
			mtu = o.cfg.MTU
		}
		was := o.dev.MTU()
		if mtu == was {
			continue
		}
		if err := o.dev.SetMTU(mtu); err != nil {
			n.log.Warn("cannot follow the underlay's MTU", "overlay", o.cfg.Name, "err", err)
			continue
		}
		n.log.Info("MTU follows the underlay", "overlay", o.cfg.Name, "mtu", mtu, "was", was)
	}
}

// deviceOf returns name and MTU of the network device that has the address a.
func deviceOf(a netip.Addr) (string, int, error) {
	ifs, err := net.Interfaces()
	if err != nil {
		return "", 0, fmt.Errorf("node: list network devices: %w", err)
	}
	for _, i := range ifs {
		addrs, err := i.Addrs()
		if err != nil {
			continue
		}
		for _, x := range addrs {
			if p, err := netip.ParsePrefix(x.String()); err == nil && p.Addr().Unmap() == a {
				return i.Name, i.MTU, nil
			}
		}
	}
	return "", 0, fmt.Errorf("node: no network device has the address %s: give --advertise one of this host's addresses", a)
}

// advertise returns the address that others reach this node at.
func advertise(cfg config.Config) (netip.Addr, error) {
	if cfg.Advertise.IsValid() {
		return cfg.Advertise, nil
	}
	if a := cfg.Listen.Addr(); a.IsValid() && !a.IsUnspecified() {
		return a, nil
	}
	for _, seed := range cfg.Join {
		host, _, err := net.SplitHostPort(seed)
		if err != nil {
			host = seed
		}
		ips, err := net.LookupIP(host)
		if err != nil {
			continue
		}
		for _, ip := range ips {
			dst, _ := netip.AddrFromSlice(ip)
			if a, err := underlay.SourceFor(dst.Unmap()); err == nil {
				return a, nil
			}
		}
	}
	if a, err := underlay.DefaultSource(); err == nil {
		return a, nil
	}
	return soleAddress()
}

// soleAddress returns the host's only global address, for a host that has
// neither a seed nor a default route.
func soleAddress() (netip.Addr, error) {
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		return netip.Addr{}, fmt.Errorf("node: list addresses: %w", err)
	}
	var v4, v6 []netip.Addr
	for _, x := range addrs {
		p, err := netip.ParsePrefix(x.String())
		if a := p.Addr().Unmap(); err == nil && a.IsGlobalUnicast() {
			if a.Is4() {
				v4 = append(v4, a)
			} else {
				v6 = append(v6, a)
			}
		}
	}
	if len(v4) == 0 {
		v4 = v6
	}
	switch len(v4) {
	case 1:
		return v4[0], nil
	case 0:
		return netip.Addr{}, fmt.Errorf("node: this host has no address that others could reach: configure its network, or give --advertise IP")
	}
	return netip.Addr{}, fmt.Errorf("node: this host has several addresses and no default route: choose with --advertise one of %v", v4)
}
