package ether

import (
	"encoding/binary"
	"net/netip"
)

// ARP operations (RFC 826).
const (
	ARPRequest = 1
	ARPReply   = 2
)

const arpLen = 28

// ARP is an ARP packet for Ethernet and IPv4 (RFC 826), 28 bytes. It is had
// from ParseARP; its bytes are shared.
type ARP []byte

// ParseARP returns the packet at the begin of b, the payload of a frame of
// EtherTypeARP. The error is ErrShort, or ErrMalformed for other kinds of
// address. Operations other than request and reply pass.
func ParseARP(b []byte) (ARP, error) {
	if len(b) < arpLen {
		return nil, ErrShort
	}
	// Hardware Ethernet, protocol IPv4, lengths 6 and 4.
	if binary.BigEndian.Uint32(b[0:4]) != 1<<16|EtherTypeIPv4 || b[4] != 6 || b[5] != 4 {
		return nil, ErrMalformed
	}
	return b[:arpLen:arpLen], nil
}

// Op returns the operation, see ARPRequest.
func (a ARP) Op() uint16 { return binary.BigEndian.Uint16(a[6:8]) }

// SenderMAC returns the sender's hardware address.
func (a ARP) SenderMAC() MAC { return MACFrom(a[8:14]) }

// SenderIP returns the sender's address; 0.0.0.0 in a probe (RFC 5227).
func (a ARP) SenderIP() netip.Addr { return netip.AddrFrom4([4]byte(a[14:18])) }

// TargetMAC returns the target's hardware address, of no meaning in a request.
func (a ARP) TargetMAC() MAC { return MACFrom(a[18:24]) }

// TargetIP returns the target's address.
func (a ARP) TargetIP() netip.Addr { return netip.AddrFrom4([4]byte(a[24:28])) }

const (
	ndSolicitation  = 135
	ndAdvertisement = 136
	ndLen           = 24 // up to the options
	ndHopLimit      = 255

	ndSourceLinkLayer = 1
	ndTargetLinkLayer = 2
)

// ND is a neighbour solicitation or advertisement, from its ICMPv6 header on
// (RFC 4861, sections 4.3 and 4.4). It is had from ParseND; its bytes are shared.
type ND []byte

// ParseND returns the message that p carries if it passes the checks of RFC
// 4861, sections 7.1.1 and 7.1.2: hop limit, checksum, code, length, target,
// options, and an unspecified source only where duplicates are looked for. A
// fragment is refused (RFC 6980). The error is ErrShort or ErrMalformed, the
// latter also for a packet that is something else.
func ParseND(p IPv6) (ND, error) {
	proto, off, ok := p.Transport()
	if !ok || proto != ProtoICMPv6 {
		return nil, ErrMalformed
	}
	n := ND(p[off:])
	if len(n) < ndLen {
		return nil, ErrShort
	}
	if n[0] != ndSolicitation && n[0] != ndAdvertisement || n[1] != 0 || p.HopLimit() != ndHopLimit {
		return nil, ErrMalformed
	}
	if Sum(n, PseudoSum(ProtoICMPv6, p[8:24], p[24:40], len(n))) != 0xffff {
		return nil, ErrMalformed
	}
	for opts := n[ndLen:]; len(opts) > 0; {
		if len(opts) < 2 {
			return nil, ErrShort
		}
		l := int(opts[1]) * 8
		if l == 0 {
			return nil, ErrMalformed
		}
		if l > len(opts) {
			return nil, ErrShort
		}
		opts = opts[l:]
	}
	if n.Target().IsMulticast() || !n.endsAgree(p) {
		return nil, ErrMalformed
	}
	return n, nil
}

// endsAgree checks what the message and the addresses of its packet owe each
// other.
func (n ND) endsAgree(p IPv6) bool {
	if n.IsAdvertisement() {
		return !p.Dst().IsMulticast() || !n.Solicited()
	}
	if !p.Src().IsUnspecified() {
		return true
	}
	_, hasLinkLayer := n.LinkLayer()
	return !hasLinkLayer && p.Dst() == SolicitedNode(n.Target())
}

// IsSolicitation reports whether n asks for Target.
func (n ND) IsSolicitation() bool { return n[0] == ndSolicitation }

// IsAdvertisement reports whether n tells of Target.
func (n ND) IsAdvertisement() bool { return n[0] == ndAdvertisement }

// Router returns the R flag of an advertisement.
func (n ND) Router() bool { return n.IsAdvertisement() && n[4]&0x80 != 0 }

// Solicited returns the S flag of an advertisement.
func (n ND) Solicited() bool { return n.IsAdvertisement() && n[4]&0x40 != 0 }

// Override returns the O flag of an advertisement.
func (n ND) Override() bool { return n.IsAdvertisement() && n[4]&0x20 != 0 }

// Target returns the address that is asked for or told of.
func (n ND) Target() netip.Addr { return netip.AddrFrom16([16]byte(n[8:24])) }

// LinkLayer returns the MAC in the first link-layer option that belongs to the
// message: the source's in a solicitation, the target's in an advertisement.
func (n ND) LinkLayer() (MAC, bool) {
	want := uint8(ndSourceLinkLayer)
	if n.IsAdvertisement() {
		want = ndTargetLinkLayer
	}
	for opts := n[ndLen:]; len(opts) >= 8; {
		l := int(opts[1]) * 8
		if l == 0 || l > len(opts) {
			break
		}
		if opts[0] == want && l == 8 {
			return MACFrom(opts[2:8]), true
		}
		opts = opts[l:]
	}
	return 0, false
}

// SolicitedNode returns the multicast group that solicitations for the IPv6
// address a go to (RFC 4291, section 2.7.1).
func SolicitedNode(a netip.Addr) netip.Addr {
	b := a.As16()
	return netip.AddrFrom16([16]byte{0: 0xff, 1: 0x02, 11: 0x01, 12: 0xff, 13: b[13], 14: b[14], 15: b[15]})
}
