package crypto

import (
	"testing"
	"testing/synctest"
	"time"
)

// TestClock: synctest starts at midnight of 2000-01-01, as a board without a
// battery might.
func TestClock(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		start := time.Now()
		c := NewClock(testNow, testNow.Add(-time.Hour), time.Time{})
		if !c.Now().Equal(testNow) {
			t.Errorf("Now() = %v, want the latest floor, %v", c.Now(), testNow)
		}
		time.Sleep(time.Hour)
		if want := testNow.Add(time.Hour); !c.Now().Equal(want) {
			t.Errorf("an hour later it is %v, want %v", c.Now(), want)
		}
		c.Raise(testNow.Add(30 * time.Minute)) // known already
		if want := testNow.Add(time.Hour); !c.Now().Equal(want) {
			t.Errorf("after a lower floor it is %v, want %v", c.Now(), want)
		}
		c.Raise(testNow.Add(5 * time.Hour))
		if want := testNow.Add(5 * time.Hour); !c.Now().Equal(want) {
			t.Errorf("after a higher floor it is %v, want %v", c.Now(), want)
		}
		if right := NewClock(start.Add(-time.Hour)); !right.Now().Equal(time.Now()) {
			t.Errorf("a clock that is right says %v at %v", right.Now(), time.Now())
		}
	})
}

func TestBuildTime(t *testing.T) {
	if b := BuildTime(); b.Before(sourceTime) {
		t.Errorf("BuildTime() = %v, before %v", b, sourceTime)
	}
	if now := NewClock(BuildTime()).Now(); now.Before(sourceTime) {
		t.Errorf("now is %v", now)
	}
}
