package keeper

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/tulle-net/tulle/crypto"
	"github.com/tulle-net/tulle/peer"
)

const (
	// leaseTime is for how long a keeper has the change of the gossip keys to
	// itself. Keepers' clocks may differ by more: then two change them at once,
	// each in epochs of its own, and the higher ones win everywhere.
	leaseTime = 2 * changeTimeout
	// behindTime is how long a keeper that has not the newest ring waits for it
	// before it makes the next one from what it has.
	behindTime = time.Minute
	// turnSteps is how many rings a change goes through: Stage, Promote, Retire.
	turnSteps = 3
	// maxTurns bounds the changes that follow each other in one request.
	maxTurns = 4
)

// rotateGossip changes the gossip keys of the whole cluster.
func (c *call) rotateGossip(ctx context.Context, _ *rotateGossipBody) (any, error) {
	var wanted uint64
	err := c.change(ctx, func(l *Ledger, a asker) error {
		if err := a.mustAdmin("change the gossip keys"); err != nil {
			return err
		}
		l.Gossip.Wanted++
		wanted = l.Gossip.Wanted
		return nil
	})
	if err != nil {
		return nil, err
	}
	ctx, cancel := c.k.detached(ctx)
	defer cancel()
	unreached, err := c.k.rotate(ctx, wanted, nil)
	return c.k.outcome(unreached, err), nil
}

// spread tells the cluster that the node is gone, and changes the gossip keys,
// which it knows. What it cannot complete Run will.
func (k *Keeper) spread(ctx context.Context, wanted uint64, gone string) *Outcome {
	ctx, cancel := k.detached(ctx)
	defer cancel()
	// Connections are torn down first: that takes one pull.
	late := k.push(ctx, []string{gone})
	unreached, err := k.rotate(ctx, wanted, []string{gone}, late...)
	return k.outcome(unreached, err)
}

func (k *Keeper) outcome(unreached []string, err error) *Outcome {
	if err != nil {
		k.cfg.Log.Warn("keeper: the gossip keys are not changed yet; a keeper will try again", "err", err)
	}
	return &Outcome{Unreached: unreached, KeysPending: err != nil}
}

// rotate makes sure that the change of that number, or a later one, is
// completed. gone are told nothing, late only at the end: whoever did not
// answer a moment ago is not waited for at each step. It returns whom the end
// did not reach, late if there was nothing to do. ErrBusy: another keeper is at it.
func (k *Keeper) rotate(ctx context.Context, wanted uint64, gone []string, late ...string) (unreached []string, err error) {
	select {
	case k.rotating <- struct{}{}:
		defer func() { <-k.rotating }()
	case <-ctx.Done():
		return late, peer.ErrBusy
	}
	unreached = late
	for range maxTurns {
		t, err := k.lease(ctx, wanted)
		if err != nil || t == nil {
			return unreached, err
		}
		t.except = append(t.except, gone...)
		if unreached, err = k.take(ctx, t, late); err != nil {
			return unreached, err
		}
		if wanted, err = k.release(ctx, t); err != nil || wanted == 0 {
			return unreached, err
		}
		late = unreached
	}
	return unreached, peer.ErrBusy // Run goes on
}

// turn is one change of the gossip keys.
type turn struct {
	ring *crypto.GossipRing // from which it starts
	base uint64             // the epochs behind it are this change's own
	goal uint64             // the number of the last change that it covers
	// except are those who are revoked.
	except []string
}

// lease has the change of that number begun by this keeper; nil: it is done.
func (k *Keeper) lease(ctx context.Context, wanted uint64) (*turn, error) {
	var t *turn
	err := k.cfg.Store.Update(ctx, func(l *Ledger) error {
		t = nil
		g, now := &l.Gossip, k.now()
		if g.Done >= wanted {
			return nil
		}
		ring := k.cfg.Ring()
		others := g.Keeper != "" && g.Keeper != k.cfg.Name
		switch {
		case others && now.Before(g.Until):
			return peer.Errorf(peer.CodeBusy, "keeper %s is changing the gossip keys: try again in a moment", g.Keeper)
		case others && ring.Epoch < g.Epoch && now.Before(g.Until.Add(behindTime)):
			return peer.Errorf(peer.CodeUnavailable, "this keeper has not the newest gossip keys yet: try again in a moment")
		}
		t = &turn{ring: ring, base: max(g.Epoch, ring.Epoch), goal: g.Wanted}
		for name, n := range l.Nodes {
			if !n.Revoked.IsZero() {
				t.except = append(t.except, name)
			}
		}
		slices.Sort(t.except)
		g.Epoch, g.Keeper, g.Until = t.base+turnSteps, k.cfg.Name, now.Add(leaseTime)
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("keeper: begin to change the gossip keys: %w", err)
	}
	return t, nil
}

// take takes the three steps, each at every node that is there before the next:
// all read the new key before one sends with it, and none sends with the old
// one when it is dropped.
func (k *Keeper) take(ctx context.Context, t *turn, late []string) (unreached []string, err error) {
	steps := [turnSteps]func(*crypto.GossipRing) *crypto.GossipRing{
		(*crypto.GossipRing).Stage, (*crypto.GossipRing).Promote, (*crypto.GossipRing).Retire,
	}
	ring := t.ring
	unreached = late
	for i, step := range steps {
		if err := ctx.Err(); err != nil {
			return unreached, fmt.Errorf("keeper: change the gossip keys: %w", err)
		}
		ring = step(ring)
		ring.Epoch = t.base + uint64(i) + 1
		if err := k.cfg.SetRing(ring); err != nil {
			return unreached, fmt.Errorf("keeper: change the gossip keys: keep step %d of %d: %w", i+1, turnSteps, err)
		}
		except := slices.Clone(t.except)
		if i < turnSteps-1 {
			except = append(except, late...)
		}
		unreached = k.push(ctx, except)
		late = append(slices.Clone(late), unreached...)
	}
	return unreached, nil
}

// release writes that the change is completed; it returns the number of the
// next one that is wanted by now, or 0.
func (k *Keeper) release(ctx context.Context, t *turn) (next uint64, err error) {
	err = k.cfg.Store.Update(ctx, func(l *Ledger) error {
		next = 0
		g := &l.Gossip
		g.Done = max(g.Done, t.goal)
		if g.Keeper == k.cfg.Name {
			g.Until = k.now()
		}
		if g.Wanted > g.Done {
			next = g.Wanted
		}
		return nil
	})
	if err != nil {
		return 0, fmt.Errorf("keeper: end the change of the gossip keys: %w", err)
	}
	k.stats.Rotations.Add(1)
	k.cfg.Log.Info("keeper: changed the gossip keys")
	k.cfg.Changed()
	return next, nil
}
