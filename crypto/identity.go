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

// WithRoots returns the identity of the same node with other CA certificates of
// its cluster. Errors are NewIdentity's: the CA that made the node's certificate
// must be among them.
func (id *Identity) WithRoots(roots *Roots, now time.Time) (*Identity, error) {
	if roots.cluster != id.roots.cluster {
		return nil, fmt.Errorf("crypto: CA certificates of cluster %s for %q: %w", roots.cluster, id.Name(), ErrOtherCluster)
	}
	return NewIdentity(id.key, id.Issued(), roots, now)
}

// TLS returns the node's certificate for a TLS configuration: both ends have
// the CA's already. A keeper's has vouchers behind it, while the CA changes: a
// node that was away learns of the change from a keeper.
func (id *Identity) TLS() tls.Certificate {
	c := id.leaf()
	if id.cert.Keeper {
		for _, v := range id.roots.vouchers[:min(len(id.roots.vouchers), maxChain-1)] {
			c.Certificate = append(c.Certificate, v.Raw)
		}
	}
	return c
}

func (id *Identity) leaf() tls.Certificate {
	return tls.Certificate{Certificate: [][]byte{id.cert.DER}, PrivateKey: id.key, Leaf: id.cert.x509}
}

// TLSWithRoots is TLS with the CA certificates and vouchers behind it, for a node
// that joins and knows only a fingerprint; see VerifyKeeper.
func (id *Identity) TLSWithRoots() tls.Certificate {
	c := id.leaf()
	// A verifier reads no more than maxChain.
	ders := id.roots.DER()
	c.Certificate = append(c.Certificate, ders[:min(len(ders), maxChain-1)]...)
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
