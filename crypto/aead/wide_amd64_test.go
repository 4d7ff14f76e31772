package aead

import (
	"crypto/cipher"
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
type refusing struct{ cipher.AEAD }

// TestDatagramIsWide: on a CPU for it, it is the assembly that seals and opens a
// datagram, between its header and its tag, of any length.
func TestDatagramIsWide(t *testing.T) {
	if !wide {
		t.Log("this CPU has no AVX-512: there is nothing to test")
		return
	}
	for _, a := range []cipher.AEAD{widenChaCha(make([]byte, keyLen), refusing{}), widenGCM(make([]byte, keyLen), refusing{})} {
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

// TestVectorsAreCleared: each function clears all 32 before it returns.
func TestVectorsAreCleared(t *testing.T) {
	for file, functions := range map[string]int{"chacha_amd64.s": 3, "gcm_amd64.s": 3} {
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
