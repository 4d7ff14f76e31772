package tap

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tulle-net/tulle/ether"
	"github.com/tulle-net/tulle/internal/ready"
)

var (
	here  = netip.MustParseAddrPort("10.32.0.1:4000")
	there = netip.MustParseAddrPort("10.32.0.2:4001") // nobody: its frames are the test's
)

const herePrefix = "10.32.0.1/16"

// splitAt returns b as parts, some of them empty.
func splitAt(b []byte, at ...int) [][]byte {
	var parts [][]byte
	last := 0
	for _, i := range at {
		parts = append(parts, b[last:i])
		last = i
	}
	return append(parts, nil, b[last:])
}

func pattern(n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(i * 7 >> 3)
	}
	return b
}

// TestWriteCuts: where a super-frame does not pass whole, the kernel gets the
// frames that it stands for, with right checksums.
func TestWriteCuts(t *testing.T) {
	for _, c := range []struct {
		what string
		cfg  Config
		seg  int
	}{
		{"plain", Config{Driver: DriverPlain}, 1000},
		{"offload without GRO", Config{Driver: DriverOffload, NoGRO: true}, 1000},
		{"more segments than the kernel takes", Config{Driver: DriverOffload}, 50},
	} {
		t.Run(c.what, func(t *testing.T) {
			s := newSpace(t)
			dev := s.station(c.cfg.Driver, herePrefix, c.cfg)
			before := dev.Offloads()
			sn := s.sniff(dev)
			payload := pattern(9500)
			frame, m := udpFrame(there, here, payload, c.seg)
			for range 2 {
				if err := dev.Queues()[0].WriteFrame(m, splitAt(frame, 14, 42, 5000)); err != nil {
					t.Fatal(err)
				}
				for i, want := range slices.Collect(slices.Chunk(payload, c.seg)) {
					got := sn.next(dev.MAC())
					h, ok := ether.ParseHeaders(got)
					if !ok || !ether.VerifyL4(got, h) || !bytes.Equal(got[h.Payload:h.End], want) {
						t.Fatalf("frame %d = %x (checksum right: %v), want payload %x", i, got, ok && ether.VerifyL4(got, h), want)
					}
				}
			}
			if o := dev.Offloads(); o != before {
				t.Errorf("Offloads = %+v, want %+v: one odd frame is no reason", o, before)
			}
		})
	}
}

func TestWritePartialChecksum(t *testing.T) {
	eachDriver(t, func(t *testing.T, d Driver) {
		s := newSpace(t)
		dev := s.station(d, herePrefix, Config{})
		conn := s.listenUDP(here)
		for _, n := range []int{1, 64, 1400} {
			frame, m := udpFrame(there, here, pattern(n), 0)
			if err := dev.Queues()[0].WriteFrame(m, [][]byte{frame}); err != nil {
				t.Fatal(err)
			}
			if got := receive(t, conn); !bytes.Equal(got, pattern(n)) {
				t.Errorf("the socket got %x, want %d bytes", got, n)
			}
		}
	})
}

// TestWriteManyParts: more parts than one writev gathers.
func TestWriteManyParts(t *testing.T) {
	eachDriver(t, func(t *testing.T, d Driver) {
		s := newSpace(t)
		dev := s.station(d, herePrefix, Config{})
		conn := s.listenUDP(here)
		for _, n := range []int{maxParts - 1, maxParts, maxParts + 1, 1000} {
			frame, m := udpFrame(there, here, pattern(1200), 0)
			parts := make([][]byte, 0, n)
			for i := range n {
				parts = append(parts, frame[i*len(frame)/n:(i+1)*len(frame)/n])
			}
			if err := dev.Queues()[0].WriteFrame(m, parts); err != nil {
				t.Fatalf("%d parts: %v", n, err)
			}
			if got := receive(t, conn); !bytes.Equal(got, pattern(1200)) {
				t.Errorf("%d parts: the socket got %x", n, got)
			}
		}
	})
}

func TestWriteInvalid(t *testing.T) {
	eachDriver(t, func(t *testing.T, d Driver) {
		s := newSpace(t)
		dev := s.station(d, herePrefix, Config{})
		frame, super := udpFrame(there, here, pattern(5000), 1000)
		noPacket := super
		noPacket.ChecksumStart = 9000
		for what, c := range map[string]struct {
			m     ether.Meta
			parts [][]byte
		}{
			"no parts":             {ether.Meta{}, nil},
			"empty":                {ether.Meta{}, [][]byte{nil, {}}},
			"13 bytes":             {ether.Meta{}, [][]byte{frame[:13]}},
			"too long":             {ether.Meta{}, [][]byte{make([]byte, ether.MaxFrame), {1}}},
			"too long super-frame": {super, [][]byte{frame, make([]byte, ether.MaxFrame)}},
			"checksum outside":     {ether.Meta{Checksum: ether.ChecksumPartial, ChecksumStart: 60}, [][]byte{frame[:60]}},
			"GSO of no packet":     {noPacket, [][]byte{frame}},
			"GSO kind unknown":     {ether.Meta{GSO: 9, SegmentLen: 10}, [][]byte{frame}},
		} {
			if err := dev.Queues()[0].WriteFrame(c.m, c.parts); !errors.Is(err, unix.EINVAL) {
				t.Errorf("%s: WriteFrame = %v, want EINVAL", what, err)
			}
		}
		if o := dev.Offloads(); d == DriverOffload && o.GRO != "on" {
			t.Errorf("GRO is %q after invalid frames, want on", o.GRO)
		}
		s.setDown(dev)
		if err := dev.Queues()[0].WriteFrame(super, [][]byte{frame}); !errors.Is(err, unix.EIO) {
			t.Errorf("WriteFrame while down = %v, want EIO", err)
		}
	})
}

// TestConcurrentWrite: frames of many writers arrive whole and once.
func TestConcurrentWrite(t *testing.T) {
	const writers, each = 4, 500
	eachDriver(t, func(t *testing.T, d Driver) {
		s := newSpace(t)
		dev := s.station(d, herePrefix, Config{})
		conn := s.listenUDP(here)
		var wg sync.WaitGroup
		for w := range writers {
			wg.Go(func() {
				payload := make([]byte, 256)
				for i := range each {
					for j := range payload {
						payload[j] = byte(w + i)
					}
					binary.BigEndian.PutUint32(payload, uint32(w*each+i))
					frame, m := udpFrame(there, here, payload, 0)
					if err := dev.Queues()[0].WriteFrame(m, splitAt(frame, 14, 60, 100)); err != nil {
						t.Errorf("WriteFrame = %v", err)
						return
					}
				}
			})
		}
		wg.Wait()
		seen := make([]bool, writers*each)
		for range seen {
			b := receive(t, conn)
			n := binary.BigEndian.Uint32(b)
			fill := byte(n/each + n%each)
			if seen[n] || len(b) != 256 || bytes.Count(b[4:], []byte{fill}) != 252 {
				t.Fatalf("datagram %d came twice or damaged: %x", n, b)
			}
			seen[n] = true
		}
	})
}

// TestGiveUp: the switch that a kernel of trap 5 would throw.
func TestGiveUp(t *testing.T) {
	s := newSpace(t)
	var log bytes.Buffer
	dev := s.station(DriverOffload, herePrefix, Config{Log: slog.New(slog.NewTextHandler(&log, nil))})
	d := dev.(*offloadDevice)
	for range 3 {
		d.giveUpWhole(ether.GSOUDP, unix.EINVAL)
	}
	if n := strings.Count(log.String(), "level=WARN"); n != 1 {
		t.Errorf("%d warnings, want 1: %s", n, &log)
	}
	if gro := dev.Offloads().GRO; !strings.HasPrefix(gro, "TCPv4: on; TCPv6: on; UDP: the kernel refuses") {
		t.Errorf("GRO = %q", gro)
	}
	sn := s.sniff(dev)
	frame, m := udpFrame(there, here, pattern(3000), 1000)
	if err := dev.Queues()[0].WriteFrame(m, [][]byte{frame}); err != nil {
		t.Fatal(err)
	}
	for range 3 {
		if got := sn.next(dev.MAC()); len(got) != 1042 {
			t.Errorf("%d bytes came, want a segment", len(got))
		}
	}
}

// TestReadBatches: small frames are drained, a super-frame ends the batch.
func TestReadBatches(t *testing.T) {
	s := newSpace(t)
	dev := s.open(Config{Driver: DriverOffload})
	q := dev.Queues()[0].(*offloadQueue)
	out := s.packetSocket(dev)
	drainAll(q)
	small, none := udpFrame(here, there, pattern(100), 0)
	super, gso := udpFrame(here, there, pattern(9000), 1000)
	big, _ := udpFrame(here, there, pattern(1400), 0)
	for range 3 {
		out.send(t, small, none)
	}
	out.send(t, super, gso)
	out.send(t, big, none)
	b := NewBatch()
	if err := q.Wait(); err != nil {
		t.Fatal(err)
	}
	if err := q.Read(b); err != nil || len(b.Frames) != 4 {
		t.Fatalf("Read = %d frames, %v, want 3 small ones and a super-frame", len(b.Frames), err)
	}
	for i, f := range b.Frames {
		want, m := small, none
		if i == 3 {
			want, m = super, gso
		}
		if !bytes.Equal(f.B, want) || f.Meta != m {
			t.Errorf("frame %d: %d bytes, %+v, want %d, %+v", i, len(f.B), f.Meta, len(want), m)
		}
	}
	if err := q.Read(b); err != nil || len(b.Frames) != 1 || !bytes.Equal(b.Frames[0].B, big) {
		t.Errorf("second Read = %d frames, %v, want the last", len(b.Frames), err)
	}
	// More than a batch: bounded by frames, and by room.
	for _, c := range []struct {
		frame []byte
		most  int
	}{{small, BatchFrames}, {big, (batchBytes-frameRoom)/len(big) + 1}} {
		const n = 100
		for range n {
			out.send(t, c.frame, none)
		}
		got := 0
		for got < n {
			if err := q.Read(b); err != nil || len(b.Frames) == 0 || len(b.Frames) > c.most {
				t.Fatalf("Read = %d frames, %v after %d, want 1 to %d", len(b.Frames), err, got, c.most)
			}
			for _, f := range b.Frames {
				if !bytes.Equal(f.B, c.frame) {
					t.Fatalf("frame %d damaged", got)
				}
				got++
			}
		}
	}
	if err := q.Read(b); err != nil || len(b.Frames) != 0 {
		t.Errorf("Read = %d frames, %v, want none", len(b.Frames), err)
	}
}

// TestImpossibleHeader plays the kernel through a socket. A frame that does not
// fit its header is one error, and does not end the queue or spoil its batch.
func TestImpossibleHeader(t *testing.T) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	file, err := ready.New(fds[0], "kernel")
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	defer unix.Close(fds[1])
	q, kernel := newOffloadQueue(nil, file), out(fds[1])
	small, none := udpFrame(here, there, pattern(100), 0)
	super, gso := udpFrame(here, there, pattern(3000), 1000)
	unfit := gso
	unfit.Checksum = ether.ChecksumUnknown
	kernel.send(t, small, none)
	kernel.send(t, super, unfit)
	kernel.send(t, super, gso)
	kernel.send(t, super, unfit)
	kernel.write(t, []byte("short"))
	kernel.send(t, small, none)
	b := NewBatch()
	for i, want := range []struct {
		frames int
		err    error
	}{{1, nil}, {0, errHeader}, {1, nil}, {0, errHeader}, {0, errHeader}, {1, nil}, {0, nil}} {
		if err := q.Read(b); !errors.Is(err, want.err) || len(b.Frames) != want.frames {
			t.Errorf("Read %d = %d frames, %v, want %d, %v", i, len(b.Frames), err, want.frames, want.err)
		}
	}
}

func TestNoAllocs(t *testing.T) {
	if raceEnabled {
		t.Skip("sync.Pool allocates under the race detector")
	}
	s := newSpace(t)
	dev := s.station(DriverOffload, herePrefix, Config{})
	q := dev.Queues()[0].(*offloadQueue)
	out := s.packetSocket(dev)
	drainAll(q)
	small, none := udpFrame(here, there, pattern(100), 0)
	super, gso := udpFrame(here, there, pattern(60_000), 1000)
	many := slices.Collect(slices.Chunk(super, 300)) // more than maxParts
	parts := splitAt(super, 14, 42, 20_000)
	b := NewBatch()
	packet := out.packet(small, none)
	check := func(what string, fn func()) {
		t.Helper()
		if n := testing.AllocsPerRun(50, fn); n != 0 {
			t.Errorf("%s allocates %v times, want 0", what, n)
		}
	}
	write := func(m ether.Meta, p [][]byte) func() {
		return func() {
			if err := q.WriteFrame(m, p); err != nil {
				t.Fatal(err)
			}
		}
	}
	check("Wait and Read", func() {
		out.write(t, packet)
		if err := errors.Join(q.Wait(), q.Read(b)); err != nil || len(b.Frames) != 1 {
			t.Fatalf("Read = %d frames, %v", len(b.Frames), err)
		}
	})
	check("Read of nothing", func() { _ = q.Read(b) })
	check("WriteFrame of a super-frame", write(gso, parts))
	check("WriteFrame of many parts", write(gso, many))
	if err := dev.SetOffload(false, false, true); err != nil {
		t.Fatal(err)
	}
	check("WriteFrame that cuts", write(gso, parts))
	s.setDown(dev)
	check("WriteFrame that fails", func() {
		if err := q.WriteFrame(none, parts); err != error(unix.EIO) {
			t.Fatalf("WriteFrame = %v, want EIO", err)
		}
	})
}

func BenchmarkWriteSuper(b *testing.B) {
	s := newSpace(b)
	dev := s.station(DriverOffload, herePrefix, Config{})
	frame, m := udpFrame(there, here, pattern(60_000), 1000)
	(dev.MAC() ^ 1).Put(frame) // dropped by the stack at once
	parts := splitAt(frame, 42, 20_000)
	b.SetBytes(int64(len(frame)))
	for b.Loop() {
		if err := dev.Queues()[0].WriteFrame(m, parts); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkReadSuper(b *testing.B) {
	s := newSpace(b)
	dev := s.open(Config{Driver: DriverOffload})
	q := dev.Queues()[0].(*offloadQueue)
	out := s.packetSocket(dev)
	drainAll(q)
	frame, m := udpFrame(here, there, pattern(60_000), 1000)
	packet, batch := out.packet(frame, m), NewBatch()
	b.SetBytes(int64(len(frame)))
	for b.Loop() { // with the packet socket's write
		out.write(b, packet)
		if err := q.Read(batch); err != nil || len(batch.Frames) != 1 {
			b.Fatal(len(batch.Frames), err)
		}
	}
}

// drainAll discards what the stack sends of itself when a device comes up.
func drainAll(q *offloadQueue) {
	for end := time.Now().Add(50 * time.Millisecond); q.waitUntil(end); {
		q.drain()
	}
}

// out is a packet socket through which the kernel sends what the test says.
type out int

func (s *space) packetSocket(dev Device) out {
	s.t.Helper()
	index := s.links()[dev.Name()].Attrs().Index
	var fd int
	s.do(func() (err error) {
		if fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0); err != nil {
			return err
		}
		s.t.Cleanup(func() { _ = unix.Close(fd) })
		if err = unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_VNET_HDR, 1); err != nil {
			return err
		}
		if err = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, 8<<20); err != nil {
			return err
		}
		return unix.Bind(fd, &unix.SockaddrLinklayer{Ifindex: index})
	})
	return out(fd)
}

func (o out) packet(frame []byte, m ether.Meta) []byte {
	h := make([]byte, virtioLen)
	encodeVirtio(h, m)
	return append(h, frame...)
}

func (o out) write(t testing.TB, packet []byte) {
	if _, err := unix.Write(int(o), packet); err != nil {
		t.Fatal(err)
	}
}

func (o out) send(t testing.TB, frame []byte, m ether.Meta) {
	t.Helper()
	o.write(t, o.packet(frame, m))
}

func (s *space) listenUDP(a netip.AddrPort) *net.UDPConn {
	s.t.Helper()
	var conn *net.UDPConn
	s.do(func() (err error) {
		conn, err = net.ListenUDP("udp", net.UDPAddrFromAddrPort(a))
		return err
	})
	s.t.Cleanup(func() { _ = conn.Close() })
	raw, err := conn.SyscallConn()
	if err != nil {
		s.t.Fatal(err)
	}
	if cerr := raw.Control(func(fd uintptr) {
		err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 16<<20)
	}); err != nil || cerr != nil {
		s.t.Fatal(err, cerr)
	}
	return conn
}

func receive(t testing.TB, conn *net.UDPConn) []byte {
	t.Helper()
	if err := conn.SetReadDeadline(time.Now().Add(5 * time.Second)); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 65536)
	n, err := conn.Read(b)
	if err != nil {
		t.Fatal(fmt.Errorf("no datagram: %w", err))
	}
	return b[:n]
}
