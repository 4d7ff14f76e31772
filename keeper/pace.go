package keeper

import (
	"sync"
	"time"
)

const (
	// paceBurst is how many changes a node that is no administrator may ask of
	// this keeper at once; one more for every paceEvery after that.
	paceBurst = 32
	paceEvery = time.Second
	// leaseBurst and leaseEvery are the same of requests about addresses, of any
	// node: etcd keeps what it overwrites for an hour, and has room for 1 GiB.
	leaseBurst = 256
	leaseEvery = time.Second / 2
	// joinBurst and joinEvery are the same of joins with tokens of all nodes that
	// are no administrators, and of one machine that joins again: a join writes
	// its token with all that it has let in, 125 KB at most.
	joinBurst = 64
	joinEvery = time.Second
)

// pace bounds how fast nodes make the keeper write.
type pace struct {
	burst int
	every time.Duration

	mu sync.Mutex
	// spent by node, at most MaxNodes.
	spent map[string]spent
}

func newPace(burst int, every time.Duration) *pace {
	return &pace{burst: burst, every: every, spent: map[string]spent{}}
}

// spent is an amount that shrinks by one for each that passes since at.
type spent struct {
	n  int
	at time.Time
}

func (s spent) after(now time.Time, every time.Duration) spent {
	if back := int(max(now.Sub(s.at), 0) / every); back < s.n {
		return spent{s.n - back, s.at.Add(time.Duration(back) * every)}
	}
	return spent{0, now}
}

// allow takes one change of the node, or says that there were too many.
func (p *pace) allow(node string, now time.Time) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	s, ok := p.spent[node]
	if !ok && len(p.spent) >= MaxNodes {
		for other, o := range p.spent {
			if o.after(now, p.every).n == 0 {
				delete(p.spent, other)
			}
		}
	}
	s = s.after(now, p.every)
	if s.n >= p.burst || !ok && len(p.spent) >= MaxNodes {
		return false
	}
	s.n++
	p.spent[node] = s
	return true
}
