package discovery

import (
	"testing"
	"time"

	"github.com/hashicorp/memberlist"
)

// saying is what a node says, as memberlist queues it.
type saying struct{ node, text string }

func (saying) Invalidates(memberlist.Broadcast) bool { return false }
func (s saying) Message() []byte                     { return []byte(s.text) }
func (saying) Finished()                             {}
func (s saying) Name() string                        { return s.node }

// A node that changes twice between two rounds of gossip, in which it hears of two
// others, spreads all three. Without the bolt its own is the one that is lost.
func TestQueueKeepsAll(t *testing.T) {
	spread := func(bolted bool) (list []string) {
		q := &memberlist.TransmitLimitedQueue{NumNodes: func() int { return 5 }, RetransmitMult: retransmitMult}
		if bolted {
			q.QueueBroadcast(bolt{})
		}
		for _, s := range []saying{{"a", "a1"}, {"a", "a2"}, {"b", "b1"}, {"c", "c1"}} {
			q.QueueBroadcast(s)
		}
		for _, b := range q.GetBroadcasts(0, datagramBytes) {
			list = append(list, string(b))
		}
		return list
	}
	if got := spread(false); len(got) == 3 {
		t.Errorf("a queue without the bolt spreads %q: memberlist loses nothing any more, and the bolt can go", got)
	}
	if got := spread(true); len(got) != 3 {
		t.Errorf("spread %q, want a2, b1 and c1", got)
	}
}

// The bolt is in the queue of each node, and all else leaves it.
func TestQueueIsBolted(t *testing.T) {
	t.Parallel()
	a := start(t, testConfig("a"))
	b := start(t, testConfig("b", a))
	meet(t, a, b)
	for _, n := range []*testNode{a, b} {
		q, err := queueOf(n.serf.Load())
		if err != nil {
			t.Fatal(err)
		}
		n.await(5*time.Second, "a queue of the bolt alone", func() bool { return q.NumQueued() == 1 })
	}
}
