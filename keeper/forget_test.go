package keeper_test

import (
	"context"
	"testing"

	"github.com/tulle-net/tulle/ipam"
	"github.com/tulle-net/tulle/keeper"
	"github.com/tulle-net/tulle/store"
	"github.com/tulle-net/tulle/store/storetest"
)

// A node that is removed gives its addresses back at once if it was away, and
// keeps them for the grace if it was there: it may be using them.
func TestRemovedNodesAddresses(t *testing.T) {
	for _, away := range []bool{true, false} {
		c := newCluster(t)
		s := &site{c: c, ring: c.ring}
		cfg := s.config("k1")
		cfg.Shared = storetest.New()
		cfg.Away = func(string) bool { return away }
		s.Keeper = must[*keeper.Keeper](t)(keeper.New(cfg))
		run, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() { _ = s.Run(run); close(done) }()
		cert := c.node("n1", "blue")
		o := s.create(store.Overlay{Name: "blue"})
		src := keeper.Addresses{Client: func() keeper.Client { return s.as(cert) }}
		must[ipam.Block](t)(src.Take(ctx, ipam.TakeRequest{
			Caller: ipam.Caller{State: "0123456789abcdef", Number: 1}, Overlay: "blue", OverlayID: o.ID, Family: 4, Nonce: "a",
		}))
		must[*keeper.Outcome](t)(s.admin().Remove(ctx, "n1"))
		l := must[*ipam.Listing](t)(s.admin().Addresses(ctx, "blue"))
		if left := len(l.Blocks); left != 0 && away || left != 1 && !away {
			t.Errorf("removed while away %v: it has %d blocks", away, left)
		}
		cancel()
		<-done
	}
}
