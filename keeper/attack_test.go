package keeper_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/tulle-net/tulle/crypto"
	"github.com/tulle-net/tulle/ipam"
	"github.com/tulle-net/tulle/keeper"
	"github.com/tulle-net/tulle/peer"
	"github.com/tulle-net/tulle/store"
	"github.com/tulle-net/tulle/store/storetest"
)

// The sentence that the tests in this file show: a compromised node can write its
// own leases and nothing else.

// prey is a cluster with three overlays, in two of which the victim has leases.
type prey struct {
	*cluster
	*site
	mem       *storetest.Memory
	blue, red *store.Overlay
	block     map[string]netip.Prefix // the victim's, by overlay
	fixed     netip.Addr              // the victim's, in blue
}

func newPrey(t testing.TB) *prey {
	t.Helper()
	c := newCluster(t)
	p := &prey{cluster: c, mem: storetest.New(), block: map[string]netip.Prefix{}, fixed: netip.MustParseAddr("10.32.250.7")}
	p.site = c.sharing("k1", p.mem)
	p.blue, p.red = p.create(store.Overlay{Name: "blue"}), p.create(store.Overlay{Name: "red"})
	for _, o := range []*store.Overlay{p.blue, p.red} { // what is fuzzed in one process is the same in another
		o.ID = o.Name + "-id"
		text, key := must[[]byte](t)(o.Encode()), store.OverlayKey(o.Name)
		if err := p.mem.Update(ctx, []string{store.Domain(key)}, func(x store.Txn) error { x.Put(key, text); return nil }); err != nil {
			t.Fatal(err)
		}
	}
	lease := p.leases(c.node("victim", "blue", "red"))
	for i, o := range []*store.Overlay{p.blue, p.red} {
		b, err := lease.Take(ctx, ipam.TakeRequest{Caller: caller("victims", uint64(i+1)), Overlay: o.Name, OverlayID: o.ID, Family: 4, Nonce: "v"})
		if err != nil {
			t.Fatal(err)
		}
		p.block[o.Name] = b.Prefix
	}
	if err := lease.Fix(ctx, ipam.FixRequest{Caller: caller("victims", 3), Overlay: "blue", OverlayID: p.blue.ID, Addr: p.fixed, Nonce: "f"}); err != nil {
		t.Fatal(err)
	}
	return p
}

func (p *prey) leases(cert *crypto.Certificate) keeper.Addresses {
	return keeper.Addresses{Client: func() keeper.Client { return p.as(cert) }}
}

// all is everything that is stored: of the ledger record by record.
func (p *prey) all(t testing.TB) map[string]string {
	t.Helper()
	mem := storetest.New()
	if err := keeper.Found(ctx, mem, p.ledger()); err != nil {
		t.Fatal(err)
	}
	all := keys(t, mem)
	delete(all, "ledger/head") // is random
	maps.Copy(all, keys(t, p.mem))
	return all
}

// foreign returns what has changed and is not the node's own.
func foreign(before, after map[string]string, node string, grants crypto.Grants) (out []string) {
	own := func(key string) bool {
		if key == store.KindRenewal+"/"+node {
			return true
		}
		parts := strings.SplitN(key, "/", 4)
		if len(parts) != 4 || parts[0] != store.KindIPAM || !grants.Allow(parts[1]) {
			return false
		}
		if parts[2] == "node" {
			return parts[3] == node
		}
		for _, all := range []map[string]string{before, after} {
			var h struct{ Node string }
			if text, there := all[key]; there && (json.Unmarshal([]byte(text), &h) != nil || h.Node != node) {
				return false
			}
		}
		return true
	}
	changed := maps.Clone(before)
	maps.Copy(changed, after)
	for key := range changed {
		if before[key] != after[key] && !own(key) {
			out = append(out, fmt.Sprintf("%s: %q → %q", key, before[key], after[key]))
		}
	}
	slices.Sort(out)
	return out
}

// attack is what a compromised node tries, and what it gets; nil: whatever it is
// told, nothing is changed.
type attack struct {
	name string
	do   func(keeper.Client, keeper.Addresses) error
	want error
}

func (p *prey) attacks(self string) []attack {
	me, victims := caller("mine", 1<<40), caller("victims", 1<<40)
	other := netip.MustParsePrefix("10.33.200.0/26")
	mtu := 1300
	admin := func(f func(keeper.Client) error) func(keeper.Client, keeper.Addresses) error {
		return func(c keeper.Client, _ keeper.Addresses) error { return f(c) }
	}
	lease := func(f func(keeper.Addresses) error) func(keeper.Client, keeper.Addresses) error {
		return func(_ keeper.Client, a keeper.Addresses) error { return f(a) }
	}
	var list []attack
	// Another's leases, under the victim's state or the attacker's own.
	for who, q := range map[string]ipam.Caller{"own": me, "victim's": victims} {
		for _, o := range []*store.Overlay{p.blue, p.red} {
			list = append(list,
				attack{"return in " + o.Name + " as " + who, lease(func(a keeper.Addresses) error {
					return a.Return(ctx, ipam.ReturnRequest{Caller: q, Overlay: o.Name, OverlayID: o.ID, Prefixes: []netip.Prefix{p.block[o.Name]}})
				}), nil},
				attack{"unfix in " + o.Name + " as " + who, lease(func(a keeper.Addresses) error {
					return a.Unfix(ctx, ipam.UnfixRequest{Caller: q, Overlay: o.Name, OverlayID: o.ID, Addr: p.fixed})
				}), nil},
				attack{"renewal in " + o.Name + " as " + who, lease(func(a keeper.Addresses) error {
					got, err := a.Renew(ctx, ipam.RenewRequest{Caller: q, Claims: []ipam.Claim{{
						Overlay: o.Name, OverlayID: o.ID, Blocks: []netip.Prefix{p.block[o.Name]}, Fixed: []netip.Addr{p.fixed}, Endpoints: 9,
					}}})
					if len(got.Blocks)+len(got.Fixed) > 0 {
						return fmt.Errorf("it has got %+v", got)
					}
					return err
				}), nil},
			)
		}
	}
	return append(list,
		attack{"the victim's fixed address", lease(func(a keeper.Addresses) error {
			return a.Fix(ctx, ipam.FixRequest{Caller: me, Overlay: "blue", OverlayID: p.blue.ID, Addr: p.fixed, Nonce: "f"})
		}), keeper.ErrTaken},
		attack{"the victim's block, with its nonce", lease(func(a keeper.Addresses) error {
			b, err := a.Take(ctx, ipam.TakeRequest{Caller: victims, Overlay: "blue", OverlayID: p.blue.ID, Family: 4, Nonce: "v"})
			if b.Prefix == p.block["blue"] {
				return errors.New("it has got it")
			}
			return err
		}), nil},
		// An overlay that it may not join.
		attack{"a block of red", lease(func(a keeper.Addresses) error {
			_, err := a.Take(ctx, ipam.TakeRequest{Caller: me, Overlay: "red", OverlayID: p.red.ID, Family: 4, Nonce: "x"})
			return err
		}), peer.ErrDenied},
		attack{"an address of red", lease(func(a keeper.Addresses) error {
			return a.Fix(ctx, ipam.FixRequest{Caller: me, Overlay: "red", OverlayID: p.red.ID, Addr: netip.MustParseAddr("10.33.7.7"), Nonce: "x"})
		}), peer.ErrDenied},
		attack{"claims in red", lease(func(a keeper.Addresses) error {
			got, err := a.Renew(ctx, ipam.RenewRequest{Caller: me, Claims: []ipam.Claim{{
				Overlay: "red", OverlayID: p.red.ID, Blocks: []netip.Prefix{other}, Fixed: []netip.Addr{netip.MustParseAddr("10.33.7.7")}, Endpoints: 1,
			}}})
			if len(got.Blocks)+len(got.Fixed) > 0 {
				return fmt.Errorf("it has got %+v", got)
			}
			return err
		}), nil},
		attack{"what is leased of red", admin(func(c keeper.Client) error { _, err := c.Addresses(ctx, "red"); return err }), peer.ErrDenied},
		attack{"the key of red", admin(func(c keeper.Client) error {
			keys, _, err := c.OverlayKeys(ctx, "red")
			if len(keys) > 0 {
				return errors.New("it has got it")
			}
			return err
		}), nil},
		attack{"the definition of red", admin(func(c keeper.Client) error {
			s, err := c.Shared(ctx, 0)
			if err == nil && slices.ContainsFunc(s.Put, func(o keeper.SharedOverlay) bool { return o.Name != "blue" }) {
				return fmt.Errorf("it has got %+v", s)
			}
			return err
		}), nil},
		attack{"a new epoch of red", admin(func(c keeper.Client) error { _, err := c.RotateOverlay(ctx, "red"); return err }), peer.ErrDenied},
		// Definitions, also of the overlay that it may join.
		attack{"create", admin(func(c keeper.Client) error {
			_, _, err := c.CreateOverlay(ctx, store.Overlay{Name: "blue-2"})
			return err
		}), peer.ErrDenied},
		attack{"set", admin(func(c keeper.Client) error {
			_, _, err := c.SetOverlay(ctx, "blue", keeper.OverlayChange{MTU: &mtu})
			return err
		}), peer.ErrDenied},
		attack{"rm", admin(func(c keeper.Client) error { _, err := c.RemoveOverlay(ctx, "blue", true); return err }), peer.ErrDenied},
		// Itself, and other nodes.
		attack{"a token for red", admin(func(c keeper.Client) error { _, err := c.CreateToken(ctx, with("red")); return err }), peer.ErrDenied},
		attack{"a token for all", admin(func(c keeper.Client) error { _, err := c.CreateToken(ctx, with("*")); return err }), peer.ErrDenied},
		attack{"promote itself", admin(func(c keeper.Client) error { _, err := c.Promote(ctx, self, ""); return err }), peer.ErrDenied},
		attack{"replace the keeper", admin(func(c keeper.Client) error { _, err := c.Promote(ctx, self, "k1"); return err }), peer.ErrDenied},
		attack{"demote the keeper", admin(func(c keeper.Client) error { _, err := c.Demote(ctx, "k1"); return err }), peer.ErrDenied},
		attack{"revoke", admin(func(c keeper.Client) error { _, err := c.Revoke(ctx, "victim"); return err }), peer.ErrDenied},
		attack{"remove", admin(func(c keeper.Client) error { _, err := c.Remove(ctx, "victim"); return err }), peer.ErrDenied},
		attack{"the gossip keys", admin(func(c keeper.Client) error { _, err := c.RotateGossip(ctx); return err }), peer.ErrDenied},
	)
}

func TestCompromisedNode(t *testing.T) {
	p := newPrey(t)
	narrow := p.cluster.node("narrow", "blue")
	// It was a keeper with all grants, and its certificate says so for 30 days.
	demoted := p.identity("demoted", crypto.Rights{Overlays: crypto.Grants{"*"}, Keeper: true})
	p.enrol(demoted)
	p.update(func(l *keeper.Ledger) {
		n := l.Nodes["demoted"]
		n.Keeper, n.Grants = false, crypto.Grants{"blue"}
		l.Nodes["demoted"] = n
	})
	for _, cert := range []*crypto.Certificate{narrow, demoted.Certificate()} {
		for _, a := range p.attacks(cert.Name) {
			before := p.all(t)
			err := a.do(p.as(cert), p.leases(cert))
			if a.want != nil && !errors.Is(err, a.want) || a.want == nil && err != nil {
				t.Errorf("%s: %s: %v, want %v", cert.Name, a.name, err, a.want)
			}
			if changed := foreign(before, p.all(t), cert.Name, crypto.Grants{"blue"}); len(changed) > 0 {
				t.Errorf("%s: %s changed what is not its own:\n%s", cert.Name, a.name, strings.Join(changed, "\n"))
			}
		}
		// What is its own it can have, so the above shows something.
		if _, err := p.leases(cert).Take(ctx, ipam.TakeRequest{Caller: caller("mine", 1<<41), Overlay: "blue", OverlayID: p.blue.ID, Family: 4, Nonce: "y"}); err != nil {
			t.Errorf("%s: a block of its own overlay: %v", cert.Name, err)
		}
	}
	// Of another node's leases everything is there.
	l := must[*ipam.Listing](t)(p.admin().Addresses(ctx, "blue"))
	if !slices.ContainsFunc(l.Blocks, func(b ipam.LeasedBlock) bool { return b.Prefix == p.block["blue"] && b.Node == "victim" }) ||
		len(l.Fixed) != 1 || l.Fixed[0].Node != "victim" {
		t.Errorf("blue has %+v", l)
	}
}

// One that is revoked, or removed, gets nothing at all.
func TestCompromisedRevoked(t *testing.T) {
	p := newPrey(t)
	revoked, removed := p.cluster.node("revoked", "*"), p.cluster.node("removed", "*")
	for _, cert := range []*crypto.Certificate{revoked, removed} {
		if _, err := p.leases(cert).Take(ctx, ipam.TakeRequest{Caller: caller("mine", 1), Overlay: "blue", OverlayID: p.blue.ID, Family: 4, Nonce: "x"}); err != nil {
			t.Fatal(err)
		}
	}
	must[*keeper.Outcome](t)(p.admin().Revoke(ctx, "revoked"))
	must[*keeper.Outcome](t)(p.admin().Remove(ctx, "removed"))
	before := p.all(t)
	for _, cert := range []*crypto.Certificate{revoked, removed} {
		for _, a := range p.attacks(cert.Name) {
			if err := a.do(p.as(cert), p.leases(cert)); !errors.Is(err, keeper.ErrRevoked) {
				t.Errorf("%s: %s: %v", cert.Name, a.name, err)
			}
		}
		for sub, body := range bodies(t) {
			if _, err := p.as(cert).Ask(ctx, sub, body); !errors.Is(err, keeper.ErrRevoked) {
				t.Errorf("%s: request %d: %v", cert.Name, sub, err)
			}
		}
	}
	if after := p.all(t); !maps.Equal(before, after) {
		t.Error("something is changed")
	}
}

// A node whose grants became fewer keeps the leases that it has until it gives
// them up, so that nobody else gets addresses that it uses, and gets no others.
func TestNarrowedLeases(t *testing.T) {
	p := newPrey(t)
	cert := p.cluster.node("n1", "blue", "red")
	lease := p.leases(cert)
	b, err := lease.Take(ctx, ipam.TakeRequest{Caller: caller("mine", 1), Overlay: "red", OverlayID: p.red.ID, Family: 4, Nonce: "x"})
	if err != nil {
		t.Fatal(err)
	}
	p.update(func(l *keeper.Ledger) { n := l.Nodes["n1"]; n.Grants = crypto.Grants{"blue"}; l.Nodes["n1"] = n })
	more := netip.MustParsePrefix("10.33.200.0/26")
	renew := func(n uint64, blocks ...netip.Prefix) []ipam.Block {
		t.Helper()
		got, err := lease.Renew(ctx, ipam.RenewRequest{Caller: caller("mine", n), Claims: []ipam.Claim{{Overlay: "red", OverlayID: p.red.ID, Blocks: blocks, Endpoints: 1}}})
		if err != nil {
			t.Fatal(err)
		}
		return got.Blocks
	}
	if got := renew(2, b.Prefix, more); len(got) != 1 || got[0].Prefix != b.Prefix {
		t.Errorf("renewed: %+v, want %v", got, b.Prefix)
	}
	if got := renew(3, more); len(got) != 0 {
		t.Errorf("it gave its block up, and has %+v", got)
	}
	if got := renew(4, b.Prefix, more); len(got) != 0 {
		t.Errorf("it has got %+v again", got)
	}
	var many []ipam.Claim
	for i := range ipam.MaxOverlays + 1 {
		many = append(many, ipam.Claim{Overlay: fmt.Sprintf("o%d", i), OverlayID: "x"})
	}
	if _, err := lease.Renew(ctx, ipam.RenewRequest{Caller: caller("mine", 5), Claims: many}); !errors.Is(err, keeper.ErrInvalid) {
		t.Errorf("claims in many overlays: %v", err)
	}
}

// How much a hostile node can write: as much as the limits of its overlays, and
// no faster than its pace. The numbers are in the log.
func TestExhaust(t *testing.T) {
	p := newPrey(t)
	small := p.create(store.Overlay{Name: "small", Subnets: []netip.Prefix{netip.MustParsePrefix("10.99.0.0/24")}})
	cert := p.cluster.node("hostile", "blue", "small")
	lease := p.leases(cert)
	before := p.all(t)
	allowed, n := 0, uint64(0)
	for ; n < 2000; n++ {
		_, err := lease.Take(ctx, ipam.TakeRequest{
			Caller: caller(fmt.Sprintf("%064d", n), n+1), Overlay: "blue", OverlayID: p.blue.ID, Family: 4, Nonce: strings.Repeat("n", 60) + fmt.Sprint(n),
		})
		if errors.Is(err, peer.ErrBusy) {
			break
		}
		allowed++
	}
	if allowed < 256 || allowed > 400 {
		t.Errorf("%d requests at once", allowed)
	}
	if _, err := lease.Renew(ctx, ipam.RenewRequest{Caller: caller("s", 1)}); !errors.Is(err, peer.ErrBusy) {
		t.Errorf("another kind of request: %v", err)
	}
	if err := lease.Fix(ctx, ipam.FixRequest{Caller: caller("s", 1), Overlay: "blue", OverlayID: p.blue.ID, Addr: netip.MustParseAddr("10.32.9.9"), Nonce: "x"}); !errors.Is(err, peer.ErrBusy) {
		t.Errorf("another kind of request: %v", err)
	}
	if _, err := p.leases(p.cluster.node("other", "blue")).Take(ctx, ipam.TakeRequest{Caller: caller("s", 1), Overlay: "blue", OverlayID: p.blue.ID, Family: 4, Nonce: "x"}); err != nil {
		t.Errorf("another node meanwhile: %v", err)
	}
	if _, err := p.as(cert).State(ctx, 0, 0); err != nil {
		t.Errorf("reading: %v", err)
	}
	// Without a pace: new keepers over the same store, until a small overlay is full.
	most := 0
	for range 8 {
		s := &site{c: p.cluster, ring: p.cluster.ring}
		cfg := s.config("k1")
		cfg.Shared = p.mem
		s.Keeper = must[*keeper.Keeper](t)(keeper.New(cfg))
		again := keeper.Addresses{Client: func() keeper.Client { return s.as(cert) }}
		wrote := 0
		for range 250 {
			n++
			state := fmt.Sprintf("%064d", n%64)
			_, err := again.Take(ctx, ipam.TakeRequest{Caller: caller(state, n), Overlay: "small", OverlayID: small.ID, Family: 4, Nonce: strings.Repeat("n", 60) + fmt.Sprint(n)})
			a := netip.AddrFrom4([4]byte{10, 99, 0, byte(n)})
			if fixed := again.Fix(ctx, ipam.FixRequest{Caller: caller(state, n), Overlay: "small", OverlayID: small.ID, Addr: a, Nonce: strings.Repeat("n", 64)}); err == nil || fixed == nil {
				wrote++
			}
		}
		if wrote == 0 {
			break
		}
	}
	size, count := 0, 0
	for key, value := range p.all(t) {
		if before[key] != value {
			size, count = size+len(key)+len(value), count+1
		}
		if key == "renewal/hostile" {
			most = len(value)
		}
	}
	t.Logf("%d requests at once; in the end %d keys, %d bytes; each request writes up to %d bytes", allowed, count, size, most)
	if count > allowed+256+10 || size > 1<<20 || most > store.MaxValue/8 {
		t.Errorf("%d keys, %d bytes, a record of %d bytes", count, size, most)
	}
	if changed := foreign(before, p.all(t), "hostile", crypto.Grants{"blue", "small"}); len(changed) > 4 { // other's own
		t.Errorf("changed: %s", changed)
	}
}

// A node that is no administrator does not fill the cluster with machines, nor
// does one machine fill the store by joining again; an administrator's tokens
// are not in its way.
func TestJoinPace(t *testing.T) {
	c := newCluster(t)
	k := c.keeper("k1")
	many := crypto.TokenOptions{TTL: time.Hour, Uses: crypto.MaxTokenUses, Name: "*", Overlays: crypto.Grants{"blue"}}
	mine := must[*crypto.Token](t)(crypto.ParseToken(must[string](t)(k.as(c.node("hostile", "blue")).CreateToken(ctx, many))))
	admins := k.token(many)
	until := func(join func(i int) error) int {
		for i := range 200 {
			if err := join(i); errors.Is(err, peer.ErrBusy) {
				return i
			} else if err != nil {
				t.Fatal(err)
			}
		}
		return 200
	}
	key := crypto.NewPrivateKey()
	for what, x := range map[string]struct {
		join func(i int) error
		all  bool
	}{
		"with its token": {func(i int) error {
			_, err := k.Join(ctx, joining(t, mine, crypto.NewPrivateKey(), fmt.Sprintf("h%d", i)))
			return err
		}, false},
		"with an administrator's": {func(i int) error {
			_, err := k.Join(ctx, joining(t, admins, crypto.NewPrivateKey(), fmt.Sprintf("a%d", i)))
			return err
		}, true},
		"again and again": {func(int) error { _, err := k.Join(ctx, joining(t, admins, key, "again")); return err }, false},
	} {
		if n := until(x.join); x.all && n != 200 || !x.all && (n < 64 || n > 100) {
			t.Errorf("%s: %d joins at once", what, n)
		}
	}
}

// Whatever a node asks about overlays and addresses, nothing panics, and nothing
// is changed but its own leases.
func FuzzCompromised(f *testing.F) {
	for sub, body := range bodies(f) {
		if sub >= keeper.SubShared {
			f.Add(sub, body)
		}
	}
	p := newPrey(f)
	for _, q := range []any{
		map[string]any{"version": 1, "request": ipam.RenewRequest{Caller: caller("victims", 9), Claims: []ipam.Claim{{
			Overlay: "red", OverlayID: p.red.ID, Blocks: []netip.Prefix{p.block["red"], netip.MustParsePrefix("10.33.200.0/26")}, Fixed: []netip.Addr{p.fixed},
		}}}},
		map[string]any{"version": 1, "request": ipam.RenewRequest{Caller: caller("mine", 9), Claims: []ipam.Claim{{
			Overlay: "blue", OverlayID: p.blue.ID, Blocks: []netip.Prefix{{}, p.block["blue"]}, Fixed: []netip.Addr{{}, p.fixed}, Endpoints: -1,
		}}}},
		map[string]any{"version": 1, "request": ipam.TakeRequest{Caller: caller("mine", 9), Overlay: "blue", OverlayID: p.blue.ID, Family: 6, Nonce: "x"}},
	} {
		body := must[[]byte](f)(json.Marshal(q))
		f.Add(keeper.SubRenewBlocks, body)
		f.Add(keeper.SubTakeBlock, body)
	}
	cert := p.cluster.node("hostile", "blue")
	seed := p.all(f)
	ledger := p.ledger()
	defer func() { p.cluster.t = f }()
	f.Fuzz(func(t *testing.T, sub uint16, body []byte) {
		p.cluster.t = t
		if sub < keeper.SubShared {
			return // FuzzRequest has them
		}
		mem := storetest.New()
		for key, value := range seed {
			if strings.HasPrefix(key, store.KindLedger+"/") {
				continue
			}
			if err := mem.Update(ctx, []string{store.Domain(key)}, func(x store.Txn) error { x.Put(key, []byte(value)); return nil }); err != nil {
				t.Fatal(err)
			}
		}
		p.update(func(l *keeper.Ledger) { *l = *ledger.Clone() })
		s := &site{c: p.cluster, ring: p.cluster.ring}
		cfg := s.config("k1")
		cfg.Shared = mem
		s.Keeper = must[*keeper.Keeper](t)(keeper.New(cfg)) // whose pace is not spent
		soon, cancel := context.WithTimeout(ctx, time.Second)
		defer cancel()
		if sub == keeper.SubShared {
			cancel() // it does not run
		}
		_, err := s.as(cert).Ask(soon, sub, body)
		if _, told := errors.AsType[*peer.Error](err); err != nil && !told {
			t.Fatalf("%v is not for the wire", err)
		}
		after := (&prey{cluster: p.cluster, mem: mem}).all(t)
		if changed := foreign(seed, after, "hostile", crypto.Grants{"blue"}); len(changed) > 0 {
			t.Fatalf("it changed what is not its own:\n%s", strings.Join(changed, "\n"))
		}
	})
}
