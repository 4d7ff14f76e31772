package e2e

import (
	bin "encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/tulle-net/tulle/internal/lab"
	"github.com/tulle-net/tulle/node"
)

// everywhere waits until each node lists an endpoint of that name with that address, at
// a node; empty: until none lists it.
func everywhere(t *testing.T, within time.Duration, at, name string, ip netip.Addr, nodes ...*tulle) time.Duration {
	t.Helper()
	return eventually(t, within, fmt.Sprintf("all nodes know %s, %s, at node %q", name, ip, at), func() bool {
		for _, n := range nodes {
			list := get[node.Endpoints](n, "/v1/endpoints").Endpoints
			i := slices.IndexFunc(list, func(e node.Endpoint) bool {
				return e.Name == name && slices.ContainsFunc(e.IPs, func(p netip.Prefix) bool { return p.Addr() == ip })
			})
			if (i >= 0) != (at != "") || i >= 0 && list[i].Node != at {
				return false
			}
		}
		return true
	})
}

// settled waits until each node knows all that the others have: nothing unknown is
// sent to them then.
func settled(t *testing.T, overlay string, nodes ...*tulle) {
	t.Helper()
	eventually(t, 10*time.Second, "all nodes know each other's endpoints", func() bool {
		for _, n := range nodes {
			if list := get[node.Status](n, "/v1/status"); !slices.ContainsFunc(list.Overlays, func(o node.OverlayStatus) bool {
				return o.Name == overlay && o.Complete == len(nodes)-1
			}) {
				return false
			}
		}
		return true
	})
}

func (n *tulle) flooded(overlay string) uint64 {
	n.t.Helper()
	for _, o := range n.status().Overlays {
		if o.Name == overlay {
			return o.Flooded
		}
	}
	n.t.Fatalf("%s has no overlay %s", n.name, overlay)
	return 0
}

// Endpoints are known everywhere, so nobody asks across the underlay who they are, one
// that moves is found where it is, and what was is told.
func TestTables(t *testing.T) {
	t.Parallel()
	l, _, h := hosts(t, 3, lab.Underlay{Prefix4: underlay4, Offloads: lab.Wire})
	nodes := joined(t, l, h, nil)
	a, b, c := nodes[0], nodes[1], nodes[2]
	a.do("overlay", "create", "blue", "--subnet", "10.32.0.0/16", "--encryption", "none")
	known(t, 5*time.Second, "blue", true, nodes...)
	cs := containers(t, l, "a1", "b1", "c1", "c2", "a2")
	ips := map[string]netip.Addr{}
	for _, c := range cs { // it floods what a host without neighbours does not
		runIn(t, c, "sysctl", "-q", "-w", "net.ipv6.conf.all.disable_ipv6=1", "net.ipv6.conf.default.disable_ipv6=1")
	}
	for i, n := range nodes {
		ips[cs[i].Name()] = n.attaches("blue", "--netns", cs[i].Path(), "--name", cs[i].Name()).Addr()
	}
	for i, n := range nodes {
		took := everywhere(t, 5*time.Second, n.name, cs[i].Name(), ips[cs[i].Name()], nodes...)
		t.Logf("%s is known everywhere after %v", cs[i].Name(), took)
	}
	a.attaches("blue", "--netns", cs[4].Path()) // so that a stays in the overlay
	settled(t, "blue", nodes...)
	before := []uint64{a.flooded("blue"), b.flooded("blue"), c.flooded("blue")}
	for i, from := range cs[:3] {
		for j, to := range cs[:3] {
			if i != j {
				ping(t, from, ips[to.Name()], 5*time.Second)
			}
		}
	}
	for i, n := range nodes {
		if now := n.flooded("blue"); now != before[i] {
			t.Errorf("%s flooded %d frames, and all that was asked for is known", n.name, now-before[i])
		}
	}

	// What would be done is said before it is done.
	trace := asked[node.Trace](a, "trace", "blue", "a1", "b1")
	if results := resultsOf(trace); !slices.Equal(results, []string{"suppressed", "known", "plain", "fits"}) || trace.To.Node != "b" {
		t.Errorf("trace %+v", trace)
	}
	if results := resultsOf(asked[node.Trace](a, "trace", "blue", "a1", "10.32.99.99")); !slices.Equal(results, []string{"flooded"}) {
		t.Errorf("trace to nobody: %v", results)
	}
	if results := resultsOf(asked[node.Trace](a, "trace", "blue", "a1", "02:54:00:00:00:01")); !slices.Equal(results, []string{"dropped"}) {
		t.Errorf("trace to nobody's MAC: %v", results)
	}
	if status, _, stderr := a.command("trace", "blue", "b1", "a1"); status != 1 || !strings.Contains(stderr, "on node b") {
		t.Errorf("a trace from another node's endpoint: %d, %s", status, stderr)
	}

	// A move: the same address elsewhere, with its MAC.
	moved := ips["a1"]
	a.do("detach", "blue", "--netns", cs[0].Path())
	if got := c.attaches("blue", "--netns", cs[3].Path(), "--name", "c2", "--ip", moved.String()).Addr(); got != moved {
		t.Fatalf("c gives %s", got)
	}
	ping(t, cs[1], moved, 2*time.Second)
	everywhere(t, 5*time.Second, "c", "c2", moved, nodes...)
	everywhere(t, 5*time.Second, "", "a1", moved, nodes...)
	ping(t, cs[1], moved, 2*time.Second)
	for _, n := range nodes {
		var what []string
		for _, e := range asked[node.History](n, "history", moved.String()).Events {
			what = append(what, string(e.What)+" "+e.Node)
		}
		// Whether it is gone before it is there again is a matter of whose news is faster.
		if got := strings.Join(what, ", "); got != "appeared a, moved c" && got != "appeared a, gone a, appeared c" {
			t.Errorf("%s tells of %s: %s", n.name, moved, got)
		}
	}
}

func resultsOf(t node.Trace) (list []string) {
	for _, s := range t.Steps {
		list = append(list, s.Result)
	}
	return list
}

// Two nodes whose settings name one address: the first keeps it, and it is told.
func TestTablesConflict(t *testing.T) {
	t.Parallel()
	l, _, h := hosts(t, 3, lab.Underlay{Prefix4: underlay4, Offloads: lab.Wire})
	first := up(t, l, h[0], "--overlay", overlay(1))
	join := fmt.Sprint(first.status().Node.Gossip)
	third := up(t, l, h[2], "--join", join, "--overlay", overlay(3))
	meet(t, 10*time.Second, first, third)
	everywhere(t, 5*time.Second, "a", "a", address(1), first, third)
	second := up(t, l, h[1], "--join", join, "--overlay", overlay(1))
	meet(t, 10*time.Second, first, second, third)
	conflict := func(n *tulle) bool {
		return slices.ContainsFunc(n.status().Node.Conflicts, func(c string) bool {
			return strings.Contains(c, address(1).String()) && strings.Contains(c, "node a") && strings.Contains(c, "node b")
		})
	}
	eventually(t, 15*time.Second, "all say that two have one address", func() bool { return conflict(first) && conflict(second) && conflict(third) })
	if e := first.fdb("blue"); len(e.Entries) == 0 {
		t.Error("a has no FDB")
	}
	first.stop()
	eventually(t, 15*time.Second, "the second has the address when the first is gone", func() bool {
		return !conflict(third) && slices.ContainsFunc(third.fdb("blue").Entries, func(e node.FDBEntry) bool { return e.Peer == "b" && e.Table })
	})
	ping(t, h[2], address(1), 5*time.Second)
}

// The cable of a node is pulled for 30 s: its names are gone within 10 s, and all is
// right within 2 s when it is back.
func TestTablesCable(t *testing.T) {
	t.Parallel()
	l, sw, h := hosts(t, 3, lab.Underlay{Prefix4: underlay4, Offloads: lab.Wire})
	nodes := joined(t, l, h, nil)
	a, b, c := nodes[0], nodes[1], nodes[2]
	a.do("overlay", "create", "blue", "--subnet", "10.32.0.0/16")
	known(t, 5*time.Second, "blue", true, nodes...)
	cs := containers(t, l, "a1", "b1", "c1", "c2")
	var ips []netip.Addr
	for i, n := range nodes {
		ips = append(ips, n.attaches("blue", "--netns", cs[i].Path(), "--name", cs[i].Name()).Addr())
	}
	all := func(within time.Duration) (took time.Duration) {
		for i, n := range nodes {
			took += everywhere(t, within, n.name, cs[i].Name(), ips[i], nodes...)
		}
		return took
	}
	all(5 * time.Second)
	ping(t, cs[2], ips[0], 5*time.Second)
	if err := sw.Cut(h[2]); err != nil {
		t.Fatal(err)
	}
	pulled := time.Now()
	gone := everywhere(t, 10*time.Second, "", "c1", ips[2], a, b)
	// What comes meanwhile is known when the cable is back, on both sides.
	fresh := c.attaches("blue", "--netns", cs[3].Path(), "--name", "c2").Addr()
	time.Sleep(time.Until(pulled.Add(30 * time.Second))) // the span that is asked for
	if err := sw.Mend(h[2]); err != nil {
		t.Fatal(err)
	}
	back := all(2*time.Second) + everywhere(t, 2*time.Second, "c", "c2", fresh, nodes...)
	t.Logf("c1's name was gone %v after the cable was pulled, and all names were right %v after it was back", gone, back)
	if back > 2*time.Second {
		t.Errorf("all names are right only %v after the cable is back", back)
	}
	ping(t, cs[2], ips[0], 5*time.Second)
	ping(t, cs[1], ips[2], 5*time.Second)
}

// An address moves between nodes under a stream of a datagram a millisecond: what is sent
// after it is elsewhere arrives there, and what was lost is counted.
func TestTablesMove(t *testing.T) {
	t.Parallel()
	l, _, h := hosts(t, 3, lab.Underlay{Prefix4: underlay4, Offloads: lab.Wire})
	nodes := joined(t, l, h, nil)
	a, b, c := nodes[0], nodes[1], nodes[2]
	a.do("overlay", "create", "blue", "--subnet", "10.32.0.0/16")
	known(t, 5*time.Second, "blue", true, nodes...)
	cs := containers(t, l, "a1", "b1", "c1", "a2", "c2")
	ip := a.attaches("blue", "--netns", cs[0].Path(), "--name", "it").Addr()
	b.attaches("blue", "--netns", cs[1].Path())
	c.attaches("blue", "--netns", cs[4].Path()) // c is in the overlay before
	a.attaches("blue", "--netns", cs[3].Path()) // and a after the move
	settled(t, "blue", nodes...)
	ping(t, cs[1], ip, 5*time.Second)

	const port = 9000
	type arrival struct{ at, seq uint32 } // at which of the two, in order of arrival
	arrivals := make(chan arrival, 1<<16)
	listen := func(h *lab.Host, at uint32) {
		var conn net.PacketConn
		if err := h.Do(func() (err error) {
			conn, err = net.ListenPacket("udp4", fmt.Sprintf("0.0.0.0:%d", port))
			return err
		}); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { conn.Close() })
		go func() {
			b := make([]byte, 64)
			for {
				n, _, err := conn.ReadFrom(b)
				if err != nil {
					return
				}
				if n == 4 {
					arrivals <- arrival{at, bin.BigEndian.Uint32(b)}
				}
			}
		}()
	}
	listen(cs[0], 0)
	listen(cs[2], 1)
	var out net.Conn
	if err := cs[1].Do(func() (err error) {
		out, err = net.Dial("udp4", netip.AddrPortFrom(ip, port).String())
		return err
	}); err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	var sent atomic.Uint32
	stop, stopped := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(stopped)
		tick := time.NewTicker(time.Millisecond)
		defer tick.Stop()
		for {
			select {
			case <-tick.C:
			case <-stop:
				return
			}
			_, _ = out.Write(bin.BigEndian.AppendUint32(nil, sent.Load())) // refused while nobody listens there
			sent.Add(1)
		}
	}()
	eventually(t, 5*time.Second, "the stream flows", func() bool { return sent.Load() > 500 })
	began := sent.Load()
	a.do("detach", "blue", "--netns", cs[0].Path())
	c.attaches("blue", "--netns", cs[2].Path(), "--name", "it", "--ip", ip.String())
	there := sent.Load()
	eventually(t, 10*time.Second, "the stream goes on", func() bool { return sent.Load() > there+1000 })
	close(stop)
	<-stopped
	last := sent.Load()
	got := map[uint32]uint32{}
	for idle := false; !idle; {
		select {
		case x := <-arrivals:
			got[x.seq] = x.at
		case <-time.After(500 * time.Millisecond):
			idle = true
		}
	}
	var lost, late, stale uint32
	for seq := range last {
		at, ok := got[seq]
		switch {
		case !ok:
			lost++
			if seq >= there {
				late++
			}
			if seq < began {
				t.Errorf("datagram %d is lost, before anything moved", seq)
			}
		case seq >= there && at == 0:
			stale++
		}
	}
	t.Logf("%d datagrams, %d lost from detach to the last that was lost, %d of them sent after attach had returned; between the two commands %d were sent",
		last, lost, late, there-began)
	if stale > 0 {
		t.Errorf("%d datagrams arrived at the old place after the move", stale)
	}
	if late > 250 { // the time in which the news has to travel, on a busy machine
		t.Errorf("%d datagrams are lost that were sent after the address was at its new place", late)
	}
}
