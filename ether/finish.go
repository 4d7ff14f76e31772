package ether

import "encoding/binary"

// Offsets of the checksum in a header: what Meta.ChecksumOffset holds.
const (
	TCPChecksumOffset = 16
	UDPChecksumOffset = 6
)

// VerifyL4 reports whether the TCP or UDP checksum of frame, whose headers are
// h as ParseHeaders found them, is right. A UDP checksum of 0 says that there
// is none: right in IPv4 (RFC 768), wrong in IPv6 (RFC 8200, section 8.1). It
// is false if ParseHeaders was not ok.
func VerifyL4(frame []byte, h Headers) bool {
	if h.Payload == 0 {
		return false
	}
	l4 := frame[h.L4:h.End]
	if h.Proto == ProtoUDP && l4[6]|l4[7] == 0 {
		return !h.V6
	}
	return Sum(l4, PseudoSumOf(frame, h)) == 0xffff
}

// PseudoSumOf is PseudoSum for the packet in frame, whose headers are h as
// ParseHeaders found them and was ok with. It is what a partial checksum field
// holds.
func PseudoSumOf(frame []byte, h Headers) uint16 {
	ip := frame[h.L3:h.L4]
	n := int(h.End) - int(h.L4)
	if h.V6 {
		return PseudoSum(h.Proto, ip[8:24], ip[24:40], n)
	}
	return PseudoSum(h.Proto, ip[12:16], ip[16:20], n)
}

// FinishChecksum fills the checksum of frame in place if m says that it is
// partial, as the kernel does: it sums from ChecksumStart to the end of the
// frame. A UDP checksum that comes to 0 becomes 0xffff (RFC 768). It is false,
// with frame unchanged, if the field is not within frame. A super-frame gets
// the checksum of the one large packet that it is.
func FinishChecksum(frame []byte, m Meta) bool {
	if m.Checksum != ChecksumPartial {
		return true
	}
	start := int(m.ChecksumStart)
	at := start + int(m.ChecksumOffset)
	if at+2 > len(frame) {
		return false
	}
	sum := ^Sum(frame[start:], 0)
	if sum == 0 && m.ChecksumOffset == UDPChecksumOffset {
		sum = 0xffff
	}
	binary.BigEndian.PutUint16(frame[at:at+2], sum)
	return true
}
