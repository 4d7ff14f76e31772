package bridge

import (
	"net/netip"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/tulle-net/tulle/ether"
	"github.com/tulle-net/tulle/ether/ethertest"
	"github.com/tulle-net/tulle/tap/taptest"
	"github.com/tulle-net/tulle/underlay/underlaytest"
	"github.com/tulle-net/tulle/vxlan"
)

const (
	tabled   ether.MAC = 0x0254_0a20_0909
	stranger ether.MAC = 0x02aa_0000_0009
)

var (
	tabled4 = netip.MustParseAddr("10.32.9.9")
	tabled6 = netip.MustParseAddr("fd00::9:9")
)

// at is an endpoint of test node i, which has both addresses.
func at(i int, mac ether.MAC) Endpoint {
	return Endpoint{MAC: mac, IPs: []netip.Addr{tabled4, tabled6}, Peer: nameOf(i), VTEP: vtepOf(i)}
}

// row returns the FDB's row of a MAC.
func (n *testNode) row(mac ether.MAC) (Entry, bool) {
	list := n.bridge.FDB()
	i := slices.IndexFunc(list, func(e Entry) bool { return e.MAC == mac })
	if i < 0 {
		return Entry{}, false
	}
	return list[i], true
}

// TestEndpoint: what the tables say neither moves nor ages, waits for its place, and goes
// with it.
func TestEndpoint(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		net := underlaytest.NewNet(1)
		var told []string
		n := []*testNode{start(t, net, 1, Config{Contradicted: func(peer string) { told = append(told, peer) }}), start(t, net, 2, Config{}), start(t, net, 3, Config{})}
		defer end(n)
		n[0].bridge.SetEndpoint(at(2, tabled))
		if e, ok := n[0].row(tabled); ok {
			t.Errorf("%+v is known before its place is", e)
		}
		for i := range n {
			n[i].meet(others(3, i+1))
		}
		if e, ok := n[0].row(tabled); !ok || !e.Table || e.Static || e.VTEP != vtepOf(2) || e.Peer != "n2" {
			t.Errorf("FDB: %+v, %v; want a table's entry at node 2", e, ok)
		}
		if got := n[0].bridge.MACs(); got != 2 {
			t.Errorf("%d MACs, want its own and the endpoint", got)
		}

		// Node 3 and a local station use its MAC: nothing of them passes, and node 3 is told of
		// once a second.
		time.Sleep(500 * time.Millisecond)
		for range 3 {
			n[2].dev.Inject(frame(tabled, macOf(1), "as another"), ether.Meta{})
		}
		n[0].wants(t)
		n[0].dropped(t, DropMovedSource, 3)
		n[1].got() // it does not know the tables, nor where node 1's MAC is
		n[0].dev.Inject(frame(tabled, macOf(2), "as another"), ether.Meta{})
		n[0].dropped(t, DropMovedSource, 4)
		n[1].wants(t)
		// In a plain overlay a peer's name is known by its endpoints only.
		if !slices.Equal(told, []string{vtepOf(3).String()}) {
			t.Errorf("told of %v, want node 3 once", told)
		}
		n[0].bridge.SetEndpoint(Endpoint{MAC: stranger, Peer: nameOf(3), VTEP: vtepOf(3)})
		time.Sleep(1100 * time.Millisecond)
		n[2].dev.Inject(frame(tabled, macOf(1), "as another"), ether.Meta{})
		synctest.Wait()
		if len(told) != 2 || told[1] != "n3" {
			t.Errorf("told of %v, want n3 again after a second", told)
		}

		// From where the tables say, it passes; and 400 s of silence do not matter.
		f := frame(tabled, macOf(1), "as itself")
		n[1].dev.Inject(f, ether.Meta{})
		n[0].wants(t, f)
		time.Sleep(400 * time.Second)
		synctest.Wait()
		if _, ok := n[0].row(tabled); !ok {
			t.Error("an endpoint of the tables has aged")
		}

		// Its place goes, and comes back, and it with it.
		n[0].meet([]netip.AddrPort{vtepOf(3)})
		if _, ok := n[0].row(tabled); ok {
			t.Error("an endpoint is known when its place has gone")
		}
		n[0].meet(others(3, 1))
		if e, ok := n[0].row(tabled); !ok || !e.Table {
			t.Errorf("FDB: %+v, %v; want the endpoint back with its place", e, ok)
		}

		// It moves to node 3: one call, and frames from there pass.
		n[0].bridge.SetEndpoint(at(3, tabled))
		f = frame(tabled, macOf(1), "moved")
		n[2].dev.Inject(f, ether.Meta{})
		n[0].wants(t, f)
		n[1].dev.Inject(frame(tabled, macOf(1), "too late"), ether.Meta{})
		n[0].wants(t)

		// To this node: a port with its MAC is above all, and what the tables say of it is
		// again when the port is gone.
		dev := taptest.New("blue9", tabled, 1450, 1)
		port, err := n[0].bridge.AddPort(dev)
		if err != nil {
			t.Fatal(err)
		}
		if e, _ := n[0].row(tabled); !e.Static || e.Table || e.Port != "blue9" {
			t.Errorf("FDB: %+v, want the port's own", e)
		}
		n[0].bridge.SetEndpoint(at(2, tabled))
		if e, _ := n[0].row(tabled); !e.Static {
			t.Errorf("FDB: %+v, want the port's own still", e)
		}
		if err := n[0].bridge.RemovePort(port); err != nil {
			t.Fatal(err)
		}
		if e, _ := n[0].row(tabled); !e.Table || e.VTEP != vtepOf(2) {
			t.Errorf("FDB: %+v, want what the tables say", e)
		}
		n[0].bridge.RemoveEndpoint(tabled)
		if e, ok := n[0].row(tabled); ok {
			t.Errorf("FDB: %+v after RemoveEndpoint", e)
		}
		if _, ok := n[0].bridge.dir.index.Load(tabled4); ok {
			t.Error("its address is known after RemoveEndpoint")
		}
		if got := n[0].bridge.fdb.tables.Load(); got != 1 { // node 3's
			t.Errorf("%d entries of tables, want 1", got)
		}
	})
}

// TestEndpointSealed: in a sealed overlay the peer's name says where, and a table's
// entries are beyond the limits.
func TestEndpointSealed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		net := underlaytest.NewNet(1)
		var told []string
		n, _ := sealedMesh(t, net, 3, Config{MaxMACs: 4, MaxMACsPerPort: 2, Contradicted: func(peer string) { told = append(told, peer) }})
		defer end(n)
		bothWays(t, n, 1, 2)
		bothWays(t, n, 1, 3)
		for i := range 20 {
			e := at(2, tabled+ether.MAC(i))
			e.IPs, e.VTEP = nil, netip.AddrPort{}
			n[0].bridge.SetEndpoint(e)
		}
		if got := n[0].bridge.MACs(); got != 21 {
			t.Errorf("%d MACs, want its own and 20 of a table", got)
		}
		n[1].dev.Inject(frame(stranger, macOf(1), "learn me"), ether.Meta{})
		n[0].got()
		if e, ok := n[0].row(stranger); !ok || e.Peer != "n2" || e.Table {
			t.Errorf("FDB: %+v, %v; want a MAC that was learnt beside the table's", e, ok)
		}
		n[0].dropped(t, DropMACLimit, 0)
		n[2].dev.Inject(frame(tabled, macOf(1), "as another"), ether.Meta{})
		n[0].dropped(t, DropMovedSource, 1)
		if !slices.Equal(told, []string{"n3"}) {
			t.Errorf("told of %v, want n3", told)
		}
		n[0].bridge.SetPeers([]Peer{{nameOf(3), vtepOf(3)}})
		if got := n[0].bridge.fdb.tables.Load(); got != 0 {
			t.Errorf("%d entries of a peer that is gone", got)
		}
		n[0].bridge.SetPeers([]Peer{{nameOf(2), vtepOf(2)}, {nameOf(3), vtepOf(3)}})
		if got := n[0].bridge.fdb.tables.Load(); got != 20 {
			t.Errorf("%d entries of a peer that is back, want 20", got)
		}
	})
}

// TestAddressMoves: where an address's MAC changes, the local ports hear of it, and no
// one else does.
func TestAddressMoves(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		net := underlaytest.NewNet(1)
		n := mesh(t, net, 3, Config{})
		defer end(n)
		sent := 0
		net.Tap(func(underlaytest.Datagram) { sent++ })
		const second = tabled + 1
		correction := func(mac ether.MAC) [][]byte {
			return [][]byte{ethertest.ARPRequest(mac, tabled4, tabled4),
				ethertest.NA{SrcMAC: mac, DstMAC: 0x3333_0000_0001, Target: tabled6, Override: true, LinkLayer: mac}.Frame()}
		}
		n[0].bridge.SetEndpoint(at(2, tabled))
		n[0].bridge.SetEndpoint(at(3, tabled)) // it moves with its MAC: nobody need know
		n[0].wants(t)
		n[0].bridge.SetEndpoint(at(2, second)) // another has the addresses, the newer one
		n[0].wants(t, correction(second)...)
		n[0].bridge.SetEndpoint(at(3, tabled)) // the older one is none the newer for that
		n[0].wants(t)
		n[0].bridge.RemoveEndpoint(second)
		n[0].wants(t, correction(tabled)...)
		n[0].bridge.RemoveEndpoint(tabled)
		n[0].wants(t)
		n[0].bridge.SetEndpoint(at(2, second)) // hosts remember who had them last
		n[0].wants(t, correction(second)...)
		n[0].bridge.SetEndpoint(Endpoint{MAC: macOf(1), IPs: []netip.Addr{tabled4}})
		n[0].wants(t) // this port's own device: it knows
		n[0].bridge.SetEndpoint(Endpoint{MAC: second, Peer: nameOf(2), VTEP: vtepOf(2)})
		if _, ok := n[0].bridge.dir.index.Load(tabled6); ok {
			t.Error("an address that its endpoint has no more is known")
		}
		if sent != 0 {
			t.Errorf("%d datagrams, want none", sent)
		}
	})
}

// TestUnknownUnicast: it goes to those who may have a station that no table names.
func TestUnknownUnicast(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		net := underlaytest.NewNet(1)
		rung := 0
		foreign := net.Conn(vtepOf(8))
		n := mesh(t, net, 3, Config{Stranger: func() { rung++ }, Peers: []netip.AddrPort{vtepOf(8)}})
		defer end(n)
		defer foreign.Close()
		var to []netip.AddrPort
		net.Tap(func(d underlaytest.Datagram) { to = append(to, d.Dst) })
		second := taptest.New("blue1", 0x0254_0a20_0102, 1450, 1)
		if _, err := n[0].bridge.AddPort(second); err != nil {
			t.Fatal(err)
		}
		reaches := func(what string, local bool, want ...netip.AddrPort) {
			t.Helper()
			to = nil
			n[0].dev.Inject(frame(macOf(1), 99, "?"), ether.Meta{})
			synctest.Wait()
			slices.SortFunc(to, func(a, b netip.AddrPort) int { return a.Compare(b) })
			if _, ok := second.TryNext(); ok != local || !slices.Equal(to, want) {
				t.Errorf("%s: it reached the other port: %v, and %v; want %v, and %v", what, ok, to, local, want)
			}
		}
		reaches("without tables", true, vtepOf(2), vtepOf(3), vtepOf(8))
		n[0].bridge.SetComplete([]Peer{{nameOf(2), vtepOf(2)}})
		reaches("node 2 complete", false, vtepOf(3), vtepOf(8))

		// From the tunnel, too.
		in := func() bool {
			send(n[1].conn, vtepOf(1), datagram(testVNI, frame(macOf(2), 99, "?")))
			synctest.Wait()
			_, ok := second.TryNext()
			return ok
		}
		if in() {
			t.Error("unknown unicast from the tunnel reached a port without strangers")
		}
		n[0].dropped(t, DropUnknownUnicast, 1)

		// A stranger behind the other port.
		if n[0].bridge.Strangers() != 0 || rung != 0 {
			t.Errorf("%d strangers, rung %d times, before there was one", n[0].bridge.Strangers(), rung)
		}
		second.Inject(frame(stranger, macOf(1), "hello"), ether.Meta{})
		second.Inject(frame(stranger, macOf(1), "hello"), ether.Meta{})
		n[0].got()
		if n[0].bridge.Strangers() != 1 || rung != 1 {
			t.Errorf("%d strangers, rung %d times, want one, once", n[0].bridge.Strangers(), rung)
		}
		reaches("a stranger here", true, vtepOf(3), vtepOf(8))
		if !in() {
			t.Error("unknown unicast from the tunnel did not reach a port with a stranger")
		}
		n[0].bridge.SetEndpoint(Endpoint{MAC: stranger}) // it is none, as the tables say now
		reaches("no stranger any more", false, vtepOf(3), vtepOf(8))
		if got := n[0].bridge.Strangers(); got != 0 {
			t.Errorf("%d strangers, want none", got)
		}
		n[0].bridge.RemoveEndpoint(stranger)
		if got := n[0].bridge.Strangers(); got != 1 {
			t.Errorf("%d strangers, want it again", got)
		}
		time.Sleep(400 * time.Second)
		synctest.Wait()
		if got := n[0].bridge.Strangers(); got != 0 {
			t.Errorf("%d strangers after all were silent, want none", got)
		}

		n[0].bridge.SetUnknownUnicast(true)
		reaches("flood", true, vtepOf(2), vtepOf(3), vtepOf(8))
		n[0].bridge.SetUnknownUnicast(false)
		// A peer that comes back is complete still.
		n[0].meet([]netip.AddrPort{vtepOf(3)})
		n[0].meet(others(3, 1))
		reaches("node 2 back", false, vtepOf(3), vtepOf(8))
		n[0].bridge.SetComplete(nil)
		reaches("nobody complete", true, vtepOf(2), vtepOf(3), vtepOf(8))
	})
}

// TestUnknownUnicastToNobody: when all is known, what is for nobody goes nowhere, by gossip neither.
func TestUnknownUnicastToNobody(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		net := underlaytest.NewNet(1)
		gossiped := 0
		n := mesh(t, net, 3, Config{})
		defer end(n)
		n[0].bridge.cfg.FloodGossip = func(_ vxlan.VNI, _ []byte) bool { gossiped++; return true }
		sent := 0
		net.Tap(func(underlaytest.Datagram) { sent++ })
		n[0].bridge.SetComplete([]Peer{{nameOf(2), vtepOf(2)}, {nameOf(3), vtepOf(3)}})
		n[0].dev.Inject(frame(macOf(1), 99, "?"), ether.Meta{})
		n[0].dropped(t, DropUnknownUnicast, 1)
		n[0].bridge.SetComplete([]Peer{{nameOf(2), vtepOf(2)}})
		n[0].dev.Inject(frame(macOf(1), 99, "?"), ether.Meta{})
		n[0].dropped(t, DropUnknownUnicast, 1)
		if sent != 1 || gossiped != 0 {
			t.Errorf("%d datagrams, %d by gossip; want one, for the peer that is not complete", sent, gossiped)
		}
		n[0].dev.Inject(frame(macOf(1), ether.Broadcast, "all"), ether.Meta{})
		synctest.Wait()
		if sent != 1 || gossiped != 1 {
			t.Errorf("%d datagrams, %d by gossip; want a broadcast by gossip", sent, gossiped)
		}
	})
}

// TestFrozen: a MAC at two places is one's only, until somebody says otherwise.
func TestFrozen(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		net := underlaytest.NewNet(1)
		var froze []ether.MAC
		n := mesh(t, net, 3, Config{Froze: func(mac ether.MAC) { froze = append(froze, mac) }})
		defer end(n)
		speaks := func(i int) bool {
			t.Helper()
			f := frame(stranger, macOf(1), "hello")
			send(n[i-1].conn, vtepOf(1), datagram(testVNI, f))
			return len(n[0].got()) == 1
		}
		for i := range 5 { // 4 moves
			if !speaks(2 + i%2) {
				t.Fatalf("frame %d did not pass", i)
			}
		}
		if len(froze) != 0 {
			t.Fatal("frozen after 4 moves, want 5")
		}
		if speaks(3) {
			t.Error("the frame of the fifth move passed")
		}
		if e, _ := n[0].row(stranger); !e.Frozen || e.VTEP != vtepOf(2) || len(froze) != 1 || froze[0] != stranger {
			t.Errorf("FDB: %+v, told %v; want it frozen at node 2, told once", e, froze)
		}
		if speaks(3) || !speaks(2) {
			t.Error("want frames of where it stays to pass, and no others")
		}
		n[0].dropped(t, DropFrozen, 2)
		if got := n[0].bridge.Unfreeze(stranger + 1); len(got) != 0 {
			t.Errorf("Unfreeze of another: %v", got)
		}
		if got := n[0].bridge.Unfreeze(0); !slices.Equal(got, []ether.MAC{stranger}) {
			t.Errorf("Unfreeze: %v, want %v", got, stranger)
		}
		if !speaks(3) {
			t.Error("it does not move after Unfreeze")
		}

		// Slow moves, and those that a node's going away makes, are none.
		for i := range 12 {
			time.Sleep(46 * time.Second)
			if !speaks(2 + i%2) {
				t.Fatalf("slow move %d did not pass", i)
			}
		}
		for i := range 12 {
			from := 2 + i%2
			n[0].meet([]netip.AddrPort{vtepOf(from)})
			if !speaks(from) {
				t.Fatalf("move %d because a node has gone did not pass", i)
			}
		}
		if len(froze) != 1 {
			t.Errorf("frozen %d times, want once", len(froze))
		}
	})
}
