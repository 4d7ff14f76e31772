package keeper

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/tulle-net/tulle/crypto"
	"github.com/tulle-net/tulle/peer"
)

// state answers what every node must have: who is believed, and gossip keys.
func (c *call) state(ctx context.Context, b *stateBody) (any, error) {
	if err := c.holds(ctx, b.Holds); err != nil {
		return nil, err
	}
	roots, err := c.k.roots(c.ledger)
	if err != nil {
		return nil, err
	}
	answer := stateAnswer{
		Time: c.k.cfg.Now().UTC(), Roots: roots.DER(), CA: c.ledger.CA.Number,
		Members: c.k.members(c.ledger, stateMembers),
	}
	if c.ring.Epoch > b.Ring {
		answer.Ring = c.ring.Encode()
	}
	list, err := c.k.list(c.ledger)
	if err != nil {
		return nil, err
	}
	if list.Number() > b.Revocations {
		answer.Revocations = c.ledger.Revocations
	}
	return answer, nil
}

// renew issues the asker's next certificate, with the grants of the one that it
// shows. Whether it is a keeper its record says: that may have changed.
func (c *call) renew(ctx context.Context, b *renewBody) (any, error) {
	var issued *crypto.Issued
	var roots *crypto.Roots
	err := c.change(ctx, func(l *Ledger, a asker) error {
		ca, err := c.k.signer(l)
		if err != nil {
			return err
		}
		if roots, err = c.k.roots(l); err != nil {
			return err
		}
		n := a.record
		if !a.cert.Overlays.Within(n.Grants) {
			return peer.Errorf(peer.CodeDenied, "the certificate of %s allows more than the node may by now: renew with its last one, or join again with a token", a.cert.Name)
		}
		now := c.k.now()
		if issued, err = ca.ReissueAs(a.cert, b.Request, n.Keeper, now); err != nil {
			return badRequest(err)
		}
		if err := certify(&n, issued, roots, now); err != nil {
			return err
		}
		l.Nodes[a.cert.Name] = n
		return nil
	})
	if err != nil {
		return nil, err
	}
	c.k.cfg.Log.Debug("keeper: renewed a certificate", "peer", c.cert.Name)
	return renewAnswer{issued.Certificate, issued.Card, roots.DER()}, nil
}

// badRequest tells the asker what is wrong with its signing request, if it is that.
func badRequest(err error) error {
	for _, r := range []struct {
		err  error
		code peer.Code
	}{
		{crypto.ErrName, peer.CodeDenied},
		{crypto.ErrOtherKey, peer.CodeDenied},
		{crypto.ErrAsksMore, peer.CodeDenied},
		{crypto.ErrMalformed, peer.CodeMalformed},
		{crypto.ErrForged, peer.CodeMalformed},
	} {
		if errors.Is(err, r.err) {
			return peer.Errorf(r.code, "%v", err)
		}
	}
	return err
}

// nodes lists a page of the nodes, by name.
func (c *call) nodes(_ context.Context, b *nodesBody) (any, error) {
	answer := nodesAnswer{Nodes: []NodeInfo{}}
	for _, name := range slices.Sorted(maps.Keys(c.ledger.Nodes)) {
		if name <= b.After {
			continue
		}
		if len(answer.Nodes) == nodesPage {
			answer.More = true
			break
		}
		n := c.ledger.Nodes[name]
		i := NodeInfo{Name: name, Key: n.Key, Serial: n.Serial.String(), Keeper: n.Keeper, Joined: n.Joined, Expires: n.Expires, Revoked: n.Revoked}
		if c.asker.covers(n.Grants) {
			i.Overlays, i.By = n.Grants, n.By
		}
		answer.Nodes = append(answer.Nodes, i)
	}
	return answer, nil
}

// revoke takes a node's identity back, and its name with it.
func (c *call) revoke(ctx context.Context, b *nodeBody) (any, error) {
	var removed []crypto.TokenID
	var wanted uint64
	err := c.change(ctx, func(l *Ledger, a asker) error {
		if err := a.mustAdmin("revoke nodes"); err != nil {
			return err
		}
		n, err := c.k.dispensable(l, b.Name)
		if err != nil {
			return err
		}
		removed, wanted = nil, l.Gossip.Wanted
		if !n.Revoked.IsZero() {
			return nil // the request came twice, or it is to be spread again
		}
		now := c.k.now()
		err = c.k.amend(l, now, func(list []crypto.Revocation) []crypto.Revocation {
			return append(list, crypto.Revocation{Name: b.Name, Key: n.Key, Until: until(n, now)})
		})
		if err != nil {
			return err
		}
		n.Revoked = now
		l.Nodes[b.Name] = n
		// With a token that it made, or joined with, the machine would be back
		// under another name.
		removed = l.removeTokens(now, func(t Token) bool {
			return t.By == b.Name || slices.ContainsFunc(t.Spent, func(s crypto.Spend) bool { return s.Name == b.Name })
		})
		l.Gossip.Wanted++
		wanted = l.Gossip.Wanted
		return nil
	})
	if err != nil {
		return nil, err
	}
	c.k.cfg.Log.Info("keeper: revoked node "+b.Name, "peer", c.cert.Name)
	c.dismiss(ctx, b.Name)
	out := c.k.spread(ctx, wanted, b.Name)
	out.TokensRemoved = removed
	return out, nil
}

// remove frees a name. What was issued for it is believed no more.
func (c *call) remove(ctx context.Context, b *nodeBody) (any, error) {
	away := c.k.cfg.Away != nil && c.k.cfg.Away(b.Name) // as it was before it is thrown out
	var removed []crypto.TokenID
	var wanted uint64
	err := c.change(ctx, func(l *Ledger, a asker) error {
		if err := a.mustAdmin("remove nodes"); err != nil {
			return err
		}
		n, err := c.k.dispensable(l, b.Name)
		if err != nil {
			return err
		}
		now := c.k.now()
		err = c.k.amend(l, now, func(list []crypto.Revocation) []crypto.Revocation { return freed(list, b.Name, n, now) })
		if err != nil {
			return err
		}
		delete(l.Nodes, b.Name)
		removed = l.removeTokens(now, func(t Token) bool { return t.By == b.Name })
		if n.Revoked.IsZero() { // else they are changed already, or about to be
			l.Gossip.Wanted++
		}
		wanted = l.Gossip.Wanted
		return nil
	})
	if err != nil {
		return nil, err
	}
	c.k.cfg.Log.Info("keeper: removed node "+b.Name, "peer", c.cert.Name)
	c.dismiss(ctx, b.Name)
	c.forgetLeases(ctx, b.Name, away)
	out := c.k.spread(ctx, wanted, b.Name)
	out.TokensRemoved = removed
	return out, nil
}

// freed returns the list when a name is free for another machine than n.
func freed(list []crypto.Revocation, name string, n Node, now time.Time) []crypto.Revocation {
	for i := range list {
		if list[i].Name == name {
			list[i].Name = "" // the key stays
		}
	}
	if n.Revoked.IsZero() {
		list = append(list, crypto.Revocation{Key: n.Key, Until: until(n, now)})
	}
	return list
}

// dismiss takes a node that is out of the cluster out of the store, if it was a
// keeper. The ledger does not let it in any more, whatever becomes of this.
func (c *call) dismiss(ctx context.Context, name string) {
	if !c.ledger.Nodes[name].Keeper {
		return
	}
	ctx, cancel := c.k.detached(ctx)
	defer cancel()
	if err := c.k.expel(ctx, name); err != nil {
		c.k.cfg.Log.Error("keeper: a node that is out still has its vote in the store: take it with `tulle node demote "+name+"`", "peer", name, "err", err)
	}
}

// dispensable returns the record of a node that the cluster, and this keeper,
// can do without.
func (k *Keeper) dispensable(l *Ledger, name string) (Node, error) {
	n, ok := l.Nodes[name]
	if !ok {
		return Node{}, peer.Errorf(CodeNoSuch, "there is no node %.70q: see `tulle node ls`", name)
	}
	if !n.Keeper || !n.Revoked.IsZero() {
		return n, nil
	}
	others := false
	for other, o := range l.Nodes {
		others = others || other != name && o.Keeper && o.Revoked.IsZero()
	}
	switch {
	case !others:
		return Node{}, peer.Errorf(CodeLastKeeper, "%s is the only keeper, and the cluster would end with it: it cannot be taken out", name)
	case name == k.cfg.Name:
		// By this code the asker goes on to the next keeper.
		return Node{}, peer.Errorf(peer.CodeUnavailable, "keeper %s does not take its own identity back: ask from a node that reaches another keeper", name)
	}
	return n, nil
}

// until is when the last certificate that was issued under the record is over.
func until(n Node, now time.Time) time.Time {
	if end := now.Add(crypto.Lifetime); end.After(n.Expires) {
		return end
	}
	return n.Expires
}

// amend signs the next list of revocations. f owns what it is given.
func (k *Keeper) amend(l *Ledger, now time.Time, f func([]crypto.Revocation) []crypto.Revocation) error {
	old, err := k.list(l)
	if err != nil {
		return err
	}
	list := slices.DeleteFunc(f(slices.Clone(old.All())), func(r crypto.Revocation) bool { return now.After(r.Until.Add(2 * crypto.Skew)) })
	ca, err := k.signer(l)
	if err != nil {
		return err
	}
	if l.Revocations, err = ca.SignRevocations(old.Number()+1, list, now); err != nil {
		return fmt.Errorf("keeper: sign the revocations: %w", err)
	}
	if len(l.Revocations) > maxSigned {
		return limit("%d identities are revoked already: wait until the first of them expire, on %s", len(list)-1, firstEnd(list).Format(time.DateOnly))
	}
	return nil
}

func firstEnd(list []crypto.Revocation) time.Time {
	return slices.MinFunc(list, func(a, b crypto.Revocation) int { return a.Until.Compare(b.Until) }).Until
}
