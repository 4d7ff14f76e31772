package ether

import (
	"encoding/binary"
	"math/bits"
)

// TCP options (RFC 9293, section 3.2).
const (
	tcpOptionEnd = 0
	tcpOptionNOP = 1
	tcpOptionMSS = 2
	tcpMSSLen    = 4
)

// ClampMSS lowers, in place, the maximum segment size that a TCP SYN or SYN-ACK
// announces to what fits IP packets of mtu bytes: 40 less in IPv4, 60 in IPv6,
// without regard to options (RFC 9293, section 3.7.1). It reports whether it
// changed frame. A checksum that is filled is updated, not computed (RFC 1624):
// a wrong one stays wrong. A partial one needs no change, for it is not yet the
// options' sum.
//
// Anything else is left alone: a SYN that announces less, or nothing, or has RST
// set; options that contradict their lengths, from there on; a partial checksum
// that is not the one of TCP; a super-frame, which no SYN is; what ParseHeaders
// is not ok with; an mtu without room for a byte.
func ClampMSS(frame []byte, m Meta, mtu int) bool {
	h, ok := ParseHeaders(frame)
	if !ok || h.Proto != ProtoTCP || m.GSO != GSONone || frame[h.L4+13]&(TCPSyn|TCPRst) != TCPSyn {
		return false
	}
	if m.Checksum == ChecksumPartial && (m.ChecksumStart != h.L4 || m.ChecksumOffset != TCPChecksumOffset) {
		return false
	}
	most := mtu - ipv4Len - tcpLen
	if h.V6 {
		most = mtu - ipv6Len - tcpLen
	}
	if most < 1 {
		return false
	}
	header := frame[h.L4:h.Payload]
	changed := false
	for at := tcpLen; at < len(header) && header[at] != tcpOptionEnd; {
		if header[at] == tcpOptionNOP {
			at++
			continue
		}
		if len(header)-at < 2 {
			break
		}
		n := int(header[at+1])
		if n < 2 || n > len(header)-at {
			break
		}
		if header[at] == tcpOptionMSS && n == tcpMSSLen && int(binary.BigEndian.Uint16(header[at+2:])) > most {
			setTCPWord(header, at+2, uint16(most), m.Checksum != ChecksumPartial)
			changed = true
		}
		at += n
	}
	return changed
}

// setTCPWord writes v at an offset of a TCP header, and updates a checksum that
// is filled.
func setTCPWord(header []byte, at int, v uint16, filled bool) {
	old := binary.BigEndian.Uint16(header[at:])
	binary.BigEndian.PutUint16(header[at:], v)
	if !filled {
		return
	}
	if at%2 != 0 {
		// It lies across two words of the sum, which is the same as one whose
		// bytes are swapped (RFC 1071, section 2 (B)).
		old, v = bits.ReverseBytes16(old), bits.ReverseBytes16(v)
	}
	adjust(header[TCPChecksumOffset:], old, v)
}

// adjust has the checksum at sum be that of a header in which v is in the place of old
// (RFC 1624, equation 3).
func adjust(sum []byte, old, v uint16) {
	binary.BigEndian.PutUint16(sum, ^fold32(uint32(^binary.BigEndian.Uint16(sum))+uint32(^old)+uint32(v)))
}
