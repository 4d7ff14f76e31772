package aead

import (
	"crypto/subtle"
	"sync/atomic"
)

// chacha is ChaCha20-Poly1305 (RFC 8439 section 2.8). It is never changed: any
// number of goroutines may use it.
type chacha struct {
	key    [keyLen]byte
	number uint64
	narrow AEAD // for what does not fit
}

// numbers counts those that were made. An Ahead knows them by number: an address may be
// another's one day.
var numbers atomic.Uint64

// newChaCha returns the AEAD of key, 32 bytes. narrow is of the same key.
func newChaCha(key []byte, narrow AEAD) AEAD {
	return &chacha{[keyLen]byte(key), numbers.Add(1), narrow}
}

func (*chacha) NonceSize() int { return nonceLen }

func (*chacha) Overhead() int { return tagLen }

// Seal is as of [crypto/cipher.AEAD].
func (c *chacha) Seal(dst, nonce, plaintext, additional []byte) []byte {
	return c.SealNext(nil, dst, nonce, plaintext, additional)
}

// SealNext is as of [AEAD]; w may be nil.
func (c *chacha) SealNext(w *Ahead, dst, nonce, plaintext, additional []byte) []byte {
	if !fits(nonce, plaintext, additional) {
		return c.narrow.Seal(dst, nonce, plaintext, additional)
	}
	n := len(plaintext)
	whole, out := grow(dst, n+tagLen)
	if misplaced(out, plaintext, additional) {
		return c.narrow.Seal(dst, nonce, plaintext, additional)
	}
	var rec chachaRecord
	rec.set(nonce, additional, n)
	if ks := c.ready(w, nonce, n); ks != nil {
		rec.oneTime = [32]byte(ks[:])
		subtle.XORBytes(out, plaintext, ks[64:])
	} else {
		chachaSeal(&out[0], &plaintext[0], n, &c.key, &rec)
	}
	chachaTag((*[tagLen]byte)(out[n:]), &out[0], &rec)
	return whole
}

// Open is as of [crypto/cipher.AEAD].
func (c *chacha) Open(dst, nonce, ciphertext, additional []byte) ([]byte, error) {
	return c.OpenNext(nil, dst, nonce, ciphertext, additional)
}

// OpenNext is as of [AEAD]; w may be nil. If the tag is wrong it clears what it
// would have written, as the libraries do.
func (c *chacha) OpenNext(w *Ahead, dst, nonce, ciphertext, additional []byte) ([]byte, error) {
	n := max(len(ciphertext)-tagLen, 0)
	if !fits(nonce, ciphertext[:n], additional) {
		return c.narrow.Open(dst, nonce, ciphertext, additional)
	}
	whole, out := grow(dst, n)
	if misplaced(out, ciphertext, additional) {
		return c.narrow.Open(dst, nonce, ciphertext, additional)
	}
	var rec chachaRecord
	rec.set(nonce, additional, n)
	right := false
	if ks := c.ready(w, nonce, n); ks != nil {
		rec.oneTime = [32]byte(ks[:])
		var tag [tagLen]byte
		chachaTag(&tag, &ciphertext[0], &rec)
		if right = subtle.ConstantTimeCompare(tag[:], ciphertext[n:]) == 1; right {
			subtle.XORBytes(out, ciphertext[:n], ks[64:])
		}
	} else {
		right = chachaOpen(&out[0], &ciphertext[0], n, &c.key, &rec)
	}
	if !right {
		clear(out)
		return nil, errChaCha
	}
	return whole, nil
}

// ready returns key stream of w for a record with a text of n bytes, or nil.
func (c *chacha) ready(w *Ahead, nonce []byte, n int) *[aheadLen]byte {
	if n > aheadText {
		return nil
	}
	return w.stream(c, nonce)
}

// Poly1305 has blocks of blockLen bytes, and the assembly vectorBlocks of them at a time.
const (
	blockLen     = 16
	vectorBlocks = 8
)

// chachaRecord is what the assembly is told about a record; its offsets are in
// asm/chacha. Poly1305 runs over a block of additional data, the text in blocks,
// and a block of lengths, eight at a time. Lanes without a block are in front.
type chachaRecord struct {
	oneTime          [32]byte // Poly1305's key
	counter          uint32
	nonce            [nonceLen]byte
	additional       [blockLen]byte
	lengths          [2]uint64
	vectors          uint64
	shift            uint64    // quadwords of the first vector in front of the text
	first, last      [2]uint64 // masks of bytes that are text
	inText           uint16    // masks of quadwords of the first vector
	inAdditional     uint16
	inLengths, lanes uint8
}

func (r *chachaRecord) set(nonce, additional []byte, n int) {
	copy(r.nonce[:], nonce)
	copy(r.additional[:], additional)
	r.lengths = [2]uint64{uint64(len(additional)), uint64(n)}

	blocks := 1 + (n+blockLen-1)/blockLen + 1
	vectors := (blocks + vectorBlocks - 1) / vectorBlocks
	empty := vectors*vectorBlocks - blocks
	r.vectors = uint64(vectors)
	r.shift = uint64(2 * (empty + 1))
	r.first = maskTo(min(n, vectorBlocks*blockLen))
	r.last = maskTo((empty+1)*blockLen + n - (vectors-1)*vectorBlocks*blockLen)
	r.inText = 0xffff << r.shift
	r.inAdditional = 3 << (2 * empty)
	if vectors == 1 {
		r.inLengths = 0xc0
	}
	r.lanes = lanesFrom[empty]
}

// maskTo returns the mask of the first n bytes of 128.
func maskTo(n int) [2]uint64 {
	return [2]uint64{^(^uint64(0) << n), ^(^uint64(0) << max(n-64, 0))}
}

// lanesFrom has the mask of the lanes of block i and above: lanes are the blocks
// 0, 4, 1, 5, 2, 6, 3, 7.
var lanesFrom = [vectorBlocks]uint8{0xff, 0xfe, 0xfa, 0xea, 0xaa, 0xa8, 0xa0, 0x80}

// chachaSeal encrypts n bytes from src to dst, sets rec.oneTime and moves
// rec.counter: a rec is for one record.
//
//go:noescape
func chachaSeal(dst, src *byte, n int, key *[keyLen]byte, rec *chachaRecord)

// chachaTag writes the tag of the ciphertext at src. It reads rec.oneTime.
//
//go:noescape
func chachaTag(tag *[tagLen]byte, src *byte, rec *chachaRecord)

// chachaAhead makes four blocks of key stream of each of some records, from the
// first block of each. rows have their counter of blocks, 0, and their nonce.
//
//go:noescape
func chachaAhead(ks *[aheadRecords][aheadLen]byte, key *[keyLen]byte, rows *[aheadRecords][16]byte)

// chachaOpen decrypts n bytes from src to dst, and reports true, if the tag behind
// them is right; else it writes nothing. It sets rec.oneTime and moves rec.counter.
//
//go:noescape
func chachaOpen(dst, src *byte, n int, key *[keyLen]byte, rec *chachaRecord) bool
