package ipam

import (
	"context"
	"strconv"
	"sync"
	"testing"
	"testing/synctest"
	"time"
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
