// Package peertest is a network in memory that loses, delays and doubles datagrams.
package peertest

import (
	"math/rand/v2"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// Net carries datagrams between the addresses that were attached to it. Its
// fields are set before the first datagram.
type Net struct {
	// Loss, Twice and Late are the shares, 0 to 1, of datagrams that are lost,
	// come twice, or come up to 5 ms late and so out of order.
	Loss, Twice, Late float64
	// MTU is the most bytes of a datagram; 0: any. A larger one fails with EMSGSIZE.
	MTU int

	// Sent and Lost count datagrams.
	Sent, Lost atomic.Int64

	mu    sync.Mutex
	rand  *rand.Rand
	hosts map[netip.AddrPort]func(netip.AddrPort, []byte)
}

// NewNet returns a network without faults. seed decides which datagrams faults hit.
func NewNet(seed uint64) *Net {
	return &Net{rand: rand.New(rand.NewPCG(seed, 4789)), hosts: map[netip.AddrPort]func(netip.AddrPort, []byte){}}
}

// SetFaults changes Loss, Twice and Late while datagrams are under way.
func (n *Net) SetFaults(loss, twice, late float64) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.Loss, n.Twice, n.Late = loss, twice, late
}

// Attach lets deliver receive what is sent to addr, in place of whoever did
// before; nil detaches. It returns the function to send from addr with.
func (n *Net) Attach(addr netip.AddrPort, deliver func(from netip.AddrPort, datagram []byte)) func(to netip.AddrPort, datagram []byte) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.hosts[addr] = deliver
	return func(to netip.AddrPort, datagram []byte) error { return n.send(addr, to, datagram) }
}

func (n *Net) send(from, to netip.AddrPort, datagram []byte) error {
	n.Sent.Add(1)
	if n.MTU != 0 && len(datagram) > n.MTU {
		return syscall.EMSGSIZE
	}
	n.mu.Lock()
	deliver := n.hosts[to]
	lost, twice, late := n.rand.Float64() < n.Loss, n.rand.Float64() < n.Twice, n.rand.Float64() < n.Late
	delay := time.Duration(n.rand.Int64N(int64(5 * time.Millisecond)))
	n.mu.Unlock()
	if deliver == nil || lost {
		n.Lost.Add(1)
		return nil
	}
	if late {
		datagram = slices.Clone(datagram)
		time.AfterFunc(delay, func() { deliver(from, datagram) })
		return nil
	}
	deliver(from, datagram)
	if twice {
		deliver(from, datagram)
	}
	return nil
}
