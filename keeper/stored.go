package keeper

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"reflect"
	"strings"
	"sync"

	"github.com/tulle-net/tulle/crypto"
	"github.com/tulle-net/tulle/store"
)

// Where a Ledger is in a store: each record under a key of its own.
const (
	keyHead        = store.KindLedger + "/head"
	keyRevocations = store.KindLedger + "/revocations"
	keyGossip      = store.KindLedger + "/gossip"
	keyCA          = store.KindLedger + "/ca"
	prefixNode     = store.KindLedger + "/node/"
	prefixToken    = store.KindLedger + "/token/"
	prefixEpoch    = store.KindLedger + "/epoch/"

	storedSchema = 1
)

// ErrNoLedger: the store holds no cluster's ledger.
var ErrNoLedger = errors.New("keeper: the store holds no ledger: it is empty, or another cluster's prefix")

// stored is what each value of a ledger looks like.
type stored struct {
	Schema int             `json:"schema"`
	Value  json.RawMessage `json:"value"`
}

// head changes with each change of the ledger.
type head struct {
	// Tag is random: a ledger that was read under it needs not be read again.
	Tag uint64 `json:"tag,string"`
	// Extra are parts of a ledger that this release does not know.
	Extra extra `json:"extra,omitempty"`
}

// inStore keeps a Ledger in a store.Store.
type inStore struct {
	st store.Store

	mu     sync.Mutex
	tag    uint64
	ledger *Ledger // as of tag, never changed; nil: none read yet
}

var _ Store = (*inStore)(nil)

// InStore returns the Store that keeps the Ledger in st. It is safe for concurrent use.
func InStore(st store.Store) Store { return &inStore{st: st} }

// Found writes the first Ledger of a cluster into st, unless there is one.
func Found(ctx context.Context, st store.Store, first *Ledger) error {
	return st.Update(ctx, []string{store.KindLedger}, func(t store.Txn) error {
		if b, err := t.Get(keyHead); err != nil || b != nil {
			return err
		}
		return write(t, &Ledger{}, first)
	})
}

// Read implements Store.
func (s *inStore) Read(ctx context.Context) (l *Ledger, err error) {
	err = s.st.View(ctx, func(r store.Reader) error {
		l, err = s.read(r)
		return err
	})
	return l, err
}

// Update implements Store.
func (s *inStore) Update(ctx context.Context, f func(*Ledger) error) error {
	return s.st.Update(ctx, []string{store.KindLedger}, func(t store.Txn) error {
		old, err := s.read(t)
		if err != nil {
			return err
		}
		next := old.Clone()
		if err := f(next); err != nil {
			return err
		}
		return write(t, old, next)
	})
}

// read returns the ledger of r's state: most often the one that was read last.
func (s *inStore) read(r store.Reader) (*Ledger, error) {
	b, err := r.Get(keyHead)
	if err != nil {
		return nil, err
	}
	if b == nil {
		return nil, ErrNoLedger
	}
	var h head
	if err := open(keyHead, b, &h); err != nil {
		return nil, err
	}
	s.mu.Lock()
	l := s.ledger
	if s.tag != h.Tag {
		l = nil
	}
	s.mu.Unlock()
	if l != nil {
		return l, nil
	}
	items, err := r.List(store.KindLedger + "/")
	if err != nil {
		return nil, err
	}
	if l, err = assemble(items, h.Extra); err != nil {
		return nil, err
	}
	s.mu.Lock()
	s.tag, s.ledger = h.Tag, l
	s.mu.Unlock()
	return l, nil
}

// open reads a value.
func open(key string, b []byte, v any) error {
	var s stored
	if err := json.Unmarshal(b, &s); err != nil {
		return fmt.Errorf("keeper: %w: %s: %w", ErrLedger, key, err)
	}
	if s.Schema != storedSchema {
		return fmt.Errorf("keeper: %w: %s is of schema %d, and this release knows %d: run one release of tulle on all keepers", ErrLedger, key, s.Schema, storedSchema)
	}
	if err := json.Unmarshal(s.Value, v); err != nil {
		return fmt.Errorf("keeper: %w: %s: %w", ErrLedger, key, err)
	}
	return nil
}

// assemble makes a Ledger of its records.
func assemble(items []store.Item, unknown extra) (*Ledger, error) {
	l := &Ledger{Nodes: map[string]Node{}, Tokens: map[crypto.TokenID]Token{}, Overlays: map[string]Overlay{}, extra: unknown}
	for _, i := range items {
		var err error
		if name, ok := strings.CutPrefix(i.Key, prefixNode); ok {
			err = into(l.Nodes, name, i)
		} else if text, ok := strings.CutPrefix(i.Key, prefixToken); ok {
			var id crypto.TokenID
			if err = id.UnmarshalText([]byte(text)); err == nil {
				err = into(l.Tokens, id, i)
			}
		} else if name, ok := strings.CutPrefix(i.Key, prefixEpoch); ok {
			err = into(l.Overlays, name, i)
		} else if i.Key == keyRevocations {
			err = open(i.Key, i.Value, &l.Revocations)
		} else if i.Key == keyGossip {
			err = open(i.Key, i.Value, &l.Gossip)
		} else if i.Key == keyCA {
			err = open(i.Key, i.Value, &l.CA)
		}
		if err != nil {
			return nil, err
		}
	}
	return l, l.check()
}

func into[K comparable, V any](m map[K]V, key K, i store.Item) error {
	var v V
	if err := open(i.Key, i.Value, &v); err != nil {
		return err
	}
	m[key] = v
	return nil
}

// write puts what differs between two ledgers.
func write(t store.Txn, old, next *Ledger) error {
	if err := next.check(); err != nil {
		return err
	}
	w := writer{t: t}
	differ(&w, prefixNode, old.Nodes, next.Nodes, func(name string) string { return name })
	differ(&w, prefixToken, old.Tokens, next.Tokens, crypto.TokenID.String)
	differ(&w, prefixEpoch, old.Overlays, next.Overlays, func(name string) string { return name })
	if !reflect.DeepEqual(old.Revocations, next.Revocations) {
		w.put(keyRevocations, next.Revocations)
	}
	if !reflect.DeepEqual(old.Gossip, next.Gossip) {
		w.put(keyGossip, next.Gossip)
	}
	if !reflect.DeepEqual(old.CA, next.CA) {
		w.put(keyCA, next.CA)
	}
	if w.wrote || old.Nodes == nil {
		w.put(keyHead, head{rand.Uint64(), next.extra})
	}
	return w.err
}

type writer struct {
	t     store.Txn
	wrote bool
	err   error
}

func (w *writer) put(key string, v any) {
	value, err := json.Marshal(v)
	if err == nil {
		value, err = json.Marshal(stored{storedSchema, value})
	}
	if err != nil {
		w.err = errors.Join(w.err, fmt.Errorf("keeper: encode %s: %w", key, err))
		return
	}
	w.t.Put(key, value)
	w.wrote = true
}

func differ[K comparable, V any](w *writer, prefix string, old, next map[K]V, text func(K) string) {
	for k, v := range next {
		if before, ok := old[k]; !ok || !reflect.DeepEqual(before, v) {
			w.put(prefix+text(k), v)
		}
	}
	for k := range old {
		if _, ok := next[k]; !ok {
			w.t.Delete(prefix + text(k))
			w.wrote = true
		}
	}
}
