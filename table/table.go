// Package table holds who is where in the overlays, as the nodes tell each other.
//
// A node owns the records of its own endpoints. Each change raises its version,
// which gossip carries; whoever shares an overlay pulls what has changed since the
// version that he has (docs/design/0009-endpoint-tables.md). A Directory is what one
// node knows: its own records and what it has pulled of the others'. A Puller keeps
// it up to date. A Journal remembers who had an address.
package table

import (
	"fmt"
	"net/netip"
	"strings"

	"github.com/tulle-net/tulle/ether"
)

const (
	// MaxRecords bounds what one node has in one overlay.
	MaxRecords = 16384
	// MaxIPs, MaxAliases and MaxServices bound one record, MaxGroups the groups of a
	// node in an overlay.
	MaxIPs      = 16
	MaxAliases  = 32
	MaxServices = 32
	MaxGroups   = 4096

	maxKey  = 64
	maxName = 63
)

// Record is one endpoint, as its node tells of it.
type Record struct {
	// Key tells it from the others of its node in its overlay.
	Key string
	// Name is what it is called in DNS; empty: nothing. Aliases are more of those.
	Name    string
	Aliases []string
	MAC     ether.MAC
	IPs     []netip.Addr
	// Services are named ports, for SRV.
	Services []Service
	// Sequence and Since, in milliseconds since 1970, decide between nodes that claim
	// one address: the higher sequence has it, then the earlier, then the smaller name.
	Sequence uint32
	Since    int64
}

// Service is a named port.
type Service struct {
	Name     string `json:"name"`
	Port     uint16 `json:"port"`
	Protocol string `json:"protocol"` // tcp, udp
}

// Traits are what holds for a node in an overlay as a whole.
type Traits struct {
	// Open: there are stations at the node that it has no records of.
	Open bool
	// Router: a multicast router is there. Groups are those that somebody there has
	// joined. Snooped: the node tells of them; else it wants all.
	Router, Snooped bool
	Groups          []netip.Addr
}

// Version of a node's records: it is compared for being another one. Zero is that
// of a node that tells of none.
type Version uint64

func versionOf(epoch, count uint32) Version { return Version(epoch)<<32 | Version(count) }

// Entry is a record and whose it is. It is shared: not to be modified.
type Entry struct {
	Overlay string
	Node    string
	Record
}

// before reports whether e has an address rather than o.
func (e *Entry) before(o *Entry) bool {
	switch {
	case e.Sequence != o.Sequence:
		return e.Sequence > o.Sequence
	case e.Since != o.Since:
		return e.Since < o.Since
	}
	return e.Node < o.Node
}

// names returns what the record is called, in small letters.
func (r *Record) names() []string {
	var out []string
	for _, n := range append([]string{r.Name}, r.Aliases...) {
		if n != "" {
			out = append(out, strings.ToLower(n))
		}
	}
	return out
}

// check returns an error if a record is none that goes over the wire.
func (r *Record) check() error {
	switch {
	case r.Key == "" || len(r.Key) > maxKey:
		return fmt.Errorf("table: a key of %d bytes: want 1 to %d", len(r.Key), maxKey)
	case len(r.Name) > maxName:
		return fmt.Errorf("table: name %.70q is longer than %d", r.Name, maxName)
	case len(r.IPs) > MaxIPs || len(r.Aliases) > MaxAliases || len(r.Services) > MaxServices:
		return fmt.Errorf("table: %s has %d addresses, %d aliases, %d services: at most %d, %d, %d",
			r.Name, len(r.IPs), len(r.Aliases), len(r.Services), MaxIPs, MaxAliases, MaxServices)
	case !r.MAC.IsValid():
		return fmt.Errorf("table: %s has the MAC %s", r.Name, r.MAC)
	}
	for _, ip := range r.IPs {
		if !ip.IsValid() || ip.IsUnspecified() || ip.IsMulticast() || ip.Zone() != "" || ip.Is4In6() {
			return fmt.Errorf("table: %s has the address %s, which no station can have", r.Name, ip)
		}
	}
	for _, a := range r.Aliases {
		if a == "" || len(a) > maxName {
			return fmt.Errorf("table: %s has the alias %.70q: want 1 to %d characters", r.Name, a, maxName)
		}
	}
	for _, s := range r.Services {
		if s.Name == "" || len(s.Name) > maxName || protocolOf(s.Protocol) < 0 {
			return fmt.Errorf("table: %s has the service %.70q over %.10q: want a name, and tcp or udp", r.Name, s.Name, s.Protocol)
		}
	}
	return nil
}

// protocols are those of services, as the wire numbers them.
var protocols = [...]string{"tcp", "udp"}

func protocolOf(name string) int {
	for i, p := range protocols {
		if p == name {
			return i
		}
	}
	return -1
}
