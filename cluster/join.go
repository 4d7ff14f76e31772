package cluster

import (
	"context"
	"encoding/json"
	"errors"
	"time"

	"github.com/tulle-net/tulle/crypto"
	"github.com/tulle-net/tulle/keeper"
	"github.com/tulle-net/tulle/peer"
)

// askTimeout bounds one question to a keeper that somebody waits for.
const askTimeout = 5 * time.Second

// Serve makes e answer what concerns this node's place, and gives it the node's
// identity. e was made with this Place's functions.
func (p *Place) Serve(e *peer.Endpoint) {
	p.e = e
	e.SetIdentity(p.identity.Load())
	e.Handle(peer.KindRefresh, 0, p.refreshed)
	keeper.Handle(e, p.answering)
}

// Join asks the token's keepers to admit this machine. A node that was here
// before keeps its key, unless it is not believed any more: removed or revoked
// (fresh). Errors are those of peer.Endpoint.Join.
func (p *Place) Join(ctx context.Context, t *crypto.Token, fresh bool) error {
	key, err := p.joiningKey(fresh)
	if err != nil {
		return err
	}
	csr, err := crypto.NewRequest(key, p.cfg.Name)
	if err != nil {
		return err
	}
	r, err := p.e.Join(ctx, t, csr)
	if err != nil {
		return err
	}
	if err := p.joined(key, r); err != nil {
		return err
	}
	p.e.SetIdentity(p.identity.Load())
	p.cfg.Log.Info("joined", "cluster", r.Roots.Cluster(), "peer", r.Keeper.Name)
	ring(p.bell)
	return nil
}

// joiningKey returns the key to join with.
func (p *Place) joiningKey(fresh bool) (*crypto.PrivateKey, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.state == nil {
		return p.cfg.Dir.JoiningKey(func(crypto.PublicKey) bool { return false })
	}
	if p.state.Files[crypto.FileCAKey] != nil {
		return nil, ErrKeeperRejoins
	}
	old, err := p.state.PrivateKey()
	if err != nil || !fresh {
		return old, err
	}
	return p.cfg.Dir.JoiningKey(func(k crypto.PublicKey) bool { return k == old.PublicKey() })
}

// joined keeps what a keeper gave.
func (p *Place) joined(key *crypto.PrivateKey, r *peer.JoinResult) error {
	id, err := crypto.NewIdentity(key, &crypto.Issued{Certificate: r.Certificate, Card: r.Card}, r.Roots, p.Now())
	if err != nil {
		return err
	}
	gossip, err := crypto.ParseGossipRing(r.Gossip)
	if err != nil {
		return err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	s := crypto.NewState(r.Roots.Cluster(), p.cfg.Name)
	s.SetIdentity(id)
	s.SetGossip(gossip)
	setCANumber(s, r.CANumber)
	if err := p.rejoined(s); err != nil {
		return err
	}
	if len(r.Revocations) > 0 {
		if _, err := r.Roots.ParseRevocations(r.Revocations); err != nil {
			return err
		}
		s.SetRevocations(r.Revocations)
	}
	// At once: a node that is killed before it saves must find a keeper, for the
	// gossip keys may be others when it is back.
	members, err := json.Marshal(r.Members[:min(len(r.Members), maxRemembered)])
	if err != nil {
		return err
	}
	s.Files[fileMembers] = members
	if err := p.begin(s); err != nil {
		return err
	}
	if err := p.cfg.Dir.Joined(); err != nil {
		p.cfg.Log.Warn("the key that this node has joined with stays in another file, too", "err", err)
	}
	return nil
}

// Believed asks a keeper whether this node is still a member: nil if it is, or
// if no keeper can be asked; an error that wraps peer.ErrNotBelieved or
// keeper.ErrRevoked if it is not.
func (p *Place) Believed(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	err := p.Refresh(ctx)
	if errors.Is(err, peer.ErrNotBelieved) || errors.Is(err, keeper.ErrRevoked) {
		return err
	}
	return nil
}

// ErrKeeperRejoins: a keeper holds the cluster's CA, and does not join with a token.
var ErrKeeperRejoins = errors.New("cluster: this node is a keeper: its state holds the cluster's CA, and a token would replace it; leave the token out, or move the state folder away")
