package tap

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/tulle-net/tulle/ether"
	"github.com/tulle-net/tulle/internal/ready"
)

// link is the network device behind a driver, as netlink sees it. It finds the
// device through a descriptor of it, so that it survives a move to another
// namespace and a change of name, and it keeps no socket in that namespace
// open: that would keep the namespace alive.
type link struct {
	name       string
	mac        ether.MAC
	mtu        atomic.Int64
	gsoMaxSize int    // as configured, 0: by the MTU
	netns      string // where it was moved to, or ""
	file       *ready.File
	addresses  []netip.Prefix  // as configured
	gateways   []netip.Addr    // as configured
	routes     []Route         // as configured
	mu         sync.Mutex      // held for a change
	noIPv6     bool            // the MTU was too small for IPv6; guarded by mu
	layer3     bool            // a TUN: it has no MAC but mac, which the kernel does not know
	inside     bool            // it was made where it is, which this process may not be able to enter
	stays      *netlink.Handle // of one that is inside; guarded by mu
}

func (l *link) Name() string   { return l.name }
func (l *link) MAC() ether.MAC { return l.mac }
func (l *link) MTU() int       { return int(l.mtu.Load()) }

const (
	// gsoLegacyMax is GSO_LEGACY_MAX_SIZE: more needs BIG TCP.
	gsoLegacyMax = 65536
	// gsoMaxSegs is what one UDP_SEGMENT send takes before Linux 6.9 (UDP_MAX_SEGMENTS - 1).
	gsoMaxSegs = 63
	// udpMax is the payload of the largest IPv4 datagram, and so of a train.
	udpMax = 65507
	// trainOverhead is what each segment of a train gets: VXLAN, Ethernet, a VLAN tag.
	trainOverhead = 8 + 14 + 4
	// tcpReserve is what Linux subtracts from gso_max_size to bound the payload
	// of a TCP super-frame: MAX_TCP_HEADER + 1 (sk_setup_caps).
	tcpReserve = 321
	// maxTCPHeaders is the most that TCP without SACK blocks takes of an MTU:
	// IPv6, TCP, timestamps.
	maxTCPHeaders = 40 + 20 + 12
	// txQueueLen is the default length in frames of the queue to each reader.
	txQueueLen = 1000

	// IN6_ADDR_GEN_MODE_EUI64 and _NONE of linux/if_link.h.
	addrGenEUI64, addrGenNone = 0, 1
)

// DefaultGSOMaxSize returns the gso_max_size in bytes for a device of the MTU:
// the largest at which the train of a TCP super-frame, each segment with VXLAN,
// Ethernet and a VLAN tag, fits one UDP send (65,507 bytes, 63 segments). For
// sealed overlays, whose segments are longer, give Config.GSOMaxSize.
func DefaultGSOMaxSize(mtu int) int {
	segs := min(gsoMaxSegs, max(1, udpMax/(mtu+trainOverhead)))
	// One byte less than what would be one segment more.
	size := tcpReserve + (segs+1)*max(1, mtu-maxTCPHeaders) - 1
	return min(max(size, 4096), gsoLegacyMax-1)
}

// nameFree returns an error if the device that cfg asks for exists already.
func nameFree(cfg Config) error {
	h, err := handleIn(cfg.Netns)
	if err != nil {
		return err
	}
	defer h.Close()
	_, err = h.LinkByName(cfg.Name)
	switch {
	case err == nil:
		return errTaken
	case errors.As(err, new(netlink.LinkNotFoundError)):
		return nil
	}
	return fmt.Errorf("look up the name: %w", err)
}

// handleIn returns a netlink handle in the namespace at path, or in the caller's.
func handleIn(path string) (*netlink.Handle, error) {
	if path == "" {
		h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
		if err != nil {
			return nil, fmt.Errorf("netlink: %w", err)
		}
		return h, nil
	}
	ns, err := openNetns(path)
	if err != nil {
		return nil, err
	}
	defer ns.Close()
	return handleAt(ns)
}

func openNetns(path string) (netns.NsHandle, error) {
	ns, err := netns.GetFromPath(path)
	if err != nil {
		return netns.None(), fmt.Errorf("network namespace %s: check that it exists and can be opened: %w", path, err)
	}
	return ns, nil
}

// handleAt returns a netlink handle in ns. Entering a namespace takes
// CAP_SYS_ADMIN, so it is not done for the one that the thread is in.
func handleAt(ns netns.NsHandle) (*netlink.Handle, error) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	here, err := netns.Get()
	if err != nil {
		return nil, fmt.Errorf("own network namespace: %w", err)
	}
	defer here.Close()
	var h *netlink.Handle
	if here.Equal(ns) {
		h, err = netlink.NewHandle(unix.NETLINK_ROUTE)
	} else if h, err = netlink.NewHandleAt(ns, unix.NETLINK_ROUTE); err != nil {
		var fd int
		if fd, err = openIn(ns, routeSocket); err == nil {
			h, err = handleOn(fd)
		}
	}
	if err != nil {
		return nil, fmt.Errorf("netlink in the device's namespace: %w", err)
	}
	return h, nil
}

// find returns the device and a handle in its namespace; close the handle.
func (l *link) find() (*netlink.Handle, netlink.Link, error) {
	var nsfd int
	var name string
	var nsErr, nameErr error
	if err := l.file.Control(func(fd uintptr) {
		nsfd, nsErr = deviceNetns(fd)
		name, nameErr = deviceName(fd)
	}); err != nil {
		return nil, nil, ErrClosed
	}
	var h *netlink.Handle
	var err error
	switch {
	case nsErr == nil:
		ns := netns.NsHandle(nsfd)
		h, err = handleAt(ns)
		_ = ns.Close()
	case errors.Is(nsErr, unix.EINVAL), errors.Is(nsErr, unix.ENOTTY): // before Linux 5.2, or emulated
		h, err = handleIn(l.netns)
	default:
		return nil, nil, deviceError("TUNGETDEVNETNS", nsErr)
	}
	if err != nil {
		return nil, nil, err
	}
	if nameErr != nil {
		h.Close()
		return nil, nil, deviceError("TUNGETIFF", nameErr)
	}
	dev, err := h.LinkByName(name)
	if err != nil {
		h.Close()
		return nil, nil, fmt.Errorf("find the device: %w", err)
	}
	return h, dev, nil
}

// findOften is find for who holds l.mu and asks again and again. Of a device that
// was made inside a namespace, which takes a child to enter, it keeps the handle: the
// device's descriptors keep the namespace alive anyway. Call done instead of closing it.
func (l *link) findOften() (h *netlink.Handle, dev netlink.Link, done func(), err error) {
	if !l.inside {
		h, dev, err = l.find()
		if err != nil {
			return nil, nil, nil, err
		}
		return h, dev, h.Close, nil
	}
	if l.stays == nil {
		if l.stays, dev, err = l.find(); err != nil {
			l.stays = nil
			return nil, nil, nil, err
		}
		return l.stays, dev, func() {}, nil
	}
	var name string
	if e := l.file.Control(func(fd uintptr) { name, err = deviceName(fd) }); e != nil {
		return nil, nil, nil, ErrClosed
	}
	if err != nil {
		return nil, nil, nil, deviceError("TUNGETIFF", err)
	}
	if dev, err = l.stays.LinkByName(name); err != nil {
		l.letGo() // it may have been moved on
		return nil, nil, nil, fmt.Errorf("find the device: %w", err)
	}
	return l.stays, dev, func() {}, nil
}

// letGo closes what findOften keeps. Called with l.mu.
func (l *link) letGo() {
	if l.stays != nil {
		l.stays.Close()
		l.stays = nil
	}
}

// deviceError is ErrClosed if err says that the descriptor has no device any more.
func deviceError(what string, err error) error {
	if errors.Is(err, unix.EBADFD) || errors.Is(err, unix.EBADF) {
		return ErrClosed
	}
	return fmt.Errorf("%s: %w", what, err)
}

// deviceNetns opens the namespace that the device of fd is in.
func deviceNetns(fd uintptr) (int, error) {
	n, _, errno := unix.Syscall(unix.SYS_IOCTL, fd, unix.TUNGETDEVNETNS, 0)
	if errno != 0 {
		return -1, errno
	}
	unix.CloseOnExec(int(n))
	return int(n), nil
}

// deviceName returns the name that the device of fd has now.
func deviceName(fd uintptr) (string, error) {
	var req unix.Ifreq
	if err := unix.IoctlIfreq(int(fd), unix.TUNGETIFF, &req); err != nil {
		return "", err
	}
	return req.Name(), nil
}

// move hands the device, which is down, to the namespace of cfg, if there is one.
func (l *link) move(cfg Config) error {
	if cfg.Netns == "" {
		return nil
	}
	if cfg.Inside {
		l.netns = cfg.Netns // it was made there
		return nil
	}
	ns, err := openNetns(cfg.Netns)
	if err != nil {
		return err
	}
	defer ns.Close()
	h, dev, err := l.find()
	if err != nil {
		return err
	}
	defer h.Close()
	if err := h.LinkSetNsFd(dev, int(ns)); err != nil {
		return fmt.Errorf("move the device to %s: %w", cfg.Netns, err)
	}
	l.netns = cfg.Netns
	return nil
}

// setUp names and configures the device, which is down and where it belongs,
// and brings it up.
func (l *link) setUp(cfg Config) error {
	h, dev, err := l.find()
	if err != nil {
		return err
	}
	defer h.Close()
	if dev.Attrs().Name != cfg.Name {
		if err := h.LinkSetName(dev, cfg.Name); errors.Is(err, fs.ErrExist) {
			return errTaken
		} else if err != nil {
			return fmt.Errorf("name the device: %w", err)
		}
	}
	l.name, l.gsoMaxSize, l.addresses = cfg.Name, cfg.GSOMaxSize, slices.Clone(cfg.Addresses)
	l.gateways, l.routes = slices.Clone(cfg.Gateways), slices.Clone(cfg.Routes)
	if err := l.setMAC(h, dev, cfg.MAC); err != nil {
		return err
	}
	if err := l.applyMTU(h, dev, cfg.MTU); err != nil {
		return err
	}
	if err := h.LinkSetTxQLen(dev, cmp.Or(cfg.QueueLen, txQueueLen)); err != nil {
		return fmt.Errorf("set the queue's length: %w", err)
	}
	// A link-local address of the MAC: it moves with an endpoint as the MAC
	// does. Without IPv6 in the kernel there is nothing to set.
	if l.layer3 {
		_ = h.LinkSetIP6AddrGenMode(dev, addrGenNone)
		l.addLinkLocal(h, dev, cfg.MTU)
	} else {
		_ = h.LinkSetIP6AddrGenMode(dev, addrGenEUI64)
	}
	if cfg.Down {
		return nil
	}
	if cfg.NoSolicit {
		l.noSolicit()
	}
	for _, a := range cfg.Addresses {
		if err := addAddress(h, dev, a); err != nil {
			return err
		}
	}
	if err := h.LinkSetUp(dev); err != nil {
		return fmt.Errorf("bring the device up: %w", err)
	}
	for _, g := range cfg.Gateways {
		if err := addDefault(h, dev, g); err != nil {
			return err
		}
	}
	for _, r := range cfg.Routes {
		if err := addRoute(h, dev, r); err != nil {
			return err
		}
	}
	return nil
}

// addRoute adds a route through the device, which is up.
func addRoute(h *netlink.Handle, dev netlink.Link, r Route) error {
	add := &netlink.Route{
		LinkIndex: dev.Attrs().Index,
		Dst:       &net.IPNet{IP: r.Dst.Addr().AsSlice(), Mask: net.CIDRMask(r.Dst.Bits(), r.Dst.Addr().BitLen())},
	}
	if r.Via.IsValid() {
		add.Gw = r.Via.AsSlice()
	} else {
		add.Scope = netlink.SCOPE_LINK
	}
	err := h.RouteAdd(add)
	switch {
	case errors.Is(err, fs.ErrExist):
		return fmt.Errorf("route to %v: %w", r.Dst, ErrRouteTaken)
	case err != nil:
		return fmt.Errorf("route to %v: %w", r.Dst, err)
	}
	return nil
}

// setMAC gives the device its MAC, or finds out which it has.
func (l *link) setMAC(h *netlink.Handle, dev netlink.Link, want ether.MAC) error {
	switch {
	case l.layer3:
		return nil
	case want == 0:
		l.mac = ether.MACFrom(dev.Attrs().HardwareAddr)
		return nil
	}
	mac := make(net.HardwareAddr, 6)
	want.Put(mac)
	if err := h.LinkSetHardwareAddr(dev, mac); err != nil {
		return fmt.Errorf("set MAC %v: %w", want, err)
	}
	l.mac = want
	return nil
}

// addLinkLocal adds the address that a TUN's kernel does not make of a MAC. Where
// there is no IPv6 it needs none.
func (l *link) addLinkLocal(h *netlink.Handle, dev netlink.Link, mtu int) {
	if mtu >= minMTU6 {
		_ = addAddress(h, dev, netip.PrefixFrom(ether.LinkLocal(l.mac), 64))
	}
}

// noSolicit does what Config.NoSolicit says, before the device is up. The files are
// those of the thread's namespace.
func (l *link) noSolicit() {
	file := opening{path: "/proc/sys/net/ipv6/conf/" + l.name + "/router_solicitations", flags: unix.O_WRONLY | unix.O_CLOEXEC}
	ns, err := openHere(l.netns)
	if err != nil {
		return
	}
	defer ns.Close()
	fd, err := openIn(ns, file)
	if err != nil {
		return // it asks
	}
	defer unix.Close(fd)
	_, _ = unix.Write(fd, []byte("0"))
}

// addDefault adds a default route through the device, which is up.
func addDefault(h *netlink.Handle, dev netlink.Link, gateway netip.Addr) error {
	zero := netip.PrefixFrom(netip.IPv4Unspecified(), 0)
	if gateway.Is6() {
		zero = netip.PrefixFrom(netip.IPv6Unspecified(), 0)
	}
	err := h.RouteAdd(&netlink.Route{
		LinkIndex: dev.Attrs().Index, Gw: gateway.AsSlice(),
		Dst: &net.IPNet{IP: zero.Addr().AsSlice(), Mask: net.CIDRMask(0, gateway.BitLen())},
	})
	switch {
	case errors.Is(err, fs.ErrExist):
		return fmt.Errorf("default route through %v: %w", gateway, ErrRouteTaken)
	case err != nil:
		return fmt.Errorf("default route through %v: %w", gateway, err)
	}
	return nil
}

func addAddress(h *netlink.Handle, dev netlink.Link, p netip.Prefix) error {
	a := p.Addr()
	addr := &netlink.Addr{IPNet: &net.IPNet{
		IP:   a.AsSlice(),
		Mask: net.CIDRMask(p.Bits(), a.BitLen()),
	}}
	if a.Is6() {
		// Addresses are given out once, so there is nothing to detect, and an
		// address that is tentative for a second would delay the first packet.
		addr.Flags = unix.IFA_F_NODAD
	}
	err := h.AddrAdd(dev, addr)
	switch {
	case err == nil:
		return nil
	case a.Is6() && (errors.Is(err, unix.EACCES) || errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EAFNOSUPPORT)):
		return fmt.Errorf("add address %v: IPv6 is switched off here (sysctl net.ipv6.conf.all.disable_ipv6, ipv6.disable): %w", p, err)
	}
	return fmt.Errorf("add address %v: %w", p, err)
}

// applyMTU sets the MTU and what follows from it. The GSO bounds are hints for
// speed: a train that is too long is split later, so their errors do not count.
func (l *link) applyMTU(h *netlink.Handle, dev netlink.Link, mtu int) error {
	if err := h.LinkSetMTU(dev, mtu); err != nil {
		return fmt.Errorf("set MTU %d: %w", mtu, err)
	}
	l.mtu.Store(int64(mtu))
	size := DefaultGSOMaxSize(mtu)
	if l.gsoMaxSize != 0 {
		size = min(size, l.gsoMaxSize)
	}
	segs := gsoMaxSegs
	if l.layer3 {
		segs, _ = tunSegmentsAt(mtu)
	}
	_ = h.LinkSetGSOMaxSegs(dev, segs)
	_ = h.LinkSetGSOMaxSize(dev, size)     // IPv6, and before Linux 6.3 IPv4 as well
	_ = h.LinkSetGSOIPv4MaxSize(dev, size) // since 6.3
	return nil
}

// SetMTU changes the MTU, 68 to 65535 bytes, wherever the device is. The error
// is ErrClosed when it is gone. Below 1280 bytes the device has no IPv6; from
// there on it has the configured IPv6 addresses again.
func (l *link) SetMTU(bytes int) error {
	if bytes < minMTU || bytes > maxMTU {
		return fmt.Errorf("tap: %s: MTU %d: choose %d to %d", l.name, bytes, minMTU, maxMTU)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	h, dev, done, err := l.findOften()
	if err != nil {
		return l.wrap(err)
	}
	defer done()
	l.noIPv6 = l.noIPv6 || dev.Attrs().MTU < minMTU6
	if err := l.applyMTU(h, dev, bytes); err != nil {
		return l.wrap(err)
	}
	return l.wrap(l.restoreIPv6(h, dev, bytes))
}

// restoreIPv6 adds the IPv6 addresses and route that the kernel dropped for good when the
// MTU was too small. At any other time one that somebody removed stays away.
func (l *link) restoreIPv6(h *netlink.Handle, dev netlink.Link, mtu int) error {
	if !l.noIPv6 || mtu < minMTU6 {
		return nil
	}
	if l.layer3 {
		l.addLinkLocal(h, dev, mtu)
	}
	for _, a := range l.addresses {
		if !a.Addr().Is6() {
			continue
		}
		if err := addAddress(h, dev, a); err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
	}
	for _, g := range l.gateways {
		if !g.Is6() {
			continue
		}
		if err := addDefault(h, dev, g); err != nil && !errors.Is(err, ErrRouteTaken) {
			return err
		}
	}
	for _, r := range l.routes {
		if !r.Dst.Addr().Is6() {
			continue
		}
		if err := addRoute(h, dev, r); err != nil && !errors.Is(err, ErrRouteTaken) {
			return err
		}
	}
	l.noIPv6 = false
	return nil
}

// Dropped returns how many frames the kernel dropped for want of room in the
// queues since the device was made; 0 when it is gone.
func (l *link) Dropped() uint64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	_, dev, done, err := l.findOften()
	if err != nil {
		return 0
	}
	defer done()
	if s := dev.Attrs().Statistics; s != nil {
		return s.TxDropped
	}
	return 0
}

// wrap adds the device's name to an error, except to ErrClosed.
func (l *link) wrap(err error) error {
	if err == nil || errors.Is(err, ErrClosed) {
		return err
	}
	return fmt.Errorf("tap: %s: %w", l.name, err)
}
