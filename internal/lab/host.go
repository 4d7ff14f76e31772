package lab

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Host is a network namespace that plays a machine. Its methods are safe for
// concurrent use, as long as no two configure the same device.
type Host struct {
	lab  *Lab
	name string
	path string
	ns   int // locked, see makeNamespace
	nl   *netlink.Handle
}

func newHost(l *Lab, name string, enter func() error) (*Host, error) {
	h := &Host{lab: l, name: name}
	var err error
	if h.path, h.ns, err = makeNamespace(l.name+"-"+name, l.home, enter); err != nil {
		return nil, err
	}
	err = h.Do(func() (err error) {
		h.nl, err = netlink.NewHandle(unix.NETLINK_ROUTE)
		return err
	})
	if err == nil {
		err = h.SetUp("lo", true)
	}
	if err == nil {
		// A second of duplicate address detection per address is of no use here.
		// Both are needed: the kernel takes the larger.
		err = errors.Join(h.sysctlIfThere("net/ipv6/conf/all/accept_dad", "0"),
			h.sysctlIfThere("net/ipv6/conf/default/accept_dad", "0"))
	}
	if err != nil {
		return nil, errors.Join(err, h.remove())
	}
	return h, nil
}

// remove ends what is left inside and deletes the namespace.
func (h *Host) remove() error {
	if h.nl != nil {
		h.nl.Close() // its sockets keep the namespace alive
	}
	err := errors.Join(killInside(h.ns), unmountNamespace(h.path), unix.Close(h.ns))
	// What `ip netns exec` mounts inside may have been made by who did not live to remove it.
	return errors.Join(err, os.RemoveAll(filepath.Join("/etc/netns", filepath.Base(h.path))))
}

// Name is the host's name within the lab.
func (h *Host) Name() string { return h.name }

// Path is the namespace's file: `nsenter --net=PATH` enters the host, and so
// does `ip netns exec` with its base name.
func (h *Host) Path() string { return h.path }

// Do runs fn on a thread that is inside the host's namespace. Sockets that fn
// opens belong to the host for good; goroutines that fn starts are outside.
// fn may call a test's FailNow.
func (h *Host) Do(fn func() error) error {
	var err error
	onThread(h.lab.home, func() {
		if err = unix.Setns(h.ns, unix.CLONE_NEWNET); err != nil {
			err = fmt.Errorf("lab: enter %s: %w", h.name, err)
			return
		}
		err = fn()
	})
	return err
}

// Sysctl writes a setting, its name with slashes: net/ipv4/ip_forward.
func (h *Host) Sysctl(name, value string) error {
	err := h.Do(func() error { return os.WriteFile(filepath.Join("/proc/sys", name), []byte(value), 0) })
	if err != nil {
		return fmt.Errorf("lab: %s: sysctl: %w", h.name, err)
	}
	return nil
}

func (h *Host) sysctlIfThere(name, value string) error {
	if err := h.Sysctl(name, value); !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil // a kernel without IPv6
}

func (h *Host) link(dev string) (netlink.Link, error) {
	link, err := h.nl.LinkByName(dev)
	if err != nil {
		return nil, fmt.Errorf("lab: %s: device %s: %w", h.name, dev, err)
	}
	return link, nil
}

// change applies fn to a device and names both in the error.
func (h *Host) change(dev, what string, fn func(netlink.Link) error) error {
	link, err := h.link(dev)
	if err != nil {
		return err
	}
	if err := fn(link); err != nil {
		return fmt.Errorf("lab: %s: %s: %s: %w", h.name, dev, what, err)
	}
	return nil
}

// Link describes a device.
type Link struct {
	Name string
	MTU  int
	MAC  string // aa:bb:cc:dd:ee:ff
	Up   bool   // set up by the administrator
	// Carrier says whether the cable is in at the other end, too.
	Carrier bool
	Kind    string // veth, tun, vxlan, …
	Addrs   []netip.Prefix
}

// Link returns a device, and false when there is none of that name.
func (h *Host) Link(dev string) (Link, bool, error) {
	link, err := h.link(dev)
	if errors.As(err, &netlink.LinkNotFoundError{}) {
		return Link{}, false, nil
	}
	if err != nil {
		return Link{}, false, err
	}
	a := link.Attrs()
	out := Link{Name: a.Name, MTU: a.MTU, MAC: a.HardwareAddr.String(), Kind: link.Type(),
		Up: a.RawFlags&unix.IFF_UP != 0, Carrier: a.RawFlags&unix.IFF_LOWER_UP != 0}
	addrs, err := h.nl.AddrList(link, netlink.FAMILY_ALL)
	if err != nil {
		return Link{}, false, fmt.Errorf("lab: %s: %s: addresses: %w", h.name, dev, err)
	}
	for _, a := range addrs {
		if p, ok := prefixOf(a.IPNet); ok {
			out.Addrs = append(out.Addrs, p)
		}
	}
	return out, true, nil
}

// SetUp brings a device up or down. Down takes its IPv6 addresses with it;
// to pull a cable, see Switch.Cut.
func (h *Host) SetUp(dev string, up bool) error {
	if up {
		return h.change(dev, "up", h.nl.LinkSetUp)
	}
	return h.change(dev, "down", h.nl.LinkSetDown)
}

// SetMTU in bytes.
func (h *Host) SetMTU(dev string, mtu int) error {
	return h.change(dev, "set MTU", func(l netlink.Link) error { return h.nl.LinkSetMTU(l, mtu) })
}

// AddAddr adds an address with its prefix length; it can be used at once.
func (h *Host) AddAddr(dev string, p netip.Prefix) error {
	return h.change(dev, "add "+p.String(), func(l netlink.Link) error {
		a := &netlink.Addr{IPNet: ipNet(p)}
		if p.Addr().Is6() {
			a.Flags = unix.IFA_F_NODAD
		}
		return h.nl.AddrAdd(l, a)
	})
}

// DelAddr removes an address.
func (h *Host) DelAddr(dev string, p netip.Prefix) error {
	return h.change(dev, "remove "+p.String(), func(l netlink.Link) error {
		return h.nl.AddrDel(l, &netlink.Addr{IPNet: ipNet(p)})
	})
}

// AddRoute sends a network through a gateway.
func (h *Host) AddRoute(to netip.Prefix, via netip.Addr) error {
	err := h.nl.RouteAdd(&netlink.Route{Dst: ipNet(to), Gw: via.AsSlice()})
	if err != nil {
		return fmt.Errorf("lab: %s: route %s via %s: %w", h.name, to, via, err)
	}
	return nil
}

// SetCongestionControl has TCP connections with an address begin with that algorithm.
// One that is chosen when a connection stands already, by setsockopt, has what the host's
// default leaves behind: BBR goes on pacing under any other.
func (h *Host) SetCongestionControl(addr netip.Addr, name string) error {
	to := net.IP(addr.AsSlice())
	found, err := h.nl.RouteGet(to)
	if err == nil && len(found) == 0 {
		err = unix.ENETUNREACH
	}
	if err == nil {
		r := netlink.Route{LinkIndex: found[0].LinkIndex, Gw: found[0].Gw, Src: found[0].Src, Congctl: name}
		r.Dst = &net.IPNet{IP: to, Mask: net.CIDRMask(addr.BitLen(), addr.BitLen())}
		if r.Gw == nil {
			r.Scope = netlink.SCOPE_LINK
		}
		err = h.nl.RouteReplace(&r)
	}
	if err != nil {
		return fmt.Errorf("lab: congestion control %s to %s: %w", name, addr, err)
	}
	return nil
}

// Neighbour returns the MAC that the host has resolved an address to by ARP or
// ND, empty when it has not.
func (h *Host) Neighbour(dev string, addr netip.Addr) (string, error) {
	link, err := h.link(dev)
	if err != nil {
		return "", err
	}
	list, err := h.nl.NeighList(link.Attrs().Index, netlink.FAMILY_ALL)
	if err != nil {
		return "", fmt.Errorf("lab: %s: neighbours: %w", h.name, err)
	}
	const useless = netlink.NUD_INCOMPLETE | netlink.NUD_FAILED
	for _, n := range list {
		if a, ok := netip.AddrFromSlice(n.IP); ok && a.Unmap() == addr && n.State&useless == 0 {
			return n.HardwareAddr.String(), nil
		}
	}
	return "", nil
}

// ForgetNeighbour removes what the host has resolved addr to at dev; that there is
// nothing is no error. All namespaces of a machine share the kernel's table, which has
// room for 1,024 by default.
func (h *Host) ForgetNeighbour(dev string, addr netip.Addr) error {
	return h.change(dev, "forget neighbour "+addr.String(), func(l netlink.Link) error {
		err := h.nl.NeighDel(&netlink.Neigh{LinkIndex: l.Attrs().Index, IP: addr.AsSlice()})
		if errors.Is(err, unix.ENOENT) {
			return nil
		}
		return err
	})
}

// VXLAN is the kernel's own tunnel device, the oracle for the wire.
type VXLAN struct {
	VNI    int
	Local  netip.Addr
	Remote netip.Addr // a VTEP, or a multicast group
	// Dev is the underlay device; needed with a group.
	Dev  string
	Port int // default 4789
	MTU  int // default: the kernel's
	// Addr is the device's own address; may be absent.
	Addr netip.Prefix
	// NoChecksum sends the outer UDP checksum over IPv6 as zero. Over IPv4 it
	// does nothing: netlink does not say so to the kernel.
	NoChecksum bool
}

// AddVXLAN makes a kernel vxlan device, and fails on a kernel without.
func (h *Host) AddVXLAN(dev string, v VXLAN) error {
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.MTU = dev, v.MTU
	x := &netlink.Vxlan{LinkAttrs: attrs, VxlanId: v.VNI, Port: v.Port, Learning: true,
		UDPCSum: !v.NoChecksum, SrcAddr: v.Local.AsSlice(), Group: v.Remote.AsSlice()}
	if v.NoChecksum && v.Local.Is6() {
		x.UDP6ZeroCSumTx, x.UDP6ZeroCSumRx = true, true
	}
	if x.Port == 0 {
		x.Port = 4789
	}
	if v.Dev != "" {
		under, err := h.link(v.Dev)
		if err != nil {
			return err
		}
		x.VtepDevIndex = under.Attrs().Index
	}
	if err := h.nl.LinkAdd(x); err != nil {
		return fmt.Errorf("lab: %s: add vxlan %s: %w", h.name, dev, err)
	}
	if v.Addr.IsValid() {
		if err := h.AddAddr(dev, v.Addr); err != nil {
			return err
		}
	}
	return h.SetUp(dev, true)
}

// DelLink removes a device.
func (h *Host) DelLink(dev string) error { return h.change(dev, "remove", h.nl.LinkDel) }

// ReadProcNet reads a file of /proc/net as the host sees it: snmp, dev, udp.
func (h *Host) ReadProcNet(name string) (string, error) {
	var b []byte
	err := h.Do(func() (err error) {
		b, err = os.ReadFile("/proc/thread-self/net/" + strings.TrimPrefix(name, "/"))
		return err
	})
	return string(b), err
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

func prefixOf(n *net.IPNet) (netip.Prefix, bool) {
	a, ok := netip.AddrFromSlice(n.IP)
	bits, _ := n.Mask.Size()
	return netip.PrefixFrom(a.Unmap(), bits), ok
}
