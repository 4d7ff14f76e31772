package bridge

import (
	"context"
	"net/netip"
	"time"

	"github.com/tulle-net/tulle/ether"
)

// A node asks at each of its ports who has joined what, as long as nobody else does
// (RFC 4541, section 2.1.1): where no router is, groups would be forgotten after
// minutes, or always be flooded. It asks as a switch does, without an address (IGMP) or
// with a link-local one that is the same at all nodes (MLD, which wants one), so nobody
// takes it for a router. Each port is asked for itself: what one hears, no other does.

const (
	// querierMAC is the source of what nodes themselves send to ports. It is nobody's
	// station.
	querierMAC ether.MAC = 0x0654_756c_6c65

	startupQueries    = 3
	lastMemberQueries = 2
	// lastMemberTime after somebody has left is when the last answer is too late.
	lastMemberTime = lastMemberQueries*second + second/5
	// quick is within what time hosts answer the first queries, and those after a leave.
	quick = time.Second
)

// question is a query to be sent to a port; an invalid group is for all.
type question struct {
	to    *Port
	group netip.Addr
	v6    bool
	quick bool
}

// wake has attend look at a port at that tick. s.mu is held.
func (s *snoop) wake(p *Port, at int64) {
	if p.cast.due == 0 || at < p.cast.due {
		p.cast.due = at
	}
	if at < s.due.Load() {
		s.due.Store(at)
		s.b.tunnel.kick()
	}
}

// attend does what is due at now: it asks, and forgets who has not answered. It returns
// the tick at which there is more to do.
func (s *snoop) attend(now int64) int64 {
	if !s.on {
		return never
	}
	if now < s.due.Load() {
		return s.due.Load()
	}
	var ask []question
	changed := false
	s.mu.Lock()
	next := int64(never)
	for _, p := range *s.b.ports.Load() {
		if p.cast.due <= now {
			ask = s.attendPort(p, now, ask, &changed)
		}
		next = min(next, p.cast.due)
	}
	s.due.Store(next)
	s.mu.Unlock()
	s.ring(changed)
	for _, q := range ask {
		s.send(q)
	}
	return next
}

// attendPort appends to ask what to send to p. s.mu is held.
func (s *snoop) attendPort(p *Port, now int64, ask []question, changed *bool) []question {
	c := &p.cast
	if c.next <= now {
		quick := c.startup > 0
		for family, v6 := range []bool{false, true} {
			// A gateway, which a local port is, joins nothing, and would take a query from
			// nobody's address for one that is forged.
			if !p.local && s.heard[family] <= now && s.heardAway[family] <= now {
				ask = append(ask, question{to: p, v6: v6, quick: quick})
			}
		}
		c.next = now + s.interval(c)
	}
	c.due = c.next
	for a, m := range c.joined {
		if m.until <= now {
			*changed = s.forget(p, a) || *changed
			continue
		}
		if m.asks > 0 && m.askAt <= now {
			ask = append(ask, question{to: p, group: a, v6: a.Is6(), quick: true})
			m.asks--
			m.askAt = now + second
		}
		if m.asks > 0 {
			c.due = min(c.due, m.askAt)
		}
		c.due = min(c.due, m.until)
	}
	if c.takes.Load() && max(c.routerUntil, c.overUntil) <= now || c.router.Load() && c.routerUntil <= now {
		*changed = s.setTakers(now) || *changed
	}
	for _, until := range []int64{c.routerUntil, c.overUntil} {
		if until > now {
			c.due = min(c.due, until)
		}
	}
	return ask
}

// interval returns how long it is to the next general query of a port.
func (s *snoop) interval(c *portCast) int64 {
	if c.startup > 0 {
		c.startup--
	}
	switch {
	case c.startup > 0:
		return s.times.startup
	case c.others > 0:
		return s.times.query
	}
	// Who joins says so. Only solicited-node groups are kept alive, or a report that
	// was lost is made good.
	return s.times.idle
}

// send sends a query. That the device does not take it is no drop: it is nobody's frame.
func (s *snoop) send(q question) {
	if q.to.blocked.Load() {
		return
	}
	within := time.Duration(s.times.within) * tick
	if q.quick {
		within = min(within, quick)
	}
	every := time.Duration(s.times.query) * tick
	var b []byte
	if q.v6 {
		b = ether.AppendMLDQuery(nil, querierMAC, q.group, within, every)
	} else {
		b = ether.AppendIGMPQuery(nil, querierMAC, q.group, within, every)
	}
	_ = q.to.queues[0].WriteFrame(ether.Meta{}, [][]byte{b})
}

// never is later than any tick.
const never = 1 << 62

// kick has attend look for what is due.
func (t *Tunnel) kick() {
	select {
	case t.kicked <- struct{}{}:
	default:
	}
}

// attend looks after all ports of all bridges, until ctx is done: it asks for groups
// and looks for loops.
func (t *Tunnel) attend(ctx context.Context) {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.kicked:
		case <-timer.C:
		}
		now, next := t.now(), int64(never)
		for _, b := range *t.bridges.Load() {
			next = min(next, b.snoop.attend(now), b.loops.attend(now))
		}
		timer.Reset(t.until(next))
		// Stations can cause as many kicks as they like.
		select {
		case <-ctx.Done():
			return
		case <-time.After(minPause):
		}
	}
}

// minPause is between two rounds of attend, maxRest the longest between two.
const (
	minPause = 10 * time.Millisecond
	maxRest  = time.Hour
)

// until returns how long it is to a tick.
func (t *Tunnel) until(at int64) time.Duration {
	if at >= t.now()+int64(maxRest/tick) {
		return maxRest
	}
	return max(time.Duration(at)*tick-time.Since(t.start), 0)
}
