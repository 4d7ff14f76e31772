package lab

import (
	"errors"
	"fmt"
	"net/netip"
	"runtime"
	"unsafe"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Offloads says what the underlay's devices leave to each other.
type Offloads string

const (
	// Virtual is veth's default: packets of 64 KiB and unfilled checksums pass.
	Virtual Offloads = ""
	// Wire turns everything off: each packet is a real one, checksummed.
	Wire Offloads = "wire"
	// NIC is Wire with receive GRO on: a plain NIC without tunnel offloads.
	NIC Offloads = "nic"
)

// Underlay configures a switch.
type Underlay struct {
	// Prefix4 and Prefix6 are the networks; host i gets address number i, from
	// 1. Either may be absent.
	Prefix4, Prefix6 netip.Prefix
	// MTU in bytes; default 1500.
	MTU int
	// DisableIPv6 switches IPv6 off on all devices of the hosts.
	DisableIPv6 bool
	Offloads    Offloads
	// Cable joins two hosts by one cable, without the work of a bridge.
	Cable bool
}

// Switch is one network segment: a bridge with a cable to each host, or a cable
// alone.
type Switch struct {
	name  string
	conf  Underlay
	box   *Host // holds the bridge; nil: two hosts, one cable
	hosts []*Host
}

const bridgeName = "bridge"

// AddSwitch connects hosts by a segment; in each the device is called name (1
// to 10 of a-z and 0-9). On a kernel without bridges two hosts are joined by
// one cable, as with Underlay.Cable. It is not safe for concurrent use with
// Attach.
func (l *Lab) AddSwitch(name string, u Underlay, hosts ...*Host) (*Switch, error) {
	if u.MTU == 0 {
		u.MTU = 1500
	}
	if u.Cable {
		if !validName.MatchString(name) {
			return nil, fmt.Errorf("lab: switch name %q is not 1 to 10 of a-z and 0-9", name)
		}
		if len(hosts) != 2 {
			return nil, fmt.Errorf("lab: switch %s: a cable joins 2 hosts, not %d", name, len(hosts))
		}
		s := &Switch{name: name, conf: u}
		return s, s.pair(hosts[0], hosts[1])
	}
	box, err := l.AddHost(name)
	if err != nil {
		return nil, err
	}
	s := &Switch{name: name, conf: u, box: box}
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.MTU = bridgeName, u.MTU
	err = box.nl.LinkAdd(&netlink.Bridge{LinkAttrs: attrs})
	if errors.Is(err, unix.EOPNOTSUPP) && len(hosts) == 2 {
		return s, s.pair(hosts[0], hosts[1])
	}
	if err != nil {
		return nil, fmt.Errorf("lab: switch %s: add bridge: %w", name, err)
	}
	// The switch itself is silent.
	if err := box.sysctlIfThere("net/ipv6/conf/all/disable_ipv6", "1"); err != nil {
		return nil, err
	}
	if err := box.sysctlIfThere("net/ipv6/conf/default/disable_ipv6", "1"); err != nil {
		return nil, err
	}
	if err := box.SetUp(bridgeName, true); err != nil {
		return nil, err
	}
	for _, h := range hosts {
		if err := s.Attach(h); err != nil {
			return nil, err
		}
	}
	return s, nil
}

// Attach plugs in one more host; it gets the next address.
func (s *Switch) Attach(h *Host) error {
	if s.box == nil {
		return fmt.Errorf("lab: switch %s: it is one cable, so two hosts are all", s.name)
	}
	if err := s.cable(h, s.name, s.box, h.name); err != nil {
		return err
	}
	bridge, err := s.box.link(bridgeName)
	if err != nil {
		return err
	}
	err = s.box.change(h.name, "join the bridge", func(l netlink.Link) error {
		return s.box.nl.LinkSetMaster(l, bridge)
	})
	if err != nil {
		return err
	}
	if err := s.box.setOffloads(h.name, s.conf.Offloads); err != nil {
		return err
	}
	if err := s.box.SetUp(h.name, true); err != nil {
		return err
	}
	s.hosts = append(s.hosts, h)
	return s.configure(h)
}

// pair joins two hosts by one cable.
func (s *Switch) pair(a, b *Host) error {
	if err := s.cable(a, s.name, b, s.name); err != nil {
		return err
	}
	s.box, s.hosts = nil, []*Host{a, b}
	return errors.Join(s.configure(a), s.configure(b))
}

// cable makes a veth, straight inside the two namespaces.
func (s *Switch) cable(a *Host, devA string, b *Host, devB string) error {
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.MTU = devA, s.conf.MTU
	err := a.nl.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: devB, PeerMTU: uint32(s.conf.MTU), PeerNamespace: netlink.NsFd(b.ns)})
	if err != nil {
		return fmt.Errorf("lab: switch %s: add veth for %s: %w", s.name, a.name, err)
	}
	return nil
}

// configure sets up a host's end of the cable.
func (s *Switch) configure(h *Host) error {
	if s.conf.DisableIPv6 {
		for _, which := range []string{"all", "default"} {
			if err := h.sysctlIfThere("net/ipv6/conf/"+which+"/disable_ipv6", "1"); err != nil {
				return err
			}
		}
	}
	if err := h.setOffloads(s.name, s.conf.Offloads); err != nil {
		return err
	}
	if err := h.SetUp(s.name, true); err != nil {
		return err
	}
	for _, p := range []netip.Prefix{s.conf.Prefix4, s.conf.Prefix6} {
		if !p.IsValid() {
			continue
		}
		a := netip.PrefixFrom(nth(p, s.index(h)), p.Bits())
		if err := h.AddAddr(s.name, a); err != nil && !errors.Is(err, unix.EEXIST) {
			return err
		}
	}
	return nil
}

// Dev is the device's name in each host.
func (s *Switch) Dev() string { return s.name }

// Addr is the IPv4 address of a host on this segment, or its IPv6 address
// where there is no Prefix4; invalid for a host that is not attached.
func (s *Switch) Addr(h *Host) netip.Addr {
	if s.conf.Prefix4.IsValid() {
		return nth(s.conf.Prefix4, s.index(h))
	}
	return s.Addr6(h)
}

// Addr6 is the IPv6 address of a host on this segment.
func (s *Switch) Addr6(h *Host) netip.Addr { return nth(s.conf.Prefix6, s.index(h)) }

// Cut pulls a host's cable out of the switch: the host keeps its addresses
// and loses the carrier.
func (s *Switch) Cut(h *Host) error { return s.plug(h, false) }

// Mend plugs the cable in again.
func (s *Switch) Mend(h *Host) error { return s.plug(h, true) }

func (s *Switch) plug(h *Host, in bool) error {
	if s.index(h) == 0 {
		return fmt.Errorf("lab: switch %s: %s is not attached", s.name, h.name)
	}
	if s.box != nil {
		return s.box.SetUp(h.name, in)
	}
	if !in {
		return h.SetUp(s.name, false)
	}
	return s.configure(h) // down took the IPv6 address away
}

// index counts from 1; 0 is not attached.
func (s *Switch) index(h *Host) int {
	for i, x := range s.hosts {
		if x == h {
			return i + 1
		}
	}
	return 0
}

// nth is the n-th address of a network, invalid for n = 0.
func nth(p netip.Prefix, n int) netip.Addr {
	if !p.IsValid() || n == 0 {
		return netip.Addr{}
	}
	a := p.Masked().Addr()
	for range n {
		a = a.Next()
	}
	return a
}

// setOffloads sets what `ethtool -K dev tso off gso off tx off gro on|off` does.
func (h *Host) setOffloads(dev string, o Offloads) error {
	var gro uint32
	switch o {
	case Virtual:
		return nil
	case Wire:
	case NIC:
		gro = 1
	default:
		return fmt.Errorf("lab: offloads %q: want wire, nic or nothing", o)
	}
	return h.Do(func() error {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return fmt.Errorf("lab: %s: offloads of %s: %w", h.name, dev, err)
		}
		defer unix.Close(fd)
		for _, set := range []ethtoolValue{{unix.ETHTOOL_STSO, 0}, {unix.ETHTOOL_SGSO, 0},
			{unix.ETHTOOL_STXCSUM, 0}, {unix.ETHTOOL_SGRO, gro}} {
			if err := set.apply(fd, dev); err != nil {
				return fmt.Errorf("lab: %s: offloads of %s: ethtool command %#x: %w", h.name, dev, set.cmd, err)
			}
		}
		return nil
	})
}

// ethtoolValue is struct ethtool_value of linux/ethtool.h.
type ethtoolValue struct{ cmd, data uint32 }

// apply takes cmd's data to the device; fd is any socket of its namespace.
func (v *ethtoolValue) apply(fd int, dev string) error {
	// struct ifreq: the name, then a union of 24 bytes (16 on 32 bits).
	var req struct {
		name [unix.IFNAMSIZ]byte
		data unsafe.Pointer
		_    [16]byte
	}
	copy(req.name[:unix.IFNAMSIZ-1], dev)
	req.data = unsafe.Pointer(v)
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.SIOCETHTOOL, uintptr(unsafe.Pointer(&req)))
	runtime.KeepAlive(v)
	if errno != 0 {
		return errno
	}
	return nil
}
