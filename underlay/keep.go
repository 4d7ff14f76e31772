package underlay

import (
	"errors"
	"net/netip"
	"os"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/tulle-net/tulle/internal/ready"
)

// The functions in this file are about sockets that outlast the process that made them.

// Handed are sockets that another process made for the same Config, and handed over.
// Open takes them over and closes those that are of no use.
type Handed struct {
	// Listening ones keep what waits in them, and the port, also one that the kernel
	// chose.
	Listening []*os.File
	// Pools of IPv4 and IPv6, in order: a flow keeps its source port.
	Pools [2][]*os.File
}

// Lasting is a Conn whose sockets can outlast it: Open's.
type Lasting interface {
	Conn
	// Descriptors returns duplicates, the caller's to close: while they are open, the
	// ports are this host's, and what arrives waits.
	Descriptors() (Handed, error)
}

var _ Lasting = (*conn)(nil)

func (c *conn) Descriptors() (h Handed, err error) {
	c.closing.RLock()
	defer c.closing.RUnlock()
	if c.closed {
		return h, ErrClosed
	}
	defer func() {
		if err != nil {
			h.close()
			h = Handed{}
		}
	}()
	for _, r := range c.receivers {
		var f *os.File
		if e := r.file.Control(func(fd uintptr) { f, err = duplicate(int(fd)) }); e != nil || err != nil {
			return h, errors.Join(e, err)
		}
		h.Listening = append(h.Listening, f)
	}
	for i := range c.pools {
		p := c.pools[i].Load()
		if p == nil {
			continue
		}
		for _, fd := range p.fds {
			f, err := duplicate(fd)
			if err != nil {
				return h, err
			}
			h.Pools[i] = append(h.Pools[i], f)
		}
	}
	return h, nil
}

func duplicate(fd int) (*os.File, error) {
	copied, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 3)
	if err != nil {
		return nil, os.NewSyscallError("dup", err)
	}
	return os.NewFile(uintptr(copied), "udp"), nil
}

func (h Handed) close() {
	for _, f := range slices.Concat(h.Listening, h.Pools[v4], h.Pools[v6]) {
		_ = f.Close()
	}
}

// handed returns a listening socket that is bound to at, or -1, and has it do what the
// settings of now say.
func (c *conn) handed(at netip.AddrPort) int {
	for i, f := range c.cfg.Handed.Listening {
		if f == nil {
			continue
		}
		fd := int(f.Fd())
		local, err := localAddr(fd)
		if err != nil || local.Addr() != at.Addr() || at.Port() != 0 && local.Port() != at.Port() || !isUDP(fd) {
			continue
		}
		copied, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 3)
		if err != nil {
			continue
		}
		_ = f.Close()
		c.cfg.Handed.Listening[i] = nil
		setBuffer(copied, unix.SO_RCVBUFFORCE, unix.SO_RCVBUF, c.cfg.ReceiveBuffer)
		setBuffer(copied, unix.SO_SNDBUFFORCE, unix.SO_SNDBUF, c.cfg.SendBuffer)
		on := 0
		if *c.groState.Load() == stateOn {
			on = 1
		}
		_ = unix.SetsockoptInt(copied, unix.SOL_UDP, unix.UDP_GRO, on) // off is refused where there is none
		return copied
	}
	return -1
}

func isUDP(fd int) bool {
	kind, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_TYPE)
	proto, err2 := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_PROTOCOL)
	return err == nil && err2 == nil && kind == unix.SOCK_DGRAM && proto == unix.IPPROTO_UDP
}

// takePools uses the source ports that were handed over, a family's all or none.
func (c *conn) takePools() {
	for f, files := range c.cfg.Handed.Pools {
		p := c.poolOf(family(f), files)
		if p != nil {
			c.pools[f].Store(p)
		}
	}
}

func (c *conn) poolOf(f family, files []*os.File) *pool {
	if len(files) != c.cfg.SourcePorts {
		return nil
	}
	source := f.unspecified()
	if s := *c.source.Load(); s.IsValid() && familyOf(s) == f {
		source = s
	}
	p := &pool{}
	for _, file := range files {
		local, err := localAddr(int(file.Fd()))
		fd := -1
		if err == nil && local.Addr() == source && isUDP(int(file.Fd())) {
			fd, err = unix.FcntlInt(file.Fd(), unix.F_DUPFD_CLOEXEC, 3)
		}
		if err != nil || fd < 0 {
			p.close()
			return nil
		}
		p.fds = append(p.fds, fd)
	}
	return p
}

// closeHanded closes what was handed over and not taken.
func (c *conn) closeHanded() {
	h := c.cfg.Handed
	h.Listening = slices.DeleteFunc(slices.Clone(h.Listening), func(f *os.File) bool { return f == nil })
	h.close()
	c.cfg.Handed = Handed{}
}

// rejoin is join where the socket is in the group since before it was handed over: its
// membership may be of a device that is no more.
func (m *membership) rejoin(file *ready.File, group netip.Addr, ifindex int) (err error) {
	if e := file.Control(func(fd uintptr) {
		_ = setMembership(int(fd), group, ifindex, false)
		err = setMembership(int(fd), group, ifindex, true)
		if errors.Is(err, unix.EADDRINUSE) {
			err = nil // by another device's number: it is in
		}
	}); e != nil {
		return ErrClosed
	}
	return err
}
