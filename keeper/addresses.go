package keeper

import (
	"context"
	"encoding/json"
	"errors"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/tulle-net/tulle/ipam"
	"github.com/tulle-net/tulle/peer"
	"github.com/tulle-net/tulle/store"
)

// reclaimEvery is how often a keeper looks for what silent nodes have left.
const reclaimEvery = time.Minute

// makeRegistry makes what leases addresses, where there is a store for it.
func (k *Keeper) makeRegistry() (err error) {
	if k.cfg.Shared == nil {
		return nil
	}
	k.registry, err = ipam.NewRegistry(ipam.RegistryConfig{
		Store: k.cfg.Shared, Now: k.cfg.Now, Grace: k.cfg.Grace, Cede: k.cede, Log: k.cfg.Log,
	})
	return err
}

// cede asks a node to give up an address of its blocks.
func (k *Keeper) cede(ctx context.Context, owner string, q ipam.CedeRequest) error {
	if k.cfg.Tell == nil {
		return peer.ErrUnavailable
	}
	b, err := json.Marshal(q)
	if err != nil {
		return err
	}
	_, err = k.cfg.Tell(ctx, owner, peer.KindCede, b)
	return err
}

// reclaim frees now and then what nodes have left that were silent for long.
func (k *Keeper) reclaim(ctx context.Context) {
	tick := time.NewTicker(reclaimEvery)
	defer tick.Stop()
	for {
		alive := map[string]bool{k.cfg.Name: true}
		for _, m := range k.cfg.Members() {
			alive[m.Name] = alive[m.Name] || k.cfg.Alive == nil || k.cfg.Alive(m.Name)
		}
		if err := k.registry.Reclaim(ctx, func(node string) bool { return alive[node] }); err != nil && ctx.Err() == nil {
			k.cfg.Log.Debug("keeper: cannot look for addresses that were left", "err", err)
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}

// leasing answers a request about addresses, which a node makes for itself.
func leasing[Q, A any](f func(*ipam.Registry, context.Context, string, Q) (A, error), overlay func(Q) string) func(*call, context.Context, *leaseBody[Q]) (any, error) {
	return func(c *call, ctx context.Context, b *leaseBody[Q]) (any, error) {
		if err := c.mustShare(); err != nil {
			return nil, err
		}
		if name := overlay(b.Request); name != "" && !c.asker.allow(name) {
			return nil, peer.Errorf(peer.CodeDenied, "%s may not join overlay %.70q", c.cert.Name, name)
		}
		if !c.k.leasing.allow(c.cert.Name, time.Now()) {
			return nil, peer.Errorf(peer.CodeBusy, "%s asks for too many addresses: wait a second", c.cert.Name)
		}
		a, err := f(c.k.registry, ctx, c.cert.Name, b.Request)
		if err != nil {
			return nil, leaseError(err)
		}
		return a, nil
	}
}

// leaseError is what a node is told of why it did not get an address.
func leaseError(err error) error {
	switch {
	case errors.Is(err, ipam.ErrFull):
		return peer.Errorf(CodeFull, "%v", err)
	case errors.Is(err, ipam.ErrTaken):
		return peer.Errorf(CodeTaken, "%v", err)
	case errors.Is(err, store.ErrUnavailable), errors.Is(err, store.ErrTooLarge), errors.Is(err, context.DeadlineExceeded), errors.Is(err, context.Canceled):
		return shareError(err)
	}
	if e, is := errors.AsType[*peer.Error](err); is { // of the node whose block it is
		return peer.Errorf(e.Code, "%v", err)
	}
	return invalid("%v", err) // the registry's own: they say what to do
}

// renewLeases renews what the asker has. Of overlays that it may not join it
// keeps what it has, until it says that it does not use it, and gets nothing: a
// claim may lease a block anew.
func (c *call) renewLeases(ctx context.Context, b *leaseBody[ipam.RenewRequest]) (any, error) {
	if err := c.mustShare(); err != nil {
		return nil, err
	}
	had := map[string]ipam.Listing{}
	for i := range b.Request.Claims {
		q := &b.Request.Claims[i]
		if c.asker.allow(q.Overlay) {
			continue
		}
		l, known := had[q.Overlay]
		if !known && len(had) >= ipam.MaxOverlays {
			return nil, invalid("%s claims addresses in more than %d overlays that it may not join", c.cert.Name, ipam.MaxOverlays)
		}
		if !known {
			var err error
			if l, err = c.k.registry.Blocks(ctx, q.Overlay); err != nil {
				return nil, leaseError(err)
			}
			had[q.Overlay] = l
		}
		q.Blocks = slices.DeleteFunc(q.Blocks, func(p netip.Prefix) bool {
			return !slices.ContainsFunc(l.Blocks, func(h ipam.LeasedBlock) bool { return h.Prefix == p && h.Node == c.cert.Name })
		})
		q.Fixed = slices.DeleteFunc(q.Fixed, func(a netip.Addr) bool {
			return !slices.ContainsFunc(l.Fixed, func(h ipam.FixedAddress) bool { return h.Addr == a && h.Node == c.cert.Name })
		})
	}
	return renewBlocks(c, ctx, b)
}

func nothing[Q any](f func(*ipam.Registry, context.Context, string, Q) error) func(*ipam.Registry, context.Context, string, Q) (done, error) {
	return func(r *ipam.Registry, ctx context.Context, node string, q Q) (done, error) {
		return done{}, f(r, ctx, node, q)
	}
}

var (
	takeBlock    = leasing((*ipam.Registry).Take, func(q ipam.TakeRequest) string { return q.Overlay })
	renewBlocks  = leasing((*ipam.Registry).Renew, func(ipam.RenewRequest) string { return "" })
	returnBlocks = leasing(nothing((*ipam.Registry).Return), func(ipam.ReturnRequest) string { return "" })
	fixAddress   = leasing(nothing((*ipam.Registry).Fix), func(q ipam.FixRequest) string { return q.Overlay })
	unfixAddress = leasing(nothing((*ipam.Registry).Unfix), func(ipam.UnfixRequest) string { return "" })
)

// addresses lists what is leased of an overlay.
func (c *call) addresses(ctx context.Context, b *nodeBody) (any, error) {
	if err := c.mustShare(); err != nil {
		return nil, err
	}
	if !c.asker.admin() && !c.asker.allow(b.Name) {
		return nil, peer.Errorf(peer.CodeDenied, "%s may not join overlay %.70q", c.cert.Name, b.Name)
	}
	l, err := c.k.registry.Blocks(ctx, b.Name)
	if err != nil {
		return nil, leaseError(err)
	}
	return l, nil
}

// maxReports are asked for at once.
const maxReports = 32

// checkAddresses compares what the store says of addresses with what the nodes
// that are there say.
func (c *call) checkAddresses(ctx context.Context, b *checkBody) (any, error) {
	if err := c.asker.mustAdmin("check all addresses"); err != nil {
		return nil, err
	}
	if err := c.mustShare(); err != nil {
		return nil, err
	}
	reports, silent := c.k.reports(ctx)
	found, err := c.k.registry.Check(ctx, reports, func(node string) bool {
		n, ok := c.ledger.Nodes[node]
		return ok && n.Revoked.IsZero()
	})
	if err != nil {
		return nil, leaseError(err)
	}
	answer := checkAnswer{Findings: append([]ipam.Finding{}, found...), Silent: silent}
	if b.Repair {
		if _, err := c.k.registry.Repair(ctx, found); err != nil {
			return nil, leaseError(err)
		}
		answer.Repaired = true
	}
	return answer, nil
}

// reports asks all nodes that are there which addresses they have; silent are
// those that do not answer.
func (k *Keeper) reports(ctx context.Context) (out []ipam.Status, silent []string) {
	var names []string
	for _, m := range k.cfg.Members() {
		if m.Name == k.cfg.Name || k.cfg.Alive == nil || k.cfg.Alive(m.Name) {
			names = append(names, m.Name)
		}
	}
	return k.reportsOf(ctx, names)
}

// reportsOf asks some.
func (k *Keeper) reportsOf(ctx context.Context, names []string) (out []ipam.Status, silent []string) {
	if k.cfg.Tell == nil {
		return nil, nil
	}
	ctx, cancel := context.WithTimeout(ctx, pushTimeout)
	defer cancel()
	var mu sync.Mutex
	var wg sync.WaitGroup
	slot := make(chan struct{}, maxReports)
	for _, name := range names {
		wg.Go(func() {
			slot <- struct{}{}
			defer func() { <-slot }()
			var s ipam.Status
			b, err := k.cfg.Tell(ctx, name, peer.KindReport, nil)
			if err == nil {
				err = json.Unmarshal(b, &s)
			}
			mu.Lock()
			defer mu.Unlock()
			if err != nil {
				silent = append(silent, name)
				return
			}
			s.Node = name // not what it says of itself
			out = append(out, s)
		})
	}
	wg.Wait()
	slices.Sort(silent)
	return out, silent
}

// forgetLeases ends what a node that was removed has leased: at once if it was
// away, for which whoever removes it answers; else when it has been silent for long.
func (c *call) forgetLeases(ctx context.Context, name string, away bool) {
	if c.k.registry == nil {
		return
	}
	ctx, cancel := c.k.detached(ctx)
	defer cancel()
	if err := c.k.registry.Forget(ctx, name, away); err != nil {
		c.k.cfg.Log.Warn("keeper: the addresses of a removed node are freed later", "peer", name, "err", err)
	}
}

// Addresses is the keepers as ipam.Source.
type Addresses struct {
	// Client returns the one to ask with.
	Client func() Client
}

var _ ipam.Source = Addresses{}

// lease makes one request.
func lease[A, Q any](ctx context.Context, s Addresses, sub uint16, q Q) (*A, error) {
	a, err := ask[A](ctx, s.Client(), sub, leaseBody[Q]{current, q})
	switch {
	case errors.Is(err, ErrFull):
		return nil, because{err, ipam.ErrFull}
	case errors.Is(err, ErrTaken):
		return nil, because{err, ipam.ErrTaken}
	}
	return a, err
}

// because is a keeper's error that is also one of ipam's.
type because struct {
	error
	is error
}

func (b because) Unwrap() []error { return []error{b.error, b.is} }

// Take implements ipam.Source.
func (s Addresses) Take(ctx context.Context, q ipam.TakeRequest) (ipam.Block, error) {
	return value(lease[ipam.Block](ctx, s, SubTakeBlock, q))
}

// Renew implements ipam.Source.
func (s Addresses) Renew(ctx context.Context, q ipam.RenewRequest) (ipam.RenewAnswer, error) {
	return value(lease[ipam.RenewAnswer](ctx, s, SubRenewBlocks, q))
}

// Return implements ipam.Source.
func (s Addresses) Return(ctx context.Context, q ipam.ReturnRequest) error {
	_, err := lease[done](ctx, s, SubReturnBlocks, q)
	return err
}

// Fix implements ipam.Source.
func (s Addresses) Fix(ctx context.Context, q ipam.FixRequest) error {
	_, err := lease[done](ctx, s, SubFixAddress, q)
	return err
}

// Unfix implements ipam.Source.
func (s Addresses) Unfix(ctx context.Context, q ipam.UnfixRequest) error {
	_, err := lease[done](ctx, s, SubUnfixAddress, q)
	return err
}

func value[A any](a *A, err error) (A, error) {
	if err != nil {
		var none A
		return none, err
	}
	return *a, nil
}

// Addresses lists what is leased of an overlay.
func (c Client) Addresses(ctx context.Context, overlay string) (*ipam.Listing, error) {
	return ask[ipam.Listing](ctx, c, SubAddresses, nodeBody{current, overlay})
}

// CheckAddresses looks for addresses that are leased or used wrongly, and repairs
// what can be. silent are nodes that did not say what they have.
func (c Client) CheckAddresses(ctx context.Context, repair bool) (found []ipam.Finding, repaired bool, silent []string, err error) {
	a, err := ask[checkAnswer](ctx, c, SubCheckAddresses, checkBody{current, repair})
	if err != nil {
		return nil, false, nil, err
	}
	return a.Findings, a.Repaired, a.Silent, nil
}
