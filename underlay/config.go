package underlay

import (
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
)

// Config of Open.
type Config struct {
	// Listen is where datagrams arrive. [::]:port listens on both families, on
	// IPv4 alone where IPv6 is disabled; any other address on itself. Port 0
	// lets the kernel choose one port for both families.
	Listen netip.AddrPort
	// Source is the address that datagrams leave from, until SetSource. While
	// this host does not have it, and for the other family, the kernel chooses
	// by route; Rebind takes it up once it is there.
	Source netip.Addr
	// SourcePorts is the number of UDP source ports per family, 1 to 64; default 32.
	SourcePorts int
	// GroupTTL is the TTL (hop limit) of datagrams to a multicast group, 1 to
	// 255; default 1 for each group that is not in it.
	GroupTTL map[netip.Addr]int
	// NoGSO and NoGRO switch off trains on the way out and on the way in.
	NoGSO, NoGRO bool
	// ReceiveBuffer and SendBuffer of each socket in bytes, up to 1 GiB; default 7 MiB.
	ReceiveBuffer, SendBuffer int
	// TooBig is rung (a send that never blocks; give it a capacity of 1) when a
	// datagram was larger than its path's MTU, so that PathMTU may have changed.
	TooBig chan<- struct{}
	// Handed are sockets of another process, to go on with.
	Handed Handed
	// Log takes warnings about offloads that had to be switched off; default none.
	Log *slog.Logger
}

const (
	defaultSourcePorts = 32
	maxSourcePorts     = 64
	// defaultBuffer ended retransmits of a fast sender elsewhere (wireguard-go f26efb6).
	defaultBuffer = 7 << 20
	maxBuffer     = 1 << 30
)

// validated returns c with its defaults, or all its faults.
func (c Config) validated() (Config, error) {
	var faults []error
	fault := func(format string, a ...any) { faults = append(faults, fmt.Errorf("underlay: "+format, a...)) }

	if !c.Listen.IsValid() {
		fault("listen address is missing: use [::]:4789")
	}
	c.Listen = unmap(c.Listen)
	c.Source = c.Source.Unmap()
	if !isSource(c.Source) {
		fault("source %s is no address of a host", c.Source)
	}
	if c.SourcePorts == 0 {
		c.SourcePorts = defaultSourcePorts
	}
	if c.SourcePorts < 1 || c.SourcePorts > maxSourcePorts {
		fault("source ports are %d, want 1 to %d", c.SourcePorts, maxSourcePorts)
	}
	ttls := make(map[netip.Addr]int, len(c.GroupTTL))
	for group, ttl := range c.GroupTTL {
		ttls[group.Unmap()] = ttl
		if !group.IsMulticast() {
			fault("TTL of group %s: not a multicast address", group)
		}
		if ttl < 1 || ttl > 255 {
			fault("TTL of group %s is %d, want 1 to 255", group, ttl)
		}
	}
	c.GroupTTL = ttls
	for _, b := range []*int{&c.ReceiveBuffer, &c.SendBuffer} {
		if *b == 0 {
			*b = defaultBuffer
		}
		if *b < 0 || *b > maxBuffer {
			fault("socket buffer is %d bytes, want 1 to %d", *b, maxBuffer)
		}
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	return c, errors.Join(faults...)
}

// isSource reports whether datagrams can leave from a, or a leaves the choice
// to the kernel.
func isSource(a netip.Addr) bool { return !a.IsValid() || !a.IsUnspecified() && !a.IsMulticast() }

func unmap(a netip.AddrPort) netip.AddrPort {
	return netip.AddrPortFrom(a.Addr().Unmap(), a.Port())
}
