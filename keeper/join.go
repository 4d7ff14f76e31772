package keeper

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"github.com/tulle-net/tulle/crypto"
	"github.com/tulle-net/tulle/peer"
	"github.com/tulle-net/tulle/store"
)

const (
	// joinMembers and stateMembers are how many members a node is told: the
	// answers have room for that many of the longest.
	joinMembers  = 256
	stateMembers = 4096
	// joinRevocations is the longest list that a joining machine is given; a
	// longer one it asks for when it is a node.
	joinRevocations = 64 << 10
)

// Join implements peer.Joiner: it admits whoever has the token's secret. What
// is wrong with the name or the token is told only to those.
//
// The ring may be older than one that comes into use at the same time, and a
// long list of revocations is left out: a machine that has joined asks for the
// State first.
//
// Errors wrap crypto.ErrTokenProof (also if there is no such token: it takes as
// long), ErrTokenExpired, ErrTokenUsed, ErrTokenName, what ParseRequest returns,
// or are ErrTokenRevoked, ErrNameTaken, ErrRefused of package peer, or ErrLimit.
// Any other error is no fault of the machine.
func (k *Keeper) Join(ctx context.Context, r peer.JoinRequest) (*peer.JoinResult, error) {
	result, name, err := k.join(ctx, r)
	if err != nil {
		k.stats.JoinsRefused.Add(1)
		if r, ok := errors.AsType[refusal](err); ok {
			return nil, r.error
		}
		if e, ok := errors.AsType[*peer.Error](err); ok {
			return nil, e
		}
		if errors.Is(err, store.ErrUnavailable) {
			return nil, errNoMajority
		}
		// What a store's error wraps must not be taken for the machine's fault.
		return nil, errors.New(err.Error())
	}
	k.stats.Joins.Add(1)
	k.cfg.Log.Info("keeper: a node joined with token "+r.Token.String(), "peer", name, "ip", r.From.Addr().String())
	k.cfg.Changed()
	return result, nil
}

// refusal is what is wrong with the machine's request, by package crypto.
type refusal struct{ error }

func refuse(err error) error {
	if err == nil {
		return nil
	}
	return refusal{err}
}

func (k *Keeper) join(ctx context.Context, r peer.JoinRequest) (*peer.JoinResult, string, error) {
	asked, err := crypto.ParseRequest(r.CSR)
	if err != nil {
		return nil, "", refuse(err)
	}
	// Before the store is read: see call.ring.
	ring := k.cfg.Ring()
	l, err := k.cfg.Store.Read(ctx)
	if err != nil {
		return nil, "", fmt.Errorf("keeper: read the ledger: %w", err)
	}
	// Strangers cause no write.
	if err := prove(l, r); err != nil {
		return nil, "", err
	}
	if err := k.paced(l, r.Token, asked); err != nil {
		return nil, "", err
	}
	result := &peer.JoinResult{Gossip: ring.Encode()}
	err = k.cfg.Store.Update(ctx, func(l *Ledger) error {
		if err := prove(l, r); err != nil {
			return err
		}
		issued, err := k.admit(l, r.Token, asked, r.CSR)
		if err != nil {
			return err
		}
		roots, err := k.roots(l)
		if err != nil {
			return err
		}
		result.Certificate, result.Card = issued.Certificate, issued.Card
		result.CAs, result.CANumber = roots.DER(), l.CA.Number
		result.Members, result.Revocations = k.members(l, joinMembers), nil
		if len(l.Revocations) <= joinRevocations {
			result.Revocations = l.Revocations
		}
		return nil
	})
	if err != nil {
		return nil, "", fmt.Errorf("keeper: admit %s: %w", asked.Name, err)
	}
	return result, asked.Name, nil
}

// paced returns an error if too many join with tokens of nodes that are no
// administrators, or the same machine again and again. First joins with an
// administrator's tokens are as many as it said.
func (k *Keeper) paced(l *Ledger, id crypto.TokenID, asked crypto.Request) error {
	by := l.Nodes[l.Tokens[id].By]
	whose := "" // no node's name
	switch {
	case l.Nodes[asked.Name].Key == asked.Key:
		whose = asked.Name
	case by.Keeper || slices.Contains(by.Grants, "*"):
		return nil
	}
	if k.joining.allow(whose, time.Now()) {
		return nil
	}
	return peer.Errorf(peer.CodeBusy, "too many machines join at once: it tries again by itself")
}

// prove verifies that the machine has the secret of a token. One that does not
// exist takes as long: it is verified against a hash of which nobody knows a secret.
func prove(l *Ledger, r peer.JoinRequest) error {
	t, ok := l.Tokens[r.Token]
	if !ok {
		t.TokenRecord = crypto.TokenRecord{ID: r.Token}
	}
	return refuse(t.Verify(r.Proof, r.Exporter, crypto.RoleJoin))
}

// admit spends the token and writes the node's record. The name and the key
// must be each other's only ones.
func (k *Keeper) admit(l *Ledger, id crypto.TokenID, asked crypto.Request, csr []byte) (*crypto.Issued, error) {
	now := k.now()
	t := l.Tokens[id]
	if !t.Removed.IsZero() {
		return nil, peer.ErrTokenRevoked
	}
	if err := t.Check(asked.Name, asked.Key, now); err != nil {
		return nil, refuse(err)
	}
	n, again := l.Nodes[asked.Name]
	if err := k.vacant(l, asked, n, again); err != nil {
		return nil, err
	}
	if !again && len(l.Nodes) >= MaxNodes {
		return nil, limit("the cluster has %d nodes already: remove those that are gone (`tulle node rm`)", MaxNodes)
	}
	if err := t.Use(asked.Name, asked.Key, now); err != nil {
		return nil, refuse(err)
	}
	ca, err := k.signer(l)
	if err != nil {
		return nil, err
	}
	roots, err := k.roots(l)
	if err != nil {
		return nil, err
	}
	issued, err := ca.Issue(csr, crypto.Rights{Overlays: t.Overlays}, now)
	if err != nil {
		return nil, err
	}
	if !again {
		n = Node{Key: asked.Key, Joined: now}
	}
	n.Grants, n.By = t.Overlays, t.By
	if err := certify(&n, issued, roots, now); err != nil {
		return nil, err
	}
	if l.CA.Number > 0 { // without the answer the machine is no node, and none to wait for
		n.CA = ca.KeyID()
	}
	l.Tokens[id], l.Nodes[asked.Name] = t, n
	l.sweep(now)
	return issued, nil
}

// vacant returns an error unless the name may go to the key. n is the name's
// record if taken.
func (k *Keeper) vacant(l *Ledger, asked crypto.Request, n Node, taken bool) error {
	list, err := k.list(l)
	if err != nil {
		return err
	}
	switch {
	case taken && !n.Revoked.IsZero():
		return peer.Errorf(peer.CodeRefused, "node %s is revoked: remove it (`tulle node rm %s`) to let another machine have the name, or choose one with --name", asked.Name, asked.Name)
	case taken && n.Key != asked.Key:
		return peer.Errorf(peer.CodeNameTaken, "the name %s belongs to another machine: choose one with --name, or free it with `tulle node rm %s`", asked.Name, asked.Name)
	case taken && n.Keeper:
		return peer.Errorf(peer.CodeRefused, "%s is a keeper, which a token does not make: have it renew its certificate, or remove it (`tulle node rm %s`)", asked.Name, asked.Name)
	case list.Check("", asked.Key, 0) != nil:
		return peer.Errorf(peer.CodeRefused, "this machine's key is revoked: move its --state-dir away, so that it makes another, and join with a new token")
	case taken:
		return nil
	}
	for name, other := range l.Nodes {
		if other.Key == asked.Key {
			return peer.Errorf(peer.CodeRefused, "this machine's key is that of node %s: start it with --name %s, or give %s another --state-dir", name, name, asked.Name)
		}
	}
	return nil
}

// certify puts into a record what was issued.
func certify(n *Node, issued *crypto.Issued, roots *crypto.Roots, now time.Time) error {
	c, err := roots.Verify([][]byte{issued.Certificate}, now, nil)
	if err != nil {
		return fmt.Errorf("keeper: what the CA issued: %w", err)
	}
	n.Serial, n.Expires = c.Serial, c.NotAfter.UTC()
	return nil
}

// members returns some that are not revoked, keepers first.
func (k *Keeper) members(l *Ledger, most int) []peer.Member {
	out := []peer.Member{}
	for _, m := range k.cfg.Members() {
		if n := l.Nodes[m.Name]; n.Revoked.IsZero() {
			m.Keeper = n.Keeper // gossip may not have heard of it yet
			out = append(out, m)
		}
	}
	KeepersFirst(out)
	return out[:min(len(out), most)]
}

// KeepersFirst orders members so that a list that is cut keeps the keepers: they
// can tell the rest.
func KeepersFirst(list []peer.Member) {
	slices.SortStableFunc(list, func(a, b peer.Member) int {
		switch {
		case a.Keeper == b.Keeper:
			return 0
		case a.Keeper:
			return -1
		}
		return 1
	})
}

// keeperAddrs returns where keepers are: who is one the ledger says before gossip does.
func (k *Keeper) keeperAddrs(l *Ledger) (out []netip.AddrPort) {
	for _, m := range k.members(l, joinMembers) {
		if m.Keeper && m.VTEP.IsValid() && !slices.Contains(out, m.VTEP) {
			out = append(out, m.VTEP)
		}
	}
	for _, a := range k.cfg.Addrs() {
		if !slices.Contains(out, a) {
			out = append(out, a)
		}
	}
	return out
}

func limit(format string, a ...any) error { return peer.Errorf(CodeLimit, format, a...) }
