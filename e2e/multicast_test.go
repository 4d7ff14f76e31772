package e2e

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/net/ipv4"
	"golang.org/x/net/ipv6"

	"github.com/tulle-net/tulle/bridge"
	"github.com/tulle-net/tulle/ether"
	"github.com/tulle-net/tulle/internal/lab"
	"github.com/tulle-net/tulle/internal/lab/labtest"
	"github.com/tulle-net/tulle/tap"
	"github.com/tulle-net/tulle/underlay"
	"github.com/tulle-net/tulle/underlay/underlaytest"
)

//	node 1: [eth0 .1] sender, [eth0 .2] member ── ╮
//	node 2: [eth0 .3] member, [eth0 .4] not ───── ┼ underlay in memory
//	node 3: [eth0 .5] not ─────────────────────── ╯
//
// The nodes are in this process; hosts, TAPs, and who joins and leaves are real.

// castNode is a node with one overlay, as the test sees it.
type castNode struct {
	t      testing.TB
	conn   underlay.Conn
	tunnel *bridge.Tunnel
	br     *bridge.Bridge
	at     netip.AddrPort
	rung   chan struct{}

	mu     sync.Mutex
	events []bridge.LoopEvent
	told   map[netip.Addr][]bridge.Peer
}

// knows reports whether the node was told of members of a group at another.
func (n *castNode) knows(g netip.Addr) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	return len(n.told[g]) > 0
}

func castName(i int) string { return fmt.Sprintf("node%d", i) }

// castNodes makes nodes that are each other's members, and tells each of the others'
// groups whenever they change, as tables do.
func castNodes(t testing.TB, count int, cfg bridge.Config) []*castNode {
	t.Helper()
	mem := underlaytest.NewNet(1)
	ctx, stop := context.WithCancel(context.Background())
	var running sync.WaitGroup
	var nodes []*castNode
	for i := 1; i <= count; i++ {
		n := &castNode{t: t, at: netip.AddrPortFrom(netip.AddrFrom4([4]byte{192, 0, 2, byte(i)}), 4789), rung: make(chan struct{}, 1)}
		n.conn = mem.Conn(n.at)
		n.tunnel = bridge.NewTunnel(bridge.TunnelConfig{Conn: n.conn, Self: []netip.Addr{n.at.Addr()}, Node: castName(i)})
		c := cfg
		c.Name, c.VNI, c.Snooping = "blue", 100, true
		c.GroupsChanged = func() {
			select {
			case n.rung <- struct{}{}:
			default:
			}
		}
		c.Loop = func(e bridge.LoopEvent) {
			n.mu.Lock()
			defer n.mu.Unlock()
			n.events = append(n.events, e)
		}
		var err error
		if n.br, err = n.tunnel.Add(c); err != nil {
			t.Fatal(err)
		}
		nodes = append(nodes, n)
	}
	t.Cleanup(func() { // before the lab's, which was made first
		stop()
		for _, n := range nodes {
			if err := n.conn.Close(); err != nil {
				t.Error(err)
			}
		}
		running.Wait()
		for _, n := range nodes {
			if err := n.br.Close(); err != nil {
				t.Error(err)
			}
		}
	})
	var telling sync.Mutex
	tell := func() {
		telling.Lock()
		defer telling.Unlock()
		for i, n := range nodes {
			members := map[netip.Addr][]bridge.Peer{}
			var routers []bridge.Peer
			for j, o := range nodes {
				if i == j {
					continue
				}
				list, router := o.br.Groups()
				peer := bridge.Peer{Name: castName(j + 1), VTEP: o.at}
				for _, g := range list {
					members[g] = append(members[g], peer)
				}
				if router {
					routers = append(routers, peer)
				}
			}
			n.br.SetGroups(members, routers)
			n.mu.Lock()
			n.told = members
			n.mu.Unlock()
		}
	}
	for i, n := range nodes {
		var vteps []netip.AddrPort
		var peers []bridge.Peer
		for j, o := range nodes {
			if i != j {
				vteps = append(vteps, o.at)
				peers = append(peers, bridge.Peer{Name: castName(j + 1), VTEP: o.at})
			}
		}
		n.tunnel.SetMembers(vteps)
		n.br.SetMembers(vteps, nil)
		n.br.SetSnooped(peers)
		running.Go(func() {
			if err := n.tunnel.Run(ctx); err != nil {
				t.Error(err)
			}
		})
		running.Go(func() {
			for {
				select {
				case <-n.rung:
					tell()
				case <-ctx.Done():
					return
				}
			}
		})
	}
	return nodes
}

// open makes a TAP in a host.
func (n *castNode) open(h *lab.Host, dev string, mac ether.MAC, addrs ...netip.Prefix) tap.Device {
	n.t.Helper()
	d, err := tap.Open(tap.Config{Name: dev, MAC: mac, MTU: 1450, Netns: h.Path(), Addresses: addrs})
	if err != nil {
		n.t.Fatal(err)
	}
	return d
}

// hold gives the node a TAP.
func (n *castNode) hold(d tap.Device) {
	n.t.Helper()
	if _, err := n.br.AddPort(d); err != nil {
		n.t.Fatal(err)
	}
}

// station gives a host number i an endpoint of the node.
func (n *castNode) station(h *lab.Host, i int) {
	n.t.Helper()
	n.hold(n.open(h, "eth0", ether.MACOf(address(i)), netip.PrefixFrom(address(i), 16), netip.PrefixFrom(addressV6(i), 64)))
}

func castHosts(t testing.TB, count int) (*lab.Lab, []*lab.Host) {
	t.Helper()
	l := labtest.New(t)
	var hs []*lab.Host
	for i := range count {
		h, err := l.AddHost(string(rune('a' + i)))
		if err != nil {
			t.Fatal(err)
		}
		hs = append(hs, h)
	}
	return l, hs
}

// listener is a socket of a member: it counts what it gets, each packet once.
type listener struct {
	conn *net.UDPConn
	got  atomic.Int64
	done chan struct{}
}

const castPort = 5004

func listen(t testing.TB, h *lab.Host, g netip.Addr) *listener {
	t.Helper()
	l := &listener{done: make(chan struct{})}
	err := h.Do(func() error {
		ifi, err := net.InterfaceByName("eth0")
		if err != nil {
			return err
		}
		network := "udp4"
		if g.Is6() {
			network = "udp6"
		}
		l.conn, err = net.ListenMulticastUDP(network, ifi, &net.UDPAddr{IP: g.AsSlice(), Port: castPort})
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	go func() {
		defer close(l.done)
		buf := make([]byte, 2048)
		for {
			if _, err := l.conn.Read(buf); err != nil {
				return
			}
			l.got.Add(1)
		}
	}()
	t.Cleanup(func() { l.close() })
	return l
}

func (l *listener) close() {
	l.conn.Close()
	<-l.done
}

// groupFrames counts frames for a group at a host's device, until the test ends.
func groupFrames(t testing.TB, h *lab.Host, g netip.Addr) *atomic.Int64 {
	t.Helper()
	n := &atomic.Int64{}
	ctx, stop := context.WithCancel(context.Background())
	ready, done := make(chan struct{}), make(chan struct{})
	mac := ether.MulticastMAC(g)
	go func() {
		defer close(done)
		_, err := h.Sniff(ctx, "eth0", func() { close(ready) }, func(f []byte) bool {
			if ether.MACFrom(f) == mac && isUDP(f) {
				n.Add(1)
			}
			return false
		})
		if ctx.Err() == nil {
			t.Error(err)
		}
	}()
	t.Cleanup(func() { stop(); <-done })
	<-ready
	return n
}

func isUDP(f []byte) bool { return f[12] == 8 && f[23] == 17 || f[12] == 0x86 && f[20] == 17 }

// rtp sends packets as RTP has them: 172 bytes, numbered, paced.
func rtp(t testing.TB, h *lab.Host, g netip.Addr, count int) {
	t.Helper()
	err := h.Do(func() error {
		ifi, err := net.InterfaceByName("eth0")
		if err != nil {
			return err
		}
		network, local := "udp4", ":0"
		if g.Is6() {
			network = "udp6"
		}
		c, err := net.ListenPacket(network, local)
		if err != nil {
			return err
		}
		defer c.Close()
		if g.Is6() {
			p := ipv6.NewPacketConn(c)
			err = p.SetMulticastInterface(ifi)
			if err == nil {
				err = p.SetMulticastHopLimit(8)
			}
		} else {
			p := ipv4.NewPacketConn(c)
			err = p.SetMulticastInterface(ifi)
			if err == nil {
				err = p.SetMulticastTTL(8)
			}
		}
		if err != nil {
			return err
		}
		b := make([]byte, 172)
		b[0] = 0x80
		to := net.UDPAddrFromAddrPort(netip.AddrPortFrom(g, castPort))
		for i := range count {
			b[2], b[3] = byte(i>>8), byte(i)
			if _, err := c.WriteTo(b, to); err != nil {
				return err
			}
			if i%10 == 9 {
				time.Sleep(2 * time.Millisecond) // a receive buffer is finite
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

func hasGroup(br *bridge.Bridge, g netip.Addr) bool {
	list, _ := br.Groups()
	return slices.Contains(list, g)
}

// TestMulticast: a stream reaches members and no other port; it goes on beyond the time
// that a membership lives, because the node asks and the kernel answers; it ends for who
// has left.
func TestMulticast(t *testing.T) {
	t.Parallel()
	for name, g := range map[string]netip.Addr{"IPv4": netip.MustParseAddr("239.32.1.2"), "IPv6": netip.MustParseAddr("ff15::3201")} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			_, hs := castHosts(t, 5)
			// A membership lives for 4.2 s. That one is lost, when queries or answers are (the
			// kernel's table of neighbours, which all namespaces share, may be full), must
			// not look as if others got the stream: then it goes nowhere.
			n := castNodes(t, 3, bridge.Config{QueryInterval: 2 * time.Second, UnknownMulticast: bridge.MulticastDrop})
			for i, at := range []int{0, 0, 1, 1, 2} {
				n[at].station(hs[i], i+1)
			}
			for i := 1; i < 5; i++ {
				ping(t, hs[0], address(i+1), 10*time.Second)
			}
			here, there := listen(t, hs[1], g), listen(t, hs[2], g)
			eventually(t, 10*time.Second, "both nodes know of members", func() bool { return hasGroup(n[0].br, g) && n[0].knows(g) })
			not := []*atomic.Int64{groupFrames(t, hs[3], g), groupFrames(t, hs[4], g)}
			const packets = 1000
			flows := func(what string, l ...*listener) {
				t.Helper()
				eventually(t, 10*time.Second, what+": all members get all of a stream", func() bool {
					var was []int64
					for _, l := range l {
						was = append(was, l.got.Load())
					}
					rtp(t, hs[0], g, packets)
					for i, l := range l {
						if !eventuallyGot(&l.got, was[i]+packets) || l.got.Load() != was[i]+packets {
							return false
						}
					}
					return true
				})
			}
			before := n[2].br.RxFrames.Load()
			flows("they have joined", here, there)
			if got := n[2].br.RxFrames.Load() - before; got > 100 {
				t.Errorf("%d frames of the stream came to a node without members", got)
			}
			time.Sleep(9 * time.Second) // twice the life of a membership that nobody renews
			flows("much later", here, there)

			there.close()
			eventually(t, 10*time.Second, "who has left is forgotten", func() bool { return !hasGroup(n[1].br, g) })
			left := groupFrames(t, hs[2], g)
			eventually(t, 5*time.Second, "the sender's node knows", func() bool { return !n[0].knows(g) })
			flows("one has left", here)
			if got := left.Load(); got != 0 {
				t.Errorf("%d packets came to who has left", got)
			}
			for i, c := range not {
				if got := c.Load(); got != 0 {
					t.Errorf("%d packets came to host %c, which has not joined", got, 'd'+rune(i))
				}
			}
			t.Logf("members got %d and %d packets, others none", here.got.Load(), there.got.Load())
		})
	}
}

// TestMulticastReattached: a bridge that gets a device whose host has joined before, and
// says so no more, learns it by asking.
func TestMulticastReattached(t *testing.T) {
	t.Parallel()
	g := netip.MustParseAddr("239.32.1.3")
	_, hs := castHosts(t, 1)
	n := castNodes(t, 1, bridge.Config{})
	dev := n[0].open(hs[0], "eth0", ether.MACOf(address(1)), netip.PrefixFrom(address(1), 16))
	listen(t, hs[0], g)
	// The kernel reports twice, and these reports are lost.
	q, batch, reports := dev.Queues()[0], tap.NewBatch(), 0
	for reports < 2 {
		if err := q.Wait(); err != nil {
			t.Fatal(err)
		}
		if err := q.Read(batch); err != nil {
			t.Fatal(err)
		}
		for _, f := range batch.Frames {
			if f.B[12] == 8 && f.B[23] == 2 && slices.Equal(f.B[len(f.B)-4:], g.AsSlice()) {
				reports++
			}
		}
	}
	start := time.Now()
	n[0].hold(dev)
	eventually(t, 10*time.Second, "the group is known", func() bool { return hasGroup(n[0].br, g) })
	t.Logf("after %v", time.Since(start).Round(time.Millisecond))
}

//	node a (the binary): a1 sends, a2 has joined, a3 has not; room has eth0 and eth1, and
//	a Linux bridge between them.
//
// TestMulticastAttached: what the node does for containers that `tulle attach` brings.
func TestMulticastAttached(t *testing.T) {
	t.Parallel()
	l, _, h := hosts(t, 1, lab.Underlay{Prefix4: underlay4, Offloads: lab.Wire})
	a := joined(t, l, h, nil)[0]
	c := containers(t, l, "a1", "a2", "a3", "room", "station")
	a.do("overlay", "create", "blue", "--subnet", "10.32.0.0/16")
	for _, h := range c[:3] {
		a.attaches("blue", "--netns", h.Path(), "--name", h.Name())
	}
	g := netip.MustParseAddr("239.32.1.4")
	member := listen(t, c[1], g)
	frames := groupFrames(t, c[2], g)
	eventually(t, 20*time.Second, "a stream of 1,000 packets reaches a2, and none of them a3", func() bool {
		before, was := frames.Load(), member.got.Load()
		rtp(t, c[0], g, 1000)
		return eventuallyGot(&member.got, was+1000) && frames.Load() == before
	})

	room, station := c[3], c[4]
	plug := looped(t, l, room, station)
	for i, dev := range []string{"eth0", "eth1"} {
		a.attaches("blue", "--netns", room.Path(), "--ifname", dev, "--name", fmt.Sprintf("port%d", i))
		plug(dev)
	}
	broadcast(t, station, netip.MustParseAddr("10.32.255.255"), 100)
	eventually(t, 5*time.Second, "status says which port is blocked", func() bool {
		b := a.status().Overlays[0].Blocked
		return len(b) == 1 && b[0].Port == "port1" && b[0].Other == "port port0"
	})
	if log := a.proc.Log(); !strings.Contains(log, "a port is blocked") || !strings.Contains(log, "port1") {
		t.Error("the node's log does not say so")
	}
	a.eventually(5*time.Second, "what is dropped at a blocked port is counted", func() bool {
		broadcast(t, station, netip.MustParseAddr("10.32.255.255"), 100)
		return a.status().Drops["bridge_port_blocked"] > 0
	})
}

// eventuallyGot waits until a listener has got so many packets, for a second.
func eventuallyGot(got *atomic.Int64, want int64) bool {
	for range 100 {
		if got.Load() >= want {
			return true
		}
		time.Sleep(10 * time.Millisecond)
	}
	return false
}

//	node 1: [eth0 .1] sender, [tap1] ── br0 ── two stations
//
// TestMulticastSharedPort: of two members behind one port one leaves. The other is asked,
// answers, and goes on getting the stream.
func TestMulticastSharedPort(t *testing.T) {
	t.Parallel()
	l, hs := castHosts(t, 4)
	sender, room, one, two := hs[0], hs[1], hs[2], hs[3]
	n := castNodes(t, 1, bridge.Config{})
	n[0].station(sender, 1)
	plug := looped(t, l, room, one)
	n[0].hold(n[0].open(room, "tap1", ether.MACOf(address(101))))
	plug("tap1")
	// The Linux bridge is to have no opinion of its own.
	runIn(t, room, "ip", "link", "set", "br0", "type", "bridge", "mcast_snooping", "0")
	runIn(t, room, "ip", "link", "add", "st1", "type", "veth", "peer", "name", "eth0", "netns", two.Path())
	plug("st1")
	runIn(t, two, "ip", "address", "add", address(8).String()+"/16", "dev", "eth0")
	runIn(t, two, "ip", "link", "set", "eth0", "up")
	for name, g := range map[string]netip.Addr{"IPv4": netip.MustParseAddr("239.32.1.5"), "IPv6": netip.MustParseAddr("ff15::3205")} {
		t.Run(name, func(t *testing.T) {
			stays := listen(t, two, g)
			eventually(t, 30*time.Second, "one leaves, and the other goes on", func() bool {
				first := listen(t, one, g)
				was := stays.got.Load()
				rtp(t, sender, g, 100)
				if !eventuallyGot(&first.got, 100) || !eventuallyGot(&stays.got, was+100) {
					first.close()
					return false
				}
				first.close()
				for deadline := time.Now().Add(4 * time.Second); time.Now().Before(deadline); time.Sleep(100 * time.Millisecond) {
					if !hasGroup(n[0].br, g) {
						return false // what it answered was lost
					}
				}
				return true
			})
			stays.close()
			eventually(t, 10*time.Second, "nobody is left", func() bool { return !hasGroup(n[0].br, g) })
		})
	}
}

// Of a stream that nobody has joined, nobody gets anything where the overlay says so; and
// of one that somebody on another node has joined, that node gets it.
func TestMulticastUnknown(t *testing.T) {
	t.Parallel()
	l, _, h := hosts(t, 3, lab.Underlay{Prefix4: underlay4, Offloads: lab.Wire})
	nodes := joined(t, l, h, nil)
	a := nodes[0]
	a.do("overlay", "create", "blue", "--subnet", "10.32.0.0/16", "--unknown-multicast", "drop")
	known(t, 5*time.Second, "blue", true, nodes...)
	cs := containers(t, l, "a1", "b1", "c1")
	for i, n := range nodes {
		n.attaches("blue", "--netns", cs[i].Path())
	}
	settled(t, "blue", nodes...)
	joinedGroup, none := netip.MustParseAddr("239.7.7.7"), netip.MustParseAddr("239.7.7.8")
	member := listen(t, cs[1], joinedGroup)
	defer member.close()
	atC := groupFrames(t, cs[2], joinedGroup)
	noneB, noneC := groupFrames(t, cs[1], none), groupFrames(t, cs[2], none)
	const count = 200
	a.eventually(20*time.Second, "the member gets the stream", func() bool {
		before := member.got.Load()
		rtp(t, cs[0], joinedGroup, count)
		return eventuallyGot(&member.got, before+count)
	})
	was := atC.Load() // from before all had told
	rtp(t, cs[0], joinedGroup, count)
	dropped := a.status().Drops["unknown_multicast"]
	rtp(t, cs[0], none, count)
	a.eventually(5*time.Second, "what nobody has joined is dropped", func() bool { return a.status().Drops["unknown_multicast"] >= dropped+count })
	if b, c, d := noneB.Load(), noneC.Load(), atC.Load()-was; b != 0 || c != 0 || d != 0 {
		t.Errorf("%d and %d frames for nobody arrived, and %d of the stream where nobody joined", b, c, d)
	}
	a.do("overlay", "set", "blue", "--unknown-multicast", "flood")
	a.eventually(10*time.Second, "it is flooded when the overlay says so", func() bool {
		rtp(t, cs[0], none, 10)
		return noneB.Load() > 0 && noneC.Load() > 0
	})
}
