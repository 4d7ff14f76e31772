package keeper_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/tulle-net/tulle/crypto"
	"github.com/tulle-net/tulle/ipam"
	"github.com/tulle-net/tulle/keeper"
	"github.com/tulle-net/tulle/peer"
	"github.com/tulle-net/tulle/store"
)

// bodies are one of each kind of request, as Client writes them.
func bodies(t testing.TB) map[uint16][]byte {
	t.Helper()
	csr := must[[]byte](t)(crypto.NewRequest(crypto.NewPrivateKey(), "n1"))
	all := map[uint16][]byte{}
	c := keeper.Client{Ask: func(_ context.Context, sub uint16, body []byte) ([]byte, error) {
		all[sub] = slices.Clone(body)
		return []byte("{}"), nil
	}}
	_, _ = c.State(ctx, 1, 1<<60)
	_, _, _ = c.Renew(ctx, csr)
	_, _, _ = c.OverlayKeys(ctx, "blue", "red")
	_, _ = c.CreateToken(ctx, with("blue"))
	_, _ = c.Tokens(ctx)
	_ = c.RemoveToken(ctx, crypto.TokenID{1})
	_, _ = c.Nodes(ctx)
	_, _ = c.Revoke(ctx, "n1")
	_, _ = c.Remove(ctx, "n1")
	_, _ = c.RotateOverlay(ctx, "blue")
	_, _ = c.RotateGossip(ctx)
	_, _ = c.Shared(ctx, 7)
	_, _, _ = c.CreateOverlay(ctx, store.Overlay{Name: "blue"})
	mtu := 1400
	_, _, _ = c.SetOverlay(ctx, "blue", keeper.OverlayChange{MTU: &mtu})
	_, _ = c.RemoveOverlay(ctx, "blue", true)
	_, _ = c.Promote(ctx, "n1", "k9")
	_, _ = c.Demote(ctx, "k9")
	_, _ = c.Addresses(ctx, "blue")
	a := keeper.Addresses{Client: func() keeper.Client { return c }}
	me := ipam.Caller{State: "s", Number: 7}
	block, addr := netip.MustParsePrefix("10.32.0.0/26"), netip.MustParseAddr("10.32.0.9")
	_, _ = a.Take(ctx, ipam.TakeRequest{Caller: me, Overlay: "blue", OverlayID: "x", Family: 4, Nonce: "n"})
	_, _ = a.Renew(ctx, ipam.RenewRequest{Caller: me, Claims: []ipam.Claim{
		{Overlay: "blue", OverlayID: "x", Blocks: []netip.Prefix{block}, Fixed: []netip.Addr{addr}, Endpoints: 3},
	}})
	_ = a.Return(ctx, ipam.ReturnRequest{Caller: me, Overlay: "blue", OverlayID: "x", Prefixes: []netip.Prefix{block}})
	_ = a.Fix(ctx, ipam.FixRequest{Caller: me, Overlay: "blue", OverlayID: "x", Addr: addr, Nonce: "n"})
	_ = a.Unfix(ctx, ipam.UnfixRequest{Caller: me, Overlay: "blue", OverlayID: "x", Addr: addr})
	return all
}

// The bytes that go to keepers of other releases.
func TestBodies(t *testing.T) {
	all := bodies(t)
	for sub, want := range map[uint16]string{
		keeper.SubState:         `{"version":1,"ring":"1","revocations":"1152921504606846976"}`,
		keeper.SubOverlayKeys:   `{"version":1,"overlays":["blue","red"]}`,
		keeper.SubTokens:        `{"version":1}`,
		keeper.SubRemoveToken:   `{"version":1,"id":"0100000000000000"}`,
		keeper.SubNodes:         `{"version":1}`,
		keeper.SubRevoke:        `{"version":1,"name":"n1"}`,
		keeper.SubRemove:        `{"version":1,"name":"n1"}`,
		keeper.SubRotateGossip:  `{"version":1}`,
		keeper.SubShared:        `{"version":1,"since":"7"}`,
		keeper.SubSetOverlay:    `{"version":1,"name":"blue","mtu":1400}`,
		keeper.SubRemoveOverlay: `{"version":1,"name":"blue","force":true}`,
		keeper.SubPromote:       `{"version":1,"name":"n1","replace":"k9"}`,
		keeper.SubDemote:        `{"version":1,"name":"k9"}`,
		keeper.SubAddresses:     `{"version":1,"name":"blue"}`,
		keeper.SubTakeBlock:     `{"version":1,"request":{"state":"s","number":7,"overlay":"blue","overlay_id":"x","family":4,"nonce":"n"}}`,
		keeper.SubRenewBlocks:   `{"version":1,"request":{"state":"s","number":7,"claims":[{"overlay":"blue","overlay_id":"x","blocks":["10.32.0.0/26"],"fixed":["10.32.0.9"],"endpoints":3}]}}`,
		keeper.SubReturnBlocks:  `{"version":1,"request":{"state":"s","number":7,"overlay":"blue","overlay_id":"x","prefixes":["10.32.0.0/26"]}}`,
		keeper.SubFixAddress:    `{"version":1,"request":{"state":"s","number":7,"overlay":"blue","overlay_id":"x","addr":"10.32.0.9","nonce":"n"}}`,
		keeper.SubUnfixAddress:  `{"version":1,"request":{"state":"s","number":7,"overlay":"blue","overlay_id":"x","addr":"10.32.0.9"}}`,
	} {
		if string(all[sub]) != want {
			t.Errorf("request %d is %s, want %s", sub, all[sub], want)
		}
	}
	for sub, want := range map[uint16]string{
		keeper.SubRenew:         `{"version":1,"request":"MI`,
		keeper.SubCreateToken:   `{"version":1,"nonce":"`,
		keeper.SubRotateOverlay: `{"version":1,"nonce":"`,
		keeper.SubCreateOverlay: `{"version":1,"id":"`,
	} {
		if !strings.HasPrefix(string(all[sub]), want) {
			t.Errorf("request %d is %s, want %s…", sub, all[sub], want)
		}
	}
	if len(all) != 23 {
		t.Errorf("%d kinds", len(all))
	}
}

func TestBadRequests(t *testing.T) {
	c := newCluster(t)
	k := c.keeper("k1")
	c.node("n1", "blue")
	ask := k.admin().Ask
	before := string(c.store.Text())
	for sub, body := range bodies(t) {
		for i := range body {
			if _, err := ask(ctx, sub, body[:i]); !errors.Is(err, peer.ErrMalformed) {
				t.Fatalf("request %d truncated to %d bytes: %v", sub, i, err)
			}
		}
		for what, x := range map[string]struct {
			body string
			want error
		}{
			"version": {strings.Replace(string(body), `"version":1`, `"version":2`, 1), peer.ErrVersion},
			"none":    {strings.Replace(string(body), `"version":1`, `"other":1`, 1), peer.ErrVersion},
			"unknown": {strings.Replace(string(body), `"version":1`, `"version":1,"only_if":"x"`, 1), peer.ErrMalformed},
			"behind":  {string(body) + "{}", peer.ErrMalformed},
			"array":   {"[" + string(body) + "]", peer.ErrMalformed},
			"large":   {string(body) + strings.Repeat(" ", 128<<10), peer.ErrTooLarge},
			"deep":    {strings.Repeat("[", 4000), peer.ErrMalformed},
		} {
			if _, err := ask(ctx, sub, []byte(x.body)); !errors.Is(err, x.want) {
				t.Errorf("request %d, %s: %v, want %v", sub, what, err, x.want)
			}
		}
	}
	for _, sub := range []uint16{0, 999, 65535} {
		if _, err := ask(ctx, sub, []byte(`{"version":1}`)); !errors.Is(err, peer.ErrKind) {
			t.Errorf("request %d: %v", sub, err)
		}
	}
	if before != string(c.store.Text()) {
		t.Error("bad requests changed the ledger")
	}
}

// What goes wrong inside is logged, and not told.
func TestInnerErrors(t *testing.T) {
	c := newCluster(t)
	k := c.keeper("k1")
	c.store.Fail(fmt.Errorf("%w: /secret/place: %w", errStore, crypto.ErrName))
	_, err := k.admin().State(ctx, 0, 0)
	if !errors.Is(err, peer.ErrUnavailable) || strings.Contains(err.Error(), "secret") {
		t.Errorf("without a store: %v: a cause that looks like the asker's fault is not", err)
	}
	c.mu.Lock()
	logged := c.log.String()
	c.mu.Unlock()
	if !strings.Contains(logged, errStore.Error()) {
		t.Errorf("logged: %s", logged)
	}
	c.store.Fail(nil)
	c.update(func(l *keeper.Ledger) { l.Revocations = []byte("nonsense") })
	if _, err := k.admin().State(ctx, 0, 0); !errors.Is(err, peer.ErrUnavailable) {
		t.Errorf("with a bad list: %v", err)
	}
	c.update(func(l *keeper.Ledger) { l.Revocations = nil })
	over, cancel := context.WithCancel(ctx)
	cancel()
	if _, err := k.admin().State(over, 0, 0); !errors.Is(err, peer.ErrTimeout) {
		t.Errorf("too late: %v", err)
	}
}

// A client bears any answer, and repeats none of it.
func FuzzAnswer(f *testing.F) {
	f.Add([]byte(`{"token":"x"}`))
	f.Add([]byte(`{"keys":[{"overlay":"blue","epoch":1,"key":"AAAA"}],"roots":["AA=="],"ring":"AA=="}`))
	f.Add([]byte(`{"nodes":[{"name":"x"}],"more":true}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		asked := 0
		c := keeper.Client{Ask: func(context.Context, uint16, []byte) ([]byte, error) {
			if asked++; asked > 100 {
				return nil, errStore
			}
			return slices.Clone(b), nil
		}}
		_, _ = c.State(ctx, 0, 0)
		_, _, _ = c.Renew(ctx, nil)
		_, _, _ = c.OverlayKeys(ctx, "blue")
		_, _ = c.CreateToken(ctx, hour)
		_, _ = c.Tokens(ctx)
		_, _ = c.Nodes(ctx)
		_, _ = c.Revoke(ctx, "n1")
	})
}

// Whatever a node asks, nothing panics, the ledger can be read, and the node's
// rights and key stay what they are.
func FuzzRequest(f *testing.F) {
	for sub, body := range bodies(f) {
		f.Add(sub, true, body)
		f.Add(sub, false, body)
	}
	f.Add(keeper.SubNodes, false, []byte(`{"version":1,"after":"k"}`))
	f.Add(keeper.SubCreateToken, false, []byte(`{"version":1,"seconds":9223372036854775807,"uses":-1,"overlays":null,"name":"*"}`))
	c := newCluster(f)
	c.node("n1", "red")
	narrow := c.node("narrow", "blue", "team-*")
	admin := c.node("admin", "*")
	text := c.ledger()
	defer func() { c.t = f }()
	f.Fuzz(func(t *testing.T, sub uint16, asAdmin bool, body []byte) {
		c.t = t
		c.secrets()
		c.log.Reset()
		k := c.keeper("k1") // whose pace is not spent
		c.update(func(l *keeper.Ledger) { *l = *text.Clone() })
		cert := narrow
		if asAdmin {
			cert = admin
		}
		b, err := k.as(cert).Ask(ctx, sub, body)
		if _, told := errors.AsType[*peer.Error](err); err != nil && !told {
			t.Fatalf("%v is not for the wire", err)
		}
		if err == nil && !json.Valid(b) {
			t.Fatalf("the answer is %q", b)
		}
		l, before := c.ledger(), text.Nodes[cert.Name]
		if n, ok := l.Nodes[cert.Name]; ok && (n.Grants.String() != before.Grants.String() || n.Keeper || n.Key != before.Key) {
			t.Fatalf("its record is %+v", n)
		}
		if asAdmin {
			return
		}
		for id, token := range l.Tokens {
			if !token.Overlays.Within(narrow.Overlays) {
				t.Fatalf("token %s is for %s", id, token.Overlays)
			}
		}
		if len(l.Nodes) != len(text.Nodes) || len(l.Revocations) != 0 || l.Gossip.Wanted != 0 {
			t.Fatal("it changed what only an administrator may")
		}
	})
}
