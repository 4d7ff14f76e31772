package discovery

import (
	"bytes"
	"context"
	"errors"
	"net/netip"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/tulle-net/tulle/crypto"
)

// testCluster is a CA, and what stands in for the authenticated connections
// between its nodes.
type testCluster struct {
	t       testing.TB
	ca      *crypto.CA
	roots   *crypto.Roots
	keys    [][]byte
	revoked atomic.Pointer[crypto.Revocations]
	ahead   atomic.Int64 // how far the nodes' clock is ahead, ns
	seq     atomic.Uint64
	checks  atomic.Int64

	mu     sync.Mutex
	nodes  map[string]*Discovery
	hidden map[string]string // per asker, the overlay that others do not tell it of
}

func gossipKey(b byte) []byte { return bytes.Repeat([]byte{b}, KeyBytes) }

func newTestCluster(t testing.TB) *testCluster {
	t.Helper()
	ca, err := crypto.NewCA(crypto.NewCluster(), time.Now().Add(-crypto.Lifetime))
	if err != nil {
		t.Fatal(err)
	}
	roots, err := crypto.NewRoots(ca.DER())
	if err != nil {
		t.Fatal(err)
	}
	return &testCluster{
		t: t, ca: ca, roots: roots, keys: [][]byte{gossipKey(1)},
		nodes: make(map[string]*Discovery), hidden: make(map[string]string),
	}
}

func (c *testCluster) now() time.Time { return time.Now().Add(time.Duration(c.ahead.Load())) }

func (c *testCluster) verify(p *crypto.Passport) error {
	c.checks.Add(1)
	return p.Verify(c.roots, c.now(), c.revoked.Load())
}

// identity lets a node in, by the clock of that time.
func (c *testCluster) identity(name string, key *crypto.PrivateKey, keeper bool, now time.Time) *crypto.Identity {
	c.t.Helper()
	grants, err := crypto.ParseGrants("*")
	if err != nil {
		c.t.Fatal(err)
	}
	request, err := crypto.NewRequest(key, name)
	if err != nil {
		c.t.Fatal(err)
	}
	issued, err := c.ca.Issue(request, crypto.Rights{Overlays: grants, Keeper: keeper}, now)
	if err != nil {
		c.t.Fatal(err)
	}
	id, err := crypto.NewIdentity(key, issued, c.roots, now)
	if err != nil {
		c.t.Fatal(err)
	}
	return id
}

// revoke takes back the keys.
func (c *testCluster) revoke(keys ...crypto.PublicKey) {
	c.t.Helper()
	var list []crypto.Revocation
	for _, k := range keys {
		list = append(list, crypto.Revocation{Key: k, Until: time.Now().Add(crypto.Lifetime)})
	}
	b, err := c.ca.SignRevocations(c.revoked.Load().Number()+1, list, time.Now())
	if err != nil {
		c.t.Fatal(err)
	}
	r, err := c.roots.ParseRevocations(b)
	if err != nil {
		c.t.Fatal(err)
	}
	c.revoked.Store(r)
}

// secureConfig is that of a node with that identity, or a new one.
func (c *testCluster) secureConfig(name string, id *crypto.Identity, seeds ...*testNode) Config {
	if id == nil {
		id = c.identity(name, crypto.NewPrivateKey(), false, time.Now())
	}
	cfg := testConfig(name, seeds...)
	cfg.Secure = &Secure{
		Keys: c.keys,
		Sign: func(s crypto.Statement) ([]byte, error) {
			s.Sequence = c.seq.Add(1)
			return id.Passport(s)
		},
		Verify: c.verify,
		Pull: func(_ context.Context, from string) ([]byte, func(string) bool, error) {
			list, err := c.pull(name, from)
			return list, func(string) bool { return true }, err
		},
	}
	return cfg
}

// pull is what a QUIC connection and the owner's filter would be.
func (c *testCluster) pull(asker, from string) ([]byte, error) {
	c.mu.Lock()
	d, hidden := c.nodes[from], c.hidden[asker]
	c.mu.Unlock()
	if d == nil {
		return nil, errors.New("nobody is there")
	}
	return d.EncodeList(func(overlay string) bool { return overlay != hidden })
}

func (c *testCluster) start(cfg Config) *testNode {
	c.t.Helper()
	n := start(c.t.(*testing.T), cfg)
	c.mu.Lock()
	c.nodes[cfg.Name] = n.Discovery
	c.mu.Unlock()
	return n
}

// passport is one that is not a running node's.
func (c *testCluster) passport(id *crypto.Identity, seq uint64, gossip netip.AddrPort) []byte {
	c.t.Helper()
	raw, err := id.Passport(crypto.Statement{
		Sequence: seq, Wire: secureWire, Gossip: gossip, VTEPs: []netip.AddrPort{netip.AddrPortFrom(gossip.Addr(), 4789)},
		Extra: []byte{headBytes - 1: 0, 3: 7},
	})
	if err != nil {
		c.t.Fatal(err)
	}
	return raw
}
