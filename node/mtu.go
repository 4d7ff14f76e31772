package node

import (
	"fmt"
	"net"
	"net/netip"
	"slices"

	"golang.org/x/sys/unix"

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
	deviceMTU, err := mtuOf(n.dev)
	if err != nil {
		return 0, err
	}
	fits := n.largestMTU(deviceMTU, o.Peers, map[netip.Addr]int{})
	if o.MTU == 0 {
		return fits, nil
	}
	if o.MTU > fits {
		ip := "20 IPv4"
		if !n.cfg.Advertise.Is4() {
			ip = "40 IPv6"
		}
		return 0, fmt.Errorf("node: overlay %s: mtu %d does not fit the underlay: %d of %s less %d (%s + 8 UDP + 8 VXLAN + 14 Ethernet) leaves %d: give mtu %d or less, or none",
			o.Name, o.MTU, fits+overhead(n.cfg.Advertise), n.dev, overhead(n.cfg.Advertise), ip, fits, fits)
	}
	return o.MTU, nil
}

// largestMTU returns the largest overlay MTU that fits the underlay's device
// and the route to each VTEP. paths remembers the routes' MTUs.
func (n *Node) largestMTU(deviceMTU int, vteps []netip.AddrPort, paths map[netip.Addr]int) int {
	mtu := deviceMTU - overhead(n.cfg.Advertise)
	for _, a := range vteps {
		path, known := paths[a.Addr()]
		if !known {
			var err error
			if path, err = n.conn.PathMTU(a.Addr()); err != nil {
				path = maxMTU + overheadIPv6 // no route: nothing is sent either
			}
			paths[a.Addr()] = path
		}
		mtu = min(mtu, path-overhead(a.Addr()))
	}
	return min(max(mtu, minMTU), maxMTU)
}

// followMTU sets the devices to what the underlay carries now. It takes the
// flood lists from the last sync.
func (n *Node) followMTU() {
	deviceMTU, err := mtuOf(n.dev)
	if err != nil { // the address may be on another device now, or come back later
		name, err := deviceOf(n.cfg.Advertise)
		if err != nil {
			return
		}
		n.dev = name
		if deviceMTU, err = mtuOf(name); err != nil {
			return
		}
	}
	paths := map[netip.Addr]int{}
	for _, o := range n.overlays {
		mtu := n.largestMTU(deviceMTU, append(slices.Clone(n.flood[o.cfg.VNI]), o.cfg.Peers...), paths)
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

// mtuOf returns a device's MTU in bytes.
func mtuOf(name string) (int, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, fmt.Errorf("node: socket: %w", err)
	}
	defer unix.Close(fd)
	r, err := unix.NewIfreq(name)
	if err == nil {
		err = unix.IoctlIfreq(fd, unix.SIOCGIFMTU, r)
	}
	if err != nil {
		return 0, fmt.Errorf("node: MTU of %s: %w", name, err)
	}
	return int(r.Uint32()), nil
}

// deviceOf returns the name of the network device that has the address a.
func deviceOf(a netip.Addr) (string, error) {
	ifs, err := net.Interfaces()
	if err != nil {
		return "", fmt.Errorf("node: list network devices: %w", err)
	}
	for _, i := range ifs {
		addrs, err := i.Addrs()
		if err != nil {
			continue
		}
		for _, x := range addrs {
			if p, err := netip.ParsePrefix(x.String()); err == nil && p.Addr().Unmap() == a {
				return i.Name, nil
			}
		}
	}
	return "", fmt.Errorf("node: no network device has the address %s: give --advertise one of this host's addresses", a)
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
