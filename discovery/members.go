package discovery

import (
	"bytes"
	"cmp"
	"context"
	"encoding/binary"
	"fmt"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/hashicorp/serf/serf"

	"github.com/tulle-net/tulle/crypto"
)

const (
	// maxPeers bounds how many other members are listed.
	maxPeers = 4096
	// refreshEvery looks at Serf's members even if no event came: at a thousand of
	// them that takes a millisecond, so for each refreshMembers it is done that much
	// more seldom.
	refreshEvery   = time.Second
	refreshMembers = 128
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
	var next time.Time
	for {
		only := d.sighted.take()
		if now := time.Now(); only == nil || !now.Before(next) {
			only = nil
			next = now.Add(refreshEvery * time.Duration(1+s.NumNodes()/refreshMembers))
		}
		d.refresh(ctx, s, only)
		t := time.NewTimer(time.Until(next))
		select {
		case <-d.moved:
		case <-t.C:
		case <-stop:
			t.Stop()
			return
		}
		t.Stop()
	}
}

// sighted are the records of which Serf has told that they are others now.
type sighted struct {
	mu    sync.Mutex
	names map[string]struct{}
	all   bool
}

func (s *sighted) note(e serf.MemberEvent) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if e.Type == serf.EventMemberReap {
		s.all = true // they are not among Serf's members any more
	}
	if s.names == nil {
		s.names = make(map[string]struct{})
	}
	for _, m := range e.Members {
		s.names[m.Name] = struct{}{}
	}
}

// everybody has all be looked at.
func (s *sighted) everybody() {
	s.mu.Lock()
	s.all = true
	s.mu.Unlock()
}

// take returns those since the last call; nil: all.
func (s *sighted) take() map[string]struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	out, all := s.names, s.all
	s.names, s.all = nil, false
	if all {
		return nil
	}
	if out == nil {
		out = map[string]struct{}{}
	}
	return out
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
		d.sighted.note(e)
		ring(d.moved)
	}
}

// refresh brings peers up to what Serf knows, those of some records or of all (nil).
// Events only say which ones to look at: one that was lost does no harm for long.
func (d *Discovery) refresh(ctx context.Context, s *serf.Serf, only map[string]struct{}) {
	if only != nil && len(only) == 0 {
		return
	}
	news := d.update(ctx, d.others(s, only), only == nil)
	for name, extra := range news {
		d.cfg.Secure.OnExtra(name, []byte(extra))
	}
}

// others returns the other members as Serf knows them, whatever version they
// speak; of a secure cluster those whose passport verifies, under their own
// names. They are those of some records, or all (nil).
func (d *Discovery) others(s *serf.Serf, only map[string]struct{}) []serf.Member {
	members := s.Members()
	if only != nil {
		some := make([]serf.Member, 0, len(only))
		for i := range members {
			if _, ok := only[members[i].Name]; ok {
				some = append(some, members[i])
			}
		}
		members = some
	}
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
	if only == nil {
		d.passports.forget(listed)
	}
	return out
}

// update brings peers up to members, which are all or some, and returns what OnExtra
// has to be told.
func (d *Discovery) update(ctx context.Context, members []serf.Member, all bool) map[string]string {
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
			d.newest[m.Name] = p.tables
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
		if _, ok := seen[name]; !ok && all {
			delete(d.peers, name)
			delete(d.newest, name)
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

// renew has Members be made anew. d.mu is held.
func (d *Discovery) renew() { d.members.Store(nil) }

// list returns what Members shows. d.mu is held.
func (d *Discovery) list() []Member {
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
		members = append(members, p.member(name))
	}
	slices.SortFunc(members, func(a, b Member) int { return cmp.Compare(a.Name, b.Name) })
	return members
}

// member shows p, of that name.
func (p *peer) member(name string) Member {
	m := Member{Name: name, Status: p.status, Confirmed: p.confirmed, VTEP: p.card.vtep, Gossip: p.gossip, Tables: p.tables}
	m.show(p.passport)
	if p.list != nil && (p.confirmed || p.status != Alive) {
		m.Overlays = p.list.overlays
	}
	return m
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
