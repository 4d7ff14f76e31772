package e2e

import (
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/tulle-net/tulle/bridge"
	"github.com/tulle-net/tulle/ether"
	"github.com/tulle-net/tulle/internal/lab"
)

//	node 1: tap1 ─╮                    node 1: tap1 ─╮
//	        tap2 ─┼─ br0 ── station    node 2: tap2 ─┼─ br0 ── station
//	node 2: eth0                       node 3: eth0
//
// br0 is a Linux bridge in a namespace, without a spanning tree. The nodes are in this
// process.

// looped makes a Linux bridge with a station, in namespaces of their own. The TAPs are
// to be made in the first.
func looped(t *testing.T, l *lab.Lab, room, station *lab.Host) (plug func(dev string)) {
	t.Helper()
	ip := func(args ...string) { t.Helper(); runIn(t, room, "ip", args...) }
	ip("link", "add", "br0", "type", "bridge", "stp_state", "0")
	ip("link", "add", "st0", "type", "veth", "peer", "name", "eth0", "netns", station.Path())
	ip("link", "set", "st0", "master", "br0", "up")
	ip("link", "set", "br0", "up")
	runIn(t, station, "ip", "address", "add", address(9).String()+"/16", "dev", "eth0")
	runIn(t, station, "ip", "link", "set", "eth0", "up")
	return func(dev string) { ip("link", "set", dev, "master", "br0", "up") }
}

// passed returns how many frames a device has sent and received.
func passed(t *testing.T, h *lab.Host, dev string) (frames int) {
	t.Helper()
	table, err := h.ReadProcNet("dev")
	if err != nil {
		t.Fatal(err)
	}
	_, line, ok := strings.Cut(table, dev+":")
	if !ok {
		t.Fatalf("there is no %s: %s", dev, table)
	}
	fields := strings.Fields(line)
	for _, i := range []int{1, 9} {
		n, err := strconv.Atoi(fields[i])
		if err != nil {
			t.Fatal(err)
		}
		frames += n
	}
	return frames
}

func (n *castNode) said() []bridge.LoopEvent {
	n.mu.Lock()
	defer n.mu.Unlock()
	return slices.Clone(n.events)
}

// ends has a station speak to a LAN with a loop, and waits until the storm has ended
// because one of the nodes has blocked a port.
func ends(t *testing.T, station *lab.Host, nodes ...*castNode) {
	t.Helper()
	start := time.Now()
	broadcast(t, station, netip.MustParseAddr("10.32.255.255"), 100)
	blocked := func() (count int) {
		for _, n := range nodes {
			count += len(n.br.Blocked())
		}
		return count
	}
	eventually(t, 10*time.Second, "a port is blocked", func() bool { return blocked() == 1 })
	took := time.Since(start)
	t.Logf("blocked after %v", took.Round(time.Millisecond))
	if took > 3*time.Second {
		t.Errorf("the storm lasted %v, want 3 s at most", took)
	}
	before := passed(t, station, "eth0")
	since := time.Now()
	time.Sleep(2500 * time.Millisecond)
	if got, each := passed(t, station, "eth0")-before, time.Since(since).Seconds(); float64(got) > 40*each {
		t.Errorf("%d frames passed in %.1f s after the storm's end", got, each)
	}
	if got := blocked(); got != 1 {
		t.Errorf("%d ports are blocked, want one", got)
	}
}

func TestLoopOfOneNode(t *testing.T) {
	t.Parallel()
	l, hs := castHosts(t, 3)
	room, station, far := hs[0], hs[1], hs[2]
	n := castNodes(t, 2, bridge.Config{})
	plug := looped(t, l, room, station)
	for i := 1; i <= 2; i++ {
		dev := fmt.Sprintf("tap%d", i)
		n[0].hold(n[0].open(room, dev, ether.MACOf(address(100+i))))
		plug(dev)
	}
	n[1].station(far, 1)
	ends(t, station, n[0])
	if got, want := n[0].said(), []bridge.LoopEvent{{Overlay: "blue", Port: "tap2", Other: "port tap1", Blocked: true}}; !slices.Equal(got, want) {
		t.Errorf("said %v, want %v", got, want)
	}
	ping(t, station, address(1), 5*time.Second)
	ping(t, far, address(9), 5*time.Second)
	if n[0].tunnel.Drops().Count(bridge.DropPortBlocked) == 0 {
		t.Error("nothing is counted as blocked")
	}
}

func TestLoopOfTwoNodes(t *testing.T) {
	t.Parallel()
	l, hs := castHosts(t, 3)
	room, station, far := hs[0], hs[1], hs[2]
	n := castNodes(t, 3, bridge.Config{})
	plug := looped(t, l, room, station)
	for i := 1; i <= 2; i++ {
		dev := fmt.Sprintf("tap%d", i)
		n[i-1].hold(n[i-1].open(room, dev, ether.MACOf(address(100+i))))
		plug(dev)
	}
	n[2].station(far, 1)
	ends(t, station, n[:2]...)
	if got, want := n[1].said(), []bridge.LoopEvent{{Overlay: "blue", Port: "tap2", Other: "node node1", Blocked: true}}; !slices.Equal(got, want) {
		t.Errorf("the larger name said %v, want %v", got, want)
	}
	if got := n[0].said(); len(got) != 0 {
		t.Errorf("the smaller name said %v", got)
	}
	ping(t, station, address(1), 15*time.Second)
	ping(t, far, address(9), 5*time.Second)
}
