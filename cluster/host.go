package cluster

import (
	"context"
	"errors"
	"net/netip"
	"slices"
	"sync"

	"github.com/tulle-net/tulle/crypto"
	"github.com/tulle-net/tulle/keeper"
	"github.com/tulle-net/tulle/peer"
)

// maxPushes are under way at once.
const maxPushes = 64

// makeKeeper makes the part that answers for the cluster, if the state has what
// it takes. Called before anybody else knows p.
func (p *Place) makeKeeper() error {
	ca, err := p.state.CA()
	if errors.Is(err, crypto.ErrNotKeeper) {
		return nil
	}
	if err != nil {
		return err
	}
	root, err := p.state.Key(crypto.FileRootSecret)
	if err != nil {
		return err
	}
	k, err := keeper.New(keeper.Config{
		Name: p.cfg.Name, CA: ca, Roots: p.identity.Load().Roots(), Root: root, Store: ledgerStore{p},
		Members: p.membersToTell, Addrs: p.keeperAddrs, Ring: p.Ring, SetRing: p.setRing, Push: p.push,
		Now: p.Now, Log: p.cfg.Log,
	})
	if err != nil {
		return err
	}
	p.keeper.Store(k)
	return nil
}

// Joiner admits nodes where this node is a keeper; nil elsewhere.
func (p *Place) Joiner() peer.Joiner {
	if k := p.keeper.Load(); k != nil {
		return k
	}
	return nil
}

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
	keepersFirst(list)
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

// ledgerStore keeps the ledger in the state folder of the one keeper.
type ledgerStore struct{ p *Place }

var errNoLedger = errors.New("cluster: this keeper's state has no ledger: restore the folder from a backup")

func (l ledgerStore) Read(context.Context) (*keeper.Ledger, error) {
	l.p.mu.Lock()
	defer l.p.mu.Unlock()
	return l.parse()
}

// parse returns the ledger of the state, which is read once for each change.
func (l ledgerStore) parse() (*keeper.Ledger, error) {
	if l.p.state == nil || l.p.state.Files[fileLedger] == nil {
		return nil, errNoLedger
	}
	if l.p.ledger == nil {
		var err error
		if l.p.ledger, err = keeper.ParseLedger(l.p.state.Files[fileLedger]); err != nil {
			return nil, err
		}
	}
	return l.p.ledger, nil
}

func (l ledgerStore) Update(_ context.Context, f func(*keeper.Ledger) error) error {
	l.p.mu.Lock()
	defer l.p.mu.Unlock()
	old, err := l.parse()
	if err != nil {
		return err
	}
	next := old.Clone()
	if err := f(next); err != nil {
		return err
	}
	b, err := next.Encode()
	if err != nil {
		return err
	}
	if err := l.p.updateLocked(func(s *crypto.State) error { s.Files[fileLedger] = b; return nil }); err != nil {
		return err
	}
	l.p.ledger = next
	return nil
}
