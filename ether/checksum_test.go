package ether

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"testing"
)

// sumWords is RFC 1071 word by word: the reference of both twins.
func sumWords(b []byte, initial uint16) uint16 {
	sum := uint32(initial)
	for i, c := range b {
		sum += uint32(c) << (8 * (1 - i%2))
		sum = sum>>16 + sum&0xffff
	}
	return uint16(sum)
}

func randomBytes(n int) []byte {
	b := make([]byte, n)
	r := rand.NewChaCha8([32]byte{1})
	r.Read(b)
	return b
}

func TestSumExample(t *testing.T) {
	// RFC 1071, section 3.
	b := []byte{0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7}
	if got := Sum(b, 0); got != 0xddf2 {
		t.Errorf("Sum(%x, 0) = %#04x, want 0xddf2", b, got)
	}
}

func TestSumZeros(t *testing.T) {
	for _, n := range []int{0, 1, 20, 1500, 65535} {
		b := make([]byte, n)
		if got := Sum(b, 0); got != 0 {
			t.Errorf("Sum of %d zeros = %#04x, want 0", n, got)
		}
		if got := Sum(b, 0xffff); got != 0xffff {
			t.Errorf("Sum of %d zeros and 0xffff = %#04x, want 0xffff", n, got)
		}
		if n < 2 {
			continue
		}
		b[0], b[1] = 0xff, 0xff
		if got := Sum(b, 0); got != 0xffff {
			t.Errorf("Sum of 0xffff and %d zeros = %#04x, want 0xffff", n-2, got)
		}
	}
}

// TestSumTwins compares the assembly, the Go twin and the reference for every
// length and alignment. sumFast is called below its threshold too.
func TestSumTwins(t *testing.T) {
	const maxLen, maxAlign = 2100, 64
	ones := bytes.Repeat([]byte{0xff}, maxLen+maxAlign)
	for name, mem := range map[string][]byte{"random": randomBytes(maxLen + maxAlign), "ones": ones} {
		for align := range maxAlign {
			var want [maxLen + 1]uint16 // of mem[align:][:n], by one pass
			initial := uint16(align) * 0x0fff
			sum := uint32(initial)
			want[0] = initial
			for i, c := range mem[align : align+maxLen] {
				sum += uint32(c) << (8 * (1 - i%2))
				sum = sum>>16 + sum&0xffff
				want[i+1] = uint16(sum)
			}
			for n := range maxLen + 1 {
				b := mem[align : align+n : align+n]
				fast, generic, used := sumFast(b, initial), sumGeneric(b, initial), Sum(b, initial)
				if fast != want[n] || generic != want[n] || used != want[n] {
					t.Fatalf("%s, %d bytes at offset %d, initial %#04x: sumFast %#04x, sumGeneric %#04x, Sum %#04x, want %#04x",
						name, n, align, initial, fast, generic, used, want[n])
				}
			}
		}
	}
}

func TestSumLong(t *testing.T) {
	for name, b := range map[string][]byte{
		"random": randomBytes(MaxFrame), "ones": bytes.Repeat([]byte{0xff}, MaxFrame),
		"high halves": bytes.Repeat([]byte{0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff}, 8000),
	} {
		for _, initial := range []uint16{0, 1, 0x8000, 0xfffe, 0xffff} {
			want := sumWords(b, initial)
			if fast, generic := sumFast(b, initial), sumGeneric(b, initial); fast != want || generic != want {
				t.Errorf("%s, initial %#04x: sumFast %#04x, sumGeneric %#04x, want %#04x", name, initial, fast, generic, want)
			}
		}
	}
}

// TestSumParts: sums of parts of even length add up to the whole.
func TestSumParts(t *testing.T) {
	b := randomBytes(3000)
	want := Sum(b, 0)
	for cut := 0; cut <= len(b); cut += 2 {
		if got := Sum(b[cut:], Sum(b[:cut], 0)); got != want {
			t.Fatalf("cut at %d: %#04x, want %#04x", cut, got, want)
		}
	}
}

func TestPseudoSum(t *testing.T) {
	v4src, v4dst := []byte{192, 0, 2, 1}, []byte{255, 255, 255, 254}
	v6src, v6dst := randomBytes(16), bytes.Repeat([]byte{0xff}, 16)
	for _, tt := range []struct {
		src, dst []byte
		n        int
	}{{v4src, v4dst, 20}, {v4src, v4dst, 65535}, {v6src, v6dst, 0}, {v6src, v6dst, 65536}, {v6dst, v6dst, 1<<31 - 1}} {
		pseudo := append(append([]byte(nil), tt.src...), tt.dst...)
		pseudo = append(pseudo, byte(tt.n>>24), byte(tt.n>>16), byte(tt.n>>8), byte(tt.n), 0, 0, 0, 17)
		if got, want := PseudoSum(17, tt.src, tt.dst, tt.n), sumWords(pseudo, 0); got != want {
			t.Errorf("PseudoSum(17, %x, %x, %d) = %#04x, want %#04x", tt.src, tt.dst, tt.n, got, want)
		}
	}
}

func FuzzSum(f *testing.F) {
	f.Add([]byte{}, uint16(0))
	f.Add(bytes.Repeat([]byte{0xff}, 300), uint16(0xffff))
	f.Fuzz(func(t *testing.T, b []byte, initial uint16) {
		want := sumWords(b, initial)
		if fast, generic := sumFast(b, initial), sumGeneric(b, initial); fast != want || generic != want {
			t.Errorf("Sum(%x, %#04x): sumFast %#04x, sumGeneric %#04x, want %#04x", b, initial, fast, generic, want)
		}
	})
}

func BenchmarkSum(b *testing.B) {
	for _, fn := range []struct {
		name string
		sum  func([]byte, uint16) uint16
	}{{"sum", Sum}, {"fast", sumFast}, {"generic", sumGeneric}} {
		for _, n := range []int{20, 128, 192, 256, 512, 1420, 65535} {
			b.Run(fmt.Sprintf("%s/%d", fn.name, n), func(b *testing.B) {
				mem := randomBytes(n)
				b.SetBytes(int64(n))
				var s uint16
				for b.Loop() {
					s = fn.sum(mem, s)
				}
			})
		}
	}
}
