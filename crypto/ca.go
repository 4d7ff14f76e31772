package crypto

import (
	"bytes"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/base32"
	"encoding/binary"
	"fmt"
	"math/big"
	"net/url"
	"strings"
	"time"
)

const (
	// Lifetime of a node's certificate and of its card.
	Lifetime = 30 * 24 * time.Hour
	// CALifetime of a CA's certificate.
	CALifetime = 10 * 365 * 24 * time.Hour
	// Skew is how far two clocks of a cluster may be apart.
	Skew = 10 * time.Minute

	maxRequest = 1024
)

// NewCluster returns a random cluster id of 16 characters, the SPIFFE trust domain.
func NewCluster() string {
	var b [10]byte
	_, _ = rand.Read(b[:]) // never fails
	return strings.ToLower(base32.StdEncoding.EncodeToString(b[:]))
}

// checkCluster returns an error unless s is [a-z0-9-]{1,63}, within SPIFFE-ID section 2.1.
func checkCluster(s string) error {
	if CheckName(s) != nil || s != strings.ToLower(s) {
		return fmt.Errorf("crypto: %w: cluster id %.70q", ErrName, s)
	}
	return nil
}

// CA issues a cluster's certificates. It is safe for concurrent use.
type CA struct {
	cluster string
	cert    *x509.Certificate
	key     *PrivateKey
}

// NewCA makes a key and a certificate for cluster, signed by itself.
func NewCA(cluster string, now time.Time) (*CA, error) {
	return newCA(cluster, NewPrivateKey(), now)
}

func newCA(cluster string, key *PrivateKey, now time.Time) (*CA, error) {
	if err := checkCluster(cluster); err != nil {
		return nil, err
	}
	template := caTemplate(cluster, now, now.Add(CALifetime))
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return nil, fmt.Errorf("crypto: make a CA: %w", err)
	}
	return LoadCA(der, key)
}

// caTemplate is what a cluster's CA certificates have in common.
func caTemplate(cluster string, now, end time.Time) *x509.Certificate {
	return &x509.Certificate{
		SerialNumber:          newSerial().big(),
		Subject:               pkix.Name{CommonName: "Tulle cluster " + cluster},
		URIs:                  []*url.URL{{Scheme: "spiffe", Host: cluster}},
		NotBefore:             now.Add(-Skew),
		NotAfter:              end,
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		BasicConstraintsValid: true,
		IsCA:                  true,
		MaxPathLenZero:        true,
	}
}

// LoadCA returns the CA of a certificate (DER, borrowed) and its key.
func LoadCA(der []byte, key *PrivateKey) (*CA, error) {
	cert, cluster, err := parseRoot(der)
	if err != nil {
		return nil, err
	}
	if publicKeyOf(cert) != key.PublicKey() {
		return nil, fmt.Errorf("crypto: CA of cluster %s: %w: certificate and key are no pair", cluster, ErrOtherKey)
	}
	return &CA{cluster: cluster, cert: cert, key: key}, nil
}

// Cluster returns the id of the cluster that ca speaks for.
func (ca *CA) Cluster() string { return ca.cluster }

// DER returns the CA's certificate, borrowed.
func (ca *CA) DER() []byte { return ca.cert.Raw }

// Key returns the CA's key, for the state folder.
func (ca *CA) Key() *PrivateKey { return ca.key }

// Fingerprint names the CA in tokens.
func (ca *CA) Fingerprint() Fingerprint { return fingerprintOf(ca.cert) }

// KeyID names the CA in certificates.
func (ca *CA) KeyID() KeyID { return keyIDOf(ca.cert) }

// NotAfter returns when the CA's own certificate ends.
func (ca *CA) NotAfter() time.Time { return ca.cert.NotAfter }

// Vouch returns a voucher for next, the cluster's CA to be: its key, certified by
// ca (NewWithOld of RFC 4210, section 4.4). Whoever knows ca only believes by it
// what next signs, for as long as both last.
func (ca *CA) Vouch(next *CA, now time.Time) ([]byte, error) {
	if next.cluster != ca.cluster {
		return nil, fmt.Errorf("crypto: vouch for a CA: %w, %s", ErrOtherCluster, next.cluster)
	}
	template := caTemplate(ca.cluster, now, now.Add(CALifetime))
	for _, end := range []time.Time{ca.cert.NotAfter, next.cert.NotAfter} {
		if template.NotAfter.After(end) {
			template.NotAfter = end
		}
	}
	der, err := x509.CreateCertificate(rand.Reader, template, ca.cert, next.key.Public(), ca.key)
	if err != nil {
		return nil, fmt.Errorf("crypto: vouch for a CA: %w", err)
	}
	return der, nil
}

// Rights are what a certificate allows its node beyond being a member.
type Rights struct {
	// Overlays that the node may join.
	Overlays Grants
	// Keeper: the node may speak for the cluster: answer who joins, hand out keys.
	Keeper bool
}

// Issued is what a CA gives a node.
type Issued struct {
	// Certificate is X.509 DER, about 600 bytes.
	Certificate []byte
	// Card is the half of the passport that the CA signs; see Passport.
	Card []byte
}

// NewRequest returns a certificate signing request (PKCS #10, DER, about 160
// bytes): name as its common name, the key, nothing else.
func NewRequest(key *PrivateKey, name string) ([]byte, error) {
	if err := CheckName(name); err != nil {
		return nil, err
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{Subject: pkix.Name{CommonName: name}}, key)
	if err != nil {
		return nil, fmt.Errorf("crypto: make a signing request: %w", err)
	}
	return der, nil
}

// Request is what a signing request asks for.
type Request struct {
	Name string
	Key  PublicKey
}

// ParseRequest reads a signing request, borrowed, at most 1,024 bytes. It
// verifies that the sender has the key, and refuses (ErrAsksMore) whatever
// NewRequest does not write: rights are the keeper's to give, so that a request
// for them is an attack or a mistake, and never silently dropped.
func ParseRequest(der []byte) (Request, error) {
	if len(der) > maxRequest {
		return Request{}, fmt.Errorf("crypto: signing request: %w: %d bytes are more than %d", ErrMalformed, len(der), maxRequest)
	}
	csr, err := x509.ParseCertificateRequest(der)
	if err != nil {
		return Request{}, fmt.Errorf("crypto: signing request: %w: %w", ErrMalformed, err)
	}
	if csr.PublicKeyAlgorithm != x509.Ed25519 || csr.SignatureAlgorithm != x509.PureEd25519 {
		return Request{}, fmt.Errorf("crypto: signing request: %w: its key is %v, not Ed25519", ErrMalformed, csr.PublicKeyAlgorithm)
	}
	if err := csr.CheckSignature(); err != nil {
		return Request{}, fmt.Errorf("crypto: signing request: %w", ErrForged)
	}
	r := Request{Name: csr.Subject.CommonName, Key: publicKeyOf(csr)}
	if err := CheckName(r.Name); err != nil {
		return Request{}, fmt.Errorf("crypto: signing request: %w", err)
	}
	// The one request for this name and key, but for the signature.
	subject, err := asn1.Marshal(pkix.Name{CommonName: r.Name}.ToRDNSequence())
	if err != nil {
		return Request{}, fmt.Errorf("crypto: signing request: %w", err)
	}
	plain, err := asn1.Marshal(struct {
		Version                  int
		Subject, Key, Attributes asn1.RawValue
	}{0, asn1.RawValue{FullBytes: subject}, asn1.RawValue{FullBytes: csr.RawSubjectPublicKeyInfo}, asn1.RawValue{FullBytes: []byte{0xa0, 0}}})
	if err != nil {
		return Request{}, fmt.Errorf("crypto: signing request: %w", err)
	}
	if !bytes.Equal(plain, csr.RawTBSCertificateRequest) {
		return Request{}, fmt.Errorf("crypto: signing request for %q: %w: send the name and the key only", r.Name, ErrAsksMore)
	}
	return r, nil
}

// Issue signs a certificate and a card for what the request names. The caller
// has made sure that the name may go to this key, and that rights may be given.
func (ca *CA) Issue(request []byte, rights Rights, now time.Time) (*Issued, error) {
	r, err := ParseRequest(request)
	if err != nil {
		return nil, err
	}
	return ca.issue(r, rights, now)
}

// Reissue renews old, which the caller has verified (it is what the peer's TLS
// connection shows): the same name, key and rights, whatever the request says.
func (ca *CA) Reissue(old *Certificate, request []byte, now time.Time) (*Issued, error) {
	return ca.ReissueAs(old, request, old.Keeper, now)
}

// ReissueAs is Reissue for a node that has become a keeper, or is none any more.
func (ca *CA) ReissueAs(old *Certificate, request []byte, keeper bool, now time.Time) (*Issued, error) {
	r, err := ParseRequest(request)
	switch {
	case err != nil:
		return nil, err
	case old.Cluster != ca.cluster:
		return nil, fmt.Errorf("crypto: renew %q: %w: the certificate is of cluster %s and the CA of %s", old.Name, ErrOtherCluster, old.Cluster, ca.cluster)
	case r.Name != old.Name:
		return nil, fmt.Errorf("crypto: renew %q: %w: it asks for %q: join with a token to get another name", old.Name, ErrName, r.Name)
	case r.Key != old.Key:
		return nil, fmt.Errorf("crypto: renew %q: %w: remove the node (tulle node rm %s) and join with a token", old.Name, ErrOtherKey, old.Name)
	}
	rights := old.Rights
	rights.Keeper = keeper
	return ca.issue(r, rights, now)
}

func (ca *CA) issue(r Request, rights Rights, now time.Time) (*Issued, error) {
	extension, err := marshalRights(rights)
	if err != nil {
		return nil, err
	}
	if now.After(ca.cert.NotAfter) {
		return nil, fmt.Errorf("crypto: CA of cluster %s: %w at %s", ca.cluster, ErrExpired, stamp(ca.cert.NotAfter))
	}
	if now.Before(ca.cert.NotBefore) {
		return nil, fmt.Errorf("crypto: CA of cluster %s: %w: it is from %s and here it is %s", ca.cluster, ErrClock, stamp(ca.cert.NotBefore), stamp(now))
	}
	serial := newSerial()
	notAfter := now.Add(Lifetime).UTC().Truncate(time.Second)
	if notAfter.After(ca.cert.NotAfter) {
		notAfter = ca.cert.NotAfter
	}
	template := &x509.Certificate{
		SerialNumber:          serial.big(),
		Subject:               pkix.Name{CommonName: r.Name},
		URIs:                  []*url.URL{{Scheme: "spiffe", Host: ca.cluster, Path: nodePath + r.Name}},
		NotBefore:             now.Add(-Skew), // for those whose clocks are behind
		NotAfter:              notAfter,
		KeyUsage:              x509.KeyUsageDigitalSignature,
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		BasicConstraintsValid: true,
		ExtraExtensions:       []pkix.Extension{{Id: rightsOID, Value: extension}},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, ca.cert, ed25519.PublicKey(r.Key[:]), ca.key)
	if err != nil {
		return nil, fmt.Errorf("crypto: sign the certificate of %q: %w", r.Name, err)
	}
	c := card{issuer: keyIDOf(ca.cert), serial: serial, expires: notAfter, key: r.Key, keeper: rights.Keeper, name: r.Name}
	return &Issued{Certificate: der, Card: c.sign(ca)}, nil
}

// Serial names a certificate of a cluster, and the card issued with it: 62
// random bits below a set one. The zero Serial is none.
type Serial uint64

func newSerial() Serial {
	var b [8]byte
	_, _ = rand.Read(b[:]) // never fails
	return Serial(binary.BigEndian.Uint64(b[:])>>2 | 1<<62)
}

func (s Serial) big() *big.Int { return new(big.Int).SetUint64(uint64(s)) }

// String returns 16 hexadecimal digits, as openssl prints serials.
func (s Serial) String() string { return fmt.Sprintf("%016X", uint64(s)) }

// stamp is how times stand in errors.
func stamp(t time.Time) string { return t.UTC().Format(time.RFC3339) }
