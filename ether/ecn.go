package ether

import "encoding/binary"

// The ECN field of the IP header (RFC 3168, section 5).
const (
	ecnMask = 3
	ecnCE   = 3
)

// MarkCE tells, in place, the receiver of an IP packet with the headers h that there is
// congestion on its way (RFC 3168, section 5), and reports whether its ends speak ECN; if
// they do not, it changes nothing. The checksum of an IPv4 header is updated, not computed.
func MarkCE(frame []byte, h Headers) bool {
	if h.L4 == 0 {
		return false
	}
	ip := frame[h.L3:]
	if h.V6 { // the traffic class is the 8 bits behind the version
		if ip[1]>>4&ecnMask == 0 {
			return false
		}
		ip[1] |= ecnCE << 4
		return true
	}
	if ip[1]&ecnMask == 0 {
		return false
	}
	old := binary.BigEndian.Uint16(ip)
	ip[1] |= ecnCE
	adjust(ip[10:], old, binary.BigEndian.Uint16(ip))
	return true
}
