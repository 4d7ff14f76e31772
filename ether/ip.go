package ether

import (
	"encoding/binary"
	"net/netip"
)

// IPv4 is an IPv4 packet without what follows it (RFC 791, section 3.1). It is
// had from ParseIPv4; its bytes are shared.
type IPv4 []byte

// ParseIPv4 returns the packet at the begin of b. The error is ErrShort or
// ErrMalformed. The header checksum is ChecksumOK's matter.
func ParseIPv4(b []byte) (IPv4, error) {
	if len(b) < ipv4Len {
		return nil, ErrShort
	}
	n, total := int(b[0]&0xf)*4, int(binary.BigEndian.Uint16(b[2:4]))
	if b[0]>>4 != 4 || n < ipv4Len || total < n {
		return nil, ErrMalformed
	}
	if total > len(b) {
		return nil, ErrShort
	}
	return b[:total:total], nil
}

// HeaderLen returns the length of the header with its options, 20 to 60 bytes.
func (p IPv4) HeaderLen() int { return int(p[0]&0xf) * 4 }

// TOS returns the DSCP and ECN byte.
func (p IPv4) TOS() uint8 { return p[1] }

// ID returns the identification.
func (p IPv4) ID() uint16 { return binary.BigEndian.Uint16(p[4:6]) }

// DontFragment returns the DF bit.
func (p IPv4) DontFragment() bool { return p[6]&0x40 != 0 }

// MoreFragments returns the MF bit.
func (p IPv4) MoreFragments() bool { return p[6]&0x20 != 0 }

// FragmentOffset returns the offset of a fragment in bytes.
func (p IPv4) FragmentOffset() int { return int(binary.BigEndian.Uint16(p[6:8])&0x1fff) * 8 }

// IsFragment reports whether the packet is a part of a larger one.
func (p IPv4) IsFragment() bool { return binary.BigEndian.Uint16(p[6:8])&ipv4FragmentAny != 0 }

// TTL returns the time to live.
func (p IPv4) TTL() uint8 { return p[8] }

// Proto returns the protocol of the payload.
func (p IPv4) Proto() uint8 { return p[9] }

// Checksum returns the header checksum as it stands.
func (p IPv4) Checksum() uint16 { return binary.BigEndian.Uint16(p[10:12]) }

// ChecksumOK reports whether the header checksum is right.
func (p IPv4) ChecksumOK() bool { return Sum(p[:p.HeaderLen()], 0) == 0xffff }

// SetChecksum writes the header checksum.
func (p IPv4) SetChecksum() {
	p[10], p[11] = 0, 0
	binary.BigEndian.PutUint16(p[10:12], ^Sum(p[:p.HeaderLen()], 0))
}

// Src returns the source.
func (p IPv4) Src() netip.Addr { return netip.AddrFrom4([4]byte(p[12:16])) }

// Dst returns the destination.
func (p IPv4) Dst() netip.Addr { return netip.AddrFrom4([4]byte(p[16:20])) }

// Payload returns the bytes after the header up to the packet's total length.
func (p IPv4) Payload() []byte { return p[p.HeaderLen():] }

// IPv6 is an IPv6 packet without what follows it (RFC 8200, section 3). It is
// had from ParseIPv6; its bytes are shared.
type IPv6 []byte

// ParseIPv6 returns the packet at the begin of b. The error is ErrShort or
// ErrMalformed. A jumbogram (RFC 2675) is seen as a packet without payload.
func ParseIPv6(b []byte) (IPv6, error) {
	if len(b) < ipv6Len {
		return nil, ErrShort
	}
	if b[0]>>4 != 6 {
		return nil, ErrMalformed
	}
	end := ipv6Len + int(binary.BigEndian.Uint16(b[4:6]))
	if end > len(b) {
		return nil, ErrShort
	}
	return b[:end:end], nil
}

// TrafficClass returns the DSCP and ECN byte.
func (p IPv6) TrafficClass() uint8 { return p[0]<<4 | p[1]>>4 }

// FlowLabel returns the flow label, 20 bits.
func (p IPv6) FlowLabel() uint32 { return binary.BigEndian.Uint32(p[0:4]) & 0xf_ffff }

// NextHeader returns the type of the first header after the fixed one.
func (p IPv6) NextHeader() uint8 { return p[6] }

// HopLimit returns the hop limit.
func (p IPv6) HopLimit() uint8 { return p[7] }

// Src returns the source.
func (p IPv6) Src() netip.Addr { return netip.AddrFrom16([16]byte(p[8:24])) }

// Dst returns the destination.
func (p IPv6) Dst() netip.Addr { return netip.AddrFrom16([16]byte(p[24:40])) }

// Payload returns the bytes after the fixed header up to the payload length.
func (p IPv6) Payload() []byte { return p[ipv6Len:] }

// Transport walks over at most eight extension headers (hop-by-hop, routing,
// destination options; RFC 8200, section 4) and returns the protocol after them
// and its offset in p. ok is false for anything with a fragment header, also
// if it is the only fragment, for a routing header with segments left, and
// where the walk ended early.
func (p IPv6) Transport() (proto uint8, off int, ok bool) {
	proto, off, state := walkExtensions(p)
	return proto, off, state == walkDone
}

// IsFragment reports whether the packet has a fragment header, even if it is
// the only fragment (RFC 6946).
func (p IPv6) IsFragment() bool {
	_, _, state := walkExtensions(p)
	return state == walkFragment
}
