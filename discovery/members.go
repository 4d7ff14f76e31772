package discovery

import (
	"bytes"
	"cmp"
	"context"
	"encoding/binary"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"github.com/hashicorp/serf/serf"

	"github.com/tulle-net/tulle/crypto"
)

const (
	// maxPeers bounds how many other members are listed.
	maxPeers = 4096
	// refreshEvery looks at Serf's members even if no event came.
	refreshEvery = time.Second
)

// peer is another node, alive or not. Discovery.mu guards it.
type peer struct {
	status  Status
	gossip  netip.AddrPort
	card    card
	list    *list  // the newest that was pulled; nil: none yet
	have    digest // of card when list was pulled
	refused string // why it is not listed; it is logged once
	pulling bool
	wake    chan struct{} // what is wanted changed

	// confirmed: over TCP, what answers at gossip said that it is this node, at
	// this VTEP, in this boot. It lasts while all three stay and the node is
	// alive; then list is not nil.
	confirmed bool
	zero      time.Time // when its clock was zero, see reply
	asked     time.Time // when it last answered
	recheck   time.Time // when it is asked again

	passport *crypto.Passport // nil in an open cluster
	extra    string           // that OnExtra was told
	tables   uint64           // version of what it has to tell; 0: nothing
}

// lacking reports whether p should be asked who it is and what it carries.
func (p *peer) lacking(now time.Time) bool {
	return p.refused == "" && p.status == Alive &&
		(!p.confirmed || p.have != p.card.digest || p.due(now))
}

// due reports whether p, confirmed as it is, should be asked again.
func (p *peer) due(now time.Time) bool { return !now.Before(p.recheck) }

// follow keeps peers up to date until stop is closed, and starts pulls until
// ctx ends.
func (d *Discovery) follow(ctx context.Context, s *serf.Serf, stop <-chan struct{}) {
	tick := time.NewTicker(refreshEvery)
	defer tick.Stop()
	for {
		d.refresh(ctx, s)
		select {
		case <-d.moved:
		case <-tick.C:
		case <-stop:
			return
		}
	}
}

// takeEvents takes Serf's events until stop is closed. It asks Serf nothing:
// Serf holds its locks while an event waits to be taken.
func (d *Discovery) takeEvents(stop <-chan struct{}) {
	for {
		select {
		case e := <-d.events:
			d.take(e)
		case <-stop:
			// Serf's last goroutine ends when it has got rid of its events.
			for {
				select {
				case <-d.events:
				case <-time.After(10 * time.Millisecond):
					return
				}
			}
		}
	}
}

func (d *Discovery) take(e serf.Event) {
	switch e := e.(type) {
	case serf.UserEvent:
		d.takeFlood(e.Name, e.Payload)
	case serf.MemberEvent:
		ring(d.moved)
	}
}

// refresh brings peers up to what Serf knows. Events are only a bell for it:
// one that was lost does no harm.
func (d *Discovery) refresh(ctx context.Context, s *serf.Serf) {
	news := d.update(ctx, d.others(s))
	for name, extra := range news {
		d.cfg.Secure.OnExtra(name, []byte(extra))
	}
}

// others returns the other members as Serf knows them, whatever version they
// speak; of a secure cluster those whose passport verifies, under their own
// names.
func (d *Discovery) others(s *serf.Serf) []serf.Member {
	members := s.Members()
	if d.passports == nil {
		return slices.DeleteFunc(members, func(m serf.Member) bool { return m.Name == d.cfg.Name })
	}
	now := time.Now()
	listed := make(map[string]struct{}, len(members))
	out := members[:0]
	for _, m := range members {
		name, at, ok := parseRecord(m.Name)
		if !ok || name == d.cfg.Name {
			continue
		}
		listed[name] = struct{}{}
		if _, _, ok := d.passports.current(name, at, now); ok {
			m.Name = name
			out = append(out, m)
		}
	}
	d.passports.forget(listed)
	return out
}

// update brings peers up to members, and returns what OnExtra has to be told.
func (d *Discovery) update(ctx context.Context, members []serf.Member) map[string]string {
	now := time.Now()
	d.mu.Lock()
	defer d.mu.Unlock()
	changed, newer := false, false
	news := map[string]string{}
	seen := make(map[string]struct{}, len(members))
	for _, m := range members {
		sight, ok := d.sight(m, now)
		if !ok {
			continue
		}
		p := d.peers[m.Name]
		if p == nil {
			if len(d.peers) >= maxPeers {
				continue
			}
			p = &peer{wake: make(chan struct{}, 1)}
			d.peers[m.Name] = p
		}
		seen[m.Name] = struct{}{}
		if p.tables != sight.tables {
			p.tables, newer = sight.tables, true
		}
		if d.become(m.Name, p, sight) {
			changed = true
		}
		if p.passport != nil && p.refused == "" && d.cfg.Secure.OnExtra != nil {
			if extra := string(p.passport.Extra[headBytes:]); extra != p.extra {
				p.extra, news[m.Name] = extra, extra
			}
		}
		if p.lacking(now) && !p.pulling && ctx.Err() == nil {
			p.pulling = true
			d.pulls.Go(func() { d.pull(ctx, m.Name, p) })
		}
	}
	for name := range d.peers {
		if _, ok := seen[name]; !ok {
			delete(d.peers, name)
			changed = true
		}
	}
	if changed || newer {
		d.renew()
	}
	if changed {
		d.tell()
	}
	if newer {
		ring(d.newer)
	}
	return news
}

// sight returns what Serf and m's tags say of m; false if its passport is no
// longer good.
func (d *Discovery) sight(m serf.Member, at time.Time) (peer, bool) {
	now := peer{gossip: gossipAddr(m.Addr, m.Port)}
	switch m.Status {
	case serf.StatusFailed:
		now.status = Failed
	case serf.StatusLeft:
		now.status = Left
	default: // also one that said it will leave: it is there until it is not
		now.status = Alive
	}
	var c card
	var err error
	if d.passports == nil {
		if c, err = parseTags(m.Tags); err == nil {
			now.tables, err = parseTables(m.Tags)
		}
	} else {
		var ok bool
		if now.passport, c, ok = d.passports.current(m.Name, now.gossip, at); !ok {
			return peer{}, false
		}
		if now.passport.Wire != secureWire {
			err = fmt.Errorf("it speaks wire version %d and this node %d: run one release of tulle on both", now.passport.Wire, secureWire)
		} else {
			now.tables = binary.BigEndian.Uint64(now.passport.Extra[bootBytes:])
		}
	}
	now.card = c
	switch {
	case err != nil:
		now.refused = err.Error()
	case c.vtep.Addr() != now.gossip.Addr():
		// Else somebody who answers at an address of his own could name any VTEP.
		now.refused = fmt.Sprintf("its VTEP %s is not at its gossip address %s", c.vtep, now.gossip)
	case c.vtep == d.cfg.VTEP && now.status == Alive:
		now.refused = "it claims this node's own VTEP " + c.vtep.String()
	}
	return now, true
}

// become makes p, of that name, what is known of it now, and reports whether
// that is news. d.mu is held.
func (d *Discovery) become(name string, p *peer, now peer) bool {
	if now.refused != "" && now.refused != p.refused {
		d.log.Warn("a member is left out", "peer", name, "err", now.refused)
	}
	if p.status == now.status && p.gossip == now.gossip && p.card == now.card && p.refused == now.refused && samePassport(p.passport, now.passport) {
		p.passport = now.passport
		return false
	}
	if now.status != Alive || now.refused != "" || p.gossip != now.gossip ||
		p.card.vtep != now.card.vtep || p.card.boot != now.card.boot ||
		p.passport != nil && p.passport.Key != now.passport.Key {
		p.confirmed = false
	}
	p.status, p.gossip, p.card, p.refused, p.passport = now.status, now.gossip, now.card, now.refused, now.passport
	ring(p.wake)
	return true
}

// samePassport reports whether two passports say the same, but for the version of
// tables: some change that ten times a second.
func samePassport(a, b *crypto.Passport) bool {
	if a == b || a == nil || b == nil || a.Wire != secureWire || b.Wire != secureWire {
		return a == b
	}
	return a.Key == b.Key && a.Serial == b.Serial && a.Keeper == b.Keeper && a.Expires.Equal(b.Expires) &&
		bytes.Equal(a.Extra[headBytes:], b.Extra[headBytes:])
}

// renew makes anew what Members shows. d.mu is held.
func (d *Discovery) renew() {
	members := make([]Member, 0, len(d.peers)+1)
	self := Member{
		Name: d.cfg.Name, Self: true, Status: Alive, Confirmed: true, VTEP: d.cfg.VTEP, Gossip: d.self,
		Overlays: d.carried.Load().overlays,
	}
	self.show(d.own.Load())
	members = append(members, self)
	for name, p := range d.peers {
		if p.refused != "" {
			continue
		}
		m := Member{Name: name, Status: p.status, Confirmed: p.confirmed, VTEP: p.card.vtep, Gossip: p.gossip, Tables: p.tables}
		m.show(p.passport)
		if p.list != nil && (p.confirmed || p.status != Alive) {
			m.Overlays = p.list.overlays
		}
		members = append(members, m)
	}
	slices.SortFunc(members, func(a, b Member) int { return cmp.Compare(a.Name, b.Name) })
	d.members.Store(&members)
}

// show fills in what p says, which may be nil.
func (m *Member) show(p *crypto.Passport) {
	if p != nil {
		m.Passport, m.Keeper, m.Extra = p, p.Keeper, p.Extra[headBytes:]
	}
}

// tell rings for the listener, and for keepJoined.
func (d *Discovery) tell() {
	ring(d.changed)
	ring(d.kick)
}

// gossipAddr returns the address that memberlist keeps as a slice.
func gossipAddr(ip []byte, port uint16) netip.AddrPort {
	a, _ := netip.AddrFromSlice(ip)
	return netip.AddrPortFrom(a.Unmap(), port)
}
