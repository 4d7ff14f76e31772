package keeper_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"reflect"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/tulle-net/tulle/crypto"
	"github.com/tulle-net/tulle/keeper"
	"github.com/tulle-net/tulle/keeper/keepertest"
	"github.com/tulle-net/tulle/store"
	"github.com/tulle-net/tulle/store/storetest"
)

// hooked is a store in memory that counts and disturbs.
type hooked struct {
	*storetest.Memory
	mu    sync.Mutex
	lists int
	then  func() // runs once, between the next Update's function and its write
}

func (h *hooked) count() int {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.lists
}

func (h *hooked) View(ctx context.Context, f func(store.Reader) error) error {
	return h.Memory.View(ctx, func(r store.Reader) error { return f(counted{r, h}) })
}

func (h *hooked) Update(ctx context.Context, domains []string, f func(store.Txn) error) error {
	return h.Memory.Update(ctx, domains, func(t store.Txn) error {
		err := f(countedTxn{t, h})
		h.mu.Lock()
		then := h.then
		h.then = nil
		h.mu.Unlock()
		if then != nil {
			then()
		}
		return err
	})
}

type counted struct {
	store.Reader
	h *hooked
}

func (c counted) List(prefix string) ([]store.Item, error) {
	c.h.mu.Lock()
	c.h.lists++
	c.h.mu.Unlock()
	return c.Reader.List(prefix)
}

type countedTxn struct {
	store.Txn
	h *hooked
}

func (c countedTxn) List(prefix string) ([]store.Item, error) {
	return counted{c.Txn, c.h}.List(prefix)
}

// text is all that is in a store, in order of keys.
func text(t testing.TB, st store.Store) (out string) {
	t.Helper()
	err := st.View(ctx, func(r store.Reader) error {
		items, err := r.List(store.KindLedger + "/")
		for _, i := range items {
			out += fmt.Sprintf("%s %s\n", i.Key, i.Value)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// What package keeper wants of a Store, of the one in etcd's place and of the
// one that its own tests use. conflict makes another change in the next Update.
func TestStores(t *testing.T) {
	for name, make := range map[string]func(*testing.T, *keeper.Ledger) (st, other keeper.Store, conflict func(func()), text func() string){
		"in a store": func(t *testing.T, l *keeper.Ledger) (keeper.Store, keeper.Store, func(func()), func() string) {
			h := &hooked{Memory: storetest.New()}
			if err := keeper.Found(ctx, h, l); err != nil {
				t.Fatal(err)
			}
			return keeper.InStore(h), keeper.InStore(h), func(f func()) { h.then = f }, func() string { return text(t, h) }
		},
		"in memory": func(t *testing.T, l *keeper.Ledger) (keeper.Store, keeper.Store, func(func()), func() string) {
			s := must[*keepertest.Store](t)(keepertest.NewStore(l))
			var then func()
			s.Conflict = func() {
				if f := then; f != nil {
					then = nil
					f()
				}
			}
			return s, s, func(f func()) { then = f }, func() string { return string(s.Text()) }
		},
	} {
		t.Run(name, func(t *testing.T) {
			st, other, conflict, text := make(t, must[*keeper.Ledger](t)(keeper.ParseLedger(golden(t))))
			wanted := func(s keeper.Store) uint64 { return must[*keeper.Ledger](t)(s.Read(ctx)).Gossip.Wanted }
			bump := func(s keeper.Store) error {
				return s.Update(ctx, func(l *keeper.Ledger) error { l.Gossip.Wanted++; return nil })
			}
			first := wanted(st)

			// Nobody reads an old ledger, whoever changed it.
			for i, s := range []keeper.Store{st, other, st, st, other} {
				if err := bump(s); err != nil {
					t.Fatal(err)
				}
				if a, b := wanted(st), wanted(other); a != first+uint64(i)+1 || b != a {
					t.Fatalf("after change %d: %d and %d, want %d", i, a, b, first+uint64(i)+1)
				}
			}

			// A change in between has it done again, with what the other wrote.
			calls := 0
			conflict(func() {
				if err := bump(other); err != nil {
					t.Error(err)
				}
			})
			before := wanted(st)
			if err := st.Update(ctx, func(l *keeper.Ledger) error { calls++; l.Gossip.Wanted += 10; return nil }); err != nil || calls != 2 || wanted(other) != before+11 {
				t.Errorf("a conflict: %v, %d calls, %d after %d", err, calls, wanted(other), before)
			}

			// An error writes nothing and comes back; nor is what f did to its ledger seen.
			was := text()
			err := st.Update(ctx, func(l *keeper.Ledger) error {
				l.Gossip.Wanted = 99
				delete(l.Nodes, "n1")
				token := l.Tokens[crypto.TokenID{1, 2, 3, 4, 5, 6, 7, 8}]
				token.Spent[0].Name = "x"
				return fmt.Errorf("no: %w", errStore)
			})
			l := must[*keeper.Ledger](t)(st.Read(ctx))
			if !errors.Is(err, errStore) || text() != was || l.Gossip.Wanted == 99 || l.Nodes["n1"].By == "" || l.Tokens[crypto.TokenID{1, 2, 3, 4, 5, 6, 7, 8}].Spent[0].Name == "x" {
				t.Errorf("an error: %v; or something is written, or read", err)
			}
			// What no keeper writes is not written.
			if err := st.Update(ctx, func(l *keeper.Ledger) error { l.Nodes["-"] = keeper.Node{}; return nil }); !errors.Is(err, keeper.ErrLedger) || text() != was {
				t.Errorf("a bad record: %v", err)
			}
			over, cancel := context.WithCancel(ctx)
			cancel()
			if err := st.Update(over, func(*keeper.Ledger) error { return nil }); !errors.Is(err, context.Canceled) {
				t.Errorf("too late: %v", err)
			}
			if _, err := st.Read(over); !errors.Is(err, context.Canceled) {
				t.Errorf("reading too late: %v", err)
			}

			// Many at once: none is lost.
			before = wanted(st)
			var wg sync.WaitGroup
			for i := range 40 {
				wg.Go(func() {
					if err := bump([]keeper.Store{st, other}[i%2]); err != nil {
						t.Error(err)
					}
				})
			}
			wg.Wait()
			if n := wanted(other) - before; n != 40 {
				t.Errorf("%d of 40 changes", n)
			}
		})
	}
}

// A ledger comes back from the store as it was, with the fields that this
// release does not know, also those of records that it changes.
func TestInStoreKeepsAll(t *testing.T) {
	mem := storetest.New()
	first := must[*keeper.Ledger](t)(keeper.ParseLedger(golden(t)))
	if err := keeper.Found(ctx, mem, first); err != nil {
		t.Fatal(err)
	}
	again := func() any {
		return generic(t, must[[]byte](t)(must[*keeper.Ledger](t)(keeper.InStore(mem).Read(ctx)).Encode()))
	}
	if want := generic(t, golden(t)); !reflect.DeepEqual(again(), want) {
		t.Fatalf("read as\n%v\nwant\n%v", again(), want)
	}
	if strings.Count(text(t, mem), `later`) < 2 {
		t.Fatalf("the golden ledger has no unknown fields:\n%s", text(t, mem))
	}
	// A record of a kind that this release does not know, and each known one changed.
	unknown := store.KindLedger + "/later/x"
	err := mem.Update(ctx, []string{store.KindLedger}, func(x store.Txn) error { x.Put(unknown, []byte(`{"schema":9}`)); return nil })
	if err != nil {
		t.Fatal(err)
	}
	id := crypto.TokenID{1, 2, 3, 4, 5, 6, 7, 8}
	want := again().(map[string]any)
	err = keeper.InStore(mem).Update(ctx, func(l *keeper.Ledger) error {
		n, token, o := l.Nodes["n1"], l.Tokens[id], l.Overlays["blue"]
		n.Serial, token.Nonce, o.Epoch, l.Gossip.Wanted, l.CA.Number = 5, 6, 7, 8, 9
		l.Nodes["n1"], l.Tokens[id], l.Overlays["blue"] = n, token, o
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	want["nodes"].(map[string]any)["n1"].(map[string]any)["serial"] = "5"
	want["tokens"].(map[string]any)[id.String()].(map[string]any)["nonce"] = "6"
	want["overlays"].(map[string]any)["blue"].(map[string]any)["epoch"] = 7.0
	want["gossip"].(map[string]any)["wanted"] = 8.0
	want["ca"].(map[string]any)["number"] = "9"
	if !reflect.DeepEqual(again(), any(want)) {
		t.Errorf("after a change\n%v\nwant\n%v", again(), want)
	}
	if !strings.Contains(text(t, mem), unknown) {
		t.Error("a record of an unknown kind is gone")
	}
	// Found does not touch a ledger that is there.
	was := text(t, mem)
	if err := keeper.Found(ctx, mem, newCluster(t).ledger()); err != nil || text(t, mem) != was {
		t.Errorf("founded twice: %v", err)
	}
}

// Only what changed is written, and nothing is read again that is known.
func TestInStoreWrites(t *testing.T) {
	h := &hooked{Memory: storetest.New()}
	c := newCluster(t)
	if err := keeper.Found(ctx, h, c.ledger()); err != nil {
		t.Fatal(err)
	}
	st := keeper.InStore(h)
	record := keeper.NewLedger(c.first.Certificate()).Nodes["k1"]
	many := func(f func(l *keeper.Ledger, name string)) {
		t.Helper()
		if err := st.Update(ctx, func(l *keeper.Ledger) error {
			for i := range 300 { // of etcd's transactions 128 at most
				f(l, fmt.Sprintf("n%d", i))
			}
			return nil
		}); err != nil {
			t.Fatal(err)
		}
	}
	many(func(l *keeper.Ledger, name string) { n := record; n.Serial++; l.Nodes[name] = n })
	if l := must[*keeper.Ledger](t)(keeper.InStore(h).Read(ctx)); len(l.Nodes) != 301 {
		t.Fatalf("%d nodes", len(l.Nodes))
	}
	lists, revisions := h.count(), changesOf(t, h.Memory)
	for range 10 {
		must[*keeper.Ledger](t)(st.Read(ctx))
		if err := st.Update(ctx, func(*keeper.Ledger) error { return nil }); err != nil {
			t.Fatal(err)
		}
	}
	if h.count() != lists+1 { // after the change
		t.Errorf("it read everything %d times", h.count()-lists)
	}
	if revisions() != 0 {
		t.Error("a change of nothing is written")
	}
	if err := st.Update(ctx, func(l *keeper.Ledger) error { n := l.Nodes["n7"]; n.Keeper = false; l.Nodes["n7"] = n; return nil }); err != nil {
		t.Fatal(err)
	}
	if n := revisions(); n != 2 {
		t.Errorf("a change of one node writes %d keys, want it and the head", n)
	}
	many(func(l *keeper.Ledger, name string) { delete(l.Nodes, name) })
	if l := must[*keeper.Ledger](t)(keeper.InStore(h).Read(ctx)); len(l.Nodes) != 1 {
		t.Errorf("%d nodes are left", len(l.Nodes))
	}
}

// changesOf returns how many keys were put or deleted since it was last called.
func changesOf(t *testing.T, st store.Store) func() int {
	was := map[string]int64{}
	diff := func() (n int) {
		now := map[string]int64{}
		err := st.View(ctx, func(r store.Reader) error {
			items, err := r.List(store.KindLedger + "/")
			for _, i := range items {
				if now[i.Key] = i.Revision; was[i.Key] != i.Revision {
					n++
				}
				delete(was, i.Key)
			}
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		n += len(was)
		was = now
		return n
	}
	diff()
	return diff
}

func TestInStoreRefuses(t *testing.T) {
	put := func(mem *storetest.Memory, key, value string) {
		t.Helper()
		if err := mem.Update(ctx, []string{store.KindLedger}, func(x store.Txn) error { x.Put(key, []byte(value)); return nil }); err != nil {
			t.Fatal(err)
		}
	}
	empty := storetest.New()
	if _, err := keeper.InStore(empty).Read(ctx); !errors.Is(err, keeper.ErrNoLedger) {
		t.Errorf("an empty store: %v", err)
	}
	if err := keeper.InStore(empty).Update(ctx, func(*keeper.Ledger) error { t.Error("called"); return nil }); !errors.Is(err, keeper.ErrNoLedger) {
		t.Errorf("an empty store: %v", err)
	}
	for _, x := range []struct{ key, value, want string }{
		{"ledger/head", `{"schema":2,"value":{}}`, "run one release of tulle on all keepers"},
		{"ledger/node/n1", `{"schema":2,"value":{}}`, "ledger/node/n1 is of schema 2, and this release knows 1"},
		{"ledger/head", `{`, "ledger/head"},
		{"ledger/node/n1", `nonsense`, "ledger/node/n1"},
		{"ledger/node/n1", `{"schema":1,"value":{"key":7}}`, "ledger/node/n1"},
		{"ledger/node/n1", `{"schema":1,"value":{}}`, `node "n1"`},
		{"ledger/token/zz", `{"schema":1,"value":{}}`, "token"},
		{"ledger/epoch/blue", `{"schema":1,"value":{"epoch":0}}`, `"blue"`},
		{"ledger/gossip", `{"schema":1,"value":{"done":9}}`, "gossip keys"},
		{"ledger/ca", `{"schema":2,"value":{}}`, "ledger/ca is of schema 2, and this release knows 1"},
		{"ledger/ca", `{"schema":1,"value":{"number":"1"}}`, "the CA"},
		{"ledger/ca", `{"schema":1,"value":{"stage":"signing"}}`, "the CA"},
		{"ledger/revocations", `{"schema":1,"value":7}`, "ledger/revocations"},
	} {
		mem := storetest.New()
		if err := keeper.Found(ctx, mem, newCluster(t).ledger()); err != nil {
			t.Fatal(err)
		}
		st := keeper.InStore(mem)
		must[*keeper.Ledger](t)(st.Read(ctx)) // what it has read before is no way out
		put(mem, x.key, x.value)
		if x.key != "ledger/head" { // as each change changes it
			put(mem, "ledger/head", `{"schema":1,"value":{"tag":"7"}}`)
		}
		was := text(t, mem)
		_, err := st.Read(ctx)
		if err == nil || !strings.Contains(err.Error(), x.want) {
			t.Errorf("%s = %s: %v, want %q", x.key, x.value, err, x.want)
		}
		err = st.Update(ctx, func(*keeper.Ledger) error { t.Error("called"); return nil })
		if err == nil || text(t, mem) != was {
			t.Errorf("%s = %s: it was changed: %v", x.key, x.value, err)
		}
	}
	away := storetest.New()
	away.SetAway(true)
	if _, err := keeper.InStore(away).Read(ctx); !errors.Is(err, store.ErrUnavailable) {
		t.Errorf("without a store: %v", err)
	}
}

// Two keepers over one store: what one does the other knows at once.
func TestTwoKeepers(t *testing.T) {
	c := newCluster(t)
	mem := storetest.New()
	if err := keeper.Found(ctx, mem, c.ledger()); err != nil {
		t.Fatal(err)
	}
	keep := func(name string) *site {
		s := &site{c: c, ring: c.ring}
		cfg := s.config(name)
		cfg.Store = keeper.InStore(mem)
		s.Keeper = must[*keeper.Keeper](t)(keeper.New(cfg))
		return s
	}
	k1, k2 := keep("k1"), keep("k2")
	token := k1.token(with("blue"))
	if _, err := k2.Join(ctx, joining(t, token, crypto.NewPrivateKey(), "n1")); err != nil {
		t.Fatal(err)
	}
	if _, err := k1.Join(ctx, joining(t, token, crypto.NewPrivateKey(), "n2")); !errors.Is(err, crypto.ErrTokenUsed) {
		t.Errorf("the token again: %v", err)
	}
	must[*keeper.Outcome](t)(k1.admin().RotateOverlay(ctx, "blue"))
	c.pass(2 * time.Second)
	if out := must[*keeper.Outcome](t)(k2.admin().RotateOverlay(ctx, "blue")); out.Epoch != 3 {
		t.Errorf("epoch %d, want 3", out.Epoch)
	}
	for _, secret := range [][]byte{c.root.Bytes(), c.ring.Primary.Bytes(), c.ca.Key().Marshal()} {
		if b := text(t, mem); strings.Contains(b, string(secret)) || strings.Contains(b, base64Of(secret)) {
			t.Error("a secret is in the store")
		}
	}
	var v any
	for line := range strings.Lines(text(t, mem)) {
		_, value, _ := strings.Cut(line, " ")
		if json.Unmarshal([]byte(value), &v) != nil || !bytes.Contains([]byte(value), []byte(`"schema":1`)) {
			t.Errorf("no value with a schema: %s", line)
		}
	}
}
