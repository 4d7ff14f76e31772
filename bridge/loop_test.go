package bridge

import (
	"bytes"
	"context"
	"encoding/hex"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/tulle-net/tulle/ether"
	"github.com/tulle-net/tulle/ether/ethertest"
	"github.com/tulle-net/tulle/tap/taptest"
	"github.com/tulle-net/tulle/underlay/underlaytest"
)

const outsider ether.MAC = 0x02aa_0000_0001

// lan connects devices as a bridge without a spanning tree does, and stations that
// speak by say. A frame takes 0.1 ms.
type lan struct {
	devs []*taptest.Device
	done sync.WaitGroup
	end  context.CancelFunc

	mu     sync.Mutex
	frames int
	heard  []string // texts of what stations have heard
}

func newLAN(t *testing.T, devs ...*taptest.Device) *lan {
	ctx, cancel := context.WithCancel(t.Context())
	l := &lan{devs: devs, end: cancel}
	for i, d := range devs {
		l.done.Go(func() {
			for {
				f, err := d.Next(ctx)
				if err != nil {
					return
				}
				time.Sleep(100 * time.Microsecond)
				l.pass(i, f.B)
			}
		})
	}
	return l
}

func (l *lan) pass(from int, f []byte) {
	l.mu.Lock()
	l.frames++
	if _, text, ok := strings.Cut(string(f), "say "); ok {
		l.heard = append(l.heard, text)
	}
	l.mu.Unlock()
	for i, d := range l.devs {
		if i != from {
			d.Inject(slices.Clone(f), ether.Meta{})
		}
	}
}

func (l *lan) count() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.frames
}

func (l *lan) said() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return strings.Join(l.heard, " ")
}

func (l *lan) say(text string) { l.pass(-1, frame(outsider, ether.Broadcast, "say "+text)) }

func (l *lan) stop() {
	l.end()
	l.done.Wait()
}

// loopNet is nodes that note what they say of loops.
type loopNet struct {
	t      *testing.T
	n      []*testNode
	mu     sync.Mutex
	events []LoopEvent
}

func loopMesh(t *testing.T, count int) *loopNet {
	l := &loopNet{t: t}
	net := underlaytest.NewNet(1)
	for i := 1; i <= count; i++ {
		cfg := Config{Loop: func(e LoopEvent) {
			l.mu.Lock()
			defer l.mu.Unlock()
			l.events = append(l.events, e)
		}}
		l.n = append(l.n, startWith(t, net, i, cfg, TunnelConfig{Node: nodeName(i)}))
	}
	for i := range l.n {
		l.n[i].meet(others(count, i+1))
		var peers []Peer
		for j := 1; j <= count; j++ {
			if j != i+1 {
				peers = append(peers, Peer{nodeName(j), vtepOf(j)})
			}
		}
		l.n[i].bridge.SetSnooped(peers)
	}
	return l
}

func nodeName(i int) string { return "node" + string(rune('0'+i)) }

func (l *loopNet) said() []LoopEvent {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.Clone(l.events)
}

func (l *loopNet) wants(events ...LoopEvent) {
	l.t.Helper()
	for i := range events {
		events[i].Overlay = "blue"
	}
	if got := l.said(); !slices.Equal(got, events) {
		l.t.Fatalf("said %v, want %v", got, events)
	}
}

// TestLoopOfOneNode: two ports of a node in one LAN. The younger is blocked, the storm
// ends, traffic goes on by the other; when the LAN is taken apart, the port is opened.
func TestLoopOfOneNode(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := loopMesh(t, 2)
		defer end(l.n)
		second := taptest.New("blue1", macOf(11), 1450, 1)
		if _, err := l.n[0].bridge.AddPort(second); err != nil {
			t.Fatal(err)
		}
		lan := newLAN(t, l.n[0].dev, second)
		lan.say("hello")
		time.Sleep(3 * time.Second)
		l.wants(LoopEvent{Port: "blue1", Other: "port blue0", Blocked: true})
		was := lan.count()
		time.Sleep(20 * time.Second)
		if now := lan.count(); now-was > 2*12 { // probes, each by both ports at most
			t.Errorf("%d frames in 20 s after the storm's end", now-was)
		}
		if b := l.n[0].bridge.Blocked(); len(b) != 1 || b[0].Port != "blue1" || b[0].Other != "port blue0" || b[0].Since.IsZero() {
			t.Errorf("Blocked = %+v", b)
		}
		l.n[1].got()
		lan.say("traffic")
		if got := l.n[1].got(); len(got) != 1 || !bytes.Contains(got[0], []byte("traffic")) {
			t.Errorf("the other node got %x, want one frame", got)
		}
		l.n[1].dev.Inject(frame(macOf(2), ether.Broadcast, "say back"), ether.Meta{})
		time.Sleep(time.Second)
		if n := strings.Count(lan.said(), "back"); n != 1 {
			t.Errorf("stations of the LAN heard %d answers, want one", n)
		}
		if l.n[0].tunnel.Drops().Count(DropPortBlocked) == 0 {
			t.Error("nothing is counted as blocked")
		}
		// As long as the probes come back it stays so: no storm each minute.
		time.Sleep(10 * time.Minute)
		l.wants(LoopEvent{Port: "blue1", Other: "port blue0", Blocked: true})

		lan.stop()
		time.Sleep(57 * time.Second)
		l.wants(LoopEvent{Port: "blue1", Other: "port blue0", Blocked: true})
		time.Sleep(5 * time.Second)
		l.wants(LoopEvent{Port: "blue1", Other: "port blue0", Blocked: true}, LoopEvent{Port: "blue1", Other: "port blue0"})
		l.n[0].got()
		second.Inject(frame(macOf(11), ether.Broadcast, "again"), ether.Meta{})
		if got := l.n[0].got(); len(got) != 1 {
			t.Errorf("%d frames pass the port that was opened, want one", len(got))
		}
		if len(l.n[0].bridge.Blocked()) != 0 {
			t.Error("the port is listed as blocked still")
		}
	})
}

// TestLoopOfTwoNodes: ports of two nodes in one LAN. One of them, that of the larger
// name, leaves the LAN to the other.
func TestLoopOfTwoNodes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := loopMesh(t, 3)
		defer end(l.n)
		lan := newLAN(t, l.n[0].dev, l.n[1].dev)
		defer lan.stop()
		lan.say("hello")
		time.Sleep(5 * time.Second)
		l.wants(LoopEvent{Port: "blue0", Other: "node node1", Blocked: true})
		if len(l.n[1].bridge.Blocked()) != 1 || len(l.n[0].bridge.Blocked()) != 0 {
			t.Error("not the port of the larger name is blocked")
		}
		was := lan.count()
		time.Sleep(10 * time.Second)
		if now := lan.count(); now-was > 15 {
			t.Errorf("%d frames in 10 s after the storm's end", now-was)
		}
		l.n[2].got()
		lan.say("traffic")
		time.Sleep(time.Second)
		if got := l.n[2].got(); len(got) != 1 {
			t.Errorf("the third node got %d frames, want one", len(got))
		}
	})
}

// A node that is no peer in the overlay may be there: nobody gives way to it.
func TestLoopOfStrangers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := loopMesh(t, 2)
		defer end(l.n)
		l.n[1].bridge.SetSnooped(nil)
		l.n[1].dev.Inject(l.n[0].tunnel.appendProbe(nil, loopProbe{l.n[0].tunnel.prover.id, testVNI, 1, 0, "node1"}), ether.Meta{})
		l.n[1].dev.Inject(l.n[0].tunnel.appendProbe(nil, loopProbe{1, testVNI, 1, 0, "aaaa"}), ether.Meta{})
		synctest.Wait()
		l.wants()
	})
}

// A foreign VTEP that brings a probe back has a way around us: the port that it left by
// is blocked.
func TestLoopByVTEP(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := loopMesh(t, 2)
		defer end(l.n)
		l.n[0].dev.Inject(frame(outsider, ether.Broadcast, "hello"), ether.Meta{})
		time.Sleep(3 * time.Second)
		var probe []byte
		for _, f := range l.n[0].got() {
			if ether.MACFrom(f) == loopGroup {
				probe = f
			}
		}
		if probe == nil {
			t.Fatal("no probe was sent to a port with a stranger")
		}
		l.n[1].got()
		send(l.n[1].conn, vtepOf(1), datagram(testVNI, probe))
		synctest.Wait()
		l.wants(LoopEvent{Port: "blue0", Other: "VTEP " + vtepOf(2).String(), Blocked: true})
		for _, f := range l.n[1].got() {
			if ether.MACFrom(f) == loopGroup {
				t.Error("a probe came through the tunnel")
			}
		}
	})
}

// An overlay that comes later, when nothing else is to be done, is looked after at once.
func TestLaterOverlay(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := loopMesh(t, 1)
		defer end(l.n)
		time.Sleep(time.Minute)
		b, err := l.n[0].tunnel.Add(Config{Name: "red", VNI: 200, Snooping: true, Loop: func(LoopEvent) {}})
		if err != nil {
			t.Fatal(err)
		}
		defer b.Close()
		d := taptest.New("red0", macOf(9), 1450, 1)
		if _, err := b.AddPort(d); err != nil {
			t.Fatal(err)
		}
		time.Sleep(50 * time.Millisecond)
		if n := len(drain(d)); n != 2 {
			t.Errorf("a new port got %d queries, want one of each family", n)
		}
		d.Inject(frame(outsider, ether.Broadcast, "hello"), ether.Meta{})
		time.Sleep(50 * time.Millisecond)
		if f := drain(d); len(f) != 1 || ether.MACFrom(f[0]) != loopGroup {
			t.Errorf("after a stranger came there are %x, want a probe", f)
		}
	})
}

// A LAN that sends back what it gets is a loop of one port.
func TestLoopOfOnePort(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := loopMesh(t, 1)
		defer end(l.n)
		l.n[0].dev.Inject(frame(outsider, ether.Broadcast, "hello"), ether.Meta{})
		time.Sleep(time.Second)
		for _, f := range l.n[0].got() {
			l.n[0].dev.Inject(f, ether.Meta{})
		}
		synctest.Wait()
		l.wants(LoopEvent{Port: "blue0", Other: "port blue0", Blocked: true})
	})
}

// What is no probe of ours blocks nothing.
func TestForgedProbes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := loopMesh(t, 2)
		defer end(l.n)
		n := l.n[0]
		second := taptest.New("blue1", macOf(11), 1450, 1)
		if _, err := n.bridge.AddPort(second); err != nil {
			t.Fatal(err)
		}
		time.Sleep(10 * time.Second)
		now := n.tunnel.now()
		good := loopProbe{n.tunnel.prover.id, testVNI, 1, now, nodeName(1)}
		change := func(at int) []byte {
			b := n.tunnel.appendProbe(nil, good)
			b[at] ^= 1
			return b
		}
		whole := n.tunnel.appendProbe(nil, good)
		refused := uint64(0)
		for at := ethernetHeader + 8 + 8; at < len(whole); at++ { // behind magic and id
			second.Inject(change(at), ether.Meta{})
			refused++
			n.dropped(t, DropLoopProbe, refused)
		}
		for cut := ethernetHeader + 8; cut < len(whole); cut++ {
			second.Inject(whole[:cut], ether.Meta{})
			refused++
			n.dropped(t, DropLoopProbe, refused)
		}
		old, other, gone := good, good, good
		old.sent, other.vni, gone.port = now-probeAge-1, testVNI+1, 99
		for _, p := range []loopProbe{old, other, gone} {
			second.Inject(n.tunnel.appendProbe(nil, p), ether.Meta{})
		}
		n.dropped(t, DropLoopProbe, refused)
		n.wants(t) // none of them goes further
		l.n[1].wants(t)
		l.wants()
		// Other frames of that group and type are none of our business.
		mine := ethertest.Ethernet(loopGroup, macOf(11), nil, loopEtherType, make([]byte, 60))
		second.Inject(mine, ether.Meta{})
		n.wants(t, mine)
		second.Inject(whole, ether.Meta{})
		synctest.Wait()
		l.wants(LoopEvent{Port: "blue1", Other: "port blue0", Blocked: true})
	})
}

// Ports with nobody but the device's own station are left alone.
func TestNoProbes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := loopMesh(t, 1)
		defer end(l.n)
		l.n[0].dev.Inject(frame(macOf(1), ether.Broadcast, "hello"), ether.Meta{})
		time.Sleep(time.Minute)
		l.n[0].wants(t)
		l.n[0].dev.Inject(frame(outsider, ether.Broadcast, "hello"), ether.Meta{})
		time.Sleep(time.Minute)
		if n := len(l.n[0].got()); n < 29 || n > 32 {
			t.Errorf("%d probes in a minute, want one each 2 s", n)
		}
		time.Sleep(6 * time.Minute) // the stranger is forgotten
		l.n[0].got()
		time.Sleep(time.Minute)
		l.n[0].wants(t)
	})
}

// The bytes that docs/wire.md shows.
func TestProbeBytes(t *testing.T) {
	tunnel := NewTunnel(TunnelConfig{Conn: underlaytest.NewNet(1).Conn(netip.MustParseAddrPort("192.0.2.1:4789"))})
	tunnel.prover.id = 0x0102030405060708
	tunnel.prover.key = [32]byte{}
	got := tunnel.appendProbe(nil, loopProbe{tunnel.prover.id, 100, 7, 1234, "pi4"})
	want, _ := hex.DecodeString(strings.ReplaceAll("0354756c6c65 0654756c6c65 88b5 54756c6c654c5001 0102030405060708 00000064 00000007 00000000000004d2 03 706934 "+
		"458e069ab4af4aa553f556bd2c5e44cd", " ", ""))
	if !bytes.Equal(got, want) {
		t.Errorf("probe %x, want %x", got, want)
	}
	if p, is, ok := tunnel.parseProbe(got); !is || !ok || p.name != "pi4" || p.port != 7 || p.vni != 100 || p.sent != 1234 {
		t.Errorf("it is read back as %+v, %v, %v", p, is, ok)
	}
}

func FuzzProbe(f *testing.F) {
	tunnel := NewTunnel(TunnelConfig{Conn: underlaytest.NewNet(1).Conn(netip.MustParseAddrPort("192.0.2.1:4789"))})
	good := tunnel.appendProbe(nil, loopProbe{tunnel.prover.id, 100, 7, 1234, "pi4"})
	f.Add(good)
	f.Add(good[:40])
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) < ethernetHeader {
			return
		}
		p, is, ok := tunnel.parseProbe(b)
		if ok && !is || len(p.name) > maxName {
			t.Errorf("parseProbe(%x) = %+v, %v, %v", b, p, is, ok)
		}
		if ok && p.id == tunnel.prover.id && !bytes.HasPrefix(b[ethernetHeader:], tunnel.appendProbe(nil, p)[ethernetHeader:]) {
			t.Errorf("%x is believed, which we did not make", b)
		}
	})
}
