package keeper_test

import (
	"context"
	"encoding/json"
	"errors"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/tulle-net/tulle/crypto"
	"github.com/tulle-net/tulle/keeper"
	"github.com/tulle-net/tulle/peer"
	"github.com/tulle-net/tulle/store"
)

// office is the other nodes and the members of the store, as a keeper sees them.
type office struct {
	site *site

	mu      sync.Mutex
	members []store.MemberInfo
	steps   []string
	fail    map[string]error // of a step
	refuses string
	orders  []keeper.KeepOrder
	before  func(step string)
}

// step notes one, and fails if it is to.
func (o *office) step(s string) error {
	if o.before != nil {
		o.before(s)
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	o.steps = append(o.steps, s)
	return o.fail[s]
}

func (o *office) AddLearner(_ context.Context, node string, addr netip.Addr) (string, error) {
	if err := o.step("add " + node + " " + addr.String()); err != nil {
		return "", err
	}
	o.members = append(o.members, store.MemberInfo{Name: node, Learner: true})
	return "initial-" + node, nil
}

func (o *office) Promote(_ context.Context, node string) error {
	if err := o.step("vote " + node); err != nil {
		return err
	}
	for i := range o.members {
		if o.members[i].Name == node {
			o.members[i].Learner, o.members[i].Started = false, true
		}
	}
	return nil
}

func (o *office) Remove(_ context.Context, node string) error {
	if err := o.step("remove " + node); err != nil {
		return err
	}
	o.members = slices.DeleteFunc(o.members, func(m store.MemberInfo) bool { return m.Name == node })
	return nil
}

func (o *office) Members(context.Context) ([]store.MemberInfo, error) {
	return slices.Clone(o.members), o.fail["members"]
}

func (o *office) tell(_ context.Context, node string, k peer.Kind, payload []byte) ([]byte, error) {
	if k != peer.KindKeep {
		return nil, peer.ErrKind
	}
	var q keeper.KeepOrder
	if err := json.Unmarshal(payload, &q); err != nil {
		return nil, peer.ErrMalformed
	}
	if err := o.step(q.Step + " " + node); err != nil {
		return nil, err
	}
	o.orders = append(o.orders, q)
	if q.Step == keeper.KeepBegin {
		for i := range o.members {
			if o.members[i].Name == node {
				o.members[i].Started = true
			}
		}
	}
	return json.Marshal(keeper.KeepAnswer{Addr: netip.MustParseAddr("192.0.2.9"), Refused: o.refuses})
}

// begin forgets what was noted, and what fails.
func (o *office) begin() {
	o.steps, o.fail, o.orders, o.refuses, o.before = nil, map[string]error{}, nil, "", nil
}

func (o *office) want(t *testing.T, steps ...string) {
	t.Helper()
	if !slices.Equal(o.steps, steps) {
		t.Errorf("steps %q, want %q", o.steps, steps)
	}
}

func (o *office) has(name string) bool {
	return slices.ContainsFunc(o.members, func(m store.MemberInfo) bool { return m.Name == name && !m.Learner })
}

// newOffice has k1 with its member, and the node n1.
func newOffice(t *testing.T) (*cluster, *site, *office) {
	c := newCluster(t)
	s := &site{c: c, ring: c.ring}
	o := &office{site: s, members: []store.MemberInfo{{Name: "k1", Started: true}}}
	o.begin()
	cfg := s.config("k1")
	cfg.Quorum, cfg.Tell = o, o.tell
	s.Keeper = must[*keeper.Keeper](t)(keeper.New(cfg))
	s.onPush = func() { _ = o.step("push") }
	c.node("n1", "blue")
	return c, s, o
}

func (c *cluster) isKeeper(name string) bool { return c.ledger().Nodes[name].Keeper }

func TestPromote(t *testing.T) {
	c, k, o := newOffice(t)
	o.before = func(step string) {
		if is := c.isKeeper("n1"); is != slices.Contains([]string{"begin n1", "vote n1", "push"}, step) {
			t.Errorf("at %s it is a keeper: %v", step, is)
		}
	}
	if _, err := k.admin().Promote(ctx, "n1", ""); err != nil {
		t.Fatal(err)
	}
	o.want(t, "ask n1", "add n1 192.0.2.9", "begin n1", "vote n1", "push")
	begin := o.orders[1]
	if key, err := crypto.ParsePrivateKey(begin.CAKey); err != nil || !slices.Equal(key.Marshal(), c.ca.Key().Marshal()) || !slices.Equal(begin.Root, c.root.Bytes()) || begin.Initial != "initial-n1" {
		t.Errorf("it is given %+v", begin)
	}
	if ask := o.orders[0]; ask.CAKey != nil || ask.Root != nil {
		t.Error("secrets are told before the node agreed")
	}
	if !c.isKeeper("n1") || !o.has("n1") {
		t.Error("it is no keeper")
	}
	// The certificate follows at its renewal.
	c.mu.Lock()
	logged := c.log.String() + string(c.store.Text())
	c.mu.Unlock()
	for _, secret := range [][]byte{c.ca.Key().Marshal(), c.root.Bytes(), begin.CAKey} {
		if strings.Contains(logged, base64Of(secret)) || strings.Contains(logged, string(secret)) {
			t.Error("a secret is in the log or in the ledger")
		}
	}
	// Again, all is done already.
	o.begin()
	if _, err := k.admin().Promote(ctx, "n1", ""); err != nil {
		t.Error(err)
	}
	o.want(t, "ask n1", "begin n1", "vote n1", "push")
	if o.orders[1].Initial != "" {
		t.Error("a member that has started is to begin anew")
	}
}

// Whatever fails, the same request again completes it.
func TestPromoteInterrupted(t *testing.T) {
	for _, x := range []struct {
		step   string
		err    error
		code   error
		keeper bool // by then, in the ledger
	}{
		{"ask n1", peer.ErrTimeout, keeper.ErrInvalid, false},
		{"ask n1", peer.Errorf(peer.CodeFailed, "its disk is full"), peer.Errorf(peer.CodeFailed, ""), false},
		{"members", store.ErrUnavailable, peer.ErrUnavailable, false},
		{"add n1 192.0.2.9", errStore, peer.ErrUnavailable, false},
		{"begin n1", peer.ErrTimeout, keeper.ErrInvalid, true},
		{"begin n1", peer.Errorf(peer.CodeFailed, "its disk is full"), peer.Errorf(peer.CodeFailed, ""), true},
		{"vote n1", store.ErrUnavailable, peer.ErrUnavailable, true},
	} {
		c, k, o := newOffice(t)
		o.fail[x.step] = x.err
		if _, err := k.admin().Promote(ctx, "n1", ""); !errors.Is(err, x.code) {
			t.Errorf("%s fails: %v, want %v", x.step, err, x.code)
		}
		if c.isKeeper("n1") != x.keeper || slices.Contains(o.steps, "push") {
			t.Errorf("%s fails: keeper %v after %q", x.step, !x.keeper, o.steps)
		}
		if told := slices.ContainsFunc(o.orders, func(q keeper.KeepOrder) bool { return q.CAKey != nil }); told && !x.keeper {
			t.Errorf("%s fails: the CA's key was told", x.step)
		}
		o.begin()
		if _, err := k.admin().Promote(ctx, "n1", ""); err != nil || !c.isKeeper("n1") || !o.has("n1") {
			t.Errorf("%s, again: %v", x.step, err)
		}
	}
}

func TestPromoteRefused(t *testing.T) {
	c, k, o := newOffice(t)
	c.node("gone", "*")
	must[*keeper.Outcome](t)(k.admin().Revoke(ctx, "gone"))
	for what, x := range map[string]struct {
		name, replace string
		want          error
	}{
		"nobody":             {"nobody", "", keeper.ErrNoSuch},
		"revoked":            {"gone", "", keeper.ErrInvalid},
		"itself":             {"n1", "n1", keeper.ErrInvalid},
		"of no keeper":       {"n1", "gone", keeper.ErrNoSuch},
		"of nobody":          {"n1", "nobody", keeper.ErrNoSuch},
		"by the asked one":   {"k1", "gone", keeper.ErrInvalid},
		"a name that is bad": {"../x", "", keeper.ErrNoSuch},
	} {
		o.begin()
		before := string(c.store.Text())
		if _, err := k.admin().Promote(ctx, x.name, x.replace); !errors.Is(err, x.want) || len(o.steps) > 0 || string(c.store.Text()) != before {
			t.Errorf("%s: %v, want %v; steps %q", what, err, x.want, o.steps)
		}
	}
	// The node itself says that it cannot: another architecture.
	o.begin()
	o.refuses = "a keeper runs a member of etcd, which is for amd64 and arm64"
	before := string(c.store.Text())
	if _, err := k.admin().Promote(ctx, "n1", ""); !errors.Is(err, keeper.ErrInvalid) || !strings.Contains(err.Error(), "amd64 and arm64") || string(c.store.Text()) != before {
		t.Errorf("refused by the node: %v", err)
	}
	o.want(t, "ask n1")
	// Removed, or its name another machine's, while its member joins: it gets no key.
	for what, f := range map[string]func(){
		"revoked": func() {
			c.update(func(l *keeper.Ledger) { n := l.Nodes["n1"]; n.Revoked = c.time(); l.Nodes["n1"] = n })
		},
		"another": func() { c.node("n1", "*") },
		"removed": func() { c.update(func(l *keeper.Ledger) { delete(l.Nodes, "n1") }) },
	} {
		c.node("n1", "blue")
		o.begin()
		o.before = func(step string) {
			if strings.HasPrefix(step, "add") {
				f()
			}
		}
		if _, err := k.admin().Promote(ctx, "n1", ""); !errors.Is(err, keeper.ErrNoSuch) || slices.Contains(o.steps, "begin n1") || c.isKeeper("n1") {
			t.Errorf("%s meanwhile: %v, steps %q", what, err, o.steps)
		}
		o.members = o.members[:1]
	}
	// The asker is no administrator any more when the member has joined.
	c.node("n1", "blue")
	admin := c.node("admin", "*")
	o.begin()
	o.before = func(step string) {
		if strings.HasPrefix(step, "add") {
			c.update(func(l *keeper.Ledger) { n := l.Nodes["admin"]; n.Grants = crypto.Grants{"blue"}; l.Nodes["admin"] = n })
		}
	}
	if _, err := k.as(admin).Promote(ctx, "n1", ""); !errors.Is(err, peer.ErrDenied) || c.isKeeper("n1") || slices.Contains(o.steps, "begin n1") {
		t.Errorf("by one that is no administrator any more: %v, steps %q", err, o.steps)
	}
}

// One keeper takes the place of another that is lost.
func TestReplace(t *testing.T) {
	c, k, o := newOffice(t)
	c.enrol(c.identity("k2", crypto.Rights{Overlays: crypto.Grants{"*"}, Keeper: true}))
	o.members = append(o.members, store.MemberInfo{Name: "k2", Started: true})
	if _, err := k.admin().Promote(ctx, "n1", "k2"); err != nil {
		t.Fatal(err)
	}
	o.want(t, "ask n1", "remove k2", "add n1 192.0.2.9", "begin n1", "vote n1", "push")
	if c.isKeeper("k2") || o.has("k2") || !c.isKeeper("n1") {
		t.Error("k2 is a keeper, or n1 is none")
	}
	// Of the asked keeper: another one has to do it.
	c.node("n2", "blue")
	o.begin()
	if _, err := k.admin().Promote(ctx, "n2", "k1"); !errors.Is(err, peer.ErrUnavailable) || !c.isKeeper("k1") {
		t.Errorf("of the asked keeper: %v", err)
	}
	o.want(t, "ask n2")
}

func TestDemote(t *testing.T) {
	c, k, o := newOffice(t)
	if _, err := k.admin().Demote(ctx, "k1"); !errors.Is(err, keeper.ErrLastKeeper) {
		t.Errorf("the only keeper: %v", err)
	}
	if _, err := k.admin().Demote(ctx, "n1"); !errors.Is(err, keeper.ErrInvalid) {
		t.Errorf("no keeper: %v", err)
	}
	if _, err := k.admin().Demote(ctx, "nobody"); !errors.Is(err, keeper.ErrNoSuch) {
		t.Errorf("nobody: %v", err)
	}
	must[*keeper.Outcome](t)(k.admin().Promote(ctx, "n1", ""))
	if _, err := k.admin().Demote(ctx, "k1"); !errors.Is(err, peer.ErrUnavailable) {
		t.Errorf("the asked keeper: %v", err)
	}
	o.begin()
	o.before = func(step string) {
		if c.isKeeper("n1") {
			t.Errorf("at %s it is a keeper still", step)
		}
	}
	if out, err := k.admin().Demote(ctx, "n1"); err != nil || len(out.Unreached) > 0 {
		t.Fatal(out, err)
	}
	o.want(t, "remove n1", "push", "end n1")
	if o.has("n1") || o.orders[0].CAKey != nil || o.orders[0].Root != nil {
		t.Error("it has its vote, or was told secrets")
	}
	// One that is not there is told when it is back.
	o.begin()
	must[*keeper.Outcome](t)(k.admin().Promote(ctx, "n1", ""))
	o.begin()
	o.fail["end n1"] = peer.ErrTimeout
	if out, err := k.admin().Demote(ctx, "n1"); err != nil || !slices.Equal(out.Unreached, []string{"n1"}) {
		t.Errorf("one that is away: %+v, %v", out, err)
	}
}

// A demotion whose store does not take the member out is made again; so is the
// end of a member whose node was removed, or revoked.
func TestDemoteAgain(t *testing.T) {
	for _, how := range []string{"demote", "revoke", "remove"} {
		c, k, o := newOffice(t)
		must[*keeper.Outcome](t)(k.admin().Promote(ctx, "n1", ""))
		o.begin()
		o.fail["remove n1"] = errStore
		var err error
		switch how {
		case "demote":
			if _, err = k.admin().Demote(ctx, "n1"); !errors.Is(err, peer.ErrUnavailable) || !strings.Contains(err.Error(), "demote it again") {
				t.Errorf("the store fails: %v", err)
			}
		case "revoke":
			_, err = k.admin().Revoke(ctx, "n1")
		case "remove":
			_, err = k.admin().Remove(ctx, "n1")
		}
		if how != "demote" && err != nil {
			t.Errorf("%s: %v", how, err)
		}
		if n, ok := c.ledger().Nodes["n1"]; ok && n.Keeper && n.Revoked.IsZero() {
			t.Errorf("%s: the ledger has it as a keeper", how)
		}
		if !o.has("n1") {
			t.Fatal("the fake store took it out")
		}
		o.begin()
		if _, err := k.admin().Demote(ctx, "n1"); err != nil || o.has("n1") {
			t.Errorf("%s, then demote: %v, vote %v", how, err, o.has("n1"))
		}
	}
}

// A keeper that is taken out of the cluster has no vote in the store.
func TestDismissed(t *testing.T) {
	for what, f := range map[string]func(keeper.Client) (*keeper.Outcome, error){
		"revoke": func(c keeper.Client) (*keeper.Outcome, error) { return c.Revoke(ctx, "n1") },
		"remove": func(c keeper.Client) (*keeper.Outcome, error) { return c.Remove(ctx, "n1") },
	} {
		_, k, o := newOffice(t)
		o.begin()
		if _, err := f(k.admin()); err != nil || slices.Contains(o.steps, "remove n1") {
			t.Errorf("%s of an ordinary node: %v, steps %q", what, err, o.steps)
		}
		c, k, o := newOffice(t)
		must[*keeper.Outcome](t)(k.admin().Promote(ctx, "n1", ""))
		o.begin()
		if _, err := f(k.admin()); err != nil || o.has("n1") || !slices.Contains(o.steps, "remove n1") {
			t.Errorf("%s: %v, steps %q", what, err, o.steps)
		}
		if slices.Contains(o.steps, "end n1") {
			t.Errorf("%s: a node that is not believed is told something", what)
		}
		if _, err := f(k.admin()); what == "revoke" && err != nil {
			t.Errorf("%s again: %v", what, err)
		}
		_ = c
	}
}

// An etcd of its own has no members of keepers.
func TestPromoteExternal(t *testing.T) {
	c, s, o := newOffice(t)
	cfg := s.config("k1")
	cfg.Tell = o.tell
	s.Keeper = must[*keeper.Keeper](t)(keeper.New(cfg))
	must[*keeper.Outcome](t)(s.admin().Promote(ctx, "n1", ""))
	must[*keeper.Outcome](t)(s.admin().Demote(ctx, "n1"))
	o.want(t, "ask n1", "begin n1", "push", "push", "end n1")
	cfg.Tell = nil
	s.Keeper = must[*keeper.Keeper](t)(keeper.New(cfg))
	if _, err := s.admin().Promote(ctx, "n1", ""); err == nil || c.isKeeper("n1") {
		t.Errorf("without a way to nodes: %v", err)
	}
}

// After the others are lost: one keeper is left, by its own word or its restored store's.
func TestGoAlone(t *testing.T) {
	c, k, _ := newOffice(t)
	k2 := c.identity("k2", crypto.Rights{Overlays: crypto.Grants{"blue"}, Keeper: true})
	c.enrol(k2)
	if err := k.GoAlone(ctx); err != nil {
		t.Fatal(err)
	}
	if !c.isKeeper("k1") || c.isKeeper("k2") {
		t.Error("k1 is not the only keeper")
	}
	if _, err := k.as(k2.Certificate()).RotateGossip(ctx); !errors.Is(err, peer.ErrDenied) {
		t.Errorf("k2, with its certificate of before: %v", err)
	}
}

func TestTakeOver(t *testing.T) {
	for what, revoked := range map[string]bool{"a name in use": false, "a revoked name": true} {
		c, k, _ := newOffice(t)
		old := c.identity("k2", crypto.Rights{Overlays: crypto.Grants{"*"}, Keeper: true})
		c.enrol(old)
		if revoked {
			must[*keeper.Outcome](t)(k.admin().Revoke(ctx, "k2"))
		}
		mine := c.identity("k2", crypto.Rights{Overlays: crypto.Grants{"*"}, Keeper: true})
		site := c.keeper("k2")
		for range 2 { // it was killed before it noted that it has done it
			if err := site.TakeOver(ctx, mine.Certificate()); err != nil {
				t.Fatal(err)
			}
		}
		if n := c.ledger().Nodes["k2"]; c.isKeeper("k1") || !n.Keeper || n.Key != mine.Certificate().Key || !n.Revoked.IsZero() {
			t.Errorf("%s: the ledger has %+v", what, n)
		}
		if _, err := site.as(mine.Certificate()).Nodes(ctx); err != nil {
			t.Errorf("%s: the new keeper: %v", what, err)
		}
		if _, err := site.as(old.Certificate()).Nodes(ctx); !errors.Is(err, keeper.ErrRevoked) {
			t.Errorf("%s: the machine that had it before: %v", what, err)
		}
		if _, err := site.admin().RotateGossip(ctx); what == "a name in use" && err != nil {
			t.Errorf("%s: k1, which has the grant *: %v", what, err)
		}
	}
}

func TestCheckKeep(t *testing.T) {
	c := newCluster(t)
	for _, r := range []crypto.Rights{{}, {Overlays: crypto.Grants{"*"}}} {
		if err := keeper.CheckKeep(peer.Peer{Certificate: c.identity("n1", r).Certificate()}); !errors.Is(err, peer.ErrDenied) {
			t.Errorf("an order of a node with %+v: %v", r, err)
		}
	}
	if err := keeper.CheckKeep(peer.Peer{Certificate: c.first.Certificate()}); err != nil {
		t.Errorf("an order of a keeper: %v", err)
	}
}

// A keeper that was demoted while it was away is told so by the ledger, and not
// one that is a keeper.
func TestRetired(t *testing.T) {
	c, k, _ := newOffice(t)
	must[*keeper.Outcome](t)(k.admin().Promote(ctx, "n1", ""))
	run := func() (told bool) {
		cfg := (&site{c: c, ring: c.ring}).config("n1")
		heard := make(chan struct{}, 1)
		cfg.Retired = func() { heard <- struct{}{} }
		away := must[*keeper.Keeper](t)(keeper.New(cfg))
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() { _ = away.Run(ctx); close(done) }()
		defer func() { cancel(); <-done }()
		select {
		case <-heard:
			return true
		case <-time.After(200 * time.Millisecond):
			return false
		}
	}
	if run() {
		t.Error("a keeper is told that it is none")
	}
	must[*keeper.Outcome](t)(k.admin().Demote(ctx, "n1"))
	if !run() {
		t.Error("a keeper that was demoted is not told")
	}
}
