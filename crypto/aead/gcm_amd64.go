package aead

// gcm is AES-256-GCM (NIST SP 800-38D). It is never changed: any number of
// goroutines may use it.
type gcm struct {
	table  gcmTable
	narrow AEAD // for what does not fit
}

// gcmTable is what the assembly makes of a key: the 15 round keys of AES-256, the
// powers of the hash key from the 96th down to the first, and two blocks that a load
// of the last of them may touch, whatever they hold. Its generator has the offsets.
type gcmTable [(15 + 96 + 2) * 16]byte

// newGCM returns the AEAD of key, 32 bytes. narrow is of the same key.
func newGCM(key []byte, narrow AEAD) AEAD {
	g := &gcm{narrow: narrow}
	gcmExpand(&g.table, &key[0])
	return g
}

func (*gcm) NonceSize() int { return nonceLen }

func (*gcm) Overhead() int { return tagLen }

// Seal is as of [crypto/cipher.AEAD].
func (g *gcm) Seal(dst, nonce, plaintext, additional []byte) []byte {
	if !fits(nonce, plaintext, additional) {
		return g.narrow.Seal(dst, nonce, plaintext, additional)
	}
	n := len(plaintext)
	whole, out := grow(dst, n+tagLen)
	if misplaced(out, plaintext, additional) {
		return g.narrow.Seal(dst, nonce, plaintext, additional)
	}
	gcmSeal(&g.table, &out[0], &plaintext[0], n, &nonce[0], &additional[0], len(additional))
	return whole
}

// Open is as of [crypto/cipher.AEAD]. If the tag is wrong it clears what it would have
// written, as the libraries do.
func (g *gcm) Open(dst, nonce, ciphertext, additional []byte) ([]byte, error) {
	n := max(len(ciphertext)-tagLen, 0)
	if !fits(nonce, ciphertext[:n], additional) {
		return g.narrow.Open(dst, nonce, ciphertext, additional)
	}
	whole, out := grow(dst, n)
	if misplaced(out, ciphertext, additional) {
		return g.narrow.Open(dst, nonce, ciphertext, additional)
	}
	if !gcmOpen(&g.table, &out[0], &ciphertext[0], n, &nonce[0], &additional[0], len(additional)) {
		clear(out)
		return nil, errGCM
	}
	return whole, nil
}

// SealNext is Seal: with AES even a small record keeps the CPU busy.
func (g *gcm) SealNext(_ *Ahead, dst, nonce, plaintext, additional []byte) []byte {
	return g.Seal(dst, nonce, plaintext, additional)
}

// OpenNext is Open.
func (g *gcm) OpenNext(_ *Ahead, dst, nonce, ciphertext, additional []byte) ([]byte, error) {
	return g.Open(dst, nonce, ciphertext, additional)
}

// gcmExpand fills table from key, 32 bytes.
//
//go:noescape
func gcmExpand(table *gcmTable, key *byte)

// gcmSeal encrypts the n bytes of src, at least 1, to dst, and puts the tag, 16
// bytes, behind them. dst is src or does not overlap it. nonce is 12 bytes, aad
// has aadLen, 1 to 16.
//
//go:noescape
func gcmSeal(table *gcmTable, dst, src *byte, n int, nonce, aad *byte, aadLen int)

// gcmOpen reports whether the 16 bytes behind the n of src are their tag, and if
// so decrypts them to dst; if not, it writes nothing. The rest is as in gcmSeal.
//
//go:noescape
func gcmOpen(table *gcmTable, dst, src *byte, n int, nonce, aad *byte, aadLen int) (ok bool)
