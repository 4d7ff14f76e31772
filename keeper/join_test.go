package keeper_test

import (
	"encoding/base64"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/tulle-net/tulle/crypto"
	_ "github.com/tulle-net/tulle/internal/proptest"
	"github.com/tulle-net/tulle/keeper"
	"github.com/tulle-net/tulle/peer"
)

func base64Of(b []byte) string { return base64.StdEncoding.EncodeToString(b) }

// A machine gets all that a node needs, and the token's rights.
func TestJoin(t *testing.T) {
	c := newCluster(t)
	k := c.keeper("k1")
	token := k.token(crypto.TokenOptions{Overlays: crypto.Grants{"blue", "team-*"}, Name: "n*"})
	key := crypto.NewPrivateKey()
	r, err := k.Join(ctx, joining(t, token, key, "n1"))
	if err != nil {
		t.Fatal(err)
	}
	id, err := crypto.NewIdentity(key, &crypto.Issued{Certificate: r.Certificate, Card: r.Card}, c.roots, c.time())
	if err != nil {
		t.Fatal(err)
	}
	if cert := id.Certificate(); cert.Name != "n1" || cert.Keeper || cert.Overlays.String() != "blue,team-*" {
		t.Errorf("certificate of %s: %+v", cert.Name, cert.Rights)
	}
	ring, err := crypto.ParseGossipRing(r.Gossip)
	if err != nil || !ring.Primary.Equal(c.ring.Primary) || len(r.Members) != 2 || r.Revocations != nil {
		t.Errorf("JoinResult: %v, %d members, %d bytes of revocations", err, len(r.Members), len(r.Revocations))
	}
	n := c.ledger().Nodes["n1"]
	if n.Key != key.PublicKey() || n.Serial != id.Certificate().Serial || n.By != "k1" || !n.Expires.Equal(id.Certificate().NotAfter) || !n.Joined.Equal(c.time()) {
		t.Errorf("record: %+v", n)
	}
	// The answer may have been lost; another certificate, and the same record.
	c.pass(time.Minute)
	again, err := k.Join(ctx, joining(t, token, key, "n1"))
	if err != nil {
		t.Fatal(err)
	}
	if l := c.ledger(); len(l.Tokens[token.ID].Spent) != 1 || l.Nodes["n1"].Serial == n.Serial || !l.Nodes["n1"].Joined.Equal(n.Joined) {
		t.Errorf("again: %+v", l.Nodes["n1"])
	}
	if _, err := c.roots.Verify([][]byte{again.Certificate}, c.time(), nil); err != nil {
		t.Error(err)
	}
	if k.Stats().Joins.Load() != 2 || k.changed.Load() != 3 {
		t.Errorf("%d joins, changed %d times", k.Stats().Joins.Load(), k.changed.Load())
	}
}

// Each way not to get in has its own error, and leaves no trace.
func TestJoinRefused(t *testing.T) {
	c := newCluster(t)
	k := c.keeper("k1")
	all := crypto.TokenOptions{Overlays: crypto.Grants{"blue"}, Uses: 10}
	mine, other := crypto.NewPrivateKey(), crypto.NewPrivateKey()
	token := k.token(all)
	if _, err := k.Join(ctx, joining(t, token, mine, "n1")); err != nil {
		t.Fatal(err)
	}
	var shared, ofRevoked *crypto.Token
	for _, name := range []string{"bad", "gone"} {
		key := crypto.NewPrivateKey()
		if name == "gone" {
			key = other
		}
		shared = k.token(all)
		if _, err := k.Join(ctx, joining(t, shared, key, name)); err != nil {
			t.Fatal(err)
		}
		if name == "bad" {
			must[*keeper.Outcome](t)(k.admin().Revoke(ctx, "bad"))
			ofRevoked = shared
		}
	}
	must[*keeper.Outcome](t)(k.admin().Remove(ctx, "gone"))
	used := k.token(crypto.TokenOptions{Name: "u*"})
	if _, err := k.Join(ctx, joining(t, used, crypto.NewPrivateKey(), "u1")); err != nil {
		t.Fatal(err)
	}
	removed := k.token(all)
	if err := k.admin().RemoveToken(ctx, removed.ID); err != nil {
		t.Fatal(err)
	}
	expired := k.token(crypto.TokenOptions{TTL: time.Second})
	c.pass(2 * time.Second)
	unknown, _, err := crypto.NewToken(c.ca.Fingerprint(), token.Keepers, crypto.TokenOptions{TTL: time.Hour, Uses: 1, Name: "*"}, c.time())
	if err != nil {
		t.Fatal(err)
	}
	wrong := *unknown
	wrong.ID = token.ID
	wrongRemoved := *unknown
	wrongRemoved.ID = removed.ID
	fresh := crypto.NewPrivateKey
	forged := joining(t, token, fresh(), "n2")
	forged.CSR[len(forged.CSR)-1] ^= 1
	bound := joining(t, token, fresh(), "n2")
	bound.Exporter = make([]byte, crypto.MinExporter)

	for _, x := range []struct {
		name string
		r    peer.JoinRequest
		want error
	}{
		{"unknown token", joining(t, unknown, fresh(), "n2"), crypto.ErrTokenProof},
		{"wrong proof", joining(t, &wrong, fresh(), "n2"), crypto.ErrTokenProof},
		{"wrong proof, removed", joining(t, &wrongRemoved, fresh(), "n2"), crypto.ErrTokenProof},
		{"proof of another connection", bound, crypto.ErrTokenProof},
		{"removed token", joining(t, removed, fresh(), "n2"), peer.ErrTokenRevoked},
		{"token that a revoked node has", joining(t, ofRevoked, fresh(), "n2"), peer.ErrTokenRevoked},
		{"expired", joining(t, expired, fresh(), "n2"), crypto.ErrTokenExpired},
		{"used", joining(t, used, fresh(), "u2"), crypto.ErrTokenUsed},
		{"name not allowed", joining(t, k.token(crypto.TokenOptions{Name: "x*"}), fresh(), "n3"), crypto.ErrTokenName},
		{"name taken", joining(t, token, fresh(), "n1"), peer.ErrNameTaken},
		{"name of a keeper", joining(t, token, fresh(), "k1"), peer.ErrNameTaken},
		{"keeper itself", joining(t, token, c.first.Key(), "k1"), peer.ErrRefused},
		{"revoked name", joining(t, token, fresh(), "bad"), peer.ErrRefused},
		{"revoked key", joining(t, token, other, "gone"), peer.ErrRefused},
		{"another name for the key", joining(t, token, mine, "n4"), peer.ErrRefused},
		{"name that was freed", joining(t, token, fresh(), "gone"), nil},
		{"forged request", forged, crypto.ErrForged},
		{"no request", peer.JoinRequest{Token: token.ID, Exporter: exporter}, crypto.ErrMalformed},
	} {
		t.Run(x.name, func(t *testing.T) {
			before := string(c.store.Text())
			_, err := k.Join(ctx, x.r)
			if !errors.Is(err, x.want) || x.want == nil && err != nil {
				t.Fatalf("Join: %v, want %v", err, x.want)
			}
			if x.want != nil {
				if string(c.store.Text()) != before {
					t.Error("a refusal changed the ledger")
				}
				t.Log(err)
			}
		})
	}
	// Unknown and wrong cannot be told apart.
	_, err1 := k.Join(ctx, joining(t, unknown, fresh(), "n2"))
	_, err2 := k.Join(ctx, joining(t, &wrong, fresh(), "n2"))
	if err1.Error() != replaceID(err2, token.ID, unknown.ID) {
		t.Errorf("%v\n%v", err1, err2)
	}
	c.store.Fail(fmt.Errorf("%w: %w", errStore, crypto.ErrName))
	if _, err := k.Join(ctx, joining(t, token, fresh(), "n5")); err == nil || errors.Is(err, crypto.ErrName) {
		t.Errorf("without a store: %v: want an error that no stranger is told", err)
	}
	c.store.Fail(nil)
}

func replaceID(err error, from, to crypto.TokenID) string {
	return strings.ReplaceAll(err.Error(), from.String(), to.String())
}

// Two keepers share a store: a use is spent once, and a name goes to one.
func TestJoinRace(t *testing.T) {
	c := newCluster(t)
	k := []*site{c.keeper("k1"), c.keeper("k2")}
	for round := range 20 {
		token := k[0].token(crypto.TokenOptions{Uses: 1})
		var wg sync.WaitGroup
		errs := make([]error, 6)
		for i := range errs {
			r := joining(t, token, crypto.NewPrivateKey(), fmt.Sprintf("n%d-%d", round, i/2))
			wg.Go(func() { _, errs[i] = k[i%2].Join(ctx, r) })
		}
		wg.Wait()
		won := 0
		for _, err := range errs {
			if err == nil {
				won++
			} else if !errors.Is(err, crypto.ErrTokenUsed) && !errors.Is(err, peer.ErrNameTaken) {
				t.Error(err)
			}
		}
		if won != 1 {
			t.Fatalf("%d machines joined with a token for one", won)
		}
	}
}

// Between reading the token and spending it another keeper removes it.
func TestJoinConflict(t *testing.T) {
	c := newCluster(t)
	k1, k2 := c.keeper("k1"), c.keeper("k2")
	token := k1.token(crypto.TokenOptions{})
	once := false
	c.store.Conflict = func() {
		if !once {
			once = true
			if err := k2.admin().RemoveToken(ctx, token.ID); err != nil {
				t.Error(err)
			}
		}
	}
	if _, err := k1.Join(ctx, joining(t, token, crypto.NewPrivateKey(), "n1")); !errors.Is(err, peer.ErrTokenRevoked) {
		t.Errorf("Join = %v, want that the token was removed", err)
	}
	if _, ok := c.ledger().Nodes["n1"]; ok {
		t.Error("it has a record")
	}
}

func TestJoinLimit(t *testing.T) {
	c := newCluster(t)
	k := c.keeper("k1")
	token := k.token(crypto.TokenOptions{Uses: 2})
	c.update(func(l *keeper.Ledger) {
		n := l.Nodes["k1"]
		n.Keeper = false
		for i := len(l.Nodes); i < keeper.MaxNodes; i++ {
			n.Key[0], n.Key[1] = byte(i), byte(i>>8)
			l.Nodes[fmt.Sprintf("x%d", i)] = n
		}
	})
	if _, err := k.Join(ctx, joining(t, token, crypto.NewPrivateKey(), "n1")); !errors.Is(err, keeper.ErrLimit) {
		t.Errorf("node %d: %v", keeper.MaxNodes+1, err)
	}
	b, err := c.ledger().Encode()
	if err != nil || len(b) > keeper.MaxLedger/2 {
		t.Errorf("%d nodes have %d bytes, %v", keeper.MaxNodes, len(b), err)
	}
	t.Logf("%d nodes: %d bytes", keeper.MaxNodes, len(b))
	if all, err := k.admin().Nodes(ctx); err != nil || len(all) != keeper.MaxNodes {
		t.Errorf("Nodes = %d, %v", len(all), err)
	}
}

// Names, keys and tokens against a model that is simple enough to be right.
func TestModel(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		c := newCluster(t)
		keepers := []*site{c.keeper("k1"), c.keeper("k2")}
		type tok struct {
			*crypto.Token
			left    int
			removed bool
			spent   map[string]bool // name/key
		}
		var (
			tokens  []*tok
			keys    = []*crypto.PrivateKey{crypto.NewPrivateKey(), crypto.NewPrivateKey(), crypto.NewPrivateKey()}
			names   = []string{"n1", "n2"}
			owner   = map[string]int{}
			revoked = map[string]bool{}
			dead    = map[int]bool{} // keys
		)
		k := func() *site { return rapid.SampledFrom(keepers).Draw(rt, "keeper") }
		rt.Repeat(map[string]func(*rapid.T){
			"create": func(rt *rapid.T) {
				uses := rapid.IntRange(1, 2).Draw(rt, "uses")
				tokens = append(tokens, &tok{k().token(crypto.TokenOptions{Uses: uses}), uses, false, map[string]bool{}})
			},
			"remove token": func(rt *rapid.T) {
				if len(tokens) == 0 {
					return
				}
				tk := rapid.SampledFrom(tokens).Draw(rt, "token")
				if err := k().admin().RemoveToken(ctx, tk.ID); err != nil {
					rt.Fatal(err)
				}
				tk.removed = true
			},
			"join": func(rt *rapid.T) {
				if len(tokens) == 0 {
					return
				}
				tk := rapid.SampledFrom(tokens).Draw(rt, "token")
				name, key := rapid.SampledFrom(names).Draw(rt, "name"), rapid.IntRange(0, len(keys)-1).Draw(rt, "key")
				spend := fmt.Sprint(name, "/", key)
				who, taken := owner[name]
				elsewhere := false
				for other, o := range owner {
					elsewhere = elsewhere || other != name && o == key
				}
				want := !tk.removed && (tk.left > 0 || tk.spent[spend]) && (!taken || who == key) && !revoked[name] && !dead[key] && !elsewhere
				_, err := k().Join(ctx, joining(t, tk.Token, keys[key], name))
				if (err == nil) != want {
					rt.Fatalf("join of %s with key %d: %v, want success %v", name, key, err, want)
				}
				if err == nil {
					owner[name] = key
					if !tk.spent[spend] {
						tk.left--
						tk.spent[spend] = true
					}
				}
			},
			"revoke": func(rt *rapid.T) {
				name := rapid.SampledFrom(names).Draw(rt, "name")
				_, err := k().admin().Revoke(ctx, name)
				key, ok := owner[name]
				if (err == nil) != ok {
					rt.Fatalf("revoke %s: %v", name, err)
				}
				if ok {
					if !revoked[name] {
						for _, tk := range tokens {
							for i := range keys {
								tk.removed = tk.removed || tk.spent[fmt.Sprint(name, "/", i)]
							}
						}
					}
					revoked[name], dead[key] = true, true
				}
			},
			"remove": func(rt *rapid.T) {
				name := rapid.SampledFrom(names).Draw(rt, "name")
				_, err := k().admin().Remove(ctx, name)
				key, ok := owner[name]
				if (err == nil) != ok {
					rt.Fatalf("remove %s: %v", name, err)
				}
				if ok {
					dead[key] = true
					delete(owner, name)
					delete(revoked, name)
				}
			},
			"": func(rt *rapid.T) {
				l := c.ledger()
				if len(l.Nodes) != len(owner)+1 {
					rt.Fatalf("%d nodes, want %d", len(l.Nodes), len(owner)+1)
				}
				for name, key := range owner {
					if n := l.Nodes[name]; n.Key != keys[key].PublicKey() || n.Revoked.IsZero() == revoked[name] {
						rt.Fatalf("%s: %+v", name, n)
					}
				}
			},
		})
	})
}
