package crypto

import (
	"crypto/ed25519"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"net/netip"
	"time"
)

const (
	// StoreCommonName is that of the certificates that keepers show each other's
	// store. No node's certificate has it: there is no space in a node's name.
	StoreCommonName = "Tulle store"
	// StoreServerName is the DNS name in all of them: a keeper may move.
	StoreServerName = "store.tulle.internal"
)

// IssueStore makes a key, and a certificate for a keeper's member of the store at
// addr, both PEM. It names no node and is none's identity: it opens stores only.
func (ca *CA) IssueStore(addr netip.Addr, now time.Time) (certificate, key []byte, err error) {
	if now.After(ca.cert.NotAfter) {
		return nil, nil, fmt.Errorf("crypto: CA of cluster %s: %w at %s", ca.cluster, ErrExpired, stamp(ca.cert.NotAfter))
	}
	private := NewPrivateKey()
	notAfter := now.Add(Lifetime).UTC().Truncate(time.Second)
	if notAfter.After(ca.cert.NotAfter) {
		notAfter = ca.cert.NotAfter
	}
	template := &x509.Certificate{
		SerialNumber:          newSerial().big(),
		Subject:               pkix.Name{CommonName: StoreCommonName},
		DNSNames:              []string{StoreServerName, "localhost"},
		NotBefore:             now.Add(-Skew), // for those whose clocks are behind
		NotAfter:              notAfter,
		KeyUsage:              x509.KeyUsageDigitalSignature,
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		BasicConstraintsValid: true,
	}
	for _, a := range []netip.Addr{addr, netip.AddrFrom4([4]byte{127, 0, 0, 1}), netip.IPv6Loopback()} {
		template.IPAddresses = append(template.IPAddresses, a.AsSlice())
	}
	public := private.PublicKey()
	der, err := x509.CreateCertificate(rand.Reader, template, ca.cert, ed25519.PublicKey(public[:]), ca.key)
	if err != nil {
		return nil, nil, fmt.Errorf("crypto: sign a store's certificate: %w", err)
	}
	secret := private.Marshal()
	defer clear(secret)
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), pem.EncodeToMemory(&pem.Block{Type: pemKey, Bytes: secret}), nil
}

// PEM returns the CA certificates, one after the other, without vouchers.
func (r *Roots) PEM() []byte {
	var out []byte
	for _, c := range r.certs {
		out = append(out, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})...)
	}
	return out
}
