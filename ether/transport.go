package ether

import "encoding/binary"

// Flags of TCP's 14th byte (RFC 9293, section 3.1).
const (
	TCPFin = 1 << iota
	TCPSyn
	TCPRst
	TCPPsh
	TCPAck
	TCPUrg
	TCPEce
	TCPCwr
)

// TCP is a TCP segment (RFC 9293, section 3.1). It is had from ParseTCP; its
// bytes are shared.
type TCP []byte

// ParseTCP returns the segment that b, the whole payload of an IP packet, is.
// The error is ErrShort or ErrMalformed.
func ParseTCP(b []byte) (TCP, error) {
	if len(b) < tcpLen {
		return nil, ErrShort
	}
	n := int(b[12]>>4) * 4
	if n < tcpLen {
		return nil, ErrMalformed
	}
	if n > len(b) {
		return nil, ErrShort
	}
	return b, nil
}

// SrcPort returns the source port.
func (s TCP) SrcPort() uint16 { return binary.BigEndian.Uint16(s[0:2]) }

// DstPort returns the destination port.
func (s TCP) DstPort() uint16 { return binary.BigEndian.Uint16(s[2:4]) }

// Seq returns the sequence number.
func (s TCP) Seq() uint32 { return binary.BigEndian.Uint32(s[4:8]) }

// Ack returns the acknowledgement number.
func (s TCP) Ack() uint32 { return binary.BigEndian.Uint32(s[8:12]) }

// HeaderLen returns the length of the header with its options, 20 to 60 bytes.
func (s TCP) HeaderLen() int { return int(s[12]>>4) * 4 }

// Flags returns FIN to CWR as bits, see TCPFin.
func (s TCP) Flags() uint8 { return s[13] }

// Window returns the window, not scaled.
func (s TCP) Window() uint16 { return binary.BigEndian.Uint16(s[14:16]) }

// Checksum returns the checksum as it stands.
func (s TCP) Checksum() uint16 { return binary.BigEndian.Uint16(s[16:18]) }

// Urgent returns the urgent pointer.
func (s TCP) Urgent() uint16 { return binary.BigEndian.Uint16(s[18:20]) }

// Options returns the options with their padding.
func (s TCP) Options() []byte { return s[tcpLen:s.HeaderLen()] }

// Payload returns the bytes after the options.
func (s TCP) Payload() []byte { return s[s.HeaderLen():] }

// UDP is a UDP datagram (RFC 768) without what follows it. It is had from
// ParseUDP; its bytes are shared.
type UDP []byte

// ParseUDP returns the datagram at the begin of b. The error is ErrShort or
// ErrMalformed; a length of 0, which RFC 2675 gives to jumbograms, is malformed.
func ParseUDP(b []byte) (UDP, error) {
	if len(b) < udpLen {
		return nil, ErrShort
	}
	n := int(binary.BigEndian.Uint16(b[4:6]))
	if n < udpLen {
		return nil, ErrMalformed
	}
	if n > len(b) {
		return nil, ErrShort
	}
	return b[:n:n], nil
}

// SrcPort returns the source port.
func (d UDP) SrcPort() uint16 { return binary.BigEndian.Uint16(d[0:2]) }

// DstPort returns the destination port.
func (d UDP) DstPort() uint16 { return binary.BigEndian.Uint16(d[2:4]) }

// Checksum returns the checksum as it stands; 0 means that there is none.
func (d UDP) Checksum() uint16 { return binary.BigEndian.Uint16(d[6:8]) }

// Payload returns the bytes after the header up to the length in it.
func (d UDP) Payload() []byte { return d[udpLen:] }
