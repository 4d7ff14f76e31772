package bridge

import (
	"bytes"
	"encoding/hex"
	"fmt"
	"net/netip"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/tulle-net/tulle/crypto"
	"github.com/tulle-net/tulle/ether"
	"github.com/tulle-net/tulle/underlay/underlaytest"
	"github.com/tulle-net/tulle/vxlan"
)

func TestControlGolden(t *testing.T) {
	for _, tt := range []struct {
		c    control
		n    int
		want string
	}{
		{control{controlProbe, 0xbeef, 1400}, 10, "0100beef057800000000"},
		{control{controlAck, 0xbeef, 1400}, 6, "0200beef0578"}, // as in docs/wire-sealed.md
		{control{controlAck, 0, 65535}, 6, "02000000ffff"},
	} {
		b := bytes.Repeat([]byte{0xee}, tt.n)
		tt.c.put(b)
		if got := hex.EncodeToString(b); got != tt.want {
			t.Errorf("%+v is written as %s, want %s", tt.c, got, tt.want)
		}
		for n := range b {
			c, ok := parseControl(b[:n])
			if ok != (n >= controlLen) || ok && c != tt.c {
				t.Errorf("parseControl(%x) = %+v, %t", b[:n], c, ok)
			}
		}
		if c, ok := parseControl(b); !ok || c != tt.c {
			t.Errorf("parseControl(%x) = %+v, %t, want %+v", b, c, ok, tt.c)
		}
	}
	for _, s := range []string{"000000000000", "030000000000", "010100000000", "ff0000000000"} {
		b, _ := hex.DecodeString(s)
		if c, ok := parseControl(b); ok {
			t.Errorf("parseControl(%s) = %+v, want none", s, c)
		}
	}
}

func FuzzParseControl(f *testing.F) {
	f.Add([]byte{1, 0, 0xbe, 0xef, 5, 0x78})
	f.Add([]byte{2, 0, 0xbe, 0xef, 5, 0x78, 0, 1})
	f.Add([]byte{3, 0, 0, 0, 0})
	f.Fuzz(func(t *testing.T, b []byte) {
		c, ok := parseControl(b)
		if !ok {
			if c != (control{}) {
				t.Errorf("parseControl(%x) = %+v, and none", b, c)
			}
			return
		}
		again := make([]byte, len(b))
		c.put(again)
		if !bytes.Equal(again[:controlLen], b[:controlLen]) {
			t.Errorf("parseControl(%x) = %+v, which is written as %x", b, c, again)
		}
	})
}

// probed is a pair of sealed nodes, with what is to be known about their probes.
type probed struct {
	net     *underlaytest.Net
	n       []*testNode
	probes  atomic.Int64 // datagrams with FlagControl from node 1
	changes atomic.Int64
}

func newProbed(t *testing.T, mtu, device int) *probed {
	t.Helper()
	p := &probed{net: underlaytest.NewNet(1)}
	narrow(p.net, 1, 2, mtu)
	p.net.Tap(func(d underlaytest.Datagram) {
		if d.B[1]&crypto.FlagControl != 0 && d.Src.Addr() == vtepOf(1).Addr() {
			p.probes.Add(1)
		}
	})
	for i := 1; i <= 2; i++ {
		n := startWith(t, p.net, i, Config{Sealed: true}, TunnelConfig{PathChanged: func() { p.changes.Add(1) }})
		n.dev.SetMTU(device)
		n.tunnel.SetMembers([]netip.AddrPort{vtepOf(3 - i)})
		n.bridge.SetPeers([]Peer{{nameOf(3 - i), vtepOf(3 - i)}})
		p.n = append(p.n, n)
	}
	bothWays(t, p.n, 1, 2)
	return p
}

func (p *probed) limit() int { return p.n[0].tunnel.PathMTU("n2") }

// until has node 1 talk until its limit is want, and returns the seconds.
func (p *probed) until(t *testing.T, want int) int {
	t.Helper()
	for i := range 1000 {
		if p.limit() == want {
			return i
		}
		chat(p.n[0], macOf(1), ether.Broadcast, 1)
	}
	t.Fatalf("the limit is %d, want %d", p.limit(), want)
	return 0
}

// Two nodes find the way between them, whose width nothing else tells.
func TestProbe(t *testing.T) {
	for _, tt := range []struct{ path, device, want, within int }{
		{1500, 1418, 0, 1},
		{1492, 1418, 1492, 6}, {1400, 1418, 1400, 6}, {1280, 1418, 1280, 6},
		{9000, 8918, 0, 1}, {1500, 8918, 1500, 6},
	} {
		t.Run(fmt.Sprint(tt.path, " of ", tt.device+82), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				p := newProbed(t, tt.path, tt.device)
				defer end(p.n)
				chat(p.n[0], macOf(1), ether.Broadcast, tt.within)
				if p.limit() != tt.want {
					t.Errorf("the limit is %d after %d s, want %d", p.limit(), tt.within, tt.want)
				}
				if tt.want == 0 && p.probes.Load() > 1 {
					t.Errorf("%d probes left, want 1", p.probes.Load())
				}
				if (p.changes.Load() > 0) != (tt.want != 0) {
					t.Errorf("PathChanged was called %d times", p.changes.Load())
				}
				// The peer has sent nothing but acknowledgements, so it does not probe.
				if got := p.n[1].tunnel.PathMTU("n1"); got != 0 {
					t.Errorf("the idle side has a limit of %d", got)
				}
				p.n[0].dropped(t, DropControlMessage, 0)
				p.n[1].dropped(t, DropControlMessage, 0)
			})
		})
	}
}

// A path that shrinks under traffic is noticed within 15 s; until then large frames
// are lost, then answered. One that grows is noticed within 610 s. An idle one costs nothing.
func TestProbeFollows(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newProbed(t, 1500, 1418)
		defer end(p.n)
		chat(p.n[0], macOf(1), ether.Broadcast, 33)
		narrow(p.net, 1, 2, 1400)
		if took := p.until(t, 1400); took > 15 {
			t.Errorf("a path that shrank was noticed after %d s", took)
		}
		p.n[1].dev.Inject(numbered(macOf(2), macOf(1), 0), ether.Meta{})
		p.n[0].got()
		f := ofSize(1418, false)
		p.n[0].dev.Inject(f, ether.Meta{})
		if got := p.n[0].got(); len(got) != 1 || toldMTU(t, got[0], f) != 1318 {
			t.Errorf("answers %x, want one", got)
		}
		narrow(p.net, 1, 2, 1500)
		if took := p.until(t, 0); took > 610 {
			t.Errorf("a path that grew was noticed after %d s", took)
		}
		time.Sleep(time.Minute)
		before := p.probes.Load()
		time.Sleep(time.Hour)
		if p.probes.Load() != before {
			t.Errorf("%d probes in an hour without traffic", p.probes.Load()-before)
		}
		p.n[0].got()
		p.n[1].got()
	})
}

// The kernel knows less than probes would find: no probe is larger. When it has forgotten, they look again.
func TestProbeBelowKernel(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newProbed(t, 1400, 1418)
		defer end(p.n)
		p.n[0].tunnel.SetPathMTU(vtepOf(2).Addr(), 1400)
		chat(p.n[0], macOf(1), ether.Broadcast, 5)
		if p.limit() != 1400 || p.probes.Load() != 1 || p.n[0].conn.Stats().TxTooBig.Load() != 0 {
			t.Errorf("limit %d after %d probes, of which %d did not leave", p.limit(), p.probes.Load(), p.n[0].conn.Stats().TxTooBig.Load())
		}
		p.n[0].tunnel.SetPathMTU(vtepOf(2).Addr(), 0)
		if p.limit() != 0 {
			t.Errorf("limit %d", p.limit())
		}
		if took := p.until(t, 1400); took > 6 {
			t.Errorf("found by probes after %d s", took)
		}
		for set, want := range map[int]int{1390: 1390, 1450: 1400, 0: 1400} { // the smaller of the two
			p.n[0].tunnel.SetPathMTU(vtepOf(2).Addr(), set)
			if p.limit() != want {
				t.Errorf("the kernel says %d, probes 1400: limit %d, want %d", set, p.limit(), want)
			}
		}
	})
}

// A peer that moves is at the end of another path.
func TestProbeRoams(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newProbed(t, 1400, 1418)
		defer end(p.n)
		p.until(t, 1400)
		if err := p.n[1].conn.SetSource(vtepOf(7).Addr()); err != nil {
			t.Fatal(err)
		}
		p.n[1].dev.Inject(numbered(macOf(2), ether.Broadcast, 0), ether.Meta{})
		synctest.Wait()
		if p.limit() != 0 {
			t.Errorf("the limit of the old path is kept: %d", p.limit())
		}
		before := p.probes.Load()
		chat(p.n[0], macOf(1), ether.Broadcast, 3)
		if p.limit() != 0 || p.probes.Load() != before+2 { // one, and one acknowledgement: n2 has sent, and so probes
			t.Errorf("limit %d after %d messages on the new path, want none after 2", p.limit(), p.probes.Load()-before)
		}
	})
}

// What nobody but the peer can say is not taken from anybody else, nor what contradicts itself.
func TestProbeForged(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		net := underlaytest.NewNet(1)
		n, _ := sealedMesh(t, net, 3, Config{})
		defer end(n)
		narrow(net, 1, 2, 1400)
		n[0].dev.SetMTU(1418)
		scratch := new(crypto.Scratch)
		message := func(tx *crypto.Sealer, c control, size int, flags byte) []byte {
			counter, ok := tx.Reserve(1)
			if !ok {
				t.Fatal("used up")
			}
			body := make([]byte, size)
			c.put(body)
			d := make([]byte, size+crypto.SealedOverhead)
			return d[:tx.Seal(scratch, d, counter, flags, body)]
		}
		bothWays(t, n, 1, 2)
		_, _ = oneWay(t, n, 1, 3)
		evil, _ := oneWay(t, n, 3, 1)
		search := &n[0].tunnel.peers["n2"].search

		// While 1,500 is on its way to n2 and lost, n3 says under its own session that it arrived; so does n3
		// from n2's address, and somebody without any session.
		for range 3 {
			n[0].dev.Inject(numbered(macOf(1), ether.Broadcast, 0), ether.Meta{})
			time.Sleep(time.Second)
			synctest.Wait()
			if search.state != trying {
				t.Fatalf("state %d", search.state)
			}
			ack := control{controlAck, search.id, 1500}
			send(n[2].conn, vtepOf(1), message(evil, ack, controlLen, crypto.FlagControl))
			send(n[1].conn, vtepOf(1), message(evil, ack, controlLen, crypto.FlagControl))
			unsealed := make([]byte, controlLen+crypto.SealedOverhead)
			copy(unsealed, message(evil, ack, controlLen, crypto.FlagControl)[:crypto.SealedHeaderLen])
			ack.put(unsealed[crypto.SealedHeaderLen:][:controlLen])
			send(n[1].conn, vtepOf(1), unsealed)
		}
		n[0].dropped(t, DropForged, 3)
		chat(n[0], macOf(1), ether.Broadcast, 4)
		if got := n[0].tunnel.PathMTU("n2"); got != 1400 {
			t.Errorf("limit %d, want 1400", got)
		}
		n[0].dropped(t, DropControlMessage, 0)

		// What is malformed is counted, and nothing is answered.
		answers := 0
		net.Tap(func(d underlaytest.Datagram) {
			if d.Src.Addr() == vtepOf(1).Addr() && d.B[1]&crypto.FlagControl != 0 {
				answers++
			}
		})
		for i, d := range [][]byte{
			message(evil, control{3, 1, 1}, 10, crypto.FlagControl),
			message(evil, control{controlProbe, 1, 1500}, 100, crypto.FlagControl), // which it is not
			message(evil, control{controlProbe, 1, 28 + 32 + 100}, 100, crypto.FlagControl|crypto.FlagUnfilled),
			message(evil, control{controlProbe, 1, 28 + 32 + 100}, 100, 0), // no VXLAN header
		} {
			send(n[2].conn, vtepOf(1), d)
			synctest.Wait()
			if got := n[0].tunnel.Drops().Count(DropControlMessage) + n[0].tunnel.Drops().Count(DropVNIMismatch); got != uint64(i+1) {
				t.Errorf("message %d: %d drops", i, got)
			}
		}
		if answers != 0 {
			t.Errorf("%d answers", answers)
		}
		// Probes in a flood are answered 100 times.
		for range 150 {
			send(n[2].conn, vtepOf(1), message(evil, control{controlProbe, 1, 28 + 32 + 100}, 100, crypto.FlagControl))
		}
		synctest.Wait()
		if answers != MaxAnswers {
			t.Errorf("%d answers to 150 probes, want %d", answers, MaxAnswers)
		}
		n[0].dropped(t, DropControlMessage, 3+50)
		for i := range n {
			n[i].got()
		}
	})
}

// Without a session to answer under nothing is sent, and without one to send under nobody probes.
func TestProbeWithoutSession(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newProbed(t, 1400, 1418)
		defer end(p.n)
		p.n[1].tunnel.Send("n1", "blue", nil)
		chat(p.n[0], macOf(1), ether.Broadcast, 20)
		if p.limit() != 0 {
			t.Errorf("limit %d of a peer that cannot answer, want none", p.limit())
		}
		p.n[0].tunnel.Send("n2", "blue", nil)
		before := p.probes.Load()
		chat(p.n[0], macOf(1), ether.Broadcast, 60)
		if p.probes.Load() != before {
			t.Error("probes without a session")
		}
	})
}

// With two overlays that share a peer: one search, up to the larger device.
func TestProbeOverlays(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newProbed(t, 1400, 1218)
		defer end(p.n)
		chat(p.n[0], macOf(1), ether.Broadcast, 3)
		if p.limit() != 0 || p.probes.Load() != 1 {
			t.Errorf("devices below the path: limit %d, %d probes", p.limit(), p.probes.Load())
		}
		for i, n := range p.n {
			red, err := n.tunnel.Add(Config{Name: "red", VNI: testVNI + 1, Sealed: true})
			if err != nil {
				t.Fatal(err)
			}
			defer red.Close()
			if _, err := red.AddPort(&nullDevice{mac: macOf(i + 5)}); err != nil { // MTU 1,450
				t.Fatal(err)
			}
			red.SetPeers([]Peer{{nameOf(2 - i), vtepOf(2 - i)}})
		}
		for i, n := range p.n {
			key := crypto.NewKey()
			to := p.n[1-i]
			rx, err := crypto.NewOpener(key, crypto.ChaCha20Poly1305, uint32(i))
			if err != nil {
				t.Fatal(err)
			}
			tx, err := crypto.NewSealer(key, crypto.ChaCha20Poly1305, uint32(i))
			if err != nil {
				t.Fatal(err)
			}
			if err := to.tunnel.Receive(nameOf(i+1), "red", rx); err != nil {
				t.Fatal(err)
			}
			n.tunnel.Send(nameOf(2-i), "red", tx)
		}
		if took := p.until(t, 1400); took > 6 {
			t.Errorf("found after %d s", took)
		}
		synctest.Wait()
	})
}

// A probe fills exactly the IP packet that it says, in both families.
func TestProbeSize(t *testing.T) {
	for _, addr := range []string{"192.0.2.9", "2001:db8::9"} {
		a := netip.MustParseAddr(addr)
		at := netip.AddrPortFrom(a, vxlan.Port)
		tx, err := crypto.NewSealer(crypto.NewKey(), crypto.ChaCha20Poly1305, 1)
		if err != nil {
			t.Fatal(err)
		}
		r := &remote{}
		r.at.Store(&at)
		to := &place{peer: r, path: &r.path}
		to.tx.Store(tx)
		s := &lastSender{}
		l := &lane{tx: s}
		tunnel := NewTunnel(TunnelConfig{Conn: underlaytest.NewNet(1).Conn(vtepOf(1))})
		tunnel.lanes.New = func() any { return l }
		p := prober{t: tunnel}
		p.probe(r, prospect{at: to, most: 1500, frames: 1}, 10)
		if want := map[bool]int{true: 1472, false: 1452}[a.Is4()]; s.n != want {
			t.Errorf("to %s: a datagram of %d bytes, want %d", addr, s.n, want)
		}
		if s.flow&1 != 1 {
			t.Errorf("to %s: it has a source port of small frames", addr)
		}
	}
}

// lastSender remembers how long the last datagram was, and what chose its source port.
type lastSender struct {
	nullSender
	flow uint32
	n    int
}

func (s *lastSender) Commit(_ netip.AddrPort, flow uint32, n int) { s.flow, s.n = flow, n }
