package ether

import "encoding/binary"

// EtherTypes that this package looks at.
const (
	EtherTypeIPv4 = 0x0800
	EtherTypeARP  = 0x0806
	EtherTypeVLAN = 0x8100 // IEEE 802.1Q
	EtherTypeIPv6 = 0x86dd
	EtherTypeQinQ = 0x88a8 // IEEE 802.1ad
)

// IP protocol numbers and IPv6 next headers.
const (
	ProtoHopByHop   = 0
	ProtoICMP       = 1
	ProtoTCP        = 6
	ProtoUDP        = 17
	ProtoRouting    = 43
	ProtoFragment   = 44
	ProtoICMPv6     = 58
	ProtoNoNext     = 59
	ProtoDestOpts   = 60
	protoDCCP       = 33
	protoSCTP       = 132
	protoUDPLite    = 136
	maxExtensions   = 8 // headers that are walked; 8 of 2,048 bytes keep L4 within 16 bits
	maxVLANs        = 2
	ethernetLen     = 14
	ipv4Len         = 20
	ipv6Len         = 40
	tcpLen          = 20
	udpLen          = 8
	ipv4FragmentAny = 0x3fff // more fragments, or an offset
)

// Headers says where the headers of a frame are. Offsets count from the first
// byte of the frame; those behind what could not be read are zero.
type Headers struct {
	// EtherType after at most two VLAN tags.
	EtherType uint16
	// L3 is where the bytes after EtherType begin, 0 if the frame is too short
	// to have one.
	L3 uint16
	// L4 is where the transport header (of a fragment: its data) begins; 0
	// unless there is a whole IP header and all of its packet.
	L4 uint16
	// Payload is where the bytes after the TCP or UDP header begin, TCP options
	// included in the header; 0 unless ParseHeaders said ok.
	Payload uint16
	// End is where the IP packet ends, by its own length field; bytes from
	// there on are padding. 0 if L4 is.
	End uint32
	// Proto is the IP protocol, for IPv6 the one after the extension headers;
	// valid if L4 is not 0. Where the walk stopped at an extension header that
	// is not known, it is that header's number and L4 points at it.
	Proto uint8
	// V6: the packet is IPv6. Valid if L4 is not 0.
	V6 bool
	// Fragment: the packet is a fragment, or has an IPv6 fragment header at all.
	Fragment bool
}

// ParseHeaders finds the headers of frame, which is borrowed. It is ok only for
// a whole TCP segment or UDP datagram whose lengths agree with each other, in
// IPv4 or IPv6, with at most two VLAN tags and eight extension headers
// (hop-by-hop, destination options, and routing with no segments left), and
// neither a fragment nor a jumbogram. Otherwise h holds what was found before
// the point that is not so. It looks at no checksum.
func ParseHeaders(frame []byte) (h Headers, ok bool) {
	if len(frame) < ethernetLen {
		return h, false
	}
	off := ethernetLen
	h.EtherType = binary.BigEndian.Uint16(frame[12:14])
	for i := 0; i < maxVLANs && (h.EtherType == EtherTypeVLAN || h.EtherType == EtherTypeQinQ); i++ {
		if len(frame) < off+4 {
			return h, false
		}
		h.EtherType = binary.BigEndian.Uint16(frame[off+2 : off+4])
		off += 4
	}
	h.L3 = uint16(off)
	switch h.EtherType {
	case EtherTypeIPv4:
		ok = h.parseIPv4(frame[off:])
	case EtherTypeIPv6:
		ok = h.parseIPv6(frame[off:])
	}
	if !ok {
		return h, false
	}
	l4 := frame[h.L4:h.End]
	switch h.Proto {
	case ProtoTCP:
		if len(l4) < tcpLen {
			return h, false
		}
		n := int(l4[12]>>4) * 4
		if n < tcpLen || n > len(l4) {
			return h, false
		}
		h.Payload = h.L4 + uint16(n)
	case ProtoUDP:
		if len(l4) < udpLen || int(binary.BigEndian.Uint16(l4[4:6])) != len(l4) {
			return h, false
		}
		h.Payload = h.L4 + udpLen
	default:
		return h, false
	}
	return h, true
}

// parseIPv4 reads the header at p, which begins at h.L3. It reports whether a
// transport header may follow.
func (h *Headers) parseIPv4(p []byte) bool {
	if len(p) < ipv4Len || p[0]>>4 != 4 {
		return false
	}
	n, total := int(p[0]&0xf)*4, int(binary.BigEndian.Uint16(p[2:4]))
	if n < ipv4Len || total < n || total > len(p) {
		return false
	}
	h.L4 = h.L3 + uint16(n)
	h.End = uint32(h.L3) + uint32(total)
	h.Proto = p[9]
	h.Fragment = binary.BigEndian.Uint16(p[6:8])&ipv4FragmentAny != 0
	return !h.Fragment
}

// parseIPv6 is parseIPv4 for IPv6.
func (h *Headers) parseIPv6(p []byte) bool {
	if len(p) < ipv6Len || p[0]>>4 != 6 {
		return false
	}
	// A payload length of 0 is a jumbogram (RFC 2675) or nothing at all.
	n := int(binary.BigEndian.Uint16(p[4:6]))
	if n == 0 || n > len(p)-ipv6Len {
		return false
	}
	end := ipv6Len + n
	h.V6 = true
	h.End = uint32(h.L3) + uint32(end)
	if p[6] == ProtoTCP || p[6] == ProtoUDP {
		h.Proto, h.L4 = p[6], h.L3+ipv6Len
		return true
	}
	proto, off, state := walkExtensions(p[:end])
	h.Proto, h.L4 = proto, h.L3+uint16(off)
	h.Fragment = state == walkFragment
	return state == walkDone
}

// walkState is how a walk over extension headers ended.
type walkState uint8

const (
	walkDone     walkState = iota // at a transport header
	walkFragment                  // past a fragment header
	walkUnknown                   // too many headers, cut short, or segments left
)

// walkExtensions walks the extension headers of the IPv6 packet p (RFC 8200,
// section 4), which has at least its fixed header and no trailing padding. off
// is less than 2^15.
func walkExtensions(p []byte) (proto uint8, off int, state walkState) {
	proto, off = p[6], ipv6Len
	for range maxExtensions {
		switch proto {
		case ProtoHopByHop, ProtoRouting, ProtoDestOpts:
		case ProtoFragment:
			if len(p)-off < 8 {
				return proto, off, walkUnknown
			}
			return p[off], off + 8, walkFragment
		default:
			return proto, off, walkDone
		}
		if len(p)-off < 8 {
			return proto, off, walkUnknown
		}
		n := (int(p[off+1]) + 1) * 8
		// With segments left the destination in the header is not the one in the
		// pseudo-header (RFC 8200, section 8.1).
		if n > len(p)-off || proto == ProtoRouting && p[off+3] != 0 {
			return proto, off, walkUnknown
		}
		proto, off = p[off], off+n
	}
	switch proto {
	case ProtoHopByHop, ProtoRouting, ProtoDestOpts, ProtoFragment:
		return proto, off, walkUnknown
	}
	return proto, off, walkDone
}
