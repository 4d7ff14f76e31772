package node

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"slices"
	"strings"

	"github.com/tulle-net/tulle/internal/hostname"
	"github.com/tulle-net/tulle/store"
	"github.com/tulle-net/tulle/tap"
)

// The functions in this file are about network namespaces.

// attach makes a device in a network namespace, on a shared overlay.
func (h *endpoints) attach(ctx context.Context, r AttachRequest) (*endpoint, error) {
	e := &endpoint{
		Overlay: r.Overlay, Tap: cmp.Or(r.Ifname, defaultIfname), MAC: r.MAC, Key: newKey(), DefaultRoute: r.DefaultRoute,
		Driver: r.Driver, NoDNS: r.NoDNS, Routes: r.Routes, Container: r.Container, Limits: r.Limits, Aliases: r.Aliases, Services: r.Services,
	}
	if r.Sandbox != "" {
		return h.attachSandbox(ctx, r)
	}
	err := checkExtras(r)
	if err != nil {
		return nil, err
	}
	if e.Netns, err = netnsPath(r.Netns, r.PID); err != nil {
		return nil, err
	}
	if err := h.n.mayInside(r.Driver); err != nil {
		return nil, err
	}
	if e.Namespace, err = namespaceAt(e.Netns); err != nil {
		return nil, h.n.notOwned(e.Netns, err)
	}
	if h.selfErr != nil {
		return nil, h.selfErr
	}
	if e.Namespace == h.self {
		return nil, bad{fmt.Errorf("%s is this host's own network namespace: `tulle expose %s` puts the host itself on the overlay", e.Netns, r.Overlay)}
	}
	e.Name = cmp.Or(r.Name, nameOf(e.Netns))
	def, err := h.allowed(ctx, e, r)
	if err != nil {
		return nil, err
	}
	defer h.claim(e.place())()
	if other := h.at(e.place()); other != nil {
		return nil, tellf(errExists, "%s of that namespace is attached to overlay %s already, as %s: `tulle detach %s` it first, or give another --ifname",
			e.Tap, other.Overlay, joinPrefixes(other.IPs), other.Overlay)
	}
	if other := h.asked(r.Container, e.Tap); other != nil {
		return nil, tellf(errExists, "%s of container %s is attached already, in %s: detach it first", e.Tap, r.Container, other.Netns)
	}
	return e, h.make(ctx, e, def, r.IPs)
}

// leads says how an endpoint reaches what is not on its overlay, and which ports of the
// host lead to it.
func (n *Node) leads(def *store.Overlay, e *endpoint, r AttachRequest) error {
	e.Publish = slices.Clone(r.Publish)
	if def.Gateway && !r.NoDefaultRoute && !slices.ContainsFunc(r.Routes, Route.everywhere) {
		e.MayYield = !e.DefaultRoute && len(e.Publish) == 0
		e.DefaultRoute = true
		if err := n.roomForExit(def); err != nil {
			return err
		}
	}
	return mayPublish(def, e)
}

// allowed checks what does not depend on where the device will be, completes e, and
// returns the overlay's definition.
func (h *endpoints) allowed(ctx context.Context, e *endpoint, r AttachRequest) (*store.Overlay, error) {
	if err := checkNames(e.Name, e.Aliases); err != nil {
		return nil, err
	}
	def, err := h.n.mayJoin(ctx, r.Overlay)
	if err != nil {
		return nil, err
	}
	e.ID = def.ID
	if err := within(def, r.IPs); err != nil {
		return nil, err
	}
	if _, err := h.n.settingsOf(def, e); err != nil {
		return nil, err
	}
	return def, h.n.leads(def, e, r)
}

// newKey returns what tells endpoints of one name apart.
func newKey() string { return rand.Text()[:keyLen] }

// netnsPath returns the path of the namespace that is asked for.
func netnsPath(path string, pid int) (string, error) {
	switch {
	case (path == "") == (pid == 0):
		return "", bad{errors.New("want a network namespace: either its path (netns) or a process in it (pid)")}
	case pid < 0:
		return "", bad{fmt.Errorf("pid %d: want the number of a process", pid)}
	case pid > 0:
		return fmt.Sprintf("/proc/%d/ns/net", pid), nil
	case !filepath.IsAbs(path):
		return "", bad{fmt.Errorf("netns %q: want its path from the root, as in /run/netns/%s", path, filepath.Base(path))}
	}
	return filepath.Clean(path), nil
}

// namespaceAt is tap.NamespaceAt for who asks.
func namespaceAt(path string) (tap.Namespace, error) {
	ns, err := tap.NamespaceAt(path)
	switch pid, of := pidOf(path); {
	case errors.Is(err, fs.ErrNotExist) && of:
		return ns, tellf(errAbsent, "there is no process %s: give the --pid of one that runs", pid)
	case errors.Is(err, fs.ErrNotExist):
		return ns, tellf(errAbsent, "there is no network namespace at %s: `ip netns list` names those under /run/netns; --pid takes that of a process", path)
	case errors.Is(err, tap.ErrNoNamespace):
		return ns, bad{fmt.Errorf("%s is no network namespace: give the path of one, as in /run/netns/web or /proc/4711/ns/net", path)}
	}
	return ns, err
}

// pidOf returns the process that a path names the namespace of.
func pidOf(path string) (pid string, of bool) {
	pid, of = strings.CutPrefix(path, "/proc/")
	if of {
		pid, of = strings.CutSuffix(pid, "/ns/net")
	}
	return pid, of && !strings.Contains(pid, "/")
}

// nameOf is what an endpoint is called that was given no name: as the file of its
// namespace, or after the process; what no name may have becomes a hyphen.
func nameOf(path string) string {
	name := filepath.Base(path)
	if pid, of := pidOf(path); of {
		name = "pid-" + pid
	}
	return cmp.Or(hostname.Of(name), "endpoint")
}

// asked returns the endpoint that a container asked for, or nil.
func (h *endpoints) asked(container, device string) *endpoint {
	return h.first(func(e *endpoint) bool {
		return container != "" && e.Container == container && (e.Tap == device || e.Sandbox)
	})
}

// detachAsked takes off what a container asked for, whatever has become of its namespace.
func (h *endpoints) detachAsked(ctx context.Context, r DetachRequest) (*endpoint, error) {
	absent := tellf(errAbsent, "nothing is attached for container %.100q as %.20q: `tulle endpoints` lists what is", r.Container, r.Ifname)
	e := h.asked(r.Container, r.Ifname)
	if e == nil {
		return nil, absent
	}
	defer h.claim(e.place())()
	if h.at(e.place()) != e {
		return nil, absent
	}
	return e, h.end(ctx, e)
}

// detach takes a namespace's device off a shared overlay. The device's name may be
// left out where the namespace has one on the overlay.
func (h *endpoints) detach(ctx context.Context, r DetachRequest) (*endpoint, error) {
	path, err := netnsPath(r.Netns, r.PID)
	if err != nil {
		return nil, err
	}
	// A namespace that has ended is known by its path, until it is forgotten.
	ns, err := namespaceAt(path)
	there := err == nil
	var found []*endpoint
	for _, e := range h.all() {
		same := there && e.Namespace == ns || !there && e.Netns == path
		if !e.host() && e.Overlay == r.Overlay && same && (r.Ifname == "" || r.Ifname == e.Tap) {
			found = append(found, e)
		}
	}
	absent := tellf(errAbsent, "nothing of %s is attached to an overlay %.70q: `tulle endpoints` lists what is", path, r.Overlay)
	switch {
	case len(found) == 0 && !there:
		return nil, err
	case len(found) == 0:
		return nil, absent
	case len(found) > 1:
		return nil, bad{fmt.Errorf("%d devices of %s are attached to overlay %s: say which with --ifname", len(found), path, r.Overlay)}
	}
	e := found[0]
	defer h.claim(e.place())()
	if h.at(e.place()) != e {
		return nil, absent
	}
	return e, h.end(ctx, e)
}
