package node

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"slices"
	"sync"

	"github.com/tulle-net/tulle/config"
	"github.com/tulle-net/tulle/crypto"
	"github.com/tulle-net/tulle/ipam"
	"github.com/tulle-net/tulle/store"
	"github.com/tulle-net/tulle/tap"
	"github.com/tulle-net/tulle/underlay"
	"github.com/tulle-net/tulle/vxlan"
)

// The functions in this file put endpoints on overlays and keep them there.

// mayJoin returns the definition of a shared overlay that this node may join.
func (n *Node) mayJoin(ctx context.Context, name string) (*store.Overlay, error) {
	p := n.secure.place
	if err := crypto.CheckName(name); err != nil {
		return nil, bad{err}
	}
	if !p.Identity().Certificate().Overlays.Allow(name) {
		return nil, tellf(errDenied, "this node's certificate does not grant overlay %s: have the node removed (`tulle node rm`) and start it with a token that does (`tulle token create --overlays %s`)", name, name)
	}
	for _, o := range n.list() {
		if o.cfg.Name == name && o.shared == nil {
			return nil, tellf(errExists, "overlay %s is a static one of this node: its settings say the host's address", name)
		}
	}
	def := p.SharedOverlay(name)
	if def == nil { // it may be new
		if err := p.Refresh(ctx); err != nil {
			n.log.Debug("no keeper tells of new overlays", "err", err)
		}
		def = p.SharedOverlay(name)
	}
	if def == nil {
		return nil, tellf(errAbsent, "there is no shared overlay %s: `tulle overlay ls` lists them, `tulle overlay create %s` makes it", name, name)
	}
	return def, nil
}

// roomFor returns an error if this host has routes to the overlay's addresses
// already: one of the two would be out of reach.
func (n *Node) roomFor(def *store.Overlay) error {
	for _, s := range def.Subnets {
		to, dev, err := underlay.Overlap(s, n.exitOf(def.Name)...)
		if err != nil {
			return err
		}
		if to.IsValid() {
			return tellf(errExists, "this host reaches %s by %s, which overlaps %s of overlay %s: take another --subnet for the overlay, or remove that route", to, dev, s, def.Name)
		}
	}
	return nil
}

// settingsOf are those of a shared overlay on this node, with an endpoint's device.
func (n *Node) settingsOf(def *store.Overlay, e *endpoint) (config.Overlay, error) {
	c := n.cfg
	c.Rootless = false // it is no static overlay
	c.Overlays = []config.Overlay{{
		Name: def.Name, VNI: vxlan.VNI(def.VNI), Encryption: def.Encryption, Cipher: def.Cipher, MTU: def.MTU, Flood: def.Flood,
		ClampMSS: def.ClampMSS, Tap: e.Tap, MAC: e.MAC, Driver: e.Driver,
	}}
	setFlooding(&c.Overlays[0], def)
	if err := c.Validate(); err != nil {
		return config.Overlay{}, bad{err}
	}
	return c.Overlays[0], nil
}

// gatewaysOf returns the overlay's gateways that an endpoint's addresses reach.
func gatewaysOf(def *store.Overlay, e *endpoint) (list []netip.Addr, err error) {
	if !e.DefaultRoute {
		return nil, nil
	}
	for _, g := range def.Gateways {
		if slices.ContainsFunc(e.IPs, func(p netip.Prefix) bool { return p.Contains(g) && p.Addr() != g }) {
			list = append(list, g)
		}
	}
	if len(list) == 0 {
		return nil, bad{fmt.Errorf("overlay %s has no gateway that %s reaches: leave --default-route out", def.Name, joinPrefixes(e.IPs))}
	}
	return list, nil
}

// joinShared puts an endpoint on a shared overlay, which this node carries from then on.
// netns leads to its namespace. Called by New and Run's goroutine.
func (n *Node) joinShared(e *endpoint, def *store.Overlay, netns string) error {
	o, err := n.settingsOf(def, e)
	if err != nil {
		return err
	}
	d := &device{cfg: n.tapConfig(o), of: e}
	d.cfg.Netns, d.cfg.Addresses = netns, e.IPs
	d.cfg.NoSolicit = !e.host() // hundreds would ask all the others, again and again
	d.cfg.GSOMaxSize, d.cfg.QueueLen = e.queue()
	if !e.host() {
		d.cfg.Alias = n.aliasOf(def.Name)
	}
	if d.cfg.Gateways, d.cfg.Routes, err = routesOf(def, e); err != nil {
		return err
	}
	ov := n.sharedHere(def.Name)
	if err := n.clash(ov, def, d); err != nil {
		return err
	}
	if err := n.publish(e); err != nil {
		return err
	}
	made := ov == nil
	if made {
		ov = &overlay{cfg: o, shared: def}
		if err := n.addOverlay(ov); err != nil {
			n.unpublish(e)
			return err
		}
	}
	was := ov.live() != nil
	if err := n.attachDevice(ov, d); err != nil {
		n.unpublish(e)
		if made {
			err = errors.Join(err, n.removeOverlay(ov))
		}
		return err
	}
	n.followGateways()
	n.names.follow()
	if was {
		n.followMTU()
	} else {
		n.carriedChanged()
	}
	return n.published(e)
}

// clash says what is in the way of a device, before anything is made.
func (n *Node) clash(ov *overlay, def *store.Overlay, d *device) error {
	if ov != nil && ov.shared.ID != def.ID {
		return fmt.Errorf("overlay %s was removed and made again, and this node is leaving the old one: try again", def.Name)
	}
	for _, other := range n.list() {
		for _, o := range other.list() {
			switch {
			case d.cfg.Netns == "" && o.here(d.cfg.Name):
				return tellf(errExists, "device %s is overlay %s's: give another --tap", d.cfg.Name, other.cfg.Name)
			case other == ov && o.cfg.MAC == d.cfg.MAC:
				return tellf(errExists, "%s has the MAC %s in overlay %s already: give another --mac", o.name(), d.cfg.MAC, def.Name)
			}
		}
	}
	return nil
}

// name is what an error calls a device.
func (d *device) name() string {
	if d.of != nil {
		return d.of.String()
	}
	return "device " + d.cfg.Name
}

// attachDevice makes a new endpoint's device, and checks that it is where it should
// be: the path may have come to lead elsewhere.
func (n *Node) attachDevice(ov *overlay, d *device) error {
	e := d.of
	err := n.addDevice(ov, d)
	if errors.Is(err, fs.ErrExist) && !e.host() && tap.RemoveLeft(d.cfg.Netns, e.Tap, n.aliasPrefix()) == nil {
		err = n.addDevice(ov, d) // an earlier run left it, of which nothing is remembered
	}
	if n.yields(d, err) {
		err = n.addDevice(ov, d)
	}
	if err == nil && !e.host() && !e.Sandbox {
		if ns, at := tap.NamespaceAt(d.cfg.Netns); at != nil || ns != e.Namespace {
			err = errors.Join(tellf(errAbsent, "the network namespace at %s has ended meanwhile", d.cfg.Netns), n.removeDevice(ov, d))
		}
	}
	switch {
	case err == nil:
		return nil
	case errors.Is(err, tap.ErrRouteTaken) && len(d.cfg.Routes) > 0:
		return tellf(errExists, "the namespace has one of the routes already: %v", err)
	case errors.Is(err, tap.ErrRouteTaken) && len(e.Publish) > 0:
		return tellf(errExists, "publish %s: the namespace has a default route already, and would answer through that: remove it there (ip route del default)", e.Publish[0])
	case errors.Is(err, tap.ErrRouteTaken):
		return tellf(errExists, "the namespace has a default route already: remove it there (ip route del default), or leave --default-route out")
	case errors.Is(err, fs.ErrExist) && e.host():
		return tellf(errExists, "there is a device %s already: give another --tap", e.Tap)
	case errors.Is(err, fs.ErrExist):
		return tellf(errExists, "there is a device %s in that namespace already: give another --ifname", e.Tap)
	}
	return err
}

// yields reports whether a device that could not be made may be made without the
// default route that its namespace has already.
func (n *Node) yields(d *device, err error) bool {
	if d.of == nil || !d.of.MayYield || !errors.Is(err, tap.ErrRouteTaken) {
		return false
	}
	n.endpoints.yield(d.of)
	d.cfg.Gateways = nil
	return true
}

// leaveShared ends an endpoint's device, and with the last one that the overlay is
// carried. Called by Run's goroutine.
func (n *Node) leaveShared(e *endpoint) error {
	defer n.unreserve(e)
	ov := n.sharedHere(e.Overlay)
	if ov == nil {
		return nil
	}
	var err error
	was := ov.live() != nil
	if d := ov.deviceOf(e); d != nil {
		err = n.removeDevice(ov, d)
	}
	n.followGateways()
	defer n.names.follow()
	switch {
	case len(ov.list()) == 0:
		err = errors.Join(err, n.removeOverlay(ov))
		n.carriedChanged()
	case was && ov.live() == nil:
		n.carriedChanged()
	}
	return err
}

// carriedChanged tells of other overlays than before, and takes them into account.
func (n *Node) carriedChanged() {
	n.wantKeys()
	n.tellCarried()
	n.sync()
}

// restore makes the endpoints again that an earlier run had. Those whose namespace
// has ended are forgotten. Whatever cannot be made now is tried again by follow.
func (h *endpoints) restore() {
	var ended []*endpoint
	holders := sync.OnceValue(tap.FindHolders)
	for _, e := range h.all() {
		if !e.placed() {
			h.settleIn(e)
		}
		err := h.remake(e, holders)
		if errors.Is(err, errEnded) {
			h.forget(e)
			if e.Sandbox {
				h.removeReturned(e)
			}
			ended = append(ended, e)
			continue
		}
		h.setFault(e, err)
	}
	if len(ended) == 0 {
		return
	}
	err := h.save()
	for _, e := range ended {
		h.n.log.Info("the endpoint's network namespace has ended while the node was away", "overlay", e.Overlay, "port", e.Name)
		err = errors.Join(err, h.pool.Release(e.owner()))
	}
	if err != nil {
		h.n.log.Error("cannot forget endpoints whose network namespace has ended", "err", err)
	}
}

// errEnded: the endpoint's namespace is no more.
var errEnded = errors.New("its network namespace has ended")

// remake makes an endpoint's device, if there is none and there may be one.
func (h *endpoints) remake(e *endpoint, holders func() tap.Holders) error {
	netns := ""
	if !e.host() {
		var there bool
		if netns, there = e.find(holders); !there {
			return errEnded
		}
	}
	def := h.n.secure.place.SharedOverlay(e.Overlay)
	if def == nil {
		return fmt.Errorf("the definition of overlay %s is not known here", e.Overlay)
	}
	if def.ID != e.ID {
		return fmt.Errorf("overlay %s is another one than when %s was put on it: take it off and put it on again", e.Overlay, e)
	}
	if !h.pool.Usable() {
		return ipam.ErrNotUsable
	}
	for _, s := range def.Subnets {
		if !e.host() {
			break // its routes are elsewhere
		}
		if to, dev, err := underlay.Overlap(s, append(h.n.exitOf(e.Overlay), e.Tap)...); err == nil && to.IsValid() {
			return fmt.Errorf("this host reaches %s by %s, which overlaps %s of overlay %s", to, dev, s, e.Overlay)
		}
	}
	if err := h.n.joinShared(e, def, netns); err != nil {
		return err
	}
	h.persist(e, true)
	return nil
}

// follow brings the endpoints in step with the definitions of now. Called by
// Run's goroutine.
func (h *endpoints) follow() {
	if h == nil {
		return
	}
	defer h.n.names.pause()()
	place := h.n.secure.place
	for _, ov := range h.n.list() {
		if ov.shared == nil {
			continue
		}
		switch def := place.SharedOverlay(ov.cfg.Name); {
		case def == nil || def == ov.shared || def.ID != ov.shared.ID:
		case sameFloods(ov.shared, def):
			if err := h.n.adjust(ov, def); err != nil {
				h.n.log.Error("the overlay cannot be here as it is defined now", "overlay", ov.cfg.Name, "err", err)
				if err := h.n.removeOverlay(ov); err != nil {
					h.n.log.Warn("cannot close the overlay's devices", "overlay", ov.cfg.Name, "err", err)
				}
				h.n.carriedChanged()
			}
		default:
			h.n.log.Info("the overlay was changed: its devices are made anew", "overlay", ov.cfg.Name)
			if err := h.n.removeOverlay(ov); err != nil {
				h.n.log.Warn("cannot close the overlay's devices", "overlay", ov.cfg.Name, "err", err)
			}
			h.n.carriedChanged()
		}
	}
	defer h.n.followGateways()
	holders := sync.OnceValue(tap.FindHolders)
	for _, e := range h.all() {
		def := place.SharedOverlay(e.Overlay)
		_, asked := place.Shared()
		if def == nil && !asked.IsZero() || def != nil && def.ID != e.ID {
			h.n.log.Warn("the overlay was removed: "+e.String()+" is in it no more", "overlay", e.Overlay)
			go h.dropLater(e, false)
			continue
		}
		if ov := h.n.sharedHere(e.Overlay); ov != nil && ov.deviceOf(e) != nil {
			_ = h.n.publish(e) // of a known endpoint it notes the error
			continue
		}
		err := h.remake(e, holders)
		if errors.Is(err, errEnded) {
			go h.dropLater(e, true)
			continue
		}
		h.setFault(e, err)
	}
}

// sameFloods reports whether two definitions need the same bridge; the rest can change while it runs.
func sameFloods(a, b *store.Overlay) bool {
	return a.VNI == b.VNI && a.Encryption == b.Encryption && a.Flood == b.Flood
}

// adjust has a shared overlay be as its definition says now, on the devices that it
// has: what flows flows on. Called by Run's goroutine.
func (n *Node) adjust(ov *overlay, def *store.Overlay) error {
	ciphers := ov.ciphers
	if ov.sealed() {
		var err error
		if ciphers, err = crypto.OfferCiphers(def.Cipher); err != nil {
			return err
		}
	}
	next := n.replace(ov, func(next *overlay) {
		next.shared, next.ciphers = def, ciphers
		next.cfg.MTU, next.cfg.ClampMSS, next.cfg.Cipher = def.MTU, def.ClampMSS, def.Cipher
		setFlooding(&next.cfg, def)
	})
	next.br.SetClampMSS(def.ClampMSS)
	next.adjustFlooding()
	switch {
	case next.cfg.Cipher != ov.cfg.Cipher:
		n.secure.sessions.Rekeyed(def.Name) // new ones, while the old ones go on
	case next.cfg.MTU == ov.cfg.MTU && next.cfg.ClampMSS == ov.cfg.ClampMSS:
		return nil
	}
	if _, err := n.fitMTU(next.cfg); err != nil {
		n.log.Warn("the overlay has a smaller MTU here than it should", "overlay", def.Name, "err", err)
	}
	n.followMTU()
	n.log.Info("the overlay was changed", "overlay", def.Name)
	return nil
}
