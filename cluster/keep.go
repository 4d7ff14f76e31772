package cluster

import (
	"context"
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"github.com/tulle-net/tulle/crypto"
	"github.com/tulle-net/tulle/keeper"
	"github.com/tulle-net/tulle/peer"
)

const (
	// refreshEvery is how often a keeper is asked for news even if nothing tells of any.
	refreshEvery = 5 * time.Minute
	// newsEvery is the least time between two pulls because of what passports tell
	// of: any member can claim news, as often as it likes, to all nodes at once.
	newsEvery = time.Second
	// A request to the keepers that failed is made again after retryMin, doubled up to retryMax.
	retryMin = 200 * time.Millisecond
	retryMax = 30 * time.Second
	// saveEvery is how often members are kept, clockEvery the time: flash cards
	// wear out, and a write takes a while on them.
	saveEvery  = 10 * time.Second
	clockEvery = 10 * time.Minute
	// minRenew is the least time between two tries to renew the certificate.
	minRenew = time.Minute
	// extraBytes of a passport: revocations' number (8) | gossip keys' epoch (8) |
	// shared overlays' revision (8).
	extraBytes = 24
)

// Extra is what this node's passport says of its news: others that have less pull it.
func (p *Place) Extra() []byte {
	b := binary.BigEndian.AppendUint64(make([]byte, 0, extraBytes), p.revoked.Load().Number())
	b = binary.BigEndian.AppendUint64(b, p.ring.Load().Epoch)
	return binary.BigEndian.AppendUint64(b, p.shared.known())
}

// Notice takes what another's passport says of its news.
func (p *Place) Notice(member string, extra []byte) {
	if len(extra) < extraBytes {
		return
	}
	if binary.BigEndian.Uint64(extra) > p.revoked.Load().Number() || binary.BigEndian.Uint64(extra[8:]) > p.ring.Load().Epoch ||
		p.shared.notice(member, binary.BigEndian.Uint64(extra[16:])) {
		ring(p.bell)
	}
}

// client asks the keepers: first the one that is here.
func (p *Place) client() keeper.Client {
	if p.keeper.Load() == nil {
		return keeper.Client{Ask: p.e.Ask}
	}
	self := func() *crypto.Certificate { return p.identity.Load().Certificate() }
	return keeper.Client{Ask: func(ctx context.Context, sub uint16, body []byte) ([]byte, error) {
		b, err := keeper.Answer(p.answering, func(k *keeper.Keeper) ([]byte, error) { return k.Local(self).Ask(ctx, sub, body) })
		if errors.Is(err, peer.ErrUnavailable) && p.otherKeeper() && ctx.Err() == nil {
			if b, err := p.e.Ask(ctx, sub, body); err == nil {
				return b, nil
			}
		}
		return b, err
	}}
}

// Client asks a keeper in this node's name.
func (p *Place) Client() keeper.Client { return p.client() }

// Refresh pulls the cluster's state from a keeper, and the shared overlays.
func (p *Place) Refresh(ctx context.Context) error {
	if err := p.refresh(ctx, p.client()); err != nil {
		return err
	}
	return p.pullShared(ctx, p.client())
}

func (p *Place) refresh(ctx context.Context, c keeper.Client) error {
	if !p.Joined() {
		return peer.ErrNoIdentity
	}
	holds := p.holds()
	s, err := c.StateHolding(ctx, p.ring.Load().Epoch, p.revoked.Load().Number(), holds)
	if err != nil {
		return err
	}
	p.ca.told.Store(&holds)
	p.learn(s.Members)
	return p.apply(s)
}

// apply keeps what is newer, and then uses it.
func (p *Place) apply(s *keeper.State) error {
	var gossip *crypto.GossipRing
	var revoked *crypto.Revocations
	p.mu.Lock()
	id, before := p.identity.Load(), p.revoked.Load()
	next, err := p.believing(id, s)
	if err != nil {
		p.mu.Unlock()
		return err
	}
	if s.Ring != nil && s.Ring.Epoch > p.ring.Load().Epoch {
		gossip = s.Ring
	}
	if len(s.Revocations) > 0 {
		r, err := next.Roots().ParseRevocations(s.Revocations)
		if err != nil {
			p.mu.Unlock()
			return err
		}
		if r.Number() > p.revoked.Load().Number() {
			revoked = r
		}
	}
	if gossip == nil && revoked == nil && next == id {
		p.mu.Unlock()
		return nil
	}
	err = p.updateLocked(func(st *crypto.State) error {
		if gossip != nil {
			st.SetGossip(gossip)
		}
		if revoked != nil {
			st.SetRevocations(s.Revocations)
		}
		if next != id {
			return believe(st, id, next, s.CA)
		}
		return nil
	})
	if err != nil {
		p.mu.Unlock()
		return err
	}
	if next != id {
		p.ca.number.Store(s.CA)
		p.identity.Store(next)
		p.e.SetIdentity(next)
	}
	if gossip != nil {
		p.ring.Store(gossip)
	}
	if revoked != nil {
		p.revoked.Store(revoked)
	}
	p.mu.Unlock()
	if revoked != nil || next != id {
		if n := p.e.Recheck(); n > 0 {
			p.cfg.Log.Info("connections with nodes that are believed no more are closed", "count", n)
		}
	}
	// A list that was only signed anew, because of the CA, revokes nobody.
	if revoked != nil && (next == id || !slices.Equal(revoked.All(), before.All())) && p.cfg.OnRevoked != nil {
		p.cfg.OnRevoked()
	}
	if next != id {
		p.believed(next)
	}
	if gossip != nil {
		p.TellRing()
	}
	return nil
}

// refreshed answers a keeper that has news.
func (p *Place) refreshed(ctx context.Context, from peer.Peer, _ []byte) ([]byte, error) {
	if !from.Keeper {
		return nil, peer.ErrDenied
	}
	c := keeper.Client{Ask: func(ctx context.Context, sub uint16, body []byte) ([]byte, error) {
		return p.e.AskKeeper(ctx, from.Name, sub, body)
	}}
	if err := p.refresh(ctx, c); err != nil {
		return nil, err
	}
	if err := p.pullShared(ctx, c); err != nil {
		return nil, err
	}
	p.keys.again() // one of them may be of a newer epoch
	return nil, nil
}

// Run keeps everything up to date until ctx ends.
func (p *Place) Run(ctx context.Context) {
	var wg sync.WaitGroup
	wg.Go(func() { p.answer(ctx) })
	wg.Go(func() { p.keepState(ctx) })
	wg.Go(func() { p.keepKeys(ctx) })
	wg.Go(func() { p.renew(ctx) })
	wg.Go(func() { p.keepSaved(ctx) })
	wg.Wait()
	if err := errors.Join(p.save(), p.saveTime()); err != nil {
		p.cfg.Log.Warn("what this node knows is not kept over a restart", "err", err)
	}
}

// keepState pulls the state at the start, when something tells of news, and now and then.
func (p *Place) keepState(ctx context.Context) {
	wait := time.Duration(0)
	for {
		err := p.Refresh(ctx)
		bell, next := p.bell, refreshEvery-rand.N(refreshEvery/4)
		outcast := errors.Is(err, peer.ErrNotBelieved) || errors.Is(err, keeper.ErrRevoked)
		p.outcast.Store(outcast)
		left := errors.Is(err, crypto.ErrForged)
		p.ca.left.Store(left)
		if err != nil && ctx.Err() == nil {
			wait = min(max(2*wait, retryMin), retryMax)
			next = wait
			p.cfg.Log.Debug("no keeper tells what is new", "err", err)
			if outcast {
				p.cfg.Log.Warn("the keepers do not believe this node any more: have it removed (`tulle node rm`) and start it with a new token")
				next = retryMax
			}
			if left {
				p.cfg.Log.Warn("the keepers show certificates of a CA that this node does not know: the cluster's CA was replaced while this node was away; start it with a new token")
				next = retryMax
			}
			bell = nil // it would be rung again and again, by the news that cannot be had
		} else {
			wait = 0
			p.keys.again() // nothing tells a node that missed the push of an overlay's next epoch
		}
		rest := min(next, newsEvery)
		if !sleep(ctx, rest, nil) || !sleep(ctx, next-rest, bell) {
			return
		}
	}
}

// sleep waits, until d has passed or the bell rings; false: ctx has ended.
func sleep(ctx context.Context, d time.Duration, bell <-chan struct{}) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-bell:
	case <-ctx.Done():
		return false
	}
	return true
}

// renew exchanges the certificate at two thirds of its time.
func (p *Place) renew(ctx context.Context) {
	if p.reissued {
		if err := p.Renew(ctx); err != nil && ctx.Err() == nil {
			p.cfg.Log.Warn("the keepers do not list this node's certificate yet", "err", err)
		}
	}
	for {
		p.followCA(ctx)
		wait := max(p.identity.Load().Certificate().RenewAt().Sub(p.Now()), minRenew)
		// Clocks are set, and timers stop in a suspended machine: look again.
		if !sleep(ctx, min(wait, time.Hour), p.ca.bell) {
			return
		}
		if p.Now().Before(p.identity.Load().Certificate().RenewAt()) {
			continue
		}
		if err := p.Renew(ctx); err != nil && ctx.Err() == nil {
			p.cfg.Log.Warn("the certificate is not renewed yet; trying on", "err", err, "until", p.identity.Load().Certificate().NotAfter)
		}
	}
}

// Renew exchanges the certificate for one that is valid for longer.
func (p *Place) Renew(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 2*askTimeout)
	defer cancel()
	old := p.identity.Load()
	csr, err := old.Renewal()
	if err != nil {
		return err
	}
	issued, roots, err := p.client().Renew(ctx, csr)
	if err != nil {
		return err
	}
	if roots.Cluster() != old.Roots().Cluster() {
		return crypto.ErrOtherCluster
	}
	id, err := p.renewed(issued)
	if errors.Is(err, crypto.ErrForged) { // by a CA that this node has not heard of
		if err = p.refresh(ctx, p.client()); err == nil {
			id, err = p.renewed(issued)
		}
	}
	if err != nil {
		return err
	}
	if id.Certificate().Keeper != old.Certificate().Keeper {
		p.e.Reintroduce() // by their connections the others still take it for what it was
	}
	p.keys.drop(p, id)
	p.cfg.Log.Info("the certificate is renewed", "until", id.Certificate().NotAfter)
	if p.cfg.OnIdentity != nil {
		p.cfg.OnIdentity(id)
	}
	return nil
}

// keepSaved keeps members and time.
func (p *Place) keepSaved(ctx context.Context) {
	at := time.Now()
	for sleep(ctx, saveEvery, nil) {
		err := p.save()
		if time.Since(at) >= clockEvery {
			at = time.Now()
			err = errors.Join(err, p.saveTime())
		}
		if err != nil {
			p.cfg.Log.Warn("what this node knows is not kept over a restart", "err", err)
		}
	}
}

func (p *Place) saveTime() error {
	return p.cfg.Dir.SaveTime(p.Now(), p.identity.Load().Certificate().NotAfter)
}
