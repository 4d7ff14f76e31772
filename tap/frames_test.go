package tap

import (
	"encoding/binary"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tulle-net/tulle/ether"
)

// arpRequest returns a broadcast frame from src.
func arpRequest(src ether.MAC) []byte {
	b := make([]byte, 60)
	ether.Broadcast.Put(b)
	src.Put(b[6:])
	binary.BigEndian.PutUint16(b[12:], ether.EtherTypeARP)
	copy(b[14:], []byte{0, 1, 8, 0, 6, 4, 0, 1})
	src.Put(b[22:])
	return b
}

// udpFrame returns a UDP packet with a partial checksum, as one super-frame of
// segments of segLen bytes, or whole if segLen is 0.
func udpFrame(src, dst netip.AddrPort, payload []byte, segLen int) ([]byte, ether.Meta) {
	b := make([]byte, 42+len(payload))
	ether.MACOf(dst.Addr()).Put(b)
	ether.MACOf(src.Addr()).Put(b[6:])
	binary.BigEndian.PutUint16(b[12:], ether.EtherTypeIPv4)
	ip, l4 := b[14:34], b[34:]
	ip[0], ip[8], ip[9] = 0x45, 64, ether.ProtoUDP
	binary.BigEndian.PutUint16(ip[2:], uint16(len(b)-14))
	copy(ip[12:], src.Addr().AsSlice())
	copy(ip[16:], dst.Addr().AsSlice())
	binary.BigEndian.PutUint16(ip[10:], ^ether.Sum(ip, 0))
	binary.BigEndian.PutUint16(l4, src.Port())
	binary.BigEndian.PutUint16(l4[2:], dst.Port())
	binary.BigEndian.PutUint16(l4[4:], uint16(len(l4)))
	binary.BigEndian.PutUint16(l4[6:], ether.PseudoSum(ether.ProtoUDP, ip[12:16], ip[16:20], len(l4)))
	copy(l4[8:], payload)
	m := ether.Meta{Checksum: ether.ChecksumPartial, ChecksumStart: 34, ChecksumOffset: ether.UDPChecksumOffset}
	if segLen > 0 {
		m.GSO, m.SegmentLen, m.HeaderLen = ether.GSOUDP, uint16(segLen), 42
	}
	return b, m
}

// sniffer sees what the kernel gets from a device, before any of its stack.
type sniffer struct {
	t  testing.TB
	fd int
}

func (s *space) sniff(dev Device) *sniffer {
	s.t.Helper()
	index := s.links()[dev.Name()].Attrs().Index
	sn := &sniffer{t: s.t, fd: -1}
	s.do(func() (err error) {
		if sn.fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0); err != nil {
			return err
		}
		s.t.Cleanup(func() { _ = unix.Close(sn.fd) })
		if err = unix.SetsockoptInt(sn.fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 8<<20); err != nil {
			return err
		}
		tv := unix.NsecToTimeval(int64(5 * time.Second))
		if err = unix.SetsockoptTimeval(sn.fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv); err != nil {
			return err
		}
		all := binary.NativeEndian.Uint16([]byte{0, unix.ETH_P_ALL})
		return unix.Bind(sn.fd, &unix.SockaddrLinklayer{Protocol: all, Ifindex: index})
	})
	return sn
}

// next returns the next frame that came from the device's queues and is for
// the MAC.
func (sn *sniffer) next(mac ether.MAC) []byte {
	sn.t.Helper()
	b := make([]byte, ether.MaxFrame)
	for {
		n, from, err := unix.Recvfrom(sn.fd, b, 0)
		if err != nil {
			sn.t.Fatalf("no frame came: %v", err)
		}
		if sa, ok := from.(*unix.SockaddrLinklayer); ok && sa.Pkttype != unix.PACKET_OUTGOING && n >= 14 && ether.MACFrom(b) == mac {
			return b[:n]
		}
	}
}
