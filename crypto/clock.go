package crypto

import (
	"runtime/debug"
	"sync/atomic"
	"time"
)

// sourceTime is what BuildTime falls back to: this file is not older.
var sourceTime = time.Date(2026, time.November, 22, 0, 0, 0, 0, time.UTC)

// BuildTime returns the time of the commit that the binary was built from, or
// where the build does not say, that of this package.
func BuildTime() time.Time {
	t := sourceTime
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return t
	}
	for _, s := range info.Settings {
		if s.Key != "vcs.time" {
			continue
		}
		if commit, err := time.Parse(time.RFC3339, s.Value); err == nil && commit.After(t) {
			t = commit
		}
	}
	return t
}

// Clock tells the time on machines that may not know it: boards without a
// battery start in 1970 and stay there until something sets them. It is never
// before its floor, and goes on from there at the machine's pace; from the
// moment on that the machine's clock is ahead of that it is the machine's.
type Clock struct{ floor atomic.Pointer[floor] }

// floor: it was at least `at` when the monotonic clock said `when`.
type floor struct{ at, when time.Time }

// NewClock returns a clock with the latest of the times as its floor: BuildTime,
// the state's Dir.LastTime.
func NewClock(floors ...time.Time) *Clock {
	c := &Clock{}
	c.floor.Store(&floor{when: time.Now()})
	for _, t := range floors {
		c.Raise(t)
	}
	return c
}

// Now returns the time, in UTC.
func (c *Clock) Now() time.Time { return c.floor.Load().now().UTC() }

func (f *floor) now() time.Time {
	machine := time.Now()
	least := f.at.Add(machine.Sub(f.when)) // by the monotonic clock
	if machine.Before(least) {
		return least
	}
	return machine
}

// Raise tells the clock that it is at least t now. t has to be known for sure,
// as from a verified certificate's NotBefore: nothing lowers a floor again.
func (c *Clock) Raise(t time.Time) {
	for {
		old := c.floor.Load()
		f := &floor{at: t.Round(0), when: time.Now()}
		if !old.at.Add(f.when.Sub(old.when)).Before(f.at) || c.floor.CompareAndSwap(old, f) {
			return
		}
	}
}
