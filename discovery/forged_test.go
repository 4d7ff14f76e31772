package discovery

import (
	"encoding/binary"
	"encoding/hex"
	"io"
	"maps"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/serf/serf"
)

// The few forms of msgpack that Serf's messages take: maps of up to 15, short
// and long strings, 8, 16 and 32 bits.
func packMap(n int) []byte { return []byte{0x80 | byte(n)} }

func packText(s string) []byte {
	if len(s) < 32 {
		return append([]byte{0xa0 | byte(len(s))}, s...)
	}
	return append([]byte{0xda, byte(len(s) >> 8), byte(len(s))}, s...)
}

func packInt(n uint32) []byte {
	if n < 128 {
		return []byte{byte(n)}
	}
	return binary.BigEndian.AppendUint32([]byte{0xce}, n)
}

// packTags is what Serf makes of tags; the order of the keys is free.
func packTags(tags map[string]string) []byte {
	b := append([]byte{0xff}, packMap(len(tags))...)
	for _, k := range slices.Sorted(maps.Keys(tags)) {
		b = append(append(b, packText(k)...), packText(tags[k])...)
	}
	return b
}

// packFlood is the datagram that carries a flood to one member.
func packFlood(time uint32, payload []byte) []byte {
	return slices.Concat([]byte{8, 3}, packMap(4), packText("LTime"), packInt(time),
		packText("Name"), packText(floodEvent), packText("Payload"), packText(string(payload)), packText("CC"), []byte{0xc2})
}

// forgery is a node that is nothing but one datagram.
type forgery struct {
	name   string
	gossip netip.AddrPort
	card   card
}

func (f forgery) tags() map[string]string {
	d := &Discovery{cfg: Config{VTEP: f.card.vtep}, boot: f.card.boot}
	return d.tags(&list{digest: f.card.digest, overlays: make([]Overlay, f.card.count)})
}

// alive is memberlist's message that f is there.
func (f forgery) alive() []byte {
	ip := f.gossip.Addr().As4()
	return slices.Concat([]byte{4}, packMap(6), packText("Incarnation"), packInt(1), packText("Node"), packText(f.name),
		packText("Addr"), packText(string(ip[:])), packText("Port"), packInt(uint32(f.gossip.Port())),
		packText("Meta"), packText(string(packTags(f.tags()))), packText("Vsn"), packText("\x01\x05\x02\x02\x05\x04"))
}

// hit sends n a datagram from nowhere.
func (n *testNode) hit(b []byte) {
	n.t.Helper()
	c, err := net.Dial("udp", n.self.String())
	if err != nil {
		n.t.Fatal(err)
	}
	defer c.Close()
	if _, err := c.Write(b); err != nil {
		n.t.Fatal(err)
	}
}

// answers serves f's exchange at the address that it returns, as a and l say.
func answers(t *testing.T, a answer, l *list) netip.AddrPort {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	t.Cleanup(func() {
		_ = ln.Close()
		<-ended
	})
	go func() {
		defer close(ended)
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			var req [3]byte
			_ = c.SetDeadline(time.Now().Add(time.Second))
			if _, err := io.ReadFull(c, req[:]); err == nil && req[0] == exchangeMagic {
				out, body := a, []byte(nil)
				if req[2] == wantList {
					out.length, body = uint32(len(l.encoded)), l.encoded
				}
				_, _ = c.Write(append(out.append(nil), body...))
			}
			_ = c.Close()
		}
	}()
	return ln.Addr().(*net.TCPAddr).AddrPort()
}

// closedPort returns a loopback address at which nobody answers.
func closedPort(t *testing.T) netip.AddrPort {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	return ln.Addr().(*net.TCPAddr).AddrPort()
}

// One forged datagram makes nobody a member that is sent anything, whether it
// names an address at which nobody answers, another node's, or another node.
func TestForgedAliveIsNotConfirmed(t *testing.T) {
	t.Parallel()
	var got floods
	c := testConfig("a")
	c.OnFlood = got.take
	a := start(t, c)
	b := start(t, testConfig("b", a))
	for _, n := range []*testNode{a, b} {
		if err := n.SetOverlays(manyOverlays(3, "none")); err != nil {
			t.Fatal(err)
		}
	}
	meet(t, a, b)
	a.await(3*time.Second, "b's overlays", func() bool { return len(a.member("b").Overlays) == 3 })
	own := a.carried.Load() // its digest is the one that the forger copies
	claim := card{boot: 7, digest: own.digest, count: len(own.overlays)}
	nobody, masked := forgery{"nobody", closedPort(t), claim}, forgery{"masked", b.self, claim}
	liar := forgery{"liar", netip.AddrPort{}, claim}
	nobody.card.vtep = netip.MustParseAddrPort("127.0.0.1:999")
	masked.card.vtep = b.cfg.VTEP
	liar.card.vtep = netip.MustParseAddrPort("127.0.0.1:998")
	liar.gossip = answers(t, answer{name: "liar", vtep: nobody.card.vtep, boot: 7, digest: own.digest}, own)
	far := forgery{"far", closedPort(t), claim}
	far.card.vtep = netip.MustParseAddrPort("203.0.113.9:4789")
	for _, f := range []forgery{nobody, masked, liar, far} {
		failed := a.Stats().PullsFailed
		a.hit(f.alive())
		if f.name == "far" {
			a.await(3*time.Second, "far is left out", func() bool { return strings.Contains(a.log.String(), "not at its gossip address") })
			continue
		}
		a.sees(3*time.Second, f.name, Alive)
		a.await(3*time.Second, "two failed exchanges", func() bool { return a.Stats().PullsFailed >= failed+2 })
		if m := a.member(f.name); m.Confirmed || m.Overlays != nil {
			t.Errorf("%s is a member by one datagram: %+v", f.name, m)
		}
	}
	a.hit(packFlood(1, (&flood{boot: 7, vni: own.overlays[0].VNI, from: nobody.card.vtep, frame: []byte("frame")}).append(nil)))
	a.await(3*time.Second, "the flood is refused", func() bool { return a.Stats().FloodsRefused == 1 })
	if n := got.count(); n != 0 {
		t.Errorf("%d floods of a forged member were delivered", n)
	}
	if m := a.member("b"); !m.Confirmed || len(m.Overlays) != 3 {
		t.Errorf("b suffered: %+v", m)
	}
}

// A peer that is made of this file's bytes alone is confirmed, and its floods
// are taken if they are of now, of this boot and in an overlay that it carries.
func TestHandMadePeer(t *testing.T) {
	t.Parallel()
	var got floods
	c := testConfig("a")
	c.OnFlood = got.take
	a := start(t, c)
	l, err := newList(manyOverlays(2, "none")) // VNI 100 and 101
	if err != nil {
		t.Fatal(err)
	}
	const clock = 10_000_000 // ten seconds
	f := forgery{name: "b", card: card{vtep: netip.MustParseAddrPort("127.0.0.1:999"), boot: 7, digest: l.digest, count: 2}}
	f.gossip = answers(t, answer{name: "b", vtep: f.card.vtep, boot: 7, clock: clock, digest: l.digest}, l)
	a.hit(f.alive())
	a.await(2*time.Second, "b is confirmed", func() bool { return a.member("b").Confirmed })
	if m := a.member("b"); m.VTEP != f.card.vtep || !slices.Equal(m.Overlays, l.overlays) {
		t.Errorf("a sees %+v", m)
	}
	good := flood{boot: 7, sent: clock, vni: 101, from: f.card.vtep, frame: []byte("frame")}
	for i, change := range []func(*flood){
		func(f *flood) { f.sent -= 6_100_000 },
		func(f *flood) { f.sent += 10_000_000 },
		func(f *flood) { f.boot++ },
		func(f *flood) { f.vni = 102 },
		func(f *flood) { f.from = netip.MustParseAddrPort("127.0.0.1:998") },
	} {
		bad := good
		change(&bad)
		a.hit(packFlood(uint32(i+1), bad.append(nil)))
		a.await(time.Second, "a refused flood", func() bool { return a.Stats().FloodsRefused == uint64(i+1) })
	}
	a.hit(packFlood(100, good.append(nil)))
	a.await(time.Second, "a flood", func() bool { return got.count() == 1 })
	if f := got.got[0]; f.vni != 101 || f.from != good.from || string(f.frame) != "frame" {
		t.Errorf("got %v", f)
	}
}

// What a confirmed member may change of itself without being asked again.
func TestConfirmedUntil(t *testing.T) {
	base := func() serf.Member {
		f := forgery{card: card{vtep: netip.MustParseAddrPort("192.0.2.1:4789"), boot: 7, count: 1}}
		return serf.Member{Name: "b", Addr: []byte{192, 0, 2, 1}, Port: 7946, Tags: f.tags(), Status: serf.StatusAlive}
	}
	for what, tt := range map[string]struct {
		change func(*serf.Member)
		keeps  bool
	}{
		"nothing":  {func(*serf.Member) {}, true},
		"leaving":  {func(m *serf.Member) { m.Status = serf.StatusLeaving }, true},
		"its list": {func(m *serf.Member) { m.Tags[tagDigest] = "0102030405060708" }, true},
		"a boot":   {func(m *serf.Member) { m.Tags[tagBoot] = "00000008" }, false},
		"its UDP port": {func(m *serf.Member) {
			m.Tags[tagVTEP] = "192.0.2.1:4790"
		}, false},
		"its address": {func(m *serf.Member) {
			m.Addr[3], m.Tags[tagVTEP] = 2, "192.0.2.2:4789"
		}, false},
		"its gossip port": {func(m *serf.Member) { m.Port++ }, false},
		"to failed":       {func(m *serf.Member) { m.Status = serf.StatusFailed }, false},
		"to left":         {func(m *serf.Member) { m.Status = serf.StatusLeft }, false},
		"its version":     {func(m *serf.Member) { m.Tags[tagVersion] = "9" }, false},
	} {
		d := &Discovery{cfg: testConfig("a"), log: quiet}
		p := &peer{wake: make(chan struct{}, 1)}
		update := func(m serf.Member) {
			now, _ := d.sight(m, time.Now())
			d.become(m.Name, p, now)
		}
		update(base())
		p.confirmed = true
		m := base()
		tt.change(&m)
		update(m)
		update(base())
		if p.confirmed != tt.keeps {
			t.Errorf("after a change of %s and back: confirmed %v, want %v", what, p.confirmed, tt.keeps)
		}
	}
}

// A flood of another time has its sender asked again, but not at once.
func TestFresh(t *testing.T) {
	now := time.Now()
	for _, tt := range []struct {
		age   time.Duration // of the flood
		asked time.Duration // ago
		fresh bool
		again bool
	}{
		{0, time.Minute, true, false},
		{maxFloodAge, time.Minute, true, false},
		{maxFloodAge + time.Second, time.Minute, false, true},
		{maxFloodAge + time.Second, recheckMin - time.Second, false, false},
		{-maxFloodAge, time.Minute, true, false},
		{-maxFloodAge - time.Second, time.Minute, false, true},
		{-1000 * time.Hour, time.Minute, false, true},
	} {
		const sent = 3_600_000_000
		p := &peer{
			status: Alive, confirmed: true, list: new(list),
			asked: now.Add(-tt.asked), recheck: now.Add(time.Hour), zero: now.Add(-tt.age - ticks(sent)),
		}
		if got := p.fresh(sent, now); got != tt.fresh || p.lacking(now) != tt.again {
			t.Errorf("%+v: fresh %v, asked again %v", tt, got, p.lacking(now))
		}
	}
}

// The vectors of docs/wire.md.
func TestWireVectors(t *testing.T) {
	l, err := newList([]Overlay{{VNI: 100, Name: "blue", Encryption: "none"}, {VNI: 66303, Name: "Red-2", Encryption: "required"}})
	if err != nil {
		t.Fatal(err)
	}
	d := &Discovery{cfg: Config{Name: "pi4", VTEP: netip.MustParseAddrPort("192.0.2.1:4789")}, boot: 0x0a0b0c0d}
	d.carried.Store(l)
	const clock = 0x000102030405
	tags := d.tags(l)
	if want := map[string]string{"v": "1", "t": "192.0.2.1:4789", "b": "0a0b0c0d", "d": "ae20ce11e74bb3e1", "n": "2"}; !maps.Equal(tags, want) {
		t.Errorf("tags %v, want %v", tags, want)
	}
	a := answer{name: "pi4", vtep: d.cfg.VTEP, boot: d.boot, clock: clock, digest: l.digest, length: uint32(len(l.encoded))}
	f := flood{boot: d.boot, sent: clock, vni: 100, from: d.cfg.VTEP, frame: []byte{0xfe, 0xed}}
	for _, tt := range []struct {
		what string
		got  []byte
		want string
	}{
		{"tags", packTags(tags), "ff85" + "a162a83061306230633064" + "a164b061653230636531316537346262336531" +
			"a16ea132" + "a174ae3139322e302e322e313a34373839" + "a176a131"},
		{"answer", append(a.append(nil), l.encoded...), "5401" + "0a0b0c0d" + "000102030405" + "ae20ce11e74bb3e1" +
			"04c000020112b5" + "03706934" + "00000013" + "0000640004626c7565" + "0102ff01055265642d32"},
		{"flood", packFlood(1, f.append(nil)), "0803" + "84" + "a54c54696d6501" + "a44e616d65a166" +
			"a75061796c6f6164" + "b7" + "01" + "0a0b0c0d" + "000102030405" + "000064" + "04c000020112b5" + "feed" + "a24343c2"},
	} {
		if got := hex.EncodeToString(tt.got); got != tt.want {
			t.Errorf("%s: %s, want %s", tt.what, got, tt.want)
		}
	}
	// The longest flood is as long as Serf takes: its Lamport time may take 9 bytes.
	f.from, f.frame = netip.MustParseAddrPort("[2001:db8::1]:4789"), make([]byte, MaxFlood)
	if n := len(packFlood(1, f.append(nil))) - 1 + 8; n != eventBytes {
		t.Errorf("the longest event is %d bytes, want %d", n, eventBytes)
	}
}
