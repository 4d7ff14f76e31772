package bridge

import (
	"sync"
	"testing"

	"pgregory.net/rapid"

	"github.com/tulle-net/tulle/ether"
	_ "github.com/tulle-net/tulle/internal/proptest"
)

// modelFDB is the fdb as a map and a mutex: slow, and plainly right.
type modelFDB struct {
	mu           sync.Mutex
	entries      map[ether.MAC]*modelEntry
	max, perPort int
}

type modelEntry struct {
	at     *place
	static bool
	frozen bool
	moves  int
	since  int64
	seen   int64
}

func (m *modelFDB) count(at *place) (n int) {
	for _, e := range m.entries {
		if e.at == at {
			n++
		}
	}
	return n
}

func (m *modelFDB) learn(mac ether.MAC, at *place, now int64) learned {
	m.mu.Lock()
	defer m.mu.Unlock()
	e := m.entries[mac]
	switch {
	case e != nil && e.at == at:
		e.seen = now
		return known
	case e != nil && e.static:
		return fixed
	case e != nil && e.frozen && now-e.seen <= thawAfter:
		return frozen
	}
	moves, since := 1, now
	if e != nil && e.moves > 0 && now-e.since <= movesWithin && now-e.seen <= thawAfter {
		moves, since = e.moves+1, e.since
	}
	switch {
	case e != nil && moves == maxMoves:
		e.frozen, e.moves = true, 0
		return frozen
	case m.count(at) >= m.perPort:
		return limited
	case e != nil:
		e.at, e.seen, e.moves, e.since, e.frozen = at, now, moves, since, false
		return moved
	case len(m.entries) >= m.max:
		return limited
	}
	m.entries[mac] = &modelEntry{at: at, seen: now}
	return fresh
}

// TestFDBModel drives fdb and model with the same random history.
func TestFDBModel(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		f := newFDB(12, 6)
		m := &modelFDB{entries: map[ether.MAC]*modelEntry{}, max: 12, perPort: 6}
		places := []*place{{}, {}, {}, {}}
		macs := rapid.Uint64Range(1, 20)
		pick := rapid.IntRange(0, len(places)-1)
		now := int64(1)
		f.pin(100, places[0])
		m.entries[100] = &modelEntry{at: places[0], static: true}
		t.Repeat(map[string]func(*rapid.T){
			"learn": func(t *rapid.T) {
				mac, at := ether.MAC(macs.Draw(t, "mac")), places[pick.Draw(t, "place")]
				if got, want := f.learn(mac, at, now), m.learn(mac, at, now); got != want {
					t.Fatalf("learn(%v) = %v, want %v", mac, got, want)
				}
			},
			"learn here and there": func(t *rapid.T) {
				mac := ether.MAC(macs.Draw(t, "mac"))
				for range rapid.IntRange(2, 8).Draw(t, "times") {
					at := places[pick.Draw(t, "place")]
					if got, want := f.learn(mac, at, now), m.learn(mac, at, now); got != want {
						t.Fatalf("learn(%v) = %v, want %v", mac, got, want)
					}
					now += rapid.SampledFrom([]int64{0, 1, 60}).Draw(t, "ticks")
				}
			},
			"learn static": func(t *rapid.T) {
				at := places[pick.Draw(t, "place")]
				if got, want := f.learn(100, at, now), m.learn(100, at, now); got != want {
					t.Fatalf("learn of a static MAC = %v, want %v", got, want)
				}
			},
			"unfreeze": func(t *rapid.T) {
				mac := ether.MAC(macs.Draw(t, "mac"))
				e := m.entries[mac]
				want := e != nil && e.frozen
				if want {
					e.frozen, e.moves = false, 0
				}
				if got := f.unfreeze(mac); got != want {
					t.Fatalf("unfreeze(%v) = %v, want %v", mac, got, want)
				}
			},
			"tick": func(t *rapid.T) { now += rapid.SampledFrom([]int64{1, 50, 1700}).Draw(t, "ticks") },
			"age": func(t *rapid.T) {
				before := now - rapid.Int64Range(0, 2000).Draw(t, "age")
				f.age(before)
				for mac, e := range m.entries {
					if !e.static && e.seen < before {
						delete(m.entries, mac)
					}
				}
			},
			"forget": func(t *rapid.T) {
				i := rapid.IntRange(1, len(places)-1).Draw(t, "place")
				gone := places[i]
				gone.gone.Store(true)
				f.forget(gone)
				if n := gone.macs.Load(); n != 0 {
					t.Fatalf("%d MACs at a place that was forgotten", n)
				}
				for mac, e := range m.entries {
					if e.at == gone {
						delete(m.entries, mac)
					}
				}
				places[i] = &place{}
			},
			"": func(t *rapid.T) {
				if got, want := int(f.size.Load()), len(m.entries); got != want || f.entries.Size() != want {
					t.Fatalf("size = %d (map %d), want %d", got, f.entries.Size(), want)
				}
				for mac := ether.MAC(1); mac <= 20; mac++ {
					var want *place
					if e := m.entries[mac]; e != nil {
						want = e.at
					}
					if got := f.lookup(mac); got != want {
						t.Fatalf("lookup(%v) = %p, want %p", mac, got, want)
					}
				}
				frozen := 0
				for _, e := range m.entries {
					if e.frozen {
						frozen++
					}
				}
				if got := int(f.frozen.Load()); got != frozen {
					t.Fatalf("%d are frozen, want %d", got, frozen)
				}
				for i, p := range places {
					if got, want := int(p.macs.Load()), m.count(p); got != want {
						t.Fatalf("place %d counts %d MACs, want %d", i, got, want)
					}
				}
			},
		})
	})
}

// TestFDBConcurrent moves MACs about from many workers while others age and
// forget; afterwards the counts must still add up.
func TestFDBConcurrent(t *testing.T) {
	f := newFDB(5000, 3000)
	places := make([]*place, 8)
	for i := range places {
		places[i] = &place{}
	}
	var workers sync.WaitGroup
	for w := range places {
		workers.Go(func() {
			for i := range 20000 {
				mac := ether.MAC(uint64(i)*2654435761%6000 + 1)
				f.learn(mac, places[(w+i/512)%len(places)], int64(i/100))
				f.lookup(mac)
			}
		})
	}
	workers.Go(func() {
		for i := range 50 {
			f.age(int64(i * 2))
		}
	})
	workers.Wait()
	perPlace, size := map[*place]int64{}, int64(0)
	f.entries.Range(func(_ ether.MAC, e *entry) bool {
		perPlace[e.at]++
		size++
		return true
	})
	if got := f.size.Load(); got != size || size > f.max || size == 0 {
		t.Errorf("size = %d, want %d, at most %d", got, size, f.max)
	}
	for i, p := range places {
		if got, want := p.macs.Load(), perPlace[p]; got != want || got > f.perPort {
			t.Errorf("place %d counts %d MACs, want %d, at most %d", i, got, want, f.perPort)
		}
	}
	gone := places[0]
	gone.gone.Store(true)
	f.forget(gone)
	if n := gone.macs.Load(); n != 0 {
		t.Errorf("%d MACs left at a place that was forgotten", n)
	}
	if f.learn(7000, gone, 1) != limited {
		t.Error("a place that is gone was learnt")
	}
}

func TestFDBNoAllocs(t *testing.T) {
	f := newFDB(100, 100)
	at := &place{}
	f.learn(42, at, 1)
	now := int64(1)
	if n := testing.AllocsPerRun(1000, func() { now++; f.learn(42, at, now); f.lookup(42) }); n != 0 {
		t.Errorf("learn and lookup of a known MAC: %v allocations, want 0", n)
	}
}

func BenchmarkFDB(b *testing.B) {
	f := newFDB(65536, 65536)
	at := &place{}
	for mac := ether.MAC(1); mac <= 10000; mac++ {
		f.learn(mac, at, 1)
	}
	mac := ether.MAC(0)
	for b.Loop() {
		mac = mac%10000 + 1
		f.learn(mac, at, 1)
		f.lookup(mac)
	}
}

// A frozen MAC that is silent where it is moves again.
func TestThaws(t *testing.T) {
	f := newFDB(10, 10)
	here, there := &place{}, &place{}
	const mac ether.MAC = 0x0200_0000_0001
	f.learn(mac, here, 1)
	at, now := here, int64(1)
	for f.frozen.Load() == 0 {
		if now++; now > 100 {
			t.Fatal("it does not freeze")
		}
		if at == here {
			at = there
		} else {
			at = here
		}
		f.learn(mac, at, now)
	}
	if got := f.learn(mac, at, now+thawAfter-1); got != frozen {
		t.Errorf("it is %v while it was heard where it is a moment ago, want frozen", got)
	}
	if got := f.learn(mac, at, now+thawAfter+1); got != moved || f.frozen.Load() != 0 || f.lookup(mac) != at {
		t.Errorf("it is %v after it was silent, want moved; %d are frozen", got, f.frozen.Load())
	}
}

// A MAC that was about to freeze when a loop ended, and is silent for as long, moves.
func TestSilenceEndsMoves(t *testing.T) {
	f := newFDB(10, 10)
	places := []*place{{}, {}}
	const mac ether.MAC = 0x0200_0000_0001
	f.learn(mac, places[0], 1)
	for i := range maxMoves - 1 {
		if got := f.learn(mac, places[(i+1)%2], 1); got != moved {
			t.Fatalf("move %d: %v", i+1, got)
		}
	}
	if got := f.learn(mac, places[maxMoves%2], 1+thawAfter+1); got != moved || f.frozen.Load() != 0 {
		t.Errorf("it is %v after it was silent, want moved; %d are frozen", got, f.frozen.Load())
	}
}
