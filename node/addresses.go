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
	var q ipam.CedeRequest
	if err := json.Unmarshal(payload, &q); err != nil {
		return nil, peer.ErrMalformed
	}
	if err := n.hosted.pool.Cede(q); err != nil {
		return nil, peer.Errorf(peer.CodeFailed, "%s", oneLine(err))
	}
	return nil, nil
}

// ipam answers `tulle ipam`: what the keepers know, or at least what this node has.
func (n *Node) ipam(w http.ResponseWriter, r *http.Request) {
	n.admin(w, r, func(ctx context.Context, c keeper.Client) (any, error) {
		st := n.hosted.pool.Status()
		out := IPAM{Overlays: []OverlayIPAM{}}
		if len(st.Blocks)+len(st.Fixed) > 0 {
			out.Expires = time.Now().Add(time.Duration(st.LeftSeconds * float64(time.Second))).UTC().Truncate(time.Second)
		}
		used := map[netip.Prefix]int{}
		for _, b := range st.Blocks {
			used[b.Prefix] = b.Used
		}
		defs, _ := n.secure.place.Shared()
		for _, d := range defs {
			o := OverlayIPAM{Overlay: d.Name, Blocks: []IPAMBlock{}, Fixed: []IPAMFixed{}}
			l, err := c.Addresses(ctx, d.Name)
			if err != nil {
				out.Stale = true
				n.own(&o, st)
				out.Overlays = append(out.Overlays, o)
				continue
			}
			for _, b := range l.Blocks {
				count := -1
				if b.Node == n.cfg.Name {
					count = used[b.Prefix]
				}
				o.Blocks = append(o.Blocks, IPAMBlock{Prefix: b.Prefix, Node: b.Node, Used: count, Renewed: b.Renewed})
			}
			for _, f := range l.Fixed {
				o.Fixed = append(o.Fixed, IPAMFixed{Addr: f.Addr, Node: f.Node})
			}
			out.Overlays = append(out.Overlays, o)
		}
		return out, nil
	})
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
