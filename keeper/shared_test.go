package keeper_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"runtime"
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

// sharing is a keeper of that name with shared overlays in mem, which runs
// until the test is over.
func (c *cluster) sharing(name string, mem store.Store) *site {
	c.t.Helper()
	s := &site{c: c, ring: c.ring}
	cfg := s.config(name)
	cfg.Shared = mem
	s.Keeper = must[*keeper.Keeper](c.t)(keeper.New(cfg))
	run, cancel := context.WithCancel(ctx)
	done := make(chan struct{})
	go func() { defer close(done); _ = s.Run(run) }()
	c.t.Cleanup(func() { cancel(); <-done })
	return s
}

func (s *site) create(o store.Overlay) *store.Overlay {
	s.c.t.Helper()
	d, _, err := s.admin().CreateOverlay(ctx, o)
	if err != nil {
		s.c.t.Fatal(err)
	}
	return d
}

// keys is all that is in a store.
func keys(t testing.TB, st store.Store) map[string]string {
	t.Helper()
	all := map[string]string{}
	err := st.View(ctx, func(r store.Reader) error {
		for _, kind := range []string{store.KindLedger, store.KindVNI, store.KindOverlay, store.KindIPAM, store.KindRenewal, store.KindKeeper} {
			items, err := r.List(kind + "/")
			if err != nil {
				return err
			}
			for _, i := range items {
				all[i.Key] = string(i.Value)
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}

func TestCreateOverlay(t *testing.T) {
	c := newCluster(t)
	mem := storetest.New()
	k := c.sharing("k1", mem)
	a, b := k.create(store.Overlay{Name: "a"}), k.create(store.Overlay{Name: "b"})
	if a.VNI != keeper.FirstVNI || fmt.Sprint(a.Subnets, a.Gateways) != "[10.32.0.0/16] [10.32.0.1]" || a.Encryption != "required" || a.Cipher != "auto" ||
		a.Flood != "unicast" || a.MTU != 0 || a.By != "k1" || !a.Created.Equal(c.time()) || a.ID == "" {
		t.Errorf("by default: %+v", a)
	}
	if b.VNI != keeper.FirstVNI+1 || fmt.Sprint(b.Subnets, b.Gateways) != "[10.33.0.0/16] [10.33.0.1]" || b.ID == a.ID {
		t.Errorf("the next: %+v", b)
	}
	explicit := store.Overlay{
		Name: "c", VNI: 7, Subnets: []netip.Prefix{netip.MustParsePrefix("10.34.7.0/24"), netip.MustParsePrefix("fd00:7::/64")},
		Gateways: []netip.Addr{netip.MustParseAddr("10.34.7.9")}, Reserved: []netip.Prefix{netip.MustParsePrefix("10.34.7.0/28")},
		Encryption: "none", MTU: 1300, Flood: "gossip", ClampMSS: true,
		By: "somebody", ID: "forged", Schema: 9, Created: time.Unix(1, 0),
	}
	d := k.create(explicit)
	if d.VNI != 7 || d.Cipher != "" || fmt.Sprint(d.Subnets, d.Gateways, d.Reserved) != "[10.34.7.0/24 fd00:7::/64] [10.34.7.9] [10.34.7.0/28]" || d.MTU != 1300 || d.Flood != "gossip" || !d.ClampMSS {
		t.Errorf("as said: %+v", d)
	}
	if d.By != "k1" || d.ID == "forged" || !d.Created.Equal(c.time()) {
		t.Errorf("the asker says who it is: %+v", d)
	}
	if e := k.create(store.Overlay{Name: "e"}); fmt.Sprint(e.Subnets) != "[10.35.0.0/16]" || e.VNI != keeper.FirstVNI+2 {
		t.Errorf("beside one that uses a part: %+v", e)
	}
	six := k.create(store.Overlay{Name: "six", Subnets: []netip.Prefix{netip.MustParsePrefix("fd00:6::/64")}})
	if fmt.Sprint(six.Subnets, six.Gateways) != "[fd00:6::/64] [fd00:6::1]" {
		t.Errorf("IPv6 only: %+v", six)
	}
	for i := 0; ; i++ {
		_, _, err := k.admin().CreateOverlay(ctx, store.Overlay{Name: fmt.Sprintf("x%d", i)})
		if err != nil {
			if !errors.Is(err, keeper.ErrLimit) || !strings.Contains(err.Error(), "--subnet") || i != 28 { // of 32, a, b, c and e have one
				t.Errorf("after %d: %v", i, err)
			}
			break
		}
	}
	if got := keys(t, mem)["vni/7"]; got != `{"schema":1,"overlay":"c"}` {
		t.Errorf("under its VNI is %s", got)
	}
}

func TestCreateOverlayRefused(t *testing.T) {
	c := newCluster(t)
	mem := storetest.New()
	k := c.sharing("k1", mem)
	other := k.as(c.node("n1", "*"))
	k.create(store.Overlay{Name: "blue", VNI: 7})
	before := keys(t, mem)
	bad := func(o store.Overlay) error { _, _, err := other.CreateOverlay(ctx, o); return err }
	for what, x := range map[string]struct {
		o    store.Overlay
		want error
		text string
	}{
		"its name":   {store.Overlay{Name: "blue"}, keeper.ErrExists, "overlay blue already, made by k1"},
		"its VNI":    {store.Overlay{Name: "red", VNI: 7}, keeper.ErrExists, "VNI 7 is overlay blue's"},
		"no name":    {store.Overlay{Name: ""}, keeper.ErrInvalid, ""},
		"a bad name": {store.Overlay{Name: "a/b"}, keeper.ErrInvalid, ""},
		"a long one": {store.Overlay{Name: strings.Repeat("x", 64)}, keeper.ErrInvalid, ""},
		"faults":     {store.Overlay{Name: "red", VNI: 1 << 24, Flood: "x"}, keeper.ErrInvalid, "want unicast or gossip"},
		"plain with": {store.Overlay{Name: "red", Encryption: "none", Cipher: "auto"}, keeper.ErrInvalid, "there is none"},
	} {
		if err := bad(x.o); !errors.Is(err, x.want) || !strings.Contains(fmt.Sprint(err), x.text) {
			t.Errorf("%s: %v, want %v and %q", what, err, x.want, x.text)
		}
	}
	for what, id := range map[string]string{"no id": "", "a long id": strings.Repeat("x", 65)} {
		body := fmt.Sprintf(`{"version":1,"id":%q,"overlay":{"schema":1,"name":"red","vni":0,"subnets":null,"encryption":"","flood":"","created":"2026-01-01T00:00:00Z","by":"","id":""}}`, id)
		if _, err := other.Ask(ctx, keeper.SubCreateOverlay, []byte(body)); !errors.Is(err, keeper.ErrInvalid) {
			t.Errorf("%s: %v", what, err)
		}
	}
	if now := keys(t, mem); !maps.Equal(now, before) {
		t.Error("a refusal changed the store")
	}
	// A request that comes twice makes one; another's of the same name none.
	var body []byte
	recorder := keeper.Client{Ask: func(ctx context.Context, sub uint16, b []byte) ([]byte, error) {
		body = slices.Clone(b)
		return k.admin().Ask(ctx, sub, b)
	}}
	first, _, err := recorder.CreateOverlay(ctx, store.Overlay{Name: "twice"})
	if err != nil {
		t.Fatal(err)
	}
	answer, err := k.admin().Ask(ctx, keeper.SubCreateOverlay, body)
	if err != nil || !bytes.Contains(answer, []byte(first.ID)) {
		t.Errorf("the same request again: %s, %v", answer, err)
	}
	if _, err := other.Ask(ctx, keeper.SubCreateOverlay, body); !errors.Is(err, keeper.ErrExists) {
		t.Errorf("the same request of another node: %v", err)
	}
	mem.SetAway(true)
	if err := bad(store.Overlay{Name: "away"}); !errors.Is(err, peer.ErrUnavailable) {
		t.Errorf("without the store: %v", err)
	}
	mem.SetAway(false)
	none := c.keeper("k1")
	for sub, body := range bodies(t) {
		if sub >= keeper.SubShared && sub != keeper.SubPromote && sub != keeper.SubDemote {
			if _, err := none.admin().Ask(ctx, sub, body); !errors.Is(err, peer.ErrUnavailable) {
				t.Errorf("request %d of a keeper without shared overlays: %v", sub, err)
			}
		}
	}
}

// All definitions fit into one answer, whatever is reserved in them.
func TestSharedFits(t *testing.T) {
	c := newCluster(t)
	mem := storetest.New()
	reserved := make([]netip.Prefix, 64)
	for i := range reserved {
		reserved[i] = netip.PrefixFrom(netip.AddrFrom16([16]byte{0xfd, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, byte(i), 0xf0}), 124)
	}
	large := store.Overlay{
		Name: longest(0), VNI: 100_000, Subnets: []netip.Prefix{netip.MustParsePrefix("fdff:ffff:ffff:ffff::/64")}, Reserved: reserved,
		Encryption: "required", Cipher: "auto", Flood: "unicast", ID: strings.Repeat("i", 64), By: longest(1), Created: c.time(),
	}
	if err := large.Check(); err != nil {
		t.Fatal(err)
	}
	size := len(must[[]byte](t)(large.Encode())) + 64
	n := keeper.MaxSharedBytes/size - 1
	for i := range n {
		large.Name, large.VNI = longest(i), uint32(100_000+i)
		text := must[[]byte](t)(large.Encode())
		err := mem.Update(ctx, []string{store.KindVNI, store.Domain(store.OverlayKey(large.Name))}, func(x store.Txn) error {
			x.Put(store.OverlayKey(large.Name), text)
			x.Put(store.VNIKey(large.VNI), []byte(`{}`))
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	k := c.sharing("k1", mem)
	large.Name, large.VNI = "one", 7
	k.create(large)
	large.Name, large.VNI = "two", 8
	if _, _, err := k.admin().CreateOverlay(ctx, large); !errors.Is(err, keeper.ErrLimit) {
		t.Errorf("one too many: %v", err)
	}
	if n >= keeper.MaxShared {
		t.Errorf("%d of %d bytes fit: the bound is never met", n, size)
	}
	answer, err := k.admin().Ask(ctx, keeper.SubShared, []byte(`{"version":1,"since":"0"}`))
	if err != nil || len(answer) > maxAnswer {
		t.Errorf("an answer of %d bytes, %v", len(answer), err)
	}
	t.Logf("%d definitions of %d bytes: an answer of %d bytes", n+1, size, len(answer))
}

func TestSetOverlay(t *testing.T) {
	c := newCluster(t)
	mem := storetest.New()
	k := c.sharing("k1", mem)
	k.create(store.Overlay{Name: "blue"})
	// A later release's field.
	key := store.OverlayKey("blue")
	later := strings.Replace(keys(t, mem)[key], `"schema":1`, `"schema":1,"later":[1,2]`, 1)
	if err := mem.Update(ctx, []string{store.Domain(key)}, func(x store.Txn) error { x.Put(key, []byte(later)); return nil }); err != nil {
		t.Fatal(err)
	}
	unicast, multicast, none := "flood", "drop", 0
	mtu, yes, flood, cipher := 1300, true, "gossip", "aes-256-gcm"
	reserved := []netip.Prefix{netip.MustParsePrefix("10.32.7.0/24")}
	o, _, err := k.admin().SetOverlay(ctx, "blue", keeper.OverlayChange{MTU: &mtu, ClampMSS: &yes, Flood: &flood, Cipher: &cipher, Gateway: &yes, Reserved: &reserved,
		UnknownUnicast: &unicast, UnknownMulticast: &multicast, BUMLimit: &none})
	if err != nil || o.UnknownUnicast != unicast || o.UnknownMulticast != multicast || o.BUMLimit == nil || *o.BUMLimit != 0 {
		t.Fatalf("SetOverlay = %+v, %v", o, err)
	}
	if o.MTU != mtu || !o.Gateway || !o.ClampMSS || o.Flood != flood || o.Cipher != cipher || !slices.Equal(o.Reserved, reserved) {
		t.Fatalf("SetOverlay = %+v, %v", o, err)
	}
	if text := keys(t, mem)[key]; !strings.Contains(text, `"later":[1,2]`) || !strings.Contains(text, `"mtu":1300`) {
		t.Errorf("written as %s", text)
	}
	was := keys(t, mem)
	none = -1
	if _, _, err := k.admin().SetOverlay(ctx, "blue", keeper.OverlayChange{BUMLimit: &none}); !errors.Is(err, keeper.ErrInvalid) {
		t.Errorf("a fault: %v", err)
	}
	mtu = 10
	if _, _, err := k.admin().SetOverlay(ctx, "blue", keeper.OverlayChange{MTU: &mtu}); !errors.Is(err, keeper.ErrInvalid) {
		t.Errorf("a fault: %v", err)
	}
	for _, name := range []string{"red", "", "a/b", strings.Repeat("x", 1000)} {
		if _, _, err := k.admin().SetOverlay(ctx, name, keeper.OverlayChange{}); !errors.Is(err, keeper.ErrNoSuch) {
			t.Errorf("of %.10q: %v", name, err)
		}
		if _, err := k.admin().RemoveOverlay(ctx, name, true); !errors.Is(err, keeper.ErrNoSuch) {
			t.Errorf("removal of %.10q: %v", name, err)
		}
	}
	if !maps.Equal(was, keys(t, mem)) {
		t.Error("a refusal changed the store")
	}
}

func caller(state string, n uint64) ipam.Caller { return ipam.Caller{State: state, Number: n} }

func TestRemoveOverlay(t *testing.T) {
	c := newCluster(t)
	mem := storetest.New()
	k := c.sharing("k1", mem)
	old := k.create(store.Overlay{Name: "blue"})
	node := k.as(c.node("n1", "blue"))
	lease := keeper.Addresses{Client: func() keeper.Client { return node }}
	if _, err := lease.Take(ctx, ipam.TakeRequest{Caller: caller("s", 1), Overlay: "blue", OverlayID: old.ID, Family: 4, Nonce: "x"}); err != nil {
		t.Fatal(err)
	}
	key := func() keeper.OverlayKey {
		keys, _, err := node.OverlayKeys(ctx, "blue")
		if err != nil || len(keys) != 1 {
			t.Fatal(keys, err)
		}
		return keys[0]
	}
	first, was := key(), keys(t, mem)
	if _, err := k.admin().RemoveOverlay(ctx, "blue", false); !errors.Is(err, keeper.ErrInUse) || !strings.Contains(err.Error(), "endpoints on n1") || !strings.Contains(err.Error(), "--force") {
		t.Errorf("with endpoints: %v", err)
	}
	if !maps.Equal(was, keys(t, mem)) || key().Epoch != first.Epoch {
		t.Error("a refusal changed something")
	}
	if _, err := k.admin().RemoveOverlay(ctx, "blue", true); err != nil {
		t.Fatal(err)
	}
	for left := range keys(t, mem) {
		if !strings.HasPrefix(left, store.KindRenewal) {
			t.Errorf("%s is left", left)
		}
	}
	if s, err := node.Shared(ctx, 0); err != nil || len(s.Put) != 0 {
		t.Errorf("the node is told %+v, %v", s, err)
	}
	if _, err := k.admin().RemoveOverlay(ctx, "blue", true); !errors.Is(err, keeper.ErrNoSuch) {
		t.Errorf("again: %v", err)
	}
	young := k.create(store.Overlay{Name: "blue"})
	if now := key(); now.Epoch <= first.Epoch || now.Key.Equal(first.Key) || young.ID == old.ID || young.VNI != old.VNI {
		t.Errorf("the next one of the name has epoch %d, id %s and VNI %d", now.Epoch, young.ID, young.VNI)
	}
	if _, err := lease.Take(ctx, ipam.TakeRequest{Caller: caller("s", 2), Overlay: "blue", OverlayID: old.ID, Family: 4, Nonce: "y"}); !errors.Is(err, keeper.ErrInvalid) {
		t.Errorf("a block of the overlay that is gone: %v", err)
	}
	// The key of a plain one is nobody's.
	k.create(store.Overlay{Name: "plain", Encryption: "none"})
	must[*keeper.Outcome](t)(k.admin().RemoveOverlay(ctx, "plain", false))
	if _, changed := c.ledger().Overlays["plain"]; changed {
		t.Error("the key of an overlay without encryption is changed")
	}
	// There is no room for another name whose key is changed: it is said before anything goes.
	c.update(func(l *keeper.Ledger) {
		for i := len(l.Overlays); i < keeper.MaxOverlays; i++ {
			l.Overlays[fmt.Sprintf("o%d", i)] = keeper.Overlay{Epoch: 2, Changed: c.time()}
		}
	})
	k.create(store.Overlay{Name: "last"})
	if _, err := k.admin().RemoveOverlay(ctx, "last", false); !errors.Is(err, keeper.ErrLimit) || keys(t, mem)["overlay/last"] == "" {
		t.Errorf("with a full ledger: %v", err)
	}
}

// replica is what a node that may see some overlays knows.
type replica struct {
	t       *testing.T
	cert    *crypto.Certificate
	see     func(string) bool
	have    map[string]int64
	at      int64
	wholes  int
	clients []keeper.Client
}

// pull asks one of the keepers, as package cluster does, and looks at each byte
// of the answer for names that are not the node's business.
func (r *replica) pull(i int) {
	r.t.Helper()
	c := keeper.Client{Ask: func(ctx context.Context, sub uint16, body []byte) ([]byte, error) {
		b, err := r.clients[i%len(r.clients)].Ask(ctx, sub, body)
		for _, word := range strings.FieldsFunc(string(b), func(c rune) bool { return c == '"' }) {
			if strings.HasPrefix(word, "team-") || strings.HasPrefix(word, "red-") {
				if !r.see(word) {
					r.t.Fatalf("an answer tells of %s: %s", word, b)
				}
			}
		}
		return b, err
	}}
	for _, since := range []int64{r.at, 0} {
		s, err := c.Shared(ctx, since)
		if err != nil {
			r.t.Fatal(err)
		}
		next := maps.Clone(r.have)
		if s.Whole {
			r.wholes++
			clear(next)
		}
		for _, o := range s.Put {
			next[o.Name] = o.Revision
		}
		for _, name := range s.Removed {
			delete(next, name)
		}
		if bytes.Equal(keeper.SharedDigest(next), s.Digest) {
			r.have, r.at = next, max(r.at, s.Revision)
			return
		}
	}
	r.t.Fatal("all that there is does not have the digest")
}

func (r *replica) check(mem store.Store) {
	r.t.Helper()
	want := map[string]int64{}
	_ = mem.View(ctx, func(t store.Reader) error {
		items, err := t.List(store.KindOverlay + "/")
		for _, i := range items {
			if name := strings.TrimPrefix(i.Key, store.KindOverlay+"/"); r.see(name) {
				want[name] = i.Revision
			}
		}
		return err
	})
	if !maps.Equal(want, r.have) {
		r.t.Fatalf("it has %v, want %v", r.have, want)
	}
}

// settle waits until a keeper knows the last change.
func settle(t *testing.T, s *site, mem *storetest.Memory) {
	t.Helper()
	var want int64
	_ = mem.View(ctx, func(r store.Reader) error { want = r.Revision(); return nil })
	for deadline := time.Now().Add(10 * time.Second); s.SharedRevision() < want; {
		if time.Now().After(deadline) {
			t.Fatalf("the keeper is at %d, the store at %d", s.SharedRevision(), want)
		}
		runtime.Gosched()
	}
}

// Random changes, seen by nodes with different grants that ask two keepers in
// turn; one of these starts anew now and then.
func TestCatalogue(t *testing.T) {
	c := newCluster(t)
	mem := storetest.New()
	k1, k2 := c.sharing("k1", mem), c.sharing("k1", mem)
	all, some := c.node("all", "*"), c.node("some", "team-*")
	rng := rand.New(rand.NewPCG(1, 2))
	see := map[*crypto.Certificate]func(string) bool{
		all: func(string) bool { return true }, some: func(name string) bool { return strings.HasPrefix(name, "team-") },
	}
	var nodes []*replica
	for cert, f := range see {
		nodes = append(nodes, &replica{t: t, cert: cert, see: f, have: map[string]int64{}, clients: []keeper.Client{k1.as(cert), k2.as(cert)}})
	}
	change := func(name string, put bool) {
		key := store.OverlayKey(name)
		text := must[[]byte](t)(store.Overlay{Name: name, VNI: 7, ID: name}.Encode())
		if err := mem.Update(ctx, []string{store.Domain(key)}, func(x store.Txn) error {
			if put {
				x.Put(key, text)
			} else {
				x.Delete(key)
			}
			return nil
		}); err != nil {
			t.Fatal(err)
		}
	}
	for i := range 400 {
		change([]string{"team-", "red-"}[rng.IntN(2)]+fmt.Sprint(rng.IntN(12)), rng.IntN(3) > 0)
		if i%100 == 99 {
			k2 = c.sharing("k1", mem)
			for _, n := range nodes {
				n.clients[1] = k2.as(n.cert)
			}
		}
		settle(t, k1, mem)
		settle(t, k2, mem)
		for j, n := range nodes {
			if rng.IntN(3) == 0 {
				n.pull(i + j)
				n.check(mem)
			}
		}
	}
	for _, n := range nodes {
		if n.wholes > 20 {
			t.Errorf("%d times everything was told: differences are not", n.wholes)
		}
	}
	// More removals than a keeper remembers, while the nodes are away.
	change("team-stays", true)
	for i := range 1100 {
		name := fmt.Sprintf("%s%d", []string{"team-", "red-"}[i%2], 1000+i)
		change(name, true)
		change(name, false)
	}
	settle(t, k1, mem)
	for _, n := range nodes {
		before := n.wholes
		n.pull(0)
		n.check(mem)
		if n.wholes != before+1 {
			t.Error("removals that are forgotten are not told as everything")
		}
		n.pull(0)
		if n.wholes != before+1 {
			t.Error("nothing new is told as everything")
		}
	}
}

// A keeper that has not read the definitions yet says nothing of them, least of
// all that there are none.
func TestSharedNotReady(t *testing.T) {
	c := newCluster(t)
	mem := storetest.New()
	mem.SetAway(true)
	k := c.sharing("k1", mem)
	soon, cancel := context.WithTimeout(ctx, 20*time.Millisecond)
	defer cancel()
	if _, err := k.admin().Shared(soon, 0); !errors.Is(err, peer.ErrUnavailable) {
		t.Errorf("before the store is there: %v", err)
	}
	mem.SetAway(false)
	if s, err := k.admin().Shared(ctx, 0); err != nil || !s.Whole || len(s.Put) != 0 {
		t.Errorf("Shared = %+v, %v", s, err)
	}
}
