package ether

import "testing"

// TestSumWithoutAVX2: a machine that lacks it gets the same sums.
func TestSumWithoutAVX2(t *testing.T) {
	if !haveAVX2 {
		t.Log("no AVX2 here: TestSumTwins compares the Go twin with itself")
	}
	defer func(was bool) { haveAVX2 = was }(haveAVX2)
	haveAVX2 = false
	b := randomBytes(4096)
	for n := range b {
		if got, want := Sum(b[:n], 7), sumWords(b[:n], 7); got != want {
			t.Fatalf("Sum of %d bytes = %#04x, want %#04x", n, got, want)
		}
	}
}
