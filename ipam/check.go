package ipam

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/tulle-net/tulle/store"
)

// Kinds of findings.
const (
	// FindUnreadable: a record that this release cannot read.
	FindUnreadable = "unreadable"
	// FindOverlayGone: addresses of an overlay that is not defined. Repair deletes them.
	FindOverlayGone = "overlay_gone"
	// FindLeaked: a lease that nothing will end, as its node's renewal does not
	// list it. Repair has it end when the grace is over.
	FindLeaked = "leaked"
	// FindNodeGone: a lease of a node that is no member. Repair forgets the node.
	FindNodeGone = "node_gone"
	// FindOverlap: two blocks have addresses in common.
	FindOverlap = "overlap"
	// FindOutside: an endpoint has an address that is not leased to its node.
	FindOutside = "outside"
	// FindTwice: two endpoints have one address.
	FindTwice = "twice"
	// FindUnclaimed: a node does not know that it has a lease. Its next renewal ends it.
	FindUnclaimed = "unclaimed"
)

// Finding is something in the cluster's addresses that should not be so.
type Finding struct {
	Kind    string `json:"kind"`
	Overlay string `json:"overlay,omitempty"`
	Node    string `json:"node,omitempty"`
	State   string `json:"state,omitempty"`
	// What is the block or address.
	What string `json:"what,omitempty"`
	// Text says it in a sentence, with what to do.
	Text string `json:"text"`
	// Repairable: Repair ends it, and no address that may be in use becomes free.
	Repairable bool `json:"repairable"`
}

// registryView is what Check reads.
type registryView struct {
	books    map[string]*book
	renewals map[string]*renewalRecord
}

func (r *Registry) view(ctx context.Context) (v registryView, unreadable []Finding, err error) {
	err = r.cfg.Store.View(ctx, func(t store.Reader) error {
		v, unreadable = registryView{books: map[string]*book{}, renewals: map[string]*renewalRecord{}}, nil
		bad := func(overlay, what string, err error) error {
			if !errors.Is(err, errRecord) && !errors.Is(err, store.ErrOverlay) {
				return err
			}
			unreadable = append(unreadable, Finding{Kind: FindUnreadable, Overlay: overlay, What: what, Text: err.Error()})
			return nil
		}
		err := each(t, store.KindIPAM+"/", func(key, rest string, _ []byte) error {
			name, _, _ := strings.Cut(rest, "/")
			if _, seen := v.books[name]; seen {
				return nil
			}
			b, err := readBook(t, name)
			if err != nil {
				b, err = &book{name: name, overlay: &store.Overlay{Name: name}}, bad(name, name, err)
			}
			v.books[name] = b
			return err
		})
		if err != nil {
			return err
		}
		return each(t, renewals, func(key, node string, value []byte) error {
			rec, err := parseRenewal(key, value)
			if err != nil {
				return bad("", key, err)
			}
			v.renewals[node] = rec
			return nil
		})
	})
	return v, unreadable, err
}

// Check compares the store with itself, with what the nodes report (Pool.Status,
// of those that answered), and with who is a member. What is under way right then
// may show as unclaimed or outside; it is gone a minute later.
func (r *Registry) Check(ctx context.Context, reports []Status, member func(node string) bool) ([]Finding, error) {
	v, out, err := r.view(ctx)
	if err != nil {
		return nil, fmt.Errorf("ipam: the store cannot be checked: %w", err)
	}
	byNode := map[string]*Status{}
	for i := range reports {
		byNode[reports[i].Node] = &reports[i]
	}
	for _, b := range v.books {
		if b.overlay == nil {
			out = append(out, Finding{Kind: FindOverlayGone, Overlay: b.name, Repairable: true,
				Text: fmt.Sprintf("overlay %s does not exist, but %d blocks and %d fixed addresses of it do", b.name, len(b.blocks), len(b.fixed))})
			continue
		}
		for p, h := range b.blocks {
			out = append(out, v.checkHolder(b, h, p.String(), member, byNode)...)
			for q, other := range b.blocks {
				if p != q && p.Overlaps(q) && p.Compare(q) < 0 {
					out = append(out, Finding{Kind: FindOverlap, Overlay: b.name, Node: h.Node, What: p.String(),
						Text: fmt.Sprintf("block %s of node %s overlaps block %s of node %s: detach the endpoints of one of them", p, h.Node, q, other.Node)})
				}
			}
		}
		for a, h := range b.fixed {
			if h.Asked == "" {
				out = append(out, v.checkHolder(b, h, a.String(), member, byNode)...)
			}
		}
	}
	out = append(out, v.checkReports(reports)...)
	slices.SortFunc(out, func(a, b Finding) int {
		return cmp.Or(cmp.Compare(a.Kind, b.Kind), cmp.Compare(a.Overlay, b.Overlay), cmp.Compare(a.What, b.What), cmp.Compare(a.Node, b.Node), cmp.Compare(a.Text, b.Text))
	})
	return out, nil
}

// checkHolder: something ends the lease, and its node knows it.
func (v *registryView) checkHolder(b *book, h *holder, what string, member func(string) bool, reports map[string]*Status) []Finding {
	f := Finding{Overlay: b.name, Node: h.Node, State: h.State, What: what}
	var l *lease
	if rec := v.renewals[h.Node]; rec != nil {
		l = rec.find(h.State)
	}
	switch report := reports[h.Node]; {
	case l == nil || !slices.Contains(l.Overlays, b.name):
		f.Kind, f.Repairable = FindLeaked, true
		f.Text = fmt.Sprintf("%s is leased to node %s, and nothing would ever end that: repair it (tulle ipam check --repair)", what, h.Node)
	case !l.Removed && !member(h.Node):
		f.Kind, f.Repairable = FindNodeGone, true
		f.Text = fmt.Sprintf("%s is leased to node %s, which is no member: remove it (tulle node rm %s), or wait for the grace to end", what, h.Node, h.Node)
	case report != nil && report.State == h.State && !report.claims(b, what):
		f.Kind = FindUnclaimed
		f.Text = fmt.Sprintf("%s is leased to node %s, which does not know it: its next renewal ends that", what, h.Node)
	default:
		return nil
	}
	return []Finding{f}
}

func (s *Status) claims(b *book, what string) bool {
	return slices.ContainsFunc(s.Blocks, func(k BlockStatus) bool { return k.OverlayID == b.overlay.ID && k.Prefix.String() == what }) ||
		slices.ContainsFunc(s.Fixed, func(f Fixed) bool { return f.OverlayID == b.overlay.ID && f.Addr.String() == what })
}

// checkReports: each endpoint's address is leased to its node, and only its.
func (v *registryView) checkReports(reports []Status) []Finding {
	var out []Finding
	users := map[usedKey]string{}
	for _, s := range reports {
		if !s.Usable {
			continue // nothing of it is in use
		}
		for _, ep := range s.Endpoints {
			b := v.books[ep.Overlay]
			for _, p := range ep.Prefixes {
				a, me := p.Addr(), fmt.Sprintf("endpoint %s of node %s", ep.Owner, s.Node)
				f := Finding{Overlay: ep.Overlay, Node: s.Node, State: s.State, What: a.String()}
				if b == nil || b.overlay == nil || b.overlay.ID != ep.OverlayID || !b.leased(a, s.Node, s.State) {
					f.Kind, f.Text = FindOutside, fmt.Sprintf("%s has %s, which is not leased to its node: its next renewal takes it away", me, a)
					out = append(out, f)
				}
				if other := users[usedKey{ep.OverlayID, a}]; other != "" {
					f.Kind, f.Text = FindTwice, fmt.Sprintf("%s and %s both have %s: detach one of them", other, me, a)
					out = append(out, f)
				}
				users[usedKey{ep.OverlayID, a}] = me
			}
		}
	}
	return out
}

func (b *book) leased(a netip.Addr, node, state string) bool {
	if h := b.fixed[a]; h != nil && h.Asked == "" {
		return h.is(node, state)
	}
	_, h := b.at(a)
	return h != nil && h.is(node, state)
}

// Repair ends what is repairable of the findings, if it is still so. It returns
// how many.
func (r *Registry) Repair(ctx context.Context, findings []Finding) (repaired int, err error) {
	for _, f := range findings {
		if !f.Repairable {
			continue
		}
		var err error
		switch f.Kind {
		case FindOverlayGone:
			err = r.repairOverlay(ctx, f.Overlay)
		case FindLeaked:
			err = r.repairLeaked(ctx, f)
		case FindNodeGone:
			err = r.Forget(ctx, f.Node, false)
		default:
			continue
		}
		if err != nil {
			return repaired, fmt.Errorf("ipam: repairing %s: %w", cmp.Or(f.What, f.Overlay), err)
		}
		repaired++
	}
	return repaired, nil
}

func (r *Registry) repairOverlay(ctx context.Context, name string) error {
	return r.cfg.Store.Update(ctx, []string{store.Domain(store.OverlayKey(name))}, func(t store.Txn) error {
		def, err := t.Get(store.OverlayKey(name))
		if err != nil || def != nil {
			return err
		}
		return DropOverlay(t, name)
	})
}

// repairLeaked gives the block's state a lease that is not renewed: its node may
// be using it, so it ends with the grace.
func (r *Registry) repairLeaked(ctx context.Context, f Finding) error {
	return r.update(ctx, f.Node, []string{f.Overlay}, false, func(e *edit) error {
		b, l := e.books[f.Overlay], e.renewal.find(f.State)
		if l == nil {
			if !b.has(f.Node, f.State) {
				return nil
			}
			l = &lease{State: f.State, Renewed: e.now, GraceMS: r.cfg.Grace.Milliseconds(), Removed: true}
			e.renewal.States = slices.Insert(e.renewal.States, 0, l)
		}
		return e.settle(b, l, -1)
	})
}
