package keeper_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/tulle-net/tulle/crypto"
	"github.com/tulle-net/tulle/keeper"
	"github.com/tulle-net/tulle/keeper/keepertest"
	"github.com/tulle-net/tulle/peer"
)

const (
	maxAnswer = 4 << 20   // of package peer
	maxJoined = 256 << 10 // of package peer
)

// longest is the longest name with this number.
func longest(i int) string { return fmt.Sprintf("%s%05d", strings.Repeat("x", 58), i) }

// The largest answers fit into what package peer carries.
func TestAnswersFit(t *testing.T) {
	c := newCluster(t)
	s := &site{c: c, ring: c.ring}
	cfg := s.config("k1")
	long := netip.MustParseAddrPort("[2001:db8:1111:2222:3333:4444:5555:6666]:47890")
	members := make([]peer.Member, 10000)
	for i := range members {
		members[i] = peer.Member{Name: longest(i), VTEP: long, Gossip: long, Keeper: true}
	}
	cfg.Members = func() []peer.Member { return members }
	s.Keeper = must[*keeper.Keeper](t)(keeper.New(cfg))
	const bare = 8 + 8 + crypto.PublicKeyBytes + 1 // bytes of a revocation without a name
	revocation := func(i int, name string) crypto.Revocation {
		return crypto.Revocation{Name: name, Key: crypto.PublicKey{byte(i), byte(i >> 8), 1}, Until: c.time().Add(time.Hour)}
	}
	var list []crypto.Revocation
	room := keeper.MaxRevocations*bare - len(must[[]byte](t)(c.ca.SignRevocations(7, nil, c.time())))
	for i := 0; room >= bare; i++ {
		name := longest(i)
		name = name[:min(len(name), room-bare)]
		if rest := room - bare - len(name); rest > 0 && rest < bare {
			name = name[:len(name)-bare+rest]
		}
		list = append(list, revocation(i, name))
		room -= bare + len(name)
	}
	signed := must[[]byte](t)(c.ca.SignRevocations(7, list, c.time()))
	t.Logf("%d revocations in %d bytes", len(list), len(signed))
	if room != 0 || len(list) < 3400 {
		t.Fatalf("a full list of %d has %d bytes, and room for %d", len(list), len(signed), room)
	}
	patterns := make(crypto.Grants, 32)
	for i := range patterns {
		patterns[i] = longest(i)
	}
	token := s.token(crypto.TokenOptions{Name: "n*"})
	c.update(func(l *keeper.Ledger) {
		l.Revocations = signed
		n := l.Nodes["k1"]
		n.Keeper, n.Grants = false, patterns
		for i := range 1500 {
			n.Key[0], n.Key[1] = byte(i), byte(i>>8)
			l.Nodes[longest(i)] = n
		}
		tk := l.Tokens[token.ID]
		tk.Overlays, tk.By, tk.NamePattern = patterns, longest(0), longest(0)
		for i := 1; i < keeper.MaxTokens; i++ {
			tk.ID = crypto.TokenID{byte(i), byte(i >> 8)}
			l.Tokens[tk.ID] = tk
		}
	})
	names := make([]string, keeper.MaxOverlayKeys)
	for i := range names {
		names[i] = longest(i)
	}
	keys := must[[]byte](t)(json.Marshal(map[string]any{"version": 1, "overlays": names}))
	for sub, body := range map[uint16][]byte{
		keeper.SubState:       []byte(`{"version":1,"ring":"0","revocations":"0"}`),
		keeper.SubNodes:       []byte(`{"version":1}`),
		keeper.SubTokens:      []byte(`{"version":1}`),
		keeper.SubOverlayKeys: keys,
	} {
		b, err := s.admin().Ask(ctx, sub, body)
		if err != nil || len(b) > maxAnswer {
			t.Errorf("request %d: an answer of %d bytes, %v", sub, len(b), err)
		}
		t.Logf("request %d: %d bytes for %d", sub, len(b), len(body))
	}
	c.update(func(l *keeper.Ledger) { // the longest list that goes with a new identity
		l.Revocations = must[[]byte](t)(c.ca.SignRevocations(8, list[:580], c.time()))
	})
	r, err := s.Join(ctx, joining(t, token, crypto.NewPrivateKey(), "n1"))
	if err != nil {
		t.Fatal(err)
	}
	if b := must[[]byte](t)(json.Marshal(r)); len(b) > maxJoined || r.Revocations == nil {
		t.Errorf("what a new node gets has %d bytes, %d of revocations", len(b), len(r.Revocations))
	}
	// A full list takes no more.
	c.update(func(l *keeper.Ledger) { l.Revocations = signed })
	if r, err := s.Join(ctx, joining(t, token, crypto.NewPrivateKey(), "n2")); !errors.Is(err, crypto.ErrTokenUsed) {
		t.Errorf("%v, %v", r, err)
	}
	if _, err := s.admin().Revoke(ctx, "n1"); !errors.Is(err, keeper.ErrLimit) {
		t.Errorf("one revocation too many: %v", err)
	}
	if !c.ledger().Nodes["n1"].Revoked.IsZero() {
		t.Error("it is revoked, and not in the list")
	}
}

// lagging is a store in which something happens right after a read.
type lagging struct {
	*keepertest.Store
	then func()
}

func (s *lagging) Read(ctx context.Context) (*keeper.Ledger, error) {
	l, err := s.Store.Read(ctx)
	if f := s.then; f != nil {
		s.then = nil
		f()
	}
	return l, err
}

// A node that is revoked while it is answered gets no key that is made because
// of that.
func TestRevokedMeanwhile(t *testing.T) {
	c := newCluster(t)
	s := &site{c: c, ring: c.ring}
	cfg := s.config("k1")
	store := &lagging{Store: c.store}
	cfg.Store = store
	s.Keeper = must[*keeper.Keeper](t)(keeper.New(cfg))
	bad := s.as(c.node("bad", "*"))
	store.then = func() { must[*keeper.Outcome](t)(s.admin().Revoke(ctx, "bad")) }
	state, err := bad.State(ctx, 0, 0)
	if err != nil || s.ring.Epoch != 4 || state.Ring.Epoch != 1 || !state.Ring.Primary.Equal(c.ring.Primary) {
		t.Errorf("State = %+v, %v", state, err)
	}
	// What it wants to change is looked at again.
	worse := s.as(c.node("worse", "*"))
	store.then = func() { must[*keeper.Outcome](t)(s.admin().Revoke(ctx, "worse")) }
	if _, err := worse.CreateToken(ctx, hour); !errors.Is(err, keeper.ErrRevoked) {
		t.Errorf("CreateToken: %v", err)
	}
}
