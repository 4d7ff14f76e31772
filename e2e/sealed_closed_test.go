package e2e

import (
	"net/netip"
	"testing"
	"time"

	"github.com/tulle-net/tulle/ether"
	"github.com/tulle-net/tulle/ether/ethertest"
	"github.com/tulle-net/tulle/internal/lab"
	"github.com/tulle-net/tulle/vxlan"
)

//	a, b (tulle) ──[ul]── c
//
// An overlay that requires encryption neither takes nor sends plaintext.

// TestSealedRefusesPlaintext: plain VXLAN of the overlay's VNI is dropped and
// counted, whoever it says that it is from.
func TestSealedRefusesPlaintext(t *testing.T) {
	t.Parallel()
	l, sw, h := hosts(t, 3, lab.Underlay{Prefix4: underlay4, Offloads: lab.Wire})
	s := &sealed{t: t, l: l, sw: sw}
	a, b := s.start(h[0], sealedOverlay(1)), s.start(h[1], sealedOverlay(2))
	ping(t, a.host, address(2), 20*time.Second)
	ping(t, h[2], sw.Addr(h[0]), 5*time.Second)
	at := netip.AddrPortFrom(sw.Addr(h[0]), vxlan.Port)
	inside := captureTAP(t, a.host, "blue0")
	frames := [][]byte{
		datagram(100, ethertest.ARPRequest(macB, address(2), address(1))),
		datagram(100, ethertest.Echo{SrcMAC: macB, DstMAC: macA, Src: address(2), Dst: address(1), Payload: marked}.Frame()),
		datagram(100, ethertest.Ethernet(ether.Broadcast, genMACs, nil, 0x88b5, marked)),
	}
	before := a.dropped("plaintext_refused")
	session, _ := a.session("b", sealedName)
	from := []netip.Addr{sw.Addr(h[1]), sw.Addr(h[2]), netip.MustParseAddr("192.168.77.200")} // a member's, a stranger's, nobody's
	sent := uint64(0)
	for i, src := range from {
		attack(t, h[2], src, at).send(frames)
		sent += uint64(len(frames))
		a.eventually(5*time.Second, "counts them", func() bool { return a.dropped("plaintext_refused") == before+sent })
		if now, _ := a.session("b", sealedName); i == 0 && now.PlaintextRefused != session.PlaintextRefused+uint64(len(frames)) {
			t.Errorf("%d plaintext datagrams are counted for b, want %d", now.PlaintextRefused-session.PlaintextRefused, len(frames))
		}
	}
	// A flow whose plaintext and sealed datagrams alternate.
	for range 50 {
		attack(t, h[2], from[0], at).send(frames[:1])
		talk(t, b.host, a.host, netip.AddrPortFrom(address(1), 7000), 300, 1)
	}
	sent += 50
	a.eventually(5*time.Second, "counts all", func() bool { return a.dropped("plaintext_refused") == before+sent })
	if inside.has(marked) {
		t.Error("plaintext was delivered")
	}
	if f := a.fdb(sealedName).Entries; len(f) > 2 {
		t.Errorf("plaintext has taught a MAC: %+v", f)
	}
}

// TestSealedMeetsOpen: a node of the cluster that has the overlay open gets
// nothing of it, and what it sends is refused.
func TestSealedMeetsOpen(t *testing.T) {
	t.Parallel()
	s := sealedCluster(t, 2, lab.Underlay{Prefix4: underlay4, Offloads: lab.Wire})
	a, b := s.nodes[0], s.nodes[1]
	ping(t, a.host, address(2), 20*time.Second)
	d, err := s.l.AddHost("d")
	if err == nil {
		err = s.sw.Attach(d)
	}
	if err != nil {
		t.Fatal(err)
	}
	// Another name, the same VNI, no encryption. It is of the cluster all the same.
	n := s.start(d, "name=open,vni=100,encryption=none,tap=blue0,address=10.32.0.4/16")
	n.eventually(10*time.Second, "sees the others", func() bool { return n.sees("a") == "alive" && n.sees("b") == "alive" })
	a.eventually(10*time.Second, "sees the conflict", func() bool { return len(a.status().Node.Conflicts) > 0 })
	wire, inside := captureTAP(t, d, "ul"), captureTAP(t, d, "blue0")
	refused := a.dropped("plaintext_refused")
	// Whether d sends anything is its own business; a takes nothing.
	attack(t, d, netip.Addr{}, netip.AddrPortFrom(s.sw.Addr(a.host), vxlan.Port)).send([][]byte{datagram(100, ethertest.ARPRequest(ether.MACOf(address(4)), address(4), address(1)))})
	a.eventually(5*time.Second, "refuses it", func() bool { return a.dropped("plaintext_refused") > refused })
	noPing(t, d, address(1), time.Second)
	noPing(t, a.host, address(4), time.Second)
	for _, h := range []*lab.Host{a.host, b.host} {
		broadcast(t, h, netip.MustParseAddr("10.32.255.255"), 100)
	}
	ping(t, a.host, address(2), 5*time.Second)
	for _, dg := range wire.datagrams() {
		if dg.payload[0]&0x40 == 0 {
			t.Errorf("%s sent %x to a node that has the overlay open", dg.src, dg.payload[:min(len(dg.payload), 32)])
		}
	}
	inside.mu.Lock()
	defer inside.mu.Unlock()
	for _, f := range inside.frames {
		if m := ether.MACFrom(f[6:]); m == macA || m == macB {
			t.Errorf("d was given a frame of the sealed overlay: %x", f)
		}
	}
}

// TestSealedWaitsForTheKey: a node without the overlay's key (its keeper is
// away) sends and takes nothing; what the others send waits. With the key all
// flows.
func TestSealedWaitsForTheKey(t *testing.T) {
	t.Parallel()
	l, sw, h := hosts(t, 3, lab.Underlay{Prefix4: underlay4, Offloads: lab.Wire})
	s := &sealed{t: t, l: l, sw: sw}
	a, b := s.start(h[0], sealedOverlay(1)), s.start(h[1], sealedOverlay(2))
	ping(t, a.host, address(2), 20*time.Second)
	// c becomes a member with another overlay, and comes back with this one when no keeper is there.
	c := s.start(h[2], "name=other,vni=101,tap=blue0,address=10.32.0.3/16")
	c.eventually(10*time.Second, "sees b", func() bool { return c.sees("b") == "alive" })
	if err := c.proc.Stop(10 * time.Second); err != nil {
		t.Fatal(err)
	}
	a.proc.Kill()
	<-a.proc.Done()
	wire := captureTAP(t, b.host, "ul")
	wireC := captureTAP(t, c.host, "ul")
	c.args[len(c.args)-3] = sealedOverlay(3)
	c.start()
	took := c.eventually(20*time.Second, "sees b again", func() bool { return c.sees("b") == "alive" })
	took += b.eventually(20*time.Second, "sees c again", func() bool { return b.sees("c") == "alive" })
	t.Logf("without a keeper, c and b have found each other after %v", took.Round(time.Millisecond))
	noPing(t, b.host, address(3), 1500*time.Millisecond)
	noPing(t, c.host, address(2), 1500*time.Millisecond)
	for _, w := range []*fastCapture{wire, wireC} {
		for _, d := range w.sealedOnly() {
			if from := d.src.Addr(); from != sw.Addr(h[0]) && d.dst.Addr() != sw.Addr(h[0]) {
				t.Errorf("%s → %s: %d sealed bytes without a session", d.src, d.dst, len(d.payload))
			}
		}
	}
	if b.floods(sw.Addr(h[2])) || c.floods(sw.Addr(h[1])) {
		t.Error("a peer that has not proven the key is in a flood list")
	}
	if q, ok := b.session("c", sealedName); ok {
		t.Errorf("b has a session with c: %+v", q)
	}
	a.start()
	took = ping(t, b.host, address(3), 30*time.Second)
	t.Logf("traffic %v after the keeper was back", took.Round(time.Millisecond))
	wire.hides(innerSecrets(3)...)
	wireC.hides(innerSecrets(3)...)
}
