package peer

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"slices"

	"github.com/tulle-net/tulle/crypto"
)

// keyExchange is the one that is spoken: traffic that is recorded today stays
// closed to the quantum computers of tomorrow (draft-ietf-tls-ecdhe-mlkem).
const keyExchange = tls.X25519MLKEM768

// baseTLS is what both ends of every connection agree on.
func baseTLS(proto string) *tls.Config {
	return &tls.Config{
		MinVersion:             tls.VersionTLS13,
		CurvePreferences:       []tls.CurveID{keyExchange},
		NextProtos:             []string{proto},
		SessionTicketsDisabled: true,
	}
}

// serverTLS answers a ClientHello. The protocol decides who must show a
// certificate, so a client may offer one only.
func (e *Endpoint) serverTLS(hello *tls.ClientHelloInfo) (*tls.Config, error) {
	id := e.identity.Load()
	if id == nil {
		return nil, ErrNoIdentity
	}
	proto := protoNode
	if e.cfg.Joiner != nil && slices.Equal(hello.SupportedProtos, []string{protoJoin}) {
		proto = protoJoin
	}
	c := baseTLS(proto)
	if proto == protoJoin {
		c.Certificates = []tls.Certificate{id.TLSWithRoots()}
		c.VerifyConnection = exchanged
		return c, nil
	}
	c.Certificates = []tls.Certificate{id.TLS()}
	c.ClientAuth = tls.RequireAnyClientCert
	c.VerifyConnection = func(s tls.ConnectionState) error { return e.believed(&s, "") }
	return c, nil
}

// clientTLS dials the node of this name and no other.
func (e *Endpoint) clientTLS(id *crypto.Identity, name string) *tls.Config {
	c := baseTLS(protoNode)
	leaf := id.TLS()
	// Whatever the server says that it would take: there is but one.
	c.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &leaf, nil }
	c.ServerName = name
	// Names are not host names: VerifyConnection does all of the verifying.
	c.InsecureSkipVerify = true
	c.VerifyConnection = func(s tls.ConnectionState) error { return e.believed(&s, name) }
	return c
}

// exchanged checks what TLS agreed on.
func exchanged(s tls.ConnectionState) error {
	if s.Version != tls.VersionTLS13 || s.CurveID != keyExchange || s.DidResume {
		return fmt.Errorf("peer: TLS agreed on %s with %s, want TLS 1.3 with %s", tls.VersionName(s.Version), s.CurveID, keyExchange)
	}
	return nil
}

var errOwnName = errors.New("peer: a certificate with this node's own name: two nodes share a name, or it dialled itself")

// verify says who the other end is; want is whom it must be, "" for anybody.
func (e *Endpoint) verify(s *tls.ConnectionState, want string) (*crypto.Certificate, error) {
	if err := exchanged(*s); err != nil {
		return nil, err
	}
	return e.verifyChain(raw(s.PeerCertificates), want)
}

func (e *Endpoint) verifyChain(chain [][]byte, want string) (*crypto.Certificate, error) {
	id := e.identity.Load()
	if id == nil {
		return nil, ErrNoIdentity
	}
	n, err := id.Roots().Verify(chain, e.cfg.Now(), e.cfg.Revoked())
	switch {
	case err != nil:
		return nil, err
	case n.Name == id.Name():
		return nil, errOwnName
	case want != "" && n.Name != want:
		return nil, otherNode{n, want}
	}
	return n, nil
}

// otherNode is the error of a certificate that is in order, but of another node.
type otherNode struct {
	is   *crypto.Certificate
	want string
}

func (o otherNode) Error() string {
	return fmt.Sprintf("peer: the certificate is of node %s, not of %s", o.is.Name, o.want)
}

func raw(chain []*x509.Certificate) [][]byte {
	der := make([][]byte, len(chain))
	for i, c := range chain {
		der[i] = c.Raw
	}
	return der
}

// believed is verify for TLS, which tells the other end no more than that it failed.
func (e *Endpoint) believed(s *tls.ConnectionState, want string) error {
	_, err := e.verify(s, want)
	if err != nil {
		e.stats.NotBelieved.Add(1)
		e.warn("peer: a certificate is not believed", err, slog.String("peer", want))
	}
	return err
}
