package keeper

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"github.com/tulle-net/tulle/crypto"
	"github.com/tulle-net/tulle/peer"
	"github.com/tulle-net/tulle/store"
)

// promoteTimeout bounds a promotion: the new member gets all of the data.
const promoteTimeout = 50 * time.Second

// Quorum is the members of the store that keepers run themselves.
type Quorum interface {
	// AddLearner lets a node join, at addr, without a vote. It returns what the
	// node is to be given as store.MemberConfig.InitialCluster.
	AddLearner(ctx context.Context, node string, addr netip.Addr) (initial string, err error)
	// Promote gives it its vote when it has caught up.
	Promote(ctx context.Context, node string) error
	Remove(ctx context.Context, node string) error
	Members(ctx context.Context) ([]store.MemberInfo, error)
}

var _ Quorum = (*store.Member)(nil)

// Steps of a KeepOrder.
const (
	// KeepAsk asks whether the node can be a keeper.
	KeepAsk = "ask"
	// KeepBegin makes it one.
	KeepBegin = "begin"
	// KeepEnd makes it none: it forgets the CA's key and the root secret.
	KeepEnd = "end"
	// KeepCA gives a keeper the key of the CA that is to sign next.
	KeepCA = "ca"
	// KeepReopen has a keeper's member of the store show and believe the CA
	// certificates of now; it starts anew for that, if it does not yet.
	KeepReopen = "reopen"
)

// KeepOrder is the payload of peer.KindKeep.
type KeepOrder struct {
	Step string `json:"step"`
	// The rest is of KeepBegin: the CA's key (PKCS #8) and the root secret, and
	// what the store's member begins with; "" where the store is external.
	CAKey   []byte `json:"ca_key,omitempty"`
	Root    []byte `json:"root,omitempty"`
	Initial string `json:"initial,omitempty"`
	// NextCA and NextKey are of KeepCA, and of KeepBegin while the CA changes: a
	// CA's certificate (DER) and key (PKCS #8).
	NextCA  []byte `json:"next_ca,omitempty"`
	NextKey []byte `json:"next_key,omitempty"`
	// Number is of KeepReopen: the Authority's that the keeper must know of.
	Number uint64 `json:"number,omitempty,string"`
}

// Zero overwrites the secrets.
func (o *KeepOrder) Zero() {
	clear(o.CAKey)
	clear(o.Root)
	clear(o.NextKey)
}

// KeepAnswer answers it.
type KeepAnswer struct {
	// Addr is where the node's member of the store listens.
	Addr netip.Addr `json:"addr"`
	// Refused says why the node cannot be a keeper.
	Refused string `json:"refused,omitempty"`
	// Restarting answers KeepReopen where the asking keeper's own store is
	// closing: another Keeper goes on.
	Restarting bool `json:"restarting,omitempty"`
}

// order has a node do a step.
func (k *Keeper) order(ctx context.Context, node string, o KeepOrder) (*KeepAnswer, error) {
	if k.cfg.Tell == nil {
		return nil, peer.ErrUnavailable
	}
	b, err := json.Marshal(o)
	if err != nil {
		return nil, fmt.Errorf("keeper: encode an order: %w", err)
	}
	defer clear(b)
	if b, err = k.cfg.Tell(ctx, node, peer.KindKeep, b); err != nil {
		return nil, err
	}
	var a KeepAnswer
	if err := json.Unmarshal(b, &a); err != nil {
		return nil, peer.ErrMalformed
	}
	if a.Refused != "" {
		return nil, invalid("%s", a.Refused)
	}
	return &a, nil
}

// promote makes a node a keeper.
func (c *call) promote(ctx context.Context, b *promoteBody) (any, error) {
	if err := c.asker.mustAdmin("make keepers"); err != nil {
		return nil, err
	}
	n, ok := c.ledger.Nodes[b.Name]
	switch {
	case !ok:
		return nil, peer.Errorf(CodeNoSuch, "there is no node %.70q: see `tulle node ls`", b.Name)
	case !n.Revoked.IsZero():
		return nil, invalid("node %s is revoked", b.Name)
	case b.Name == b.Replace:
		return nil, invalid("a node cannot replace itself")
	case b.Name == c.k.cfg.Name && b.Replace != "":
		return nil, invalid("%s is a keeper already: to end another one, demote that (`tulle node demote %.70s`)", b.Name, b.Replace)
	case b.Name == c.k.cfg.Name:
		return Outcome{}, nil // it is one, or this would not be asked here
	}
	if b.Replace != "" {
		if old, ok := c.ledger.Nodes[b.Replace]; !ok || !old.Keeper {
			return nil, peer.Errorf(CodeNoSuch, "%.70q is no keeper: see `tulle node ls`", b.Replace)
		}
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), promoteTimeout)
	defer cancel()
	a, err := c.k.order(ctx, b.Name, KeepOrder{Step: KeepAsk})
	if err != nil {
		return nil, unreachable(b.Name, err)
	}
	if b.Replace != "" {
		if err := c.k.retire(ctx, c, b.Replace); err != nil {
			return nil, err
		}
	}
	initial := ""
	if c.k.cfg.Quorum != nil {
		if initial, err = c.join(ctx, b.Name, a.Addr); err != nil {
			return nil, err
		}
	}
	if err := c.change(ctx, func(l *Ledger, a asker) error {
		if err := a.mustAdmin("make keepers"); err != nil {
			return err
		}
		n := l.Nodes[b.Name]
		if n.Key == c.ledger.Nodes[b.Name].Key && n.Revoked.IsZero() {
			n.Keeper = true
			l.Nodes[b.Name] = n
			return nil
		}
		return peer.Errorf(CodeNoSuch, "node %s was removed or revoked meanwhile", b.Name)
	}); err != nil {
		return nil, err
	}
	o, err := c.k.office(ctx)
	if err != nil {
		return nil, err
	}
	defer clear(o.CAKey)
	defer clear(o.NextKey)
	o.Step, o.Root, o.Initial = KeepBegin, c.k.cfg.Root.Bytes(), initial
	if _, err = c.k.order(ctx, b.Name, *o); err != nil {
		return nil, unreachable(b.Name, err)
	}
	if c.k.cfg.Quorum != nil {
		if err := c.k.cfg.Quorum.Promote(ctx, b.Name); err != nil {
			return nil, peer.Errorf(peer.CodeUnavailable, "%s is a keeper, but its member of the store has no vote yet: `tulle node promote %s` again (%v)", b.Name, b.Name, err)
		}
	}
	c.k.cfg.Log.Info("keeper: another keeper", "peer", b.Name)
	return Outcome{Unreached: c.k.push(ctx, nil)}, nil
}

// join lets a node's member into the store, unless it is in already.
func (c *call) join(ctx context.Context, name string, addr netip.Addr) (string, error) {
	members, err := c.k.cfg.Quorum.Members(ctx)
	if err != nil {
		return "", shareError(err)
	}
	if slices.ContainsFunc(members, func(m store.MemberInfo) bool { return m.Name == name && m.Started }) {
		return "", nil // an earlier promotion came this far
	}
	initial, err := c.k.cfg.Quorum.AddLearner(ctx, name, addr)
	if err != nil {
		return "", peer.Errorf(peer.CodeUnavailable, "the store does not take another member: %v", err)
	}
	return initial, nil
}

// unreachable says that it is another node that does not answer.
func unreachable(name string, err error) error {
	if e, ok := errors.AsType[*peer.Error](err); ok && e.Code != peer.CodeTimeout && e.Code != peer.CodeUnavailable {
		return e
	}
	return invalid("node %s does not answer the keeper, and has to take part: %v", name, err)
}

// demote makes a keeper an ordinary node.
func (c *call) demote(ctx context.Context, b *nodeBody) (any, error) {
	if err := c.asker.mustAdmin("end keepers"); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), promoteTimeout)
	defer cancel()
	n, ok := c.ledger.Nodes[b.Name]
	left := false // an earlier try, or the removal of the node, came only so far
	if !n.Keeper {
		var err error
		if left, err = c.k.takesPart(ctx, b.Name); err != nil {
			return nil, err
		}
	}
	switch {
	case left:
		if err := c.k.expel(ctx, b.Name); err != nil {
			return nil, err
		}
	case !ok:
		return nil, peer.Errorf(CodeNoSuch, "there is no node %.70q: see `tulle node ls`", b.Name)
	case !n.Keeper:
		return nil, invalid("%s is no keeper", b.Name)
	default:
		if err := c.k.retire(ctx, c, b.Name); err != nil {
			return nil, err
		}
	}
	out := Outcome{Unreached: c.k.push(ctx, nil)}
	if _, err := c.k.order(ctx, b.Name, KeepOrder{Step: KeepEnd}); err != nil && !slices.Contains(out.Unreached, b.Name) {
		out.Unreached = append(out.Unreached, b.Name)
	}
	c.k.cfg.Log.Info("keeper: one keeper less", "peer", b.Name)
	return out, nil
}

// retire takes a keeper's vote and its rights.
func (k *Keeper) retire(ctx context.Context, c *call, name string) error {
	err := c.change(ctx, func(l *Ledger, a asker) error {
		if err := a.mustAdmin("end keepers"); err != nil {
			return err
		}
		n, err := k.dispensable(l, name)
		if err != nil {
			return err
		}
		n.Keeper = false
		l.Nodes[name] = n
		return nil
	})
	if err != nil {
		return err
	}
	return k.expel(ctx, name)
}

// takesPart reports whether a node has a member of the store.
func (k *Keeper) takesPart(ctx context.Context, name string) (bool, error) {
	if k.cfg.Quorum == nil {
		return false, nil
	}
	members, err := k.cfg.Quorum.Members(ctx)
	if err != nil {
		return false, shareError(err)
	}
	return slices.ContainsFunc(members, func(m store.MemberInfo) bool { return m.Name == name }), nil
}

// expel takes a node's member out of the store, if it has one.
func (k *Keeper) expel(ctx context.Context, name string) error {
	if in, err := k.takesPart(ctx, name); err != nil || !in {
		return err
	}
	if err := k.cfg.Quorum.Remove(ctx, name); err != nil {
		return peer.Errorf(peer.CodeUnavailable, "%s has its vote in the store still: demote it again (%v)", name, err)
	}
	return nil
}

// CheckKeep returns an error unless a node may be told such a thing by from.
func CheckKeep(from peer.Peer) error {
	if !from.Keeper {
		return peer.ErrDenied
	}
	return nil
}

// GoAlone takes their office from all other keepers: they are lost for good.
func (k *Keeper) GoAlone(ctx context.Context) error {
	err := k.cfg.Store.Update(ctx, func(l *Ledger) error {
		for name, n := range l.Nodes {
			if name != k.cfg.Name && n.Keeper {
				n.Keeper = false
				l.Nodes[name] = n
			}
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("keeper: be the only one: %w", err)
	}
	return nil
}

// TakeOver gives a name, in the ledger of a store that was restored, to the
// keeper whose certificate it is, and makes it the only keeper. A machine that
// had the name before is believed no more.
func (k *Keeper) TakeOver(ctx context.Context, cert *crypto.Certificate) error {
	err := k.cfg.Store.Update(ctx, func(l *Ledger) error {
		for name, n := range l.Nodes {
			if n.Keeper {
				n.Keeper = false
				l.Nodes[name] = n
			}
		}
		now := k.now()
		if old, taken := l.Nodes[cert.Name]; taken && old.Key != cert.Key {
			err := k.amend(l, now, func(list []crypto.Revocation) []crypto.Revocation { return freed(list, cert.Name, old, now) })
			if err != nil {
				return err
			}
		}
		n := recordOf(cert)
		n.Joined = now
		l.Nodes[cert.Name] = n
		return nil
	})
	if err != nil {
		return fmt.Errorf("keeper: take over a restored store: %w", err)
	}
	return nil
}
