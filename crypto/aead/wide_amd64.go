package aead

import (
	"errors"
	"unsafe"

	"golang.org/x/sys/cpu"
)

// wide reports what the assembly of this package needs: AVX-512 with 52-bit
// multiply, AES and carry-less multiply, all of which a CPU with 512-bit AES has
// (Intel Ice Lake, AMD Zen 4, and later). GODEBUG=cpu.avx512f=off turns it off.
var wide = cpu.X86.HasAVX2 && cpu.X86.HasAVX512F && cpu.X86.HasAVX512BW && cpu.X86.HasAVX512VL && cpu.X86.HasAVX512DQ &&
	cpu.X86.HasAVX512IFMA && cpu.X86.HasAVX512VAES && cpu.X86.HasAVX512VPCLMULQDQ &&
	cpu.X86.HasAES && cpu.X86.HasPCLMULQDQ && cpu.X86.HasBMI2

// The libraries' texts: nobody can tell the implementations apart.
var (
	errChaCha = errors.New("chacha20poly1305: message authentication failed")
	errGCM    = errors.New("cipher: message authentication failed")
)

func widenChaCha(key []byte, narrow AEAD) AEAD {
	if !wide {
		return narrow
	}
	return newChaCha(key, narrow)
}

func widenGCM(key []byte, narrow AEAD) AEAD {
	if !wide {
		return narrow
	}
	return newGCM(key, narrow)
}

// What the assembly is given: texts as long as a datagram can be, for it is not
// preempted, and additional data of one block, as a sealed datagram's header is.
const (
	maxText       = 1<<16 - 1
	maxAdditional = 16
)

// fits reports whether the assembly is for a record; narrow does all others.
func fits(nonce, text, additional []byte) bool {
	return len(nonce) == nonceLen && len(text) > 0 && len(text) <= maxText && len(additional) > 0 && len(additional) <= maxAdditional
}

// grow returns dst with n bytes more, which are tail; n is at least 1.
func grow(dst []byte, n int) (whole, tail []byte) {
	if total := len(dst) + n; cap(dst) >= total {
		whole = dst[:total]
	} else {
		whole = make([]byte, total)
		copy(whole, dst)
	}
	return whole, whole[len(dst):]
}

// misplaced reports whether out overlaps text otherwise than from its first byte,
// or additional at all; none of them is empty. That is the libraries' to judge.
func misplaced(out, text, additional []byte) bool {
	return &out[0] != &text[0] && overlap(out, text) || overlap(out, additional)
}

func overlap(a, b []byte) bool {
	pa, pb := uintptr(unsafe.Pointer(&a[0])), uintptr(unsafe.Pointer(&b[0]))
	return pa < pb+uintptr(len(b)) && pb < pa+uintptr(len(a))
}
