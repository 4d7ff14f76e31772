package ether

import "encoding/binary"

const (
	icmpUnreachable = 3 // destination unreachable; its codes:

	icmpHostUnreachable     = 1
	icmpFragmentationNeeded = 4
	icmp6Unreachable        = 1 // its code 3: address unreachable
	icmp6AddressUnreachable = 3

	icmpMaxType   = 18
	icmpHeaderLen = 8 // ICMP and ICMPv6 alike
	icmp6TooBig   = 2
	icmp6Redirect = 137
	icmpHopLimit  = 64
	// icmpMaxPacket is the most bytes of an ICMP error's packet (RFC 1812,
	// section 4.3.2.3).
	icmpMaxPacket = 576
	// minIPv4MTU and minIPv6MTU are what each link has at least (RFC 791,
	// section 3.2; RFC 8200, section 5).
	minIPv4MTU = 68
	minIPv6MTU = 1280
)

// MaxTooBig is the most bytes that TooBig appends.
const MaxTooBig = ethernetLen + 4*maxVLANs + minIPv6MTU

// TooBig appends to dst the frame that tells the sender of frame that its IP
// packet is larger than mtu, the bytes of the largest packet that fits: ICMP
// "fragmentation needed" (RFC 792; RFC 1191, section 4) or ICMPv6 Packet Too Big
// (RFC 4443, section 3.2). It goes back the way that frame came, MACs swapped,
// VLAN tags kept, and quotes the begin of the packet as it is: 548 bytes of IPv4,
// 1,232 of IPv6. Its source is the packet's destination: an overlay has no router
// whose address it could be, and any other address might be one that the
// sender's own filters refuse. Of a super-frame it quotes the begin, sequence
// number and all. frame is borrowed and does not overlap dst.
//
// It is false, with dst as it was, where there is nobody to tell or nothing that
// helps:
//
//   - the packet fits, or has no DF (IPv4): it may be fragmented
//   - mtu is less than 68, or 1,280 for IPv6: a host need not go below
//   - an ICMP error, or a message that may be one (RFC 1122, section 3.2.2)
//   - to or from what is not a single host, by MAC or address. A multicast
//     packet of IPv6 may be answered (RFC 4443, section 2.4 (e.3)), but not from
//     its own destination
//   - a fragment but the first: nobody knows of what
//   - no whole IP packet, an IPv4 header checksum that is wrong, extension
//     headers that ParseHeaders does not walk
//
// How often one sender is told is for the caller to limit (RFC 4443, section 2.4
// (f)).
func TooBig(dst, frame []byte, mtu int) ([]byte, bool) {
	h, _ := ParseHeaders(frame)
	if h.L4 == 0 || int(h.End)-int(h.L3) <= mtu || !MACFrom(frame).IsValid() || !MACFrom(frame[6:]).IsValid() {
		return dst, false
	}
	packet := frame[h.L3:h.End]
	if h.V6 {
		if mtu < minIPv6MTU || !answerable6(packet) {
			return dst, false
		}
		return appendTooBig6(appendBack(dst, frame[:h.L3]), packet, mtu), true
	}
	if mtu < minIPv4MTU || !IPv4(packet).DontFragment() || !answerable4(IPv4(packet)) {
		return dst, false
	}
	return appendTooBig4(appendBack(dst, frame[:h.L3]), packet, mtu), true
}

// answerable4 reports whether the packet p, whose lengths are right, may be
// answered with an ICMP error.
func answerable4(p IPv4) bool {
	if p.FragmentOffset() != 0 || !p.ChecksumOK() || !isHost4(p[12:16]) || !isHost4(p[16:20]) {
		return false
	}
	if p.Proto() != ProtoICMP {
		return true
	}
	icmp := p.Payload()
	if len(icmp) == 0 {
		return false
	}
	switch icmp[0] {
	case icmpUnreachable, 4, 5, 11, 12: // source quench, redirect, time exceeded, parameter problem
		return false
	}
	return icmp[0] <= icmpMaxType
}

// isHost4 reports whether a, 4 bytes, may be a single host's address. Broadcasts
// of a subnet, which nothing here knows, have the broadcast MAC.
func isHost4(a []byte) bool { return a[0] != 0 && a[0] != 127 && a[0] < 224 }

// answerable6 is answerable4 for IPv6.
func answerable6(p []byte) bool {
	if !isHost6(p[8:24]) || !isHost6(p[24:40]) {
		return false
	}
	proto, off, state := walkExtensions(p)
	switch state {
	case walkUnknown:
		return false
	case walkFragment: // off is behind its header
		if binary.BigEndian.Uint16(p[off-6:off-4])&^7 != 0 {
			return false
		}
		switch proto {
		case ProtoHopByHop, ProtoRouting, ProtoFragment, ProtoDestOpts:
			return false // which may lead to ICMPv6
		}
	}
	if proto != ProtoICMPv6 {
		return true
	}
	return off < len(p) && p[off] >= 128 && p[off] != icmp6Redirect
}

// isHost6 reports whether a, 16 bytes, may be a single host's address.
func isHost6(a []byte) bool {
	return a[0] != 0xff && binary.BigEndian.Uint64(a)|binary.BigEndian.Uint64(a[8:])&^1 != 0 // "::" and "::1"
}

// appendBack appends the Ethernet header of the answer to a frame with this one.
func appendBack(dst, header []byte) []byte {
	dst = append(dst, header[6:12]...)
	dst = append(dst, header[0:6]...)
	return append(dst, header[12:]...)
}

// appendTooBig4 appends the answer to packet.
func appendTooBig4(dst, packet []byte, mtu int) []byte {
	return appendUnreachable4(dst, packet, icmpFragmentationNeeded, mtu)
}

// appendUnreachable4 appends an ICMP message of the type destination unreachable.
func appendUnreachable4(dst, packet []byte, code byte, mtu int) []byte {
	packet = packet[:min(len(packet), icmpMaxPacket-ipv4Len-icmpHeaderLen)]
	at := len(dst)
	dst = append(dst,
		0x45, 0xc0, 0, 0, // precedence 6 (RFC 1812, section 4.3.2.5)
		0, 0, 0x40, 0,
		icmpHopLimit, ProtoICMP, 0, 0)
	dst = append(dst, packet[16:20]...)
	dst = append(dst, packet[12:16]...)
	dst = append(dst, icmpUnreachable, code, 0, 0, 0, 0, byte(mtu>>8), byte(mtu))
	dst = append(dst, packet...)
	ip := IPv4(dst[at:])
	binary.BigEndian.PutUint16(ip[2:4], uint16(len(ip)))
	ip.SetChecksum()
	icmp := ip[ipv4Len:]
	binary.BigEndian.PutUint16(icmp[2:4], ^Sum(icmp, 0))
	return dst
}

// appendTooBig6 is appendTooBig4 for IPv6.
func appendTooBig6(dst, packet []byte, mtu int) []byte {
	return appendError6(dst, packet, icmp6TooBig, 0, uint32(mtu))
}

// appendError6 appends an ICMPv6 error with the four bytes that belong to its type.
func appendError6(dst, packet []byte, kind, code byte, word uint32) []byte {
	packet = packet[:min(len(packet), minIPv6MTU-ipv6Len-icmpHeaderLen)]
	at := len(dst)
	dst = append(dst, 0x60, 0, 0, 0, 0, 0, ProtoICMPv6, icmpHopLimit)
	dst = append(dst, packet[24:40]...)
	dst = append(dst, packet[8:24]...)
	dst = append(dst, kind, code, 0, 0)
	dst = binary.BigEndian.AppendUint32(dst, word)
	dst = append(dst, packet...)
	ip := dst[at:]
	icmp := ip[ipv6Len:]
	binary.BigEndian.PutUint16(ip[4:6], uint16(len(icmp)))
	binary.BigEndian.PutUint16(icmp[2:4], ^Sum(icmp, PseudoSum(ProtoICMPv6, ip[8:24], ip[24:40], len(icmp))))
	return dst
}
