package keeper_test

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"

	"github.com/tulle-net/tulle/crypto"
	"github.com/tulle-net/tulle/keeper"
	"github.com/tulle-net/tulle/keeper/keepertest"
	"github.com/tulle-net/tulle/peer"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var (
	errStore = errors.New("the disk is full")
	ctx      = context.Background()
)

// cluster is a CA, a store, and a clock that stands still.
type cluster struct {
	t     testing.TB
	ca    *crypto.CA
	roots *crypto.Roots
	root  crypto.Key
	store *keepertest.Store
	first *crypto.Identity // of k1
	ring  *crypto.GossipRing

	mu  sync.Mutex
	now time.Time
	log bytes.Buffer
}

func must[T any](t testing.TB) func(v T, err error) T {
	return func(v T, err error) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

// newCluster is one whose first keeper is k1.
func newCluster(t testing.TB) *cluster {
	t.Helper()
	c := &cluster{t: t, root: crypto.NewKey(), ring: crypto.NewGossipRing(), now: time.Now().UTC().Truncate(time.Second)}
	c.ca = must[*crypto.CA](t)(crypto.NewCA(crypto.NewCluster(), c.now))
	c.roots = must[*crypto.Roots](t)(crypto.NewRoots(c.ca.DER()))
	c.first = c.identity("k1", crypto.Rights{Overlays: crypto.Grants{"*"}, Keeper: true})
	c.store = must[*keepertest.Store](t)(keepertest.NewStore(keeper.NewLedger(c.first.Certificate())))
	t.Cleanup(func() { c.secrets() })
	return c
}

func (c *cluster) time() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.now
}

func (c *cluster) pass(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.now = c.now.Add(d)
}

// Write takes the keepers' logs.
func (c *cluster) Write(b []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.log.Write(b)
}

// secrets fails the test if one of the cluster's is in a log or in the store.
func (c *cluster) secrets() {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, b := range [][]byte{c.log.Bytes(), c.store.Text()} {
		for _, secret := range [][]byte{c.root.Bytes(), c.ring.Primary.Bytes()} {
			if bytes.Contains(b, secret) || bytes.Contains(b, []byte(base64Of(secret))) {
				c.t.Error("a secret is in a log or in the ledger")
			}
		}
		if bytes.Contains(b, []byte("tulle1.")) {
			c.t.Error("a token is in a log or in the ledger")
		}
	}
}

// identity issues one, whatever the ledger says.
func (c *cluster) identity(name string, r crypto.Rights) *crypto.Identity {
	c.t.Helper()
	key := crypto.NewPrivateKey()
	csr := must[[]byte](c.t)(crypto.NewRequest(key, name))
	issued := must[*crypto.Issued](c.t)(c.ca.Issue(csr, r, c.time()))
	return must[*crypto.Identity](c.t)(crypto.NewIdentity(key, issued, c.roots, c.time()))
}

// enrol writes a record for an identity.
func (c *cluster) enrol(id *crypto.Identity) *crypto.Certificate {
	c.t.Helper()
	c.update(func(l *keeper.Ledger) {
		for name, n := range keeper.NewLedger(id.Certificate()).Nodes {
			l.Nodes[name] = n
		}
	})
	return id.Certificate()
}

// node is one with a record.
func (c *cluster) node(name string, grants ...string) *crypto.Certificate {
	c.t.Helper()
	return c.enrol(c.identity(name, crypto.Rights{Overlays: grants}))
}

func (c *cluster) update(f func(*keeper.Ledger)) {
	c.t.Helper()
	if err := c.store.Update(ctx, func(l *keeper.Ledger) error { f(l); return nil }); err != nil {
		c.t.Fatal(err)
	}
}

func (c *cluster) ledger() *keeper.Ledger {
	c.t.Helper()
	return must[*keeper.Ledger](c.t)(c.store.Read(ctx))
}

// site is what a keeper's node does for it.
type site struct {
	*keeper.Keeper
	c       *cluster
	changed atomic.Int64

	mu     sync.Mutex
	ring   *crypto.GossipRing
	rings  []*crypto.GossipRing // that were set
	pushes [][]string           // except whom
	silent []string             // who is never reached
	fail   error                // of SetRing
	onPush func()
}

// keeper makes one over the cluster's store.
func (c *cluster) keeper(name string) *site {
	c.t.Helper()
	s := &site{c: c, ring: c.ring}
	s.Keeper = must[*keeper.Keeper](c.t)(keeper.New(s.config(name)))
	return s
}

func (s *site) config(name string) keeper.Config {
	c := s.c
	return keeper.Config{
		Name: name, CA: c.ca, Roots: c.roots, Root: c.root, Store: c.store, Now: c.time,
		Members: func() []peer.Member {
			a := netip.MustParseAddrPort("192.0.2.1:4789")
			return []peer.Member{{Name: "k1", VTEP: a, Gossip: a, Keeper: true}, {Name: "n1", VTEP: a, Gossip: a}}
		},
		Addrs: func() []netip.AddrPort { return []netip.AddrPort{netip.MustParseAddrPort("192.0.2.1:4789")} },
		Ring: func() *crypto.GossipRing {
			s.mu.Lock()
			defer s.mu.Unlock()
			return s.ring
		},
		SetRing: func(r *crypto.GossipRing) error {
			s.mu.Lock()
			defer s.mu.Unlock()
			if s.fail != nil {
				return s.fail
			}
			s.ring = r
			s.rings = append(s.rings, r)
			return nil
		},
		Push: func(_ context.Context, except []string) []string {
			s.mu.Lock()
			s.pushes = append(s.pushes, except)
			f := s.onPush
			unreached := slices.DeleteFunc(slices.Clone(s.silent), func(n string) bool { return slices.Contains(except, n) })
			s.mu.Unlock()
			if f != nil {
				f()
			}
			return unreached
		},
		Changed: func() { s.changed.Add(1) },
		KeepCA:  func(*crypto.CA) error { return nil },
		Log:     slog.New(slog.NewTextHandler(c, &slog.HandlerOptions{Level: slog.LevelDebug})),
	}
}

// as is the keeper's client of a node.
func (s *site) as(cert *crypto.Certificate) keeper.Client {
	return s.Local(func() *crypto.Certificate { return cert })
}

// admin is the client of k1.
func (s *site) admin() keeper.Client { return s.as(s.c.first.Certificate()) }

// token makes one.
func (s *site) token(o crypto.TokenOptions) *crypto.Token {
	s.c.t.Helper()
	if o.TTL == 0 {
		o.TTL = time.Hour
	}
	if o.Name == "" {
		o.Name = "*"
	}
	o.Uses = max(o.Uses, 1)
	text := must[string](s.c.t)(s.admin().CreateToken(ctx, o))
	return must[*crypto.Token](s.c.t)(crypto.ParseToken(text))
}

var exporter = bytes.Repeat([]byte{7}, crypto.MinExporter)

// join is a machine's request.
func joining(t testing.TB, token *crypto.Token, key *crypto.PrivateKey, name string) peer.JoinRequest {
	t.Helper()
	return peer.JoinRequest{
		Token: token.ID, Proof: token.Prove(exporter, crypto.RoleJoin), Exporter: exporter,
		CSR: must[[]byte](t)(crypto.NewRequest(key, name)), From: netip.MustParseAddrPort("192.0.2.7:4789"),
	}
}

func TestNew(t *testing.T) {
	c := newCluster(t)
	_, err := keeper.New(keeper.Config{})
	for _, want := range []string{"CA", "certificates", "root secret", "store", "members", "addresses", "gossip keys", "push", "name"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("New without %s: %v", want, err)
		}
	}
	cfg := (&site{c: c}).config("k1")
	cfg.Roots = newCluster(t).roots
	if _, err := keeper.New(cfg); !errors.Is(err, crypto.ErrOtherCluster) {
		t.Errorf("New with another cluster's roots: %v", err)
	}
}

// Run forgets what is over, and completes what was left undone.
func TestRun(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t)
		k := c.keeper("k1")
		old, young := k.token(crypto.TokenOptions{}), k.token(crypto.TokenOptions{TTL: 100 * time.Hour})
		c.pass(26 * time.Hour)
		k.fail = errStore
		out, err := k.admin().RotateGossip(ctx)
		if err != nil || !out.KeysPending {
			t.Fatalf("RotateGossip = %+v, %v: want it pending", out, err)
		}
		run, cancel := context.WithCancel(ctx)
		ended := make(chan error)
		go func() { ended <- k.Run(run) }()
		synctest.Wait()
		l := c.ledger()
		if _, ok := l.Tokens[old.ID]; ok || len(l.Tokens) != 1 || l.Tokens[young.ID].Uses != 1 {
			t.Errorf("%d tokens are left", len(l.Tokens))
		}
		if l.Gossip.Done != 0 || k.ring.Epoch != 1 {
			t.Errorf("a ring that cannot be kept is used: %+v", l.Gossip)
		}
		k.mu.Lock()
		k.fail = nil
		k.mu.Unlock()
		time.Sleep(31 * time.Second)
		synctest.Wait()
		if l := c.ledger(); l.Gossip.Done != l.Gossip.Wanted || len(k.rings) != 3 {
			t.Errorf("after Run: %+v, %d rings", l.Gossip, len(k.rings))
		}
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
}
