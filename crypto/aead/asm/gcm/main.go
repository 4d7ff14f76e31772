// Command gcm writes the assembly of AES-256-GCM for amd64 with 512-bit AES and
// carry-less multiply:
//
//	go run ./gcm >../gcm_amd64.s
//
// Notation. A vector is a register of 64 bytes, four blocks of AES side by side in
// its lanes. A group is eight vectors. H is the hash key, E(0).
//
// The hash (NIST SP 800-38D section 6.4) is a sum of products: of t blocks, the
// first is multiplied by H^t, the last by H^1. So all products of a record can be
// summed unreduced, and the sum reduced once. The table of powers is long enough
// for a record that fits a frame of Ethernet; a longer text is hashed in chunks,
// each of which takes in the reduced hash so far.
//
// A block with its bytes reversed is a polynomial with its bits reversed, which is
// reduced by the reversed polynomial, x^128 + x^127 + x^126 + x^121 + 1. The product
// of two such, so reduced, lacks a factor x (of 128 bits each, it has 255). The
// powers in the table have one more instead.
//
// Nothing branches on, or addresses memory by, what is secret: only lengths, and
// at the end whether the tag is right.
package main

import (
	"fmt"

	"github.com/mmcloughlin/avo/attr"
	. "github.com/mmcloughlin/avo/build"
	. "github.com/mmcloughlin/avo/operand"
	. "github.com/mmcloughlin/avo/reg"
)

// Of gcmTable in gcm_amd64.go, in bytes: the round keys are at 0, the powers of H
// from the highest down to the first behind them.
const (
	block    = 16
	vector   = 4 * block
	group    = 8 * vector
	rounds   = 14
	powers   = 96
	atPowers = (rounds + 1) * block
	atEnd    = atPowers + powers*block

	// A text of so many bytes is one chunk: the additional data and the lengths
	// take a power each.
	chunkMost = (powers - 2) * block
	// Of a longer one the first chunks have so many groups. The rest is then never
	// empty.
	chunkGroups = 2
)

// Operands of instructions: the order of 32-bit words that swaps the 64-bit words of
// a block, and the truth table of a sum of three.
const (
	swapWords  = 0x4e
	sumOfThree = 0x96
)

// The registers that hold the same all through seal and open.
var (
	text    = []VecPhysical{Z0, Z1, Z2, Z3, Z4, Z5, Z6, Z7}
	counter = Z8  // in each lane the nonce and the next counter, little-endian
	low     = Z9  // unreduced sum of products: of the lower words,
	high    = Z10 // of the upper ones,
	middle  = Z11 // of lower plus upper
	spare   = []VecPhysical{Z12, Z13, Z14, Z15}
	seed    = spare[3] // of a chunk, and
	power   = spare[1] // what it is multiplied by
	mask    = Z16      // in the first lane: E of the first counter, which hides the hash
	key     = []VecPhysical{Z17, Z18, Z19, Z20, Z21, Z22, Z23, Z24, Z25, Z26, Z27, Z28, Z29, Z30, Z31}

	table  = RDI
	src    = RSI
	dst    = RDX
	left   = RCX // bytes of text not yet done
	pow    = R8  // the power of the next block of text
	groups = R9  // whole groups left in this chunk
	back   = R10 // bytes from pow back to the power of the seed
	tail   = K1  // the bytes of the last vector that are text
)

var constSwap, constOrder, constFirst, constFour, constPoly Mem

func constants() {
	constSwap = lanes("gcmSwap", 0x08090a0b0c0d0e0f, 0x0001020304050607)
	constOrder = lanes("gcmOrder", 0x0706050403020100, 0x0c0d0e0f0b0a0908)
	// What the counters of the mask, and of the first vector, add to a nonce.
	constFirst = constant("gcmFirst", 0, 1<<32, 0, 2<<32, 0, 3<<32, 0, 4<<32, 0, 5<<32)
	constFour = lanes("gcmFour", 0, 4<<32)
	// The reversed polynomial without x^128. A product by it is one by its upper
	// word, and a swap of words for the 1.
	constPoly = constant("gcmPoly", 1, 0xc2<<56)
}

// constant returns where the words are.
func constant(name string, words ...uint64) Mem {
	m := GLOBL(name, attr.RODATA|attr.NOPTR)
	for i, w := range words {
		DATA(8*i, U64(w))
	}
	return m
}

// lanes returns a constant of a vector, the same in all lanes.
func lanes(name string, lo, hi uint64) Mem {
	return constant(name, lo, hi, lo, hi, lo, hi, lo, hi)
}

func main() {
	constants()
	expand()
	seal()
	open()
	Generate()
}

func at(base Register, offset int) Mem { return Mem{Base: base, Disp: offset} }

// expand writes the function that makes the table of a key.
func expand() {
	TEXT("gcmExpand", attr.NOSPLIT, "func(table *byte, key *byte)")
	Load(Param("table"), table)
	Load(Param("key"), src)
	schedule(X0, X1, X2, X3)
	hashKey(X0, X1, X2)
	fillPowers()
	end()
}

// schedule writes the round keys of AES-256 (FIPS 197 section 5.2). An instruction
// does the S-box: no table is looked up by a secret.
func schedule(a, b, t, u VecPhysical) {
	VMOVDQU(at(src, 0), a)
	VMOVDQU(at(src, block), b)
	VMOVDQU(a, at(table, 0))
	VMOVDQU(b, at(table, block))
	half := func(round, rcon, pick int, other, this VecPhysical) {
		VAESKEYGENASSIST(Imm(uint64(rcon)), other, t)
		VPSHUFD(Imm(uint64(pick)), t, t)
		for range 3 { // in the end each word has all before it added
			VPSLLDQ(Imm(4), this, u)
			VPXOR(u, this, this)
		}
		VPXOR(t, this, this)
		VMOVDQU(this, at(table, round*block))
	}
	for i := range rounds / 2 {
		half(2*i+2, 1<<i, 0xff, b, a)
		if 2*i+3 <= rounds {
			half(2*i+3, 0, 0xaa, a, b)
		}
	}
}

// hashKey leaves in h the hash key, bytes reversed, multiplied by x.
func hashKey(h, carry, top VecPhysical) {
	VMOVDQU(at(table, 0), h)
	for r := 1; r < rounds; r++ {
		VAESENC(at(table, r*block), h, h)
	}
	VAESENCLAST(at(table, rounds*block), h, h)
	VPSHUFB(constSwap, h, h)

	VPSRAD(Imm(31), h, carry)
	VPSHUFD(Imm(0xff), carry, carry) // all ones if the top bit is set
	VPAND(constPoly, carry, carry)
	VPSRLQ(Imm(63), h, top)
	VPSLLDQ(Imm(8), top, top) // the top bit of the lower word, to the upper
	VPADDQ(h, h, h)
	VPOR(top, h, h)
	VPXOR(carry, h, h)
}

// fillPowers writes the powers of the hash key, which is in X0, from the last: four
// one by one, then four at a time by the fourth.
func fillPowers() {
	by, now := Z0, Z1
	LEAQ(at(table, atEnd), pow)
	VMOVDQA64(by, now)
	VMOVDQU(now.AsX(), at(pow, -block))
	for i := 2; i <= 4; i++ {
		product(by, now)
		reduce()
		VMOVDQA64(low, now)
		VMOVDQU(now.AsX(), at(pow, -i*block))
	}
	VMOVDQU64(at(pow, -vector), now)
	VBROADCASTI32X4(at(pow, -vector), by)
	MOVQ(I32(powers/4-1), groups)
	Label("vectors")
	SUBQ(I32(vector), pow)
	product(by, now)
	reduce()
	VMOVDQA64(low, now)
	VMOVDQU64(now, at(pow, -vector))
	DECQ(groups)
	JNZ(LabelRef("vectors"))
}

// product makes a by b the sum, with three products of words instead of four
// (Karatsuba): on Zen 5 one takes two cycles of the only unit that can do it, and
// two rounds of AES take one.
func product(a, b VecPhysical) {
	VPCLMULQDQ(Imm(0x00), a, b, low)
	VPCLMULQDQ(Imm(0x11), a, b, high)
	halves(a, spare[0])
	halves(b, spare[2])
	VPCLMULQDQ(Imm(0x00), spare[0], spare[2], middle)
}

// halves leaves in to the sum of the words of v, lane by lane.
func halves(v, to VecPhysical) {
	VPSHUFD(Imm(swapWords), v, to)
	VPXORQ(v, to, to)
}

// multiply adds a by b to the sum. It is product otherwise.
func multiply(a Mem, b VecPhysical) code {
	return code{
		func() { VPSHUFD(Imm(swapWords), b, spare[1]) },
		func() { VPXORQ(b, spare[1], spare[1]) },
		func() { VPSHUFD(Imm(swapWords), a, spare[2]) },
		func() { VPXORQ(a, spare[2], spare[2]) },
		func() { VPCLMULQDQ(Imm(0x00), a, b, spare[0]) },
		func() { VPXORQ(spare[0], low, low) },
		func() { VPCLMULQDQ(Imm(0x11), a, b, spare[0]) },
		func() { VPXORQ(spare[0], high, high) },
		func() { VPCLMULQDQ(Imm(0x00), spare[1], spare[2], spare[1]) },
		func() { VPXORQ(spare[1], middle, middle) },
	}
}

// reduce leaves the sum, lane by lane, as a block in low. Twice it multiplies the
// lowest word by the polynomial and adds that to the rest, by which the word goes.
// The middle sum is added between the two: its lower word then is in its place, and
// the second swap brings its upper one into its own.
func reduce() {
	poly, folded := spare[0], spare[1]
	VBROADCASTI32X4(constPoly, poly)
	VPTERNLOGQ(Imm(sumOfThree), low, high, middle)
	for _, add := range []VecPhysical{middle, high} {
		VPCLMULQDQ(Imm(0x10), poly, low, folded)
		VPSHUFD(Imm(swapWords), low, low)
		VPTERNLOGQ(Imm(sumOfThree), folded, add, low)
	}
}

// fold leaves in the first lane of low the sum of all.
func fold() {
	half := spare[0]
	VEXTRACTI64X4(Imm(1), low, half.AsY())
	VPXOR(half.AsY(), low.AsY(), low.AsY())
	VEXTRACTI128(Imm(1), low.AsY(), half.AsX())
	VPXOR(half.AsX(), low.AsX(), low.AsX())
}

// code is instructions in order, not yet written.
type code []func()

func (c code) write() {
	for _, instruction := range c {
		instruction()
	}
}

// weave mixes two that do not depend on each other evenly, so that the CPU finds
// work for the units of both at any time.
func weave(a, b code) code {
	both := make(code, 0, len(a)+len(b))
	done := 0
	for i, instruction := range a {
		both = append(both, instruction)
		upTo := (i + 1) * len(b) / len(a)
		both = append(both, b[done:upTo]...)
		done = upTo
	}
	return both
}

// encrypt makes a group of key stream in text, but for the last round. Eight vectors
// keep two units of four cycles busy.
func encrypt() code {
	var c code
	for _, v := range text {
		c = append(c,
			func() { VPSHUFB(constOrder, counter, v) },
			func() { VPADDD(constFour, counter, counter) })
	}
	for _, v := range text {
		c = append(c, func() { VPXORQ(key[0], v, v) })
	}
	for r := 1; r < rounds; r++ {
		for _, v := range text {
			c = append(c, func() { VAESENC(key[r], v, v) })
		}
	}
	return c
}

// cover does the last round of n vectors and adds src to them, and writes them to
// dst. If partial, the last has only the bytes of tail, and zeros behind; where the
// rest of it reaches into a page that is not there, that takes as long as a record.
func cover(n int, partial bool) {
	for i, v := range text[:n] {
		from, last := at(src, i*vector), spare[i%len(spare)]
		if partial && i == n-1 {
			VMOVDQU8_Z(from, tail, last)
			VPXORQ(key[rounds], last, last)
		} else {
			VPXORQ(from, key[rounds], last)
		}
		VAESENCLAST(last, v, v) // adding to the last key adds to the result
	}
	for i, v := range text[:n] {
		to := at(dst, i*vector)
		if partial && i == n-1 {
			VMOVDQU8(v, tail, to)
			VMOVDQU8_Z(v, tail, v)
		} else {
			VMOVDQU64(v, to)
		}
	}
}

// hash adds n vectors of text by their powers to the sum.
func hash(n int) {
	for i, v := range text[:n] {
		VPSHUFB(constSwap, v, v)
		multiply(at(pow, i*vector), v).write()
	}
}

// hashMemory is hash of what is at from. It leaves text alone, and has, as cover,
// of a partial vector only the bytes of tail.
func hashMemory(from Register, n int, partial bool) code {
	var c code
	v := spare[3]
	for i := range n {
		m := at(from, i*vector)
		if partial && i == n-1 {
			c = append(c, func() { VMOVDQU8_Z(m, tail, v) })
		} else {
			c = append(c, func() { VMOVDQU64(m, v) })
		}
		c = append(c, func() { VPSHUFB(constSwap, v, v) })
		c = append(c, multiply(at(pow, i*vector), v)...)
	}
	return c
}

// firstBytes leaves in to the mask of n bytes, at most 64.
func firstBytes(n, scratch GPPhysical, to OpmaskPhysical) {
	MOVQ(I32(-1), scratch)
	BZHIQ(n, scratch, scratch)
	KMOVQ(scratch, to)
}

// begin loads the arguments and the round keys, and makes of the nonce the mask
// and the first counters, of the additional data the first seed.
func begin() {
	Load(Param("table"), table)
	for i, k := range key {
		VBROADCASTI32X4(at(table, i*block), k)
	}
	Load(Param("nonce"), RAX)
	VMOVQ(at(RAX, 0), counter.AsX())
	VPINSRD(Imm(2), at(RAX, 8), counter.AsX(), counter.AsX())
	maskOf()
	VSHUFI64X2(Imm(0), counter, counter, counter)      // to all lanes
	VPADDD(constFirst.Offset(block), counter, counter) // 32 bits: no carry into the nonce

	Load(Param("aad"), RAX)
	Load(Param("aadLen"), RBX)
	firstBytes(RBX, R11, tail)
	VMOVDQU8_Z(at(RAX, 0), tail, seed.AsX())
	VPSHUFB(constSwap, seed.AsX(), seed.AsX())
	texts()
}

// maskOf makes of the nonce, in counter, the mask.
func maskOf() {
	x := spare[0].AsX()
	VPADDD(constFirst, counter.AsX(), x)
	VPSHUFB(constOrder, x, x)
	VPXORQ(key[0].AsX(), x, x)
	for r := 1; r < rounds; r++ {
		VAESENC(key[r].AsX(), x, x)
	}
	VAESENCLAST(key[rounds].AsX(), x, mask.AsX())
}

// texts goes to the start of the text.
func texts() {
	Load(Param("dst"), dst)
	Load(Param("src"), src)
	Load(Param("n"), left)
}

// chunks hashes a record, whose aadLen is in RBX, and leaves the sealed hash in
// low. whole adds a group at src to the sum, last the vectors that are left.
//
// The seed of a chunk is what goes before its text: the additional data, a block
// with a power of its own, or the hash of the chunks before, which is added to
// the first block of text and so has the power of that.
func chunks(whole func(), last func(n int, partial bool)) {
	MOVQ(I32(block), back)
	Label("chunk")
	CMPQ(left, I32(chunkMost))
	JA(LabelRef("long"))
	lastChunk()
	JMP(LabelRef("seed"))
	Label("long")
	longChunk()
	Label("seed")
	XORQ(back, back)
	product(power, seed)

	TESTQ(groups, groups)
	JZ(LabelRef("last"))
	Label("group")
	whole()
	next()
	ADDQ(I32(group), pow)
	DECQ(groups)
	JNZ(LabelRef("group"))
	LEAQ(at(table, atEnd), RAX)
	CMPQ(pow, RAX)
	JB(LabelRef("last")) // only a long chunk has all powers

	reduce()
	fold()
	VMOVDQA(low.AsX(), seed.AsX())
	JMP(LabelRef("chunk"))

	Label("last")
	rest("last", last)
	reduce()
	fold()
	VPSHUFB(constSwap, low.AsX(), low.AsX())
	VPXORQ(mask.AsX(), low.AsX(), low.AsX())
}

// lastChunk sets up the chunk with the end of the text. The last power is that of
// the lengths, which go with the seed, in its second lane.
func lastChunk() {
	LEAQ(at(left, block-1), RAX)
	ANDQ(I8(-block), RAX)
	LEAQ(at(table, atEnd-block), pow)
	SUBQ(RAX, pow)
	LEAQ(at(left, -1), groups) // the last vectors are never none
	SHRQ(Imm(9), groups)
	seedPower()
	VINSERTI128(Imm(1), at(table, atEnd-block), power.AsY(), power.AsY())

	lengths := spare[0].AsX()
	Load(Param("n"), RAX)
	SHLQ(Imm(3), RAX) // in bits
	SHLQ(Imm(3), RBX)
	VMOVQ(RAX, lengths)
	VPINSRQ(Imm(1), RBX, lengths, lengths)
	VINSERTI128(Imm(1), lengths, seed.AsY(), seed.AsY())
}

// longChunk sets up a chunk of whole groups.
func longChunk() {
	LEAQ(at(table, atEnd-chunkGroups*group), pow)
	MOVQ(I32(chunkGroups), groups)
	seedPower()
}

// seedPower loads the power of the seed, into the first lane.
func seedPower() {
	MOVQ(pow, RAX)
	SUBQ(back, RAX)
	VMOVDQU(at(RAX, 0), power.AsX())
}

// next goes on by a group of text.
func next() {
	ADDQ(I32(group), src)
	ADDQ(I32(group), dst)
	SUBQ(I32(group), left)
}

// rest does the 1 to 512 bytes that are left by step, of which it writes one for
// each number of vectors.
func rest(name string, step func(n int, partial bool)) {
	for n := 1; n < len(text); n++ {
		CMPQ(left, I32(n*vector))
		JBE(LabelRef(fmt.Sprint(name, n)))
	}
	for n := len(text); n > 0; n-- {
		Label(fmt.Sprint(name, n))
		LEAQ(at(left, -(n-1)*vector), RAX)
		firstBytes(RAX, R11, tail)
		step(n, true)
		if n > 1 {
			JMP(LabelRef(name + "Done"))
		}
	}
	Label(name + "Done")
}

const recordArguments = "table, dst, src *byte, n int, nonce, aad *byte, aadLen int"

// seal writes the function that seals a record. While it encrypts a group it
// hashes the one before.
func seal() {
	TEXT("gcmSeal", attr.NOSPLIT, "func("+recordArguments+")")
	begin()
	encrypt().write()
	chunks(func() {
		cover(len(text), false)
		weave(encrypt(), hashMemory(dst, len(text), false)).write()
	}, func(n int, partial bool) {
		cover(n, partial)
		hash(n)
	})
	ADDQ(left, dst)
	VMOVDQU(low.AsX(), at(dst, 0))
	end()
}

// open writes the function that opens a record. While it hashes the end it makes
// the key stream of the first group, and decrypts nothing before the tag is right.
func open() {
	TEXT("gcmOpen", attr.NOSPLIT, "func("+recordArguments+") (ok bool)")
	begin()
	chunks(func() {
		hashMemory(src, len(text), false).write()
	}, func(n int, partial bool) {
		weave(encrypt(), hashMemory(src, n, partial)).write()
	})
	ADDQ(left, src)
	VPXOR(at(src, 0), low.AsX(), low.AsX())
	VPTEST(low.AsX(), low.AsX())
	SETEQ(AL)
	Store(AL, ReturnIndex(0))
	JNE(LabelRef("done"))

	texts()
	JMP(LabelRef("more"))
	Label("stream")
	cover(len(text), false)
	next()
	encrypt().write()
	Label("more")
	CMPQ(left, I32(group))
	JA(LabelRef("stream"))
	rest("stream", cover)
	Label("done")
	end()
}

// end clears all vectors and returns: nothing else in a Go program uses the upper
// 16, and what they hold of a key would outlive it.
func end() {
	for _, x := range []VecPhysical{X0, X1, X2, X3, X4, X5, X6, X7, X8, X9, X10, X11, X12, X13, X14, X15} {
		VPXOR(x, x, x)
	}
	for _, z := range append(key[:len(key):len(key)], mask) {
		VPXORQ(z, z, z)
	}
	VZEROUPPER()
	RET()
}
