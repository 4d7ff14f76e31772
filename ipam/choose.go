package ipam

import (
	"fmt"
	"net/netip"
	"strings"

	"github.com/tulle-net/tulle/store"
)

// choose returns an address of the family that is free.
func (p *Pool) choose(q *Request, family int, subnet netip.Prefix) (netip.Addr, need, error) {
	for _, a := range q.Want {
		if familyOf(a) != family {
			continue
		}
		if ep := p.s.used[usedKey{q.Overlay.ID, a}]; ep != nil {
			return a, need{}, fmt.Errorf("ipam: %s belongs to endpoint %s of this node: %w: ask for another address", a, ep.Owner, ErrTaken)
		}
		if !p.s.owns(q.Overlay.ID, a) {
			return a, need{fix: a}, nil
		}
		return a, need{}, nil
	}
	if a, ok := p.s.fresh(q.Overlay, subnet); ok {
		return a, need{}, nil
	}
	if a, ok := p.s.again(q.Overlay, subnet); ok {
		return a, need{}, nil
	}
	return netip.Addr{}, need{take: family}, nil
}

// maxFreed: of a block with more released addresses than that they are given
// again before new ones are.
const maxFreed = 1024

// fresh returns an address that nobody has had, of the first block that has one.
func (s *state) fresh(o *store.Overlay, subnet netip.Prefix) (netip.Addr, bool) {
	layout := layoutOf(o)
	for _, k := range s.blocks {
		if k.OverlayID != o.ID || k.Returning || !subnet.Overlaps(k.Prefix) || len(k.Freed) > maxFreed {
			continue
		}
		if k.Layout != layout { // what was skipped may be offered now
			k.Layout, k.Next, k.raw = layout, 0, nil
		}
		for k.Next < sizeOf(k.Prefix) {
			a := plus(k.Prefix.Addr(), k.Next, 0)
			if r, ok := reservedAt(o, a); ok {
				if r.Bits() <= k.Prefix.Bits() {
					k.Next = sizeOf(k.Prefix)
				} else {
					k.Next = offset(k.Prefix, last(r)) + 1
				}
			} else if k.freed[k.Next] || !s.given(o, k, a) {
				k.Next++
			} else {
				return a, true
			}
			k.raw = nil
		}
	}
	return netip.Addr{}, false
}

// given: the block's address can be given to an endpoint that asks for none.
func (s *state) given(o *store.Overlay, k *block, a netip.Addr) bool {
	_, hole := k.Holes[a]
	return !hole && s.used[usedKey{o.ID, a}] == nil && offered(o, a)
}

// again returns the address that was released the longest ago.
func (s *state) again(o *store.Overlay, subnet netip.Prefix) (out netip.Addr, ok bool) {
	var turn uint64
	for _, k := range s.blocks {
		if k.OverlayID != o.ID || k.Returning || !subnet.Overlaps(k.Prefix) {
			continue
		}
		for _, f := range k.Freed {
			if ok && f.Turn > turn {
				break
			}
			if a := plus(k.Prefix.Addr(), f.Offset, 0); s.given(o, k, a) {
				out, ok, turn = a, true, f.Turn
				break
			}
		}
	}
	return out, ok
}

// layoutOf names what of the overlay is not offered.
func layoutOf(o *store.Overlay) string {
	if len(o.Gateways)+len(o.Reserved) == 0 {
		return ""
	}
	var b strings.Builder
	for _, g := range o.Gateways {
		b.WriteString(g.String() + " ")
	}
	for _, r := range o.Reserved {
		b.WriteString(r.String() + " ")
	}
	return b.String()
}
