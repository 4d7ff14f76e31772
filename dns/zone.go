package dns

import (
	"net/netip"
	"strings"
)

// Record is one that somebody has added. Name is relative to the overlay.
type Record struct {
	Name, Type, Value string
	TTL               int // in seconds; 0: that of endpoints
}

// Zone is what is defined of an overlay. It does not change: of another definition
// there is another one.
type Zone struct {
	subnets []netip.Prefix
	records map[string][]Record // by name, in lower case
	above   map[string]bool     // the names that a record is below
}

// NewZone makes the zone of an overlay, which keeps both lists. It costs as much as
// there are records: who is asked for it often keeps it.
func NewZone(subnets []netip.Prefix, records []Record) *Zone {
	z := &Zone{subnets: subnets, records: make(map[string][]Record, len(records)), above: map[string]bool{}}
	for _, r := range records {
		name := strings.ToLower(r.Name)
		z.records[name] = append(z.records[name], r)
		for _, rest, more := strings.Cut(name, "."); more; _, rest, more = strings.Cut(rest, ".") {
			z.above[rest] = true
		}
	}
	return z
}
