package cluster

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/tulle-net/tulle/crypto"
	"github.com/tulle-net/tulle/keeper"
	"github.com/tulle-net/tulle/peer"
	"github.com/tulle-net/tulle/peer/peertest"
	"github.com/tulle-net/tulle/store/storetest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// site is a network of machines with state folders.
type site struct {
	t     *testing.T
	net   *peertest.Net
	dirs  map[string]string
	nodes map[string]*machine
	store *storetest.Memory
	hold  atomic.Uint64 // the change of the CA with which no member of the store starts
}

// machine is one that runs.
type machine struct {
	*Place
	e       *peer.Endpoint
	cancel  context.CancelFunc
	done    chan struct{}
	rings   atomic.Int32
	revokes atomic.Int32
	told    atomic.Int32 // keys
	member  member
}

func newSite(t *testing.T) *site {
	return &site{t: t, net: peertest.NewNet(1), dirs: map[string]string{}, nodes: map[string]*machine{}, store: storetest.New()}
}

func addrOf(name string) netip.AddrPort {
	return netip.AddrPortFrom(netip.AddrFrom4([4]byte{192, 0, 2, name[len(name)-1] - '0'}), 4789)
}

// open makes a machine of the name, with what its folder holds, but does not run it.
func (s *site) open(name string) (*machine, error) {
	s.t.Helper()
	if s.dirs[name] == "" {
		s.dirs[name] = filepath.Join(s.t.TempDir(), name)
	}
	dir, err := crypto.OpenDir(s.dirs[name])
	if err != nil {
		s.t.Fatal(err)
	}
	m := &machine{done: make(chan struct{})}
	m.Place, err = New(Config{
		Dir: dir, Name: name, Clock: crypto.NewClock(crypto.BuildTime()),
		OnRing: func(*crypto.GossipRing) { m.rings.Add(1) }, OnRevoked: func() { m.revokes.Add(1) },
		OnKey: func(string) { m.told.Add(1) },
		Self:  func(_ context.Context, _ peer.Kind, payload []byte) ([]byte, error) { return s.order(m, payload, true) },
	})
	return m, err
}

// connect gives it an endpoint; create makes a first node.
func (s *site) connect(name string, m *machine, create bool) {
	s.t.Helper()
	if create && !m.Joined() {
		if err := m.Create(); err != nil {
			s.t.Fatal(err)
		}
	}
	if m.HoldsCA() {
		if err := m.Keep(s.t.Context(), Keeping{Store: s.store}); err != nil {
			s.t.Fatal(err)
		}
	}
	m.SetSelf(peer.Member{VTEP: addrOf(name), Gossip: netip.AddrPortFrom(addrOf(name).Addr(), 7946)})
	var e atomic.Pointer[peer.Endpoint]
	send := s.net.Attach(addrOf(name), func(from netip.AddrPort, d []byte) {
		if e := e.Load(); e != nil {
			e.Deliver(from, d)
		}
	})
	var err error
	m.e, err = peer.New(peer.Config{
		Identity: m.Identity(), Revoked: m.Revoked, Send: send, Resolve: m.Resolve, Keepers: m.Keepers, Known: m.Known,
		ResetKey: m.ResetKey(), TokenKey: m.TokenKey(), Joiner: m.Joiner(), Version: "test", Now: m.Now,
	})
	if err != nil {
		s.t.Fatal(err)
	}
	e.Store(m.e)
	m.Serve(m.e)
	m.e.Handle(peer.KindKeep, 16<<10, func(_ context.Context, from peer.Peer, payload []byte) ([]byte, error) {
		if err := keeper.CheckKeep(from); err != nil {
			return nil, err
		}
		return s.order(m, payload, false)
	})
	s.nodes[name] = m
	s.t.Cleanup(func() { s.stop(name) })
}

// run runs it, and lets all that run know each other.
func (s *site) run(name string) {
	ctx, cancel := context.WithCancel(context.Background())
	m := s.nodes[name]
	m.cancel = cancel
	go func() { m.Run(ctx); close(m.done) }()
	s.meet()
}

func (s *site) meet() {
	for name, m := range s.nodes {
		var list []Member
		for other, o := range s.nodes {
			if other != name && o.Joined() {
				list = append(list, Member{Member: peer.Member{Name: other, VTEP: addrOf(other), Gossip: addrOf(other), Keeper: o.IsKeeper()}, Alive: true})
			}
		}
		m.SetMembers(list)
	}
}

func (s *site) stop(name string) {
	m := s.nodes[name]
	if m == nil {
		return
	}
	delete(s.nodes, name)
	if m.cancel != nil {
		m.cancel()
		<-m.done
	}
	s.net.Attach(addrOf(name), nil)
	if err := m.e.Close(); err != nil {
		s.t.Error(err)
	}
	s.meet()
}

// start opens, connects and runs a machine that is a member, or the first.
func (s *site) start(name string) *machine {
	s.t.Helper()
	m, err := s.open(name)
	if err != nil {
		s.t.Fatal(err)
	}
	s.connect(name, m, len(s.nodes) == 0)
	s.run(name)
	return m
}

func within(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	t.Cleanup(cancel)
	return ctx
}

// token makes one with these grants.
func (s *site) token(by *machine, uses int, overlays ...string) *crypto.Token {
	s.t.Helper()
	grants, err := crypto.ParseGrants(overlays...)
	if err != nil {
		s.t.Fatal(err)
	}
	text, err := by.Client().CreateToken(within(s.t), crypto.TokenOptions{TTL: time.Hour, Uses: uses, Overlays: grants, Name: "*"})
	if err != nil {
		s.t.Fatal(err)
	}
	t, err := crypto.ParseToken(text)
	if err != nil {
		s.t.Fatal(err)
	}
	return t
}

// join has a new machine join with the token.
func (s *site) join(name string, t *crypto.Token) *machine {
	s.t.Helper()
	m, err := s.open(name)
	if err != nil {
		s.t.Fatal(err)
	}
	s.connect(name, m, false)
	if err := m.Join(within(s.t), t, false); err != nil {
		s.t.Fatal(err)
	}
	s.run(name)
	return m
}

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); !ok(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("still not: %s", what)
		}
	}
}

// A first node, two that join, all of them restarted: everybody is who they were, with the same keys.
func TestCreateJoinRestart(t *testing.T) {
	s := newSite(t)
	a := s.start("n1")
	if !a.IsKeeper() || a.Ring().Epoch != 1 || a.Revoked() != nil {
		t.Fatalf("a first node: keeper %v, ring %d, revocations %v", a.IsKeeper(), a.Ring().Epoch, a.Revoked())
	}
	tok := s.token(a, 2, "*")
	b := s.join("n2", tok)
	s.join("n3", tok)
	if b.IsKeeper() || b.Identity().Certificate().Cluster != a.Identity().Certificate().Cluster || !slices.Equal(b.Keepers(), []string{"n1"}) {
		t.Errorf("a node that joined: keeper %v, cluster %s, keepers %v", b.IsKeeper(), b.Identity().Certificate().Cluster, b.Keepers())
	}
	a.Want("blue")
	b.Want("blue", "red")
	eventually(t, "keys", func() bool {
		_, x := a.Key("blue")
		_, y := b.Key("blue")
		_, z := b.Key("red")
		return x && y && z
	})
	ka, _ := a.Key("blue")
	kb, _ := b.Key("blue")
	red, _ := b.Key("red")
	if !ka.Key.Equal(kb.Key) || ka.Epoch != 1 || ka.Key.Equal(red.Key) {
		t.Error("two nodes have two keys of one overlay, or one key of two")
	}
	if _, ok := a.Key("red"); ok {
		t.Error("a key that is not wanted")
	}
	serial := b.Identity().Certificate().Serial
	ring := b.Ring().Primary
	for _, name := range []string{"n3", "n2", "n1"} { // no keeper at the end
		s.stop(name)
	}
	b, err := s.open("n2")
	if err != nil {
		t.Fatal(err)
	}
	if !b.Joined() || b.Identity().Certificate().Serial != serial || !b.Ring().Primary.Equal(ring) || len(b.Resolve("n1")) == 0 || !slices.Equal(b.Keepers(), []string{"n1"}) {
		t.Errorf("after a restart: joined %v, n1 at %v, keepers %v", b.Joined(), b.Resolve("n1"), b.Keepers())
	}
	b.Want("blue")
	if k, ok := b.Key("blue"); !ok || !k.Key.Equal(kb.Key) {
		t.Error("the overlay's key does not outlive a restart without a keeper")
	}
	if _, err := New(Config{Dir: must(crypto.OpenDir(s.dirs["n2"])), Name: "other", Clock: crypto.NewClock()}); !errors.Is(err, crypto.ErrOtherName) {
		t.Errorf("another name on the folder: %v", err)
	}
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

// Sequences only grow, over restarts too.
func TestSequence(t *testing.T) {
	s := newSite(t)
	last := uint64(0)
	for range 2 {
		m := s.start("n1")
		for range 3 {
			n, err := m.Sequence()
			if err != nil || n <= last {
				t.Fatalf("Sequence() = %d, %v, want more than %d", n, err, last)
			}
			last = n
		}
		s.stop("n1")
	}
}

// A node that is killed as soon as it has joined finds a keeper when it is back.
func TestKilledAfterJoin(t *testing.T) {
	s := newSite(t)
	a := s.start("n1")
	tok := s.token(a, 1, "*")
	b, err := s.open("n2")
	if err != nil {
		t.Fatal(err)
	}
	s.connect("n2", b, false)
	if err := b.Join(within(t), tok, false); err != nil {
		t.Fatal(err)
	}
	back, err := s.open("n2") // what b, which did not run, left in the folder
	if err != nil {
		t.Fatal(err)
	}
	if !back.Joined() || !slices.Equal(back.Keepers(), []string{"n1"}) || !slices.Equal(back.Resolve("n1"), []netip.AddrPort{addrOf("n1")}) {
		t.Errorf("joined %v, keepers %v, n1 at %v", back.Joined(), back.Keepers(), back.Resolve("n1"))
	}
}

// A node that is killed before it has written what the keeper gave joins as the
// same node, by the same token.
func TestKilledWhileJoining(t *testing.T) {
	s := newSite(t)
	tok := s.token(s.start("n1"), 1, "*")
	b, err := s.open("n2")
	if err != nil {
		t.Fatal(err)
	}
	s.connect("n2", b, false)
	key, err := b.joiningKey(false)
	if err != nil {
		t.Fatal(err)
	}
	csr, err := crypto.NewRequest(key, "n2")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := b.e.Join(within(t), tok, csr); err != nil { // and nothing is written
		t.Fatal(err)
	}
	s.stop("n2")
	if b = s.join("n2", tok); b.Identity().Key().PublicKey() != key.PublicKey() {
		t.Error("another key")
	}
	if _, err := os.Stat(filepath.Join(s.dirs["n2"], "joining.key")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the key stays beside the state: %v", err)
	}
}

// The one keeper was off for longer than a certificate lasts: it goes on, and so
// do those who join again.
func TestKeeperAwayForTooLong(t *testing.T) {
	s := newSite(t)
	a := s.start("n1")
	key := a.Identity().Key().PublicKey()
	s.join("n2", s.token(a, 1, "*"))
	s.stop("n2")
	s.stop("n1")
	later := crypto.NewClock(time.Now().Add(40 * 24 * time.Hour))
	back := func(name string) (*Place, error) {
		return New(Config{Dir: must(crypto.OpenDir(s.dirs[name])), Name: name, Clock: later})
	}
	p, err := back("n1")
	if err != nil {
		t.Fatal(err)
	}
	c := p.Identity().Certificate()
	if !p.HoldsCA() || c.Key != key || !c.Keeper || !c.NotAfter.After(later.Now()) || !p.reissued {
		t.Errorf("holds the CA %v, certificate %+v", p.HoldsCA(), c)
	}
	if p, err = back("n1"); err != nil || p.Identity().Certificate().Serial != c.Serial {
		t.Errorf("once more: %v", err) // it was kept
	}
	if _, err := back("n2"); !errors.Is(err, crypto.ErrExpired) {
		t.Errorf("a node that is no keeper: %v, want ErrExpired", err)
	}
}

// A node with a narrow certificate gets no key beyond it, says so, and can make no wider token.
// TestFindWithoutKeeper: a node that starts while the keeper is away does not
// wait for it to find the others.
func TestFindWithoutKeeper(t *testing.T) {
	s := newSite(t)
	keeper := s.start("n1")
	token := s.token(keeper, 2, "*")
	s.join("n2", token)
	s.join("n3", token)
	s.meet()
	s.stop("n1")
	s.stop("n2")
	n2 := s.start("n2")
	start := time.Now()
	found := n2.Find(within(t))
	if took := time.Since(start); took > 3*time.Second { // a handshake is given 4 s
		t.Errorf("Find without a keeper took %v", took)
	}
	if !slices.ContainsFunc(found, func(a netip.AddrPort) bool { return a.Addr() == addrOf("n3").Addr() }) {
		t.Errorf("Find = %v, want n3's in it", found)
	}
}

func TestGrants(t *testing.T) {
	s := newSite(t)
	a := s.start("n1")
	b := s.join("n2", s.token(a, 1, "blue"))
	b.Want("blue", "red")
	eventually(t, "an answer", func() bool { _, ok := b.Key("blue"); return ok && len(b.Denied()) > 0 })
	if _, ok := b.Key("red"); ok || !slices.Equal(b.Denied(), []string{"red"}) {
		t.Errorf("denied %v, want red", b.Denied())
	}
	if _, err := b.Client().CreateToken(within(t), crypto.TokenOptions{TTL: time.Hour, Uses: 1, Overlays: crypto.Grants{"*"}, Name: "*"}); !errors.Is(err, peer.ErrDenied) {
		t.Errorf("a wider token: %v, want denied", err)
	}
	if _, err := b.Client().Revoke(within(t), "n1"); err == nil {
		t.Error("a narrow node revokes")
	}
	if err := b.Renew(within(t)); err != nil {
		t.Fatal(err)
	}
	if g := b.Identity().Certificate().Overlays; !slices.Equal(g, crypto.Grants{"blue"}) {
		t.Errorf("a renewal made the grants %v", g)
	}
	// The key goes with its grant.
	b.mu.Lock()
	defer b.mu.Unlock()
	for file := range b.state.Files {
		if strings.HasSuffix(file, ".red") {
			t.Errorf("the state has %s", file)
		}
	}
}

// A revocation reaches every node that is there within the push, and the others when they return.
func TestRevoke(t *testing.T) {
	s := newSite(t)
	a := s.start("n1")
	tok := s.token(a, 3, "*")
	b := s.join("n2", tok)
	s.join("n3", tok)
	d := s.join("n4", tok)
	if err := d.Refresh(within(t)); err != nil { // there is a connection
		t.Fatal(err)
	}
	s.stop("n3")
	old := d.Ring()
	start := time.Now()
	o, err := b.Client().Revoke(within(t), "n4")
	if err != nil || o.KeysPending {
		t.Fatal(o, err)
	}
	if took := time.Since(start); took > 5*time.Second {
		t.Errorf("it took %v", took)
	}
	if a.Revoked().Number() == 0 || b.Revoked().Number() != a.Revoked().Number() || b.revokes.Load() == 0 || b.rings.Load() == 0 {
		t.Errorf("revocations %d and %d", a.Revoked().Number(), b.Revoked().Number())
	}
	if a.Ring().Epoch <= old.Epoch || b.Ring().Epoch != a.Ring().Epoch || slices.ContainsFunc(a.Ring().Keys(), func(k []byte) bool { return string(k) == string(old.Primary.Bytes()) }) {
		t.Errorf("gossip keys: %d and %d after %d, or the old one is still read", a.Ring().Epoch, b.Ring().Epoch, old.Epoch)
	}
	if err := d.Refresh(within(t)); err == nil {
		t.Error("a revoked node gets the state")
	}
	if err := d.Believed(within(t)); err == nil {
		t.Error("a revoked node thinks that it is believed")
	}
	if d.Ring().Epoch != old.Epoch {
		t.Error("a revoked node has the new gossip keys")
	}
	d.Notice("n1", a.Extra()) // as gossip tells it
	eventually(t, "the revoked node says so", d.Outcast)
	back := s.start("n3")
	eventually(t, "the one that was away knows", func() bool {
		return back.Revoked().Number() == a.Revoked().Number() && back.Ring().Epoch == a.Ring().Epoch
	})
	// Removed, the machine joins anew, as another node with another key.
	if _, err := a.Client().Remove(within(t), "n4"); err != nil {
		t.Fatal(err)
	}
	key := d.Identity().Certificate().Key
	if err := d.Join(within(t), s.token(a, 1, "*"), true); err != nil {
		t.Fatal(err)
	}
	if d.Identity().Certificate().Key == key || d.Believed(within(t)) != nil {
		t.Error("it joined with its old key, or is not believed")
	}
}

// What another's passport says of its news is pulled.
func TestNotice(t *testing.T) {
	s := newSite(t)
	a := s.start("n1")
	b := s.join("n2", s.token(a, 1, "*"))
	b.SetMembers(nil)
	a.SetMembers(nil) // the push reaches nobody
	if _, err := a.Client().RotateGossip(within(t)); err != nil {
		t.Fatal(err)
	}
	if b.Ring().Epoch == a.Ring().Epoch {
		t.Fatal("the change came by itself")
	}
	b.Notice("n1", a.Extra())
	eventually(t, "the new ring", func() bool { return b.Ring().Epoch == a.Ring().Epoch })
	b.Notice("n1", []byte("short"))
}

// Whoever claims news all the time does not make the others ask all the time.
func TestClaims(t *testing.T) {
	s := newSite(t)
	a := s.start("n1")
	b := s.join("n2", s.token(a, 1, "*"))
	asked := a.keeper.Load().Stats()
	start, before := time.Now(), asked.Requests.Load()
	claim := slices.Repeat([]byte{0xff}, extraBytes)
	for time.Since(start) < 300*time.Millisecond {
		b.Notice("n3", claim)
		time.Sleep(time.Millisecond)
	}
	// Two of the start, n1's own too.
	if n := asked.Requests.Load() - before; n > 6 {
		t.Errorf("%d requests in %v", n, time.Since(start))
	}
}

// Files that this package adds, damaged: a key is asked for again, members are forgotten.
func TestDamagedExtras(t *testing.T) {
	s := newSite(t)
	a := s.start("n1")
	b := s.join("n2", s.token(a, 1, "*"))
	b.Want("blue")
	eventually(t, "a key", func() bool { _, ok := b.Key("blue"); return ok })
	s.stop("n2")
	dir := must(crypto.OpenDir(s.dirs["n2"]))
	state := must(dir.Load())
	state.Files[fileOverlayKey+"blue"] = []byte("short")
	state.Files[fileMembers] = []byte("{")
	if err := dir.Commit(state); err != nil {
		t.Fatal(err)
	}
	b = s.start("n2")
	b.Want("blue")
	eventually(t, "the key again", func() bool { _, ok := b.Key("blue"); return ok })
}

// A keeper is not replaced by joining.
func TestKeeperDoesNotJoin(t *testing.T) {
	s := newSite(t)
	a := s.start("n1")
	if err := a.Join(within(t), s.token(a, 1, "*"), true); !errors.Is(err, ErrKeeperRejoins) {
		t.Errorf("Join of a keeper: %v", err)
	}
}

// An overlay's next epoch reaches those who want it.
func TestRotateOverlay(t *testing.T) {
	s := newSite(t)
	a := s.start("n1")
	tok := s.token(a, 2, "*")
	b, c := s.join("n2", tok), s.join("n3", tok)
	for _, m := range []*machine{a, b} {
		m.Want("blue")
		eventually(t, "a key", func() bool { _, ok := m.Key("blue"); return ok })
	}
	told := b.told.Load()
	o, err := c.Client().RotateOverlay(within(t), "blue")
	if err != nil || o.Epoch != 2 {
		t.Fatal(o, err)
	}
	eventually(t, "epoch 2", func() bool {
		x, _ := a.Key("blue")
		y, _ := b.Key("blue")
		return x.Epoch == 2 && y.Epoch == 2 && x.Key.Equal(y.Key) && b.told.Load() > told
	})
}

// A node that was away while an overlay's key was changed asks for it when it is
// back, whether or not a peer that has it turns up.
func TestRotateOverlayAway(t *testing.T) {
	s := newSite(t)
	a := s.start("n1")
	b := s.join("n2", s.token(a, 1, "*"))
	b.Want("blue")
	eventually(t, "a key", func() bool { _, ok := b.Key("blue"); return ok })
	s.stop("n2")
	if _, err := a.Client().RotateOverlay(within(t), "blue"); err != nil {
		t.Fatal(err)
	}
	b = s.start("n2")
	b.Want("blue")
	eventually(t, "epoch 2", func() bool { k, _ := b.Key("blue"); return k.Epoch == 2 })
}

// What tells of a newer key while an older one is on its way is not forgotten
// with the answer.
func TestStaleMeanwhile(t *testing.T) {
	s := newSite(t)
	a := s.start("n1")
	b := s.join("n2", s.token(a, 1, "*"))
	b.cancel() // nobody else fetches
	<-b.done
	b.Want("blue")
	epoch := uint32(0)
	b.cfg.OnKey = func(overlay string) {
		k, _ := b.Key(overlay)
		epoch = k.Epoch
	}
	hold := context.WithoutCancel(within(t))
	requests := a.keeper.Load().Stats().Requests.Load()
	a.SetMembers(nil) // no push waits
	b.mu.Lock()       // the answer comes and waits for this
	fetched := make(chan error)
	go func() { fetched <- b.fetch(hold) }()
	eventually(t, "the request", func() bool { return a.keeper.Load().Stats().Requests.Load() > requests })
	if _, err := a.Client().RotateOverlay(within(t), "blue"); err != nil {
		t.Fatal(err)
	}
	b.Stale("blue")
	b.mu.Unlock()
	if err := <-fetched; err != nil {
		t.Fatal(err)
	}
	if err := b.fetch(hold); err != nil || epoch != 2 {
		t.Errorf("epoch %d (%v), want 2", epoch, err)
	}
}

// The folder of a node that is killed while it writes is that of before or after; and nothing in it can be read by others.
func TestModes(t *testing.T) {
	s := newSite(t)
	s.join("n2", s.token(s.start("n1"), 1, "*"))
	for name, dir := range s.dirs {
		for _, e := range must(os.ReadDir(dir)) {
			if i := must(e.Info()); i.Mode().Perm()&0o077 != 0 {
				t.Errorf("%s of %s has mode %v", e.Name(), name, i.Mode())
			}
		}
	}
	// No secret shows when a Place is printed by mistake.
	n1 := s.nodes["n1"]
	n1.mu.Lock() // it may be writing what it was told
	text := fmt.Sprintf("%+v %#v", n1.state, n1.Ring())
	n1.mu.Unlock()
	if strings.Contains(text, "PRIVATE KEY") {
		t.Error("a private key is printed")
	}
}
