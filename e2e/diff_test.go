package e2e

import (
	"bytes"
	bin "encoding/binary"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/tulle-net/tulle/ether"
	"github.com/tulle-net/tulle/internal/lab"
	"github.com/tulle-net/tulle/vxlan"
)

//	a (tulle, driver=offload) ──[ul]── c (a UDP socket of the test: a listed peer)
//	b (tulle, driver=plain)   ──'
//
// The same frames go through both drivers and must come out the same.

// patience is for machines with more to do: what is lost never comes.
const patience = 15 * time.Second

// twoDrivers starts a node with each driver, with the test as their only peer.
// The underlay has room for packets of 1,500 bytes with two VLAN tags.
func twoDrivers(t *testing.T, unfinished string) (v *fastVTEP, sw *lab.Switch, a, b *tulle) {
	t.Helper()
	l, sw, h := hosts(t, 3, lab.Underlay{Prefix4: underlay4, MTU: 1600})
	v = playVTEP(t, h[2], sw.Addr(h[2]))
	peer := "peer=" + sw.Addr(h[2]).String()
	conf := settings(t, l, "unfinished-checksums: "+unfinished, nothingShed)
	a = up(t, l, h[0], "--config", conf, "--overlay", overlay(1, "driver=offload", "bum-limit=0", "unknown-unicast=flood", peer))
	b = up(t, l, h[1], "--config", conf, "--overlay", overlay(2, "driver=plain", "bum-limit=0", "unknown-unicast=flood", peer))
	inOrder(t, a, b)
	for _, n := range []*tulle{a, b} {
		want := map[*tulle]string{a: "offload", b: "plain"}[n]
		if got := n.status().Offloads.Taps["blue0"]; string(got.Driver) != want {
			t.Fatalf("%s has driver %+v, want %s: this test tests nothing", n.name, got, want)
		}
	}
	return v, sw, a, b
}

// TestDifferentialIngress: what comes from the tunnel reaches both kernels as
// it was sent, byte by byte and each flow in order, though one gets it merged.
func TestDifferentialIngress(t *testing.T) {
	t.Parallel()
	for _, unfinished := range []string{"off", "on"} {
		t.Run("unfinished "+unfinished, func(t *testing.T) {
			v, sw, a, b := twoDrivers(t, unfinished)
			g := newGen(3, 96, 0)
			ingress(t, v, sw, a, b, 12_000, func() (int, []byte, []byte) {
				flow, frame := g.next()
				return flow, frame, frame
			})
		})
	}
}

// TestDifferentialUnfinished: frames whose checksums are not yet filled reach
// both kernels finished, alone and in trains.
func TestDifferentialUnfinished(t *testing.T) {
	t.Parallel()
	v, sw, a, b := twoDrivers(t, "on")
	g := newGen(4, 96, 0)
	ingress(t, v, sw, a, b, 6_000, func() (int, []byte, []byte) {
		flow, frame := g.next()
		h, ok := ether.ParseHeaders(frame)
		ip := ipv4In(frame)
		// One that never had a checksum, or a wrong one, or a packet damaged, stays so.
		if !ok || !ether.VerifyL4(frame, h) || ip != nil && !ip.ChecksumOK() || g.one(4) {
			return flow, frame, frame
		}
		at := int(h.L4) + ether.TCPChecksumOffset
		if h.Proto == ether.ProtoUDP {
			at = int(h.L4) + ether.UDPChecksumOffset
			if frame[at] == 0 && frame[at+1] == 0 {
				return flow, frame, frame
			}
		}
		bare := bytes.Clone(frame)
		bin.BigEndian.PutUint16(bare[at:], ether.PseudoSumOf(frame, h))
		return flow, bare, frame
	})
}

// ingress sends n frames of next (its flow, what is sent, what must come out) to
// both nodes and compares.
func ingress(t *testing.T, v *fastVTEP, sw *lab.Switch, a, b *tulle, n int, next func() (flow int, in, out []byte)) {
	t.Helper()
	start := time.Now()
	ends := []*tulle{a, b}
	captures := []*fastCapture{captureTAP(t, a.host, "blue0"), captureTAP(t, b.host, "blue0")}
	ledgers := []*fastLedger{newLedger(canonical), newLedger(canonical)}
	// A burst is no more than all buffers on the way hold.
	const burst = 500
	total := 0
	for total < n {
		var datagrams [][]byte
		for range burst {
			flow, in, out := next()
			datagrams = append(datagrams, encapsulated(in))
			for _, l := range ledgers {
				l.sent(flow, out)
			}
		}
		total += burst
		for _, e := range ends {
			v.send(sw.Addr(e.host), datagrams...)
		}
		for i, c := range captures {
			if got := c.taken(total, generated, patience); len(got) != total {
				t.Errorf("%s: %d frames came out, want %d", ends[i].name, len(got), total)
			}
		}
		if t.Failed() {
			break
		}
	}
	for i, c := range captures {
		for _, f := range c.taken(total, generated, 0) {
			ledgers[i].came(f)
		}
		for _, fault := range ledgers[i].missing() {
			t.Errorf("%s: %s", ends[i].name, fault)
		}
		c.mu.Lock()
		t.Logf("%s: %d frames, %d of what came were super-frames, the longest of %d bytes", ends[i].name, total, c.supers, c.longest)
		if c.err != nil {
			t.Errorf("%s: %v", ends[i].name, c.err)
		}
		if offload := i == 0; offload && (c.supers < total/100 || c.longest < 10_000) || !offload && c.supers > 0 {
			t.Errorf("%s: %d super-frames, the longest of %d bytes", ends[i].name, c.supers, c.longest)
		}
		c.mu.Unlock()
		for reason, count := range ends[i].status().Drops {
			if count != 0 {
				t.Errorf("%s: drop %s = %d, want 0", ends[i].name, reason, count)
			}
		}
	}
	t.Logf("%d frames through each driver in %v", total, time.Since(start).Round(time.Millisecond))
}

// TestDifferentialRecorded replays what two kernels said to each other.
func TestDifferentialRecorded(t *testing.T) {
	t.Parallel()
	l, r, a, b := relayed(t, lab.Underlay{}, "auto", []string{"driver=offload"}, []string{"driver=plain"})
	var mu sync.Mutex
	var recorded [][]byte
	r.through(t, func(fromA bool, d []byte) bool {
		frame := bytes.Clone(d[vxlan.HeaderLen:])
		// The MACs say the direction, which is all that a flow needs here. The
		// destinations are never sources: what both ends have behind the tunnel
		// stays there (split horizon).
		src := genMACs
		if fromA {
			src++
		}
		(src ^ 0x0001_0000_0000).Put(frame)
		src.Put(frame[6:])
		mu.Lock()
		recorded = append(recorded, frame)
		mu.Unlock()
		return true
	})
	ping(t, a.host, address(2), 5*time.Second)
	ping(t, b.host, addressV6(1), 5*time.Second)
	transfer(t, l, a.host, b.host, address(2), 2<<20)
	transfer(t, l, b.host, a.host, addressV6(1), 2<<20)
	for _, size := range []int{0, 1, 333, 1400, 5000} { // the last leaves in fragments
		talk(t, a.host, b.host, netip.AddrPortFrom(address(2), 7000), size, 20)
	}
	r.through(t, nil)
	inOrder(t, a, b)
	mu.Lock()
	frames := slices.Clone(recorded)
	mu.Unlock()
	// They come out of a node of each driver again, and are no other's business.
	at := 0
	ingress(t, r.fastVTEP, r.sw, a, b, len(frames)/500*500, func() (int, []byte, []byte) {
		f := frames[at]
		at++
		return int(ether.FlowHash(f)), f, f
	})
}

// talk sends datagrams from one host to another and waits for the last.
func talk(t *testing.T, from, to *lab.Host, dst netip.AddrPort, size, n int) {
	t.Helper()
	in, err := to.ListenPacket(dst.String())
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	out, err := from.Dial(t.Context(), "udp", dst.String())
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	payload := bytes.Repeat([]byte{0x5a}, size)
	buf := make([]byte, 65536)
	for i := range n {
		if _, err := out.Write(payload); err != nil {
			t.Fatal(err)
		}
		_ = in.SetReadDeadline(time.Now().Add(5 * time.Second))
		if got, _, err := in.ReadFrom(buf); err != nil || got != size {
			t.Fatalf("datagram %d: %d bytes, %v, want %d", i, got, err, size)
		}
	}
}

// TestDifferentialEgress: what a kernel sends into a TAP arrives at a peer as
// the same frames, whether the node cuts the super-frames (offload) or the
// kernel itself does (plain).
func TestDifferentialEgress(t *testing.T) {
	t.Parallel()
	v, sw, a, b := twoDrivers(t, "auto")
	ends := []*tulle{a, b}
	// c receives from both; who sent it says the outer source.
	type arrival struct {
		mu     sync.Mutex
		frames [][]byte
	}
	arrived := map[netip.Addr]*arrival{}
	for _, e := range ends {
		arrived[sw.Addr(e.host)] = &arrival{}
	}
	go func() {
		for buf := make([]byte, 65536); ; {
			n, src, err := v.conn.ReadFromUDPAddrPort(buf)
			if err != nil {
				return
			}
			if at := arrived[src.Addr().Unmap()]; at != nil && n > vxlan.HeaderLen {
				at.mu.Lock()
				at.frames = append(at.frames, bytes.Clone(buf[vxlan.HeaderLen:n]))
				at.mu.Unlock()
			}
		}
	}()
	injects := []*fastInject{injectTAP(t, a.host, "blue0"), injectTAP(t, b.host, "blue0")}
	start := time.Now()
	g := newGen(5, 96, 0)
	ledgers := []*fastLedger{newLedger(exact), newLedger(exact)}
	total, supers := 0, 0
	var cut ether.Segmenter
	for total < 20_000 && !t.Failed() {
		for range 40 {
			flow, frame, m := g.outgoing()
			if m.GSO != ether.GSONone {
				supers++
			}
			for _, i := range injects {
				i.send(frame, m)
			}
			// What must arrive is what Segmenter makes of it; that the plain
			// node's kernel makes the same is the proof.
			if err := cut.Reset(frame, m); err != nil {
				t.Fatal(err)
			}
			for cut.Count() > 0 {
				seg := make([]byte, cut.MaxLen())
				seg = seg[:cut.Next(seg)]
				for _, l := range ledgers {
					l.sent(flow, seg)
				}
				total++
			}
		}
		for _, e := range ends {
			at := arrived[sw.Addr(e.host)]
			if got := waitFrames(t, &at.mu, &at.frames, total, generated, patience); len(got) != total {
				t.Errorf("%s: %d frames arrived, want %d", e.name, len(got), total)
			}
		}
	}
	for i, e := range ends {
		at := arrived[sw.Addr(e.host)]
		for _, f := range waitFrames(t, &at.mu, &at.frames, total, generated, 0) {
			ledgers[i].came(f)
		}
		for _, fault := range ledgers[i].missing() {
			t.Errorf("%s: %s", e.name, fault)
		}
		for reason, count := range e.status().Drops {
			if count != 0 {
				t.Errorf("%s: drop %s = %d, want 0", e.name, reason, count)
			}
		}
	}
	t.Logf("%d super-frames, %d frames on the wire from each driver in %v", supers, total, time.Since(start).Round(time.Millisecond))
}

// outgoing is next for the way out of a kernel: super-frames, frames whose
// checksum the device is to fill, and any others.
func (g *fastGen) outgoing() (flow int, frame []byte, m ether.Meta) {
	g.last = g.rng.IntN(len(g.flows))
	f := g.flows[g.last]
	seg := 76 + g.rng.IntN(1300) // the smallest that Linux' TCP makes: 88 less timestamps
	payload := func() []byte { return g.bytes(1 + g.rng.IntN(min(62_000, 60*seg))) }
	switch {
	case f.kind == "tcp" && !g.one(4):
		s := f.tcp
		s.Payload = payload()
		s.Flags = ether.TCPAck
		for _, flag := range []uint8{ether.TCPPsh, ether.TCPFin, ether.TCPEce, ether.TCPCwr} {
			if g.one(8) {
				s.Flags |= flag
			}
		}
		f.tcp.Seq += uint32(len(s.Payload))
		f.tcp.ID += 100
		frame, m = s.Super(seg)
	case f.kind == "udp" && !g.one(4) && !f.udp.NoChecksum:
		d := f.udp
		d.Payload = payload()
		f.udp.ID += 100
		frame, m = d.Super(seg)
	default:
		flow, frame = g.next()
		return flow, frame, ether.Meta{}
	}
	return g.last, frame, m
}
