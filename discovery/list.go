package discovery

import (
	"bytes"
	"cmp"
	"crypto/sha256"
	"errors"
	"fmt"
	"slices"

	"github.com/tulle-net/tulle/vxlan"
)

const (
	// MaxOverlays is how many overlays a node may carry.
	MaxOverlays = 65536
	// MaxListBytes bounds a node's encoded list: 5 bytes and the name each.
	MaxListBytes = 1 << 20

	maxNameBytes = 63
	entryHeader  = 5
)

// digest names the content of a list: the first 8 bytes of the SHA-256 of its
// encoding.
type digest [8]byte

// list is what one node carries. It is never changed once made.
type list struct {
	overlays []Overlay // by VNI; not nil
	encoded  []byte
	digest   digest
}

var encryptions = [...]string{0: "none", 1: "required"}

// newList sorts a copy of overlays by VNI and encodes it: per overlay
//
//	VNI (3) | encryption (1): 0 none, 1 required | length of name (1) | name
//
// strictly ascending by VNI, so that a list has one encoding.
func newList(overlays []Overlay) (*list, error) {
	if len(overlays) > MaxOverlays {
		return nil, fmt.Errorf("discovery: %d overlays are more than the %d that a node may carry", len(overlays), MaxOverlays)
	}
	l := &list{overlays: make([]Overlay, len(overlays))}
	copy(l.overlays, overlays)
	slices.SortFunc(l.overlays, func(a, b Overlay) int { return cmp.Compare(a.VNI, b.VNI) })
	names := make(map[string]vxlan.VNI, len(overlays))
	for i, o := range l.overlays {
		enc := slices.Index(encryptions[:], o.Encryption)
		switch {
		case o.VNI > vxlan.MaxVNI:
			return nil, fmt.Errorf("discovery: overlay %s: VNI %d is larger than %d", o.Name, o.VNI, vxlan.MaxVNI)
		case !validName(o.Name):
			return nil, fmt.Errorf("discovery: overlay name %q: use letters, digits and hyphens, at most %d, with no hyphen first", o.Name, maxNameBytes)
		case enc < 0:
			return nil, fmt.Errorf("discovery: overlay %s: encryption %q is neither none nor required", o.Name, o.Encryption)
		case i > 0 && l.overlays[i-1].VNI == o.VNI:
			return nil, fmt.Errorf("discovery: overlays %s and %s have one VNI, %d", l.overlays[i-1].Name, o.Name, o.VNI)
		}
		if other, twice := names[o.Name]; twice {
			return nil, fmt.Errorf("discovery: overlay %s has two VNIs, %d and %d", o.Name, other, o.VNI)
		}
		names[o.Name] = o.VNI
		l.encoded = append(l.encoded, byte(o.VNI>>16), byte(o.VNI>>8), byte(o.VNI), byte(enc), byte(len(o.Name)))
		l.encoded = append(l.encoded, o.Name...)
	}
	if len(l.encoded) > MaxListBytes {
		return nil, fmt.Errorf("discovery: the list of %d overlays takes %d bytes, more than %d: use shorter names", len(overlays), len(l.encoded), MaxListBytes)
	}
	l.digest = digestOf(l.encoded)
	return l, nil
}

var errList = errors.New("discovery: malformed overlay list")

// parseList decodes what newList encoded, of which it keeps nothing. Whatever
// else it gets is errList; an owner that lists a name twice is the consumer's
// matter.
func parseList(b []byte) (*list, error) {
	if len(b) > MaxListBytes {
		return nil, errList
	}
	l := &list{overlays: []Overlay{}, encoded: bytes.Clone(b), digest: digestOf(b)}
	for len(b) > 0 {
		if len(b) < entryHeader || len(l.overlays) == MaxOverlays {
			return nil, errList
		}
		o := Overlay{VNI: vxlan.VNI(b[0])<<16 | vxlan.VNI(b[1])<<8 | vxlan.VNI(b[2])}
		enc, n := int(b[3]), int(b[4])
		b = b[entryHeader:]
		if enc >= len(encryptions) || n > len(b) {
			return nil, errList
		}
		o.Encryption, o.Name = encryptions[enc], string(b[:n])
		b = b[n:]
		if !validName(o.Name) {
			return nil, errList
		}
		if k := len(l.overlays); k > 0 && l.overlays[k-1].VNI >= o.VNI {
			return nil, errList
		}
		l.overlays = append(l.overlays, o)
	}
	return l, nil
}

func digestOf(encoded []byte) digest {
	sum := sha256.Sum256(encoded)
	return digest(sum[:len(digest{})])
}

// validName reports whether s is [A-Za-z0-9][A-Za-z0-9-]{0,62}.
func validName(s string) bool {
	if s == "" || len(s) > maxNameBytes || s[0] == '-' {
		return false
	}
	for i := range len(s) {
		c := s[i]
		if !(c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || c == '-') {
			return false
		}
	}
	return true
}
