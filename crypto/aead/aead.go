// Package aead seals records with the widest vectors that the CPU has.
//
// It has the two AEADs of a session, ChaCha20-Poly1305 (RFC 8439) and
// AES-256-GCM (NIST SP 800-38D), as [cipher.AEAD]: nonces of 12 bytes, tags of 16.
// On amd64 with AVX-512 they are assembly of this package, generated in asm;
// elsewhere, and for what a datagram never is, they are those of
// golang.org/x/crypto and of the standard library, byte for byte the same.
//
// Opening reads a record twice, to authenticate and then to decrypt it, so nobody
// may write to it meanwhile. What a key became goes with the AEAD, when the collector
// uses its memory again; the stack keeps the last record's key stream until it is
// used for something else.
//
// It does not choose between ciphers nor count nonces: that is package crypto's.
package aead

import (
	"crypto/aes"
	"crypto/cipher"

	"golang.org/x/crypto/chacha20poly1305"
)

const (
	keyLen   = 32
	nonceLen = 12
	tagLen   = 16
)

// AEAD is a [cipher.AEAD] for records whose nonces count: the last eight bytes of
// a nonce are a big-endian number, and that of the next record is mostly one more.
type AEAD interface {
	cipher.AEAD
	// SealNext is Seal with what w, of the caller alone, has ready.
	SealNext(w *Ahead, dst, nonce, plaintext, additional []byte) []byte
	// OpenNext is Open with what w, of the caller alone, has ready.
	OpenNext(w *Ahead, dst, nonce, ciphertext, additional []byte) ([]byte, error)
}

// library is an AEAD that gets nothing ready.
type library struct{ cipher.AEAD }

func (l library) SealNext(_ *Ahead, dst, nonce, plaintext, additional []byte) []byte {
	return l.Seal(dst, nonce, plaintext, additional)
}

func (l library) OpenNext(_ *Ahead, dst, nonce, ciphertext, additional []byte) ([]byte, error) {
	return l.Open(dst, nonce, ciphertext, additional)
}

// NewChaCha20Poly1305 returns the AEAD of RFC 8439. key is 32 bytes, borrowed
// until return; the error says that it is not.
func NewChaCha20Poly1305(key []byte) (AEAD, error) {
	narrow, err := chacha20poly1305.New(key)
	if err != nil {
		return nil, err
	}
	return widenChaCha(key, library{narrow}), nil
}

// NewAES256GCM returns AES-256-GCM. key is 32 bytes, borrowed until return; the
// error says that it is not.
func NewAES256GCM(key []byte) (AEAD, error) {
	if len(key) != keyLen {
		return nil, aes.KeySizeError(len(key))
	}
	block, err := aes.NewCipher(key)
	if err != nil {
		return nil, err
	}
	narrow, err := cipher.NewGCM(block)
	if err != nil {
		return nil, err
	}
	return widenGCM(key, library{narrow}), nil
}
