package bridge

import (
	"math/rand/v2"
	"slices"
	"sync"
)

// The search for a peer's path MTU after RFC 8899 (DPLPMTUD), whose terms and
// sections are named here. A step is a second, and so is the PROBE_TIMER.
//
//	idle ─ due ─▶ confirming: the size that was found, again
//	  ▲               │ lost: a black hole (section 4.3)
//	  │               ▼
//	  ├────────── searching: all sizes of a ladder at a time, until two are close
//	  │               ▲
//	  │               │ lost
//	idle ─ new ─▶ trying: the largest size alone, which mostly is the answer
//
// It differs from the RFC in two ways. It starts with MAX_PLPMTU and not with
// BASE_PLPMTU (section 5.2), which nearly always ends it with one probe; base is
// on the first ladder, and so is the size that was lost. And it sends the sizes of
// a ladder at the same time, not one after the other (section 5.3.2 leaves the
// choice of sizes open): each size that is lost takes three seconds, in which
// hosts would lose whatever is larger, or be told of less than fits and remember
// it for ten minutes.
//
// What was found is used only once something of the search was acknowledged: a
// peer that does not answer at all says nothing about the path.
type search struct {
	mu    sync.Mutex
	state searchState
	id    uint16
	max   int // MAX_PLPMTU; 0 before the first search
	size  int // PLPMTU; 0 for not known (the Error state, section 5.2)
	// low is the largest that was acknowledged, in this search or before it; high
	// the smallest that was not.
	low, high int
	sizes     []int // PROBED_SIZEs, ascending
	sent      int   // PROBE_COUNT: how often they were sent
	due       int64 // tick from which idle may end
	raise     int64 // tick from which a larger size may be tried
	frames    uint64
}

type searchState uint8

const (
	idle searchState = iota
	trying
	searching
	confirming
)

const (
	// maxProbes is MAX_PROBES (section 5.1.2): as often is a size tried.
	maxProbes = 3
	// confirmAfter is the CONFIRMATION_TIMER, raiseAfter the PMTU_RAISE_TIMER
	// (section 5.1.1), retryAfter the wait in the Error state; in ticks.
	confirmAfter = 10 * second
	raiseAfter   = 600 * second
	retryAfter   = 30 * second
	// maxPacket is the largest IP packet, in bytes.
	maxPacket = 65535
	// unchanged: step has nothing new to say about the limit.
	unchanged = -1
)

// plateaus are sizes that paths have: what is common with less than Ethernet's
// 1,500 (tunnels, PPPoE) closely, then jumbo frames. 1,280 is IPv6's least and the
// BASE_PLPMTU; below are the 1,006 of SLIP and what leaves the 576 that each IPv4
// host takes in a sealed overlay.
var plateaus = [...]int{
	658, 1006, 1280, 1320, 1360, 1400, 1420, 1440, 1452, 1460, 1472, 1480, 1492, 1500,
	2000, 4352, 8166, 8950, 9000, 9216, 17914, 32000,
}

// step takes the search on. most is the largest size that makes sense, frames
// counts what was sent to the peer: one that nothing is sent to is not probed. It
// returns the sizes to probe now, ascending, and the limit that holds from now
// on: 0 for most, or unchanged.
func (s *search) step(now int64, most int, frames uint64) (sizes []int, id uint16, limit int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	active := frames != s.frames
	s.frames = frames
	if most != s.max && s.state != idle {
		s.state, s.due = idle, now
	}
	if s.state == idle {
		if !active || now < s.due && most == s.max {
			return nil, 0, unchanged
		}
		s.begin(now, most)
	} else {
		s.advance(now)
	}
	limit = s.limit()
	if s.state == idle {
		return nil, 0, limit
	}
	s.sent++
	return slices.Clone(s.sizes), s.id, limit
}

// limit returns what step does. While the largest size or the last one is tried
// nothing is known to be otherwise than it was.
func (s *search) limit() int {
	switch {
	case s.size == 0 || s.state == trying || s.state == confirming:
		return unchanged
	case s.size >= s.max:
		return 0
	}
	return s.size
}

// begin ends idle.
func (s *search) begin(now int64, most int) {
	if s.max == 0 {
		s.id = uint16(rand.Uint32()) // not that of a search before the peer moved
	}
	s.id++
	s.sent = 0
	if s.size != 0 && most == s.max && (s.size == s.max || now < s.raise) {
		s.state, s.low = confirming, 0
		s.sizes = append(s.sizes[:0], s.size)
		return
	}
	s.state, s.max, s.low = trying, most, 0
	if s.size < most {
		s.low = s.size
	}
	s.sizes = append(s.sizes[:0], most)
}

// advance judges what was acknowledged since the last step.
func (s *search) advance(now int64) {
	s.sizes = slices.DeleteFunc(s.sizes, func(size int) bool { return size <= s.low })
	if s.state == searching && s.low != 0 {
		s.size = s.low // rather this at once than the best later
	}
	if len(s.sizes) > 0 && s.sent < maxProbes {
		return
	}
	if len(s.sizes) > 0 {
		s.high = s.sizes[0]
	}
	switch {
	case s.state == confirming && s.low == s.size:
		s.state, s.due = idle, now+confirmAfter
		return
	case s.state == trying && s.low == s.max:
		s.end(now)
		return
	}
	// What is known still holds until something else was acknowledged.
	lost := s.state != searching
	s.state, s.sent = searching, 0
	s.sizes = ladder(s.sizes[:0], s.low, s.high)
	if lost {
		// Alone it proves little: for these seconds everything may have been lost.
		s.sizes = append(s.sizes, s.high)
	}
	if len(s.sizes) == 0 {
		s.end(now)
	}
}

// end is the SEARCH_COMPLETE state's begin (section 5.2), or, if nothing at all was
// acknowledged, that of the Error state, in which what held before still holds.
func (s *search) end(now int64) {
	s.state, s.size = idle, s.low
	s.due, s.raise = now+confirmAfter, now+raiseAfter
	if s.low == 0 {
		s.due = now + retryAfter
	}
}

// ladder appends the sizes to try between low, which passes, and high, which does
// not, or none if the two are within 1/64 or 8 bytes: the plateaus, and where there
// are none, evenly spaced ones. low is 0 where nothing is known to pass.
func ladder(sizes []int, low, high int) []int {
	const steps = 8
	if low != 0 && high-low <= max(low/64, steps) {
		return sizes
	}
	for _, p := range plateaus {
		if low < p && p < high {
			sizes = append(sizes, p)
		}
	}
	if len(sizes) > 0 || low == 0 {
		return sizes
	}
	for i := 1; i < steps; i++ {
		sizes = append(sizes, low+(high-low)*i/steps)
	}
	return sizes
}

// acknowledged notes that the peer got a probe. What was not asked, or in an
// earlier search, changes nothing.
func (s *search) acknowledged(id uint16, size int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.state != idle && id == s.id && slices.Contains(s.sizes, size) {
		s.low = max(s.low, size)
	}
}

// reset makes the search that of another path.
func (s *search) reset() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.state, s.max, s.size, s.due = idle, 0, 0, 0
}
