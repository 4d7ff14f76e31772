package crypto

import (
	"errors"
	"fmt"
	"slices"
	"testing"
	"time"
)

func TestRevocations(t *testing.T) {
	ca, roots := testCA(t, "c1", 1)
	var ids []*Identity
	for i := range 5 {
		ids = append(ids, identity(t, ca, roots, fixedKey(byte(10+i)), fmt.Sprint("n", i), Rights{}))
	}
	until := testNow.Add(Lifetime)
	list := []Revocation{
		{Serial: ids[0].cert.Serial, Until: until},
		{Name: "n1", Until: until},
		{Key: ids[2].cert.Key, Until: until},
		{Key: ids[2].cert.Key, Until: until},                      // twice
		{Name: "n3", Until: testNow.Add(-2*Skew - 1*time.Second)}, // over
	}
	b, err := ca.SignRevocations(8, list, testNow)
	if err != nil {
		t.Fatal(err)
	}
	r, err := roots.ParseRevocations(b)
	if err != nil {
		t.Fatal(err)
	}
	if r.Number() != 8 || len(r.All()) != 3 {
		t.Errorf("list %d: %v", r.Number(), r.All())
	}
	for i, id := range ids {
		var want error
		if i < 3 {
			want = ErrRevoked
		}
		if _, err := roots.Verify([][]byte{id.cert.DER}, testNow, r); !errors.Is(err, want) {
			t.Errorf("certificate of n%d: %v, want %v", i, err, want)
		}
		if err := parsePassport(t, passport(t, id, testStatement())).Verify(roots, testNow, r); !errors.Is(err, want) {
			t.Errorf("passport of n%d: %v, want %v", i, err, want)
		}
	}
	again, err := ca.SignRevocations(8, r.All(), testNow)
	if err != nil || !slices.Equal(again, b) {
		t.Errorf("the same list is %x and %x, %v", b, again, err)
	}
}

func TestRevocationsAttacks(t *testing.T) {
	ca, roots := testCA(t, "c1", 1)
	b, err := ca.SignRevocations(1, []Revocation{{Name: "n1", Key: fixedKey(2).PublicKey(), Until: testNow}}, testNow)
	if err != nil {
		t.Fatal(err)
	}
	flips(b, func(bit int, changed []byte) {
		if _, err := roots.ParseRevocations(changed); err == nil {
			t.Errorf("bit %d changed: the list is read", bit)
		}
	})
	for n := range b {
		if _, err := roots.ParseRevocations(b[:n]); err == nil {
			t.Errorf("%d of %d bytes are read", n, len(b))
		}
	}
	_, other := testCA(t, "c1", 2)
	if _, err := other.ParseRevocations(b); !errors.Is(err, ErrOtherCluster) {
		t.Errorf("by another CA: %v, want ErrOtherCluster", err)
	}
	_, sameKey := testCA(t, "c2", 1)
	if _, err := sameKey.ParseRevocations(b); !errors.Is(err, ErrForged) {
		t.Errorf("in another cluster: %v, want ErrForged", err)
	}
	sign := func(body []byte) []byte {
		return append(slices.Clone(body), ca.key.sign(signedText(revocationsContext, "c1", body))...)
	}
	body := b[:len(b)-SignatureBytes]
	for name, f := range map[string]func([]byte) []byte{
		"another version": func(b []byte) []byte { b[0] = 2; return b },
		"number 0":        func(b []byte) []byte { clear(b[5:13]); return b },
		"too many":        func(b []byte) []byte { b[13] = 255; return b },
		"one more":        func(b []byte) []byte { b[16]++; return b },
		"one less":        func(b []byte) []byte { b[16]--; return b },
		"a long way off":  func(b []byte) []byte { b[25] = 255; return b },
		"cut name":        func(b []byte) []byte { return b[:len(b)-1] },
		"bad name":        func(b []byte) []byte { b[len(b)-1] = '/'; return b },
		"of nothing":      func(b []byte) []byte { clear(b[33:65]); b[65] = 0; return b[:66] },
	} {
		if _, err := roots.ParseRevocations(sign(f(slices.Clone(body)))); !errors.Is(err, ErrMalformed) && !errors.Is(err, ErrName) {
			t.Errorf("%s, signed: %v, want ErrMalformed", name, err)
		}
	}
	for name, list := range map[string][]Revocation{
		"of nothing": {{Until: testNow}},
		"bad name":   {{Name: "*", Until: testNow}},
		"too many":   make([]Revocation, 0, 1),
	} {
		if name == "too many" {
			for i := range MaxRevocations + 1 {
				list = append(list, Revocation{Serial: Serial(i + 1), Until: testNow})
			}
		}
		if _, err := ca.SignRevocations(1, list, testNow); err == nil {
			t.Errorf("%s: signed", name)
		}
	}
	if _, err := ca.SignRevocations(0, nil, testNow); err == nil {
		t.Error("number 0 is signed")
	}
}

func TestRevocationsNewer(t *testing.T) {
	ca, roots := testCA(t, "c1", 1)
	at := func(n uint64) *Revocations {
		b, err := ca.SignRevocations(n, nil, testNow)
		if err != nil {
			t.Fatal(err)
		}
		r, err := roots.ParseRevocations(b)
		if err != nil {
			t.Fatal(err)
		}
		return r
	}
	var none *Revocations
	one, two := at(1), at(2)
	if one.Newer(two) != two || two.Newer(one) != two || none.Newer(one) != one || one.Newer(nil) != one || none.Newer(nil) != nil {
		t.Error("the list with the lower number wins")
	}
	if none.Check("n1", PublicKey{}, 0) != nil || one.Check("", PublicKey{}, 0) != nil || len(none.All()) != 0 {
		t.Error("an empty list revokes")
	}
}

func FuzzParseRevocations(f *testing.F) {
	ca, roots := testCA(f, "c1", 1)
	b, err := ca.SignRevocations(1, []Revocation{{Name: "n1", Key: fixedKey(2).PublicKey(), Until: testNow}, {Serial: 9, Until: testNow}}, testNow)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b[:len(b)-SignatureBytes])
	f.Fuzz(func(t *testing.T, body []byte) {
		// As the CA would: else nothing gets beyond the signature.
		b := append(slices.Clone(body), ca.key.sign(signedText(revocationsContext, "c1", body))...)
		r, err := roots.ParseRevocations(b)
		if err != nil {
			return
		}
		if r.Number() == 0 || len(r.All()) > MaxRevocations {
			t.Errorf("ParseRevocations(%x) = %v", b, r.All())
		}
	})
}
