package cluster

import (
	"testing"

	"github.com/tulle-net/tulle/crypto"
	"github.com/tulle-net/tulle/keeper"
)

// Of gossip keys that arrive together, from two keepers' pushes or a push and a
// pull, the newest is the one that is used in the end.
func TestRingsInOrder(t *testing.T) {
	s := newSite(t)
	b := s.join("n2", s.token(s.start("n1"), 1, "*"))
	entered, release := make(chan struct{}), make(chan struct{})
	first, used := true, uint64(0)
	older := b.Ring().Stage()
	b.cfg.OnRing = func(g *crypto.GossipRing) {
		if first {
			first = false
			close(entered)
			<-release
		}
		used = g.Epoch
	}
	done := make(chan error, 2)
	go func() { done <- b.apply(&keeper.State{Ring: older}) }()
	<-entered
	newer := older.Promote()
	go func() { done <- b.apply(&keeper.State{Ring: newer}) }()
	eventually(t, "the newer ring is kept", func() bool { return b.Ring().Epoch == newer.Epoch })
	select {
	case err := <-done: // the newer one, used before the older
		done <- err
	default:
	}
	close(release)
	for range 2 {
		if err := <-done; err != nil {
			t.Fatal(err)
		}
	}
	if used != newer.Epoch {
		t.Errorf("the ring of epoch %d is used, and %d is the newest", used, newer.Epoch)
	}
}
