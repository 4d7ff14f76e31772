package crypto

import (
	"bytes"
	"errors"
	"strings"
	"testing"
	"time"
)

// succession is a cluster whose CA changes: before, between, and after.
type succession struct {
	old, next                *CA
	before, introduced, both *Roots // both: next signs
	after                    *Roots
}

func newSuccession(t testing.TB) *succession {
	t.Helper()
	s := &succession{}
	s.old, s.before = testCA(t, "c1", 1)
	s.next, _ = testCA(t, "c1", 2)
	var err error
	if s.introduced, err = Introduce(s.old, s.next, testNow); err != nil {
		t.Fatal(err)
	}
	if s.both, err = s.introduced.Promoted(s.next.Fingerprint()); err != nil {
		t.Fatal(err)
	}
	s.after = s.both.Only()
	return s
}

func TestIntroduce(t *testing.T) {
	s := newSuccession(t)
	for _, tt := range []struct {
		name   string
		roots  *Roots
		signer *CA
		len    int
		ders   int
	}{{"before", s.before, s.old, 1, 1}, {"introduced", s.introduced, s.old, 2, 3}, {"both", s.both, s.next, 2, 3}, {"after", s.after, s.next, 1, 1}} {
		again, err := NewRoots(tt.roots.DER()...)
		if err != nil || !again.Equal(tt.roots) {
			t.Errorf("%s: read again: %v", tt.name, err)
		}
		if tt.roots.Signer() != tt.signer.Fingerprint() || tt.roots.Len() != tt.len || len(tt.roots.DER()) != tt.ders || len(tt.roots.Fingerprints()) != tt.len {
			t.Errorf("%s: %d CAs, %d certificates, %s signs", tt.name, tt.roots.Len(), len(tt.roots.DER()), tt.roots.Signer())
		}
		if n := bytes.Count(tt.roots.PEM(), []byte("BEGIN CERTIFICATE")); n != tt.len {
			t.Errorf("%s: %d certificates for the store, want %d", tt.name, n, tt.len)
		}
	}
	if s.introduced.Equal(s.both) || !s.both.Has(s.old.KeyID()) || s.after.Has(s.old.KeyID()) {
		t.Error("Equal or Has")
	}
	foreign, _ := testCA(t, "c2", 3)
	stranger, _ := testCA(t, "c1", 4)
	voucher := s.introduced.DER()[2]
	byStranger, err := stranger.Vouch(s.next, testNow)
	if err != nil {
		t.Fatal(err)
	}
	for name, ders := range map[string][][]byte{
		"a voucher alone":               {voucher},
		"a voucher without who vouches": {s.next.DER(), voucher},
		"a voucher for somebody else":   {s.old.DER(), voucher},
		"another cluster's CA":          {s.old.DER(), foreign.DER()},
		"a stranger's voucher":          {s.old.DER(), s.next.DER(), byStranger},
	} {
		if _, err := NewRoots(ders...); err == nil {
			t.Errorf("%s is taken", name)
		}
	}
	if _, err := s.old.Vouch(foreign, testNow); !errors.Is(err, ErrOtherCluster) {
		t.Errorf("vouching for another cluster's CA: %v", err)
	}
	if _, err := s.introduced.Promoted(stranger.Fingerprint()); err == nil {
		t.Error("a CA signs that is not known")
	}
}

// A node that knows only the former CA believes a keeper of the next one by the
// voucher, and nobody else.
func TestVouched(t *testing.T) {
	s := newSuccession(t)
	keeper := identity(t, s.next, s.both, fixedKey(5), "k1", Rights{Keeper: true})
	member := identity(t, s.next, s.both, fixedKey(6), "n1", Rights{Overlays: grants(t, "*")})
	chain := keeper.TLS().Certificate
	c, err := s.before.Verify(chain, testNow, nil)
	if err != nil || c.Name != "k1" || c.Issuer != s.next.KeyID() || len(c.Chain()) != 2 {
		t.Fatalf("a keeper of the next CA: %+v, %v", c, err)
	}
	if _, err := s.before.Verify(c.Chain(), testNow, nil); err != nil {
		t.Errorf("verified again: %v", err)
	}
	if c, err := s.both.Verify(chain, testNow, nil); err != nil || len(c.Chain()) != 1 {
		t.Errorf("who knows both needs no voucher: %v", err)
	}
	if len(member.TLS().Certificate) != 1 {
		t.Error("a node that is no keeper shows more than its certificate")
	}
	voucher := s.introduced.DER()[2]
	stranger, _ := testCA(t, "c1", 4)
	byStranger, err := stranger.Vouch(s.next, testNow)
	if err != nil {
		t.Fatal(err)
	}
	revoked := newRevocations(1, []Revocation{{Name: "k1", Until: testNow.Add(time.Hour)}})
	ofOld := identity(t, s.old, s.before, fixedKey(7), "n2", Rights{Overlays: grants(t, "*")})
	for name, tt := range map[string]struct {
		roots *Roots
		chain [][]byte
		now   time.Time
		list  *Revocations
		want  error
	}{
		"no voucher":                       {s.before, chain[:1], testNow, nil, ErrForged},
		"the next CA itself":               {s.before, [][]byte{chain[0], s.next.DER()}, testNow, nil, ErrForged},
		"a stranger's voucher":             {s.before, [][]byte{chain[0], byStranger}, testNow, nil, ErrForged},
		"a node's certificate as one":      {s.before, [][]byte{chain[0], ofOld.cert.DER}, testNow, nil, ErrForged},
		"revoked":                          {s.before, chain, testNow, revoked, ErrRevoked},
		"expired":                          {s.before, chain, testNow.Add(2 * Lifetime), nil, ErrExpired},
		"after, a certificate of the old":  {s.after, [][]byte{ofOld.cert.DER}, testNow, nil, ErrForged},
		"after, and the voucher as a link": {s.after, [][]byte{ofOld.cert.DER, voucher}, testNow, nil, ErrForged},
	} {
		if _, err := tt.roots.Verify(tt.chain, tt.now, tt.list); !errors.Is(err, tt.want) {
			t.Errorf("%s: %v, want %v", name, err, tt.want)
		}
	}
	flips(voucher, func(bit int, changed []byte) {
		if _, err := s.before.Verify([][]byte{chain[0], changed}, testNow, nil); err == nil {
			t.Errorf("believed by a voucher whose bit %d is another", bit)
		}
	})
	// The times of the CAs bound the voucher's.
	x, _, err := parseCA(voucher)
	if err != nil || x.NotAfter.After(s.old.NotAfter()) {
		t.Errorf("the voucher lasts until %s, the CA until %s", x.NotAfter, s.old.NotAfter())
	}
}

// A machine that joins by a token of either CA learns of both.
func TestVerifyKeeperOfNextCA(t *testing.T) {
	s := newSuccession(t)
	chain := identity(t, s.next, s.both, fixedKey(5), "k1", Rights{Keeper: true}).TLSWithRoots().Certificate
	if len(chain) > maxChain {
		t.Fatalf("a chain of %d certificates, more than %d", len(chain), maxChain)
	}
	for name, ca := range map[string]*CA{"old": s.old, "new": s.next} {
		if c, roots, err := VerifyKeeper(chain, ca.Fingerprint(), testNow); err != nil || c.Name != "k1" || roots.Signer() != ca.Fingerprint() {
			t.Errorf("by the %s token: %v", name, err)
		}
	}
	chain = identity(t, s.next, s.after, fixedKey(5), "k1", Rights{Keeper: true}).TLSWithRoots().Certificate
	if _, _, err := VerifyKeeper(chain, s.old.Fingerprint(), testNow); !errors.Is(err, ErrOtherCluster) {
		t.Errorf("by the old token, afterwards: %v", err)
	}
}

// A keeper's state through a change of the CA, on the disk.
func TestStateOfSuccession(t *testing.T) {
	s := newSuccession(t)
	state, d := NewState("c1", "k1"), openDir(t)
	id := identity(t, s.old, s.before, fixedKey(5), "k1", Rights{Keeper: true})
	state.SetIdentity(id)
	state.SetCA(s.old)
	step := func(what string, signs *CA, roots *Roots, f func() error) {
		t.Helper()
		if err := f(); err != nil {
			t.Fatalf("%s: %v", what, err)
		}
		commit(t, d, state)
		var err error
		if state, err = d.Load(); err != nil {
			t.Fatalf("%s: %v", what, err)
		}
		ca, err := state.CA()
		if err != nil || ca.Fingerprint() != signs.Fingerprint() {
			t.Errorf("%s: CA: %v", what, err)
		}
		if got, err := state.Roots(); err != nil || !got.Equal(roots) {
			t.Errorf("%s: Roots: %v", what, err)
		}
		if _, err := state.Identity(testNow); err != nil {
			t.Errorf("%s: Identity: %v", what, err)
		}
	}
	with := func(roots *Roots) func() error {
		return func() error {
			before, err := state.Roots()
			if err != nil {
				return err
			}
			if id, err = id.WithRoots(roots, testNow); err != nil {
				return err
			}
			state.SetIdentity(id)
			return state.DropCAs(before)
		}
	}
	step("the key is here before anybody knows", s.old, s.before, func() error { return state.SetNextCA(s.next) })
	step("introduced", s.old, s.introduced, with(s.introduced))
	step("signing", s.next, s.both, with(s.both))
	if err := with(s.after)(); !errors.Is(err, ErrForged) {
		t.Errorf("dropping the CA of its own certificate: %v", err)
	}
	third, _ := testCA(t, "c1", 9)
	if err := state.SetNextCA(third); err == nil || !strings.Contains(err.Error(), "try again") {
		t.Errorf("a third CA meanwhile: %v", err)
	}
	step("renewed", s.next, s.both, func() error {
		id = identity(t, s.next, s.both, fixedKey(5), "k1", Rights{Keeper: true})
		state.SetIdentity(id)
		return nil
	})
	step("after", s.next, s.after, with(s.after))
	if _, ok := state.Files[FileNextCA]; ok {
		t.Error("there is still another CA")
	}
	key, err := state.privateKey(FileCAKey)
	if err != nil || key.PublicKey() != s.next.key.PublicKey() {
		t.Errorf("the CA's key: %v", err)
	}
	old, _, err := NewToken(s.old.Fingerprint(), testStatement().VTEPs, testOptions, testNow)
	if err != nil {
		t.Fatal(err)
	}
	fresh := *old
	fresh.CA = s.next.Fingerprint()
	foreign := *old
	foreign.CA = third.Fingerprint()
	for name, tt := range map[string]struct {
		token *Token
		want  error
	}{"of the former CA": {old, nil}, "of this one": {&fresh, nil}, "of another": {&foreign, ErrOtherCluster}} {
		if err := state.CheckToken(tt.token); !errors.Is(err, tt.want) {
			t.Errorf("a token %s: %v", name, err)
		}
	}
	state.Files[FileNextCA] = []byte("x")
	if _, err := state.CA(); !errors.Is(err, ErrDamaged) {
		t.Errorf("a damaged next CA: %v", err)
	}
}

func TestKeyIDText(t *testing.T) {
	id := KeyID{0xde, 0xad, 0, 1}
	b, err := id.MarshalText()
	if err != nil || string(b) != "dead0001" {
		t.Fatalf("MarshalText = %s, %v", b, err)
	}
	var got KeyID
	if err := got.UnmarshalText(b); err != nil || got != id {
		t.Errorf("UnmarshalText = %v, %v", got, err)
	}
	for _, bad := range []string{"", "dead00", "dead000100", "DEAD0001", "deadxxxx"} {
		if err := got.UnmarshalText([]byte(bad)); !errors.Is(err, ErrMalformed) {
			t.Errorf("UnmarshalText(%q) = %v", bad, err)
		}
	}
}
