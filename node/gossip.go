package node

import (
	"context"
	"errors"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/tulle-net/tulle/discovery"
	"github.com/tulle-net/tulle/underlay"
)

// moveAfter is how long this node's address may be gone before it looks for
// another one.
const moveAfter = time.Second

// settleTime is how long a node that moved remembers whom it knew before.
const settleTime = 10 * time.Second

// openGossip makes the membership at the address that this node has now.
func (n *Node) openGossip() error {
	dc := discovery.Config{
		Name:      n.cfg.Name,
		Listen:    n.cfg.Gossip,
		Advertise: n.addr(),
		VTEP:      n.vtep(),
		StateDir:  n.cfg.StateDir,
		OnFlood:   n.tunnel.DeliverFlood,
		Log:       n.log,
	}
	if n.secure != nil {
		dc.Secure = n.secure.gossip(n)
	} else {
		dc.Seeds = n.cfg.Join
	}
	d, err := discovery.New(dc)
	if err != nil {
		return err
	}
	n.disc.Store(d)
	return nil
}

// runGossip runs the membership until ctx ends, again and again where this node
// moves: a new address needs a new Serf.
func (n *Node) runGossip(ctx context.Context) error {
	for {
		here, cancel := context.WithCancelCause(ctx)
		n.leave.Store(&cancel)
		err := n.disc.Load().Run(here)
		moved := ctx.Err() == nil && errors.Is(context.Cause(here), discovery.ErrMoved)
		cancel(nil)
		if !moved {
			return err
		}
		if err := n.settle(ctx); err != nil {
			return err
		}
	}
}

// settle makes the membership anew, at this node's address of now. The ports of
// the one before may take a moment.
func (n *Node) settle(ctx context.Context) error {
	for {
		err := n.openGossip()
		if err == nil {
			err = n.disc.Load().SetOverlays(n.carried())
		}
		if err == nil {
			ring(n.moved)
			return nil
		}
		n.log.Warn("cannot gossip at the new address yet; trying on", "err", err)
		t := time.NewTimer(time.Second)
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
			return nil
		}
	}
}

// followAddress looks whether this node has still the address that it
// advertises. One that was set stays: it may come back. Else it moves to the
// one that the host would use now.
func (n *Node) followAddress(ctx context.Context) {
	if n.cfg.Advertise.IsValid() || has(n.addr()) {
		n.missing = time.Time{}
		return
	}
	if n.missing.IsZero() { // a device that is made anew has it back in a moment
		n.missing = time.Now()
		time.AfterFunc(moveAfter, func() { ring(n.moved) })
	}
	if time.Since(n.missing) < moveAfter {
		return
	}
	to, err := n.advertise(ctx)
	dev, none := underlay.DeviceOf(to)
	if err != nil || none != nil || n.isTap(dev.Name) || to.Is4() != n.addr().Is4() {
		n.log.Debug("no other address yet", "ip", to, "err", errors.Join(err, none))
		return // the next change rings again
	}
	n.missing = time.Time{}
	n.log.Info("this node's address is another one now", "ip", to, "was", n.addr())
	n.move(to)
}

// members returns who is there. For a while after this node moved those that it
// knew before are too, until it has met them again: they are where they were.
func (n *Node) members() []discovery.Member {
	list := n.disc.Load().Members()
	if n.before == nil {
		return list
	}
	if time.Since(n.movedAt) > settleTime {
		n.before = nil
		return list
	}
	for _, old := range n.before {
		i := slices.IndexFunc(list, func(m discovery.Member) bool { return m.Name == old.Name })
		switch {
		case old.Self:
		case i < 0:
			list = append(list, old)
		case list[i].Status == discovery.Alive && !list[i].Confirmed:
			list[i] = old
		}
	}
	slices.SortFunc(list, func(a, b discovery.Member) int { return strings.Compare(a.Name, b.Name) })
	return list
}

// isTap reports whether a device is one of this node's overlays.
func (n *Node) isTap(name string) bool {
	return slices.ContainsFunc(n.overlays, func(o *overlay) bool { return o.cfg.Tap == name })
}

// has reports whether this host has the address.
func has(a netip.Addr) bool {
	_, err := underlay.DeviceOf(a)
	return err == nil
}

// move goes on at another address.
func (n *Node) move(to netip.Addr) {
	n.before, n.movedAt = n.members(), time.Now()
	n.at.Store(&to)
	if err := n.conn.SetSource(to); err != nil {
		n.log.Error("cannot send from the new address", "ip", to, "err", err)
	}
	n.tunnel.SetSelf([]netip.Addr{to})
	if n.secure != nil {
		n.secure.tellSelf(n)
		n.secure.endpoint.MovedSelf()
	}
	if end := n.leave.Load(); end != nil {
		(*end)(discovery.ErrMoved)
	}
}
