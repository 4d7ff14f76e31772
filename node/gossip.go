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
		Run:       n.run,
		Log:       n.log,
	}
	if n.secure != nil {
		dc.Secure = n.secure.gossip(n)
	} else {
		dc.Seeds, dc.OnTables = n.cfg.Join, n.tables.answer
	}
	d, err := discovery.New(dc)
	if err != nil {
		return err
	}
	// Before anybody can ask it: whom it told of none would end the sessions.
	if err := errors.Join(d.SetTables(uint64(n.tables.dir.Version())), d.SetOverlays(n.carried())); err != nil {
		d.Close()
		return err
	}
	n.disc.Store(d)
	ring(n.tables.own) // what came in between was told to the one before
	if n.secure != nil {
		n.secure.place.TellRing() // the keys may have changed since they were read
	}
	return nil
}

// runGossip runs the membership until ctx ends, again and again where this node
// moves: a new address needs a new Serf.
func (n *Node) runGossip(ctx context.Context) error {
	for {
		here, cancel := context.WithCancelCause(ctx)
		n.leave.Store(&cancel)
		if n.disc.Load().Gossip().Addr() != n.addr() { // it moved once more meanwhile
			cancel(discovery.ErrMoved)
		}
		err := n.disc.Load().Run(here)
		n.run = discovery.Run{} // elsewhere it is a new one
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
		if err == nil { // once more: what changed meanwhile was told to the one before
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

// followCarrier looks whether this host's cable is back: then others are looked for at
// once, and what goes by connections of before is asked again by new ones.
func (n *Node) followCarrier() {
	was := n.unplugged
	n.unplugged = !n.dev.Carrier()
	if !was || n.unplugged {
		return
	}
	n.log.Info("the underlay's device has a carrier again", "device", n.dev.Name)
	n.disc.Load().Rejoin()
	if n.secure != nil {
		n.secure.endpoint.MovedSelf()
	}
}

// followAddress looks whether this node has still the address that it
// advertises. One that was set stays: it may come back. Else it moves to the
// one that the host would use now, as soon as there is one.
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
	for _, to := range n.elsewhere(ctx) {
		dev, err := underlay.DeviceOf(to)
		if err != nil || !n.fit(to, dev.Name) {
			continue
		}
		n.missing = time.Time{}
		n.log.Info("this node's address is another one now", "ip", to, "was", n.addr())
		n.move(to)
		return
	}
	// Perhaps soon: the next change rings again.
}

// elsewhere returns where this host may be reached now, best first: from where
// it sends to other nodes and through its default route, and what else the device
// has that held the address. Any other device would do for the moment only, and
// there the node would stay.
func (n *Node) elsewhere(ctx context.Context) []netip.Addr {
	var out []netip.Addr
	for _, host := range append(n.secure.hosts(), n.cfg.Join...) {
		if a, ok := sourceFor(ctx, host); ok {
			out = append(out, a)
			break
		}
	}
	out = append(out, underlay.DefaultRoutes()...)
	own, err := n.dev.Addrs()
	if err != nil {
		n.log.Warn("cannot look for this node's new address", "err", err)
	}
	return append(out, own...)
}

// fit reports whether this node may move to an address, which a device holds: it
// is of the same family, and not inside an overlay, through which nothing that
// carries the overlay can go.
func (n *Node) fit(to netip.Addr, dev string) bool {
	if to.Is4() != n.addr().Is4() {
		return false
	}
	for _, o := range n.list() {
		x := o.exit.Load()
		if slices.ContainsFunc(o.list(), func(d *device) bool { return d.here(dev) }) || x != nil && x.device == dev {
			return false
		}
	}
	return true
}

// members returns who is there.
func (n *Node) members() []discovery.Member { return n.withBefore(n.disc.Load().Members()) }

// withBefore adds, for a while after this node moved, those that it knew before,
// until it has met them again: they are where they were. Once somebody is revoked
// only those count that are met: gossip alone knows whom not to believe.
func (n *Node) withBefore(list []discovery.Member) []discovery.Member {
	if n.before == nil {
		return list
	}
	if time.Since(n.movedAt) > settleTime || n.revoked.Load() {
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

// has reports whether this host has the address.
func has(a netip.Addr) bool {
	_, err := underlay.DeviceOf(a)
	return err == nil
}

// move goes on at another address.
func (n *Node) move(to netip.Addr) {
	if n.revoked.Swap(false) { // who is revoked from here on may be among the members
		n.before = nil
	}
	n.before, n.movedAt = n.members(), time.Now()
	n.at.Store(&to)
	if err := n.conn.SetSource(to); err != nil {
		n.log.Error("cannot send from the new address", "ip", to, "err", err)
	}
	n.tunnel.SetSelf([]netip.Addr{to})
	if n.secure != nil {
		n.secure.tellSelf(n)
		n.secure.endpoint.MovedSelf()
		go n.secure.keeping.moved() // it waits for the others, and ends with the node
	}
	if end := n.leave.Load(); end != nil {
		(*end)(discovery.ErrMoved)
	}
}
