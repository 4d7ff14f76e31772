package e2e

import (
	bin "encoding/binary"
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tulle-net/tulle/ether"
	"github.com/tulle-net/tulle/internal/lab"
)

// Packet sockets on a TAP: what a kernel gets from a node before its stack looks
// at it, and a way to have it send super-frames of the test's making.

// virtio_net_hdr (VIRTIO 1.2, section 5.1.6), as packet sockets have it.
const (
	vnetLen       = 10
	vnetNeedsCsum = 1
	vnetTCPv4     = 1
	vnetTCPv6     = 4
	vnetUDPL4     = 5
	vnetECN       = 0x80
)

// packetSocket opens one with virtio headers on a device.
func packetSocket(t *testing.T, h *lab.Host, dev string, protocol uint16) *os.File {
	t.Helper()
	var fd int
	err := h.Do(func() (err error) {
		link, err := net.InterfaceByName(dev)
		if err != nil {
			return err
		}
		if fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0); err != nil {
			return err
		}
		return errors.Join(unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_VNET_HDR, 1),
			unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_AUXDATA, 1),
			unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_IGNORE_OUTGOING, 1),
			unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 64<<20),
			unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, 8<<20),
			unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: protocol, Ifindex: link.Index}))
	})
	if err != nil {
		t.Fatal(err)
	}
	f := os.NewFile(uintptr(fd), "packet")
	t.Cleanup(func() { _ = f.Close() })
	return f
}

// fastCapture collects what comes out of a TAP, super-frames cut again.
type fastCapture struct {
	t  *testing.T
	mu sync.Mutex
	// frames in order of arrival, out of so many packets, some of which were
	// super-frames. bytes of all, and of the longest.
	frames  [][]byte
	bytes   int
	packets int
	supers  int
	longest int
	err     error
}

func captureTAP(t *testing.T, h *lab.Host, dev string) *fastCapture {
	t.Helper()
	all := bin.NativeEndian.Uint16([]byte{0, unix.ETH_P_ALL})
	f := packetSocket(t, h, dev, all)
	raw, err := f.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	c := &fastCapture{t: t}
	go func() {
		buf, oob := make([]byte, vnetLen+ether.MaxFrame), make([]byte, 256)
		var cut ether.Segmenter
		for {
			n, oobLen, err := recvmsg(raw, buf, oob)
			if err != nil {
				return // closed
			}
			if err := c.add(&cut, buf[:n], oob[:oobLen]); err != nil {
				c.mu.Lock()
				c.err = errors.Join(c.err, err)
				c.mu.Unlock()
			}
		}
	}()
	return c
}

func recvmsg(raw syscall.RawConn, buf, oob []byte) (n, oobLen int, err error) {
	failed := raw.Read(func(fd uintptr) bool {
		n, oobLen, _, _, err = unix.Recvmsg(int(fd), buf, oob, 0)
		return err != unix.EAGAIN
	})
	return n, oobLen, errors.Join(failed, err)
}

// add takes one packet: virtio header, frame, and the VLAN tag that the kernel
// took out of it.
func (c *fastCapture) add(cut *ether.Segmenter, b, oob []byte) error {
	var m ether.Meta
	frame := slices.Clone(b[vnetLen:])
	tag, err := auxVLAN(oob)
	if err != nil {
		return err
	}
	frame = slices.Insert(frame, min(12, len(frame)), tag...)
	if b[0]&vnetNeedsCsum != 0 {
		m.Checksum = ether.ChecksumPartial
		m.ChecksumStart = bin.NativeEndian.Uint16(b[6:]) + uint16(len(tag))
		m.ChecksumOffset = bin.NativeEndian.Uint16(b[8:])
	}
	m.ECN = b[1]&vnetECN != 0
	switch b[1] &^ vnetECN {
	case vnetTCPv4:
		m.GSO = ether.GSOTCPv4
	case vnetTCPv6:
		m.GSO = ether.GSOTCPv6
	case vnetUDPL4:
		m.GSO = ether.GSOUDP
	}
	if m.GSO != ether.GSONone {
		m.SegmentLen = bin.NativeEndian.Uint16(b[4:])
	}
	if err := cut.Reset(frame, m); err != nil {
		return fmt.Errorf("a frame of %d bytes with %+v does not fit its header: %w", len(frame), m, err)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.packets++
	c.bytes += len(frame)
	if m.GSO != ether.GSONone {
		c.supers++
		c.longest = max(c.longest, len(frame))
	}
	for cut.Count() > 0 {
		seg := make([]byte, cut.MaxLen())
		c.frames = append(c.frames, seg[:cut.Next(seg)])
	}
	return nil
}

// auxVLAN returns the four bytes of a tag in a tpacket_auxdata, or nothing.
func auxVLAN(oob []byte) ([]byte, error) {
	messages, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return nil, err
	}
	for _, m := range messages {
		const valid = unix.TP_STATUS_VLAN_VALID | unix.TP_STATUS_VLAN_TPID_VALID
		if m.Header.Level == unix.SOL_PACKET && m.Header.Type == unix.PACKET_AUXDATA && bin.NativeEndian.Uint32(m.Data)&valid == valid {
			tag := bin.BigEndian.AppendUint16(nil, bin.NativeEndian.Uint16(m.Data[18:]))
			return bin.BigEndian.AppendUint16(tag, bin.NativeEndian.Uint16(m.Data[16:])), nil
		}
	}
	return nil, nil
}

// taken returns the frames of the given sources so far, at least n unless the
// time is over.
func (c *fastCapture) taken(n int, ours func(ether.MAC) bool, limit time.Duration) [][]byte {
	c.t.Helper()
	return waitFrames(c.t, &c.mu, &c.frames, n, ours, limit)
}

// merged fails the test where no super-frame came.
func (c *fastCapture) merged() {
	c.t.Helper()
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.supers == 0 || c.err != nil {
		c.t.Errorf("%d frames were merged to %d super-frames, %v: want some", len(c.frames), c.supers, c.err)
	}
}

// waitFrames waits until there are n frames of ours, and returns them.
func waitFrames(t *testing.T, mu *sync.Mutex, all *[][]byte, n int, ours func(ether.MAC) bool, limit time.Duration) [][]byte {
	t.Helper()
	var got [][]byte
	seen := 0
	for start := time.Now(); ; time.Sleep(2 * time.Millisecond) {
		mu.Lock()
		for _, f := range (*all)[seen:] {
			if ours(ether.MACFrom(f[6:])) {
				got = append(got, f)
			}
		}
		seen = len(*all)
		mu.Unlock()
		if len(got) >= n || time.Since(start) > limit {
			return got
		}
	}
}

// fastInject has a host's kernel send frames through a TAP.
type fastInject struct {
	t *testing.T
	f *os.File
}

func injectTAP(t *testing.T, h *lab.Host, dev string) *fastInject {
	t.Helper()
	return &fastInject{t, packetSocket(t, h, dev, 0)}
}

func (i *fastInject) send(frame []byte, m ether.Meta) {
	i.t.Helper()
	b := make([]byte, vnetLen, vnetLen+len(frame))
	if m.Checksum == ether.ChecksumPartial {
		b[0] = vnetNeedsCsum
		bin.NativeEndian.PutUint16(b[6:], m.ChecksumStart)
		bin.NativeEndian.PutUint16(b[8:], m.ChecksumOffset)
	}
	if m.GSO != ether.GSONone {
		b[1] = [...]byte{ether.GSOTCPv4: vnetTCPv4, ether.GSOTCPv6: vnetTCPv6, ether.GSOUDP: vnetUDPL4}[m.GSO]
		if m.ECN {
			b[1] |= vnetECN
		}
		bin.NativeEndian.PutUint16(b[2:], m.HeaderLen)
		bin.NativeEndian.PutUint16(b[4:], m.SegmentLen)
	}
	if _, err := i.f.Write(append(b, frame...)); err != nil {
		i.t.Fatalf("packet socket, %d bytes, %+v: %v", len(frame), m, err)
	}
}
