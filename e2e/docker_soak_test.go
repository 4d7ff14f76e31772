//go:build soak

package e2e

import (
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/tulle-net/tulle/internal/lab"
	"github.com/tulle-net/tulle/node"
)

//	a ──┬─[ul]─┬── b           each host has a dockerd and a node, and a relay between them
//	    │      │
//	 a0…a2   b0…b2             containers that start and end, and one that stays

const (
	dockerChurnFor = 5 * time.Minute
	dockerSlots    = 3
	dockerQuiet    = 2 * time.Second // between two kills, for what has to work
	lentFor        = 2 * time.Minute // docs/docker.md: an address that gets no container
)

// dockerChurner starts and ends the containers of one host.
type dockerChurner struct {
	*dockerHost
	n     *tulle
	relay *relay
	seed  uint64
	// era is odd while the node is away.
	era                   atomic.Int64
	began, failed, worked atomic.Int64
}

// run runs `docker …`. It may fail only if the node was away meanwhile.
func (c *dockerChurner) run(args ...string) {
	era := c.era.Load()
	out, err := c.try(args...)
	switch {
	case err == nil:
		c.worked.Add(1)
	case era%2 == 1 || c.era.Load() != era:
		c.failed.Add(1)
	default:
		c.t.Errorf("%s, whose node was there: docker %s: %v: %s", c.host.Name(), strings.Join(args, " "), err, out)
	}
}

// churn does things at random with one container, until stop.
func (c *dockerChurner) churn(slot int, stop <-chan struct{}) {
	name := fmt.Sprintf("%s-%d", c.host.Name(), slot) // a0 may be how another one's ID begins
	r := rand.New(rand.NewPCG(c.seed, uint64(slot)))
	start := []string{"run", "-d", "--init", "--name", name, "--network", "blue", "bb", "sleep", "600"}
	for !c.t.Failed() {
		select {
		case <-stop:
			return
		default:
		}
		running, err := c.try("inspect", "-f", "{{.State.Running}}", name)
		switch {
		case err != nil && r.IntN(4) == 0: // removed in the middle of its start
			c.began.Add(1)
			done := make(chan struct{})
			go func() { _, _ = c.try(start...); close(done) }()
			time.Sleep(time.Duration(r.IntN(800)) * time.Millisecond)
			_, _ = c.try("rm", "-f", name)
			<-done
		case err != nil:
			c.began.Add(1)
			c.run(start...)
		case running == "true":
			c.run([][]string{{"kill", name}, {"stop", "-t", "0", name}, {"rm", "-f", name}}[r.IntN(3)]...)
		case r.IntN(2) == 0:
			c.began.Add(1)
			c.run("start", name)
		default:
			c.run("rm", "-f", name)
		}
	}
}

// left is what there is of a host that containers add to: devices, mounted namespaces, tables.
func (c *dockerChurner) left() (list []string) {
	for line := range strings.Lines(runIn(c.t, c.host, "ip", "-br", "link")) {
		dev, _, _ := strings.Cut(strings.Fields(line)[0], "@")
		if strings.HasPrefix(dev, "veth") {
			dev = "veth" // and a number
		}
		list = append(list, "device "+dev)
	}
	mounts, err := os.ReadFile(fmt.Sprintf("/proc/%d/mountinfo", c.daemon.Pid()))
	if err != nil {
		c.t.Fatal(err)
	}
	for range strings.Count(string(mounts), c.dir+"/exec/netns/") {
		list = append(list, "namespace")
	}
	for line := range strings.Lines(runIn(c.t, c.host, "nft", "list", "tables")) {
		if strings.Contains(line, "tulle") {
			list = append(list, strings.TrimSpace(line))
		}
	}
	slices.Sort(list)
	return list
}

// descriptors are the node's.
func (c *dockerChurner) descriptors() []string { return (&churner{t: c.t, n: c.n}).descriptors() }

// tables are Tulle's in a container's namespace.
func (c *dockerChurner) tables(container string) string {
	pid := c.do("inspect", "-f", "{{.State.Pid}}", container)
	return runIn(c.t, c.host, "nsenter", "-t", pid, "-n", "nft", "list", "tables")
}

// back starts the killed node again.
func (c *dockerChurner) back() {
	c.n.start()
	c.relay.serve(c.n)
	c.era.Add(1)
}

// killNext kills the node once: at a call, or within a second. It reports at what, and
// "" if nothing called in time.
func (c *dockerChurner) killNext(call, moment string) string {
	if call == "" {
		time.Sleep(time.Duration(rand.Int64N(int64(time.Second))))
		c.relay.kill(c.relay.underWay())
	} else {
		c.relay.arm(call, moment)
	}
	select {
	case at := <-c.relay.killed:
		return at
	case <-time.After(10 * time.Second):
	}
	c.relay.arm("", "")
	select { // at the last moment
	case at := <-c.relay.killed:
		return at
	case <-time.After(100 * time.Millisecond):
		return ""
	}
}

// TestSoakDocker: containers on two hosts are started, killed, stopped and removed at
// random for five minutes, and their nodes killed at each call of the driver's and in
// between. Nothing is left over, and the next container works.
func TestSoakDocker(t *testing.T) {
	l, _, h := hosts(t, 2, lab.Underlay{Prefix4: underlay4, Offloads: lab.Wire})
	ds := dockers(t, l, h)
	a := upDocker(t, l, ds[0], "--docker", "on")
	b := upDocker(t, l, ds[1], "--docker", "on", "--token", a.token())
	untoken(b)
	nodes := []*tulle{a, b}
	meet(t, 15*time.Second, nodes...)
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	var cs []*dockerChurner
	for i, d := range ds {
		c := &dockerChurner{dockerHost: d, n: nodes[i], seed: seed + uint64(i)}
		c.relay = newRelay(d, func() { c.era.Add(1) })
		c.relay.serve(c.n)
		d.do("network", "create", "-d", "relay", "--ipam-driver", "relay", "--ipam-opt", "overlay=blue", "-o", "overlay=blue", "--subnet", "10.40.0.0/16", "blue")
		cs = append(cs, c)
	}
	for _, c := range cs { // at the end they are killed nodes, too
		c.relay.kill("")
		<-c.relay.killed
		c.back()
	}
	// The first containers, and what they send, make what stays: blocks, source ports.
	for _, c := range cs {
		c.runs("stays", "--network", "blue")
	}
	cs[0].pings("stays", cs[1].address("stays", "blue"))
	cs[1].pings("stays", cs[0].address("stays", "blue"))
	var before, open [2][]string
	for i, c := range cs {
		c.do("rm", "-f", "stays")
		time.Sleep(5 * time.Second) // what is done once is done then
		before[i], open[i] = c.left(), c.descriptors()
	}
	for _, c := range cs {
		c.runs("stays", "--network", "blue")
	}

	stop := make(chan struct{})
	var working sync.WaitGroup
	for _, c := range cs {
		for slot := range dockerSlots {
			working.Go(func() { c.churn(slot, stop) })
		}
	}
	hits := killing(t, cs, time.Now().Add(dockerChurnFor))
	close(stop)
	working.Wait()
	for _, call := range driverCalls {
		for _, m := range moments {
			t.Logf("killed %d times: %s %s", hits[m+" "+call], m, call)
		}
	}
	for at, n := range hits {
		if strings.HasPrefix(at, "at random:") {
			t.Logf("killed %d times: %s", n, at)
		}
	}

	cs[0].pings("stays", cs[1].address("stays", "blue"))
	var tables string
	if !settles(5*time.Second, func() bool { tables = cs[0].tables("stays"); return strings.Count(tables, " tulle-") == 1 }) {
		t.Errorf("a container that has outlived many nodes has the tables %q, want one", tables)
	}
	for i, c := range cs {
		t.Logf("%s: %d starts; %d commands worked, %d failed while the node was away", c.host.Name(), c.began.Load(), c.worked.Load(), c.failed.Load())
		if all := strings.Fields(c.do("ps", "-aq")); len(all) > 0 {
			c.do(append([]string{"rm", "-f"}, all...)...)
		}
		c.nothingLeft(before[i], open[i])
	}
	for _, c := range cs {
		c.runs("next", "--network", "blue")
	}
	cs[0].pings("next", cs[1].address("next", "blue"))
	for _, c := range cs {
		c.do("rm", "-f", "next")
	}
	a.eventually(5*time.Second, "both have ended", func() bool { return len(get[node.Endpoints](a, "/v1/endpoints").Endpoints) == 0 })
	cs[1].do("network", "rm", "blue")
	cs[0].do("network", "rm", "blue") // which made the overlay
	known(t, 5*time.Second, "blue", false, nodes...)
}

// killing kills nodes until then, and returns how often at what.
func killing(t *testing.T, cs []*dockerChurner, until time.Time) map[string]int {
	t.Helper()
	type at struct{ call, moment string }
	var plan []at
	for _, call := range driverCalls {
		for _, m := range moments {
			plan = append(plan, at{call, m})
		}
	}
	hits := map[string]int{}
	for i := 0; time.Now().Before(until) && !t.Failed(); i++ {
		if i%len(plan) == 0 {
			rand.Shuffle(len(plan), func(j, k int) { plan[j], plan[k] = plan[k], plan[j] })
		}
		next := plan[i%len(plan)]
		if i%5 == 4 {
			next = at{}
		}
		c := cs[i%len(cs)]
		what := c.killNext(next.call, next.moment)
		if what == "" {
			t.Logf("%s: nothing calls %s", c.host.Name(), next.call)
			continue
		}
		hits[what]++
		time.Sleep(time.Duration(rand.Int64N(int64(time.Second))))
		c.back()
		time.Sleep(dockerQuiet)
	}
	return hits
}

// nothingLeft checks that a host without a container is as it was.
func (c *dockerChurner) nothingLeft(before, open []string) {
	c.t.Helper()
	c.n.eventually(10*time.Second, "no endpoint is left", func() bool {
		return len(c.n.attached(func(node.Endpoint) bool { return true })) == 0
	})
	start := time.Now()
	if !settles(lentFor+20*time.Second, func() bool { return c.n.used("blue") == 0 }) {
		c.t.Errorf("%s: %d addresses are in use by nobody", c.host.Name(), c.n.used("blue"))
	}
	c.t.Logf("%s: no address is in use after %v", c.host.Name(), time.Since(start).Round(time.Millisecond))
	var now []string
	if !settles(10*time.Second, func() bool { now = c.left(); return slices.Equal(now, before) }) {
		c.t.Errorf("%s has\n%q\nand had\n%q", c.host.Name(), now, before)
	}
	if list := c.returned(); len(list) != 0 {
		c.t.Errorf("%s: devices are left: %q", c.host.Name(), list)
	}
	if !settles(20*time.Second, func() bool { now = c.descriptors(); return len(now) <= len(open) }) {
		c.t.Errorf("%s: descriptors are left: %v, before: %v", c.host.Name(), now, open)
	}
}

// TestSoakDockerdKilled: dockerd is killed at each call of a container's start and end.
// The next start works, and the container that runs on does not notice.
func TestSoakDockerdKilled(t *testing.T) {
	l, _, h := hosts(t, 1, lab.Underlay{Prefix4: underlay4})
	d := dockers(t, l, h, "--live-restore")[0]
	a := upDocker(t, l, d, "--docker", "on")
	r := newRelay(d, func() {})
	r.serve(a)
	d.do("network", "create", "-d", "relay", "--ipam-driver", "relay", "--ipam-opt", "overlay=blue", "-o", "overlay=blue", "--subnet", "10.40.0.0/16", "blue")
	d.runs("stays", "--network", "blue")
	stays := d.address("stays", "blue")
	start := []string{"run", "-d", "--init", "--name", "other", "--network", "blue", "bb", "sleep", "600"}
	r.kills = func() {
		if err := d.daemon.Signal(syscall.SIGKILL); err != nil {
			t.Error(err)
		}
		<-d.daemon.Done()
	}
	for i, call := range driverCalls {
		for _, moment := range moments {
			command := start
			if i >= 3 { // of the end
				d.do(start...)
				command = []string{"rm", "-f", "other"}
			}
			ended := d.contained()
			r.arm(call, moment)
			began := time.Now()
			out, err := d.try(command...) // it fails, or its answer came first
			select {
			case <-r.killed:
			case <-time.After(20 * time.Second):
				t.Fatalf("dockerd was not killed: %s %s; %v: %s", moment, call, err, out)
			}
			ended()
			d.start()
			if !d.answers() {
				t.FailNow()
			}
			if !settles(20*time.Second, func() bool { _, _ = d.try("rm", "-f", "other"); _, err := d.try("inspect", "other"); return err != nil }) {
				t.Fatalf("%s %s: the container cannot be removed", moment, call)
			}
			d.do(start...)
			d.pings("other", stays)
			d.do("rm", "-f", "other")
			t.Logf("%s %s: %v", moment, call, time.Since(began).Round(10*time.Millisecond))
		}
	}
	r.kills = nil
	a.eventually(lentFor+30*time.Second, "only the container that stays has an endpoint", func() bool {
		list := get[node.Endpoints](a, "/v1/endpoints").Endpoints
		return len(list) == 1 && list[0].Name == "stays"
	})
	d.do("rm", "-f", "stays")
	if !settles(lentFor+20*time.Second, func() bool { return a.used("blue") == 0 }) {
		t.Errorf("%d addresses are in use by nobody", a.used("blue"))
	}
	d.do("network", "rm", "blue") // which goes now, and its overlay with it
	known(t, 5*time.Second, "blue", false, a)
}
