package cluster

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"math"
	"slices"
	"strings"
	"testing"

	"github.com/tulle-net/tulle/crypto"
	"github.com/tulle-net/tulle/keeper"
	"github.com/tulle-net/tulle/peer"
	"github.com/tulle-net/tulle/store"
)

func names(m *machine) string {
	list, _ := m.Shared()
	var out []string
	for _, o := range list {
		out = append(out, o.Name)
	}
	return strings.Join(out, " ")
}

func (m *machine) create(t *testing.T, name string) *store.Overlay {
	t.Helper()
	o, unreached, err := m.Client().CreateOverlay(within(t), store.Overlay{Name: name})
	if err != nil || len(unreached) > 0 {
		t.Fatalf("create %s: %v, unreached %v", name, err, unreached)
	}
	return o
}

// A definition is everywhere when the one who made it is told so, on the keeper
// too; each node has those that it may join; all is there after a restart with no keeper.
func TestShared(t *testing.T) {
	s := newSite(t)
	a := s.start("n1")
	b := s.join("n2", s.token(a, 1, "*"))
	d := s.join("n3", s.token(a, 1, "blue"))
	red := b.create(t, "red")
	b.create(t, "blue")
	for m, want := range map[*machine]string{a: "blue red", b: "blue red", d: "blue"} {
		if got := names(m); got != want {
			t.Errorf("%s knows %q, want %q", m.cfg.Name, got, want)
		}
	}
	mtu := 1400
	if _, unreached, err := b.Client().SetOverlay(within(t), "blue", keeper.OverlayChange{MTU: &mtu}); err != nil || len(unreached) > 0 {
		t.Fatal(err, unreached)
	}
	if o := d.SharedOverlay("blue"); o == nil || o.MTU != mtu {
		t.Errorf("n3 has %+v", o)
	}
	if d.SharedOverlay("red") != nil {
		t.Error("n3 has the definition of an overlay that it may not join")
	}
	for _, name := range []string{"n3", "n2", "n1"} {
		s.stop(name)
	}
	b = must(s.open("n2"))
	if o := b.SharedOverlay("red"); o == nil || o.ID != red.ID || o.VNI != red.VNI || !slices.Equal(o.Subnets, red.Subnets) {
		t.Errorf("after a restart without a keeper: %+v, want %+v", o, red)
	}
	if _, asked := b.Shared(); !asked.IsZero() {
		t.Error("it says that a keeper has told it")
	}
}

// What was removed while a node was away is gone when it is back, although the
// keeper was restarted meanwhile and the last change that it can see is an older one.
func TestSharedRemovedAway(t *testing.T) {
	s := newSite(t)
	a := s.start("n1")
	b := s.join("n2", s.token(a, 1, "*"))
	for _, name := range []string{"a", "b", "c"} {
		b.create(t, name)
	}
	remove := func(name string) {
		if _, err := a.Client().RemoveOverlay(within(t), name, false); err != nil {
			t.Fatal(err)
		}
	}
	remove("b")
	if names(b) != "a c" {
		t.Fatalf("n2 knows %q", names(b))
	}
	s.stop("n2")
	remove("c")
	s.stop("n1")
	s.start("n1")
	b = s.start("n2")
	if err := b.Refresh(within(t)); err != nil || names(b) != "a" {
		t.Errorf("n2 knows %q, %v", names(b), err)
	}
}

// answers is a keeper that answers what it is given.
type answers struct {
	revision int64
	defined  map[string]int64 // name and revision
	digest   []byte           // nil: that of defined
	asked    []int64
	delta    bool
}

func (k *answers) client() keeper.Client {
	return keeper.Client{Ask: func(_ context.Context, sub uint16, body []byte) ([]byte, error) {
		var q struct {
			Since int64 `json:"since,string"`
		}
		if err := json.Unmarshal(body, &q); err != nil || sub != keeper.SubShared {
			return nil, peer.ErrKind
		}
		k.asked = append(k.asked, q.Since)
		type item struct {
			Revision int64           `json:"revision,string"`
			Overlay  json.RawMessage `json:"overlay"`
		}
		a := struct {
			Revision int64  `json:"revision,string"`
			Whole    bool   `json:"whole"`
			Put      []item `json:"put"`
			Digest   []byte `json:"digest"`
		}{Revision: k.revision, Whole: q.Since == 0 || !k.delta, Digest: k.digest}
		for name, revision := range k.defined {
			if a.Whole || revision > q.Since {
				a.Put = append(a.Put, item{revision, must(store.Overlay{Name: name, ID: name}.Encode())})
			}
		}
		if a.Digest == nil {
			a.Digest = keeper.SharedDigest(k.defined)
		}
		return json.Marshal(a)
	}}
}

// A keeper that knows less undoes nothing; one that contradicts itself is not
// believed; one that has the same, at a lower revision, is fine.
func TestSharedBehind(t *testing.T) {
	s := newSite(t)
	a := must(s.open("n1"))
	if err := a.Create(); err != nil {
		t.Fatal(err)
	}
	pull := func(k *answers) error { return a.pullShared(within(t), k.client()) }
	both := map[string]int64{"blue": 5, "red": 9}
	if err := pull(&answers{revision: 9, defined: both}); err != nil || names(a) != "blue red" {
		t.Fatalf("%q, %v", names(a), err)
	}
	for what, x := range map[string]struct {
		k    *answers
		want error
	}{
		"behind":                  {&answers{revision: 5, defined: map[string]int64{"blue": 5}}, errSharedBehind},
		"behind, by difference":   {&answers{revision: 5, defined: map[string]int64{"blue": 5}, delta: true}, errSharedBehind},
		"empty":                   {&answers{}, errSharedBehind},
		"contradicts itself":      {&answers{revision: 12, defined: map[string]int64{"blue": 5}, digest: make([]byte, 16)}, errSharedDigest},
		"the same, after a start": {&answers{revision: 7, defined: both, delta: true}, nil},
	} {
		if err := pull(x.k); !errors.Is(err, x.want) || x.want == nil && err != nil {
			t.Errorf("%s: %v, want %v", what, err, x.want)
		}
		if names(a) != "blue red" || a.shared.known() != 9 {
			t.Errorf("%s: it knows %q of revision %d", what, names(a), a.shared.known())
		}
	}
	// What it cannot make of a difference it asks for whole, once.
	k := &answers{revision: 12, defined: map[string]int64{"red": 9}, delta: true}
	if err := pull(k); err != nil || names(a) != "red" || !slices.Equal(k.asked, []int64{9, 0}) {
		t.Errorf("%q, %v, asked since %v", names(a), err, k.asked)
	}
	if again := must(s.open("n1")); names(again) != "red" || again.shared.known() != 12 {
		t.Errorf("on disk: %q of revision %d", names(again), again.shared.known())
	}
}

// A file that is damaged, or of a later release, costs no more than asking for all again.
func TestSharedDamaged(t *testing.T) {
	s := newSite(t)
	a := s.start("n1")
	b := s.join("n2", s.token(a, 1, "*"))
	b.create(t, "red")
	b.create(t, "blue")
	for what, x := range map[string]struct{ text, left string }{
		"cut":         {`{"schema":1,"revision":"99","overlays":[`, ""},
		"later":       {`{"schema":2,"revision":"99"}`, ""},
		"empty":       {``, ""},
		"one overlay": {`{"schema":1,"revision":"99","overlays":[{"revision":"1","overlay":{"schema":7,"name":"red"}},{"revision":"2","overlay":{"schema":1,"name":"blue"}}]}`, "blue"},
	} {
		s.stop("n2")
		dir := must(crypto.OpenDir(s.dirs["n2"]))
		state := must(dir.Load())
		state.Files[fileShared] = []byte(x.text)
		if err := dir.Commit(state); err != nil {
			t.Fatal(err)
		}
		b, err := s.open("n2")
		if err != nil || names(b) != x.left || b.shared.known() != 0 {
			t.Fatalf("%s: %v; it knows %q of revision %d", what, err, names(b), b.shared.known())
		}
		s.connect("n2", b, false)
		s.run("n2")
		eventually(t, what+": all again", func() bool { return names(b) == "blue red" && b.SharedOverlay("blue").VNI != 0 })
	}
}

// Who claims a revision that nobody has silences nobody else.
func TestSharedClaims(t *testing.T) {
	s := newSite(t)
	a := s.start("n1")
	b := s.join("n2", s.token(a, 1, "*"))
	b.SetMembers(nil)
	a.SetMembers(nil) // the push reaches nobody
	claim := b.Extra()
	binary.BigEndian.PutUint64(claim[16:], math.MaxUint64)
	_, before := b.Shared()
	b.Notice("n3", claim)
	eventually(t, "the claim is looked into", func() bool { _, asked := b.Shared(); return asked.After(before) })
	if _, _, err := a.Client().CreateOverlay(within(t), store.Overlay{Name: "blue"}); err != nil {
		t.Fatal(err)
	}
	if names(b) != "" {
		t.Fatal("the definition came by itself")
	}
	b.Notice("n3", claim)
	b.Notice("n1", a.Extra())
	eventually(t, "the definition", func() bool { return names(b) == "blue" })
	if b.shared.notice("n3", math.MaxUint64) || !b.shared.notice("n4", math.MaxUint64) || b.shared.notice("n4", 7) {
		t.Error("a claim is believed twice, or another's not at all")
	}
	for i := range 3 * maxNoticed {
		b.shared.notice(string(rune(i)), math.MaxUint64)
	}
	if n := len(b.shared.noticed); n > maxNoticed {
		t.Errorf("%d claims are remembered", n)
	}
}

// Only a keeper has a node pull.
func TestRefreshedByKeepers(t *testing.T) {
	s := newSite(t)
	a := s.start("n1")
	tok := s.token(a, 2, "*")
	s.join("n2", tok)
	d := s.join("n3", tok)
	if _, err := d.e.Request(within(t), "n2", peer.KindRefresh, nil); !errors.Is(err, peer.ErrDenied) {
		t.Errorf("by an ordinary node: %v", err)
	}
	if _, err := a.e.Request(within(t), "n2", peer.KindRefresh, nil); err != nil {
		t.Errorf("by the keeper: %v", err)
	}
}
