package bridge

import (
	"sync/atomic"

	"github.com/puzpuzpuz/xsync/v4"

	"github.com/tulle-net/tulle/ether"
)

// fdb is the forwarding database of one bridge: MAC → place. Look-ups and
// refreshes take no lock; only a MAC that is new, moved or gone locks its bucket.
type fdb struct {
	entries *xsync.Map[ether.MAC, *entry]
	size    atomic.Int64
	moves   atomic.Uint64
	max     int64 // entries in all
	perPort int64 // entries of one place
}

// entry is immutable but for seen: a move replaces it.
type entry struct {
	at     *place
	static bool         // never moves, never ages
	seen   atomic.Int64 // tick of the last frame from this MAC
}

type learned uint8

const (
	known   learned = iota // was there
	fresh                  // is new
	moved                  // was elsewhere
	limited                // not learnt: a bound is reached
	fixed                  // not learnt: the MAC is static elsewhere
)

func newFDB(maxMACs, maxPerPort int) *fdb {
	return &fdb{entries: xsync.NewMap[ether.MAC, *entry](), max: int64(maxMACs), perPort: int64(maxPerPort)}
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
	if ok && e.static {
		return fixed
	}
	return f.put(mac, at, now, false)
}

// pin makes mac static at its place, beyond the limits.
func (f *fdb) pin(mac ether.MAC, at *place) { f.put(mac, at, 0, true) }

func (f *fdb) put(mac ether.MAC, at *place, now int64, static bool) (result learned) {
	f.entries.Compute(mac, func(old *entry, loaded bool) (*entry, xsync.ComputeOp) {
		switch {
		case at.gone.Load():
			result = limited
			return old, xsync.CancelOp
		case loaded && old.at == at && !static:
			result = known
			return old, xsync.CancelOp
		case loaded && old.static && !static:
			result = fixed
			return old, xsync.CancelOp
		}
		if at.macs.Add(1) > f.perPort && !static {
			at.macs.Add(-1)
			result = limited
			return old, xsync.CancelOp
		}
		if loaded {
			old.at.macs.Add(-1)
			f.moves.Add(1)
			result = moved
		} else {
			if f.size.Add(1) > f.max && !static {
				f.size.Add(-1)
				at.macs.Add(-1)
				result = limited
				return old, xsync.CancelOp
			}
			result = fresh
		}
		e := &entry{at: at, static: static}
		e.seen.Store(now)
		return e, xsync.UpdateOp
	})
	return result
}

// age removes what was not seen since the tick before.
func (f *fdb) age(before int64) {
	f.remove(func(e *entry) bool { return !e.static && e.seen.Load() < before })
}

// forget removes everything at p, which must be marked gone, static entries too.
func (f *fdb) forget(p *place) {
	f.remove(func(e *entry) bool { return e.at == p })
}

func (f *fdb) remove(match func(*entry) bool) {
	f.entries.Range(func(mac ether.MAC, e *entry) bool {
		if match(e) {
			f.entries.Compute(mac, func(now *entry, loaded bool) (*entry, xsync.ComputeOp) {
				if !loaded || !match(now) {
					return now, xsync.CancelOp // moved or refreshed meanwhile
				}
				now.at.macs.Add(-1)
				f.size.Add(-1)
				return now, xsync.DeleteOp
			})
		}
		return true
	})
}
