package tap

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tulle-net/tulle/ether"
)

// The self-test sends one small super-frame of each kind through the device,
// both ways, before it gets addresses or a namespace. Out of the kernel: a
// packet socket sends it, the queue must read it whole. Into the kernel: the
// write must be taken; the stack drops the frame because its destination is
// another host, and a bridge would because its source is no station.

// probeTimeout bounds the wait for one probe that never comes.
const probeTimeout = 250 * time.Millisecond

// probeSegment is the payload bytes per segment of a probe, which has two.
const probeSegment = 64

// findings is what a self-test found out for sure: offloads are the kernel's
// and do not differ from TAP to TAP, while a test takes some 10 ms.
type findings struct {
	mu    sync.Mutex
	known bool
	reasons
}

// found is this process's.
var found findings

// keep takes over what a test found, unless it may be due to the moment.
func (f *findings) keep(r reasons, sure bool) {
	if sure {
		f.known, f.reasons = true, r
	}
}

// selfTest tries each offload and switches off what fails. The device is down
// before and after.
func (d *offloadDevice) selfTest() error {
	h, dev, err := d.find()
	if err != nil {
		return err
	}
	defer h.Close()
	d.mac = ether.MACFrom(dev.Attrs().HardwareAddr)
	found.mu.Lock()
	defer found.mu.Unlock()
	d.state.mu.Lock()
	if found.known {
		d.state.reasons.fill(found.reasons)
		defer d.state.mu.Unlock()
		return d.apply()
	}
	d.state.mu.Unlock()
	_ = h.LinkSetIP6AddrGenMode(dev, addrGenNone) // no router solicitations yet
	if err := h.LinkSetUp(dev); err != nil {
		return fmt.Errorf("bring the device up for its self-test: %w", err)
	}
	q := d.queues[0].(*offloadQueue)
	sure := d.testOut(dev.Attrs().Index)
	sure = d.state.testIn(q.probeWrite) && sure
	if err := h.LinkSetDown(dev); err != nil {
		return fmt.Errorf("bring the device down after its self-test: %w", err)
	}
	q.drain()
	d.warn()
	d.state.mu.Lock()
	defer d.state.mu.Unlock()
	found.keep(d.state.reasons, sure)
	return d.apply()
}

// warn logs what failed.
func (d *offloadDevice) warn() {
	s := &d.state
	for _, o := range []struct{ name, why string }{
		{"checksum", s.checksum}, {"TSO4", s.tso4}, {"TSO6", s.tso6}, {"USO", s.uso}, {"GRO", s.groWhy()},
	} {
		if o.why != "" {
			d.log.Warn("TAP offload not available", "port", d.name, "offload", o.name, "err", o.why)
		}
	}
}

// testOut tries the offloads of frames that leave the kernel, and reports
// whether it is sure. Without a packet socket (CAP_NET_RAW) the kernel's word is
// taken.
func (d *offloadDevice) testOut(index int) (sure bool) {
	fd, err := d.packetSocket()
	if err != nil {
		return true
	}
	// Some 20 ms, until nobody in the kernel can be using it: nobody has to wait for that.
	defer func() { go unix.Close(fd) }()
	if unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_VNET_HDR, 1) != nil {
		return true
	}
	sent := ether.MAC(0)
	return d.state.testOut(func(kind ether.GSO) error {
		sent++
		return d.probeRead(fd, index, kind, sent)
	})
}

// testOut sets the reasons why probe fails, where there are none yet. It
// reports whether they are the kernel's: other ones may be gone with the next
// device.
func (r *reasons) testOut(probe func(ether.GSO) error) (sure bool) {
	sure = true
	for _, o := range []struct {
		kind ether.GSO
		why  *string
	}{{ether.GSONone, &r.checksum}, {ether.GSOTCPv4, &r.tso4}, {ether.GSOTCPv6, &r.tso6}, {ether.GSOUDP, &r.uso}} {
		if *o.why != "" {
			continue
		}
		if err := twice(probe, o.kind); err != nil {
			*o.why = "self-test: " + err.Error()
			sure = sure && !passing(err)
		}
	}
	return sure
}

// testIn is testOut for super-frames into the kernel.
func (r *reasons) testIn(probe func(ether.GSO) error) (sure bool) {
	sure = true
	for _, o := range []struct {
		kind ether.GSO
		why  *string
	}{{ether.GSOTCPv4, &r.groTCP4}, {ether.GSOTCPv6, &r.groTCP6}, {ether.GSOUDP, &r.groUDP}} {
		if err := twice(probe, o.kind); err != nil {
			*o.why = fmt.Sprintf("self-test: the kernel refuses super-frames (%v)", err)
			sure = sure && !passing(err)
		}
	}
	return sure
}

// twice gives a probe a second chance if it failed for a reason that passes.
func twice(probe func(ether.GSO) error, kind ether.GSO) error {
	err := probe(kind)
	if passing(err) {
		err = probe(kind)
	}
	return err
}

// passing reports whether err says nothing about offloads: the machine is busy
// or short of memory.
func passing(err error) bool {
	return errors.Is(err, errLate) || errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.ENOBUFS) || errors.Is(err, unix.ENOMEM)
}

// errLate: a probe is lost, or will come too late.
var errLate = fmt.Errorf("a probe did not come within %v", probeTimeout)

// probeRead sends a probe from the packet socket fd and reads it from the first
// queue. number, 1 to 255, is one that no probe of this device had: those before
// may still come.
func (d *offloadDevice) probeRead(fd, index int, kind ether.GSO, number ether.MAC) error {
	frame, m := probe(kind, d.mac)
	(d.mac ^ number).Put(frame)
	out := make([]byte, virtioLen, virtioLen+len(frame))
	encodeVirtio(out, m)
	out = append(out, frame...)
	sa := &unix.SockaddrLinklayer{Ifindex: index, Halen: 6}
	sa.Protocol = binary.NativeEndian.Uint16(frame[12:]) // in network order in memory
	copy(sa.Addr[:], frame[:6])
	if err := unix.Sendto(fd, out, 0, sa); err != nil {
		return fmt.Errorf("send a probe: %w", err)
	}
	q := d.queues[0].(*offloadQueue)
	b := NewBatch()
	for end := time.Now().Add(probeTimeout); q.waitUntil(end); {
		if err := q.Read(b); errors.Is(err, ErrClosed) {
			return err
		}
		for _, f := range b.Frames {
			switch {
			case len(f.B) < 14 || !bytes.Equal(f.B[:14], frame[:14]):
				continue // the stack's own, or late
			case !bytes.Equal(f.B, frame):
				return errors.New("a super-frame came in pieces")
			case f.Meta != m:
				return fmt.Errorf("a frame came with other metadata: %+v, want %+v", f.Meta, m)
			}
			return nil
		}
	}
	return errLate
}

// waitUntil reports whether there is something to read before end. It looks at
// least once: a process that was not scheduled until then missed nothing.
func (q *offloadQueue) waitUntil(end time.Time) bool {
	for {
		left := max(0, time.Until(end))
		p := []unix.PollFd{{Events: unix.POLLIN}}
		var n int
		if q.file.Control(func(fd uintptr) {
			p[0].Fd = int32(fd)
			n, _ = unix.Poll(p, int((left+time.Millisecond-1)/time.Millisecond))
		}) != nil {
			return false
		}
		if n > 0 {
			return true
		}
		if left == 0 {
			return false
		}
	}
}

// drain discards what waits.
func (q *offloadQueue) drain() {
	b := NewBatch()
	for q.file.Readable() {
		if q.Read(b) == ErrClosed {
			return
		}
	}
}

// probeWrite hands the kernel a sound super-frame that it will drop.
func (q *offloadQueue) probeWrite(kind ether.GSO) error {
	frame, m := probe(kind, q.dev.mac)
	return q.write(m, [][]byte{frame})
}

// probe returns a frame of the kind, two segments long (one if GSONone), to a
// station that is not mac.
func probe(kind ether.GSO, mac ether.MAC) ([]byte, ether.Meta) {
	v6, udp := kind == ether.GSOTCPv6, kind == ether.GSOUDP
	l3, l4len, proto, payload := 20, 20, uint8(6), 2*probeSegment
	if v6 {
		l3 = 40
	}
	if udp {
		l4len, proto = 8, 17
	}
	if kind == ether.GSONone {
		payload = probeSegment
	}
	l4 := 14 + l3
	frame := make([]byte, l4+l4len+payload)
	(mac ^ 1).Put(frame)
	ip, tail := frame[14:l4], frame[l4:]
	var src, dst []byte
	if v6 {
		binary.BigEndian.PutUint16(frame[12:], 0x86dd)
		ip[0], ip[6], ip[7] = 0x60, proto, 1
		binary.BigEndian.PutUint16(ip[4:], uint16(len(tail)))
		src, dst = ip[8:24], ip[24:40]
		copy(src, []byte{0x20, 0x01, 0x0d, 0xb8, 15: 1}) // RFC 3849
		copy(dst, []byte{0x20, 0x01, 0x0d, 0xb8, 15: 2})
	} else {
		binary.BigEndian.PutUint16(frame[12:], 0x0800)
		ip[0], ip[6], ip[8], ip[9] = 0x45, 0x40, 1, proto
		binary.BigEndian.PutUint16(ip[2:], uint16(len(ip)+len(tail)))
		src, dst = ip[12:16], ip[16:20]
		copy(src, []byte{192, 0, 2, 1}) // RFC 5737
		copy(dst, []byte{192, 0, 2, 2})
		binary.BigEndian.PutUint16(ip[10:], ^ether.Sum(ip, 0))
	}
	m := ether.Meta{Checksum: ether.ChecksumPartial, ChecksumStart: uint16(l4), ChecksumOffset: ether.TCPChecksumOffset}
	binary.BigEndian.PutUint16(tail, 9) // discard, RFC 863
	binary.BigEndian.PutUint16(tail[2:], 9)
	if udp {
		binary.BigEndian.PutUint16(tail[4:], uint16(len(tail)))
		m.ChecksumOffset = ether.UDPChecksumOffset
	} else {
		tail[12], tail[13] = 5<<4, 0x10 // 20 bytes; ACK
	}
	binary.BigEndian.PutUint16(tail[m.ChecksumOffset:], ether.PseudoSum(proto, src, dst, len(tail)))
	if kind != ether.GSONone {
		m.GSO, m.SegmentLen, m.HeaderLen = kind, probeSegment, uint16(l4+l4len)
	}
	return frame, m
}
