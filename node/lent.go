package node

import (
	"context"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/tulle-net/tulle/crypto"
	"github.com/tulle-net/tulle/ipam"
	"github.com/tulle-net/tulle/keeper"
)

// The functions in this file lend addresses to who asks for the endpoint later, as
// container engines do, whose address management is a driver of its own.

const (
	// ownerLent, the overlay and a key is what a lent address is assigned to.
	ownerLent = "lent/"
	// lentFor is how long one is lent without an endpoint: what an engine takes from the
	// address to the container's device, and longer. It may have been killed in between.
	lentFor = 2 * time.Minute
)

// lent is an address that is lent.
type lent struct {
	owner   string
	overlay string
	id      string // of the overlay's definition
	prefix  netip.Prefix
	since   time.Time // without an endpoint
}

// restoreLent takes up what an earlier run lent.
func (h *endpoints) restoreLent() {
	for _, ep := range h.pool.Status().Endpoints {
		if strings.HasPrefix(ep.Owner, ownerLent) && len(ep.Prefixes) > 0 {
			h.lent = append(h.lent, lent{ep.Owner, ep.Overlay, ep.OverlayID, ep.Prefixes[0], time.Now()})
		}
	}
}

// lend assigns an address of one family: want, or any. One that was lent and has no
// endpoint is lent again to who asks for it: the engine knows better whom it is for.
func (h *endpoints) lend(ctx context.Context, overlay string, family int, want netip.Addr) (netip.Prefix, error) {
	def, err := h.n.mayJoin(ctx, overlay)
	if err != nil {
		return netip.Prefix{}, err
	}
	h.callIn(time.Now())
	q := ipam.Request{Overlay: def, Owner: ownerLent + overlay + "/" + newKey(), Families: []int{family}}
	if want.IsValid() {
		if err := within(def, []netip.Addr{want}); err != nil {
			return netip.Prefix{}, err
		}
		q.Want = []netip.Addr{want}
		if q.Families[0] = 4; want.Is6() {
			q.Families[0] = 6
		}
		if p, again, err := h.lendAgain(overlay, want); again || err != nil {
			return p, err
		}
	}
	if err := h.unavoid(); err != nil {
		return netip.Prefix{}, err
	}
	a, err := h.assign(ctx, q)
	if err != nil {
		return netip.Prefix{}, err
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.lent = append(h.lent, lent{q.Owner, overlay, def.ID, a.Prefixes[0], time.Now()})
	return a.Prefixes[0], nil
}

func (h *endpoints) lendAgain(overlay string, want netip.Addr) (netip.Prefix, bool, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	i := h.lentAt(overlay, want)
	if i < 0 {
		return netip.Prefix{}, false, nil
	}
	if e := h.borrower(h.lent[i].owner); e != nil {
		return netip.Prefix{}, false, tellf(errExists, "%s belongs to %s in overlay %s: choose another address", want, e, overlay)
	}
	h.lent[i].since = time.Now()
	return h.lent[i].prefix, true, nil
}

// lentAt returns which one an address is, or -1; with h.mu.
func (h *endpoints) lentAt(overlay string, ip netip.Addr) int {
	return slices.IndexFunc(h.lent, func(l lent) bool { return l.overlay == overlay && l.prefix.Addr() == ip })
}

// borrower returns the endpoint that has a lent address, or nil; with h.mu.
func (h *endpoints) borrower(owner string) *endpoint {
	i := slices.IndexFunc(h.list, func(e *endpoint) bool { return slices.Contains(e.Lent, owner) })
	if i < 0 {
		return nil
	}
	return h.list[i]
}

// borrow gives an endpoint those of the addresses that are lent, and returns whether
// that is all of them.
func (h *endpoints) borrow(e *endpoint, ips []netip.Addr) (all bool, err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, ip := range ips {
		i := h.lentAt(e.Overlay, ip)
		if i < 0 {
			return false, nil
		}
		if other := h.borrower(h.lent[i].owner); other != nil {
			return false, tellf(errExists, "%s belongs to %s in overlay %s: choose another address", ip, other, e.Overlay)
		}
		h.lent[i].since = time.Now()
		e.Lent, e.IPs = append(e.Lent, h.lent[i].owner), append(e.IPs, h.lent[i].prefix)
	}
	return len(ips) > 0, nil
}

// takeBack ends the loan of an address. One that is not lent is no error: who
// borrowed it may have been away for longer than it was.
func (h *endpoints) takeBack(overlay string, ip netip.Addr) error {
	h.mu.Lock()
	i := h.lentAt(overlay, ip)
	if i < 0 {
		h.mu.Unlock()
		return nil
	}
	l := h.lent[i]
	if e := h.borrower(l.owner); e != nil {
		h.mu.Unlock()
		return tellf(errExists, "%s belongs to %s in overlay %s still", ip, e, overlay)
	}
	h.lent = slices.Delete(h.lent, i, i+1)
	h.mu.Unlock()
	return h.pool.Release(l.owner)
}

// callIn takes back what has been lent for too long without an endpoint, or is of an
// overlay that was removed.
func (h *endpoints) callIn(now time.Time) {
	h.mu.Lock()
	var over []lent
	for i := range h.lent {
		l := &h.lent[i]
		switch def := h.n.secure.place.SharedOverlay(l.overlay); {
		case h.borrower(l.owner) != nil:
			l.since = now
		case def != nil && def.ID != l.id, now.Sub(l.since) > lentFor:
			over = append(over, *l)
		}
	}
	h.lent = slices.DeleteFunc(h.lent, func(l lent) bool { return slices.Contains(over, l) })
	h.mu.Unlock()
	for _, l := range over {
		h.n.log.Info("a lent address has no endpoint, and is free again", "overlay", l.overlay, "ip", l.prefix.Addr())
		if err := h.pool.Release(l.owner); err != nil {
			h.n.log.Warn("an address that was lent is not given back", "overlay", l.overlay, "ip", l.prefix.Addr(), "err", err)
		}
	}
}

// lendAddress and takeAddressBack answer the local API.
func (n *Node) lendAddress(w http.ResponseWriter, r *http.Request) {
	n.admin(w, r, func(ctx context.Context, _ keeper.Client) (any, error) {
		want, err := read[AddressRequest](w, r)
		if err != nil {
			return nil, err
		}
		if want.Family == 0 {
			want.Family = 4
		}
		p, err := n.endpoints.lend(ctx, want.Overlay, want.Family, want.IP)
		if err != nil {
			return nil, err
		}
		return AddressLent{p}, nil
	})
}

func (n *Node) takeAddressBack(w http.ResponseWriter, r *http.Request) {
	n.admin(w, r, func(context.Context, keeper.Client) (any, error) {
		overlay := r.FormValue("overlay")
		ip, err := netip.ParseAddr(r.FormValue("ip"))
		if err == nil {
			err = crypto.CheckName(overlay)
		}
		if err != nil {
			return nil, bad{err}
		}
		return struct{}{}, n.endpoints.takeBack(overlay, ip)
	})
}
