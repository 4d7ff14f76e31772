package ether

import (
	"encoding/binary"
	"math/bits"
)

// FlowHash returns a hash of the flow that frame (borrowed) belongs to, from
// which a VTEP takes its UDP source port (RFC 7348, section 5): addresses,
// protocol and ports for IP; addresses and protocol for what has no ports in
// reach, and for every fragment, so that a fragmented datagram stays together;
// MACs and EtherType for all else. It has no seed: the same flow has the same
// hash on every node and after a restart. The two directions of a flow differ.
// All 32 bits are spread alike. It does not withstand a sender who wants
// collisions.
func FlowHash(frame []byte) uint32 {
	// TCP and UDP with nothing unusual are several times cheaper than through
	// ParseHeaders.
	if len(frame) >= ethernetLen+ipv4Len+4 {
		ip := frame[ethernetLen:]
		switch binary.BigEndian.Uint16(frame[12:14]) {
		case EtherTypeIPv4:
			total := int(binary.BigEndian.Uint16(ip[2:4]))
			if ip[0] == 0x45 && total >= ipv4Len+4 && total <= len(ip) && (ip[9] == ProtoTCP || ip[9] == ProtoUDP) &&
				binary.BigEndian.Uint16(ip[6:8])&ipv4FragmentAny == 0 {
				return hashIPv4(ip, uint64(binary.LittleEndian.Uint32(ip[ipv4Len:]))<<32|uint64(ip[9]))
			}
		case EtherTypeIPv6:
			n := int(binary.BigEndian.Uint16(ip[4:6]))
			if ip[0]>>4 == 6 && n >= 4 && ipv6Len+n <= len(ip) && (ip[6] == ProtoTCP || ip[6] == ProtoUDP) {
				return hashIPv6(ip, uint64(binary.LittleEndian.Uint32(ip[ipv6Len:]))<<32|uint64(ip[6]))
			}
		}
	}
	h, _ := ParseHeaders(frame)
	return flowHash(frame, h)
}

// flowHash is FlowHash without the short way.
func flowHash(frame []byte, h Headers) uint32 {
	if h.L4 == 0 {
		if h.L3 == 0 {
			return 0
		}
		macs := binary.LittleEndian.Uint64(frame)
		rest := uint64(binary.LittleEndian.Uint32(frame[8:12]))
		return fold(mix(macs, rest<<16|uint64(h.EtherType)))
	}
	last := uint64(h.Proto)
	if hasPorts(h) {
		last |= uint64(binary.LittleEndian.Uint32(frame[h.L4:])) << 32
	}
	if h.V6 {
		return hashIPv6(frame[h.L3:], last)
	}
	return hashIPv4(frame[h.L3:], last)
}

// hashIPv4 hashes the addresses of the header at ip, and ports and protocol
// in last.
func hashIPv4(ip []byte, last uint64) uint32 {
	return fold(mix(binary.LittleEndian.Uint64(ip[12:20]), last))
}

// hashIPv6 is hashIPv4 for IPv6.
func hashIPv6(ip []byte, last uint64) uint32 {
	ip = ip[8:40]
	a := mix(binary.LittleEndian.Uint64(ip), binary.LittleEndian.Uint64(ip[8:]))
	b := mix(binary.LittleEndian.Uint64(ip[16:]), binary.LittleEndian.Uint64(ip[24:])^hashK2)
	return fold(mix(a^bits.RotateLeft64(b, 23), last|1<<8))
}

// hasPorts reports whether the four bytes at L4 are ports; ParseHeaders need
// not be content with the rest.
func hasPorts(h Headers) bool {
	if h.Fragment || h.End-uint32(h.L4) < 4 {
		return false
	}
	switch h.Proto {
	case ProtoTCP, ProtoUDP, protoSCTP, protoDCCP, protoUDPLite:
		return true
	}
	return false
}

// Odd constants with as many ones as zeros: the fractional digits of the
// golden ratio, of sqrt(2) and of sqrt(3).
const (
	hashK0 = 0x9e3779b97f4a7c15
	hashK1 = 0x6a09e667f3bcc909
	hashK2 = 0xbb67ae8584caa73b
)

// mix is one multiplication of 64 by 64 bits, folded: every bit of a and b
// reaches the middle of the product.
func mix(a, b uint64) uint64 {
	hi, lo := bits.Mul64(a^hashK0, b^hashK1)
	return hi ^ lo
}

// fold spreads x over 32 bits once more.
func fold(x uint64) uint32 {
	x = mix(x, hashK2)
	return uint32(x>>32) ^ uint32(x)
}
