package underlay

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// pool is the sockets of one family that datagrams leave from: one for each
// source port, so that routers and hosts on the way can spread flows (RFC 7348,
// section 5).
type pool struct {
	fds []int
}

const (
	// The dynamic range that RFC 7348, section 5, recommends.
	minSourcePort = 49152
	maxSourcePort = 65535
	// bindTries bounds the search for a free port.
	bindTries = 128
	// poolRetry is how long after a failure another try is made.
	poolRetry = time.Second
)

// pool returns the sockets of f, which it makes when they are first needed. The
// caller holds c.closing for reading.
func (c *conn) pool(f family) (*pool, error) {
	if p := c.pools[f].Load(); p != nil {
		return p, nil
	}
	c.making.Lock()
	defer c.making.Unlock()
	if p := c.pools[f].Load(); p != nil {
		return p, nil
	}
	now := time.Now()
	if now.Before(c.retryAt[f]) {
		return nil, errPoolFailed
	}
	p, err := newPool(c.cfg, *c.source.Load(), f)
	if err != nil {
		if c.retryAt[f].IsZero() {
			c.cfg.Log.Warn("cannot send to one address family", "err", err)
		}
		c.retryAt[f] = now.Add(poolRetry)
		return nil, err
	}
	c.pools[f].Store(p)
	return p, nil
}

// errPoolFailed: a moment ago it did not work.
var errPoolFailed = errors.New("underlay: no source ports")

// newPool makes sockets that leave from wanted, if that is of family f.
func newPool(cfg Config, wanted netip.Addr, f family) (*pool, error) {
	p := &pool{fds: make([]int, 0, cfg.SourcePorts)}
	source := f.unspecified()
	if wanted.IsValid() && familyOf(wanted) == f {
		source = wanted
	}
	ifindex := indexOf(wanted)
	for range cfg.SourcePorts {
		fd, err := poolSocket(f, cfg.SendBuffer, ifindex)
		if err != nil {
			p.close()
			return nil, fmt.Errorf("underlay: make source port: %w", err)
		}
		p.fds = append(p.fds, fd)
		err = bindAny(fd, source)
		if errors.Is(err, unix.EADDRNOTAVAIL) && !source.IsUnspecified() {
			// No longer an address of this host, or not yet (DHCP): what leaves
			// from another one still arrives, and Rebind puts it right.
			source = f.unspecified()
			err = bindAny(fd, source)
		}
		if err != nil {
			p.close()
			return nil, fmt.Errorf("underlay: bind a source port in %d to %d of %s: %w", minSourcePort, maxSourcePort, source, err)
		}
	}
	return p, nil
}

func (p *pool) close() {
	for _, fd := range p.fds {
		unix.Close(fd)
	}
}

// bindAny binds fd to a random free port.
func bindAny(fd int, source netip.Addr) error {
	var err error
	for range bindTries {
		at := netip.AddrPortFrom(source, uint16(minSourcePort+rand.IntN(maxSourcePort-minSourcePort+1)))
		if err = unix.Bind(fd, sockaddr(at)); !errors.Is(err, unix.EADDRINUSE) {
			break
		}
	}
	return os.NewSyscallError("bind", err)
}

// poolSocket returns a socket that can only send.
func poolSocket(f family, buffer, ifindex int) (int, error) {
	fd, err := udpSocket(f)
	if err != nil {
		return -1, err
	}
	ok := false
	defer func() {
		if !ok {
			unix.Close(fd)
		}
	}()
	// Before the bind: nobody reads here, so nothing may ever be queued.
	if err = dropAll(fd); err != nil {
		return -1, err
	}
	setBuffer(fd, unix.SO_SNDBUFFORCE, unix.SO_SNDBUF, buffer)
	type option struct {
		name             string
		level, opt, want int
	}
	options := []option{
		// VTEPs must not fragment (RFC 7348, section 4.3).
		{"IP_MTU_DISCOVER", unix.SOL_IP, unix.IP_MTU_DISCOVER, unix.IP_PMTUDISC_DO},
		{"IP_RECVERR", unix.SOL_IP, unix.IP_RECVERR, 1},
		{"IP_MULTICAST_LOOP", unix.SOL_IP, unix.IP_MULTICAST_LOOP, 0},
	}
	if f == v6 {
		options = []option{
			{"IPV6_V6ONLY", unix.SOL_IPV6, unix.IPV6_V6ONLY, 1},
			{"IPV6_MTU_DISCOVER", unix.SOL_IPV6, unix.IPV6_MTU_DISCOVER, unix.IPV6_PMTUDISC_DO},
			{"IPV6_RECVERR", unix.SOL_IPV6, unix.IPV6_RECVERR, 1},
			{"IPV6_MULTICAST_LOOP", unix.SOL_IPV6, unix.IPV6_MULTICAST_LOOP, 0},
			{"IPV6_MULTICAST_IF", unix.SOL_IPV6, unix.IPV6_MULTICAST_IF, ifindex},
		}
	}
	for _, o := range options {
		// Every kernel has all of them; an emulated one may lack some, and
		// sends to single hosts without them.
		if err = unix.SetsockoptInt(fd, o.level, o.opt, o.want); err != nil && err != unix.ENOPROTOOPT {
			return -1, os.NewSyscallError(o.name, err)
		}
	}
	if f == v4 && ifindex != 0 {
		err = unix.SetsockoptIPMreqn(fd, unix.SOL_IP, unix.IP_MULTICAST_IF, &unix.IPMreqn{Ifindex: int32(ifindex)})
		if err != nil && err != unix.ENOPROTOOPT {
			return -1, os.NewSyscallError("IP_MULTICAST_IF", err)
		}
	}
	ok = true
	return fd, nil
}

// dropAll makes fd accept no datagram: a filter of one instruction that keeps
// 0 bytes.
func dropAll(fd int) error {
	drop := unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: 0}
	prog := unix.SockFprog{Len: 1, Filter: &drop}
	return os.NewSyscallError("SO_ATTACH_FILTER", unix.SetsockoptSockFprog(fd, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, &prog))
}

// drain empties fd's error queue and returns how many of its entries are ICMP
// errors (RFC 792, RFC 4443), and of these how many say that a datagram was too
// big. Errors that this host made itself are in the queue too.
func (e *errorReader) drain(fd int) (icmp, tooBig int) {
	for range maxDrain {
		e.hdr = unix.Msghdr{Control: (*byte)(unsafe.Pointer(&e.ctl))}
		e.hdr.SetControllen(len(e.ctl) * 8)
		_, _, errno := unix.RawSyscall(unix.SYS_RECVMSG, uintptr(fd), uintptr(unsafe.Pointer(&e.hdr)), unix.MSG_ERRQUEUE|unix.MSG_DONTWAIT)
		if errno != 0 {
			break
		}
		h := (*unix.Cmsghdr)(unsafe.Pointer(&e.ctl))
		if int(e.hdr.Controllen) < unix.CmsgLen(int(unsafe.Sizeof(unix.SockExtendedErr{}))) ||
			!(h.Level == unix.SOL_IP && h.Type == unix.IP_RECVERR || h.Level == unix.SOL_IPV6 && h.Type == unix.IPV6_RECVERR) {
			continue
		}
		ee := (*unix.SockExtendedErr)(unsafe.Pointer(uintptr(unsafe.Pointer(&e.ctl)) + uintptr(unix.CmsgLen(0))))
		if ee.Origin == unix.SO_EE_ORIGIN_ICMP || ee.Origin == unix.SO_EE_ORIGIN_ICMP6 {
			icmp++
			if ee.Errno == uint32(unix.EMSGSIZE) {
				tooBig++
			}
		}
	}
	return icmp, tooBig
}

// maxDrain bounds one drain: senders of ICMP errors are not to be trusted.
const maxDrain = 64

// errorReader is the memory of drain.
type errorReader struct {
	hdr unix.Msghdr
	ctl [16]uint64 // of words: aligned for cmsghdr
}
