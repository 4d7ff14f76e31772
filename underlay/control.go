package underlay

import (
	"net/netip"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// neverFragment has fd send with DF set (RFC 9000, section 14) and refuse what is
// larger than the device's MTU. The path MTU of the kernel is not asked: QUIC
// finds its own (RFC 8899), while a forged ICMP message, which the kernel may
// believe, could leave less than the 1,200 bytes that QUIC needs.
//
// There is no IP_RECVERR on a listening socket: without it a socket that is not
// connected never has an error pending, so control that nobody takes cannot
// disturb Receive.
func neverFragment(fd int, f family) error {
	name, level, option, value := "IP_MTU_DISCOVER", unix.SOL_IP, unix.IP_MTU_DISCOVER, unix.IP_PMTUDISC_PROBE
	if f == v6 {
		name, level, option, value = "IPV6_MTU_DISCOVER", unix.SOL_IPV6, unix.IPV6_MTU_DISCOVER, unix.IPV6_PMTUDISC_PROBE
	}
	// An emulated kernel may lack it, as with the pool's sockets.
	if err := unix.SetsockoptInt(fd, level, option, value); err != nil && err != unix.ENOPROTOOPT {
		return os.NewSyscallError(name, err)
	}
	return nil
}

// SendControl takes its memory from a pool: several goroutines may be in it.
func (c *conn) SendControl(dst netip.AddrPort, d []byte) error {
	err := c.sendControl(unmap(dst), d)
	if err != nil {
		c.stats.TxControlError.Add(1)
		return err
	}
	c.stats.TxControl.Add(1)
	return nil
}

func (c *conn) sendControl(dst netip.AddrPort, d []byte) error {
	i := 0
	for i < len(c.local) && (!dst.IsValid() || familyOf(c.local[i].Addr()) != familyOf(dst.Addr())) {
		i++
	}
	if i == len(c.local) {
		return unix.EAFNOSUPPORT
	}
	source := netip.Addr{}
	if c.local[i].Addr().IsUnspecified() {
		source = *c.source.Load()
	}
	m := c.control.Get().(*controlMessage)
	m.set(dst, source, d)
	err := c.receivers[i].file.Control(m.call)
	if err == nil && m.hdr.Control != nil && (m.errno == unix.ENETUNREACH || m.errno == unix.EINVAL) {
		// The kernel's words, in IPv4 and in IPv6, for a source that is not this
		// host's address: it went, or is not there yet (DHCP). From another one
		// the datagram still arrives.
		m.hdr.Control = nil
		m.hdr.SetControllen(0)
		err = c.receivers[i].file.Control(m.call)
	}
	errno := m.errno
	m.iov.Base = nil // d is borrowed
	c.control.Put(m)
	switch {
	case err != nil:
		return ErrClosed
	case errno != 0:
		return errno
	}
	return nil
}

// controlMessage is the memory of one SendControl; it is pooled because a
// closure cannot take arguments without allocating.
type controlMessage struct {
	hdr   unix.Msghdr
	iov   unix.Iovec
	name  unix.RawSockaddrInet6
	ctl   [txControl / 8]uint64 // of words: aligned for cmsghdr
	errno unix.Errno
	call  func(fd uintptr)
}

func newControlMessage() *controlMessage {
	m := &controlMessage{}
	m.hdr.Name = (*byte)(unsafe.Pointer(&m.name))
	m.hdr.Iov = &m.iov
	m.hdr.SetIovlen(1)
	m.call = func(fd uintptr) {
		for {
			// Raw: MSG_DONTWAIT cannot block, so the scheduler need not know.
			_, _, m.errno = unix.RawSyscall(unix.SYS_SENDMSG, fd, uintptr(unsafe.Pointer(&m.hdr)), unix.MSG_DONTWAIT)
			if m.errno != unix.EINTR {
				return
			}
		}
	}
	return m
}

// set prepares call: d to dst from source, which may be of the other family or
// zero, and then is the kernel's choice.
func (m *controlMessage) set(dst netip.AddrPort, source netip.Addr, d []byte) {
	m.iov.Base = unsafe.SliceData(d)
	m.iov.SetLen(len(d))
	m.hdr.Namelen = putSockaddr(&m.name, dst, scopeOf(dst.Addr().Zone()))
	m.hdr.Control = nil
	used := 0
	if source.IsValid() && familyOf(source) == familyOf(dst.Addr()) {
		b := unsafe.Slice((*byte)(unsafe.Pointer(&m.ctl)), txControl)
		used = putSource(b, source)
		m.hdr.Control = &b[0]
	}
	m.hdr.SetControllen(used)
}

// putSource writes the control message IP_PKTINFO or IPV6_PKTINFO (RFC 3542,
// section 6.2) to b, which is aligned for cmsghdr, and returns the space that it
// takes. The device is left to the route, but for a link-local source, which
// means nothing without its own.
func putSource(b []byte, source netip.Addr) int {
	if source.Is4() {
		info := (*unix.Inet4Pktinfo)(unsafe.Pointer(&putCmsg(b, unix.SOL_IP, unix.IP_PKTINFO, unix.SizeofInet4Pktinfo)[0]))
		*info = unix.Inet4Pktinfo{Spec_dst: source.As4()}
		return unix.CmsgSpace(unix.SizeofInet4Pktinfo)
	}
	info := (*unix.Inet6Pktinfo)(unsafe.Pointer(&putCmsg(b, unix.SOL_IPV6, unix.IPV6_PKTINFO, unix.SizeofInet6Pktinfo)[0]))
	*info = unix.Inet6Pktinfo{Addr: source.As16(), Ifindex: scopeOf(source.Zone())}
	return unix.CmsgSpace(unix.SizeofInet6Pktinfo)
}
