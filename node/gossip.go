package node

import (
	"context"
	"errors"
	"net/netip"
	"time"

	"github.com/tulle-net/tulle/discovery"
	"github.com/tulle-net/tulle/underlay"
)

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
		return
	}
	to, err := n.advertise(ctx)
	if err != nil || to == n.addr() || !has(to) || to.Is4() != n.addr().Is4() {
		return // perhaps soon: the next change rings again
	}
	n.log.Info("this node's address is another one now", "ip", to, "was", n.addr())
	n.move(to)
}

// has reports whether this host has the address.
func has(a netip.Addr) bool {
	_, err := underlay.DeviceOf(a)
	return err == nil
}

// move goes on at another address.
func (n *Node) move(to netip.Addr) {
	n.at.Store(&to)
	if err := n.conn.SetSource(to); err != nil {
		n.log.Error("cannot send from the new address", "ip", to, "err", err)
	}
	n.tunnel.SetSelf([]netip.Addr{to})
	if n.secure != nil {
		n.secure.tellSelf(n)
	}
	if end := n.leave.Load(); end != nil {
		(*end)(discovery.ErrMoved)
	}
}
