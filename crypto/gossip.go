package crypto

import (
	"encoding/binary"
	"fmt"
	"math"
)

const (
	gossipVersion = 1
	gossipHeader  = 1 + 8 + 1
	// maxGossipKeys bounds what every gossip packet is tried with.
	maxGossipKeys = 4
)

// GossipRing is the keys that gossip is encrypted with (AES-256-GCM in
// memberlist): one sends with the primary, and reads with all. It is never
// changed once made; a change makes the next one, with a higher epoch.
//
// The key of a cluster changes without a node lost in three steps, each
// complete on every reachable node before the next: Stage, Promote, Retire.
type GossipRing struct {
	// Epoch counts the steps; a ring of a lower epoch never replaces one of a
	// higher. It is 1 or more.
	Epoch uint64
	// Primary encrypts.
	Primary Key
	// Others are read too, at most 3: the next key, or earlier ones. The newest is first.
	Others []Key
}

// NewGossipRing returns a first ring, with a random key.
func NewGossipRing() *GossipRing { return &GossipRing{Epoch: 1, Primary: NewKey()} }

// Stage returns the ring that also reads a new, random key. What no longer fits
// is the oldest.
func (g *GossipRing) Stage() *GossipRing {
	others := append([]Key{NewKey()}, g.Others...)
	return &GossipRing{Epoch: g.Epoch + 1, Primary: g.Primary, Others: others[:min(len(others), maxGossipKeys-1)]}
}

// Promote returns the ring that encrypts with the newest of Others, and reads
// the primary of before; without Others it returns g.
func (g *GossipRing) Promote() *GossipRing {
	if len(g.Others) == 0 {
		return g
	}
	others := append([]Key{g.Primary}, g.Others[1:]...)
	return &GossipRing{Epoch: g.Epoch + 1, Primary: g.Others[0], Others: others}
}

// Retire returns the ring that knows its primary only.
func (g *GossipRing) Retire() *GossipRing {
	return &GossipRing{Epoch: g.Epoch + 1, Primary: g.Primary}
}

// Keys returns the primary and then the others, borrowed.
func (g *GossipRing) Keys() [][]byte {
	keys := [][]byte{g.Primary.Bytes()}
	for _, k := range g.Others {
		keys = append(keys, k.Bytes())
	}
	return keys
}

// Zero overwrites the keys, which other rings may share.
func (g *GossipRing) Zero() {
	g.Primary.Zero()
	for _, k := range g.Others {
		k.Zero()
	}
}

// Encode returns the ring in clear, for the state folder or for a verified
// peer; the caller owns it, at most 138 bytes:
//
//	version (1): 1 | epoch (8) | number of keys (1): 1 to 4 | keys (32 each), the primary first
func (g *GossipRing) Encode() []byte {
	keys := g.Keys()
	b := make([]byte, 0, gossipHeader+len(keys)*KeyBytes)
	b = append(b, gossipVersion)
	b = binary.BigEndian.AppendUint64(b, g.Epoch)
	b = append(b, byte(len(keys)))
	for _, k := range keys {
		b = append(b, k...)
	}
	return b
}

// ParseGossipRing reads what Encode made; b is borrowed.
func ParseGossipRing(b []byte) (*GossipRing, error) {
	if len(b) < gossipHeader || b[0] != gossipVersion {
		return nil, fmt.Errorf("crypto: %w: gossip keys: not of version %d", ErrMalformed, gossipVersion)
	}
	g := &GossipRing{Epoch: binary.BigEndian.Uint64(b[1:])}
	n := int(b[9])
	if n < 1 || n > maxGossipKeys || len(b) != gossipHeader+n*KeyBytes || g.Epoch == 0 || g.Epoch > math.MaxInt64 {
		return nil, fmt.Errorf("crypto: %w: gossip keys: %d keys in %d bytes, epoch %d", ErrMalformed, n, len(b), g.Epoch)
	}
	for i := range n {
		k, err := KeyFrom(b[gossipHeader+i*KeyBytes:][:KeyBytes])
		if err != nil {
			return nil, err
		}
		for _, have := range append([]Key{g.Primary}, g.Others...) {
			if k.Equal(have) {
				return nil, fmt.Errorf("crypto: %w: gossip keys: one key twice", ErrMalformed)
			}
		}
		if i == 0 {
			g.Primary = k
		} else {
			g.Others = append(g.Others, k)
		}
	}
	return g, nil
}
