package main

import (
	. "github.com/mmcloughlin/avo/build"
	. "github.com/mmcloughlin/avo/operand"
	. "github.com/mmcloughlin/avo/reg"
)

// Poly1305 (RFC 8439 section 2.5) of eight blocks at a time: a number is three
// limbs of 44, 44 and 42 bits, each in a register that has it for eight lanes.
// Products are of 52-bit multiply-add, low and high halves in registers of their own.
//
// With N blocks, the first vector is filled up with lanes that hold none, which
// add nothing; each further one multiplies by r^8; at the end lane by lane the
// powers r^8 to r^1 that are still owed.
type limbs [3]VecVirtual

func newLimbs() limbs { return limbs{ZMM(), ZMM(), ZMM()} }

// factor is a multiplier: its limbs, and 20 times the upper two: 2^132 is 20
// modulo 2^130-5.
type factor struct {
	limbs
	twenty [3]VecVirtual // [0] is none
}

func newFactor(l limbs) factor {
	f := factor{limbs: l}
	for i := 1; i < 3; i++ {
		f.twenty[i] = ZMM()
		sixteen := ZMM()
		VPSLLQ(U8(4), l[i], sixteen)
		VPSLLQ(U8(2), l[i], f.twenty[i])
		VPADDQ(sixteen, f.twenty[i], f.twenty[i])
	}
	return f
}

// modulus has the masks of limbs, and 0.
type modulus struct{ low44, low42, zero VecVirtual }

func broadcast(word uint64) VecVirtual {
	r, z := GP64(), ZMM()
	MOVQ(U64(word), r)
	VPBROADCASTQ(r, z)
	return z
}

// times returns a*f + plus, carried; plus is used up, and none if nil.
//
// Bounds: limbs of a below 2^46 and of f below 2^45 give high sums below 2^45,
// so carries below 2^54; after the second carry limbs are below 2^44 + 2^15.
func (m modulus) times(a limbs, f factor, plus *limbs) limbs {
	var low, high limbs
	for i := range 3 {
		high[i] = ZMM()
		VMOVDQA64(m.zero, high[i])
		if plus != nil {
			low[i] = plus[i]
			continue
		}
		low[i] = ZMM()
		VMOVDQA64(m.zero, low[i])
	}
	for j := range 3 { // limb of a
		for i := range 3 { // limb of the product
			k := i - j
			by := VecVirtual(nil)
			if k >= 0 {
				by = f.limbs[k]
			} else {
				by = f.twenty[k+3]
			}
			VPMADD52LUQ(by, a[j], low[i])
			VPMADD52HUQ(by, a[j], high[i])
		}
	}
	return m.carry(low, high)
}

// carry moves what is above a limb to the next, of all three at once, twice.
func (m modulus) carry(low, high limbs) limbs {
	bits := [3]uint8{44, 44, 42}
	var over limbs
	for i := range 3 {
		over[i] = ZMM()
		VPSRLQ(U8(bits[i]), low[i], over[i])
		VPSLLQ(U8(52-bits[i]), high[i], high[i])
		VPADDQ(high[i], over[i], over[i])
	}
	m.pass(low, over)
	for i := range 3 {
		VPSRLQ(U8(bits[i]), low[i], over[i])
	}
	m.pass(low, over)
	return low
}

// pass keeps the limbs' own bits and adds what is over of the limb below: of the
// uppermost five times, for 2^130 is 5.
func (m modulus) pass(low, over limbs) {
	five := ZMM()
	VPSLLQ(U8(2), over[2], five)
	VPADDQ(over[2], five, five)
	VPANDQ(m.low44, low[0], low[0])
	VPANDQ(m.low44, low[1], low[1])
	VPANDQ(m.low42, low[2], low[2])
	VPADDQ(five, low[0], low[0])
	VPADDQ(over[0], low[1], low[1])
	VPADDQ(over[1], low[2], low[2])
}

// split makes limbs of eight blocks in two registers; lanes are then blocks 0, 4,
// 1, 5, 2, 6, 3, 7. The bit above each block is not set.
func (m modulus) split(lower, upper VecVirtual) limbs {
	l := newLimbs()
	lo, hi, t := ZMM(), ZMM(), ZMM()
	VPUNPCKLQDQ(upper, lower, lo)
	VPUNPCKHQDQ(upper, lower, hi)
	VPANDQ(m.low44, lo, l[0])
	VPSRLQ(U8(44), lo, t)
	VPSLLQ(U8(20), hi, l[1])
	VPORQ(t, l[1], l[1])
	VPANDQ(m.low44, l[1], l[1])
	VPSRLQ(U8(24), hi, l[2])
	return l
}

// powers returns r^8 in all lanes, and in the lanes of split what they are to be
// multiplied by at the end: r to the 8, 4, 7, 3, 6, 2, 5, 1.
func (m modulus) powers(oneTime Mem) (eighth factor, owed limbs) {
	r := m.clamp(oneTime)
	second := newFactor(m.times(r, newFactor(r), nil))
	// An exponent less one has three bits; each doubles a square into its lanes.
	odd := blend(0x33, r, second.limbs)
	t := m.times(odd, second, nil)
	fourth := newFactor(firstLane(t))
	pairs := blend(0x0f, odd, t)
	t = m.times(pairs, fourth, nil)
	return newFactor(firstLane(t)), blend(0x55, pairs, t)
}

// clamp returns r of the one-time key in all lanes (RFC 8439 section 2.5.1).
func (m modulus) clamp(oneTime Mem) limbs {
	lo, hi, t, mask := GP64(), GP64(), GP64(), GP64()
	MOVQ(oneTime, lo)
	MOVQ(oneTime.Offset(8), hi)
	MOVQ(U64(0x0ffffffc0fffffff), t)
	ANDQ(t, lo)
	MOVQ(U64(0x0ffffffc0ffffffc), t)
	ANDQ(t, hi)

	r := newLimbs()
	MOVQ(U64(1<<44-1), mask)
	MOVQ(lo, t)
	ANDQ(mask, t)
	VPBROADCASTQ(t, r[0])
	MOVQ(hi, t)
	SHRQ(U8(24), t)
	VPBROADCASTQ(t, r[2])
	SHRQ(U8(44), hi, lo) // lo is now what is above bit 44
	ANDQ(mask, lo)
	VPBROADCASTQ(lo, r[1])
	return r
}

// blend takes the lanes of mask from b and the others from a.
func blend(mask uint8, a, b limbs) limbs {
	k, r := K(), GP32()
	MOVL(U32(mask), r)
	KMOVB(r, k)
	l := newLimbs()
	for i := range l {
		VMOVDQA64(a[i], l[i])
		VMOVDQA64(b[i], k, l[i])
	}
	return l
}

func firstLane(a limbs) limbs {
	l := newLimbs()
	for i := range l {
		VPBROADCASTQ(a[i].AsX(), l[i])
	}
	return l
}

// poly computes the tag of the ciphertext at src, with the additional data in
// front and the lengths behind (RFC 8439 section 2.8).
func poly(rec, src Register) [2]GPVirtual {
	oneTime := Mem{Base: rec, Disp: atOneTime}
	m := modulus{broadcast(1<<44 - 1), broadcast(1<<42 - 1), broadcast(0)}
	above := broadcast(1 << 40) // 2^128, in the uppermost limb
	eighth, owed := m.powers(oneTime)

	left := GP64()
	MOVQ(Mem{Base: rec, Disp: atVectors}, left)
	acc := newLimbs()
	move(acc, m.first(rec, src, above))
	at, front := GP64(), GP64()
	MOVQ(src, at)
	MOVQ(Mem{Base: rec, Disp: atShift}, front)
	SHLQ(U8(3), front)
	SUBQ(front, at)
	DECQ(left)
	JZ(LabelRef("poly_sum"))

	Label("poly_more")
	ADDQ(U8(128), at)
	DECQ(left)
	JZ(LabelRef("poly_last"))
	lower, upper := ZMM(), ZMM()
	VMOVDQU64(Mem{Base: at}, lower)
	VMOVDQU64(Mem{Base: at, Disp: 64}, upper)
	l := m.split(lower, upper)
	VPORQ(above, l[2], l[2])
	move(acc, m.times(acc, eighth, &l))
	JMP(LabelRef("poly_more"))

	Label("poly_last")
	l = m.last(rec, at)
	VPORQ(above, l[2], l[2])
	move(acc, m.times(acc, eighth, &l))

	Label("poly_sum")
	return finish(oneTime, m.times(acc, newFactor(owed), nil))
}

func move(to, from limbs) {
	for i := range to {
		VMOVDQA64(from[i], to[i])
	}
}

// masked returns the mask of some kind at offset.
func masked(rec Register, offset int, load func(Op, Op)) OpmaskVirtual {
	k := K()
	load(Mem{Base: rec, Disp: offset}, k)
	return k
}

// part loads eight blocks of which the masks at offset say which bytes are text.
func part(rec, at Register, offset int) (halves [2]VecVirtual) {
	for i := range halves {
		halves[i] = ZMM()
		VMOVDQU8_Z(Mem{Base: at, Disp: i * 64}, masked(rec, offset+i*8, KMOVQ), halves[i])
	}
	return halves
}

// first loads the first vector: lanes without a block, the additional data, text,
// and the lengths if there is no further one. What is in front of the text is not
// touched, not even with a mask, for a buffer may begin there, and a page that is
// not there is slow. Behind it is the tag.
func (m modulus) first(rec, src Register, above VecVirtual) limbs {
	text := part(rec, src, atFirst)
	shift := ZMM()
	VPBROADCASTQ(Mem{Base: rec, Disp: atShift}, shift)
	var halves [2]VecVirtual
	for i := range halves {
		halves[i] = ZMM()
		VMOVDQU64(quadwords.Offset(i*64), halves[i])
		VPSUBQ(shift, halves[i], halves[i])
		VPERMI2Q_Z(text[1], text[0], masked(rec, atInText+i, KMOVB), halves[i])
		VBROADCASTI64X2(Mem{Base: rec, Disp: atAdditional}, masked(rec, atInAdditional+i, KMOVB), halves[i])
	}
	VBROADCASTI64X2(Mem{Base: rec, Disp: atLengths}, masked(rec, atInLengths, KMOVB), halves[1])
	l := m.split(halves[0], halves[1])
	VPORQ(above, l[2], masked(rec, atLanes, KMOVB), l[2])
	return l
}

// last loads the last vector of several: text, and the lengths.
func (m modulus) last(rec, at Register) limbs {
	halves := part(rec, at, atLast)
	k, r := K(), GP32()
	MOVL(U32(0xc0), r)
	KMOVB(r, k)
	VBROADCASTI64X2(Mem{Base: rec, Disp: atLengths}, k, halves[1])
	return m.split(halves[0], halves[1])
}

// finish adds up the lanes, reduces the sum and adds the second half of the
// one-time key.
func finish(oneTime Mem, a limbs) [2]GPVirtual {
	var h [3]GPVirtual
	for i := range h {
		y, x := YMM(), XMM()
		VEXTRACTI64X4(U8(1), a[i], y)
		VPADDQ(y, a[i].AsY(), y)
		VEXTRACTI128(U8(1), y, x)
		VPADDQ(x, y.AsX(), x)
		VPUNPCKHQDQ(x, x, y.AsX())
		VPADDQ(y.AsX(), x, x)
		h[i] = GP64()
		VMOVQ(x, h[i])
	}
	mask, t := GP64(), GP64()
	MOVQ(U64(1<<44-1), mask)
	ripple := func(i int) {
		MOVQ(h[i], t)
		SHRQ(U8(44), t)
		ANDQ(mask, h[i])
		ADDQ(t, h[i+1])
	}
	ripple(0)
	ripple(1)
	MOVQ(h[2], t)
	SHRQ(U8(42), t)
	SHLQ(U8(22), h[2])
	SHRQ(U8(22), h[2])
	LEAQ(Mem{Base: t, Index: t, Scale: 4}, t)
	ADDQ(t, h[0])
	ripple(0)
	ripple(1)

	// 130 bits in lo, hi and top.
	lo, hi, top := h[0], GP64(), h[2]
	MOVQ(h[1], t)
	SHLQ(U8(44), t)
	ORQ(t, lo)
	MOVQ(h[1], hi)
	SHRQ(U8(20), hi)
	MOVQ(h[2], t)
	SHLQ(U8(24), t)
	ORQ(t, hi)
	SHRQ(U8(40), top)

	// If adding 5 reaches 2^130, that without the bit is the sum modulo 2^130-5.
	lo5, hi5 := GP64(), GP64()
	MOVQ(lo, lo5)
	MOVQ(hi, hi5)
	ADDQ(U8(5), lo5)
	ADCQ(U8(0), hi5)
	ADCQ(U8(0), top)
	CMPQ(top, U8(4))
	CMOVQCC(lo5, lo)
	CMOVQCC(hi5, hi)
	ADDQ(oneTime.Offset(16), lo)
	ADCQ(oneTime.Offset(24), hi)
	return [2]GPVirtual{lo, hi}
}
