package ipam

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/tulle-net/tulle/store"
)

// heard is what this keeper knows of a lease: at the time `at` of its own clock
// the renewal of that number was at least `silence` ago.
type heard struct {
	number  uint64
	silence time.Duration
	at      time.Duration
}

// silence returns for how long at least the lease has not been renewed. Keepers'
// times of day do not matter. Each keeper adds to what the store says, or to what
// it knew itself, what has passed by its own clock since it read that; Reclaim
// writes it back, so it survives keepers and grows while any of them runs.
func (r *Registry) silence(node string, l *lease) time.Duration {
	_, now := r.cfg.Clock.Boot()
	key, out := heardKey{node, l.State}, time.Duration(l.SilentMS)*time.Millisecond
	r.mu.Lock()
	defer r.mu.Unlock()
	if h, ok := r.heard[key]; ok && h.number == l.Number {
		out = max(out, h.silence+now-h.at)
	}
	r.heard[key] = heard{number: l.Number, silence: out, at: now}
	return out
}

// forgetHeard drops what is known of leases that are gone.
func (r *Registry) forgetHeard(there map[heardKey]bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for k := range r.heard {
		if !there[k] {
			delete(r.heard, k)
		}
	}
}

// silenceShare: silence is written when it has grown by grace/silenceShare, so
// that of a node that renews it never is.
const silenceShare = 16

// Reclaim frees what leases have that were silent for longer than grace and a
// margin: of nodes that are not alive, and of states that were lost or removed.
// Every keeper calls it, every few minutes; what passes before a keeper's first
// call is not counted.
func (r *Registry) Reclaim(ctx context.Context, alive func(node string) bool) error {
	type found struct {
		node    string
		l       *lease
		current bool
		silence time.Duration
	}
	var leases []found
	var all []error
	err := r.cfg.Store.View(ctx, func(t store.Reader) error {
		leases, all = nil, nil
		return each(t, renewals, func(key, node string, value []byte) error {
			rec, err := parseRenewal(key, value)
			if err != nil {
				all = append(all, err) // of others' blocks nothing follows
				return nil
			}
			for i, l := range rec.States {
				leases = append(leases, found{node: node, l: l, current: i == len(rec.States)-1})
			}
			return nil
		})
	})
	if err != nil {
		return err
	}
	there := map[heardKey]bool{}
	for i := range leases {
		f := &leases[i]
		f.silence = r.silence(f.node, f.l)
		there[heardKey{f.node, f.l.State}] = true
	}
	r.forgetHeard(there)
	for _, f := range leases {
		live := f.current && !f.l.Removed && alive(f.node)
		switch limit := f.l.reclaimable(); {
		case f.silence >= limit && !live:
			err = r.reclaim(ctx, f.node, f.l)
		case f.silence < limit && f.silence.Milliseconds()-f.l.SilentMS >= f.l.GraceMS/silenceShare:
			err = r.writeSilence(ctx, f.node, f.l, f.silence)
		}
		if err != nil {
			all = append(all, err)
		}
		if errors.Is(err, store.ErrUnavailable) || ctx.Err() != nil {
			break
		}
		err = nil
	}
	if err == nil {
		all = append(all, r.withdrawOld(ctx))
	}
	return errors.Join(all...)
}

func (r *Registry) writeSilence(ctx context.Context, node string, seen *lease, silence time.Duration) error {
	return r.update(ctx, node, nil, false, func(e *edit) error {
		if l := e.renewal.find(seen.State); l != nil && l.Number == seen.Number {
			l.SilentMS = max(l.SilentMS, silence.Milliseconds())
		}
		return nil
	})
}

// reclaim frees all that the lease has, unless it is renewed meanwhile.
func (r *Registry) reclaim(ctx context.Context, node string, seen *lease) error {
	freed, err := r.free(ctx, node, seen, func(l *lease) bool { return l.Number == seen.Number })
	if err == nil && freed > 0 {
		r.cfg.Log.Info("addresses of a node that is gone are free again", "peer", node)
	}
	return err
}

// free frees what the lease has, an overlay a transaction, as long as still says
// so, and then the lease.
func (r *Registry) free(ctx context.Context, node string, seen *lease, still func(*lease) bool) (freed int, err error) {
	for _, name := range seen.Overlays {
		n := 0
		err := r.update(ctx, node, []string{name}, false, func(e *edit) error {
			n = 0
			l := e.renewal.find(seen.State)
			if l == nil || !still(l) {
				return nil
			}
			n = e.free(e.books[name], l.State)
			return e.settle(e.books[name], l, -1)
		})
		if err != nil {
			return freed, err
		}
		freed += n
	}
	return freed, r.update(ctx, node, nil, false, func(e *edit) error {
		if l := e.renewal.find(seen.State); l != nil && still(l) && len(l.Overlays) == 0 {
			e.renewal.States = slices.DeleteFunc(e.renewal.States, func(o *lease) bool { return o == l })
		}
		return nil
	})
}

// withdrawOld ends requests for addresses whose keeper is gone.
func (r *Registry) withdrawOld(ctx context.Context) error {
	type asked struct {
		overlay string
		addr    netip.Addr
		h       *holder
	}
	var old []asked
	err := r.cfg.Store.View(ctx, func(t store.Reader) error {
		old = nil
		return each(t, store.KindIPAM+"/", func(key, rest string, value []byte) error {
			part := strings.SplitN(rest, "/", 3)
			if len(part) != 3 || part[1] != "fixed" {
				return nil
			}
			a, err := netip.ParseAddr(part[2])
			if err != nil {
				return nil // Check tells
			}
			h, err := parseHolder(key, value)
			if err == nil && h.Asked != "" && r.cfg.Now().Sub(h.Since).Abs() >= askFor {
				old = append(old, asked{part[0], a, h})
			}
			return nil
		})
	})
	for _, a := range old {
		if err == nil {
			err = r.update(ctx, a.h.Node, []string{a.overlay}, false, func(e *edit) error {
				return e.withdraw(a.overlay, a.addr, a.h.Asked)
			})
		}
	}
	return err
}

// Forget is for a node that was removed from the cluster: nothing is renewed for
// it any more. What it has is free when it has been silent for grace and a
// margin, whether it is alive or not; at once if the machine is off, for which
// the caller answers: until Forget returns it must not be using any of its
// addresses, nor lease others.
func (r *Registry) Forget(ctx context.Context, node string, off bool) error {
	if err := checkNames(node); err != nil {
		return err
	}
	var leases []*lease
	err := r.update(ctx, node, nil, false, func(e *edit) error {
		e.renewal.States = slices.DeleteFunc(e.renewal.States, func(l *lease) bool { return len(l.Overlays) == 0 })
		leases = e.renewal.States
		for _, l := range leases {
			l.Removed = true
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("ipam: the addresses of node %s stay leased: %w", node, err)
	}
	if !off {
		return nil
	}
	for _, l := range leases {
		if _, err := r.free(ctx, node, l, func(l *lease) bool { return l.Removed }); err != nil {
			return fmt.Errorf("ipam: some addresses of node %s stay leased, until its grace is over: %w", node, err)
		}
	}
	return nil
}
