package aead

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"syscall"
	"testing"

	"golang.org/x/crypto/chacha20poly1305"
)

// ciphers are both, as this package has them and as the libraries have.
var ciphers = []struct {
	name   string
	here   func(key []byte) (AEAD, error)
	narrow func(key []byte) (cipher.AEAD, error)
}{
	{"chacha20-poly1305", NewChaCha20Poly1305, chacha20poly1305.New},
	{"aes-256-gcm", NewAES256GCM, func(key []byte) (cipher.AEAD, error) {
		block, err := aes.NewCipher(key)
		if err != nil {
			return nil, err
		}
		return cipher.NewGCM(block)
	}},
}

// maxTextTested is what the assembly takes on the CPUs that it is for.
const maxTextTested = 1<<16 - 1

// source gives bytes that are the same in each run.
type source struct{ *rand.ChaCha8 }

func newSource(seed byte) source { return source{rand.NewChaCha8([32]byte{seed})} }

func (s source) bytes(n int) []byte {
	b := make([]byte, n)
	_, _ = s.Read(b)
	return b
}

// pair returns the AEAD of this package and the library's, with one key.
func pair(t testing.TB, i int, key []byte) (here AEAD, narrow cipher.AEAD) {
	t.Helper()
	here, err := ciphers[i].here(key)
	if err != nil {
		t.Fatal(err)
	}
	narrow, err = ciphers[i].narrow(key)
	if err != nil {
		t.Fatal(err)
	}
	return here, narrow
}

// each runs a test for both ciphers.
func each(t *testing.T, run func(t *testing.T, i int)) {
	for i, c := range ciphers {
		t.Run(c.name, func(t *testing.T) { run(t, i) })
	}
}

// check seals and opens one record in all ways that an AEAD has, and compares
// with the library.
func check(t *testing.T, here, narrow cipher.AEAD, nonce, text, additional []byte) {
	t.Helper()
	want := narrow.Seal(nil, nonce, text, additional)
	fail := func(how string, got, want []byte, err error) {
		t.Helper()
		t.Fatalf("%s, %d bytes and %d additional: %x, %v, want %x", how, len(text), len(additional), got, err, want)
	}
	if got := here.Seal(nil, nonce, text, additional); !bytes.Equal(got, want) {
		fail("Seal", got, want, nil)
	}
	got, err := here.Open(nil, nonce, want, additional)
	if err != nil || !bytes.Equal(got, text) {
		fail("Open", got, text, err)
	}
	// In place, behind bytes that stay, in front of some that do.
	const front, behind = "front", "behind, which is longer than a register of 64 bytes has room for..."
	b := append([]byte(front), text...)
	b = append(b, make([]byte, tagLen)...)
	b = append(b, behind...)
	begin, end := len(front), len(front)+len(want)
	got = here.Seal(b[:begin:end], nonce, b[begin:begin+len(text)], additional)
	if !bytes.Equal(got, append([]byte(front), want...)) || &got[0] != &b[0] || string(b[end:]) != behind {
		fail("Seal in place", b, want, nil)
	}
	got, err = here.Open(b[:begin:end], nonce, b[begin:end], additional)
	if err != nil || !bytes.Equal(got, append([]byte(front), text...)) || &got[0] != &b[0] || string(b[end:]) != behind {
		fail("Open in place", b, text, err)
	}
}

// TestSame: every length up to that of a jumbo frame in steps, and up to a
// datagram of 1,500 bytes each, gives the library's bytes.
func TestSame(t *testing.T) {
	each(t, func(t *testing.T, i int) {
		s := newSource(byte(i))
		for n := 0; n < 9100; n++ {
			if n > 1600 {
				n += 36
			}
			here, narrow := pair(t, i, s.bytes(keyLen))
			check(t, here, narrow, s.bytes(nonceLen), s.bytes(n), s.bytes(16))
		}
		here, narrow := pair(t, i, s.bytes(keyLen))
		for additional := 0; additional < 40; additional++ {
			for _, n := range []int{0, 1, 15, 16, 17, 64, 111, 112, 113, 1418} {
				check(t, here, narrow, s.bytes(nonceLen), s.bytes(n), s.bytes(additional))
			}
		}
		// Around what the assembly takes, and the ends of chunks and groups.
		for n := maxTextTested - 33; n <= maxTextTested+17; n++ {
			check(t, here, narrow, s.bytes(nonceLen), s.bytes(n), s.bytes(16))
		}
		for _, unit := range []int{512, 1504, 1536} {
			for n := unit; n < 9000; n += unit {
				for off := -20; off <= 20; off++ {
					check(t, here, narrow, s.bytes(nonceLen), s.bytes(n+off), s.bytes(16))
				}
			}
		}
	})
}

// TestKeys: keys of one bit and others, so that what is derived of a key has its
// highest bits set as often as not.
func TestKeys(t *testing.T) {
	each(t, func(t *testing.T, i int) {
		s := newSource(byte(i))
		keys := [][]byte{make([]byte, keyLen), bytes.Repeat([]byte{0xff}, keyLen)}
		for bit := range 8 * keyLen {
			key := make([]byte, keyLen)
			key[bit/8] = 1 << (bit % 8)
			keys = append(keys, key, s.bytes(keyLen))
		}
		for _, key := range keys {
			here, narrow := pair(t, i, key)
			check(t, here, narrow, s.bytes(nonceLen), s.bytes(1504), s.bytes(16))
			check(t, here, narrow, s.bytes(nonceLen), bytes.Repeat([]byte{0xff}, 1504), bytes.Repeat([]byte{0xff}, 16))
		}
	})
}

// TestNonces: bytes of nonces beside the counter of blocks, where a carry would go.
func TestNonces(t *testing.T) {
	each(t, func(t *testing.T, i int) {
		s := newSource(byte(i))
		here, narrow := pair(t, i, s.bytes(keyLen))
		text := s.bytes(5000) // the counter has two bytes
		for at := range nonceLen {
			for _, b := range []byte{0, 1, 0x7f, 0x80, 0xff} {
				for _, rest := range []byte{0, 0xff} {
					nonce := bytes.Repeat([]byte{rest}, nonceLen)
					nonce[at] = b
					check(t, here, narrow, nonce, text, text[:16])
				}
			}
		}
	})
}

// TestNext: records in the order that a worker meets them: nonces that count, with
// some missing, repeated and late, some that do not, records of all sizes, and two
// keys in turn, with the same nonces.
func TestNext(t *testing.T) {
	each(t, func(t *testing.T, i int) {
		s := newSource(byte(i))
		var here [2]AEAD
		var narrow [2]cipher.AEAD
		for k := range here {
			here[k], narrow[k] = pair(t, i, s.bytes(keyLen))
		}
		var seals, opens Ahead
		additional := s.bytes(16)
		random := rand.New(s)
		number, k := uint64(0), 0
		for range 50_000 {
			switch random.IntN(20) {
			case 0:
				number += uint64(random.IntN(9))
			case 1:
				number -= uint64(random.IntN(9))
			case 2:
				number = uint64(random.IntN(40))
			case 3:
				k = random.IntN(2)
			case 4:
				number = -uint64(random.IntN(9))
			default:
				number++
			}
			n := random.IntN(230)
			if random.IntN(30) == 0 {
				n = random.IntN(3000)
			}
			nonce := binary.BigEndian.AppendUint64(make([]byte, 4, nonceLen), number)
			if random.IntN(50) == 0 {
				nonce[random.IntN(4)]++
			}
			text := s.bytes(n)
			want := narrow[k].Seal(nil, nonce, text, additional)
			b := append(bytes.Clone(text), make([]byte, tagLen+1)...)
			if random.IntN(2) == 0 { // in place, or not
				text = b[:n]
			}
			if got := here[k].SealNext(&seals, b[:0], nonce, text, additional); !bytes.Equal(got, want) || b[len(want)] != 0 {
				t.Fatalf("number %d, %d bytes: SealNext = %x, want %x", number, n, got, want)
			}
			if random.IntN(10) == 0 {
				b[random.IntN(len(want))] ^= 1 << random.IntN(8)
				if got, err := here[k].OpenNext(&opens, b[:0:n], nonce, b[:len(want)], additional); err == nil || got != nil {
					t.Fatalf("number %d, %d bytes: OpenNext of a forgery = %x", number, n, got)
				}
				if !bytes.Equal(b[:n], make([]byte, n)) {
					t.Fatalf("number %d, %d bytes: OpenNext of a forgery left %x", number, n, b)
				}
				copy(b, want)
			}
			var dst []byte
			if random.IntN(2) == 0 { // in place, or not
				dst = b[:0]
			}
			got, err := here[k].OpenNext(&opens, dst, nonce, b[:len(want)], additional)
			if plain, _ := narrow[k].Open(nil, nonce, want, additional); err != nil || !bytes.Equal(got, plain) {
				t.Fatalf("number %d, %d bytes: OpenNext = %x, %v, want %x", number, n, got, err, plain)
			}
		}
	})
}

// TestForged: no record with a bit flipped, cut, or with other additional data or
// another nonce is opened, nothing of its text is left, and nothing written behind.
func TestForged(t *testing.T) {
	each(t, func(t *testing.T, i int) {
		s := newSource(byte(i))
		here, narrow := pair(t, i, s.bytes(keyLen))
		_, forged := narrow.Open(nil, make([]byte, nonceLen), make([]byte, 100), nil)
		nonce, additional := s.bytes(nonceLen), s.bytes(16)
		refused := func(what string, at int, sealed, nonce, additional []byte) {
			t.Helper()
			b := append(bytes.Clone(sealed), 0xaa)
			got, err := here.Open(b[:0:len(sealed)], nonce, b[:len(sealed)], additional)
			if err == nil || err.Error() != forged.Error() || got != nil {
				t.Fatalf("%s %d: Open = %x, %v, want %v", what, at, got, err, forged)
			}
			if n := len(sealed) - tagLen; n > 0 && !bytes.Equal(b[:n], make([]byte, n)) || b[len(sealed)] != 0xaa {
				t.Fatalf("%s %d: Open left %x", what, at, b)
			}
		}
		for _, n := range []int{1, 40, 100, 1418} {
			sealed := here.Seal(nil, nonce, s.bytes(n), additional)
			flip := func(what string, b []byte) {
				for bit := range len(b) * 8 {
					b[bit/8] ^= 1 << (bit % 8)
					refused(what, bit, sealed, nonce, additional)
					b[bit/8] ^= 1 << (bit % 8)
				}
			}
			flip("record, bit", sealed)
			flip("nonce, bit", nonce)
			flip("additional data, bit", additional)
			for cut := range min(len(sealed), 200) {
				refused("cut to", cut, sealed[:cut], nonce, additional)
			}
			refused("additional data of", 15, sealed, nonce, additional[:15])
			refused("additional data of", 17, sealed, nonce, append(additional[:16:16], 0))
		}
	})
}

// TestPages: records that begin where a page does and records that end where one
// ends, between pages that must not be touched.
func TestPages(t *testing.T) {
	page := syscall.Getpagesize()
	m, err := syscall.Mmap(-1, 0, 4*page, syscall.PROT_READ|syscall.PROT_WRITE, syscall.MAP_PRIVATE|syscall.MAP_ANON)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = syscall.Munmap(m) }()
	for _, guard := range [][]byte{m[:page], m[3*page:]} {
		if err := syscall.Mprotect(guard, syscall.PROT_NONE); err != nil {
			t.Fatal(err)
		}
	}
	room := m[page : 3*page]
	each(t, func(t *testing.T, i int) {
		s := newSource(byte(i))
		here, narrow := pair(t, i, s.bytes(keyLen))
		nonce, additional, text := s.bytes(nonceLen), s.bytes(16), s.bytes(1500)
		for n := 0; n <= len(text); n++ {
			want := narrow.Seal(nil, nonce, text[:n], additional)
			for _, b := range [][]byte{room[:n+tagLen], room[len(room)-n-tagLen:]} {
				copy(b, text[:n])
				if got := here.Seal(b[:0], nonce, b[:n], additional); !bytes.Equal(got, want) {
					t.Fatalf("%d bytes: Seal = %x, want %x", n, got, want)
				}
				if got, err := here.Open(b[:0], nonce, b, additional); err != nil || !bytes.Equal(got, text[:n]) {
					t.Fatalf("%d bytes: Open = %x, %v, want %x", n, got, err, text[:n])
				}
				// Plaintext and ciphertext of their own, which end with the page.
				b = b[:n]
				copy(b, text[:n])
				if got := here.Seal(nil, nonce, b, additional); !bytes.Equal(got, want) {
					t.Fatalf("%d bytes: Seal = %x, want %x", n, got, want)
				}
				if got, err := here.Open(b[:0], nonce, want, additional); err != nil || !bytes.Equal(got, text[:n]) {
					t.Fatalf("%d bytes: Open = %x, %v, want %x", n, got, err, text[:n])
				}
			}
		}
	})
}

// TestMisuse: what is a mistake of the caller panics as in the libraries, and what
// is none does not.
func TestMisuse(t *testing.T) {
	each(t, func(t *testing.T, i int) {
		s := newSource(byte(i))
		here, narrow := pair(t, i, s.bytes(keyLen))
		nonce, text, room := s.bytes(nonceLen), s.bytes(100), make([]byte, 500)
		for name, call := range map[string]func(a cipher.AEAD){
			"no nonce, Seal":             func(a cipher.AEAD) { a.Seal(nil, nil, text, text[:16]) },
			"no nonce, Open":             func(a cipher.AEAD) { _, _ = a.Open(nil, nil, text, text[:16]) },
			"a nonce of 11, Seal":        func(a cipher.AEAD) { a.Seal(nil, nonce[:11], text, text[:16]) },
			"a nonce of 13, Open":        func(a cipher.AEAD) { _, _ = a.Open(nil, text[:13], text, text[:16]) },
			"text one byte on, Seal":     func(a cipher.AEAD) { a.Seal(room[:0], nonce, room[1:101], text[:16]) },
			"text one byte on, Open":     func(a cipher.AEAD) { _, _ = a.Open(room[:0], nonce, room[1:101], text[:16]) },
			"text one byte before, Seal": func(a cipher.AEAD) { a.Seal(room[:1], nonce, room[:100], text[:16]) },
			"text one byte before, Open": func(a cipher.AEAD) { _, _ = a.Open(room[:1], nonce, room[:100], text[:16]) },
			"text under the tag, Seal":   func(a cipher.AEAD) { a.Seal(room[:0], nonce, room[115:215], text[:16]) },
			"text behind the tag, Seal":  func(a cipher.AEAD) { a.Seal(room[:0], nonce, room[116:216], text[:16]) },
			"a byte of text, Seal":       func(a cipher.AEAD) { a.Seal(room[99:99], nonce, room[:100], text[:16]) },
			"a byte of data, Seal":       func(a cipher.AEAD) { a.Seal(room[15:15], nonce, text, room[:16]) },
			"a byte of data, Open":       func(a cipher.AEAD) { _, _ = a.Open(room[15:15], nonce, text, room[:16]) },
			"the tag alone, Open":        func(a cipher.AEAD) { _, _ = a.Open(room[90:90:300], nonce, room[:100], text[:16]) },
			"text in front, Seal":        func(a cipher.AEAD) { a.Seal(room[100:100], nonce, room[:100], text[:16]) },
			"data is dst, Seal":          func(a cipher.AEAD) { a.Seal(room[:0], nonce, text, room[:16]) },
			"data is dst, Open":          func(a cipher.AEAD) { _, _ = a.Open(room[:0], nonce, text, room[:16]) },
			"data in dst, Seal":          func(a cipher.AEAD) { a.Seal(room[:0], nonce, text, room[5:21]) },
			"data in dst, Open":          func(a cipher.AEAD) { _, _ = a.Open(room[:0], nonce, text, room[83:99]) },
			"data behind dst, Open":      func(a cipher.AEAD) { _, _ = a.Open(room[:0], nonce, text, room[84:100]) },
			"data before dst, Seal":      func(a cipher.AEAD) { a.Seal(room[:16], nonce, text, room[:16]) },
			"dst has no room, Seal":      func(a cipher.AEAD) { a.Seal(room[:0:50], nonce, room[1:101], room[:16]) },
			"a tag cut short, Open":      func(a cipher.AEAD) { _, _ = a.Open(nil, nonce, text[:15], text[:16]) },
		} {
			outcome := func(a cipher.AEAD) (message any) {
				defer func() { message = recover() }()
				call(a)
				return nil
			}
			if got, want := outcome(here), outcome(narrow); got != want {
				t.Errorf("%s: panics with %v, want %v", name, got, want)
			}
		}
		if here.NonceSize() != narrow.NonceSize() || here.Overhead() != narrow.Overhead() {
			t.Errorf("nonces of %d bytes, tags of %d", here.NonceSize(), here.Overhead())
		}
		for _, n := range []int{0, 16, 31, 33} {
			if _, err := ciphers[i].here(make([]byte, n)); err == nil {
				t.Errorf("a key of %d bytes was taken", n)
			}
		}
	})
}

func TestNoAllocs(t *testing.T) {
	each(t, func(t *testing.T, i int) {
		here, _ := pair(t, i, make([]byte, keyLen))
		b, nonce, additional := make([]byte, 1418+tagLen), make([]byte, nonceLen), make([]byte, 16)
		var seals, opens Ahead
		n := testing.AllocsPerRun(100, func() {
			nonce[nonceLen-1]++
			here.SealNext(&seals, b[:0], nonce, b[:80], additional)
			if _, err := here.OpenNext(&opens, b[:0], nonce, b[:80+tagLen], additional); err != nil {
				t.Fatal(err)
			}
			here.Seal(b[:0], nonce, b[:1418], additional)
			if _, err := here.Open(b[:0], nonce, b, additional); err != nil {
				t.Fatal(err)
			}
			b[0]++
			if _, err := here.Open(b[:0], nonce, b, additional); err == nil {
				t.Fatal("a forgery was opened")
			}
		})
		if n != 0 {
			t.Errorf("seal, open and refuse allocate %v times", n)
		}
	})
}

// FuzzSame: whatever is sealed is the library's, and whatever is opened the
// library opens.
func FuzzSame(f *testing.F) {
	f.Add(uint8(0), make([]byte, keyLen+nonceLen), make([]byte, 16), make([]byte, 100))
	f.Add(uint8(1), make([]byte, keyLen+nonceLen), make([]byte, 7), make([]byte, 1418))
	f.Fuzz(func(t *testing.T, i uint8, secret, additional, text []byte) {
		var b [keyLen + nonceLen]byte
		copy(b[:], secret)
		nonce := b[keyLen:]
		here, narrow := pair(t, int(i)%len(ciphers), b[:keyLen])
		check(t, here, narrow, nonce, text, additional)
		got, err := here.Open(nil, nonce, text, additional)
		want, wantErr := narrow.Open(nil, nonce, text, additional)
		if fmt.Sprint(err) != fmt.Sprint(wantErr) || !bytes.Equal(got, want) {
			t.Fatalf("Open = %x, %v, want %x, %v", got, err, want, wantErr)
		}
	})
}

// BenchmarkRecord gives both implementations in turn; on a CPU without AVX-512
// they are the same.
func BenchmarkRecord(b *testing.B) {
	for i, c := range ciphers {
		here, narrow := pair(b, i, make([]byte, keyLen))
		for _, n := range []int{64, 1418, 8900} {
			buf, nonce, additional := make([]byte, n+tagLen), make([]byte, nonceLen), make([]byte, 16)
			sealed := here.Seal(nil, nonce, buf[:n], additional)
			for _, a := range []struct {
				name string
				cipher.AEAD
			}{{"wide", here}, {"narrow", narrow}} {
				b.Run(fmt.Sprintf("%s/%d/seal/%s", c.name, n, a.name), func(b *testing.B) {
					b.SetBytes(int64(n))
					for b.Loop() {
						a.Seal(buf[:0], nonce, buf[:n], additional)
					}
				})
				if next, ok := a.AEAD.(AEAD); ok {
					b.Run(fmt.Sprintf("%s/%d/next/%s", c.name, n, a.name), func(b *testing.B) {
						var w Ahead
						b.SetBytes(int64(n))
						for number := uint64(0); b.Loop(); number++ {
							binary.BigEndian.PutUint64(nonce[4:], number)
							next.SealNext(&w, buf[:0], nonce, buf[:n], additional)
						}
						clear(nonce)
					})
				}
				b.Run(fmt.Sprintf("%s/%d/open/%s", c.name, n, a.name), func(b *testing.B) {
					b.SetBytes(int64(n))
					for b.Loop() {
						if _, err := a.Open(buf[:0], nonce, sealed, additional); err != nil {
							b.Fatal(err)
						}
					}
				})
			}
		}
	}
}
