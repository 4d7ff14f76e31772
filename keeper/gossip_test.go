package keeper_test

import (
	"errors"
	"fmt"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/tulle-net/tulle/crypto"
	"github.com/tulle-net/tulle/keeper"
	"github.com/tulle-net/tulle/peer"
)

// Revoking is one change, told to all others, and then three rings, each of
// which is everywhere before the next.
func TestRevoke(t *testing.T) {
	c := newCluster(t)
	k := c.keeper("k1")
	bad := c.node("bad", "*")
	badToken := must[*crypto.Token](t)(crypto.ParseToken(must[string](t)(k.as(bad).CreateToken(ctx, hour))))
	var steps []string
	k.onPush = func() {
		if _, err := k.as(bad).State(ctx, 0, 0); !errors.Is(err, keeper.ErrRevoked) {
			t.Errorf("the revoked node asks: %v", err)
		}
		s := must[*keeper.State](t)(k.admin().State(ctx, 0, 0))
		list := must[*crypto.Revocations](t)(c.roots.ParseRevocations(s.Revocations))
		if err := list.Check("x", bad.Key, 0); list.Check("bad", crypto.PublicKey{}, 0) == nil || err == nil {
			t.Error("told before it was revoked")
		}
		steps = append(steps, fmt.Sprintf("%d:%d:%v", s.Ring.Epoch, len(s.Ring.Keys()), s.Ring.Primary.Equal(c.ring.Primary)))
	}
	out := must[*keeper.Outcome](t)(k.admin().Revoke(ctx, "bad"))
	if want := []string{"1:1:true", "2:2:true", "3:2:false", "4:1:false"}; !slices.Equal(steps, want) {
		t.Errorf("steps %v, want %v", steps, want)
	}
	if len(out.Unreached) != 0 || out.KeysPending || !slices.Equal(out.TokensRemoved, []crypto.TokenID{badToken.ID}) {
		t.Errorf("Outcome %+v", out)
	}
	for i, except := range k.pushes {
		if !slices.Contains(except, "bad") {
			t.Errorf("push %d tells the revoked node", i)
		}
	}
	if _, err := k.Join(ctx, joining(t, badToken, crypto.NewPrivateKey(), "n9")); !errors.Is(err, peer.ErrTokenRevoked) {
		t.Errorf("its token: %v", err)
	}
	// Again: no other list, no other keys.
	number := must[*crypto.Revocations](t)(c.roots.ParseRevocations(c.ledger().Revocations)).Number()
	must[*keeper.Outcome](t)(k.admin().Revoke(ctx, "bad"))
	if l := c.ledger(); must[*crypto.Revocations](t)(c.roots.ParseRevocations(l.Revocations)).Number() != number || k.ring.Epoch != 4 {
		t.Error("revoked twice")
	}
	s := must[*keeper.State](t)(k.admin().State(ctx, 4, number))
	if s.Ring != nil || s.Revocations != nil || s.Roots.Cluster() != c.ca.Cluster() || !s.Time.Equal(c.time()) {
		t.Errorf("State has what the node had: %+v", s)
	}
}

// Removing frees the name; what was issued for it stays dead.
func TestRemove(t *testing.T) {
	c := newCluster(t)
	k := c.keeper("k1")
	for _, first := range []string{"", "revoked before"} {
		old := c.node("n1", "*")
		if first != "" {
			must[*keeper.Outcome](t)(k.admin().Revoke(ctx, "n1"))
		}
		epoch := k.ring.Epoch
		must[*keeper.Outcome](t)(k.admin().Remove(ctx, "n1"))
		list := must[*crypto.Revocations](t)(c.roots.ParseRevocations(c.ledger().Revocations))
		if list.Check("n1", crypto.PublicKey{1}, 1) != nil || list.Check("n1", old.Key, old.Serial) == nil {
			t.Errorf("%s: the name is taken, or the key believed", first)
		}
		if changed := k.ring.Epoch != epoch; changed != (first == "") {
			t.Errorf("%s: gossip keys changed: %v", first, changed)
		}
		if _, err := k.Join(ctx, joining(t, k.token(hour), crypto.NewPrivateKey(), "n1")); err != nil {
			t.Errorf("%s: the next machine: %v", first, err)
		}
		c.update(func(l *keeper.Ledger) { delete(l.Nodes, "n1") })
	}
	if _, err := k.admin().Remove(ctx, "n1"); !errors.Is(err, keeper.ErrNoSuch) {
		t.Errorf("removing none: %v", err)
	}
	// Entries go when all that they could match has expired.
	c.pass(crypto.Lifetime + time.Hour)
	admin := k.as(c.node("admin", "*"))
	c.node("n2", "*")
	must[*keeper.Outcome](t)(admin.Revoke(ctx, "n2"))
	if list := must[*crypto.Revocations](t)(c.roots.ParseRevocations(c.ledger().Revocations)); len(list.All()) != 1 {
		t.Errorf("%d entries", len(list.All()))
	}
}

func TestKeepersStay(t *testing.T) {
	c := newCluster(t)
	k := c.keeper("k1")
	for _, f := range []func(string) (*keeper.Outcome, error){
		func(n string) (*keeper.Outcome, error) { return k.admin().Revoke(ctx, n) },
		func(n string) (*keeper.Outcome, error) { return k.admin().Remove(ctx, n) },
	} {
		if _, err := f("k1"); !errors.Is(err, keeper.ErrLastKeeper) {
			t.Errorf("the last keeper: %v", err)
		}
		c.enrol(c.identity("k2", crypto.Rights{Keeper: true}))
		if _, err := f("k1"); !errors.Is(err, peer.ErrUnavailable) {
			t.Errorf("the keeper itself: %v", err)
		}
		if _, err := f("k2"); err != nil {
			t.Errorf("another keeper: %v", err)
		}
		if _, err := f("k1"); !errors.Is(err, keeper.ErrLastKeeper) {
			t.Errorf("the last keeper that is not revoked: %v", err)
		}
	}
}

// Who is not there is waited for at the first step and at the last.
func TestUnreached(t *testing.T) {
	c := newCluster(t)
	k := c.keeper("k1")
	c.node("bad", "*")
	k.silent = []string{"away", "bad"}
	out := must[*keeper.Outcome](t)(k.admin().Revoke(ctx, "bad"))
	if !slices.Equal(out.Unreached, []string{"away"}) {
		t.Errorf("unreached %v", out.Unreached)
	}
	var waited []bool
	for _, except := range k.pushes {
		waited = append(waited, !slices.Contains(except, "away"))
	}
	if want := []bool{true, false, false, true}; !slices.Equal(waited, want) {
		t.Errorf("waited for it %v, want %v", waited, want)
	}
}

// What a keeper could not complete another one does, in epochs of its own.
func TestRotateInterrupted(t *testing.T) {
	c := newCluster(t)
	k1, k2 := c.keeper("k1"), c.keeper("k2")
	n := 0
	k1.onPush = func() {
		if n++; n == 2 { // at Promote
			k1.mu.Lock()
			k1.fail = errStore
			k1.mu.Unlock()
			// The other keeper has what was pushed, and waits its turn.
			k2.mu.Lock()
			k2.ring = k1.ring
			k2.mu.Unlock()
			if out := must[*keeper.Outcome](t)(k2.admin().RotateGossip(ctx)); !out.KeysPending {
				t.Error("two keepers change the keys at once")
			}
		}
	}
	if out := must[*keeper.Outcome](t)(k1.admin().RotateGossip(ctx)); !out.KeysPending {
		t.Error("it failed, and says that it has not")
	}
	c.pass(time.Minute)
	if out := must[*keeper.Outcome](t)(k2.admin().RotateGossip(ctx)); !out.KeysPending {
		t.Error("it begins from a ring that may not be the newest")
	}
	c.pass(time.Minute)
	out := must[*keeper.Outcome](t)(k2.admin().RotateGossip(ctx))
	if g := c.ledger().Gossip; out.KeysPending || g.Done != g.Wanted {
		t.Errorf("Outcome %+v, %+v", out, g)
	}
	var epochs []uint64
	for _, r := range append(k1.rings, k2.rings...) {
		epochs = append(epochs, r.Epoch)
	}
	if want := []uint64{2, 3, 5, 6, 7}; !slices.Equal(epochs, want) || len(k2.ring.Keys()) != 1 {
		t.Errorf("epochs %v, want %v; %d keys at the end", epochs, want, len(k2.ring.Keys()))
	}
}

// While a keeper is at it another one leaves it what it is asked for.
func TestRotateHeld(t *testing.T) {
	c := newCluster(t)
	k1, k2 := c.keeper("k1"), c.keeper("k2")
	n := 0
	k1.onPush = func() {
		if n++; n != 3 { // at Retire: nobody is behind
			return
		}
		k2.mu.Lock()
		k2.ring = k1.ring
		k2.mu.Unlock()
		if out := must[*keeper.Outcome](t)(k2.admin().RotateGossip(ctx)); !out.KeysPending || len(k2.rings) != 0 {
			t.Errorf("two keepers change the keys at once: %+v, %d rings", out, len(k2.rings))
		}
	}
	out := must[*keeper.Outcome](t)(k1.admin().RotateGossip(ctx))
	if g := c.ledger().Gossip; out.KeysPending || g.Wanted != 2 || g.Done != 2 || len(k1.rings) != 6 || k1.Stats().Rotations.Load() != 2 {
		t.Errorf("%+v, %+v, %d rings", out, g, len(k1.rings))
	}
}

// Many at once: one after the other, each ring once, all that was wanted is done.
func TestRotateRace(t *testing.T) {
	c := newCluster(t)
	k := []*site{c.keeper("k1"), c.keeper("k2")}
	for i := range 8 {
		c.node(fmt.Sprint("bad", i), "*")
	}
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			if _, err := k[i%2].admin().Revoke(ctx, fmt.Sprint("bad", i)); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	l := c.ledger()
	if list := must[*crypto.Revocations](t)(c.roots.ParseRevocations(l.Revocations)); list.Number() != 8 || len(list.All()) != 8 {
		t.Errorf("list %d of %d", list.Number(), len(list.All()))
	}
	seen := map[uint64]bool{}
	for _, r := range append(k[0].rings, k[1].rings...) {
		if seen[r.Epoch] {
			t.Errorf("two rings of epoch %d", r.Epoch)
		}
		seen[r.Epoch] = true
	}
	// The one that found the other at it left it to that one, which did it, or to Run.
	if l.Gossip.Done == 0 || l.Gossip.Wanted != 8 {
		t.Errorf("%+v", l.Gossip)
	}
}
