package cluster

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/tulle-net/tulle/crypto"
	"github.com/tulle-net/tulle/keeper"
	"github.com/tulle-net/tulle/store"
)

// fileShared is the shared overlays that this node may know of.
const fileShared = "shared"

// maxNoticed members are remembered by what they told of.
const maxNoticed = keeper.MaxNodes

var (
	errSharedBehind = errors.New("cluster: the keeper knows less of the shared overlays than this node")
	errSharedDigest = errors.New("cluster: the keeper's list of shared overlays contradicts itself")
)

// shared is the definitions of the shared overlays, as of the last answer of a keeper.
type shared struct {
	applying sync.Mutex // one answer at a time: on disk, then in memory

	mu       sync.Mutex
	revision int64
	noticed  map[string]uint64 // the highest revision that each member told of, maxNoticed at most
	defined  map[string]keeper.SharedOverlay
	asked    time.Time // when a keeper last answered
	removed  []removed // not long ago, the oldest first
}

// removed is an overlay that was shared.
type removed struct {
	name string
	vni  uint32
	at   time.Time
}

// removedFor is how long others may be seen to carry an overlay that was
// removed: they hear of the removal, and gossip tells that they left it.
const removedFor = time.Minute

// sharedFile is the text of fileShared.
type sharedFile struct {
	Schema   int         `json:"schema"`
	Revision int64       `json:"revision,string"`
	Overlays []savedItem `json:"overlays"`
}

type savedItem struct {
	Revision int64           `json:"revision,string"`
	Overlay  json.RawMessage `json:"overlay"`
}

// load takes what an earlier run saved; what cannot be read is asked for again.
func (s *shared) load(st *crypto.State, log *slog.Logger) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.revision, s.defined = 0, map[string]keeper.SharedOverlay{}
	b := st.Files[fileShared]
	if b == nil {
		return
	}
	var f sharedFile
	if err := json.Unmarshal(b, &f); err != nil || f.Schema != 1 {
		log.Warn("what this node knew of the shared overlays cannot be read; asking for it again", "err", err)
		return
	}
	for _, i := range f.Overlays {
		o, err := store.ParseOverlay(i.Overlay)
		if err != nil {
			log.Warn("the definition of an overlay cannot be read; asking for all again", "err", err)
			f.Revision = 0
			continue
		}
		s.defined[o.Name] = keeper.SharedOverlay{Overlay: o, Revision: i.Revision}
	}
	s.revision = f.Revision
}

func (s *shared) known() uint64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return uint64(s.revision)
}

// notice reports whether a revision is higher than what this node knows, and
// than all that the member told of before: a keeper may not know it yet. Who
// claims what nobody has is believed once, and in the others' way never.
func (s *shared) notice(member string, revision uint64) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if revision <= s.noticed[member] || revision <= uint64(s.revision) {
		return false
	}
	if s.noticed == nil || len(s.noticed) >= maxNoticed {
		s.noticed = map[string]uint64{}
	}
	s.noticed[member] = revision
	return true
}

// Shared returns the shared overlays that this node may know of, by name, and
// when a keeper last told of them; zero: not since the start.
func (p *Place) Shared() ([]*store.Overlay, time.Time) {
	p.shared.mu.Lock()
	defer p.shared.mu.Unlock()
	list := make([]*store.Overlay, 0, len(p.shared.defined))
	for _, name := range slices.Sorted(maps.Keys(p.shared.defined)) {
		list = append(list, p.shared.defined[name].Overlay)
	}
	return list, p.shared.asked
}

// SharedOverlay returns the definition of one; nil: there is none.
func (p *Place) SharedOverlay(name string) *store.Overlay {
	p.shared.mu.Lock()
	defer p.shared.mu.Unlock()
	return p.shared.defined[name].Overlay
}

// WasShared reports whether an overlay was a shared one until not long ago. Others
// may be seen to carry it still.
func (p *Place) WasShared(name string, vni uint32) bool {
	p.shared.mu.Lock()
	defer p.shared.mu.Unlock()
	return slices.ContainsFunc(p.shared.removed, func(r removed) bool {
		return r.name == name && r.vni == vni && time.Since(r.at) < removedFor
	})
}

// pullShared pulls what is new of the shared overlays.
func (p *Place) pullShared(ctx context.Context, c keeper.Client) error {
	p.shared.mu.Lock()
	since := p.shared.revision
	p.shared.mu.Unlock()
	changed, err := p.takeShared(ctx, c, since)
	if errors.Is(err, errSharedDigest) {
		// Another answer came in between, or what this node has is not what the
		// keeper thinks: everything, then.
		changed, err = p.takeShared(ctx, c, 0)
	}
	if err != nil {
		return err
	}
	if changed && p.cfg.OnShared != nil {
		p.cfg.OnShared()
	}
	return nil
}

// takeShared asks once, and keeps what is new.
func (p *Place) takeShared(ctx context.Context, c keeper.Client, since int64) (changed bool, err error) {
	a, err := c.Shared(ctx, since)
	if err != nil {
		return false, err
	}
	s := &p.shared
	s.applying.Lock()
	defer s.applying.Unlock()
	s.mu.Lock()
	old, before := s.defined, s.revision
	s.mu.Unlock()
	next := maps.Clone(old)
	if a.Whole {
		clear(next)
	}
	for _, o := range a.Put {
		next[o.Name] = o
	}
	for _, name := range a.Removed {
		delete(next, name)
	}
	have := map[string]int64{}
	for name, o := range next {
		have[name] = o.Revision
	}
	if !bytes.Equal(keeper.SharedDigest(have), a.Digest) {
		return false, errSharedDigest
	}
	changed = !maps.EqualFunc(old, next, func(a, b keeper.SharedOverlay) bool { return a.Revision == b.Revision })
	if changed && a.Revision < before {
		return false, errSharedBehind // it will know more, or another one does
	}
	revision := max(a.Revision, before)
	if changed || revision != before {
		if err := p.saveShared(revision, next); err != nil {
			return false, err
		}
	}
	s.mu.Lock()
	now := time.Now()
	s.removed = slices.DeleteFunc(s.removed, func(r removed) bool { return now.Sub(r.at) >= removedFor })
	for name, o := range s.defined {
		if is, there := next[name]; !there || is.ID != o.ID {
			s.removed = append(s.removed, removed{name, o.VNI, now})
		}
	}
	s.revision, s.defined, s.asked = revision, next, now
	s.mu.Unlock()
	return changed, nil
}

func (p *Place) saveShared(revision int64, defined map[string]keeper.SharedOverlay) error {
	f := sharedFile{Schema: 1, Revision: revision}
	for _, name := range slices.Sorted(maps.Keys(defined)) {
		b, err := defined[name].Encode()
		if err != nil {
			return err
		}
		f.Overlays = append(f.Overlays, savedItem{defined[name].Revision, b})
	}
	b, err := json.Marshal(f)
	if err != nil {
		return err
	}
	return p.update(func(st *crypto.State) error { st.Files[fileShared] = b; return nil })
}
