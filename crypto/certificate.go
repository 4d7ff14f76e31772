package crypto

import (
	"bytes"
	"crypto/ed25519"
	"crypto/x509"
	"encoding/asn1"
	"encoding/hex"
	"fmt"
	"slices"
	"strings"
	"time"
)

// MaxRoots is how many CA certificates and vouchers a cluster may have at a time.
const MaxRoots = 8

const (
	nodePath = "/node/"

	maxChain       = 4
	maxCertificate = 8 << 10
	rightsVersion  = 1
)

// rightsOID names the extension that carries Rights. 2.25 is the arc of UUIDs
// (X.667); "tull" is the number. crypto/x509 reads arcs of up to 31 bits only.
//
// The extension is not critical: whoever cannot read it learns a node's name,
// which is all that a foreign verifier of SPIFFE identities asks for, and gets
// no right from it. Here it is required, and of this version, as if it were.
//
//	TulleRights ::= SEQUENCE {
//	    version   INTEGER (1),
//	    keeper    BOOLEAN,
//	    overlays  SEQUENCE SIZE (0..32) OF UTF8String }  -- sorted, each once; PrintableString where there is no *
var rightsOID = asn1.ObjectIdentifier{2, 25, 1953852524, 1}

type rightsDER struct {
	Version  int
	Keeper   bool
	Overlays []string
}

// marshalRights returns the extension's one encoding.
func marshalRights(r Rights) ([]byte, error) {
	if err := r.Overlays.check(); err != nil {
		return nil, err
	}
	overlays := []string(r.Overlays)
	if overlays == nil {
		overlays = []string{}
	}
	der, err := asn1.Marshal(rightsDER{rightsVersion, r.Keeper, overlays})
	if err != nil {
		return nil, fmt.Errorf("crypto: encode rights: %w", err)
	}
	return der, nil
}

func parseRights(der []byte) (Rights, error) {
	var version struct {
		Version int
		Rest    []asn1.RawValue `asn1:"optional"`
	}
	var d rightsDER
	rest, err := asn1.Unmarshal(der, &d)
	if err != nil || len(rest) != 0 || d.Version != rightsVersion {
		if _, e := asn1.Unmarshal(der, &version); e == nil && version.Version != rightsVersion {
			return Rights{}, fmt.Errorf("%w: rights of version %d, and this release knows %d", ErrMalformed, version.Version, rightsVersion)
		}
		return Rights{}, fmt.Errorf("%w: rights", ErrMalformed)
	}
	r := Rights{Overlays: d.Overlays, Keeper: d.Keeper}
	again, err := marshalRights(r)
	if err != nil || !bytes.Equal(again, der) {
		return Rights{}, fmt.Errorf("%w: rights are not in their one encoding", ErrMalformed)
	}
	return r, nil
}

// Certificate is a node's certificate, read and of the profile that CA.Issue
// writes. It is never changed once made.
type Certificate struct {
	// Cluster and Name are those of spiffe://CLUSTER/node/NAME.
	Cluster, Name string
	Key           PublicKey
	Serial        Serial
	Rights
	NotBefore, NotAfter time.Time
	// Issuer names the key that signed it.
	Issuer KeyID
	// DER is the certificate itself.
	DER []byte

	x509 *x509.Certificate
	// voucher made a root of the CA that signed it, where Roots has it not; nil: Roots has.
	voucher []byte
}

// Chain returns what Roots.Verify needs to believe the certificate again.
func (c *Certificate) Chain() [][]byte {
	if c.voucher == nil {
		return [][]byte{c.DER}
	}
	return [][]byte{c.DER, c.voucher}
}

// RenewAt returns when to ask a keeper for the next one: at two thirds.
func (c *Certificate) RenewAt() time.Time {
	issued := c.NotBefore.Add(Skew)
	return issued.Add(c.NotAfter.Sub(issued) * 2 / 3)
}

// ID returns spiffe://CLUSTER/node/NAME.
func (c *Certificate) ID() string { return "spiffe://" + c.Cluster + nodePath + c.Name }

// certificateOf reads a node's certificate. It verifies no signature and no
// time; Roots.Verify does.
func certificateOf(x *x509.Certificate) (*Certificate, error) {
	cluster, path, err := spiffeOf(x)
	if err != nil {
		return nil, err
	}
	name, ok := strings.CutPrefix(path, nodePath)
	if !ok || CheckName(name) != nil {
		return nil, fmt.Errorf("crypto: certificate: %w: its URI ends in %.80q, not in /node/ and a name", ErrName, path)
	}
	fault := func(what string) (*Certificate, error) {
		return nil, fmt.Errorf("crypto: certificate of %q: %w: %s", name, ErrMalformed, what)
	}
	switch {
	case x.PublicKeyAlgorithm != x509.Ed25519 || x.SignatureAlgorithm != x509.PureEd25519:
		return fault("not Ed25519")
	case !x.BasicConstraintsValid || x.IsCA || x.KeyUsage != x509.KeyUsageDigitalSignature:
		return fault("its key may do more than prove an identity")
	case len(x.ExtKeyUsage) != 2 || len(x.UnknownExtKeyUsage) != 0 ||
		!slices.Contains(x.ExtKeyUsage, x509.ExtKeyUsageServerAuth) || !slices.Contains(x.ExtKeyUsage, x509.ExtKeyUsageClientAuth):
		return fault("it is not for both ends of a connection")
	case x.Subject.CommonName != name:
		return fault("subject and URI name two nodes")
	case !x.SerialNumber.IsUint64() || x.SerialNumber.Uint64()>>62 != 1:
		return fault("serial number")
	case len(x.UnhandledCriticalExtensions) != 0:
		return fault("a critical extension that this release does not know")
	}
	var rights []byte
	for _, e := range x.Extensions { // x509 refuses an extension that comes twice
		if e.Id.Equal(rightsOID) {
			rights = e.Value
		}
	}
	r, err := parseRights(rights)
	if err != nil {
		return nil, fmt.Errorf("crypto: certificate of %q: %w", name, err)
	}
	return &Certificate{
		Cluster: cluster, Name: name, Key: publicKeyOf(x), Serial: Serial(x.SerialNumber.Uint64()), Rights: r,
		NotBefore: x.NotBefore, NotAfter: x.NotAfter, DER: x.Raw, x509: x,
	}, nil
}

// spiffeOf returns trust domain and path of the one URI that x has; it may have
// no other name.
func spiffeOf(x *x509.Certificate) (cluster, path string, err error) {
	if len(x.URIs) != 1 || len(x.DNSNames)+len(x.IPAddresses)+len(x.EmailAddresses) != 0 {
		return "", "", fmt.Errorf("crypto: certificate: %w: want one URI as its only name", ErrName)
	}
	u := x.URIs[0]
	if u.Scheme != "spiffe" || checkCluster(u.Host) != nil || u.String() != "spiffe://"+u.Host+u.Path {
		return "", "", fmt.Errorf("crypto: certificate: %w: its URI %.120q is no SPIFFE ID", ErrName, u)
	}
	return u.Host, u.Path, nil
}

// publicKeyOf returns the Ed25519 key of a certificate or request that has one.
func publicKeyOf[T *x509.Certificate | *x509.CertificateRequest](t T) PublicKey {
	var key any
	switch x := any(t).(type) {
	case *x509.Certificate:
		key = x.PublicKey
	case *x509.CertificateRequest:
		key = x.PublicKey
	}
	if k, ok := key.(ed25519.PublicKey); ok && len(k) == ed25519.PublicKeySize {
		return PublicKey(k)
	}
	return PublicKey{}
}

// KeyID is the first four bytes of a CA's Fingerprint: which of the roots to
// try, never a proof.
type KeyID [4]byte

// String returns 8 hexadecimal digits.
func (i KeyID) String() string { return hex.EncodeToString(i[:]) }

// MarshalText returns String.
func (i KeyID) MarshalText() ([]byte, error) { return []byte(i.String()), nil }

// UnmarshalText reads what MarshalText made.
func (i *KeyID) UnmarshalText(b []byte) error {
	id, err := hex.DecodeString(string(b))
	if err != nil || len(id) != len(i) || string(b) != strings.ToLower(string(b)) {
		return fmt.Errorf("crypto: %w: key id %.40q: want 8 hexadecimal digits", ErrMalformed, b)
	}
	*i = KeyID(id)
	return nil
}

func keyIDOf(x *x509.Certificate) KeyID {
	f := fingerprintOf(x)
	return KeyID(f[:4])
}

// Roots are a cluster's CA certificates: one, or several while its CA changes;
// and then the vouchers by which a CA tells of its successor (CA.Vouch). They are
// never changed once made.
type Roots struct {
	cluster  string
	certs    []*x509.Certificate
	vouchers []*x509.Certificate
}

// NewRoots reads CA certificates, DER, borrowed; all are of one cluster. The
// first is the one that issues. What is not signed by itself is a voucher: of one
// of the others, for one of the others.
func NewRoots(ders ...[]byte) (*Roots, error) {
	if len(ders) == 0 || len(ders) > MaxRoots {
		return nil, fmt.Errorf("crypto: %d CA certificates: want 1 to %d", len(ders), MaxRoots)
	}
	r := &Roots{}
	for _, der := range ders {
		cert, cluster, err := parseCA(der)
		if err != nil {
			return nil, err
		}
		if r.cluster != "" && r.cluster != cluster {
			return nil, fmt.Errorf("crypto: CA certificates of two clusters, %s and %s: %w", r.cluster, cluster, ErrOtherCluster)
		}
		r.cluster = cluster
		if signed(cert, cert) {
			r.certs = append(r.certs, cert)
		} else {
			r.vouchers = append(r.vouchers, cert)
		}
	}
	for _, v := range r.vouchers {
		if r.signer(v) == nil || len(r.byID(keyIDOf(v))) == 0 {
			return nil, fmt.Errorf("crypto: CA certificate of cluster %s: %w", r.cluster, ErrForged)
		}
	}
	if len(r.certs) == 0 {
		return nil, fmt.Errorf("crypto: CA certificates of cluster %s: %w: none has signed itself", r.cluster, ErrMalformed)
	}
	return r, nil
}

// parseRoot reads a CA's certificate and verifies its own signature.
func parseRoot(der []byte) (*x509.Certificate, string, error) {
	cert, cluster, err := parseCA(der)
	if err == nil && !signed(cert, cert) {
		return nil, "", fmt.Errorf("crypto: CA certificate of cluster %s: %w", cluster, ErrForged)
	}
	return cert, cluster, err
}

// parseCA reads a CA's certificate or voucher; whose signature is on it the
// caller looks at.
func parseCA(der []byte) (*x509.Certificate, string, error) {
	if len(der) > maxCertificate {
		return nil, "", fmt.Errorf("crypto: CA certificate: %w: %d bytes are more than %d", ErrMalformed, len(der), maxCertificate)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, "", fmt.Errorf("crypto: CA certificate: %w: %w", ErrMalformed, err)
	}
	cluster, path, err := spiffeOf(cert)
	if err != nil {
		return nil, "", err
	}
	if path != "" || !cert.BasicConstraintsValid || !cert.IsCA || cert.PublicKeyAlgorithm != x509.Ed25519 ||
		cert.KeyUsage&x509.KeyUsageCertSign == 0 || len(cert.UnhandledCriticalExtensions) != 0 {
		return nil, "", fmt.Errorf("crypto: CA certificate of cluster %s: %w: not a CA of tulle", cluster, ErrMalformed)
	}
	return cert, cluster, nil
}

// Cluster returns the id of the cluster.
func (r *Roots) Cluster() string { return r.cluster }

// DER returns the certificates, then the vouchers, borrowed: what NewRoots takes.
func (r *Roots) DER() [][]byte {
	var ders [][]byte
	for _, c := range slices.Concat(r.certs, r.vouchers) {
		ders = append(ders, c.Raw)
	}
	return ders
}

// Len returns how many CAs are believed.
func (r *Roots) Len() int { return len(r.certs) }

// Signer names the CA that issues.
func (r *Roots) Signer() Fingerprint { return fingerprintOf(r.certs[0]) }

// Equal reports whether o has the same certificates in the same order.
func (r *Roots) Equal(o *Roots) bool {
	return slices.EqualFunc(r.DER(), o.DER(), bytes.Equal)
}

// Has reports whether a CA of that key id is believed.
func (r *Roots) Has(id KeyID) bool { return len(r.byID(id)) > 0 }

// Times returns when the certificate of a CA that is believed begins and ends.
func (r *Roots) Times(f Fingerprint) (notBefore, notAfter time.Time) {
	for _, c := range r.certs {
		if fingerprintOf(c) == f {
			return c.NotBefore, c.NotAfter
		}
	}
	return time.Time{}, time.Time{}
}

// Introduce returns the roots of a cluster whose CA by issues, and next is to: who
// knows only by believes next through the voucher.
func Introduce(by, next *CA, now time.Time) (*Roots, error) {
	voucher, err := by.Vouch(next, now)
	if err != nil {
		return nil, err
	}
	return NewRoots(by.DER(), next.DER(), voucher)
}

// Promoted returns the roots with the CA of that fingerprint as the one that issues.
func (r *Roots) Promoted(f Fingerprint) (*Roots, error) {
	ders := slices.DeleteFunc(slices.Clone(r.certs), func(c *x509.Certificate) bool { return fingerprintOf(c) != f })
	if len(ders) == 0 {
		return nil, fmt.Errorf("crypto: CA %s is %w", f, ErrOtherCluster)
	}
	for _, c := range r.certs {
		if fingerprintOf(c) != f {
			ders = append(ders, c)
		}
	}
	return &Roots{r.cluster, ders, r.vouchers}, nil
}

// Only returns the roots without all CAs but the one that issues.
func (r *Roots) Only() *Roots { return &Roots{r.cluster, r.certs[:1:1], nil} }

// Fingerprints returns those of the certificates, in order.
func (r *Roots) Fingerprints() []Fingerprint {
	var out []Fingerprint
	for _, c := range r.certs {
		out = append(out, fingerprintOf(c))
	}
	return out
}

// Verify returns the identity that a chain shows: DER, borrowed, the node's
// certificate first, as tls.ConnectionState.PeerCertificates has it. The node's
// certificate is signed by one of r, or by a CA for which the chain has the
// voucher of one of r (what else is in the chain is ignored), its time is now
// within Skew, and it is not revoked (revoked may be nil). That the peer has its
// key is TLS's to prove.
//
// Errors wrap ErrMalformed, ErrName, ErrSelfSigned, ErrOtherCluster, ErrForged,
// ErrClock, ErrExpired or ErrRevoked.
func (r *Roots) Verify(chain [][]byte, now time.Time, revoked *Revocations) (*Certificate, error) {
	if len(chain) == 0 || len(chain) > maxChain {
		return nil, fmt.Errorf("crypto: %w: a chain of %d certificates", ErrMalformed, len(chain))
	}
	if len(chain[0]) > maxCertificate {
		return nil, fmt.Errorf("crypto: certificate: %w: %d bytes are more than %d", ErrMalformed, len(chain[0]), maxCertificate)
	}
	x, err := x509.ParseCertificate(chain[0])
	if err != nil {
		return nil, fmt.Errorf("crypto: certificate: %w: %w", ErrMalformed, err)
	}
	if signed(x, x) {
		return nil, fmt.Errorf("crypto: certificate of %.70q: %w: no CA knows that node; join with a token", x.Subject.CommonName, ErrSelfSigned)
	}
	c, err := certificateOf(x)
	if err != nil {
		return nil, err
	}
	if c.Cluster != r.cluster {
		return nil, fmt.Errorf("crypto: certificate of %q: %w: %s, and this is %s", c.Name, ErrOtherCluster, c.Cluster, r.cluster)
	}
	root := r.signer(x)
	if root == nil {
		if root = r.vouched(x, chain[1:], now); root == nil {
			return nil, fmt.Errorf("crypto: certificate of %q: %w: no CA of this cluster made it", c.Name, ErrForged)
		}
		c.voucher = root.Raw
	}
	c.Issuer = keyIDOf(root)
	if err := checkTimes("certificate of "+c.Name, c.NotBefore, c.NotAfter, now); err != nil {
		return nil, err
	}
	if err := checkTimes("CA of cluster "+r.cluster, root.NotBefore, root.NotAfter, now); err != nil {
		return nil, err
	}
	if err := revoked.Check(c.Name, c.Key, c.Serial); err != nil {
		return nil, err
	}
	return c, nil
}

// signer returns the root that signed x, or nil.
func (r *Roots) signer(x *x509.Certificate) *x509.Certificate {
	for _, root := range r.certs {
		if signed(x, root) {
			return root
		}
	}
	return nil
}

// vouched returns the voucher among chain, by one of r, for the CA that signed x;
// nil: there is none that is valid now.
func (r *Roots) vouched(x *x509.Certificate, chain [][]byte, now time.Time) *x509.Certificate {
	for _, der := range chain {
		v, cluster, err := parseCA(der)
		if err != nil || cluster != r.cluster || signed(v, v) || !signed(x, v) {
			continue
		}
		by := r.signer(v)
		if by != nil && checkTimes("CA", by.NotBefore, by.NotAfter, now) == nil && checkTimes("voucher", v.NotBefore, v.NotAfter, now) == nil {
			return v
		}
	}
	return nil
}

// signed reports whether by's key signed x, whether or not by may.
func signed(x, by *x509.Certificate) bool {
	return x.SignatureAlgorithm == x509.PureEd25519 && by.PublicKeyAlgorithm == x509.Ed25519 &&
		publicKeyOf(by).verify(x.RawTBSCertificate, x.Signature)
}

// byID returns the roots with the id.
func (r *Roots) byID(id KeyID) []*x509.Certificate {
	var out []*x509.Certificate
	for _, root := range r.certs {
		if keyIDOf(root) == id {
			out = append(out, root)
		}
	}
	return out
}

// checkTimes tolerates Skew at the end; at the start what is issued is
// backdated by it.
func checkTimes(what string, notBefore, notAfter, now time.Time) error {
	if now.Before(notBefore) {
		return fmt.Errorf("crypto: %s: %w: it is valid from %s and here it is %s; set the clock of this machine or of the keeper to within %v",
			what, ErrClock, stamp(notBefore), stamp(now), Skew)
	}
	if now.After(notAfter.Add(Skew)) {
		return fmt.Errorf("crypto: %s: %w at %s, and here it is %s: set the clock if that is wrong, else join again with a token",
			what, ErrExpired, stamp(notAfter), stamp(now))
	}
	return nil
}

// VerifyKeeper is for a node that joins: it has no roots, only the fingerprint
// in its token. The chain has to carry the CA's certificate behind the keeper's.
// It returns the keeper and the one root. Errors are those of Roots.Verify,
// ErrOtherCluster if the CA is not in the chain, and ErrNotKeeper.
func VerifyKeeper(chain [][]byte, want Fingerprint, now time.Time) (*Certificate, *Roots, error) {
	if len(chain) == 0 || len(chain) > maxChain {
		return nil, nil, fmt.Errorf("crypto: %w: a chain of %d certificates", ErrMalformed, len(chain))
	}
	for _, der := range chain[1:] {
		cert, _, err := parseRoot(der)
		if err != nil || fingerprintOf(cert) != want {
			continue
		}
		roots, err := NewRoots(der)
		if err != nil {
			return nil, nil, err
		}
		keeper, err := roots.Verify(chain, now, nil)
		if err != nil {
			return nil, nil, err
		}
		if !keeper.Keeper {
			return nil, nil, fmt.Errorf("crypto: %q: %w: it may not let nodes into cluster %s", keeper.Name, ErrNotKeeper, roots.cluster)
		}
		return keeper, roots, nil
	}
	return nil, nil, fmt.Errorf("crypto: whoever answers is %w than the token's, or the cluster's CA was replaced since: check the token and its keepers' addresses, or make another token", ErrOtherCluster)
}
