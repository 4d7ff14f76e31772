// Package keeper answers for the cluster: it admits nodes, knows whose each name is, and takes identities back.
//
//	a machine ──token──▶ Join ──┐
//	a node ──Client──▶ serve ───┼──▶ Store.Update(Ledger); Shared: definitions, leases
//	the operator ──Client───────┘        │
//	                                     └──▶ Push: nodes pull State; GossipRing: Stage, Promote, Retire
//
// What a cluster knows of itself is one Ledger in a Store that all keepers
// share; each change of it is one transaction, in which the asker's rights are
// looked at again, so several keepers may work at once. The CA's key and the root
// secret are each keeper's own and never in the Ledger; nor are gossip keys.
// Shared overlays and who leases which addresses are in a store.Store, in
// transactions of their own: an asker's rights are those of when it asked.
//
// An asker's rights are those that its certificate and its record both allow.
// One with the grant `*`, or a keeper, is an administrator. Others may make,
// list and remove tokens within their grants, ask for the keys, the definitions
// and the addresses of overlays that they are granted, lease addresses of those
// in their own name, change the key of those that their grants name in full,
// renew their own certificate, and nothing else.
//
// The package opens no connection and keeps no file. It does not know who is
// reachable. Every name that is granted has a key, whether or not there is a
// shared overlay of the name: static ones are not defined here.
package keeper

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
	"github.com/tulle-net/tulle/ipam"
	"github.com/tulle-net/tulle/peer"
	"github.com/tulle-net/tulle/store"
)

const (
	// sweepEvery is how often a keeper looks for what is over or was left undone.
	sweepEvery = 30 * time.Second
	// pushTimeout bounds the wait for nodes to pull what changed.
	pushTimeout = 2 * time.Second
	// changeTimeout bounds what follows a change that is in the store: pushing
	// it, and changing the gossip keys. It is longer than all the pushes of that.
	changeTimeout = 15 * time.Second
)

// Store keeps a cluster's Ledger for all of its keepers. It is safe for
// concurrent use.
type Store interface {
	// Read returns the Ledger with whatever any keeper's Update that has
	// returned wrote. The caller may keep it and must not change it.
	Read(ctx context.Context) (*Ledger, error)
	// Update calls f with a Ledger that f may change, and writes it if nobody
	// changed the stored one since; else again, so f has no other effect. It is
	// all or nothing, and durable when Update returns nil. An error of f ends
	// it, writes nothing, and comes back so that errors.Is and As find it.
	Update(ctx context.Context, f func(*Ledger) error) error
}

// Config of New. All but Log, Now and Changed must be given.
type Config struct {
	// Name of this node, as in its certificate.
	Name string
	// CA signs what nodes show; Roots are whom they believe, CA's among them: as
	// long as the CA was never changed. Since then the Ledger says it.
	CA    *crypto.CA
	Roots *crypto.Roots
	// CAs returns the CA of that fingerprint; nil: this node has not its key. KeepCA
	// keeps one beside the one that signs, durably. Nil: only CA is there, and
	// cannot be changed.
	CAs    func(crypto.Fingerprint) *crypto.CA
	KeepCA func(*crypto.CA) error
	// Root is the root secret, from which overlay keys are derived.
	Root  crypto.Key
	Store Store
	// Shared holds the shared overlays and their addresses; nil: this keeper
	// has none, and says that it is unavailable.
	Shared store.Store
	// Grace is how long a node that is away keeps its addresses; default 24 h.
	Grace time.Duration
	// Alive reports whether gossip shows a member to be there; nil: all are.
	Alive func(name string) bool
	// Away reports whether gossip shows that a member failed or left; nil: none is.
	Away func(name string) bool
	// Quorum is who takes part in the store; nil: it is external.
	Quorum Quorum
	// Retired is called when the ledger says that this node is no keeper any more;
	// it must not block. Nil: nobody wants to know.
	Retired func()
	// Tell asks a node, this one included; nil: nobody can be reached.
	Tell func(ctx context.Context, node string, k peer.Kind, payload []byte) ([]byte, error)
	// Members are some nodes to begin with, the keepers first; a machine that
	// joins is told the first 256, a node 4,096.
	Members func() []peer.Member
	// Addrs are the keepers' data addresses, for tokens; the first 8 are used.
	Addrs func() []netip.AddrPort
	// Ring returns the gossip keys that this node uses, never nil.
	Ring func() *crypto.GossipRing
	// SetRing keeps a ring with a higher epoch, durably, and then makes this
	// node use it.
	SetRing func(*crypto.GossipRing) error
	// Push tells every node that is there, but for those of except, to pull
	// the cluster's state from this keeper at once: another may not have the
	// ring yet. It returns when all have done it or ctx has ended (2 s), with
	// the names of those that did not. Several calls may be under way.
	Push func(ctx context.Context, except []string) (unreached []string)
	// Changed is called after a change of the Ledger by this keeper, from any
	// goroutine; it must not block. Default: nothing.
	Changed func()
	// Now is the time that is believed; default time.Now.
	Now func() time.Time
	// Log takes changes and what an operator should know; default none.
	Log *slog.Logger
}

// Stats counts since the start.
type Stats struct {
	// Joins are certificates for machines that joined; JoinsRefused the others.
	Joins, JoinsRefused atomic.Uint64
	// Requests of nodes; RequestsRefused are those that got an error.
	Requests, RequestsRefused atomic.Uint64
	// Rotations are changes of the gossip keys that were completed.
	Rotations atomic.Uint64
}

// Keeper answers for the cluster. It is safe for concurrent use.
type Keeper struct {
	cfg   Config
	stats Stats
	// revoked is the list that was read last.
	revoked atomic.Pointer[readList]
	// believed are the CA certificates that were read last.
	believed atomic.Pointer[readRoots]
	// rotating has room for the one who changes the gossip keys, changing for the
	// one who begins to change the CA.
	rotating, changing chan struct{}
	// resume is rung when there may be more to do of a change of the CA; pushed is
	// what came of its last push.
	resume   chan struct{}
	pushed   atomic.Pointer[pushedCA]
	pace     *pace // of changes of the ledger
	leasing  *pace // of requests about addresses
	joining  *pace // of joins, see paced
	shared   catalogue
	registry *ipam.Registry // nil: no Shared

	ctx    context.Context
	cancel context.CancelFunc
}

var _ peer.Joiner = (*Keeper)(nil)

// New makes a Keeper, which answers at once: give it to peer.Config.Joiner, and
// call Handle. Run does what nobody asks for.
func New(cfg Config) (*Keeper, error) {
	var faults []error
	missing := func(absent bool, what string) {
		if absent {
			faults = append(faults, fmt.Errorf("keeper: no %s is given", what))
		}
	}
	missing(cfg.CA == nil, "CA")
	missing(cfg.Roots == nil, "CA certificates")
	missing(cfg.Root.IsZero(), "root secret")
	missing(cfg.Store == nil, "store")
	missing(cfg.Members == nil, "function for members")
	missing(cfg.Addrs == nil, "function for keepers' addresses")
	missing(cfg.Ring == nil || cfg.SetRing == nil, "functions for the gossip keys")
	missing(cfg.Push == nil, "function to push with")
	if err := crypto.CheckName(cfg.Name); err != nil {
		faults = append(faults, fmt.Errorf("keeper: %w", err))
	}
	if cfg.CA != nil && cfg.Roots != nil && cfg.CA.Cluster() != cfg.Roots.Cluster() {
		faults = append(faults, fmt.Errorf("keeper: the CA is %w: %s, not %s", crypto.ErrOtherCluster, cfg.CA.Cluster(), cfg.Roots.Cluster()))
	}
	if err := errors.Join(faults...); err != nil {
		return nil, err
	}
	if cfg.Changed == nil {
		cfg.Changed = func() {}
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	k := &Keeper{
		cfg: cfg, rotating: make(chan struct{}, 1), changing: make(chan struct{}, 1), resume: make(chan struct{}, 1),
		pace: newPace(paceBurst, paceEvery), leasing: newPace(leaseBurst, leaseEvery), joining: newPace(joinBurst, joinEvery),
	}
	k.shared.init()
	if err := k.makeRegistry(); err != nil {
		return nil, err
	}
	k.ctx, k.cancel = context.WithCancel(context.Background())
	return k, nil
}

// Stats returns the counters.
func (k *Keeper) Stats() *Stats { return &k.stats }

// Run sweeps out what is over and completes changes of the gossip keys and of the
// CA that were left undone, until ctx ends; what a request has begun ends then, too. It
// returns nil and must be called once.
func (k *Keeper) Run(ctx context.Context) error {
	defer k.cancel()
	var following sync.WaitGroup
	defer following.Wait()
	if k.cfg.Shared != nil {
		following.Go(func() {
			_ = k.cfg.Shared.Follow(ctx, store.KindOverlay+"/", func(c store.Change) { // returns nil
				k.shared.take(c)
				k.cfg.Changed()
			})
		})
		following.Go(func() { k.reclaim(ctx) })
	}
	if k.cfg.KeepCA != nil {
		following.Go(func() { k.completeCA(ctx) })
	}
	tick := time.NewTicker(sweepEvery)
	defer tick.Stop()
	for {
		if err := k.sweep(ctx); err != nil && ctx.Err() == nil {
			k.cfg.Log.Warn("keeper: cannot complete what was begun; will try again", "err", err)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

// sweep does one round of Run.
func (k *Keeper) sweep(ctx context.Context) error {
	l, err := k.cfg.Store.Read(ctx)
	if err != nil {
		return fmt.Errorf("keeper: read the ledger: %w", err)
	}
	if self, listed := l.Nodes[k.cfg.Name]; listed && !self.Keeper && k.cfg.Retired != nil {
		k.cfg.Retired() // while it was away
		return nil
	}
	if l.overdue(k.now()) {
		err := k.cfg.Store.Update(ctx, func(l *Ledger) error {
			l.sweep(k.now())
			return nil
		})
		if err != nil {
			return fmt.Errorf("keeper: sweep tokens: %w", err)
		}
	}
	if l.Gossip.Wanted > l.Gossip.Done {
		ctx, cancel := context.WithTimeout(ctx, changeTimeout)
		defer cancel()
		_, err := k.rotate(ctx, l.Gossip.Wanted, nil)
		if errors.Is(err, peer.ErrBusy) {
			return nil // another keeper does it
		}
		return err
	}
	return nil
}

// now is the time as it stands in the Ledger: whole seconds.
func (k *Keeper) now() time.Time { return k.cfg.Now().UTC().Truncate(time.Second) }

// detached is a context for what has to follow a change, whether or not the
// asker still waits; it ends when the keeper does.
func (k *Keeper) detached(ctx context.Context) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), changeTimeout)
	stop := context.AfterFunc(k.ctx, cancel)
	return ctx, func() { stop(); cancel() }
}

// push has nodes pull the state.
func (k *Keeper) push(ctx context.Context, except []string) []string {
	ctx, cancel := context.WithTimeout(ctx, pushTimeout)
	defer cancel()
	return k.cfg.Push(ctx, except)
}
