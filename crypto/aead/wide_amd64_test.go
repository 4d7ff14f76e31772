package aead

import (
	"encoding/binary"
	"fmt"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// TestWide: what the kernel says of the CPU.
func TestWide(t *testing.T) {
	info, err := os.ReadFile("/proc/cpuinfo")
	if err != nil {
		t.Fatal(err)
	}
	flags := strings.Fields(regexp.MustCompile(`(?m)^flags.*`).FindString(string(info)))
	want := !strings.Contains(os.Getenv("GODEBUG"), "cpu.avx512f=off")
	for _, flag := range []string{"avx2", "avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512ifma", "vaes", "vpclmulqdq", "aes", "pclmulqdq", "bmi2"} {
		want = want && slices.Contains(flags, flag)
	}
	if wide != want {
		t.Errorf("wide is %t, want %t", wide, want)
	}
}

// refusing is an AEAD that nothing must come to.
type refusing struct{ AEAD }

// TestDatagramIsWide: on a CPU for it, it is the assembly that seals and opens a
// datagram, between its header and its tag, of any length.
func TestDatagramIsWide(t *testing.T) {
	if !wide {
		t.Log("this CPU has no AVX-512: there is nothing to test")
		return
	}
	for _, a := range []AEAD{widenChaCha(make([]byte, keyLen), refusing{}), widenGCM(make([]byte, keyLen), refusing{})} {
		for _, n := range []int{1, 64, 1418, 9000, maxText} {
			nonce, room := make([]byte, nonceLen), make([]byte, 16+n+tagLen+n)
			d, text := room[:16+n+tagLen], room[16+n+tagLen:]
			a.Seal(d[16:16], nonce, d[16:16+n], d[:16])
			if got, err := a.Open(d[16:16], nonce, d[16:], d[:16]); err != nil || len(got) != n {
				t.Errorf("%T, %d bytes: Open = %d bytes, %v", a, n, len(got), err)
			}
			// From where the TAP left it: right behind, for once.
			a.Seal(d[16:16], nonce, text, d[:16])
		}
	}
}

// TestAhead: key stream is made ahead once nonces count, and used while it lasts.
func TestAhead(t *testing.T) {
	if !wide {
		t.Log("this CPU has no AVX-512: there is nothing to test")
		return
	}
	c := newChaCha(make([]byte, keyLen), refusing{}).(*chacha)
	var a Ahead
	nonce := func(n uint64) []byte { return binary.BigEndian.AppendUint64(make([]byte, 4), n) }
	for _, tt := range []struct {
		n     uint64
		ready bool
		first uint64 // of what is made now
	}{
		{7, false, 0}, {8, true, 8}, {9, true, 8}, {13, true, 8}, {14, true, 14}, {18, true, 14}, {17, true, 14},
		{20, true, 20}, {21, true, 20}, {26, false, 20}, {30, true, 30}, {30, true, 30}, {34, true, 30}, {34, true, 30}, {33, true, 30}, {40, false, 30},
	} {
		if ks := a.stream(c, nonce(tt.n)); (ks != nil) != tt.ready || a.first != tt.first {
			t.Fatalf("%d: ready %t, made from %d on, want %t, %d", tt.n, ks != nil, a.first, tt.ready, tt.first)
		}
	}
	// What overlaps is still the library's to judge; it is not asked about the rest.
	b := make([]byte, 200)
	a.stream(c, nonce(41))
	for _, records := range []func(){
		func() { c.SealNext(&a, b[:0], nonce(42), b[:80], b[120:136]) },
		func() { _, _ = c.OpenNext(&a, b[:0], nonce(42), b[:96], b[120:136]) },
	} {
		a.first, a.last, a.made = 0, 41, false
		if records(); !a.made || a.first != 42 {
			t.Error("a record that counts made no key stream")
		}
	}
	for what, misuse := range map[string]func(){
		"SealNext": func() { c.SealNext(&a, b[90:90], nonce(43), b[:80], b[120:136]) },
		"OpenNext": func() { _, _ = c.OpenNext(&a, b[1:1], nonce(43), b[:80], b[120:136]) },
	} {
		func() {
			defer func() {
				if recover() == nil {
					t.Errorf("%s did not ask", what)
				}
			}()
			misuse()
		}()
	}
	other := newChaCha(make([]byte, keyLen), refusing{}).(*chacha)
	if a.stream(other, nonce(44)) != nil || a.stream(c, nonce(45)) != nil || a.stream(c, append([]byte{1}, nonce(46)[1:]...)) != nil {
		t.Error("key stream of another key or nonce was used")
	}
}

// TestVectorsAreCleared: each function clears all 32 before it returns.
func TestVectorsAreCleared(t *testing.T) {
	for file, functions := range map[string]int{"chacha_amd64.s": 4, "gcm_amd64.s": 3} {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		parts := strings.Split(string(text), "\tRET\n")
		if len(parts) != functions+1 {
			t.Errorf("%s returns %d times, want %d", file, len(parts)-1, functions)
		}
		for _, part := range parts[:len(parts)-1] {
			lines := strings.Split(strings.TrimSpace(part), "\n")
			var end []string
			for _, line := range lines[max(len(lines)-33, 0):] {
				end = append(end, strings.Join(strings.Fields(line), " "))
			}
			for i := range 32 {
				clears := fmt.Sprintf("VPXORQ Z%[1]d, Z%[1]d, Z%[1]d", i)
				if i < 16 {
					clears = fmt.Sprintf("VPXOR X%[1]d, X%[1]d, X%[1]d", i)
				}
				if !slices.Contains(end, clears) {
					t.Errorf("%s: a function returns without %s", file, clears)
				}
			}
			if end[len(end)-1] != "VZEROUPPER" {
				t.Errorf("%s: a function returns with %s, want VZEROUPPER", file, end[len(end)-1])
			}
		}
	}
}
