package node

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	mathrand "math/rand/v2"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/tulle-net/tulle/ether"
	"github.com/tulle-net/tulle/ipam"
	"github.com/tulle-net/tulle/keeper"
	"github.com/tulle-net/tulle/peer"
	"github.com/tulle-net/tulle/store"
	"github.com/tulle-net/tulle/tap"
)

const (
	fileEndpoints   = "endpoints.json"
	fileAddresses   = "addresses.json"
	endpointsSchema = 1 // of the host only
	endpointsNetns  = 2 // and of namespaces
	// ownerHost and the overlay's name is who an address of the host is assigned to;
	// ownerNetns, its name and its key who one of a namespace's endpoint is.
	ownerHost     = "host/"
	ownerNetns    = "netns/"
	maxDeviceName = 15 // IFNAMSIZ less the terminating zero
	defaultIfname = "eth0"
	// keyLen characters of rand.Text tell endpoints of one name apart: 50 bits.
	keyLen = 10
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
	// errDuplicate: an address is somebody's whom the keepers do not know.
	errDuplicate = errors.New("it is another station's")
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

// endpoints are what this node has attached to shared overlays, and the addresses
// that this node has. They are remembered, and made again at the next start.
type endpoints struct {
	n    *Node
	pool *ipam.Pool
	// self is the node's own namespace, or selfErr why that is not known.
	self    tap.Namespace
	selfErr error

	saver saver

	mu      sync.Mutex
	list    []*endpoint          // in the order in which they were made
	claimed map[place]struct{}   // what somebody changes at the moment
	free    sync.Cond            // of mu: one is claimed no more
	avoided map[string]time.Time // owners of addresses that are in use by others, and since when
	lent    []lent               // addresses that have, or may get, an endpoint of an engine's
}

// endpoint is the host itself in an overlay, or a device in a network namespace,
// as it is remembered.
type endpoint struct {
	Overlay string         `json:"overlay"`
	ID      string         `json:"overlay_id"` // of the overlay's definition
	Tap     string         `json:"tap"`
	IPs     []netip.Prefix `json:"ips"`
	MAC     ether.MAC      `json:"mac"`
	Driver  tap.Driver     `json:"driver,omitempty"` // that was asked for

	// Of one in a namespace: what its addresses are assigned to, what it is called,
	// and the namespace, with a path that led to it.
	Key          string        `json:"key,omitempty"`
	Name         string        `json:"name,omitempty"`
	Netns        string        `json:"netns,omitempty"`
	Namespace    tap.Namespace `json:"namespace,omitzero"`
	DefaultRoute bool          `json:"default_route,omitempty"`
	// MayYield: nobody has asked for the default route, which is left out where the
	// namespace has one.
	MayYield  bool      `json:"may_yield,omitempty"`
	Publish   []Publish `json:"publish,omitempty"`
	NoDNS     bool      `json:"no_dns,omitempty"`
	Routes    []Route   `json:"routes,omitempty"`
	Container string    `json:"container,omitempty"`
	Limits    *Limits   `json:"limits,omitempty"`
	Aliases   []string  `json:"aliases,omitempty"` // further names
	// Sandbox: a container engine takes the device to Netns; until then there is no
	// Namespace. Lent are what its addresses are assigned to, if that is not owner.
	Sandbox bool     `json:"sandbox,omitempty"`
	Lent    []string `json:"lent,omitempty"`
	// Resolvers are whom the engine's resolver in the namespace asks (divert.go).
	Resolvers []netip.Addr `json:"resolvers,omitempty"`
	// Services are ports of it that have names.
	Services []Service `json:"services,omitempty"`

	reserved     bool   // its ports of the host are; New's and Run's goroutine's
	fault        string // why its device is not there
	duplicate    string // who else has its address
	publishFault string // why ports of the host do not lead to it
}

// place is where at most one endpoint can be: the host in an overlay, or a
// device's name in a namespace.
type place struct {
	overlay string
	ns      tap.Namespace
	device  string
}

func (e *endpoint) host() bool { return e.Key == "" }

func (e *endpoint) place() place {
	if e.host() {
		return place{overlay: e.Overlay}
	}
	if e.Sandbox {
		return place{device: e.Container}
	}
	return place{ns: e.Namespace, device: e.Tap}
}

// owner is who its addresses are assigned to.
func (e *endpoint) owner() string {
	if e.host() {
		return ownerHost + e.Overlay
	}
	return ownerNetns + e.Name + "/" + e.Key
}

// String is what a log calls it.
func (e *endpoint) String() string {
	if e.host() {
		return "this host"
	}
	return "endpoint " + e.Name
}

type endpointsFile struct {
	Schema    int         `json:"schema"`
	Endpoints []*endpoint `json:"endpoints"`
}

// openEndpoints takes what an earlier run remembered.
func (n *Node) openEndpoints() (*endpoints, error) {
	h := &endpoints{n: n, claimed: map[place]struct{}{}, avoided: map[string]time.Time{}}
	h.free.L = &h.mu
	h.self, h.selfErr = tap.OwnNamespace()
	b, err := os.ReadFile(filepath.Join(n.cfg.StateDir, fileEndpoints))
	switch {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		return nil, fmt.Errorf("node: endpoints: %w", err)
	default:
		if h.list, err = parseEndpoints(b); err != nil {
			return nil, err
		}
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
	h.restoreLent()
	return h, h.release()
}

func parseEndpoints(b []byte) ([]*endpoint, error) {
	var f endpointsFile
	if err := json.Unmarshal(b, &f); err != nil || f.Schema != endpointsSchema && f.Schema != endpointsNetns {
		return nil, fmt.Errorf("node: %s in the state directory cannot be read: it is damaged, or of a later release; move it away to start without this host's endpoints (%v)", fileEndpoints, err)
	}
	return f.Endpoints, nil
}

// encodeEndpoints writes the schema that the oldest release can read: one that
// knows the host only must not take a container's endpoint for the host's.
func encodeEndpoints(list []*endpoint) ([]byte, error) {
	f := endpointsFile{endpointsSchema, list}
	if slices.ContainsFunc(list, func(e *endpoint) bool { return !e.host() }) {
		f.Schema = endpointsNetns
	}
	return json.Marshal(f) // not for eyes: with hundreds of endpoints indenting took most of the time
}

// release gives back addresses of endpoints that are not remembered: the node was
// killed in between.
func (h *endpoints) release() error {
	var errs []error
	for _, owner := range h.pool.Owners() {
		if (strings.HasPrefix(owner, ownerHost) || strings.HasPrefix(owner, ownerNetns)) && h.owned(owner) == nil {
			errs = append(errs, h.pool.Release(owner))
		}
	}
	return errors.Join(errs...)
}

// save remembers the endpoints of now.
func (h *endpoints) save() error {
	return h.saver.save(func() error {
		h.mu.Lock() // an endpoint may yield its default route meanwhile
		b, err := encodeEndpoints(h.list)
		h.mu.Unlock()
		if err != nil {
			return err
		}
		return writeFile(filepath.Join(h.n.cfg.StateDir, fileEndpoints), b)
	})
}

// all returns the endpoints of now.
func (h *endpoints) all() []*endpoint {
	h.mu.Lock()
	defer h.mu.Unlock()
	return slices.Clone(h.list)
}

// at returns the endpoint at a place, or nil.
func (h *endpoints) at(p place) *endpoint {
	return h.first(func(e *endpoint) bool { return e.place() == p })
}

// owned returns the endpoint that an owner of addresses is, or nil.
func (h *endpoints) owned(owner string) *endpoint {
	return h.first(func(e *endpoint) bool { return e.owner() == owner || slices.Contains(e.Lent, owner) })
}

func (h *endpoints) first(is func(*endpoint) bool) *endpoint {
	list := h.all()
	if i := slices.IndexFunc(list, is); i >= 0 {
		return list[i]
	}
	return nil
}

// claim waits until nobody else changes what is at a place; the function that it
// returns lets others. Places do not wait for each other: an endpoint whose
// namespace has ended goes while a keeper is asked for another one's address.
func (h *endpoints) claim(p place) (done func()) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for {
		if _, busy := h.claimed[p]; !busy {
			break
		}
		h.free.Wait()
	}
	h.claimed[p] = struct{}{}
	return func() {
		h.mu.Lock()
		defer h.mu.Unlock()
		delete(h.claimed, p)
		h.free.Broadcast()
	}
}

// yield notes that an endpoint has no default route, for its namespace has another.
func (h *endpoints) yield(e *endpoint) {
	h.mu.Lock()
	e.DefaultRoute, e.MayYield = false, false
	known := slices.Contains(h.list, e)
	h.mu.Unlock()
	if !known {
		return // it is remembered when it is made
	}
	if err := h.save(); err != nil {
		h.n.log.Error("it is not remembered that an endpoint has no default route", "overlay", e.Overlay, "port", e.Name, "err", err)
	}
}

func (h *endpoints) setFault(e *endpoint, err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	text := ""
	if err != nil {
		text = oneLine(err)
	}
	if text != e.fault && text != "" {
		h.n.log.Error(e.String()+" is not in the overlay: "+text, "overlay", e.Overlay)
	}
	e.fault = text
}

// expose makes this host an endpoint of a shared overlay.
func (h *endpoints) expose(ctx context.Context, r ExposeRequest) (*endpoint, error) {
	e := &endpoint{Overlay: r.Overlay, Tap: r.Tap, Driver: r.Driver, Services: r.Services}
	if err := checkServices(r.Services); err != nil {
		return nil, err
	}
	if err := h.n.notRootless(r.Overlay); err != nil {
		return nil, err
	}
	defer h.claim(e.place())()
	def, err := h.n.mayJoin(ctx, r.Overlay)
	if err != nil {
		return nil, err
	}
	if err := within(def, r.IPs); err != nil {
		return nil, err
	}
	if e := h.at(e.place()); e != nil {
		for _, ip := range r.IPs {
			if !slices.ContainsFunc(e.IPs, func(p netip.Prefix) bool { return p.Addr() == ip }) {
				return nil, tellf(errExists, "this host is in overlay %s already, as %s: `tulle unexpose %s` first", def.Name, joinPrefixes(e.IPs), def.Name)
			}
		}
		if r.Tap != "" && r.Tap != e.Tap {
			return nil, tellf(errExists, "this host is in overlay %s already, on %s: `tulle unexpose %s` first", def.Name, e.Tap, def.Name)
		}
		if r.Driver != "" && r.Driver != cmp.Or(e.Driver, tap.DriverAuto) {
			return nil, tellf(errExists, "this host is in overlay %s already, with the driver %s: `tulle unexpose %s` first", def.Name, cmp.Or(e.Driver, tap.DriverAuto), def.Name)
		}
		if len(r.Services) > 0 && !slices.Equal(r.Services, e.Services) {
			return nil, tellf(errExists, "this host is in overlay %s already, with other services: `tulle unexpose %s` first", def.Name, def.Name)
		}
		return e, nil
	}
	e.ID = def.ID
	if e.Tap == "" {
		e.Tap = def.Name[:min(len(def.Name), maxDeviceName)]
	}
	if err := h.n.roomFor(def); err != nil {
		return nil, err
	}
	return e, h.make(ctx, e, def, r.IPs)
}

// within returns an error if an address is in no subnet of the overlay.
func within(def *store.Overlay, ips []netip.Addr) error {
	for _, ip := range ips {
		if def.Within(ip) == (netip.Prefix{}) {
			return bad{fmt.Errorf("%s lies in no subnet of overlay %s, which has %s", ip, def.Name, joinPrefixes(def.Subnets))}
		}
	}
	return nil
}

// make gives an endpoint its addresses and its device, and remembers it. The place
// is claimed.
func (h *endpoints) make(ctx context.Context, e *endpoint, def *store.Overlay, want []netip.Addr) error {
	if err := h.give(ctx, e, def, want); err != nil {
		return err
	}
	h.mu.Lock()
	h.list = append(h.list, e)
	h.mu.Unlock()
	if err := h.save(); err != nil {
		h.forget(e)
		return errors.Join(err, h.n.do(context.WithoutCancel(ctx), func() error { return h.n.leaveShared(e) }), h.pool.Release(e.owner()))
	}
	h.persist(e, true) // now that a restart makes the endpoint again
	return nil
}

// give gives an endpoint its addresses and its device. Those that turn out to be
// somebody else's are avoided, unless they were asked for. After an error nothing is left.
func (h *endpoints) give(ctx context.Context, e *endpoint, def *store.Overlay, want []netip.Addr) error {
	if len(e.Lent) > 0 {
		return h.borrowed(ctx, e, def)
	}
	if err := h.unavoid(); err != nil {
		return err
	}
	ownMAC := e.MAC != 0
	for tried := 1; ; tried++ {
		a, err := h.assign(ctx, ipam.Request{Overlay: def, Owner: e.owner(), Want: want})
		if err != nil {
			return err
		}
		e.IPs = a.Prefixes
		if !ownMAC {
			e.MAC = a.MAC
		}
		switch err = h.settle(ctx, e, def, len(want) > 0); {
		case err == nil:
			return nil
		case !errors.Is(err, errDuplicate) || len(want) > 0 || e.host() || tried == maxDuplicates:
			return errors.Join(err, h.pool.Release(e.owner()))
		}
		h.n.log.Warn("another address is taken: "+oneLine(err), "overlay", e.Overlay, "port", e.Name)
		h.avoid(e)
	}
}

// assign asks again while the keepers' store is busy: a rollout exposes all nodes
// at once, and each needs a block.
func (h *endpoints) assign(ctx context.Context, q ipam.Request) (ipam.Assignment, error) {
	until := time.Now().Add(assignPatience)
	for wait := assignRetryMin; ; wait = min(2*wait, assignRetryMax) {
		a, err := h.pool.Assign(ctx, q)
		if !errors.Is(err, peer.ErrUnavailable) || time.Now().Add(wait).After(until) {
			return a, err
		}
		t := time.NewTimer(wait/2 + mathrand.N(wait))
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
			return a, err
		}
	}
}

func (h *endpoints) forget(e *endpoint) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.list = slices.DeleteFunc(h.list, func(o *endpoint) bool { return o == e })
}

// unexpose takes this host out of a shared overlay.
func (h *endpoints) unexpose(ctx context.Context, overlay string) (*endpoint, error) {
	p := place{overlay: overlay}
	defer h.claim(p)()
	e := h.at(p)
	if e == nil {
		return nil, tellf(errAbsent, "this host is no endpoint of an overlay %.70q: `tulle endpoints` lists them", overlay)
	}
	return e, h.drop(ctx, e)
}

// drop ends an endpoint: forgotten first, so that no restart makes it again
// with an address that is somebody else's by then. Its device does not outlast this
// process from here on. The place is claimed.
func (h *endpoints) drop(ctx context.Context, e *endpoint) error {
	h.persist(e, false)
	err := h.dropEnded(ctx, e)
	if h.at(e.place()) == e {
		h.persist(e, true)
	}
	return err
}

// dropEnded is drop for one whose namespace has ended: its device does, too.
func (h *endpoints) dropEnded(ctx context.Context, e *endpoint) error {
	h.forget(e)
	if err := h.save(); err != nil {
		h.mu.Lock()
		h.list = append(h.list, e)
		h.mu.Unlock()
		return err
	}
	err := h.n.do(context.WithoutCancel(ctx), func() error { return h.n.leaveShared(e) })
	return errors.Join(err, h.pool.Release(e.owner()))
}

// end drops an endpoint, and removes its device also where an earlier run left it and
// it could not be attached to. The place is claimed.
func (h *endpoints) end(ctx context.Context, e *endpoint) error {
	left := h.attachment(e) == nil
	err := h.drop(ctx, e)
	if left && err == nil {
		h.removeLeft(e)
	}
	return err
}

// dropLater drops an endpoint whose overlay is gone, or its namespace; not for Run's goroutine.
func (h *endpoints) dropLater(e *endpoint, ended bool) {
	defer h.claim(e.place())()
	if h.at(e.place()) != e {
		return
	}
	drop := h.end
	if ended {
		drop = h.dropEnded
	}
	if err := drop(context.Background(), e); err != nil && !errors.Is(err, errStopped) {
		h.n.log.Error("cannot forget an endpoint whose overlay or network namespace is gone", "overlay", e.Overlay, "port", e.Tap, "err", err)
	}
}

// lost is told by the pool that an endpoint's address is not this node's any more.
func (h *endpoints) lost(owner string) {
	e := h.owned(owner)
	if e == nil {
		return
	}
	again := "`tulle unexpose` it and expose it again"
	if !e.host() {
		again = "`tulle detach` it and attach it again"
	}
	h.setFault(e, errors.New("its address could not be renewed and may be another node's by now: "+again+" when a keeper answers"))
	go func() { // the pool waits for nobody
		_ = h.n.do(context.Background(), func() error { return h.n.leaveShared(e) })
	}()
}

func (h *endpoints) statusOf(e *endpoint) Endpoint {
	s := Endpoint{
		Name: cmp.Or(e.Name, h.n.cfg.Name), Overlay: e.Overlay, IPs: append([]netip.Prefix{}, e.IPs...), MAC: e.MAC, Node: h.n.cfg.Name, Tap: e.Tap,
		Netns: e.Netns, Driver: e.Driver, Publish: e.Publish, NoDNS: e.NoDNS,
		Routes: e.Routes, Container: e.Container, Limits: e.Limits, Aliases: e.Aliases, Services: e.Services, DNS: h.n.names.statusOf(e),
	}
	if ov := h.n.sharedHere(e.Overlay); ov != nil {
		if d := ov.deviceOf(e); d != nil {
			s.Gateways = d.cfg.Gateways
			if a := d.live.Load(); a != nil {
				s.Up, s.MTU = true, a.dev.MTU()
			}
		}
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	s.DefaultRoute = e.DefaultRoute
	if s.Error = e.duplicate; !s.Up {
		s.Error = e.fault
	}
	s.PublishError = e.publishFault
	if err := h.n.exitFault(e.Overlay); err != nil && len(e.Publish) > 0 && s.PublishError == "" {
		s.PublishError = err.Error()
	}
	return s
}

func joinPrefixes(list []netip.Prefix) string {
	var out []string
	for _, p := range list {
		out = append(out, p.String())
	}
	return strings.Join(out, ", ")
}
