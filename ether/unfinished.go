package ether

import "encoding/binary"

// Unfinished says how a frame is to be finished that a kernel's VTEP sent over
// a virtual link (veth, a virtio NIC). There the kernel hands over its own
// frames as they are in memory: the TCP or UDP checksum field holds the sum of
// the pseudo-header alone, and a TCP segment may be a super-frame of up to
// 64 KiB whose segment length is lost. frame is borrowed; mtu is the largest
// inner IP packet in bytes.
//
// It is ok if the field holds just that sum, folded and not inverted, while it
// is no right checksum of the packet, and the IPv4 header checksum is right.
// Then m is ChecksumPartial, and
//
//   - a TCP packet of more than mtu bytes is a super-frame with segments that
//     just fit mtu: what the sender's own kernel would have cut. TCP does not
//     depend on where its segments end.
//   - a UDP packet of more than mtu bytes stays one datagram. It was a train
//     (USO) whose segment length is lost, or one datagram of a sender with a
//     larger MTU. Datagrams do depend on where they end: any guess would hand
//     the application datagrams that nobody sent, with right checksums.
//
// Otherwise m is the zero Meta; so for an oversize packet whose checksum is
// filled and right.
//
// It weakens the checksum: a filled packet that was damaged on its way passes
// as unfinished, and is given a right checksum, if the damage made its field
// equal to that sum, which for random damage is one in 65,536. The checksum
// lets one in 65,535 pass by itself, so the chance about doubles; but damage to
// the payload of a packet that really is unfinished is never seen. So it is an
// option, for underlays that are virtual.
func Unfinished(frame []byte, mtu int) (m Meta, ok bool) {
	h, ok := ParseHeaders(frame)
	if !ok {
		return Meta{}, false
	}
	at := checksumOffset(h.Proto)
	l4 := frame[h.L4:h.End]
	if binary.BigEndian.Uint16(l4[at:at+2]) != PseudoSumOf(frame, h) {
		return Meta{}, false
	}
	ip := frame[h.L3:h.L4]
	if !h.V6 && Sum(ip, 0) != 0xffff {
		return Meta{}, false
	}
	// One filled packet in 65,536 has this very value as its right checksum,
	// and finishing it would spoil it.
	if VerifyL4(frame, h) {
		return Meta{}, false
	}
	m = Meta{Checksum: ChecksumPartial, ChecksumStart: h.L4, ChecksumOffset: at}
	segmentLen := mtu - int(h.Payload-h.L3)
	if h.Proto != ProtoTCP || int(h.End)-int(h.L3) <= mtu || segmentLen <= 0 || int(h.End) != len(frame) {
		return m, true
	}
	m.GSO = GSOTCPv4
	if h.V6 {
		m.GSO = GSOTCPv6
	}
	m.HeaderLen, m.SegmentLen = h.Payload, uint16(segmentLen)
	m.ECN = l4[13]&TCPCwr != 0
	return m, true
}
