package keeper

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/tulle-net/tulle/crypto"
	"github.com/tulle-net/tulle/peer"
	"github.com/tulle-net/tulle/store"
)

// Handle makes e answer what nodes ask a keeper: with the Keeper that of returns,
// or, where that is nil, that this node is none. of may wait for one that begins.
func Handle(e *peer.Endpoint, of func() *Keeper) {
	e.HandleKeeper(maxBody, func(ctx context.Context, p peer.Peer, sub uint16, body []byte) ([]byte, error) {
		return Answer(of, func(k *Keeper) ([]byte, error) { return k.serve(ctx, p.Certificate, sub, body) })
	})
}

// Answer has the Keeper that of returns do something; and once more if it could
// not, and of returns another by then, with a store that was opened anew.
func Answer[T any](of func() *Keeper, f func(*Keeper) (T, error)) (T, error) {
	var none T
	k := of()
	if k == nil {
		return none, peer.ErrNotKeeper
	}
	v, err := f(k)
	if !errors.Is(err, peer.ErrUnavailable) {
		return v, err
	}
	again := of()
	if again == nil || again == k {
		return v, err
	}
	return f(again)
}

// Local returns the Client by which the keeper's own node asks it: a node has
// no connection to itself. self returns the node's certificate of now.
func (k *Keeper) Local(self func() *crypto.Certificate) Client {
	return Client{Ask: func(ctx context.Context, sub uint16, body []byte) ([]byte, error) {
		if len(body) > maxBody {
			return nil, peer.ErrTooLarge
		}
		return k.serve(ctx, self(), sub, body)
	}}
}

// call is one request being answered.
type call struct {
	k    *Keeper
	cert *crypto.Certificate
	// ring is from before the ledger was read: an asker that the ledger
	// believes gets no key that was made after it was revoked.
	ring   *crypto.GossipRing
	ledger *Ledger
	asker  asker
}

// kind is how requests of a sub-kind are answered.
type kind struct {
	limit  int
	answer func(ctx context.Context, c *call, body []byte) (any, error)
}

// of adapts a method that takes a typed body.
func of[B any](limit int, f func(*call, context.Context, *B) (any, error)) kind {
	return kind{limit, func(ctx context.Context, c *call, body []byte) (any, error) {
		b := new(B)
		if err := decode(body, b); err != nil {
			return nil, err
		}
		return f(c, ctx, b)
	}}
}

var kinds = map[uint16]kind{
	SubState:         of(maxSmallBody, (*call).state),
	SubRenew:         of(maxSmallBody, (*call).renew),
	SubOverlayKeys:   of(maxBody, (*call).overlayKeys),
	SubCreateToken:   of(maxSmallBody, (*call).createToken),
	SubTokens:        of(maxSmallBody, (*call).tokens),
	SubRemoveToken:   of(maxSmallBody, (*call).removeToken),
	SubNodes:         of(maxSmallBody, (*call).nodes),
	SubRevoke:        of(maxSmallBody, (*call).revoke),
	SubRemove:        of(maxSmallBody, (*call).remove),
	SubRotateOverlay: of(maxSmallBody, (*call).rotateOverlay),
	SubRotateGossip:  of(maxSmallBody, (*call).rotateGossip),
	SubShared:        of(maxSmallBody, (*call).sharedOverlays),
	SubCreateOverlay: of(maxBody, (*call).createOverlay),
	SubSetOverlay:    of(maxBody, (*call).setOverlay),
	SubRemoveOverlay: of(maxSmallBody, (*call).removeOverlay),
	SubPromote:       of(maxSmallBody, (*call).promote),
	SubDemote:        of(maxSmallBody, (*call).demote),
	SubTakeBlock:     of(maxSmallBody, takeBlock),
	SubRenewBlocks:   of(maxBody, (*call).renewLeases),
	SubReturnBlocks:  of(maxBody, returnBlocks),
	SubFixAddress:    of(maxSmallBody, fixAddress),
	SubUnfixAddress:  of(maxSmallBody, unfixAddress),
	SubAddresses:     of(maxSmallBody, (*call).addresses),

	SubChangeCA: of(maxSmallBody, (*call).changeCA),
	SubCAStatus: of(maxSmallBody, (*call).caStatus),

	SubCheckAddresses: of(maxSmallBody, (*call).checkAddresses),
}

// serve answers a node whose certificate the caller has verified.
func (k *Keeper) serve(ctx context.Context, cert *crypto.Certificate, sub uint16, body []byte) ([]byte, error) {
	k.stats.Requests.Add(1)
	answer, err := k.answer(ctx, cert, sub, body)
	if err == nil {
		var b []byte
		if b, err = json.Marshal(answer); err == nil {
			return b, nil
		}
	}
	k.stats.RequestsRefused.Add(1)
	return nil, k.told(ctx, cert, err)
}

func (k *Keeper) answer(ctx context.Context, cert *crypto.Certificate, sub uint16, body []byte) (any, error) {
	kd, ok := kinds[sub]
	switch {
	case !ok:
		return nil, peer.Errorf(peer.CodeKind, "this keeper does not know request %d: upgrade it", sub)
	case len(body) > kd.limit:
		return nil, peer.ErrTooLarge
	}
	c := &call{k: k, cert: cert, ring: k.cfg.Ring()}
	var err error
	if c.ledger, err = k.cfg.Store.Read(ctx); err != nil {
		return nil, fmt.Errorf("keeper: read the ledger: %w", err)
	}
	if c.asker, err = k.asker(c.ledger, cert); err != nil {
		return nil, err
	}
	return kd.answer(ctx, c, body)
}

// errNoMajority is what is told while the store is away.
var errNoMajority = &peer.Error{Code: peer.CodeUnavailable, Text: "the keepers' store does not answer: too few keepers are there, or its etcd is away; `tulle store status` on a keeper says more, and traffic goes on without"}

// told is what the asker may know of err: a store's error may wrap anything,
// so that nothing is told but what was made to be.
func (k *Keeper) told(ctx context.Context, cert *crypto.Certificate, err error) error {
	if e, ok := errors.AsType[*peer.Error](err); ok {
		return e
	}
	if errors.Is(err, store.ErrUnavailable) {
		k.cfg.Log.Debug("keeper: the store does not answer", "peer", cert.Name, "err", err)
		return errNoMajority
	}
	if errors.Is(err, store.ErrTooLarge) {
		k.cfg.Log.Error("keeper: a change is larger than the store takes", "peer", cert.Name, "err", err)
		return limit("the change is larger than the store takes at once: make it in parts, or remove what is no longer needed; the keeper's log says more")
	}
	if ctx.Err() != nil {
		return peer.ErrTimeout
	}
	k.cfg.Log.Error("keeper: cannot answer a node", "peer", cert.Name, "err", err)
	return peer.ErrUnavailable
}

// asker is who asks, and what its record and its certificate allow.
type asker struct {
	cert   *crypto.Certificate
	record Node
}

// asker looks an asker up. Its certificate was verified, maybe a while ago.
func (k *Keeper) asker(l *Ledger, cert *crypto.Certificate) (asker, error) {
	list, err := k.list(l)
	if err != nil {
		return asker{}, err
	}
	if list.Check(cert.Name, cert.Key, cert.Serial) != nil {
		return asker{}, ErrRevoked
	}
	if !k.knows(l, cert) {
		return asker{}, peer.Errorf(peer.CodeDenied, "the certificate of %s is by a CA that the cluster has replaced: join again with a token", cert.Name)
	}
	n, ok := l.Nodes[cert.Name]
	switch {
	case !ok || n.Key != cert.Key:
		return asker{}, peer.Errorf(peer.CodeDenied, "the name %s is not this node's any more: join again with a token", cert.Name)
	case !n.Revoked.IsZero():
		return asker{}, ErrRevoked
	case k.now().After(cert.NotAfter.Add(crypto.Skew)):
		return asker{}, peer.Errorf(peer.CodeDenied, "the certificate of %s has expired: join again with a token", cert.Name)
	}
	return asker{cert, n}, nil
}

func (a asker) keeper() bool { return a.cert.Keeper && a.record.Keeper }

// admin reports whether the asker may do everything.
func (a asker) admin() bool {
	const all = "*"
	return a.keeper() || slices.Contains(a.cert.Overlays, all) && slices.Contains(a.record.Grants, all)
}

// allow reports whether the asker may join the overlay. A keeper as such may not.
func (a asker) allow(overlay string) bool {
	return a.cert.Overlays.Allow(overlay) && a.record.Grants.Allow(overlay)
}

// covers reports whether the asker may do what is about these grants.
func (a asker) covers(g crypto.Grants) bool {
	return a.admin() || g.Within(a.cert.Overlays) && g.Within(a.record.Grants)
}

func (a asker) mustAdmin(what string) error {
	if a.admin() {
		return nil
	}
	return peer.Errorf(peer.CodeDenied, "%s may not %s: only keepers and nodes with the grant * may; ask from one of those", a.cert.Name, what)
}

// change makes a change that the asker wants, in one transaction. Whether it
// may is asked again in it: it may have been revoked meanwhile.
func (c *call) change(ctx context.Context, f func(l *Ledger, a asker) error) error {
	if !c.asker.admin() && !c.k.pace.allow(c.cert.Name, time.Now()) {
		return peer.Errorf(peer.CodeBusy, "%s asks for too many changes: wait a second for each", c.cert.Name)
	}
	err := c.k.cfg.Store.Update(ctx, func(l *Ledger) error {
		a, err := c.k.asker(l, c.cert)
		if err != nil {
			return err
		}
		return f(l, a)
	})
	if err != nil {
		return fmt.Errorf("keeper: change the ledger: %w", err)
	}
	c.k.cfg.Changed()
	return nil
}

// readList is a list of revocations and what it was read from.
type readList struct {
	text []byte
	list *crypto.Revocations
}

// list returns the ledger's revocations.
func (k *Keeper) list(l *Ledger) (*crypto.Revocations, error) {
	if len(l.Revocations) == 0 {
		return nil, nil
	}
	if r := k.revoked.Load(); r != nil && bytes.Equal(r.text, l.Revocations) {
		return r.list, nil
	}
	roots, err := k.roots(l)
	if err != nil {
		return nil, err
	}
	list, err := roots.ParseRevocations(l.Revocations)
	if err != nil {
		return nil, fmt.Errorf("keeper: the store's revocations: %w", err)
	}
	k.revoked.Store(&readList{l.Revocations, list})
	return list, nil
}
