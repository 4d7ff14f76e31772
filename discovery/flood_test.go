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
	c := config(0, "a")
	c.VTEP = netip.MustParseAddrPort("[2001:db8::a]:4789") // the longest header
	a := start(t, c)
	b := start(t, config(1, "b", a))
	third := start(t, config(2, "c", b))
	meet(t, a, b, third)

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
	c = testConfig("late", a)
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

// Floods of unknown, failed and own VTEPs are not delivered.
func TestFloodFromStrangers(t *testing.T) {
	var got floods
	c := testConfig("a")
	c.OnFlood = got.take
	d, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	alive, failed := netip.MustParseAddrPort("192.0.2.1:4789"), netip.MustParseAddrPort("192.0.2.2:4789")
	d.mu.Lock()
	d.peers["b"] = &peer{status: Alive, card: card{vtep: alive}}
	d.peers["c"] = &peer{status: Failed, card: card{vtep: failed}}
	d.renew()
	d.mu.Unlock()
	frame := []byte("frame")
	for _, from := range []netip.AddrPort{failed, c.VTEP, netip.MustParseAddrPort("192.0.2.1:4790"), netip.MustParseAddrPort("[::1]:4789")} {
		d.takeFlood(floodEvent, append(appendFlood(nil, 1, 5, from), frame...))
	}
	d.takeFlood("other", append(appendFlood(nil, 1, 5, alive), frame...))
	d.takeFlood(floodEvent, nil)
	if n := got.count(); n != 0 {
		t.Fatalf("%d floods of strangers were delivered", n)
	}
	d.takeFlood(floodEvent, append(appendFlood(nil, 1, 5, alive), frame...))
	if s := d.Stats(); got.count() != 1 || s.FloodsReceived != 1 || s.FloodsRefused != 5 {
		t.Errorf("%d delivered, stats %+v", got.count(), s)
	}
}

func TestParseFlood(t *testing.T) {
	for _, from := range addrs("192.0.2.1:4789", "[2001:db8::1]:4789") {
		b := append(appendFlood(nil, 0x01020304, 0x050607, from), "frame"...)
		f, err := parseFlood(b)
		if err != nil || f.seq != 0x01020304 || f.vni != 0x050607 || f.from != from || string(f.frame) != "frame" {
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
		for i, v := range map[int]byte{0: 2, 8: 5} {
			bad := bytes.Clone(b)
			bad[i] = v
			if f, err := parseFlood(bad); err == nil {
				t.Errorf("parseFlood(%x) = %v, want an error", bad, f)
			}
		}
	}
	golden := append(appendFlood(nil, 1, 100, netip.MustParseAddrPort("192.0.2.1:4789")), 0xfe)
	if want := []byte{1, 0, 0, 0, 1, 0, 0, 100, 4, 192, 0, 2, 1, 0x12, 0xb5, 0xfe}; !bytes.Equal(golden, want) {
		t.Errorf("flood is %x, want %x", golden, want)
	}
}

func FuzzParseFlood(f *testing.F) {
	f.Add(append(appendFlood(nil, 1, 2, netip.MustParseAddrPort("192.0.2.1:4789")), 1, 2, 3))
	f.Add(append(appendFlood(nil, 1, 2, netip.MustParseAddrPort("[2001:db8::1]:4789")), 1, 2, 3))
	f.Fuzz(func(t *testing.T, b []byte) {
		p, err := parseFlood(b)
		if err != nil {
			return
		}
		if again := append(appendFlood(nil, p.seq, p.vni, p.from), p.frame...); !bytes.Equal(again, b) {
			t.Fatalf("parseFlood(%x) encodes to %x", b, again)
		}
	})
}
