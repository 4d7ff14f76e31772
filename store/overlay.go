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
