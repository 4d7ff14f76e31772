package underlay

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// What Offloads says; anything else is the reason why there is none.
const (
	stateOn  = "on"
	stateOff = "off"
)

const (
	// testWait bounds each wait of the self-test, whose datagrams are
	// delivered within the call that sends them.
	testWait       = 200 * time.Millisecond
	testSegmentLen = 300
)

// offloads is what testOffloads found.
type offloads struct {
	gso, gro   string
	longTrains bool // more than minMaxSegments
	sndBuf     int  // granted
}

// testOffloads sends real datagrams over the loopback: kernels exist that
// accept an option and then do something else. Where the loopback carries no
// datagrams at all (it may be down), an option that the kernel accepts counts:
// sending falls back by itself.
func testOffloads(cfg Config) offloads {
	l, err := newLoop(cfg.SendBuffer)
	if err != nil {
		return offloads{gso: state(err), gro: state(err)}
	}
	defer l.close()
	alive := l.alive()
	t := offloads{gso: state(l.testGSO(alive)), gro: state(l.testGRO(alive)), sndBuf: granted(l.tx, unix.SO_SNDBUF)}
	t.longTrains = t.gso == stateOn && alive && l.takes(longMaxSegments)
	return t
}

func state(err error) string {
	if err != nil {
		return "not available: " + err.Error()
	}
	return stateOn
}

// loop is a pair of sockets on the loopback.
type loop struct {
	tx, rx int
	to     unix.Sockaddr
	buf    []byte
}

func newLoop(sendBuffer int) (*loop, error) {
	l := &loop{tx: -1, rx: -1, buf: make([]byte, MaxDatagram)}
	var err error
	if l.tx, err = udpSocket(v4); err != nil {
		return nil, err
	}
	if l.rx, err = udpSocket(v4); err != nil {
		l.close()
		return nil, err
	}
	setBuffer(l.tx, unix.SO_SNDBUFFORCE, unix.SO_SNDBUF, sendBuffer)
	if err = unix.Bind(l.rx, sockaddr(netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), 0))); err == nil {
		l.to, err = unix.Getsockname(l.rx)
	}
	if err != nil {
		l.close()
		return nil, err
	}
	return l, nil
}

func (l *loop) close() {
	for _, fd := range []int{l.tx, l.rx} {
		if fd >= 0 {
			unix.Close(fd)
		}
	}
}

// send sends b as a train, or alone if segmentLen is 0.
func (l *loop) send(b []byte, segmentLen int) error {
	var control []byte
	if segmentLen != 0 {
		var words [txControl / 8]uint64 // aligned for cmsghdr
		control = unsafe.Slice((*byte)(unsafe.Pointer(&words)), txControl)
		control = control[:putSegmentLen(control, segmentLen)]
	}
	_, err := unix.SendmsgN(l.tx, b, control, l.to, unix.MSG_DONTWAIT)
	return err
}

// receive returns the next datagram or train and its segment size (0: not told).
func (l *loop) receive() (b []byte, segmentLen int, err error) {
	fds := []unix.PollFd{{Fd: int32(l.rx), Events: unix.POLLIN}}
	for {
		n, err := unix.Poll(fds, int(testWait/time.Millisecond))
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return nil, 0, err
		}
		if n == 0 {
			return nil, 0, errNothingCame
		}
		break
	}
	control := make([]byte, 64)
	n, cn, _, _, err := unix.Recvmsg(l.rx, l.buf, control, unix.MSG_DONTWAIT)
	if err != nil {
		return nil, 0, err
	}
	msgs, err := unix.ParseSocketControlMessage(control[:cn])
	if err != nil {
		return nil, 0, err
	}
	for _, m := range msgs {
		if m.Header.Level == unix.SOL_UDP && m.Header.Type == unix.UDP_GRO && len(m.Data) >= 4 {
			segmentLen = int(binary.NativeEndian.Uint32(m.Data))
		}
	}
	return l.buf[:n], segmentLen, nil
}

var errNothingCame = errors.New("a datagram over the loopback did not arrive")

// alive reports whether the loopback carries ordinary datagrams.
func (l *loop) alive() bool {
	if l.send([]byte("tulle"), 0) != nil {
		return false
	}
	b, _, err := l.receive()
	return err == nil && string(b) == "tulle"
}

// testGSO sends a train of three to a socket without GRO, which must get three.
func (l *loop) testGSO(alive bool) error {
	if err := unix.SetsockoptInt(l.tx, unix.SOL_UDP, unix.UDP_SEGMENT, 0); err != nil {
		return fmt.Errorf("UDP_SEGMENT: %w (Linux 4.18 or newer is needed)", err)
	}
	if !alive {
		return nil
	}
	want := testPattern(2*testSegmentLen + 50)
	if err := l.send(want, testSegmentLen); err != nil {
		return fmt.Errorf("send a train: %w", err)
	}
	for rest := want; len(rest) > 0; {
		n := min(testSegmentLen, len(rest))
		b, _, err := l.receive()
		if err != nil {
			return fmt.Errorf("receive a train: %w", err)
		}
		if !bytes.Equal(b, rest[:n]) {
			return errors.New("the kernel garbled a train")
		}
		rest = rest[n:]
	}
	return nil
}

// takes reports whether the kernel sends trains of n datagrams, of a byte each.
// They arrive one by one or, after testGRO, together.
func (l *loop) takes(n int) bool {
	if l.send(testPattern(n), 1) != nil {
		return false
	}
	for n > 0 {
		b, _, err := l.receive()
		if err != nil || len(b) == 0 {
			return false
		}
		n -= len(b)
	}
	return true
}

// testGRO sends a train to a socket with GRO, which gets it whole with its
// segment size, or cut.
func (l *loop) testGRO(alive bool) error {
	if err := unix.SetsockoptInt(l.rx, unix.SOL_UDP, unix.UDP_GRO, 1); err != nil {
		return fmt.Errorf("UDP_GRO: %w (Linux 5.0 or newer is needed)", err)
	}
	if !alive {
		return nil
	}
	want := testPattern(2*testSegmentLen + 50)
	if l.send(want, testSegmentLen) != nil {
		// No trains out: only one datagram can be tested.
		want = want[:testSegmentLen]
		if err := l.send(want, 0); err != nil {
			return fmt.Errorf("send a datagram: %w", err)
		}
	}
	for rest := want; len(rest) > 0; {
		b, segmentLen, err := l.receive()
		if err != nil {
			return fmt.Errorf("receive a train: %w", err)
		}
		if len(b) == 0 || len(b) > len(rest) || !bytes.Equal(b, rest[:len(b)]) {
			return errors.New("the kernel garbled a train")
		}
		if len(b) > testSegmentLen && segmentLen != testSegmentLen {
			return fmt.Errorf("the kernel told a segment size of %d, not %d", segmentLen, testSegmentLen)
		}
		rest = rest[len(b):]
	}
	return nil
}

// testPattern returns n bytes of which no two neighbouring segments are alike.
func testPattern(n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(i) ^ byte(i>>8)*37
	}
	return b
}
