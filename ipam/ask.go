package ipam

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
)

// ask asks the keepers for what a request needs. The caller is talking.
func (p *Pool) ask(ctx context.Context, q *Request, n need) error {
	ctx, cancel := context.WithTimeout(ctx, requestFor)
	defer cancel()
	switch {
	case n.renew:
		if err := p.renew(ctx); err != nil {
			return fmt.Errorf("ipam: node %s: %w, and no keeper renews them: see that a keeper can be reached (tulle peers): %w", p.cfg.Node, ErrNotUsable, err)
		}
		if !p.Usable() {
			return fmt.Errorf("ipam: node %s: %w, though a keeper answered: try again, and see that keepers answer sooner", p.cfg.Node, ErrNotUsable)
		}
		return nil
	case n.fix.IsValid():
		return p.fix(ctx, q, n.fix)
	}
	return p.take(ctx, q, n.take, false)
}

// caller numbers a request; what makes it has to be saved before it is sent.
func (p *Pool) caller() Caller {
	p.s.Number++
	return Caller{State: p.s.State, Number: p.s.Number}
}

// take leases another block; ahead: nobody waits for it.
func (p *Pool) take(ctx context.Context, q *Request, family int, ahead bool) error {
	p.mu.Lock()
	at := slices.IndexFunc(p.s.Takes, func(t *takeEntry) bool { return t.OverlayID == q.Overlay.ID && t.Family == family })
	if at < 0 {
		at = len(p.s.Takes)
		p.s.Takes = append(p.s.Takes, &takeEntry{OverlayID: q.Overlay.ID, Family: family, Nonce: p.id()})
	}
	entry := p.s.Takes[at]
	c := p.caller()
	err := p.save()
	p.mu.Unlock()
	if err != nil {
		return err
	}
	b, err := p.cfg.Source.Take(ctx, TakeRequest{Caller: c, Overlay: q.Overlay.Name, OverlayID: q.Overlay.ID, Family: family, Nonce: entry.Nonce, Ahead: ahead})
	p.mu.Lock()
	defer p.mu.Unlock()
	if !ahead {
		p.lastErr = err
	}
	if err != nil {
		return fmt.Errorf("ipam: node %s has no address left in overlay %s and got no block: %w", p.cfg.Node, q.Overlay.Name, err)
	}
	subnet, _ := subnetOf(q.Overlay, family)
	if b.OverlayID != q.Overlay.ID || b.Prefix != b.Prefix.Masked() || !subnet.Contains(b.Prefix.Addr()) || b.Prefix.Bits() < subnet.Bits() ||
		b.Prefix.Addr().BitLen()-b.Prefix.Bits() > 128-BlockBits6 {
		return fmt.Errorf("ipam: a keeper leased %s, which is no block of overlay %s: run one release of tulle on all nodes", b.Prefix, q.Overlay.Name)
	}
	k := &block{Overlay: q.Overlay.Name, OverlayID: q.Overlay.ID, Prefix: b.Prefix, Layout: layoutOf(q.Overlay), freed: map[uint64]bool{}, idle: p.now()}
	k.Holes = holesOf(b.Holes, nil, c.Number)
	p.s.Takes = slices.DeleteFunc(p.s.Takes, func(t *takeEntry) bool { return t == entry })
	p.s.blocks = slices.DeleteFunc(p.s.blocks, func(o *block) bool { return o.OverlayID == k.OverlayID && o.Prefix == k.Prefix })
	p.s.blocks = append(p.s.blocks, k)
	p.s.recount(k)
	if err := p.save(); err != nil {
		// Unused and unsaved it is a lost answer: the next request has its nonce.
		p.s.blocks = slices.DeleteFunc(p.s.blocks, func(o *block) bool { return o == k })
		p.s.Takes = append(p.s.Takes, entry)
		return err
	}
	p.cfg.Log.Info("block leased", "overlay", k.Overlay, "ip", k.Prefix)
	return nil
}

// recount counts the endpoints that had addresses of the block before it came:
// fixed ones.
func (s *state) recount(k *block) {
	for key := range s.used {
		if key.overlayID == k.OverlayID && k.Prefix.Contains(key.addr) {
			k.used++
		}
	}
}

// holesOf returns what an answer to the request of that number leaves of holes:
// those that it lists, and those that are newer than the request.
func holesOf(listed []netip.Addr, old map[netip.Addr]uint64, number uint64) map[netip.Addr]uint64 {
	out := make(map[netip.Addr]uint64, len(listed))
	for _, a := range listed {
		out[a] = 0
	}
	for a, since := range old {
		if since >= number {
			out[a] = since
		}
	}
	return out
}

// fix gets a fixed address.
func (p *Pool) fix(ctx context.Context, q *Request, a netip.Addr) error {
	p.mu.Lock()
	f := p.s.fixedOf(q.Overlay.ID, a)
	if f == nil {
		f = &fixedEntry{Overlay: q.Overlay.Name, OverlayID: q.Overlay.ID, Addr: a}
		p.s.Fixed = append(p.s.Fixed, f)
	}
	f.Asked, f.Returning, f.Nonce = true, false, p.id()
	c := p.caller()
	err := p.save()
	p.mu.Unlock()
	if err != nil {
		return err
	}
	err = p.cfg.Source.Fix(ctx, FixRequest{Caller: c, Overlay: q.Overlay.Name, OverlayID: q.Overlay.ID, Addr: a, Nonce: f.Nonce})
	p.mu.Lock()
	defer p.mu.Unlock()
	p.lastErr = err
	if err != nil {
		f.Returning = true // it is not known what a keeper did
		return fmt.Errorf("ipam: node %s did not get %s: %w", p.cfg.Node, a, err)
	}
	f.Asked = false
	if err := p.save(); err != nil {
		f.Asked, f.Returning = true, true
		return err
	}
	return nil
}
