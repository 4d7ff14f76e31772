package crypto

import (
	"sync"
	"sync/atomic"
	"testing"

	"pgregory.net/rapid"

	_ "github.com/tulle-net/tulle/internal/proptest"
)

// modelWindow is what replayWindow has to do, with a map and a bound.
type modelWindow struct {
	seen map[uint64]bool
	end  uint64
}

func (m *modelWindow) accept(counter uint64) bool {
	if counter+ReplayWindow < m.end || m.seen[counter] {
		return false
	}
	m.seen[counter] = true
	m.end = max(m.end, counter+1)
	return true
}

// TestReplayWindowModel drives window and model with the same random history,
// most of it near the edges of the window and of blocks.
func TestReplayWindowModel(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var w replayWindow
		m := modelWindow{seen: map[uint64]bool{}}
		near := rapid.Int64Range(-70, 70)
		at := []int64{0, -ReplayWindow, ReplayWindow, -windowBlocks * blockBits, windowBlocks * blockBits, -ReplayWindow / 2}
		for range rapid.IntRange(1, 200).Draw(t, "datagrams") {
			var counter uint64
			if rapid.IntRange(0, 9).Draw(t, "kind") == 0 {
				counter = rapid.Uint64Range(0, SessionDatagrams-1).Draw(t, "anywhere")
			} else {
				c := int64(m.end) + at[rapid.IntRange(0, len(at)-1).Draw(t, "edge")] + near.Draw(t, "near")
				counter = uint64(min(max(c, 0), SessionDatagrams-1))
			}
			fresh := w.fresh(counter)
			want := m.accept(counter)
			if got := w.accept(counter); got != want || fresh != want {
				t.Fatalf("accept(%d) = %t, fresh = %t, want %t; end %d", counter, got, fresh, want, m.end)
			}
			if w.end.Load() != m.end || w.accepted.Load() != uint64(len(m.seen)) {
				t.Fatalf("end %d, accepted %d, want %d, %d", w.end.Load(), w.accepted.Load(), m.end, len(m.seen))
			}
		}
	})
}

// TestReplayWindowEdges: the window is exactly ReplayWindow wide, and works to
// the last counter.
func TestReplayWindowEdges(t *testing.T) {
	for _, top := range []uint64{ReplayWindow - 1, ReplayWindow, 100_000, SessionDatagrams - 1} {
		var w replayWindow
		if !w.accept(top) {
			t.Fatalf("%d is refused", top)
		}
		if oldest := top - (ReplayWindow - 1); !w.accept(oldest) {
			t.Errorf("%d, the oldest within the window of %d, is refused", oldest, top)
		}
		if top >= ReplayWindow && w.accept(top-ReplayWindow) {
			t.Errorf("%d, behind the window of %d, is accepted", top-ReplayWindow, top)
		}
		for c := top - (ReplayWindow - 1) + 1; c < top; c++ {
			if !w.accept(c) || w.accept(c) {
				t.Fatalf("%d, below %d, is not accepted once", c, top)
			}
		}
		if w.accept(top) {
			t.Errorf("%d is accepted twice", top)
		}
	}
}

// TestReplayWindowBetween: a worker that has taken a word for a later block, and
// not moved the end yet, has made the word's earlier block too old.
func TestReplayWindowBetween(t *testing.T) {
	var w replayWindow
	const later = (windowBlocks+2)<<blockBits | 1
	w.ring[2].Store(later)
	if c := uint64(2*blockBits + 5); w.fresh(c) || w.accept(c) || w.ring[2].Load() != later {
		t.Errorf("counter %d takes the word of a later block: %#x", c, w.ring[2].Load())
	}
}

// TestReplayWindowMark: a worker that was overtaken between reading a word and
// writing it has not marked anything.
func TestReplayWindowMark(t *testing.T) {
	const counter, earlier = 7*blockBits + 3, 6<<blockBits | 0xff
	for name, now := range map[string]uint64{
		"the same counter":    7<<blockBits | 1<<3,
		"another of the word": 7<<blockBits | 1<<4,
		"a later block":       (7+windowBlocks)<<blockBits | 1,
	} {
		var slot atomic.Uint64
		slot.Store(now)
		if mark(&slot, earlier, counter) || slot.Load() != now {
			t.Errorf("overtaken by %s: marked, and the word is %#x", name, slot.Load())
		}
	}
	var slot atomic.Uint64
	slot.Store(earlier)
	if !mark(&slot, earlier, counter) || slot.Load() != 7<<blockBits|1<<3 {
		t.Errorf("not overtaken: the word is %#x", slot.Load())
	}
}

// TestReplayWindowConcurrent: eight workers are given every counter. Each is
// accepted once: none twice, and none is lost, as all are within the window of
// where the workers are. Half of them go the same way, where who is behind is
// faster and catches up, so that they meet at one bit; the others go other ways,
// and meet them at other bits of a word.
func TestReplayWindowConcurrent(t *testing.T) {
	const (
		workers = 8
		step    = ReplayWindow / 2
		rounds  = 48
	)
	var w replayWindow
	accepted := make([]atomic.Uint32, step*rounds)
	for round := range rounds {
		var wg sync.WaitGroup
		for worker := range workers {
			// Odd, so that every counter of the step is visited.
			stride := []int{1, 1, 1, 1, 3, 33, 1025, step - 1}[worker]
			wg.Go(func() {
				for i := range step {
					if c := uint64(round*step + i*stride%step); w.accept(c) {
						accepted[c].Add(1)
					}
				}
			})
		}
		wg.Wait()
	}
	for c := range accepted {
		if n := accepted[c].Load(); n != 1 {
			t.Fatalf("counter %d is accepted %d times", c, n)
		}
	}
	if w.accepted.Load() != step*rounds || w.end.Load() != step*rounds {
		t.Errorf("accepted %d, end %d, want %d", w.accepted.Load(), w.end.Load(), step*rounds)
	}
}

// TestReplayWindowRace: workers race far ahead of each other, so that words of
// the ring are taken over by later blocks in the middle of it. Nothing is
// accepted twice.
func TestReplayWindowRace(t *testing.T) {
	const counters = windowBlocks * blockBits * 3
	var w replayWindow
	accepted := make([]atomic.Uint32, counters)
	var wg sync.WaitGroup
	for worker := range 8 {
		wg.Go(func() {
			stride := []int{1, 1, 33, 97, 1025, 8193, 16385, 5}[worker] // odd, so that all are visited
			for i := range counters {
				c := uint64(i * stride % counters)
				if w.accept(c) {
					accepted[c].Add(1)
				}
			}
		})
	}
	wg.Wait()
	total := uint64(0)
	for c := range accepted {
		n := accepted[c].Load()
		total += uint64(n)
		if n > 1 {
			t.Fatalf("counter %d is accepted %d times", c, n)
		}
	}
	if w.end.Load() != counters || w.accepted.Load() != total {
		t.Errorf("end %d, accepted %d, want %d, %d", w.end.Load(), w.accepted.Load(), counters, total)
	}
}
