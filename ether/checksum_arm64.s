#include "textflag.h"

// func sumBlocks(b []byte, initial uint64) uint64
//
// The 32-bit words of each 16 bytes are widened and added to eight 64-bit
// lanes, which cannot pass 64 bits.
TEXT ·sumBlocks(SB), NOSPLIT, $0-40
	MOVD b_base+0(FP), R0
	MOVD b_len+8(FP), R1
	MOVD initial+24(FP), R2
	LSR  $6, R1, R1
	CBZ  R1, done

	VEOR V0.B16, V0.B16, V0.B16
	VEOR V1.B16, V1.B16, V1.B16
	VEOR V2.B16, V2.B16, V2.B16
	VEOR V3.B16, V3.B16, V3.B16

loop:
	VLD1.P  64(R0), [V4.S4, V5.S4, V6.S4, V7.S4]
	VUADDW  V4.S2, V0.D2, V0.D2
	VUADDW  V5.S2, V1.D2, V1.D2
	VUADDW  V6.S2, V2.D2, V2.D2
	VUADDW  V7.S2, V3.D2, V3.D2
	VUADDW2 V4.S4, V0.D2, V0.D2
	VUADDW2 V5.S4, V1.D2, V1.D2
	VUADDW2 V6.S4, V2.D2, V2.D2
	VUADDW2 V7.S4, V3.D2, V3.D2
	SUBS    $1, R1, R1
	BNE     loop

	VADD V1.D2, V0.D2, V0.D2
	VADD V3.D2, V2.D2, V2.D2
	VADD V2.D2, V0.D2, V0.D2
	VMOV V0.D[0], R3
	VMOV V0.D[1], R4
	ADDS R3, R2, R2
	ADCS R4, R2, R2
	ADC  ZR, R2, R2

done:
	MOVD R2, ret+32(FP)
	RET
