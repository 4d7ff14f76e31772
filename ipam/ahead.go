package ipam

import (
	"cmp"
	"context"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/tulle-net/tulle/store"
)

const (
	// lowWater: with fewer free addresses than that a node leases another block before
	// an endpoint has to wait for it.
	lowWater = 16
	// roomy is how many blocks a subnet has where blocks are leased ahead: of a small
	// one, others need them.
	roomy = 256
	// aheadFor is how long keepers may take over it: others may have to talk to them.
	aheadFor = 3 * time.Second
	// aheadPause follows when it came to nothing.
	aheadPause = time.Minute
)

// kind is what blocks are alike in.
type kind struct {
	overlayID string
	family    int
}

// ahead is what a Pool leases before it is needed.
type ahead struct {
	lowWater uint64
	roomy    int
	low      map[kind]*store.Overlay
	paused   map[kind]time.Duration // until when, since boot
}

// noteLow notes, for Run, of which families few addresses are left after a request was
// fulfilled; addresses that were asked for say nothing of that. The caller has the lock.
func (p *Pool) noteLow(q *Request, families []int) {
	for _, f := range families {
		one := kind{q.Overlay.ID, f}
		subnet, _ := subnetOf(q.Overlay, f)
		bits := BlockBits(subnet) - subnet.Bits()
		if 1<<min(bits, 30) < p.ahead.roomy || q.wants(f) || p.ahead.low[one] != nil || p.now() < p.ahead.paused[one] || p.s.room(one) >= p.ahead.lowWater {
			continue
		}
		o := *q.Overlay // which is borrowed
		o.Subnets, o.Gateways, o.Reserved = slices.Clone(o.Subnets), slices.Clone(o.Gateways), slices.Clone(o.Reserved)
		p.ahead.low[one] = &o
		p.wake()
	}
}

// wants reports whether an address of the family is asked for.
func (q *Request) wants(family int) bool {
	for _, a := range q.Want {
		if familyOf(a) == family {
			return true
		}
	}
	return false
}

// room returns how many addresses of the node's blocks are free, or reserved.
func (s *state) room(of kind) (n uint64) {
	for _, k := range s.blocks {
		if (kind{k.OverlayID, familyOf(k.Prefix.Addr())}) == of && !k.Returning {
			n += sizeOf(k.Prefix) - min(uint64(k.used+len(k.Holes)), sizeOf(k.Prefix))
		}
	}
	return n
}

// isLow: there is something to lease ahead.
func (p *Pool) isLow() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.ahead.low) > 0
}

// leaseAhead leases what noteLow noted.
func (p *Pool) leaseAhead(ctx context.Context) {
	if p.talking(ctx) != nil {
		return
	}
	defer p.silent()
	p.mu.Lock()
	low := p.ahead.low
	p.ahead.low = map[kind]*store.Overlay{}
	p.mu.Unlock()
	// In order, so that a history of the model can be had again.
	order := slices.SortedFunc(maps.Keys(low), func(a, b kind) int {
		return cmp.Or(strings.Compare(a.overlayID, b.overlayID), a.family-b.family)
	})
	for _, one := range order {
		o := low[one]
		p.mu.Lock()
		still := p.usable() && p.s.room(one) < p.ahead.lowWater // an Assign may have asked meanwhile
		p.mu.Unlock()
		if !still {
			continue
		}
		some, cancel := context.WithTimeout(ctx, aheadFor)
		err := p.take(some, &Request{Overlay: o}, one.family, true)
		cancel()
		if err != nil {
			p.mu.Lock()
			p.ahead.paused[one] = p.now() + aheadPause
			p.mu.Unlock()
			p.cfg.Log.Debug("no block leased ahead", "overlay", o.Name, "err", err)
		}
	}
}
