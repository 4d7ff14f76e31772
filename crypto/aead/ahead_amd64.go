package aead

import "encoding/binary"

// How many records key stream is made for at once, and how much for each: the block
// that Poly1305's key is of, and three blocks for a text.
const (
	aheadRecords = 6
	aheadLen     = 4 * 64
	aheadText    = aheadLen - 64
)

// Ahead is key stream of ChaCha20 for small records that are to come. One takes 122
// ns, for each step waits for the one before, and six at once take 155. It is made
// once nonces were seen to count, and never used for another key or nonce. What is
// not used stays until the next is made. The zero Ahead is ready; it must not be shared.
type Ahead struct {
	number uint64 // of the chacha
	last   uint64 // the number in the last nonce
	first  uint64 // and in that of ks[0]
	made   bool
	ks     [aheadRecords][aheadLen]byte
}

// stream returns the first blocks of the key stream for nonce, of which the last
// eight bytes are a number; nil if numbers do not count, or something else does, and
// of a nil Ahead.
func (a *Ahead) stream(c *chacha, nonce []byte) *[aheadLen]byte {
	if a == nil || binary.BigEndian.Uint32(nonce) != 0 {
		return nil
	}
	n := binary.BigEndian.Uint64(nonce[4:])
	// A few may be missing: they were lost, or are another worker's.
	const near = 4
	counts := a.number == c.number && n-a.last-1 < near
	if a.number != c.number {
		a.number, a.made = c.number, false
	}
	a.last = n
	if a.made && n-a.first < aheadRecords {
		return &a.ks[n-a.first]
	}
	if !counts {
		return nil
	}
	a.first, a.made = n, true
	var rows [aheadRecords][16]byte
	for i := range rows {
		binary.BigEndian.PutUint64(rows[i][8:], n+uint64(i))
	}
	chachaAhead(&a.ks, &c.key, &rows)
	return &a.ks[0]
}
