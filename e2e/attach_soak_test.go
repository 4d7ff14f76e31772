//go:build soak

package e2e

import (
	"encoding/json"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/tulle-net/tulle/internal/lab"
	"github.com/tulle-net/tulle/node"
)

//	a ──┬─[ul]─┬── b ── … c       100 namespaces a node that come, go, are attached and
//	 a0…a99 b0…b99                detached; c is left alone

const (
	spacesEach = 100
	churnFor   = 5 * time.Minute
	churnRound = 20 * time.Second
)

// churner attaches and detaches the namespaces of one node.
type churner struct {
	t        *testing.T
	n        *tulle
	r        *rand.Rand
	overlays []string
	paths    []string
	ends     map[string]func()
	there    map[string]netip.Addr // by path and overlay: what must be attached
	took     []time.Duration
	ended    int
}

func key(path, overlay string) string { return path + " " + overlay }

// step does one thing at random.
func (c *churner) step() {
	path, overlay := c.paths[c.r.IntN(len(c.paths))], c.overlays[c.r.IntN(len(c.overlays))]
	_, is := c.there[key(path, overlay)]
	switch {
	case c.r.IntN(20) == 0: // the container ends
		c.ends[path]()
		for _, o := range c.overlays {
			delete(c.there, key(path, o))
		}
		c.gone(path)
		_, c.ends[path] = netnsNamed(c.t, filepath.Base(path))
		c.ended++
	case is:
		if _, err := c.n.request(http.MethodDelete, "/v1/endpoints?"+url.Values{"overlay": {overlay}, "netns": {path}}.Encode(), nil); err != nil {
			c.t.Error(err)
		}
		delete(c.there, key(path, overlay))
	default:
		start := time.Now()
		body, err := c.n.request(http.MethodPost, "/v1/endpoints", node.AttachRequest{Overlay: overlay, Netns: path, Ifname: overlay})
		if err != nil {
			c.t.Error(err)
			return
		}
		c.took = append(c.took, time.Since(start))
		var e node.Endpoint
		if err := json.Unmarshal(body, &e); err != nil || len(e.IPs) == 0 {
			c.t.Errorf("%s: %v", body, err)
			return
		}
		c.there[key(path, overlay)] = e.IPs[0].Addr()
	}
}

// gone waits until nothing of a namespace that has ended is left.
func (c *churner) gone(path string) {
	start := time.Now()
	c.n.eventually(5*time.Second, "nothing is left of "+path, func() bool {
		return !slices.ContainsFunc(get[node.Endpoints](c.n, "/v1/endpoints?local=true").Endpoints, func(e node.Endpoint) bool { return e.Netns == path })
	})
	if took := time.Since(start); took > 1500*time.Millisecond {
		c.t.Errorf("%s: an endpoint was there %v after its namespace had ended", c.n.name, took)
	}
}

// agrees checks that the node has what it should, and the namespaces too.
func (c *churner) agrees() {
	have := map[string]netip.Addr{}
	for _, e := range get[node.Endpoints](c.n, "/v1/endpoints?local=true").Endpoints {
		have[key(e.Netns, e.Overlay)] = e.IPs[0].Addr()
		if !e.Up || e.Error != "" {
			c.t.Errorf("%s: endpoint %+v", c.n.name, e)
		}
	}
	if !maps.Equal(have, c.there) {
		c.t.Errorf("%s: %d endpoints, want %d", c.n.name, len(have), len(c.there))
	}
	for _, o := range c.overlays {
		want := 0
		for k := range c.there {
			if strings.HasSuffix(k, " "+o) {
				want++
			}
		}
		if used := c.n.used(o); used != want {
			c.t.Errorf("%s: %d addresses of %s are in use by %d endpoints", c.n.name, used, o, want)
		}
	}
}

// devices counts the devices in the node's namespaces that are none of the loopback.
func (c *churner) devices() (n int) {
	for _, path := range c.paths {
		out, err := exec.Command("ip", "-n", filepath.Base(path), "-o", "link").CombinedOutput()
		if err != nil {
			c.t.Errorf("%s: %v: %s", path, err, out)
		}
		n += strings.Count(string(out), "\n") - 1
	}
	return n
}

// descriptors lists what the node's descriptors are, without the numbers of sockets.
func (c *churner) descriptors() (list []string) {
	dir := fmt.Sprintf("/proc/%d/fd", c.n.proc.Pid())
	entries, err := os.ReadDir(dir)
	if err != nil {
		c.t.Fatal(err)
	}
	for _, e := range entries {
		to, _ := os.Readlink(filepath.Join(dir, e.Name())) // closed meanwhile: empty
		to, _, _ = strings.Cut(to, ":[")
		list = append(list, to)
	}
	slices.Sort(list)
	return list
}

// TestSoakAttach: two hundred namespaces on two nodes are attached, detached and
// ended at random for five minutes, and one node is killed in between. No address,
// device, name, descriptor or goroutine is left over.
func TestSoakAttach(t *testing.T) {
	l, _, h := hosts(t, 3, lab.Underlay{Prefix4: underlay4, Offloads: lab.Wire})
	nodes := joined(t, l, h, nil)
	overlays := []string{"blue", "red"}
	for i, o := range overlays {
		nodes[0].do("overlay", "create", o, "--subnet", fmt.Sprintf("10.%d.0.0/16", 32+i))
		known(t, 5*time.Second, o, true, nodes...)
	}
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	var churners []*churner
	for i, n := range nodes {
		c := &churner{t: t, n: n, r: rand.New(rand.NewPCG(seed, uint64(i))), overlays: overlays, ends: map[string]func(){}, there: map[string]netip.Addr{}}
		spaces := spacesEach
		if i == 2 {
			spaces = 1
		}
		for j := range spaces {
			path, end := netnsNamed(t, unusedName(fmt.Sprintf("%s%d", n.name, j)))
			c.paths, c.ends[path] = append(c.paths, path), end
		}
		churners = append(churners, c)
	}
	// The first of each, and what it sends, makes what stays: blocks, source ports.
	for _, o := range overlays {
		to := churners[2].n.attaches(o, "--netns", churners[2].paths[0])
		for _, c := range churners[:2] {
			c.n.do("attach", o, "--netns", c.paths[0])
			runIn(t, c.n.host, "nsenter", "--net="+c.paths[0], "ping", "-c", "1", "-W", "10", to.Addr().String())
			c.n.do("detach", o, "--netns", c.paths[0])
		}
		churners[2].n.do("detach", o, "--netns", churners[2].paths[0])
	}
	idle, busy := churners[2], churners[:2]
	time.Sleep(5 * time.Second)
	before := [][]string{busy[0].descriptors(), idle.descriptors()} // b is killed: c is as b was
	for until := time.Now().Add(churnFor); time.Now().Before(until) && !t.Failed(); {
		var wg sync.WaitGroup
		for _, c := range busy {
			wg.Go(func() {
				for stop := time.Now().Add(churnRound); time.Now().Before(stop) && !t.Failed(); {
					c.step()
				}
			})
		}
		wg.Wait()
		together(t, busy)
		busy[1].n.kill()
		busy[1].n.start()
		busy[1].n.eventually(10*time.Second, "its endpoints are up", func() bool {
			list := get[node.Endpoints](busy[1].n, "/v1/endpoints?local=true").Endpoints
			return len(list) == len(busy[1].there) && !slices.ContainsFunc(list, func(e node.Endpoint) bool { return !e.Up })
		})
		together(t, busy)
	}
	for i, c := range busy {
		for k := range c.there {
			path, overlay, _ := strings.Cut(k, " ")
			c.n.do("detach", overlay, "--netns", path)
		}
		c.there = map[string]netip.Addr{}
		c.agrees()
		if n := c.devices(); n != 0 {
			t.Errorf("%s: %d devices are left", c.n.name, n)
		}
		slices.Sort(c.took)
		t.Logf("%s: %d attached, %d namespaces ended; an attach takes %v (median), %v (95 %%), %v at most; %.1f MiB resident",
			c.n.name, len(c.took), c.ended, c.took[len(c.took)/2], c.took[len(c.took)*95/100], c.took[len(c.took)-1], float64(memory(t, c.n.proc.Pid(), "VmRSS"))/(1<<20))
		var now []string
		if !settles(20*time.Second, func() bool { now = c.descriptors(); return len(now) <= len(before[i]) }) {
			t.Errorf("%s: descriptors are left: %v, before: %v", c.n.name, now, before[i])
		}
	}
	most := goroutines(t, idle.n)
	if n := goroutines(t, busy[1].n); n > most+4 {
		t.Errorf("b has %d goroutines and c, which was left alone, %d", n, most)
	}
	if n := goroutines(t, busy[0].n); n > 3*most { // a keeper
		t.Errorf("a has %d goroutines and c, which is no keeper, %d", n, most)
	}
}

// together checks both nodes, and that endpoints reach each other.
func together(t *testing.T, busy []*churner) {
	t.Helper()
	seen := map[string]string{}
	for _, c := range busy {
		c.agrees()
		if n := c.devices(); n != len(c.there) {
			t.Errorf("%s: %d devices for %d endpoints", c.n.name, n, len(c.there))
		}
		for k, ip := range c.there {
			_, overlay, _ := strings.Cut(k, " ")
			if other := seen[key(ip.String(), overlay)]; other != "" {
				t.Errorf("%s has the address of %s in %s", k, other, overlay)
			}
			seen[key(ip.String(), overlay)] = k
		}
	}
	pings := 0
	for from := range busy[0].there {
		path, overlay, _ := strings.Cut(from, " ")
		for k, ip := range busy[1].there {
			if strings.HasSuffix(k, " "+overlay) && pings < 20 {
				pings++
				if out, err := exec.Command("ip", "netns", "exec", filepath.Base(path), "ping", "-c", "1", "-W", "5", ip.String()).CombinedOutput(); err != nil {
					t.Errorf("%s reaches %s not: %v: %s", from, k, err, out)
				}
				break
			}
		}
	}
}

// settles reports whether ok says so within the limit.
func settles(limit time.Duration, ok func() bool) bool {
	for until := time.Now().Add(limit); !ok(); time.Sleep(50 * time.Millisecond) {
		if time.Now().After(until) {
			return false
		}
	}
	return true
}

// goroutines ends a node and counts what its runtime lists as it dies.
func goroutines(t *testing.T, n *tulle) int {
	t.Helper()
	if err := n.proc.Signal(syscall.SIGQUIT); err != nil {
		t.Fatal(err)
	}
	<-n.proc.Done()
	count := strings.Count(n.proc.Log(), "\ngoroutine ")
	if count == 0 {
		t.Errorf("%s lists no goroutines", n.name)
	}
	return count
}
