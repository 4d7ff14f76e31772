package underlay

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"

	"golang.org/x/sys/unix"

	"github.com/tulle-net/tulle/internal/ready"
)

// anyUDPPort is a port to connect a socket to that never sends (discard, RFC 863).
const anyUDPPort = 9

// withRoute calls fn with a socket that is connected to dst, which makes the
// kernel look up the route. Nothing is sent.
func withRoute(source, dst netip.Addr, fn func(fd int) error) error {
	dst = dst.Unmap()
	if !dst.IsValid() {
		return fmt.Errorf("underlay: route: no destination")
	}
	fd, err := udpSocket(familyOf(dst))
	if err != nil {
		return fmt.Errorf("underlay: route to %s: %w", dst, err)
	}
	defer unix.Close(fd)
	if source.IsValid() && familyOf(source) == familyOf(dst) {
		// Where it fails the pool's sockets are not bound to it either.
		_ = unix.Bind(fd, sockaddr(netip.AddrPortFrom(source, 0)))
	}
	if err := unix.Connect(fd, sockaddr(netip.AddrPortFrom(dst, anyUDPPort))); err != nil {
		return fmt.Errorf("underlay: no route to %s: %w", dst, err)
	}
	if err := fn(fd); err != nil {
		return fmt.Errorf("underlay: route to %s: %w", dst, err)
	}
	return nil
}

// PathMTU is the MTU of the route, or less where an ICMP message told so.
func (c *conn) PathMTU(dst netip.Addr) (int, error) {
	mtu := 0
	err := withRoute(*c.source.Load(), dst, func(fd int) (err error) {
		level, option := unix.SOL_IP, unix.IP_MTU
		if familyOf(dst.Unmap()) == v6 {
			level, option = unix.SOL_IPV6, unix.IPV6_MTU
		}
		mtu, err = unix.GetsockoptInt(fd, level, option)
		if err == unix.ENOPROTOOPT {
			// An emulated kernel: the device's own, without the path's.
			mtu, err = deviceMTU(fd)
		}
		return os.NewSyscallError("IP_MTU", err)
	})
	return mtu, err
}

// deviceMTU returns the MTU of the device that holds the address that fd sends from.
func deviceMTU(fd int) (int, error) {
	at, err := localAddr(fd)
	if err != nil {
		return 0, err
	}
	d, err := DeviceOf(at.Addr())
	return d.MTU, err
}

// SourceFor returns the address that datagrams to dst leave from. Nothing is
// sent. The error says that there is no route.
func SourceFor(dst netip.Addr) (netip.Addr, error) {
	var source netip.Addr
	err := withRoute(netip.Addr{}, dst, func(fd int) error {
		at, err := localAddr(fd)
		source = at.Addr()
		return os.NewSyscallError("getsockname", err)
	})
	return source, err
}

// farAway are addresses that only a default route leads to: root servers' (no
// name is asked and nothing is sent).
var farAway = []netip.Addr{
	netip.MustParseAddr("198.41.0.4"),
	netip.MustParseAddr("2001:503:ba3e::2:30"),
}

// DefaultRoutes returns the source addresses of the default routes, IPv4 before
// IPv6; none where there is no such route.
func DefaultRoutes() []netip.Addr {
	var sources []netip.Addr
	for _, dst := range farAway {
		if source, err := SourceFor(dst); err == nil && !source.IsLoopback() && !source.IsUnspecified() {
			sources = append(sources, source)
		}
	}
	return sources
}

// DefaultSource returns the first of DefaultRoutes; without a default route, the
// first address of an interface that is up and not the loopback.
func DefaultSource() (netip.Addr, error) {
	if sources := DefaultRoutes(); len(sources) > 0 {
		return sources[0], nil
	}
	all, err := net.Interfaces()
	if err != nil {
		return netip.Addr{}, fmt.Errorf("underlay: list interfaces: %w", err)
	}
	usable := make(map[int]bool, len(all))
	for i := range all {
		usable[all[i].Index] = all[i].Flags&(net.FlagUp|net.FlagLoopback) == net.FlagUp
	}
	addrs, err := addresses(unix.AF_UNSPEC)
	if err != nil {
		return netip.Addr{}, fmt.Errorf("underlay: list addresses: %w", err)
	}
	var found netip.Addr
	for _, h := range addrs {
		if !usable[h.index] || h.addr.IsLinkLocalUnicast() {
			continue
		}
		if !found.IsValid() || found.Is6() && h.addr.Is4() {
			found = h.addr
		}
	}
	if !found.IsValid() {
		return netip.Addr{}, errors.New("underlay: this host has no address but loopback and link-local ones: name one with --advertise")
	}
	return found, nil
}

// Changes returns a bell of capacity 1 that rings after any change of a link,
// an address or a route: what PathMTU and SourceFor said may be different now.
// It rings until ctx ends, and is never closed.
func Changes(ctx context.Context) (<-chan struct{}, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("underlay: watch links and routes: %w", os.NewSyscallError("socket", err))
	}
	groups := uint32(unix.RTMGRP_LINK | unix.RTMGRP_IPV4_IFADDR | unix.RTMGRP_IPV6_IFADDR | unix.RTMGRP_IPV4_ROUTE | unix.RTMGRP_IPV6_ROUTE)
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: groups}); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("underlay: watch links and routes: %w", os.NewSyscallError("bind", err))
	}
	file, err := ready.New(fd, "rtnetlink") // closes fd on error
	if err != nil {
		return nil, fmt.Errorf("underlay: watch links and routes: %w", err)
	}
	bell := make(chan struct{}, 1)
	context.AfterFunc(ctx, func() { file.Close() })
	go func() {
		for file.Wait() == nil {
			// Also after ENOBUFS: messages were lost, so there were some.
			if file.Control(discard) != nil {
				return
			}
			select {
			case bell <- struct{}{}:
			default:
			}
		}
	}()
	return bell, nil
}

// discard reads what waits: that there was a message is all that counts.
func discard(fd uintptr) {
	var b [64]byte
	for range 1024 {
		if _, _, err := unix.Recvfrom(int(fd), b[:], unix.MSG_DONTWAIT|unix.MSG_TRUNC); err != nil && err != unix.EINTR && err != unix.ENOBUFS {
			return
		}
	}
}
