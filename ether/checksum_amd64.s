#include "textflag.h"

// func sumBlocks(b []byte, initial uint64) uint64
//
// Each 64-bit lane keeps two sums: R of the whole words modulo 2^64, and H of
// their high halves. The sum of the low halves is R - H<<32, exactly: neither
// sum of halves can pass 64 bits (b would need 2^32 words a lane). That is
// three operations for 32 bytes, where widening both halves takes four.
TEXT ·sumBlocks(SB), NOSPLIT, $0-40
	MOVQ b_base+0(FP), SI
	MOVQ b_len+8(FP), CX
	MOVQ initial+24(FP), AX
	SHRQ $7, CX
	JZ   done

	VPXOR Y0, Y0, Y0 // R, four times
	VPXOR Y1, Y1, Y1
	VPXOR Y2, Y2, Y2
	VPXOR Y3, Y3, Y3
	VPXOR Y4, Y4, Y4 // H, four times
	VPXOR Y5, Y5, Y5
	VPXOR Y6, Y6, Y6
	VPXOR Y7, Y7, Y7

loop:
	VMOVDQU 0(SI), Y8
	VMOVDQU 32(SI), Y9
	VMOVDQU 64(SI), Y10
	VMOVDQU 96(SI), Y11
	VPADDQ  Y8, Y0, Y0
	VPADDQ  Y9, Y1, Y1
	VPADDQ  Y10, Y2, Y2
	VPADDQ  Y11, Y3, Y3
	VPSRLQ  $32, Y8, Y8
	VPSRLQ  $32, Y9, Y9
	VPSRLQ  $32, Y10, Y10
	VPSRLQ  $32, Y11, Y11
	VPADDQ  Y8, Y4, Y4
	VPADDQ  Y9, Y5, Y5
	VPADDQ  Y10, Y6, Y6
	VPADDQ  Y11, Y7, Y7
	ADDQ    $128, SI
	DECQ    CX
	JNZ     loop

	// The sums of halves add up without carry; R only modulo 2^64, which is
	// what the subtraction wants.
	VPADDQ Y1, Y0, Y0
	VPADDQ Y3, Y2, Y2
	VPADDQ Y2, Y0, Y0
	VPADDQ Y5, Y4, Y4
	VPADDQ Y7, Y6, Y6
	VPADDQ Y6, Y4, Y4
	VPSLLQ $32, Y4, Y5
	VPSUBQ Y5, Y0, Y0  // the low halves

	// Four lanes to one: low halves in DX, high halves in BX.
	VEXTRACTI128 $1, Y0, X1
	VPADDQ       X1, X0, X0
	VEXTRACTI128 $1, Y4, X5
	VPADDQ       X5, X4, X4
	VPSRLDQ      $8, X0, X1
	VPADDQ       X1, X0, X0
	VPSRLDQ      $8, X4, X5
	VPADDQ       X5, X4, X4
	VMOVQ        X0, DX
	VMOVQ        X4, BX
	VZEROUPPER

	// 2^64 is 1 here, so BX<<32 is BX rotated.
	ROLQ $32, BX
	ADDQ DX, AX
	ADCQ BX, AX
	ADCQ $0, AX

done:
	MOVQ AX, ret+32(FP)
	RET
