package e2e

import (
	"errors"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/tulle-net/tulle/internal/lab"
)

//	a, b, c (tulle) ──[ul]── ARP and ND travel as gossip, what is bigger by unicast

// TestFloodGossip: the underlay carries no broadcast frame in VXLAN, and yet
// all hosts find each other, over IPv4 and IPv6.
func TestFloodGossip(t *testing.T) {
	t.Parallel()
	l, sw, h := hosts(t, 3, lab.Underlay{})
	nodes := []*tulle{
		up(t, l, h[0], "--overlay", overlay(1, "flood=gossip")),
		up(t, l, h[1], "--join", seed(sw.Addr(h[0])), "--overlay", overlay(2, "flood=gossip")),
		up(t, l, h[2], "--join", seed(sw.Addr(h[0])), "--overlay", overlay(3, "flood=gossip")),
	}
	// That of the settings is in the tables, and nobody asks for it.
	unlisted := func(i int) netip.Addr { return netip.AddrFrom4([4]byte{10, 32, 1, byte(i)}) }
	for i, n := range nodes {
		n.eventually(5*time.Second, "floods to the two others", func() bool { return len(n.status().Overlays[0].FloodList) == 2 })
		if err := h[i].AddAddr("blue0", netip.PrefixFrom(unlisted(i+1), 16)); err != nil {
			t.Fatal(err)
		}
		if err := h[i].AddAddr("blue0", netip.PrefixFrom(addressV6(i+1), 64)); err != nil {
			t.Fatal(err)
		}
	}
	for _, to := range []struct {
		at   *lab.Host
		addr netip.Addr
	}{{h[1], unlisted(2)}, {h[2], unlisted(3)}, {h[1], addressV6(2)}} {
		question := func(f []byte) bool { return f[0]&1 != 0 && asksFor(to.addr)(f) }
		echo := echoTo(to.addr)
		arrived := watch(t, to.at, "blue0", question)
		// What comes first by VXLAN: the question, or the echo that follows the answer?
		first := watch(t, h[0], "ul", func(f []byte) bool {
			_, in, ok := inner(f)
			return ok && (question(in) || echo(in))
		})
		took := ping(t, h[0], to.addr, 5*time.Second)
		t.Logf("first ping of %s after %v", to.addr, took.Round(time.Millisecond))
		if arrived(time.Second) == nil {
			t.Errorf("no question for %s arrived on %s", to.addr, to.at.Name())
		}
		if _, in, ok := inner(first(time.Second)); !ok || !echo(in) {
			t.Errorf("the first frame for %s by VXLAN is %x, want the echo request", to.addr, in)
		}
	}
	transfer(t, l, h[0], h[1], address(2), 16<<20)
	transfer(t, l, h[2], h[0], address(1), 16<<20)

	// A broadcast that no Serf event can hold goes to both by unicast.
	const size = 1200
	big := func(f []byte) bool { return len(f) > size && string(f[:6]) == "\xff\xff\xff\xff\xff\xff" }
	var arrived, tunnelled []func(time.Duration) []byte
	for _, x := range h[1:] {
		arrived = append(arrived, watch(t, x, "blue0", big))
		tunnelled = append(tunnelled, watch(t, x, "ul", func(f []byte) bool {
			dst, in, ok := inner(f)
			return ok && dst == sw.Addr(x) && big(in)
		}))
	}
	broadcast(t, h[0], netip.MustParseAddr("10.32.255.255"), size)
	for i, x := range h[1:] {
		if arrived[i](2*time.Second) == nil {
			t.Errorf("the broadcast of %d bytes did not arrive on %s", size, x.Name())
		}
		if tunnelled[i](2*time.Second) == nil {
			t.Errorf("the broadcast of %d bytes did not go to %s by unicast", size, x.Name())
		}
	}
	intact(t, h...)
}

// echoTo matches an echo request to an address.
func echoTo(dst netip.Addr) func(frame []byte) bool {
	return func(f []byte) bool {
		if dst.Is4() {
			return len(f) >= 42 && f[12] == 0x08 && f[13] == 0x00 && f[23] == 1 && f[34] == 8 && netip.AddrFrom4([4]byte(f[30:34])) == dst
		}
		return len(f) >= 62 && f[12] == 0x86 && f[13] == 0xdd && f[20] == 58 && f[54] == 128 && netip.AddrFrom16([16]byte(f[38:54])) == dst
	}
}

// addressV6 is a second address of host number i.
func addressV6(i int) netip.Addr {
	a := netip.MustParseAddr("fd32::").As16()
	a[15] = byte(i)
	return netip.AddrFrom16(a)
}

// broadcast sends one UDP datagram to a broadcast address.
func broadcast(t *testing.T, h *lab.Host, dst netip.Addr, size int) {
	t.Helper()
	c, err := h.ListenPacket("0.0.0.0:0") // Go sets SO_BROADCAST
	if err != nil {
		t.Fatal(err)
	}
	_, err = c.WriteTo(make([]byte, size), net.UDPAddrFromAddrPort(netip.AddrPortFrom(dst, 9)))
	if err = errors.Join(err, c.Close()); err != nil {
		t.Fatal(err)
	}
}
