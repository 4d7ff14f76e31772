package discovery

import (
	"bytes"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/tulle-net/tulle/vxlan"
)

// floods collects what OnFlood got.
type floods struct {
	mu  sync.Mutex
	got []flood
}

func (f *floods) take(from netip.AddrPort, vni vxlan.VNI, frame []byte) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.got = append(f.got, flood{vni: vni, from: from, frame: bytes.Clone(frame)})
	clear(frame) // it is the callee's: what Serf passes on must not suffer
}

func (f *floods) count() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return len(f.got)
}

func TestFloodReachesEachOnce(t *testing.T) {
	t.Parallel()
	var got [3]floods
	config := func(i int, name string, seeds ...*testNode) Config {
		c := testConfig(name, seeds...)
		c.OnFlood = got[i].take
		return c
	}
	a := start(t, config(0, "a"))
	b := start(t, config(1, "b", a))
	third := start(t, config(2, "c", b))
	for _, n := range []*testNode{a, b, third} {
		if err := n.SetOverlays([]Overlay{{7, "x", "none"}, {9, "y", "none"}, {vxlan.MaxVNI, "z", "none"}}); err != nil {
			t.Fatal(err)
		}
	}
	meet(t, a, b, third)
	for _, n := range []*testNode{a, b, third} {
		n.await(3*time.Second, "the lists", func() bool {
			return !slices.ContainsFunc(n.Members(), func(m Member) bool { return len(m.Overlays) != 3 })
		})
	}

	same := bytes.Repeat([]byte{0xaa}, 60)
	big := bytes.Repeat([]byte{0xbb}, MaxFlood)
	for _, f := range [][]byte{same, same, big} { // two frames that are the same are two frames
		if !a.Flood(vxlan.MaxVNI, f) {
			t.Fatalf("Flood of %d bytes was refused", len(f))
		}
	}
	if !third.Flood(7, same) {
		t.Fatal("Flood was refused")
	}
	for i, n := range []*testNode{a, b, third} {
		want := []int{1, 4, 3}[i]
		n.await(3*time.Second, "all floods", func() bool { return got[i].count() == want })
	}
	// A node that joins later gets none of them, nor does anybody get one again.
	var late floods
	c := testConfig("late", a)
	c.OnFlood = late.take
	d := start(t, c)
	meet(t, a, b, third, d)
	if !a.Flood(9, same) {
		t.Fatal("Flood was refused")
	}
	d.await(3*time.Second, "the new flood", func() bool { return late.count() > 0 })
	for i, n := range []*testNode{b, third} {
		n.await(3*time.Second, "the new flood", func() bool { return got[i+1].count() == []int{5, 4}[i] })
	}
	if got := late.got; len(got) != 1 || got[0].vni != 9 {
		t.Errorf("the late node got %v", got)
	}
	for _, f := range got[1].got[:4] {
		from, vni, frame := a.cfg.VTEP, vxlan.MaxVNI, same
		if f.vni == 7 {
			from, vni = third.cfg.VTEP, 7
		} else if len(f.frame) == MaxFlood {
			frame = big
		}
		if f.from != from || f.vni != vni || !bytes.Equal(f.frame, frame) {
			t.Errorf("b got %v from %v with %d bytes", f.vni, f.from, len(f.frame))
		}
	}
}

func TestFloodIsBounded(t *testing.T) {
	t.Parallel()
	a := start(t, testConfig("a"))
	a.await(time.Second, "gossip", func() bool { return a.serf.Load() != nil })
	for _, n := range []int{0, MaxFlood + 1, 1500} {
		if a.Flood(1, make([]byte, n)) {
			t.Errorf("Flood took %d bytes", n)
		}
	}
	if a.Flood(vxlan.MaxVNI+1, []byte{1}) {
		t.Error("Flood took a VNI of 25 bits")
	}
	begin, taken := time.Now(), 0
	for range 10 * FloodBurst {
		if a.Flood(1, []byte{1}) {
			taken++
		}
	}
	limit := FloodBurst + 1 + int(FloodsPerSecond*time.Since(begin).Seconds())
	if taken < FloodBurst || taken > limit {
		t.Errorf("Flood took %d at once, want %d to %d", taken, FloodBurst, limit)
	}
}

// Floods of unknown, failed, unconfirmed and own VTEPs are not delivered, nor
// those in an overlay that the sender does not carry.
func TestFloodFromStrangers(t *testing.T) {
	var got floods
	c := testConfig("a")
	c.OnFlood = got.take
	d, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	l, err := newList([]Overlay{{3, "x", "none"}, {5, "y", "none"}})
	if err != nil {
		t.Fatal(err)
	}
	good, failed, unconfirmed := netip.MustParseAddrPort("192.0.2.1:4789"), netip.MustParseAddrPort("192.0.2.2:4789"), netip.MustParseAddrPort("192.0.2.3:4789")
	d.peers["b"] = &peer{status: Alive, card: card{vtep: good}, list: l, confirmed: true, zero: time.Now()}
	d.peers["c"] = &peer{status: Failed, card: card{vtep: failed}, list: l, zero: time.Now()}
	d.peers["d"] = &peer{status: Alive, card: card{vtep: unconfirmed}, list: l, zero: time.Now()}
	d.renew()
	for _, m := range d.Members()[1:] { // b, c, d
		if shown := m.Overlays != nil; shown != (m.Name != "d") || m.Confirmed != (m.Name == "b") {
			t.Errorf("member %+v", m)
		}
	}
	payload := func(from netip.AddrPort, vni vxlan.VNI) []byte {
		f := flood{vni: vni, from: from, frame: []byte("frame")}
		return f.append(nil)
	}
	for _, from := range append(addrs("192.0.2.1:4790", "[::1]:4789"), failed, unconfirmed, c.VTEP) {
		d.takeFlood(floodEvent, payload(from, 5))
	}
	d.takeFlood(floodEvent, payload(good, 4))
	d.takeFlood("other", payload(good, 5))
	d.takeFlood(floodEvent, nil)
	if n := got.count(); n != 0 {
		t.Fatalf("%d floods of strangers were delivered", n)
	}
	d.takeFlood(floodEvent, payload(good, 5))
	if s := d.Stats(); got.count() != 1 || s.FloodsReceived != 1 || s.FloodsRefused != 7 {
		t.Errorf("%d delivered, stats %+v", got.count(), s)
	}
}

func TestStampIsUnique(t *testing.T) {
	d := &Discovery{born: time.Now().Add(-time.Hour)}
	last := d.stamp()
	for range 1000 {
		now := d.stamp()
		if now <= last {
			t.Fatalf("stamp %d after %d", now, last)
		}
		last = now
	}
	if off := ticks(last) - time.Hour; off < 0 || off > time.Minute {
		t.Errorf("the clock is off by %v", off)
	}
}

func TestParseFlood(t *testing.T) {
	for _, from := range addrs("192.0.2.1:4789", "[2001:db8::1]:4789") {
		in := flood{boot: 0x01020304, sent: 0x0a0b0c0d0e0f, vni: 0x050607, from: from, frame: []byte("frame")}
		b := in.append(nil)
		f, err := parseFlood(b)
		if err != nil || f.boot != in.boot || f.sent != in.sent || f.vni != in.vni || f.from != from || string(f.frame) != "frame" {
			t.Errorf("parseFlood(%x) = %v, %v", b, f, err)
		}
		for n := range len(b) - len("frame") + 1 {
			if f, err := parseFlood(b[:n]); err == nil {
				t.Errorf("parseFlood(%x) = %v, want an error", b[:n], f)
			}
		}
		long := append(slices.Clip(b), make([]byte, MaxFlood)...)
		if _, err := parseFlood(long); err == nil {
			t.Error("parseFlood accepts a frame longer than MaxFlood")
		}
		for i, v := range map[int]byte{0: 2, floodFixed - 1: 5} {
			bad := bytes.Clone(b)
			bad[i] = v
			if f, err := parseFlood(bad); err == nil {
				t.Errorf("parseFlood(%x) = %v, want an error", bad, f)
			}
		}
	}
}

func FuzzParseFlood(f *testing.F) {
	for _, from := range addrs("192.0.2.1:4789", "[2001:db8::1]:4789") {
		in := flood{boot: 1, sent: 2, vni: 3, from: from, frame: []byte{1, 2, 3}}
		f.Add(in.append(nil))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		p, err := parseFlood(b)
		if err != nil {
			return
		}
		if again := p.append(nil); !bytes.Equal(again, b) {
			t.Fatalf("parseFlood(%x) encodes to %x", b, again)
		}
	})
}
