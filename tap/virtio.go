package tap

import (
	"encoding/binary"
	"errors"

	"github.com/tulle-net/tulle/ether"
)

// A frame to or from an offload queue stands behind a virtio_net_hdr (VIRTIO
// 1.2, section 5.1.6), without num_buffers, its integers in the order of the
// machine (TUNSETVNETLE and TUNSETVNETBE are left alone):
//
//	0       1          2         4          6            8             10
//	+-------+----------+---------+----------+------------+-------------+
//	| flags | gso_type | hdr_len | gso_size | csum_start | csum_offset |
//	+-------+----------+---------+----------+------------+-------------+
const virtioLen = 10

const (
	virtioNeedsCsum = 1
	virtioDataValid = 2

	virtioGSONone  = 0
	virtioGSOTCPv4 = 1
	virtioGSOTCPv6 = 4
	virtioGSOUDPL4 = 5
	virtioGSOECN   = 0x80
)

// errHeader: the kernel's header and its frame do not fit each other.
var errHeader = errors.New("tap: frame with an impossible virtio header")

// decodeVirtio returns what h, virtioLen bytes, says about frame. Every field
// is assigned. It does not trust hdr_len, which is the end of the first buffer
// of the kernel and not of the headers.
func decodeVirtio(h, frame []byte) (ether.Meta, error) {
	_ = h[virtioLen-1]
	var m ether.Meta
	flags, gso := h[0], h[1]
	switch {
	case flags&virtioNeedsCsum != 0:
		m.Checksum = ether.ChecksumPartial
		m.ChecksumStart = binary.NativeEndian.Uint16(h[6:])
		m.ChecksumOffset = binary.NativeEndian.Uint16(h[8:])
		if int(m.ChecksumStart)+int(m.ChecksumOffset)+2 > len(frame) {
			return ether.Meta{}, errHeader
		}
	case flags&virtioDataValid != 0:
		m.Checksum = ether.ChecksumVerified
	}
	if gso == virtioGSONone {
		return m, nil
	}
	// The kernel leaves the checksum of each super-frame unfilled, also where
	// who sent it (a packet socket, say) did not: ChecksumStart is the start
	// of L4, without looking at IP.
	m.SegmentLen = binary.NativeEndian.Uint16(h[4:])
	if m.Checksum != ether.ChecksumPartial || m.SegmentLen == 0 {
		return ether.Meta{}, errHeader
	}
	m.ECN = gso&virtioGSOECN != 0
	start := int(m.ChecksumStart)
	end := start + 8
	switch gso &^ virtioGSOECN {
	case virtioGSOTCPv4, virtioGSOTCPv6:
		m.GSO = ether.GSOTCPv4
		if gso&^virtioGSOECN == virtioGSOTCPv6 {
			m.GSO = ether.GSOTCPv6
		}
		if start+20 > len(frame) || m.ChecksumOffset != ether.TCPChecksumOffset {
			return ether.Meta{}, errHeader
		}
		lenBytes := int(frame[start+12]>>4) * 4
		if lenBytes < 20 {
			return ether.Meta{}, errHeader
		}
		end = start + lenBytes
	case virtioGSOUDPL4:
		m.GSO = ether.GSOUDP
		if m.ECN || m.ChecksumOffset != ether.UDPChecksumOffset {
			return ether.Meta{}, errHeader
		}
	default: // UFO, or newer than this
		return ether.Meta{}, errHeader
	}
	if end >= len(frame) || end > 0xffff {
		return ether.Meta{}, errHeader
	}
	m.HeaderLen = uint16(end)
	return m, nil
}

// encodeVirtio writes m to h, virtioLen bytes; every byte is assigned.
func encodeVirtio(h []byte, m ether.Meta) {
	_ = h[virtioLen-1]
	var flags, gso byte
	var start, offset uint16
	switch m.Checksum {
	case ether.ChecksumPartial:
		flags, start, offset = virtioNeedsCsum, m.ChecksumStart, m.ChecksumOffset
	case ether.ChecksumVerified:
		flags = virtioDataValid
	}
	switch m.GSO {
	case ether.GSOTCPv4:
		gso = virtioGSOTCPv4
	case ether.GSOTCPv6:
		gso = virtioGSOTCPv6
	case ether.GSOUDP:
		gso = virtioGSOUDPL4
	}
	if m.ECN && gso != virtioGSONone {
		gso |= virtioGSOECN
	}
	// hdr_len of a super-frame must be right: the kernel puts that much in the
	// linear part of its buffer, and all 64 KiB where it is 0.
	h[0], h[1] = flags, gso
	binary.NativeEndian.PutUint16(h[2:], m.HeaderLen)
	binary.NativeEndian.PutUint16(h[4:], m.SegmentLen)
	binary.NativeEndian.PutUint16(h[6:], start)
	binary.NativeEndian.PutUint16(h[8:], offset)
}
