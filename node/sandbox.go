package node

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"path/filepath"
	"slices"
	"time"

	"github.com/tulle-net/tulle/crypto"
	"github.com/tulle-net/tulle/ether"
	"github.com/tulle-net/tulle/keeper"
	"github.com/tulle-net/tulle/store"
	"github.com/tulle-net/tulle/tap"
)

// The functions in this file are about devices that a container engine takes into a
// sandbox: a network namespace that it makes, and moves the device to, after the node
// has made the device here. The engine gives the device its name, addresses and routes.
//
//	attachSandbox   the device is here, down, under a name that only it has
//	followSandboxes it is in the sandbox: from here on it is as any other endpoint
//
// Until then the endpoint has no Namespace, and its place is who asked for it.

const (
	// sandboxPrefix starts a device's name until the engine has named it.
	sandboxPrefix = "tulle"
	// placePatience is how long an engine may take to move a device.
	placePatience = 2 * time.Minute
	maxAliases    = 32
)

// whereabouts is a device that tells where it is.
type whereabouts interface {
	Whereabouts() (ns tap.Namespace, name string, up bool, err error)
}

// placed reports whether an endpoint's device is where it belongs.
func (e *endpoint) placed() bool { return !e.Sandbox || e.Namespace != (tap.Namespace{}) }

// attachSandbox makes a device for an engine to take.
func (h *endpoints) attachSandbox(ctx context.Context, r AttachRequest) (*endpoint, error) {
	e := &endpoint{
		Overlay: r.Overlay, Tap: sandboxPrefix + newKey()[:maxDeviceName-len(sandboxPrefix)-1], MAC: r.MAC, Key: newKey(), Name: r.Name, Aliases: r.Aliases,
		DefaultRoute: r.DefaultRoute, NoDNS: r.NoDNS, Container: r.Container, Sandbox: true, Netns: filepath.Clean(r.Sandbox),
	}
	switch {
	case r.Netns != "" || r.PID != 0 || r.Ifname != "" || len(r.Routes) > 0 || r.Limits != nil || r.Driver != "":
		return nil, bad{errors.New("a device for a sandbox has no netns, pid, ifname, routes, limits or driver: who takes it there sees to them")}
	case !filepath.IsAbs(r.Sandbox):
		return nil, bad{fmt.Errorf("sandbox %q: want its path from the root", r.Sandbox)}
	case r.Container == "":
		return nil, bad{errors.New("want container: who asks for the device")}
	case h.selfErr != nil:
		return nil, h.selfErr
	}
	if err := checkExtras(r); err != nil {
		return nil, err
	}
	def, err := h.allowed(ctx, e, r)
	if err != nil {
		return nil, err
	}
	defer h.claim(e.place())()
	if other := h.at(e.place()); other != nil {
		return nil, tellf(errExists, "%s is attached to overlay %s already: detach it first", r.Container, other.Overlay)
	}
	all, err := h.borrow(e, r.IPs)
	if err != nil {
		return nil, err
	}
	if !all {
		e.Lent, e.IPs = nil, nil
	}
	return e, h.make(ctx, e, def, r.IPs)
}

// borrowed makes the device of an endpoint whose addresses are lent to it.
func (h *endpoints) borrowed(ctx context.Context, e *endpoint, def *store.Overlay) error {
	if e.MAC == 0 {
		e.MAC = ether.MACOf(e.IPs[0].Addr())
	}
	return h.settle(ctx, e, def, false)
}

// checkNames checks what an endpoint is to be called.
func checkNames(name string, aliases []string) error {
	if len(aliases) > maxAliases {
		return bad{fmt.Errorf("%d aliases: an endpoint has %d at most", len(aliases), maxAliases)}
	}
	for _, n := range append([]string{name}, aliases...) {
		if crypto.CheckName(n) != nil {
			return bad{fmt.Errorf("name %.70q: want 1 to 63 letters, digits and -, the first no -", n)}
		}
	}
	return nil
}

// unplaced has a device be made here and down, for somebody to take.
func unplaced(c tap.Config) tap.Config {
	c.Netns, c.Down = "", true
	c.Addresses, c.Gateways, c.Routes = nil, nil, nil
	return c
}

// replaced has a changed copy of an endpoint stand for it, with the same device: others
// read endpoints without a lock. It returns the copy, or nil if e is none any more. The
// place is claimed.
func (h *endpoints) replaced(ctx context.Context, e *endpoint, change func(next *endpoint)) (*endpoint, error) {
	var next *endpoint
	err := h.n.do(ctx, func() error {
		h.mu.Lock()
		i := slices.Index(h.list, e)
		if i < 0 {
			h.mu.Unlock()
			return nil
		}
		c := *e
		next = &c
		change(next)
		h.list[i] = next
		h.mu.Unlock()
		if files, has := h.n.ports[e]; has {
			delete(h.n.ports, e)
			h.n.ports[next] = files
		}
		ov := h.n.sharedHere(e.Overlay)
		if ov == nil {
			return nil
		}
		list := slices.Clone(ov.list())
		for i, d := range list {
			if d.of != e {
				continue
			}
			list[i] = d.handTo(next)
			if a := list[i].live.Load(); a != nil {
				h.n.tables.put(ov, list[i], a) // its names may be others
			}
		}
		ov.devices.Store(&list)
		h.n.names.follow() // it may be in its namespace by now
		return nil
	})
	if err != nil || next == nil {
		return nil, err
	}
	return next, h.save()
}

// handTo returns the device as that of another endpoint.
func (d *device) handTo(e *endpoint) *device {
	out := &device{cfg: d.cfg, of: e, mac: d.mac}
	out.cfg.Name, out.cfg.Netns = e.Tap, e.Netns
	if a := d.live.Load(); a != nil {
		out.live.Store(&attachment{named{bare(a.dev), e.Name}, a.port})
	}
	return out
}

// followSandboxes looks whether devices have been taken to where they belong. since is
// when each was first seen that is not; it is the caller's to keep.
func (h *endpoints) followSandboxes(ctx context.Context, since map[*endpoint]time.Time) {
	for e := range since {
		if h.at(e.place()) != e {
			delete(since, e)
		}
	}
	for _, e := range h.all() {
		if e.placed() {
			continue
		}
		if since[e].IsZero() {
			since[e] = time.Now()
		}
		h.followSandbox(ctx, e, time.Since(since[e]) > placePatience)
	}
}

func (h *endpoints) followSandbox(ctx context.Context, e *endpoint, late bool) {
	a := h.attachment(e)
	if a == nil {
		return // mend looks after it
	}
	w, is := bare(a.dev).(whereabouts)
	if !is {
		return
	}
	ns, name, up, err := w.Whereabouts()
	switch {
	case err != nil || ns == h.self && !late || ns != h.self && !up && !late:
		return
	case ns == h.self:
		h.n.log.Warn("nobody took a device to its container: it is removed", "overlay", e.Overlay, "port", e.Name)
		h.dropLater(e, false)
		return
	}
	defer h.claim(e.place())()
	_, err = h.replaced(ctx, e, func(next *endpoint) {
		next.Namespace, next.Tap, next.Resolvers = ns, name, askedByEngine()
	})
	if err != nil && !errors.Is(err, errStopped) {
		h.n.log.Error("it is not remembered where a container's device is", "overlay", e.Overlay, "port", e.Name, "err", err)
	}
}

// settleIn finds out where the device of an endpoint is that an earlier run made, which
// ended before it knew. If it is in no sandbox, the start of that container fails, and
// removeReturned leaves nothing of it. For New, where nobody else is yet.
func (h *endpoints) settleIn(e *endpoint) {
	alias := h.n.aliasOf(e.Overlay)
	if ns, err := tap.NamespaceAt(e.Netns); err == nil && ns != h.self {
		if name, err := tap.FindLeft(e.Netns, alias, e.MAC); err == nil && name != "" {
			e.Namespace, e.Tap, e.Resolvers = ns, name, askedByEngine()
			return
		}
	}
}

// removeReturned removes the device of an endpoint that is no more, which the engine has
// brought back here while no node was there to hear that the container had ended, or
// has not taken away.
func (h *endpoints) removeReturned(e *endpoint) {
	alias := h.n.aliasOf(e.Overlay)
	name, err := tap.FindLeft("", alias, e.MAC)
	if err == nil && name != "" {
		err = tap.RemoveLeft("", name, alias)
	}
	if err != nil {
		h.n.log.Warn("a device of a container that has ended is left", "overlay", e.Overlay, "port", e.Name, "err", err)
	}
}

// Shares reports whether the node can be on shared overlays: it is in a secure cluster.
func (n *Node) Shares() bool { return n.secure != nil }

// rename changes what an endpoint of a container engine is called.
func (h *endpoints) rename(ctx context.Context, container string, c EndpointChange) (*endpoint, error) {
	is := func(e *endpoint) bool { return e.Sandbox && e.Container == container }
	absent := tellf(errAbsent, "nothing is attached for container %.100q: `tulle endpoints` lists what is", container)
	e := h.first(is)
	if container == "" || e == nil {
		return nil, absent
	}
	defer h.claim(e.place())()
	if e = h.first(is); e == nil {
		return nil, absent
	}
	name, aliases := e.Name, e.Aliases
	if c.Name != nil {
		name = *c.Name
	}
	if c.Aliases != nil {
		aliases = *c.Aliases
	}
	if err := checkNames(name, aliases); err != nil {
		return nil, err
	}
	if name == e.Name && slices.Equal(aliases, e.Aliases) {
		return e, nil
	}
	next, err := h.replaced(ctx, e, func(next *endpoint) { next.Name, next.Aliases = name, aliases })
	if err == nil && next == nil {
		err = absent
	}
	return next, err
}

func (n *Node) changeEndpoint(w http.ResponseWriter, r *http.Request) {
	n.admin(w, r, func(ctx context.Context, _ keeper.Client) (any, error) {
		want, err := read[EndpointChange](w, r)
		if err != nil {
			return nil, err
		}
		e, err := n.endpoints.rename(ctx, r.FormValue("container"), *want)
		if err != nil {
			return nil, err
		}
		return n.endpoints.statusOf(e), nil
	})
}
