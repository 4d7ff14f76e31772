package cluster

import (
	"context"
	"encoding/binary"
	"errors"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/tulle-net/tulle/crypto"
	"github.com/tulle-net/tulle/keeper"
)

// OverlayKey is the key of an overlay's epoch.
type OverlayKey struct {
	crypto.Key
	Epoch uint32
}

const overlayKeyBytes = 4 + crypto.KeyBytes

// keys are the overlay keys that this node was given.
type keys struct {
	bell chan struct{} // ask for keys

	mu     sync.Mutex
	have   map[string]OverlayKey
	wanted map[string]bool
	ask    map[string]bool // wanted, and not there or perhaps of an older epoch
	denied map[string]bool
}

func (k *keys) init() {
	k.bell = make(chan struct{}, 1)
	k.have, k.wanted, k.ask, k.denied = map[string]OverlayKey{}, map[string]bool{}, map[string]bool{}, map[string]bool{}
}

// load takes the keys from the state; a damaged one is asked for again.
func (k *keys) load(s *crypto.State, log *slog.Logger) {
	k.mu.Lock()
	defer k.mu.Unlock()
	clear(k.have)
	for file, b := range s.Files {
		overlay, ok := strings.CutPrefix(file, fileOverlayKey)
		if !ok {
			continue
		}
		key, err := parseOverlayKey(b)
		if err != nil {
			log.Warn("the key of an overlay cannot be read; asking for it again", "overlay", overlay, "err", err)
			continue
		}
		k.have[overlay] = key
	}
}

func parseOverlayKey(b []byte) (OverlayKey, error) {
	if len(b) != overlayKeyBytes || binary.BigEndian.Uint32(b) == 0 {
		return OverlayKey{}, crypto.ErrMalformed
	}
	key, err := crypto.KeyFrom(b[4:])
	return OverlayKey{key, binary.BigEndian.Uint32(b)}, err
}

// Want says which overlays' keys this node needs, and has them fetched: also
// those that are there, which may have been changed while this node was away.
func (p *Place) Want(overlays ...string) {
	k := &p.keys
	k.mu.Lock()
	k.wanted = map[string]bool{}
	for _, o := range overlays {
		k.wanted[o], k.ask[o] = true, true
	}
	maps.DeleteFunc(k.ask, func(o string, _ bool) bool { return !k.wanted[o] })
	k.mu.Unlock()
	ring(k.bell)
}

// Key returns the key of an overlay, if it is wanted and there, and the
// certificate grants it.
func (p *Place) Key(overlay string) (OverlayKey, bool) {
	p.keys.mu.Lock()
	defer p.keys.mu.Unlock()
	key, ok := p.keys.have[overlay]
	id := p.identity.Load()
	return key, ok && p.keys.wanted[overlay] && id != nil && id.Certificate().Overlays.Allow(overlay)
}

// Denied returns the wanted overlays that this node's certificate does not grant.
func (p *Place) Denied() []string {
	p.keys.mu.Lock()
	defer p.keys.mu.Unlock()
	return slices.Sorted(maps.Keys(p.keys.denied))
}

// Stale tells that a peer has a newer key of the overlay.
func (p *Place) Stale(overlay string) {
	k := &p.keys
	k.mu.Lock()
	if k.wanted[overlay] {
		k.ask[overlay] = true
	}
	k.mu.Unlock()
	ring(k.bell)
}

// again asks for all wanted keys.
func (k *keys) again() {
	k.mu.Lock()
	for o := range k.wanted {
		k.ask[o] = true
	}
	k.mu.Unlock()
	ring(k.bell)
}

// askAgain has those asked for that are wanted still.
func (k *keys) askAgain(overlays []string) {
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, o := range overlays {
		if k.wanted[o] {
			k.ask[o] = true
		}
	}
}

// keepKeys fetches keys as they are needed.
func (p *Place) keepKeys(ctx context.Context) {
	wait := time.Duration(0)
	for {
		next := time.Hour
		if err := p.fetch(ctx); err != nil && ctx.Err() == nil {
			wait = min(max(2*wait, retryMin), retryMax)
			next = wait
			p.cfg.Log.Debug("keys of overlays are still missing", "err", err)
		} else {
			wait = 0
		}
		if !sleep(ctx, next, p.keys.bell) {
			return
		}
	}
}

// fetch asks a keeper for the keys that are missing.
func (p *Place) fetch(ctx context.Context) error {
	k := &p.keys
	k.mu.Lock()
	overlays := slices.Sorted(maps.Keys(k.ask))
	// What is asked for from here on may be of a newer epoch than the answer.
	clear(k.ask)
	k.mu.Unlock()
	if len(overlays) == 0 {
		return nil
	}
	left := slices.Clone(overlays)
	defer func() { k.askAgain(left) }()
	ctx, cancel := context.WithTimeout(ctx, 2*askTimeout)
	defer cancel()
	got, denied, err := p.client().OverlayKeys(ctx, overlays...)
	if err != nil {
		return err
	}
	id := p.identity.Load()
	var fresh []string
	err = p.update(func(s *crypto.State) error {
		fresh = fresh[:0]
		for _, g := range got {
			if have, ok := k.get(g.Overlay); ok && have.Epoch >= g.Epoch || !id.Certificate().Overlays.Allow(g.Overlay) {
				continue
			}
			s.Files[fileOverlayKey+g.Overlay] = append(binary.BigEndian.AppendUint32(nil, g.Epoch), g.Key.Bytes()...)
			fresh = append(fresh, g.Overlay)
		}
		for _, overlay := range denied { // the key goes with its grant
			delete(s.Files, fileOverlayKey+overlay)
		}
		return nil
	})
	if err != nil {
		return err
	}
	k.mu.Lock()
	for _, g := range got {
		delete(k.denied, g.Overlay)
		if slices.Contains(fresh, g.Overlay) {
			k.have[g.Overlay] = OverlayKey{g.Key, g.Epoch}
		}
	}
	for _, overlay := range denied {
		delete(k.have, overlay)
		if !k.denied[overlay] {
			k.denied[overlay] = true
			p.cfg.Log.Error("this node's certificate does not grant the overlay: have the node removed (tulle node rm) and start it with a token that does (tulle token create --overlays)", "overlay", overlay)
		}
	}
	k.mu.Unlock()
	left = slices.DeleteFunc(left, func(o string) bool {
		return slices.Contains(denied, o) || slices.ContainsFunc(got, func(g keeper.OverlayKey) bool { return g.Overlay == o })
	})
	p.tellKeys(append(fresh, denied...))
	if len(left) > 0 {
		return errKeysLeft
	}
	return nil
}

var errKeysLeft = errors.New("cluster: the keeper's answer leaves some out")

func (k *keys) get(overlay string) (OverlayKey, bool) {
	k.mu.Lock()
	defer k.mu.Unlock()
	key, ok := k.have[overlay]
	return key, ok
}

func (p *Place) tellKeys(overlays []string) {
	if p.cfg.OnKey == nil {
		return
	}
	for _, overlay := range overlays {
		p.cfg.OnKey(overlay)
	}
}

// drop forgets the keys that id's certificate does not grant.
func (k *keys) drop(p *Place, id *crypto.Identity) {
	var gone []string
	k.mu.Lock()
	for overlay := range k.have {
		if !id.Certificate().Overlays.Allow(overlay) {
			gone = append(gone, overlay)
			delete(k.have, overlay)
		}
	}
	k.mu.Unlock()
	if len(gone) == 0 {
		return
	}
	err := p.update(func(s *crypto.State) error {
		for _, overlay := range gone {
			delete(s.Files, fileOverlayKey+overlay)
		}
		return nil
	})
	if err != nil {
		p.cfg.Log.Error("cannot forget the keys of overlays that are not granted any more", "err", err)
	}
	p.tellKeys(gone)
}
