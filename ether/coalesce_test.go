package ether_test

import (
	"bytes"
	"encoding/binary"
	"slices"
	"testing"

	"github.com/tulle-net/tulle/ether"
	"github.com/tulle-net/tulle/ether/ethertest"
)

// written is one call of WriteFrame.
type written struct {
	m     ether.Meta
	frame []byte
	parts int
	// first is where the first part was: the frame itself if it came through alone.
	first *byte
}

// collector is a Sink that keeps what it gets.
type collector struct{ got []written }

func (c *collector) WriteFrame(m ether.Meta, parts [][]byte) {
	w := written{m: m, frame: bytes.Join(parts, nil), parts: len(parts)}
	if len(parts[0]) > 0 {
		w.first = &parts[0][0]
	}
	c.got = append(c.got, w)
}

// frames checks each frame's Meta and returns the frames as they go on a wire.
func (c *collector) frames(t failer) [][]byte {
	t.Helper()
	var s ether.Segmenter
	var out [][]byte
	for _, w := range c.got {
		if w.parts > 1 {
			checkSuper(t, w)
		}
		if w.m.Checksum == ether.ChecksumVerified {
			if err := ethertest.Verify(w.frame); err != nil {
				t.Fatalf("said to be verified: %v", err)
			}
		}
		if s.Reset(w.frame, w.m) != nil { // it came so
			out = append(out, w.frame)
			continue
		}
		out = append(out, cut(t, &s, w.frame, w.m)...)
	}
	return out
}

// checkSuper: a merged super-frame is one that a kernel takes.
func checkSuper(t failer, w written) {
	t.Helper()
	h, ok := ether.ParseHeaders(w.frame)
	m := w.m
	if !ok || int(h.End) != len(w.frame) || m.GSO == ether.GSONone || m.HeaderLen != h.Payload || m.Checksum != ether.ChecksumPartial ||
		m.ECN || m.ChecksumStart != h.L4 || m.SegmentLen == 0 {
		t.Fatalf("super-frame %+v with headers %+v, %t", m, h, ok)
	}
	n := int(h.End) - int(h.Payload)
	if want := 1 + (n+int(m.SegmentLen)-1)/int(m.SegmentLen); w.parts != want || w.parts < 3 || w.parts > 1+ether.MaxSegments {
		t.Fatalf("super-frame of %d parts, payload %d, segments %d", w.parts, n, m.SegmentLen)
	}
	// Its checksum field is the pseudo-header's sum just if finishing gives a
	// right one.
	done := bytes.Clone(w.frame)
	if !ether.FinishChecksum(done, m) {
		t.Fatalf("super-frame %+v: checksum outside", m)
	}
	if err := ethertest.Verify(done); err != nil {
		t.Fatalf("super-frame: %v", err)
	}
}

// merge adds frames to a new Coalescer and flushes it.
func merge(m ether.Meta, frames ...[]byte) *collector {
	out := &collector{}
	c := ether.NewCoalescer(65535)
	for _, f := range frames {
		c.Add(out, f, m)
	}
	c.Flush()
	return out
}

// shapes is the frame shapes that can merge, each with the Meta of its super-frame's kind.
var shapes = []struct {
	name   string
	p      ethertest.TCP
	gso    ether.GSO
	header uint16
}{
	{"IPv4", ethertest.TCP{DF: true, ID: 65534}, ether.GSOTCPv4, 54},
	{"IPv4 fragmentable", ethertest.TCP{ID: 9, TOS: 0xb8}, ether.GSOTCPv4, 54},
	{"IPv4 options", ethertest.TCP{DF: true, Options: pattern(12), VLANs: []uint16{5}}, ether.GSOTCPv4, 70},
	{"IPv6", ethertest.TCP{Src: ethertest.DefaultSrc6, FlowLabel: 0x12345, TOS: 2}, ether.GSOTCPv6, 74},
	{"IPv6 options", ethertest.TCP{Src: ethertest.DefaultSrc6, Options: pattern(40), VLANs: []uint16{5, 6}}, ether.GSOTCPv6, 122},
}

func TestCoalesceTCP(t *testing.T) {
	for _, tt := range shapes {
		for _, n := range []int{201, 300, 301, 64 * 100} {
			p := tt.p
			p.Payload, p.Seq, p.Flags = pattern(n), 1<<32-150, ether.TCPAck|ether.TCPPsh
			in := tcpSegments(p, 100, false)
			out := merge(ether.Meta{}, in...)
			if len(out.got) != 1 || out.got[0].m.GSO != tt.gso || out.got[0].m.SegmentLen != 100 || out.got[0].m.HeaderLen != tt.header {
				t.Fatalf("%s, %d bytes: %d frames, the first %+v", tt.name, n, len(out.got), out.got[0].m)
			}
			compareFrames(t, out.frames(t), in)
			want, _ := p.Super(100)
			if !bytes.Equal(out.got[0].frame, want) {
				t.Errorf("%s: super-frame\n got %x\nwant %x", tt.name, out.got[0].frame[:128], want[:128])
			}
		}
	}
}

func TestCoalesceUDP(t *testing.T) {
	for _, p := range []ethertest.UDP{{ID: 65535}, {Src: ethertest.DefaultSrc6, VLANs: []uint16{5}}} {
		for _, n := range []int{201, 300, 301} {
			p.Payload = pattern(n)
			in := udpSegments(p, 100, false)
			out := merge(ether.Meta{}, in...)
			want, m := p.Super(100)
			if len(out.got) != 1 || out.got[0].m != m || !bytes.Equal(out.got[0].frame, want) {
				t.Fatalf("%d frames, the first %+v\n got %x\nwant %x", len(out.got), out.got[0].m, out.got[0].frame, want)
			}
			compareFrames(t, out.frames(t), in)
		}
	}
}

// TestCoalesceRefuses: two frames that would merge, but for one difference in
// the second. All that differs goes through as it came.
func TestCoalesceRefuses(t *testing.T) {
	type change func(p *ethertest.TCP)
	tests := []struct {
		name   string
		change change
		only   string
	}{
		{"sequence gap", func(p *ethertest.TCP) { p.Seq++ }, ""},
		{"sequence overlap", func(p *ethertest.TCP) { p.Seq-- }, ""},
		{"repeated", func(p *ethertest.TCP) { p.Seq -= 100 }, ""},
		{"acknowledgement", func(p *ethertest.TCP) { p.Ack++ }, ""},
		{"window", func(p *ethertest.TCP) { p.Window = 77 }, ""},
		{"urgent pointer", func(p *ethertest.TCP) { p.Urgent = 1 }, ""},
		{"SYN", func(p *ethertest.TCP) { p.Flags |= ether.TCPSyn }, ""},
		{"RST", func(p *ethertest.TCP) { p.Flags |= ether.TCPRst }, ""},
		{"URG", func(p *ethertest.TCP) { p.Flags |= ether.TCPUrg }, ""},
		{"CWR", func(p *ethertest.TCP) { p.Flags |= ether.TCPCwr }, ""},
		{"ECE", func(p *ethertest.TCP) { p.Flags |= ether.TCPEce }, ""},
		{"no ACK", func(p *ethertest.TCP) { p.Flags = ether.TCPPsh }, ""},
		{"options", func(p *ethertest.TCP) { p.Options = make([]byte, 12) }, ""},
		{"options of another length", func(p *ethertest.TCP) { p.Options = pattern(16) }, ""},
		{"no payload", func(p *ethertest.TCP) { p.Payload = nil }, ""},
		{"longer", func(p *ethertest.TCP) { p.Payload = pattern(101) }, ""},
		{"padding", func(p *ethertest.TCP) { p.Padding = 1 }, ""},
		{"TOS", func(p *ethertest.TCP) { p.TOS ^= 4 }, ""},
		{"ECN mark", func(p *ethertest.TCP) { p.TOS ^= 1 }, ""},
		{"TTL", func(p *ethertest.TCP) { p.TTL = 63 }, ""},
		{"identification the same", func(p *ethertest.TCP) { p.ID--; p.DF = false }, "4"},
		{"identification gap", func(p *ethertest.TCP) { p.ID++ }, "4"},
		{"DF", func(p *ethertest.TCP) { p.DF = !p.DF }, "4"},
		{"IP options", func(p *ethertest.TCP) { p.IPOptions = []byte{1, 1, 1, 0} }, "4"},
		{"flow label", func(p *ethertest.TCP) { p.FlowLabel ^= 1 }, "6"},
		{"extension header", func(p *ethertest.TCP) { p.Extensions = []ethertest.Extension{ethertest.Padded(0, 8)} }, "6"},
		{"fragment header", func(p *ethertest.TCP) { p.Extensions = []ethertest.Extension{fragment6(0, false)} }, "6"},
		{"Accurate ECN bit", func(*ethertest.TCP) {}, ""}, // in the bytes, below
		{"source MAC", func(p *ethertest.TCP) { p.SrcMAC = 0x020000000009 }, ""},
		{"destination MAC", func(p *ethertest.TCP) { p.DstMAC = 0x020000000009 }, ""},
		{"VLAN", func(p *ethertest.TCP) { p.VLANs = []uint16{4} }, ""},
		{"source port", func(p *ethertest.TCP) { p.Src, p.Dst = otherPorts(*p, 1, 0) }, ""},
		{"destination port", func(p *ethertest.TCP) { p.Src, p.Dst = otherPorts(*p, 0, 1) }, ""},
	}
	for _, shape := range shapes {
		for _, tt := range tests {
			if tt.only != "" && tt.only != shape.name[3:4] {
				continue
			}
			p := shape.p
			p.Payload, p.Seq, p.Ack, p.Flags = pattern(100), 1000, 5, ether.TCPAck
			first := p.Frame()
			p.Seq, p.ID = p.Seq+100, p.ID+1
			if same := merge(ether.Meta{}, first, p.Frame()); len(same.got) != 1 {
				t.Fatalf("%s: %d frames without the difference, want 1", shape.name, len(same.got))
			}
			tt.change(&p)
			if tt.name == "identification the same" {
				// With DF it is allowed: make the first fragmentable as well.
				q := shape.p
				q.Payload, q.Seq, q.Ack, q.Flags, q.DF = pattern(100), 1000, 5, ether.TCPAck, false
				first = q.Frame()
			}
			second := p.Frame()
			if tt.name == "Accurate ECN bit" {
				second = withReserved(second)
			}
			out := merge(ether.Meta{}, first, second)
			if len(out.got) != 2 || out.got[0].first != &first[0] || out.got[1].first != &second[0] ||
				out.got[0].m != (ether.Meta{}) || out.got[1].m != (ether.Meta{}) {
				t.Errorf("%s, %s: %d frames, %+v", shape.name, tt.name, len(out.got), out.got[0].m)
			}
		}
	}
}

// withReserved sets the lowest of the reserved bits of a TCP header.
func withReserved(frame []byte) []byte {
	h, _ := ether.ParseHeaders(frame)
	frame = patch(frame, int(h.L4)+12, frame[h.L4+12]|1)
	copy(frame[h.L4+16:], []byte{0, 0})
	binary.BigEndian.PutUint16(frame[h.L4+16:], ^ether.Sum(frame[h.L4:], ether.PseudoSumOf(frame, h)))
	return frame
}

// TestCoalesceRefusesFirst: two frames with the same fault do not merge either.
func TestCoalesceRefusesFirst(t *testing.T) {
	for _, tt := range []struct {
		name   string
		change func(p *ethertest.TCP)
	}{
		{"SYN", func(p *ethertest.TCP) { p.Flags |= ether.TCPSyn }},
		{"RST", func(p *ethertest.TCP) { p.Flags |= ether.TCPRst }},
		{"URG", func(p *ethertest.TCP) { p.Flags |= ether.TCPUrg }},
		{"CWR", func(p *ethertest.TCP) { p.Flags |= ether.TCPCwr }},
		{"PSH", func(p *ethertest.TCP) { p.Flags |= ether.TCPPsh }},
		{"FIN", func(p *ethertest.TCP) { p.Flags |= ether.TCPFin }},
		{"no ACK", func(p *ethertest.TCP) { p.Flags = ether.TCPEce }},
		{"no payload", func(p *ethertest.TCP) { p.Payload = nil }},
		{"padding", func(p *ethertest.TCP) { p.Padding = 3 }},
		{"IP options", func(p *ethertest.TCP) { p.IPOptions = []byte{1, 1, 1, 0} }},
		{"extension header", func(p *ethertest.TCP) {
			p.Src, p.Extensions = ethertest.DefaultSrc6, []ethertest.Extension{ethertest.Padded(0, 8)}
		}},
	} {
		p := ethertest.TCP{Payload: pattern(100), Flags: ether.TCPAck}
		tt.change(&p)
		first := p.Frame()
		p.Seq, p.ID = p.Seq+uint32(len(p.Payload)), p.ID+1
		second := p.Frame()
		out := merge(ether.Meta{}, first, second)
		if len(out.got) != 2 || out.got[0].first != &first[0] || out.got[1].first != &second[0] {
			t.Errorf("%s: %d frames", tt.name, len(out.got))
		}
	}
	// Fragments of a datagram look alike, and so do datagrams without checksum.
	d := ethertest.UDP{Payload: pattern(100), NoChecksum: true}
	if out := merge(ether.Meta{}, udpSegments(d, 20, false)...); len(out.got) != 5 {
		t.Errorf("UDP without checksum: %d frames, want 5", len(out.got))
	}
	for _, d := range []ethertest.UDP{
		{Payload: pattern(100), IPOptions: make([]byte, 4)},
		{Payload: pattern(100), Src: ethertest.DefaultSrc6, Extensions: []ethertest.Extension{ethertest.Padded(60, 8)}},
	} {
		if out := merge(ether.Meta{}, udpSegments(d, 50, false)...); len(out.got) != 2 {
			t.Errorf("UDP behind options: %d frames, want 2", len(out.got))
		}
	}
	evil := udpSegments(ethertest.UDP{Payload: pattern(100)}, 50, false)
	for i := range evil {
		evil[i] = patch(evil[i], 20, 0x80)
		ether.IPv4(evil[i][14:]).SetChecksum()
	}
	if out := merge(ether.Meta{}, evil...); len(out.got) != 2 {
		t.Errorf("the reserved flag: %d frames, want 2", len(out.got))
	}
}

// TestCoalesceEnds: PSH, FIN and a shorter payload end a super-frame, and what
// follows begins the next.
func TestCoalesceEnds(t *testing.T) {
	for _, tt := range []struct {
		name  string
		flags byte
		last  int
	}{{"PSH", ether.TCPPsh, 100}, {"FIN", ether.TCPFin | ether.TCPPsh, 100}, {"shorter", 0, 99}} {
		p := ethertest.TCP{Payload: pattern(200 + tt.last), Flags: ether.TCPAck | tt.flags}
		in := tcpSegments(p, 100, false)
		p.Seq, p.ID, p.Payload, p.Flags = p.Seq+uint32(len(p.Payload)), p.ID+3, pattern(200), ether.TCPAck
		in = append(in, tcpSegments(p, 100, false)...)
		out := merge(ether.Meta{}, in...)
		if len(out.got) != 2 || out.got[0].parts != 4 || out.got[1].parts != 3 {
			t.Errorf("%s: %d super-frames, the first of %d parts", tt.name, len(out.got), out.got[0].parts)
		}
		compareFrames(t, out.frames(t), in)
	}
}

// TestCoalesceFixedID: DF packets of one identification merge; the exception.
func TestCoalesceFixedID(t *testing.T) {
	p := ethertest.TCP{Payload: pattern(100), DF: true, Flags: ether.TCPAck}
	var in, want [][]byte
	for i := range 4 {
		p.ID = 0
		in = append(in, p.Frame())
		p.ID = uint16(i)
		want = append(want, p.Frame())
		p.Seq += 100
	}
	out := merge(ether.Meta{}, in...)
	if len(out.got) != 1 {
		t.Fatalf("%d frames, want 1", len(out.got))
	}
	compareFrames(t, out.frames(t), want)
	// Neither a number nor the same again changes to the other.
	p.ID, p.Seq = 2, 200
	if out := merge(ether.Meta{}, in[0], in[1], p.Frame()); len(out.got) != 2 {
		t.Errorf("identifications 0, 0, 2: %d frames, want 2", len(out.got))
	}
	p.ID = 0
	if out := merge(ether.Meta{}, want[0], want[1], p.Frame()); len(out.got) != 2 {
		t.Errorf("identifications 0, 1, 0: %d frames, want 2", len(out.got))
	}
}

// TestCoalesceCorrupt: a frame with any bit changed merges with nothing, and
// goes on as it came, said to be unknown; so does it if it is the first.
func TestCoalesceCorrupt(t *testing.T) {
	super := []ethertest.TCP{{Payload: pattern(60), ID: 5}, {Payload: pattern(60), Src: ethertest.DefaultSrc6, Options: pattern(4)}}
	trains := [][][]byte{tcpSegments(super[0], 20, false), tcpSegments(super[1], 20, false),
		udpSegments(ethertest.UDP{Payload: pattern(60)}, 20, false), udpSegments(ethertest.UDP{Src: ethertest.DefaultSrc6, Payload: pattern(60)}, 20, false)}
	for k, train := range trains {
		for at := range train {
			for bit := range len(train[at]) * 8 {
				in := slices.Clone(train)
				bad := patch(in[at], bit/8, in[at][bit/8]^1<<(bit%8))
				in[at] = bad
				out := merge(ether.Meta{}, in...)
				alone := 0
				for _, w := range out.got {
					if w.first == &bad[0] && w.parts == 1 && w.m == (ether.Meta{}) {
						alone++
					}
				}
				if alone != 1 {
					t.Fatalf("train %d, frame %d, byte %d, bit %d: the frame did not go on by itself", k, at, bit/8, bit%8)
				}
				sameBytes(t, out.frames(t), in)
			}
		}
	}
}

// sameBytes compares the frames but not their order.
func sameBytes(t failer, got, want [][]byte) {
	t.Helper()
	got, want = slices.Clone(got), slices.Clone(want)
	slices.SortFunc(got, bytes.Compare)
	slices.SortFunc(want, bytes.Compare)
	compareFrames(t, got, want)
}

// TestCoalesceState: what the Meta of frames says of their checksums.
func TestCoalesceState(t *testing.T) {
	p := ethertest.TCP{Payload: pattern(300)}
	filled, partial := tcpSegments(p, 100, false), tcpSegments(p, 100, true)
	_, pm := ethertest.TCP{Payload: pattern(100)}.Super(0)
	verified := ether.Meta{Checksum: ether.ChecksumVerified}
	if out := merge(verified, filled...); len(out.got) != 1 {
		t.Errorf("verified: %d frames, want 1", len(out.got))
	}
	out := merge(pm, partial...)
	if len(out.got) != 1 {
		t.Errorf("partial: %d frames, want 1", len(out.got))
	}
	compareFrames(t, out.frames(t), filled)
	// Verified frames are not summed; that is the point.
	if out := merge(verified, filled[0], patch(filled[1], 60, 9), filled[2]); len(out.got) != 1 {
		t.Errorf("verified, although not so: %d frames, want 1", len(out.got))
	}
	// A partial field that is not the sum, or elsewhere, would be laundered.
	wrong := patch(partial[1], 50, partial[1][50]^1)
	if out := merge(pm, partial[0], wrong, partial[2]); len(out.got) != 3 || out.got[1].first != &wrong[0] || out.got[1].m != pm {
		t.Errorf("wrong partial sum: %d frames, want 3", len(out.got))
	}
	elsewhere := pm
	elsewhere.ChecksumStart += 4
	if out := merge(elsewhere, partial...); len(out.got) != 3 {
		t.Errorf("partial sum elsewhere: %d frames, want 3", len(out.got))
	}
	// Mixed, as when only some frames came from a kernel's VTEP.
	mixed := &collector{}
	c := ether.NewCoalescer(65535)
	c.Add(mixed, filled[0], ether.Meta{})
	c.Add(mixed, partial[1], pm)
	c.Add(mixed, filled[2], verified)
	c.Flush()
	if len(mixed.got) != 1 {
		t.Errorf("mixed: %d frames, want 1", len(mixed.got))
	}
	compareFrames(t, mixed.frames(t), filled)
}

// TestCoalesceOtherZero: a checksum of 0xffff where 0 is usual is right, but
// would not come back.
func TestCoalesceOtherZero(t *testing.T) {
	p := ethertest.TCP{Payload: make([]byte, 10), Seq: 10, ID: 1}
	f := p.Frame()
	copy(p.Payload, f[50:52]) // now all adds up to 0
	zero := p.Frame()
	if zero[50] != 0 || zero[51] != 0 {
		t.Fatalf("the checksum of %x is not 0", zero)
	}
	before := ethertest.TCP{Payload: make([]byte, 10)}.Frame()
	if out := merge(ether.Meta{}, before, zero); len(out.got) != 1 {
		t.Errorf("checksum 0: %d frames, want 1", len(out.got))
	}
	ffff := patch(zero, 50, 0xff, 0xff)
	ethertest.Check(t, ffff)
	if out := merge(ether.Meta{}, before, ffff); len(out.got) != 2 || out.got[1].first != &ffff[0] {
		t.Errorf("checksum 0xffff: %d frames, want 2", len(out.got))
	}
}

// TestCoalesceOtherZeroIPv4 is TestCoalesceOtherZero for the IPv4 header.
func TestCoalesceOtherZeroIPv4(t *testing.T) {
	p := ethertest.UDP{Payload: make([]byte, 10)}
	f := p.Frame()
	p.ID = binary.BigEndian.Uint16(f[24:26]) // with it the rest adds up to 0xffff
	zero := p.Frame()
	if zero[24] != 0 || zero[25] != 0 {
		t.Fatalf("the header checksum of %x is not 0", zero)
	}
	p.ID--
	before := p.Frame()
	if out := merge(ether.Meta{}, before, zero); len(out.got) != 1 {
		t.Errorf("checksum 0: %d frames, want 1", len(out.got))
	}
	ffff := patch(zero, 24, 0xff, 0xff)
	ethertest.Check(t, ffff)
	if out := merge(ether.Meta{}, before, ffff); len(out.got) != 2 || out.got[1].first != &ffff[0] {
		t.Errorf("checksum 0xffff: %d frames, want 2", len(out.got))
	}
}

// TestCoalesceOrder: what goes through alone comes after what came before it in
// its flow, and super-frames in the order of their first frames.
func TestCoalesceOrder(t *testing.T) {
	flow := func(srcPort uint16) [][]byte {
		src, dst := otherPorts(ethertest.TCP{}, srcPort, 0)
		return tcpSegments(ethertest.TCP{Src: src, Dst: dst, Payload: pattern(400), Flags: ether.TCPAck}, 100, false)
	}
	a, b, d := flow(1), flow(2), flow(3)
	src, dst := otherPorts(ethertest.TCP{}, 2, 0)
	ack := ethertest.TCP{Src: src, Dst: dst, Seq: 200, Flags: ether.TCPAck}.Frame()
	out := merge(ether.Meta{}, a[0], b[0], d[0], d[1], b[1], ack, a[1], b[2], b[3])
	compareFrames(t, out.frames(t), [][]byte{b[0], b[1], ack, a[0], a[1], d[0], d[1], b[2], b[3]})
	if len(out.got) != 5 {
		t.Errorf("%d frames, want 5", len(out.got))
	}
	// A fragment has no ports, so all between the MACs goes first.
	fragment := patch(a[3], 20, 0x20)
	ether.IPv4(fragment[14:]).SetChecksum()
	out = merge(ether.Meta{}, a[0], b[0], a[1], fragment, b[1])
	compareFrames(t, out.frames(t), [][]byte{a[0], a[1], b[0], fragment, b[1]})
	// Not so for another Sink: what that one holds of the flow stays.
	two := &collector{}
	c := ether.NewCoalescer(65535)
	c.Add(two, a[0], ether.Meta{})
	c.Add(&collector{}, fragment, ether.Meta{})
	if len(two.got) != 0 {
		t.Error("a fragment for one Sink let go what another has")
	}
	c.Flush()
	// A super-frame keeps its place in its flow too.
	big, bm := ethertest.TCP{Src: src, Dst: dst, Seq: 200, Payload: pattern(500)}.Super(100)
	sink := &collector{}
	c.Add(sink, b[0], ether.Meta{})
	c.Add(sink, b[1], ether.Meta{})
	c.Add(sink, big, bm)
	if len(sink.got) != 2 || sink.got[1].first != &big[0] || sink.got[1].m != bm {
		t.Errorf("super-frame: %d frames before Flush, want 2", len(sink.got))
	}
}
