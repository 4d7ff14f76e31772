package store

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"time"
)

// ErrOverlay: a definition that this release cannot read.
var ErrOverlay = errors.New("store: no definition of an overlay that this release can read")

// overlaySchema is the version of Overlay's JSON.
const overlaySchema = 1

// Overlay is the definition of a shared overlay.
type Overlay struct {
	Schema int    `json:"schema"`
	Name   string `json:"name"`
	VNI    uint32 `json:"vni"`
	// Subnets are one of IPv4, one of IPv6, or both; their host bits are zero.
	Subnets []netip.Prefix `json:"subnets"`
	// Gateways are addresses within Subnets that no endpoint gets, at most one a
	// subnet; the first host address if none is said.
	Gateways []netip.Addr `json:"gateways,omitempty"`
	// Gateway: each node is the gateway of its own endpoints, at Gateways.
	Gateway bool `json:"gateway,omitempty"`
	// Reserved are ranges within Subnets that are never given out by themselves;
	// an address of them can be asked for.
	Reserved []netip.Prefix `json:"reserved,omitempty"`
	// Encryption is required or none.
	Encryption string `json:"encryption"`
	// Cipher is auto, chacha20-poly1305 or aes-256-gcm; empty with Encryption none.
	Cipher string `json:"cipher,omitempty"`
	// MTU in bytes; 0: what the underlay allows.
	MTU int `json:"mtu,omitempty"`
	// Flood is unicast or gossip.
	Flood    string `json:"flood"`
	ClampMSS bool   `json:"mss_clamp,omitempty"`
	// UnknownUnicast is auto or flood; empty: auto. UnknownMulticast is flood or drop;
	// empty: flood. BUMLimit in frames a second a port, 0: any; absent: 2,000.
	UnknownUnicast   string `json:"unknown_unicast,omitempty"`
	UnknownMulticast string `json:"unknown_multicast,omitempty"`
	BUMLimit         *int   `json:"bum_limit,omitempty"`
	// Records are names in the overlay beside those of its endpoints.
	Records []Record `json:"records,omitempty"`
	// Created is when, By the node that asked for it.
	Created time.Time `json:"created"`
	By      string    `json:"by"`
	// ID tells an overlay from another one that had the name before.
	ID string `json:"id"`

	extra map[string]json.RawMessage
}

// OverlayKey is where the definition of the overlay is.
func OverlayKey(name string) string { return KindOverlay + "/" + name }

// VNIKey is where the name of the overlay with this VNI is.
func VNIKey(vni uint32) string { return fmt.Sprintf("%s/%d", KindVNI, vni) }

type overlayJSON Overlay

// ParseOverlay reads a definition; b is borrowed. Fields that this release does
// not know stay as they are when it is encoded again. Errors wrap ErrOverlay.
func ParseOverlay(b []byte) (*Overlay, error) {
	var j overlayJSON
	extra, err := Split(b, &j)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrOverlay, err)
	}
	if j.Schema != overlaySchema {
		return nil, fmt.Errorf("%w: %q is of schema %d, and this release knows %d: run one release of tulle on all nodes", ErrOverlay, j.Name, j.Schema, overlaySchema)
	}
	o := Overlay(j)
	o.extra = extra
	return &o, nil
}

// Encode returns the definition as JSON.
func (o Overlay) Encode() ([]byte, error) {
	o.Schema = overlaySchema
	return Join(overlayJSON(o), o.extra)
}

// Bounds of a definition.
const (
	MaxVNI      = 1<<24 - 1
	minMTU      = 68   // RFC 791: what every IPv4 link carries
	minMTU6     = 1280 // RFC 8200, section 5
	maxMTU      = 65_535
	maxReserved = 64
	maxBUMLimit = 1_000_000
	// A subnet has at least 2 bits of hosts, at most 24 of IPv4 and 80 of IPv6.
	minHostBits  = 2
	maxHostBits4 = 24
	maxHostBits6 = 80
)

// Check returns all faults of a definition, each with what to do.
func (o *Overlay) Check() error {
	var faults []error
	fault := func(format string, a ...any) {
		faults = append(faults, fmt.Errorf("overlay %.70q: %w", o.Name, fmt.Errorf(format, a...)))
	}
	if o.VNI == 0 || o.VNI > MaxVNI {
		fault("VNI %d: want 1 to %d", o.VNI, MaxVNI)
	}
	families := map[bool]bool{}
	for _, s := range o.Subnets {
		if err := checkSubnet(s); err != nil {
			fault("subnet %s: %w", s, err)
		}
		if families[s.Addr().Is4()] {
			fault("subnet %s: one subnet of each family at most", s)
		}
		families[s.Addr().Is4()] = true
	}
	if len(o.Subnets) == 0 {
		fault("no subnet is given")
	}
	gateways := map[netip.Prefix]bool{}
	for _, g := range o.Gateways {
		switch s := o.Within(g); {
		case s == (netip.Prefix{}):
			fault("gateway %s lies in none of its subnets", g)
		case g == s.Addr():
			fault("gateway %s is the address of its subnet: want a host's, such as %s", g, g.Next())
		case gateways[s]:
			fault("gateway %s is another one of subnet %s: one a subnet at most", g, s)
		default:
			gateways[s] = true
		}
	}
	if o.Gateway && len(o.Gateways) == 0 {
		fault("gateway: true, and no address is reserved for it: make the overlay with --gateway ADDRESS")
	}
	for _, r := range o.Reserved {
		if r != r.Masked() || o.Within(r.Addr()) == (netip.Prefix{}) || r.Bits() < o.Within(r.Addr()).Bits() {
			fault("reserved range %s: want a prefix within one of its subnets", r)
		}
	}
	if len(o.Reserved) > maxReserved {
		fault("%d reserved ranges: %d at most", len(o.Reserved), maxReserved)
	}
	switch {
	case o.Encryption != "required" && o.Encryption != "none":
		fault("encryption %q: want required or none", o.Encryption)
	case o.Encryption == "none" && o.Cipher != "":
		fault("cipher %q: with encryption none there is none", o.Cipher)
	case o.Encryption == "required" && o.Cipher != "auto" && o.Cipher != "chacha20-poly1305" && o.Cipher != "aes-256-gcm":
		fault("cipher %q: want auto, chacha20-poly1305 or aes-256-gcm", o.Cipher)
	}
	if o.Flood != "unicast" && o.Flood != "gossip" {
		fault("flood %q: want unicast or gossip", o.Flood)
	}
	if o.UnknownUnicast != "" && o.UnknownUnicast != "auto" && o.UnknownUnicast != "flood" {
		fault("unknown unicast %q: want auto or flood", o.UnknownUnicast)
	}
	if o.UnknownMulticast != "" && o.UnknownMulticast != "flood" && o.UnknownMulticast != "drop" {
		fault("unknown multicast %q: want flood or drop", o.UnknownMulticast)
	}
	if o.BUMLimit != nil && (*o.BUMLimit < 0 || *o.BUMLimit > maxBUMLimit) {
		fault("BUM limit %d: want 0 (any) to %d frames a second", *o.BUMLimit, maxBUMLimit)
	}
	if err := checkRecords(o.Records); err != nil {
		fault("%w", err)
	}
	least := minMTU
	if families[false] {
		least = minMTU6
	}
	if o.MTU != 0 && (o.MTU < least || o.MTU > maxMTU) {
		fault("MTU %d: want %d to %d, or 0 for what the underlay allows", o.MTU, least, maxMTU)
	}
	return errors.Join(faults...)
}

func checkSubnet(s netip.Prefix) error {
	a := s.Addr()
	switch {
	case !s.IsValid() || a.Is4In6() || a.Zone() != "":
		return errors.New("want a prefix such as 10.32.0.0/16 or fd00:32::/64")
	case s != s.Masked():
		return fmt.Errorf("its host bits are not zero: is %s meant?", s.Masked())
	case a.IsMulticast() || a.IsLoopback() || a.IsUnspecified() || a.IsLinkLocalUnicast():
		return errors.New("want unicast addresses that are neither loopback nor link-local")
	}
	hosts, most := a.BitLen()-s.Bits(), maxHostBits6
	if a.Is4() {
		most = maxHostBits4
	}
	if hosts < minHostBits || hosts > most {
		return fmt.Errorf("want a length of /%d to /%d", a.BitLen()-most, a.BitLen()-minHostBits)
	}
	return nil
}

// Within returns the subnet that has the address; zero: none.
func (o *Overlay) Within(a netip.Addr) netip.Prefix {
	for _, s := range o.Subnets {
		if s.Contains(a) {
			return s
		}
	}
	return netip.Prefix{}
}
