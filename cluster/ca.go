package cluster

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/tulle-net/tulle/crypto"
	"github.com/tulle-net/tulle/keeper"
)

const (
	// fileCANumber is the keeper.Authority's whose CA certificates this node has.
	fileCANumber = "ca.number"
	heardPoll    = 20 * time.Millisecond
	// renewSpread is the time for each member over which nodes spread that renew
	// because of the CA, up to renewMost: all at once would fight for the ledger.
	renewSpread = 5 * time.Millisecond
	renewMost   = 30 * time.Second
	// renewRest is the time between renewing because of the CA, and telling that: what
	// others know of this node by the former CA is to be known by the new one when
	// the former is dropped: its connections, and its passport.
	renewRest = time.Second
	// pauseMost bounds the wait for a keeper that opens its store anew.
	pauseMost = 10 * time.Second
)

// ca is how far this node is in a change of the CA.
type ca struct {
	number atomic.Uint64
	// told is the CA of which a keeper was told that this node has its certificate.
	told atomic.Pointer[crypto.KeyID]
	rest atomic.Bool   // it is not to be told yet
	left atomic.Bool   // the keepers are of a CA that this node does not know
	bell chan struct{} // there may be something to do
	// paused is closed when the keeper that is here answers again; nil: it does.
	paused atomic.Pointer[chan struct{}]
}

func (c *ca) load(s *crypto.State) {
	// Damage costs no more than that the keepers' certificates replace the node's.
	n, _ := strconv.ParseUint(strings.TrimSpace(string(s.Files[fileCANumber])), 10, 64)
	c.number.Store(n)
}

func setCANumber(s *crypto.State, n uint64) {
	if n > 0 {
		s.Files[fileCANumber] = []byte(strconv.FormatUint(n, 10) + "\n")
	}
}

// CANumber returns which change of the CA this node has heard of last.
func (p *Place) CANumber() uint64 { return p.ca.number.Load() }

// believing returns id with the CA certificates of s, if those are newer. Called
// with p.mu.
func (p *Place) believing(id *crypto.Identity, s *keeper.State) (*crypto.Identity, error) {
	if s.CA <= p.ca.number.Load() {
		return id, nil
	}
	next, err := id.WithRoots(s.Roots, p.Now())
	if err != nil {
		return nil, fmt.Errorf("cluster: the cluster's CA was changed, and this node has no certificate of the new one: join again with a token: %w", err)
	}
	return next, nil
}

// believe puts other CA certificates into the state, and forgets keys of CAs that
// are gone.
func believe(s *crypto.State, old, next *crypto.Identity, number uint64) error {
	s.SetIdentity(next)
	setCANumber(s, number)
	if _, err := s.Revocations(); err != nil { // by nobody who is believed any more
		return err
	}
	return s.DropCAs(old.Roots())
}

// believed tells of other CA certificates.
func (p *Place) believed(id *crypto.Identity) {
	p.cfg.Log.Info("other CA certificates are believed", "count", id.Roots().Len())
	if p.cfg.OnRoots != nil {
		p.cfg.OnRoots()
	}
	ring(p.ca.bell)
}

// holds is what a keeper is told of this node's certificate: nothing, unless the
// CA changes.
func (p *Place) holds() crypto.KeyID {
	id := p.identity.Load()
	if id.Roots().Len() < 2 || p.ca.rest.Load() {
		return crypto.KeyID{}
	}
	return id.Certificate().Issuer
}

// behind reports whether another CA signs than the one of this node's certificate.
func (p *Place) behind() bool {
	id := p.identity.Load()
	f := id.Roots().Signer()
	return id.Certificate().Issuer != crypto.KeyID(f[:len(crypto.KeyID{})])
}

// untold reports whether no keeper knows yet that this node has its certificate.
func (p *Place) untold() bool {
	holds, told := p.holds(), p.ca.told.Load()
	return holds != crypto.KeyID{} && (told == nil || *told != holds)
}

// followCA renews the certificate if the CA was changed, and tells a keeper that it
// is on this node's disk, until both is done or ctx has ended.
func (p *Place) followCA(ctx context.Context) {
	if p.behind() {
		p.membersMu.Lock()
		spread := min(time.Duration(len(p.members)+1)*renewSpread, renewMost)
		p.membersMu.Unlock()
		sleep(ctx, rand.N(spread), nil)
	}
	for wait := retryMin; ctx.Err() == nil; wait = min(2*wait, retryMax) {
		var err error
		switch {
		case p.behind():
			p.ca.rest.Store(true)
			if err = p.Renew(ctx); err == nil {
				p.e.Reintroduce()
				sleep(ctx, renewRest, nil)
				p.e.Reintroduce() // those whose handshake was under way
			}
			p.ca.rest.Store(false)
		case p.untold():
			err = p.Refresh(ctx)
		default:
			return
		}
		if err != nil {
			p.cfg.Log.Debug("this node has not followed the change of the CA yet", "err", err)
			sleep(ctx, wait, p.ca.bell)
		}
	}
}

// renewed takes a certificate that a keeper has issued.
func (p *Place) renewed(issued *crypto.Issued) (*crypto.Identity, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	now := p.identity.Load() // its roots may have changed meanwhile
	id, err := crypto.NewIdentity(now.Key(), issued, now.Roots(), p.Now())
	if err != nil {
		return nil, err
	}
	if err := p.updateLocked(func(s *crypto.State) error { s.SetIdentity(id); return nil }); err != nil {
		return nil, err
	}
	p.identity.Store(id)
	p.e.SetIdentity(id)
	return id, nil
}

// rejoined takes over what a node that joins again knows of its cluster's former
// CAs. Called with p.mu.
func (p *Place) rejoined(s *crypto.State) error {
	if p.state == nil || p.state.Cluster != s.Cluster {
		return nil
	}
	before, err := p.state.Roots()
	if err != nil {
		return err
	}
	if b := p.state.Files[crypto.FileFormerCAs]; b != nil {
		s.Files[crypto.FileFormerCAs] = b
	}
	return s.DropCAs(before)
}

// nextCA returns the CA that an order hands over; nil: none.
func nextCA(o keeper.KeepOrder) (*crypto.CA, error) {
	if len(o.NextCA) == 0 {
		return nil, nil
	}
	key, err := crypto.ParsePrivateKey(o.NextKey)
	if err != nil {
		return nil, err
	}
	return crypto.LoadCA(o.NextCA, key)
}

// TakeCA keeps the CA that is to sign next, on a keeper.
func (p *Place) TakeCA(o keeper.KeepOrder) error {
	next, err := nextCA(o)
	if err != nil {
		return err
	}
	if next == nil {
		return crypto.ErrMalformed
	}
	return p.keepCA(next)
}

// keepCA keeps a CA beside the one that signs, unless it is here already.
func (p *Place) keepCA(next *crypto.CA) error {
	if p.caOf(next.Fingerprint()) != nil {
		return nil
	}
	return p.update(func(s *crypto.State) error {
		if _, err := s.CA(); err != nil {
			return err // no keeper
		}
		return s.SetNextCA(next)
	})
}

// caOf returns the CA of that fingerprint, if its key is here.
func (p *Place) caOf(f crypto.Fingerprint) *crypto.CA {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.state == nil {
		return nil
	}
	for _, get := range []func() (*crypto.CA, error){p.state.NextCA, p.state.CA} {
		if ca, err := get(); err == nil && ca != nil && ca.Fingerprint() == f {
			return ca
		}
	}
	return nil
}

// Pause has whoever asks the keeper that is here wait until Keep has made the next
// one, or Unpause was called: its store is opened anew.
func (p *Place) Pause() {
	c := make(chan struct{})
	if old := p.ca.paused.Swap(&c); old != nil {
		close(*old)
	}
}

// Unpause ends Pause.
func (p *Place) Unpause() {
	if c := p.ca.paused.Swap(nil); c != nil {
		close(*c)
	}
}

// answering returns the keeper that is here; nil: this node is none.
func (p *Place) answering() *keeper.Keeper {
	if c := p.ca.paused.Load(); c != nil {
		t := time.NewTimer(pauseMost)
		defer t.Stop()
		select {
		case <-*c:
		case <-t.C:
		}
	}
	return p.keeper.Load()
}

var errNoRoots = errors.New("cluster: this node has not heard of the change of the CA yet, or has no certificate of the new one")

// Heard waits until this node believes the CAs of that change, and has a
// certificate of the one that signs.
func (p *Place) Heard(ctx context.Context, number uint64) error {
	for p.CANumber() < number || p.behind() {
		if !sleep(ctx, heardPoll, nil) {
			return errNoRoots
		}
	}
	return nil
}
