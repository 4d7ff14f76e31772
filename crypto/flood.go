package crypto

import (
	stdcipher "crypto/cipher"
	"crypto/rand"
	"encoding/binary"
	"fmt"
	"sync"
	"sync/atomic"

	"golang.org/x/crypto/chacha20poly1305"
)

const (
	// MaxFloodSenders is how many senders a FloodOpener remembers.
	MaxFloodSenders = 4096

	floodWindow   = 64
	floodNonceLen = chacha20poly1305.NonceSizeX
	floodMinimum  = floodNonceLen + 1 + 1 + 8 + TagLen // a name of one character
)

// FloodKey is the key that frames of an overlay's epoch are sealed with where
// gossip floods them: HKDF-SHA-256 of the OverlayKey k, empty salt, info
//
//	"tulle flood key v1" | 0 | length of name (1) | name | epoch (4)
//
// overlay passes CheckName. The key is none if k was zeroed meanwhile.
func FloodKey(k Key, overlay string, epoch uint32) Key {
	if k.IsZero() || CheckName(overlay) != nil {
		panic("crypto: flood key without an overlay's key or a name")
	}
	if !k.live() {
		return Key{}
	}
	return derive(k.Bytes(), string(appendOverlay([]byte("tulle flood key v1\x00"), overlay, epoch)))
}

// floodAEAD returns XChaCha20-Poly1305 (draft-irtf-cfrg-xchacha-03): random nonces
// of 24 bytes do not meet.
func floodAEAD(k Key) (stdcipher.AEAD, error) {
	if !k.live() {
		return nil, fmt.Errorf("crypto: flood: %w: no key, or one that was dropped", ErrMalformed)
	}
	return chacha20poly1305.NewX(k.Bytes())
}

// FloodSealer seals the frames of one overlay's epoch that this node floods by
// gossip. It is safe for concurrent use. It is for some frames a second: it
// allocates.
//
//	nonce (24), random | XChaCha20-Poly1305(length of sender (1) | sender | sequence (8) | frame) | tag (16)
//
// All nodes of the overlay share the key. So any of them can seal a frame in the
// name of another, and with a high sequence make others refuse what that one
// sends: a flood is known to be of the overlay, and the sender's name is its word
// for it. What has to be of one node goes through a session.
//
// There is nothing to zero: what holds the key is out of reach, as in a Sealer.
// Drop the FloodSealer, and it is gone as soon as the collector uses its memory again.
type FloodSealer struct {
	aead   stdcipher.AEAD
	sender string
	last   atomic.Uint64
}

// NewFloodSealer returns the sealer of the node with the name sender. k is a
// FloodKey, borrowed until return. Sequences start behind after, which is more
// than any earlier run of this node used: Dir.NextSequence() << 20.
func NewFloodSealer(k Key, sender string, after uint64) (*FloodSealer, error) {
	if err := CheckName(sender); err != nil {
		return nil, err
	}
	aead, err := floodAEAD(k)
	if err != nil {
		return nil, err
	}
	s := &FloodSealer{aead: aead, sender: sender}
	s.last.Store(after)
	return s, nil
}

// Seal appends frame, sealed, to dst: 49 bytes and the sender's name more than it has.
// additional is authenticated and not sent; the opener has to give the same. All
// are borrowed, and none overlaps another.
func (s *FloodSealer) Seal(dst, frame, additional []byte) []byte {
	return s.seal(dst, frame, additional, randomNonce(), s.last.Add(1))
}

func randomNonce() (nonce [floodNonceLen]byte) {
	_, _ = rand.Read(nonce[:]) // never fails
	return nonce
}

func (s *FloodSealer) seal(dst, frame, additional []byte, nonce [floodNonceLen]byte, sequence uint64) []byte {
	inner := append(make([]byte, 0, 1+len(s.sender)+8+len(frame)), byte(len(s.sender)))
	inner = append(inner, s.sender...)
	inner = append(binary.BigEndian.AppendUint64(inner, sequence), frame...)
	return s.aead.Seal(append(dst, nonce[:]...), nonce[:], inner, additional)
}

// Flood is what a FloodOpener found in a flooded frame.
type Flood struct {
	// Sender is who says to have sent it; see FloodSealer.
	Sender   string
	Sequence uint64
	// Frame is the caller's.
	Frame []byte
}

// FloodOpener opens the frames of one overlay's epoch that come by gossip. It
// remembers, per sender, the last 64 sequences. It is safe for concurrent use.
type FloodOpener struct {
	aead  stdcipher.AEAD
	admit func(sender string) bool

	mu      sync.Mutex
	senders map[string]*floodSeen // at most MaxFloodSenders
}

// NewFloodOpener returns an opener. k is a FloodKey, borrowed until return. admit
// says whether a node with that name floods this overlay; it is asked about each
// flood that was authenticated, so that those who share the key cannot fill the
// opener with names that they make up. It must not call the opener.
func NewFloodOpener(k Key, admit func(sender string) bool) (*FloodOpener, error) {
	aead, err := floodAEAD(k)
	if err != nil {
		return nil, err
	}
	if admit == nil {
		panic("crypto: flood opener that admits nobody")
	}
	return &FloodOpener{aead: aead, admit: admit, senders: map[string]*floodSeen{}}, nil
}

// Open opens what FloodSealer.Seal made with the same additional; both are
// borrowed. Errors, plain ones:
//
//   - ErrSealedShort: shorter than any
//   - ErrSealedForged: not of this key, with other additional data, or changed
//   - ErrSealedMalformed: authentic, and not what Seal makes
//   - ErrFloodSender: its sender is not admitted, or one more than MaxFloodSenders
//   - ErrSealedReplay: the sender's sequence came before, or is 64 or more behind
func (o *FloodOpener) Open(sealed, additional []byte) (Flood, error) {
	if len(sealed) < floodMinimum {
		return Flood{}, ErrSealedShort
	}
	inner, err := o.aead.Open(nil, sealed[:floodNonceLen], sealed[floodNonceLen:], additional)
	if err != nil {
		return Flood{}, ErrSealedForged
	}
	r := &reader{b: inner}
	f := Flood{Sender: string(r.take(int(r.u8())))}
	f.Sequence = r.u64()
	f.Frame = r.b
	if r.bad || CheckName(f.Sender) != nil {
		return Flood{}, ErrSealedMalformed
	}
	if !o.admit(f.Sender) {
		return Flood{}, ErrFloodSender
	}
	if err := o.see(f.Sender, f.Sequence); err != nil {
		return Flood{}, err
	}
	return f, nil
}

// see remembers a sequence of sender.
func (o *FloodOpener) see(sender string, sequence uint64) error {
	o.mu.Lock()
	defer o.mu.Unlock()
	seen := o.senders[sender]
	if seen == nil {
		if len(o.senders) >= MaxFloodSenders {
			return ErrFloodSender
		}
		seen = &floodSeen{}
		o.senders[sender] = seen
	}
	if !seen.accept(sequence) {
		return ErrSealedReplay
	}
	return nil
}

// Forget frees the place of a sender that has left. Floods of it from before
// would be opened once more, if admit lets them: those that are late are for the
// caller to refuse.
func (o *FloodOpener) Forget(sender string) {
	o.mu.Lock()
	defer o.mu.Unlock()
	delete(o.senders, sender)
}

// floodSeen is the sequences of one sender that were accepted: the highest, and a
// bit for each of the floodWindow up to it, bit 0 for itself. The zero floodSeen
// has seen none.
type floodSeen struct{ highest, bits uint64 }

// accept reports whether sequence is new and within the window, and remembers it.
func (s *floodSeen) accept(sequence uint64) bool {
	switch {
	case sequence > s.highest:
		s.bits = s.bits<<(sequence-s.highest) | 1 // a shift of 64 and more leaves 0
		s.highest = sequence
	case s.highest-sequence >= floodWindow || s.bits>>(s.highest-sequence)&1 != 0:
		return false
	default:
		s.bits |= 1 << (s.highest - sequence)
	}
	return true
}
