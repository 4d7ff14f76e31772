package gateway

import (
	"errors"
	"fmt"
	"net/netip"
	"os"

	"golang.org/x/sys/unix"
)

// ErrPortTaken: a program of this host has the port.
var ErrPortTaken = errors.New("a program of this host has it")

// ErrNoAddress: the host does not have the address.
var ErrNoAddress = errors.New("this host does not have that address")

// Reserve binds a port of the host for as long as the file is open, so that no
// program takes it while it leads to an endpoint: that program would wait for calls
// that never come. Nothing is read from it. An unspecified address stands for all
// of its family. Errors wrap ErrPortTaken or ErrNoAddress where it is that.
func Reserve(at netip.AddrPort, protocol string) (*os.File, error) {
	kind, family := unix.SOCK_STREAM, unix.AF_INET
	if protocol == "udp" {
		kind = unix.SOCK_DGRAM
	}
	var to unix.Sockaddr
	if at.Addr().Is6() {
		family, to = unix.AF_INET6, &unix.SockaddrInet6{Port: int(at.Port()), Addr: at.Addr().As16()}
	} else {
		to = &unix.SockaddrInet4{Port: int(at.Port()), Addr: at.Addr().As4()}
	}
	fd, err := unix.Socket(family, kind|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("gateway: reserve %s port %s: %w", protocol, at, err)
	}
	if err := reserve(fd, kind, family, to); err != nil {
		unix.Close(fd)
		switch {
		case errors.Is(err, unix.EADDRINUSE):
			err = ErrPortTaken
		case errors.Is(err, unix.EADDRNOTAVAIL):
			err = ErrNoAddress
		}
		return nil, fmt.Errorf("gateway: reserve %s port %s: %w", protocol, at, err)
	}
	return os.NewFile(uintptr(fd), protocol+" port"), nil
}

func reserve(fd, kind, family int, to unix.Sockaddr) error {
	if family == unix.AF_INET6 {
		if err := unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_V6ONLY, 1); err != nil {
			return err
		}
	}
	if kind == unix.SOCK_DGRAM {
		_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF, 0) // the kernel's least
		return unix.Bind(fd, to)
	}
	// A server that has just ended leaves connections that keep its port busy for a
	// minute, unless one asks like this; of one that listens it is refused all the
	// same. Afterwards the socket is not to be shared.
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1); err != nil {
		return err
	}
	if err := unix.Bind(fd, to); err != nil {
		return err
	}
	return unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 0)
}
