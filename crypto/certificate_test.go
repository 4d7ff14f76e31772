package crypto

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"math/big"
	"net"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"
)

func TestIssueAndVerify(t *testing.T) {
	ca, roots := testCA(t, NewCluster(), 1)
	key := NewPrivateKey()
	rights := Rights{Overlays: grants(t, "blue", "team-*"), Keeper: true}
	id := identity(t, ca, roots, key, "Pi-4", rights)
	c, err := roots.Verify([][]byte{id.Certificate().DER}, testNow, nil)
	if err != nil {
		t.Fatal(err)
	}
	if c.Cluster != ca.Cluster() || c.Name != "Pi-4" || c.Key != key.PublicKey() || !c.Keeper || !slices.Equal(c.Overlays, rights.Overlays) {
		t.Errorf("certificate %+v", c)
	}
	if want := "spiffe://" + ca.Cluster() + "/node/Pi-4"; c.ID() != want {
		t.Errorf("ID() = %s, want %s", c.ID(), want)
	}
	if f := ca.Fingerprint(); c.Issuer != KeyID(f[:4]) {
		t.Errorf("issuer %x, want the first bytes of %s", c.Issuer, f)
	}
	if want := testNow.Add(Lifetime); !c.NotAfter.Equal(want) {
		t.Errorf("NotAfter %v, want %v", c.NotAfter, want)
	}
	if want := testNow.Add(20 * 24 * time.Hour); !c.RenewAt().Equal(want) {
		t.Errorf("RenewAt() = %v, want %v", c.RenewAt(), want)
	}
	if len(c.DER) > 700 {
		t.Errorf("the certificate has %d bytes", len(c.DER))
	}
	// What a verifier that knows nothing of Tulle makes of it.
	pool := x509.NewCertPool()
	root, err := x509.ParseCertificate(ca.DER())
	if err != nil {
		t.Fatal(err)
	}
	pool.AddCert(root)
	for _, use := range []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth} {
		if _, err := c.x509.Verify(x509.VerifyOptions{Roots: pool, CurrentTime: testNow, KeyUsages: []x509.ExtKeyUsage{use}}); err != nil {
			t.Errorf("crypto/x509, use %v: %v", use, err)
		}
	}
}

func TestVerifyTimes(t *testing.T) {
	ca, roots := testCA(t, "c1", 1)
	id := identity(t, ca, roots, fixedKey(2), "n1", Rights{})
	for _, tt := range []struct {
		after time.Duration
		want  error
	}{
		{-Skew - time.Second, ErrClock},
		{-24 * time.Hour, ErrClock},
		{-testNow.Sub(time.Unix(0, 0)), ErrClock}, // a board that starts in 1970
		{-Skew, nil},
		{0, nil},
		{Lifetime, nil},
		{Lifetime + Skew, nil},
		{Lifetime + Skew + time.Second, ErrExpired},
		{CALifetime + Lifetime, ErrExpired},
	} {
		_, err := roots.Verify([][]byte{id.Certificate().DER}, testNow.Add(tt.after), nil)
		if !errors.Is(err, tt.want) {
			t.Errorf("%v after it was issued: %v, want %v", tt.after, err, tt.want)
		}
		if tt.want == ErrClock && !strings.Contains(err.Error(), "set the clock") {
			t.Errorf("%v does not say what to do", err)
		}
	}
}

// TestCAEnds: no certificate outlives its CA, and an old CA issues none.
func TestCAEnds(t *testing.T) {
	ca, roots := testCA(t, "c1", 1)
	late := testNow.Add(CALifetime - 24*time.Hour)
	issued, err := ca.Issue(request(t, fixedKey(2), "n1"), Rights{}, late)
	if err != nil {
		t.Fatal(err)
	}
	c, err := roots.Verify([][]byte{issued.Certificate}, late, nil)
	if err != nil || c.NotAfter.After(ca.NotAfter()) {
		t.Errorf("certificate until %v of a CA until %v: %v", c.NotAfter, ca.NotAfter(), err)
	}
	if _, err := NewIdentity(fixedKey(2), issued, roots, late); err != nil {
		t.Error(err)
	}
	if _, err := ca.Issue(request(t, fixedKey(2), "n1"), Rights{}, testNow.Add(CALifetime+time.Hour)); !errors.Is(err, ErrExpired) {
		t.Errorf("after its end: %v, want ErrExpired", err)
	}
	if _, err := ca.Issue(request(t, fixedKey(2), "n1"), Rights{}, testNow.Add(-time.Hour)); !errors.Is(err, ErrClock) {
		t.Errorf("before its start: %v, want ErrClock", err)
	}
}

// forge is the certificate that CA.Issue makes of n1, changed by f and signed by ca.
func forge(t *testing.T, ca *CA, f func(*x509.Certificate)) []byte {
	t.Helper()
	return forgeFor(t, ca, fixedKey(2), f)
}

func forgeFor(t *testing.T, ca *CA, key *PrivateKey, f func(*x509.Certificate)) []byte {
	t.Helper()
	rights, err := marshalRights(Rights{})
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: newSerial().big(), Subject: pkix.Name{CommonName: "n1"},
		URIs:      []*url.URL{{Scheme: "spiffe", Host: ca.cluster, Path: "/node/n1"}},
		NotBefore: testNow.Add(-Skew), NotAfter: testNow.Add(Lifetime), KeyUsage: x509.KeyUsageDigitalSignature,
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		BasicConstraintsValid: true, ExtraExtensions: []pkix.Extension{{Id: rightsOID, Value: rights}},
	}
	f(template)
	der, err := x509.CreateCertificate(rand.Reader, template, ca.cert, key.Public(), ca.key)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

// TestVerifyProfile: what a CA of ours never signs is refused even if it did.
func TestVerifyProfile(t *testing.T) {
	ca, roots := testCA(t, "c1", 1)
	if _, err := roots.Verify([][]byte{forge(t, ca, func(*x509.Certificate) {})}, testNow, nil); err != nil {
		t.Fatalf("unchanged: %v", err)
	}
	uri := func(s string) func(*x509.Certificate) {
		return func(c *x509.Certificate) {
			u, err := url.Parse(s)
			if err != nil {
				t.Fatal(err)
			}
			c.URIs = []*url.URL{u}
		}
	}
	rights := func(b ...byte) func(*x509.Certificate) {
		return func(c *x509.Certificate) { c.ExtraExtensions[0].Value = b }
	}
	for name, tt := range map[string]struct {
		f    func(*x509.Certificate)
		want error
	}{
		"other cluster":      {uri("spiffe://c2/node/n1"), ErrOtherCluster},
		"other scheme":       {uri("https://c1/node/n1"), ErrName},
		"no path":            {uri("spiffe://c1"), ErrName},
		"other path":         {uri("spiffe://c1/keeper/n1"), ErrName},
		"deeper path":        {uri("spiffe://c1/node/n1/x"), ErrName},
		"dots":               {uri("spiffe://c1/node/../n1"), ErrName},
		"escaped":            {uri("spiffe://c1/node/n%31"), ErrName},
		"query":              {uri("spiffe://c1/node/n1?x"), ErrName},
		"fragment":           {uri("spiffe://c1/node/n1#x"), ErrName},
		"user":               {uri("spiffe://u@c1/node/n1"), ErrName},
		"port":               {uri("spiffe://c1:1/node/n1"), ErrName},
		"capital cluster":    {uri("spiffe://C1/node/n1"), ErrName},
		"no URI":             {func(c *x509.Certificate) { c.URIs = nil }, ErrName},
		"two URIs":           {func(c *x509.Certificate) { c.URIs = append(c.URIs, c.URIs[0]) }, ErrName},
		"a DNS name":         {func(c *x509.Certificate) { c.DNSNames = []string{"n1"} }, ErrName},
		"an address":         {func(c *x509.Certificate) { c.IPAddresses = []net.IP{{1, 2, 3, 4}} }, ErrName},
		"a CA":               {func(c *x509.Certificate) { c.IsCA = true }, ErrMalformed},
		"signs certificates": {func(c *x509.Certificate) { c.KeyUsage |= x509.KeyUsageCertSign }, ErrMalformed},
		"server only":        {func(c *x509.Certificate) { c.ExtKeyUsage = c.ExtKeyUsage[:1] }, ErrMalformed},
		"server twice":       {func(c *x509.Certificate) { c.ExtKeyUsage[1] = c.ExtKeyUsage[0] }, ErrMalformed},
		"signs code":         {func(c *x509.Certificate) { c.ExtKeyUsage[1] = x509.ExtKeyUsageCodeSigning }, ErrMalformed},
		"subject":            {func(c *x509.Certificate) { c.Subject.CommonName = "n2" }, ErrMalformed},
		"short serial":       {func(c *x509.Certificate) { c.SerialNumber = big.NewInt(7) }, ErrMalformed},
		"long serial":        {func(c *x509.Certificate) { c.SerialNumber = new(big.Int).Lsh(big.NewInt(1), 100) }, ErrMalformed},
		"no rights":          {func(c *x509.Certificate) { c.ExtraExtensions = nil }, ErrMalformed},
		"empty rights":       {rights(), ErrMalformed},
		"rights version 2":   {rights(0x30, 8, 2, 1, 2, 1, 1, 0, 0x30, 0), ErrMalformed},
		"rights not DER":     {rights(0x30, 8, 2, 1, 1, 1, 1, 1, 0x30, 0), ErrMalformed},
		"rights unsorted":    {rights(0x30, 14, 2, 1, 1, 1, 1, 0, 0x30, 6, 0x13, 1, 'b', 0x13, 1, 'a'), ErrMalformed},
		"rights bad pattern": {rights(0x30, 12, 2, 1, 1, 1, 1, 0, 0x30, 4, 0x0c, 2, '*', '*'), ErrMalformed},
		"rights other type":  {rights(0x30, 11, 2, 1, 1, 1, 1, 0, 0x30, 3, 0x0c, 1, 'a'), ErrMalformed},
		"rights and more":    {rights(0x30, 8, 2, 1, 1, 1, 1, 0, 0x30, 0, 0), ErrMalformed},
		"a critical extension": {func(c *x509.Certificate) {
			c.ExtraExtensions = append(c.ExtraExtensions, pkix.Extension{Id: asn1.ObjectIdentifier{2, 25, 1}, Critical: true, Value: []byte{5, 0}})
		}, ErrMalformed},
	} {
		if _, err := roots.Verify([][]byte{forge(t, ca, tt.f)}, testNow, nil); !errors.Is(err, tt.want) {
			t.Errorf("%s: %v, want %v", name, err, tt.want)
		}
	}
}

// TestVerifyAttackers: certificates that no CA of this cluster made.
func TestVerifyAttackers(t *testing.T) {
	ca, roots := testCA(t, "c1", 1)
	other, otherRoots := testCA(t, "c2", 3)
	impostor, _ := testCA(t, "c1", 4) // another CA that claims the same cluster
	node := identity(t, ca, roots, fixedKey(2), "n1", Rights{Overlays: grants(t, "*"), Keeper: true})
	issue := func(ca *CA) []byte {
		issued, err := ca.Issue(request(t, fixedKey(5), "n1"), Rights{}, testNow)
		if err != nil {
			t.Fatal(err)
		}
		return issued.Certificate
	}
	self, _ := testCA(t, "c1", 6)
	selfSigned := forgeFor(t, self, fixedKey(6), func(*x509.Certificate) {})
	// A member as a CA: it signs a certificate with its own key.
	member := forgeFor(t, &CA{cluster: "c1", cert: node.Certificate().x509, key: fixedKey(2)}, fixedKey(7), func(c *x509.Certificate) {
		c.Subject.CommonName = "n9"
		c.URIs[0].Path = "/node/n9"
	})
	ec, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	otherKind, err := x509.CreateCertificate(rand.Reader, node.Certificate().x509, ca.cert, ec.Public(), ca.key)
	if err != nil {
		t.Fatal(err)
	}
	for name, tt := range map[string]struct {
		chain [][]byte
		want  error
	}{
		"nothing":                   {nil, ErrMalformed},
		"too long":                  {slices.Repeat([][]byte{node.cert.DER}, maxChain+1), ErrMalformed},
		"too large":                 {[][]byte{make([]byte, maxCertificate+1)}, ErrMalformed},
		"self-signed":               {[][]byte{selfSigned}, ErrSelfSigned},
		"the CA itself":             {[][]byte{ca.DER()}, ErrSelfSigned},
		"other cluster":             {[][]byte{issue(other), other.DER()}, ErrOtherCluster},
		"impostor":                  {[][]byte{issue(impostor), impostor.DER()}, ErrForged},
		"impostor with our CA":      {[][]byte{issue(impostor), ca.DER()}, ErrForged},
		"signed by a member":        {[][]byte{member, node.cert.DER, ca.DER()}, ErrForged},
		"another kind of key":       {[][]byte{otherKind}, ErrMalformed},
		"valid, with a wrong chain": {[][]byte{node.cert.DER, other.DER(), {1}}, nil},
	} {
		if _, err := roots.Verify(tt.chain, testNow, nil); !errors.Is(err, tt.want) {
			t.Errorf("%s: %v, want %v", name, err, tt.want)
		}
	}
	if _, err := otherRoots.Verify([][]byte{node.cert.DER}, testNow, nil); !errors.Is(err, ErrOtherCluster) {
		t.Errorf("our node elsewhere: %v, want ErrOtherCluster", err)
	}
}

func TestVerifyFlipsAndTruncation(t *testing.T) {
	ca, roots := testCA(t, "c1", 1)
	der := identity(t, ca, roots, fixedKey(2), "n1", Rights{Overlays: grants(t, "blue")}).cert.DER
	flips(der, func(bit int, b []byte) {
		if c, err := roots.Verify([][]byte{b}, testNow, nil); err == nil {
			t.Errorf("bit %d changed: %+v is verified", bit, c)
		}
	})
	for n := range der {
		if _, err := roots.Verify([][]byte{der[:n]}, testNow, nil); err == nil {
			t.Errorf("%d of %d bytes are verified", n, len(der))
		}
	}
	if _, err := roots.Verify([][]byte{append(slices.Clone(der), 0)}, testNow, nil); err == nil {
		t.Error("one byte more is verified")
	}
}

// TestRootChange: while the CA changes, nodes of both are verified.
func TestRootChange(t *testing.T) {
	oldCA, oldRoots := testCA(t, "c1", 1)
	newCA, newRoots := testCA(t, "c1", 2)
	both, err := NewRoots(newCA.DER(), oldCA.DER())
	if err != nil {
		t.Fatal(err)
	}
	a := identity(t, oldCA, oldRoots, fixedKey(3), "a", Rights{Overlays: grants(t, "blue")})
	issued, err := newCA.Reissue(a.Certificate(), request(t, fixedKey(3), "a"), testNow)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := oldRoots.Verify([][]byte{issued.Certificate}, testNow, nil); !errors.Is(err, ErrForged) {
		t.Errorf("of the new CA, by the old: %v, want ErrForged", err)
	}
	for _, der := range [][]byte{a.cert.DER, issued.Certificate} {
		if _, err := both.Verify([][]byte{der}, testNow, nil); err != nil {
			t.Error(err)
		}
	}
	for _, id := range []*Identity{a, identity(t, newCA, newRoots, fixedKey(4), "b", Rights{})} {
		b, err := id.Passport(testStatement())
		if err != nil {
			t.Fatal(err)
		}
		p, err := ParsePassport(b)
		if err != nil {
			t.Fatal(err)
		}
		if err := p.Verify(both, testNow, nil); err != nil {
			t.Error(err)
		}
	}
	other, _ := testCA(t, "c2", 5)
	if _, err := NewRoots(oldCA.DER(), other.DER()); !errors.Is(err, ErrOtherCluster) {
		t.Errorf("roots of two clusters: %v, want ErrOtherCluster", err)
	}
	if _, err := NewRoots(); err == nil {
		t.Error("no roots are roots")
	}
	if _, err := NewRoots(a.cert.DER); err == nil {
		t.Error("a node's certificate is a root")
	}
	flips(oldCA.DER(), func(bit int, b []byte) {
		if _, err := NewRoots(b); err == nil {
			t.Errorf("root with bit %d changed is read", bit)
		}
	})
	if _, err := LoadCA(oldCA.DER(), fixedKey(9)); !errors.Is(err, ErrOtherKey) {
		t.Errorf("CA with another key: %v, want ErrOtherKey", err)
	}
}

// TestReissue: name, key and rights stay, whatever is asked for.
func TestReissue(t *testing.T) {
	ca, roots := testCA(t, "c1", 1)
	key := fixedKey(2)
	old := identity(t, ca, roots, key, "n1", Rights{Overlays: grants(t, "blue")}).Certificate()
	later := old.RenewAt()
	issued, err := ca.Reissue(old, request(t, key, "n1"), later)
	if err != nil {
		t.Fatal(err)
	}
	id, err := NewIdentity(key, issued, roots, later)
	if err != nil {
		t.Fatal(err)
	}
	c := id.Certificate()
	if !slices.Equal(c.Overlays, old.Overlays) || c.Keeper || c.Name != "n1" || c.Serial == old.Serial || !c.NotAfter.Equal(later.Add(Lifetime)) {
		t.Errorf("renewed %+v from %+v", c, old)
	}
	other, otherRoots := testCA(t, "c2", 3)
	foreign := identity(t, other, otherRoots, key, "n1", Rights{}).Certificate()
	for name, tt := range map[string]struct {
		old  *Certificate
		csr  []byte
		want error
	}{
		"another name":  {old, request(t, key, "n2"), ErrName},
		"another key":   {old, request(t, fixedKey(4), "n1"), ErrOtherKey},
		"other cluster": {foreign, request(t, key, "n1"), ErrOtherCluster},
		"no request":    {old, nil, ErrMalformed},
	} {
		if _, err := ca.Reissue(tt.old, tt.csr, later); !errors.Is(err, tt.want) {
			t.Errorf("%s: %v, want %v", name, err, tt.want)
		}
	}
}

// TestRequestAsksMore: a request that asks for anything but a name is refused.
func TestRequestAsksMore(t *testing.T) {
	ca, _ := testCA(t, "c1", 1)
	rights, err := marshalRights(Rights{Overlays: grants(t, "*"), Keeper: true})
	if err != nil {
		t.Fatal(err)
	}
	n1 := pkix.Name{CommonName: "n1"}
	for name, template := range map[string]*x509.CertificateRequest{
		"rights":         {Subject: n1, ExtraExtensions: []pkix.Extension{{Id: rightsOID, Value: rights}}},
		"a CA":           {Subject: n1, ExtraExtensions: []pkix.Extension{{Id: asn1.ObjectIdentifier{2, 5, 29, 19}, Value: []byte{0x30, 3, 1, 1, 0xff}}}},
		"another URI":    {Subject: n1, URIs: []*url.URL{{Scheme: "spiffe", Host: "c1", Path: "/node/keeper"}}},
		"a DNS name":     {Subject: n1, DNSNames: []string{"n1"}},
		"organisation":   {Subject: pkix.Name{CommonName: "n1", Organization: []string{"keepers"}}},
		"another CN too": {Subject: pkix.Name{ExtraNames: []pkix.AttributeTypeAndValue{{Type: asn1.ObjectIdentifier{2, 5, 4, 3}, Value: "n2"}, {Type: asn1.ObjectIdentifier{2, 5, 4, 3}, Value: "n1"}}}},
	} {
		der, err := x509.CreateCertificateRequest(rand.Reader, template, fixedKey(2))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := ca.Issue(der, Rights{}, testNow); !errors.Is(err, ErrAsksMore) {
			t.Errorf("%s: %v, want ErrAsksMore", name, err)
		}
	}
	for name, subject := range map[string]pkix.Name{"no name": {}, "a path": {CommonName: "../n1"}, "star": {CommonName: "*"}} {
		der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{Subject: subject}, fixedKey(2))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := ca.Issue(der, Rights{}, testNow); !errors.Is(err, ErrName) {
			t.Errorf("%s: %v, want ErrName", name, err)
		}
	}
	ec, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{Subject: n1}, ec)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := ca.Issue(der, Rights{}, testNow); !errors.Is(err, ErrMalformed) {
		t.Errorf("ECDSA: %v, want ErrMalformed", err)
	}
	der = request(t, fixedKey(2), "n1")
	flips(der, func(bit int, b []byte) {
		if r, err := ParseRequest(b); err == nil {
			t.Errorf("request with bit %d changed: %v is read", bit, r)
		}
	})
	for n := range der {
		if _, err := ParseRequest(der[:n]); err == nil {
			t.Errorf("%d of %d bytes of a request are read", n, len(der))
		}
	}
	if _, err := ParseRequest(make([]byte, maxRequest+1)); !errors.Is(err, ErrMalformed) {
		t.Errorf("a large request: %v, want ErrMalformed", err)
	}
}

func TestRightsBounds(t *testing.T) {
	ca, roots := testCA(t, "c1", 1)
	var most Grants
	for i := range maxGrants {
		most = append(most, strings.Repeat(string(rune('A'+i/26))+string(rune('A'+i%26)), 31)+"*")
	}
	c := identity(t, ca, roots, fixedKey(2), strings.Repeat("n", maxName), Rights{Overlays: most}).Certificate()
	if len(c.DER) > maxCertificate/2 || !slices.Equal(c.Overlays, most) {
		t.Errorf("the largest certificate has %d bytes, which is near %d", len(c.DER), maxCertificate)
	}
	for name, bad := range map[string]Grants{"unsorted": {"b", "a"}, "twice": {"a", "a"}, "no pattern": {"a**"}, "too many": append(slices.Clone(most), "z")} {
		if _, err := ca.Issue(request(t, fixedKey(2), "n1"), Rights{Overlays: bad}, testNow); err == nil {
			t.Errorf("%s: grants %v are issued", name, bad)
		}
	}
}

func TestVerifyKeeper(t *testing.T) {
	ca, roots := testCA(t, "c1", 1)
	keeper := identity(t, ca, roots, fixedKey(2), "k1", Rights{Keeper: true})
	chain := keeper.TLSWithRoots().Certificate
	c, got, err := VerifyKeeper(chain, ca.Fingerprint(), testNow)
	if err != nil || c.Name != "k1" || got.Cluster() != "c1" {
		t.Fatalf("VerifyKeeper: %v, %v", c, err)
	}
	member := identity(t, ca, roots, fixedKey(3), "n1", Rights{Overlays: grants(t, "*")})
	other, otherRoots := testCA(t, "c1", 4)
	foreign := identity(t, other, otherRoots, fixedKey(5), "k1", Rights{Keeper: true})
	for name, tt := range map[string]struct {
		chain [][]byte
		now   time.Time
		want  error
	}{
		"a member":                  {member.TLSWithRoots().Certificate, testNow, ErrNotKeeper},
		"no CA":                     {keeper.TLS().Certificate, testNow, ErrOtherCluster},
		"another CA":                {foreign.TLSWithRoots().Certificate, testNow, ErrOtherCluster},
		"another's node, our CA":    {[][]byte{foreign.cert.DER, ca.DER()}, testNow, ErrForged},
		"the CA as the node":        {[][]byte{ca.DER(), ca.DER()}, testNow, ErrSelfSigned},
		"nothing":                   {nil, testNow, ErrMalformed},
		"a clock that is behind":    {chain, testNow.Add(-time.Hour), ErrClock},
		"a clock that is ahead":     {chain, testNow.Add(2 * Lifetime), ErrExpired},
		"damaged CA, then the same": {[][]byte{chain[0], {1}, chain[1]}, testNow, nil},
	} {
		if _, _, err := VerifyKeeper(tt.chain, ca.Fingerprint(), tt.now); !errors.Is(err, tt.want) {
			t.Errorf("%s: %v, want %v", name, err, tt.want)
		}
	}
}

func TestNewIdentityWantsAPair(t *testing.T) {
	ca, roots := testCA(t, "c1", 1)
	issue := func(key *PrivateKey, name string, r Rights) *Issued {
		issued, err := ca.Issue(request(t, key, name), r, testNow)
		if err != nil {
			t.Fatal(err)
		}
		return issued
	}
	a, b := issue(fixedKey(2), "a", Rights{}), issue(fixedKey(3), "b", Rights{})
	again := issue(fixedKey(2), "a", Rights{})
	other, _ := testCA(t, "c2", 4)
	foreign, err := other.Issue(request(t, fixedKey(2), "a"), Rights{}, testNow)
	if err != nil {
		t.Fatal(err)
	}
	for name, tt := range map[string]struct {
		key    *PrivateKey
		issued *Issued
		want   error
	}{
		"another key":           {fixedKey(9), a, ErrOtherKey},
		"another's card":        {fixedKey(2), &Issued{a.Certificate, b.Card}, ErrOtherKey},
		"card of another time":  {fixedKey(2), &Issued{a.Certificate, again.Card}, ErrMalformed},
		"card and more":         {fixedKey(2), &Issued{a.Certificate, append(slices.Clone(a.Card), 0)}, ErrMalformed},
		"no card":               {fixedKey(2), &Issued{a.Certificate, nil}, ErrMalformed},
		"card of other cluster": {fixedKey(2), &Issued{a.Certificate, foreign.Card}, ErrOtherCluster},
		"other cluster":         {fixedKey(2), foreign, ErrOtherCluster},
	} {
		if _, err := NewIdentity(tt.key, tt.issued, roots, testNow); !errors.Is(err, tt.want) {
			t.Errorf("%s: %v, want %v", name, err, tt.want)
		}
	}
}

// TestTLS: both ends of a TLS 1.3 connection verify each other, and a token's
// proof made at one end holds at the other.
func TestTLS(t *testing.T) {
	ca, roots := testCA(t, "c1", 1)
	server := identity(t, ca, roots, fixedKey(2), "k1", Rights{Keeper: true})
	client := identity(t, ca, roots, fixedKey(3), "n1", Rights{})
	verify := func(want string) func(tls.ConnectionState) error {
		return func(cs tls.ConnectionState) error {
			var chain [][]byte
			for _, c := range cs.PeerCertificates {
				chain = append(chain, c.Raw)
			}
			c, err := roots.Verify(chain, testNow, nil)
			if err == nil && c.Name != want {
				t.Errorf("peer is %s, want %s", c.Name, want)
			}
			return err
		}
	}
	a, b := net.Pipe()
	cs := tls.Client(a, &tls.Config{MinVersion: tls.VersionTLS13, InsecureSkipVerify: true, Certificates: []tls.Certificate{client.TLS()}, VerifyConnection: verify("k1")})
	ss := tls.Server(b, &tls.Config{MinVersion: tls.VersionTLS13, ClientAuth: tls.RequireAnyClientCert, Certificates: []tls.Certificate{server.TLSWithRoots()}, VerifyConnection: verify("n1"), SessionTicketsDisabled: true})
	done := make(chan error, 1)
	go func() { done <- ss.Handshake() }()
	if err := errors.Join(cs.Handshake(), <-done); err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	defer b.Close()
	exporter := func(c *tls.Conn) []byte {
		state := c.ConnectionState()
		b, err := state.ExportKeyingMaterial(TokenExporterLabel, nil, MinExporter)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	token, record := newToken(t, TokenOptions{TTL: time.Hour, Uses: 1, Name: "*"})
	if err := record.Verify(token.Prove(exporter(cs), RoleJoin), exporter(ss), RoleJoin); err != nil {
		t.Error(err)
	}
}

func FuzzVerify(f *testing.F) {
	_, roots := testCA(f, "c1", 0x77) // it signed nothing
	ca, others := testCA(f, "c1", 1)
	f.Add(identity(f, ca, others, fixedKey(2), "n1", Rights{Overlays: grants(f, "blue", "team-*")}).Certificate().DER)
	f.Add(ca.DER())
	f.Fuzz(func(t *testing.T, der []byte) {
		if c, err := roots.Verify([][]byte{der}, testNow, nil); err == nil {
			t.Errorf("%x is verified as %v", der, c.ID())
		}
		_, _, _ = VerifyKeeper([][]byte{der, der}, roots.Fingerprints()[0], testNow)
		// What stands behind the signature.
		if x, err := x509.ParseCertificate(der); err == nil {
			_, _ = certificateOf(x)
		}
		_, _ = parseRights(der)
	})
}

func FuzzParseRequest(f *testing.F) {
	f.Add(request(f, fixedKey(2), "n1"))
	f.Fuzz(func(t *testing.T, der []byte) {
		r, err := ParseRequest(der)
		if err != nil {
			return
		}
		if CheckName(r.Name) != nil || r.Key == (PublicKey{}) {
			t.Errorf("ParseRequest(%x) = %v", der, r)
		}
	})
}
