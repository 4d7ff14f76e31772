package ipam

import (
	"context"
	"errors"
	"fmt"
	"hash/fnv"
	"log/slog"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/tulle-net/tulle/store"
)

// RegistryConfig is what a Registry needs.
type RegistryConfig struct {
	Store store.Store
	// Now stamps records for people to read. Nothing is decided by it but when
	// an address that was asked for in vain may be asked for again.
	Now func() time.Time
	// Clock measures for how long nodes are silent; nil: SystemClock.
	Clock Clock
	// Grace is how long a node that is away keeps its blocks; default
	// DefaultGrace. What a node was told with its last renewal holds for it.
	Grace time.Duration
	// Cede asks the node owner to give up an address; nil: it has, durably. An
	// error: it has not, or it is not known. Nil: no address of another node's
	// block can be had.
	Cede func(ctx context.Context, owner string, q CedeRequest) error
	Log  *slog.Logger
}

// Registry is what a keeper does with the store about addresses. It is safe for
// concurrent use, and each keeper has one.
type Registry struct {
	cfg RegistryConfig
	id  func() string

	mu    sync.Mutex
	heard map[heardKey]heard
}

type heardKey struct{ node, state string }

// NewRegistry returns a Registry over the configured store.
func NewRegistry(cfg RegistryConfig) (*Registry, error) {
	if cfg.Clock == nil {
		var err error
		if cfg.Clock, err = SystemClock(); err != nil {
			return nil, err
		}
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.Grace == 0 {
		cfg.Grace = DefaultGrace
	}
	if cfg.Grace < time.Second {
		return nil, fmt.Errorf("ipam: a grace of %v is too short: set one second or more", cfg.Grace)
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	return &Registry{cfg: cfg, id: newID, heard: map[heardKey]heard{}}, nil
}

// errOverlays: the transaction has to be made with more overlays.
type errOverlays struct{ names []string }

func (errOverlays) Error() string { return "ipam: more overlays are concerned" }

// update makes one transaction on the node's renewal and on the overlays; all:
// and those in which it has anything. f may be called several times.
func (r *Registry) update(ctx context.Context, node string, overlays []string, all bool, f func(*edit) error) error {
	for {
		domains := []string{store.Domain(renewalKey(node))}
		for _, name := range overlays {
			domains = append(domains, store.Domain(store.OverlayKey(name)))
		}
		err := r.cfg.Store.Update(ctx, domains, func(t store.Txn) error {
			e, err := r.begin(t, node, overlays, all)
			if err != nil {
				return err
			}
			if err := f(e); err != nil {
				return err
			}
			value, err := e.renewal.encode()
			if err != nil {
				return err
			}
			if value == nil {
				t.Delete(renewalKey(node))
			} else {
				t.Put(renewalKey(node), value)
			}
			return nil
		})
		var more errOverlays
		if !errors.As(err, &more) {
			return err
		}
		overlays = more.names
	}
}

func (r *Registry) begin(t store.Txn, node string, overlays []string, all bool) (*edit, error) {
	e := &edit{txn: t, node: node, now: r.cfg.Now().UTC(), books: map[string]*book{}}
	value, err := t.Get(renewalKey(node))
	if err != nil {
		return nil, err
	}
	if e.renewal, err = parseRenewal(renewalKey(node), value); err != nil {
		return nil, err
	}
	if all {
		names := slices.Clone(overlays)
		for _, l := range e.renewal.States {
			names = append(names, l.Overlays...)
		}
		slices.Sort(names)
		if names = slices.Compact(names); len(names) > len(overlays) {
			return nil, errOverlays{names}
		}
	}
	for _, name := range overlays {
		if e.books[name], err = readBook(t, name); err != nil {
			return nil, err
		}
	}
	return e, nil
}

// state returns the lease of a request's state, a new one if it is not known.
func (r *Registry) state(e *edit, c Caller) (*lease, error) {
	if c.State == "" || len(c.State) > maxID || c.Number == 0 {
		return nil, errors.New("ipam: the request does not say of which state of the node it is")
	}
	if l := e.renewal.find(c.State); l != nil {
		if l.Removed {
			return nil, fmt.Errorf("ipam: node %s was removed: join the cluster anew", e.node)
		}
		return l, nil
	}
	if len(e.renewal.States) >= MaxStates {
		return nil, fmt.Errorf("ipam: node %s has lost its state %d times within the grace period: keep --state-dir on a disk, then run tulle node rm %s", e.node, MaxStates, e.node)
	}
	l := &lease{State: c.State, Renewed: e.now, GraceMS: r.cfg.Grace.Milliseconds()}
	e.renewal.States = append(e.renewal.States, l)
	return l, nil
}

func checkNames(names ...string) error {
	for _, n := range names {
		if !legalName(n) {
			return fmt.Errorf("ipam: %q is no name: use letters, digits and dashes", n)
		}
	}
	return nil
}

// Take leases a free block to the node. Asked again with the same nonce it
// returns the same one. Errors wrap ErrFull if there is none.
func (r *Registry) Take(ctx context.Context, node string, q TakeRequest) (Block, error) {
	if err := checkNames(node, q.Overlay); err != nil {
		return Block{}, err
	}
	if q.Nonce == "" || len(q.Nonce) > maxID {
		return Block{}, errors.New("ipam: the request has no nonce")
	}
	var out Block
	err := r.update(ctx, node, []string{q.Overlay}, false, func(e *edit) error {
		b := e.books[q.Overlay]
		o, err := b.defined(q.OverlayID)
		if err != nil {
			return err
		}
		subnet, ok := subnetOf(o, q.Family)
		if !ok {
			return fmt.Errorf("ipam: overlay %s has no IPv%d subnet", o.Name, q.Family)
		}
		l, err := r.state(e, q.Caller)
		if err != nil {
			return err
		}
		p, h := b.taken(node, q)
		if h == nil {
			if p, err = r.choose(b, subnet, node, q); err != nil {
				return err
			}
			h = &holder{Node: node, State: q.State, Nonce: q.Nonce, Since: e.now}
		}
		h.Number = max(h.Number, q.Number)
		if err := e.putBlock(b, p, h); err != nil {
			return err
		}
		out = Block{Overlay: q.Overlay, OverlayID: q.OverlayID, Prefix: p, Holes: b.holes(p, node, q.State)}
		if !slices.Contains(l.Overlays, b.name) && !e.renewal.room(b.name) {
			return fmt.Errorf("ipam: node %s has addresses in %d overlays, the most that it can: detach it from one, or remove one; those of a state that it lost count until they are free", node, MaxOverlays)
		}
		return e.settle(b, l, -1)
	})
	if err != nil {
		return Block{}, err
	}
	r.cfg.Log.Info("block leased", "overlay", q.Overlay, "peer", node, "ip", out.Prefix)
	return out, nil
}

// taken returns the block that the same request got before.
func (b *book) taken(node string, q TakeRequest) (netip.Prefix, *holder) {
	for p, h := range b.blocks {
		if h.is(node, q.State) && h.Nonce == q.Nonce && familyOf(p.Addr()) == q.Family {
			return p, h
		}
	}
	return netip.Prefix{}, nil
}

func (r *Registry) choose(b *book, subnet netip.Prefix, node string, q TakeRequest) (netip.Prefix, error) {
	if len(b.blocks) >= MaxBlocks {
		return netip.Prefix{}, fmt.Errorf("ipam: overlay %s has %d blocks, the most that it can: %w: detach endpoints, or use another overlay", b.name, MaxBlocks, ErrFull)
	}
	if q.Ahead && b.most(subnet) < 2*(len(b.blocks)+1) {
		return netip.Prefix{}, fmt.Errorf("ipam: half of overlay %s is leased: %w ahead", b.name, ErrFull)
	}
	// Nodes begin at different places, so that they seldom want the same block.
	h := fnv.New64a()
	h.Write([]byte(b.name + "/" + node))
	p, ok := b.free(subnet, h.Sum64(), node, q.State)
	if !ok {
		return p, fmt.Errorf("ipam: overlay %s has in %s %w: give it a larger subnet, remove nodes that are gone (tulle node rm), or ask for a single address (--ip)", b.name, subnet, ErrFull)
	}
	return p, nil
}

// most returns how many blocks of a subnet there can be.
func (b *book) most(subnet netip.Prefix) int {
	return min(1<<min(BlockBits(subnet)-subnet.Bits(), 30), MaxBlocks)
}

// Return frees blocks of the node, if it has not got them again since.
func (r *Registry) Return(ctx context.Context, node string, q ReturnRequest) error {
	if err := checkNames(node, q.Overlay); err != nil {
		return err
	}
	if len(q.Prefixes) > MaxBlocks {
		return fmt.Errorf("ipam: more than %d blocks in one request", MaxBlocks)
	}
	return r.giveBack(ctx, node, q.Caller, q.Overlay, q.OverlayID, func(e *edit, b *book) {
		for _, p := range q.Prefixes {
			if h := b.blocks[p]; h != nil && h.is(node, q.State) && h.Number < q.Number {
				e.deleteBlock(b, p)
			}
		}
	})
}

// Unfix frees a fixed address of the node, if it has not got it again since.
func (r *Registry) Unfix(ctx context.Context, node string, q UnfixRequest) error {
	if err := checkNames(node, q.Overlay); err != nil {
		return err
	}
	return r.giveBack(ctx, node, q.Caller, q.Overlay, q.OverlayID, func(e *edit, b *book) {
		if h := b.fixed[q.Addr]; h != nil && h.is(node, q.State) && h.Number < q.Number {
			e.deleteFixed(b, q.Addr)
		}
	})
}

func (r *Registry) giveBack(ctx context.Context, node string, c Caller, overlay, id string, f func(*edit, *book)) error {
	return r.update(ctx, node, []string{overlay}, false, func(e *edit) error {
		b, l := e.books[overlay], e.renewal.find(c.State)
		if l == nil || b.overlay == nil || b.overlay.ID != id {
			return nil // nothing of it is left
		}
		f(e, b)
		return e.settle(b, l, -1)
	})
}

// Fix gives the node one address, wherever it lies: if it is in another node's
// block, that node is asked to give it up. Asked again it succeeds again. Errors
// wrap ErrTaken if somebody has the address.
func (r *Registry) Fix(ctx context.Context, node string, q FixRequest) error {
	if err := checkNames(node, q.Overlay); err != nil {
		return err
	}
	attempt, owner := r.id(), ""
	err := r.update(ctx, node, []string{q.Overlay}, false, func(e *edit) (err error) {
		owner, err = r.ask(e, q, attempt)
		return err
	})
	if err != nil || owner == "" {
		return err
	}
	// The record that it is asked for is a hole in every answer about the block
	// from here on, so the owner cannot get the address back meanwhile.
	if err := r.cede(ctx, owner, CedeRequest{Overlay: q.Overlay, OverlayID: q.OverlayID, Addr: q.Addr}); err != nil {
		r.withdraw(ctx, node, q, attempt)
		return fmt.Errorf("ipam: %s is in a block of node %s, which did not give it up: ask for another address, or again when %s is there: %w", q.Addr, owner, owner, err)
	}
	return r.update(ctx, node, []string{q.Overlay}, false, func(e *edit) error {
		b := e.books[q.Overlay]
		h := b.fixed[q.Addr]
		if b.overlay == nil || b.overlay.ID != q.OverlayID || h == nil || h.Asked != attempt {
			return fmt.Errorf("ipam: asking for %s took so long that another request went ahead: ask again", q.Addr)
		}
		h.Asked = ""
		return e.putFixed(b, q.Addr, h)
	})
}

// ask writes that the node has the address, or that it asks for it and owner has
// to give it up first.
func (r *Registry) ask(e *edit, q FixRequest, attempt string) (owner string, err error) {
	b := e.books[q.Overlay]
	o, err := b.defined(q.OverlayID)
	if err != nil {
		return "", err
	}
	if err := askable(o, q.Addr); err != nil {
		return "", err
	}
	l, err := r.state(e, q.Caller)
	if err != nil {
		return "", err
	}
	h := b.fixed[q.Addr]
	if h != nil && !h.is(e.node, q.State) {
		if h.Asked == "" {
			return "", fmt.Errorf("ipam: %s belongs to node %s: %w: ask for another address", q.Addr, h.Node, ErrTaken)
		}
		if age := e.now.Sub(h.Since); age.Abs() < askFor {
			return "", fmt.Errorf("ipam: node %s asks for %s right now: %w: ask for another address, or again in a minute", h.Node, q.Addr, ErrTaken)
		}
		h = nil
	}
	if h == nil {
		if len(b.fixed) >= MaxFixed {
			return "", fmt.Errorf("ipam: overlay %s has %d fixed addresses outside of their nodes' blocks, the most that it can: let the address be chosen (--ip auto)", o.Name, MaxFixed)
		}
		if !slices.Contains(l.Overlays, b.name) && !e.renewal.room(b.name) {
			return "", fmt.Errorf("ipam: node %s has addresses in %d overlays, the most that it can: detach it from one, or remove one; those of a state that it lost count until they are free", e.node, MaxOverlays)
		}
		h = &holder{Node: e.node, State: q.State, Since: e.now, Asked: attempt}
	}
	if h.Asked != "" {
		h.Since, h.Asked = e.now, ""
		if _, block := b.at(q.Addr); block != nil && !block.is(e.node, q.State) {
			owner, h.Asked = block.Node, attempt
		}
	}
	h.Nonce, h.Number = q.Nonce, max(h.Number, q.Number)
	if err := e.putFixed(b, q.Addr, h); err != nil {
		return "", err
	}
	return owner, e.settle(b, l, -1)
}

func (r *Registry) cede(ctx context.Context, owner string, q CedeRequest) error {
	if r.cfg.Cede == nil {
		return errors.New("ipam: this keeper cannot ask it")
	}
	return r.cfg.Cede(ctx, owner, q)
}

// withdrawFor is how long a keeper tries to forget that an address was asked for.
const withdrawFor = 5 * time.Second

// withdraw deletes the record that the address is asked for. If it cannot,
// Reclaim does.
func (r *Registry) withdraw(ctx context.Context, node string, q FixRequest, attempt string) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), withdrawFor)
	defer cancel()
	err := r.update(ctx, node, []string{q.Overlay}, false, func(e *edit) error {
		return e.withdraw(q.Overlay, q.Addr, attempt)
	})
	if err != nil {
		r.cfg.Log.Info("asking for an address ended, which could not be written yet", "overlay", q.Overlay, "ip", q.Addr, "peer", node, "err", err)
	}
}

func (e *edit) withdraw(overlay string, a netip.Addr, attempt string) error {
	b := e.books[overlay]
	h := b.fixed[a]
	if h == nil || h.Asked != attempt || attempt == "" || h.Node != e.node {
		return nil
	}
	e.deleteFixed(b, a)
	if l := e.renewal.find(h.State); l != nil {
		return e.settle(b, l, -1)
	}
	return e.settleNode(b, -1)
}
