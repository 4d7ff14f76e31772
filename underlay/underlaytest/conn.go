package underlaytest

import (
	"fmt"
	"net/netip"
	"sync"
	"syscall"
	"time"

	"github.com/tulle-net/tulle/underlay"
)

// Conn is an underlay.Conn of a Net.
type Conn struct {
	net      *Net
	addr     netip.AddrPort     // guarded by net.mu
	basePort uint16             // first of its source ports
	groups   map[netip.Addr]int // joins of each, guarded by net.mu
	rebinds  int                // guarded by net.mu
	stats    underlay.Stats
	bell     chan struct{} // capacity 1: the queue is not empty
	done     chan struct{} // closed by Close
	once     sync.Once

	mu    sync.Mutex
	queue []received
}

type received struct {
	src netip.AddrPort
	b   []byte
}

var (
	_ underlay.Conn     = (*Conn)(nil)
	_ underlay.Sender   = (*sender)(nil)
	_ underlay.Receiver = (*receiver)(nil)
)

func (c *Conn) Receivers() []underlay.Receiver { return []underlay.Receiver{&receiver{c}} }
func (c *Conn) NewSender() underlay.Sender     { return &sender{c: c} }
func (c *Conn) Stats() *underlay.Stats         { return &c.stats }

// LocalAddrs returns the one address that the Conn has now: see SetSource.
func (c *Conn) LocalAddrs() []netip.AddrPort {
	c.net.mu.Lock()
	defer c.net.mu.Unlock()
	return []netip.AddrPort{c.addr}
}

// SendControl sends from the address that the Conn listens on.
func (c *Conn) SendControl(dst netip.AddrPort, d []byte) error {
	err := c.sendControl(netip.AddrPortFrom(dst.Addr().Unmap(), dst.Port()), d)
	if err != nil {
		c.stats.TxControlError.Add(1)
		return err
	}
	c.stats.TxControl.Add(1)
	return nil
}

func (c *Conn) sendControl(dst netip.AddrPort, d []byte) error {
	if c.closed() {
		return underlay.ErrClosed
	}
	c.net.mu.Lock()
	defer c.net.mu.Unlock()
	if !dst.IsValid() || dst.Addr().Is4() != c.addr.Addr().Is4() {
		return syscall.EAFNOSUPPORT
	}
	if len(d) > underlay.MaxSend || !c.net.send(c, c.addr, dst, d) {
		return syscall.EMSGSIZE
	}
	return nil
}

// NoteLoss does nothing: there are no trains here to be lost as such.
func (c *Conn) NoteLoss(peer string, sent, lost uint64) {}

// SetOffload does nothing: trains stay on.
func (c *Conn) SetOffload(noGSO, noGRO bool) error { return nil }

// Offloads says "on": trains are merged on the way in as the kernel does.
func (c *Conn) Offloads() underlay.Offloads {
	return underlay.Offloads{GSO: "on", GRO: "on", ReceiveBuffer: MaxQueue, SendBuffer: MaxQueue}
}

func (c *Conn) JoinGroup(group netip.Addr) error {
	if !group.IsMulticast() {
		return fmt.Errorf("underlaytest: join group %s: not a multicast address", group)
	}
	c.net.mu.Lock()
	defer c.net.mu.Unlock()
	c.groups[group.Unmap()]++
	return nil
}

func (c *Conn) LeaveGroup(group netip.Addr) error {
	c.net.mu.Lock()
	defer c.net.mu.Unlock()
	switch c.groups[group.Unmap()] {
	case 0:
		return fmt.Errorf("underlaytest: leave group %s: not joined", group)
	case 1:
		delete(c.groups, group.Unmap())
	default:
		c.groups[group.Unmap()]--
	}
	return nil
}

// Rebind has no devices to look at: it is counted.
func (c *Conn) Rebind() error {
	if c.closed() {
		return underlay.ErrClosed
	}
	c.net.mu.Lock()
	defer c.net.mu.Unlock()
	c.rebinds++
	return nil
}

// SetSource moves the Conn, with its port, to an address that the host has got
// in place of its old one: what is on the way to that is lost, and another Conn
// may have it. It fails if another Conn is at the new one. It counts as a Rebind.
func (c *Conn) SetSource(source netip.Addr) error {
	if c.closed() {
		return underlay.ErrClosed
	}
	if !source.IsValid() {
		return c.Rebind() // the kernel's choice is the one address that there is
	}
	source = source.Unmap()
	if source.IsUnspecified() || source.IsMulticast() {
		return fmt.Errorf("underlaytest: source %s is no address of a host", source)
	}
	c.net.mu.Lock()
	defer c.net.mu.Unlock()
	at := netip.AddrPortFrom(source, c.addr.Port())
	if other := c.net.conns[at]; other != nil && other != c {
		return fmt.Errorf("underlaytest: address %s is in use", at)
	}
	delete(c.net.conns, c.addr)
	c.addr = at
	c.net.conns[at] = c
	c.rebinds++
	return nil
}

// Rebinds returns how often Rebind and SetSource were called.
func (c *Conn) Rebinds() int {
	c.net.mu.Lock()
	defer c.net.mu.Unlock()
	return c.rebinds
}

// PathMTU returns the MTU of the link to dst.
func (c *Conn) PathMTU(dst netip.Addr) (int, error) {
	c.net.mu.Lock()
	defer c.net.mu.Unlock()
	return c.net.mtu(c.addr.Addr(), dst.Unmap()), nil
}

// Close makes room for another Conn at the same address.
func (c *Conn) Close() error {
	c.once.Do(func() {
		c.net.mu.Lock()
		delete(c.net.conns, c.addr)
		c.net.mu.Unlock()
		close(c.done)
	})
	return nil
}

// push queues b, which is owned; false: the queue is full.
func (c *Conn) push(src netip.AddrPort, b []byte) bool {
	c.mu.Lock()
	full := len(c.queue) >= MaxQueue
	if !full {
		c.queue = append(c.queue, received{src, b})
	}
	c.mu.Unlock()
	if full {
		c.stats.RxOverflow.Add(1)
		return false
	}
	c.ring()
	return true
}

func (c *Conn) ring() {
	select {
	case c.bell <- struct{}{}:
	default:
	}
}

func (c *Conn) closed() bool {
	select {
	case <-c.done:
		return true
	default:
		return false
	}
}

// receiver is the one Receiver of a Conn.
type receiver struct{ c *Conn }

func (r *receiver) Wait() error {
	if r.c.closed() {
		return underlay.ErrClosed
	}
	select {
	case <-r.c.bell:
		return nil
	case <-r.c.done:
		return underlay.ErrClosed
	}
}

// Rest returns at once: in no time nothing gathers.
func (r *receiver) Rest(time.Duration) {}

const (
	maxSlots = 32
)

// memory is Batch.Memory: the slots' bytes.
type memory struct{ bufs [maxSlots][]byte }

func (r *receiver) Receive(b *underlay.Batch) error {
	b.Slots = b.Slots[:0]
	if r.c.closed() {
		return underlay.ErrClosed
	}
	m, ok := b.Memory.(*memory)
	if !ok {
		m = &memory{}
		b.Memory = m
	}
	r.c.mu.Lock()
	defer r.c.mu.Unlock()
	taken := 0
	for taken < len(r.c.queue) && len(b.Slots) < maxSlots {
		i := len(b.Slots)
		n := train(r.c.queue[taken:])
		m.bufs[i] = m.bufs[i][:0]
		for _, d := range r.c.queue[taken : taken+n] {
			m.bufs[i] = append(m.bufs[i], d.b...)
		}
		s := underlay.Slot{Src: r.c.queue[taken].src, B: m.bufs[i]}
		if n > 1 {
			s.SegmentLen = len(r.c.queue[taken].b)
		}
		b.Slots = append(b.Slots, s)
		taken += n
		r.c.stats.RxDatagrams.Add(uint64(n))
		r.c.stats.RxBytes.Add(uint64(len(s.B)))
	}
	if taken == 0 {
		return nil
	}
	clear(r.c.queue[:taken]) // their bytes may go
	r.c.queue = r.c.queue[taken:]
	r.c.stats.RxCalls.Add(1)
	r.c.stats.RxSlots.Add(uint64(len(b.Slots)))
	if len(r.c.queue) > 0 {
		r.c.ring()
	}
	return nil
}

// train returns how many datagrams at the head of q the kernel's UDP_GRO would
// merge: one source, one size, the last may be shorter.
func train(q []received) int {
	size, bytes := len(q[0].b), len(q[0].b)
	for n := 1; n < len(q); n++ {
		d := len(q[n].b)
		if q[n].src != q[0].src || d > size || d == 0 || bytes+d > underlay.MaxSend {
			return n
		}
		bytes += d
		if d < size {
			return n + 1
		}
	}
	return len(q)
}

// arenaLen and maxDatagrams bound what one Flush sends, as with real sockets.
const (
	arenaLen     = 256 << 10
	maxDatagrams = 512
)

// sender is a Sender of a Conn; it sends in Flush.
type sender struct {
	c        *Conn
	arena    []byte
	used     int
	reserved int
	queue    []queued
}

type queued struct {
	dst      netip.AddrPort
	flow     uint32
	off, end int
}

func (s *sender) Reserve(n int) []byte {
	if n < 1 || n > underlay.MaxSend {
		panic("underlaytest: Reserve: length is not 1 to 65507")
	}
	if s.arena == nil {
		s.arena = make([]byte, arenaLen)
	}
	if s.used+n > len(s.arena) {
		s.Flush()
	}
	s.reserved = n
	return s.arena[s.used : s.used+n : s.used+n]
}

func (s *sender) Commit(dst netip.AddrPort, flow uint32, n int) {
	if n < 1 || n > s.reserved {
		panic("underlaytest: Commit: more or less than was reserved")
	}
	s.reserved = 0
	dst = netip.AddrPortFrom(dst.Addr().Unmap(), dst.Port())
	s.queue = append(s.queue, queued{dst, flow, s.used, s.used + n})
	s.used += n
	if len(s.queue) == maxDatagrams {
		s.Flush()
	}
}

func (s *sender) Flush() {
	s.reserved = 0
	if len(s.queue) == 0 {
		return
	}
	c, st := s.c, &s.c.stats
	if !c.closed() {
		c.net.mu.Lock()
		for _, q := range s.queue {
			b := s.arena[q.off:q.end]
			src := netip.AddrPortFrom(c.addr.Addr(), c.basePort+uint16(q.flow%SourcePorts))
			switch {
			case !q.dst.IsValid() || q.dst.Addr().Is4() != src.Addr().Is4():
				st.TxUnreachable.Add(1) // no address of its family
			case !c.net.send(c, src, q.dst, b):
				st.TxTooBig.Add(1)
			default:
				st.TxDatagrams.Add(1)
				st.TxBytes.Add(uint64(len(b)))
				st.TxTrains.Add(1)
			}
		}
		c.net.mu.Unlock()
		st.TxCalls.Add(1)
	}
	clear(s.arena[:s.used]) // who keeps a slice that is no longer valid shall see it
	s.used, s.queue = 0, s.queue[:0]
}
