package ipam

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"github.com/tulle-net/tulle/store"
)

// LeasedBlock is a block as the store has it.
type LeasedBlock struct {
	Prefix netip.Prefix `json:"prefix"`
	Node   string       `json:"node"`
	State  string       `json:"state"`
	Since  time.Time    `json:"since"`
	// Renewed is when the node last renewed it, by a keeper's clock.
	Renewed time.Time `json:"renewed,omitzero"`
	// Former: the node has lost the state that leased it, or was removed; it is
	// free again when its grace is over.
	Former bool `json:"former,omitempty"`
}

// FixedAddress is a fixed address as the store has it.
type FixedAddress struct {
	Addr  netip.Addr `json:"addr"`
	Node  string     `json:"node"`
	State string     `json:"state"`
	Since time.Time  `json:"since"`
	// Asked: whose block it is in has not given it up yet.
	Asked bool `json:"asked,omitempty"`
}

// Listing is what is leased of an overlay, in order of addresses.
type Listing struct {
	Overlay string         `json:"overlay"`
	Blocks  []LeasedBlock  `json:"blocks"`
	Fixed   []FixedAddress `json:"fixed"`
	// Endpoints is how many each node has, as it last said.
	Endpoints map[string]int `json:"endpoints"`
}

// Blocks returns what is leased of the overlay.
func (r *Registry) Blocks(ctx context.Context, overlay string) (Listing, error) {
	if err := checkNames(overlay); err != nil {
		return Listing{}, err
	}
	var out Listing
	err := r.cfg.Store.View(ctx, func(t store.Reader) error {
		out = Listing{Overlay: overlay, Endpoints: map[string]int{}}
		b, err := readBook(t, overlay)
		if err != nil {
			return err
		}
		leases := map[string]*renewalRecord{}
		for p, h := range b.blocks {
			rec, ok := leases[h.Node]
			if !ok {
				value, err := t.Get(renewalKey(h.Node))
				if err != nil {
					return err
				}
				if rec, err = parseRenewal(renewalKey(h.Node), value); err != nil {
					return err
				}
				leases[h.Node] = rec
			}
			l := LeasedBlock{Prefix: p, Node: h.Node, State: h.State, Since: h.Since, Former: true}
			if s := rec.find(h.State); s != nil {
				l.Renewed, l.Former = s.Renewed, s.Removed || s != rec.States[len(rec.States)-1]
			}
			out.Blocks = append(out.Blocks, l)
		}
		for a, h := range b.fixed {
			out.Fixed = append(out.Fixed, FixedAddress{Addr: a, Node: h.Node, State: h.State, Since: h.Since, Asked: h.Asked != ""})
		}
		for node, n := range b.nodes {
			out.Endpoints[node] = n.Endpoints
		}
		return nil
	})
	slices.SortFunc(out.Blocks, func(a, b LeasedBlock) int { return a.Prefix.Compare(b.Prefix) })
	slices.SortFunc(out.Fixed, func(a, b FixedAddress) int { return a.Addr.Compare(b.Addr) })
	return out, err
}

// InUse returns the nodes that have endpoints in the overlay, or a block from
// which they may give an address at any moment, without asking.
func InUse(t store.Reader, overlay string) ([]string, error) {
	var out []string
	err := each(t, ipamKey(overlay, "node"), func(_, node string, _ []byte) error {
		out = append(out, node)
		return nil
	})
	return out, err
}

// InUse is InUse in a state of its own.
func (r *Registry) InUse(ctx context.Context, overlay string) ([]string, error) {
	if err := checkNames(overlay); err != nil {
		return nil, err
	}
	var out []string
	err := r.cfg.Store.View(ctx, func(t store.Reader) (err error) {
		out, err = InUse(t, overlay)
		return err
	})
	return out, err
}

// DropOverlay deletes all that is leased of the overlay, in the transaction that
// deletes its definition: its domain is the definition's. Nodes give up what they
// have there when they next renew.
func DropOverlay(t store.Txn, overlay string) error {
	items, err := t.List(store.KindIPAM + "/" + overlay + "/")
	if err != nil {
		return fmt.Errorf("ipam: overlay %s: %w", overlay, err)
	}
	for _, i := range items {
		t.Delete(i.Key)
	}
	return nil
}
