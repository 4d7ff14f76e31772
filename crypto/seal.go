package crypto

import (
	"encoding/binary"
	"sync/atomic"

	"github.com/tulle-net/tulle/crypto/aead"
	"golang.org/x/sys/cpu"
)

// The sealed form; see docs/wire-sealed.md.
//
//	 0        1       2     3     4           8             16
//	| 0x04 | flags | 0 0 | session (32) | counter (64) | ciphertext | tag (16) |
//
// The 16 bytes of the header are the additional data. The nonce is four bytes
// of zero and the counter. Numbers are big-endian.
const (
	// SealedByte is the first byte of a sealed datagram.
	SealedByte = 0x04
	// SealedHeaderLen in bytes; the plaintext stands behind it.
	SealedHeaderLen = 16
	// TagLen in bytes, behind the ciphertext.
	TagLen = 16
	// SealedOverhead is what sealing adds, in bytes.
	SealedOverhead = SealedHeaderLen + TagLen
	// FlagUnfilled says that the checksum of the inner TCP or UDP is not filled in.
	FlagUnfilled = 1
	// FlagControl says that the plaintext is no VXLAN header and frame but a
	// message between the two nodes (docs/wire-sealed.md).
	FlagControl = 2
	// SessionDatagrams is how many datagrams one session takes: counters are below.
	SessionDatagrams = 1 << 32

	knownSealedFlags = FlagUnfilled | FlagControl
	nonceLen         = 12
)

// Scratch is the memory that one worker seals and opens with: what goes through
// an interface would be allocated otherwise. The zero Scratch is ready. It must
// not be shared, nor live on a stack that grows: keep it in the worker. It may hold
// key stream for a few counters that are to come, also of a session that was dropped,
// until there is some of another.
type Scratch struct {
	nonce [nonceLen]byte // the first four bytes stay zero
	ahead aead.Ahead
}

// Sealer seals the datagrams of one session, in one direction. It is safe for
// concurrent use, each worker with a Scratch of its own.
//
// It makes no copy of its key but the AEAD's own: what package aead and the
// libraries behind it make of it, the key itself for ChaCha20Poly1305, the key
// schedule and powers of the hash key for AES256GCM. Nobody outside can overwrite
// those: after Zero they are unreachable, and gone when the collector uses their
// memory again.
type Sealer struct {
	aead   atomic.Pointer[aead.AEAD] // nil after Zero
	cipher Cipher
	index  uint32

	_    cpu.CacheLinePad // what is above is read per datagram and never written
	next atomic.Uint64
	_    cpu.CacheLinePad
}

// NewSealer returns the sealer of the session that the receiver knows as index.
// A key must never be given to two sealers: they would use its counters twice. k
// is borrowed until return; zero it then.
func NewSealer(k Key, c Cipher, index uint32) (*Sealer, error) {
	a, err := c.aead(k)
	if err != nil {
		return nil, err
	}
	s := &Sealer{cipher: c, index: index}
	s.aead.Store(&a)
	return s, nil
}

// Reserve takes the counters first to first+n-1 for n datagrams, n at least 1.
// Nobody gets them again, whether they are used or not. !ok means that the
// session has not that many left, or was dropped: make another.
func (s *Sealer) Reserve(n int) (first uint64, ok bool) {
	if n < 1 {
		panic("crypto: no counters to reserve")
	}
	// The load keeps next from ever wrapping around.
	if uint64(n) > SessionDatagrams || s.next.Load() >= SessionDatagrams || s.aead.Load() == nil {
		return 0, false
	}
	end := s.next.Add(uint64(n))
	return end - uint64(n), end <= SessionDatagrams
}

// Seal writes header, ciphertext and tag to dst and returns their length,
// SealedOverhead more than plaintext; or 0 if the sealer was dropped: then
// nothing was written, and nothing may be sent. counter is of Reserve, and used
// once. dst has room for the length. plaintext is dst[SealedHeaderLen:] of its
// length, and sealed in place, or does not overlap dst. Both are borrowed.
func (s *Sealer) Seal(w *Scratch, dst []byte, counter uint64, flags byte, plaintext []byte) int {
	if counter >= SessionDatagrams || flags&^knownSealedFlags != 0 {
		panic("crypto: counter that was not reserved, or a flag that there is not")
	}
	a := s.aead.Load()
	if a == nil {
		return 0
	}
	n := SealedOverhead + len(plaintext)
	dst = dst[:n:n]
	binary.BigEndian.PutUint32(dst, SealedByte<<24|uint32(flags)<<16)
	binary.BigEndian.PutUint32(dst[4:], s.index)
	binary.BigEndian.PutUint64(dst[8:], counter)
	binary.BigEndian.PutUint64(w.nonce[nonceLen-8:], counter)
	(*a).SealNext(&w.ahead, dst[SealedHeaderLen:SealedHeaderLen], w.nonce[:], plaintext, dst[:SealedHeaderLen])
	return n
}

// Index returns the session's index, which the receiver chose.
func (s *Sealer) Index() uint32 { return s.index }

// Cipher returns the session's AEAD.
func (s *Sealer) Cipher() Cipher { return s.cipher }

// Sent returns how many counters were reserved, at most SessionDatagrams.
func (s *Sealer) Sent() uint64 { return min(s.next.Load(), SessionDatagrams) }

// Zero drops the key: from now on Reserve fails and Seal seals nothing. A Seal
// that runs meanwhile ends as if before.
func (s *Sealer) Zero() { s.aead.Store(nil) }
