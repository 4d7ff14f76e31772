// Package cluster keeps a node's place in its secure cluster: who it is, whom it believes, which keys it was given.
//
//	state folder ──New──▶ Place ──Create (first node), Join (token)──▶ identity, gossip keys, revocations
//	keeper ──Refresh, renewal, overlay keys──▶ Place ──▶ state folder, and whoever is told (Config.On…)
//
// On a keeper the Place also holds the CA's key and the root secret, and makes the
// keeper.Keeper that answers for the cluster from a store that it is given (Keep).
//
// All that a node must know to start again without a keeper is in the state
// folder: its identity, the gossip keys, the revocations, the keys of its
// overlays, the shared overlays' definitions, and where the others were. The
// package opens no socket and does not
// gossip; what it is told of members comes from there (SetMembers).
package cluster

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/tulle-net/tulle/crypto"
	"github.com/tulle-net/tulle/keeper"
	"github.com/tulle-net/tulle/peer"
)

// The files that this package adds to a crypto.State.
const (
	// fileLedger is a cluster's first ledger, until it is in the store.
	fileLedger   = "ledger"
	fileMembers  = "members"
	fileTokenKey = "token.key"
	// fileOverlayKey and the overlay's name: epoch (4) | key (32).
	fileOverlayKey = "overlay-key."
)

// Config of New.
type Config struct {
	Dir   *crypto.Dir
	Name  string
	Clock *crypto.Clock
	// The following are called when something has changed, from one goroutine or
	// another; they must not block for long, nor call Create, Join or Run. Nil: nobody is told.
	//
	// OnRing: the gossip keys. OnRevoked: the list of revocations. OnIdentity: the
	// certificate was renewed, or this node became a keeper or ceased to be one. OnKey: the key of an overlay is there, or of a newer
	// epoch, or was taken away.
	OnRing     func(*crypto.GossipRing)
	OnRevoked  func()
	OnIdentity func(*crypto.Identity)
	OnKey      func(overlay string)
	// Self answers what a keeper asks of a node where both are this one, which has
	// no connection to itself; nil: nothing.
	Self func(ctx context.Context, k peer.Kind, payload []byte) ([]byte, error)
	// OnShared: shared overlays are defined, changed or removed.
	OnShared func()
	// OnRoots: other CAs are believed than before.
	OnRoots func()
	// Log takes changes and what an operator should know; default none.
	Log *slog.Logger
}

// Member is another node, as gossip knows it.
type Member struct {
	peer.Member
	Alive bool
}

// Place is a node's place in a secure cluster. It is safe for concurrent use.
type Place struct {
	cfg Config
	e   *peer.Endpoint // from Serve on

	// mu serialises changes of the state, in memory and on disk.
	mu    sync.Mutex
	state *crypto.State // nil before Create or Join

	// reissued: the keepers' ledger does not know this certificate yet.
	reissued bool

	identity atomic.Pointer[crypto.Identity]
	revoked  atomic.Pointer[crypto.Revocations]
	ring     atomic.Pointer[crypto.GossipRing]
	keeper   atomic.Pointer[keeper.Keeper]
	keeping  chan struct{} // keeper is another
	telling  sync.Mutex    // one OnRing at a time

	ca ca // how far this node is in a change of the CA

	outcast            atomic.Bool // the keepers do not believe this node
	resetKey, tokenKey [32]byte

	membersMu  sync.Mutex
	members    map[string]Member
	seeds      []netip.AddrPort                        // see SetSeeds
	remembered []peer.Member                           // of the last run, and what keepers told
	addrs      atomic.Pointer[map[netip.Addr]struct{}] // of members that are there

	keys   keys
	shared shared

	self atomic.Pointer[peer.Member]
	bell chan struct{} // pull the state
}

// New loads the place of the node from its state folder. Without a state it has
// none: see Joined. A state of another node, damaged or half-written, is an
// error and nothing is changed. One whose certificate is over is an error that
// wraps crypto.ErrExpired, and the Place may Join again.
func New(cfg Config) (*Place, error) {
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	p := &Place{cfg: cfg, members: map[string]Member{}, bell: make(chan struct{}, 1), keeping: make(chan struct{}, 1)}
	p.keys.init()
	p.ca.bell = make(chan struct{}, 1)
	state, err := cfg.Dir.Load()
	switch {
	case errors.Is(err, crypto.ErrNoState):
		p.resetKey, p.tokenKey = [32]byte(crypto.NewKey().Bytes()), [32]byte(crypto.NewKey().Bytes())
		return p, nil
	case err != nil:
		return nil, err
	}
	if err := state.CheckNode(cfg.Name); err != nil {
		return nil, err
	}
	p.state = state
	return p, p.load()
}

// load takes everything from the state. Called before anybody else knows p.
func (p *Place) load() error {
	for _, k := range []struct {
		file string
		at   *[32]byte
	}{{crypto.FileResetKey, &p.resetKey}, {fileTokenKey, &p.tokenKey}} {
		key, err := p.state.Key(k.file)
		if err != nil {
			return err
		}
		*k.at = [32]byte(key.Bytes())
	}
	ring, err := p.state.Gossip()
	if err != nil {
		return err
	}
	revoked, err := p.state.Revocations()
	if err != nil {
		return err
	}
	p.ring.Store(ring)
	p.revoked.Store(revoked)
	p.loadMembers()
	p.ca.load(p.state)
	p.keys.load(p.state, p.cfg.Log)
	p.shared.load(p.state, p.cfg.Log)
	id, err := p.state.Identity(p.Now())
	if errors.Is(err, crypto.ErrExpired) && p.state.Files[crypto.FileCAKey] != nil {
		id, err = p.reissue()
	}
	if err != nil {
		return err
	}
	p.identity.Store(id)
	return nil
}

// reissue gives a keeper that was off until its certificate was over the next
// one: it has what signs it, and no other keeper may be there to ask. Called
// before anybody else knows p.
func (p *Place) reissue() (*crypto.Identity, error) {
	ca, err := p.state.CA()
	if err != nil {
		return nil, err
	}
	old, err := p.state.Lapsed()
	if err != nil {
		return nil, err
	}
	c := old.Certificate()
	if err := p.revoked.Load().Check(c.Name, c.Key, c.Serial); err != nil {
		return nil, err
	}
	csr, err := old.Renewal()
	if err != nil {
		return nil, err
	}
	issued, err := ca.Reissue(c, csr, p.Now())
	if err != nil {
		return nil, err
	}
	id, err := crypto.NewIdentity(old.Key(), issued, old.Roots(), p.Now())
	if err != nil {
		return nil, err
	}
	if err := p.updateLocked(func(s *crypto.State) error { s.SetIdentity(id); return nil }); err != nil {
		return nil, err
	}
	p.reissued = true
	p.cfg.Log.Warn("this keeper was off until its certificate was over, and has signed itself another", "until", id.Certificate().NotAfter)
	return id, nil
}

// Joined reports whether the node has an identity.
func (p *Place) Joined() bool { return p.identity.Load() != nil }

// Identity returns who the node is, nil before it has joined.
func (p *Place) Identity() *crypto.Identity { return p.identity.Load() }

// Revoked returns the list of those who are believed no longer; nil: none yet.
func (p *Place) Revoked() *crypto.Revocations { return p.revoked.Load() }

// Ring returns the gossip keys, nil before the node has joined.
func (p *Place) Ring() *crypto.GossipRing { return p.ring.Load() }

// Now returns the time that is believed.
func (p *Place) Now() time.Time { return p.cfg.Clock.Now() }

// ResetKey and TokenKey are for peer.Config.
func (p *Place) ResetKey() [32]byte { return p.resetKey }
func (p *Place) TokenKey() [32]byte { return p.tokenKey }

// IsKeeper reports whether this node answers for the cluster.
func (p *Place) IsKeeper() bool { return p.keeper.Load() != nil }

// Outcast reports whether the keepers said, when they were last asked, that they
// do not believe this node: it is revoked or removed.
func (p *Place) Outcast() bool { return p.outcast.Load() }

// Left reports whether the keepers, when they were last asked, showed certificates
// of a CA that this node does not know: it was replaced while this node was away,
// and nobody waited.
func (p *Place) Left() bool { return p.ca.left.Load() }

// CheckToken returns an error that wraps crypto.ErrOtherCluster if the token is of
// another cluster than the node is in already, or of a CA that the cluster got
// while the node was away.
func (p *Place) CheckToken(t *crypto.Token) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.state == nil {
		return nil
	}
	return p.state.CheckToken(t)
}

// Verify returns nil if a passport is believed now.
func (p *Place) Verify(pass *crypto.Passport) error {
	id := p.identity.Load()
	if id == nil {
		return peer.ErrNoIdentity
	}
	return pass.Verify(id.Roots(), p.Now(), p.revoked.Load())
}

// Sign completes a statement and returns this node's passport.
func (p *Place) Sign(s crypto.Statement) ([]byte, error) {
	id := p.identity.Load()
	if id == nil {
		return nil, peer.ErrNoIdentity
	}
	var err error
	if s.Sequence, err = p.cfg.Dir.NextSequence(p.Now()); err != nil {
		return nil, err
	}
	return id.Passport(s)
}

// Sequence returns a number above all that this node used before, in former runs
// and with another clock too.
func (p *Place) Sequence() (uint64, error) { return p.cfg.Dir.NextSequence(p.Now()) }

// update changes the state on disk, and then in memory: all or nothing.
func (p *Place) update(f func(*crypto.State) error) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.updateLocked(f)
}

func (p *Place) updateLocked(f func(*crypto.State) error) error {
	if p.state == nil {
		return peer.ErrNoIdentity
	}
	next := crypto.NewState(p.state.Cluster, p.state.Node)
	for name, b := range p.state.Files {
		next.Files[name] = b
	}
	if err := f(next); err != nil {
		return err
	}
	if err := p.cfg.Dir.Commit(next); err != nil {
		return err
	}
	for _, name := range []string{crypto.FileCAKey, crypto.FileNextCA} {
		if was, is := p.state.Files[name], next.Files[name]; len(was) > 0 && (len(is) == 0 || &was[0] != &is[0]) {
			clear(was) // the key of a CA that is gone
		}
	}
	p.state = next
	return nil
}

// begin makes s the first state, or one that replaces an identity.
func (p *Place) begin(s *crypto.State) error {
	reset, err := crypto.KeyFrom(p.resetKey[:])
	if err != nil {
		return err
	}
	token, err := crypto.KeyFrom(p.tokenKey[:])
	if err != nil {
		return err
	}
	s.SetKey(crypto.FileResetKey, reset)
	s.SetKey(fileTokenKey, token)
	if err := p.cfg.Dir.Commit(s); err != nil {
		return err
	}
	p.state = s
	return p.load()
}

// Create makes a cluster of which this node is the first member and, once it is
// given a store (Keep), keeper.
func (p *Place) Create() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.state != nil {
		return fmt.Errorf("cluster: this node is in cluster %s already", p.state.Cluster)
	}
	now := p.Now()
	ca, err := crypto.NewCA(crypto.NewCluster(), now)
	if err != nil {
		return err
	}
	roots, err := crypto.NewRoots(ca.DER())
	if err != nil {
		return err
	}
	key := crypto.NewPrivateKey()
	csr, err := crypto.NewRequest(key, p.cfg.Name)
	if err != nil {
		return err
	}
	issued, err := ca.Issue(csr, crypto.Rights{Overlays: crypto.Grants{"*"}, Keeper: true}, now)
	if err != nil {
		return err
	}
	id, err := crypto.NewIdentity(key, issued, roots, now)
	if err != nil {
		return err
	}
	ledger, err := keeper.NewLedger(id.Certificate()).Encode()
	if err != nil {
		return err
	}
	s := crypto.NewState(ca.Cluster(), p.cfg.Name)
	s.SetIdentity(id)
	s.SetCA(ca)
	s.SetKey(crypto.FileRootSecret, crypto.NewKey())
	s.SetGossip(crypto.NewGossipRing())
	s.Files[fileLedger] = ledger
	if err := p.begin(s); err != nil {
		return err
	}
	p.cfg.Log.Info("this node is the first of a new cluster, and its keeper", "cluster", s.Cluster)
	return nil
}

func ring(bell chan struct{}) {
	select {
	case bell <- struct{}{}:
	default:
	}
}
