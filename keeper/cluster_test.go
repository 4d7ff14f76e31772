package keeper_test

import (
	"context"
	"errors"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/tulle-net/tulle/crypto"
	"github.com/tulle-net/tulle/keeper"
	"github.com/tulle-net/tulle/peer"
	"github.com/tulle-net/tulle/peer/peertest"
)

// mesh is a cluster whose nodes are connected.
type mesh struct {
	*cluster
	net *peertest.Net

	mu    sync.Mutex
	addrs map[string]netip.AddrPort
	nodes map[string]*node
}

// node is one as package node makes it, as far as keepers are concerned.
type node struct {
	*peer.Endpoint
	keeper.Client
	roots   *crypto.Roots
	key     *crypto.PrivateKey
	revoked atomic.Pointer[crypto.Revocations]
	ring    atomic.Pointer[crypto.GossipRing]
}

func (m *mesh) node(name string, id *crypto.Identity, joiner peer.Joiner) *node {
	m.t.Helper()
	m.mu.Lock()
	addr := netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 0, 0, byte(len(m.addrs) + 1)}), 4789)
	m.addrs[name] = addr
	m.mu.Unlock()
	n := &node{roots: m.roots, key: crypto.NewPrivateKey()}
	cfg := peer.Config{
		Identity: id, Joiner: joiner, Revoked: n.revoked.Load, Version: "test",
		Keepers: func() []string { return []string{"k1"} },
		Resolve: func(name string) []netip.AddrPort {
			m.mu.Lock()
			defer m.mu.Unlock()
			if a, ok := m.addrs[name]; ok {
				return []netip.AddrPort{a}
			}
			return nil
		},
	}
	copy(cfg.ResetKey[:], "reset "+name)
	copy(cfg.TokenKey[:], "token "+name)
	var at atomic.Pointer[peer.Endpoint]
	cfg.Send = m.net.Attach(addr, func(from netip.AddrPort, d []byte) {
		if e := at.Load(); e != nil {
			e.Deliver(from, d)
		}
	})
	n.Endpoint = must[*peer.Endpoint](m.t)(peer.New(cfg))
	at.Store(n.Endpoint)
	m.t.Cleanup(func() {
		if err := n.Close(); err != nil {
			m.t.Error(err)
		}
	})
	n.Client = keeper.Client{Ask: n.Endpoint.Ask}
	m.mu.Lock()
	m.nodes[name] = n
	m.mu.Unlock()
	return n
}

// pull has a node ask for what is newer.
func (n *node) pull(ctx context.Context) error {
	var epoch uint64
	if r := n.ring.Load(); r != nil {
		epoch = r.Epoch
	}
	s, err := n.State(ctx, epoch, n.revoked.Load().Number())
	if err != nil {
		return err
	}
	if s.Ring != nil {
		n.ring.Store(s.Ring)
	}
	if s.Revocations != nil {
		list, err := n.roots.ParseRevocations(s.Revocations)
		if err != nil {
			return err
		}
		n.revoked.Store(list)
	}
	n.Recheck()
	return nil
}

// push has all nodes but the keeper pull.
func (m *mesh) push(ctx context.Context, except []string) []string {
	m.mu.Lock()
	var wg sync.WaitGroup
	var mu sync.Mutex
	var unreached []string
	for name, n := range m.nodes {
		if name == "k1" || slices.Contains(except, name) {
			continue
		}
		wg.Go(func() {
			if err := n.pull(ctx); err != nil {
				mu.Lock()
				defer mu.Unlock()
				unreached = append(unreached, name)
			}
		})
	}
	m.mu.Unlock()
	wg.Wait()
	return unreached
}

func newMesh(t *testing.T) (*mesh, *node, *site) {
	m := &mesh{cluster: newCluster(t), net: peertest.NewNet(1), addrs: map[string]netip.AddrPort{}, nodes: map[string]*node{}}
	s := &site{c: m.cluster, ring: m.ring}
	cfg := s.config("k1")
	cfg.Now = time.Now
	cfg.Addrs = func() []netip.AddrPort { return []netip.AddrPort{m.addrs["k1"]} }
	var self *node
	cfg.Push = m.push
	cfg.Changed = func() {
		if l := m.ledger(); self != nil && l.Revocations != nil {
			self.revoked.Store(must[*crypto.Revocations](t)(m.roots.ParseRevocations(l.Revocations)))
			self.Recheck()
		}
	}
	s.Keeper = must[*keeper.Keeper](t)(keeper.New(cfg))
	self = m.node("k1", m.first, s.Keeper)
	keeper.Handle(self.Endpoint, func() *keeper.Keeper { return s.Keeper })
	return m, self, s
}

// enter joins as name with the token.
func (m *mesh) enter(t *testing.T, name string, token *crypto.Token) *node {
	t.Helper()
	n := m.node(name, nil, nil)
	csr := must[[]byte](t)(crypto.NewRequest(n.key, name))
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	r := must[*peer.JoinResult](t)(n.Join(ctx, token, csr))
	n.SetIdentity(must[*crypto.Identity](t)(crypto.NewIdentity(n.key, &crypto.Issued{Certificate: r.Certificate, Card: r.Card}, r.Roots, time.Now())))
	n.ring.Store(must[*crypto.GossipRing](t)(crypto.ParseGossipRing(r.Gossip)))
	return n
}

// TestCluster is a keeper and three nodes over QUIC: one with all grants, one
// with few that tries for more, one that is revoked.
func TestCluster(t *testing.T) {
	m, k1, s := newMesh(t)
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	admin := m.enter(t, "admin", s.token(with("*")))
	narrow := m.enter(t, "narrow", must[*crypto.Token](t)(crypto.ParseToken(must[string](t)(admin.CreateToken(ctx, with("a"))))))
	bad := m.enter(t, "bad", s.token(with("*")))
	if _, err := admin.Whoami(ctx, "bad"); err != nil {
		t.Fatal(err)
	}

	// Few grants, over the wire.
	keys, denied, err := narrow.OverlayKeys(ctx, "a", "b")
	if err != nil || len(keys) != 1 || !keys[0].Key.Equal(crypto.OverlayKey(m.root, "a", 1)) || !slices.Equal(denied, []string{"b"}) {
		t.Errorf("OverlayKeys = %v, %v, %v", keys, denied, err)
	}
	csr := must[[]byte](t)(crypto.NewRequest(narrow.key, "admin"))
	for what, err := range map[string]error{
		"wider token": second(narrow.CreateToken(ctx, with("*"))), "another token": second(narrow.CreateToken(ctx, with("b"))),
		"another's renewal": third(narrow.Renew(ctx, csr)), "revocation": second(narrow.Revoke(ctx, "admin")),
		"removal": second(narrow.Remove(ctx, "admin")), "key of b": second(narrow.RotateOverlay(ctx, "b")), "gossip keys": second(narrow.RotateGossip(ctx)),
	} {
		if !errors.Is(err, peer.ErrDenied) {
			t.Errorf("%s: %v", what, err)
		}
	}
	issued, roots, err := narrow.Renew(ctx, must[[]byte](t)(crypto.NewRequest(narrow.key, "narrow")))
	if err != nil {
		t.Fatal(err)
	}
	id, err := crypto.NewIdentity(narrow.key, issued, roots, time.Now())
	if err != nil || id.Certificate().Overlays.String() != "a" {
		t.Errorf("renewed: %v, %v", id, err)
	}

	// A name is one machine's.
	other := m.node("other", nil, nil)
	if _, err := other.Join(ctx, s.token(with("*")), must[[]byte](t)(crypto.NewRequest(other.key, "narrow"))); !errors.Is(err, peer.ErrNameTaken) {
		t.Errorf("another machine as narrow: %v", err)
	}
	delete(m.nodes, "other")

	// Revoked: gone everywhere, and without the new key, when Revoke returns.
	begin := time.Now()
	out, err := admin.Revoke(ctx, "bad")
	if err != nil || len(out.Unreached) != 0 || out.KeysPending {
		t.Fatalf("Revoke = %+v, %v", out, err)
	}
	t.Logf("revoked in %v", time.Since(begin))
	old := bad.ring.Load()
	for name, n := range m.nodes {
		if name == "bad" || name == "k1" {
			continue
		}
		if r := n.ring.Load(); r.Epoch != 4 || len(r.Keys()) != 1 || r.Primary.Equal(old.Primary) {
			t.Errorf("%s has a ring of epoch %d with %d keys", name, r.Epoch, len(r.Keys()))
		}
		for _, c := range n.Conns() {
			if c.Peer == "bad" {
				t.Errorf("%s still has a connection to bad", name)
			}
		}
	}
	if err := bad.pull(ctx); err == nil {
		t.Error("the revoked node pulled the cluster's state")
	}
	if _, err := bad.Whoami(ctx, "narrow"); err == nil {
		t.Error("the revoked node is answered")
	}
	if _, err := k1.Endpoint.Ask(ctx, keeper.SubState, nil); err == nil {
		t.Error("a keeper asks itself over the network")
	}
	if all, err := admin.Nodes(ctx); err != nil || len(all) != 4 || all[1].Name != "bad" || all[1].Revoked.IsZero() {
		t.Errorf("Nodes = %+v, %v", all, err)
	}
}

func second[T any](_ T, err error) error        { return err }
func third[T, U any](_ T, _ U, err error) error { return err }
