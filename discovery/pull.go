package discovery

import (
	"context"
	"math/rand/v2"
	"time"
)

const (
	// maxPulls exchanges run at once. Each may hold a list of up to
	// MaxListBytes, but most carry none; and an address at which nobody is takes
	// exchangeTimeout.
	maxPulls = 32

	pullRetryMin = 100 * time.Millisecond
	pullRetryMax = 5 * time.Second

	// recheckEvery is how often a confirmed member is asked again, up to a
	// quarter less: two clocks that are each 100 ppm off part by 0.7 s in it.
	recheckEvery = time.Hour
	// recheckMin is how soon a member is asked again whose floods seem to come
	// from another time: one of the two hosts may have been suspended.
	recheckMin = 10 * time.Second
)

// pull asks p until p has confirmed its tags and its list is there, or it is
// gone. One runs per peer at a time.
func (d *Discovery) pull(ctx context.Context, name string, p *peer) {
	wait := backoff{min: pullRetryMin, max: pullRetryMax}
	for {
		select {
		case d.pullSlot <- struct{}{}:
		case <-ctx.Done():
			return
		}
		q, ok := d.wanted(name, p)
		if !ok {
			<-d.pullSlot
			return
		}
		r, err := d.ask(ctx, q)
		<-d.pullSlot
		if err == nil {
			if q.known == nil {
				d.count.pulls.Add(1)
			}
			d.confirm(p, q, r)
			wait.reset()
			continue
		}
		if ctx.Err() != nil {
			return
		}
		d.count.pullsFailed.Add(1)
		d.log.Debug("a member is not confirmed yet", "peer", name, "err", err)
		t := time.NewTimer(wait.next())
		select {
		case <-t.C:
		case <-p.wake:
			t.Stop()
			wait.reset()
		case <-ctx.Done():
			t.Stop()
			return
		}
	}
}

// ask asks a member who it is, and for its list.
func (d *Discovery) ask(ctx context.Context, q question) (reply, error) {
	if d.cfg.Secure != nil {
		return d.askSecure(ctx, q)
	}
	return ask(ctx, d.port.dial, q)
}

// wanted returns what to ask p, or false, and then p is no longer being pulled.
func (d *Discovery) wanted(name string, p *peer) (question, bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	now := time.Now()
	if d.peers[name] == p && p.lacking(now) {
		q := question{name: name, at: p.gossip, card: p.card, known: d.known(p.card)}
		if q.known == nil || !p.confirmed || p.due(now) {
			return q, true
		}
		// It is there, and carries now what another one does.
		p.list, p.have = q.known, q.card.digest
		d.renew()
		d.tell()
	}
	p.pulling = false
	return question{}, false
}

// known returns the list that c names if this node or another carries it: in
// many clusters all carry the same. In a secure cluster only the owner knows
// which part of it this node may see. d.mu is held.
func (d *Discovery) known(c card) *list {
	if d.cfg.Secure != nil {
		return nil
	}
	is := func(l *list) bool { return l != nil && l.digest == c.digest && len(l.overlays) == c.count }
	if l := d.carried.Load(); is(l) {
		return l
	}
	for _, p := range d.peers {
		if is(p.list) {
			return p.list
		}
	}
	return nil
}

// confirm takes p's reply, if p is still what was asked about.
func (d *Discovery) confirm(p *peer, q question, r reply) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if p.status != Alive || p.refused != "" || p.gossip != q.at || p.card != q.card {
		return
	}
	changed := !p.confirmed || p.list.digest != r.list.digest
	if changed {
		p.list = r.list
	}
	p.confirmed, p.have, p.zero = true, q.card.digest, r.zero
	p.asked = time.Now()
	p.recheck = p.asked.Add(recheckEvery - rand.N(recheckEvery/4))
	if changed {
		d.renew()
		d.tell()
	}
}
