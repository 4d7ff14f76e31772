package node

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"net/netip"
	"slices"
	"strconv"
	"time"

	"github.com/tulle-net/tulle/crypto"
	"github.com/tulle-net/tulle/discovery"
	"github.com/tulle-net/tulle/keeper"
	"github.com/tulle-net/tulle/store"
	"github.com/tulle-net/tulle/underlay"
	"github.com/tulle-net/tulle/vxlan"
)

// staleAfter is how old what the keepers told may be before it is called stale:
// they are asked every five minutes.
const staleAfter = 6 * time.Minute

// The functions in this file answer the local API about shared overlays.

// read reads a request's body.
func read[T any](w http.ResponseWriter, r *http.Request) (*T, error) {
	v := new(T)
	d := json.NewDecoder(http.MaxBytesReader(w, r.Body, maxBody))
	d.DisallowUnknownFields()
	if err := d.Decode(v); err != nil {
		return nil, bad{fmt.Errorf("the request: %w", err)}
	}
	return v, nil
}

func (n *Node) listShared(w http.ResponseWriter, _ *http.Request) {
	out := SharedOverlays{Overlays: []SharedOverlay{}}
	if n.secure != nil {
		defs, asked := n.secure.place.Shared()
		for _, d := range defs {
			out.Overlays = append(out.Overlays, n.sharedOf(d))
		}
		if time.Since(asked) > staleAfter {
			out.Stale = asked
			if asked.IsZero() {
				out.Stale = n.started
			}
		}
	}
	for _, o := range n.list() {
		if o.shared == nil {
			out.Overlays = append(out.Overlays, staticOf(o))
		}
	}
	slices.SortStableFunc(out.Overlays, func(a, b SharedOverlay) int { return int(a.VNI) - int(b.VNI) })
	reply(w, http.StatusOK, out)
}

func (n *Node) sharedOf(d *store.Overlay) SharedOverlay {
	s := SharedOverlay{
		Name: d.Name, VNI: vxlan.VNI(d.VNI), Subnets: d.Subnets, Gateways: append([]netip.Addr{}, d.Gateways...),
		Reserved: append([]netip.Prefix{}, d.Reserved...), Encryption: d.Encryption, Cipher: d.Cipher, MTU: d.MTU, Flood: d.Flood,
		ClampMSS: d.ClampMSS, Gateway: d.Gateway, Shared: true, Created: d.Created, By: d.By, Records: d.Records,
	}
	showFlooding(&s, floodingOf(d))
	for _, o := range n.list() {
		s.Joined = s.Joined || o.cfg.Name == d.Name && o.shared != nil
	}
	return s
}

func staticOf(o *overlay) SharedOverlay {
	s := SharedOverlay{
		Name: o.cfg.Name, VNI: o.cfg.VNI, Subnets: o.subnets(), Gateways: []netip.Addr{}, Reserved: []netip.Prefix{},
		Encryption: o.cfg.Encryption, Cipher: o.cfg.Cipher, MTU: o.cfg.MTU, Flood: o.cfg.Flood, ClampMSS: o.cfg.ClampMSS, Gateway: o.cfg.Gateway, Joined: true,
	}
	showFlooding(&s, o.cfg)
	return s
}

func (n *Node) createShared(w http.ResponseWriter, r *http.Request) {
	n.admin(w, r, func(ctx context.Context, c keeper.Client) (any, error) {
		want, err := read[OverlayRequest](w, r)
		if err != nil {
			return nil, err
		}
		if err := crypto.CheckName(want.Name); err != nil {
			return nil, bad{err}
		}
		if err := n.unused(want); err != nil {
			return nil, err
		}
		if len(want.Subnets) == 0 {
			want.Subnets = n.freeSubnet()
		}
		if want.VNI == 0 {
			want.VNI = n.freeVNI()
		}
		o, unreached, err := c.CreateOverlay(ctx, store.Overlay{
			Name: want.Name, VNI: uint32(want.VNI), Subnets: want.Subnets, Gateways: want.Gateways, Reserved: want.Reserved,
			Encryption: want.Encryption, Cipher: want.Cipher, MTU: want.MTU, Flood: want.Flood, ClampMSS: want.ClampMSS,
			Gateway: want.Gateway, UnknownUnicast: want.UnknownUnicast, UnknownMulticast: want.UnknownMulticast, BUMLimit: want.BUMLimit,
		})
		if err != nil {
			return nil, err
		}
		n.pulled(ctx, unreached)
		return n.sharedOf(o), nil
	})
}

// freeSubnet returns the first of the subnets for overlays that ask for none which
// neither another overlay nor a route of this host uses; none: the keeper chooses,
// who does not know this host.
func (n *Node) freeSubnet() []netip.Prefix {
	defs, _ := n.secure.place.Shared()
	for s := range keeper.DefaultSubnets() {
		taken := slices.ContainsFunc(defs, func(d *store.Overlay) bool { return slices.ContainsFunc(d.Subnets, s.Overlaps) })
		if to, _, err := underlay.Overlap(s); !taken && err == nil && !to.IsValid() {
			return []netip.Prefix{s}
		}
	}
	return nil
}

// freeVNI returns the VNI of an overlay that asks for none: 0, so that the keeper
// chooses, unless nodes have static overlays where it would, of which it does not know.
func (n *Node) freeVNI() vxlan.VNI {
	used, static := map[vxlan.VNI]bool{}, false
	defs, _ := n.secure.place.Shared()
	for _, d := range defs {
		used[vxlan.VNI(d.VNI)] = true
	}
	carried := n.carried()
	for _, m := range n.disc.Load().Members() {
		carried = append(carried, m.Overlays...)
	}
	for _, o := range carried {
		if o.VNI >= keeper.FirstVNI && !used[o.VNI] && !n.secure.place.WasShared(o.Name, uint32(o.VNI)) {
			used[o.VNI], static = true, true
		}
	}
	if !static {
		return 0
	}
	for vni := vxlan.VNI(keeper.FirstVNI); vni <= store.MaxVNI; vni++ {
		if !used[vni] {
			return vni
		}
	}
	return 0
}

// pulled has this node know what it has just asked for, and logs who does not know it yet.
func (n *Node) pulled(ctx context.Context, unreached []string) {
	if err := n.secure.place.Refresh(ctx); err != nil {
		n.log.Warn("what was changed is not known here yet", "err", err)
	}
	if len(unreached) > 0 {
		n.log.Info("some nodes do not know of the change yet", "peer", fmt.Sprint(unreached))
	}
}

// unused returns an error if a static overlay of some node, or a route of this
// host, is in the way of a new overlay.
func (n *Node) unused(want *OverlayRequest) error {
	clash := func(node string, o discovery.Overlay) error {
		switch {
		case n.secure.place.WasShared(o.Name, uint32(o.VNI)):
			return nil // the node leaves it
		case o.Name == want.Name && n.secure.place.SharedOverlay(o.Name) == nil:
			return tellf(errExists, "node %s has a static overlay %s: choose another name", node, o.Name)
		case o.VNI == want.VNI && want.VNI != 0 && o.Name != want.Name:
			return tellf(errExists, "node %s uses VNI %d for overlay %s: choose another one, or leave --vni out", node, o.VNI, o.Name)
		}
		return nil
	}
	for _, o := range n.carried() {
		if err := clash(n.cfg.Name, o); err != nil {
			return err
		}
	}
	for _, m := range n.disc.Load().Members() {
		for _, o := range m.Overlays {
			if err := clash(m.Name, o); err != nil {
				return err
			}
		}
	}
	var own []string
	for _, o := range n.list() {
		if d := o.own(); d != nil {
			own = append(own, d.cfg.Name)
		}
		own = append(own, n.exitOf(o.cfg.Name)...)
	}
	for _, s := range want.Subnets {
		if !s.IsValid() {
			continue // the keeper says what is wrong
		}
		to, dev, err := underlay.Overlap(s, own...)
		if err != nil {
			return err
		}
		if to.IsValid() {
			return tellf(errExists, "subnet %s overlaps %s, which this host reaches by %s: take another --subnet", s, to, dev)
		}
	}
	return nil
}

func (n *Node) inspectShared(w http.ResponseWriter, r *http.Request) {
	name := r.PathValue("name")
	for _, o := range n.list() {
		if o.cfg.Name == name && o.shared == nil {
			reply(w, http.StatusOK, staticOf(o))
			return
		}
	}
	n.admin(w, r, func(ctx context.Context, c keeper.Client) (any, error) {
		def := n.secure.place.SharedOverlay(name)
		if def == nil {
			return nil, tellf(errAbsent, "there is no overlay %.70q: `tulle overlay ls` lists them", name)
		}
		s := n.sharedOf(def)
		for _, m := range n.disc.Load().Members() {
			if slices.ContainsFunc(m.Overlays, func(o discovery.Overlay) bool { return o.Name == name }) {
				s.Nodes = append(s.Nodes, m.Name)
			}
		}
		if s.Joined && !slices.Contains(s.Nodes, n.cfg.Name) {
			s.Nodes = append(s.Nodes, n.cfg.Name)
		}
		slices.Sort(s.Nodes)
		return s, nil
	})
}

func (n *Node) setShared(w http.ResponseWriter, r *http.Request) {
	n.admin(w, r, func(ctx context.Context, c keeper.Client) (any, error) {
		want, err := read[OverlayChange](w, r)
		if err != nil {
			return nil, err
		}
		o, unreached, err := c.SetOverlay(ctx, r.PathValue("name"), keeper.OverlayChange{
			Cipher: want.Cipher, MTU: want.MTU, Flood: want.Flood, ClampMSS: want.ClampMSS, Gateway: want.Gateway, Reserved: want.Reserved,
			UnknownUnicast: want.UnknownUnicast, UnknownMulticast: want.UnknownMulticast, BUMLimit: want.BUMLimit,
			AddRecords: want.AddRecords, RemoveRecords: want.RemoveRecords,
		})
		if err != nil {
			return nil, err
		}
		n.pulled(ctx, unreached)
		return n.sharedOf(o), nil
	})
}

func (n *Node) removeShared(w http.ResponseWriter, r *http.Request) {
	n.admin(w, r, func(ctx context.Context, c keeper.Client) (any, error) {
		o, err := c.RemoveOverlay(ctx, r.PathValue("name"), r.FormValue("force") == "true")
		if err != nil {
			return nil, err
		}
		n.pulled(ctx, nil)
		return changeOf(o), nil
	})
}

func (n *Node) expose(w http.ResponseWriter, r *http.Request) {
	n.admin(w, r, func(ctx context.Context, _ keeper.Client) (any, error) {
		want, err := read[ExposeRequest](w, r)
		if err != nil {
			return nil, err
		}
		e, err := n.endpoints.expose(ctx, *want)
		if err != nil {
			return nil, err
		}
		return n.endpoints.statusOf(e), nil
	})
}

func (n *Node) unexpose(w http.ResponseWriter, r *http.Request) {
	n.admin(w, r, func(ctx context.Context, _ keeper.Client) (any, error) {
		e, err := n.endpoints.unexpose(ctx, r.PathValue("overlay"))
		if err != nil {
			return nil, err
		}
		return n.endpoints.statusOf(e), nil
	})
}

func (n *Node) attach(w http.ResponseWriter, r *http.Request) {
	n.admin(w, r, func(ctx context.Context, _ keeper.Client) (any, error) {
		want, err := read[AttachRequest](w, r)
		if err != nil {
			return nil, err
		}
		e, err := n.endpoints.attach(ctx, *want)
		if err != nil {
			return nil, err
		}
		return n.endpoints.statusOf(e), nil
	})
}

func (n *Node) detach(w http.ResponseWriter, r *http.Request) {
	n.admin(w, r, func(ctx context.Context, _ keeper.Client) (any, error) {
		want := DetachRequest{Container: r.FormValue("container"), Overlay: r.FormValue("overlay"), Netns: r.FormValue("netns"), Ifname: r.FormValue("ifname")}
		if pid := r.FormValue("pid"); pid != "" {
			var err error
			if want.PID, err = strconv.Atoi(pid); err != nil {
				return nil, bad{fmt.Errorf("pid %.20q: want the number of a process", pid)}
			}
		}
		take := n.endpoints.detach
		if want.Container != "" {
			take = n.endpoints.detachAsked
		}
		e, err := take(ctx, want)
		if err != nil {
			return nil, err
		}
		return n.endpoints.statusOf(e), nil
	})
}
