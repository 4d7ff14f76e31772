package bridge

import (
	"net/netip"
	"testing"
	"testing/synctest"
	"time"

	"github.com/tulle-net/tulle/ether"
	"github.com/tulle-net/tulle/ether/ethertest"
	"github.com/tulle-net/tulle/underlay/underlaytest"
)

// What is asked before two nodes have met arrives when they meet, once, and not
// when it is of long ago; and of many questions the last ones.
func TestEarlyFramesReachWhoMeetsLater(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		net := underlaytest.NewNet(1)
		n := []*testNode{start(t, net, 1, Config{}), start(t, net, 2, Config{}), start(t, net, 3, Config{})}
		defer end(n)
		who := ethertest.ARPRequest(macOf(1), netip.MustParseAddr("10.32.0.1"), netip.MustParseAddr("10.32.0.2"))
		n[0].dev.Inject(who, ether.Meta{})
		n[0].dev.Inject(frame(macOf(1), macOf(9), "unknown unicast"), ether.Meta{})
		synctest.Wait()
		n[1].meet([]netip.AddrPort{vtepOf(1)})
		n[2].meet([]netip.AddrPort{vtepOf(1)})
		n[0].meet([]netip.AddrPort{vtepOf(2)})
		n[1].wants(t, who)
		n[0].meet([]netip.AddrPort{vtepOf(2), vtepOf(3)})
		n[1].wants(t) // not again
		n[2].wants(t, who)

		n[0].meet(nil)
		for i := range uint32(maxEarly + 5) {
			n[0].dev.Inject(numbered(macOf(1), ether.Broadcast, i), ether.Meta{})
		}
		synctest.Wait()
		n[0].meet([]netip.AddrPort{vtepOf(2)})
		if got := n[1].got(); len(got) != maxEarly || number(got[0]) != 5 || number(got[maxEarly-1]) != maxEarly+4 {
			t.Errorf("%d frames of many, want the last %d", len(got), maxEarly)
		}
		time.Sleep(3 * time.Second) // of the bubble's time
		n[0].meet(nil)
		n[0].meet([]netip.AddrPort{vtepOf(2)})
		n[1].wants(t)
	})
}

// In a sealed overlay they wait, sealed by nothing, until the peer has proven the
// key and there is a session.
func TestEarlyFramesAreSealed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		net := underlaytest.NewNet(1)
		n, _ := sealedMesh(t, net, 2, Config{})
		defer end(n)
		sent := 0
		net.Tap(func(d underlaytest.Datagram) {
			sent++
			if d.B[0] != 0x04 {
				t.Errorf("a datagram begins with %#x", d.B[0])
			}
		})
		who := ethertest.ARPRequest(macOf(1), netip.MustParseAddr("10.32.0.1"), netip.MustParseAddr("10.32.0.2"))
		n[0].dev.Inject(who, ether.Meta{})
		synctest.Wait()
		oneWay(t, n, 2, 1)
		synctest.Wait()
		if sent != 0 {
			t.Errorf("%d datagrams left before there was a session", sent)
		}
		oneWay(t, n, 1, 2)
		n[1].wants(t, who)
		if sent != 1 {
			t.Errorf("%d datagrams, want 1", sent)
		}
	})
}
