package tap

import (
	"net/netip"
	"time"

	"github.com/tulle-net/tulle/ether"
)

// The functions in this file keep a station's neighbours, by the states of RFC
// 4861, section 7.3, which serve ARP as well. mu is held in all but tick.

// neighbour is a station on the link that the host sends to.
type neighbour struct {
	addr  netip.Addr
	mac   ether.MAC
	state neighbourState
	// until is when a timed state ends: for reachable by itself, for the others
	// with the timer.
	until   time.Time
	asked   int // of incomplete and probe: how often
	used    time.Time
	src     netip.Addr // of the packet that asks for an IPv6 neighbour
	waiting [][]byte   // frames behind Headroom bytes, of incomplete
}

type neighbourState uint8

const (
	incomplete neighbourState = iota // asked for; packets wait
	reachable                        // confirmed
	stale                            // known, not confirmed for a while
	delay                            // stale and used: asked soon
	probing                          // asked directly
	failed                           // does not answer; packets are dropped
)

// The times of RFC 4861, section 10; failedFor is ours.
const (
	reachableFor = 30 * time.Second
	delayFor     = 5 * time.Second
	retransmit   = time.Second
	maxAsked     = 3
	failedFor    = time.Second
)

// neighbour returns the entry of an address, a new one if there is none. It is nil
// where the table is full of those that are asked for.
func (s *station) neighbour(a netip.Addr, now time.Time) *neighbour {
	if nb := s.table[a]; nb != nil {
		return nb
	}
	if len(s.table) >= maxNeighbours && !s.evict() {
		return nil
	}
	nb := &neighbour{addr: a, used: now}
	s.table[a] = nb
	return nb
}

// evict forgets the neighbour that was not used for longest.
func (s *station) evict() bool {
	var oldest *neighbour
	for _, nb := range s.table {
		if nb.state != incomplete && (oldest == nil || nb.used.Before(oldest.used)) {
			oldest = nb
		}
	}
	if oldest == nil {
		return false
	}
	s.forget(oldest)
	return true
}

func (s *station) forget(nb *neighbour) {
	delete(s.table, nb.addr)
	if s.last == nb {
		s.last = nil
	}
}

// toNeighbour addresses a frame to a neighbour; see address.
func (s *station) toNeighbour(nb *neighbour, frame []byte, now time.Time) bool {
	nb.used = now
	if nb.state == reachable && !now.Before(nb.until) {
		nb.state = stale
	}
	switch nb.state {
	case incomplete:
		first := nb.asked == 0
		s.wait(nb, frame)
		if first {
			if nb.addr.Is6() {
				nb.src = netip.AddrFrom16([16]byte(frame[etherLen+8 : etherLen+24]))
			}
			s.ask(nb, now)
		}
		return false
	case failed:
		s.unreachable(frame, now)
		return false
	case stale:
		s.setDelay(nb, now)
	}
	nb.mac.Put(frame)
	if s.packets > 0 {
		// Earlier ones are still on their way to the worker.
		s.hold(append(make([]byte, Headroom, Headroom+len(frame)), frame...), true)
		return false
	}
	return true
}

// setDelay has a neighbour asked if nothing confirms it soon.
func (s *station) setDelay(nb *neighbour, now time.Time) {
	nb.state = delay
	s.until(nb, now.Add(delayFor))
}

// wait keeps a copy of a frame until the neighbour is known; the oldest makes room.
func (s *station) wait(nb *neighbour, frame []byte) {
	if len(nb.waiting) >= maxWaiting {
		s.heldBytes -= len(nb.waiting[0])
		nb.waiting = nb.waiting[1:]
		s.drop(dropNeighbourQueue)
	}
	if s.heldBytes+Headroom+len(frame) > maxHeldBytes {
		s.drop(dropNeighbourQueue)
		return
	}
	f := append(make([]byte, Headroom, Headroom+len(frame)), frame...)
	s.heldBytes += len(f)
	nb.waiting = append(nb.waiting, f)
}

// hold has the worker send a packet of the host's; fresh: its bytes are not counted.
func (s *station) hold(f []byte, fresh bool) {
	if fresh {
		if s.heldBytes+len(f) > maxHeldBytes {
			s.drop(dropNeighbourQueue)
			return
		}
		s.heldBytes += len(f)
	}
	s.packets++
	s.enqueue(queued{f, true})
}

// known sets a neighbour's MAC and state, and sends what waited for it.
func (s *station) known(nb *neighbour, mac ether.MAC, confirmed bool, now time.Time) {
	nb.mac, nb.asked = mac, 0
	if confirmed {
		nb.state, nb.until = reachable, now.Add(jitter(reachableFor))
	} else {
		nb.state = stale
	}
	if len(nb.waiting) == 0 {
		return
	}
	if !confirmed {
		s.setDelay(nb, now)
	}
	for _, f := range nb.waiting {
		mac.Put(f[Headroom:])
		s.hold(f, false)
	}
	nb.waiting = nil
}

// learn takes in what an ARP message, or a solicitation, says of its sender. A new
// entry is made for who asks for the host (create), as there is most likely an
// answer to come, and nobody else has to make room for it.
func (s *station) learn(a netip.Addr, mac ether.MAC, create, confirmed bool, now time.Time) {
	nb := s.table[a]
	switch {
	case nb == nil && create && len(s.table) < maxNeighbours:
		nb = &neighbour{addr: a, used: now}
		s.table[a] = nb
		s.known(nb, mac, false, now)
	case nb == nil:
	case nb.state == incomplete, nb.state == failed, nb.mac != mac, confirmed:
		s.known(nb, mac, confirmed, now)
	}
}

// advertised takes in a neighbour advertisement (RFC 4861, section 7.2.5).
func (s *station) advertised(m ether.ND, mac ether.MAC, named bool, now time.Time) {
	nb := s.table[m.Target()]
	if nb == nil {
		return
	}
	unknown := nb.state == incomplete || nb.state == failed
	switch {
	case unknown && !named:
	case unknown:
		s.known(nb, mac, m.Solicited(), now)
	case named && mac != nb.mac && !m.Override():
		if nb.state == reachable {
			nb.state = stale
		}
	case named && mac != nb.mac:
		s.known(nb, mac, m.Solicited(), now)
	case m.Solicited():
		s.known(nb, nb.mac, true, now)
	}
}

// ask sends a request for a neighbour, to all or to itself.
func (s *station) ask(nb *neighbour, now time.Time) {
	nb.asked++
	s.until(nb, now.Add(retransmit))
	to := ether.MAC(0)
	if nb.state == probing {
		to = nb.mac
	}
	if nb.addr.Is4() {
		if to == 0 {
			to = ether.Broadcast
		}
		s.send(ether.AppendARP(newFrame(), to, ether.ARPRequest, s.mac, s.source(nb.addr), 0, nb.addr))
		return
	}
	src := nb.src
	if !s.has(src) {
		src = s.source(nb.addr)
	}
	s.send(ether.AppendSolicitation(newFrame(), to, s.mac, src, nb.addr))
}

// until has the timer look at a neighbour then.
func (s *station) until(nb *neighbour, at time.Time) {
	nb.until = at
	if !s.due.IsZero() && !at.Before(s.due) {
		return
	}
	s.due = at
	if s.timer == nil {
		s.timer = time.AfterFunc(time.Until(at), s.tick)
		return
	}
	s.timer.Reset(time.Until(at))
}

// tick does what is due for the neighbours in timed states.
func (s *station) tick() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return
	}
	now := time.Now()
	s.due = time.Time{}
	var next time.Time
	for _, nb := range s.table {
		if nb.timed() && !now.Before(nb.until) {
			s.expire(nb, now)
		}
		if s.table[nb.addr] == nb && nb.timed() && (next.IsZero() || nb.until.Before(next)) {
			next = nb.until
		}
	}
	if !next.IsZero() {
		s.due = next
		s.timer.Reset(time.Until(next))
	}
}

// timed reports whether the timer ends the neighbour's state.
func (nb *neighbour) timed() bool { return nb.state != reachable && nb.state != stale }

// expire ends a timed state.
func (s *station) expire(nb *neighbour, now time.Time) {
	switch {
	case nb.state == delay:
		nb.state, nb.asked = probing, 0
		s.ask(nb, now)
	case nb.state == failed:
		s.forget(nb)
	case nb.asked < maxAsked:
		s.ask(nb, now)
	case nb.state == probing:
		s.forget(nb) // the next packet asks everybody
	default:
		for _, f := range nb.waiting {
			s.heldBytes -= len(f)
			s.unreachable(f[Headroom:], now)
		}
		nb.waiting, nb.state = nil, failed
		nb.until = now.Add(failedFor)
	}
}
