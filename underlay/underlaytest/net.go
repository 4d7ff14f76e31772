// Package underlaytest is an underlay in memory, for several nodes in one test.
//
// A Net carries datagrams between its Conns and can lose, duplicate, delay and
// reorder them, all decided by its seed. It makes no system calls and starts no
// goroutines, so it works in a testing/synctest bubble.
package underlaytest

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"sync"

	"github.com/tulle-net/tulle/underlay"
)

const (
	// MaxQueue is how many datagrams wait in a Conn; more are dropped and
	// counted in RxOverflow.
	MaxQueue = 65536
	// MaxHeld is how many datagrams a Net holds back for delay and reordering
	// on one link; more go out in order.
	MaxHeld = 65536
	// DefaultMTU of a link, in bytes.
	DefaultMTU = 1500
	// SourcePorts is the number of source ports of a Conn.
	SourcePorts = 16
)

// Link is how datagrams fare from one address to another. The zero Link
// delivers each at once.
type Link struct {
	// Loss, Duplicate and Reorder are probabilities, 0 to 1. A datagram that is
	// reordered is delivered behind the next one of its link, or by Step.
	Loss, Duplicate, Reorder float64
	// Delay is how many calls of Step a datagram waits for; 0: none.
	Delay int
	// MTU in bytes of an IP packet without options; 0: DefaultMTU.
	MTU int
}

// Datagram is what a tap sees. B is borrowed until the tap returns.
type Datagram struct {
	Src, Dst netip.AddrPort
	B        []byte
	// Lost: it will not be delivered, be it for loss, a partition, a full
	// queue or because nobody listens at Dst.
	Lost bool
}

// Net is a network of Conns. Its methods are safe for concurrent use.
type Net struct {
	mu    sync.Mutex
	seed  uint64
	conns map[netip.AddrPort]*Conn
	links map[pair]*link
	def   Link
	sides map[netip.Addr]int // partition; nil: whole
	tap   func(Datagram)
}

// pair is a direction.
type pair struct{ from, to netip.Addr }

// link is the state of one direction.
type link struct {
	set  *Link // nil: the default
	rng  *rand.Rand
	held []held
	late []held // reordered: goes behind the next one
}

// held is a datagram on its way.
type held struct {
	steps int
	src   netip.AddrPort
	dst   netip.AddrPort
	b     []byte
}

// NewNet returns a network without Conns, all of whose links are the zero Link.
// What is decided for the n-th datagram of a link depends on seed and n only.
func NewNet(seed uint64) *Net {
	return &Net{seed: seed, conns: map[netip.AddrPort]*Conn{}, links: map[pair]*link{}}
}

// SetDefault changes all links that SetLink was not called for.
func (n *Net) SetDefault(l Link) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.def = l
}

// SetLink changes one direction.
func (n *Net) SetLink(from, to netip.Addr, l Link) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.link(from, to).set = &l
}

// Partition cuts the network: an address reaches only those in its own group.
// Addresses in no group are a group of their own.
func (n *Net) Partition(groups ...[]netip.Addr) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.sides = map[netip.Addr]int{}
	for i, g := range groups {
		for _, a := range g {
			n.sides[a] = i + 1
		}
	}
}

// Heal ends a partition.
func (n *Net) Heal() {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.sides = nil
}

// Tap calls fn with each datagram as it leaves its sender; nil ends it. fn must
// not call methods of the Net or its Conns.
func (n *Net) Tap(fn func(Datagram)) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.tap = fn
}

// Step lets one step of time pass: what was delayed comes a step nearer, what
// was reordered and not yet overtaken is delivered.
func (n *Net) Step() {
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, p := range n.order() {
		l := n.links[p]
		due := l.late
		l.late = nil
		rest := l.held[:0]
		for _, h := range l.held {
			if h.steps--; h.steps > 0 {
				rest = append(rest, h)
			} else {
				due = append(due, h)
			}
		}
		clear(l.held[len(rest):])
		l.held = rest
		for _, h := range due {
			n.deliver(h.src, h.dst, h.b)
		}
	}
}

// Waiting returns how many datagrams are held back for Step.
func (n *Net) Waiting() int {
	n.mu.Lock()
	defer n.mu.Unlock()
	sum := 0
	for _, l := range n.links {
		sum += len(l.held) + len(l.late)
	}
	return sum
}

// order returns the links in an order that does not depend on the map's.
func (n *Net) order() []pair {
	ps := make([]pair, 0, len(n.links))
	for p := range n.links {
		ps = append(ps, p)
	}
	slices.SortFunc(ps, func(a, b pair) int {
		if c := a.from.Compare(b.from); c != 0 {
			return c
		}
		return a.to.Compare(b.to)
	})
	return ps
}

// link returns the state of a direction.
func (n *Net) link(from, to netip.Addr) *link {
	p := pair{from, to}
	l := n.links[p]
	if l == nil {
		// Of its own: what happens on a link does not depend on the others.
		h := n.seed
		for _, a := range []netip.Addr{from, to} {
			for _, b := range a.As16() {
				h = (h ^ uint64(b)) * 0x100000001b3 // FNV-1a
			}
		}
		l = &link{rng: rand.New(rand.NewPCG(n.seed, h))}
		n.links[p] = l
	}
	return l
}

func (n *Net) linkOf(l *link) Link {
	if l.set != nil {
		return *l.set
	}
	return n.def
}

// mtu of the direction; it makes no state for addresses that nobody named.
func (n *Net) mtu(from, to netip.Addr) int {
	m := n.def.MTU
	if l := n.links[pair{from, to}]; l != nil {
		m = n.linkOf(l).MTU
	}
	if m == 0 {
		m = DefaultMTU
	}
	return m
}

// headers of IP and UDP, in bytes.
func headers(a netip.Addr) int {
	if a.Is4() {
		return 20 + 8
	}
	return 40 + 8
}

// send takes a datagram of c and reports whether it is small enough for the
// link. b is borrowed.
func (n *Net) send(c *Conn, src, dst netip.AddrPort, b []byte) bool {
	to := []netip.AddrPort{dst}
	if dst.Addr().IsMulticast() {
		to = n.members(c, dst)
	}
	fits := len(b)+headers(dst.Addr()) <= n.mtu(src.Addr(), dst.Addr())
	for _, at := range to {
		fits = fits && len(b)+headers(dst.Addr()) <= n.mtu(src.Addr(), at.Addr())
	}
	if !fits {
		return false
	}
	lost := true
	for _, at := range to {
		if n.carry(src, at, b) {
			lost = false
		}
	}
	if n.tap != nil {
		n.tap(Datagram{Src: src, Dst: dst, B: b, Lost: lost})
	}
	return true
}

// members returns who gets what c sends to a group: not c itself.
func (n *Net) members(c *Conn, group netip.AddrPort) []netip.AddrPort {
	var to []netip.AddrPort
	for at, m := range n.conns {
		if m != c && m.groups[group.Addr()] > 0 && at.Port() == group.Port() {
			to = append(to, at)
		}
	}
	slices.SortFunc(to, netip.AddrPort.Compare)
	return to
}

// carry takes a datagram over its link; false: it is lost.
func (n *Net) carry(src, dst netip.AddrPort, b []byte) bool {
	if n.conns[dst] == nil || n.sides[src.Addr()] != n.sides[dst.Addr()] {
		return false
	}
	l := n.link(src.Addr(), dst.Addr())
	cfg := n.linkOf(l)
	// Always three draws: what happens to one datagram does not depend on
	// which of them were switched on for those before it.
	lose, dup, reorder := l.rng.Float64() < cfg.Loss, l.rng.Float64() < cfg.Duplicate, l.rng.Float64() < cfg.Reorder
	if lose {
		return false
	}
	copies := 1
	if dup {
		copies = 2
	}
	ok := true
	for range copies {
		h := held{steps: cfg.Delay, src: src, dst: dst, b: bytes.Clone(b)}
		switch full := len(l.held)+len(l.late) >= MaxHeld; {
		case reorder && !full:
			l.late = append(l.late, h)
		case cfg.Delay > 0 && !full:
			l.held = append(l.held, h)
		default:
			ok = n.deliver(src, dst, h.b)
		}
	}
	if !reorder {
		late := l.late
		l.late = nil
		for _, h := range late {
			if cfg.Delay > 0 {
				l.held = append(l.held, h)
			} else {
				n.deliver(h.src, h.dst, h.b)
			}
		}
	}
	return ok
}

// deliver hands b, which is owned, to the Conn at dst; false: there is none, or
// it is full. A partition that came up on the way cuts it too.
func (n *Net) deliver(src, dst netip.AddrPort, b []byte) bool {
	c := n.conns[dst]
	return c != nil && n.sides[src.Addr()] == n.sides[dst.Addr()] && c.push(src, b)
}

// Conn returns a new Conn that listens on addr, which must have no other: a
// closed one makes room. It panics if addr is in use or not valid: the test is
// wrong.
func (n *Net) Conn(addr netip.AddrPort) underlay.Conn {
	addr = netip.AddrPortFrom(addr.Addr().Unmap(), addr.Port())
	n.mu.Lock()
	defer n.mu.Unlock()
	if !addr.IsValid() || addr.Addr().IsUnspecified() || n.conns[addr] != nil {
		panic(fmt.Sprintf("underlaytest: address %s is in use or not one of a host", addr))
	}
	c := &Conn{
		net: n, addr: addr, groups: map[netip.Addr]int{},
		bell: make(chan struct{}, 1), done: make(chan struct{}),
		basePort: 49152 + uint16(rand.New(rand.NewPCG(n.seed, uint64(addr.Port()))).IntN(16384-SourcePorts+1)),
	}
	n.conns[addr] = c
	return c
}
