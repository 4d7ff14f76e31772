package crypto

import (
	"fmt"
	"strings"

	"github.com/tulle-net/tulle/crypto/aead"
	"golang.org/x/sys/cpu"
)

// Cipher is the AEAD of one session, as a byte of the wire. The zero Cipher is none.
type Cipher uint8

const (
	// ChaCha20Poly1305 is RFC 8439: every node has it, and it is fast without
	// special instructions.
	ChaCha20Poly1305 Cipher = 1
	// AES256GCM is NIST SP 800-38D with a key of 256 bits. Where the CPU has
	// instructions for it, it is some two to four times as fast as ChaCha20Poly1305;
	// elsewhere many times slower, in a time that depends on the key.
	AES256GCM Cipher = 2
)

// CipherAuto is what OfferCiphers takes for "what suits this CPU".
const CipherAuto = "auto"

// String returns the name that settings and the key log use.
func (c Cipher) String() string {
	switch c {
	case ChaCha20Poly1305:
		return "chacha20-poly1305"
	case AES256GCM:
		return "aes-256-gcm"
	}
	return fmt.Sprintf("cipher %d", uint8(c))
}

// aead returns c's AEAD: nonce of 12 bytes, tag of TagLen. key is borrowed.
func (c Cipher) aead(key Key) (aead.AEAD, error) {
	if !key.live() {
		return nil, fmt.Errorf("crypto: %v: %w: no key, or one that was dropped", c, ErrMalformed)
	}
	switch c {
	case ChaCha20Poly1305:
		return aead.NewChaCha20Poly1305(key.Bytes())
	case AES256GCM:
		return aead.NewAES256GCM(key.Bytes())
	}
	return nil, fmt.Errorf("crypto: %w: %v is unknown to this release", ErrMalformed, c)
}

// live reports whether k is a key, and not one after Zero.
func (k Key) live() bool {
	return !k.IsZero() && !k.Equal(Key{hide(new([KeyBytes]byte))})
}

// Ciphers is a set of Ciphers, and its own encoding as one byte: bit 0
// ChaCha20Poly1305, bit 1 AES256GCM. Bits of later releases stay and agree with
// nothing. The zero Ciphers is empty.
type Ciphers uint8

func (c Cipher) bit() Ciphers { return 1 << (c - 1) }

// Has reports whether c is one of cs.
func (cs Ciphers) Has(c Cipher) bool {
	return (c == ChaCha20Poly1305 || c == AES256GCM) && cs&c.bit() != 0
}

// Agree returns the Cipher of two nodes that offer cs and other: AES256GCM if
// both do, else ChaCha20Poly1305 if both do; false if they have none in common.
func (cs Ciphers) Agree(other Ciphers) (Cipher, bool) {
	for _, c := range []Cipher{AES256GCM, ChaCha20Poly1305} {
		if (cs & other).Has(c) {
			return c, true
		}
	}
	return 0, false
}

// String returns the names with commas between.
func (cs Ciphers) String() string {
	var names []string
	for _, c := range []Cipher{ChaCha20Poly1305, AES256GCM} {
		if cs.Has(c) {
			names = append(names, c.String())
		}
	}
	return strings.Join(names, ",")
}

// OfferCiphers returns what this node offers: for CipherAuto ChaCha20Poly1305,
// and AES256GCM where the CPU has instructions for it; for a Cipher's name that
// one only. AES256GCM without the instructions is an error: it would be slow, and
// its time would tell of the key.
func OfferCiphers(pin string) (Ciphers, error) { return offerCiphers(pin, hasAES()) }

func offerCiphers(pin string, instructions bool) (Ciphers, error) {
	switch {
	case pin == CipherAuto && instructions:
		return ChaCha20Poly1305.bit() | AES256GCM.bit(), nil
	case pin == CipherAuto, pin == ChaCha20Poly1305.String():
		return ChaCha20Poly1305.bit(), nil
	case pin == AES256GCM.String() && instructions:
		return AES256GCM.bit(), nil
	case pin == AES256GCM.String():
		return 0, fmt.Errorf("crypto: cipher %v: this CPU has no instructions for it: use %v, or %s", AES256GCM, ChaCha20Poly1305, CipherAuto)
	}
	return 0, fmt.Errorf("crypto: cipher %.40q: use %s, %v or %v", pin, CipherAuto, ChaCha20Poly1305, AES256GCM)
}

// hasAES reports whether the standard library uses instructions for AES and for
// GHASH here; the conditions are those of crypto/internal/fips140/aes/gcm. 32-bit
// Arm is not among them, though an Armv8 CPU in that mode has the instructions.
func hasAES() bool {
	return cpu.X86.HasAES && cpu.X86.HasPCLMULQDQ && cpu.X86.HasSSE41 && cpu.X86.HasSSSE3 ||
		cpu.ARM64.HasAES && cpu.ARM64.HasPMULL
}
