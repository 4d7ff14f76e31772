//go:build soak

package e2e

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"
)

//	n0 (keeper) ──[u0]──┐
//	n1 ───────────[u1]──┼── r routes      5 and 50 nodes on one machine
//	…                   │
//	n49 ─────────[u49]──┘
//
// How long it takes until a new overlay is of use everywhere, and what nodes need.

// TestSoakSharedFive measures it with five nodes.
func TestSoakSharedFive(t *testing.T) { usable(t, 5) }

// TestSoakSharedFifty measures it with fifty.
func TestSoakSharedFifty(t *testing.T) { usable(t, 50) }

// exposeAll exposes all nodes at once, by the API: that many commands would show
// how long this one machine takes to start them.
func exposeAll(t *testing.T, overlay string, nodes []*tulle) []place {
	t.Helper()
	at, errs := make([]place, len(nodes)), make([]error, len(nodes))
	var wg sync.WaitGroup
	for i, n := range nodes {
		wg.Go(func() {
			client := n.http
			client.Timeout = 40 * time.Second
			r, err := client.Post("http://tulle/v1/exposed", "application/json", strings.NewReader(fmt.Sprintf(`{"overlay":%q}`, overlay)))
			if err != nil {
				errs[i] = err
				return
			}
			defer r.Body.Close()
			var e struct { // of an Endpoint and of an Error
				IPs   []netip.Prefix
				Error string
			}
			if err := json.NewDecoder(r.Body).Decode(&e); err != nil || r.StatusCode != http.StatusOK || len(e.IPs) == 0 {
				errs[i] = fmt.Errorf("%s: expose: %s: %s (%v)", n.name, r.Status, e.Error, err)
				return
			}
			at[i] = place{n, e.IPs[0].Addr()}
		})
	}
	wg.Wait()
	if err := errors.Join(errs...); err != nil {
		t.Fatal(err)
	}
	return at
}

func usable(t *testing.T, count int) {
	_, _, nodes := fifty(t, count+1) // without the last one
	eventually(t, time.Minute, "all see all", func() bool {
		for _, n := range nodes {
			if n.status().Node.Peers != count-1 {
				return false
			}
		}
		return true
	})
	memoryOf := func(when string) {
		t.Helper()
		t.Logf("%d nodes, %s: the keeper has %.1f MiB resident, another node %.1f", count, when,
			float64(memory(t, nodes[0].proc.Pid(), "VmRSS"))/(1<<20), float64(memory(t, nodes[count/2].proc.Pid(), "VmRSS"))/(1<<20))
	}
	memoryOf("without a shared overlay")
	var slowest struct{ command, known, all time.Duration }
	for _, name := range []string{"blue", "green", "red"} {
		start := time.Now()
		nodes[count-1].do("overlay", "create", name)
		command := time.Since(start)
		known(t, 30*time.Second, name, true, nodes...)
		seen := time.Since(start)
		at := exposeAll(t, name, nodes)
		exposed := time.Since(start)
		used := map[netip.Addr]bool{}
		for _, p := range at {
			if used[p.addr] {
				t.Errorf("%s is assigned twice", p.addr)
			}
			used[p.addr] = true
		}
		var wg sync.WaitGroup
		for i, p := range at { // each to its neighbour, so that each has sent and received
			to := at[(i+1)%count]
			wg.Go(func() {
				if !answers(t, p.n.host, to.addr, 30*time.Second) {
					t.Errorf("%s: %s does not answer", p.n.name, to.addr)
				}
			})
		}
		wg.Wait()
		all := time.Since(start)
		t.Logf("%d nodes: overlay create returns after %v, every node lists the overlay after %v, is exposed after %v, and has pinged another one after %v",
			count, command.Round(time.Millisecond), seen.Round(time.Millisecond), exposed.Round(time.Millisecond), all.Round(time.Millisecond))
		slowest.command, slowest.known, slowest.all = max(slowest.command, command), max(slowest.known, seen), max(slowest.all, all)
	}
	memoryOf("in three shared overlays")
	if slowest.known > 5*time.Second || slowest.all > 60*time.Second {
		t.Errorf("the slowest: %+v, want 5s until all know, 60s until all have pinged", slowest)
	}
}
