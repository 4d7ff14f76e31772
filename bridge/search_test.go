package bridge

import (
	"math/rand/v2"
	"slices"
	"testing"
)

// walk steps s once a second, from the second now on, over a path of mtu bytes
// that loses probes by itself, until it is idle. It returns the seconds until it
// was, and until the limit was first told, what it is, and the probes and bytes.
type walk struct {
	s             search
	now           int64 // seconds
	mtu, most     int
	loss          float64
	rnd           *rand.Rand
	deaf          bool // nothing is acknowledged
	limit         int
	toldAt, took  int64
	probes, bytes int
}

func newWalk(most, mtu int) *walk {
	return &walk{mtu: mtu, most: most, rnd: rand.New(rand.NewPCG(1, 2))}
}

// second is one step; frames are sent in it if busy. It reports whether it probed.
func (w *walk) second(busy bool) bool {
	w.now++
	frames := w.s.frames
	if busy {
		frames++
	}
	sizes, id, limit := w.s.step(w.now*second, w.most, frames)
	if limit != unchanged {
		w.limit = limit
		if w.toldAt == 0 {
			w.toldAt = w.now
		}
	}
	for _, size := range sizes {
		w.probes++
		w.bytes += size
		if size <= w.mtu && !w.deaf && w.rnd.Float64() >= w.loss {
			w.s.acknowledged(id, size)
		}
	}
	return len(sizes) > 0
}

// settle runs one search to its end.
func (w *walk) settle(t *testing.T) {
	t.Helper()
	begun := w.now + 1
	w.toldAt, w.probes, w.bytes = 0, 0, 0
	for i := 0; w.second(true); i++ {
		if i > 60 {
			t.Fatalf("no end in a minute: %+v", &w.s)
		}
	}
	w.took, w.toldAt = w.now-begun, w.toldAt-begun
}

// until runs until the limit is want and returns how many seconds that took.
func (w *walk) until(t *testing.T, want int) int64 {
	t.Helper()
	begun := w.now
	for w.limit != want {
		if w.now-begun > 1000 {
			t.Fatalf("the limit is %d after 1,000 s, want %d", w.limit, want)
		}
		w.second(true)
	}
	return w.now - begun
}

// What docs/performance.md or a release note may say of it: how many probes, when
// the limit holds, and when it is final.
func TestSearchConverges(t *testing.T) {
	for _, tt := range []struct {
		most, mtu    int
		limit        int
		probes       int
		toldAt, took int64 // seconds after the first probe
	}{
		{1500, 1500, 0, 1, 1, 1},
		{9000, 9000, 0, 1, 1, 1},
		{1500, 1492, 1492, 3 + 14 + 1 + 1, 4, 6},
		{1500, 1400, 1400, 3 + 14 + 8 + 8, 4, 6},
		{1500, 1280, 1280, 3 + 14 + 11 + 11 + 7*3, 4, 9},
		{1500, 1350, 1350, 3 + 14 + 10 + 10 + 7 + 1 + 1, 4, 9},
		{9000, 1500, 1500, 3 + 19 + 5 + 5 + 7*3 + 7*3, 4, 12},
		{9000, 1400, 1400, 3 + 19 + 13 + 13, 4, 6},
	} {
		w := newWalk(tt.most, tt.mtu)
		w.settle(t)
		t.Logf("device %d, path %d: limit %d, told after %d s, final after %d s, %d probes, %d bytes", tt.most, tt.mtu, w.limit, w.toldAt, w.took, w.probes, w.bytes)
		if w.limit != tt.limit || w.toldAt != tt.toldAt || w.took != tt.took || w.probes != tt.probes {
			t.Errorf("device %d, path %d: limit %d after %d s, final after %d s, %d probes; want %d, %d s, %d s, %d",
				tt.most, tt.mtu, w.limit, w.toldAt, w.took, w.probes, tt.limit, tt.toldAt, tt.took, tt.probes)
		}
	}
}

// Whatever the path: what is found passes, and is not far from the most that does,
// also where one probe in ten is lost.
func TestSearchIsRight(t *testing.T) {
	rnd := rand.New(rand.NewPCG(3, 4))
	for i := range 2000 {
		most := 700 + rnd.IntN(9000)
		w := newWalk(most, 658+rnd.IntN(most-658+1))
		w.rnd = rnd
		if i%2 == 1 {
			w.loss = 0.1
		}
		w.settle(t)
		found := w.limit
		if found == 0 {
			found = most
		}
		if found > w.mtu {
			t.Fatalf("device %d, path %d: found %d, which does not pass", most, w.mtu, found)
		}
		if w.loss == 0 && w.mtu-found > w.mtu/64+1 {
			t.Fatalf("device %d, path %d: found %d only", most, w.mtu, found)
		}
		if w.took > 25 {
			t.Fatalf("device %d, path %d: took %d s", most, w.mtu, w.took)
		}
	}
}

// A path that shrinks under traffic is noticed within 15 s, one that grows within 610.
func TestSearchFollows(t *testing.T) {
	w := newWalk(1500, 1500)
	w.settle(t)
	var worst int64
	for at := range int64(12) { // wherever in the round it happens
		for range at {
			w.second(true)
		}
		w.mtu = 1400
		worst = max(worst, w.until(t, 1400))
		w.settle(t)
		w.mtu = 1500
		grown := w.until(t, 0)
		if grown > 610 {
			t.Errorf("a path that grew was noticed after %d s", grown)
		}
	}
	if worst > 15 || worst < 10 {
		t.Errorf("a path that shrank was noticed after %d s, want 10 to 15", worst)
	}
	t.Logf("at worst after %d s", worst)
}

// A peer that does not answer says nothing about the path, and one that nothing
// is sent to is not asked.
func TestSearchLearnsNothingFromSilence(t *testing.T) {
	w := newWalk(1500, 1500)
	w.deaf = true
	w.settle(t)
	if w.limit != 0 || w.toldAt > 0 || w.s.size != 0 {
		t.Errorf("a deaf peer: limit %d", w.limit)
	}
	pause := 0
	for !w.second(true) {
		pause++
	}
	if pause < 28 || pause > 30 {
		t.Errorf("a deaf peer is asked again after %d s, want 30", pause)
	}
	w.deaf = false
	w.settle(t)
	w.mtu = 1400
	w.until(t, 1400)
	w.settle(t)
	w.deaf = true // and gone: what was found stays
	for range 100 {
		w.second(true)
	}
	if w.limit != 1400 {
		t.Errorf("the limit is %d when the peer is gone, want 1400 as before", w.limit)
	}
	w.deaf, w.mtu = false, 1500 // it is back, and nothing is held against its path
	if took := w.until(t, 0); took > 45 {
		t.Errorf("a peer that is back has its limit for %d s more", took)
	}
	w = newWalk(1500, 1400)
	w.settle(t)
	for range 2000 {
		if w.second(false) {
			t.Fatal("an idle peer is probed")
		}
	}
	if !w.second(true) {
		t.Error("a peer that is busy again is not probed")
	}
}

// A path over which nothing passes for some seconds is no narrower after them.
func TestSearchOutage(t *testing.T) {
	for _, mtu := range []int{1500, 1400} {
		for begin := range 15 {
			for length := range 15 {
				w := newWalk(1500, mtu)
				w.settle(t)
				limit := w.limit
				for i := range 600 {
					w.deaf = i >= begin && i < begin+length
					w.second(true)
					if w.limit != limit {
						t.Fatalf("path of %d, %d s away for %d s: limit %d, want %d", mtu, begin, length, w.limit, limit)
					}
				}
			}
		}
	}
}

// The devices' MTU changes, or the kernel learns of a path.
func TestSearchOtherDevice(t *testing.T) {
	w := newWalk(1500, 1450)
	w.settle(t)
	found := w.limit
	if found < 1440 || found > 1450 {
		t.Fatalf("found %d", found)
	}
	w.most = 1300
	w.settle(t)
	if w.limit != 0 || w.probes != 1 {
		t.Errorf("devices below the path: limit %d after %d probes, want none after 1", w.limit, w.probes)
	}
	w.most, w.mtu = 9000, 9000
	w.second(true)
	if w.limit != 0 {
		t.Errorf("a limit of %d while more is tried, want none as before", w.limit)
	}
	w.second(true)
	if w.limit != 0 || w.s.size != 9000 {
		t.Errorf("jumbo frames everywhere: limit %d, found %d, want none and 9000", w.limit, w.s.size)
	}
	w = newWalk(1500, 1300)
	w.second(true)
	w.most = 1300 // in the middle of a search
	w.settle(t)
	if w.limit != 0 || w.probes != 1 {
		t.Errorf("a device that changes during a search: limit %d after %d probes, want none after 1", w.limit, w.probes)
	}
}

// An acknowledgement that was not asked for changes nothing.
func TestSearchForged(t *testing.T) {
	w := newWalk(1500, 1400)
	w.second(true)
	for range 2 {
		w.s.acknowledged(w.s.id+1, 1500)
		w.s.acknowledged(w.s.id, 1499)
		w.s.acknowledged(w.s.id, 65535)
		w.second(true)
	}
	if w.s.low != 0 {
		t.Fatalf("%d is taken as acknowledged", w.s.low)
	}
	old := w.s.id
	w.settle(t)
	w.s.acknowledged(old, 1500) // late, when nobody waits
	w.s.reset()
	w.second(true)
	w.s.acknowledged(old, 1500)
	if w.s.low != 0 || w.limit != 1400 {
		t.Errorf("an old acknowledgement was taken: low %d, limit %d", w.s.low, w.limit)
	}
}

func TestLadder(t *testing.T) {
	if !slices.IsSorted(plateaus[:]) {
		t.Error("the plateaus are not in order")
	}
	for low := 0; low < 10000; low += 7 {
		for high := low + 1; high < 12000; high += 131 {
			l := ladder(nil, low, high)
			if !slices.IsSorted(l) || len(l) > len(plateaus) || len(l) > 0 && (l[0] <= low || l[len(l)-1] >= high) {
				t.Fatalf("ladder(%d, %d) = %v", low, high, l)
			}
		}
	}
}
