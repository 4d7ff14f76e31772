package ipam

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"strings"
)

// Renew begins the node's grace anew, and says what of its claims it has. What
// the store still has under its name though it does not claim it becomes free.
// The same request again begins nothing anew.
func (r *Registry) Renew(ctx context.Context, node string, q RenewRequest) (RenewAnswer, error) {
	if err := checkNames(node); err != nil {
		return RenewAnswer{}, err
	}
	names := make([]string, 0, len(q.Claims))
	for _, c := range q.Claims {
		if err := checkNames(c.Overlay); err != nil {
			return RenewAnswer{}, err
		}
		if len(c.Blocks) > MaxBlocks || len(c.Fixed) > MaxFixed {
			return RenewAnswer{}, fmt.Errorf("ipam: node %s claims more of overlay %s than one can have", node, c.Overlay)
		}
		names = append(names, c.Overlay)
	}
	slices.Sort(names)
	names = slices.Compact(names)
	if len(names) > MaxOverlays {
		return RenewAnswer{}, fmt.Errorf("ipam: node %s claims addresses in more than %d overlays", node, MaxOverlays)
	}
	var out RenewAnswer
	err := r.update(ctx, node, names, true, func(e *edit) error {
		out = RenewAnswer{GraceSeconds: r.cfg.Grace.Seconds()}
		if l := e.renewal.find(q.State); l != nil && (l.Removed || q.Number < l.Number) {
			out.Refused, out.Reason = true, "the node was removed from the cluster"
			if !l.Removed {
				out.Reason = fmt.Sprintf("request %d of a state that has asked %d times already: its file is an old copy", q.Number, l.Number)
			}
			return nil
		}
		l, err := r.state(e, q.Caller)
		if err != nil {
			return err
		}
		if q.Number > l.Number {
			l.Number, l.SilentMS, l.Renewed, l.GraceMS = q.Number, 0, e.now, r.cfg.Grace.Milliseconds()
		}
		e.renewal.makeLast(l)
		for _, name := range sorted(e.books) {
			if err := e.renew(e.books[name], l, q, &out); err != nil {
				return err
			}
		}
		return nil
	})
	return out, err
}

// makeLast: it is the state that the node has; of those that it lost only those
// stay that have something.
func (r *renewalRecord) makeLast(l *lease) {
	r.States = slices.DeleteFunc(r.States, func(o *lease) bool { return o == l || len(o.Overlays) == 0 })
	r.States = append(r.States, l)
}

func sorted(books map[string]*book) []string {
	names := make([]string, 0, len(books))
	for n := range books {
		names = append(names, n)
	}
	slices.SortFunc(names, strings.Compare)
	return names
}

// renew answers the claims in one overlay.
func (e *edit) renew(b *book, l *lease, q RenewRequest, out *RenewAnswer) error {
	blocks, fixed := map[netip.Prefix]bool{}, map[netip.Addr]bool{}
	endpoints := 0
	for _, c := range q.Claims {
		if c.Overlay != b.name || b.overlay == nil || c.OverlayID != b.overlay.ID {
			continue // of an overlay that is gone, and so is what was in it
		}
		endpoints = max(0, c.Endpoints)
		for _, p := range c.Blocks {
			blocks[p] = true
			if err := e.readmitBlock(b, l, q.Number, p); err != nil {
				return err
			}
		}
		for _, a := range c.Fixed {
			fixed[a] = true
			if err := e.readmitFixed(b, l, q.Number, a); err != nil {
				return err
			}
		}
	}
	for p, h := range b.blocks {
		switch {
		case !h.is(e.node, l.State):
		case blocks[p]:
			out.Blocks = append(out.Blocks, Block{Overlay: b.name, OverlayID: b.overlay.ID, Prefix: p, Holes: b.holes(p, e.node, l.State)})
		case h.Number < q.Number: // taken before this was asked, and not there
			e.deleteBlock(b, p)
		}
	}
	for a, h := range b.fixed {
		switch {
		case !h.is(e.node, l.State):
		case fixed[a] && h.Asked == "":
			out.Fixed = append(out.Fixed, Fixed{Overlay: b.name, OverlayID: b.overlay.ID, Addr: a})
		case h.Number < q.Number:
			e.deleteFixed(b, a)
		}
	}
	return e.settle(b, l, endpoints)
}

// readmitBlock leases a block again that the node claims and nobody has: it was
// reclaimed, or the store was restored from a time before. As it is free, and
// nothing in it is anybody's, nobody else can be using it.
func (e *edit) readmitBlock(b *book, l *lease, number uint64, p netip.Prefix) error {
	subnet, ok := subnetOf(b.overlay, familyOf(p.Addr()))
	if !ok || b.blocks[p] != nil || len(b.blocks) >= MaxBlocks || p != p.Masked() ||
		p.Bits() != BlockBits(subnet) || !subnet.Contains(p.Addr()) || len(b.holes(p, e.node, l.State)) > 0 {
		return nil
	}
	if _, busy := b.busy(p); busy || !e.mayEnter(b, l) {
		return nil
	}
	return e.putBlock(b, p, &holder{Node: e.node, State: l.State, Number: number, Since: e.now})
}

// readmitFixed does the same for a fixed address.
func (e *edit) readmitFixed(b *book, l *lease, number uint64, a netip.Addr) error {
	if b.fixed[a] != nil || len(b.fixed) >= MaxFixed || askable(b.overlay, a) != nil || !e.mayEnter(b, l) {
		return nil
	}
	if _, block := b.at(a); block != nil && !block.is(e.node, l.State) {
		return nil
	}
	return e.putFixed(b, a, &holder{Node: e.node, State: l.State, Number: number, Since: e.now})
}

// mayEnter: the node may have something in the overlay.
func (e *edit) mayEnter(b *book, l *lease) bool {
	_, in := b.nodes[e.node]
	return (in || len(b.nodes) < MaxNodes) && (slices.Contains(l.Overlays, b.name) || e.renewal.room(b.name))
}
