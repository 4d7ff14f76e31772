package dns

import "sync/atomic"

// Drop is why a query was not answered, or not as was asked.
type Drop int

// The reasons; docs/architecture.md explains them.
const (
	DropMalformed Drop = iota
	DropSource
	DropInFlight
	DropConnections
	DropForwards
	DropUpstream
	numDrops
)

var dropNames = [numDrops]string{
	DropMalformed:   "dns_malformed",
	DropSource:      "dns_source",
	DropInFlight:    "dns_in_flight",
	DropConnections: "dns_connections",
	DropForwards:    "dns_forwards",
	DropUpstream:    "dns_upstream",
}

func (d Drop) String() string { return dropNames[d] }

// Stats counts since the server was made.
type Stats struct {
	Queries   atomic.Uint64 // well formed, of who may ask
	Forwarded atomic.Uint64 // of those, what the host's resolvers were asked
	drops     [numDrops]atomic.Uint64
}

func (s *Stats) drop(d Drop) { s.drops[d].Add(1) }

// Drops returns how often a reason was met.
func (s *Stats) Drops(d Drop) uint64 { return s.drops[d].Load() }

// EachDrop calls f with each reason; of a nil Stats none was met.
func (s *Stats) EachDrop(f func(name string, count uint64)) {
	for d := range numDrops {
		count := uint64(0)
		if s != nil {
			count = s.Drops(d)
		}
		f(d.String(), count)
	}
}
