package bridge

import (
	"bytes"
	"fmt"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/tulle-net/tulle/crypto"
	"github.com/tulle-net/tulle/ether"
	"github.com/tulle-net/tulle/ether/ethertest"
	"github.com/tulle-net/tulle/tap"
	"github.com/tulle-net/tulle/underlay"
	"github.com/tulle-net/tulle/underlay/underlaytest"
	"github.com/tulle-net/tulle/vxlan"
)

// told is what a Tunnel tells whoever agrees on sessions.
type told struct {
	mu                 sync.Mutex
	wants, lost, moved []string
}

func (w *told) config() (c TunnelConfig) {
	add := func(l *[]string, s string) {
		w.mu.Lock()
		*l = append(*l, s)
		w.mu.Unlock()
	}
	c.Want = func(peer, overlay string) { add(&w.wants, peer+"/"+overlay) }
	c.Lost = func(peer string) { add(&w.lost, peer) }
	c.Moved = func(peer string, to netip.AddrPort) { add(&w.moved, fmt.Sprint(peer, " ", to)) }
	return c
}

func (w *told) got(l *[]string) []string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.Clone(*l)
}

func nameOf(i int) string { return fmt.Sprintf("n%d", i) }

// sealedMesh makes nodes whose overlay is sealed and who know each other; sessions are the test's to make.
func sealedMesh(t *testing.T, net *underlaytest.Net, count int, cfg Config) ([]*testNode, []*told) {
	t.Helper()
	var nodes []*testNode
	var tells []*told
	for i := 1; i <= count; i++ {
		w := &told{}
		cfg.Sealed = true
		n := startWith(t, net, i, cfg, w.config())
		nodes, tells = append(nodes, n), append(tells, w)
	}
	for i := range nodes {
		var peers []Peer
		for j := 1; j <= count; j++ {
			if j != i+1 {
				peers = append(peers, Peer{nameOf(j), vtepOf(j)})
			}
		}
		nodes[i].tunnel.SetMembers(others(count, i+1))
		nodes[i].bridge.SetPeers(peers)
	}
	return nodes, tells
}

// oneWay makes a session from node i to node j and returns its halves.
func oneWay(t *testing.T, n []*testNode, i, j int) (*crypto.Sealer, *crypto.Opener) {
	t.Helper()
	key, index := crypto.NewKey(), n[j-1].tunnel.Index()
	rx, err := crypto.NewOpener(key, crypto.ChaCha20Poly1305, index)
	if err != nil {
		t.Fatal(err)
	}
	tx, err := crypto.NewSealer(key, crypto.ChaCha20Poly1305, index)
	if err != nil {
		t.Fatal(err)
	}
	if err := n[j-1].tunnel.Receive(nameOf(i), "blue", rx); err != nil {
		t.Fatal(err)
	}
	n[i-1].tunnel.Send(nameOf(j), "blue", tx)
	return tx, rx
}

func bothWays(t *testing.T, n []*testNode, i, j int) {
	t.Helper()
	oneWay(t, n, i, j)
	oneWay(t, n, j, i)
}

// Frames pass sealed, in both directions, small ones, super-frames and broadcasts, and nothing else leaves the node.
func TestSealed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		net := underlaytest.NewNet(1)
		n, _ := sealedMesh(t, net, 3, Config{})
		defer end(n)
		secret := []byte("attack at dawn")
		var seen [][]byte
		net.Tap(func(d underlaytest.Datagram) { seen = append(seen, bytes.Clone(d.B)) })
		for _, p := range [][2]int{{1, 2}, {1, 3}, {2, 3}} {
			bothWays(t, n, p[0], p[1])
		}
		all := ethertest.UDP{SrcMAC: macOf(1), DstMAC: ether.Broadcast, Payload: secret}.Frame()
		n[0].dev.Inject(all, ether.Meta{})
		n[1].wants(t, all)
		n[2].wants(t, all)
		back := ethertest.UDP{SrcMAC: macOf(2), DstMAC: macOf(1), Payload: secret}.Frame()
		n[1].dev.Inject(back, ether.Meta{})
		n[0].wants(t, back)
		n[2].wants(t) // known: not flooded

		f := superFrame()
		f.B, f.Meta.SegmentLen = ethertest.TCP{SrcMAC: macOf(1), DstMAC: macOf(2), Payload: make([]byte, 44*1366)}.Frame(), 1366 // the MTU of a sealed overlay
		n[0].dev.Inject(f.B, f.Meta)
		synctest.Wait()
		payload := 0
		for got, ok := n[1].dev.TryNext(); ok; got, ok = n[1].dev.TryNext() { // in as many pieces as there were batches
			payload += len(got.B) - 54
			if got.Meta.Checksum != ether.ChecksumPartial {
				t.Errorf("a piece of a super-frame arrives with %+v, want its checksum partial", got.Meta)
			}
		}
		if payload != 44*1366 {
			t.Errorf("%d bytes of a super-frame arrive, want %d", payload, 44*1366)
		}
		if len(seen) < 3+44 {
			t.Fatalf("%d datagrams", len(seen))
		}
		for _, d := range seen {
			if d[0] != crypto.SealedByte || bytes.Contains(d, secret) {
				t.Fatalf("on the wire: %x", d)
			}
		}
		for i, want := range []uint64{2, 0, 0} { // VTEPs of the flood list
			if i == 0 && len(n[0].bridge.FloodList()) != int(want) {
				t.Errorf("flood list %v, want two", n[0].bridge.FloodList())
			}
		}
	})
}

// Without a session nothing leaves: frames wait, bounded, and go in order once there is one.
func TestSealedWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		net := underlaytest.NewNet(1)
		n, tells := sealedMesh(t, net, 2, Config{})
		defer end(n)
		sent := 0
		net.Tap(func(underlaytest.Datagram) { sent++ })
		// Nobody has proven the key: nobody is flooded to, and nothing waits for
		// anybody; but who proves it soon gets what was flooded (see early).
		n[0].dev.Inject(numbered(macOf(1), ether.Broadcast, 0), ether.Meta{})
		synctest.Wait()
		if len(n[0].bridge.FloodList()) != 0 || sent != 0 || len(tells[0].got(&tells[0].wants)) != 0 {
			t.Fatalf("flood list %v, %d datagrams, wants %v; want none", n[0].bridge.FloodList(), sent, tells[0].wants)
		}
		// The peer has proven it, and there is no session to send under.
		oneWay(t, n, 2, 1)
		for i := range uint32(MaxWaiting + 10) {
			n[0].dev.Inject(numbered(macOf(1), ether.Broadcast, i), ether.Meta{})
		}
		synctest.Wait()
		if sent != 0 {
			t.Fatalf("%d datagrams left without a session", sent)
		}
		if w := tells[0].got(&tells[0].wants); len(w) == 0 || w[0] != "n2/blue" {
			t.Errorf("wants %v, want n2/blue", w)
		}
		n[0].dropped(t, DropNoSession, 11)
		oneWay(t, n, 1, 2)
		n[0].dev.Inject(numbered(macOf(1), ether.Broadcast, 1000), ether.Meta{})
		got := n[1].got()
		if len(got) != MaxWaiting+1 || number(got[0]) != 10 || number(got[MaxWaiting-1]) != MaxWaiting+9 || number(got[MaxWaiting]) != 1000 {
			t.Errorf("%d frames, from %d to %d; want %d in order", len(got), number(got[0]), number(got[len(got)-1]), MaxWaiting+1)
		}
		// Idle: the session is taken back, and frames wait again.
		n[0].tunnel.Send("n2", "blue", nil)
		big := make([]byte, 60000)
		copy(big, numbered(macOf(1), ether.Broadcast, 0))
		for range 6 {
			n[0].dev.Inject(big, ether.Meta{})
		}
		synctest.Wait()
		if w := &n[0].tunnel.peers["n2"].waiting; w.bytes > MaxWaitingBytes || len(w.frames) != 4 {
			t.Errorf("%d frames of %d bytes wait, want 4 of at most %d", len(w.frames), w.bytes, MaxWaitingBytes)
		}
		n[0].bridge.SetPeers(nil)
		if w := n[0].tunnel.peers["n2"]; w != nil {
			t.Error("a peer that is gone is remembered")
		}
	})
}

// Frames of one overlay do not push out another's that wait for the same peer, and
// none is sent when it is of long ago.
func TestSealedWaitsApart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		net := underlaytest.NewNet(1)
		n, _ := sealedMesh(t, net, 2, Config{})
		defer end(n)
		red, err := n[0].tunnel.Add(Config{Name: "red", VNI: testVNI + 1, Sealed: true})
		if err != nil {
			t.Fatal(err)
		}
		red.SetPeers([]Peer{{"n2", vtepOf(2)}})
		blue, _ := n[0].bridge.peers.Load("n2")
		other, _ := red.peers.Load("n2")
		w := &blue.peer.waiting
		hold := func(b *Bridge, at *place, i uint32) {
			w.hold(b, nil, at, &tap.Frame{B: numbered(macOf(1), macOf(2), i)}, 0)
		}
		hold(n[0].bridge, blue, 7)
		for i := range uint32(3 * MaxWaiting) {
			hold(red, other, i)
		}
		if got := w.count(blue); got != 1 || len(w.frames) != MaxWaiting {
			t.Fatalf("%d of %d frames that wait are blue's, want 1 of %d", got, len(w.frames), MaxWaiting)
		}
		oneWay(t, n, 1, 2)
		if got := n[1].got(); len(got) != 1 || number(got[0]) != 7 {
			t.Errorf("%d frames arrive", len(got))
		}
		// Left behind by an epoch: nothing waits, and no BUM frame is for it, until it proves itself anew.
		oneWay(t, n, 2, 1)
		n[0].tunnel.Leave("n2", "blue")
		if l := n[0].bridge.FloodList(); len(l) != 0 {
			t.Errorf("flood list %v, want nobody", l)
		}
		hold(n[0].bridge, blue, 8)
		time.Sleep(6 * time.Second)
		hold(n[0].bridge, blue, 9)
		oneWay(t, n, 1, 2)
		if got := n[1].got(); len(got) != 1 || number(got[0]) != 9 {
			t.Errorf("%d frames arrive, want the one of now", len(got))
		}
		if err := red.Close(); err != nil {
			t.Fatal(err)
		}
	})
}

// Whatever is not sealed by the peer for this overlay goes no further.
func TestSealedFailsClosed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		net := underlaytest.NewNet(1)
		n, tells := sealedMesh(t, net, 2, Config{})
		defer end(n)
		tx, _ := oneWay(t, n, 1, 2)
		victim := n[1]
		f := numbered(macOf(1), ether.Broadcast, 7)
		plain := datagram(testVNI, f)
		seal := func(inner []byte, flags byte) []byte {
			counter, _ := tx.Reserve(1)
			d := make([]byte, len(inner)+crypto.SealedOverhead)
			return d[:tx.Seal(new(crypto.Scratch), d, counter, flags, inner)]
		}

		send(n[0].conn, vtepOf(2), plain) // from a member
		victim.dropped(t, DropPlaintextRefused, 1)
		stranger := net.Conn(vtepOf(9))
		defer stranger.Close()
		send(stranger, vtepOf(2), plain)
		victim.dropped(t, DropPlaintextRefused, 2)
		var refused []string
		victim.bridge.EachPeer(func(peer string, count uint64, _ int) { refused = append(refused, fmt.Sprint(peer, " ", count)) })
		if len(refused) != 1 || refused[0] != "n1 1" {
			t.Errorf("plaintext refused of %v, want n1 1", refused)
		}
		// Behind a sealed datagram in the same train, plaintext is still plaintext.
		s := n[0].conn.NewSender()
		for _, d := range [][]byte{seal(plain, 0), append(bytes.Clone(plain), make([]byte, crypto.SealedOverhead)...)} {
			copy(s.Reserve(len(d)), d)
			s.Commit(vtepOf(2), 0, len(d))
		}
		s.Flush()
		victim.dropped(t, DropPlaintextRefused, 3)
		victim.wants(t, f)

		good := seal(plain, 0)
		for i := range good {
			d := bytes.Clone(good)
			d[i] ^= 0x10
			send(n[0].conn, vtepOf(2), d)
		}
		for i := range good {
			if i > 0 {
				send(n[0].conn, vtepOf(2), good[:i])
			}
		}
		victim.wants(t)
		send(n[0].conn, vtepOf(2), good)
		victim.wants(t, f)
		send(n[0].conn, vtepOf(2), good)
		victim.dropped(t, DropReplay, 1)

		send(n[0].conn, vtepOf(2), seal(datagram(testVNI+1, f), 0))
		victim.dropped(t, DropVNIMismatch, 1)
		send(n[0].conn, vtepOf(2), seal(plain[:5], 0))
		victim.dropped(t, DropVNIMismatch, 2)
		malformed := victim.tunnel.Drops().Count(DropMalformed)
		send(n[0].conn, vtepOf(2), seal(plain, crypto.FlagUnfilled)) // no TCP, no UDP: no checksum
		victim.dropped(t, DropMalformed, malformed+1)
		victim.wants(t)

		// A session that nobody knows: whoever agrees on them hears of it, once a second.
		unknown := victim.tunnel.Drops().Count(DropUnknownSession)
		lost := len(tells[1].got(&tells[1].lost))
		d := bytes.Clone(good)
		d[4] ^= 1
		for range 50 {
			send(n[0].conn, vtepOf(2), d)
		}
		send(stranger, vtepOf(2), d)
		victim.dropped(t, DropUnknownSession, unknown+51)
		if l := tells[1].got(&tells[1].lost); len(l) > lost+1 || len(l) == 0 || l[0] != "n1" {
			t.Errorf("lost %v, want n1 once", l)
		}
		// The peer is none any more: its session has ended.
		d = seal(plain, 0)
		victim.bridge.SetPeers(nil)
		send(n[0].conn, vtepOf(2), d)
		victim.dropped(t, DropUnknownSession, unknown+52)
		victim.wants(t)
		if victim.tunnel.Sessions() != 0 || len(victim.bridge.FDB()) != 1 {
			t.Errorf("%d sessions, FDB %v; want its own MAC only", victim.tunnel.Sessions(), victim.bridge.FDB())
		}
	})
}

// The newest datagram of a session tells where the peer is; an old one, played back, does not.
func TestSealedRoams(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		net := underlaytest.NewNet(1)
		n, tells := sealedMesh(t, net, 2, Config{})
		defer end(n)
		tx, _ := oneWay(t, n, 1, 2)
		oneWay(t, n, 2, 1)
		var captured [][]byte
		for i := range uint32(3) {
			counter, _ := tx.Reserve(1)
			inner := datagram(testVNI, numbered(macOf(1), macOf(2), i))
			d := make([]byte, len(inner)+crypto.SealedOverhead)
			captured = append(captured, d[:tx.Seal(new(crypto.Scratch), d, counter, 0, inner)])
		}
		roaming := netip.AddrPortFrom(netip.MustParseAddr("198.51.100.7"), vxlan.Port)
		elsewhere := net.Conn(netip.AddrPortFrom(roaming.Addr(), 50000))
		defer elsewhere.Close()
		at := func() netip.AddrPort { return n[1].bridge.FloodList()[0] }

		send(n[0].conn, vtepOf(2), captured[1])
		synctest.Wait()
		send(elsewhere, vtepOf(2), captured[0]) // late: it is delivered and moves nobody
		synctest.Wait()
		if at() != vtepOf(1) {
			t.Fatalf("an older datagram moved the peer to %v", at())
		}
		send(elsewhere, vtepOf(2), captured[2])
		synctest.Wait()
		if at() != roaming {
			t.Fatalf("the peer is at %v, want %v: its IP and its advertised port", at(), roaming)
		}
		if m := tells[1].got(&tells[1].moved); len(m) != 1 || m[0] != "n1 198.51.100.7:4789" {
			t.Errorf("moved %v", m)
		}
		send(n[0].conn, vtepOf(2), captured[1]) // replay from where it was
		synctest.Wait()
		if at() != roaming {
			t.Error("a replay moved the peer")
		}
		n[1].bridge.SetPeers([]Peer{{"n1", vtepOf(1)}}) // as it advertised before: no news
		if at() != roaming {
			t.Error("the same advertisement moved the peer back")
		}
		n[1].bridge.SetPeers([]Peer{{"n1", vtepOf(5)}})
		if at() != vtepOf(5) {
			t.Errorf("a new advertisement: the peer is at %v", at())
		}
	})
}

// A peer that seals from another peer's address is not taken for the other, nor
// does it cost more than a few moves a second to be everywhere.
func TestSealedRoamsToOthers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		net := underlaytest.NewNet(1)
		n, tells := sealedMesh(t, net, 3, Config{})
		defer end(n)
		tx, _ := oneWay(t, n, 1, 3)
		from := func(c underlay.Conn) {
			counter, _ := tx.Reserve(1)
			inner := datagram(testVNI, numbered(macOf(1), macOf(3), 0))
			d := make([]byte, len(inner)+crypto.SealedOverhead)
			send(c, vtepOf(3), d[:tx.Seal(new(crypto.Scratch), d, counter, 0, inner)])
			synctest.Wait()
		}
		lost := func() []string { // by a datagram of an unknown session from node 2
			send(n[1].conn, vtepOf(3), append([]byte{crypto.SealedByte}, make([]byte, 99)...))
			synctest.Wait()
			return tells[2].got(&tells[2].lost)
		}
		from(n[1].conn)
		if l := lost(); len(l) != 1 || l[0] != "n2" {
			t.Errorf("while node 1 is at node 2's address, %v have lost sessions, want n2", l)
		}
		from(n[0].conn)
		time.Sleep(2 * time.Second)
		if l := lost(); len(l) != 2 || l[1] != "n2" {
			t.Errorf("after node 1 was at node 2's address, %v have lost sessions, want n2 twice", l)
		}
		before := len(tells[2].got(&tells[2].moved))
		for range 5 * MaxAnswers {
			from(n[1].conn)
			from(n[0].conn)
		}
		if moves := len(tells[2].got(&tells[2].moved)) - before; moves > 2*MaxAnswers {
			t.Errorf("%d moves at once, want %d at most", moves, 2*MaxAnswers)
		}
		if at, ok := n[2].bridge.peers.Load("n1"); !ok || at.address() != vtepOf(1) {
			t.Error("the peer is not where it advertises to be, and was heard from last")
		}
	})
}

// A renewal under traffic changes the session between two frames.
func TestSealedRenewal(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		net := underlaytest.NewNet(1)
		n, _ := sealedMesh(t, net, 2, Config{})
		defer end(n)
		for i := range uint32(100) {
			if i%10 == 0 {
				oneWay(t, n, 1, 2)
			}
			n[0].dev.Inject(numbered(macOf(1), macOf(2), i), ether.Meta{})
		}
		synctest.Wait()
		// The flood list is empty on the sending side until the peer has proven its key.
		oneWay(t, n, 2, 1)
		n[1].dev.Inject(numbered(macOf(2), macOf(1), 0), ether.Meta{})
		synctest.Wait()
		for i := range uint32(100) {
			if i%10 == 0 {
				oneWay(t, n, 1, 2)
			}
			n[0].dev.Inject(numbered(macOf(1), macOf(2), 1000+i), ether.Meta{})
		}
		got := n[1].got()
		if len(got) < 100 || number(got[len(got)-1]) != 1099 {
			t.Errorf("%d frames arrived", len(got))
		}
		for i := 1; i < len(got); i++ {
			if number(got[i]) <= number(got[i-1]) {
				t.Fatalf("frame %d behind %d", number(got[i]), number(got[i-1]))
			}
		}
		if s := n[1].tunnel.Sessions(); s != 20 {
			t.Errorf("%d sessions", s)
		}
	})
}

// Frames that gossip floods are sealed with the overlay's flood key.
func TestSealedFloodGossip(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		net := underlaytest.NewNet(1)
		var flooded [][]byte
		n, _ := sealedMesh(t, net, 2, Config{
			FloodGossip: func(_ vxlan.VNI, b []byte) bool { flooded = append(flooded, bytes.Clone(b)); return true },
		})
		defer end(n)
		oneWay(t, n, 2, 1)
		key := crypto.FloodKey(crypto.NewKey(), "blue", 1)
		for i := range n {
			if err := n[i].bridge.SetFloodKey(key, nameOf(i+1), 1); err != nil {
				t.Fatal(err)
			}
		}
		f := numbered(macOf(1), ether.Broadcast, 5)
		n[0].dev.Inject(f, ether.Meta{})
		synctest.Wait()
		if len(flooded) != 1 || bytes.Contains(flooded[0], f[6:]) {
			t.Fatalf("gossip was given %x", flooded)
		}
		n[1].tunnel.DeliverFlood(vtepOf(1), testVNI, bytes.Clone(flooded[0]))
		n[1].wants(t, f)
		n[1].tunnel.DeliverFlood(vtepOf(1), testVNI, bytes.Clone(flooded[0]))
		n[1].dropped(t, DropReplay, 1)
		n[1].tunnel.DeliverFlood(vtepOf(1), testVNI, f) // plaintext
		n[1].dropped(t, DropForged, 1)
		n[1].bridge.SetPeers(nil)
		n[0].dev.Inject(numbered(macOf(1), ether.Broadcast, 6), ether.Meta{})
		synctest.Wait()
		n[1].tunnel.DeliverFlood(vtepOf(1), testVNI, flooded[1])
		n[1].wants(t)

		n[0].bridge.DropFloodKey() // who has it no more floods nothing, and hears nothing
		n[0].dev.Inject(numbered(macOf(1), ether.Broadcast, 7), ether.Meta{})
		synctest.Wait()
		if len(flooded) != 2 {
			t.Errorf("without the key gossip was given %x", flooded[2:])
		}
		n[0].tunnel.DeliverFlood(vtepOf(2), testVNI, flooded[1])
		n[0].dropped(t, DropUnknownSession, 1)
	})
}

// hotSealed is a sealed bridge with one device and one peer, and the two halves of a session with itself.
func hotSealed(tb testing.TB, c crypto.Cipher) (*Tunnel, *Port, *crypto.Sealer) {
	tb.Helper()
	t := NewTunnel(TunnelConfig{Conn: underlaytest.NewNet(1).Conn(vtepOf(1))})
	b, err := t.Add(Config{Name: "blue", VNI: testVNI, Sealed: true})
	if err != nil {
		tb.Fatal(err)
	}
	p, err := b.AddPort(&nullDevice{mac: macOf(1)})
	if err != nil {
		tb.Fatal(err)
	}
	b.SetPeers([]Peer{{"n2", vtepOf(2)}})
	key := crypto.NewKey()
	rx, err := crypto.NewOpener(key, c, 1)
	if err != nil {
		tb.Fatal(err)
	}
	tx, err := crypto.NewSealer(key, c, 1)
	if err != nil {
		tb.Fatal(err)
	}
	if err := t.Receive("n2", "blue", rx); err != nil {
		tb.Fatal(err)
	}
	t.Send("n2", "blue", tx)
	at, _ := b.peers.Load("n2")
	b.fdb.learn(macOf(2), at, 0)
	return t, p, tx
}

// sealedTrain seals the datagrams of a train, as if the peer had sent them.
func sealedTrain(tb testing.TB, tx *crypto.Sealer, plain, into *underlay.Slot, scratch *crypto.Scratch) {
	into.Src, into.SegmentLen, into.B = plain.Src, plain.SegmentLen+crypto.SealedOverhead, into.B[:0]
	for rest := plain.B; len(rest) > 0; {
		n := min(plain.SegmentLen, len(rest))
		counter, ok := tx.Reserve(1)
		if !ok {
			tb.Fatal("used up")
		}
		at := len(into.B)
		into.B = into.B[:at+n+crypto.SealedOverhead]
		tx.Seal(scratch, into.B[at:], counter, crypto.FlagUnfilled, rest[:n])
		rest = rest[n:]
	}
}

// withHead is f as a TAP hands it out: with room before it.
func withHead(f tap.Frame) tap.Frame {
	g := tap.FrameAt(make([]byte, tap.Headroom+len(f.B)), len(f.B))
	copy(g.B, f.B)
	g.Meta = f.Meta
	return g
}

func TestSealedNoAllocs(t *testing.T) {
	for _, c := range []crypto.Cipher{crypto.ChaCha20Poly1305, crypto.AES256GCM} {
		tunnel, p, tx := hotSealed(t, c)
		l := &lane{tx: &nullSender{}}
		in := newIngress(tunnel)
		scratch := new(crypto.Scratch)
		for name, f := range hotFrames() {
			pristine := withHead(f)
			f := withHead(f)
			if n := testing.AllocsPerRun(100, func() {
				copy(f.Head, pristine.Head) // sealing in place uses it up
				p.forward(l, &f)
			}); n != 0 {
				t.Errorf("%v, %s: %v allocations to send, want 0", c, name, n)
			}
			plain := trainOf(t, pristine)
			slot := underlay.Slot{B: make([]byte, 0, 2*len(plain.B))}
			in.batch.Slots = []underlay.Slot{slot}
			if n := testing.AllocsPerRun(100, func() {
				sealedTrain(t, tx, &plain, &in.batch.Slots[0], scratch)
				in.handle()
			}); n != 0 {
				t.Errorf("%v, %s: %v allocations to receive, want 0", c, name, n)
			}
		}
		if d := tunnel.Drops().Count(DropForged) + tunnel.Drops().Count(DropReplay) + tunnel.Drops().Count(DropSealedMalformed); d != 0 {
			t.Errorf("%d datagrams were not opened", d)
		}
	}
}

func BenchmarkForwardSealed(b *testing.B) {
	for _, c := range []crypto.Cipher{crypto.ChaCha20Poly1305, crypto.AES256GCM} {
		for name, f := range hotFrames() {
			b.Run(fmt.Sprint(c, "/", name), func(b *testing.B) {
				_, p, _ := hotSealed(b, c)
				l := &lane{tx: &nullSender{}}
				pristine, f := withHead(f), withHead(f)
				b.SetBytes(int64(len(f.B)))
				b.ReportAllocs()
				for b.Loop() {
					copy(f.Head[:min(200, len(f.Head))], pristine.Head) // its headers, which sealing in place moves on
					p.forward(l, &f)
				}
			})
		}
	}
}
