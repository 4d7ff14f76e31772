package keeper_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/tulle-net/tulle/crypto"
	"github.com/tulle-net/tulle/keeper"
	"github.com/tulle-net/tulle/peer"
)

// fleet is a cluster of nodes that do what keepers tell them.
type fleet struct {
	*cluster
	t     *testing.T
	sites map[string]*site

	mu      sync.Mutex
	ids     map[string]*crypto.Identity
	cas     map[string][]*crypto.CA // each keeper's
	away    map[string]bool
	reopens []string // of whom, in order
	stages  []keeper.Stage
	refuse  string // who does not open its store anew
	hold    uint64 // the change with which nobody does
}

// newFleet has keepers k1 and k2, and the nodes n1 and n2.
func newFleet(t *testing.T) *fleet {
	f := &fleet{
		t: t, cluster: newCluster(t), sites: map[string]*site{}, ids: map[string]*crypto.Identity{},
		cas: map[string][]*crypto.CA{}, away: map[string]bool{},
	}
	f.ids["k1"] = f.first
	f.ids["k2"] = f.identity("k2", crypto.Rights{Overlays: crypto.Grants{"*"}, Keeper: true})
	f.ids["n1"] = f.identity("n1", crypto.Rights{Overlays: crypto.Grants{"*"}})
	f.ids["n2"] = f.identity("n2", crypto.Rights{Overlays: crypto.Grants{"blue"}})
	for _, name := range []string{"k2", "n1", "n2"} {
		f.enrol(f.ids[name])
	}
	for _, name := range []string{"k1", "k2"} {
		f.serve(name)
	}
	return f
}

// serve makes a keeper.
func (f *fleet) serve(name string) {
	f.t.Helper()
	s := &site{c: f.cluster, ring: f.ring}
	cfg := s.config(name)
	cfg.CAs = func(p crypto.Fingerprint) *crypto.CA {
		f.mu.Lock()
		defer f.mu.Unlock()
		for _, ca := range f.cas[name] {
			if ca.Fingerprint() == p {
				return ca
			}
		}
		return nil
	}
	cfg.KeepCA = func(ca *crypto.CA) error {
		f.mu.Lock()
		defer f.mu.Unlock()
		f.cas[name] = append(f.cas[name], ca)
		return nil
	}
	cfg.Alive = func(name string) bool {
		f.mu.Lock()
		defer f.mu.Unlock()
		return !f.away[name]
	}
	cfg.Tell = f.tell
	cfg.Push = func(ctx context.Context, _ []string) []string { return f.push(ctx, s) }
	s.Keeper = must[*keeper.Keeper](f.t)(keeper.New(cfg))
	f.sites[name] = s
}

// tell has a node do what it is ordered.
func (f *fleet) tell(_ context.Context, node string, _ peer.Kind, payload []byte) ([]byte, error) {
	var o keeper.KeepOrder
	if err := json.Unmarshal(payload, &o); err != nil {
		return nil, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.away[node] {
		return nil, peer.ErrTimeout
	}
	switch o.Step {
	case keeper.KeepCA:
		key, err := crypto.ParsePrivateKey(o.NextKey)
		if err != nil {
			return nil, err
		}
		ca, err := crypto.LoadCA(o.NextCA, key)
		if err != nil {
			return nil, err
		}
		f.cas[node] = append(f.cas[node], ca)
	case keeper.KeepReopen:
		if f.refuse == node || f.hold == o.Number {
			return nil, peer.Errorf(peer.CodeFailed, "the disk is full")
		}
		f.reopens = append(f.reopens, node)
	}
	return []byte("{}"), nil
}

// push has all that are there pull, and renew if they have to.
func (f *fleet) push(ctx context.Context, s *site) []string {
	l := f.ledger()
	f.mu.Lock()
	f.stages = append(f.stages, l.CA.Stage)
	var names []string
	for name := range f.ids {
		if !f.away[name] {
			names = append(names, name)
		}
	}
	f.mu.Unlock()
	var late []string
	for _, name := range names {
		if err := f.follow(ctx, s, name); err != nil {
			f.t.Logf("%s: %v", name, err)
			late = append(late, name)
		}
	}
	return late
}

// follow is what a node does when it is pushed.
func (f *fleet) follow(ctx context.Context, s *site, name string) error {
	f.mu.Lock()
	id := f.ids[name]
	f.mu.Unlock()
	st, err := s.as(id.Certificate()).State(ctx, 0, 0)
	if err != nil {
		return err
	}
	if id, err = id.WithRoots(st.Roots, f.time()); err != nil {
		return err
	}
	if st.Revocations != nil {
		if _, err := id.Roots().ParseRevocations(st.Revocations); err != nil {
			return err
		}
	}
	if p := id.Roots().Signer(); id.Certificate().Issuer != crypto.KeyID(p[:4]) {
		issued, _, err := s.as(id.Certificate()).Renew(ctx, must[[]byte](f.t)(id.Renewal()))
		if err != nil {
			return err
		}
		if id, err = crypto.NewIdentity(id.Key(), issued, id.Roots(), f.time()); err != nil {
			return err
		}
	}
	f.mu.Lock()
	f.ids[name] = id
	f.mu.Unlock()
	_, err = s.as(id.Certificate()).StateHolding(ctx, 0, 0, id.Certificate().Issuer)
	return err
}

// client asks by a keeper in a node's name.
func (f *fleet) client(keeper, name string) keeper.Client {
	return f.sites[keeper].Local(func() *crypto.Certificate {
		f.mu.Lock()
		defer f.mu.Unlock()
		return f.ids[name].Certificate()
	})
}

// run has keepers work until the function that it returns is called.
func (f *fleet) run(names ...string) (stop func()) {
	run, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	for _, name := range names {
		wg.Go(func() { _ = f.sites[name].Run(run) })
	}
	return func() { cancel(); wg.Wait() }
}

// status waits until nothing more happens by itself.
func (f *fleet) status() *keeper.CAStatus {
	f.t.Helper()
	synctest.Wait()
	time.Sleep(time.Minute)
	synctest.Wait()
	return must[*keeper.CAStatus](f.t)(f.client("k1", "k1").CAStatus(ctx))
}

func (f *fleet) set(m map[string]bool, name string, v bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	m[name] = v
}

// A change takes all stages in order; each has been everywhere before the next, and
// every keeper's store is opened anew in each, the one at work last.
func TestChangeCA(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFleet(t)
		must[*keeper.Outcome](t)(f.client("k1", "n1").Revoke(ctx, f.enrol(f.identity("bad", crypto.Rights{})).Name))
		f.stages = nil
		old := f.sites["k1"].token(hour)
		removed := f.sites["k1"].token(hour)
		if err := f.client("k1", "n1").RemoveToken(ctx, removed.ID); err != nil {
			t.Fatal(err)
		}
		defer f.run("k1", "k2")()
		first := must[*keeper.CAStatus](t)(f.client("k1", "n1").ChangeCA(ctx))
		if first.Stage != keeper.CAIntroduced || len(first.Roots) != 2 || first.Roots[0].Fingerprint != f.ca.Fingerprint().String() {
			t.Errorf("ChangeCA = %+v", first)
		}
		st := f.status()
		if st.Stage != keeper.CASettled || st.Number != 3 || len(st.Roots) != 1 || st.Roots[0].Fingerprint == f.ca.Fingerprint().String() ||
			st.Why != "" || len(st.Waiting)+len(st.Left) != 0 || !slices.Equal(st.TokensRemoved, []crypto.TokenID{old.ID}) {
			t.Errorf("CAStatus = %+v", st)
		}
		if want := []keeper.Stage{keeper.CAIntroduced, keeper.CASigning, keeper.CAGone}; !slices.Equal(slices.Compact(f.stages), want) {
			t.Errorf("pushed in stages %v, want %v", f.stages, want)
		}
		if n := len(f.reopens); n < 6 || n%2 != 0 {
			t.Errorf("%d stores opened anew: %v", n, f.reopens)
		}
		for i, name := range f.reopens {
			if first := f.reopens[0]; (name == first) != (i%2 == 0) {
				t.Errorf("stores opened anew in the order %v", f.reopens)
				break
			}
		}
		l := f.ledger()
		for name, n := range l.Nodes {
			if id := f.ids[name]; id != nil && (n.Serial != id.Certificate().Serial || n.CA != id.Certificate().Issuer || n.CA.String() != st.Roots[0].Fingerprint[:8]) {
				t.Errorf("%s has a certificate %s of %s, and the ledger says %s of %s", name, id.Certificate().Serial, id.Certificate().Issuer, n.Serial, n.CA)
			}
		}
		roots := f.ids["n2"].Roots()
		list := must[*crypto.Revocations](t)(roots.ParseRevocations(l.Revocations))
		if list.Check("bad", crypto.PublicKey{}, 0) == nil || list.Number() != 4 {
			t.Errorf("revocations %d: the revoked node is forgotten, or not every stage has a number", list.Number())
		}
		for _, secret := range f.cas["k1"] {
			if bytes.Contains(f.store.Text(), secret.Key().Marshal()) || bytes.Contains(f.store.Text(), []byte(base64Of(secret.Key().Marshal()))) {
				t.Error("a CA's key is in the store")
			}
		}
		// Certificates of the old CA are believed no more; new tokens name the new one.
		if _, err := f.sites["k2"].admin().Nodes(ctx); !errors.Is(err, peer.ErrDenied) || !strings.Contains(err.Error(), "join again") {
			t.Errorf("a certificate of the former CA: %v", err)
		}
		token := must[*crypto.Token](t)(crypto.ParseToken(must[string](t)(f.client("k2", "n1").CreateToken(ctx, hour))))
		if token.CA != roots.Signer() {
			t.Error("a token names another CA than the one that signs")
		}
		r := must[*peer.JoinResult](t)(f.sites["k2"].Join(ctx, joining(t, token, crypto.NewPrivateKey(), "n9")))
		if _, err := roots.Verify([][]byte{r.Certificate}, f.time(), nil); err != nil || r.CANumber != 3 || len(r.CAs) != 1 {
			t.Errorf("a machine that joins: %v, CA of change %d", err, r.CANumber)
		}
		// The next change begins where this one ended.
		must[*keeper.CAStatus](t)(f.client("k2", "n1").ChangeCA(ctx))
		f.set(f.away, "n9", true) // nobody runs it
		f.cluster.update(func(l *keeper.Ledger) { delete(l.Nodes, "n9") })
		if st := f.status(); st.Stage != keeper.CASettled || st.Number != 6 || st.Roots[0].Fingerprint == roots.Signer().String() {
			t.Errorf("CAStatus after the next change = %+v", st)
		}
	})
}

// A node that is away is waited for, by name; when it is back it follows.
func TestChangeCAAway(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFleet(t)
		f.set(f.away, "n2", true)
		defer f.run("k1", "k2")()
		must[*keeper.CAStatus](t)(f.client("k1", "n1").ChangeCA(ctx))
		st := f.status()
		if st.Stage != keeper.CASigning || !slices.Equal(st.Waiting, []keeper.CAWaiting{{Name: "n2"}}) || !strings.Contains(st.Why, "--finish") {
			t.Fatalf("CAStatus = %+v", st)
		}
		if again := must[*keeper.CAStatus](t)(f.client("k2", "k2").ChangeCA(ctx)); again.Number != st.Number {
			t.Errorf("a second change began within the first: %+v", again)
		}
		// Its certificate is believed still; a keeper is asked, as by a node that starts.
		f.set(f.away, "n2", false)
		if err := f.follow(ctx, f.sites["k2"], "n2"); err != nil {
			t.Fatal(err)
		}
		if st := f.status(); st.Stage != keeper.CASettled || len(st.Left) != 0 {
			t.Errorf("CAStatus = %+v", st)
		}
	})
}

// Finished without a node, that one is named, and believed no more. Nodes that are
// there, and keepers, are never left behind.
func TestChangeCAFinish(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFleet(t)
		f.set(f.away, "n2", true)
		if _, err := f.client("k1", "n1").FinishCA(ctx); !errors.Is(err, keeper.ErrInvalid) {
			t.Errorf("finishing nothing: %v", err)
		}
		defer f.run("k1", "k2")()
		must[*keeper.CAStatus](t)(f.client("k1", "n1").ChangeCA(ctx))
		f.status()
		if _, err := f.client("k1", "n1").FinishCA(ctx); err != nil {
			t.Fatal(err)
		}
		if st := f.status(); st.Stage != keeper.CASettled || !slices.Equal(st.Left, []string{"n2"}) {
			t.Errorf("CAStatus = %+v", st)
		}
		if err := f.follow(ctx, f.sites["k1"], "n2"); !errors.Is(err, peer.ErrDenied) {
			t.Errorf("a node that was left behind: %v", err)
		}
		// It joins again as the same node.
		token := must[*crypto.Token](t)(crypto.ParseToken(must[string](t)(f.client("k1", "n1").CreateToken(ctx, with("blue")))))
		if _, err := f.sites["k1"].Join(ctx, joining(t, token, f.ids["n2"].Key(), "n2")); err != nil {
			t.Error(err)
		}
	})
}

// A keeper that is away when a change begins is named, and nothing is changed; one
// that goes away later is waited for, finished or not.
func TestChangeCAKeeperAway(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFleet(t)
		f.set(f.away, "k2", true)
		before := f.store.Text()
		_, err := f.client("k1", "n1").ChangeCA(ctx)
		if !errors.Is(err, keeper.ErrInvalid) || !strings.Contains(err.Error(), "keeper k2 ") || !strings.Contains(err.Error(), "`tulle node demote k2`") {
			t.Errorf("ChangeCA = %v", err)
		}
		if !bytes.Equal(before, f.store.Text()) || len(f.cas["k1"]) != 0 {
			t.Error("something is changed all the same")
		}
		f.set(f.away, "k2", false)
		f.refuse = "k2"
		defer f.run("k1")()
		must[*keeper.CAStatus](t)(f.client("k1", "n1").ChangeCA(ctx))
		if st := f.status(); st.Stage != keeper.CAIntroduced || !strings.Contains(st.Why, "the disk is full") || len(st.Waiting) != 1 || st.Waiting[0].Name != "k2" {
			t.Errorf("CAStatus while a store does not open = %+v", st)
		}
		f.mu.Lock()
		f.refuse = ""
		f.away["k2"] = true
		f.mu.Unlock()
		must[*keeper.CAStatus](t)(f.client("k1", "n1").FinishCA(ctx))
		if st := f.status(); st.Stage != keeper.CAIntroduced || !strings.Contains(st.Why, "demote") {
			t.Errorf("CAStatus without k2 = %+v", st)
		}
		must[*keeper.Outcome](t)(f.client("k1", "n1").Demote(ctx, "k2"))
		if st := f.status(); st.Stage != keeper.CASettled || !slices.Equal(st.Left, []string{"k2"}) {
			t.Errorf("CAStatus after k2 was demoted = %+v", st)
		}
	})
}

// What a keeper has begun another one completes when the first is gone: in each
// stage.
func TestChangeCATakenOver(t *testing.T) {
	for number := range 3 {
		synctest.Test(t, func(t *testing.T) {
			f := newFleet(t)
			f.hold = uint64(number + 1) // the stage cannot end
			stop := f.run("k1")
			must[*keeper.CAStatus](t)(f.client("k1", "n1").ChangeCA(ctx))
			st := f.status()
			if st.Number != f.hold {
				t.Errorf("CAStatus = %+v, want it to stay at %d", st, f.hold)
			}
			stop()
			f.mu.Lock()
			f.hold = 0
			f.mu.Unlock()
			defer f.run("k2")()
			if again := f.status(); again.Number != st.Number || again.Stage != st.Stage {
				t.Errorf("k2 did not wait for its turn: %+v", again)
			}
			f.pass(2 * time.Minute)
			if st := f.status(); st.Stage != keeper.CASettled || st.Number != 3 {
				t.Errorf("CAStatus = %+v", st)
			}
		})
	}
}

// A keeper that becomes one meanwhile has both keys; and one without the key that
// signs sends askers to another.
func TestChangeCAKeys(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFleet(t)
		f.set(f.away, "n2", true)
		stop := f.run("k1")
		must[*keeper.CAStatus](t)(f.client("k1", "n1").ChangeCA(ctx))
		f.status()
		stop()
		f.mu.Lock()
		f.cas["k2"] = nil
		f.mu.Unlock()
		if _, _, err := f.client("k2", "n1").Renew(ctx, must[[]byte](t)(f.ids["n1"].Renewal())); !errors.Is(err, peer.ErrUnavailable) {
			t.Errorf("a keeper without the key: %v", err)
		}
		defer f.run("k2")()
		f.pass(time.Hour)
		if st := f.status(); st.Stage != keeper.CASigning {
			t.Errorf("a keeper without the key goes on: %+v", st)
		}
	})
}

// The record is kept as it is, with what later releases add; a stage of theirs is
// left to them.
func TestAuthorityOfLaterRelease(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFleet(t)
		text := f.store.Text()
		var all map[string]any
		if err := json.Unmarshal(text, &all); err != nil {
			t.Fatal(err)
		}
		all["ca"] = map[string]any{"number": "7", "stage": "crossed", "roots": f.roots.DER(), "later": map[string]any{"a": 1}}
		l := must[*keeper.Ledger](t)(keeper.ParseLedger(must[[]byte](t)(json.Marshal(all))))
		f.cluster.update(func(now *keeper.Ledger) { now.CA = l.CA })
		defer f.run("k1")()
		if st := f.status(); st.Stage != "crossed" || st.Number != 7 {
			t.Errorf("CAStatus = %+v", st)
		}
		if b := must[[]byte](t)(f.ledger().Encode()); !bytes.Contains(b, []byte(`"later":{"a":1}`)) {
			t.Errorf("written as %s", b)
		}
	})
}
