package keeper_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/tulle-net/tulle/crypto"
	"github.com/tulle-net/tulle/keeper"
	"github.com/tulle-net/tulle/store"
	"github.com/tulle-net/tulle/store/storetest"
)

// Whatever a node has made, there is room in one change of the store to revoke it.
func TestRevokeFits(t *testing.T) {
	c := newCluster(t)
	mem := storetest.New()
	bad := c.identity("bad", crypto.Rights{Overlays: crypto.Grants{"*"}})
	patterns := make(crypto.Grants, 32)
	for i := range patterns {
		patterns[i] = longest(i)
	}
	l := keeper.NewLedger(c.first.Certificate())
	for name, n := range keeper.NewLedger(bad.Certificate()).Nodes {
		l.Nodes[name] = n
	}
	if err := keeper.Found(ctx, mem, l); err != nil {
		t.Fatal(err)
	}
	st := keeper.InStore(mem)
	spent := make([]crypto.Spend, crypto.MaxTokenUses)
	for i := range spent {
		spent[i] = crypto.Spend{Name: longest(i), Key: crypto.PublicKey{byte(i), byte(i >> 8), 9}}
	}
	var made []keeper.Token
	for i := range keeper.MaxTokens {
		_, r, err := crypto.NewToken(c.ca.Fingerprint(), (&site{c: c}).config("k1").Addrs(), crypto.TokenOptions{
			TTL: time.Hour, Uses: crypto.MaxTokenUses, Overlays: patterns, Name: longest(i),
		}, c.time())
		if err != nil {
			t.Fatal(err)
		}
		if i%200 == 0 { // more take long, and are no worse
			r.Spent = spent
		}
		made = append(made, keeper.Token{TokenRecord: *r, By: "bad", Nonce: 1 << 63})
	}
	for some := range slices.Chunk(made, 200) {
		err := st.Update(ctx, func(l *keeper.Ledger) error {
			for _, token := range some {
				l.Tokens[token.ID] = token
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	// A list of revocations that has room for one more.
	const bare = 8 + 8 + crypto.PublicKeyBytes + 1
	list := make([]crypto.Revocation, keeper.MaxRevocations-10)
	for i := range list {
		list[i] = crypto.Revocation{Key: crypto.PublicKey{byte(i), byte(i >> 8), 1}, Until: c.time().Add(time.Hour)}
	}
	signed := must[[]byte](t)(c.ca.SignRevocations(1, list, c.time()))
	if err := st.Update(ctx, func(l *keeper.Ledger) error { l.Revocations = signed; return nil }); err != nil {
		t.Fatalf("a list of %d bytes: %v", len(signed), err)
	}
	s := &site{c: c, ring: c.ring}
	cfg := s.config("k1")
	cfg.Store = st
	s.Keeper = must[*keeper.Keeper](t)(keeper.New(cfg))
	out, err := s.admin().Revoke(ctx, "bad")
	if err != nil || len(out.TokensRemoved) != keeper.MaxTokens {
		t.Fatalf("Revoke: %v, %+v", err, out)
	}
	if after := must[*keeper.Ledger](t)(st.Read(ctx)); after.Nodes["bad"].Revoked.IsZero() || len(after.Revocations) != len(signed)+bare+len("bad") {
		t.Errorf("bad is not revoked, or the list has %d bytes", len(after.Revocations))
	}
	if _, err := s.as(bad.Certificate()).State(ctx, 0, 0); !errors.Is(err, keeper.ErrRevoked) {
		t.Errorf("the revoked node: %v", err)
	}
	// What the store refuses is not told as an outage.
	cfg.Store = keeper.InStore(full{mem})
	s.Keeper = must[*keeper.Keeper](t)(keeper.New(cfg))
	if _, err := s.admin().CreateToken(ctx, hour); !errors.Is(err, keeper.ErrLimit) || bytes.Contains([]byte(err.Error()), []byte("secret")) {
		t.Errorf("a change that is too large: %v", err)
	}
}

// full takes no change.
type full struct{ *storetest.Memory }

func (f full) Update(ctx context.Context, _ []string, g func(store.Txn) error) error {
	err := f.Memory.Update(ctx, []string{store.KindLedger}, func(t store.Txn) error {
		if err := g(t); err != nil {
			return err
		}
		return fmt.Errorf("secret: %w", store.ErrTooLarge)
	})
	return err
}
