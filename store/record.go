package store

import (
	"errors"
	"fmt"
	"net/netip"
	"regexp"
	"slices"
	"strconv"
	"strings"
)

// Bounds of the records of an overlay.
const (
	MaxRecords     = 256
	MaxRecordTTL   = 86_400
	maxRecordName  = 127 // with room for the overlay's and the domain
	maxRecordValue = 255 // of TXT: one string of the wire
)

// Record is a name in an overlay, beside those of its endpoints.
type Record struct {
	// Name is relative to the overlay, as in www or _ldap._tcp.
	Name string `json:"name"`
	// Type is A, AAAA, CNAME, SRV or TXT.
	Type string `json:"type"`
	// Value is an address, a name, "PRIORITY WEIGHT PORT NAME", or a text. A name
	// without a dot is one of the overlay, one with a dot is complete.
	Value string `json:"value"`
	TTL   int    `json:"ttl,omitempty"` // in seconds; 0: as endpoints have
}

// recordLabel is a label of DNS, as far as anybody needs them.
var recordLabel = regexp.MustCompile(`^[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?$`)

func checkRecordName(name string) error {
	switch {
	case len(name) > maxRecordName:
		return fmt.Errorf("it has %d characters: at most %d", len(name), maxRecordName)
	case slices.ContainsFunc(strings.Split(name, "."), func(l string) bool { return !recordLabel.MatchString(l) }):
		return errors.New("want labels of 1 to 63 letters, digits, - and _, with dots between")
	}
	return nil
}

// Check returns what is wrong with a record.
func (r *Record) Check() error {
	if err := checkRecordName(r.Name); err != nil {
		return fmt.Errorf("record %.70q: %w", r.Name, err)
	}
	if err := r.checkValue(); err != nil {
		return fmt.Errorf("record %s: %s %.70q: %w", r.Name, r.Type, r.Value, err)
	}
	if r.TTL < 0 || r.TTL > MaxRecordTTL {
		return fmt.Errorf("record %s: a TTL of %d s: want 1 to %d, or 0 for that of endpoints", r.Name, r.TTL, MaxRecordTTL)
	}
	return nil
}

func (r *Record) checkValue() error {
	target := func(name string) error { return checkRecordName(strings.TrimSuffix(name, ".")) }
	switch r.Type {
	case "A", "AAAA":
		a, err := netip.ParseAddr(r.Value)
		if err != nil || a.Is4() != (r.Type == "A") || a.Zone() != "" || a.Is4In6() {
			return errors.New("want an address, of IPv4 for A and of IPv6 for AAAA")
		}
		return nil
	case "CNAME":
		return target(r.Value)
	case "SRV":
		f := strings.Fields(r.Value)
		if len(f) != 4 {
			return errors.New("want PRIORITY WEIGHT PORT NAME, as in 0 0 389 ldap")
		}
		for _, n := range f[:3] {
			if _, err := strconv.ParseUint(n, 10, 16); err != nil {
				return errors.New("want PRIORITY WEIGHT PORT NAME, as in 0 0 389 ldap")
			}
		}
		return target(f[3])
	case "TXT":
		if r.Value == "" || len(r.Value) > maxRecordValue || strings.ContainsFunc(r.Value, func(c rune) bool { return c < ' ' || c > '~' }) {
			return fmt.Errorf("want a text of 1 to %d characters of ASCII", maxRecordValue)
		}
		return nil
	}
	return errors.New("want A, AAAA, CNAME, SRV or TXT")
}

// checkRecords returns what is wrong with all records of an overlay.
func checkRecords(list []Record) error {
	if len(list) > MaxRecords {
		return fmt.Errorf("%d records: %d at most", len(list), MaxRecords)
	}
	aliases, names := map[string]bool{}, map[string]int{}
	for i := range list {
		r := &list[i]
		if err := r.Check(); err != nil {
			return err
		}
		name := strings.ToLower(r.Name)
		names[name]++
		aliases[name] = aliases[name] || r.Type == "CNAME"
	}
	for name, is := range aliases {
		if is && names[name] > 1 {
			return fmt.Errorf("record %s: a name that has a CNAME has nothing else (RFC 1034, section 3.6.2): remove one", name)
		}
	}
	return nil
}

// Same reports whether two records are one, apart from their TTLs.
func (r Record) Same(o Record) bool {
	return strings.EqualFold(r.Name, o.Name) && r.Type == o.Type && r.Value == o.Value
}

// Matches reports whether a record is meant by one whose type and value may be empty.
func (r Record) Matches(which Record) bool {
	return strings.EqualFold(r.Name, which.Name) && (which.Type == "" || which.Type == r.Type) && (which.Value == "" || which.Value == r.Value)
}
