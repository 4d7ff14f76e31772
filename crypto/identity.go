package crypto

import (
	"crypto/tls"
	"fmt"
	"slices"
	"time"
)

// Identity is what makes a machine a node of a cluster: a key, and what the CA
// says of it. It is never changed once made; a renewal makes the next one. It
// is safe for concurrent use.
type Identity struct {
	key   *PrivateKey
	cert  *Certificate
	card  []byte
	roots *Roots
}

// NewIdentity checks that key, certificate, card and roots belong together and
// are valid now, and copies what it keeps. Errors are those of Roots.Verify,
// and ErrOtherKey.
func NewIdentity(key *PrivateKey, issued *Issued, roots *Roots, now time.Time) (*Identity, error) {
	cert, err := roots.Verify([][]byte{issued.Certificate}, now, nil)
	if err != nil {
		return nil, err
	}
	r := &reader{b: slices.Clone(issued.Card)}
	p, err := r.card()
	if err != nil {
		return nil, err
	}
	if err := p.verifyCard(roots, now, nil); err != nil {
		return nil, err
	}
	if cert.Key != key.PublicKey() || p.Key != cert.Key {
		return nil, fmt.Errorf("crypto: identity of %q: %w", cert.Name, ErrOtherKey)
	}
	if len(r.b) != 0 || p.Name != cert.Name || p.Serial != cert.Serial || p.Keeper != cert.Keeper {
		return nil, fmt.Errorf("crypto: identity of %q: %w: certificate and card are no pair", cert.Name, ErrMalformed)
	}
	return &Identity{key: key, cert: cert, card: slices.Clone(issued.Card), roots: roots}, nil
}

// Name returns the node's name.
func (id *Identity) Name() string { return id.cert.Name }

// Certificate returns the node's certificate.
func (id *Identity) Certificate() *Certificate { return id.cert }

// Roots returns the cluster's CA certificates.
func (id *Identity) Roots() *Roots { return id.roots }

// Key returns the node's key.
func (id *Identity) Key() *PrivateKey { return id.key }

// Issued returns copies of certificate and card, for the state folder.
func (id *Identity) Issued() *Issued {
	return &Issued{Certificate: slices.Clone(id.cert.DER), Card: slices.Clone(id.card)}
}

// Renewal returns the request for the next certificate; see Certificate.RenewAt.
func (id *Identity) Renewal() ([]byte, error) { return NewRequest(id.key, id.cert.Name) }

// TLS returns the node's certificate for a TLS configuration: both ends have
// the CA's already.
func (id *Identity) TLS() tls.Certificate {
	return tls.Certificate{Certificate: [][]byte{id.cert.DER}, PrivateKey: id.key, Leaf: id.cert.x509}
}

// TLSWithRoots is TLS with the CA certificates behind it, for a node that joins
// and knows only a fingerprint; see VerifyKeeper.
func (id *Identity) TLSWithRoots() tls.Certificate {
	c := id.TLS()
	// A verifier reads no more than maxChain.
	c.Certificate = append(c.Certificate, id.roots.DER()[:min(len(id.roots.certs), maxChain-1)]...)
	return c
}

// Passport signs s and returns the encoded passport, at most MaxPassport bytes.
func (id *Identity) Passport(s Statement) ([]byte, error) {
	b, err := s.append(slices.Clone(id.card))
	if err != nil {
		return nil, err
	}
	return append(b, id.key.sign(signedText(statementContext, id.cert.Cluster, b))...), nil
}
