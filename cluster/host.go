package cluster

import (
	"context"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/tulle-net/tulle/crypto"
	"github.com/tulle-net/tulle/keeper"
	"github.com/tulle-net/tulle/peer"
	"github.com/tulle-net/tulle/store"
)

// maxPushes are under way at once.
const maxPushes = 64

// HoldsCA reports whether this node can answer for the cluster: it has the CA's
// key and the root secret.
func (p *Place) HoldsCA() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.state != nil && p.state.Files[crypto.FileCAKey] != nil
}

// Keeping is what a keeper answers from.
type Keeping struct {
	Store store.Store
	// Quorum is who takes part in it; nil: it is external.
	Quorum keeper.Quorum
	// Grace is how long a node that is away keeps its addresses; 0: the default.
	Grace time.Duration
	// Retired is called when the keepers' ledger says that this node is none any
	// more; it must not block. Nil: nobody wants to know.
	Retired func()
}

// Founding reports whether this node is the first of a cluster that is not in a
// store yet.
func (p *Place) Founding() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.state != nil && p.state.Files[fileLedger] != nil
}

// Keep makes this node answer for the cluster. The first node of a cluster
// writes its first ledger, for which the store must be available; any other
// keeper needs nothing of it yet.
func (p *Place) Keep(ctx context.Context, from Keeping) error {
	if err := p.found(ctx, from.Store); err != nil {
		return err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	ca, err := p.state.CA()
	if err != nil {
		return err
	}
	root, err := p.state.Key(crypto.FileRootSecret)
	if err != nil {
		return err
	}
	st := keeper.Patient(from.Store)
	k, err := keeper.New(keeper.Config{
		Name: p.cfg.Name, CA: ca, CAs: p.caOf, KeepCA: p.keepCA, Roots: p.identity.Load().Roots(), Root: root, Store: keeper.InStore(st), Shared: st, Quorum: from.Quorum, Tell: p.tell, Alive: p.alive, Away: p.away, Grace: from.Grace, Retired: from.Retired,
		Members: p.membersToTell, Addrs: p.keeperAddrs, Ring: p.Ring, SetRing: p.setRing, Push: p.push,
		Now: p.Now, Log: p.cfg.Log,
	})
	if err != nil {
		return err
	}
	if err := p.takeName(ctx, k); err != nil {
		return err
	}
	p.answerAs(k)
	return nil
}

// alive reports whether gossip shows a node to be there.
func (p *Place) alive(name string) bool {
	p.membersMu.Lock()
	defer p.membersMu.Unlock()
	return p.members[name].Alive
}

// away reports whether gossip shows that a node failed or left. Of one that it
// does not know nothing is shown: this keeper may have started a moment ago.
func (p *Place) away(name string) bool {
	p.membersMu.Lock()
	defer p.membersMu.Unlock()
	m, known := p.members[name]
	return known && !m.Alive
}

// tell asks a node.
func (p *Place) tell(ctx context.Context, node string, k peer.Kind, payload []byte) ([]byte, error) {
	if node == p.cfg.Name {
		if p.cfg.Self == nil {
			return nil, peer.ErrUnavailable
		}
		return p.cfg.Self(ctx, k, payload)
	}
	return p.e.Request(ctx, node, k, payload)
}

// GoAlone makes this keeper the only one in the ledger.
func (p *Place) GoAlone(ctx context.Context) error {
	k := p.keeper.Load()
	if k == nil {
		return peer.ErrNotKeeper
	}
	return k.GoAlone(ctx)
}

// found writes a cluster's first ledger into the store; the state has it until then.
func (p *Place) found(ctx context.Context, st store.Store) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	seed := p.state.Files[fileLedger]
	if seed == nil {
		return nil
	}
	first, err := keeper.ParseLedger(seed)
	if err != nil {
		return err
	}
	if err := keeper.Found(ctx, st, first); err != nil {
		return err
	}
	return p.updateLocked(func(s *crypto.State) error { delete(s.Files, fileLedger); return nil })
}

// answerAs has k answer from now on; nil: this node is no keeper any more.
func (p *Place) answerAs(k *keeper.Keeper) {
	p.keeper.Store(k)
	if self := p.self.Load(); self != nil {
		p.SetSelf(*self)
	}
	ring(p.keeping)
}

// answer runs the keeper, while there is one, until ctx ends.
func (p *Place) answer(ctx context.Context) {
	for ctx.Err() == nil {
		run, cancel := context.WithCancel(ctx)
		var running sync.WaitGroup
		k := p.keeper.Load()
		if k != nil {
			running.Go(func() { _ = k.Run(run) }) // returns nil
		}
		for ctx.Err() == nil && p.keeper.Load() == k {
			select {
			case <-p.keeping:
			case <-ctx.Done():
			}
		}
		cancel()
		running.Wait()
	}
}

// Join implements peer.Joiner where this node is a keeper.
func (j joiner) Join(ctx context.Context, r peer.JoinRequest) (*peer.JoinResult, error) {
	return keeper.Answer(j.p.answering, func(k *keeper.Keeper) (*peer.JoinResult, error) { return k.Join(ctx, r) })
}

// joiner admits nodes as the keeper of now.
type joiner struct{ p *Place }

// Joiner admits nodes where this node is a keeper, and tells elsewhere that it is none.
func (p *Place) Joiner() peer.Joiner { return joiner{p} }

// SetSelf says where this node is, for tokens and for those that join.
func (p *Place) SetSelf(m peer.Member) {
	m.Name, m.Keeper = p.cfg.Name, p.IsKeeper()
	p.self.Store(&m)
}

func (p *Place) membersToTell() []peer.Member {
	list := p.known()
	if self := p.self.Load(); self != nil {
		list = append([]peer.Member{*self}, list...)
	}
	keeper.KeepersFirst(list)
	return list
}

func (p *Place) keeperAddrs() []netip.AddrPort {
	var out []netip.AddrPort
	for _, m := range p.membersToTell() {
		if m.Keeper && m.VTEP.IsValid() && !slices.Contains(out, m.VTEP) {
			out = append(out, m.VTEP)
		}
	}
	return out
}

// setRing keeps gossip keys that this keeper made, and uses them.
func (p *Place) setRing(g *crypto.GossipRing) error {
	p.mu.Lock()
	if g.Epoch <= p.ring.Load().Epoch {
		p.mu.Unlock()
		return nil
	}
	err := p.updateLocked(func(s *crypto.State) error { s.SetGossip(g); return nil })
	if err == nil {
		p.ring.Store(g)
	}
	p.mu.Unlock()
	if err == nil {
		p.TellRing()
	}
	return err
}

// TellRing calls OnRing with the gossip keys of now, if there are any. One call at
// a time, so that the last one has the newest: keys come from several sides at once.
func (p *Place) TellRing() {
	if p.cfg.OnRing == nil {
		return
	}
	p.telling.Lock()
	defer p.telling.Unlock()
	if g := p.ring.Load(); g != nil {
		p.cfg.OnRing(g)
	}
}

// push tells all nodes that are there to pull the state. This node first: it may
// have made a change that concerns itself.
func (p *Place) push(ctx context.Context, except []string) []string {
	unreached := []string{}
	if err := p.Refresh(ctx); err != nil {
		unreached = append(unreached, p.cfg.Name)
	}
	var names []string
	p.membersMu.Lock()
	for name, m := range p.members {
		if m.Alive && !slices.Contains(except, name) {
			names = append(names, name)
		}
	}
	p.membersMu.Unlock()
	var mu sync.Mutex
	var wg sync.WaitGroup
	slot := make(chan struct{}, maxPushes)
	wg.Go(func() { // beside the others, who do not wait for it
		if err := p.pullShared(ctx, p.client()); err != nil {
			p.cfg.Log.Debug("the shared overlays are not known here yet", "err", err)
		}
	})
	for _, name := range names {
		wg.Go(func() {
			select {
			case slot <- struct{}{}:
				defer func() { <-slot }()
			case <-ctx.Done():
			}
			if _, err := p.e.Request(ctx, name, peer.KindRefresh, nil); err != nil {
				p.cfg.Log.Debug("a node did not pull what is new", "peer", name, "err", err)
				mu.Lock()
				unreached = append(unreached, name)
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	p.keys.again()
	slices.Sort(unreached)
	return unreached
}

// TakeOffice keeps what makes this node a keeper: the CA's key and the root secret
// of the order, which is borrowed. Keep has it answer.
func (p *Place) TakeOffice(o keeper.KeepOrder) error {
	key, err := crypto.ParsePrivateKey(o.CAKey)
	if err != nil {
		return err
	}
	secret, err := crypto.KeyFrom(o.Root)
	if err != nil {
		return err
	}
	next, err := nextCA(o)
	if err != nil {
		return err
	}
	return p.update(func(s *crypto.State) error {
		delete(s.Files, crypto.FileNextCA) // of an earlier office
		if err := s.SetCAKey(key); err != nil {
			return err
		}
		s.SetKey(crypto.FileRootSecret, secret)
		if next != nil {
			return s.SetNextCA(next)
		}
		return nil
	})
}

// Resign has this node answer no more, although it has what makes a keeper.
func (p *Place) Resign() { p.answerAs(nil) }

// LeaveOffice has this node answer no more, and forgets what made it a keeper.
func (p *Place) LeaveOffice() error {
	p.answerAs(nil)
	return p.update(func(s *crypto.State) error {
		delete(s.Files, crypto.FileCAKey)
		delete(s.Files, crypto.FileNextCA)
		delete(s.Files, crypto.FileRootSecret)
		delete(s.Files, fileLedger)
		return nil
	})
}

// StoreCertificate makes what this keeper's member of the store at addr shows:
// certificate and key, and whom it believes, all PEM.
func (p *Place) StoreCertificate(addr netip.Addr) (certificate, key, roots []byte, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.state == nil {
		return nil, nil, nil, peer.ErrNoIdentity
	}
	ca, err := p.state.CA()
	if err != nil {
		return nil, nil, nil, err
	}
	certificate, key, err = ca.IssueStore(addr, p.Now())
	return certificate, key, p.identity.Load().Roots().PEM(), err
}
