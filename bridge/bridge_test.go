package bridge

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"net/netip"
	"os"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"

	"github.com/tulle-net/tulle/ether"
	"github.com/tulle-net/tulle/ether/ethertest"
	"github.com/tulle-net/tulle/tap/taptest"
	"github.com/tulle-net/tulle/underlay"
	"github.com/tulle-net/tulle/underlay/underlaytest"
	"github.com/tulle-net/tulle/vxlan"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const testVNI vxlan.VNI = 100

// vtepOf is the VTEP of test node i, macOf the MAC of its device.
func vtepOf(i int) netip.AddrPort {
	return netip.AddrPortFrom(netip.AddrFrom4([4]byte{192, 0, 2, byte(i)}), vxlan.Port)
}

func macOf(i int) ether.MAC { return 0x0254_0a20_0000 + ether.MAC(i) }

// testNode is a node in memory: tunnel, one bridge, one device.
type testNode struct {
	conn   underlay.Conn
	tunnel *Tunnel
	bridge *Bridge
	dev    *taptest.Device
	end    func()
}

// start makes test node i on net. It is called, and ended, inside a synctest bubble.
func start(t *testing.T, net *underlaytest.Net, i int, cfg Config) *testNode {
	t.Helper()
	return startWith(t, net, i, cfg, TunnelConfig{})
}

func startWith(t *testing.T, net *underlaytest.Net, i int, cfg Config, tc TunnelConfig) *testNode {
	t.Helper()
	cfg.Name, cfg.VNI = "blue", testVNI
	n := &testNode{conn: net.Conn(vtepOf(i))}
	tc.Conn, tc.Self = n.conn, []netip.Addr{vtepOf(i).Addr()}
	n.tunnel = NewTunnel(tc)
	var err error
	if n.bridge, err = n.tunnel.Add(cfg); err != nil {
		t.Fatal(err)
	}
	n.dev = taptest.New("blue0", macOf(i), 1450, 1)
	if _, err := n.bridge.AddPort(n.dev); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { n.tunnel.Run(ctx); close(done) }()
	n.end = func() {
		cancel()
		n.conn.Close()
		<-done
		if err := n.bridge.Close(); err != nil {
			t.Error(err)
		}
	}
	return n
}

// mesh makes nodes 1 to count that are each other's members.
func mesh(t *testing.T, net *underlaytest.Net, count int, cfg Config) []*testNode {
	t.Helper()
	var nodes []*testNode
	for i := range count {
		nodes = append(nodes, start(t, net, i+1, cfg))
	}
	for i := range nodes {
		nodes[i].meet(others(count, i+1))
	}
	return nodes
}

func others(count, self int) (list []netip.AddrPort) {
	for i := 1; i <= count; i++ {
		if i != self {
			list = append(list, vtepOf(i))
		}
	}
	return list
}

func (n *testNode) meet(members []netip.AddrPort) {
	n.tunnel.SetMembers(members)
	n.bridge.SetMembers(members, nil)
}

func end(nodes []*testNode) {
	for _, n := range nodes {
		n.end()
	}
}

// got returns the frames that were written to the node's device, once all is quiet.
func (n *testNode) got() (frames [][]byte) {
	synctest.Wait()
	for {
		f, ok := n.dev.TryNext()
		if !ok {
			return frames
		}
		frames = append(frames, f.B)
	}
}

// wants fails unless exactly these frames were written to the node's device.
func (n *testNode) wants(t *testing.T, frames ...[]byte) {
	t.Helper()
	got := n.got()
	if len(got) != len(frames) {
		t.Fatalf("%d frames at the device, want %d: %x", len(got), len(frames), got)
	}
	for i := range got {
		if !bytes.Equal(got[i], frames[i]) {
			t.Fatalf("frame %d is %x, want %x", i, got[i], frames[i])
		}
	}
}

func (n *testNode) dropped(t *testing.T, r Drop, want uint64) {
	t.Helper()
	synctest.Wait()
	if got := n.tunnel.Drops().Count(r); got != want {
		t.Fatalf("drop %v = %d, want %d", r, got, want)
	}
}

// frame is a small UDP frame from one test MAC to another.
func frame(src, dst ether.MAC, payload string) []byte {
	return ethertest.UDP{SrcMAC: src, DstMAC: dst, Payload: []byte(payload)}.Frame()
}

// datagram wraps a frame as a foreign VTEP would.
func datagram(v vxlan.VNI, frame []byte) []byte {
	d := make([]byte, vxlan.HeaderLen, vxlan.HeaderLen+len(frame))
	vxlan.Put(d, v)
	return append(d, frame...)
}

func send(c underlay.Conn, dst netip.AddrPort, d []byte) {
	s := c.NewSender()
	copy(s.Reserve(len(d)), d)
	s.Commit(dst, 0, len(d))
	s.Flush()
}

func TestFloodLearnForward(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		net := underlaytest.NewNet(1)
		sent := 0
		net.Tap(func(underlaytest.Datagram) { sent++ })
		n := mesh(t, net, 3, Config{})
		defer end(n)

		who := ethertest.ARPRequest(macOf(1), netip.MustParseAddr("10.32.0.1"), netip.MustParseAddr("10.32.0.2"))
		n[0].dev.Inject(who, ether.Meta{})
		n[1].wants(t, who)
		n[2].wants(t, who)
		n[0].wants(t) // not its own
		if sent != 2 {
			t.Fatalf("a broadcast made %d datagrams, want one for each of 2 members", sent)
		}

		// The answer is unicast: node 2 has learnt where node 1's MAC is.
		sent = 0
		reply := frame(macOf(2), macOf(1), "reply")
		n[1].dev.Inject(reply, ether.Meta{})
		n[0].wants(t, reply)
		n[2].wants(t)
		if sent != 1 {
			t.Fatalf("a known unicast made %d datagrams, want 1", sent)
		}

		// Unknown unicast goes to all.
		unknown := frame(macOf(1), macOf(99), "?")
		n[0].dev.Inject(unknown, ether.Meta{})
		n[1].wants(t, unknown)
		n[2].wants(t, unknown)
		if got := n[0].bridge.Flooded.Load(); got != 2 {
			t.Errorf("flooded = %d, want 2", got)
		}
		if got := n[0].bridge.TxFrames.Load(); got != 4 {
			t.Errorf("tx frames = %d, want 4", got)
		}
		if got := n[0].bridge.RxBytes.Load(); got != uint64(len(reply)) {
			t.Errorf("rx bytes = %d, want %d", got, len(reply))
		}
	})
}

func TestSplitHorizon(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		net := underlaytest.NewNet(1)
		n := mesh(t, net, 3, Config{})
		defer end(n)
		// Node 1 knows MAC 50 at node 2; node 3 sends it a frame for that MAC.
		n[1].dev.Inject(frame(50, macOf(1), "here"), ether.Meta{})
		n[0].got()
		send(n[2].conn, vtepOf(1), datagram(testVNI, frame(60, 50, "relay me")))
		n[0].wants(t)
		n[1].got()
		n[0].dropped(t, DropSplitHorizon, 1)
		// And a broadcast from the tunnel goes to ports only.
		seen := 0
		net.Tap(func(d underlaytest.Datagram) { seen++ })
		b := frame(60, ether.Broadcast, "all")
		send(n[2].conn, vtepOf(1), datagram(testVNI, b))
		n[0].wants(t, b)
		if seen != 1 {
			t.Errorf("%d datagrams, want only the one that was sent", seen)
		}
	})
}

func TestWhoMaySend(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		net := underlaytest.NewNet(1)
		listed, stranger := vtepOf(8), vtepOf(9)
		a := start(t, net, 1, Config{Peers: []netip.AddrPort{listed}})
		defer a.end()
		a.meet([]netip.AddrPort{vtepOf(2)})
		member, foreign, nobody := net.Conn(vtepOf(2)), net.Conn(listed), net.Conn(stranger)
		f := frame(77, macOf(1), "hello")

		send(nobody, vtepOf(1), datagram(testVNI, f))
		a.wants(t)
		a.dropped(t, DropUnknownVTEP, 1)
		for _, e := range a.bridge.FDB() {
			if e.MAC == 77 {
				t.Error("a stranger's MAC is in the FDB")
			}
		}
		send(member, vtepOf(1), datagram(testVNI, f))
		a.wants(t, f)
		send(foreign, vtepOf(1), datagram(testVNI, f))
		a.wants(t, f)

		// A member that has left is a stranger, and what it taught is gone.
		send(member, vtepOf(1), datagram(testVNI, frame(78, macOf(1), "hello")))
		a.got()
		if a.bridge.fdb.lookup(78) == nil {
			t.Fatal("a member's MAC was not learnt")
		}
		a.meet(nil)
		if a.bridge.fdb.lookup(78) != nil {
			t.Error("the MAC of a member that has left is still known")
		}
		send(member, vtepOf(1), datagram(testVNI, f))
		a.wants(t)
		a.dropped(t, DropUnknownVTEP, 2)
		if got := a.bridge.FloodList(); len(got) != 1 || got[0] != listed {
			t.Errorf("flood list %v, want only %v", got, listed)
		}

		// A member whose overlay has another name or VNI is refused.
		a.tunnel.SetMembers([]netip.AddrPort{vtepOf(2)})
		a.bridge.SetMembers(nil, []netip.Addr{vtepOf(2).Addr()})
		send(member, vtepOf(1), datagram(testVNI, f))
		a.wants(t)
		a.dropped(t, DropOverlayConflict, 1)
	})
}

func TestLearnVTEPs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		net := underlaytest.NewNet(1)
		a := start(t, net, 1, Config{LearnVTEPs: true, AgeAfter: 10 * time.Second})
		defer a.end()
		stranger := net.Conn(vtepOf(9))
		f := frame(77, macOf(1), "hello")
		send(stranger, vtepOf(1), datagram(testVNI, f))
		a.wants(t, f)
		if len(a.bridge.FloodList()) != 0 {
			t.Error("a learnt VTEP is on the flood list")
		}
		var back []netip.AddrPort
		net.Tap(func(d underlaytest.Datagram) { back = append(back, d.Dst) })
		a.dev.Inject(frame(macOf(1), 77, "answer"), ether.Meta{})
		synctest.Wait()
		if len(back) != 1 || back[0] != vtepOf(9) {
			t.Errorf("the answer went to %v, want %v", back, vtepOf(9))
		}
		time.Sleep(20 * time.Second)
		synctest.Wait()
		if n := a.bridge.remotes.Size(); n != 0 {
			t.Errorf("%d VTEPs after all their MACs have aged, want 0", n)
		}
	})
}

func TestAgeing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		net := underlaytest.NewNet(1)
		n := mesh(t, net, 2, Config{})
		defer end(n)
		n[1].dev.Inject(frame(macOf(2), macOf(1), "x"), ether.Meta{})
		n[0].got()
		time.Sleep(299 * time.Second)
		synctest.Wait()
		if n[0].bridge.fdb.lookup(macOf(2)) == nil {
			t.Fatal("forgotten after 299 s, want 300 s")
		}
		time.Sleep(25 * time.Second)
		synctest.Wait()
		if n[0].bridge.fdb.lookup(macOf(2)) != nil {
			t.Fatal("still known after 324 s")
		}
		if n[0].bridge.fdb.lookup(macOf(1)) == nil {
			t.Fatal("the device's own MAC has aged")
		}
	})
}

func TestOwnFrames(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		net := underlaytest.NewNet(1)
		n := mesh(t, net, 2, Config{})
		defer end(n)
		// Its own MAC comes from the tunnel: a loop, or somebody who pretends.
		send(n[1].conn, vtepOf(1), datagram(testVNI, frame(macOf(1), ether.Broadcast, "loop")))
		n[0].wants(t)
		n[0].dropped(t, DropOwnFrame, 1)
		// A datagram from its own address.
		send(n[0].conn, vtepOf(1), datagram(testVNI, frame(70, ether.Broadcast, "loop")))
		n[0].wants(t)
		n[0].dropped(t, DropOwnFrame, 2)
		// A frame for a MAC at the port that it comes from.
		n[0].dev.Inject(frame(70, ether.Broadcast, "x"), ether.Meta{})
		n[0].dev.Inject(frame(macOf(1), 70, "x"), ether.Meta{})
		n[0].dropped(t, DropSamePort, 1)
	})
}

func TestDemultiplex(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		net := underlaytest.NewNet(1)
		a := start(t, net, 1, Config{})
		defer a.end()
		a.meet([]netip.AddrPort{vtepOf(2)})
		member := net.Conn(vtepOf(2))
		want := map[Drop]uint64{}
		for first := range 256 {
			d := datagram(testVNI, frame(77, macOf(1), "x"))
			d[0] = byte(first)
			send(member, vtepOf(1), d)
			switch {
			case first == 0x08:
			case first == 0x04:
				want[DropUnknownSession]++
			case first >= 0x40 && first <= 0x7f, first >= 0xc0:
				want[DropControl]++
			default:
				want[DropUnknownType]++
			}
		}
		a.wants(t, frame(77, macOf(1), "x"))
		for r, count := range want {
			a.dropped(t, r, count)
		}
		for i := 1; i < vxlan.HeaderLen; i++ {
			send(member, vtepOf(1), datagram(testVNI, nil)[:i])
		}
		a.dropped(t, DropShort, vxlan.HeaderLen-1)
		for i := range ethernetHeader {
			send(member, vtepOf(1), datagram(testVNI, make([]byte, i)))
		}
		a.dropped(t, DropShortFrame, ethernetHeader)
		send(member, vtepOf(1), datagram(testVNI+1, frame(77, macOf(1), "x")))
		a.dropped(t, DropUnknownVNI, 1)
		zero := frame(77, macOf(1), "x")
		ether.MAC(0).Put(zero[6:])
		send(member, vtepOf(1), datagram(testVNI, zero))
		send(member, vtepOf(1), datagram(testVNI, frame(ether.Broadcast, macOf(1), "x")))
		a.dropped(t, DropBadSource, 2)
		// Reserved bits mean nothing.
		d := datagram(testVNI, frame(77, macOf(1), "y"))
		d[1], d[2], d[3], d[7] = 0xff, 0xff, 0xff, 0xff
		send(member, vtepOf(1), d)
		a.wants(t, frame(77, macOf(1), "y"))
	})
}

func TestLimits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		net := underlaytest.NewNet(1)
		a := start(t, net, 1, Config{MaxMACs: 10, MaxMACsPerPort: 5})
		defer a.end()
		a.meet([]netip.AddrPort{vtepOf(2)})
		member := net.Conn(vtepOf(2))
		for mac := ether.MAC(200); mac < 220; mac++ {
			f := frame(mac, macOf(1), "x")
			send(member, vtepOf(1), datagram(testVNI, f))
			a.wants(t, f) // forwarded all the same
		}
		a.dropped(t, DropMACLimit, 15)
		if n := a.bridge.MACs(); n != 6 {
			t.Errorf("%d MACs, want 5 and the device's own", n)
		}
	})
}

func TestLocalSwitching(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		net := underlaytest.NewNet(1)
		n := mesh(t, net, 2, Config{})
		defer end(n)
		second := taptest.New("blue1", 0x0254_0a20_0102, 1450, 1)
		port, err := n[0].bridge.AddPort(second)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := n[0].bridge.AddPort(taptest.New("blue2", 0x0254_0a20_0102, 1450, 1)); err == nil {
			t.Error("two devices with one MAC: want an error")
		}
		sent := 0
		net.Tap(func(underlaytest.Datagram) { sent++ })
		// A super-frame passes whole, with its metadata, and never leaves the node.
		super := ethertest.TCP{SrcMAC: macOf(1), DstMAC: second.MAC(), Payload: make([]byte, 20000)}.Frame()
		m := ether.Meta{GSO: ether.GSOTCPv4, Checksum: ether.ChecksumPartial, HeaderLen: 54, SegmentLen: 1410, ChecksumStart: 34, ChecksumOffset: 16}
		n[0].dev.Inject(super, m)
		synctest.Wait()
		f, ok := second.TryNext()
		if !ok || !bytes.Equal(f.B, super) || f.Meta != m {
			t.Errorf("the other port got %d bytes, %+v, want the super-frame as it was", len(f.B), f.Meta)
		}
		if sent != 0 {
			t.Errorf("%d datagrams for a frame between two local ports", sent)
		}
		// A broadcast goes to the other port and into the tunnel.
		b := frame(macOf(1), ether.Broadcast, "all")
		n[0].dev.Inject(b, ether.Meta{})
		n[1].wants(t, b)
		if f, ok := second.TryNext(); !ok || !bytes.Equal(f.B, b) {
			t.Error("a broadcast did not reach the other local port")
		}
		// One from the tunnel goes to both.
		b = frame(macOf(2), ether.Broadcast, "all")
		n[1].dev.Inject(b, ether.Meta{})
		n[0].wants(t, b)
		if f, ok := second.TryNext(); !ok || !bytes.Equal(f.B, b) {
			t.Error("a broadcast from the tunnel did not reach the second port")
		}
		if err := n[0].bridge.RemovePort(port); err != nil {
			t.Error(err)
		}
		if n[0].bridge.fdb.lookup(second.MAC()) != nil {
			t.Error("the MAC of a removed port is still known")
		}
	})
}

func TestAddRefusesDuplicates(t *testing.T) {
	net := underlaytest.NewNet(1)
	tunnel := NewTunnel(TunnelConfig{Conn: net.Conn(vtepOf(1))})
	if _, err := tunnel.Add(Config{Name: "blue", VNI: 100}); err != nil {
		t.Fatal(err)
	}
	if _, err := tunnel.Add(Config{Name: "red", VNI: 100}); err == nil {
		t.Error("a second overlay with VNI 100: want an error")
	}
	if _, err := tunnel.Add(Config{Name: "blue", VNI: 101}); err == nil {
		t.Error("a second overlay named blue: want an error")
	}
}

func TestListedPeerReturnsAfterRefusal(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		net := underlaytest.NewNet(1)
		listed := vtepOf(8)
		a := start(t, net, 1, Config{Peers: []netip.AddrPort{listed}})
		defer a.end()
		a.bridge.SetMembers(nil, []netip.Addr{listed.Addr()})
		if got := a.bridge.FloodList(); len(got) != 0 {
			t.Fatalf("flood list %v while the peer is refused", got)
		}
		a.bridge.SetMembers(nil, nil)
		if got := a.bridge.FloodList(); len(got) != 1 || got[0] != listed {
			t.Fatalf("flood list %v after the refusal, want %v", got, listed)
		}
		f := frame(77, macOf(1), "hello")
		send(net.Conn(listed), vtepOf(1), datagram(testVNI, f))
		a.wants(t, f)
	})
}

func TestGossipFloodReachesForeignVTEPs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		net := underlaytest.NewNet(1)
		var gossiped [][]byte
		a := start(t, net, 1, Config{
			Peers:       []netip.AddrPort{vtepOf(8)},
			FloodGossip: func(_ vxlan.VNI, f []byte) bool { gossiped = append(gossiped, bytes.Clone(f)); return len(f) < 100 },
		})
		defer a.end()
		a.meet([]netip.AddrPort{vtepOf(2)})
		var sent []netip.AddrPort
		net.Tap(func(d underlaytest.Datagram) { sent = append(sent, d.Dst) })
		a.dev.Inject(frame(macOf(1), ether.Broadcast, "small"), ether.Meta{})
		synctest.Wait()
		if len(gossiped) != 1 || len(sent) != 1 || sent[0] != vtepOf(8) {
			t.Fatalf("a small broadcast: %d by gossip, datagrams to %v; want 1 and only the foreign VTEP", len(gossiped), sent)
		}
		a.dev.Inject(frame(macOf(1), ether.Broadcast, string(make([]byte, 200))), ether.Meta{})
		synctest.Wait()
		if len(sent) != 3 {
			t.Errorf("a large broadcast: datagrams to %v, want the foreign VTEP and the member", sent[1:])
		}
	})
}

func TestPortLost(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		lost := 0
		a := start(t, underlaytest.NewNet(1), 1, Config{PortLost: func() { lost++ }})
		defer a.end()
		second := taptest.New("blue1", 0x0254_0a20_0102, 1450, 2)
		p, err := a.bridge.AddPort(second)
		if err != nil {
			t.Fatal(err)
		}
		second.Close() // by itself, as when somebody deletes it
		synctest.Wait()
		if lost != 1 || !p.Lost() {
			t.Errorf("a device that went by itself: told %d times, Lost %v; want once", lost, p.Lost())
		}
		if err := a.bridge.RemovePort(p); err != nil {
			t.Error(err)
		}
		third := taptest.New("blue2", 0x0254_0a20_0103, 1450, 2)
		if p, err = a.bridge.AddPort(third); err != nil {
			t.Fatal(err)
		}
		if err := a.bridge.RemovePort(p); err != nil {
			t.Error(err)
		}
		if lost != 1 || p.Lost() {
			t.Error("RemovePort counts as a loss")
		}
	})
}

// failingReceiver fails twice, then delivers, then is closed.
type failingReceiver struct {
	calls int
	slot  underlay.Slot
}

func (r *failingReceiver) Wait() error {
	if r.calls == 3 {
		return underlay.ErrClosed
	}
	return nil
}

func (*failingReceiver) Rest(time.Duration) {}

func (r *failingReceiver) Receive(b *underlay.Batch) error {
	r.calls++
	if r.calls < 3 {
		return errors.New("no buffer space available")
	}
	b.Slots = append(b.Slots[:0], r.slot)
	return nil
}

func TestReceiveGoesOnAfterAnError(t *testing.T) {
	tunnel, b, _ := hotBridge(t)
	newIngress(tunnel).run(&failingReceiver{slot: trainOf(t, smallFrame())})
	if got := tunnel.Drops().Count(DropReceive); got != 2 {
		t.Errorf("receive_failed = %d, want 2", got)
	}
	if got := b.RxFrames.Load(); got != 1 {
		t.Errorf("%d frames received after the errors, want 1", got)
	}
}

// TestWireVector: docs/wire.md shows this datagram.
func TestWireVector(t *testing.T) {
	const vector = `
08000000 00006400
ffffffffffff 02540a200001 0806
0001 0800 06 04 0001 02540a200001 0a200001 000000000000 0a200002`
	text, err := os.ReadFile("../docs/wire.md")
	if err != nil {
		t.Fatal(err)
	}
	want := ""
	for line := range strings.Lines(vector) {
		line = strings.TrimSpace(line)
		if !strings.Contains(string(text), line) {
			t.Errorf("docs/wire.md does not have the line %q", line)
		}
		want += strings.ReplaceAll(line, " ", "")
	}
	synctest.Test(t, func(t *testing.T) {
		net := underlaytest.NewNet(1)
		got := ""
		net.Tap(func(d underlaytest.Datagram) { got = hex.EncodeToString(d.B) })
		a := start(t, net, 1, Config{})
		defer a.end()
		a.meet([]netip.AddrPort{vtepOf(2)})
		a.dev.Inject(ethertest.ARPRequest(macOf(1), netip.MustParseAddr("10.32.0.1"), netip.MustParseAddr("10.32.0.2")), ether.Meta{})
		synctest.Wait()
		if got != want {
			t.Errorf("an ARP request is sent as\n%s, want\n%s", got, want)
		}
	})
}
