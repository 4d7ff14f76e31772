package peer

import (
	"context"
	"fmt"
	"net/netip"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/tulle-net/tulle/crypto"
	"github.com/tulle-net/tulle/peer/peertest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// cluster is a CA and the nodes that it made.
type cluster struct {
	t    testing.TB
	net  *peertest.Net
	ca   *crypto.CA
	root *crypto.Roots

	mu      sync.Mutex
	addrs   map[string]netip.AddrPort
	silent  map[*Endpoint]*atomic.Bool // those that were killed
	revoked atomic.Pointer[crypto.Revocations]
}

func newCluster(t testing.TB, n *peertest.Net) *cluster {
	t.Helper()
	ca, err := crypto.NewCA(crypto.NewCluster(), time.Now().Add(-2*crypto.Lifetime))
	if err != nil {
		t.Fatal(err)
	}
	roots, err := crypto.NewRoots(ca.DER())
	if err != nil {
		t.Fatal(err)
	}
	return &cluster{t: t, net: n, ca: ca, root: roots, addrs: map[string]netip.AddrPort{}, silent: map[*Endpoint]*atomic.Bool{}}
}

// identity makes a node's, valid from the time that is told.
func (c *cluster) identity(name string, r crypto.Rights, at time.Time) *crypto.Identity {
	c.t.Helper()
	key := crypto.NewPrivateKey()
	csr, err := crypto.NewRequest(key, name)
	if err != nil {
		c.t.Fatal(err)
	}
	issued, err := c.ca.Issue(csr, r, at)
	if err != nil {
		c.t.Fatal(err)
	}
	id, err := crypto.NewIdentity(key, issued, c.root, at)
	if err != nil {
		c.t.Fatal(err)
	}
	return id
}

func (c *cluster) revoke(names ...string) {
	c.t.Helper()
	var list []crypto.Revocation
	for _, name := range names {
		list = append(list, crypto.Revocation{Name: name, Until: time.Now().Add(crypto.Lifetime)})
	}
	b, err := c.ca.SignRevocations(c.revoked.Load().Number()+1, list, time.Now())
	if err != nil {
		c.t.Fatal(err)
	}
	r, err := c.root.ParseRevocations(b)
	if err != nil {
		c.t.Fatal(err)
	}
	c.revoked.Store(r)
}

var lastHost atomic.Uint32

func newAddr() netip.AddrPort {
	n := lastHost.Add(1)
	return netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, byte(n >> 16), byte(n >> 8), byte(n)}), 4789)
}

func (c *cluster) resolve(name string) []netip.AddrPort {
	c.mu.Lock()
	defer c.mu.Unlock()
	if a, ok := c.addrs[name]; ok {
		return []netip.AddrPort{a}
	}
	return nil
}

// node makes an Endpoint at an address of its own. Its keys depend on its name,
// as if they came from its state folder.
func (c *cluster) node(name string, change ...func(*Config)) *Endpoint {
	c.t.Helper()
	return c.nodeAs(name, c.identity(name, crypto.Rights{Overlays: crypto.Grants{"*"}, Keeper: name == "keeper"}, time.Now()), change...)
}

func (c *cluster) nodeAs(name string, id *crypto.Identity, change ...func(*Config)) *Endpoint {
	c.t.Helper()
	c.mu.Lock()
	addr, again := c.addrs[name]
	if !again {
		addr = newAddr()
		c.addrs[name] = addr
	}
	c.mu.Unlock()
	cfg := Config{
		Identity: id, Resolve: c.resolve, Revoked: c.revoked.Load, Version: "test",
		Keepers: func() []string { return []string{"keeper"} },
	}
	copy(cfg.ResetKey[:], "reset "+name)
	copy(cfg.TokenKey[:], "token "+name)
	var e atomic.Pointer[Endpoint]
	silent := new(atomic.Bool)
	send := c.net.Attach(addr, func(from netip.AddrPort, d []byte) {
		if e := e.Load(); e != nil {
			e.Deliver(from, d)
		}
	})
	cfg.Send = func(to netip.AddrPort, d []byte) error {
		if silent.Load() {
			return nil
		}
		return send(to, d)
	}
	for _, f := range change {
		f(&cfg)
	}
	made, err := New(cfg)
	if err != nil {
		c.t.Fatal(err)
	}
	e.Store(made)
	c.mu.Lock()
	c.silent[made] = silent
	c.mu.Unlock()
	c.t.Cleanup(func() {
		if err := made.Close(); err != nil {
			c.t.Error(err)
		}
	})
	return made
}

// kill ends a node as kill -9 does: it tells nobody.
func (c *cluster) kill(name string, e *Endpoint) {
	c.net.Attach(c.addrs[name], nil)
	c.mu.Lock()
	c.silent[e].Store(true)
	c.mu.Unlock()
	if err := e.Close(); err != nil {
		c.t.Error(err)
	}
}

// within is a context that ends the test when something hangs.
func within(t testing.TB, d time.Duration) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), d)
	t.Cleanup(cancel)
	return ctx
}

// eventually waits for what other goroutines will have done soon.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); !ok(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("still not: %s", what)
		}
	}
}

const kindEcho Kind = 300

func echo(_ context.Context, p Peer, payload []byte) ([]byte, error) {
	return fmt.Appendf(nil, "%s says %s", p.Name, payload), nil
}
