package crypto

import (
	"bytes"
	"crypto/ed25519"
	"net/netip"
	"testing"
	"time"
)

var testNow = time.Date(2027, time.March, 4, 5, 6, 7, 0, time.UTC)

// fixedKey is the private key whose seed is 32 times b.
func fixedKey(b byte) *PrivateKey {
	return privateKeyFrom(ed25519.NewKeyFromSeed(bytes.Repeat([]byte{b}, ed25519.SeedSize)))
}

// testCA is the CA of a cluster whose key is always the same.
func testCA(t testing.TB, cluster string, seed byte) (*CA, *Roots) {
	t.Helper()
	ca, err := newCA(cluster, fixedKey(seed), testNow)
	if err != nil {
		t.Fatal(err)
	}
	roots, err := NewRoots(ca.DER())
	if err != nil {
		t.Fatal(err)
	}
	return ca, roots
}

func request(t testing.TB, key *PrivateKey, name string) []byte {
	t.Helper()
	csr, err := NewRequest(key, name)
	if err != nil {
		t.Fatal(err)
	}
	return csr
}

func grants(t testing.TB, patterns ...string) Grants {
	t.Helper()
	g, err := ParseGrants(patterns...)
	if err != nil {
		t.Fatal(err)
	}
	return g
}

// identity is a node that ca lets into its cluster.
func identity(t testing.TB, ca *CA, roots *Roots, key *PrivateKey, name string, rights Rights) *Identity {
	t.Helper()
	issued, err := ca.Issue(request(t, key, name), rights, testNow)
	if err != nil {
		t.Fatal(err)
	}
	id, err := NewIdentity(key, issued, roots, testNow)
	if err != nil {
		t.Fatal(err)
	}
	return id
}

// testStatement has no field that is zero.
func testStatement() Statement {
	return Statement{
		Sequence: 7, Wire: 1, Count: 3, Digest: [16]byte{1, 2, 3, 15: 16},
		VTEPs:  []netip.AddrPort{netip.MustParseAddrPort("192.0.2.1:4789"), netip.MustParseAddrPort("[2001:db8::1]:4789")},
		Gossip: netip.MustParseAddrPort("192.0.2.1:7946"),
		Extra:  []byte("later"),
	}
}

// flips calls f with b, one bit changed, for each bit.
func flips(b []byte, f func(bit int, changed []byte)) {
	for i := range len(b) * 8 {
		c := bytes.Clone(b)
		c[i/8] ^= 1 << (i % 8)
		f(i, c)
	}
}
