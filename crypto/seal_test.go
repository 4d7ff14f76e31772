package crypto

import (
	"bytes"
	"encoding/hex"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/tulle-net/tulle/crypto/aead"
)

func session(t testing.TB, c Cipher, index uint32) (*Sealer, *Opener) {
	t.Helper()
	k := testKey(t, 1)
	s, err := NewSealer(k, c, index)
	if err != nil {
		t.Fatal(err)
	}
	o, err := NewOpener(k, c, index)
	if err != nil {
		t.Fatal(err)
	}
	k.Zero()
	return s, o
}

func unhex(t testing.TB, text string) []byte {
	t.Helper()
	b, err := hex.DecodeString(string(bytes.Join(bytes.Fields([]byte(text)), nil)))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// TestSealedGolden: whole datagrams under the key 01…, made with another
// implementation (OpenSSL's): a VXLAN header alone, with counter 5 and the flag,
// and an empty plaintext with the last counter.
func TestSealedGolden(t *testing.T) {
	for _, tt := range []struct {
		c         Cipher
		index     uint32
		counter   uint64
		flags     byte
		plaintext string
		want      string
	}{
		{ChaCha20Poly1305, 0xa1a2a3a4, 5, FlagUnfilled, "08 00 00 00 00 00 64 00",
			"04 01 00 00  a1 a2 a3 a4  00 00 00 00 00 00 00 05  20 e1 35 70 b2 74 29 bb  37 b5 55 25 d3 22 b3 26 93 54 38 8b e4 f1 41 5e"},
		{ChaCha20Poly1305, 1, SessionDatagrams - 1, 0, "",
			"04 00 00 00  00 00 00 01  00 00 00 00 ff ff ff ff  ea ae 04 6e b3 e7 30 b1 5c d7 3e 84 3d f0 44 a9"},
		{AES256GCM, 0xa1a2a3a4, 5, FlagUnfilled, "08 00 00 00 00 00 64 00",
			"04 01 00 00  a1 a2 a3 a4  00 00 00 00 00 00 00 05  ad 71 79 6f 58 d1 1f 2d  28 a8 02 ef 09 73 7c d2 2c 91 ff a2 a0 b5 22 8a"},
		{AES256GCM, 1, SessionDatagrams - 1, 0, "",
			"04 00 00 00  00 00 00 01  00 00 00 00 ff ff ff ff  57 e3 27 ec cb 6b 6f c4 cd 41 0c 32 0a 7f f9 66"},
	} {
		s, o := session(t, tt.c, tt.index)
		var w Scratch
		plaintext, want := unhex(t, tt.plaintext), unhex(t, tt.want)
		dst := make([]byte, len(want)+5)
		if n := s.Seal(&w, dst, tt.counter, tt.flags, plaintext); !bytes.Equal(dst[:n], want) || !bytes.Equal(dst[n:], make([]byte, 5)) {
			t.Errorf("%v: Seal = %x, want %x", tt.c, dst[:n], want)
		}
		if index, ok := ParseSealed(want); index != tt.index || !ok {
			t.Errorf("ParseSealed(%x) = %#x, %t, want %#x", want, index, ok, tt.index)
		}
		got, flags, counter, err := o.Open(&w, bytes.Clone(want))
		if err != nil || !bytes.Equal(got, plaintext) || flags != tt.flags || counter != tt.counter || o.Highest() != tt.counter {
			t.Errorf("%v: Open(%x) = %x, %d, %d, %v, want %x, %d, %d", tt.c, want, got, flags, counter, err, plaintext, tt.flags, tt.counter)
		}
	}
}

// TestSealRoundTrip: every length up to where all implementations have changed
// their loop, in place and from elsewhere, with the same result.
func TestSealRoundTrip(t *testing.T) {
	for _, c := range bothCiphers {
		s, o := session(t, c, 7)
		var w Scratch
		for size := range 1500 {
			if size > 600 && size%61 != 0 {
				continue
			}
			plaintext := make([]byte, size)
			for i := range plaintext {
				plaintext[i] = byte(i + size)
			}
			counter, ok := s.Reserve(1)
			if !ok {
				t.Fatal("no counter left")
			}
			apart, inPlace := make([]byte, size+SealedOverhead), make([]byte, size+SealedOverhead)
			copy(inPlace[SealedHeaderLen:], plaintext)
			n := s.Seal(&w, apart, counter, 0, plaintext)
			m := s.Seal(&w, inPlace, counter, 0, inPlace[SealedHeaderLen:][:size])
			if n != size+SealedOverhead || m != n || !bytes.Equal(apart, inPlace) {
				t.Fatalf("%v, %d bytes: in place and from elsewhere differ", c, size)
			}
			got, _, _, err := o.Open(&w, apart)
			if err != nil || !bytes.Equal(got, plaintext) || size > 0 && &got[0] != &apart[SealedHeaderLen] {
				t.Fatalf("%v, %d bytes: Open = %x, %v", c, size, got, err)
			}
		}
		if s.Sent() != o.Received() || o.Highest() != s.Sent()-1 || o.Replays()+o.Forgeries() != 0 {
			t.Errorf("%v: sent %d, received %d, highest %d", c, s.Sent(), o.Received(), o.Highest())
		}
	}
}

// TestOpenChanged: no bit of a datagram can change, it cannot be cut or grow, and
// what was refused has moved nothing.
func TestOpenChanged(t *testing.T) {
	for _, c := range bothCiphers {
		s, o := session(t, c, 0xa1a2a3a4)
		var w Scratch
		d := make([]byte, 90)
		d = d[:s.Seal(&w, d, 1000, FlagUnfilled, bytes.Repeat([]byte{0xA7}, 58))]
		whole := bytes.Clone(d)
		flips(d, func(bit int, b []byte) {
			want := ErrSealedForged
			switch at := bit / 8; {
			case at == 1 && bit%8 < 2: // a known flag: only the tag protects it
			case at < 12: // first byte, flags, reserved, index, counter beyond the session
				want = ErrSealedMalformed
			}
			if p, _, _, err := o.Open(&w, b); err != want || p != nil {
				t.Errorf("%v: bit %d changed: %x, %v, want %v", c, bit, p, err, want)
			}
		})
		for n := range whole {
			want := ErrSealedForged
			if n < SealedOverhead {
				want = ErrSealedShort
			}
			if _, _, _, err := o.Open(&w, bytes.Clone(whole[:n])); err != want {
				t.Errorf("%v: %d of %d bytes: %v, want %v", c, n, len(whole), err, want)
			}
			if _, ok := ParseSealed(whole[:n]); ok != (n >= SealedOverhead) {
				t.Errorf("ParseSealed of %d bytes: %t", n, ok)
			}
		}
		if _, _, _, err := o.Open(&w, append(bytes.Clone(whole), 0)); err != ErrSealedForged {
			t.Errorf("%v: a byte more: %v, want ErrSealedForged", c, err)
		}
		if o.Highest() != 0 || o.Received() != 0 || o.Replays() != 0 || o.Forgeries() == 0 {
			t.Errorf("%v: forgeries moved highest to %d, received to %d", c, o.Highest(), o.Received())
		}
		// The true one is still taken, once.
		if _, _, counter, err := o.Open(&w, bytes.Clone(whole)); err != nil || counter != 1000 {
			t.Errorf("%v: after the forgeries: %d, %v", c, counter, err)
		}
		if _, _, _, err := o.Open(&w, bytes.Clone(whole)); err != ErrSealedReplay || o.Replays() != 1 || o.Received() != 1 {
			t.Errorf("%v: again: %v, %d replays", c, err, o.Replays())
		}
	}
}

// TestOpenOthers: a key opens what was sealed with it, under its index and AEAD.
func TestOpenOthers(t *testing.T) {
	s, _ := session(t, ChaCha20Poly1305, 7)
	var w Scratch
	d := make([]byte, SealedOverhead+8)
	s.Seal(&w, d, 1, 0, make([]byte, 8))
	for name, tt := range map[string]struct {
		k     Key
		c     Cipher
		index uint32
		want  error
	}{
		"another key":     {testKey(t, 2), ChaCha20Poly1305, 7, ErrSealedForged},
		"another cipher":  {testKey(t, 1), AES256GCM, 7, ErrSealedForged},
		"another session": {testKey(t, 1), ChaCha20Poly1305, 8, ErrSealedMalformed},
		"right":           {testKey(t, 1), ChaCha20Poly1305, 7, nil},
	} {
		o, err := NewOpener(tt.k, tt.c, tt.index)
		if err != nil {
			t.Fatal(err)
		}
		if _, _, _, err := o.Open(&w, bytes.Clone(d)); err != tt.want {
			t.Errorf("%s: %v, want %v", name, err, tt.want)
		}
	}
}

// meanwhile is an AEAD that lets something happen before it opens.
type meanwhile struct {
	aead.AEAD
	happens func()
}

func (m meanwhile) OpenNext(w *aead.Ahead, dst, nonce, ciphertext, additional []byte) ([]byte, error) {
	m.happens()
	return m.AEAD.OpenNext(w, dst, nonce, ciphertext, additional)
}

// TestOpenMeanwhile: of two workers that verify the same datagram at the same
// time, the second gets nothing of it.
func TestOpenMeanwhile(t *testing.T) {
	s, o := session(t, AES256GCM, 7)
	var w Scratch
	d := make([]byte, SealedOverhead+8)
	s.Seal(&w, d, 3, 0, []byte("the text"))
	var other aead.AEAD = meanwhile{*o.aead.Load(), func() { o.window.accept(3) }}
	o.aead.Store(&other)
	if p, _, _, err := o.Open(&w, d); err != ErrSealedReplay || p != nil || o.Replays() != 1 || bytes.Contains(d, []byte("the text")) {
		t.Errorf("Open = %q, %v, %d replays; left is %q", p, err, o.Replays(), d)
	}
}

// TestOpenConcurrent: eight workers get every datagram, and each is opened once.
func TestOpenConcurrent(t *testing.T) {
	const datagrams, workers = 4000, 8
	for _, c := range bothCiphers {
		s, o := session(t, c, 7)
		var w Scratch
		sealed := make([][]byte, datagrams)
		for i := range sealed {
			sealed[i] = make([]byte, SealedOverhead+8)
			s.Seal(&w, sealed[i], uint64(i), 0, fmt.Appendf(nil, "%08d", i))
		}
		opened := make([]atomic.Uint32, datagrams)
		var wg sync.WaitGroup
		for worker := range workers {
			wg.Go(func() {
				var w Scratch
				for i := range sealed {
					d := sealed[(i+worker)%datagrams]
					p, _, counter, err := o.Open(&w, bytes.Clone(d))
					switch {
					case err == nil && string(p) == fmt.Sprintf("%08d", counter):
						opened[counter].Add(1)
					case !errors.Is(err, ErrSealedReplay):
						t.Errorf("Open = %s, %d, %v", p, counter, err)
					}
				}
			})
		}
		wg.Wait()
		for i := range opened {
			if n := opened[i].Load(); n != 1 {
				t.Fatalf("%v: datagram %d is opened %d times", c, i, n)
			}
		}
		if o.Received() != datagrams || o.Replays() != datagrams*(workers-1) || o.Highest() != datagrams-1 {
			t.Errorf("%v: received %d, replays %d, highest %d", c, o.Received(), o.Replays(), o.Highest())
		}
	}
}

// TestReserve: no counter is given twice and none is left out, whatever the
// workers do at the same time.
func TestReserve(t *testing.T) {
	const trains = 1 << 17
	s, _ := session(t, ChaCha20Poly1305, 7)
	taken := make([]atomic.Uint32, trains*(1+2+3+4))
	var wg sync.WaitGroup
	for worker := range 4 {
		wg.Go(func() {
			n := worker + 1
			for range trains {
				first, ok := s.Reserve(n)
				if !ok {
					t.Error("no counter left")
					return
				}
				for c := first; c < first+uint64(n); c++ {
					taken[c].Add(1)
				}
			}
		})
	}
	wg.Wait()
	for c := range taken {
		if n := taken[c].Load(); n != 1 {
			t.Fatalf("counter %d is given %d times", c, n)
		}
	}
	if s.Sent() != uint64(len(taken)) {
		t.Errorf("sent %d, want %d", s.Sent(), len(taken))
	}
}

// TestReserveEnd: no counter is beyond the session's end, and asking on does not
// bring the first ones back.
func TestReserveEnd(t *testing.T) {
	s, _ := session(t, ChaCha20Poly1305, 7)
	s.next.Store(SessionDatagrams - 5)
	if first, ok := s.Reserve(5); first != SessionDatagrams-5 || !ok {
		t.Errorf("the last five: %d, %t", first, ok)
	}
	s.next.Store(SessionDatagrams - 5)
	if first, ok := s.Reserve(6); ok {
		t.Errorf("six of five counters: %d", first)
	}
	if s.Sent() != SessionDatagrams {
		t.Errorf("sent %d, want %d", s.Sent(), uint64(SessionDatagrams))
	}
	end := s.next.Load()
	for _, n := range []int{1, 64, 1 << 30} {
		if _, ok := s.Reserve(n); ok || s.next.Load() != end {
			t.Errorf("%d counters beyond the session's end: next is %d, and was %d", n, s.next.Load(), end)
		}
	}
}

// TestSealMisuse: what only a mistake of ours can ask for panics, before a nonce
// is used.
func TestSealMisuse(t *testing.T) {
	s, _ := session(t, ChaCha20Poly1305, 7)
	var w Scratch
	dst := make([]byte, 100)
	for name, f := range map[string]func(){
		"no counters":    func() { s.Reserve(0) },
		"counter":        func() { s.Seal(&w, dst, SessionDatagrams, 0, nil) },
		"flag":           func() { s.Seal(&w, dst, 1, 4, nil) },
		"no room":        func() { s.Seal(&w, dst[:40:40], 1, 0, make([]byte, 9)) },
		"wrong overlap":  func() { s.Seal(&w, dst, 1, 0, dst[8:40]) },
		"wrong overlap+": func() { s.Seal(&w, dst, 1, 0, dst[17:40]) },
	} {
		func() {
			defer func() {
				if recover() == nil {
					t.Errorf("%s: no panic", name)
				}
			}()
			f()
		}()
	}
}

// TestForgeries: so many of them end a session.
func TestForgeries(t *testing.T) {
	s, o := session(t, ChaCha20Poly1305, 7)
	var w Scratch
	d := make([]byte, SealedOverhead+8)
	o.forgeries.Store(SessionForgeries - 2)
	for i, want := range []error{nil, ErrSealedForged, ErrSealedForged, ErrSealedDropped} {
		s.Seal(&w, d, uint64(i), 0, make([]byte, 8))
		if want != nil {
			d[len(d)-1] ^= 1
		}
		if _, _, _, err := o.Open(&w, d); err != want {
			t.Errorf("%d: %v, want %v", i, err, want)
		}
	}
	if o.Forgeries() != SessionForgeries {
		t.Errorf("%d forgeries, want %d", o.Forgeries(), uint64(SessionForgeries))
	}
}

func TestZero(t *testing.T) {
	for _, c := range bothCiphers {
		s, o := session(t, c, 7)
		var w Scratch
		d := make([]byte, SealedOverhead+8)
		s.Seal(&w, d, 3, 0, make([]byte, 8))
		s.Zero()
		o.Zero()
		again := make([]byte, len(d))
		if n := s.Seal(&w, again, 4, 0, make([]byte, 8)); n != 0 || !bytes.Equal(again, make([]byte, len(d))) {
			t.Errorf("%v: %d bytes sealed after Zero: %x", c, n, again)
		}
		if _, ok := s.Reserve(1); ok {
			t.Errorf("%v: a counter after Zero", c)
		}
		if _, _, _, err := o.Open(&w, d); err != ErrSealedDropped {
			t.Errorf("%v: Open after Zero: %v, want ErrSealedDropped", c, err)
		}
		if s.Index() != 7 || s.Cipher() != c || o.Index() != 7 || o.Cipher() != c {
			t.Errorf("%v: it has forgotten who it was", c)
		}
	}
}

func FuzzParseSealed(f *testing.F) {
	f.Add(make([]byte, SealedOverhead))
	f.Add(append([]byte{SealedByte, FlagUnfilled, 0, 0, 1, 2, 3, 4}, make([]byte, 40)...))
	f.Fuzz(func(t *testing.T, d []byte) {
		index, ok := ParseSealed(d)
		want := len(d) >= 32 && d[0] == 4 && d[1] <= 3 && d[2] == 0 && d[3] == 0
		if ok != want || ok && index != uint32(d[4])<<24|uint32(d[5])<<16|uint32(d[6])<<8|uint32(d[7]) {
			t.Errorf("ParseSealed(%x) = %#x, %t, want %t", d, index, ok, want)
		}
	})
}

// FuzzOpen: what is opened is what sealing makes, byte for byte, and what is not
// moves nothing. What is sealed here is opened.
func FuzzOpen(f *testing.F) {
	for i, c := range bothCiphers {
		s, _ := session(f, c, 7)
		d := make([]byte, SealedOverhead+8)
		s.Seal(new(Scratch), d, 9, 0, make([]byte, 8))
		f.Add(byte(i), d)
	}
	f.Fuzz(func(t *testing.T, c byte, d []byte) {
		s, o := session(t, bothCiphers[c%2], 7)
		var w Scratch
		sealed := make([]byte, len(d)+SealedOverhead)
		p, flags, counter, err := o.Open(&w, bytes.Clone(d))
		if err == nil {
			if n := s.Seal(&w, sealed, counter, flags, p); !bytes.Equal(sealed[:n], d) {
				t.Fatalf("Open(%x) = %x, which is sealed as %x", d, p, sealed[:n])
			}
			return
		}
		if p != nil || o.Highest() != 0 || o.Received() != 0 {
			t.Fatalf("Open(%x) = %x, %v, highest %d, received %d", d, p, err, o.Highest(), o.Received())
		}
		s.Seal(&w, sealed, uint64(len(d)), 0, d)
		if p, _, counter, err := o.Open(&w, sealed); err != nil || counter != uint64(len(d)) || !bytes.Equal(p, d) {
			t.Fatalf("Open of sealed %x = %x, %d, %v", d, p, counter, err)
		}
	})
}
