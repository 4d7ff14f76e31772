package scale

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/tulle-net/tulle/discovery"
	"github.com/tulle-net/tulle/discovery/discoverytest"
	"github.com/tulle-net/tulle/vxlan"
)

// layout is what a cluster looks like.
type layout struct {
	Nodes     int
	Endpoints int // a node
	Overlays  int // in all
	Each      int // that a node has
	Secure    bool
	Delay     time.Duration // one way
	Storm     time.Duration // within which all start
}

// seedNodes are those whom all nodes are told to join.
const seedNodes = 3

// cluster is a running simulation. It belongs to one synctest bubble.
type cluster struct {
	layout
	t       testing.TB
	net     *discoverytest.Network
	secure  *authority // nil: an open cluster
	seeds   []string
	nodes   []*node
	random  *rand.Rand
	given   int // addresses
	carry   map[vxlan.VNI]int
	running sync.WaitGroup
	stop    context.CancelCauseFunc

	faults  atomic.Int64
	changes sync.Map // netip.Addr → *change: those that are waited for
}

// change is one Directory.Put, and how it spreads.
type change struct {
	at      time.Time
	want    int // nodes that are interested
	mu      sync.Mutex
	latency []time.Duration
}

func newCluster(t testing.TB, l layout) *cluster {
	c := &cluster{
		layout: l, t: t, net: discoverytest.NewNetwork(l.Delay), carry: map[vxlan.VNI]int{},
		random: rand.New(rand.NewPCG(1, uint64(l.Nodes))),
	}
	if l.Secure {
		var err error
		if c.secure, err = newAuthority(l.Delay); err != nil {
			t.Fatal(err)
		}
	}
	for i := range l.Nodes {
		n := &node{c: c, name: fmt.Sprintf("node%04d", i), addr: netip.AddrFrom4([4]byte{192, 168, byte(i >> 8), byte(i)})}
		for _, o := range c.random.Perm(l.Overlays)[:l.Each] {
			n.mine = append(n.mine, discovery.Overlay{VNI: vxlan.VNI(100 + o), Name: fmt.Sprintf("overlay-%d", o), Encryption: "required"})
			c.carry[vxlan.VNI(100+o)]++
		}
		if i < seedNodes {
			c.seeds = append(c.seeds, netip.AddrPortFrom(n.addr, gossipPort).String())
		}
		c.nodes = append(c.nodes, n)
	}
	for _, n := range c.nodes {
		for _, o := range c.nodes {
			if o == n {
				continue
			}
			for k := range l.Endpoints {
				if slices.Contains(n.mine, o.overlayOf(k)) {
					n.want++
				}
			}
		}
	}
	return c
}

// address is a new one, in the network that the number begins.
func (c *cluster) address(first byte) netip.Addr {
	c.given++
	return netip.AddrFrom4([4]byte{first, byte(c.given >> 16), byte(c.given >> 8), byte(c.given)})
}

// start starts all nodes within c.Storm, the first one at once.
func (c *cluster) start() {
	ctx, stop := context.WithCancelCause(context.Background())
	c.stop = stop
	for i, n := range c.nodes {
		if err := c.open(n); err != nil {
			c.t.Fatal(err)
		}
		var after time.Duration
		if i > 0 {
			after = time.Duration(c.random.Int64N(int64(c.Storm)))
		}
		c.running.Go(func() {
			time.Sleep(after)
			if err := n.run(ctx); err != nil {
				c.fault(err)
			}
		})
	}
}

// end stops all nodes as if they went on elsewhere, and waits for them.
func (c *cluster) end() {
	c.stop(discovery.ErrMoved)
	c.running.Wait()
	time.Sleep(5 * time.Second) // memberlist's last probes end
}

func (c *cluster) fault(err error) {
	if c.faults.Add(1) < 20 {
		c.t.Error(err)
	}
}

// settle waits until every node knows the endpoints of all that it shares an overlay
// with, and returns how long that took: longer than most fails.
func (c *cluster) settle(most time.Duration) time.Duration {
	begin := time.Now()
	for {
		lacking, last := 0, ""
		for _, n := range c.nodes {
			if got := n.known.Load(); got != n.want {
				lacking++
				last = fmt.Sprintf("%s knows %d of %d", n.name, got, n.want)
			}
		}
		took := time.Since(begin)
		if lacking == 0 {
			return took
		}
		if took > most {
			c.t.Fatalf("after %v %d nodes do not know all; %s", took, lacking, last)
		}
		if took.Truncate(time.Second) == took {
			c.progress(took)
		}
		time.Sleep(50 * time.Millisecond)
	}
}

// progress tells how much is known.
func (c *cluster) progress(after time.Duration) {
	if !*verbose {
		return
	}
	var known, want int64
	for _, n := range c.nodes {
		known, want = known+n.known.Load(), want+n.want
	}
	c.t.Logf("    %v: %.2f %% is known; CPU %.0f s so far", after, 100*float64(known)/float64(want), cpuTime().Seconds())
}

// members fails unless every node sees all others alive, and confirmed.
func (c *cluster) members() {
	for _, n := range c.nodes {
		good := 0
		for _, m := range n.disc.Members() {
			if m.Status == discovery.Alive && m.Confirmed {
				good++
			}
		}
		if good != len(c.nodes) {
			c.fault(fmt.Errorf("%s sees %d of %d nodes", n.name, good, len(c.nodes)))
		}
	}
}

// changing has that many endpoints a second get another address, for a while, and
// returns how long each change took to each node that is interested in it.
func (c *cluster) changing(perSecond int, during time.Duration) []*change {
	var made []*change
	pace := time.Second / time.Duration(perSecond)
	for range int(during / pace) {
		// Not all at the same phase of anything.
		time.Sleep(pace/2 + time.Duration(c.random.Int64N(int64(pace))))
		n := c.nodes[c.random.IntN(len(c.nodes))]
		k := c.random.IntN(c.Endpoints)
		ip := c.address(11)
		ch := &change{at: time.Now(), want: c.carry[n.overlayOf(k).VNI] - 1}
		c.changes.Store(ip, ch)
		made = append(made, ch)
		if err := n.put(k, ip); err != nil {
			c.fault(err)
		}
	}
	return made
}

// arrived is told that a node knows an address.
func (c *cluster) arrived(ip netip.Addr) {
	if !ip.Is4() || ip.As4()[0] != 11 {
		return
	}
	v, ok := c.changes.Load(ip)
	if !ok {
		c.fault(errors.New("an address that nobody has: " + ip.String()))
		return
	}
	ch := v.(*change)
	took := time.Since(ch.at)
	ch.mu.Lock()
	ch.latency = append(ch.latency, took)
	ch.mu.Unlock()
}

// spread is what became of changes.
type spread struct {
	Changes, Replaced int             // Replaced: by the next change of the same endpoint, before all had it
	Last              []time.Duration // when the last of the interested had it, sorted
	All               []time.Duration // when each had it, sorted
}

func spreadOf(changes []*change) spread {
	s := spread{Changes: len(changes)}
	for _, ch := range changes {
		ch.mu.Lock()
		if len(ch.latency) == ch.want && ch.want > 0 {
			s.Last = append(s.Last, slices.Max(ch.latency))
		} else {
			s.Replaced++
		}
		s.All = append(s.All, ch.latency...)
		ch.mu.Unlock()
	}
	slices.Sort(s.Last)
	slices.Sort(s.All)
	return s
}

// at returns the value below which a part of sorted ones is.
func at(sorted []time.Duration, part float64) time.Duration {
	if len(sorted) == 0 {
		return 0
	}
	return sorted[min(int(part*float64(len(sorted))), len(sorted)-1)]
}
