package e2e

import (
	"bytes"
	bin "encoding/binary"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/tulle-net/tulle/crypto"
	"github.com/tulle-net/tulle/ether"
	"github.com/tulle-net/tulle/ether/ethertest"
	"github.com/tulle-net/tulle/internal/lab"
	"github.com/tulle-net/tulle/vxlan"
)

//	a ──[ul]── m ──[vl]── b      m has recorded what a seals for b, and kept some of it back
//	a, b, c ──[ul]──             c knows the indexes of sessions, and forges

// onTheCable is a man in the middle who has something genuine.
type onTheCable struct {
	*sealedWire
	s        *sealed
	from, to ether.MAC
	inside   *fastCapture
}

func manInTheMiddle(t *testing.T) *onTheCable {
	t.Helper()
	x := &onTheCable{sealedWire: tapped(t)}
	x.s = &sealed{t: t, l: x.l}
	x.s.start(x.a, sealedOverlay(1))
	x.s.start(x.b, sealedOverlay(2))
	x.s.meet()
	ping(t, x.a, address(2), 10*time.Second)
	ping(t, x.b, address(1), 10*time.Second)
	x.inside = captureTAP(t, x.b, "blue0")
	return x
}

// record keeps what a seals for b while during runs; hold: it does not go on to b.
func (x *onTheCable) record(hold bool, during func()) (payloads [][]byte) {
	x.t.Helper()
	var mu sync.Mutex
	x.through(func(fromA bool, frame []byte) bool {
		d, ok := outerUDP(frame)
		if !ok || !fromA || !isSealed(d) {
			return true
		}
		mu.Lock()
		defer mu.Unlock()
		x.to, x.from = ether.MACFrom(frame), ether.MACFrom(frame[6:])
		payloads = append(payloads, bytes.Clone(d.payload))
		return !hold
	})
	during()
	time.Sleep(50 * time.Millisecond)
	x.through(nil)
	mu.Lock()
	defer mu.Unlock()
	return payloads
}

// put sends datagrams to b as if src had.
func (x *onTheCable) put(src netip.Addr, payloads ...[]byte) {
	for _, p := range payloads {
		x.send(true, ethertest.UDP{
			SrcMAC: x.from, DstMAC: x.to, Src: netip.AddrPortFrom(src, 40000), Dst: netip.AddrPortFrom(x.at[1], vxlan.Port), Payload: p,
		}.Frame())
	}
}

// drops are b's.
func (x *onTheCable) drops() map[string]uint64 { return x.s.nodes[1].status().Drops }

// expect waits until b's drops have grown by exactly these. The kernel drops what
// is bad about UDP itself; put makes no such thing.
func (x *onTheCable) expect(what string, before map[string]uint64, want map[string]uint64) {
	x.t.Helper()
	grown := map[string]uint64{}
	for limit := time.Now().Add(10 * time.Second); time.Now().Before(limit); time.Sleep(10 * time.Millisecond) {
		clear(grown)
		for reason, n := range x.drops() {
			if n != before[reason] {
				grown[reason] = n - before[reason]
			}
		}
		if maps.Equal(grown, want) {
			return
		}
	}
	x.t.Errorf("%s: b's drops grew by %v, want %v", what, grown, want)
}

// say sends the mark from a to b once.
func (x *onTheCable) say() {
	c, err := x.a.Dial(x.t.Context(), "udp", netip.AddrPortFrom(address(2), 9).String())
	if err == nil {
		_, err = c.Write(marked)
	}
	if err != nil {
		x.t.Fatal(err)
	}
	_ = c.Close()
}

// heldBack returns a genuine datagram with the mark inside that b has not seen.
func (x *onTheCable) heldBack() []byte {
	x.t.Helper()
	want := crypto.SealedOverhead + vxlan.HeaderLen + 14 + 20 + 8 + len(marked)
	for range 10 {
		for _, d := range x.record(true, x.say) {
			if len(d) == want {
				return d
			}
		}
	}
	x.t.Fatal("nothing could be held back")
	return nil
}

// TestSealedReplay: what was recorded of a run is refused to the last datagram,
// and so it is when it comes from elsewhere.
func TestSealedReplay(t *testing.T) {
	t.Parallel()
	x := manInTheMiddle(t)
	recorded := x.record(false, func() {
		transfer(t, x.l, x.a, x.b, address(2), 4<<20)
		for range 10 {
			x.say()
		}
	})
	if len(recorded) < 1000 {
		t.Fatalf("%d datagrams were recorded: too few to tell", len(recorded))
	}
	b := x.s.nodes[1]
	session, _ := b.session("a", sealedName)
	x.inside.mu.Lock()
	x.inside.frames = nil
	x.inside.mu.Unlock()
	before, sent := x.drops(), 0
	for _, src := range []netip.Addr{x.at[0], netip.MustParseAddr("192.168.77.99")} {
		for chunk := range slices.Chunk(recorded, 500) { // no more than b's buffer holds
			x.put(src, chunk...)
			sent += len(chunk)
			x.expect(fmt.Sprintf("%d replays from %s", sent, src), before, map[string]uint64{"replay": uint64(sent)})
		}
	}
	if now, _ := b.session("a", sealedName); now.Replays != session.Replays+uint64(sent) {
		t.Errorf("the session counts %d replays, want %d", now.Replays-session.Replays, sent)
	}
	if x.inside.has(marked) {
		t.Error("a replay was delivered")
	}
	if !b.floods(x.at[0]) || b.floods(netip.MustParseAddr("192.168.77.99")) {
		t.Errorf("a replay has moved the peer: b floods to %v", b.status().Overlays[0].FloodList)
	}
	ping(t, x.a, address(2), 5*time.Second)
}

// TestSealedFlips: a datagram with any bit changed, cut anywhere, or with
// something behind it is refused; the datagram itself, after all that, is taken.
func TestSealedFlips(t *testing.T) {
	t.Parallel()
	x := manInTheMiddle(t)
	d := x.heldBack()
	flip := func(bits ...int) (out [][]byte) {
		for _, bit := range bits {
			f := bytes.Clone(d)
			f[bit/8] ^= 1 << (bit % 8)
			out = append(out, f)
		}
		return out
	}
	span := func(from, to int) (bits []int) { // bytes
		for i := from * 8; i < to*8; i++ {
			bits = append(bits, i)
		}
		return bits
	}
	size := len(d)
	for _, tt := range []struct {
		what string
		send [][]byte
		want map[string]uint64
	}{
		{"the first byte, but for the bit that says QUIC", flip(0, 1, 2, 3, 4, 5, 7), map[string]uint64{"unknown_type": 7}},
		{"the two flags that there are", flip(8, 9), map[string]uint64{"forged": 2}},
		{"other flags and reserved bytes", flip(span(1, 4)[2:]...), map[string]uint64{"sealed_malformed": 22}},
		{"counters that no session has", flip(span(8, 12)...), map[string]uint64{"sealed_malformed": 32}},
		{"high counters", flip(span(12, 14)...), map[string]uint64{"forged": 16}},
		{"ciphertext and tag", flip(span(16, size)...), map[string]uint64{"forged": uint64(8 * (size - 16))}},
		{"cut short", cuts(d), map[string]uint64{"short": 1, "sealed_malformed": 31, "forged": uint64(size - 32)}},
		{"something behind", [][]byte{append(bytes.Clone(d), 0), append(bytes.Clone(d), d...)}, map[string]uint64{"forged": 2}},
		{"another session", flip(span(4, 8)...), map[string]uint64{"unknown_session": 32}},
	} {
		before := x.drops()
		x.put(x.at[0], tt.send...)
		x.expect(tt.what, before, tt.want)
	}
	// Low bits of the counter make one that came, or is yet to come.
	before := x.drops()
	x.put(x.at[0], flip(span(14, 16)...)...)
	x.s.nodes[1].eventually(5*time.Second, "refuses low counters", func() bool {
		now := x.drops()
		return now["forged"]+now["replay"] == before["forged"]+before["replay"]+16
	})
	if x.inside.has(marked) {
		t.Fatal("a damaged datagram was delivered")
	}
	x.put(x.at[0], flip(6)...) // to QUIC, which has no counter for it here
	x.put(x.at[0], d)
	eventually(t, 5*time.Second, "the datagram itself is delivered", func() bool { return x.inside.has(marked) })
	ping(t, x.a, address(2), 5*time.Second)
}

// cuts returns d cut at each length.
func cuts(d []byte) (out [][]byte) {
	for n := range len(d) {
		out = append(out, d[:n])
	}
	return out
}

// TestSealedFirstByte: of all first bytes from a member's address and a
// stranger's, none gets anywhere.
func TestSealedFirstByte(t *testing.T) {
	t.Parallel()
	x := manInTheMiddle(t)
	d := x.heldBack()
	for _, src := range []netip.Addr{x.at[0], netip.MustParseAddr("192.168.77.99")} {
		var all [][]byte
		for first := range 256 {
			f := bytes.Clone(d)
			f[0] = byte(first)
			if f[0] == crypto.SealedByte {
				bin.BigEndian.PutUint32(f[4:], ^bin.BigEndian.Uint32(f[4:]))
			}
			if f[0] == vxlan.FlagVNI {
				copy(f, datagram(100, nil))
			}
			all = append(all, f)
		}
		before := x.drops()
		x.put(src, all...)
		x.expect("each first byte from "+src.String(), before, map[string]uint64{"unknown_type": 126, "unknown_session": 1, "plaintext_refused": 1})
	}
	if x.inside.has(marked) {
		t.Error("a frame was delivered")
	}
	ping(t, x.a, address(2), 5*time.Second)
}

// TestSealedForgeries: a million forged datagrams, under sessions that exist and
// others, with a member's address and without, change counters and nothing else.
func TestSealedForgeries(t *testing.T) {
	t.Parallel()
	l, sw, h := hosts(t, 3, lab.Underlay{Prefix4: underlay4, Offloads: lab.Wire})
	s := &sealed{t: t, l: l, sw: sw}
	a, b := s.start(h[0], sealedOverlay(1)), s.start(h[1], sealedOverlay(2))
	s.meet()
	wire := captureTAP(t, a.host, "ul")
	ping(t, a.host, address(2), 10*time.Second)
	ping(t, h[2], sw.Addr(h[0]), 5*time.Second)
	known := wire.sealedOnly()
	if len(known) == 0 {
		t.Fatal("no sealed datagram came by")
	}
	index := bin.BigEndian.Uint32(known[len(known)-1].payload[4:])
	at := netip.AddrPortFrom(sw.Addr(h[0]), vxlan.Port)
	member, stranger := attack(t, h[2], sw.Addr(h[1]), at), attack(t, h[2], netip.Addr{}, at)
	fdb, flood, rss := len(a.fdb(sealedName).Entries), a.status().Overlays[0].FloodList, resident(t, a)
	stop := keepPinging(t, a.host)
	noise := rand.NewChaCha8([32]byte{9}) // the same in each run
	r := rand.New(noise)
	for _, tt := range []struct {
		what    string
		x       *attacker
		n       int
		index   func() uint32
		reasons []string
	}{
		{"a session of a and b, a member's address", member, 400_000, func() uint32 { return index }, []string{"forged", "replay", "unknown_session"}},
		{"a session of a and b, a stranger's address", stranger, 200_000, func() uint32 { return index }, []string{"forged", "replay", "unknown_session"}},
		{"no session, a member's address", member, 200_000, r.Uint32, []string{"unknown_session"}},
		{"no session, a stranger's address", stranger, 200_000, r.Uint32, []string{"unknown_session"}},
	} {
		sum := func() (n uint64) {
			d := a.status().Drops
			for _, reason := range append(tt.reasons, "rx_overflow") {
				n += d[reason]
			}
			return n + backlogDrops(t)
		}
		before, cpu, start := sum(), cpuTime(t, a.proc.Pid()), time.Now()
		overflow := a.dropped("rx_overflow")
		ds := make([][]byte, 128)
		for sent := 0; sent < tt.n; {
			for end := min(sent+4096, tt.n); sent < end; {
				for i := range ds {
					ds[i] = slices.Grow(ds[i][:0], 400)[:100+r.IntN(300)]
					_, _ = noise.Read(ds[i]) // never fails
					copy(ds[i], []byte{crypto.SealedByte, 0, 0, 0})
					bin.BigEndian.PutUint32(ds[i][4:], tt.index())
					bin.BigEndian.PutUint64(ds[i][8:], uint64(20_000+r.IntN(1<<20))) // fresh ones, which cost most
				}
				k := min(len(ds), end-sent)
				tt.x.send(ds[:k])
				sent += k
			}
			a.eventually(10*time.Second, "has counted what was sent", func() bool { return sum() >= before+uint64(sent) })
		}
		took := cpuTime(t, a.proc.Pid()) - cpu
		t.Logf("%s: %d forged datagrams of 100 to 400 bytes in %v: %v of a's CPU each, all included; %d did not fit its buffer",
			tt.what, tt.n, time.Since(start).Round(time.Millisecond), (took / time.Duration(tt.n)).Round(10*time.Nanosecond), a.dropped("rx_overflow")-overflow)
	}
	if pings := stop(); pings == 0 {
		t.Error("no ping was answered meanwhile")
	} else {
		t.Logf("%d pings answered meanwhile", pings)
	}
	ping(t, b.host, address(1), 5*time.Second)
	if got := len(a.fdb(sealedName).Entries); got != fdb {
		t.Errorf("a's FDB had %d entries and has %d", fdb, got)
	}
	if got := a.status().Overlays[0].FloodList; !slices.Equal(got, flood) {
		t.Errorf("a's flood list was %v and is %v", flood, got)
	}
	sent, received := b.status().Overlays[0].TxFrames, a.status().Overlays[0].RxFrames
	if received > sent+slack {
		t.Errorf("a received %d frames, b sent %d: a forgery was delivered", received, sent)
	}
	if now := resident(t, a); now > rss+32<<20 {
		t.Errorf("a's resident memory grew from %d to %d MiB, want at most 32 more", rss>>20, now>>20)
	}
	if log := a.proc.Log(); len(log) > 16<<10 {
		t.Errorf("a wrote %d bytes of log about it", len(log))
	}
}
