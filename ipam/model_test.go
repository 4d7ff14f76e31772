package ipam

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"testing"
	"time"

	_ "github.com/tulle-net/tulle/internal/proptest"
	"github.com/tulle-net/tulle/store"
	"pgregory.net/rapid"
)

// The model: nodes that crash, lose power, keep wrong time, lose their disks, are
// cut off and are removed; two keepers with clocks of their own; a store that is
// away; requests whose answers are lost, that arrive twice, late, or while others
// are under way. After each step no address may be in use twice.
//
//	TULLE_IPAM_HISTORIES=100000 go test -run TestModel -timeout 1h -rapid.seed=$RANDOM ./ipam    a soak
//	go test -run TestModel -rapid.seed=N ./ipam                                                 one again

const (
	modelHistories = 2000
	modelNodes     = 4
	modelMachines  = 6
	modelKeepers   = 2
)

var errCrashed = errors.New("the process was killed")

// act is one step.
func (w *modelWorld) act() {
	w.steps++
	ctx := context.Background()
	n := w.nodes[w.pick(len(w.nodes), "node")]
	owner := "e" + strconv.Itoa(w.pick(4, "endpoint"))
	p := n.pool
	kind := rapid.IntRange(0, 99).Draw(w.t, "step")
	w.trace("%s %s step %d depth %d", n.name, owner, kind, w.depth)
	if n.off {
		return
	}
	if p == nil && kind < 55 {
		n.start()
		return
	}
	talks := func() bool { return len(p.talk) > 0 } // it would wait for itself
	switch {
	case kind < 22:
		if !talks() {
			q := Request{Overlay: w.overlay(), Owner: owner, Families: [][]int{nil, {4}, {6}}[w.pick(3, "families")]}
			w.assigned(n, p, q, ctx)
		}
	case kind < 32:
		if !talks() {
			a := w.hot
			switch w.pick(8, "which") {
			case 6:
				a = netip.AddrFrom4([4]byte{10, 0, 0, byte(2 + w.pick(13, "address"))})
			case 7:
				a = netip.MustParseAddr(fmt.Sprintf("fd00::%x", 2+w.pick(14, "address")))
			}
			w.assigned(n, p, Request{Overlay: w.overlay(), Owner: owner, Want: []netip.Addr{a}, Families: []int{familyOf(a)}}, ctx)
		}
	case kind < 43:
		p.Release(owner)
	case kind < 55:
		if !talks() {
			p.stop()
			p.tick(ctx)
			p.leaseAhead(ctx)
		}
	case kind < 63:
		w.pass(time.Duration(rapid.IntRange(1, 90).Draw(w.t, "minutes")) * time.Minute)
	case kind < 69:
		w.hours(2 + w.pick([]int{24, 60}[w.pick(2, "long")], "hours"))
	case kind < 72:
		n.crashIn = 1 + w.pick(12, "killed in")
	case kind < 74:
		n.kill()
	case kind < 77:
		w.reboot(n)
	case kind < 81:
		n.cut = !n.cut
	case kind < 83:
		w.away = !w.away
		w.mem.SetAway(w.away)
	case kind < 85:
		n.wall += time.Duration(rapid.IntRange(-100, 100).Draw(w.t, "jump")) * time.Hour
		n.sync = n.wall == 0
	case kind < 87:
		k := w.keepers[w.pick(len(w.keepers), "keeper")]
		if w.depth == 0 && w.chance(40, "keeper restarts") {
			k.restart()
		}
		k.wall += time.Duration(rapid.IntRange(-100, 100).Draw(w.t, "jump")) * time.Hour
	case kind < 93:
		w.reclaim()
	case kind < 97:
		if len(w.late) > 0 {
			i := w.pick(len(w.late), "late")
			f := w.late[i]
			w.late = slices.Delete(w.late, i, i+1)
			f()
		}
	case kind < 98: // node rm
		w.keeper().Forget(ctx, n.name, false)
	case kind < 99 && w.chance(60, "off"): // node rm of a machine that is off, whose disk is wiped
		w.turnOff(n.name, true)
		w.keeper().Forget(ctx, n.name, true)
		w.turnOff(n.name, false)
	case kind < 99: // the disk is lost, or another machine has the name while this one runs on
		if len(w.nodes) < modelMachines && w.chance(50, "another") {
			w.machine(n.name)
			return
		}
		n.kill()
		n.disk = nil
	default:
		if w.depth == 0 && !w.away {
			w.define("blue")
		}
	}
}

// turnOff turns all machines of the name off, with nothing on their disks when they
// are on again.
func (w *modelWorld) turnOff(name string, off bool) {
	for _, n := range w.nodes {
		if n.name == name {
			n.kill()
			n.off, n.disk = off, nil
		}
	}
}

// assigned asks for an assignment and checks what comes.
func (w *modelWorld) assigned(n *modelNode, p *Pool, q Request, ctx context.Context) {
	life := n.life
	out, err := p.Assign(ctx, q)
	w.trace("%s assigns to %s, wanted %v: %v, %v", n.name, q.Owner, q.Want, out.Prefixes, err)
	if err != nil || n.life != life {
		return
	}
	delete(n.lost, q.Owner)
	on, err := parseState(n.disk)
	if err != nil {
		w.fatal("%s: %v", n.name, err)
	}
	if ep := on.endpoints[q.Owner]; ep == nil || !slices.Equal(ep.Prefixes, out.Prefixes) {
		w.fatal("%s assigned %v to %s, which is not on its disk", n.name, out.Prefixes, q.Owner)
	}
	for _, a := range q.Want {
		if !slices.ContainsFunc(out.Prefixes, func(p netip.Prefix) bool { return p.Addr() == a }) {
			w.fatal("%s asked for %s and got %v", n.name, a, out.Prefixes)
		}
	}
}

// reboot: a machine that loses power; its clock is right, or wrong and not
// synchronised.
func (w *modelWorld) reboot(n *modelNode) {
	n.kill()
	off := w.now
	if w.chance(50, "off for long") {
		w.hours(1 + w.pick(40, "hours off"))
	} else {
		w.pass(time.Duration(w.pick(30, "minutes off")) * time.Minute)
	}
	n.kill() // others' steps may have started it
	n.boot++
	off = w.now - off
	n.wall, n.sync = 0, !w.chance(60, "no real-time clock")
	if !n.sync {
		n.wall = -off // its file says when it went off, and that is all it knows
		if w.chance(30, "nor a file") {
			n.wall = time.Duration(rapid.IntRange(-300, 300).Draw(w.t, "wrong by")) * time.Hour
		}
	}
	n.since = time.Duration(w.pick(60, "since")) * time.Second
	n.start()
}

// hours pass, in which those that can do what they do all the time.
func (w *modelWorld) hours(n int) {
	w.depth++
	defer func() { w.depth-- }()
	for n > 0 {
		some := min(n, 1+w.pick(10, "some"))
		n -= some
		w.pass(time.Duration(some) * time.Hour)
		for _, n := range w.nodes {
			if p := n.pool; p != nil && len(p.talk) == 0 && w.depth < 3 {
				p.stop()
				if !n.cut && w.chance(60, "renews") {
					p.tick(context.Background())
				}
			}
		}
		if w.chance(70, "reclaims") {
			w.reclaim()
		}
		w.check()
	}
}

func (w *modelWorld) reclaim() {
	k := w.keepers[w.pick(len(w.keepers), "keeper")]
	k.r.Reclaim(context.Background(), func(node string) bool {
		for _, n := range w.nodes {
			if n.name == node {
				return n.pool != nil && !n.cut
			}
		}
		return false
	})
}

// check: no address is in use twice. In use is what a Pool says it may use now,
// and has not told the owner to stop using.
func (w *modelWorld) check() {
	used := map[string]string{}
	for _, n := range w.nodes {
		if n.pool == nil || !n.pool.Usable() {
			continue
		}
		for _, ep := range n.pool.Status().Endpoints {
			if n.lost[ep.Owner] {
				continue
			}
			for _, p := range ep.Prefixes {
				key := ep.OverlayID + " " + p.Addr().String()
				me := fmt.Sprintf("%s (machine %d)/%s", n.name, n.machine, ep.Owner)
				if other := used[key]; other != "" {
					w.fatal("%s is in use by %s and %s", p.Addr(), other, me)
				}
				used[key] = me
			}
		}
	}
}

// heal ends all faults and all endpoints; then nothing may be leased.
func (w *modelWorld) heal() {
	ctx := context.Background()
	w.ended = true
	for _, f := range w.late {
		f()
		w.check()
	}
	w.late = nil
	w.away = false
	w.mem.SetAway(false)
	for _, n := range w.nodes {
		n.cut, n.crashIn = false, 0
		n.start()
	}
	for range 3 {
		for _, n := range w.nodes {
			n.pool.stop()
			n.pool.tick(ctx) // may begin anew
			for _, o := range n.pool.Owners() {
				if err := n.pool.Release(o); err != nil {
					w.t.Fatal(err)
				}
			}
		}
		w.check()
		w.pass(time.Hour)
		for range 2 {
			w.reclaim()
		}
	}
	// States that were lost, and nodes that were removed, are reclaimed in time.
	for range 14 {
		w.pass(2 * time.Hour)
		for _, n := range w.nodes {
			if err := n.pool.tick(ctx); err != nil {
				w.fatal("%s cannot renew: %v", n.name, err)
			}
		}
		for _, k := range w.keepers {
			if err := k.r.Reclaim(ctx, func(string) bool { return true }); err != nil {
				w.t.Fatal(err)
			}
		}
	}
	w.check()
	var left []string
	w.mem.View(ctx, func(t store.Reader) error {
		items, err := t.List("ipam/")
		for _, i := range items {
			left = append(left, i.Key+" "+string(i.Value))
		}
		return err
	})
	if len(left) > 0 {
		w.fatal("leaked: %q", left)
	}
	for _, n := range w.nodes {
		if s := n.pool.Status(); len(s.Blocks)+len(s.Fixed)+len(s.Endpoints) > 0 {
			w.fatal("%s still has %+v", n.name, s)
		}
	}
}

func TestModel(t *testing.T) {
	histories := modelHistories
	if s := os.Getenv("TULLE_IPAM_HISTORIES"); s != "" {
		var err error
		if histories, err = strconv.Atoi(s); err != nil {
			t.Fatal(err)
		}
	}
	steps, assigned := 0, 0
	began := time.Now()
	done := 0
	seed := flag.Lookup("rapid.seed").Value
	first, err := strconv.ParseUint(seed.String(), 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	defer seed.Set(seed.String())
	for round := uint64(0); done < histories; round++ {
		seed.Set(strconv.FormatUint(first+round, 10))
		rapid.Check(t, func(t *rapid.T) {
			w := newModel(t)
			for range rapid.IntRange(10, 80).Draw(t, "steps") {
				w.act()
				w.check()
			}
			for _, n := range w.nodes {
				if n.pool != nil {
					assigned += len(n.pool.Owners())
				}
			}
			w.heal()
			steps += w.steps
			done++
		})
		if t.Failed() {
			return
		}
	}
	t.Logf("%d histories, %d steps, %d endpoints at their ends, %v", done, steps, assigned, time.Since(began))
}
