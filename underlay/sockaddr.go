package underlay

import (
	"encoding/binary"
	"net"
	"net/netip"
	"strconv"
	"unsafe"

	"golang.org/x/sys/unix"
)

// mmsghdr is struct mmsghdr of recvmmsg(2). Go pads it as C does: a trailing
// array of no bytes would make it 4 bytes too long on 32-bit.
type mmsghdr struct {
	hdr unix.Msghdr
	n   uint32
}

// family is an index: everything that exists once per address family.
type family uint8

const (
	v4 family = iota
	v6
)

func familyOf(a netip.Addr) family {
	if a.Is4() {
		return v4
	}
	return v6
}

// domain returns AF_INET or AF_INET6.
func (f family) domain() int {
	if f == v4 {
		return unix.AF_INET
	}
	return unix.AF_INET6
}

func (f family) unspecified() netip.Addr {
	if f == v4 {
		return netip.IPv4Unspecified()
	}
	return netip.IPv6Unspecified()
}

// putSockaddr writes a, which is not IPv4-mapped, to sa and returns its length.
func putSockaddr(sa *unix.RawSockaddrInet6, a netip.AddrPort, scope uint32) uint32 {
	if ip := a.Addr(); ip.Is4() {
		sa4 := (*unix.RawSockaddrInet4)(unsafe.Pointer(sa))
		sa4.Family = unix.AF_INET
		putPort(&sa4.Port, a.Port())
		sa4.Addr = ip.As4()
		return unix.SizeofSockaddrInet4
	}
	sa.Family = unix.AF_INET6
	putPort(&sa.Port, a.Port())
	sa.Flowinfo = 0
	sa.Addr = a.Addr().As16()
	sa.Scope_id = scope
	return unix.SizeofSockaddrInet6
}

// addrPortOf reads sa; an address that is IPv4-mapped becomes IPv4.
func addrPortOf(sa *unix.RawSockaddrInet6) netip.AddrPort {
	if sa.Family == unix.AF_INET {
		sa4 := (*unix.RawSockaddrInet4)(unsafe.Pointer(sa))
		return netip.AddrPortFrom(netip.AddrFrom4(sa4.Addr), port(&sa4.Port))
	}
	ip := netip.AddrFrom16(sa.Addr).Unmap()
	if sa.Scope_id != 0 && ip.IsLinkLocalUnicast() {
		// Only a link-local source has a zone: answers need it.
		ip = ip.WithZone(strconv.Itoa(int(sa.Scope_id)))
	}
	return netip.AddrPortFrom(ip, port(&sa.Port))
}

// The port in a raw address is in network order whatever the machine's is.
func putPort(p *uint16, v uint16) { binary.BigEndian.PutUint16((*[2]byte)(unsafe.Pointer(p))[:], v) }
func port(p *uint16) uint16       { return binary.BigEndian.Uint16((*[2]byte)(unsafe.Pointer(p))[:]) }

// scopeOf returns the interface index of a zone, 0 if there is none.
func scopeOf(zone string) uint32 {
	if zone == "" {
		return 0
	}
	if i, err := strconv.Atoi(zone); err == nil {
		return uint32(i)
	}
	if ifi, err := net.InterfaceByName(zone); err == nil {
		return uint32(ifi.Index)
	}
	return 0
}

// sockaddr is a for the calls that are not on the hot path.
func sockaddr(a netip.AddrPort) unix.Sockaddr {
	if ip := a.Addr(); ip.Is4() {
		return &unix.SockaddrInet4{Port: int(a.Port()), Addr: ip.As4()}
	}
	return &unix.SockaddrInet6{Port: int(a.Port()), Addr: a.Addr().As16(), ZoneId: scopeOf(a.Addr().Zone())}
}

// localAddr returns what fd is bound to.
func localAddr(fd int) (netip.AddrPort, error) {
	sa, err := unix.Getsockname(fd)
	if err != nil {
		return netip.AddrPort{}, err
	}
	switch sa := sa.(type) {
	case *unix.SockaddrInet4:
		return netip.AddrPortFrom(netip.AddrFrom4(sa.Addr), uint16(sa.Port)), nil
	case *unix.SockaddrInet6:
		return netip.AddrPortFrom(netip.AddrFrom16(sa.Addr), uint16(sa.Port)), nil
	}
	return netip.AddrPort{}, unix.EAFNOSUPPORT
}
