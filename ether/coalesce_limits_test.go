package ether_test

import (
	"bytes"
	"encoding/binary"
	"net/netip"
	"runtime"
	"slices"
	"testing"
	"weak"

	"github.com/tulle-net/tulle/ether"
	"github.com/tulle-net/tulle/ether/ethertest"
)

// TestCoalesceLimits: segments, bytes and open super-frames are bounded.
func TestCoalesceLimits(t *testing.T) {
	in := tcpSegments(ethertest.TCP{Payload: pattern(10 * 150), Flags: ether.TCPAck}, 10, false)
	out := merge(ether.Meta{}, in...)
	if len(out.got) != 3 || out.got[0].parts != 1+ether.MaxSegments || out.got[2].parts != 1+22 {
		t.Errorf("150 segments: %d super-frames", len(out.got))
	}
	compareFrames(t, out.frames(t), in)
	for _, maxSize := range []int{0, 40, 2040, 6039, 6040, 65535, 1 << 20} {
		in := tcpSegments(ethertest.TCP{Payload: pattern(2000 * 130), Flags: ether.TCPAck}, 2000, false)
		c, sink := ether.NewCoalescer(maxSize), &collector{}
		for _, f := range in {
			c.Add(sink, f, ether.Meta{})
		}
		c.Flush()
		for _, w := range sink.got {
			if n := len(w.frame) - 14; w.parts > 1 && (n > maxSize || n > 65535) {
				t.Errorf("maxSize %d: packet of %d bytes", maxSize, n)
			}
		}
		if want := 130 / max(1, (min(maxSize, 65535)-40)/2000); len(sink.got) < want || len(sink.got) > want+1 {
			t.Errorf("maxSize %d: %d frames, want %d", maxSize, len(sink.got), want)
		}
		compareFrames(t, sink.frames(t), in)
	}
	// 40 flows, one frame each and round again: the oldest are closed, in order.
	in = nil
	for round := range 2 {
		for i := range 40 {
			src, dst := otherPorts(ethertest.TCP{}, uint16(i), 0)
			in = append(in, ethertest.TCP{Src: src, Dst: dst, Seq: uint32(round) * 100, ID: uint16(round), Payload: pattern(100)}.Frame())
		}
	}
	compareFrames(t, merge(ether.Meta{}, in...).frames(t), in)
}

// TestCoalesceCollision: two flows of one hash are two.
func TestCoalesceCollision(t *testing.T) {
	seen := map[uint32]ethertest.TCP{}
	pair := [2]ethertest.TCP{}
	frame := ethertest.TCP{Payload: pattern(100)}.Frame()
	for i := range 1 << 20 { // half a million pairs a look-up are enough
		binary.BigEndian.PutUint32(frame[34:38], uint32(i)*0x9e3779b1|1)
		p := ethertest.TCP{Payload: pattern(100)}
		p.Src = netip.AddrPortFrom(ethertest.DefaultSrc.Addr(), binary.BigEndian.Uint16(frame[34:36]))
		p.Dst = netip.AddrPortFrom(ethertest.DefaultDst.Addr(), binary.BigEndian.Uint16(frame[36:38]))
		hash := ether.TableHash(frame)
		if q, ok := seen[hash]; ok && (q.Src != p.Src || q.Dst != p.Dst) {
			pair = [2]ethertest.TCP{p, q}
			break
		}
		seen[hash] = p
	}
	if pair[0].Payload == nil {
		t.Fatal("no collision found")
	}
	first := pair[0].Frame()
	pair[1].Seq, pair[1].ID = 100, 1
	second := pair[1].Frame()
	pair[0].Seq, pair[0].ID = 100, 1
	third := pair[0].Frame()
	out := merge(ether.Meta{}, first, second, third)
	compareFrames(t, out.frames(t), [][]byte{first, third, second})
	if len(out.got) != 2 {
		t.Errorf("%d frames, want 2", len(out.got))
	}
}

// TestCoalesceSinks: one flow to two Sinks is two; the frames are not changed.
func TestCoalesceSinks(t *testing.T) {
	in := tcpSegments(ethertest.TCP{Payload: pattern(400)}, 100, false)
	before := bytes.Join(in, nil)
	var sinks [2]collector
	c := ether.NewCoalescer(65535)
	for range 3 { // and again, with what the first batch left
		for _, f := range in {
			c.Add(&sinks[0], f, ether.Meta{})
			c.Add(&sinks[1], f, ether.Meta{})
		}
		c.Flush()
	}
	for i := range sinks {
		if len(sinks[i].got) != 3 {
			t.Errorf("Sink %d has %d frames, want 3", i, len(sinks[i].got))
		}
		compareFrames(t, sinks[i].frames(t), slices.Concat(in, in, in))
	}
	if !bytes.Equal(before, bytes.Join(in, nil)) {
		t.Error("borrowed frames were changed")
	}
}

func TestCoalesceSwitches(t *testing.T) {
	tcp := tcpSegments(ethertest.TCP{Payload: pattern(400)}, 100, false)
	udp := udpSegments(ethertest.UDP{Payload: pattern(400)}, 100, false)
	for _, tt := range []struct {
		noTCP, noUDP bool
		want         int
	}{{false, false, 2}, {true, false, 5}, {false, true, 5}, {true, true, 8}} {
		c, sink := ether.NewCoalescer(65535), &collector{}
		c.NoTCP, c.NoUDP = tt.noTCP, tt.noUDP
		for _, f := range slices.Concat(tcp, udp) {
			c.Add(sink, f, ether.Meta{})
		}
		c.Flush()
		if len(sink.got) != tt.want {
			t.Errorf("NoTCP %t, NoUDP %t: %d frames, want %d", tt.noTCP, tt.noUDP, len(sink.got), tt.want)
		}
		sameBytes(t, sink.frames(t), slices.Concat(tcp, udp))
	}
}

// forget is a Sink that keeps nothing.
type forget struct{ frames, parts int }

func (f *forget) WriteFrame(_ ether.Meta, parts [][]byte) {
	f.frames++
	f.parts += len(parts)
}

// TestCoalesceKeepsNothing: after Flush the frames and the Sink can go.
func TestCoalesceKeepsNothing(t *testing.T) {
	c := ether.NewCoalescer(65535)
	var held []weak.Pointer[byte]
	var to weak.Pointer[forget]
	func() {
		sink := &forget{}
		to = weak.Make(sink)
		in := tcpSegments(ethertest.TCP{Payload: pattern(4000)}, 1000, false)
		in = append(in, ethertest.Echo{Payload: pattern(1000)}.Frame(), ethertest.UDP{Payload: pattern(1000)}.Frame())
		for _, f := range in {
			c.Add(sink, f, ether.Meta{})
			held = append(held, weak.Make(&f[0]))
		}
		c.Flush()
	}()
	runtime.GC()
	for i, p := range held {
		if p.Value() != nil {
			t.Errorf("frame %d is still held", i)
		}
	}
	if to.Value() != nil {
		t.Error("the Sink is still held")
	}
	runtime.KeepAlive(c)
}

func TestCoalesceNoAllocs(t *testing.T) {
	c, sink := ether.NewCoalescer(65535), &forget{}
	var in [][]byte
	for i := range 40 {
		src, dst := otherPorts(ethertest.TCP{}, uint16(i), 0)
		in = append(in, tcpSegments(ethertest.TCP{Src: src, Dst: dst, Payload: pattern(500)}, 100, false)...)
	}
	in = append(in, udpSegments(ethertest.UDP{Payload: pattern(3000), Src: ethertest.DefaultSrc6}, 100, false)...)
	in = append(in, ethertest.TCP{}.Frame(), ethertest.Echo{}.Frame(), in[0][:10])
	batch := func() {
		for _, f := range in {
			c.Add(sink, f, ether.Meta{})
		}
		c.Flush()
	}
	batch() // makes the super-frames that the table needs
	if n := testing.AllocsPerRun(10, batch); n != 0 {
		t.Errorf("%v allocations, want 0", n)
	}
}

func BenchmarkCoalesce(b *testing.B) {
	opts := make([]byte, 12)
	tcp4 := tcpSegments(ethertest.TCP{Payload: pattern(45 * 1448), Options: opts, DF: true}, 1448, false)
	tcp6 := tcpSegments(ethertest.TCP{Payload: pattern(45 * 1428), Options: opts, Src: ethertest.DefaultSrc6}, 1428, false)
	partial := tcpSegments(ethertest.TCP{Payload: pattern(45 * 1448), Options: opts, DF: true}, 1448, true)
	pm, _ := ether.PartialMeta(partial[0])
	udp := udpSegments(ethertest.UDP{Payload: pattern(45 * 1400)}, 1400, false)
	var many, mice, acks [][]byte
	for i := range 8 {
		src, dst := otherPorts(ethertest.TCP{}, uint16(i), 0)
		for k, f := range tcpSegments(ethertest.TCP{Src: src, Dst: dst, Payload: pattern(8 * 1448)}, 1448, false) {
			many = slices.Insert(many, k*i+k, f)
		}
	}
	for i := range 64 {
		src, dst := otherPorts(ethertest.TCP{}, uint16(i), 0)
		mice = append(mice, ethertest.UDP{Src: src, Dst: dst, Payload: pattern(22)}.Frame())
		acks = append(acks, ethertest.TCP{Ack: uint32(i)}.Frame())
	}
	for _, bb := range []struct {
		name string
		in   [][]byte
		m    ether.Meta
	}{
		{"TCPv4", tcp4, ether.Meta{}}, {"TCPv4 verified", tcp4, ether.Meta{Checksum: ether.ChecksumVerified}},
		{"TCPv4 partial", partial, pm},
		{"TCPv6", tcp6, ether.Meta{}}, {"UDPv4", udp, ether.Meta{}},
		{"8 flows", many, ether.Meta{}}, {"64-byte UDP of 64 flows", mice, ether.Meta{}}, {"ACKs", acks, ether.Meta{}},
	} {
		b.Run(bb.name, func(b *testing.B) {
			c, sink := ether.NewCoalescer(65535), &forget{}
			n := 0
			for _, f := range bb.in {
				n += len(f)
			}
			b.SetBytes(int64(n))
			for b.Loop() {
				for _, f := range bb.in {
					c.Add(sink, f, bb.m)
				}
				c.Flush()
			}
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N*len(bb.in)), "ns/frame")
			b.ReportMetric(float64(sink.frames)/float64(b.N), "writes")
		})
	}
}
