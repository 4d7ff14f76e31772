package ipam

import (
	"context"
	"slices"

	"github.com/tulle-net/tulle/store"
)

const (
	// lowWater: with fewer free addresses than that a node leases another block before
	// an endpoint has to wait for it.
	lowWater = 16
	// roomy is how many blocks a subnet has where blocks are leased ahead: of a small
	// one, others need them.
	roomy = 256
)

// kind is what blocks are alike in.
type kind struct {
	overlayID string
	family    int
}

// noteLow notes, for Run, of which families of the overlay few addresses are left. The
// caller has the lock.
func (p *Pool) noteLow(o *store.Overlay, families []int) {
	for _, f := range families {
		subnet, _ := subnetOf(o, f)
		if bits := BlockBits(subnet) - subnet.Bits(); 1<<min(bits, 30) < roomy || p.s.room(o.ID, f) >= lowWater {
			continue
		}
		if p.low == nil {
			p.low = map[kind]*store.Overlay{}
		}
		mine := *o
		mine.Subnets, mine.Gateways, mine.Reserved = slices.Clone(o.Subnets), slices.Clone(o.Gateways), slices.Clone(o.Reserved)
		p.low[kind{o.ID, f}] = &mine
		p.wake()
	}
}

// room returns how many addresses of the node's blocks are free, give or take reserved
// ones and holes.
func (s *state) room(overlayID string, family int) (n uint64) {
	for _, k := range s.blocks {
		if k.OverlayID == overlayID && familyOf(k.Prefix.Addr()) == family && !k.Returning {
			n += sizeOf(k.Prefix) - min(k.Next, sizeOf(k.Prefix)) + uint64(len(k.Freed))
		}
	}
	return n
}

// isLow: there is something to lease ahead.
func (p *Pool) isLow() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.low) > 0
}

// leaseAhead leases what noteLow noted. What fails is noted again by the next Assign.
func (p *Pool) leaseAhead(ctx context.Context) {
	if p.talking(ctx) != nil {
		return
	}
	defer p.silent()
	p.mu.Lock()
	low := p.low
	p.low = nil
	p.mu.Unlock()
	ctx, cancel := context.WithTimeout(ctx, requestFor)
	defer cancel()
	for k, o := range low {
		p.mu.Lock()
		still := p.usable() && p.s.room(k.overlayID, k.family) < lowWater // an Assign may have asked meanwhile
		p.mu.Unlock()
		if !still {
			continue
		}
		if err := p.take(ctx, &Request{Overlay: o}, k.family); err != nil {
			p.cfg.Log.Debug("no block leased ahead", "overlay", o.Name, "err", err)
		}
	}
}
