package e2e

import (
	bin "encoding/binary"
	"net/netip"
	"testing"
	"time"

	"github.com/tulle-net/tulle/ether"
	"github.com/tulle-net/tulle/internal/lab"
)

//	a ──[ul]── m ──[vl]── b      what a seals arrives from another address than a says it has

// TestSealedRoam: what a peer seals is taken from wherever it comes, and
// answered there, before gossip knows anything; and its move back too.
func TestSealedRoam(t *testing.T) {
	t.Parallel()
	w := tapped(t)
	s := &sealed{t: t, l: w.l}
	a := s.start(w.a, sealedOverlay(1))
	b := s.start(w.b, sealedOverlay(2))
	s.meet()
	elsewhere := netip.MustParseAddr("192.168.77.50")
	if err := w.a.AddAddr("ul", netip.PrefixFrom(elsewhere, 24)); err != nil { // a answers ARP for it, and hears it
		t.Fatal(err)
	}
	wire := captureTAP(t, w.a, "ul")
	flow := countFlow(t, w.a, 1, w.b, 2)
	arrivesAt := func(at netip.Addr) {
		t.Helper()
		from := len(wire.datagrams())
		took := eventually(t, 5*time.Second, "b sends to "+at.String(), func() bool {
			for _, d := range wire.datagrams()[from:] {
				if isSealed(d) && d.dst.Addr() == at {
					return d.dst.Port() == 4789
				}
			}
			return false
		})
		t.Logf("b sends to %s after %v", at, took.Round(time.Millisecond))
		time.Sleep(200 * time.Millisecond) // what was under way has come
		from = len(wire.datagrams())
		ping(t, w.b, address(1), 5*time.Second)
		for _, d := range wire.datagrams()[from:] {
			if isSealed(d) && d.dst.Addr() != at {
				t.Errorf("b still sends to %s", d.dst)
			}
		}
	}
	// What a NAT on the way does, to sealed datagrams alone.
	w.through(func(fromA bool, frame []byte) bool {
		if d, ok := outerUDP(frame); ok && fromA && isSealed(d) {
			ip := ether.IPv4(frame[14:])
			copy(frame[26:30], elsewhere.AsSlice())
			ip.SetChecksum()
			bin.BigEndian.PutUint16(frame[40:], 0) // no UDP checksum
		}
		return true
	})
	arrivesAt(elsewhere)
	if got := b.sees("a"); got != "alive" {
		t.Errorf("b sees a as %q", got)
	}
	if got := a.status().Node.VTEP.Addr(); got != w.at[0] {
		t.Errorf("a says that it is at %s: this tested nothing", got)
	}
	w.through(nil)
	arrivesAt(w.at[0])
	flow.settle("there and back")
	for _, n := range s.nodes {
		if d := n.dropped("forged") + n.dropped("replay") + n.dropped("unknown_session"); d != 0 {
			t.Errorf("%s: %d drops: %v", n.name, d, n.status().Drops)
		}
	}
}

// TestSealedRoamOld: a datagram that was sealed before the newest moves nobody,
// wherever it comes from.
func TestSealedRoamOld(t *testing.T) {
	t.Parallel()
	w := tapped(t)
	s := &sealed{t: t, l: w.l}
	s.start(w.a, sealedOverlay(1))
	s.start(w.b, sealedOverlay(2))
	s.meet()
	ping(t, w.a, address(2), 10*time.Second)
	elsewhere := netip.MustParseAddr("192.168.77.50")
	wire := captureTAP(t, w.a, "ul")
	if err := w.a.AddAddr("ul", netip.PrefixFrom(elsewhere, 24)); err != nil {
		t.Fatal(err)
	}
	// Each third sealed datagram of a comes late, from elsewhere.
	n, late := 0, 0
	var held []byte
	w.through(func(fromA bool, frame []byte) bool {
		d, ok := outerUDP(frame)
		if !ok || !fromA || !isSealed(d) {
			return true
		}
		switch n++; {
		case n%3 == 0:
			held = append(held[:0], frame...)
			copy(held[26:30], elsewhere.AsSlice())
			ether.IPv4(held[14:]).SetChecksum()
			bin.BigEndian.PutUint16(held[40:], 0)
			return false
		case len(held) > 0:
			w.send(fromA, frame)
			w.send(fromA, held)
			held = held[:0]
			late++
			return false
		}
		return true
	})
	flow := countFlow(t, w.a, 1, w.b, 2)
	time.Sleep(500 * time.Millisecond)
	// No more; the one that is held, if there is one, comes with the next.
	w.through(func(fromA bool, frame []byte) bool {
		d, ok := outerUDP(frame)
		if len(held) == 0 || !ok || !fromA || !isSealed(d) {
			return true
		}
		w.send(fromA, frame)
		w.send(fromA, held)
		held = nil
		return false
	})
	time.Sleep(100 * time.Millisecond)
	w.through(nil)
	flow.settle("with each third datagram late")
	for _, d := range wire.datagrams() {
		if isSealed(d) && d.dst.Addr() == elsewhere {
			t.Fatal("b was moved by an old datagram")
		}
	}
	if late < 50 {
		t.Errorf("%d datagrams were late: this tested nothing", late)
	}
}

// TestSealedReaddressed: a's address is replaced by another; its sessions go on.
func TestSealedReaddressed(t *testing.T) {
	t.Parallel()
	s := sealedCluster(t, 2, lab.Underlay{Prefix4: underlay4})
	s.meet()
	a, b := s.nodes[0], s.nodes[1]
	there, back := heartbeat(t, a.host, address(2)), heartbeat(t, b.host, address(1))
	for _, x := range []*beat{there, back} {
		x.since(t, time.Now(), 5*time.Second)
	}
	old, now := netip.PrefixFrom(s.sw.Addr(a.host), 24), netip.MustParsePrefix("192.168.77.50/24")
	if err := a.host.DelAddr("ul", old); err != nil { // first: with it Linux removes the others of its network
		t.Fatal(err)
	}
	if err := a.host.AddAddr("ul", now); err != nil {
		t.Fatal(err)
	}
	moved := time.Now()
	for what, x := range map[string]*beat{"a reaches b": there, "b reaches a": back} {
		took := x.since(t, moved, 20*time.Second)
		t.Logf("%s %v after a's address was replaced", what, took.Round(time.Millisecond))
		if took > 5*time.Second {
			t.Errorf("%s %v after a's address was replaced, want 5 s at most", what, took)
		}
	}
	a.eventually(30*time.Second, "advertises its new address", func() bool { return a.status().Node.VTEP.Addr() == now.Addr() })
	b.eventually(30*time.Second, "has a at its new address", func() bool { return b.floods(now.Addr()) })
	transfer(t, s.l, b.host, a.host, address(1), 4<<20)
}
