package crypto

import (
	stdcrypto "crypto"
	"crypto/ed25519"
	"crypto/hkdf"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"crypto/x509"
	"encoding/base64"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"io"
	"log/slog"
)

// KeyBytes is the length of a Key.
const KeyBytes = 32

// Lengths of Ed25519.
const (
	PublicKeyBytes = ed25519.PublicKeySize
	SignatureBytes = ed25519.SignatureSize
)

const redacted = "[redacted]"

// Key is a secret of 32 bytes: a root secret, a gossip key, an overlay's key.
// However it is printed or encoded it reads [redacted]. Copies of a Key are one
// key: Zero on one empties all. The zero Key is none.
type Key struct{ at **[KeyBytes]byte }

// hide returns a pointer to a pointer to v. In a field that is not exported fmt
// calls no method, and follows one pointer, but never two.
func hide[T any](v *T) **T { return &v }

var (
	_ fmt.Formatter    = Key{}
	_ slog.LogValuer   = Key{}
	_ fmt.Formatter    = (*PrivateKey)(nil)
	_ slog.LogValuer   = (*PrivateKey)(nil)
	_ stdcrypto.Signer = (*PrivateKey)(nil)
)

// NewKey returns 32 random bytes.
func NewKey() Key {
	k := Key{hide(new([KeyBytes]byte))}
	_, _ = rand.Read((*k.at)[:]) // never fails
	return k
}

// KeyFrom copies b, which is borrowed and must have 32 bytes, not all of them zero.
func KeyFrom(b []byte) (Key, error) {
	if len(b) != KeyBytes {
		return Key{}, fmt.Errorf("crypto: %w: a key has %d bytes, not %d", ErrMalformed, KeyBytes, len(b))
	}
	k := Key{hide(new([KeyBytes]byte))}
	copy((*k.at)[:], b)
	if k.Equal(Key{hide(new([KeyBytes]byte))}) {
		return Key{}, fmt.Errorf("crypto: %w: a key of zeros", ErrMalformed)
	}
	return k, nil
}

// IsZero reports whether k is none. A key after Zero is one of zeros.
func (k Key) IsZero() bool { return k.at == nil }

// Bytes returns k's own bytes, borrowed until Zero; nil for none.
func (k Key) Bytes() []byte {
	if k.at == nil {
		return nil
	}
	return (*k.at)[:]
}

// Equal compares in constant time. No key equals none.
func (k Key) Equal(o Key) bool {
	return k.at != nil && o.at != nil && subtle.ConstantTimeCompare((*k.at)[:], (*o.at)[:]) == 1
}

// Zero overwrites the bytes, of all copies.
func (k Key) Zero() {
	if k.at != nil {
		clear((*k.at)[:])
	}
}

// String returns [redacted].
func (Key) String() string { return redacted }

// Format covers every verb.
func (Key) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, redacted) }

// LogValue implements slog.LogValuer.
func (Key) LogValue() slog.Value { return slog.StringValue(redacted) }

// MarshalText covers JSON and YAML.
func (Key) MarshalText() ([]byte, error) { return []byte(redacted), nil }

// derive is HKDF-SHA-256 (RFC 5869) with an empty salt: secret is random.
// info starts with what the key is for, which no other use starts with.
func derive(secret []byte, info string) Key {
	b, err := hkdf.Key(sha256.New, secret, nil, info, KeyBytes)
	if err != nil {
		panic("crypto: hkdf: " + err.Error()) // the length is a constant
	}
	k := Key{hide(new([KeyBytes]byte))}
	copy((*k.at)[:], b)
	clear(b)
	return k
}

// OverlayKey is the key of an overlay's epoch: HKDF-SHA-256 of the root secret,
// empty salt, info
//
//	"tulle overlay key v1" | 0 | length of name (1) | name | epoch (4)
//
// Only keepers have the root secret. overlay passes CheckName.
func OverlayKey(root Key, overlay string, epoch uint32) Key {
	if root.IsZero() || CheckName(overlay) != nil {
		panic("crypto: overlay key without a root secret or a name")
	}
	info := append([]byte("tulle overlay key v1\x00"), byte(len(overlay)))
	info = binary.BigEndian.AppendUint32(append(info, overlay...), epoch)
	return derive((*root.at)[:], string(info))
}

// PrivateKey is an Ed25519 key (RFC 8032): a node's or a CA's. It prints
// [redacted], and signs where the standard library wants a crypto.Signer.
type PrivateKey struct {
	at **[ed25519.PrivateKeySize]byte
}

// NewPrivateKey makes a random key.
func NewPrivateKey() *PrivateKey {
	seed := make([]byte, ed25519.SeedSize)
	_, _ = rand.Read(seed) // never fails
	defer clear(seed)
	return privateKeyFrom(ed25519.NewKeyFromSeed(seed))
}

func privateKeyFrom(key ed25519.PrivateKey) *PrivateKey {
	k := &PrivateKey{hide(new([ed25519.PrivateKeySize]byte))}
	copy((*k.at)[:], key)
	clear(key)
	return k
}

// ParsePrivateKey reads what Marshal made.
func ParsePrivateKey(der []byte) (*PrivateKey, error) {
	parsed, err := x509.ParsePKCS8PrivateKey(der)
	if err != nil {
		return nil, fmt.Errorf("crypto: %w: private key", ErrMalformed) // the cause may quote bytes
	}
	key, ok := parsed.(ed25519.PrivateKey)
	if !ok {
		return nil, fmt.Errorf("crypto: %w: the private key is a %T, not Ed25519", ErrMalformed, parsed)
	}
	return privateKeyFrom(key), nil
}

// Marshal returns the key as PKCS #8 DER, in clear; the caller owns it.
func (k *PrivateKey) Marshal() []byte {
	der, err := x509.MarshalPKCS8PrivateKey(ed25519.PrivateKey((*k.at)[:]))
	if err != nil {
		panic("crypto: marshal an Ed25519 key: " + err.Error()) // cannot fail for this type
	}
	return der
}

// PublicKey returns the other half.
func (k *PrivateKey) PublicKey() PublicKey { return PublicKey((*k.at)[ed25519.SeedSize:]) }

// Public implements crypto.Signer; it returns an ed25519.PublicKey.
func (k *PrivateKey) Public() stdcrypto.PublicKey {
	p := k.PublicKey()
	return ed25519.PublicKey(p[:])
}

// Sign implements crypto.Signer for Ed25519: message is not hashed before.
func (k *PrivateKey) Sign(r io.Reader, message []byte, opts stdcrypto.SignerOpts) ([]byte, error) {
	return ed25519.PrivateKey((*k.at)[:]).Sign(r, message, opts)
}

// sign returns the Ed25519 signature of message, 64 bytes.
func (k *PrivateKey) sign(message []byte) []byte {
	return ed25519.Sign(ed25519.PrivateKey((*k.at)[:]), message)
}

// Zero overwrites the key. It signs nothing that verifies from then on.
func (k *PrivateKey) Zero() { clear((*k.at)[:]) }

// String returns [redacted].
func (*PrivateKey) String() string { return redacted }

// Format covers every verb.
func (*PrivateKey) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, redacted) }

// LogValue implements slog.LogValuer.
func (*PrivateKey) LogValue() slog.Value { return slog.StringValue(redacted) }

// MarshalText covers JSON and YAML.
func (*PrivateKey) MarshalText() ([]byte, error) { return []byte(redacted), nil }

// PublicKey is an Ed25519 public key. The zero PublicKey is none.
type PublicKey [PublicKeyBytes]byte

// String returns the key as 43 characters of base64url.
func (p PublicKey) String() string { return base64.RawURLEncoding.EncodeToString(p[:]) }

// MarshalText returns String.
func (p PublicKey) MarshalText() ([]byte, error) { return []byte(p.String()), nil }

// UnmarshalText reads what MarshalText made.
func (p *PublicKey) UnmarshalText(b []byte) error {
	return unmarshalBase64(p[:], b)
}

// verify reports whether sig is p's signature of message.
func (p PublicKey) verify(message, sig []byte) bool {
	return len(sig) == ed25519.SignatureSize && ed25519.Verify(p[:], message, sig)
}

// Fingerprint is the SHA-256 of a CA's SubjectPublicKeyInfo (RFC 7469 section
// 2.4), which names a CA in a token.
type Fingerprint [sha256.Size]byte

// String returns 64 hexadecimal digits.
func (f Fingerprint) String() string { return hex.EncodeToString(f[:]) }

func fingerprintOf(c *x509.Certificate) Fingerprint {
	return sha256.Sum256(c.RawSubjectPublicKeyInfo)
}

// unmarshalBase64 fills dst, whole, from unpadded base64url without slack bits.
func unmarshalBase64(dst, text []byte) error {
	b, err := base64.RawURLEncoding.Strict().AppendDecode(nil, text)
	if err != nil || len(b) != len(dst) {
		return fmt.Errorf("crypto: %w: want %d bytes as base64url", ErrMalformed, len(dst))
	}
	copy(dst, b)
	return nil
}
