package crypto

import (
	"encoding/binary"
	"sync/atomic"

	"github.com/tulle-net/tulle/crypto/aead"
	"golang.org/x/sys/cpu"
)

// ParseSealed returns the session's index in a sealed datagram, borrowed; false
// if it is too short for one, or malformed as Opener.Open says. Nothing of it is
// authenticated.
func ParseSealed(d []byte) (index uint32, ok bool) {
	if len(d) < SealedOverhead || !wellFormed(d) {
		return 0, false
	}
	return binary.BigEndian.Uint32(d[4:]), true
}

// wellFormed reports whether d, at least four bytes, starts as the sealed form of
// this release does: no unknown flag, and nothing in the reserved bytes.
func wellFormed(d []byte) bool {
	return binary.BigEndian.Uint32(d)&^(knownSealedFlags<<16) == SealedByte<<24
}

// SessionForgeries is how many forged datagrams end a session: a guess that
// succeeds stays out of reach. RFC 9001 section 6.6 has 2^36 for
// ChaCha20Poly1305 and 2^52 for AES256GCM, with shorter packets than ours may be.
// At a million a second it takes an hour, and a session in use is not that old.
const SessionForgeries = 1 << 32

// Opener opens the datagrams of one session, in one direction. It is safe for
// concurrent use, each worker with a Scratch of its own, and takes no lock. For
// its key the same holds as for a Sealer's.
type Opener struct {
	aead   atomic.Pointer[aead.AEAD] // nil after Zero
	cipher Cipher
	index  uint32

	_      cpu.CacheLinePad // what is above is read per datagram and never written
	window replayWindow
	_      cpu.CacheLinePad

	replays, forgeries atomic.Uint64
}

// NewOpener returns the opener of the session that this node chose index for.
// k is borrowed until return; zero it then.
func NewOpener(k Key, c Cipher, index uint32) (*Opener, error) {
	a, err := c.aead(k)
	if err != nil {
		return nil, err
	}
	o := &Opener{cipher: c, index: index}
	o.aead.Store(&a)
	return o, nil
}

// Open verifies the datagram d and decrypts it in place; plaintext is a part of
// d, which is borrowed for as long as that is used. Errors, plain ones that
// nothing is allocated for:
//
//   - ErrSealedShort: shorter than SealedOverhead
//   - ErrSealedMalformed: another first byte, an unknown flag, a reserved byte
//     that is not zero, another session, or a counter that no session has
//   - ErrSealedReplay: the counter was accepted before, or is ReplayWindow or
//     more behind the highest
//   - ErrSealedForged: not of this key, or changed on the way; d is destroyed
//   - ErrSealedDropped: the opener was dropped, or has seen SessionForgeries
//
// A datagram that is refused moves nothing but the counters of Replays and Forgeries.
func (o *Opener) Open(w *Scratch, d []byte) (plaintext []byte, flags byte, counter uint64, err error) {
	if len(d) < SealedOverhead {
		return nil, 0, 0, ErrSealedShort
	}
	counter = binary.BigEndian.Uint64(d[8:])
	if !wellFormed(d) || binary.BigEndian.Uint32(d[4:]) != o.index || counter >= SessionDatagrams {
		return nil, 0, 0, ErrSealedMalformed
	}
	// Replays cost no decryption. What is fresh now need not be when it has been
	// verified: another worker may have had the same datagram.
	if !o.window.fresh(counter) {
		o.replays.Add(1)
		return nil, 0, 0, ErrSealedReplay
	}
	a := o.aead.Load()
	if a == nil {
		return nil, 0, 0, ErrSealedDropped
	}
	binary.BigEndian.PutUint64(w.nonce[nonceLen-8:], counter)
	flags = d[1]
	plaintext, err = (*a).OpenNext(&w.ahead, d[SealedHeaderLen:SealedHeaderLen], w.nonce[:], d[SealedHeaderLen:], d[:SealedHeaderLen])
	if err != nil {
		if o.forgeries.Add(1) >= SessionForgeries {
			o.Zero()
		}
		return nil, 0, 0, ErrSealedForged
	}
	if !o.window.accept(counter) {
		clear(plaintext)
		o.replays.Add(1)
		return nil, 0, 0, ErrSealedReplay
	}
	return plaintext, flags, counter, nil
}

// Index returns the session's index.
func (o *Opener) Index() uint32 { return o.index }

// Cipher returns the session's AEAD.
func (o *Opener) Cipher() Cipher { return o.cipher }

// Highest returns the highest counter that was verified; 0 also if there was
// none. The datagram that Open returned this counter for is the newest of them,
// so its source is where the peer is.
func (o *Opener) Highest() uint64 { return max(o.window.end.Load(), 1) - 1 }

// Received returns how many datagrams were opened.
func (o *Opener) Received() uint64 { return o.window.accepted.Load() }

// Replays returns how many datagrams were refused with ErrSealedReplay.
func (o *Opener) Replays() uint64 { return o.replays.Load() }

// Forgeries returns how many datagrams were refused with ErrSealedForged.
func (o *Opener) Forgeries() uint64 { return o.forgeries.Load() }

// Zero drops the key: Open refuses everything from now on. An Open that runs
// meanwhile ends as if before.
func (o *Opener) Zero() { o.aead.Store(nil) }
