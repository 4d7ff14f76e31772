package tap

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/tulle-net/tulle/ether"
)

// TestTunTCP: a host without Ethernet talks to hosts with it, and to another
// without, by both families, both ways, with super-frames into it.
func TestTunTCP(t *testing.T) {
	const n = 8 << 20
	for _, other := range allDrivers {
		for _, v6 := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s/v6=%v", other, v6), func(t *testing.T) {
				sa, sb := newSpace(t), newSpace(t)
				addrA, addrB := "10.32.0.1/16", "10.32.0.2/16"
				if v6 {
					addrA, addrB = "fd00:32::1/64", "fd00:32::2/64"
				}
				a, b := sa.station(DriverTun, addrA, Config{}), sb.station(other, addrB, Config{})
				w := plug(t, a, b)
				transfer(t, sa, sb, netip.MustParsePrefix(addrB).Addr(), n)
				kind := ether.GSOTCPv4
				if v6 {
					kind = ether.GSOTCPv6
				}
				if n := w.super[kind].Load(); n < 20 || w.longest.Load() < 20_000 {
					t.Errorf("the TUN gave %d super-frames, the longest of %d bytes, want the bulk of the traffic", n, w.longest.Load())
				}
				w.longest.Store(0)
				transfer(t, sb, sa, netip.MustParsePrefix(addrA).Addr(), n)
				if longest := w.longest.Load(); other == DriverOffload && longest < 20_000 {
					t.Errorf("the longest frame into the TUN has %d bytes, want a long super-frame", longest)
				}
				// Without them it works as well, cut on the way in.
				if err := a.SetOffload(true, true, true); err != nil {
					t.Fatal(err)
				}
				if o := a.Offloads(); o != (Offloads{DriverTun, "on", "off", "off", "off", "off"}) {
					t.Errorf("Offloads = %+v, want all but the checksum off", o)
				}
				w.longest.Store(0)
				transfer(t, sa, sb, netip.MustParsePrefix(addrB).Addr(), n/4)
				if w.longest.Load() > 1450+14 {
					t.Errorf("the TUN gave a frame of %d bytes, want none beyond the MTU", w.longest.Load())
				}
				transfer(t, sb, sa, netip.MustParsePrefix(addrA).Addr(), n/4)
				tunDrops(t, a)
			})
		}
	}
}

// tunDrops fails if the device has passed something on no further, but for reasons
// in but.
func tunDrops(t *testing.T, dev Device, but ...string) {
	t.Helper()
	EachDrop(dev, func(name string, n uint64) {
		if n > 0 && !strings.Contains(strings.Join(but, " "), name) {
			t.Errorf("%d %s", n, name)
		}
	})
}

// TestTunWithoutHeaders: where the kernel has no virtio headers for it, packets
// pass one by one.
func TestTunWithoutHeaders(t *testing.T) {
	sa, sb := newSpace(t), newSpace(t)
	var a *tunDevice
	sa.do(func() (err error) {
		p := netip.MustParsePrefix("10.32.0.1/16")
		a, err = openTunnelWith(Config{Name: unique(), MTU: 1450, Addresses: []netip.Prefix{p}, Netns: sa.path()}, 0)
		return err
	})
	t.Cleanup(func() { _ = a.Close() })
	b := sb.station(DriverOffload, "10.32.0.2/16", Config{})
	if o := a.Offloads(); o.TSO4 == "on" || o.Checksum == "on" || o.Driver != DriverTun {
		t.Errorf("Offloads = %+v, want none", o)
	}
	plug(t, a, b)
	transfer(t, sa, sb, there.Addr(), 4<<20)
	transfer(t, sb, sa, here.Addr(), 4<<20)
	tunDrops(t, a)
}

// TestTunUDP: datagrams of every size pass, fragmented where they have to be, of
// both families and both ways, the first of which waits for the neighbour.
func TestTunUDP(t *testing.T) {
	for _, v6 := range []bool{false, true} {
		t.Run(fmt.Sprintf("v6=%v", v6), func(t *testing.T) {
			sa, sb := newSpace(t), newSpace(t)
			addrA, addrB := "10.32.0.1/16", "10.32.0.2/16"
			if v6 {
				addrA, addrB = "fd00:32::1/64", "fd00:32::2/64"
			}
			a, b := sa.station(DriverTun, addrA, Config{}), sb.station(DriverOffload, addrB, Config{})
			plug(t, a, b)
			atA := netip.AddrPortFrom(netip.MustParsePrefix(addrA).Addr(), 4000)
			atB := netip.AddrPortFrom(netip.MustParsePrefix(addrB).Addr(), 4001)
			ca, cb := sa.listenUDP(atA), sb.listenUDP(atB)
			sizes := []int{65507, 0, 1, 2, 17, 1378, 1400, 1401, 1402, 1403, 1421, 1422, 1423, 1424, 9000, 65500}
			for n := 18; n < 1450; n += 31 {
				sizes = append(sizes, n)
			}
			for _, n := range sizes {
				if v6 {
					n = min(n, 65487)
				}
				want := pattern(n)
				for _, way := range []struct {
					from, to *net.UDPConn
					addr     netip.AddrPort
				}{{ca, cb, atB}, {cb, ca, atA}} {
					if _, err := way.from.WriteToUDPAddrPort(want, way.addr); err != nil {
						t.Fatal(err)
					}
					if got := receive(t, way.to); !bytes.Equal(got, want) {
						t.Fatalf("%d bytes to %v arrived as %d", n, way.addr, len(got))
					}
				}
			}
			tunDrops(t, a)
		})
	}
}

// TestTunUDPChecksumZero: a sum of 0 is written as 0xffff, or the receiver takes the
// datagram for one without a checksum: never in IPv6.
func TestTunUDPChecksumZero(t *testing.T) {
	sa, sb := newSpace(t), newSpace(t)
	a, b := sa.station(DriverTun, "fd00:32::1/64", Config{}), sb.station(DriverOffload, "fd00:32::2/64", Config{})
	plug(t, a, b)
	atB := netip.AddrPortFrom(netip.MustParseAddr("fd00:32::2"), 4001)
	ca, cb := sa.listenUDP(netip.AddrPortFrom(netip.MustParseAddr("fd00:32::1"), 4000)), sb.listenUDP(atB)
	// One of 65,536 values of two bytes makes the sum 0.
	src, dst := netip.MustParseAddr("fd00:32::1").As16(), atB.Addr().As16()
	udp := []byte{4000 >> 8, 4000 & 0xff, 4001 >> 8, 4001 & 0xff, 0, 10, 0, 0, 0, 0}
	sum := ^ether.Sum(udp, ether.PseudoSum(ether.ProtoUDP, src[:], dst[:], len(udp)))
	payload := []byte{byte(sum >> 8), byte(sum)}
	copy(udp[8:], payload)
	if ether.Sum(udp, ether.PseudoSum(ether.ProtoUDP, src[:], dst[:], len(udp))) != 0xffff {
		t.Fatal("the test's arithmetic is wrong")
	}
	for range 3 {
		if _, err := ca.WriteToUDPAddrPort(payload, atB); err != nil {
			t.Fatal(err)
		}
		if got := receive(t, cb); !bytes.Equal(got, payload) {
			t.Fatalf("got %x, want %x", got, payload)
		}
	}
}

// TestTunMTU: packets of the full MTU pass, before and after it is changed, and
// with what somebody else has set nothing breaks.
func TestTunMTU(t *testing.T) {
	sa, sb := newSpace(t), newSpace(t)
	a, b := sa.station(DriverTun, "10.32.0.1/16", Config{NoTSO: true}), sb.station(DriverOffload, "10.32.0.2/16", Config{MTU: 65521})
	w := plug(t, a, b)
	for _, mtu := range []int{1450, 576, 9000, 32000, 100, 1280} {
		if err := a.SetMTU(mtu); err != nil {
			t.Fatal(err)
		}
		w.longest.Store(0)
		transfer(t, sa, sb, there.Addr(), 256<<10)
		if got := w.longest.Load(); got != int64(mtu)+14 {
			t.Errorf("MTU %d: the longest frame has %d bytes, want %d", mtu, got, mtu+14)
		}
	}
	tunDrops(t, a)
	sa.do(func() error { return netlink.LinkSetMTU(sa.links()[a.Name()], 9000) })
	ca, cb := sa.listenUDP(here), sb.listenUDP(there)
	for _, n := range []int{8000, 100} { // the first is longer than what was agreed
		if _, err := ca.WriteToUDPAddrPort(pattern(n), there); err != nil {
			t.Fatal(err)
		}
	}
	if got := receive(t, cb); len(got) != 100 {
		t.Errorf("%d bytes came, want 100", len(got))
	}
	tunDrops(t, a, "tun_malformed")
}

// wire is the test as what a device is plugged into.
type wire struct {
	t testing.TB
	q Queue
	b *Batch
	// left of the last Read
	left []Frame
}

func newWire(t testing.TB, dev Device) *wire {
	return &wire{t: t, q: dev.Queues()[0], b: NewBatch()}
}

func (w *wire) put(frame []byte) {
	w.t.Helper()
	if err := w.q.WriteFrame(ether.Meta{}, [][]byte{frame}); err != nil {
		w.t.Fatal(err)
	}
}

// next returns the next frame that is wanted.
func (w *wire) next(wanted func(frame []byte) bool) []byte {
	w.t.Helper()
	ended := time.AfterFunc(10*time.Second, func() { w.t.Error("no such frame came") })
	defer ended.Stop()
	for !w.t.Failed() {
		for len(w.left) > 0 {
			f := w.left[0].B
			w.left = w.left[1:]
			if wanted(f) {
				return bytes.Clone(f)
			}
		}
		if err := w.q.Wait(); err != nil {
			w.t.Fatal(err)
		}
		if err := w.q.Read(w.b); err != nil {
			w.t.Fatal(err)
		}
		w.left = w.b.Frames
	}
	w.t.FailNow()
	return nil
}

func isARP(frame []byte) bool { return frame[12] == 8 && frame[13] == 6 }
func isUDP(frame []byte) bool { return frame[12] == 8 && frame[13] == 0 && frame[23] == ether.ProtoUDP }

// TestTunNeighbour: what a real host sends waits for its neighbour, goes to where
// that one says it has moved, and frames that are not for the host do not reach it.
func TestTunNeighbour(t *testing.T) {
	s := newSpace(t)
	dev := s.station(DriverTun, "10.32.0.1/16", Config{
		Netns: s.path(), Gateways: []netip.Addr{netip.MustParseAddr("10.32.0.9")},
	})
	w := newWire(t, dev)
	conn := s.listenUDP(here)
	send := func(to string, n int) {
		t.Helper()
		if _, err := conn.WriteToUDPAddrPort(pattern(n), netip.MustParseAddrPort(to)); err != nil {
			t.Fatal(err)
		}
	}
	const first, second = ether.MAC(0x0200_0000_0007), ether.MAC(0x0200_0000_0008)
	seven, nine := netip.MustParseAddr("10.32.0.7"), netip.MustParseAddr("10.32.0.9")

	send("10.32.0.7:9", 100)
	send("10.32.0.7:9", 101)
	asked := w.next(isARP)
	if want := ether.AppendARP(nil, ether.Broadcast, ether.ARPRequest, dev.MAC(), here.Addr(), 0, seven); !bytes.Equal(asked, want) {
		t.Errorf("asked %x, want %x", asked, want)
	}
	w.put(ether.AppendARP(nil, dev.MAC(), ether.ARPReply, first, seven, dev.MAC(), here.Addr()))
	for _, n := range []int{100, 101} {
		if f := w.next(isUDP); ether.MACFrom(f) != first || ether.MACFrom(f[6:]) != dev.MAC() || len(f) != 42+n {
			t.Errorf("sent %x, want %d bytes to %v", f, n, first)
		}
	}
	// It says that it has moved (RFC 5227, section 3).
	w.put(ether.AppendARP(nil, ether.Broadcast, ether.ARPRequest, second, seven, 0, seven))
	send("10.32.0.7:9", 102)
	if f := w.next(isUDP); ether.MACFrom(f) != second {
		t.Errorf("sent to %v, want %v", ether.MACFrom(f), second)
	}
	// What is off the subnet goes to the gateway.
	send("192.0.2.1:9", 103)
	if asked := w.next(isARP); netip.AddrFrom4([4]byte(asked[38:42])) != nine {
		t.Errorf("asked %x, want for the gateway", asked)
	}
	w.put(ether.AppendARP(nil, dev.MAC(), ether.ARPReply, first, nine, dev.MAC(), here.Addr()))
	if f := w.next(isUDP); ether.MACFrom(f) != first {
		t.Errorf("sent to %v, want the gateway's MAC", ether.MACFrom(f))
	}
	// Who probes for the host's address hears that it is taken (RFC 5227, section 2.1.1).
	w.put(ether.AppendARP(nil, ether.Broadcast, ether.ARPRequest, second, netip.IPv4Unspecified(), 0, here.Addr()))
	if got, want := w.next(isARP), ether.AppendARP(nil, second, ether.ARPReply, dev.MAC(), here.Addr(), second, netip.IPv4Unspecified()); !bytes.Equal(got, want) {
		t.Errorf("the probe was answered %x, want %x", got, want)
	}
	// For another host, and for a group but to this one: not for this host. Then one that is.
	for i, mac := range []ether.MAC{first, ether.Broadcast, dev.MAC()} {
		frame, m := udpFrame(netip.MustParseAddrPort("10.32.0.7:9"), here, pattern(10+i), 0)
		mac.Put(frame)
		if err := w.q.WriteFrame(m, splitAt(frame, 14, 20)); err != nil {
			t.Fatal(err)
		}
	}
	if got := receive(t, conn); len(got) != 12 {
		t.Errorf("the host got %d bytes, want 12", len(got))
	}
	if n := dev.(*tunDevice).st.drops[dropOtherHost].Load(); n != 2 {
		t.Errorf("%d frames for others, want 2", n)
	}
	tunDrops(t, dev, "tun_other_host")
}

// TestTunReadNoAllocs, and WriteFrame of packets and super-frames.
func TestTunNoAllocs(t *testing.T) {
	if raceEnabled {
		t.Skip("sync.Pool drops at random under the race detector")
	}
	s := newSpace(t)
	dev := s.station(DriverTun, "10.32.0.1/16", Config{})
	w := newWire(t, dev)
	conn := s.listenUDP(here)
	frame, m := udpFrame(there, here, pattern(1200), 0)
	super, sm := udpFrame(there, here, pattern(9600), 1200)
	parts := [][]byte{nil}
	for what, f := range map[string]func(){
		"packet": func() { parts[0] = frame; _ = w.q.WriteFrame(m, parts) },
		"super":  func() { parts[0] = super; _ = w.q.WriteFrame(sm, parts) },
	} {
		if n := testing.AllocsPerRun(100, f); n != 0 {
			t.Errorf("WriteFrame of a %s allocates %v times", what, n)
		}
	}
	w.put(ether.AppendARP(nil, dev.MAC(), ether.ARPRequest, 0x0200_0000_0002, there.Addr(), 0, here.Addr()))
	raw, err := conn.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct{ lenBytes, segment int }{{1000, 0}, {20_500, 1000}} {
		if err := errors.Join(raw.Control(func(fd uintptr) {
			err = unix.SetsockoptInt(int(fd), unix.SOL_UDP, unix.UDP_SEGMENT, c.segment)
		}), err); err != nil {
			t.Fatal(err)
		}
		payload, got := pattern(c.lenBytes), 0
		if n := testing.AllocsPerRun(100, func() {
			if _, err := conn.WriteToUDPAddrPort(payload, there); err != nil {
				t.Fatal(err)
			}
			for {
				if err := w.q.Read(w.b); err != nil || len(w.b.Frames) == 0 {
					t.Fatalf("Read found no datagram: %v", err)
				}
				if f := w.b.Frames[len(w.b.Frames)-1]; isUDP(f.B) {
					if len(f.B) == 42+c.lenBytes && int(f.Meta.SegmentLen) == c.segment && len(f.Head) == Headroom+len(f.B) {
						got++
					}
					break
				}
			}
		}); n != 0 {
			t.Errorf("Read of %d bytes allocates %v times", c.lenBytes, n)
		}
		if got != 101 { // one to warm up
			t.Errorf("%d of 101 trains of %d bytes were read whole", got, c.lenBytes)
		}
	}
}

// TestTunUSO: a UDP train passes out of the host whole, in the right order, behind
// what waits for the neighbour as well.
func TestTunUSO(t *testing.T) {
	const seg, total = 1000, 30_500
	sa, sb := newSpace(t), newSpace(t)
	a, b := sa.station(DriverTun, "10.32.0.1/16", Config{}), sb.station(DriverOffload, "10.32.0.2/16", Config{})
	w := plug(t, a, b)
	out, in := sa.listenUDP(here), sb.listenUDP(there)
	raw, err := out.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(raw.Control(func(fd uintptr) {
		err = unix.SetsockoptInt(int(fd), unix.SOL_UDP, unix.UDP_SEGMENT, seg)
	}), err); err != nil {
		t.Fatal(err)
	}
	payload := pattern(total)
	for range 3 {
		if _, err := out.WriteToUDPAddrPort(payload, there); err != nil {
			t.Fatal(err)
		}
		for off := 0; off < total; off += seg {
			if got := receive(t, in); !bytes.Equal(got, payload[off:min(off+seg, total)]) {
				t.Fatalf("datagram at %d is damaged", off)
			}
		}
	}
	if n := w.super[ether.GSOUDP].Load(); n != 2 { // the first waited, in pieces
		t.Errorf("%d UDP super-frames, want 2", n)
	}
	tunDrops(t, a)
}

// BenchmarkTunWrite is what a train of 60,000 bytes costs on its way into a host that
// throws it away: as the drivers write it, in pieces, and as the library would.
func BenchmarkTunWrite(b *testing.B) {
	frame, m := udpFrame(there, here, pattern(60_000), 1400)
	for _, c := range []struct {
		what   string
		driver Driver
		cfg    Config
	}{{"offload", DriverOffload, Config{}}, {"tun", DriverTun, Config{}}, {"tun in pieces", DriverTun, Config{NoGRO: true}}} {
		b.Run(c.what, func(b *testing.B) {
			dev := newSpace(b).station(c.driver, herePrefix, c.cfg)
			dev.MAC().Put(frame)
			q, parts := dev.Queues()[0], [][]byte{frame}
			b.SetBytes(int64(len(frame)))
			b.ReportAllocs()
			for b.Loop() {
				if err := q.WriteFrame(m, parts); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
	b.Run("tun by the library", func(b *testing.B) {
		d := newSpace(b).station(DriverTun, herePrefix, Config{}).(*tunDevice)
		d.MAC().Put(frame)
		var seg ether.Segmenter
		memory, bufs := make([][]byte, 64), make([][]byte, 0, 64)
		for i := range memory {
			memory[i] = make([]byte, ether.MaxFrame)
		}
		b.SetBytes(int64(len(frame)))
		b.ReportAllocs()
		for b.Loop() {
			if seg.Reset(frame, m) != nil {
				b.Fatal("no super-frame")
			}
			bufs = bufs[:0]
			for n := seg.Next(memory[0]); n > 0; n = seg.Next(memory[len(bufs)]) {
				bufs = append(bufs, memory[len(bufs)][:n])
			}
			if _, err := d.tun.Write(bufs, etherLen); err != nil {
				b.Fatal(err)
			}
		}
	})
}

// BenchmarkTunRead is what a datagram of the host costs on its way out, sending it included.
func BenchmarkTunRead(b *testing.B) {
	for _, d := range []Driver{DriverOffload, DriverTun} {
		b.Run(string(d), func(b *testing.B) {
			s := newSpace(b)
			dev := s.station(d, herePrefix, Config{})
			q, batch := dev.Queues()[0], NewBatch()
			conn := s.listenUDP(here)
			to, payload := netip.MustParseAddrPort("10.32.255.255:9"), pattern(1000)
			raw, err := conn.SyscallConn()
			if err != nil {
				b.Fatal(err)
			}
			if err := errors.Join(raw.Control(func(fd uintptr) {
				err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_BROADCAST, 1)
			}), err); err != nil {
				b.Fatal(err)
			}
			b.SetBytes(int64(len(payload)))
			b.ReportAllocs()
			for b.Loop() {
				for range 16 {
					if _, err := conn.WriteToUDPAddrPort(payload, to); err != nil {
						b.Fatal(err)
					}
				}
				for got := 0; got < 16; {
					if err := q.Read(batch); err != nil {
						b.Fatal(err)
					}
					got += len(batch.Frames)
				}
			}
		})
	}
}

// TestTunWithoutIPv6: where IPv6 is switched off there is IPv4, and no error.
func TestTunWithoutIPv6(t *testing.T) {
	sa, sb := newSpace(t), newSpace(t)
	for _, s := range []*space{sa, sb} {
		s.do(func() error { return os.WriteFile("/proc/sys/net/ipv6/conf/default/disable_ipv6", []byte("1"), 0) })
	}
	a, b := sa.station(DriverTun, "10.32.0.1/16", Config{}), sb.station(DriverTun, "10.32.0.2/16", Config{})
	if got := sa.addresses(a.Name()); len(got) != 1 {
		t.Errorf("addresses %v, want the IPv4 one alone", got)
	}
	plug(t, a, b)
	transfer(t, sa, sb, there.Addr(), 1<<20)
	tunDrops(t, a)
	sa.do(func() error {
		dev, err := Open(Config{Name: unique(), MTU: 1450, Driver: DriverTun, Addresses: []netip.Prefix{netip.MustParsePrefix("fd00:32::1/64")}})
		if err == nil {
			_ = dev.Close()
			return errors.New("an IPv6 address was taken")
		}
		if !strings.Contains(err.Error(), "IPv6 is switched off") {
			t.Errorf("an IPv6 address: %v", err)
		}
		return nil
	})
}

// TestNoSolicit: in a namespace of its own a device asks for no routers.
func TestNoSolicit(t *testing.T) {
	everyDriver(t, func(t *testing.T, d Driver) {
		for _, no := range []bool{false, true} {
			s, target := newSpace(t), newSpace(t)
			s.open(Config{Name: "eth0", Driver: d, Netns: target.path(), NoSolicit: no})
			target.do(func() error {
				b, err := os.ReadFile("/proc/sys/net/ipv6/conf/eth0/router_solicitations")
				if got := strings.TrimSpace(string(b)); (got == "0") != no {
					t.Errorf("router_solicitations = %s with NoSolicit %v", got, no)
				}
				return err
			})
		}
	})
}

// TestTunUnreachable: a program of the host's is told that there is nobody, as soon as
// it would be by Ethernet: the fourth second.
func TestTunUnreachable(t *testing.T) {
	s := newSpace(t)
	dev := s.station(DriverTun, "10.32.0.1/16", Config{Addresses: []netip.Prefix{netip.MustParsePrefix("fd00:32::1/64")}})
	ended := make(chan error, 1)
	go func() { ended <- pump(dev.Queues()[0], func(Frame) {}) }()
	var wg sync.WaitGroup
	for _, to := range []string{"10.32.0.7:9", "[fd00:32::7]:9"} {
		wg.Go(func() {
			start := time.Now()
			s.do(func() error {
				conn, err := (&net.Dialer{Timeout: 20 * time.Second}).Dial("tcp", to)
				if err == nil {
					_ = conn.Close()
				}
				if !errors.Is(err, unix.EHOSTUNREACH) {
					t.Errorf("connect to %s: %v, want EHOSTUNREACH", to, err)
				}
				return nil
			})
			if took := time.Since(start); took < 2*time.Second || took > 8*time.Second {
				t.Errorf("connect to %s: told after %v, want some three seconds", to, took)
			}
		})
	}
	wg.Wait()
	_ = dev.Close()
	<-ended
}
