package underlay

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tulle-net/tulle/internal/ready"
)

// conn is the Conn over the kernel's sockets.
type conn struct {
	cfg       Config // but for Source: see source
	stats     Stats
	source    atomic.Pointer[netip.Addr] // Config.Source, or what SetSource gave
	receivers []*receiver
	local     []netip.AddrPort

	// closing is held for reading while a Sender uses the pools' descriptors:
	// they are bare, because the runtime's poller would be woken for every
	// datagram that leaves a socket.
	closing sync.RWMutex
	closed  bool
	pools   [2]atomic.Pointer[pool] // by family
	making  sync.Mutex
	retryAt [2]time.Time // when making a pool may be tried again; guarded by making

	joining sync.Mutex // held for a change of groups or of source
	groups  map[netip.Addr]*membership

	control sync.Pool // of *controlMessage

	loss        lossWatch
	gso         atomic.Bool
	gsoState    atomic.Pointer[string]
	groState    atomic.Pointer[string]
	tested      offloads // what the self-test found, switches left aside
	maxSegments int      // of one train
	rcvBuf      int      // granted
	sndBuf      int
}

var _ Conn = (*conn)(nil)

// Open listens for datagrams and tests the offloads. The sockets, also the ones
// that are made on the first send, belong to the network namespace of the
// thread that makes them. IPv6 datagrams with a zero UDP checksum are refused,
// IPv4 ones accepted: the kernel's defaults (RFC 7348, section 5; RFC 6935).
func Open(cfg Config) (Conn, error) {
	handed := cfg.Handed
	cfg, err := cfg.validated()
	if err != nil {
		handed.close()
		return nil, err
	}
	c := &conn{cfg: cfg, maxSegments: minMaxSegments, groups: map[netip.Addr]*membership{}}
	c.source.Store(&cfg.Source)
	c.control.New = func() any { return newControlMessage() }
	c.tested = testOffloads(cfg)
	c.sndBuf = c.tested.sndBuf
	if c.tested.longTrains {
		c.maxSegments = longMaxSegments
	}
	defer c.closeHanded()
	if err := c.SetOffload(cfg.NoGSO, cfg.NoGRO); err != nil {
		return nil, err
	}
	c.takePools()
	if err := c.listen(); err != nil {
		c.Close()
		return nil, err
	}
	return c, nil
}

// listen opens the listening sockets.
func (c *conn) listen() error {
	at := c.cfg.Listen
	if at.Addr() != netip.IPv6Unspecified() {
		return c.listenOn(at)
	}
	// With port 0 the kernel chooses for IPv4 what IPv6 may have in use.
	var err error
	for range 8 {
		if err = c.listenOn(netip.AddrPortFrom(netip.IPv4Unspecified(), at.Port())); err != nil {
			return err
		}
		err = c.listenOn(netip.AddrPortFrom(netip.IPv6Unspecified(), c.local[0].Port()))
		if err == nil || noFamily(err) {
			return nil
		}
		if at.Port() != 0 || !errors.Is(err, unix.EADDRINUSE) {
			return err
		}
		c.receivers[0].file.Close()
		c.receivers, c.local = nil, nil
	}
	return err
}

// noFamily reports whether err says that this host has no IPv6.
func noFamily(err error) bool {
	return errors.Is(err, unix.EAFNOSUPPORT) || errors.Is(err, unix.EADDRNOTAVAIL)
}

// listenOn adds one listening socket.
func (c *conn) listenOn(at netip.AddrPort) error {
	fd, err := c.handed(at), error(nil)
	if fd < 0 {
		fd, err = listenSocket(at, c.cfg.ReceiveBuffer, c.cfg.SendBuffer, *c.groState.Load() == stateOn)
	}
	if err != nil {
		return listenError(at, err)
	}
	c.rcvBuf = granted(fd, unix.SO_RCVBUF)
	local, err := localAddr(fd)
	if err != nil {
		unix.Close(fd)
		return listenError(at, err)
	}
	file, err := ready.New(fd, "udp:"+local.String()) // closes fd on error
	if err != nil {
		return listenError(at, err)
	}
	c.receivers = append(c.receivers, newReceiver(c, file))
	c.local = append(c.local, local)
	return nil
}

func listenSocket(at netip.AddrPort, rcvBuf, sndBuf int, gro bool) (fd int, err error) {
	f := familyOf(at.Addr())
	fd, err = udpSocket(f)
	if err != nil {
		return -1, err
	}
	defer func() {
		if err != nil {
			unix.Close(fd)
		}
	}()
	if f == v6 {
		if err = unix.SetsockoptInt(fd, unix.SOL_IPV6, unix.IPV6_V6ONLY, 1); err != nil {
			return -1, os.NewSyscallError("IPV6_V6ONLY", err)
		}
	}
	// Only groups that this socket joined. Without the option (IPv6 before
	// Linux 4.20, emulated kernels) also those that others on this host joined:
	// the bridge knows its own.
	_ = unix.SetsockoptInt(fd, unix.SOL_IP, unix.IP_MULTICAST_ALL, 0)
	if f == v6 {
		_ = unix.SetsockoptInt(fd, unix.SOL_IPV6, unix.IPV6_MULTICAST_ALL, 0)
	}
	if err = neverFragment(fd, f); err != nil {
		return -1, err
	}
	setBuffer(fd, unix.SO_RCVBUFFORCE, unix.SO_RCVBUF, rcvBuf)
	setBuffer(fd, unix.SO_SNDBUFFORCE, unix.SO_SNDBUF, sndBuf)
	// Without it (emulated kernels) RxOverflow stays 0.
	_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RXQ_OVFL, 1)
	if gro {
		if err = unix.SetsockoptInt(fd, unix.SOL_UDP, unix.UDP_GRO, 1); err != nil {
			return -1, os.NewSyscallError("UDP_GRO", err)
		}
	}
	if err = unix.Bind(fd, sockaddr(at)); err != nil {
		return -1, os.NewSyscallError("bind", err)
	}
	return fd, nil
}

// listenError says what to do about err.
func listenError(at netip.AddrPort, err error) error {
	switch {
	case errors.Is(err, unix.EADDRINUSE) && at.Port() == 4789:
		culprit := "most likely a kernel vxlan device that is up, or Docker Swarm"
		if names := devicesOf("vxlan"); len(names) > 0 {
			culprit = "most likely the kernel vxlan device " + strings.Join(names, ", ") + " that is up, or Docker Swarm"
		}
		return fmt.Errorf("underlay: UDP port 4789 of %s is in use, %s: remove it, or choose another port with --listen [::]:4790 "+
			"(nodes may use different ports; only foreign VTEPs must be told): %w", at.Addr(), culprit, err)
	case errors.Is(err, unix.EADDRINUSE):
		return fmt.Errorf("underlay: UDP port %d of %s is in use by another program: choose another with --listen [::]:PORT: %w", at.Port(), at.Addr(), err)
	case errors.Is(err, unix.EADDRNOTAVAIL):
		return fmt.Errorf("underlay: listen on %s: this host does not have the address; --listen [::]:%d listens on all: %w", at, at.Port(), err)
	case errors.Is(err, unix.EACCES):
		return fmt.Errorf("underlay: listen on %s: not permitted; a port below 1024 needs CAP_NET_BIND_SERVICE: %w", at, err)
	}
	return fmt.Errorf("underlay: listen on %s: %w", at, err)
}

// udpSocket returns a non-blocking socket.
func udpSocket(f family) (int, error) {
	fd, err := unix.Socket(f.domain(), unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	return fd, os.NewSyscallError("socket", err)
}

// setBuffer asks for n bytes, beyond the host's limit where that is allowed.
// What was granted is told by granted: too little is not an error.
func setBuffer(fd, force, plain, n int) {
	if unix.SetsockoptInt(fd, unix.SOL_SOCKET, force, n) != nil {
		_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, plain, n)
	}
}

// granted returns a buffer's size: the kernel tells it doubled (socket(7)).
func granted(fd, option int) int {
	n, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, option)
	if err != nil {
		return 0
	}
	return n / 2
}

func (c *conn) Receivers() []Receiver {
	rs := make([]Receiver, len(c.receivers))
	for i, r := range c.receivers {
		rs[i] = r
	}
	return rs
}

func (c *conn) LocalAddrs() []netip.AddrPort { return append([]netip.AddrPort(nil), c.local...) }
func (c *conn) Stats() *Stats                { return &c.stats }
func (c *conn) NewSender() Sender            { return newSender(c) }

func (c *conn) Offloads() Offloads {
	return Offloads{GSO: *c.gsoState.Load(), GRO: *c.groState.Load(), ReceiveBuffer: c.rcvBuf, SendBuffer: c.sndBuf}
}

func (c *conn) SetOffload(noGSO, noGRO bool) error {
	gso, gro := c.tested.gso, c.tested.gro
	if noGSO {
		gso = stateOff
	}
	if noGRO {
		gro = stateOff
	}
	on := 0
	if gro == stateOn {
		on = 1
	}
	for _, r := range c.receivers {
		var err error
		if e := r.file.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_UDP, unix.UDP_GRO, on) }); e != nil {
			return ErrClosed
		}
		if err != nil && on == 1 { // off is refused only by a kernel that has none
			return fmt.Errorf("underlay: UDP_GRO: %w", err)
		}
	}
	c.setGSO(gso)
	c.groState.Store(&gro)
	return nil
}

// setGSO takes "on", "off" or the reason why there are no trains.
func (c *conn) setGSO(state string) {
	c.gsoState.Store(&state)
	c.gso.Store(state == stateOn)
}

func (c *conn) Close() error {
	c.closing.Lock()
	defer c.closing.Unlock()
	if c.closed {
		return nil
	}
	c.closed = true
	var errs []error
	for _, r := range c.receivers {
		errs = append(errs, r.file.Close())
	}
	for f := range c.pools {
		if p := c.pools[f].Load(); p != nil {
			p.close()
		}
	}
	return errors.Join(errs...)
}
