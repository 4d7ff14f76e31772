package keeper

import (
	"bytes"
	"context"
	"fmt"
	"maps"
	"math"
	"slices"
	"time"

	"github.com/tulle-net/tulle/crypto"
	"github.com/tulle-net/tulle/peer"
)

// Stage is how far a change of the CA is.
type Stage string

// The stages, in order. Each begins in one transaction, and is over when all that
// have to know of it do.
const (
	// CASettled: nothing is to be done.
	CASettled Stage = ""
	// CAIntroduced: the next CA is believed beside the one that signs. It ends when
	// every node that is there has both, and so has every member of the store.
	CAIntroduced Stage = "introduced"
	// CASigning: the next CA signs. It ends when every node has a certificate of it.
	CASigning Stage = "signing"
	// CAGone: the CA of before is believed no more. It ends when the keepers have
	// forgotten it.
	CAGone Stage = "gone"
)

const (
	// maxWaits bounds the names of nodes in an Authority.
	maxWaits = 100
	// maxWhy bounds Authority.Why, in bytes.
	maxWhy = 300
)

// Authority is whom a cluster's nodes believe, and how far a change of that is.
// What its slices hold is never changed.
type Authority struct {
	// Number grows with each stage; 0: the CA was never changed, and the rest is empty.
	Number uint64 `json:"number,omitempty,string"`
	Stage  Stage  `json:"stage,omitempty"`
	// Roots are for crypto.NewRoots: the CA that signs first.
	Roots [][]byte `json:"roots,omitempty"`
	// Started is when the last change was; Nonce tells a request that came twice.
	Started time.Time `json:"started,omitzero"`
	Nonce   uint64    `json:"nonce,omitempty,string"`
	// Finish: nodes that are away are not waited for. Left are those that were not,
	// at most 1,000.
	Finish bool     `json:"finish,omitempty"`
	Left   []string `json:"left,omitempty"`
	// TokensRemoved are those that were of the CA that is gone.
	TokensRemoved []crypto.TokenID `json:"tokens_removed,omitempty"`
	// Waits are nodes that the stage waited for when it was last looked at, at most
	// 100, and Why says what it waits for.
	Waits []string `json:"waits,omitempty"`
	Why   string   `json:"why,omitempty"`
	// Keeper is at it now, until Until at the latest; "": nobody is.
	Keeper string    `json:"keeper,omitempty"`
	Until  time.Time `json:"until,omitzero"`

	extra extra
}

// check returns what no keeper writes. What the roots are, crypto.NewRoots says.
func (a Authority) check() error {
	if a.Number > math.MaxInt64 || len(a.Roots) > crypto.MaxRoots || a.Number > 0 && len(a.Roots) == 0 || a.Stage != CASettled && a.Number == 0 ||
		len(a.Waits) > maxWaits || len(a.Left) > maxLeft || len(a.TokensRemoved) > MaxTokens || a.Keeper != "" && crypto.CheckName(a.Keeper) != nil {
		return errOutOfRange
	}
	return checkTimes(a.Started, a.Until)
}

// readRoots are CA certificates and what they were read from.
type readRoots struct {
	text  [][]byte
	roots *crypto.Roots
}

// roots returns whom nodes believe by the ledger.
func (k *Keeper) roots(l *Ledger) (*crypto.Roots, error) {
	if l.CA.Number == 0 {
		return k.cfg.Roots, nil
	}
	if r := k.believed.Load(); r != nil && slices.EqualFunc(r.text, l.CA.Roots, bytes.Equal) {
		return r.roots, nil
	}
	roots, err := crypto.NewRoots(l.CA.Roots...)
	if err != nil {
		return nil, fmt.Errorf("keeper: the store's CA certificates: %w", err)
	}
	k.believed.Store(&readRoots{l.CA.Roots, roots})
	return roots, nil
}

// signer returns the CA that signs by the ledger.
func (k *Keeper) signer(l *Ledger) (*crypto.CA, error) {
	roots, err := k.roots(l)
	if err != nil {
		return nil, err
	}
	if ca := k.ca(roots.Signer()); ca != nil {
		return ca, nil
	}
	// By this code the asker goes on to the next keeper.
	return nil, peer.Errorf(peer.CodeUnavailable, "keeper %s has not the key of the CA that signs by now: ask another one", k.cfg.Name)
}

// ca returns the CA of that fingerprint; nil: its key is not here.
func (k *Keeper) ca(f crypto.Fingerprint) *crypto.CA {
	if k.cfg.CA.Fingerprint() == f {
		return k.cfg.CA
	}
	if k.cfg.CAs == nil {
		return nil
	}
	return k.cfg.CAs(f)
}

// knows reports whether a certificate, which was verified once, is by a CA that
// is believed still.
func (k *Keeper) knows(l *Ledger, cert *crypto.Certificate) bool {
	if l.CA.Number == 0 {
		return true
	}
	roots, err := k.roots(l)
	return err == nil && roots.Has(cert.Issuer)
}

// office is what a node that becomes a keeper needs of this one.
func (k *Keeper) office(ctx context.Context) (*KeepOrder, error) {
	l, err := k.cfg.Store.Read(ctx)
	if err != nil {
		return nil, fmt.Errorf("keeper: read the ledger: %w", err)
	}
	ca, err := k.signer(l)
	if err != nil {
		return nil, err
	}
	o := &KeepOrder{CAKey: ca.Key().Marshal()}
	if next := k.next(l); next != nil {
		o.NextCA, o.NextKey = next.DER(), next.Key().Marshal()
	}
	return o, nil
}

// next returns the CA that is introduced; nil: there is none, or its key is not here.
func (k *Keeper) next(l *Ledger) *crypto.CA {
	roots, err := k.roots(l)
	if err != nil || l.CA.Stage != CAIntroduced {
		return nil
	}
	for _, f := range roots.Fingerprints() {
		if f != roots.Signer() {
			return k.ca(f)
		}
	}
	return nil
}

// enter makes a stage the ledger's, with these roots. The list of revocations is
// signed anew: by the CA that signs from now on; and its number, which passports
// tell, has every node that misses the push pull.
func (k *Keeper) enter(l *Ledger, s Stage, roots *crypto.Roots) error {
	l.CA.Number, l.CA.Stage, l.CA.Roots = l.CA.Number+1, s, roots.DER()
	l.CA.Waits, l.CA.Why = nil, ""
	return k.amend(l, k.now(), func(list []crypto.Revocation) []crypto.Revocation { return list })
}

// introduce puts next beside the CA that signs. It replaces one that was introduced
// and whose key is lost: nothing was signed with that.
func (k *Keeper) introduce(l *Ledger, next *crypto.CA, nonce uint64) error {
	ca, err := k.signer(l)
	if err != nil {
		return err
	}
	roots, err := crypto.Introduce(ca, next, k.cfg.Now())
	if err != nil {
		return fmt.Errorf("keeper: introduce a CA: %w", err)
	}
	if l.CA.Stage == CASettled {
		l.CA.Started, l.CA.Nonce = k.now(), nonce
		l.CA.Finish, l.CA.Left, l.CA.TokensRemoved = false, nil, nil
	}
	return k.enter(l, CAIntroduced, roots)
}

// promoteCA has the CA that is introduced sign.
func (k *Keeper) promoteCA(l *Ledger) error {
	next := k.next(l)
	if next == nil {
		return peer.Errorf(peer.CodeUnavailable, "keeper %s has not the key of the next CA", k.cfg.Name)
	}
	roots, err := k.roots(l)
	if err == nil {
		roots, err = roots.Promoted(next.Fingerprint())
	}
	if err != nil {
		return err
	}
	return k.enter(l, CASigning, roots)
}

// dropCA ends the belief in the CA of before.
func (k *Keeper) dropCA(l *Ledger, left []string) error {
	roots, err := k.roots(l)
	if err != nil {
		return err
	}
	l.CA.Left = left
	return k.enter(l, CAGone, roots.Only())
}

// behind returns the nodes that have no certificate of the CA that signs, by name:
// those that can come back without a token.
func (l *Ledger) behind(signer crypto.Fingerprint, now time.Time) []string {
	var names []string
	for _, name := range slices.Sorted(maps.Keys(l.Nodes)) {
		n := l.Nodes[name]
		if n.Revoked.IsZero() && now.Before(n.Expires.Add(crypto.Skew)) && n.CA != crypto.KeyID(signer[:len(n.CA)]) {
			names = append(names, name)
		}
	}
	return names
}

// keepersBut returns the other keepers, by name.
func (l *Ledger) keepersBut(self string) []string {
	var names []string
	for _, name := range slices.Sorted(maps.Keys(l.Nodes)) {
		if n := l.Nodes[name]; name != self && n.Keeper && n.Revoked.IsZero() {
			names = append(names, name)
		}
	}
	return names
}

// holds notes by which CA the asker says that it has a certificate. It has it on
// its disk: what was issued may have been lost on the way.
func (c *call) holds(ctx context.Context, id crypto.KeyID) error {
	due := func(l *Ledger) bool {
		roots, err := c.k.roots(l)
		if err != nil || l.CA.Stage != CASigning {
			return false
		}
		f := roots.Signer()
		return id == crypto.KeyID(f[:len(id)]) && l.Nodes[c.cert.Name].CA != id
	}
	if id == (crypto.KeyID{}) || !due(c.ledger) {
		return nil
	}
	err := c.change(ctx, func(l *Ledger, a asker) error {
		if due(l) {
			a.record.CA = id
			l.Nodes[a.cert.Name] = a.record
		}
		return nil
	})
	ringBell(c.k.resume)
	return err
}

func ringBell(bell chan struct{}) {
	select {
	case bell <- struct{}{}:
	default:
	}
}
