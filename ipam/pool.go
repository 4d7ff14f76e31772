package ipam

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
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
	ahead   ahead
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
	p.ahead = ahead{lowWater, roomy, map[kind]*store.Overlay{}, map[kind]time.Duration{}}
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
	p.noteLow(q, families)
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
