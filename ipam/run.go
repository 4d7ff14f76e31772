package ipam

import (
	"context"
	"log/slog"
	"net/netip"
	"slices"
	"time"
)

const (
	// returnAfter is how long a block is empty before it is given back: an
	// endpoint that is made anew needs no keeper.
	returnAfter = time.Minute
	// firstRetry and lastRetry are the times between attempts to reach a keeper.
	firstRetry = time.Second
	lastRetry  = 5 * time.Minute
	// requestFor is how long a request to a keeper may take.
	requestFor = 20 * time.Second
)

// Run renews what the node has, leases what it will need, gives back what it does not
// need, and tells Lost and Back, until ctx ends. It returns nil.
func (p *Pool) Run(ctx context.Context) error {
	retry, due, away := firstRetry, time.Duration(0), false
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-p.kick:
		case <-timer.C:
		}
		p.stop()
		if now := p.now(); now >= due || !away && p.spare(now) {
			if err := p.tick(ctx); err != nil {
				if ctx.Err() != nil {
					return nil
				}
				level := slog.LevelDebug
				if !away {
					level = slog.LevelWarn
				}
				p.cfg.Log.Log(ctx, level, "no keeper renews this node's addresses", "err", err)
				due, retry, away = now+retry, min(2*retry, lastRetry, max(firstRetry, p.interval())), true
			} else {
				due, retry, away = now+p.interval(), firstRetry, false
			}
		}
		if !away && p.isLow() {
			p.leaseAhead(ctx)
		}
		timer.Reset(p.pause(due))
	}
}

// interval returns the time between renewals.
func (p *Pool) interval() time.Duration {
	p.mu.Lock()
	defer p.mu.Unlock()
	return time.Duration(p.s.Lease.GraceMS) * time.Millisecond / renewShare
}

// pause returns how long Run has nothing to do: until the next renewal, until the
// lease runs out, until a block has been empty long enough. A timer does not
// count sleep, so it is a minute at most.
func (p *Pool) pause(due time.Duration) time.Duration {
	now := p.now()
	d := min(due-now, returnAfter)
	p.mu.Lock()
	defer p.mu.Unlock()
	if left := p.left(); left > 0 {
		d = min(d, left)
	}
	return max(d, time.Millisecond)
}

// spare: there is something to give back.
func (p *Pool) spare(now time.Duration) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.s.spareBlocks(now)) > 0 || slices.ContainsFunc(p.s.Fixed, p.s.idle)
}

// tick renews, and gives back what is not needed: only when keepers are there,
// for while they are away what is given back cannot be had again.
func (p *Pool) tick(ctx context.Context) error {
	if err := p.talking(ctx); err != nil {
		return err
	}
	defer p.silent()
	ctx, cancel := context.WithTimeout(ctx, requestFor)
	defer cancel()
	if err := p.renew(ctx); err != nil {
		return err
	}
	if err := p.unfix(ctx); err != nil {
		return err
	}
	return p.giveBack(ctx)
}

// idle: no endpoint has the fixed address.
func (s *state) idle(f *fixedEntry) bool { return s.used[usedKey{f.OverlayID, f.Addr}] == nil }

// spareBlocks returns the blocks that have been empty for some time: all of an
// overlay without endpoints, all but one of a family of another.
func (s *state) spareBlocks(now time.Duration) []*block {
	endpoints := map[string]bool{}
	for _, ep := range s.list {
		endpoints[ep.OverlayID] = true
	}
	kept := map[kind]bool{}
	var out []*block
	for _, k := range s.blocks {
		if k.used > 0 || k.Returning {
			continue
		}
		one := kind{k.OverlayID, familyOf(k.Prefix.Addr())}
		if endpoints[k.OverlayID] && !kept[one] {
			kept[one] = true
			continue
		}
		if now-k.idle >= returnAfter || now < k.idle { // idle is of this boot
			out = append(out, k)
		}
	}
	return out
}

// unfix gives back the fixed addresses that no endpoint has.
func (p *Pool) unfix(ctx context.Context) error {
	p.mu.Lock()
	var out []*fixedEntry
	for _, f := range p.s.Fixed {
		if p.s.idle(f) {
			f.Returning = true
			out = append(out, f)
		}
	}
	requests := make([]UnfixRequest, 0, len(out))
	for _, f := range out {
		requests = append(requests, UnfixRequest{Caller: p.caller(), Overlay: f.Overlay, OverlayID: f.OverlayID, Addr: f.Addr})
	}
	var err error
	if len(out) > 0 {
		err = p.save()
	}
	p.mu.Unlock()
	for i, f := range out {
		if err == nil {
			err = p.cfg.Source.Unfix(ctx, requests[i])
		}
		if err == nil {
			p.mu.Lock()
			p.s.Fixed = slices.DeleteFunc(p.s.Fixed, func(o *fixedEntry) bool { return o == f })
			err = p.save()
			p.mu.Unlock()
		}
	}
	return err
}

// giveBack gives back the blocks that are not needed.
func (p *Pool) giveBack(ctx context.Context) error {
	p.mu.Lock()
	var requests []ReturnRequest
	for _, k := range p.s.spareBlocks(p.now()) {
		k.Returning, k.raw = true, nil
		at := slices.IndexFunc(requests, func(q ReturnRequest) bool { return q.OverlayID == k.OverlayID })
		if at < 0 {
			at = len(requests)
			requests = append(requests, ReturnRequest{Caller: p.caller(), Overlay: k.Overlay, OverlayID: k.OverlayID})
		}
		requests[at].Prefixes = append(requests[at].Prefixes, k.Prefix)
	}
	var err error
	if len(requests) > 0 {
		err = p.save()
	}
	p.mu.Unlock()
	for _, q := range requests {
		if err == nil {
			err = p.cfg.Source.Return(ctx, q)
		}
		if err == nil {
			p.mu.Lock()
			p.s.blocks = slices.DeleteFunc(p.s.blocks, func(k *block) bool { return k.Returning && k.OverlayID == q.OverlayID })
			err = p.save()
			p.mu.Unlock()
			p.cfg.Log.Info("empty blocks given back", "overlay", q.Overlay)
		}
	}
	return err
}

// BlockStatus is a block of a node.
type BlockStatus struct {
	Overlay   string       `json:"overlay"`
	OverlayID string       `json:"overlay_id"`
	Prefix    netip.Prefix `json:"prefix"`
	// Used is how many of its addresses endpoints have, Holes how many are fixed
	// elsewhere.
	Used      int  `json:"used"`
	Holes     int  `json:"holes"`
	Returning bool `json:"returning,omitempty"`
}

// EndpointStatus is an endpoint's addresses.
type EndpointStatus struct {
	Owner     string         `json:"owner"`
	Overlay   string         `json:"overlay"`
	OverlayID string         `json:"overlay_id"`
	Prefixes  []netip.Prefix `json:"prefixes"`
}

// Status is what a node has, and what it tells Check.
type Status struct {
	Node  string `json:"node"`
	State string `json:"state"`
	// Usable: the addresses may be used, for so many seconds if no keeper renews.
	Usable      bool             `json:"usable"`
	LeftSeconds float64          `json:"left_seconds"`
	Blocks      []BlockStatus    `json:"blocks"`
	Fixed       []Fixed          `json:"fixed"`
	Endpoints   []EndpointStatus `json:"endpoints"`
	// KeepersError is why the last request to the keepers failed.
	KeepersError string `json:"keepers_error,omitempty"`
}

// Status returns what the node has.
func (p *Pool) Status() Status {
	p.mu.Lock()
	defer p.mu.Unlock()
	out := Status{Node: p.cfg.Node, State: p.s.State, Usable: p.usable(), LeftSeconds: p.left().Seconds()}
	for _, k := range p.s.blocks {
		out.Blocks = append(out.Blocks, BlockStatus{Overlay: k.Overlay, OverlayID: k.OverlayID, Prefix: k.Prefix, Used: k.used, Holes: len(k.Holes), Returning: k.Returning})
	}
	for _, f := range p.s.Fixed {
		if f.held() {
			out.Fixed = append(out.Fixed, Fixed{Overlay: f.Overlay, OverlayID: f.OverlayID, Addr: f.Addr})
		}
	}
	for _, ep := range p.s.list {
		out.Endpoints = append(out.Endpoints, EndpointStatus{Owner: ep.Owner, Overlay: ep.Overlay, OverlayID: ep.OverlayID, Prefixes: slices.Clone(ep.Prefixes)})
	}
	if p.lastErr != nil {
		out.KeepersError = p.lastErr.Error()
	}
	return out
}
