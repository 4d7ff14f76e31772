package node

import (
	"context"
	"errors"
	"io/fs"
	"sync"
	"time"

	"github.com/tulle-net/tulle/tap"
)

// The functions in this file have devices in network namespaces outlast this
// process, and end with their namespaces all the same.

// watchEvery is how often a namespace that this node keeps alive is looked at: its
// endpoint is gone a second after everybody else has left it.
const watchEvery = 700 * time.Millisecond

// aliasOf is what is written on an endpoint's device, so that it is known again.
func (n *Node) aliasOf(overlay string) string {
	if p := n.aliasPrefix(); p != "" {
		return p + overlay
	}
	return ""
}

func (n *Node) aliasPrefix() string {
	id := n.secure.place.Identity()
	if id == nil {
		return "" // of no cluster: no device is known again
	}
	return "tulle " + id.Certificate().Cluster + "/"
}

// persist has an endpoint's device outlast this process, or not any more. That its
// device does not is no fault of the endpoint.
func (h *endpoints) persist(e *endpoint, on bool) {
	dev := h.attachment(e).lasting()
	if e.host() || dev == nil {
		return
	}
	err := dev.SetPersistent(on)
	if err != nil && !errors.Is(err, tap.ErrClosed) {
		h.n.log.Warn("the device goes when this process does", "overlay", e.Overlay, "port", e.Name, "err", err)
	}
}

// lasting returns the device, if it can outlast this process; else nil.
func (a *attachment) lasting() tap.Lasting {
	if a == nil {
		return nil
	}
	dev := a.dev
	if n, is := dev.(named); is {
		dev = n.Device
	}
	l, _ := dev.(tap.Lasting)
	return l
}

// attachment returns an endpoint's device that is there, or nil.
func (h *endpoints) attachment(e *endpoint) *attachment {
	if ov := h.n.sharedHere(e.Overlay); ov != nil {
		if d := ov.deviceOf(e); d != nil {
			return d.live.Load()
		}
	}
	return nil
}

// removeLeft removes the device of an endpoint that this node does not hold: an
// earlier run made it.
func (h *endpoints) removeLeft(e *endpoint) {
	if e.host() {
		return
	}
	path, there := e.find(tap.FindHolders)
	if !there || path == "" {
		return
	}
	err := tap.RemoveLeft(path, e.Tap, h.n.aliasOf(e.Overlay))
	if err != nil && !errors.Is(err, fs.ErrExist) {
		h.n.log.Warn("a device of an endpoint that there is no more is left", "overlay", e.Overlay, "port", e.Name, "err", err)
	}
}

// spare has the devices in namespaces stay: this process ends, their endpoints do not.
func (n *Node) spare() {
	for _, ov := range n.list() {
		for _, d := range ov.list() {
			if dev := d.live.Load().lasting(); dev != nil && d.of != nil && !d.of.host() {
				dev.Spare()
			}
		}
	}
}

// find returns a path that leads to the endpoint's namespace: the one that it was
// attached by, or that of somebody who holds it; false: there is none any more.
func (e *endpoint) find(holders func() tap.Holders) (string, bool) {
	if !e.placed() {
		return "", false
	}
	if ns, err := tap.NamespaceAt(e.Netns); err == nil && ns == e.Namespace {
		return e.Netns, true
	}
	if e.Namespace.Ended() {
		return "", false
	}
	path, held := holders()[e.Namespace.Inode]
	if !held {
		return "", false
	}
	// The inode may be that of a later namespace. A path there may be none.
	if ns, err := tap.NamespaceAt(path); err == nil && ns == e.Namespace {
		return path, true
	}
	return "", false
}

// watch ends the endpoints whose namespaces nobody but this node keeps alive, until
// ctx ends. That is so where names are answered, and where a device was attached to
// inside its namespace; with the others the kernel tells.
func (n *Node) watch(ctx context.Context) {
	h := n.endpoints
	tick := time.NewTicker(watchEvery)
	defer tick.Stop()
	held := map[*endpoint]string{} // by which path each was found last
	waiting := map[*endpoint]time.Time{}
	var ending sync.WaitGroup
	defer ending.Wait()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		h.followSandboxes(ctx, waiting)
		h.callIn(time.Now())
		for _, e := range h.deserted(held) {
			delete(held, e)
			n.log.Info("the endpoint's network namespace has ended", "overlay", e.Overlay, "port", e.Name)
			// Let go of, the namespace ends, and the device in it, for which the kernel takes
			// less time than to remove the device.
			if dev := h.attachment(e).lasting(); dev != nil {
				dev.Spare()
			}
			ending.Go(func() { h.dropLater(e, true) })
		}
	}
}

// deserted returns the endpoints whose namespaces this node alone keeps alive. A look
// at one is a stat(2); only where that finds nothing all of /proc is searched, twice:
// who holds it may have handed it to somebody who was looked at before.
func (h *endpoints) deserted(held map[*endpoint]string) []*endpoint {
	pinned := h.pinned()
	for e := range held {
		if !pinned[e] {
			delete(held, e)
		}
	}
	var missing []*endpoint
	for e := range pinned {
		if path, known := held[e]; known && tap.LeadsTo(path, e.Namespace) {
			continue
		}
		if tap.LeadsTo(e.Netns, e.Namespace) {
			held[e] = e.Netns
			continue
		}
		missing = append(missing, e)
	}
	for range 2 {
		if len(missing) == 0 {
			return nil
		}
		holders := tap.FindHolders()
		var still []*endpoint
		for _, e := range missing {
			if path, is := holders[e.Namespace.Inode]; is {
				held[e] = path
				continue
			}
			still = append(still, e)
		}
		missing = still
	}
	return missing
}

// pinned returns the endpoints whose namespaces this node keeps alive, by the device or
// by the resolver there.
func (h *endpoints) pinned() map[*endpoint]bool {
	list := map[*endpoint]bool{}
	for _, ov := range h.n.list() {
		for _, d := range ov.list() {
			if d.of == nil || d.of.host() {
				continue
			}
			dev := d.live.Load().lasting()
			if dev != nil && dev.Pinned() || h.n.names.pins(d.of.Namespace) {
				list[d.of] = true
			}
		}
	}
	return list
}
