package keeper_test

import (
	"context"
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/tulle-net/tulle/crypto"
	"github.com/tulle-net/tulle/keeper"
	"github.com/tulle-net/tulle/peer"
)

var (
	hour = crypto.TokenOptions{TTL: time.Hour, Uses: 1, Name: "*"}
	with = func(grants ...string) crypto.TokenOptions {
		o := hour
		o.Overlays = grants
		return o
	}
)

// requests are one of each kind, of a node called self whose grants are blue
// and team-*, and what others than administrators get.
func requests(self *crypto.Identity, token crypto.TokenID) []struct {
	name string
	do   func(keeper.Client) error
	want error // for the narrow node
} {
	other := crypto.NewPrivateKey()
	csr := func(key *crypto.PrivateKey, name string) []byte {
		b, err := crypto.NewRequest(key, name)
		if err != nil {
			panic(err)
		}
		return b
	}
	create := func(grants ...string) func(keeper.Client) error {
		return func(c keeper.Client) error { _, err := c.CreateToken(ctx, with(grants...)); return err }
	}
	renew := func(b []byte) func(keeper.Client) error {
		return func(c keeper.Client) error { _, _, err := c.Renew(ctx, b); return err }
	}
	outcome := func(f func(keeper.Client, context.Context, string) (*keeper.Outcome, error), name string) func(keeper.Client) error {
		return func(c keeper.Client) error { _, err := f(c, ctx, name); return err }
	}
	return []struct {
		name string
		do   func(keeper.Client) error
		want error
	}{
		{"state", func(c keeper.Client) error { _, err := c.State(ctx, 0, 0); return err }, nil},
		{"nodes", func(c keeper.Client) error { _, err := c.Nodes(ctx); return err }, nil},
		{"tokens", func(c keeper.Client) error { _, err := c.Tokens(ctx); return err }, nil},
		{"renew", renew(csr(self.Key(), self.Name())), nil},
		{"renew under another name", renew(csr(self.Key(), "k1")), peer.ErrDenied},
		{"renew with another key", renew(csr(other, self.Name())), peer.ErrDenied},
		{"another's renewal", renew(csr(other, "victim")), peer.ErrDenied},
		{"token within", create("blue"), nil},
		{"token of a pattern within", create("team-1-*"), nil},
		{"token of none", create(), nil},
		{"token of another overlay", create("red"), peer.ErrDenied},
		{"token of one within and one not", create("blue", "red"), peer.ErrDenied},
		{"token of a wider pattern", create("team*"), peer.ErrDenied},
		{"token of all", create("*"), peer.ErrDenied},
		{"another's token", func(c keeper.Client) error { return c.RemoveToken(ctx, token) }, peer.ErrDenied},
		{"revoke", outcome(keeper.Client.Revoke, "victim"), peer.ErrDenied},
		{"revoke itself", outcome(keeper.Client.Revoke, self.Name()), peer.ErrDenied},
		{"remove", outcome(keeper.Client.Remove, "victim"), peer.ErrDenied},
		{"rotate an overlay that it names", outcome(keeper.Client.RotateOverlay, "blue"), nil},
		{"rotate an overlay of its pattern", outcome(keeper.Client.RotateOverlay, "team-1"), peer.ErrDenied},
		{"rotate another overlay", outcome(keeper.Client.RotateOverlay, "red"), peer.ErrDenied},
		{"status of the CA", func(c keeper.Client) error { _, err := c.CAStatus(ctx); return err }, nil},
		{"change the CA", func(c keeper.Client) error { _, err := c.ChangeCA(ctx); return err }, peer.ErrDenied},
		{"finish a change of the CA", func(c keeper.Client) error { _, err := c.FinishCA(ctx); return err }, peer.ErrDenied},
		{"rotate gossip", func(c keeper.Client) error { _, err := c.RotateGossip(ctx); return err }, peer.ErrDenied},
	}
}

func TestRights(t *testing.T) {
	c := newCluster(t)
	k := c.keeper("k1")
	c.node("victim", "red")
	narrow := c.identity("narrow", crypto.Rights{Overlays: crypto.Grants{"blue", "team-*"}})
	c.enrol(narrow)
	token := k.token(with("red")).ID
	for _, x := range requests(narrow, token) {
		before := string(c.store.Text())
		err := x.do(k.as(narrow.Certificate()))
		if !errors.Is(err, x.want) || x.want == nil && err != nil {
			t.Errorf("%s: %v, want %v", x.name, err, x.want)
		}
		if x.want != nil && before != string(c.store.Text()) {
			t.Errorf("%s: a refusal changed the ledger", x.name)
		}
		if n := c.ledger().Nodes["narrow"]; n.Keeper || n.Grants.String() != "blue,team-*" {
			t.Fatalf("%s: its record is %+v", x.name, n)
		}
	}

	// Administrators: by grant, and as a keeper with few grants.
	for _, r := range []crypto.Rights{{Overlays: crypto.Grants{"*"}}, {Overlays: crypto.Grants{"green"}, Keeper: true}} {
		admin := c.identity("admin", r)
		c.enrol(admin)
		client := k.as(admin.Certificate())
		for _, x := range requests(admin, token) {
			if strings.Contains(x.name, "itself") || strings.HasPrefix(x.name, "renew ") || x.name == "another's renewal" {
				continue
			}
			c.pass(2 * time.Second) // between changes of one overlay's key
			if x.name == "remove" || x.name == "revoke" {
				c.node("victim", "red")
			}
			if err := x.do(client); err != nil {
				t.Errorf("administrator with %+v: %s: %v", r, x.name, err)
			}
		}
	}
}

// Nothing is answered to a node that is not believed any more, whatever its
// connection has shown.
func TestNotBelieved(t *testing.T) {
	c := newCluster(t)
	k := c.keeper("k1")
	revoked := c.identity("revoked", crypto.Rights{Overlays: crypto.Grants{"*"}, Keeper: true})
	c.enrol(revoked)
	must[*keeper.Outcome](t)(k.admin().Revoke(ctx, "revoked"))
	removed := c.identity("removed", crypto.Rights{Overlays: crypto.Grants{"*"}})
	c.enrol(removed)
	must[*keeper.Outcome](t)(k.admin().Remove(ctx, "removed"))
	again := c.identity("again", crypto.Rights{Overlays: crypto.Grants{"*"}}) // the name is another's
	c.node("again", "*")
	stranger := c.identity("stranger", crypto.Rights{Overlays: crypto.Grants{"*"}, Keeper: true}) // the ledger was restored
	for _, x := range []struct {
		id   *crypto.Identity
		want error
	}{{revoked, keeper.ErrRevoked}, {removed, keeper.ErrRevoked}, {again, peer.ErrDenied}, {stranger, peer.ErrDenied}} {
		before := string(c.store.Text())
		for _, r := range requests(x.id, crypto.TokenID{}) {
			if err := r.do(k.as(x.id.Certificate())); !errors.Is(err, x.want) {
				t.Errorf("%s: %s: %v, want %v", x.id.Name(), r.name, err, x.want)
			}
		}
		if _, _, err := k.as(x.id.Certificate()).OverlayKeys(ctx, "blue"); !errors.Is(err, x.want) {
			t.Errorf("%s: overlay keys: %v", x.id.Name(), err)
		}
		if before != string(c.store.Text()) {
			t.Errorf("%s changed the ledger", x.id.Name())
		}
	}
	marked := c.node("marked", "*") // in its record only
	c.update(func(l *keeper.Ledger) {
		n := l.Nodes["marked"]
		n.Revoked = c.time()
		l.Nodes["marked"] = n
	})
	if _, err := k.as(marked).State(ctx, 0, 0); !errors.Is(err, keeper.ErrRevoked) {
		t.Errorf("revoked by its record: %v", err)
	}
	late := c.node("late", "*")
	c.pass(crypto.Lifetime + time.Hour)
	if _, err := k.as(late).State(ctx, 0, 0); !errors.Is(err, peer.ErrDenied) {
		t.Errorf("with an expired certificate: %v", err)
	}
}

// A right is one that both certificate and record have; renewing does not
// bring back what a newer token no longer gives.
func TestNarrowed(t *testing.T) {
	c := newCluster(t)
	k := c.keeper("k1")
	key := crypto.NewPrivateKey()
	join := func(grants ...string) *crypto.Identity {
		r := must[*peer.JoinResult](t)(k.Join(ctx, joining(t, k.token(with(grants...)), key, "n1")))
		return must[*crypto.Identity](t)(crypto.NewIdentity(key, &crypto.Issued{Certificate: r.Certificate, Card: r.Card}, c.roots, c.time()))
	}
	old := join("*")
	young := join("blue")
	csr := must[[]byte](t)(young.Renewal())
	if _, _, err := k.as(old.Certificate()).Renew(ctx, csr); !errors.Is(err, peer.ErrDenied) {
		t.Errorf("renewing the wider certificate: %v", err)
	}
	for _, id := range []*crypto.Identity{old, young} {
		keys, denied, err := k.as(id.Certificate()).OverlayKeys(ctx, "blue", "red")
		if err != nil || len(keys) != 1 || keys[0].Overlay != "blue" || !slices.Equal(denied, []string{"red"}) {
			t.Errorf("keys %v, denied %v, %v", keys, denied, err)
		}
		if _, err := k.as(id.Certificate()).RotateGossip(ctx); !errors.Is(err, peer.ErrDenied) {
			t.Errorf("as an administrator: %v", err)
		}
	}
	issued, _, err := k.as(young.Certificate()).Renew(ctx, csr)
	if err != nil {
		t.Fatal(err)
	}
	cert := must[*crypto.Certificate](t)(c.roots.Verify([][]byte{issued.Certificate}, c.time(), nil))
	if n := c.ledger().Nodes["n1"]; cert.Overlays.String() != "blue" || cert.Keeper || n.Serial != cert.Serial || !n.Expires.Equal(cert.NotAfter) {
		t.Errorf("renewed: %+v, record %+v", cert.Rights, n)
	}
}

func TestOverlayKeys(t *testing.T) {
	c := newCluster(t)
	k := c.keeper("k1")
	node := k.as(c.node("n1", "blue", "team-*"))
	keys, denied, err := node.OverlayKeys(ctx, "blue", "team-7", "red", "team", "Blue")
	if err != nil || len(keys) != 2 || !slices.Equal(denied, []string{"red", "team", "Blue"}) {
		t.Fatalf("OverlayKeys = %v, %v, %v", keys, denied, err)
	}
	for _, key := range keys {
		if key.Epoch != 1 || !key.Key.Equal(crypto.OverlayKey(c.root, key.Overlay, 1)) {
			t.Errorf("%s: epoch %d, or not its key", key.Overlay, key.Epoch)
		}
	}
	for want := uint32(2); want < 4; want++ {
		c.pass(time.Second)
		if out, err := node.RotateOverlay(ctx, "blue"); err != nil || out.Epoch != want {
			t.Fatalf("RotateOverlay = %+v, %v, want epoch %d", out, err, want)
		}
		if keys, _, err := node.OverlayKeys(ctx, "blue"); err != nil || keys[0].Epoch != want || !keys[0].Key.Equal(crypto.OverlayKey(c.root, "blue", want)) {
			t.Errorf("%v, %v", keys, err)
		}
	}
	if _, err := node.RotateOverlay(ctx, "blue"); !errors.Is(err, peer.ErrBusy) {
		t.Errorf("again at once: %v", err)
	}
	if len(k.pushes) != 2 {
		t.Errorf("pushed %d times", len(k.pushes))
	}
	if _, _, err := node.OverlayKeys(ctx, "no name"); !errors.Is(err, keeper.ErrInvalid) {
		t.Errorf("a name that is none: %v", err)
	}
	many := slices.Repeat([]string{"team-1"}, 2*keeper.MaxOverlayKeys+1)
	if keys, _, err := node.OverlayKeys(ctx, many...); err != nil || len(keys) != len(many) {
		t.Errorf("%d overlays: %d keys, %v", len(many), len(keys), err)
	}
}

// Who may join what is told to those who may join it, too.
func TestNodes(t *testing.T) {
	c := newCluster(t)
	k := c.keeper("k1")
	n1 := c.node("n1", "blue", "red")
	c.node("n2", "blue")
	list := must[[]keeper.NodeInfo](t)(k.as(n1).Nodes(ctx))
	if len(list) != 3 || list[0].Name != "k1" || !list[0].Keeper || list[0].Overlays != nil || list[1].Overlays.String() != "blue,red" ||
		list[1].Serial != n1.Serial.String() || list[1].Key != n1.Key || list[2].Overlays.String() != "blue" {
		t.Errorf("n1 sees %+v", list)
	}
	if list = must[[]keeper.NodeInfo](t)(k.admin().Nodes(ctx)); list[0].Overlays.String() != "*" || list[1].Overlays.String() != "blue,red" {
		t.Errorf("k1 sees %+v", list)
	}
}

func TestTokens(t *testing.T) {
	c := newCluster(t)
	k := c.keeper("k1")
	node := k.as(c.node("n1", "blue"))
	red := k.token(with("red"))
	blue := must[*crypto.Token](t)(crypto.ParseToken(must[string](t)(node.CreateToken(ctx, with("blue")))))
	all := must[[]keeper.TokenInfo](t)(k.admin().Tokens(ctx))
	mine := must[[]keeper.TokenInfo](t)(node.Tokens(ctx))
	if len(all) != 2 || len(mine) != 1 || mine[0].ID != blue.ID || mine[0].By != "n1" || mine[0].Left != 1 || mine[0].Overlays.String() != "blue" {
		t.Errorf("all %+v\nmine %+v", all, mine)
	}
	if _, err := k.Join(ctx, joining(t, blue, crypto.NewPrivateKey(), "n2")); err != nil {
		t.Error(err)
	}
	if mine = must[[]keeper.TokenInfo](t)(node.Tokens(ctx)); mine[0].Left != 0 {
		t.Errorf("after it was used: %+v", mine)
	}
	for range 2 {
		if err := node.RemoveToken(ctx, blue.ID); err != nil {
			t.Error(err)
		}
	}
	if err := node.RemoveToken(ctx, crypto.TokenID{9}); !errors.Is(err, keeper.ErrNoSuch) {
		t.Errorf("removing none: %v", err)
	}
	for name, o := range map[string]crypto.TokenOptions{
		"no time":     {Uses: 1, Name: "*"},
		"a long time": {Uses: 1, Name: "*", TTL: 366 * 24 * time.Hour},
		"no use":      {TTL: time.Hour, Name: "*"},
		"uses":        {TTL: time.Hour, Name: "*", Uses: crypto.MaxTokenUses + 1},
		"no name":     {TTL: time.Hour, Uses: 1},
		"grants":      {TTL: time.Hour, Uses: 1, Name: "*", Overlays: crypto.Grants{"b", "a"}},
	} {
		if _, err := k.admin().CreateToken(ctx, o); !errors.Is(err, keeper.ErrInvalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, ok := c.ledger().Tokens[red.ID]; !ok {
		t.Error("a token of others is gone")
	}
}

// A request that comes twice makes one token, and one epoch.
func TestTwice(t *testing.T) {
	c := newCluster(t)
	k := c.keeper("k1")
	local := k.admin()
	twice := keeper.Client{Ask: func(ctx context.Context, sub uint16, body []byte) ([]byte, error) {
		if _, err := local.Ask(ctx, sub, body); err != nil {
			return nil, err
		}
		return local.Ask(ctx, sub, body)
	}}
	text, err := twice.CreateToken(ctx, hour)
	if err != nil {
		t.Fatal(err)
	}
	token := must[*crypto.Token](t)(crypto.ParseToken(text))
	if l := c.ledger(); len(l.Tokens) != 1 || l.Tokens[token.ID].Uses != 1 {
		t.Errorf("%d tokens", len(l.Tokens))
	}
	if out, err := twice.RotateOverlay(ctx, "blue"); err != nil || out.Epoch != 2 {
		t.Errorf("RotateOverlay = %+v, %v", out, err)
	}
}

func TestTokenLimits(t *testing.T) {
	c := newCluster(t)
	k := c.keeper("k1")
	n1 := c.node("n1", "blue")
	fill := func(by string, n int) {
		c.update(func(l *keeper.Ledger) {
			for range n {
				_, r, err := crypto.NewToken(c.ca.Fingerprint(), k.config("k1").Addrs(), hour, c.time())
				if err != nil {
					t.Fatal(err)
				}
				l.Tokens[r.ID] = keeper.Token{TokenRecord: *r, By: by}
			}
		})
	}
	fill("n1", keeper.MaxTokensEach)
	if _, err := k.as(n1).CreateToken(ctx, with("blue")); !errors.Is(err, keeper.ErrLimit) {
		t.Errorf("one token too many of a node: %v", err)
	}
	fill("k1", keeper.MaxTokens-keeper.MaxTokensEach)
	if _, err := k.admin().CreateToken(ctx, hour); !errors.Is(err, keeper.ErrLimit) {
		t.Errorf("one token too many: %v", err)
	}
	// Those that are over make room.
	c.pass(2 * time.Hour)
	for range 3 {
		k.token(hour)
	}
	if l := c.ledger(); len(l.Tokens) != keeper.MaxTokensOver+3 {
		t.Errorf("%d tokens", len(l.Tokens))
	}
	c.pass(26 * time.Hour)
	k.token(hour)
	if l := c.ledger(); len(l.Tokens) != 1 {
		t.Errorf("a day later: %d tokens", len(l.Tokens))
	}
}

// A node without administrator's rights does not make the keeper write all day.
func TestPace(t *testing.T) {
	c := newCluster(t)
	k := c.keeper("k1")
	node := k.as(c.node("n1", "blue"))
	var err error
	n := 0
	for ; err == nil && n < 100; n++ {
		_, err = node.CreateToken(ctx, with("blue"))
	}
	if !errors.Is(err, peer.ErrBusy) || n < 30 || n > 40 {
		t.Errorf("after %d tokens: %v", n, err)
	}
	if _, err := node.State(ctx, 0, 0); err != nil {
		t.Errorf("reading: %v", err)
	}
	k.token(hour)
}
