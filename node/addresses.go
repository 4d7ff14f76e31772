package node

import (
	"context"
	"encoding/json"
	"net/http"
	"net/netip"
	"time"

	"github.com/tulle-net/tulle/ipam"
	"github.com/tulle-net/tulle/keeper"
	"github.com/tulle-net/tulle/peer"
)

// ceded answers a keeper that asks for an address of this node's blocks.
func (n *Node) ceded(_ context.Context, from peer.Peer, payload []byte) ([]byte, error) {
	if err := keeper.CheckKeep(from); err != nil {
		return nil, err
	}
	return n.cede(payload)
}

func (n *Node) cede(payload []byte) ([]byte, error) {
	var q ipam.CedeRequest
	if err := json.Unmarshal(payload, &q); err != nil {
		return nil, peer.ErrMalformed
	}
	if err := n.endpoints.pool.Cede(q); err != nil {
		return nil, peer.Errorf(peer.CodeFailed, "%s", oneLine(err))
	}
	return nil, nil
}

// self answers the keeper that is this node.
func (n *Node) self(_ context.Context, k peer.Kind, payload []byte) ([]byte, error) {
	switch k {
	case peer.KindCede:
		return n.cede(payload)
	case peer.KindKeep:
		return n.secure.keeping.orderedSelf(payload)
	case peer.KindReport:
		return json.Marshal(n.endpoints.pool.Status())
	}
	return nil, peer.ErrKind
}

// report answers a keeper that checks all addresses.
func (n *Node) report(_ context.Context, from peer.Peer, _ []byte) ([]byte, error) {
	if err := keeper.CheckKeep(from); err != nil {
		return nil, err
	}
	return json.Marshal(n.endpoints.pool.Status())
}

// checkIPAM answers `tulle ipam check`.
func (n *Node) checkIPAM(w http.ResponseWriter, r *http.Request) {
	n.admin(w, r, func(ctx context.Context, c keeper.Client) (any, error) {
		found, repaired, silent, err := c.CheckAddresses(ctx, r.FormValue("repair") == "true")
		if err != nil {
			return nil, err
		}
		out := IPAMCheck{Findings: []IPAMFinding{}, Silent: silent}
		for _, f := range found {
			out.Findings = append(out.Findings, IPAMFinding{Overlay: f.Overlay, What: f.Text, Repaired: repaired && f.Repairable})
		}
		return out, nil
	})
}

// ipam answers `tulle ipam`: what the keepers know, or at least what this node has.
func (n *Node) ipam(w http.ResponseWriter, r *http.Request) {
	n.admin(w, r, func(ctx context.Context, c keeper.Client) (any, error) {
		st := n.endpoints.pool.Status()
		out := IPAM{Overlays: []OverlayIPAM{}}
		if len(st.Blocks)+len(st.Fixed) > 0 {
			out.Expires = time.Now().Add(time.Duration(st.LeftSeconds * float64(time.Second))).UTC().Truncate(time.Second)
		}
		type key struct {
			overlay string
			prefix  netip.Prefix
		}
		used := map[key]int{}
		for _, b := range st.Blocks {
			used[key{b.Overlay, b.Prefix}] = b.Used
		}
		defs, _ := n.secure.place.Shared()
		for _, d := range defs {
			o := OverlayIPAM{Overlay: d.Name, Blocks: []IPAMBlock{}, Fixed: []IPAMFixed{}}
			var l *ipam.Listing
			if !out.Stale {
				var err error
				l, err = c.Addresses(ctx, d.Name)
				out.Stale = err != nil // and it takes seconds, so once is enough
			}
			if out.Stale {
				n.own(&o, st)
				out.Overlays = append(out.Overlays, o)
				continue
			}
			for _, b := range l.Blocks {
				count := -1
				if b.Node == n.cfg.Name {
					count = used[key{d.Name, b.Prefix}]
				}
				o.Blocks = append(o.Blocks, IPAMBlock{Prefix: b.Prefix, Node: b.Node, Used: count, Renewed: b.Renewed})
			}
			for _, f := range l.Fixed {
				o.Fixed = append(o.Fixed, IPAMFixed{Addr: f.Addr, Node: f.Node})
			}
			out.Overlays = append(out.Overlays, o)
		}
		if !out.Stale && len(defs) > 0 {
			out.Leaks = leaks(ctx, c)
		}
		return out, nil
	})
}

// leaks says what of a check is about leases that nobody uses.
func leaks(ctx context.Context, c keeper.Client) (out []string) {
	found, _, _, err := c.CheckAddresses(ctx, false)
	if err != nil {
		return nil // most likely this node is none that may ask
	}
	for _, f := range found {
		switch f.Kind {
		case ipam.FindLeaked, ipam.FindNodeGone, ipam.FindOverlayGone:
			out = append(out, f.Text)
		}
	}
	return out
}

// own lists what this node itself has in an overlay.
func (n *Node) own(o *OverlayIPAM, st ipam.Status) {
	for _, b := range st.Blocks {
		if b.Overlay == o.Overlay {
			o.Blocks = append(o.Blocks, IPAMBlock{Prefix: b.Prefix, Node: n.cfg.Name, Used: b.Used})
		}
	}
	for _, f := range st.Fixed {
		if f.Overlay == o.Overlay {
			o.Fixed = append(o.Fixed, IPAMFixed{Addr: f.Addr, Node: n.cfg.Name})
		}
	}
}
