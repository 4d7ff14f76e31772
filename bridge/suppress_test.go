package bridge

import (
	"bytes"
	"context"
	"net/netip"
	"testing"
	"testing/synctest"
	"time"

	"github.com/tulle-net/tulle/ether"
	"github.com/tulle-net/tulle/ether/ethertest"
	"github.com/tulle-net/tulle/tap"
	"github.com/tulle-net/tulle/tap/taptest"
	"github.com/tulle-net/tulle/underlay/underlaytest"
)

const allNodes ether.MAC = 0x3333_0000_0001

// TestSuppression: what a station says or asks of addresses, and who hears it. Node 1
// has the station with macOf(1), own4 and own6, and another at a second port; tabled is
// at node 2, whose tables are complete; node 3's are not.
func TestSuppression(t *testing.T) {
	own4, own6, local4 := netip.MustParseAddr("10.32.0.1"), netip.MustParseAddr("fd00::1"), netip.MustParseAddr("10.32.0.50")
	free4, free6 := netip.MustParseAddr("10.32.0.77"), netip.MustParseAddr("fd00::77")
	zero4, zero6 := netip.IPv4Unspecified(), netip.IPv6Unspecified()
	const me, second = 0x0254_0a20_0001, ether.MAC(0x0254_0a20_0102)
	na := func(mac ether.MAC, ip netip.Addr) []byte {
		return ethertest.NA{SrcMAC: mac, DstMAC: allNodes, Target: ip, Override: true, LinkLayer: mac}.Frame()
	}
	broken := ethertest.Solicit(me, own6, tabled6)
	broken[len(broken)-1] ^= 1
	const (
		none    = 0
		port    = 1 << iota // the other local port
		known               // node 2
		unknown             // node 3
		all     = port | known | unknown
		but2    = port | unknown
	)
	for name, c := range map[string]struct {
		frame  []byte
		heard  int
		answer []byte
		drop   Drop
	}{
		"question":                         {frame: ethertest.ARPRequest(me, own4, tabled4), answer: ethertest.ARPReply(tabled, tabled4, me, own4)},
		"question for a local station":     {frame: ethertest.ARPRequest(me, own4, local4), answer: ethertest.ARPReply(second, local4, me, own4)},
		"question for nobody":              {frame: ethertest.ARPRequest(me, own4, free4), heard: all},
		"question with a VLAN tag":         {frame: ethertest.ARP{SenderMAC: me, SenderIP: own4, TargetIP: tabled4, VLANs: []uint16{5}}.Frame(), heard: all},
		"question that is cut":             {frame: ethertest.ARPRequest(me, own4, tabled4)[:40], heard: all},
		"question to the target":           {frame: ethertest.ARP{SenderMAC: me, SenderIP: own4, TargetIP: tabled4, DstMAC: tabled}.Frame(), answer: ethertest.ARPReply(tabled, tabled4, me, own4)},
		"question to another than it":      {frame: ethertest.ARP{SenderMAC: me, SenderIP: own4, TargetIP: free4, DstMAC: tabled}.Frame(), heard: known},
		"answer":                           {frame: ethertest.ARPReply(me, own4, tabled, tabled4), heard: known},
		"probe of another's":               {frame: ethertest.ARPRequest(me, zero4, tabled4), answer: ethertest.ARPReply(tabled, tabled4, me, zero4)},
		"probe of its own":                 {frame: ethertest.ARPRequest(me, zero4, own4), heard: but2},
		"probe of a free one":              {frame: ethertest.ARPRequest(me, zero4, free4), heard: all},
		"announcement":                     {frame: ethertest.ARPRequest(me, own4, own4), heard: but2},
		"announcement of a free one":       {frame: ethertest.ARPRequest(me, free4, free4), heard: all},
		"announcement of another's":        {frame: ethertest.ARPRequest(me, tabled4, tabled4), drop: DropSpoofedNeighbour},
		"announcing answer":                {frame: ethertest.ARP{Op: 2, SenderMAC: me, SenderIP: own4, TargetIP: own4, DstMAC: ether.Broadcast}.Frame(), heard: but2},
		"announcing answer, of another's":  {frame: ethertest.ARP{Op: 2, SenderMAC: me, SenderIP: tabled4, TargetIP: tabled4, DstMAC: ether.Broadcast}.Frame(), drop: DropSpoofedNeighbour},
		"RARP":                             {frame: ethertest.ARP{Op: 3, SenderMAC: me, SenderIP: own4, TargetIP: tabled4, DstMAC: ether.Broadcast}.Frame(), heard: all},
		"solicitation":                     {frame: ethertest.Solicit(me, own6, tabled6), answer: ethertest.Advertise(tabled, tabled6, me, own6)},
		"solicitation for nobody":          {frame: ethertest.Solicit(me, own6, free6), heard: all},
		"solicitation, broken":             {frame: broken, heard: all},
		"solicitation with a VLAN tag":     {frame: ethertest.NS{Src: own6, SrcMAC: me, Target: tabled6, LinkLayer: me, VLANs: []uint16{5}}.Frame(), heard: all},
		"solicitation to the target":       {frame: ethertest.NS{Src: own6, SrcMAC: me, Dst: tabled6, DstMAC: tabled, Target: tabled6}.Frame(), answer: ethertest.Advertise(tabled, tabled6, me, own6)},
		"duplicate detection of another's": {frame: ether.AppendSolicitation(nil, 0, me, zero6, tabled6), answer: na(tabled, tabled6)},
		"duplicate detection of its own":   {frame: ether.AppendSolicitation(nil, 0, me, zero6, own6), heard: but2},
		"duplicate detection of a free":    {frame: ether.AppendSolicitation(nil, 0, me, zero6, free6), heard: all},
		"advertisement":                    {frame: na(me, own6), heard: but2},
		"advertisement of a free one":      {frame: na(me, free6), heard: all},
		"advertisement of another's":       {frame: na(me, tabled6), drop: DropSpoofedNeighbour},
		"advertisement to another":         {frame: ethertest.Advertise(me, own6, tabled, tabled6), heard: known},
		"echo to all":                      {frame: ethertest.Echo{SrcMAC: me, DstMAC: allNodes, Src: own6, Dst: netip.IPv6LinkLocalAllNodes()}.Frame(), heard: all},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				n := mesh(t, underlaytest.NewNet(1), 3, Config{})
				defer end(n)
				other := taptest.New("blue1", second, 1450, 1)
				if _, err := n[0].bridge.AddPort(other); err != nil {
					t.Fatal(err)
				}
				n[0].bridge.SetComplete([]Peer{{nameOf(2), vtepOf(2)}})
				n[0].bridge.SetEndpoint(at(2, tabled))
				n[0].bridge.SetEndpoint(Endpoint{MAC: me, IPs: []netip.Addr{own4, own6}})
				n[0].bridge.SetEndpoint(Endpoint{MAC: second, IPs: []netip.Addr{local4}})
				n[0].dev.Inject(c.frame, ether.Meta{})
				if c.answer != nil {
					ethertest.Check(t, c.answer)
					n[0].wants(t, c.answer)
				} else {
					n[0].wants(t)
				}
				heard := none
				if _, ok := other.TryNext(); ok {
					heard |= port
				}
				for i, who := range []int{known, unknown} {
					if len(n[i+1].got()) > 0 {
						heard |= who
					}
				}
				if heard != c.heard {
					t.Errorf("heard by %b, want %b (port %b, complete peer %b, other peer %b)", heard, c.heard, port, known, unknown)
				}
				n[0].tunnel.Drops().Each(func(name string, count uint64) {
					if want := c.drop != 0 && name == c.drop.String(); (count == 1) != want || count > 1 {
						t.Errorf("drop %s: %d", name, count)
					}
				})
			})
		})
	}
}

// TestDuplicateDetectionAcross: the owner of an address defends it against a station of
// a node that does not know it yet, and only then.
func TestDuplicateDetectionAcross(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := mesh(t, underlaytest.NewNet(1), 2, Config{})
		defer end(n)
		n[0].bridge.SetComplete([]Peer{{nameOf(2), vtepOf(2)}})
		n[0].bridge.SetEndpoint(Endpoint{MAC: macOf(1), IPs: []netip.Addr{tabled6}})
		defence := ethertest.NA{SrcMAC: macOf(1), DstMAC: allNodes, Target: tabled6, Override: true, LinkLayer: macOf(1)}.Frame()
		n[0].dev.Inject(defence, ether.Meta{})
		n[1].wants(t)
		question := ether.AppendSolicitation(nil, 0, macOf(2), netip.IPv6Unspecified(), tabled6)
		n[1].dev.Inject(question, ether.Meta{})
		n[0].wants(t, question)
		n[0].dev.Inject(defence, ether.Meta{})
		n[1].wants(t, defence)
		time.Sleep(4 * time.Second)
		n[0].dev.Inject(defence, ether.Meta{})
		n[1].wants(t)
	})
}

// TestSuppressionAtGateway: who reaches this node's stations alone is told of them alone.
func TestSuppressionAtGateway(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := mesh(t, underlaytest.NewNet(1), 2, Config{})
		defer end(n)
		gate := taptest.New("gate", 0x0254_0a20_00fe, 1450, 1)
		if _, err := n[0].bridge.AddLocalPort(gate); err != nil {
			t.Fatal(err)
		}
		ip, own := netip.MustParseAddr("10.32.0.254"), netip.MustParseAddr("10.32.0.1")
		n[0].bridge.SetEndpoint(at(2, tabled))
		n[0].bridge.SetEndpoint(Endpoint{MAC: macOf(1), IPs: []netip.Addr{own}})
		gate.Inject(ethertest.ARPRequest(gate.MAC(), ip, own), ether.Meta{})
		n[0].wants(t)
		if f, ok := gate.TryNext(); !ok || string(f.B) != string(ethertest.ARPReply(macOf(1), own, gate.MAC(), ip)) {
			t.Errorf("the gateway got %x, want who its node's station is", f.B)
		}
		question := ethertest.ARPRequest(gate.MAC(), ip, tabled4)
		gate.Inject(question, ether.Meta{})
		n[0].wants(t, question)
		if f, ok := gate.TryNext(); ok {
			t.Errorf("the gateway got %x, of a station that it does not reach", f.B)
		}
		n[1].wants(t)
	})
}

// TestNeighbourLimit: questions that nobody can answer are flooded 50 a second, 100 at once.
func TestNeighbourLimit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := mesh(t, underlaytest.NewNet(1), 2, Config{})
		defer end(n)
		own := netip.MustParseAddr("10.32.0.1")
		n[0].bridge.SetEndpoint(at(2, tabled))
		ask := func(count int) int {
			for i := range count {
				target := netip.AddrFrom4([4]byte{10, 32, 77, byte(i)})
				n[0].dev.Inject(ethertest.ARPRequest(macOf(1), own, target), ether.Meta{})
			}
			return len(n[1].got())
		}
		if got := ask(200); got != neighbourBurst {
			t.Errorf("%d of 200 questions at once were flooded, want %d", got, neighbourBurst)
		}
		n[0].dropped(t, DropNeighbourLimit, 200-neighbourBurst)
		time.Sleep(time.Second)
		if got := ask(200); got < neighboursPerSecond-5 || got > neighboursPerSecond+5 {
			t.Errorf("%d were flooded a second later, want %d", got, neighboursPerSecond)
		}
		// What is known is answered all the same.
		n[0].dev.Inject(ethertest.ARPRequest(macOf(1), own, tabled4), ether.Meta{})
		n[0].wants(t, ethertest.ARPReply(tabled, tabled4, macOf(1), own))
	})
}

// TestProbeByIndex: what the tables know is neither asked nor told.
func TestProbeByIndex(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := mesh(t, underlaytest.NewNet(1), 3, Config{})
		defer end(n)
		port := (*n[0].bridge.ports.Load())[0]
		n[0].bridge.SetEndpoint(at(2, tabled))
		nobodyElse := func(ether.MAC) bool { return false }
		d, found := port.Probe(t.Context(), []netip.Addr{tabled6}, nobodyElse, time.Second)
		if want := (Duplicate{tabled6, tabled}); !found || d != want {
			t.Errorf("Probe = %v, %v; want %v", d, found, want)
		}
		n[1].wants(t)
		ctx, cancel := context.WithTimeout(t.Context(), 2500*time.Millisecond)
		defer cancel()
		go func() {
			time.Sleep(1500 * time.Millisecond)
			e := at(2, tabled+1)
			e.IPs = []netip.Addr{netip.MustParseAddr("10.32.0.1")}
			n[0].bridge.SetEndpoint(e)
		}()
		d, found = port.Probe(ctx, []netip.Addr{netip.MustParseAddr("10.32.0.1")}, nobodyElse, time.Second)
		if !found || d.MAC != tabled+1 {
			t.Errorf("Probe = %v, %v; want the one that the tables told of meanwhile", d, found)
		}
		if got := len(n[1].got()); got != 2 {
			t.Errorf("%d probes, want 2 before the tables knew", got)
		}
		n[2].got()

		own := netip.MustParseAddr("fd00::1")
		n[0].bridge.SetEndpoint(Endpoint{MAC: macOf(1), IPs: []netip.Addr{own}})
		heard := func() (count [2]int) { return [2]int{len(n[1].got()), len(n[2].got())} }
		port.Announce([]netip.Addr{own})
		if got := heard(); got != [2]int{1, 1} {
			t.Errorf("announced to %v, want both", got)
		}
		n[0].bridge.SetComplete([]Peer{{nameOf(2), vtepOf(2)}})
		port.Announce([]netip.Addr{own})
		if got := heard(); got != [2]int{0, 1} {
			t.Errorf("announced to %v, want the one that is not complete", got)
		}
		n[0].bridge.SetComplete([]Peer{{nameOf(2), vtepOf(2)}, {nameOf(3), vtepOf(3)}})
		port.Announce([]netip.Addr{own})
		if got := heard(); got != [2]int{0, 0} {
			t.Errorf("announced to %v, want nobody", got)
		}
		port.Announce([]netip.Addr{netip.MustParseAddr("fd00::2")})
		if got := heard(); got != [2]int{1, 1} {
			t.Errorf("an address that no table knows was announced to %v, want both", got)
		}
	})
}

// TestStorm: what is flooded is bounded, by port, by overlay and by peer.
func TestStorm(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := mesh(t, underlaytest.NewNet(1), 3, Config{Storm: Storm{Port: 20, Overlay: 30}})
		defer end(n)
		second := taptest.New("blue1", 0x0254_0a20_0102, 1450, 1)
		if _, err := n[0].bridge.AddPort(second); err != nil {
			t.Fatal(err)
		}
		burst := func(dev *taptest.Device, f []byte) int {
			for range 50 {
				dev.Inject(f, ether.Meta{})
			}
			return len(n[1].got())
		}
		if got := burst(n[0].dev, frame(macOf(1), ether.Broadcast, "all")); got != 20 {
			t.Errorf("%d of 50 broadcasts of a port passed, want 20", got)
		}
		n[0].dropped(t, DropBUMLimit, 30)
		if got := burst(second, frame(second.MAC(), 99, "unknown")); got != 10 {
			t.Errorf("%d of 50 more from another port passed, want 10 that the overlay has left", got)
		}
		// Unicast to a MAC that is known is nobody's concern.
		n[1].dev.Inject(frame(macOf(2), macOf(1), "learn me"), ether.Meta{})
		n[0].got()
		if got := burst(n[0].dev, frame(macOf(1), macOf(2), "known")); got != 50 {
			t.Errorf("%d of 50 known unicast frames passed", got)
		}
		time.Sleep(500 * time.Millisecond)
		if got := burst(n[0].dev, frame(macOf(1), ether.Broadcast, "all")); got != 10 {
			t.Errorf("%d passed after half a second, want 10", got)
		}

		// From the tunnel, each peer by itself.
		second.SetDown(true)
		n[0].got()
		from := func(i int) int {
			for range 50 {
				send(n[i-1].conn, vtepOf(1), datagram(testVNI, frame(macOf(i), ether.Broadcast, "all")))
			}
			return len(n[0].got())
		}
		if got := from(2); got != 30 {
			t.Errorf("%d of 50 broadcasts of a peer passed, want 30", got)
		}
		if got := from(3); got != 30 {
			t.Errorf("%d of 50 broadcasts of another peer passed, want 30", got)
		}
		n[0].bridge.SetStorm(Storm{})
		if got := from(3); got != 50 {
			t.Errorf("%d of 50 passed without a bound", got)
		}

		// A super-frame counts as its segments.
		n[0].bridge.SetStorm(Storm{Port: 20})
		time.Sleep(time.Minute)
		n[1].got()
		before := n[0].bridge.TxFrames.Load()
		f, m := ethertest.UDP{SrcMAC: macOf(1), DstMAC: ether.Broadcast, Payload: make([]byte, 12*100)}.Super(100)
		for range 3 {
			n[0].dev.Inject(f, m)
		}
		synctest.Wait()
		if got := n[0].bridge.TxFrames.Load() - before; got != 2*24 {
			t.Errorf("%d frames of super-frames left, want two of 12 for each of two peers", got)
		}
	})
}

// Neither an answer, nor a flood that is counted, allocates.
func TestSuppressionNoAllocs(t *testing.T) {
	tunnel, b, p := hotBridge(t)
	b.SetEndpoint(at(2, tabled))
	b.SetComplete([]Peer{{nameOf(2), vtepOf(2)}})
	b.SetStorm(Storm{Port: 1e6, Overlay: 1e6})
	l := &lane{tx: &nullSender{}}
	for name, f := range map[string][]byte{
		"ARP":             ethertest.ARPRequest(macOf(1), netip.MustParseAddr("10.32.0.1"), tabled4),
		"ND":              ethertest.Solicit(macOf(1), netip.MustParseAddr("fd00::1"), tabled6),
		"spoofed":         ethertest.ARPRequest(macOf(1), tabled4, tabled4),
		"unknown unicast": frame(macOf(1), 99, "?"),
	} {
		f := tap.Frame{B: f}
		if n := testing.AllocsPerRun(200, func() { p.forward(l, &f) }); n != 0 {
			t.Errorf("%s: %v allocations, want 0", name, n)
		}
	}
	if got := b.Answered.Load(); got != 2*201 {
		t.Errorf("%d answers, want all of 402", got)
	}
	if tunnel.Drops().Count(DropSpoofedNeighbour) != 201 || tunnel.Drops().Count(DropUnknownUnicast) != 201 {
		t.Error("what was to be dropped was not")
	}
	in := newIngress(tunnel)
	in.src = vtepOf(2)
	if _, ok := in.resolve(testVNI); !ok {
		t.Fatal("node 2 is not there")
	}
	all := frame(macOf(2), ether.Broadcast, "all")
	if n := testing.AllocsPerRun(200, func() { in.deliver(all, ether.Meta{}); in.merge.Flush() }); n != 0 {
		t.Errorf("a broadcast from the tunnel: %v allocations, want 0", n)
	}
}

// A station that changes its MAC says so; another's address at another MAC is no such.
func TestReaddressed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		type change struct{ was, is ether.MAC }
		told := make(chan change, 10)
		n := mesh(t, underlaytest.NewNet(1), 2, Config{Readdressed: func(was, is ether.MAC) { told <- change{was, is} }})
		defer end(n)
		const fresh ether.MAC = 0x0200_0000_0077
		b, me := n[0].bridge, macOf(1)
		other := taptest.New("blue1", 0x0200_0000_0099, 1450, 1)
		if _, err := b.AddPort(other); err != nil {
			t.Fatal(err)
		}
		own4, own6 := netip.MustParseAddr("10.32.0.1"), netip.MustParseAddr("fd00::1")
		b.SetEndpoint(Endpoint{MAC: me, IPs: []netip.Addr{own4, own6}})
		b.SetEndpoint(at(2, tabled))
		for _, frame := range [][]byte{
			ethertest.ARPRequest(fresh, tabled4, tabled4),
			ethertest.ARPRequest(me, own4, tabled4),
			ethertest.ARPRequest(fresh, own4, tabled4),
			ethertest.Solicit(fresh, own6, tabled6), // within the same second
		} {
			n[0].dev.Inject(frame, ether.Meta{})
			synctest.Wait()
		}
		corrected := false
		for f, ok := other.TryNext(); ok; f, ok = other.TryNext() {
			corrected = corrected || bytes.Equal(f.B, ethertest.ARPRequest(fresh, own4, own4))
		}
		if !corrected {
			t.Error("a neighbour here is not told of the new MAC")
		}
		time.Sleep(2 * time.Second)
		n[0].dev.Inject(ethertest.Solicit(fresh, own6, tabled6), ether.Meta{})
		synctest.Wait()
		for range 2 {
			if got := <-told; got != (change{me, fresh}) {
				t.Errorf("told of %v", got)
			}
		}
		if len(told) > 0 {
			t.Errorf("told of %v too", <-told)
		}
		// The tables follow. However silent it is then, it is found.
		b.RemoveEndpoint(me)
		b.SetEndpoint(Endpoint{MAC: fresh, IPs: []netip.Addr{own4, own6}})
		b.fdb.age(1 << 60)
		if at := b.fdb.lookup(fresh); at == nil || at.port == nil {
			t.Error("it is not known where the station is any more")
		}
	})
}
