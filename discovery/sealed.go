package discovery

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"slices"
	"sync"

	"github.com/hashicorp/memberlist"
)

// In a secure cluster gossip is sealed by memberlist, AES-256-GCM:
//
//	datagram  version (1): 1 | nonce (12) | sealed message | tag (16)
//	stream    10 | length of what follows (4) | version (1): 1 | nonce (12) | sealed message | tag (16)
//
// memberlist takes two things more from whoever holds a gossip key, and ends
// the process at both: version 0, whose padding it does not check, and on a
// stream an empty message. Neither is ever sent, so they stop here.
const (
	sealVersion = 1
	sealMessage = 10 // memberlist's message type
	// sealHeader of a stream: up to the version.
	sealHeader = 1 + 4 + 1
	// sealOverhead is the length of an empty message.
	sealOverhead = 1 + 12 + 16

	// KeyBytes is the length of a gossip key.
	KeyBytes = 32
	// MaxKeys bounds what every message is tried with.
	MaxKeys = 8
)

var errUnsealed = errors.New("discovery: the other end's gossip is not sealed: it is in an open cluster, or no tulle")

// sift passes on the datagrams that may be sealed, from begin on.
func (p *port) sift() {
	select {
	case <-p.ready:
	case <-p.done:
		return
	}
	for {
		select {
		case m := <-p.transport.PacketCh():
			if len(m.Buf) <= sealOverhead || m.Buf[0] != sealVersion {
				continue
			}
			select {
			case p.packets <- m:
			case <-p.done:
				return
			}
		case <-p.done:
			return
		}
	}
}

// PacketCh gives memberlist the datagrams that are its own.
func (p *port) PacketCh() <-chan *memberlist.Packet {
	if p.packets != nil {
		return p.packets
	}
	return p.transport.PacketCh()
}

// sealedConn is a stream that reads as broken unless it begins as a sealed one.
// One goroutine at a time reads it.
type sealedConn struct {
	net.Conn
	head [sealHeader]byte
	n    int // of head that was read
}

func (c *sealedConn) Read(b []byte) (int, error) {
	if c.n == sealHeader || len(b) == 0 {
		return c.Conn.Read(b)
	}
	n, err := c.Conn.Read(b[:min(len(b), sealHeader-c.n)])
	c.n += copy(c.head[c.n:], b[:n])
	if c.n > 0 && c.head[0] != sealMessage {
		return 0, errUnsealed
	}
	if c.n == sealHeader && (c.head[sealHeader-1] != sealVersion || binary.BigEndian.Uint32(c.head[1:]) <= sealOverhead) {
		return 0, errUnsealed
	}
	return n, err
}

// keyring holds the gossip keys.
type keyring struct {
	ring *memberlist.Keyring
	mu   sync.Mutex // serialises set
}

func newKeyring(keys [][]byte) (*keyring, error) {
	keys, err := checkKeys(keys)
	if err != nil {
		return nil, err
	}
	ring, err := memberlist.NewKeyring(keys, keys[0])
	if err != nil {
		return nil, fmt.Errorf("discovery: gossip keys: %w", err)
	}
	return &keyring{ring: ring}, nil
}

// checkKeys returns copies.
func checkKeys(keys [][]byte) ([][]byte, error) {
	if len(keys) == 0 || len(keys) > MaxKeys {
		return nil, fmt.Errorf("discovery: %d gossip keys: want 1 to %d", len(keys), MaxKeys)
	}
	out := make([][]byte, len(keys))
	for i, k := range keys {
		if len(k) != KeyBytes {
			return nil, fmt.Errorf("discovery: gossip key %d has %d bytes: want %d", i+1, len(k), KeyBytes)
		}
		out[i] = slices.Clone(k)
	}
	return out, nil
}

// set makes keys the ring: it reads with the new ones before it sends with the
// first, and sends with that before it forgets others.
func (r *keyring) set(keys [][]byte) error {
	keys, err := checkKeys(keys)
	if err != nil {
		return err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, k := range keys {
		if err := r.ring.AddKey(k); err != nil {
			return fmt.Errorf("discovery: gossip keys: %w", err)
		}
	}
	if err := r.ring.UseKey(keys[0]); err != nil {
		return fmt.Errorf("discovery: gossip keys: %w", err)
	}
	// From the last one on: RemoveKey moves what is behind the removed key, in
	// memory that a reader may be going through. So when only the primary
	// stays, nothing moves.
	had := r.ring.GetKeys()
	for i := len(had) - 1; i > 0; i-- {
		if slices.ContainsFunc(keys, func(k []byte) bool { return slices.Equal(k, had[i]) }) {
			continue
		}
		if err := r.ring.RemoveKey(had[i]); err != nil {
			return fmt.Errorf("discovery: gossip keys: %w", err)
		}
	}
	return nil
}
