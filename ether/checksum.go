package ether

import (
	"encoding/binary"
	"math/bits"
)

// Sum returns the ones' complement sum of b's big-endian 16-bit words (an odd
// last byte is padded with zero) and of initial (RFC 1071). It is folded to 16
// bits and not inverted. Of the two zeros of ones' complement it returns 0 only
// if all of b and initial are zero, otherwise 0xffff; every implementation
// gives the same value. b is borrowed.
func Sum(b []byte, initial uint16) uint16 {
	if len(b) >= sumFastMin {
		return sumFast(b, initial)
	}
	return sumGeneric(b, initial)
}

// sumGeneric is Sum in Go alone: the twin that assembly is checked against.
func sumGeneric(b []byte, initial uint16) uint16 {
	return sumTail(b, uint64(bits.ReverseBytes16(initial)))
}

// sumTail adds b to acc and folds. acc is a sum of little-endian words: ones'
// complement sums are the same in either byte order but for a swap at the end
// (RFC 1071, section 2 (B)), and little-endian is the order of the machines.
func sumTail(b []byte, acc uint64) uint16 {
	var c uint64
	for len(b) >= 64 {
		acc, c = bits.Add64(acc, binary.LittleEndian.Uint64(b[0:8]), 0)
		acc, c = bits.Add64(acc, binary.LittleEndian.Uint64(b[8:16]), c)
		acc, c = bits.Add64(acc, binary.LittleEndian.Uint64(b[16:24]), c)
		acc, c = bits.Add64(acc, binary.LittleEndian.Uint64(b[24:32]), c)
		acc, c = bits.Add64(acc, binary.LittleEndian.Uint64(b[32:40]), c)
		acc, c = bits.Add64(acc, binary.LittleEndian.Uint64(b[40:48]), c)
		acc, c = bits.Add64(acc, binary.LittleEndian.Uint64(b[48:56]), c)
		acc, c = bits.Add64(acc, binary.LittleEndian.Uint64(b[56:64]), c)
		// The first of the eight had no carry in, so acc is not all ones when
		// the last carries out: this addition does not.
		acc += c
		b = b[64:]
	}
	for len(b) >= 8 {
		acc, c = bits.Add64(acc, binary.LittleEndian.Uint64(b[0:8]), 0)
		acc += c
		b = b[8:]
	}
	// At most 7 bytes are left: one more word, padded with zero.
	var last uint64
	if len(b) >= 4 {
		last = uint64(binary.LittleEndian.Uint32(b[0:4]))
		b = b[4:]
		last |= tail3(b) << 32
	} else {
		last = tail3(b)
	}
	acc, c = bits.Add64(acc, last, 0)
	return bits.ReverseBytes16(foldSum(acc + c))
}

// tail3 returns the at most three bytes of b, the first in the low bits.
func tail3(b []byte) uint64 {
	switch len(b) {
	case 1:
		return uint64(b[0])
	case 2:
		return uint64(binary.LittleEndian.Uint16(b))
	case 3:
		return uint64(binary.LittleEndian.Uint16(b)) | uint64(b[2])<<16
	}
	return 0
}

// foldSum folds a sum of 64-bit words to 16 bits; not zero stays not zero.
func foldSum(acc uint64) uint16 {
	acc = acc>>32 + acc&0xffff_ffff // 33 bits
	acc = acc>>32 + acc&0xffff_ffff
	acc = acc>>16 + acc&0xffff // 17 bits
	acc = acc>>16 + acc&0xffff
	return uint16(acc)
}

// PseudoSum returns the sum of the pseudo-header of an L4 packet of lenBytes
// bytes (RFC 9293, section 3.1; RFC 8200, section 8.1); src and dst are 4 or
// 16 bytes.
func PseudoSum(proto uint8, src, dst []byte, lenBytes int) uint16 {
	acc := uint64(lenBytes) + uint64(proto)
	if len(src) == 4 && len(dst) == 4 {
		acc += uint64(binary.BigEndian.Uint32(src)) + uint64(binary.BigEndian.Uint32(dst))
	} else {
		for i := 0; i+4 <= len(src); i += 4 {
			acc += uint64(binary.BigEndian.Uint32(src[i:]))
		}
		for i := 0; i+4 <= len(dst); i += 4 {
			acc += uint64(binary.BigEndian.Uint32(dst[i:]))
		}
	}
	return foldSum(acc)
}
