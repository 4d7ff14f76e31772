package ether

import "golang.org/x/sys/cpu"

// sumFastMin is the length from which sumFast wins over sumGeneric (measured:
// they meet at about 128 bytes).
const sumFastMin = 192

// haveAVX2 is also false where the operating system does not save the
// registers: cpu asks XGETBV.
var haveAVX2 = cpu.X86.HasAVX2

// sumFast is sumGeneric with the whole blocks summed by AVX2.
func sumFast(b []byte, initial uint16) uint16 {
	if !haveAVX2 {
		return sumGeneric(b, initial)
	}
	n := len(b) &^ (sumBlock - 1)
	return sumTail(b[n:], sumBlocks(b[:n], uint64(initial>>8|initial<<8)))
}

// sumBlock is what sumBlocks takes at a time, in bytes.
const sumBlock = 128

// sumBlocks returns the sum of b's little-endian 64-bit words and of initial
// with end-around carry. len(b) is a multiple of sumBlock. It needs AVX2.
//
//go:noescape
func sumBlocks(b []byte, initial uint64) uint64
