package bridge

import (
	"time"

	"github.com/tulle-net/tulle/ether"
	"github.com/tulle-net/tulle/tap"
)

// A receiving worker that has emptied its socket of a lot rests before it waits for more,
// as network cards do before they interrupt (ethtool(8), -C rx-usecs): what comes meanwhile
// wakes nobody, and is delivered in one batch, with fewer wake-ups on the way to the socket
// of a stream and back. Who waits for an answer would wait longer, so a worker rests only
// while this node's ports send mere acknowledgements.
const (
	// restFor bounds how long what comes is kept waiting. (The kernel may add 50 µs: the
	// slack of a thread's timers, prctl(2).)
	restFor = 150 * time.Microsecond
	// restAfter is how many bytes are a lot: several segments of a stream.
	restAfter = 8 << 10
	// restQuiet is how long nothing but acknowledgements has been sent by then.
	restQuiet = int64(100 * time.Millisecond)
	// spokeFor is how long a worker that has just noted that something was sent need not
	// look again.
	spokeFor = int64(time.Millisecond)
)

// rests reports whether the worker may rest after the batch, which was delivered.
func (in *ingress) rests() bool {
	if in.batch.More {
		return false // what is left of the burst comes first
	}
	much := in.burst >= restAfter
	in.burst = 0
	return much && in.t.nanos()-in.t.spoke.Load() > restQuiet
}

// notes remembers whether somebody may wait for what these frames carry, or for an answer:
// one of them is large, or no mere acknowledgement.
func (w *egress) notes(t *Tunnel, frames []tap.Frame, now int64) {
	spoke := false
	for i := range frames {
		b := frames[i].B
		if len(b) >= largeLen {
			spoke = true
		} else if now != w.company.last && len(b) >= ethernetHeader && waits(b) {
			spoke = true
			if !t.apart.is(ether.FlowHash(b), now/int64(tick)) {
				w.company.last = now
			}
		}
	}
	if spoke && now-t.spoke.Load() > spokeFor {
		t.spoke.Store(now)
	}
}
