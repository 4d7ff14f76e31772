package underlay

import (
	"testing"
	"time"
)

// Trains that do not arrive are given up; a path that loses everything alike keeps them.
func TestLossWatch(t *testing.T) {
	now := time.Now()
	type step struct {
		sent, lost uint64
		want       verdict
	}
	for name, steps := range map[string][]step{
		"a good path":        {{1000, 0, leaveTrains}, {1000, 10, leaveTrains}, {1000, 240, leaveTrains}},
		"too few to tell":    {{29, 29, leaveTrains}, {29, 29, leaveTrains}, {29, 29, leaveTrains}},
		"a moment of loss":   {{1000, 500, leaveTrains}, {1000, 0, leaveTrains}, {1000, 500, leaveTrains}, {1000, 0, leaveTrains}},
		"trains get lost":    {{100, 60, leaveTrains}, {100, 60, tryWithout}, {100, 0, leaveTrains}, {100, 1, leaveTrains}, {100, 0, giveUp}},
		"everything is lost": {{100, 60, leaveTrains}, {100, 60, tryWithout}, {100, 50, leaveTrains}, {100, 60, leaveTrains}, {100, 60, backOn}, {100, 60, leaveTrains}, {100, 60, leaveTrains}, {100, 60, leaveTrains}},
	} {
		t.Run(name, func(t *testing.T) {
			var w lossWatch
			trains := true
			for i, s := range steps {
				got := w.report("n2", s.sent, s.lost, trains, now)
				if got != s.want {
					t.Fatalf("report %d (%d of %d): %d, want %d", i+1, s.lost, s.sent, got, s.want)
				}
				trains = trains && got != tryWithout && got != giveUp || got == backOn
			}
		})
	}
	// After the pause there may be another trial.
	w := lossWatch{pause: now.Add(time.Minute)}
	if w.report("n2", 100, 90, true, now); w.report("n2", 100, 90, true, now) != leaveTrains {
		t.Error("a trial within the pause")
	}
	now = now.Add(2 * time.Minute)
	if w.report("n2", 100, 90, true, now); w.report("n2", 100, 90, true, now) != tryWithout {
		t.Error("no trial after the pause")
	}
}

// A peer with a bad way and others with good ones are no reason to give trains up,
// and a trial does not wait for a peer that says no more.
func TestLossWatchOfOnePeer(t *testing.T) {
	now := time.Now()
	var w lossWatch
	w.report("n2", 100, 60, true, now)
	if got := w.report("n2", 100, 60, true, now); got != tryWithout {
		t.Fatalf("a second bad report: %d, want a trial", got)
	}
	for range 2 * trialReports {
		if got := w.report("n3", 100, 0, false, now); got != leaveTrains {
			t.Fatalf("another peer's report: %d, want %d", got, leaveTrains)
		}
	}
	now = now.Add(trialTime)
	if got := w.report("n3", 100, 0, false, now); got != backOn {
		t.Errorf("another peer's report when the trial's time is over: %d, want %d", got, backOn)
	}
}
