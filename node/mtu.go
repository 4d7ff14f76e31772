package node

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"time"

	"github.com/tulle-net/tulle/config"
	"github.com/tulle-net/tulle/crypto"
	"github.com/tulle-net/tulle/tap"
	"github.com/tulle-net/tulle/underlay"
	"github.com/tulle-net/tulle/vxlan"
)

// What plain VXLAN adds to an inner IP packet, in bytes.
const (
	overheadInner = 14 + vxlan.HeaderLen + 8 // Ethernet, VXLAN, UDP
	overheadIPv4  = overheadInner + 20
	overheadIPv6  = overheadInner + 40
	overheadSeal  = crypto.SealedOverhead
	minMTU        = 68 // RFC 791
	maxMTU        = 65535 - overheadIPv6 - overheadSeal
)

func overhead(underlayAddr netip.Addr, sealed bool) int {
	n := overheadIPv6
	if underlayAddr.Is4() {
		n = overheadIPv4
	}
	if sealed {
		n += overheadSeal
	}
	return n
}

// fitMTU returns the MTU that overlay o starts with: the one that it asks for,
// if it fits the underlay, else the largest that does.
func (n *Node) fitMTU(o config.Overlay) (int, error) {
	sealed := o.Encryption == "required"
	fits := n.largestMTU(n.dev, o.Peers, sealed, map[netip.Addr]int{})
	if o.MTU == 0 {
		return fits, nil
	}
	if o.MTU > fits {
		parts := "20 IPv4 + 8 UDP + 8 VXLAN + 14 Ethernet"
		if !n.addr().Is4() {
			parts = "40 IPv6 + 8 UDP + 8 VXLAN + 14 Ethernet"
		}
		if sealed {
			parts += " + 32 sealing"
		}
		less := overhead(n.addr(), sealed)
		return 0, fmt.Errorf("node: overlay %s: mtu %d does not fit the underlay: %d of %s less %d (%s) leaves %d: give mtu %d or less, or none",
			o.Name, o.MTU, fits+less, n.dev.Name, less, parts, fits, fits)
	}
	return o.MTU, nil
}

// largestMTU returns the largest overlay MTU that fits the underlay's device
// and the route to each VTEP. paths remembers the routes' MTUs.
func (n *Node) largestMTU(dev underlay.Device, vteps []netip.AddrPort, sealed bool, paths map[netip.Addr]int) int {
	mtu := dev.MTU - overhead(n.addr(), sealed)
	for _, a := range vteps {
		path, known := paths[a.Addr()]
		if !known {
			var err error
			if path, err = n.conn.PathMTU(a.Addr()); err != nil {
				path = maxMTU + overheadIPv6 + overheadSeal // no route: nothing is sent either
			}
			paths[a.Addr()] = path
		}
		mtu = min(mtu, path-overhead(a.Addr(), sealed))
	}
	return min(max(mtu, minMTU), maxMTU)
}

// followDevice looks which device holds our address now, and with which MTU.
func (n *Node) followDevice() {
	dev, err := underlay.DeviceOf(n.addr())
	if err != nil {
		return // the address is gone; it may come back
	}
	was := n.dev
	n.dev = dev
	if dev.Index == was.Index {
		return
	}
	n.log.Info("the underlay is another device now", "port", dev.Name, "was", was.Name)
	if err := n.conn.Rebind(); err != nil {
		n.log.Error("cannot use the underlay's new device", "port", dev.Name, "err", err)
	}
}

// followMTU sets the devices to what the underlay carries now. It takes the
// flood lists from the last sync.
func (n *Node) followMTU() {
	paths := map[netip.Addr]int{}
	for _, o := range n.list() {
		if o.live() == nil {
			continue
		}
		mtu := n.largestMTU(n.dev, append(slices.Clone(n.flood[o.cfg.VNI]), o.cfg.Peers...), o.sealed(), paths)
		if o.cfg.MTU != 0 && o.cfg.MTU < mtu {
			mtu = o.cfg.MTU
		}
		for _, d := range o.list() {
			if a := d.live.Load(); a != nil {
				n.setMTU(o, a.dev, mtu)
			}
		}
		if x := o.exit.Load(); x != nil && x.live != nil {
			n.setMTU(o, x.live.dev, mtu)
		}
	}
	// What still does not fit is answered by the bridge.
	for _, vteps := range n.flood {
		for _, a := range vteps {
			if mtu, known := paths[a.Addr()]; known && mtu < n.dev.MTU {
				n.tunnel.SetPathMTU(a.Addr(), mtu)
			} else {
				n.tunnel.SetPathMTU(a.Addr(), 0)
			}
		}
	}
}

// setMTU changes one device's, if it is another.
func (n *Node) setMTU(o *overlay, dev tap.Device, mtu int) {
	was := dev.MTU()
	if mtu == was {
		return
	}
	if err := dev.SetMTU(mtu); err != nil {
		if !errors.Is(err, tap.ErrClosed) { // else it is mended
			n.log.Warn("cannot follow the underlay's MTU", "overlay", o.cfg.Name, "port", dev.Name(), "err", err)
		}
		return
	}
	n.log.Info("MTU follows the underlay", "overlay", o.cfg.Name, "port", dev.Name(), "mtu", mtu, "was", was)
}

// resolveTimeout bounds the resolving of one seed's name at the start.
const resolveTimeout = 3 * time.Second

// advertise returns the address that others reach this node at.
func (n *Node) advertise(ctx context.Context) (netip.Addr, error) {
	cfg := n.cfg
	if cfg.Advertise.IsValid() {
		return cfg.Advertise, nil
	}
	if a := cfg.Listen.Addr(); a.IsValid() && !a.IsUnspecified() {
		return a, nil
	}
	for _, seed := range append(slices.Clone(cfg.Join), n.secure.hosts()...) {
		if a, ok := sourceFor(ctx, seed); ok {
			return a, nil
		}
	}
	if err := ctx.Err(); err != nil {
		return netip.Addr{}, err
	}
	return underlay.DefaultSource()
}

// sourceFor returns the source address of the route to a seed. One that leads
// to ourselves, by a name that /etc/hosts maps to the loopback, tells nothing.
func sourceFor(ctx context.Context, seed string) (netip.Addr, bool) {
	host, _, err := config.ParseHostPort(seed, config.GossipPort)
	if err != nil {
		return netip.Addr{}, false
	}
	ips, err := lookup(ctx, host)
	if err != nil {
		return netip.Addr{}, false
	}
	for _, ip := range ips {
		if a, err := underlay.SourceFor(ip.Unmap()); err == nil && !a.IsLoopback() {
			return a, true
		}
	}
	return netip.Addr{}, false
}

// lookup returns the addresses of a host, which may be one.
func lookup(ctx context.Context, host string) ([]netip.Addr, error) {
	ctx, cancel := context.WithTimeout(ctx, resolveTimeout)
	defer cancel()
	return net.DefaultResolver.LookupNetIP(ctx, "ip", host)
}
