package crypto

import (
	"bytes"
	"compress/gzip"
	stdcipher "crypto/cipher"
	"encoding/hex"
	"encoding/json"
	"errors"
	"os"
	"testing"
)

func testKey(t testing.TB, b byte) Key {
	t.Helper()
	k, err := KeyFrom(bytes.Repeat([]byte{b}, KeyBytes))
	if err != nil {
		t.Fatal(err)
	}
	return k
}

var bothCiphers = []Cipher{ChaCha20Poly1305, AES256GCM}

func TestOfferCiphers(t *testing.T) {
	for _, tt := range []struct {
		pin          string
		instructions bool
		want         Ciphers
		ok           bool
	}{
		{"auto", true, 3, true},
		{"auto", false, 1, true},
		{"chacha20-poly1305", true, 1, true},
		{"chacha20-poly1305", false, 1, true},
		{"aes-256-gcm", true, 2, true},
		{"aes-256-gcm", false, 0, false},
		{"", true, 0, false},
		{"aes-128-gcm", true, 0, false},
		{"Auto", true, 0, false},
	} {
		got, err := offerCiphers(tt.pin, tt.instructions)
		if got != tt.want || (err == nil) != tt.ok {
			t.Errorf("offerCiphers(%q, %t) = %v, %v, want %v, %t", tt.pin, tt.instructions, got, err, tt.want, tt.ok)
		}
	}
	if offer, err := OfferCiphers(CipherAuto); err != nil || !offer.Has(ChaCha20Poly1305) || offer.Has(AES256GCM) != hasAES() {
		t.Errorf("OfferCiphers(auto) = %v, %v", offer, err)
	}
}

// TestAgree: the table of every pair, bits of later releases included.
func TestAgree(t *testing.T) {
	const later = 0xfc
	for _, tt := range []struct {
		a, b Ciphers
		want Cipher
	}{
		{0, 0, 0}, {0, 3, 0}, {1, 1, ChaCha20Poly1305}, {2, 2, AES256GCM}, {1, 2, 0}, {3, 3, AES256GCM},
		{3, 1, ChaCha20Poly1305}, {3, 2, AES256GCM}, {later, later, 0}, {later | 3, later | 1, ChaCha20Poly1305}, {0xff, 0xff, AES256GCM},
	} {
		for _, pair := range [][2]Ciphers{{tt.a, tt.b}, {tt.b, tt.a}} {
			if got, ok := pair[0].Agree(pair[1]); got != tt.want || ok != (tt.want != 0) {
				t.Errorf("%#x.Agree(%#x) = %v, %t, want %v", uint8(pair[0]), uint8(pair[1]), got, ok, tt.want)
			}
		}
	}
	for _, c := range []Cipher{0, 3, 4, 9, 255} {
		if Ciphers(0xff).Has(c) {
			t.Errorf("a set of what this release knows has %v", c)
		}
	}
	if got, want := Ciphers(0xff).String(), "chacha20-poly1305,aes-256-gcm"; got != want {
		t.Errorf("String = %s, want %s", got, want)
	}
}

func TestKeysThatAreNone(t *testing.T) {
	dropped := testKey(t, 1)
	dropped.Zero()
	for _, k := range []Key{{}, dropped} {
		for _, c := range bothCiphers {
			if _, err := NewSealer(k, c, 1); !errors.Is(err, ErrMalformed) {
				t.Errorf("NewSealer: %v, want ErrMalformed", err)
			}
			if _, err := NewOpener(k, c, 1); !errors.Is(err, ErrMalformed) {
				t.Errorf("NewOpener: %v, want ErrMalformed", err)
			}
		}
		if _, err := NewFloodSealer(k, "n1", 0); !errors.Is(err, ErrMalformed) {
			t.Errorf("NewFloodSealer: %v, want ErrMalformed", err)
		}
		if _, err := NewFloodOpener(k, nil); !errors.Is(err, ErrMalformed) {
			t.Errorf("NewFloodOpener: %v, want ErrMalformed", err)
		}
	}
	for _, c := range []Cipher{0, 3, 255} {
		if _, err := NewSealer(testKey(t, 1), c, 1); !errors.Is(err, ErrMalformed) {
			t.Errorf("NewSealer with %v: %v, want ErrMalformed", c, err)
		}
	}
}

type wycheproof struct {
	TestGroups []struct {
		IVSize, KeySize, TagSize int
		Tests                    []struct {
			TcID                       int
			Comment, Result            string
			Key, IV, AAD, Msg, Ct, Tag text16
		}
	}
}

// text16 is bytes in hexadecimal.
type text16 []byte

func (b *text16) UnmarshalText(text []byte) (err error) {
	*b, err = hex.AppendDecode(nil, text)
	return err
}

func sessionAEAD(c Cipher) func(Key) (stdcipher.AEAD, error) {
	return func(k Key) (stdcipher.AEAD, error) { return c.aead(k) }
}

// TestWycheproof drives the AEADs, through the constructors that sessions and
// floods use, with the vectors of Project Wycheproof; see testdata/wycheproof.
func TestWycheproof(t *testing.T) {
	for _, tt := range []struct {
		file  string
		aead  func(Key) (stdcipher.AEAD, error)
		tests int
	}{
		{"chacha20_poly1305", sessionAEAD(ChaCha20Poly1305), 316},
		{"aes_gcm", sessionAEAD(AES256GCM), 66},
		{"xchacha20_poly1305", floodAEAD, 306},
	} {
		t.Run(tt.file, func(t *testing.T) {
			f, err := os.Open("testdata/wycheproof/" + tt.file + ".json.gz")
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			z, err := gzip.NewReader(f)
			if err != nil {
				t.Fatal(err)
			}
			var v wycheproof
			if err := json.NewDecoder(z).Decode(&v); err != nil {
				t.Fatal(err)
			}
			tests := 0
			for _, group := range v.TestGroups {
				for _, test := range group.Tests {
					tests++
					k, err := KeyFrom(test.Key)
					if err != nil {
						t.Fatalf("%d: %v", test.TcID, err)
					}
					aead, err := tt.aead(k)
					if err != nil {
						t.Fatalf("%d: %v", test.TcID, err)
					}
					sealed := append(bytes.Clone(test.Ct), test.Tag...)
					// In place, as everything here opens.
					got, err := aead.Open(sealed[:0], test.IV, sealed, test.AAD)
					if valid := test.Result == "valid"; (err == nil) != valid || valid && !bytes.Equal(got, test.Msg) {
						t.Errorf("%d (%s): Open = %x, %v, want %s", test.TcID, test.Comment, got, err, test.Result)
					}
					want := append(bytes.Clone(test.Ct), test.Tag...)
					if got := aead.Seal(nil, test.IV, test.Msg, test.AAD); test.Result == "valid" && !bytes.Equal(got, want) {
						t.Errorf("%d (%s): Seal = %x, want %x", test.TcID, test.Comment, got, want)
					}
				}
			}
			if tests != tt.tests {
				t.Errorf("%d tests, want %d", tests, tt.tests)
			}
		})
	}
}
