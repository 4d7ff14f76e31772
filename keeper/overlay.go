package keeper

import (
	"context"
	"fmt"
	"math"
	"slices"
	"time"

	"github.com/tulle-net/tulle/crypto"
	"github.com/tulle-net/tulle/peer"
)

// overlayRest is the least time between two changes of an overlay's key.
const overlayRest = time.Second

// overlayKeys answers the keys of those overlays that the asker may join.
func (c *call) overlayKeys(_ context.Context, b *overlayKeysBody) (any, error) {
	if len(b.Overlays) > MaxOverlayKeys {
		return nil, peer.ErrTooLarge
	}
	answer := overlayKeysAnswer{Keys: []overlayKeyJSON{}}
	for _, name := range b.Overlays {
		if err := crypto.CheckName(name); err != nil {
			return nil, invalid("%v", err)
		}
		if !c.asker.allow(name) {
			answer.Denied = append(answer.Denied, name)
			continue
		}
		epoch := c.ledger.epoch(name)
		key := crypto.OverlayKey(c.k.cfg.Root, name, epoch)
		answer.Keys = append(answer.Keys, overlayKeyJSON{name, epoch, slices.Clone(key.Bytes())})
		key.Zero()
	}
	return answer, nil
}

// rotateOverlay begins the overlay's next epoch.
func (c *call) rotateOverlay(ctx context.Context, b *rotateOverlayBody) (any, error) {
	if err := crypto.CheckName(b.Overlay); err != nil {
		return nil, invalid("%v", err)
	}
	var epoch uint32
	err := c.change(ctx, func(l *Ledger, a asker) error {
		// In full: a pattern stands for more names than the ledger has room for.
		if !a.admin() && !(slices.Contains(a.cert.Overlays, b.Overlay) && slices.Contains(a.record.Grants, b.Overlay)) {
			return peer.Errorf(peer.CodeDenied, "%s may not change the key of overlay %s: only keepers, nodes with the grant * and those whose grants name it in full may", a.cert.Name, b.Overlay)
		}
		o, again := l.Overlays[b.Overlay]
		now := c.k.now()
		switch {
		case again && b.Nonce != 0 && o.Nonce == b.Nonce: // the request came twice
			epoch = o.Epoch
			return nil
		case again && now.Before(o.Changed.Add(overlayRest)) && !now.Before(o.Changed):
			return peer.Errorf(peer.CodeBusy, "the key of overlay %s was changed a moment ago: wait %v", b.Overlay, overlayRest)
		case !again && len(l.Overlays) >= MaxOverlays:
			return limit("%d overlays have had their key changed, and there is no room for more", MaxOverlays)
		case o.Epoch == math.MaxUint32:
			return limit("the key of overlay %s cannot be changed any more: make an overlay of another name", b.Overlay)
		}
		o.Epoch, o.Changed, o.Nonce = l.epoch(b.Overlay)+1, now, b.Nonce
		epoch = o.Epoch
		l.Overlays[b.Overlay] = o
		return nil
	})
	if err != nil {
		return nil, err
	}
	c.k.cfg.Log.Info(fmt.Sprintf("keeper: the overlay's key is of epoch %d", epoch), "overlay", b.Overlay, "peer", c.cert.Name)
	ctx, cancel := c.k.detached(ctx)
	defer cancel()
	return Outcome{Epoch: epoch, Unreached: c.k.push(ctx, nil)}, nil
}
