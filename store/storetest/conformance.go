package storetest

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/tulle-net/tulle/store"
)

// patience is how long Run waits for what must come.
const patience = 20 * time.Second

// Run checks that a store does what store.Store says. Open returns an empty one
// each time.
func Run(t *testing.T, open func(t *testing.T) store.Store) {
	for name, f := range map[string]func(*testing.T, store.Store){
		"Values": values, "OwnWrites": ownWrites, "Lists": lists, "Revisions": revisions,
		"ErrorWritesNothing": errorWritesNothing, "Domains": domains, "Prefixes": prefixes, "Limits": limits,
		"Canceled": canceled, "Conflict": conflict, "Phantom": phantom, "NoConflict": noConflict, "Counter": counter,
		"Follow": follow, "ManyDomains": manyDomains,
	} {
		t.Run(name, func(t *testing.T) { f(t, open(t)) })
	}
}

func update(t *testing.T, s store.Store, domain string, f func(store.Txn) error) {
	t.Helper()
	if err := s.Update(t.Context(), []string{domain}, f); err != nil {
		t.Fatalf("Update(%s): %v", domain, err)
	}
}

func put(t *testing.T, s store.Store, key, value string) {
	t.Helper()
	update(t, s, store.Domain(key), func(x store.Txn) error {
		x.Put(key, []byte(value))
		return nil
	})
}

// get returns what a View sees; "-": nothing.
func get(t *testing.T, s store.Store, key string) string {
	t.Helper()
	var b []byte
	err := s.View(t.Context(), func(r store.Reader) (err error) {
		b, err = r.Get(key)
		return err
	})
	if err != nil {
		t.Fatalf("Get(%s): %v", key, err)
	}
	if b == nil {
		return "-"
	}
	return string(b)
}

func want(t *testing.T, what, got, want string) {
	t.Helper()
	if got != want {
		t.Errorf("%s is %q, want %q", what, got, want)
	}
}

func values(t *testing.T, s store.Store) {
	want(t, "no value", get(t, s, "vni/1"), "-")
	value := []byte("a")
	update(t, s, "vni", func(x store.Txn) error {
		x.Put("vni/1", value)
		value[0] = 'x' // it is the caller's again
		x.Put("vni/2", nil)
		return nil
	})
	want(t, "a value", get(t, s, "vni/1"), "a")
	want(t, "an empty value", get(t, s, "vni/2"), "")
	want(t, "another key", get(t, s, "vni/11"), "-")
	put(t, s, "vni/1", "b")
	want(t, "the second value", get(t, s, "vni/1"), "b")
	update(t, s, "vni", func(x store.Txn) error {
		x.Delete("vni/1")
		x.Delete("vni/3") // is not there
		return nil
	})
	want(t, "a deleted value", get(t, s, "vni/1"), "-")
}

func ownWrites(t *testing.T, s store.Store) {
	put(t, s, "vni/1", "a")
	put(t, s, "vni/2", "b")
	update(t, s, "vni", func(x store.Txn) error {
		x.Delete("vni/1")
		x.Put("vni/3", []byte("c"))
		one, err1 := x.Get("vni/1")
		three, err3 := x.Get("vni/3")
		all, err := x.List("vni/")
		if one != nil || string(three) != "c" {
			t.Errorf("Get in the transaction = %q, %q, want none and c", one, three)
		}
		want(t, "List in the transaction", text(all), "vni/2=b vni/3=c")
		return errors.Join(err1, err3, err)
	})
}

func text(items []store.Item) string {
	var out []string
	for _, i := range items {
		out = append(out, i.Key+"="+string(i.Value))
	}
	return strings.Join(out, " ")
}

func lists(t *testing.T, s store.Store) {
	const many = 1200 // more than one answer of etcd
	update(t, s, "overlay/blue", func(x store.Txn) error {
		for i := range many {
			x.Put(fmt.Sprintf("ipam/blue/%04d", i), []byte("{}"))
		}
		return nil
	})
	put(t, s, "ipam/blue2/0001", "{}")
	put(t, s, "overlay/blue", "{}")
	err := s.View(t.Context(), func(r store.Reader) error {
		all, err := r.List("ipam/blue/")
		if len(all) != many || !slices.IsSortedFunc(all, func(a, b store.Item) int { return strings.Compare(a.Key, b.Key) }) {
			t.Errorf("List: %d items, want %d in order", len(all), many)
		}
		none, err2 := r.List("vni/")
		if len(none) != 0 {
			t.Errorf("List of nothing: %v", none)
		}
		kinds, err3 := r.List("overlay/")
		want(t, "List", text(kinds), "overlay/blue={}")
		return errors.Join(err, err2, err3)
	})
	if err != nil {
		t.Fatal(err)
	}
}

func revisions(t *testing.T, s store.Store) {
	at := func() (rev, item int64) {
		err := s.View(t.Context(), func(r store.Reader) error {
			rev = r.Revision()
			all, err := r.List("vni/")
			if len(all) > 0 {
				item = all[0].Revision
			}
			if again := r.Revision(); again != rev {
				t.Errorf("Revision changed within a View: %d, %d", rev, again)
			}
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		return rev, item
	}
	before, _ := at()
	put(t, s, "vni/1", "a")
	after, item := at()
	if before <= 0 || item <= before || after < item {
		t.Errorf("revisions before %d, of the item %d, after %d: want them to rise", before, item, after)
	}
	put(t, s, "vni/2", "b")
	if later, same := at(); later <= after || same != item {
		t.Errorf("after another put: revision %d, of the item %d, want more than %d, and %d", later, same, after, item)
	}
}

func errorWritesNothing(t *testing.T, s store.Store) {
	no := errors.New("no")
	err := s.Update(t.Context(), []string{"vni"}, func(x store.Txn) error {
		x.Put("vni/1", []byte("a"))
		return fmt.Errorf("because: %w", no)
	})
	if !errors.Is(err, no) {
		t.Errorf("Update = %v, want the error of its function", err)
	}
	want(t, "a value of a failed Update", get(t, s, "vni/1"), "-")
	if err := s.View(t.Context(), func(store.Reader) error { return no }); !errors.Is(err, no) {
		t.Errorf("View = %v, want the error of its function", err)
	}
}

func domains(t *testing.T, s store.Store) {
	for name, f := range map[string]func(store.Txn){
		"Get":    func(x store.Txn) { _, _ = x.Get("ledger/all") },
		"List":   func(x store.Txn) { _, _ = x.List("ipam/red/") },
		"kind":   func(x store.Txn) { _, _ = x.List("overlay/") },
		"Put":    func(x store.Txn) { x.Put("overlay/red", []byte("{}")) },
		"Delete": func(x store.Txn) { x.Delete("renewal/a") },
		"guard":  func(x store.Txn) { x.Put("guard/vni", []byte("{}")) },
		"empty":  func(x store.Txn) { x.Put("", []byte("{}")) },
	} {
		for _, d := range [][]string{{"vni", "overlay/blue"}, {}, nil} {
			err := s.Update(t.Context(), d, func(x store.Txn) error {
				f(x)
				return nil
			})
			if err == nil || errors.Is(err, store.ErrUnavailable) {
				t.Errorf("%s outside of the domains %q = %v, want an error", name, d, err)
			}
		}
	}
	err := s.Update(t.Context(), []string{"vni", "overlay/blue", "vni"}, func(x store.Txn) error {
		x.Put("vni/1", []byte("1"))
		x.Put("overlay/blue", []byte("2"))
		x.Put("ipam/blue/x/y", []byte("3"))
		return nil
	})
	if err != nil {
		t.Errorf("Update of several domains: %v", err)
	}
	want(t, "a value of several domains", get(t, s, "ipam/blue/x/y"), "3")
}

// manyDomains: a change may be of so many domains, and write all that it may
// write at the same time, and of no more.
func manyDomains(t *testing.T, s store.Store) {
	var names []string
	for i := range store.MaxDomains + 1 {
		names = append(names, fmt.Sprintf("renewal/n%d", i))
	}
	write := func(domains []string) error {
		return s.Update(t.Context(), domains, func(x store.Txn) error {
			for _, d := range domains[1:] {
				x.Put(d, []byte("{}"))
			}
			for i := range store.MaxWrites - len(domains) {
				x.Put(fmt.Sprintf("ipam/blue/%05d", i), []byte("{}"))
			}
			return nil
		})
	}
	all := append([]string{"overlay/blue"}, names...)
	if err := write(all[:store.MaxDomains]); err != nil {
		t.Errorf("%d domains: %v", store.MaxDomains, err)
	}
	if err := write(all[:store.MaxDomains+1]); !errors.Is(err, store.ErrTooLarge) {
		t.Errorf("%d domains: %v, want ErrTooLarge", store.MaxDomains+1, err)
	}
}

func prefixes(t *testing.T, s store.Store) {
	err := s.View(t.Context(), func(r store.Reader) error {
		_, err := r.List("vni/1")
		return err
	})
	if err == nil {
		t.Error("List of a prefix that does not end in / went well")
	}
	if s.Follow(t.Context(), "vni", func(store.Change) {}) == nil {
		t.Error("Follow of a prefix that does not end in / went well")
	}
}

func limits(t *testing.T, s store.Store) {
	for name, l := range map[string]struct {
		writes, key, value int
		ok                 bool
	}{
		"longest key":    {1, store.MaxKey, 1, true},
		"key":            {1, store.MaxKey + 1, 1, false},
		"largest value":  {1, 20, store.MaxValue, true},
		"value":          {1, 20, store.MaxValue + 1, false},
		"129 writes":     {129, 20, 1, true},
		"most writes":    {store.MaxWrites, 128, 127, true},
		"writes":         {store.MaxWrites + 1, 20, 1, false},
		"most bytes":     {8, 128, store.MaxBytes/8 - 128, true},
		"bytes":          {9, 128, store.MaxBytes/8 - 128, false},
		"1000 and guard": {1000, 20, 1, true},
	} {
		t.Run(name, func(t *testing.T) {
			prefix := "ipam/" + strings.ReplaceAll(name, " ", "") + "/"
			err := s.Update(t.Context(), []string{store.Domain(prefix)}, func(x store.Txn) error {
				for i := range l.writes {
					key := fmt.Sprintf("%s%05d", prefix, i)
					x.Put(key+strings.Repeat("k", max(0, l.key-len(key))), make([]byte, l.value))
				}
				return nil
			})
			if l.ok && err != nil || !l.ok && !errors.Is(err, store.ErrTooLarge) {
				t.Fatalf("Update = %v", err)
			}
			there := 0
			err = s.View(t.Context(), func(r store.Reader) error {
				all, err := r.List(prefix)
				there = len(all)
				return err
			})
			if err != nil || l.ok && there != l.writes || !l.ok && there != 0 {
				t.Fatalf("%d keys are there (%v), of %d", there, err, l.writes)
			}
			if !l.ok {
				return
			}
			update(t, s, store.Domain(prefix), func(x store.Txn) error {
				all, err := x.List(prefix)
				for _, i := range all {
					x.Delete(i.Key)
				}
				return err
			})
		})
	}
}

func canceled(t *testing.T, s store.Store) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	err := s.Update(ctx, []string{"vni"}, func(store.Txn) error { return nil })
	if !errors.Is(err, context.Canceled) {
		t.Errorf("Update with a context that ended = %v", err)
	}
	err = s.View(ctx, func(r store.Reader) error {
		_, err := r.Get("vni/1")
		return err
	})
	if !errors.Is(err, context.Canceled) {
		t.Errorf("View with a context that ended = %v", err)
	}
}

// during calls between once, while an Update of domains has read and not yet
// written, and returns how often the Update's function was called.
func during(t *testing.T, s store.Store, domains []string, between func(), f func(store.Txn) error) int {
	t.Helper()
	calls := 0
	err := s.Update(t.Context(), domains, func(x store.Txn) error {
		err := f(x)
		if calls++; calls == 1 {
			between()
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return calls
}

func conflict(t *testing.T, s store.Store) {
	put(t, s, "vni/1", "a")
	calls := during(t, s, []string{"vni"}, func() { put(t, s, "vni/1", "b") }, func(x store.Txn) error {
		b, err := x.Get("vni/1")
		x.Put("vni/2", b)
		return err
	})
	if calls != 2 {
		t.Errorf("after a change of what was read, the function was called %d times, want 2", calls)
	}
	want(t, "what was copied", get(t, s, "vni/2"), "b")
}

// phantom: a key that was not there when the keys were listed.
func phantom(t *testing.T, s store.Store) {
	calls := during(t, s, []string{"overlay/blue"}, func() { put(t, s, "ipam/blue/new", "1") }, func(x store.Txn) error {
		all, err := x.List("ipam/blue/")
		x.Put("overlay/blue", fmt.Appendf(nil, "%d", len(all)))
		return err
	})
	if calls != 2 {
		t.Errorf("after a new key in what was listed, the function was called %d times, want 2", calls)
	}
	want(t, "the count", get(t, s, "overlay/blue"), "1")
}

func noConflict(t *testing.T, s store.Store) {
	calls := during(t, s, []string{"overlay/blue"}, func() { put(t, s, "ipam/red/new", "1") }, func(x store.Txn) error {
		x.Put("overlay/blue", []byte("1"))
		return nil
	})
	if calls != 1 {
		t.Errorf("after a change in another domain, the function was called %d times, want 1", calls)
	}
}

func counter(t *testing.T, s store.Store) {
	const workers, each = 8, 10
	var wg sync.WaitGroup
	for range workers {
		wg.Go(func() {
			for range each {
				ctx, cancel := context.WithTimeout(t.Context(), patience)
				err := s.Update(ctx, []string{"ledger"}, func(x store.Txn) error {
					b, err := x.Get("ledger/n")
					x.Put("ledger/n", append(b, '.'))
					return err
				})
				cancel()
				if err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
	if n := len(get(t, s, "ledger/n")); n != workers*each {
		t.Errorf("%d increments are left of %d", n, workers*each)
	}
}

// Followed is what a follower knows.
type Followed struct {
	mu     sync.Mutex
	items  map[string]string
	wholes int
	rev    int64
	rung   chan struct{}
}

// NewFollowed follows prefix of s until the test ends.
func NewFollowed(t *testing.T, s store.Store, prefix string) *Followed {
	f := &Followed{items: map[string]string{}, rung: make(chan struct{}, 1)}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- s.Follow(ctx, prefix, func(c store.Change) { f.change(t, prefix, c) }) }()
	t.Cleanup(func() {
		cancel()
		select {
		case err := <-done:
			if err != nil {
				t.Errorf("Follow = %v, want nil", err)
			}
		case <-time.After(patience):
			t.Error("Follow does not return when its context has ended")
		}
	})
	return f
}

func (f *Followed) change(t *testing.T, prefix string, c store.Change) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if c.Revision < f.rev || !c.Whole && c.Revision == f.rev {
		t.Errorf("Follow: revision %d after %d", c.Revision, f.rev)
	}
	f.rev = c.Revision
	if c.Whole {
		f.wholes++
		clear(f.items)
	} else if f.wholes == 0 {
		t.Error("Follow began with a change that is not whole")
	}
	for _, i := range c.Put {
		if !strings.HasPrefix(i.Key, prefix) {
			t.Errorf("Follow of %s: got %s", prefix, i.Key)
		}
		f.items[i.Key] = string(i.Value)
	}
	for _, k := range c.Deleted {
		delete(f.items, k)
	}
	select {
	case f.rung <- struct{}{}:
	default:
	}
}

// Wait waits until the follower knows exactly this: "key=value key=value", in order.
func (f *Followed) Wait(t *testing.T, want string) {
	t.Helper()
	end := time.After(patience)
	for {
		f.mu.Lock()
		var got []string
		for _, k := range slices.Sorted(maps.Keys(f.items)) {
			got = append(got, k+"="+f.items[k])
		}
		wholes := f.wholes
		f.mu.Unlock()
		if wholes > 0 && strings.Join(got, " ") == want {
			return
		}
		select {
		case <-f.rung:
		case <-end:
			t.Fatalf("the follower knows %q, want %q", got, want)
		}
	}
}

func follow(t *testing.T, s store.Store) {
	put(t, s, "vni/1", "a")
	f := NewFollowed(t, s, "vni/")
	f.Wait(t, "vni/1=a")
	put(t, s, "vni/2", "b")
	put(t, s, "overlay/blue", "elsewhere")
	f.Wait(t, "vni/1=a vni/2=b")
	update(t, s, "vni", func(x store.Txn) error {
		x.Delete("vni/1")
		x.Put("vni/2", []byte("c"))
		return nil
	})
	f.Wait(t, "vni/2=c")
	nothing := NewFollowed(t, s, "keeper/")
	nothing.Wait(t, "")
}
