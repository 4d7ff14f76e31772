// Command chacha writes the assembly of ChaCha20-Poly1305 (RFC 8439) for AVX-512:
//
//	go run ./chacha >../chacha_amd64.s
package main

import (
	"fmt"

	"github.com/mmcloughlin/avo/attr"
	. "github.com/mmcloughlin/avo/build"
	"github.com/mmcloughlin/avo/ir"
	. "github.com/mmcloughlin/avo/operand"
	. "github.com/mmcloughlin/avo/reg"
)

// Offsets into the Go type chachaRecord.
const (
	atOneTime    = 0   // Poly1305's key, written here
	atCounter    = 32  // row d of the state: the counter of blocks, and the nonce
	atAdditional = 48  // the additional data, a block
	atLengths    = 64  // the block of lengths
	atVectors    = 80  // how many vectors of 8 blocks Poly1305 has
	atShift      = 88  // quadwords of the first vector in front of the text
	atFirst      = 96  // two masks: which of the first 128 bytes are text
	atLast       = 112 // and which in the last vector
	// Masks of quadwords of the first vector: what is text or behind it, and what
	// is additional data; of ones of its upper half that are lengths; and of lanes
	// that hold a block.
	atInText       = 128
	atInAdditional = 130
	atInLengths    = 132
	atLanes        = 133
)

const (
	blockLen = 64
	groupLen = 4 // blocks that four registers hold, one of each row
	chunkLen = 6 * groupLen
)

func main() {
	constants()
	seal()
	tag()
	open()
	ahead()
	Generate()
}

// table is read-only data of quadwords.
func table(name string, words ...uint64) Mem {
	m := GLOBL(name, attr.RODATA|attr.NOPTR)
	for i, w := range words {
		DATA(i*8, U64(w))
	}
	return m
}

var sigma, lanes, four, quadwords Mem

func constants() {
	sigma = table("sigma", 0x3320646e61707865, 0x6b20657479622d32) // "expand 32-byte k"
	lanes = table("lanes", 0, 0, 1, 0, 2, 0, 3, 0)
	four = table("four", 4, 0, 4, 0, 4, 0, 4, 0)
	quadwords = table("quadwords", 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)
}

// text is what is left of a record.
type text struct {
	dst, src, n Register
}

func pointer(name string) Register { return Load(Param(name), GP64()) }

// seal writes the function that encrypts chunk after chunk.
func seal() {
	TEXT("chachaSeal", 0, "func(dst, src *byte, n int, key, rec *byte)")
	Doc("chachaSeal encrypts n bytes from src to dst.")
	rec := pointer("rec")
	crypt(text{pointer("dst"), pointer("src"), pointer("n")}, pointer("key"), rec, func(ks Register) {
		saveOneTime(ks, rec)
	})
	end()
}

// tag writes the function that authenticates what chachaSeal has encrypted.
func tag() {
	TEXT("chachaTag", 0, "func(tag, src *byte, rec *byte)")
	Doc("chachaTag writes the tag of the ciphertext at src.")
	to := pointer("tag")
	for i, half := range poly(pointer("rec"), pointer("src")) {
		MOVQ(half, Mem{Base: to, Disp: 8 * i})
	}
	end()
}

// open writes the function that authenticates all of the ciphertext, before it
// decrypts chunk after chunk.
func open() {
	TEXT("chachaOpen", 0, "func(dst, src *byte, n int, key, rec *byte) bool")
	Doc("chachaOpen decrypts n bytes from src to dst if the tag behind them is right.")
	t, rec := text{pointer("dst"), pointer("src"), pointer("n")}, pointer("rec")
	crypt(t, pointer("key"), rec, func(ks Register) {
		saveOneTime(ks, rec)
		tag := poly(rec, t.src)
		end, right := GP64(), GP8()
		LEAQ(Mem{Base: t.src, Index: t.n, Scale: 1}, end)
		XORQ(Mem{Base: end}, tag[0])
		XORQ(Mem{Base: end, Disp: 8}, tag[1])
		ORQ(tag[1], tag[0])
		SETEQ(right)
		Store(right, ReturnIndex(0))
		JNE(LabelRef("done"))
	})
	Label("done")
	end()
}

// end clears all vectors and returns: nothing else in a Go program uses the upper
// 16, and what they hold of a key would outlive it.
func end() {
	for i, z := range []VecPhysical{
		Z0, Z1, Z2, Z3, Z4, Z5, Z6, Z7, Z8, Z9, Z10, Z11, Z12, Z13, Z14, Z15,
		Z16, Z17, Z18, Z19, Z20, Z21, Z22, Z23, Z24, Z25, Z26, Z27, Z28, Z29, Z30, Z31,
	} {
		// Not VPXORQ(z, z, z), for which avo would keep z from use from the start.
		opcode, v, isa := "VPXORQ", Op(z), "AVX512F"
		if i < 16 {
			opcode, v, isa = "VPXOR", z.AsX(), "AVX"
		}
		Instruction(&ir.Instruction{Opcode: opcode, Operands: []Op{v, v, v}, ISA: []string{isa}})
	}
	VZEROUPPER()
	RET()
}

// ahead writes the function that makes key stream of several records, a group of
// each: of one small record it takes as long, for its steps wait for each other.
func ahead() {
	TEXT("chachaAhead", 0, "func(ks, key, rows *byte)")
	Doc("chachaAhead makes the first four blocks of six records.")
	ks, rows := pointer("ks"), pointer("rows")
	start := newStart(pointer("key"))
	var gs []group
	for i := range chunkLen / groupLen {
		VBROADCASTI32X4(Mem{Base: rows, Disp: 16 * i}, start.d)
		VPADDD(lanes, start.d, start.d)
		gs = append(gs, start.copy())
	}
	rounds(gs, "rounds_ahead")
	for i, g := range gs {
		VBROADCASTI32X4(Mem{Base: rows, Disp: 16 * i}, start.d)
		VPADDD(lanes, start.d, start.d)
		finishGroup(g, start, ks, i)
	}
	end()
}

// crypt applies the key stream to a text, chunk after chunk; once the first is
// there, and before any of it is used, begin is run.
func crypt(t text, key, rec Register, begin func(ks Register)) {
	chunk, ks := AllocLocal(chunkLen*blockLen+blockLen), GP64()
	LEAQ(chunk.Offset(blockLen-1), ks)
	ANDQ(I8(-blockLen), ks)
	// Block 0 is no key stream.
	need, skip := GP64(), GP64()
	MOVQ(U32(blockLen), skip)
	Label("chunk")
	LEAQ(Mem{Base: t.n, Index: skip, Scale: 1}, need)
	keystream(key, rec, ks, need)
	TESTQ(skip, skip)
	JZ(LabelRef("begun"))
	begin(ks)
	Label("begun")
	xor(t, ks, skip)
	XORQ(skip, skip)
	ADDL(U8(chunkLen), Mem{Base: rec, Disp: atCounter})
	TESTQ(t.n, t.n)
	JNZ(LabelRef("chunk"))
}

// saveOneTime copies Poly1305's key, the first half of block 0 (RFC 8439 section 2.6).
func saveOneTime(ks, rec Register) {
	y := YMM()
	VMOVDQU(Mem{Base: ks}, y)
	VMOVDQU(y, Mem{Base: rec, Disp: atOneTime})
}

// group is four blocks on their way, a row of each in a register.
type group struct{ a, b, c, d VecVirtual }

// keystream writes code for a chunk, or as much of it as has n bytes, at ks.
func keystream(key, rec, ks, n Register) {
	const few = 2 // one takes no less time: its steps wait for each other
	CMPQ(n, U32(few*groupLen*blockLen))
	JG(LabelRef("many"))
	blocks(key, rec, ks, few)
	JMP(LabelRef("generated"))
	Label("many")
	blocks(key, rec, ks, chunkLen/groupLen)
	Label("generated")
}

// newStart returns the start of a group but for row d.
func newStart(key Register) group {
	start := group{ZMM(), ZMM(), ZMM(), ZMM()}
	VBROADCASTI32X4(sigma, start.a)
	VBROADCASTI32X4(Mem{Base: key}, start.b)
	VBROADCASTI32X4(Mem{Base: key, Disp: 16}, start.c)
	return start
}

func (g group) copy() group {
	c := group{ZMM(), ZMM(), ZMM(), ZMM()}
	VMOVDQA64(g.a, c.a)
	VMOVDQA64(g.b, c.b)
	VMOVDQA64(g.c, c.c)
	VMOVDQA64(g.d, c.d)
	return c
}

// blocks computes size groups of one record.
func blocks(key, rec, ks Register, size int) {
	start := newStart(key)
	VBROADCASTI32X4(Mem{Base: rec, Disp: atCounter}, start.d)
	VPADDD(lanes, start.d, start.d)
	var gs []group
	for i := range size {
		g := start.copy()
		if i > 0 {
			VPADDD(four, gs[i-1].d, g.d)
		}
		gs = append(gs, g)
	}
	rounds(gs, fmt.Sprintf("rounds%d", size))
	for i, g := range gs {
		finishGroup(g, start, ks, i)
		if i < size-1 {
			VPADDD(four, start.d, start.d)
		}
	}
}

// rounds are the 20 of RFC 8439 section 2.3, the groups' steps in turn so that none
// waits for itself.
func rounds(gs []group, label string) {
	left := GP64()
	MOVQ(U32(10), left)
	Label(label)
	round(gs)
	diagonal(gs, 0x39, 0x4e, 0x93)
	round(gs)
	diagonal(gs, 0x93, 0x4e, 0x39)
	DECQ(left)
	JNZ(LabelRef(label))
}

// finishGroup adds the start, and writes the blocks to their place in ks.
func finishGroup(g, start group, ks Register, i int) {
	VPADDD(start.a, g.a, g.a)
	VPADDD(start.b, g.b, g.b)
	VPADDD(start.c, g.c, g.c)
	VPADDD(start.d, g.d, g.d)
	storeGroup(g, ks, i*groupLen*blockLen)
}

// round is a quarter round of all columns.
func round(gs []group) {
	for _, half := range [][2]uint8{{16, 12}, {8, 7}} {
		each(gs, func(g group) { VPADDD(g.b, g.a, g.a) })
		each(gs, func(g group) { VPXORD(g.a, g.d, g.d) })
		each(gs, func(g group) { VPROLD(U8(half[0]), g.d, g.d) })
		each(gs, func(g group) { VPADDD(g.d, g.c, g.c) })
		each(gs, func(g group) { VPXORD(g.c, g.b, g.b) })
		each(gs, func(g group) { VPROLD(U8(half[1]), g.b, g.b) })
	}
}

// diagonal turns the rows, so that diagonals are columns or columns again.
func diagonal(gs []group, b, c, d uint8) {
	each(gs, func(g group) { VPSHUFD(U8(b), g.b, g.b) })
	each(gs, func(g group) { VPSHUFD(U8(c), g.c, g.c) })
	each(gs, func(g group) { VPSHUFD(U8(d), g.d, g.d) })
}

func each(gs []group, step func(group)) {
	for _, g := range gs {
		step(g)
	}
}

// storeGroup turns four rows of four blocks into blocks.
func storeGroup(g group, ks Register, offset int) {
	ab, cd, z := ZMM(), ZMM(), ZMM()
	for half, lanes := range []uint8{0x44, 0xee} {
		VSHUFI32X4(U8(lanes), g.b, g.a, ab)
		VSHUFI32X4(U8(lanes), g.d, g.c, cd)
		for i, pick := range []uint8{0x88, 0xdd} {
			VSHUFI32X4(U8(pick), cd, ab, z)
			VMOVDQU64(z, Mem{Base: ks, Disp: offset + (2*half+i)*blockLen})
		}
	}
}

// xor applies what ks holds behind the first skip bytes, and moves t on. Its last
// bytes are taken first and stored last, as a whole register that overlaps what
// is in front: a masked access that reaches into a page that is not there takes as
// long as a record.
func xor(t text, ks, skip Register) {
	at, n, z, tail, end := GP64(), GP64(), ZMM(), ZMM(), GP64()
	LEAQ(Mem{Base: ks, Index: skip, Scale: 1}, at)
	MOVQ(U32(chunkLen*blockLen), n)
	SUBQ(skip, n)
	CMPQ(t.n, n)
	CMOVQLT(t.n, n)
	SUBQ(n, t.n)
	CMPQ(n, U8(blockLen))
	JL(LabelRef("short"))
	last := func(base Register) Mem { return Mem{Base: base, Index: n, Scale: 1, Disp: -blockLen} }
	VMOVDQU64(last(t.src), tail)
	VPXORQ(last(at), tail, tail)
	LEAQ(last(t.dst), end)

	Label("xor")
	VMOVDQU64(Mem{Base: t.src}, z)
	VPXORQ(Mem{Base: at}, z, z)
	VMOVDQU64(z, Mem{Base: t.dst})
	ADDQ(U8(blockLen), t.src)
	ADDQ(U8(blockLen), t.dst)
	ADDQ(U8(blockLen), at)
	SUBQ(U8(blockLen), n)
	CMPQ(n, U8(blockLen))
	JGE(LabelRef("xor"))
	VMOVDQU64(tail, Mem{Base: end})
	JMP(LabelRef("applied"))

	Label("short") // of one register
	mask, bits := K(), GP64()
	MOVQ(I32(-1), bits)
	BZHIQ(n, bits, bits)
	KMOVQ(bits, mask)
	VMOVDQU8_Z(Mem{Base: t.src}, mask, z)
	VPXORQ(Mem{Base: at}, z, z)
	VMOVDQU8(z, mask, Mem{Base: t.dst})
	Label("applied")
}
