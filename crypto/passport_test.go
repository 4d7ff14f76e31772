package crypto

import (
	"bytes"
	"errors"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"
)

func passport(t testing.TB, id *Identity, s Statement) []byte {
	t.Helper()
	b, err := id.Passport(s)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func parsePassport(t testing.TB, b []byte) *Passport {
	t.Helper()
	p, err := ParsePassport(b)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func TestPassport(t *testing.T) {
	ca, roots := testCA(t, "c1", 1)
	id := identity(t, ca, roots, fixedKey(2), "Pi-4", Rights{Keeper: true})
	b := passport(t, id, testStatement())
	p := parsePassport(t, b)
	if err := p.Verify(roots, testNow, nil); err != nil {
		t.Fatal(err)
	}
	c := id.Certificate()
	if p.Name != "Pi-4" || p.Key != c.Key || p.Serial != c.Serial || !p.Expires.Equal(c.NotAfter) || !p.Keeper || !reflect.DeepEqual(p.Statement, testStatement()) {
		t.Errorf("passport %+v", p)
	}
	if !bytes.Equal(p.Encode(), b) {
		t.Errorf("Encode() = %x, want %x", p.Encode(), b)
	}
	member := parsePassport(t, passport(t, identity(t, ca, roots, fixedKey(3), "n1", Rights{}), testStatement()))
	if member.Keeper {
		t.Error("a member's passport says keeper")
	}
}

func TestPassportSize(t *testing.T) {
	ca, roots := testCA(t, "c1", 1)
	v4, v6 := netip.MustParseAddrPort("192.0.2.1:4789"), netip.MustParseAddrPort("[2001:db8::1]:4789")
	for _, tt := range []struct {
		name string
		s    Statement
		want int
	}{
		{"12345678", Statement{Sequence: 1, VTEPs: []netip.AddrPort{v4}, Gossip: v4}, 237},
		{"12345678", Statement{Sequence: 1, VTEPs: []netip.AddrPort{v6, v4}, Gossip: v6}, 268},
		{strings.Repeat("n", maxName), Statement{Sequence: 1, VTEPs: []netip.AddrPort{v4, v6}, Gossip: v6, Extra: make([]byte, MaxExtra)}, 387},
	} {
		b := passport(t, identity(t, ca, roots, fixedKey(2), tt.name, Rights{}), tt.s)
		if len(b) != tt.want || len(b) > MaxPassport || MaxPassport != 399 {
			t.Errorf("%d VTEPs, name of %d: %d bytes, want %d; at most %d", len(tt.s.VTEPs), len(tt.name), len(b), tt.want, MaxPassport)
		}
	}
}

// TestPassportAttacks: every bit is under one of the two signatures.
func TestPassportAttacks(t *testing.T) {
	ca, roots := testCA(t, "c1", 1)
	a := identity(t, ca, roots, fixedKey(2), "a", Rights{})
	b := identity(t, ca, roots, fixedKey(3), "b", Rights{})
	renewed := identity(t, ca, roots, fixedKey(2), "a", Rights{})
	mine := passport(t, a, testStatement())
	flips(mine, func(bit int, changed []byte) {
		p, err := ParsePassport(changed)
		if err == nil {
			err = p.Verify(roots, testNow, nil)
		}
		if err == nil {
			t.Errorf("bit %d changed: %+v is verified", bit, p)
		}
	})
	for n := range mine {
		if p, err := ParsePassport(mine[:n]); err == nil {
			t.Errorf("%d of %d bytes are read: %+v", n, len(mine), p)
		}
	}
	for _, more := range []int{1, MaxPassport} {
		if _, err := ParsePassport(append(slices.Clone(mine), make([]byte, more)...)); !errors.Is(err, ErrMalformed) {
			t.Errorf("%d bytes more: %v, want ErrMalformed", more, err)
		}
	}

	splice := func(card []byte, signer *PrivateKey, s Statement, context string) []byte {
		text, err := s.append(slices.Clone(card))
		if err != nil {
			t.Fatal(err)
		}
		return append(text, signer.sign(signedText(context, "c1", text))...)
	}
	moved := testStatement()
	moved.Gossip = netip.MustParseAddrPort("203.0.113.66:7946")
	impostor, _ := testCA(t, "c1", 7)
	issued, err := impostor.Issue(request(t, fixedKey(2), "a"), Rights{}, testNow)
	if err != nil {
		t.Fatal(err)
	}
	foreign, foreignRoots := testCA(t, "c2", 1) // with the same key
	sameKey := identity(t, foreign, foreignRoots, fixedKey(2), "a", Rights{})
	self := card{issuer: keyIDOf(ca.cert), serial: newSerial(), expires: testNow.Add(Lifetime), key: fixedKey(9).PublicKey(), name: "a"}
	relabelled := slices.Clone(issued.Card)
	copy(relabelled[1:5], a.card[1:5])
	for name, tt := range map[string]struct {
		b    []byte
		want error
	}{
		"a's card, b's statement":           {splice(a.card, fixedKey(3), testStatement(), statementContext), ErrForged},
		"a's card, an attacker's address":   {splice(a.card, fixedKey(9), moved, statementContext), ErrForged},
		"a's statement under b's card":      {slices.Concat(b.card, mine[len(a.card):]), ErrForged},
		"a's statement under another card":  {slices.Concat(renewed.card, mine[len(a.card):]), ErrForged},
		"self-signed card":                  {splice(self.sign(&CA{cluster: "c1", key: fixedKey(9)}), fixedKey(9), moved, statementContext), ErrForged},
		"card of an impostor":               {splice(issued.Card, fixedKey(2), moved, statementContext), ErrOtherCluster},
		"card of an impostor, our key's id": {splice(relabelled, fixedKey(2), moved, statementContext), ErrForged},
		"the CA's key in another cluster":   {passport(t, sameKey, moved), ErrForged},
		"signed as something else":          {splice(a.card, fixedKey(2), moved, passportContext), ErrForged},
	} {
		if err := parsePassport(t, tt.b).Verify(roots, testNow, nil); !errors.Is(err, tt.want) {
			t.Errorf("%s: %v, want %v", name, err, tt.want)
		}
	}
	p := parsePassport(t, mine)
	for _, tt := range []struct {
		after time.Duration
		want  error
	}{
		{-Skew, nil},
		{-Skew - time.Second, ErrClock},
		{Lifetime + Skew, nil},
		{Lifetime + Skew + time.Second, ErrExpired},
	} {
		if err := p.Verify(roots, testNow.Add(tt.after), nil); !errors.Is(err, tt.want) {
			t.Errorf("%v after it was issued: %v, want %v", tt.after, err, tt.want)
		}
	}
}

func TestPassportSupersedes(t *testing.T) {
	ca, roots := testCA(t, "c1", 1)
	id := identity(t, ca, roots, fixedKey(2), "a", Rights{})
	at := func(id *Identity, sequence uint64, change func(*Statement)) *Passport {
		s := testStatement()
		s.Sequence = sequence
		change(&s)
		return parsePassport(t, passport(t, id, s))
	}
	same := func(*Statement) {}
	five := at(id, 5, same)
	for name, tt := range map[string]struct {
		p, old *Passport
		want   bool
	}{
		"the first":          {five, nil, true},
		"the same again":     {at(id, 5, same), five, true},
		"newer":              {at(id, 6, same), five, true},
		"older":              {at(id, 4, same), five, false},
		"other, same number": {at(id, 5, func(s *Statement) { s.Count++ }), five, false},
		"another key":        {at(identity(t, ca, roots, fixedKey(3), "a", Rights{}), 9, same), five, false},
	} {
		if got := tt.p.Supersedes(tt.old); got != tt.want {
			t.Errorf("%s: %v, want %v", name, got, tt.want)
		}
	}
}

// badStatements are refused by the sender, and by the receiver of the same bytes.
func TestStatementBounds(t *testing.T) {
	ca, roots := testCA(t, "c1", 1)
	id := identity(t, ca, roots, fixedKey(2), "a", Rights{})
	a := func(s string) netip.AddrPort { return netip.MustParseAddrPort(s) }
	for name, change := range map[string]func(*Statement){
		"no VTEP":         func(s *Statement) { s.VTEPs = nil },
		"three":           func(s *Statement) { s.VTEPs = append(s.VTEPs, a("192.0.2.3:1")) },
		"two of a family": func(s *Statement) { s.VTEPs[1] = a("192.0.2.3:1") },
		"port 0":          func(s *Statement) { s.VTEPs[0] = a("192.0.2.3:0") },
		"unspecified":     func(s *Statement) { s.VTEPs[0] = a("0.0.0.0:1") },
		"multicast":       func(s *Statement) { s.VTEPs[1] = a("[ff02::1]:1") },
		"zone":            func(s *Statement) { s.VTEPs[1] = a("[fe80::1%eth0]:1") },
		"mapped":          func(s *Statement) { s.VTEPs[1] = a("[::ffff:192.0.2.1]:1") },
		"no gossip":       func(s *Statement) { s.Gossip = netip.AddrPort{} },
		"extra":           func(s *Statement) { s.Extra = make([]byte, MaxExtra+1) },
		"sequence 0":      func(s *Statement) { s.Sequence = 0 },
		"sequence":        func(s *Statement) { s.Sequence = 1 << 63 },
	} {
		s := testStatement()
		change(&s)
		if b, err := id.Passport(s); err == nil {
			t.Errorf("%s: passport %x is made", name, b)
		}
	}
	at := len(id.card)
	for name, change := range map[string]func([]byte){
		"no VTEP":         func(b []byte) { b[at+30] = 0 },
		"three":           func(b []byte) { b[at+30] = 3 },
		"family":          func(b []byte) { b[at+31] = 5 },
		"port 0":          func(b []byte) { b[at+36], b[at+37] = 0, 0 },
		"multicast":       func(b []byte) { b[at+32] = 230 },
		"sequence 0":      func(b []byte) { clear(b[at : at+8]) },
		"sequence":        func(b []byte) { b[at] = 0x80 },
		"flags":           func(b []byte) { b[21] |= 2 },
		"version":         func(b []byte) { b[0] = 2 },
		"a long way off":  func(b []byte) { b[13] = 0x7f },
		"serial":          func(b []byte) { b[5] = 0xff },
		"length of name":  func(b []byte) { b[54] = 255 },
		"length of extra": func(b []byte) { b[len(b)-64-6] = 65 },
	} {
		b := passport(t, id, testStatement())
		change(b)
		if p, err := ParsePassport(b); !errors.Is(err, ErrMalformed) {
			t.Errorf("%s: %+v, %v, want ErrMalformed", name, p, err)
		}
	}
}

func FuzzParsePassport(f *testing.F) {
	ca, roots := testCA(f, "c1", 1)
	id := identity(f, ca, roots, fixedKey(2), "a", Rights{})
	b := passport(f, id, testStatement())
	f.Add(b)
	f.Add(passport(f, id, Statement{Sequence: 1, VTEPs: testStatement().VTEPs[:1], Gossip: testStatement().Gossip}))
	f.Fuzz(func(t *testing.T, b []byte) {
		p, err := ParsePassport(b)
		if err != nil {
			return
		}
		if !bytes.Equal(p.Encode(), b) {
			t.Errorf("ParsePassport(%x).Encode() = %x", b, p.Encode())
		}
		if _, err := p.Statement.append(nil); err != nil || CheckName(p.Name) != nil {
			t.Errorf("ParsePassport(%x) = %+v, which nobody could have made: %v", b, p, err)
		}
		_ = p.Verify(roots, testNow, nil)
	})
}

func BenchmarkPassportVerify(b *testing.B) {
	ca, roots := testCA(b, "c1", 1)
	text := passport(b, identity(b, ca, roots, fixedKey(2), "a", Rights{}), testStatement())
	for b.Loop() {
		p, err := ParsePassport(text)
		if err != nil {
			b.Fatal(err)
		}
		if err := p.Verify(roots, testNow, nil); err != nil {
			b.Fatal(err)
		}
	}
}
