package bridge

import (
	"testing"
	"testing/synctest"

	"github.com/tulle-net/tulle/ether"
	"github.com/tulle-net/tulle/tap/taptest"
	"github.com/tulle-net/tulle/underlay/underlaytest"
)

// TestLocalPort: two nodes have a device with one MAC, and neither hears of the other's.
func TestLocalPort(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		net := underlaytest.NewNet(1)
		n := mesh(t, net, 2, Config{})
		defer end(n)
		const mac ether.MAC = 0x0254_0a20_00fe
		var gates []*taptest.Device
		for i := range n {
			gates = append(gates, taptest.New("gate", mac, 1450, 1))
			if _, err := n[i].bridge.AddLocalPort(gates[i]); err != nil {
				t.Fatal(err)
			}
		}
		got := func(i int) string {
			synctest.Wait()
			f, ok := gates[i].TryNext()
			if !ok {
				return ""
			}
			return string(f.B[42:])
		}
		sent := 0
		net.Tap(func(underlaytest.Datagram) { sent++ })

		n[0].dev.Inject(frame(macOf(1), mac, "to the gateway"), ether.Meta{})
		if s := got(0); s != "to the gateway" {
			t.Errorf("the node's own gateway got %q", s)
		}
		back := frame(mac, macOf(1), "back")
		gates[0].Inject(back, ether.Meta{})
		n[0].wants(t, back)
		all := frame(mac, ether.Broadcast, "who has")
		gates[0].Inject(all, ether.Meta{})
		n[0].wants(t, all)
		unknown := frame(mac, macOf(9), "unknown")
		gates[0].Inject(unknown, ether.Meta{})
		n[0].wants(t, unknown)
		if sent != 0 || got(1) != "" {
			t.Errorf("%d datagrams left for frames between a gateway and its node's ports", sent)
		}

		// A broadcast of an endpoint goes to its own gateway and to the other node's
		// endpoints, but not to the gateway there.
		b := frame(macOf(1), ether.Broadcast, "all")
		n[0].dev.Inject(b, ether.Meta{})
		n[1].wants(t, b)
		if s := got(0); s != "all" {
			t.Errorf("the node's own gateway got %q of a broadcast", s)
		}
		if s := got(1); s != "" {
			t.Errorf("the other node's gateway got %q from the tunnel", s)
		}

		// Between the gateway and the other node nothing passes, either way.
		gates[1].Inject(frame(mac, macOf(1), "out"), ether.Meta{})
		n[1].dropped(t, DropLocalOnly, 1)
		n[0].wants(t)
		send(n[1].conn, vtepOf(1), datagram(testVNI, frame(macOf(2), mac, "in")))
		n[0].dropped(t, DropLocalOnly, 1)
		if s := got(0); s != "" {
			t.Errorf("the gateway got %q from another node", s)
		}
		// Nobody else may have its MAC.
		send(n[1].conn, vtepOf(1), datagram(testVNI, frame(mac, macOf(1), "as the gateway")))
		n[0].dropped(t, DropOwnFrame, 1)
		n[0].wants(t)
	})
}
