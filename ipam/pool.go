package ipam

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/tulle-net/tulle/ether"
	"github.com/tulle-net/tulle/store"
)

// PoolConfig is what a Pool needs.
type PoolConfig struct {
	// Node is the node's name, for messages.
	Node string
	// Source are the keepers.
	Source Source
	// Load returns what Save kept last; nil or fs.ErrNotExist: nothing yet.
	Load func() ([]byte, error)
	// Save keeps b, which is borrowed, all or nothing, and returns when it would
	// survive a loss of power.
	Save func(b []byte) error
	// Clock is the machine's; nil: SystemClock.
	Clock Clock
	// Lost is called when an endpoint's address must not be used any more: it has
	// to leave the device at once. Nil: nobody wants to know.
	Lost func(owner string)
	// Back is called when an endpoint that was told Lost may use its address again.
	Back func(owner string)
	Log  *slog.Logger
}

// Pool gives a node's endpoints addresses of the blocks that the node leases. It
// is safe for concurrent use. What it says is on disk before it says it.
type Pool struct {
	cfg  PoolConfig
	id   func() string
	kick chan struct{} // something is to be given back
	talk chan struct{} // held while a request to the keepers is under way

	mu      sync.Mutex
	s       *state
	stopped bool     // told Lost because the lease ran out
	anchor  *instant // of a lease from before the last boot
	lastErr error    // of the last request to the keepers
}

// NewPool returns a Pool that goes on from what was saved.
func NewPool(cfg PoolConfig) (*Pool, error) {
	if cfg.Clock == nil {
		var err error
		if cfg.Clock, err = SystemClock(); err != nil {
			return nil, err
		}
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	p := &Pool{cfg: cfg, id: newID, kick: make(chan struct{}, 1), talk: make(chan struct{}, 1)}
	var err error
	if p.s, err = loadState(cfg.Load, p.id); err != nil {
		return nil, err
	}
	for _, k := range p.s.blocks {
		k.idle = p.now()
	}
	return p, nil
}

// Request asks for the addresses of one endpoint.
type Request struct {
	// Overlay is its definition; it is borrowed.
	Overlay *store.Overlay
	// Owner is the endpoint. Asked again for the same owner, the same is returned.
	Owner string
	// Want are addresses that it must have, at most one of a family.
	Want []netip.Addr
	// Families are the families (4, 6) of which it needs an address; none: those
	// of the overlay.
	Families []int
}

// Assignment is what an endpoint has.
type Assignment struct {
	// Prefixes are its addresses, with the lengths of their subnets; IPv4 first.
	Prefixes []netip.Prefix `json:"prefixes"`
	MAC      ether.MAC      `json:"mac"`
}

func (ep *endpoint) assignment() Assignment {
	return Assignment{Prefixes: slices.Clone(ep.Prefixes), MAC: ether.MACOf(ep.Prefixes[0].Addr())}
}

// families returns the families of which the request needs an address.
func (q *Request) families() ([]int, error) {
	if q.Overlay == nil || q.Owner == "" {
		return nil, errors.New("ipam: an address has to be for an endpoint of an overlay")
	}
	out := slices.Clone(q.Families)
	for _, a := range q.Want {
		if err := askable(q.Overlay, a); err != nil {
			return nil, err
		}
		if len(q.Families) > 0 {
			out = append(out, familyOf(a))
		}
	}
	if len(out) == 0 {
		for _, s := range q.Overlay.Subnets {
			out = append(out, familyOf(s.Addr()))
		}
	}
	slices.Sort(out)
	out = slices.Compact(out)
	for _, f := range out {
		if _, ok := subnetOf(q.Overlay, f); !ok {
			return nil, fmt.Errorf("ipam: overlay %s has no IPv%d subnet", q.Overlay.Name, f)
		}
		n := 0
		for _, a := range q.Want {
			if familyOf(a) == f {
				n++
			}
		}
		if n > 1 {
			return nil, fmt.Errorf("ipam: endpoint %s asks for %d IPv%d addresses: ask for one", q.Owner, n, f)
		}
	}
	if len(out) == 0 {
		return nil, fmt.Errorf("ipam: overlay %s has no subnet, so nobody gets an address: give it one", q.Overlay.Name)
	}
	return out, nil
}

// need is what the keepers have to be asked before a request can be fulfilled.
type need struct {
	renew bool
	take  int // a family
	fix   netip.Addr
}

func (n need) none() bool { return n == need{} }

// maxAsked is the most requests to keepers that one Assign makes: to renew, and
// for each family a few blocks that turn out to have no room.
const maxAsked = 8

// Assign gives an endpoint its addresses. Keepers are asked only if no block has
// room, or for a wanted address that is in none. Errors wrap ErrFull, ErrTaken
// and ErrNotUsable, as far as the Source keeps what errors wrap.
func (p *Pool) Assign(ctx context.Context, q Request) (Assignment, error) {
	families, err := q.families()
	if err != nil {
		return Assignment{}, err
	}
	out, n, err := p.assign(&q, families)
	if err != nil || n.none() {
		return out, err
	}
	if err := p.talking(ctx); err != nil {
		return Assignment{}, err
	}
	defer p.silent()
	for range maxAsked {
		if out, n, err = p.assign(&q, families); err != nil || n.none() {
			return out, err
		}
		if err := p.ask(ctx, &q, n); err != nil {
			p.wake() // what was got in vain goes back
			return Assignment{}, err
		}
	}
	p.wake()
	return Assignment{}, fmt.Errorf("ipam: node %s got blocks of overlay %s, but no address in them: %w: try again", p.cfg.Node, q.Overlay.Name, ErrFull)
}

// talking waits until no request to the keepers is under way.
func (p *Pool) talking(ctx context.Context) error {
	select {
	case p.talk <- struct{}{}:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (p *Pool) silent() { <-p.talk }

// wake has Run look at what can be given back.
func (p *Pool) wake() {
	select {
	case p.kick <- struct{}{}:
	default:
	}
}

// assign fulfils the request from what the node has, or says what it needs.
func (p *Pool) assign(q *Request, families []int) (Assignment, need, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	usable := p.usable()
	if ep := p.s.endpoints[q.Owner]; ep != nil {
		if err := ep.fits(q); err != nil {
			return Assignment{}, need{}, err
		}
		if !usable {
			return Assignment{}, need{renew: true}, nil
		}
		ep.withdrawn = false
		return ep.assignment(), need{}, nil
	}
	if !usable {
		return Assignment{}, need{renew: true}, nil
	}
	if len(p.s.endpoints) >= MaxEndpoints {
		return Assignment{}, need{}, fmt.Errorf("ipam: node %s has %d endpoints, the most that it can: detach some", p.cfg.Node, MaxEndpoints)
	}
	ep := &endpoint{Owner: q.Owner, Overlay: q.Overlay.Name, OverlayID: q.Overlay.ID}
	for _, f := range families {
		subnet, _ := subnetOf(q.Overlay, f)
		a, n, err := p.choose(q, f, subnet)
		if err != nil || !n.none() {
			return Assignment{}, n, err
		}
		ep.Prefixes = append(ep.Prefixes, netip.PrefixFrom(a, subnet.Bits()))
	}
	if err := p.s.add(ep); err != nil {
		return Assignment{}, need{}, err
	}
	if err := p.save(); err != nil {
		p.s.remove(ep, p.now())
		return Assignment{}, need{}, err
	}
	return ep.assignment(), need{}, nil
}

// fits: the request is for what the endpoint has.
func (ep *endpoint) fits(q *Request) error {
	if ep.OverlayID != q.Overlay.ID {
		return fmt.Errorf("ipam: endpoint %s has an address of overlay %s: detach it first", ep.Owner, ep.Overlay)
	}
	for _, a := range q.Want {
		if !slices.ContainsFunc(ep.Prefixes, func(p netip.Prefix) bool { return p.Addr() == a }) {
			return fmt.Errorf("ipam: endpoint %s has %v: detach it before it asks for %s", ep.Owner, ep.Prefixes, a)
		}
	}
	return nil
}

// choose returns an address of the family that is free.
func (p *Pool) choose(q *Request, family int, subnet netip.Prefix) (netip.Addr, need, error) {
	for _, a := range q.Want {
		if familyOf(a) != family {
			continue
		}
		if ep := p.s.used[usedKey{q.Overlay.ID, a}]; ep != nil {
			return a, need{}, fmt.Errorf("ipam: %s belongs to endpoint %s of this node: %w: ask for another address", a, ep.Owner, ErrTaken)
		}
		if !p.s.owns(q.Overlay.ID, a) {
			return a, need{fix: a}, nil
		}
		return a, need{}, nil
	}
	if a, ok := p.s.fresh(q.Overlay, subnet); ok {
		return a, need{}, nil
	}
	if a, ok := p.s.again(q.Overlay, subnet); ok {
		return a, need{}, nil
	}
	return netip.Addr{}, need{take: family}, nil
}

// maxFreed: of a block with more released addresses than that they are given
// again before new ones are.
const maxFreed = 1024

// fresh returns an address that nobody has had, of the first block that has one.
func (s *state) fresh(o *store.Overlay, subnet netip.Prefix) (netip.Addr, bool) {
	layout := layoutOf(o)
	for _, k := range s.blocks {
		if k.OverlayID != o.ID || k.Returning || !subnet.Overlaps(k.Prefix) || len(k.Freed) > maxFreed {
			continue
		}
		if k.Layout != layout { // what was skipped may be offered now
			k.Layout, k.Next, k.raw = layout, 0, nil
		}
		for k.Next < sizeOf(k.Prefix) {
			a := plus(k.Prefix.Addr(), k.Next, 0)
			if r, ok := reservedAt(o, a); ok {
				if r.Bits() <= k.Prefix.Bits() {
					k.Next = sizeOf(k.Prefix)
				} else {
					k.Next = offset(k.Prefix, last(r)) + 1
				}
			} else if k.freed[k.Next] || !s.given(o, k, a) {
				k.Next++
			} else {
				return a, true
			}
			k.raw = nil
		}
	}
	return netip.Addr{}, false
}

// given: the block's address can be given to an endpoint that asks for none.
func (s *state) given(o *store.Overlay, k *block, a netip.Addr) bool {
	_, hole := k.Holes[a]
	return !hole && s.used[usedKey{o.ID, a}] == nil && offered(o, a)
}

// again returns the address that was released the longest ago.
func (s *state) again(o *store.Overlay, subnet netip.Prefix) (out netip.Addr, ok bool) {
	var turn uint64
	for _, k := range s.blocks {
		if k.OverlayID != o.ID || k.Returning || !subnet.Overlaps(k.Prefix) {
			continue
		}
		for _, f := range k.Freed {
			if ok && f.Turn > turn {
				break
			}
			if a := plus(k.Prefix.Addr(), f.Offset, 0); s.given(o, k, a) {
				out, ok, turn = a, true, f.Turn
				break
			}
		}
	}
	return out, ok
}

// layoutOf names what of the overlay is not offered.
func layoutOf(o *store.Overlay) string {
	if len(o.Gateways)+len(o.Reserved) == 0 {
		return ""
	}
	var b strings.Builder
	for _, g := range o.Gateways {
		b.WriteString(g.String() + " ")
	}
	for _, r := range o.Reserved {
		b.WriteString(r.String() + " ")
	}
	return b.String()
}

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
	return p.take(ctx, q, n.take)
}

// caller numbers a request; what makes it has to be saved before it is sent.
func (p *Pool) caller() Caller {
	p.s.Number++
	return Caller{State: p.s.State, Number: p.s.Number}
}

// take leases another block.
func (p *Pool) take(ctx context.Context, q *Request, family int) error {
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
	b, err := p.cfg.Source.Take(ctx, TakeRequest{Caller: c, Overlay: q.Overlay.Name, OverlayID: q.Overlay.ID, Family: family, Nonce: entry.Nonce})
	p.mu.Lock()
	defer p.mu.Unlock()
	p.lastErr = err
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

// Release takes an endpoint's addresses back; they are given again after all
// others. An owner that has none is no error.
func (p *Pool) Release(owner string) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	ep := p.s.endpoints[owner]
	if ep == nil {
		return nil
	}
	p.s.remove(ep, p.now())
	if err := p.save(); err != nil {
		// The file may still have it, so it stays; add fails only if
		// JSON that could be written cannot be any more.
		return errors.Join(err, p.s.add(ep))
	}
	p.wake()
	return nil
}

// Owners returns the endpoints that have addresses. At start the node releases
// those that it does not know: a process that was killed may have left them.
func (p *Pool) Owners() []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	out := make([]string, 0, len(p.s.list))
	for _, ep := range p.s.list {
		out = append(out, ep.Owner)
	}
	slices.Sort(out)
	return out
}

// Cede gives an address of the node's blocks up for another node; nil: it is
// not used here any more, and the disk says so. It is asked for by keepers.
func (p *Pool) Cede(q CedeRequest) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	k := p.s.blockOf(q.OverlayID, q.Addr)
	if k == nil || k.Returning {
		// It may be about to get the block, in an answer that does not know of this.
		return fmt.Errorf("ipam: node %s does not have the block of %s: try again", p.cfg.Node, q.Addr)
	}
	if ep := p.s.used[usedKey{q.OverlayID, q.Addr}]; ep != nil {
		return fmt.Errorf("ipam: %s belongs to endpoint %s of node %s: %w", q.Addr, ep.Owner, p.cfg.Node, ErrTaken)
	}
	if k.Holes == nil {
		k.Holes = map[netip.Addr]uint64{}
	}
	old, was := k.Holes[q.Addr]
	// Also a hole that is known: an answer that is on its way may not know it any more.
	k.Holes[q.Addr], k.raw = p.s.Number, nil
	if err := p.save(); err != nil {
		k.raw = nil
		if k.Holes[q.Addr] = old; !was {
			delete(k.Holes, q.Addr)
		}
		return err
	}
	return nil
}

// save writes the state. The caller has the lock.
func (p *Pool) save() error {
	b, err := p.s.encode()
	if err == nil {
		err = p.cfg.Save(b)
	}
	if err != nil {
		return fmt.Errorf("ipam: node %s cannot write down which addresses are given: free the disk of --state-dir: %w", p.cfg.Node, err)
	}
	return nil
}

// now returns the time since boot.
func (p *Pool) now() time.Duration {
	_, now := p.cfg.Clock.Boot()
	return now
}
