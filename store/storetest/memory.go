// Package storetest is a store in memory, for tests.
package storetest

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"

	"github.com/tulle-net/tulle/store"
)

// Memory is a store.Store that forgets everything with the process. SetAway
// makes it unavailable.
type Memory struct {
	mu       sync.Mutex
	revision int64
	items    map[string]store.Item
	domains  map[string]int64
	away     bool
	changed  chan struct{} // closed and replaced at each change
	log      []store.Change
}

var _ store.Store = (*Memory)(nil)

// New returns an empty store.
func New() *Memory {
	return &Memory{revision: 1, items: map[string]store.Item{}, domains: map[string]int64{}, changed: make(chan struct{})}
}

// SetAway makes the store unavailable, or available again.
func (m *Memory) SetAway(away bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.away = away
	m.ring()
}

func (m *Memory) ring() {
	close(m.changed)
	m.changed = make(chan struct{})
}

// View implements store.Store.
func (m *Memory) View(ctx context.Context, f func(store.Reader) error) error {
	t, err := m.begin(ctx, nil)
	if err != nil {
		return err
	}
	return cmp.Or(f(t), t.err)
}

func (m *Memory) begin(ctx context.Context, domains []string) (*txn, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if len(domains) > store.MaxDomains {
		return nil, fmt.Errorf("%w: %d domains in one change, more than %d", store.ErrTooLarge, len(domains), store.MaxDomains)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.away {
		return nil, store.ErrUnavailable
	}
	t := &txn{domains: domains, items: map[string]store.Item{}, revision: m.revision, writes: map[string][]byte{}, seen: map[string]int64{}}
	for k, i := range m.items {
		t.items[k] = i
	}
	for _, d := range domains {
		t.seen[d] = m.domains[d]
	}
	return t, nil
}

// Update implements store.Store.
func (m *Memory) Update(ctx context.Context, domains []string, f func(store.Txn) error) error {
	if domains == nil {
		domains = []string{} // nil is a View's
	}
	for {
		t, err := m.begin(ctx, domains)
		if err != nil {
			return err
		}
		if err := f(t); err != nil {
			return err
		}
		if t.err != nil {
			return t.err
		}
		done, err := m.commit(t)
		if done || err != nil {
			return err
		}
	}
}

func (m *Memory) commit(t *txn) (bool, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.away {
		return false, store.ErrUnavailable
	}
	for d, rev := range t.seen {
		if m.domains[d] != rev {
			return false, nil
		}
	}
	if len(t.writes) == 0 {
		return true, nil
	}
	bytes := 0
	for key, value := range t.writes {
		if len(key) > store.MaxKey || len(value) > store.MaxValue {
			return false, store.ErrTooLarge
		}
		bytes += len(key) + len(value)
	}
	if len(t.writes) > store.MaxWrites || bytes > store.MaxBytes {
		return false, store.ErrTooLarge
	}
	m.revision++
	c := store.Change{Revision: m.revision}
	for key, value := range t.writes {
		m.domains[store.Domain(key)] = m.revision
		if value == nil {
			delete(m.items, key)
			c.Deleted = append(c.Deleted, key)
			continue
		}
		m.items[key] = store.Item{Key: key, Value: value, Revision: m.revision}
		c.Put = append(c.Put, m.items[key])
	}
	m.log = append(m.log, c)
	m.ring()
	return true, nil
}

// Follow implements store.Store.
func (m *Memory) Follow(ctx context.Context, prefix string, f func(store.Change)) error {
	if err := store.CheckPrefix(prefix); err != nil {
		return err
	}
	at := -1
	for {
		m.mu.Lock()
		wait, away := m.changed, m.away
		var todo []store.Change
		if !away && at < 0 {
			c := store.Change{Whole: true, Revision: m.revision}
			for _, i := range m.items {
				c.Put = append(c.Put, i)
			}
			todo, at = append(todo, c), len(m.log)
		} else if !away {
			todo, at = append(todo, m.log[at:]...), len(m.log)
		}
		m.mu.Unlock()
		for _, c := range todo {
			out := store.Change{Whole: c.Whole, Revision: c.Revision}
			for _, i := range c.Put {
				if strings.HasPrefix(i.Key, prefix) {
					out.Put = append(out.Put, i)
				}
			}
			for _, k := range c.Deleted {
				if strings.HasPrefix(k, prefix) {
					out.Deleted = append(out.Deleted, k)
				}
			}
			slices.SortFunc(out.Put, func(a, b store.Item) int { return strings.Compare(a.Key, b.Key) })
			if out.Whole || len(out.Put)+len(out.Deleted) > 0 {
				f(out)
			}
		}
		select {
		case <-wait:
		case <-ctx.Done():
			return nil
		}
	}
}

type txn struct {
	domains  []string // nil: a View, of everything
	items    map[string]store.Item
	revision int64
	seen     map[string]int64
	writes   map[string][]byte // nil: deleted
	err      error
}

func (t *txn) check(key string) error {
	if t.domains != nil && !slices.Contains(t.domains, store.Domain(key)) {
		t.err = fmt.Errorf("store: key %q is of domain %q, which is not one of %q", key, store.Domain(key), t.domains)
		return t.err
	}
	return nil
}

func (t *txn) Revision() int64 { return t.revision }

func (t *txn) Get(key string) ([]byte, error) {
	if err := t.check(key); err != nil {
		return nil, err
	}
	if v, ok := t.writes[key]; ok {
		return slices.Clone(v), nil
	}
	return slices.Clone(t.items[key].Value), nil
}

func (t *txn) List(prefix string) ([]store.Item, error) {
	if err := store.CheckPrefix(prefix); err != nil {
		t.err = cmp.Or(t.err, err)
		return nil, err
	}
	if err := t.check(prefix); err != nil {
		return nil, err
	}
	var out []store.Item
	for k, i := range t.items {
		if _, written := t.writes[k]; !written && strings.HasPrefix(k, prefix) {
			i.Value = slices.Clone(i.Value)
			out = append(out, i)
		}
	}
	for k, v := range t.writes {
		if v != nil && strings.HasPrefix(k, prefix) {
			out = append(out, store.Item{Key: k, Value: slices.Clone(v), Revision: t.revision})
		}
	}
	slices.SortFunc(out, func(a, b store.Item) int { return strings.Compare(a.Key, b.Key) })
	return out, nil
}

func (t *txn) Put(key string, value []byte) {
	if t.check(key) == nil {
		t.writes[key] = append([]byte{}, value...)
	}
}

func (t *txn) Delete(key string) {
	if t.check(key) == nil {
		t.writes[key] = nil
	}
}
