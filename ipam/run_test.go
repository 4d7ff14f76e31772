package ipam

import (
	"context"
	"strconv"
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

func (n *member) addrOf(owner string) string { return n.s.endpoints[owner].Prefixes[0].Addr().String() }

func TestCheck(t *testing.T) {
	blue, red := overlay("blue", "10.32.0.0/16"), overlay("red", "10.40.0.0/16")
	c := newCluster(t, blue, red)
	a, b, gone := c.node("a"), c.node("b"), c.node("gone")
	a.assign(blue, "e")
	a.assign(blue, "f", "10.32.200.1")
	b.assign(blue, "e")
	b.assign(red, "r")
	reports := func() []Status { return []Status{a.Status(), b.Status()} }
	member := func(n string) bool { return n == "a" || n == "b" }
	check := func(want ...string) []Finding {
		t.Helper()
		found, err := c.r.Check(ctx, reports(), member)
		if err != nil {
			t.Fatal(err)
		}
		var got []string
		for _, f := range found {
			got = append(got, f.Kind+" "+f.What)
			if f.Text == "" {
				t.Errorf("%+v says nothing", f)
			}
		}
		if len(got) != len(want) {
			t.Fatalf("found %q, want %q", got, want)
		}
		for i := range got {
			if got[i] != want[i] {
				t.Fatalf("found %q, want %q", got, want)
			}
		}
		return found
	}
	repair := func(found []Finding, want int) {
		t.Helper()
		if n, err := c.r.Repair(ctx, found); err != nil || n != want {
			t.Fatalf("repaired %d, %v, want %d", n, err, want)
		}
	}
	check()

	gone.assign(blue, "e")
	repair(check("node_gone "+gone.Status().Blocks[0].Prefix.String()), 1)
	check() // removed; it is free when its grace is over

	c.update("red", func(t store.Txn) error { t.Delete(store.OverlayKey("red")); return nil })
	found := check("outside "+b.addrOf("r"), "overlay_gone ")
	repair(found, 1)
	b.must(b.tick(ctx))
	check()

	c.update("blue", func(t store.Txn) error {
		t.Put("ipam/blue/block/10.32.77.0-26", []byte(`{"schema":1,"node":"a","state":"lost","number":1,"since":"2026-01-01T00:00:00Z"}`))
		t.Put("ipam/blue/block/10.32.78.0-26", []byte(`{"schema":1,"node":"a","state":"`+a.s.State+`","number":1,"since":"2026-01-01T00:00:00Z"}`))
		t.Put("ipam/blue/block/10.32.78.64-27", []byte(`{"schema":1,"node":"b","state":"`+b.s.State+`","number":100,"since":"2026-01-01T00:00:00Z"}`))
		t.Put("ipam/blue/block/10.32.78.64-26", []byte(`{"schema":1,"node":"b","state":"`+b.s.State+`","number":100,"since":"2026-01-01T00:00:00Z"}`))
		return nil
	})
	repair(check("leaked 10.32.77.0/26", "overlap 10.32.78.64/26", "unclaimed 10.32.78.0/26", "unclaimed 10.32.78.64/26", "unclaimed 10.32.78.64/27"), 1)
	for range 101 {
		b.must(b.tick(ctx))
	}
	a.must(a.tick(ctx))
	check()
	for range 30 {
		c.pass(time.Hour)
		a.must(a.tick(ctx))
		b.must(b.tick(ctx))
		c.r.Reclaim(ctx, member)
	}
	l, err := c.r.Blocks(ctx, "blue")
	if err != nil || len(l.Blocks) != 2 {
		t.Errorf("%+v, %v", l.Blocks, err)
	}

	// Two that use one address, one of them outside of its blocks.
	s := a.Status()
	s.Node, s.State = "b", b.s.State
	found, err = c.r.Check(ctx, []Status{a.Status(), s}, member)
	kinds := map[string]int{}
	for _, f := range found {
		kinds[f.Kind]++
	}
	if err != nil || kinds[FindTwice] != 2 || kinds[FindOutside] != 2 {
		t.Errorf("%v, %v", kinds, err)
	}

	c.update("blue", func(t store.Txn) error { t.Put("ipam/blue/fixed/x", []byte("{}")); return nil })
	found, err = c.r.Check(ctx, nil, member)
	if err != nil || len(found) != 1 || found[0].Kind != FindUnreadable || found[0].Repairable {
		t.Errorf("%+v, %v", found, err)
	}
}
