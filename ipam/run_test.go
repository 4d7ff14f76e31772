package ipam

import (
	"context"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/tulle-net/tulle/store"
)

// bubbleClock is the clock of a synctest bubble.
type bubbleClock struct{ began time.Time }

func (c bubbleClock) Boot() (string, time.Duration) { return "bubble", time.Since(c.began) }
func (c bubbleClock) Wall() (time.Time, bool)       { return time.Now(), true }

func TestRun(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		blue := overlay("blue", "10.32.0.0/16")
		c := newCluster(t, blue)
		n := c.node("n")
		n.cfg.Clock = bubbleClock{time.Now()}
		ctx, cancel := context.WithCancel(context.Background())
		var running sync.WaitGroup
		running.Go(func() {
			if err := n.Run(ctx); err != nil {
				t.Error(err)
			}
		})
		for i := range 100 {
			n.assign(blue, strconv.Itoa(i))
		}
		time.Sleep(50 * time.Hour)
		synctest.Wait()
		if !n.Usable() || len(n.lost) > 0 {
			t.Error("not renewed for 50 hours")
		}
		for i := 1; i < 100; i++ {
			n.Release(strconv.Itoa(i))
		}
		time.Sleep(3 * time.Minute)
		synctest.Wait()
		if got := len(n.Status().Blocks); got != 2 {
			t.Errorf("%d blocks", got)
		}
		c.cut.Store(true)
		time.Sleep(22 * time.Hour)
		synctest.Wait()
		if !n.Usable() || n.Status().KeepersError == "" {
			t.Errorf("%+v", n.Status())
		}
		time.Sleep(3 * time.Hour)
		synctest.Wait()
		if n.Usable() || len(n.lost) != 1 {
			t.Errorf("lost %q", n.lost)
		}
		c.cut.Store(false)
		time.Sleep(lastRetry)
		synctest.Wait()
		if !n.Usable() || len(n.back) != 1 {
			t.Errorf("back %q", n.back)
		}
		n.Release("0")
		time.Sleep(3 * time.Minute)
		synctest.Wait()
		if use, err := c.r.InUse(ctx, "blue"); err != nil || len(use) > 0 {
			t.Errorf("in use by %q, %v", use, err)
		}
		cancel()
		running.Wait()
	})
}

// TestLeasedAhead: the next block comes before the last address is given, and only where
// others have enough.
func TestLeasedAhead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		large, small, both := overlay("large", "10.32.0.0/18"), overlay("small", "10.33.0.0/19"), overlay("both", "10.34.0.0/16", "fd00::/64")
		c := newCluster(t, large, small, both)
		n := c.node("n")
		n.cfg.Clock = bubbleClock{time.Now()}
		ctx, cancel := context.WithCancel(context.Background())
		var running sync.WaitGroup
		running.Go(func() { n.Run(ctx) })
		blocks := func() map[string]int {
			synctest.Wait()
			out := map[string]int{}
			for _, b := range n.Status().Blocks {
				out[b.Overlay]++
			}
			return out
		}
		for i := range 64 - lowWater {
			for _, o := range []*store.Overlay{large, small, both} {
				n.assign(o, o.Name+strconv.Itoa(i))
			}
		}
		if got := blocks(); got["large"] != 1 || got["small"] != 1 || got["both"] != 2 {
			t.Errorf("with enough addresses left: %v", got)
		}
		for i := range 1 {
			for _, o := range []*store.Overlay{large, small, both} {
				n.assign(o, o.Name+"+"+strconv.Itoa(i))
			}
		}
		if got := blocks(); got["large"] != 2 || got["small"] != 1 || got["both"] != 3 {
			t.Errorf("with few left: %v", got)
		}
		// Nobody waits for a keeper, and what keepers are not asked for in vain is no fault.
		c.cut.Store(true)
		for i := range 64 {
			n.assign(large, "more"+strconv.Itoa(i))
		}
		synctest.Wait()
		if got := n.Status(); got.KeepersError != "" || len(n.ahead.paused) != 1 {
			t.Errorf("%q; pauses %v", got.KeepersError, n.ahead.paused)
		}
		c.cut.Store(false)
		n.Release("more0")
		n.assign(large, "soon")
		if got := blocks(); got["large"] != 2 {
			t.Errorf("within the pause: %v", got)
		}
		time.Sleep(aheadPause)
		n.Release("more1")
		n.assign(large, "last")
		if got := blocks(); got["large"] != 3 || got["small"] != 1 {
			t.Errorf("when keepers are back: %v", got)
		}
		// Who has only addresses that it asked for needs no block.
		other := c.node("other")
		other.assign(large, "fixed", "10.32.20.20")
		if other.isLow() {
			t.Error("a block is leased ahead for an address that was asked for")
		}
		cancel()
		running.Wait()
	})
}

// TestAheadOfOthers: what is left of an overlay is for those who need it.
func TestAheadOfOthers(t *testing.T) {
	blue := overlay("blue", "10.32.0.0/22") // 16 blocks
	c := newCluster(t, blue)
	for i := range 7 {
		n := c.node("n" + strconv.Itoa(i))
		n.ahead.roomy, n.ahead.lowWater = 1, 1000
		n.assign(blue, "e")
		n.leaseAhead(ctx)
	}
	blocks := slices.DeleteFunc(c.keys(), func(key string) bool { return !strings.Contains(key, "/block/") })
	if len(blocks) != 11 { // the 4 first have two: the 8th is half
		t.Errorf("%d blocks of 16 are leased, want 11: %v", len(blocks), blocks)
	}
}

// TestConcurrent: many at once, of two nodes, with Run, for the race detector.
func TestConcurrent(t *testing.T) {
	blue := overlay("blue", "10.32.0.0/22", "fd00::/64")
	c := newCluster(t, blue)
	members := []*member{c.node("a"), c.node("b")}
	run, cancel := context.WithCancel(ctx)
	var running, working sync.WaitGroup
	var mu sync.Mutex
	used := map[string]string{}
	for _, n := range members {
		running.Go(func() { n.Run(run) })
		for i := range 8 {
			working.Go(func() {
				owner := n.name + strconv.Itoa(i)
				for j := range 40 {
					want := []string{}
					if j%4 == 0 {
						want = append(want, "10.32.0."+strconv.Itoa(2+(i*7+j)%250))
					}
					a, err := n.try(blue, owner, want...)
					if err != nil {
						continue
					}
					mu.Lock()
					for _, p := range a.Prefixes {
						if o := used[p.String()]; o != "" {
							t.Errorf("%s is in use by %s and %s", p, o, owner)
						}
						used[p.String()] = owner
					}
					mu.Unlock()
					mu.Lock()
					for _, p := range a.Prefixes {
						delete(used, p.String())
					}
					mu.Unlock()
					if err := n.Release(owner); err != nil {
						t.Error(err)
					}
					n.Status()
				}
			})
		}
	}
	working.Wait()
	cancel()
	running.Wait()
}

func TestSystemClock(t *testing.T) {
	c, err := SystemClock()
	if err != nil {
		t.Fatal(err)
	}
	boot, since := c.Boot()
	boot2, since2 := c.Boot()
	if boot == "" || boot != boot2 || since <= 0 || since2 < since {
		t.Errorf("%q %v, then %q %v", boot, since, boot2, since2)
	}
	if wall, _ := c.Wall(); time.Since(wall).Abs() > time.Minute {
		t.Errorf("the time of day is %v", wall)
	}
}
