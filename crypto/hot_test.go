package crypto

import (
	"bytes"
	"fmt"
	"testing"
)

func TestNoAllocsSealOpen(t *testing.T) {
	for _, c := range bothCiphers {
		s, o := session(t, c, 7)
		var w Scratch
		d := make([]byte, SealedOverhead+1418)
		step := func() {
			first, ok := s.Reserve(1)
			if !ok || s.Seal(&w, d, first, FlagUnfilled, d[SealedHeaderLen:][:1418]) != len(d) {
				t.Fatal("not sealed")
			}
			if _, ok := ParseSealed(d); !ok {
				t.Fatal("not parsed")
			}
			if _, _, _, err := o.Open(&w, d); err != nil {
				t.Fatal(err)
			}
		}
		if n := testing.AllocsPerRun(100, step); n != 0 {
			t.Errorf("%v: seal and open allocate %v times", c, n)
		}
		forged, replay := bytes.Clone(d), d[:SealedOverhead]
		forged[8+6] ^= 0x80
		refuse := func() {
			if _, _, _, err := o.Open(&w, forged); err != ErrSealedForged {
				t.Fatal(err)
			}
			if _, _, _, err := o.Open(&w, replay); err != ErrSealedReplay {
				t.Fatal(err)
			}
			if _, _, _, err := o.Open(&w, d[:20]); err != ErrSealedShort {
				t.Fatal(err)
			}
			if _, _, _, err := o.Open(&w, forged[1:]); err != ErrSealedMalformed {
				t.Fatal(err)
			}
		}
		if n := testing.AllocsPerRun(100, refuse); n != 0 {
			t.Errorf("%v: refusing allocates %v times", c, n)
		}
	}
}

func BenchmarkSeal(b *testing.B) {
	for _, c := range bothCiphers {
		for _, size := range []int{64, 1418} {
			b.Run(fmt.Sprintf("%v/%d", c, size), func(b *testing.B) {
				s, _ := session(b, c, 7)
				var w Scratch
				d := make([]byte, SealedOverhead+size)
				b.SetBytes(int64(size))
				counter := uint64(0)
				for b.Loop() {
					s.Seal(&w, d, counter, 0, d[SealedHeaderLen:][:size])
					counter++
				}
			})
		}
	}
}

// BenchmarkOpen opens one datagram again and again: a copy of it is part of what
// is measured, and the window is set back.
func BenchmarkOpen(b *testing.B) {
	for _, c := range bothCiphers {
		for _, size := range []int{64, 1418} {
			b.Run(fmt.Sprintf("%v/%d", c, size), func(b *testing.B) {
				s, o := session(b, c, 7)
				var w Scratch
				sealed := make([]byte, SealedOverhead+size)
				s.Seal(&w, sealed, 100, 0, make([]byte, size))
				d := make([]byte, len(sealed))
				b.SetBytes(int64(size))
				for b.Loop() {
					copy(d, sealed)
					o.window.ring[3].Store(0)
					if _, _, _, err := o.Open(&w, d); err != nil {
						b.Fatal(err)
					}
				}
			})
		}
	}
}

// BenchmarkReplayWindow is what accepting costs, without decryption.
func BenchmarkReplayWindow(b *testing.B) {
	var w replayWindow
	counter := uint64(0)
	for b.Loop() {
		if !w.fresh(counter) || !w.accept(counter) {
			b.Fatal(counter)
		}
		counter++
	}
}
