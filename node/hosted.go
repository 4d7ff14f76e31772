package node

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/tulle-net/tulle/config"
	"github.com/tulle-net/tulle/crypto"
	"github.com/tulle-net/tulle/ether"
	"github.com/tulle-net/tulle/ipam"
	"github.com/tulle-net/tulle/keeper"
	"github.com/tulle-net/tulle/peer"
	"github.com/tulle-net/tulle/store"
	"github.com/tulle-net/tulle/underlay"
	"github.com/tulle-net/tulle/vxlan"
)

const (
	fileEndpoints   = "endpoints.json"
	fileAddresses   = "addresses.json"
	endpointsSchema = 1
	// ownerHost and the overlay's name is who an address of the host is assigned to.
	ownerHost     = "host/"
	maxDeviceName = 15 // IFNAMSIZ less the terminating zero
	// assignPatience is how long an address is asked for of keepers whose store is
	// busy; the pauses grow from assignRetryMin to assignRetryMax.
	assignPatience = 15 * time.Second
	assignRetryMin = 100 * time.Millisecond
	assignRetryMax = time.Second
)

var (
	errExists = errors.New("it is there already")
	errAbsent = errors.New("there is none")
	errDenied = errors.New("not granted")
)

// told is an error with a text for who asked, and a kind that statusOf knows.
type told struct {
	kind error
	text string
}

func (t told) Error() string        { return t.text }
func (t told) Is(target error) bool { return target == t.kind }

func tellf(kind error, format string, a ...any) error {
	return told{kind, fmt.Sprintf(format, a...)}
}

// hosted are this host's endpoints in shared overlays, and the addresses that
// this node has. They are remembered, and made again at the next start.
type hosted struct {
	n    *Node
	pool *ipam.Pool

	changing sync.Mutex // one expose or unexpose at a time

	mu   sync.Mutex
	list []*hostEndpoint // in the order in which they were made
}

// hostEndpoint is one, as it is remembered.
type hostEndpoint struct {
	Overlay string         `json:"overlay"`
	ID      string         `json:"overlay_id"` // of the overlay's definition
	Tap     string         `json:"tap"`
	IPs     []netip.Prefix `json:"ips"`
	MAC     ether.MAC      `json:"mac"`

	fault string // why its device is not there
}

type endpointsFile struct {
	Schema    int             `json:"schema"`
	Endpoints []*hostEndpoint `json:"endpoints"`
}

// openHosted takes what an earlier run remembered.
func (n *Node) openHosted() (*hosted, error) {
	h := &hosted{n: n}
	b, err := os.ReadFile(filepath.Join(n.cfg.StateDir, fileEndpoints))
	switch {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		return nil, fmt.Errorf("node: endpoints: %w", err)
	default:
		var f endpointsFile
		if err := json.Unmarshal(b, &f); err != nil || f.Schema != endpointsSchema {
			return nil, fmt.Errorf("node: %s in the state directory cannot be read: it is damaged, or of a later release; move it away to start without this host's endpoints (%v)", fileEndpoints, err)
		}
		h.list = f.Endpoints
	}
	clock, err := ipam.SystemClock()
	if err != nil {
		return nil, err
	}
	file := filepath.Join(n.cfg.StateDir, fileAddresses)
	h.pool, err = ipam.NewPool(ipam.PoolConfig{
		Node: n.cfg.Name, Source: keeper.Addresses{Client: n.secure.place.Client}, Clock: clock, Log: n.log,
		Load: func() ([]byte, error) {
			b, err := os.ReadFile(file)
			if errors.Is(err, fs.ErrNotExist) {
				return nil, nil
			}
			return b, err
		},
		Save: func(b []byte) error { return writeFile(file, b) },
		Lost: h.lost, Back: func(string) { ring(n.redefined) },
	})
	if err != nil {
		return nil, err
	}
	return h, h.release()
}

// release gives back addresses of endpoints that are not remembered: the node was
// killed in between.
func (h *hosted) release() error {
	var errs []error
	for _, owner := range h.pool.Owners() {
		if overlay, is := strings.CutPrefix(owner, ownerHost); is && h.of(overlay) == nil {
			errs = append(errs, h.pool.Release(owner))
		}
	}
	return errors.Join(errs...)
}

// save remembers the endpoints of now. Called with h.changing or by New.
func (h *hosted) save() error {
	h.mu.Lock()
	f := endpointsFile{endpointsSchema, slices.Clone(h.list)}
	h.mu.Unlock()
	b, err := json.MarshalIndent(f, "", "  ")
	if err != nil {
		return err
	}
	return writeFile(filepath.Join(h.n.cfg.StateDir, fileEndpoints), b)
}

func (h *hosted) of(overlay string) *hostEndpoint {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, e := range h.list {
		if e.Overlay == overlay {
			return e
		}
	}
	return nil
}

func (h *hosted) setFault(e *hostEndpoint, err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	text := ""
	if err != nil {
		text = oneLine(err)
	}
	if text != e.fault && text != "" {
		h.n.log.Error("this host is not in the overlay: "+text, "overlay", e.Overlay)
	}
	e.fault = text
}

// expose makes this host an endpoint of a shared overlay.
func (h *hosted) expose(ctx context.Context, r ExposeRequest) (*hostEndpoint, error) {
	h.changing.Lock()
	defer h.changing.Unlock()
	def, err := h.n.mayJoin(ctx, r.Overlay)
	if err != nil {
		return nil, err
	}
	for _, ip := range r.IPs {
		if def.Within(ip) == (netip.Prefix{}) {
			return nil, bad{fmt.Errorf("%s lies in no subnet of overlay %s, which has %s", ip, def.Name, joinPrefixes(def.Subnets))}
		}
	}
	if e := h.of(def.Name); e != nil {
		for _, ip := range r.IPs {
			if !slices.ContainsFunc(e.IPs, func(p netip.Prefix) bool { return p.Addr() == ip }) {
				return nil, tellf(errExists, "this host is in overlay %s already, as %s: `tulle unexpose %s` first", def.Name, joinPrefixes(e.IPs), def.Name)
			}
		}
		if r.Tap != "" && r.Tap != e.Tap {
			return nil, tellf(errExists, "this host is in overlay %s already, on %s: `tulle unexpose %s` first", def.Name, e.Tap, def.Name)
		}
		return e, nil
	}
	e := &hostEndpoint{Overlay: def.Name, ID: def.ID, Tap: r.Tap}
	if e.Tap == "" {
		e.Tap = def.Name[:min(len(def.Name), maxDeviceName)]
	}
	if err := h.n.roomFor(def); err != nil {
		return nil, err
	}
	owner := ownerHost + def.Name
	a, err := h.assign(ctx, ipam.Request{Overlay: def, Owner: owner, Want: r.IPs})
	if err != nil {
		return nil, err
	}
	e.IPs, e.MAC = a.Prefixes, a.MAC
	err = h.n.do(ctx, func() error { return h.n.joinShared(e, def) })
	if err != nil {
		return nil, errors.Join(err, h.pool.Release(owner))
	}
	h.mu.Lock()
	h.list = append(h.list, e)
	h.mu.Unlock()
	if err := h.save(); err != nil {
		h.forget(e)
		return nil, errors.Join(err, h.n.do(context.WithoutCancel(ctx), func() error { return h.n.leaveShared(def.Name) }), h.pool.Release(owner))
	}
	return e, nil
}

// assign asks again while the keepers' store is busy: a rollout exposes all nodes
// at once, and each needs a block.
func (h *hosted) assign(ctx context.Context, q ipam.Request) (ipam.Assignment, error) {
	until := time.Now().Add(assignPatience)
	for wait := assignRetryMin; ; wait = min(2*wait, assignRetryMax) {
		a, err := h.pool.Assign(ctx, q)
		if !errors.Is(err, peer.ErrUnavailable) || time.Now().Add(wait).After(until) {
			return a, err
		}
		t := time.NewTimer(wait/2 + rand.N(wait))
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
			return a, err
		}
	}
}

func (h *hosted) forget(e *hostEndpoint) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.list = slices.DeleteFunc(h.list, func(o *hostEndpoint) bool { return o == e })
}

// unexpose takes this host out of a shared overlay.
func (h *hosted) unexpose(ctx context.Context, overlay string) (*hostEndpoint, error) {
	h.changing.Lock()
	defer h.changing.Unlock()
	e := h.of(overlay)
	if e == nil {
		return nil, tellf(errAbsent, "this host is no endpoint of an overlay %.70q: `tulle endpoints` lists them", overlay)
	}
	return e, h.drop(ctx, e)
}

// drop ends an endpoint: forgotten first, so that no restart makes it again
// with an address that is somebody else's by then.
func (h *hosted) drop(ctx context.Context, e *hostEndpoint) error {
	h.forget(e)
	if err := h.save(); err != nil {
		h.mu.Lock()
		h.list = append(h.list, e)
		h.mu.Unlock()
		return err
	}
	err := h.n.do(context.WithoutCancel(ctx), func() error { return h.n.leaveShared(e.Overlay) })
	return errors.Join(err, h.pool.Release(ownerHost+e.Overlay))
}

// lost is told by the pool that an endpoint's address is not this node's any more.
func (h *hosted) lost(owner string) {
	overlay, ok := strings.CutPrefix(owner, ownerHost)
	if !ok {
		return
	}
	e := h.of(overlay)
	if e == nil {
		return
	}
	h.setFault(e, errors.New("its address could not be renewed and may be another node's by now: `tulle unexpose` it and expose it again when a keeper answers"))
	go func() { // the pool waits for nobody
		_ = h.n.do(context.Background(), func() error { return h.n.leaveShared(overlay) })
	}()
}

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
		to, dev, err := underlay.Overlap(s)
		if err != nil {
			return err
		}
		if to.IsValid() {
			return tellf(errExists, "this host reaches %s by %s, which overlaps %s of overlay %s: take another --subnet for the overlay, or remove that route", to, dev, s, def.Name)
		}
	}
	return nil
}

// joinShared makes this node carry a shared overlay. Called by New and Run's goroutine.
func (n *Node) joinShared(e *hostEndpoint, def *store.Overlay) error {
	o := config.Overlay{
		Name: def.Name, VNI: vxlan.VNI(def.VNI), Encryption: def.Encryption, Cipher: def.Cipher, MTU: def.MTU, Flood: def.Flood,
		ClampMSS: def.ClampMSS, Tap: e.Tap, MAC: e.MAC,
	}
	c := n.cfg
	c.Overlays = []config.Overlay{o}
	if err := c.Validate(); err != nil {
		return bad{err}
	}
	for _, other := range n.list() {
		if other.cfg.Tap == e.Tap {
			return tellf(errExists, "device %s is overlay %s's: give another --tap", e.Tap, other.cfg.Name)
		}
	}
	ov := &overlay{cfg: c.Overlays[0], addrs: e.IPs, shared: def}
	if err := n.addOverlay(ov); err != nil {
		if errors.Is(err, fs.ErrExist) {
			return tellf(errExists, "there is a device %s already: give another --tap", e.Tap)
		}
		return err
	}
	n.carriedChanged()
	return nil
}

// leaveShared ends it. Called by Run's goroutine.
func (n *Node) leaveShared(name string) error {
	for _, o := range n.list() {
		if o.cfg.Name == name && o.shared != nil {
			err := n.removeOverlay(o)
			n.carriedChanged()
			return err
		}
	}
	return nil
}

// carriedChanged tells of other overlays than before, and takes them into account.
func (n *Node) carriedChanged() {
	n.wantKeys()
	n.tellCarried()
	n.sync()
}

// restore makes the endpoints again that an earlier run had. Whatever cannot be
// made now is tried again by mend.
func (h *hosted) restore() {
	h.mu.Lock()
	list := slices.Clone(h.list)
	h.mu.Unlock()
	for _, e := range list {
		h.setFault(e, h.remake(e))
	}
}

// remake makes an endpoint's device, if there is none and there may be one.
func (h *hosted) remake(e *hostEndpoint) error {
	def := h.n.secure.place.SharedOverlay(e.Overlay)
	if def == nil {
		return fmt.Errorf("the definition of overlay %s is not known here", e.Overlay)
	}
	if def.ID != e.ID {
		return fmt.Errorf("overlay %s is another one than when this host was exposed in it: `tulle unexpose %s` and expose it again", e.Overlay, e.Overlay)
	}
	if !h.pool.Usable() {
		return ipam.ErrNotUsable
	}
	for _, s := range def.Subnets {
		if to, dev, err := underlay.Overlap(s, e.Tap); err == nil && to.IsValid() {
			return fmt.Errorf("this host reaches %s by %s, which overlaps %s of overlay %s", to, dev, s, e.Overlay)
		}
	}
	return h.n.joinShared(e, def)
}

// follow brings the endpoints in step with the definitions of now. Called by
// Run's goroutine.
func (h *hosted) follow() {
	if h == nil {
		return
	}
	h.mu.Lock()
	list := slices.Clone(h.list)
	h.mu.Unlock()
	for _, e := range list {
		var ov *overlay
		for _, o := range h.n.list() {
			if o.cfg.Name == e.Overlay && o.shared != nil {
				ov = o
			}
		}
		def := h.n.secure.place.SharedOverlay(e.Overlay)
		_, asked := h.n.secure.place.Shared()
		switch {
		case ov == nil && def == nil && !asked.IsZero(), def != nil && def.ID != e.ID:
			h.n.log.Warn("the overlay was removed: this host is in it no more", "overlay", e.Overlay)
			go h.dropRemoved(e)
		case ov == nil:
			h.setFault(e, h.remake(e))
		case def == nil && !asked.IsZero():
			h.n.log.Warn("the overlay was removed: this host is in it no more", "overlay", e.Overlay)
			go h.dropRemoved(e)
		case def != nil && ov.shared != def && sameFloods(ov.shared, def):
			if err := h.n.adjust(ov, def); err != nil {
				h.setFault(e, errors.Join(err, h.n.leaveShared(e.Overlay)))
			}
		case def != nil && ov.shared != def:
			h.n.log.Info("the overlay was changed: its device is made anew", "overlay", e.Overlay)
			if err := h.n.leaveShared(e.Overlay); err != nil {
				h.n.log.Warn("cannot close the overlay's device", "overlay", e.Overlay, "err", err)
			}
			h.setFault(e, h.remake(e))
		}
	}
}

// dropRemoved drops an endpoint whose overlay is gone.
func (h *hosted) dropRemoved(e *hostEndpoint) {
	h.changing.Lock()
	defer h.changing.Unlock()
	if h.of(e.Overlay) != e {
		return
	}
	if err := h.drop(context.Background(), e); err != nil {
		h.n.log.Error("cannot forget an endpoint of an overlay that was removed", "overlay", e.Overlay, "err", err)
	}
}

// sameFloods reports whether two definitions need the same bridge; the rest can change while it runs.
func sameFloods(a, b *store.Overlay) bool {
	return a.VNI == b.VNI && a.Encryption == b.Encryption && a.Flood == b.Flood
}

// adjust has a shared overlay be as its definition says now, on the device that it
// has: what flows flows on. Called by Run's goroutine.
func (n *Node) adjust(ov *overlay, def *store.Overlay) error {
	next := &overlay{cfg: ov.cfg, addrs: ov.addrs, ciphers: ov.ciphers, shared: def, br: ov.br}
	next.cfg.MTU, next.cfg.ClampMSS, next.cfg.Cipher = def.MTU, def.ClampMSS, def.Cipher
	if next.sealed() {
		var err error
		if next.ciphers, err = crypto.OfferCiphers(def.Cipher); err != nil {
			return err
		}
	}
	next.tap.Store(ov.tap.Load())
	next.br.SetClampMSS(def.ClampMSS)
	list := slices.Clone(n.list())
	list[slices.Index(list, ov)] = next
	n.overlays.Store(&list)
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

func (h *hosted) statusOf(e *hostEndpoint) Endpoint {
	s := Endpoint{Name: h.n.cfg.Name, Overlay: e.Overlay, IPs: append([]netip.Prefix{}, e.IPs...), MAC: e.MAC, Node: h.n.cfg.Name, Tap: e.Tap}
	for _, o := range h.n.list() {
		if o.cfg.Name == e.Overlay && o.shared != nil {
			s.Up = o.tap.Load() != nil
		}
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if !s.Up {
		s.Error = e.fault
	}
	return s
}

// endpoints lists them.
func (n *Node) endpoints() Endpoints {
	out := Endpoints{Endpoints: []Endpoint{}}
	if n.hosted == nil {
		return out
	}
	n.hosted.mu.Lock()
	list := slices.Clone(n.hosted.list)
	n.hosted.mu.Unlock()
	for _, e := range list {
		out.Endpoints = append(out.Endpoints, n.hosted.statusOf(e))
	}
	return out
}

func joinPrefixes(list []netip.Prefix) string {
	var out []string
	for _, p := range list {
		out = append(out, p.String())
	}
	return strings.Join(out, ", ")
}
