package crypto

import (
	"bytes"
	"encoding/base64"
	"errors"
	"fmt"
	"net/netip"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"
)

var testKeepers = []netip.AddrPort{netip.MustParseAddrPort("192.0.2.1:4789"), netip.MustParseAddrPort("[2001:db8::1]:4789")}

func newToken(t testing.TB, o TokenOptions) (*Token, *TokenRecord) {
	t.Helper()
	ca, _ := testCA(t, "c1", 1)
	token, record, err := NewToken(ca.Fingerprint(), testKeepers, o, testNow)
	if err != nil {
		t.Fatal(err)
	}
	return token, record
}

var testOptions = TokenOptions{TTL: time.Hour, Uses: 1, Name: "*", Overlays: Grants{"*"}}

func TestToken(t *testing.T) {
	token, record := newToken(t, testOptions)
	text := token.Encode()
	if !regexp.MustCompile(`^[A-Za-z0-9._-]+$`).MatchString(text) {
		t.Errorf("token %s has characters that scripts do not expect", text)
	}
	back, err := ParseToken(" " + text + "\n")
	if err != nil {
		t.Fatal(err)
	}
	if back.ID != token.ID || back.CA != token.CA || **back.secret != **token.secret || !slices.Equal(back.Keepers, testKeepers) || back.ID != record.ID {
		t.Errorf("ParseToken(%s) = %v", text, back)
	}
	exporter := bytes.Repeat([]byte{9}, MinExporter)
	if err := record.Verify(back.Prove(exporter, RoleJoin), exporter, RoleJoin); err != nil {
		t.Error(err)
	}
	if bytes.Contains(record.Encode(), []byte(base64.RawURLEncoding.EncodeToString((*token.secret)[:]))) || record.Hash == TokenHash(token.key().Bytes()) {
		t.Error("the record holds the secret")
	}
	again, _ := newToken(t, testOptions)
	if again.ID == token.ID || **again.secret == **token.secret {
		t.Error("two tokens are one")
	}
}

func TestTokenSize(t *testing.T) {
	ca, _ := testCA(t, "c1", 1)
	for n, want := range map[int]int{1: 98, MaxTokenKeepers: 291} {
		a := netip.MustParseAddrPort("192.0.2.1:4789")
		if n > 1 {
			a = netip.MustParseAddrPort("[2001:db8::1]:4789")
		}
		token, _, err := NewToken(ca.Fingerprint(), slices.Repeat([]netip.AddrPort{a}, n), testOptions, testNow)
		if err != nil {
			t.Fatal(err)
		}
		if got := len(token.Encode()); got != want || got > MaxTokenText {
			t.Errorf("a token with %d keepers has %d characters, want %d", n, got, want)
		}
		if _, err := ParseToken(token.Encode()); err != nil {
			t.Error(err)
		}
	}
}

func TestParseTokenErrors(t *testing.T) {
	token, _ := newToken(t, testOptions)
	text := token.Encode()
	body := strings.TrimPrefix(text, tokenPrefix)
	for _, tt := range []struct {
		text string
		want error
	}{
		{"", ErrTokenForeign},
		{"tulle", ErrTokenForeign},
		{"tulle1", ErrTokenForeign},
		{"tulle.", ErrTokenForeign},
		{"tullex." + body, ErrTokenForeign},
		{"K10abcdef::server:x", ErrTokenForeign},
		{"eyJhbGciOiJub25lIn0.e30.", ErrTokenForeign},
		{body, ErrTokenForeign},
		{"tulle2." + body, ErrTokenVersion},
		{"tulle01." + body, ErrTokenVersion},
		{"tulle1.", ErrTokenDamaged},
		{"tulle1." + body[1:], ErrTokenDamaged},
		{text + "A", ErrTokenDamaged},
		{text + "=", ErrTokenDamaged},
		{text[:40] + "\n" + text[40:], ErrTokenDamaged},
		{text[:40] + " " + text[40:], ErrTokenDamaged},
		{text + text, ErrTokenDamaged},
		{"tulle1." + strings.Repeat("A", 1<<20), ErrTokenDamaged},
	} {
		_, err := ParseToken(tt.text)
		if !errors.Is(err, tt.want) {
			t.Errorf("ParseToken(%.60q) = %v, want %v", tt.text, err, tt.want)
		}
		if err != nil && len(tt.text) > 20 && strings.Contains(err.Error(), tt.text[10:20]) {
			t.Errorf("the error quotes the token: %v", err)
		}
	}
	for n := range text {
		if _, err := ParseToken(text[:n]); err == nil {
			t.Errorf("%d of %d characters are a token", n, len(text))
		}
	}
	const alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
	for i := len(tokenPrefix); i < len(text); i++ {
		for _, c := range alphabet {
			changed := text[:i] + string(c) + text[i+1:]
			if _, err := ParseToken(changed); changed != text && !errors.Is(err, ErrTokenDamaged) {
				t.Fatalf("character %d changed to %c: %v, want ErrTokenDamaged", i, c, err)
			}
		}
	}
	// Right checksum, wrong content.
	payload := func(f func([]byte) []byte) string {
		b, err := base64.RawURLEncoding.DecodeString(body)
		if err != nil {
			t.Fatal(err)
		}
		b = f(b[:len(b)-tokenChecksum])
		return tokenPrefix + base64.RawURLEncoding.EncodeToString(append(b, checksum(b)...))
	}
	const keepersAt = 8 + tokenSecret + 32
	for name, f := range map[string]func([]byte) []byte{
		"no keeper":     func(b []byte) []byte { b[keepersAt] = 0; return b[:keepersAt+1] },
		"nine keepers":  func(b []byte) []byte { b[keepersAt] = 9; return b },
		"one is gone":   func(b []byte) []byte { b[keepersAt] = 3; return b },
		"bytes behind":  func(b []byte) []byte { b[keepersAt] = 1; return b },
		"family":        func(b []byte) []byte { b[keepersAt+1] = 5; return b },
		"port 0":        func(b []byte) []byte { b[keepersAt+6], b[keepersAt+7] = 0, 0; return b },
		"multicast":     func(b []byte) []byte { b[keepersAt+2] = 224; return b },
		"empty":         func([]byte) []byte { return nil },
		"short":         func(b []byte) []byte { return b[:30] },
		"IPv4 as IPv6":  func(b []byte) []byte { copy(b[keepersAt+9:], append(make([]byte, 10), 255, 255, 1, 2, 3, 4)); return b },
		"not specified": func(b []byte) []byte { clear(b[keepersAt+2:][:4]); return b },
	} {
		if token, err := ParseToken(payload(f)); !errors.Is(err, ErrTokenDamaged) {
			t.Errorf("%s: %v, %v, want ErrTokenDamaged", name, token, err)
		}
	}
}

func TestNewTokenBounds(t *testing.T) {
	ca, _ := testCA(t, "c1", 1)
	with := func(f func(*TokenOptions)) TokenOptions {
		o := testOptions
		f(&o)
		return o
	}
	for name, tt := range map[string]struct {
		keepers []netip.AddrPort
		o       TokenOptions
	}{
		"no keeper":     {nil, testOptions},
		"nine":          {slices.Repeat(testKeepers[:1], 9), testOptions},
		"no address":    {[]netip.AddrPort{{}}, testOptions},
		"unspecified":   {[]netip.AddrPort{netip.MustParseAddrPort("0.0.0.0:4789")}, testOptions},
		"zone":          {[]netip.AddrPort{netip.MustParseAddrPort("[fe80::1%eth0]:4789")}, testOptions},
		"no TTL":        {testKeepers, with(func(o *TokenOptions) { o.TTL = 0 })},
		"two years":     {testKeepers, with(func(o *TokenOptions) { o.TTL = 2 * MaxTokenTTL })},
		"no use":        {testKeepers, with(func(o *TokenOptions) { o.Uses = 0 })},
		"too many uses": {testKeepers, with(func(o *TokenOptions) { o.Uses = MaxTokenUses + 1 })},
		"no name":       {testKeepers, with(func(o *TokenOptions) { o.Name = "" })},
		"bad name":      {testKeepers, with(func(o *TokenOptions) { o.Name = "a b" })},
		"bad overlays":  {testKeepers, with(func(o *TokenOptions) { o.Overlays = Grants{"b", "a"} })},
	} {
		if _, _, err := NewToken(ca.Fingerprint(), tt.keepers, tt.o, testNow); err == nil {
			t.Errorf("%s: a token is made", name)
		}
	}
}

// TestTokenProof: it holds for its token, connection and role, and whoever has
// only the record cannot make one.
func TestTokenProof(t *testing.T) {
	token, record := newToken(t, testOptions)
	other, otherRecord := newToken(t, testOptions)
	here, there := bytes.Repeat([]byte{1}, MinExporter), bytes.Repeat([]byte{2}, MinExporter)
	proof := token.Prove(here, RoleJoin)
	for name, tt := range map[string]struct {
		r        *TokenRecord
		p        Proof
		exporter []byte
		role     string
		want     error
	}{
		"right":              {record, proof, here, RoleJoin, nil},
		"another connection": {record, proof, there, RoleJoin, ErrTokenProof},
		"another role":       {record, proof, here, "keeper", ErrTokenProof},
		"another token":      {otherRecord, proof, here, RoleJoin, ErrTokenProof},
		"another's proof":    {record, other.Prove(here, RoleJoin), here, RoleJoin, ErrTokenProof},
		"nothing":            {record, Proof{}, here, RoleJoin, ErrTokenProof},
		// The thief of the record knows the hash and hence the pad.
		"the pad":          {record, Proof(tokenPad(record.Hash[:], record.ID, here, RoleJoin)), here, RoleJoin, ErrTokenProof},
		"the hash, padded": {record, xor(record.Hash, tokenPad(record.Hash[:], record.ID, here, RoleJoin)), here, RoleJoin, ErrTokenProof},
		"the hash":         {record, Proof(record.Hash), here, RoleJoin, ErrTokenProof},
	} {
		if err := tt.r.Verify(tt.p, tt.exporter, tt.role); !errors.Is(err, tt.want) {
			t.Errorf("%s: %v, want %v", name, err, tt.want)
		}
	}
	flips(proof[:], func(bit int, b []byte) {
		if err := record.Verify(Proof(b), here, RoleJoin); !errors.Is(err, ErrTokenProof) {
			t.Errorf("bit %d changed: %v, want ErrTokenProof", bit, err)
		}
	})
	token.Zero()
	if err := record.Verify(token.Prove(here, RoleJoin), here, RoleJoin); err == nil {
		t.Error("it proves after Zero")
	}
}

func xor(a TokenHash, b []byte) (p Proof) {
	for i := range p {
		p[i] = a[i] ^ b[i]
	}
	return p
}

func TestTokenUse(t *testing.T) {
	o := testOptions
	o.Uses, o.Name = 2, "pi-*"
	_, r := newToken(t, o)
	key := func(b byte) PublicKey { return fixedKey(b).PublicKey() }
	for i, tt := range []struct {
		name  string
		key   PublicKey
		after time.Duration
		want  error
		left  int
	}{
		{"n1", key(1), 0, ErrTokenName, 2},
		{"../pi-1", key(1), 0, ErrName, 2},
		{"pi-1", key(1), time.Hour, ErrTokenExpired, 2},
		{"pi-1", key(1), 0, nil, 1},
		{"pi-1", key(1), time.Minute, nil, 1}, // its answer was lost
		{"pi-2", key(1), time.Minute, nil, 0},
		{"pi-3", key(3), time.Minute, ErrTokenUsed, 0},
		{"pi-1", key(3), time.Minute, ErrTokenUsed, 0}, // another machine with a name that joined
		{"pi-1", key(1), time.Minute, nil, 0},
		{"pi-1", key(1), time.Hour, ErrTokenExpired, 0},
	} {
		if err := r.Check(tt.name, tt.key, testNow.Add(tt.after)); !errors.Is(err, tt.want) {
			t.Errorf("%d: Check = %v, want %v", i, err, tt.want)
		}
		if err := r.Use(tt.name, tt.key, testNow.Add(tt.after)); !errors.Is(err, tt.want) {
			t.Errorf("%d: Use = %v, want %v", i, err, tt.want)
		}
		if r.Left() != tt.left {
			t.Errorf("%d: %d left, want %d", i, r.Left(), tt.left)
		}
	}
	b := r.Encode()
	back, err := ParseTokenRecord(b)
	if err != nil || fmt.Sprint(*back) != fmt.Sprint(*r) || !bytes.Equal(back.Encode(), b) {
		t.Errorf("ParseTokenRecord(%s) = %+v, %v", b, back, err)
	}
	if err := back.Check("pi-9", key(9), testNow); !errors.Is(err, ErrTokenUsed) {
		t.Errorf("used up, after it was stored: %v", err)
	}
	for n := range b {
		if _, err := ParseTokenRecord(b[:n]); err == nil {
			t.Errorf("%d of %d bytes are a record", n, len(b))
		}
	}
	for name, change := range map[string][2]string{
		"another key":  {`"uses"`, `"usez"`},
		"no uses":      {`"uses":2`, `"uses":0`},
		"too few uses": {`"uses":2`, `"uses":1`},
		"bad pattern":  {`pi-*`, `**`},
		"capital id":   {r.ID.String(), strings.ToUpper("abcdef" + r.ID.String()[6:])},
		"bad name":     {`"pi-1"`, `"pi.1"`},
	} {
		if bad := strings.Replace(string(b), change[0], change[1], 1); bad == string(b) {
			t.Errorf("%s: nothing changed", name)
		} else if _, err := ParseTokenRecord([]byte(bad)); err == nil {
			t.Errorf("%s: %s is a record", name, bad)
		}
	}
}

func FuzzParseToken(f *testing.F) {
	token, _ := newToken(f, testOptions)
	f.Add(token.Encode())
	f.Add("tulle2.AAAA")
	f.Fuzz(func(t *testing.T, text string) {
		token, err := ParseToken(text)
		if err == nil && token.Encode() != strings.TrimSpace(text) {
			t.Errorf("ParseToken(%q).Encode() = %s", text, token.Encode())
		}
		// What stands behind the checksum.
		b := []byte(text)
		text = tokenPrefix + base64.RawURLEncoding.EncodeToString(append(b, checksum(b)...))
		if token, err := ParseToken(text); err == nil && token.Encode() != text {
			t.Errorf("ParseToken(%q).Encode() = %s", text, token.Encode())
		}
	})
}

func FuzzParseTokenRecord(f *testing.F) {
	_, record := newToken(f, testOptions)
	f.Add(record.Encode())
	f.Fuzz(func(t *testing.T, b []byte) {
		r, err := ParseTokenRecord(b)
		if err != nil {
			return
		}
		_ = r.Use("n1", PublicKey{}, testNow)
		if _, err := ParseTokenRecord(r.Encode()); err != nil {
			t.Errorf("%s: what was read cannot be read again: %v", b, err)
		}
	})
}
