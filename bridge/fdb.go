package bridge

import (
	"sync/atomic"

	"github.com/puzpuzpuz/xsync/v4"

	"github.com/tulle-net/tulle/ether"
)

// A learnt MAC that has moved maxMoves times within movesWithin ticks of the first, and
// was never silent for thawAfter, is two stations': it stays where it is (RFC 7432,
// section 15.1).
const (
	maxMoves    = 5
	movesWithin = 180 * second
)

// fdb is the forwarding database of one bridge: MAC → place. Look-ups and
// refreshes take no lock; only a MAC that is new, moved or gone locks its bucket.
type fdb struct {
	entries   *xsync.Map[ether.MAC, *entry]
	size      atomic.Int64 // without those that tables name
	tables    atomic.Int64 // those
	strangers atomic.Int64
	frozen    atomic.Int64
	moves     atomic.Uint64
	max       int64 // entries in all
	perPort   int64 // entries of one place
	// own are the MACs of this node's endpoints, and so no strangers.
	own *xsync.Map[ether.MAC, struct{}]
	// strange is told when a port has learnt a stranger, froze when a MAC was frozen.
	strange func()
	froze   func(ether.MAC)
}

// entry is immutable but for seen: a move replaces it.
type entry struct {
	at       *place
	static   bool         // never moves, never ages: a port's own
	table    *Endpoint    // never moves, never ages: as the tables say; nil: they do not
	stranger bool         // learnt at a port, and no endpoint of this node
	frozen   bool         // has moved too often: it does not move any more
	moves    uint8        // within movesWithin from since
	since    int64        // tick of the first of them
	seen     atomic.Int64 // tick of the last frame from this MAC
}

type learned uint8

const (
	known   learned = iota // was there
	fresh                  // is new
	moved                  // was elsewhere
	limited                // not learnt: a bound is reached
	fixed                  // not learnt: the MAC is static elsewhere
	claimed                // not learnt: the tables say that the MAC is elsewhere
	frozen                 // not learnt: the MAC was elsewhere too often
)

func newFDB(maxMACs, maxPerPort int) *fdb {
	return &fdb{
		entries: xsync.NewMap[ether.MAC, *entry](), max: int64(maxMACs), perPort: int64(maxPerPort),
		own: xsync.NewMap[ether.MAC, struct{}](),
	}
}

// lookup returns where mac lives, or nil.
func (f *fdb) lookup(mac ether.MAC) *place {
	e, ok := f.entries.Load(mac)
	if !ok || e.at.gone.Load() {
		return nil
	}
	return e.at
}

// learn notes that a frame with source mac came from at. now is in ticks.
func (f *fdb) learn(mac ether.MAC, at *place, now int64) learned {
	e, ok := f.entries.Load(mac)
	if ok && e.at == at {
		// A store dirties the cache line for all workers: once a tick is enough.
		if e.seen.Load() != now {
			e.seen.Store(now)
		}
		return known
	}
	if ok {
		if why, held := e.held(now); held {
			return why
		}
	}
	return f.put(mac, at, now)
}

// thawAfter is how long, in ticks, a frozen MAC must be silent where it is, to move again
// when it is heard elsewhere: a loop that is over, or a second station that is gone.
const thawAfter = 5 * second

// held says why the entry does not move, if it does not.
func (e *entry) held(now int64) (learned, bool) {
	switch {
	case e.static:
		return fixed, true
	case e.table != nil:
		return claimed, true
	case e.frozen && !e.silent(now):
		return frozen, true
	}
	return 0, false
}

// silent reports whether nothing was heard where the entry is for thawAfter.
func (e *entry) silent(now int64) bool { return now-e.seen.Load() > thawAfter }

// put makes or moves a learnt entry.
func (f *fdb) put(mac ether.MAC, at *place, now int64) (result learned) {
	stranger, froze := false, false
	f.entries.Compute(mac, func(old *entry, loaded bool) (*entry, xsync.ComputeOp) {
		switch {
		case at.gone.Load():
			result = limited
			return old, xsync.CancelOp
		case loaded && old.at == at:
			result = known
			return old, xsync.CancelOp
		}
		e := &entry{at: at}
		if loaded {
			if why, held := old.held(now); held {
				result = why
				return old, xsync.CancelOp
			}
			if e.moves, e.since = old.moved(now); e.moves == maxMoves && !old.frozen {
				result, froze = frozen, true
				f.frozen.Add(1)
				return old.with(func(e *entry) { e.frozen, e.moves = true, 0 }), xsync.UpdateOp
			}
		}
		if at.macs.Add(1) > f.perPort {
			at.macs.Add(-1)
			result = limited
			return old, xsync.CancelOp
		}
		if loaded {
			old.at.macs.Add(-1)
			f.countStranger(old, -1)
			if old.frozen {
				f.frozen.Add(-1)
			}
			f.moves.Add(1)
			result = moved
		} else {
			if f.size.Add(1) > f.max {
				f.size.Add(-1)
				at.macs.Add(-1)
				result = limited
				return old, xsync.CancelOp
			}
			result = fresh
		}
		stranger = f.isStranger(mac, e)
		e.stranger = stranger
		f.countStranger(e, 1)
		e.seen.Store(now)
		return e, xsync.UpdateOp
	})
	if stranger && f.strange != nil {
		f.strange()
	}
	if froze && f.froze != nil {
		f.froze(mac)
	}
	return result
}

// moved returns the count of moves with another one now, which is none if the entry's
// place has gone, and the first after a silence that ends a freeze, too.
func (e *entry) moved(now int64) (moves uint8, since int64) {
	switch {
	case e.at.gone.Load():
		return 0, 0
	case e.moves == 0 || now-e.since > movesWithin || e.silent(now):
		return 1, now
	}
	return e.moves + 1, e.since
}

// with returns a changed copy.
func (e *entry) with(change func(*entry)) *entry {
	next := &entry{at: e.at, static: e.static, table: e.table, stranger: e.stranger, frozen: e.frozen, moves: e.moves, since: e.since}
	next.seen.Store(e.seen.Load())
	change(next)
	return next
}

func (f *fdb) isStranger(mac ether.MAC, e *entry) bool {
	_, own := f.own.Load(mac)
	return !own && e.at.port != nil && !e.static && e.table == nil
}

// count counts an entry that comes (1) or goes (-1).
func (f *fdb) count(e *entry, n int64) {
	if e.table != nil {
		f.tables.Add(n)
		return
	}
	e.at.macs.Add(n)
	f.size.Add(n)
	f.countStranger(e, n)
	if e.frozen {
		f.frozen.Add(n)
	}
}

func (f *fdb) countStranger(e *entry, n int64) {
	if e.stranger {
		e.at.strangers.Add(n)
		f.strangers.Add(n)
	}
}

// pin makes mac static at its place, beyond the limits and above what tables say.
func (f *fdb) pin(mac ether.MAC, at *place) {
	f.set(mac, &entry{at: at, static: true}, func(*entry) bool { return true })
}

// claim has mac where the tables say that it is, beyond the limits, unless it is a
// port's own.
func (f *fdb) claim(mac ether.MAC, at *place, e *Endpoint) {
	f.set(mac, &entry{at: at, table: e}, func(old *entry) bool { return !old.static })
}

// set makes or replaces an entry, if the old one may be; none at a place that is gone.
func (f *fdb) set(mac ether.MAC, e *entry, may func(old *entry) bool) {
	f.entries.Compute(mac, func(old *entry, loaded bool) (*entry, xsync.ComputeOp) {
		if e.at.gone.Load() || loaded && !may(old) {
			return old, xsync.CancelOp
		}
		if loaded {
			f.count(old, -1)
		}
		f.count(e, 1)
		return e, xsync.UpdateOp
	})
}

// setOwn says whether mac is an endpoint's of this node, and what was learnt of it no stranger.
func (f *fdb) setOwn(mac ether.MAC, own bool) {
	if own {
		f.own.Store(mac, struct{}{})
	} else {
		f.own.Delete(mac)
	}
	f.entries.Compute(mac, func(old *entry, loaded bool) (*entry, xsync.ComputeOp) {
		if !loaded || f.isStranger(mac, old) == old.stranger {
			return old, xsync.CancelOp
		}
		f.countStranger(old, -1)
		e := old.with(func(e *entry) { e.stranger = !e.stranger })
		f.countStranger(e, 1)
		return e, xsync.UpdateOp
	})
}

// unfreeze lets mac move again; it reports whether it was frozen.
func (f *fdb) unfreeze(mac ether.MAC) (was bool) {
	f.entries.Compute(mac, func(old *entry, loaded bool) (*entry, xsync.ComputeOp) {
		if was = loaded && old.frozen; !was {
			return old, xsync.CancelOp
		}
		f.frozen.Add(-1)
		return old.with(func(e *entry) { e.frozen, e.moves = false, 0 }), xsync.UpdateOp
	})
	return was
}

// age removes what was not seen since the tick before.
func (f *fdb) age(before int64) {
	f.remove(func(mac ether.MAC, e *entry) bool {
		return !e.static && e.table == nil && e.seen.Load() < before && !f.stays(mac, e)
	})
}

// stays reports whether an entry is of an endpoint of this node, which the tables say is
// here: everybody is told to send to it, so nobody asks it to speak.
func (f *fdb) stays(mac ether.MAC, e *entry) bool {
	if e.at.port == nil {
		return false
	}
	_, own := f.own.Load(mac)
	return own
}

// forget removes everything at p, which must be marked gone, static entries too.
func (f *fdb) forget(p *place) {
	f.remove(func(_ ether.MAC, e *entry) bool { return e.at == p })
}

func (f *fdb) remove(match func(ether.MAC, *entry) bool) {
	f.entries.Range(func(mac ether.MAC, e *entry) bool {
		if match(mac, e) {
			f.removeOne(mac, func(e *entry) bool { return match(mac, e) })
		}
		return true
	})
}

func (f *fdb) removeOne(mac ether.MAC, match func(*entry) bool) {
	f.entries.Compute(mac, func(now *entry, loaded bool) (*entry, xsync.ComputeOp) {
		if !loaded || !match(now) {
			return now, xsync.CancelOp // moved or refreshed meanwhile
		}
		f.count(now, -1)
		return now, xsync.DeleteOp
	})
}
