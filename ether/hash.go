package ether

import (
	"encoding/binary"
	"math/bits"
)

// FlowHash returns a hash of the flow that frame (borrowed) belongs to, from
// which a VTEP takes its UDP source port (RFC 7348, section 5): addresses,
// protocol and ports for IP; addresses and protocol for what has no ports in
// reach, and for every fragment, so that a fragmented datagram stays together;
// MACs and EtherType for all else. The headers are enough: of a super-frame in
// parts the first one has the hash of the whole. It has no seed: the same flow
// has the same hash on every node and after a restart. The two directions of a
// flow differ. All 32 bits are spread alike. It does not withstand a sender who
// wants collisions.
func FlowHash(frame []byte) uint32 {
	// TCP and UDP with nothing unusual are several times cheaper than through
	// flowHash.
	if len(frame) >= ethernetLen+ipv4Len+4 {
		ip := frame[ethernetLen:]
		switch binary.BigEndian.Uint16(frame[12:14]) {
		case EtherTypeIPv4:
			if ip[0] == 0x45 && binary.BigEndian.Uint16(ip[2:4]) >= ipv4Len+4 && (ip[9] == ProtoTCP || ip[9] == ProtoUDP) &&
				binary.BigEndian.Uint16(ip[6:8])&ipv4FragmentAny == 0 {
				return hashIPv4(ip, uint64(binary.LittleEndian.Uint32(ip[ipv4Len:]))<<32|uint64(ip[9]))
			}
		case EtherTypeIPv6:
			if len(ip) >= ipv6Len+4 && ip[0]>>4 == 6 && binary.BigEndian.Uint16(ip[4:6]) >= 4 && (ip[6] == ProtoTCP || ip[6] == ProtoUDP) {
				return hashIPv6(ip, uint64(binary.LittleEndian.Uint32(ip[ipv6Len:]))<<32|uint64(ip[6]))
			}
		}
	}
	return flowHash(frame)
}

// flowHash is FlowHash without the short way. It reads what ParseHeaders reads,
// but needs no more than the headers.
func flowHash(frame []byte) uint32 {
	if len(frame) < ethernetLen {
		return 0
	}
	off, etherType := ethernetLen, binary.BigEndian.Uint16(frame[12:14])
	for i := 0; i < maxVLANs && (etherType == EtherTypeVLAN || etherType == EtherTypeQinQ); i++ {
		if len(frame) < off+4 {
			return 0
		}
		etherType = binary.BigEndian.Uint16(frame[off+2 : off+4])
		off += 4
	}
	ip := frame[off:]
	switch {
	case etherType == EtherTypeIPv4 && len(ip) >= ipv4Len && ip[0]>>4 == 4:
		n, total := int(ip[0]&0xf)*4, int(binary.BigEndian.Uint16(ip[2:4]))
		if n < ipv4Len || total < n {
			break
		}
		last := uint64(ip[9])
		if binary.BigEndian.Uint16(ip[6:8])&ipv4FragmentAny == 0 {
			last |= portsAt(ip, n, total, ip[9])
		}
		return hashIPv4(ip, last)
	case etherType == EtherTypeIPv6 && len(ip) >= ipv6Len && ip[0]>>4 == 6:
		total := ipv6Len + int(binary.BigEndian.Uint16(ip[4:6]))
		if total == ipv6Len {
			break // a jumbogram (RFC 2675) or nothing at all
		}
		proto, n, state := walkExtensions(ip[:min(total, len(ip))])
		last := uint64(proto)
		if state == walkDone {
			last |= portsAt(ip, n, total, proto)
		}
		return hashIPv6(ip, last)
	}
	macs := binary.LittleEndian.Uint64(frame)
	rest := uint64(binary.LittleEndian.Uint32(frame[8:12]))
	return fold(mix(macs, rest<<16|uint64(etherType)))
}

// portsAt returns the ports at n of a packet that says to have total bytes, as
// hashIPv4 takes them; 0 for a protocol without ports, and where they are not
// in reach. The rest of the transport header need not be in order.
func portsAt(ip []byte, n, total int, proto uint8) uint64 {
	if min(total, len(ip))-n < 4 {
		return 0
	}
	switch proto {
	case ProtoTCP, ProtoUDP, protoSCTP, protoDCCP, protoUDPLite:
		return uint64(binary.LittleEndian.Uint32(ip[n:])) << 32
	}
	return 0
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
