package tap

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// The functions in this file are about a resolver that is in a network namespace.

const loopback = "lo"

// ListenInside opens sockets of UDP and TCP in the namespace want, to which path leads,
// at an address that its loopback gets, which is brought up. The sockets keep the namespace alive.
// The error is ErrNoNamespace if the path leads elsewhere by now.
func ListenInside(path string, want Namespace, at netip.AddrPort) (udp *net.UDPConn, tcp *net.TCPListener, err error) {
	if udp, tcp, err = listenInside(path, want, at); err != nil {
		return nil, nil, fmt.Errorf("tap: a resolver at %s in the network namespace %s: %w", at, path, err)
	}
	return udp, tcp, nil
}

func listenInside(path string, want Namespace, at netip.AddrPort) (udp *net.UDPConn, tcp *net.TCPListener, err error) {
	ns, err := openNetns(path)
	if err != nil {
		return nil, nil, err
	}
	defer ns.Close()
	// What is open cannot end, so what is true of the path now is true of it.
	if is, err := NamespaceAt(path); err != nil || is != want || !LeadsTo(fmt.Sprintf("/proc/self/fd/%d", int(ns)), want) {
		return nil, nil, errors.Join(ErrNoNamespace, err)
	}
	if err := addLoopback(ns, at.Addr()); err != nil {
		return nil, nil, err
	}
	u, err := socketIn(ns, unix.SOCK_DGRAM, at)
	if err != nil {
		return nil, nil, err
	}
	defer u.Close() // what is made of it has a copy
	t, err := socketIn(ns, unix.SOCK_STREAM, at)
	if err != nil {
		return nil, nil, err
	}
	defer t.Close()
	pc, err := net.FilePacketConn(u)
	if err != nil {
		return nil, nil, err
	}
	l, err := net.FileListener(t)
	if err != nil {
		_ = pc.Close()
		return nil, nil, err
	}
	return pc.(*net.UDPConn), l.(*net.TCPListener), nil
}

// listenBacklog connections wait to be accepted.
const listenBacklog = 128

// socketIn opens a socket in a namespace, at an address of IPv4, which listens if it is of TCP.
func socketIn(ns netns.NsHandle, kind int, at netip.AddrPort) (*os.File, error) {
	fd, err := openIn(ns, opening{domain: unix.AF_INET, kind: kind | unix.SOCK_CLOEXEC | unix.SOCK_NONBLOCK})
	if err != nil {
		return nil, fmt.Errorf("open a socket: %w", err)
	}
	f := os.NewFile(uintptr(fd), "resolver")
	// A program there that serves names at all addresses may share the port, if it asks to.
	err = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1)
	if err == nil {
		err = unix.Bind(fd, &unix.SockaddrInet4{Port: int(at.Port()), Addr: at.Addr().As4()})
	}
	if err == nil && kind == unix.SOCK_STREAM {
		err = unix.Listen(fd, listenBacklog)
	}
	if err != nil {
		_ = f.Close()
		return nil, fmt.Errorf("listen: %w", err)
	}
	return f, nil
}

// addLoopback gives the loopback of a namespace an address, and brings it up.
func addLoopback(ns netns.NsHandle, a netip.Addr) error {
	h, err := handleAt(ns)
	if err != nil {
		return err
	}
	defer h.Close()
	lo, err := h.LinkByName(loopback)
	if err != nil {
		return fmt.Errorf("find %s: %w", loopback, err)
	}
	if err := h.AddrAdd(lo, hostAddr(a)); err != nil && !errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("add address %s to %s: %w", a, loopback, err)
	}
	if err := h.LinkSetUp(lo); err != nil {
		return fmt.Errorf("bring %s up: %w", loopback, err)
	}
	return nil
}

// NamespaceOf returns a descriptor of the namespace of a socket that ListenInside has
// opened. It is the caller's to close.
func NamespaceOf(udp *net.UDPConn) (*os.File, error) {
	raw, err := udp.SyscallConn()
	if err != nil {
		return nil, fmt.Errorf("tap: find the resolver's namespace: %w", err)
	}
	ns, errno := -1, error(nil)
	if err := raw.Control(func(fd uintptr) {
		n, _, e := unix.Syscall(unix.SYS_IOCTL, fd, unix.SIOCGSKNS, 0)
		if e != 0 {
			errno = e
			return
		}
		ns = int(n)
		unix.CloseOnExec(ns)
	}); err != nil {
		return nil, fmt.Errorf("tap: find the resolver's namespace: %w", err)
	}
	if errno != nil {
		return nil, fmt.Errorf("tap: find the resolver's namespace: SIOCGSKNS: %w", errno)
	}
	return os.NewFile(uintptr(ns), "namespace"), nil
}

// LeaveInside takes the address of a socket that ListenInside has opened off its
// namespace's loopback. The socket stays open.
func LeaveInside(udp *net.UDPConn) error {
	at := udp.LocalAddr().(*net.UDPAddr).AddrPort().Addr().Unmap()
	ns, err := NamespaceOf(udp)
	if err != nil {
		return err
	}
	defer ns.Close()
	h, err := handleAt(netns.NsHandle(ns.Fd()))
	if err != nil {
		return fmt.Errorf("tap: leave the resolver's namespace: %w", err)
	}
	defer h.Close()
	lo, err := h.LinkByName(loopback)
	if err == nil {
		err = h.AddrDel(lo, hostAddr(at))
	}
	if err != nil && !errors.Is(err, unix.EADDRNOTAVAIL) {
		return fmt.Errorf("tap: take %s off %s: %w", at, loopback, err)
	}
	return nil
}

func hostAddr(a netip.Addr) *netlink.Addr {
	return &netlink.Addr{
		IPNet: &net.IPNet{IP: a.AsSlice(), Mask: net.CIDRMask(a.BitLen(), a.BitLen())},
		Scope: int(netlink.SCOPE_HOST), // it is no source of what leaves the namespace
	}
}
