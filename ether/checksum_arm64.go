package ether

// sumFastMin is the length from which sumFast wins over sumGeneric; an
// estimate, since emulation tells nothing about time.
const sumFastMin = 256

// sumFast is sumGeneric with the whole blocks summed by NEON, which every
// arm64 has.
func sumFast(b []byte, initial uint16) uint16 {
	n := len(b) &^ (sumBlock - 1)
	return sumTail(b[n:], sumBlocks(b[:n], uint64(initial>>8|initial<<8)))
}

// sumBlock is what sumBlocks takes at a time, in bytes.
const sumBlock = 64

// sumBlocks returns the sum of b's little-endian 64-bit words and of initial
// with end-around carry. len(b) is a multiple of sumBlock.
//
//go:noescape
func sumBlocks(b []byte, initial uint64) uint64
