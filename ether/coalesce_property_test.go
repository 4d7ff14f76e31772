package ether_test

import (
	"bytes"
	"fmt"
	"net/netip"
	"slices"
	"testing"

	"pgregory.net/rapid"

	"github.com/tulle-net/tulle/ether"
	"github.com/tulle-net/tulle/ether/ethertest"
	_ "github.com/tulle-net/tulle/internal/proptest"
)

// otherPorts returns the ends of p with the ports moved.
func otherPorts(p ethertest.TCP, src, dst uint16) (netip.AddrPort, netip.AddrPort) {
	a, b := ethertest.DefaultSrc, ethertest.DefaultDst
	if p.Src.Addr().Is6() {
		a, b = ethertest.DefaultSrc6, ethertest.DefaultDst6
	}
	return netip.AddrPortFrom(a.Addr(), a.Port()+src), netip.AddrPortFrom(b.Addr(), b.Port()+dst)
}

// TestSegmentThenCoalesce: what was cut merges to the very super-frame.
func TestSegmentThenCoalesce(t *testing.T) {
	var s ether.Segmenter
	c := ether.NewCoalescer(65535)
	rapid.Check(t, func(t *rapid.T) {
		var frame []byte
		var m ether.Meta
		shape := drawTCP(t)
		shape.IPOptions, shape.Extensions = nil, nil
		shape.Flags = ether.TCPAck | shape.Flags&(ether.TCPEce|ether.TCPPsh|ether.TCPFin)
		n := rapid.IntRange(1, 1460).Draw(t, "segment")
		shape.Payload = pattern(rapid.IntRange(n+1, min(n*ether.MaxSegments, 65535-100)).Draw(t, "bytes"))
		if rapid.Bool().Draw(t, "TCP") {
			frame, m = shape.Super(n)
		} else {
			frame, m = ethertest.UDP{Src: shape.Src, ID: shape.ID, DF: shape.DF, TOS: shape.TOS, VLANs: shape.VLANs,
				FlowLabel: shape.FlowLabel, Payload: shape.Payload}.Super(n)
		}
		s.Unfilled = rapid.Bool().Draw(t, "unfilled")
		sm := ether.Meta{Checksum: rapid.SampledFrom([]ether.Checksum{ether.ChecksumUnknown, ether.ChecksumVerified}).Draw(t, "state")}
		if s.Unfilled {
			sm = ether.Meta{Checksum: ether.ChecksumPartial, ChecksumStart: m.ChecksumStart, ChecksumOffset: m.ChecksumOffset}
		}
		sink := &collector{}
		for _, f := range cut(t, &s, frame, m) {
			c.Add(sink, f, sm)
		}
		c.Flush()
		if len(sink.got) != 1 || sink.got[0].m != m || !bytes.Equal(sink.got[0].frame, frame) {
			t.Fatalf("%d super-frames, the first %+v, want %+v", len(sink.got), sink.got[0].m, m)
		}
		sink.frames(t)
	})
}

// flow is a sender that mostly does what merges.
type flow struct {
	tcp ethertest.TCP
	udp bool
	mss int
}

// choice yields the next small number of a random source.
type choice func(n int) int

// next returns the flow's next frame, which may be anything.
func (f *flow) next(pick choice) ([]byte, ether.Meta) {
	p := f.tcp
	p.Payload, p.Flags = pattern(f.mss), ether.TCPAck
	step := uint16(1)
	switch pick(16) { // beyond these: as usual
	case 0:
		p.Payload = p.Payload[:pick(f.mss+1)]
	case 1:
		p.Flags = byte(pick(256))
	case 2:
		f.tcp.Ack++
	case 3:
		f.tcp.Seq += uint32(pick(3))
	case 4:
		step = uint16(pick(4))
	case 5:
		p.TOS, p.TTL = byte(pick(256)), byte(pick(3)+63)
	case 6:
		p.Options = pattern(4 * pick(11))
	case 7:
		p.Padding = pick(3)
	case 8:
		if p.Src.Addr().Is6() {
			p.Extensions = []ethertest.Extension{fragment6(uint16(8*pick(3)), pick(2) == 1)}
		} else {
			p.IPOptions = pattern(4 * pick(3))
		}
	}
	if f.tcp.DF && step == 0 {
		step = 1 // the one exception; not here
	}
	f.tcp.Seq += uint32(len(p.Payload))
	f.tcp.ID += step
	var frame []byte
	var m ether.Meta
	partial, segment := pick(8) == 0, 0
	if pick(16) == 0 {
		segment = 1 + pick(40)
	}
	switch {
	case f.udp:
		d := ethertest.UDP{Src: p.Src, Dst: p.Dst, VLANs: p.VLANs, TOS: p.TOS, TTL: p.TTL, ID: p.ID, DF: p.DF, IPOptions: p.IPOptions,
			Extensions: p.Extensions, FlowLabel: p.FlowLabel, Payload: p.Payload, Padding: p.Padding, NoChecksum: pick(32) == 0}
		if partial {
			d.Padding = 0
			frame, m = d.Super(segment)
		} else {
			frame = d.Frame()
		}
	case partial:
		p.Padding = 0
		frame, m = p.Super(segment)
	default:
		frame = p.Frame()
	}
	if pick(24) == 0 {
		frame[pick(len(frame))] ^= 1 << pick(8)
	}
	if pick(64) == 0 {
		frame = frame[:pick(len(frame))]
	}
	return frame, m
}

// newFlows returns a handful of flows.
func newFlows(pick choice) []*flow {
	flows := make([]*flow, 1+pick(6))
	for i := range flows {
		f := &flow{udp: pick(3) == 0, mss: 1 + pick(60)}
		if pick(2) == 0 {
			f.tcp.Src = ethertest.DefaultSrc6
		}
		// Two may be one, and disturb each other; but with DF they could show one
		// identification twice, the exception.
		port := uint16(pick(3))
		f.tcp.DF, f.tcp.Options, f.tcp.ID = pick(2) == 0, pattern(4*pick(3)), uint16(65530+pick(6))
		if f.tcp.DF {
			port = uint16(3 + i)
		}
		f.tcp.Src, f.tcp.Dst = otherPorts(f.tcp, port, 0)
		if pick(4) == 0 {
			f.tcp.VLANs = []uint16{uint16(pick(2))}
		}
		flows[i] = f
	}
	return flows
}

// flowKey names what must stay in order: the flow, as far as it can be seen.
func flowKey(frame []byte) string {
	h, ok := ether.ParseHeaders(frame)
	if !ok {
		return fmt.Sprintf("%x", frame[:min(len(frame), 12)])
	}
	addrs := frame[h.L3+12 : h.L3+20]
	if h.V6 {
		addrs = frame[h.L3+8 : h.L3+40]
	}
	return fmt.Sprintf("%x %x %x %d", frame[:h.L3], addrs, frame[h.L4:h.L4+4], h.Proto)
}

// input is one frame that was added.
type input struct {
	frame []byte
	m     ether.Meta
}

// checkCoalesced runs batches through a Coalescer and compares, flow by flow,
// what would be on the wire without it and with it.
func checkCoalesced(t failer, c *ether.Coalescer, in []input, flushEvery int) {
	t.Helper()
	want, got := map[string][][]byte{}, map[string][][]byte{}
	sink := &collector{}
	for i, f := range in {
		before := bytes.Clone(f.frame)
		alone := collector{got: []written{{m: f.m, frame: before, parts: 1}}}
		for _, w := range alone.frames(t) {
			want[flowKey(w)] = append(want[flowKey(w)], w)
		}
		c.Add(sink, f.frame, f.m)
		if !bytes.Equal(before, f.frame) {
			t.Fatalf("frame %d was changed", i)
		}
		if i%flushEvery == flushEvery-1 {
			c.Flush()
		}
	}
	c.Flush()
	for _, w := range sink.frames(t) {
		got[flowKey(w)] = append(got[flowKey(w)], w)
	}
	for k, w := range want {
		compareFrames(t, got[k], w)
	}
	if len(got) != len(want) {
		t.Fatalf("%d flows came out, %d went in", len(got), len(want))
	}
}

// TestCoalesceThenSegment: whatever flows send, and however they interleave,
// each comes out byte by byte and in order.
func TestCoalesceThenSegment(t *testing.T) {
	c := ether.NewCoalescer(65535)
	merged := 0
	rapid.Check(t, func(t *rapid.T) {
		pick := func(n int) int { return rapid.IntRange(0, n-1).Draw(t, "pick") }
		flows := newFlows(pick)
		var in []input
		for range rapid.IntRange(1, 120).Draw(t, "frames") {
			frame, m := flows[pick(len(flows))].next(pick)
			in = append(in, input{frame, m})
		}
		checkCoalesced(t, c, in, rapid.IntRange(1, 100).Draw(t, "batch"))
		sink := &forget{}
		for _, f := range in {
			c.Add(sink, f.frame, f.m)
		}
		c.Flush()
		merged += len(in) - sink.frames
	})
	if merged == 0 {
		t.Error("nothing ever merged: the test shows nothing")
	}
}

// FuzzCoalesce is TestCoalesceThenSegment with the fuzzer's choices, and with
// its bytes as a frame among the others.
func FuzzCoalesce(f *testing.F) {
	f.Add([]byte{}, byte(0), uint16(0), uint16(0))
	f.Add(bytes.Repeat([]byte{9}, 400), byte(0), uint16(0), uint16(0))
	f.Add(ethertest.TCP{Payload: pattern(300), VLANs: []uint16{1}}.Frame(), byte(1), uint16(100), uint16(38))
	f.Add(ethertest.UDP{Payload: pattern(90), Src: ethertest.DefaultSrc6}.Frame(), byte(3), uint16(40), uint16(54))
	f.Add(bytes.Join([][]byte{{4, 200, 3}, slices.Repeat([]byte{15, 1, 7, 20, 99, 63}, 100)}, nil), byte(0), uint16(0), uint16(0))
	f.Fuzz(func(t *testing.T, data []byte, kind byte, a, b uint16) {
		i := 0
		pick := func(n int) int {
			if len(data) == 0 {
				return n - 1
			}
			i++
			return (int(data[i%len(data)]) + i/len(data)) % n
		}
		flows := newFlows(pick)
		m := ether.Meta{GSO: ether.GSO(kind & 3), Checksum: ether.Checksum(kind >> 2 % 3), SegmentLen: a, ChecksumStart: b, ChecksumOffset: a}
		// A frame that is said to be verified is trusted: the fuzzer may not lie.
		if m.Checksum == ether.ChecksumVerified {
			m.Checksum = ether.ChecksumUnknown
		}
		var in []input
		for k := range 8 + len(data)/8%64 {
			// Not twice if it may be of one identification with DF: the exception.
			if k == 7 || k%8 == 7 && !(len(data) > 20 && slices.Contains(data[20:min(len(data), 29)], 0x40)) {
				in = append(in, input{data, m})
			}
			frame, fm := flows[pick(len(flows))].next(pick)
			in = append(in, input{frame, fm})
		}
		checkCoalesced(t, ether.NewCoalescer(65535), in, 40)
	})
}
