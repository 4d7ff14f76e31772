package bridge

import (
	"net/netip"
	"testing"

	"github.com/tulle-net/tulle/ether"
	"github.com/tulle-net/tulle/ether/ethertest"
	"github.com/tulle-net/tulle/tap"
	"github.com/tulle-net/tulle/underlay"
	"github.com/tulle-net/tulle/underlay/underlaytest"
	"github.com/tulle-net/tulle/vxlan"
)

// nullSender takes datagrams and forgets them.
type nullSender struct{ buf [65536]byte }

func (s *nullSender) Reserve(n int) []byte               { return s.buf[:n] }
func (s *nullSender) Commit(netip.AddrPort, uint32, int) {}
func (s *nullSender) Flush()                             {}

// nullDevice takes frames and forgets them.
type nullDevice struct{ mac ether.MAC }

func (d *nullDevice) Name() string                              { return "null" }
func (d *nullDevice) MAC() ether.MAC                            { return d.mac }
func (d *nullDevice) Queues() []tap.Queue                       { return []tap.Queue{d} }
func (d *nullDevice) MTU() int                                  { return 1450 }
func (d *nullDevice) SetMTU(int) error                          { return nil }
func (d *nullDevice) Offloads() tap.Offloads                    { return tap.Offloads{} }
func (d *nullDevice) SetOffload(noTSO, noUSO, noGRO bool) error { return nil }
func (d *nullDevice) Dropped() uint64                           { return 0 }
func (d *nullDevice) Close() error                              { return nil }
func (d *nullDevice) Wait() error                               { return tap.ErrClosed }
func (d *nullDevice) Read(*tap.Batch) error                     { return tap.ErrClosed }
func (d *nullDevice) WriteFrame(ether.Meta, [][]byte) error     { return nil }

// hotBridge is a bridge with one device and one member that have been learnt.
func hotBridge(tb testing.TB) (*Tunnel, *Bridge, *Port) {
	tb.Helper()
	t := NewTunnel(TunnelConfig{Conn: underlaytest.NewNet(1).Conn(vtepOf(1))})
	b, err := t.Add(Config{Name: "blue", VNI: testVNI})
	if err != nil {
		tb.Fatal(err)
	}
	p, err := b.AddPort(&nullDevice{mac: macOf(1)})
	if err != nil {
		tb.Fatal(err)
	}
	t.SetMembers([]netip.AddrPort{vtepOf(2)})
	b.SetMembers([]netip.AddrPort{vtepOf(2)}, nil)
	remote, _ := b.remotes.Load(vtepOf(2).Addr())
	b.fdb.learn(macOf(2), remote, 0)
	return t, b, p
}

// superFrame is a TCP super-frame of 44 segments, as a TAP hands it out.
func superFrame() tap.Frame {
	f := ethertest.TCP{SrcMAC: macOf(1), DstMAC: macOf(2), Payload: make([]byte, 44*1398)}.Frame()
	return tap.Frame{B: f, Meta: ether.Meta{
		GSO: ether.GSOTCPv4, Checksum: ether.ChecksumPartial, HeaderLen: 54, SegmentLen: 1398, ChecksumStart: 34, ChecksumOffset: 16,
	}}
}

func smallFrame() tap.Frame {
	return tap.Frame{B: ethertest.UDP{SrcMAC: macOf(1), DstMAC: macOf(2), Payload: make([]byte, 64)}.Frame()}
}

// trainOf is the slot that holds the datagrams of a super-frame.
func trainOf(tb testing.TB, f tap.Frame) underlay.Slot {
	tb.Helper()
	var cut ether.Segmenter
	if err := cut.Reset(f.B, f.Meta); err != nil {
		tb.Fatal(err)
	}
	s := underlay.Slot{Src: vtepOf(2), SegmentLen: vxlan.HeaderLen + cut.MaxLen()}
	b := make([]byte, cut.MaxLen())
	for n := cut.Next(b); n > 0; n = cut.Next(b) {
		// The other way round: from the member to us.
		macOf(1).Put(b)
		macOf(2).Put(b[6:])
		s.B = append(s.B, datagram(testVNI, b[:n])...)
	}
	return s
}

func hotFrames() map[string]tap.Frame {
	return map[string]tap.Frame{"super-frame": superFrame(), "small": smallFrame()}
}

func TestForwardNoAllocs(t *testing.T) {
	_, _, p := hotBridge(t)
	l := &lane{tx: &nullSender{}}
	for name, f := range hotFrames() {
		if n := testing.AllocsPerRun(200, func() { p.forward(l, &f) }); n != 0 {
			t.Errorf("%s: %v allocations, want 0", name, n)
		}
	}
}

func TestDeliverNoAllocs(t *testing.T) {
	tunnel, _, _ := hotBridge(t)
	in := newIngress(tunnel)
	for name, f := range hotFrames() {
		in.batch.Slots = []underlay.Slot{trainOf(t, f)}
		in.handle()
		if n := testing.AllocsPerRun(200, in.handle); n != 0 {
			t.Errorf("%s: %v allocations, want 0", name, n)
		}
	}
}

func BenchmarkForward(b *testing.B) {
	for name, f := range hotFrames() {
		b.Run(name, func(b *testing.B) {
			_, _, p := hotBridge(b)
			l := &lane{tx: &nullSender{}}
			b.SetBytes(int64(len(f.B)))
			b.ReportAllocs()
			for b.Loop() {
				p.forward(l, &f)
			}
		})
	}
}

func BenchmarkDeliver(b *testing.B) {
	for name, f := range hotFrames() {
		b.Run(name, func(b *testing.B) {
			tunnel, _, _ := hotBridge(b)
			in := newIngress(tunnel)
			in.batch.Slots = []underlay.Slot{trainOf(b, f)}
			b.SetBytes(int64(len(in.batch.Slots[0].B)))
			b.ReportAllocs()
			for b.Loop() {
				in.handle()
			}
		})
	}
}
