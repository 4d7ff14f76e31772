package e2e

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/tulle-net/tulle/node"
)

// ledger is what a has counted, apart from what b sent to it.
type ledger struct {
	counts  map[string]uint64
	backlog uint64
}

// arriving are the reasons that a datagram from the underlay ends under. (A
// frame with another drop is also counted as received.)
var arriving = []string{"unknown_type", "control_refused", "unknown_session", "sealed_malformed", "short", "unknown_vni", "unknown_vtep", "plaintext_refused",
	"overlay_conflict", "own_frame", "short_frame", "bad_source", "vtep_limit", "rx_truncated", "rx_overflow"}

func account(a, b *tulle) ledger {
	a.t.Helper()
	l := ledger{counts: map[string]uint64{}, backlog: backlogDrops(a.t)}
	// A frame of b between the two looks would be one of ours too many, for good:
	// look at a while b is silent, if it ever is.
	sent := b.status().Overlays[0].TxFrames
	var s node.Status
	for range 20 {
		time.Sleep(5 * time.Millisecond) // what is on its way arrives
		s = a.status()
		now := b.status().Overlays[0].TxFrames
		if now == sent {
			break
		}
		sent = now
	}
	for _, reason := range arriving {
		l.counts[reason] = s.Drops[reason]
	}
	l.counts[accepted] = s.Overlays[0].RxFrames - sent
	return l
}

// since returns what was counted after l, by reason and in all.
func (l ledger) since(a, b *tulle) (counts map[string]uint64, sum uint64) {
	a.t.Helper()
	now := account(a, b)
	for reason, n := range now.counts {
		now.counts[reason] = n - l.counts[reason]
		sum += now.counts[reason]
	}
	return now.counts, sum
}

// settle waits until all sent datagrams are accounted for, and returns how many
// of them overflowed. What the kernel drops before a socket sees it (the
// processors' backlog queues) it counts for the whole machine: so many may be
// missing, and none else.
func (l ledger) settle(t *testing.T, a, b *tulle, sent uint64) (overflow uint64) {
	t.Helper()
	var counts map[string]uint64
	var sum, backlog uint64
	ok := func() bool {
		counts, sum = l.since(a, b)
		backlog = backlogDrops(t) - l.backlog
		return sum+backlog >= sent
	}
	for limit := time.Now().Add(5 * time.Second); !ok(); {
		if time.Now().After(limit) {
			t.Fatalf("%d datagrams were sent, %d are accounted for and at most %d were lost in a backlog: %v", sent, sum, backlog, counts)
		}
	}
	if sum > sent+slack {
		t.Fatalf("%d datagrams were sent, and %d are accounted for: %v", sent, sum, counts)
	}
	return counts["rx_overflow"]
}

// slack is how many frames of b may arrive between two looks at the counters.
const slack = 64

// expect waits until the datagrams are counted under their reasons, and under
// no other.
func (l ledger) expect(t *testing.T, a, b *tulle, want map[string]uint64) {
	t.Helper()
	sent := uint64(0)
	for _, n := range want {
		sent += n
	}
	l.settle(t, a, b, sent)
	var wrong string
	ok := func() bool {
		wrong = ""
		counts, sum := l.since(a, b)
		lost := counts["rx_overflow"] + backlogDrops(t) - l.backlog
		for reason, n := range counts {
			switch w := want[reason]; {
			case reason == "rx_overflow":
			case n > w || n+lost < w:
				wrong += fmt.Sprintf("%s is %d, want %d; ", reason, int64(n), w)
			}
		}
		if lost > 0 {
			t.Logf("%d of %d datagrams were lost in the kernel's queues; %d are accounted for", lost, sent, sum)
		}
		return wrong == ""
	}
	for limit := time.Now().Add(2 * time.Second); !ok(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(limit) {
			t.Fatal(wrong)
		}
	}
}

// backlogDrops counts, for the whole machine, packets that found a processor's
// backlog full: the second column of softnet_stat.
func backlogDrops(t *testing.T) (n uint64) {
	t.Helper()
	b, err := os.ReadFile("/proc/net/softnet_stat")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		f := strings.Fields(line)
		if len(f) < 2 {
			continue
		}
		v, err := strconv.ParseUint(f[1], 16, 64)
		if err != nil {
			t.Fatal(err)
		}
		n += v
	}
	return n
}
