package ether

import (
	"encoding/binary"
	"net/netip"
)

// MulticastMAC returns the MAC of the group that packets for the multicast
// address a go to: 01:00:5e and 23 bits for IPv4 (RFC 1112, section 6.4), 33:33
// and 32 bits for IPv6 (RFC 2464, section 7).
func MulticastMAC(a netip.Addr) MAC {
	if a.Is4() {
		b := a.As4()
		return 0x0100_5e00_0000 | MAC(binary.BigEndian.Uint32(b[:])&0x7f_ffff)
	}
	b := a.As16()
	return 0x3333_0000_0000 | MAC(binary.BigEndian.Uint32(b[12:]))
}

// LinkLocal returns the link-local address that follows from a MAC (RFC 4291,
// appendix A).
func LinkLocal(m MAC) netip.Addr {
	return netip.AddrFrom16([16]byte{
		0xfe, 0x80, 8: byte(m>>40) ^ 2, 9: byte(m >> 32), 10: byte(m >> 24), 11: 0xff,
		12: 0xfe, 13: byte(m >> 16), 14: byte(m >> 8), 15: byte(m),
	})
}

// AppendARP appends to b the frame of an ARP packet (RFC 826). target is zero
// where it is asked for.
func AppendARP(b []byte, dst MAC, op uint16, sender MAC, senderIP netip.Addr, target MAC, targetIP netip.Addr) []byte {
	b = appendEthernet(b, dst, sender, EtherTypeARP)
	b = append(b, 0, 1, EtherTypeIPv4>>8, EtherTypeIPv4&0xff, 6, 4, byte(op>>8), byte(op))
	b = appendMAC(b, sender)
	from, to := senderIP.As4(), targetIP.As4()
	b = append(b, from[:]...)
	b = appendMAC(b, target)
	return append(b, to[:]...)
}

// AppendSolicitation appends to b the frame of a neighbour solicitation (RFC
// 4861, section 4.3) for target, of a station with the address src: to the
// target's solicited-node group, or, where dst is not zero, to that MAC alone.
func AppendSolicitation(b []byte, dst, mac MAC, src, target netip.Addr) []byte {
	to := target
	if dst == 0 {
		to = SolicitedNode(target)
		dst = MulticastMAC(to)
	}
	return appendND(b, dst, mac, src, to, ndSolicitation, 0, target)
}

// AppendAdvertisement appends to b the frame of a neighbour advertisement (RFC
// 4861, section 4.4) of the station's own address target: solicited, to who
// asked, or, where to is not valid, to all nodes. It overrides what they know.
func AppendAdvertisement(b []byte, dst, mac MAC, to, target netip.Addr) []byte {
	flags := byte(0x60) // solicited, override
	if !to.IsValid() {
		to, flags = netip.IPv6LinkLocalAllNodes(), 0x20
		dst = MulticastMAC(to)
	}
	return appendND(b, dst, mac, target, to, ndAdvertisement, flags, target)
}

// appendND appends a frame with a neighbour discovery message that names mac.
func appendND(b []byte, dst, mac MAC, src, to netip.Addr, kind, flags byte, target netip.Addr) []byte {
	option := byte(ndSourceLinkLayer)
	if kind == ndAdvertisement {
		option = ndTargetLinkLayer
	}
	b = appendEthernet(b, dst, mac, EtherTypeIPv6)
	at := len(b)
	from, dest, what := src.As16(), to.As16(), target.As16()
	b = append(b, 0x60, 0, 0, 0, 0, ndLen+8, ProtoICMPv6, ndHopLimit)
	b = append(b, from[:]...)
	b = append(b, dest[:]...)
	b = append(b, kind, 0, 0, 0, flags, 0, 0, 0)
	b = append(b, what[:]...)
	b = append(b, option, 1)
	b = appendMAC(b, mac)
	icmp := b[at+ipv6Len:]
	binary.BigEndian.PutUint16(icmp[2:4], ^Sum(icmp, PseudoSum(ProtoICMPv6, from[:], dest[:], len(icmp))))
	return b
}

func appendEthernet(b []byte, dst, src MAC, etherType uint16) []byte {
	b = appendMAC(appendMAC(b, dst), src)
	return binary.BigEndian.AppendUint16(b, etherType)
}

func appendMAC(b []byte, m MAC) []byte {
	return append(b, byte(m>>40), byte(m>>32), byte(m>>24), byte(m>>16), byte(m>>8), byte(m))
}
