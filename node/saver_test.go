package node

import (
	"errors"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// TestSaver: who is told that a file is written finds in it what it has changed
// before, while a hundred who come at once are served by two writes.
func TestSaver(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var s saver
		var mu sync.Mutex
		state, file := map[int]bool{}, map[int]bool{} // what there is, and what of it is written
		var writes, under atomic.Int32
		write := func() error {
			if under.Add(1) > 1 {
				t.Error("two writes at a time")
			}
			defer under.Add(-1)
			writes.Add(1)
			mu.Lock()
			now := map[int]bool{}
			for k := range state {
				now[k] = true
			}
			mu.Unlock()
			time.Sleep(10 * time.Millisecond)
			mu.Lock()
			file = now
			mu.Unlock()
			return nil
		}
		change := func(i int) {
			mu.Lock()
			state[i] = true
			mu.Unlock()
			if err := s.save(write); err != nil {
				t.Error(err)
			}
			mu.Lock()
			defer mu.Unlock()
			if !file[i] {
				t.Errorf("%d was told that it is written, and it is not", i)
			}
		}
		var wg sync.WaitGroup
		wg.Go(func() { change(0) })
		synctest.Wait() // its write is under way
		for i := range 99 {
			wg.Go(func() { change(1 + i) })
		}
		wg.Wait()
		if n := writes.Load(); n != 2 {
			t.Errorf("%d writes for a hundred, want 2", n)
		}
		change(100)
		if n := writes.Load(); n != 3 {
			t.Errorf("%d writes, want 3: nothing is under way", n)
		}
	})
}

// TestSaverFails: a write that fails is told to all whom it was for, and to nobody
// who comes later.
func TestSaverFails(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var s saver
		full := errors.New("no space left")
		fail := func() error { time.Sleep(time.Millisecond); return full }
		var failed atomic.Int32
		var wg sync.WaitGroup
		for range 10 {
			wg.Go(func() {
				if errors.Is(s.save(fail), full) {
					failed.Add(1)
				}
			})
		}
		wg.Wait()
		if failed.Load() != 10 {
			t.Errorf("%d of 10 were told", failed.Load())
		}
		if err := s.save(func() error { return nil }); err != nil {
			t.Errorf("later: %v", err)
		}
	})
}
