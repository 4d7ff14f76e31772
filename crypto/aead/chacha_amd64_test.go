package aead

import (
	"bytes"
	"math/big"
	"slices"
	"testing"
	"unsafe"
)

// poly1305 is the tag of RFC 8439 section 2.8 in numbers without limbs.
func poly1305(oneTime [32]byte, additional, text []byte) [tagLen]byte {
	number := func(b []byte) *big.Int {
		b = slices.Clone(b)
		slices.Reverse(b)
		return new(big.Int).SetBytes(b)
	}
	p := new(big.Int).Lsh(big.NewInt(1), 130)
	p.Sub(p, big.NewInt(5))
	r := number(oneTime[:16])
	clamp, _ := new(big.Int).SetString("0ffffffc0ffffffc0ffffffc0fffffff", 16)
	r.And(r, clamp)
	sum := new(big.Int)
	block := func(b []byte) {
		m := number(b)
		m.SetBit(m, 128, 1)
		sum.Add(sum, m).Mul(sum, r).Mod(sum, p)
	}
	for _, part := range [][]byte{additional, text} {
		for b := range slices.Chunk(part, blockLen) {
			block(append(slices.Clone(b), make([]byte, blockLen-len(b))...))
		}
	}
	lengths := make([]byte, blockLen)
	lengths[0], lengths[8], lengths[9] = byte(len(additional)), byte(len(text)), byte(len(text)>>8)
	block(lengths)
	sum.Add(sum, number(oneTime[16:]))
	b := sum.FillBytes(make([]byte, 20))
	slices.Reverse(b)
	return [tagLen]byte(b)
}

// TestTag: one-time keys that no key of a session would give in a lifetime, and
// sums at the modulus.
func TestTag(t *testing.T) {
	if !wide {
		t.Log("this CPU has no AVX-512: there is nothing to test")
		return
	}
	tag := func(oneTime [32]byte, additional, text []byte) (got [tagLen]byte) {
		var rec chachaRecord
		rec.set(make([]byte, nonceLen), additional, len(text))
		rec.oneTime = oneTime
		chachaTag(&got, unsafe.SliceData(text), &rec)
		return got
	}
	s := newSource(3)
	half := func(b ...byte) []byte { return append(b, make([]byte, 16-len(b))...) }
	ones := bytes.Repeat([]byte{0xff}, 16)
	for _, r := range [][]byte{half(), half(1), half(2), half(0, 0, 0, 0, 4), append(make([]byte, 12), 0, 0, 0, 0x0f), ones, s.bytes(16), s.bytes(16)} {
		for _, add := range [][]byte{half(), half(1), ones, s.bytes(16)} {
			oneTime := [32]byte(append(slices.Clone(r), add...))
			for n := range 400 {
				for _, text := range [][]byte{make([]byte, n), bytes.Repeat([]byte{0xff}, n), s.bytes(n)} {
					additional := text[:min(n, 16)]
					if len(additional) == 0 {
						additional = ones
					}
					if got, want := tag(oneTime, additional, text), poly1305(oneTime, additional, text); got != want {
						t.Fatalf("r %x, s %x, %d bytes of %x: %x, want %x", r, add, n, additional, got, want)
					}
				}
			}
		}
	}
	// With r 1 the sum is that of the blocks, 2^128 more each, so it can be chosen:
	// from the modulus less 64 to 2^130 and 64 more, and with all bits set up to the
	// end of a limb, where what is above 2^130 is added five times.
	oneTime := [32]byte{0: 1}
	sum := func(blocks int, low *big.Int) {
		t.Helper()
		b := make([]byte, blockLen*blocks)
		n := len(b) - blockLen
		rest := new(big.Int).Add(big.NewInt(16), new(big.Int).Lsh(big.NewInt(int64(n)), 64))
		rest.Sub(low, rest).FillBytes(b[:blockLen]) // the additional data
		slices.Reverse(b[:blockLen])
		if got, want := tag(oneTime, b[:blockLen], b[blockLen:]), poly1305(oneTime, b[:blockLen], b[blockLen:]); got != want {
			t.Fatalf("%d blocks with %x: %x, want %x", blocks, low, got, want)
		}
	}
	for d := int64(-64); d < 64; d++ {
		low := new(big.Int).Lsh(big.NewInt(1), 128) // and three blocks' 2^128
		sum(2, low.Add(low, big.NewInt(d-5)))
	}
	for blocks := 1; blocks < 40; blocks++ {
		for _, bits := range []uint{88, 128} {
			for d := int64(1); d < 200; d++ {
				low := new(big.Int).Lsh(big.NewInt(1), bits)
				sum(blocks, low.Sub(low, big.NewInt(d)))
			}
		}
		for d := int64(1); d < 200; d++ {
			low := new(big.Int).Lsh(big.NewInt(1), 88) // the upper limb is not all ones
			low.Add(low, new(big.Int).Lsh(big.NewInt(1), 44))
			sum(blocks, low.Sub(low, big.NewInt(d)))
		}
	}
}

// TestForgeryIsNotDecrypted: the text is cleared anyway; here it was not written.
func TestForgeryIsNotDecrypted(t *testing.T) {
	if !wide {
		t.Log("this CPU has no AVX-512: there is nothing to test")
		return
	}
	var key [keyLen]byte
	for _, n := range []int{1, 64, 1418, 9000} {
		sealed, dst := make([]byte, n+tagLen), make([]byte, n)
		var rec chachaRecord
		rec.set(make([]byte, nonceLen), make([]byte, 16), n)
		if chachaOpen(&dst[0], &sealed[0], n, &key, &rec) || !bytes.Equal(dst, make([]byte, n)) {
			t.Errorf("%d bytes: opened, or wrote %x", n, dst)
		}
	}
}

// TestRecordOffsets: the assembly has them as numbers.
func TestRecordOffsets(t *testing.T) {
	var r chachaRecord
	got := []uintptr{unsafe.Offsetof(r.oneTime), unsafe.Offsetof(r.counter), unsafe.Offsetof(r.additional), unsafe.Offsetof(r.lengths),
		unsafe.Offsetof(r.vectors), unsafe.Offsetof(r.shift), unsafe.Offsetof(r.first), unsafe.Offsetof(r.last),
		unsafe.Offsetof(r.inText), unsafe.Offsetof(r.inAdditional), unsafe.Offsetof(r.inLengths), unsafe.Offsetof(r.lanes)}
	if want := []uintptr{0, 32, 48, 64, 80, 88, 96, 112, 128, 130, 132, 133}; !slices.Equal(got, want) {
		t.Errorf("offsets %v, want %v", got, want)
	}
}
