package keeper

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/tulle-net/tulle/crypto"
	"github.com/tulle-net/tulle/peer"
)

const (
	// caTimeout bounds one look at a stage: each keeper may open its store anew.
	caTimeout = 30 * time.Second
	// A stage that waits is looked at again after caEvery, doubled up to caSeldom:
	// it may wait for days.
	caEvery  = 500 * time.Millisecond
	caSeldom = 15 * time.Second
	// caLease is for how long a keeper has the change of the CA to itself, and
	// caLeast what it must have left of that to look once more.
	caLease = 2 * caLeast
	caLeast = caTimeout + caSeldom
	// caPushEvery is how often nodes are told again that a change is under way:
	// those that were not there learn of it from gossip.
	caPushEvery = 30 * time.Second
	// maxLeft bounds the names of nodes that a change has left behind.
	maxLeft = 1000
	// tokensAtOnce are removed in one transaction.
	tokensAtOnce = 64
)

// errRestarting: this keeper's own store is closing, and another Keeper goes on.
var errRestarting = errors.New("keeper: the store is opened anew")

// changeCA begins a change of the CA, or has the one that is under way wait for
// nobody any more. What follows Run does: see completeCA.
func (c *call) changeCA(ctx context.Context, b *changeCABody) (any, error) {
	if err := c.asker.mustAdmin("change the cluster's CA"); err != nil {
		return nil, err
	}
	if c.k.cfg.KeepCA == nil {
		return nil, peer.ErrUnavailable
	}
	select {
	case c.k.changing <- struct{}{}:
		defer func() { <-c.k.changing }()
	case <-ctx.Done():
		return nil, peer.ErrBusy
	}
	l, err := c.k.cfg.Store.Read(ctx) // somebody may have begun meanwhile
	if err != nil {
		return nil, fmt.Errorf("keeper: read the ledger: %w", err)
	}
	switch {
	case b.Finish:
		err = c.finishCA(ctx)
	case l.CA.Stage == CASettled && (l.CA.Number == 0 || l.CA.Nonce != b.Nonce):
		err = c.beginCA(ctx, l, b.Nonce)
	}
	if err != nil {
		return nil, err
	}
	ringBell(c.k.resume)
	return c.caStatus(ctx, nil)
}

// beginCA makes the next CA, gives its key to all keepers, and introduces it.
func (c *call) beginCA(ctx context.Context, l *Ledger, nonce uint64) error {
	k := c.k
	if _, err := k.signer(l); err != nil {
		return err
	}
	for _, name := range l.keepersBut(k.cfg.Name) {
		if _, err := k.order(ctx, name, KeepOrder{Step: KeepAsk}); err != nil {
			return absent(name, err)
		}
	}
	err := c.change(ctx, func(l *Ledger, _ asker) error {
		if l.CA.Stage != CASettled {
			return nil
		}
		return k.leaseCA(l)
	})
	if err != nil {
		return err
	}
	next, err := k.makeCA(ctx, l)
	if err != nil {
		return err
	}
	err = c.change(ctx, func(l *Ledger, _ asker) error {
		if l.CA.Stage != CASettled {
			return nil // another keeper was faster, and goes on
		}
		if l.CA.Keeper != k.cfg.Name {
			return peer.Errorf(peer.CodeBusy, "keeper %s begins to change the CA: see `tulle ca status`", l.CA.Keeper)
		}
		return k.introduce(l, next, nonce)
	})
	if err == nil {
		k.cfg.Log.Info("keeper: a new CA is introduced", "peer", c.cert.Name)
	}
	return err
}

// absent says that a keeper has to take part in a change of the CA.
func absent(name string, err error) error {
	return invalid("keeper %s does not answer, and every keeper has to have the key of the new CA: start it, or demote it (`tulle node demote %s`): %v", name, name, err)
}

// makeCA makes the next CA. It is on the disk of every keeper when it returns.
func (k *Keeper) makeCA(ctx context.Context, l *Ledger) (*crypto.CA, error) {
	next, err := crypto.NewCA(k.cfg.Roots.Cluster(), k.cfg.Now())
	if err != nil {
		return nil, err
	}
	if err := k.cfg.KeepCA(next); err != nil {
		return nil, fmt.Errorf("keeper: keep the new CA: %w", err)
	}
	if name, err := k.handCA(ctx, l, next); err != nil {
		return nil, absent(name, err)
	}
	return next, nil
}

// handCA gives the key of a CA to all other keepers; the name is that of the first
// who did not take it.
func (k *Keeper) handCA(ctx context.Context, l *Ledger, ca *crypto.CA) (name string, err error) {
	key := ca.Key().Marshal()
	defer clear(key)
	for _, name := range l.keepersBut(k.cfg.Name) {
		if _, err := k.order(ctx, name, KeepOrder{Step: KeepCA, NextCA: ca.DER(), NextKey: key}); err != nil {
			return name, err
		}
	}
	return "", nil
}

// finishCA has the change wait for no node that is away. Keepers it does not leave
// behind: what they hold would be in the way of their coming back.
func (c *call) finishCA(ctx context.Context) error {
	return c.change(ctx, func(l *Ledger, _ asker) error {
		switch l.CA.Stage {
		case CASettled:
			return invalid("no change of the CA is under way, so there is none to finish: `tulle ca rotate` begins one")
		case CAGone:
			return nil
		}
		l.CA.Finish = true
		return nil
	})
}

// completeCA takes a change of the CA through its stages, whoever began it, until
// ctx ends.
func (k *Keeper) completeCA(ctx context.Context) {
	told, soon := "", caEvery
	for {
		wait := sweepEvery
		mine, moved, err := k.advanceCA(ctx)
		if moved {
			soon = caEvery
		}
		switch {
		case errors.Is(err, errRestarting):
			<-ctx.Done()
			return
		case err != nil && ctx.Err() == nil && err.Error() != told:
			told = err.Error()
			k.cfg.Log.Warn("keeper: the CA is not changed yet; will try again", "err", err)
		case err == nil:
			told = ""
		}
		if mine {
			wait, soon = soon, min(2*soon, caSeldom)
		}
		t := time.NewTimer(wait)
		select {
		case <-k.resume:
			soon = caEvery
		case <-t.C:
		case <-ctx.Done():
		}
		t.Stop()
		if ctx.Err() != nil {
			return
		}
	}
}

// advanceCA goes as far as it can now. mine: the change is this keeper's to go on
// with; moved: a stage is over.
func (k *Keeper) advanceCA(ctx context.Context) (mine, moved bool, err error) {
	for ; ; moved = true {
		l, err := k.takeCA(ctx)
		if err != nil || l == nil {
			return false, moved, err
		}
		look, cancel := context.WithTimeout(ctx, caTimeout)
		w, err := k.lookCA(look, l)
		if err == nil && w != nil {
			err = k.waitCA(look, l, w)
			cancel()
			return true, moved, err
		}
		cancel()
		if err != nil {
			return true, moved, err
		}
	}
}

// waiting is why a stage goes on: for whom, and what they have to do.
type waiting struct {
	why   string
	names []string
}

// takeCA has a change that is under way be this keeper's for a while; nil: there
// is none, or it is another's.
func (k *Keeper) takeCA(ctx context.Context) (*Ledger, error) {
	l, err := k.cfg.Store.Read(ctx)
	if err != nil {
		return nil, fmt.Errorf("keeper: read the ledger: %w", err)
	}
	if l.CA.Stage == CASettled {
		return nil, nil
	}
	err = k.cfg.Store.Update(ctx, func(next *Ledger) error {
		l = nil
		switch next.CA.Stage {
		case CASigning, CAGone:
			if _, err := k.signer(next); err != nil {
				return nil // one who has the key does it
			}
		case CAIntroduced:
		default: // none, or a later release's
			return nil
		}
		if err := k.leaseCA(next); err != nil {
			return nil // another keeper does it
		}
		l = next
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("keeper: go on to change the CA: %w", err)
	}
	return l, nil
}

// leaseCA has the change be this keeper's for a while, or says whose it is.
func (k *Keeper) leaseCA(l *Ledger) error {
	a, now := &l.CA, k.now()
	if a.Keeper != "" && a.Keeper != k.cfg.Name && now.Before(a.Until) {
		return peer.Errorf(peer.CodeBusy, "keeper %s is changing the CA: see `tulle ca status`", a.Keeper)
	}
	// Written only when it must be: a stage may wait for long.
	if a.Keeper != k.cfg.Name || now.Add(caLeast).After(a.Until) {
		a.Keeper, a.Until = k.cfg.Name, now.Add(caLease)
	}
	return nil
}

// stepCA enters the next stage, if the change is this keeper's still and as it was
// looked at.
func (k *Keeper) stepCA(ctx context.Context, as *Ledger, f func(*Ledger) error) error {
	err := k.cfg.Store.Update(ctx, func(l *Ledger) error {
		if l.CA.Number != as.CA.Number || l.CA.Keeper != k.cfg.Name {
			return nil
		}
		if err := k.leaseCA(l); err != nil {
			return err
		}
		return f(l)
	})
	if err != nil {
		return fmt.Errorf("keeper: change the CA: %w", err)
	}
	k.cfg.Changed()
	return nil
}

// waitCA writes what a stage waits for, for those that ask.
func (k *Keeper) waitCA(ctx context.Context, as *Ledger, w *waiting) error {
	why := w.why[:min(len(w.why), maxWhy)]
	names := w.names[:min(len(w.names), maxWaits)]
	if as.CA.Why == why && slices.Equal(as.CA.Waits, names) {
		return nil
	}
	return k.stepCA(ctx, as, func(l *Ledger) error {
		l.CA.Why, l.CA.Waits = strings.ToValidUTF8(why, ""), names
		return nil
	})
}

// lookCA enters the next stage, or says what this one waits for.
func (k *Keeper) lookCA(ctx context.Context, l *Ledger) (*waiting, error) {
	switch l.CA.Stage {
	case CAIntroduced:
		return k.lookIntroduced(ctx, l)
	case CASigning:
		return k.lookSigning(ctx, l)
	default:
		return k.lookGone(ctx, l)
	}
}

// lookIntroduced waits until every keeper has the key, every node that is there
// both roots, and every member of the store believes both.
func (k *Keeper) lookIntroduced(ctx context.Context, l *Ledger) (*waiting, error) {
	next := k.next(l)
	if next == nil {
		// Whoever began was lost with the key: nothing was signed with it.
		next, err := k.makeCA(ctx, l)
		if err != nil {
			return &waiting{why: err.Error()}, nil
		}
		return nil, k.stepCA(ctx, l, func(l *Ledger) error { return k.introduce(l, next, 0) })
	}
	if name, err := k.handCA(ctx, l, next); err != nil {
		return &waiting{absent(name, err).Error(), []string{name}}, nil
	}
	late := k.pushCA(ctx, l)
	if len(late) > 0 && (!l.CA.Finish || slices.Contains(late, k.cfg.Name)) {
		return &waiting{"these nodes are there, and have not taken the new CA certificate yet", late}, nil
	}
	if w, err := k.reopenAll(ctx, l); w != nil || err != nil {
		return w, err
	}
	if err := k.stepCA(ctx, l, k.promoteCA); err != nil {
		return nil, err
	}
	k.cfg.Log.Info("keeper: the new CA signs from now on")
	return nil, nil
}

// lookSigning waits until every node has a certificate of the CA that signs, and
// every member of the store shows one.
func (k *Keeper) lookSigning(ctx context.Context, l *Ledger) (*waiting, error) {
	roots, err := k.roots(l)
	if err != nil {
		return nil, err
	}
	// A keeper that was made since has it already; one that was restored has not.
	if ca, err := k.signer(l); err == nil {
		if name, err := k.handCA(ctx, l, ca); err != nil {
			return &waiting{absent(name, err).Error(), []string{name}}, nil
		}
	}
	if late := k.pushCA(ctx, l); slices.Contains(late, k.cfg.Name) {
		return &waiting{"this keeper has not taken the change yet", late}, nil
	}
	if w, err := k.reopenAll(ctx, l); w != nil || err != nil {
		return w, err
	}
	var w *waiting
	dropped := false
	err = k.stepCA(ctx, l, func(l *Ledger) error {
		w = nil
		behind := l.behind(roots.Signer(), k.now())
		needed := slices.DeleteFunc(slices.Clone(behind), func(name string) bool {
			return l.CA.Finish && !l.Nodes[name].Keeper && !k.alive(name)
		})
		if dropped = len(needed) == 0; dropped {
			return k.dropCA(l, behind[:min(len(behind), maxLeft)])
		}
		w = &waiting{"these nodes have no certificate of the new CA yet: they get it when they are back; `tulle ca rotate --finish` goes on without those that are away and no keepers", needed}
		return nil
	})
	if err == nil && dropped {
		k.cfg.Log.Info("keeper: the former CA is believed no more")
	}
	return w, err
}

// lookGone waits until the keepers have forgotten the CA of before.
func (k *Keeper) lookGone(ctx context.Context, l *Ledger) (*waiting, error) {
	if late := k.pushCA(ctx, l); slices.Contains(late, k.cfg.Name) {
		return &waiting{"this keeper has not taken the change yet", late}, nil
	}
	if w, err := k.reopenAll(ctx, l); w != nil || err != nil {
		return w, err
	}
	roots, err := k.roots(l)
	if err != nil {
		return nil, err
	}
	f := roots.Signer()
	settled := false
	for more := true; more; {
		more = false // if the change is not this keeper's any more
		err := k.stepCA(ctx, l, func(l *Ledger) error {
			n := 0
			gone := l.removeTokens(k.now(), func(t Token) bool {
				if t.CA == crypto.KeyID(f[:len(t.CA)]) {
					return false
				}
				n++
				return n <= tokensAtOnce
			})
			if more = n > tokensAtOnce; !more {
				l.CA.Stage, l.CA.Keeper, l.CA.Until, l.CA.Finish = CASettled, "", time.Time{}, false
				l.CA.Waits, l.CA.Why = nil, ""
			}
			l.CA.TokensRemoved = append(slices.Clone(l.CA.TokensRemoved), gone...)
			settled = !more
			return nil
		})
		if err != nil {
			return nil, err
		}
	}
	if settled {
		k.cfg.Log.Info("keeper: the CA is changed")
	}
	return nil, nil
}

// pushCA has nodes pull the stage, unless all that were there did lately. It
// returns who did not.
func (k *Keeper) pushCA(ctx context.Context, l *Ledger) []string {
	if p := k.pushed.Load(); p != nil && p.number == l.CA.Number && len(p.late) == 0 && time.Since(p.at) < caPushEvery {
		return nil
	}
	late := slices.DeleteFunc(k.push(ctx, nil), func(name string) bool {
		n, ok := l.Nodes[name]
		return !ok || !n.Revoked.IsZero()
	})
	k.pushed.Store(&pushedCA{l.CA.Number, late, time.Now()})
	return late
}

// pushedCA is what came of the last push of a stage.
type pushedCA struct {
	number uint64
	late   []string
	at     time.Time
}

// reopenAll has each keeper's member of the store show and believe the CA
// certificates of now, one at a time, this keeper's last: a majority is there all
// the time, where there are three.
func (k *Keeper) reopenAll(ctx context.Context, l *Ledger) (*waiting, error) {
	for _, name := range append(l.keepersBut(k.cfg.Name), k.cfg.Name) {
		a, err := k.order(ctx, name, KeepOrder{Step: KeepReopen, Number: l.CA.Number})
		if err != nil {
			return &waiting{fmt.Sprintf("keeper %s has not opened its store with the new CA certificates yet: start it, or demote it (`tulle node demote %s`): %v", name, name, err), []string{name}}, nil
		}
		if a.Restarting {
			return nil, errRestarting
		}
	}
	return nil, nil
}

// alive reports whether a node is there, as far as gossip shows.
func (k *Keeper) alive(name string) bool {
	return name == k.cfg.Name || k.cfg.Alive == nil || k.cfg.Alive(name)
}

// caStatus says how far a change of the CA is.
func (c *call) caStatus(ctx context.Context, _ *caStatusBody) (any, error) {
	l, err := c.k.cfg.Store.Read(ctx)
	if err != nil {
		return nil, fmt.Errorf("keeper: read the ledger: %w", err)
	}
	roots, err := c.k.roots(l)
	if err != nil {
		return nil, err
	}
	s := &CAStatus{
		Stage: l.CA.Stage, Number: l.CA.Number, Started: l.CA.Started, Why: l.CA.Why,
		Left: l.CA.Left, TokensRemoved: l.CA.TokensRemoved,
	}
	for _, f := range roots.Fingerprints() {
		_, end := roots.Times(f)
		s.Roots = append(s.Roots, CARoot{f.String(), end.UTC()})
	}
	names := l.CA.Waits
	if l.CA.Stage == CASigning {
		if behind := l.behind(roots.Signer(), c.k.now()); len(names) == 0 || len(behind) > 0 {
			names = behind
		}
	}
	for _, name := range names[:min(len(names), nodesPage)] {
		s.Waiting = append(s.Waiting, CAWaiting{name, l.Nodes[name].Keeper, c.k.alive(name)})
	}
	return s, nil
}
