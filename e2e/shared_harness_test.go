package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/tulle-net/tulle/ether"
	"github.com/tulle-net/tulle/internal/lab"
	"github.com/tulle-net/tulle/node"
)

// What the tests of shared overlays share.

// joined starts one secure cluster on the hosts; the first makes it. own returns
// further arguments of node i; nil: there are none.
func joined(t *testing.T, l *lab.Lab, h []*lab.Host, own func(i int) []string) []*tulle {
	t.Helper()
	var nodes []*tulle
	token := ""
	for i := range h {
		var args []string
		if own != nil {
			args = own(i)
		}
		if i == 1 {
			token = nodes[0].token("--uses", fmt.Sprint(len(h)-1))
		}
		if i > 0 {
			args = append(args, "--token", token)
		}
		nodes = append(nodes, up(t, l, h[i], args...))
	}
	meet(t, 15*time.Second, nodes...)
	return nodes
}

// untoken has nodes start again without their tokens: with one, a node that is a
// member asks a keeper first whether it still is, for 5 s if none answers.
func untoken(nodes ...*tulle) {
	for _, n := range nodes {
		if at := slices.Index(n.args, "--token"); at >= 0 {
			n.args = slices.Delete(slices.Clone(n.args), at, at+2)
		}
	}
}

// part runs a subtest; the nodes fail it and not the test around it.
func part(t *testing.T, name string, nodes []*tulle, f func(t *testing.T)) {
	t.Helper()
	t.Run(name, func(t *testing.T) {
		for _, n := range nodes {
			was := n.t
			n.t = t
			t.Cleanup(func() { n.t = was })
		}
		f(t)
	})
}

// asked runs a command that prints JSON.
func asked[T any](n *tulle, args ...string) (v T) {
	n.t.Helper()
	out := n.do(append(args, "-o", "json")...)
	if err := json.Unmarshal([]byte(out), &v); err != nil {
		n.t.Fatalf("%s: tulle %s -o json: %v: %s", n.name, strings.Join(args, " "), err, out)
	}
	return v
}

// get asks the API.
func get[T any](n *tulle, path string) (v T) {
	n.t.Helper()
	if err := n.try(path, &v); err != nil {
		n.t.Fatal(err)
	}
	return v
}

// knows returns what n knows of an overlay of the cluster.
func (n *tulle) knows(overlay string) (o node.SharedOverlay, there bool) {
	n.t.Helper()
	for _, o := range get[node.SharedOverlays](n, "/v1/shared").Overlays {
		if o.Name == overlay {
			return o, true
		}
	}
	return o, false
}

// known waits until all nodes know the overlay, or none does.
func known(t *testing.T, within time.Duration, overlay string, want bool, nodes ...*tulle) time.Duration {
	t.Helper()
	return eventually(t, within, fmt.Sprintf("%d nodes know of overlay %s: %v", len(nodes), overlay, want), func() bool {
		for _, n := range nodes {
			if _, is := n.knows(overlay); is != want {
				return false
			}
		}
		return true
	})
}

// exposes runs `tulle expose`, which prints its addresses and nothing else.
func (n *tulle) exposes(overlay string, args ...string) (list []netip.Prefix) {
	n.t.Helper()
	out := n.do(append([]string{"expose", overlay}, args...)...)
	for line := range strings.Lines(out) {
		p, err := netip.ParsePrefix(strings.TrimSuffix(line, "\n"))
		if err != nil || line != p.String()+"\n" {
			n.t.Fatalf("%s: tulle expose %s prints %q, want ADDRESS/PREFIX and a newline", n.name, overlay, out)
		}
		list = append(list, p)
	}
	if len(list) == 0 {
		n.t.Fatalf("%s: tulle expose %s prints %q", n.name, overlay, out)
	}
	return list
}

// exposed is exposes in an overlay of one family.
func (n *tulle) exposed(overlay string, args ...string) netip.Prefix {
	n.t.Helper()
	list := n.exposes(overlay, args...)
	if len(list) != 1 {
		n.t.Fatalf("%s: tulle expose %s prints %v, want one address", n.name, overlay, list)
	}
	return list[0]
}

// endpoint returns the node's endpoint in an overlay.
func (n *tulle) endpoint(overlay string) (e node.Endpoint, there bool) {
	n.t.Helper()
	for _, e := range get[node.Endpoints](n, "/v1/endpoints?local=true").Endpoints {
		if e.Overlay == overlay {
			return e, true
		}
	}
	return e, false
}

// carries reports whether n has the overlay, and returns its state.
func (n *tulle) carries(overlay string) (o node.OverlayStatus, is bool) {
	n.t.Helper()
	for _, o := range n.status().Overlays {
		if o.Name == overlay {
			return o, true
		}
	}
	return o, false
}

// floodsTo reports whether n sends BUM frames of the overlay to a VTEP.
func (n *tulle) floodsTo(overlay string, at netip.Addr) bool {
	n.t.Helper()
	o, _ := n.carries(overlay)
	return slices.ContainsFunc(o.FloodList, func(a netip.AddrPort) bool { return a.Addr() == at })
}

// refuses runs a command that must fail, with one line that has the words.
func (n *tulle) refuses(words []string, args ...string) {
	n.t.Helper()
	status, stdout, stderr := n.command(args...)
	if status == 0 || stdout != "" {
		n.t.Errorf("%s: tulle %s: status %d, prints %q: want it refused", n.name, strings.Join(args, " "), status, stdout)
		return
	}
	wantRefusal(n.t, status, stderr, words...)
}

// refusesAll is refuses for several commands at once, each within the time.
func (n *tulle) refusesAll(within time.Duration, words []string, commands ...[]string) {
	n.t.Helper()
	var wg sync.WaitGroup
	for _, args := range commands {
		wg.Go(func() {
			start := time.Now()
			n.refuses(words, args...)
			took := time.Since(start)
			n.t.Logf("%s: tulle %s: refused after %v", n.name, strings.Join(args, " "), took.Round(time.Millisecond))
			if took > within {
				n.t.Errorf("want it refused within %v", within)
			}
		})
	}
	wg.Wait()
}

// device checks that the endpoint's device is as the endpoint says.
func (n *tulle) device(overlay string, want ...netip.Prefix) {
	n.t.Helper()
	e, there := n.endpoint(overlay)
	if !there || !e.Up {
		n.t.Fatalf("%s: endpoint in %s: %+v, want one that is up", n.name, overlay, e)
	}
	link, there, err := n.host.Link(e.Tap)
	if err != nil || !there {
		n.t.Fatalf("%s: device %s: %v, there: %v", n.name, e.Tap, err, there)
	}
	if !link.Up || link.MAC != e.MAC.String() || e.MAC != ether.MACOf(want[0].Addr()) {
		n.t.Errorf("%s: device %+v, endpoint's MAC %s, want it up and MAC %s", n.name, link, e.MAC, ether.MACOf(want[0].Addr()))
	}
	for _, p := range want {
		if !slices.Contains(link.Addrs, p) || !slices.Contains(e.IPs, p) {
			n.t.Errorf("%s: device has %v, endpoint %v, want %s", n.name, link.Addrs, e.IPs, p)
		}
	}
}

// place is a node with an address in an overlay.
type place struct {
	n    *tulle
	addr netip.Addr
}

// mesh waits until each address answers on all other nodes.
func mesh(t *testing.T, within time.Duration, at ...place) time.Duration {
	t.Helper()
	start := time.Now()
	var failed atomic.Bool
	var wg sync.WaitGroup
	for _, p := range at {
		wg.Go(func() {
			for _, q := range at {
				if p.n != q.n && !answers(t, p.n.host, q.addr, within) {
					t.Errorf("%s: %s (%s) does not answer within %v", p.n.name, q.addr, q.n.name, within)
					failed.Store(true)
				}
			}
		})
	}
	wg.Wait()
	if failed.Load() {
		t.FailNow()
	}
	return time.Since(start)
}

// answers reports whether dst answers a ping from h within the time.
func answers(t *testing.T, h *lab.Host, dst netip.Addr, within time.Duration) bool {
	ctx, cancel := context.WithTimeout(t.Context(), within)
	defer cancel()
	_, err := h.WaitPing(ctx, dst)
	return err == nil
}
