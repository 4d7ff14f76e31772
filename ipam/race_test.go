package ipam

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/tulle-net/tulle/store"
)

// The tests here are orders of events that the model meets seldom.

// hooked is a Source that lets something happen after a keeper has answered.
type hooked struct {
	Source
	afterRenew  func()
	afterReturn func(ReturnRequest)
	afterUnfix  func(UnfixRequest)
}

func (h *hooked) Renew(ctx context.Context, q RenewRequest) (RenewAnswer, error) {
	a, err := h.Source.Renew(ctx, q)
	if f := h.afterRenew; f != nil {
		h.afterRenew = nil
		f()
	}
	return a, err
}

func (h *hooked) Return(ctx context.Context, q ReturnRequest) error {
	err := h.Source.Return(ctx, q)
	if h.afterReturn != nil {
		h.afterReturn(q)
	}
	return err
}

func (h *hooked) Unfix(ctx context.Context, q UnfixRequest) error {
	err := h.Source.Unfix(ctx, q)
	if h.afterUnfix != nil {
		h.afterUnfix(q)
	}
	return err
}

func (n *member) hook() *hooked {
	h := &hooked{Source: n.cfg.Source}
	n.cfg.Source = h
	return h
}

// raceCluster has node a with a block, and an address x of it that b will want.
func raceCluster(t *testing.T) (c *cluster, blue *store.Overlay, a, b *member, x string) {
	blue = overlay("blue", "10.32.0.0/16")
	c = newCluster(t, blue)
	a, b = c.node("a"), c.node("b")
	x = a.assign(blue, "first").Prefixes[0].Addr().Next().String()
	return c, blue, a, b, x
}

func (n *member) must(err error) {
	n.c.t.Helper()
	if err != nil {
		n.c.t.Fatal(err)
	}
}

func (n *member) mustNot(o *store.Overlay, x string) {
	n.c.t.Helper()
	if got, err := n.try(o, "mustnot", x); err == nil {
		n.c.t.Fatalf("%s gave %v, which another node has", n.name, got)
	}
}

// TestRenewedWhileAsked: the owner renews between ceding and the fixed record.
func TestRenewedWhileAsked(t *testing.T) {
	c, blue, a, b, x := raceCluster(t)
	c.r.cfg.Cede = func(ctx context.Context, owner string, q CedeRequest) error {
		err := c.cede(ctx, owner, q)
		a.must(a.tick(ctx))
		c.cut.Store(true)
		a.mustNot(blue, x)
		c.cut.Store(false)
		return err
	}
	b.assign(blue, "x", x)
	a.mustNot(blue, x)
}

// TestCededWhileRenewing: an answer that is older than a cede does not undo it;
// also if the address had been a hole before.
func TestCededWhileRenewing(t *testing.T) {
	for _, before := range []bool{false, true} {
		c, blue, a, b, x := raceCluster(t)
		if before {
			b.assign(blue, "x", x)
			b.Release("x")
			b.must(b.tick(ctx))
		}
		a.hook().afterRenew = func() { b.assign(blue, "x", x) }
		a.must(a.tick(ctx))
		c.cut.Store(true)
		a.mustNot(blue, x)
	}
}

// TestSlowKeeper: a keeper that sleeps between the two steps of Fix does not give
// the address when it has gone back to its owner meanwhile, nor when another
// keeper has begun again.
func TestSlowKeeper(t *testing.T) {
	for _, again := range []bool{false, true} {
		c, blue, a, b, x := raceCluster(t)
		cedes := make(chan struct{})
		ended := make(chan error, 1)
		first := true
		c.r.cfg.Cede = func(ctx context.Context, owner string, q CedeRequest) error {
			if !first { // the second keeper's request has not reached the owner
				cedes <- struct{}{}
				<-cedes
				return c.cede(ctx, owner, q)
			}
			first = false
			err := c.cede(ctx, owner, q)
			c.pass(askFor + time.Minute)
			c.r.Reclaim(ctx, func(string) bool { return true })
			a.must(a.tick(ctx))
			a.assign(blue, "mine", x)
			if again {
				go func() {
					ended <- c.r.Fix(ctx, "b", FixRequest{Caller: Caller{State: b.s.State, Number: 1000}, Overlay: "blue", OverlayID: blue.ID, Addr: q.Addr, Nonce: "again"})
				}()
				select {
				case <-cedes:
				case err := <-ended:
					t.Fatalf("the second attempt asked nobody: %v", err)
				}
			}
			return err
		}
		b.mustNot(blue, x)
		if again {
			cedes <- struct{}{}
			if err := <-ended; !errors.Is(err, ErrTaken) {
				t.Errorf("the second attempt: %v", err)
			}
		}
	}
}

// TestAskedAndGone: a keeper that died while it asked leaves nothing behind.
func TestAskedAndGone(t *testing.T) {
	c, blue, a, b, x := raceCluster(t)
	c.r.cfg.Cede = func(context.Context, string, CedeRequest) error {
		c.mem.SetAway(true)
		return errors.New("the keeper is gone")
	}
	b.mustNot(blue, x)
	c.mem.SetAway(false)
	c.r.cfg.Cede = c.cede
	if _, err := a.try(blue, "y", "10.32.250.1"); err != nil {
		t.Fatal(err)
	}
	third := c.node("c")
	if _, err := third.try(blue, "x", x); !errors.Is(err, ErrTaken) {
		t.Errorf("asked for by two at once: %v", err)
	}
	c.pass(askFor + time.Minute)
	if err := c.r.Reclaim(ctx, func(string) bool { return true }); err != nil {
		t.Fatal(err)
	}
	l, err := c.r.Blocks(ctx, "blue")
	if err != nil || len(l.Fixed) != 1 {
		t.Errorf("%+v, %v", l.Fixed, err)
	}
	third.assign(blue, "x", x)
}

// TestLate: a request to give back, that arrives once more when the same was got
// again, does nothing.
func TestLate(t *testing.T) {
	c, blue, _, b, _ := raceCluster(t)
	h := b.hook()
	var returned []ReturnRequest
	var unfixed []UnfixRequest
	h.afterReturn = func(q ReturnRequest) { returned = append(returned, q) }
	h.afterUnfix = func(q UnfixRequest) { unfixed = append(unfixed, q) }
	fixed := "10.32.99.99"
	was := b.assign(blue, "e").Prefixes[0]
	b.assign(blue, "f", fixed)
	b.Release("e")
	b.Release("f")
	c.pass(2 * time.Minute)
	b.must(b.tick(ctx))
	if len(returned) != 1 || len(unfixed) != 1 {
		t.Fatalf("%v, %v", returned, unfixed)
	}
	if again := b.assign(blue, "e").Prefixes[0]; again != was {
		t.Fatalf("not the same block: %s, then %s", was, again)
	}
	b.assign(blue, "f", fixed)
	b.must(c.r.Return(ctx, "b", returned[0]))
	b.must(c.r.Unfix(ctx, "b", unfixed[0]))
	l, err := c.r.Blocks(ctx, "blue")
	if err != nil || len(l.Blocks) != 2 || len(l.Fixed) != 1 {
		t.Fatalf("%+v, %v", l, err)
	}
}

// TestRenewedWhileReclaimed: a renewal between a keeper's look and its deed.
func TestRenewedWhileReclaimed(t *testing.T) {
	c, _, a, _, _ := raceCluster(t)
	dead := func(string) bool { return false }
	c.r.Reclaim(ctx, dead)
	c.pass(26 * time.Hour)
	err := c.r.Reclaim(ctx, func(string) bool {
		a.must(a.tick(ctx))
		return false
	})
	if err != nil {
		t.Fatal(err)
	}
	if l, err := c.r.Blocks(ctx, "blue"); err != nil || len(l.Blocks) != 1 {
		t.Fatalf("%+v, %v", l, err)
	}
}

// TestSilenceSurvives: keepers that restart, one after the other, go on counting.
func TestSilenceSurvives(t *testing.T) {
	c, _, _, _, _ := raceCluster(t)
	for range 26 {
		r, err := NewRegistry(RegistryConfig{Store: c.mem, Now: func() time.Time { return time.Time{} }, Clock: c.clock})
		if err != nil {
			t.Fatal(err)
		}
		for range 3 {
			if err := r.Reclaim(ctx, func(string) bool { return false }); err != nil {
				t.Fatal(err)
			}
			c.clock.pass(time.Hour)
		}
		c.clock.boot += "x"
		c.clock.since = 0
	}
	if l, err := c.r.Blocks(ctx, "blue"); err != nil || len(l.Blocks) != 0 {
		t.Fatalf("%+v, %v", l, err)
	}
}

// TestNonce: a request whose answer was lost gets the same block, with the holes
// that it has by then.
func TestNonce(t *testing.T) {
	c, blue, _, b, _ := raceCluster(t)
	q := TakeRequest{Caller: Caller{State: "s", Number: 1}, Overlay: "blue", OverlayID: blue.ID, Family: 4, Nonce: "x"}
	first, err := c.r.Take(ctx, "n", q)
	if err != nil || len(first.Holes) != 0 {
		t.Fatalf("%+v, %v", first, err)
	}
	c.r.cfg.Cede = func(context.Context, string, CedeRequest) error { return nil }
	b.assign(blue, "x", first.Prefix.Addr().Next().Next().String())
	q.Number = 2
	second, err := c.r.Take(ctx, "n", q)
	if err != nil || second.Prefix != first.Prefix || len(second.Holes) != 1 {
		t.Fatalf("%+v, then %+v, %v", first, second, err)
	}
	q.Nonce = "y"
	if third, err := c.r.Take(ctx, "n", q); err != nil || third.Prefix == first.Prefix {
		t.Fatalf("%+v, %v", third, err)
	}
}

// TestTakenWhileRenewing: a renewal that arrives late frees no block that was
// taken after it was made.
func TestTakenWhileRenewing(t *testing.T) {
	c, blue, _, b, _ := raceCluster(t)
	old := RenewRequest{Caller: Caller{State: b.s.State, Number: 1}}
	b.assign(blue, "e") // renews with number 1, takes
	b.assign(blue, "f", "10.32.99.99")
	b.must(func() error { _, err := c.r.Renew(ctx, "b", old); return err }())
	if l, err := c.r.Blocks(ctx, "blue"); err != nil || len(l.Blocks) != 2 || len(l.Fixed) != 1 {
		t.Fatalf("%+v, %v", l, err)
	}
}

// TestRenewalEndsSilence: a node that renews is not reclaimed, though gossip does
// not show it.
func TestRenewalEndsSilence(t *testing.T) {
	c, _, a, _, _ := raceCluster(t)
	for range 100 {
		for range 2 { // so that silence is written
			if err := c.r.Reclaim(ctx, func(string) bool { return false }); err != nil {
				t.Fatal(err)
			}
			// Looked at before the next renewal, which would readmit it.
			if l, err := c.r.Blocks(ctx, "blue"); err != nil || len(l.Blocks) != 1 {
				t.Fatalf("%+v, %v", l, err)
			}
			c.pass(2 * time.Hour)
		}
		a.must(a.tick(ctx))
	}
}
