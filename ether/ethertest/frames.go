// Package ethertest builds frames for tests.
//
// Every frame has right lengths and checksums, computed one 16-bit word after
// the other and not by package ether, whose code it is there to test. Verify
// looks at a frame in the same way. A zero field means something usual, so
// TCP{Payload: b}.Frame() is a good frame. A frame that cannot be built panics.
package ethertest

import (
	"encoding/binary"
	"fmt"
	"net/netip"

	"github.com/tulle-net/tulle/ether"
)

// The addresses of frames that name none.
var (
	DefaultSrc  = netip.MustParseAddrPort("10.32.0.1:40000")
	DefaultDst  = netip.MustParseAddrPort("10.32.0.2:80")
	DefaultSrc6 = netip.MustParseAddrPort("[fd00:32::1]:40000")
	DefaultDst6 = netip.MustParseAddrPort("[fd00:32::2]:80")
)

// Extension is an IPv6 extension header: hop-by-hop, routing, destination
// options or fragment.
type Extension struct {
	Proto uint8
	// Body is all after the next-header byte; 7 bytes, or 7 more than a
	// multiple of 8. The length byte is in it.
	Body []byte
}

// Padded is an extension header of lenBytes (a multiple of 8) full of PadN.
func Padded(proto uint8, lenBytes int) Extension {
	body := make([]byte, lenBytes-1)
	body[0] = byte(lenBytes/8 - 1)
	for at := 1; at < len(body); {
		n := min(len(body)-at-2, 255)
		body[at], body[at+1] = 1, byte(n)
		at += 2 + n
		if at == len(body)-1 {
			body[at] = 0 // Pad1
			at++
		}
	}
	return Extension{Proto: proto, Body: body}
}

// TCP is a TCP segment in IPv4, or in IPv6 if the addresses are.
type TCP struct {
	Src, Dst       netip.AddrPort // DefaultSrc and DefaultDst
	SrcMAC, DstMAC ether.MAC      // ether.MACOf the addresses
	VLANs          []uint16       // tags, the outer first: 0x8100, if there are two 0x88a8 and 0x8100
	TOS            uint8          // traffic class
	TTL            uint8          // hop limit; 64
	ID             uint16         // IPv4
	DF             bool           // IPv4
	IPOptions      []byte         // IPv4, a multiple of 4
	FlowLabel      uint32         // IPv6
	Extensions     []Extension    // IPv6
	Seq, Ack       uint32
	Flags          uint8  // ether.TCPAck
	Window         uint16 // 0xffff
	Urgent         uint16
	Options        []byte // a multiple of 4
	Payload        []byte
	// Partial leaves the pseudo-header's sum in the checksum field.
	Partial bool
	// Padding is the number of zero bytes behind the packet.
	Padding int
}

// Frame returns the frame, with a capacity of its length.
func (s TCP) Frame() []byte {
	if s.Flags == 0 {
		s.Flags = ether.TCPAck
	}
	if s.Window == 0 {
		s.Window = 0xffff
	}
	src, dst := ends(s.Src, s.Dst)
	b := binary.BigEndian.AppendUint16(nil, src.Port())
	b = binary.BigEndian.AppendUint16(b, dst.Port())
	b = binary.BigEndian.AppendUint32(b, s.Seq)
	b = binary.BigEndian.AppendUint32(b, s.Ack)
	if len(s.Options)%4 != 0 || len(s.Options) > 40 {
		panic(fmt.Sprintf("ethertest: TCP options of %d bytes", len(s.Options)))
	}
	b = append(b, byte(20+len(s.Options))/4<<4, s.Flags)
	b = binary.BigEndian.AppendUint16(b, s.Window)
	b = append(b, 0, 0)
	b = binary.BigEndian.AppendUint16(b, s.Urgent)
	b = append(append(b, s.Options...), s.Payload...)
	return packet{
		src: src.Addr(), dst: dst.Addr(), srcMAC: s.SrcMAC, dstMAC: s.DstMAC, vlans: s.VLANs,
		tos: s.TOS, ttl: s.TTL, id: s.ID, df: s.DF, options: s.IPOptions, label: s.FlowLabel, exts: s.Extensions,
		proto: 6, sumAt: 16, body: b, partial: s.Partial, padding: s.Padding,
	}.frame()
}

// Super returns the frame with a partial checksum and the Meta that a kernel
// gives with it: a super-frame to be cut into segments of segmentLen bytes, or
// an ordinary frame if segmentLen is 0 or holds the payload.
func (s TCP) Super(segmentLen int) ([]byte, ether.Meta) {
	s.Partial = true
	f := s.Frame()
	m := partialMeta(f, 16, len(s.Payload)+s.Padding, 20+len(s.Options))
	if segmentLen > 0 && segmentLen < len(s.Payload) {
		m.GSO = ether.GSOTCPv4
		if src, _ := ends(s.Src, s.Dst); src.Addr().Is6() {
			m.GSO = ether.GSOTCPv6
		}
		m.ECN = s.Flags&ether.TCPCwr != 0
		m.HeaderLen, m.SegmentLen = uint16(len(f)-s.Padding-len(s.Payload)), uint16(segmentLen)
	}
	return f, m
}

// UDP is a UDP datagram in IPv4, or in IPv6 if the addresses are. Fields mean
// what they mean in TCP.
type UDP struct {
	Src, Dst       netip.AddrPort
	SrcMAC, DstMAC ether.MAC
	VLANs          []uint16
	TOS            uint8
	TTL            uint8
	ID             uint16
	DF             bool
	IPOptions      []byte
	FlowLabel      uint32
	Extensions     []Extension
	Payload        []byte
	Partial        bool
	// NoChecksum leaves the checksum 0.
	NoChecksum bool
	Padding    int
}

// Frame returns the frame, with a capacity of its length.
func (d UDP) Frame() []byte {
	src, dst := ends(d.Src, d.Dst)
	b := binary.BigEndian.AppendUint16(nil, src.Port())
	b = binary.BigEndian.AppendUint16(b, dst.Port())
	b = binary.BigEndian.AppendUint16(b, uint16(8+len(d.Payload)))
	b = append(append(b, 0, 0), d.Payload...)
	sumAt := 6
	if d.NoChecksum {
		sumAt = noSum
	}
	return packet{
		src: src.Addr(), dst: dst.Addr(), srcMAC: d.SrcMAC, dstMAC: d.DstMAC, vlans: d.VLANs,
		tos: d.TOS, ttl: d.TTL, id: d.ID, df: d.DF, options: d.IPOptions, label: d.FlowLabel, exts: d.Extensions,
		proto: 17, sumAt: sumAt, body: b, partial: d.Partial, padding: d.Padding,
	}.frame()
}

// Super is TCP.Super for a train of datagrams of segmentLen bytes each.
func (d UDP) Super(segmentLen int) ([]byte, ether.Meta) {
	d.Partial, d.NoChecksum = true, false
	f := d.Frame()
	m := partialMeta(f, 6, len(d.Payload)+d.Padding, 8)
	if segmentLen > 0 && segmentLen < len(d.Payload) {
		m.GSO = ether.GSOUDP
		m.HeaderLen, m.SegmentLen = uint16(len(f)-d.Padding-len(d.Payload)), uint16(segmentLen)
	}
	return f, m
}

// partialMeta describes frame, which ends with a transport header of headerLen
// bytes and behind bytes after that.
func partialMeta(frame []byte, sumAt, behind, headerLen int) ether.Meta {
	return ether.Meta{
		Checksum:       ether.ChecksumPartial,
		ChecksumStart:  uint16(len(frame) - behind - headerLen),
		ChecksumOffset: uint16(sumAt),
	}
}

// Echo is an ICMP echo request or reply (RFC 792), for IPv6 addresses an
// ICMPv6 one (RFC 4443, section 4).
type Echo struct {
	Src, Dst       netip.Addr // those of DefaultSrc and DefaultDst
	SrcMAC, DstMAC ether.MAC
	VLANs          []uint16
	TTL            uint8
	Reply          bool
	Ident, Seq     uint16
	Payload        []byte
	Padding        int
}

// Frame returns the frame, with a capacity of its length.
func (e Echo) Frame() []byte {
	if !e.Src.IsValid() {
		e.Src = DefaultSrc.Addr()
	}
	if !e.Dst.IsValid() {
		e.Dst = DefaultDst.Addr()
	}
	kind, proto := byte(8), byte(1)
	if e.Reply {
		kind = 0
	}
	if e.Src.Is6() {
		kind, proto = 128, 58
		if e.Reply {
			kind = 129
		}
	}
	b := []byte{kind, 0, 0, 0}
	b = binary.BigEndian.AppendUint16(b, e.Ident)
	b = binary.BigEndian.AppendUint16(b, e.Seq)
	return packet{
		src: e.Src, dst: e.Dst, srcMAC: e.SrcMAC, dstMAC: e.DstMAC, vlans: e.VLANs, ttl: e.TTL,
		proto: proto, sumAt: 2, body: append(b, e.Payload...), padding: e.Padding,
	}.frame()
}

// Ethernet returns a frame of any type.
func Ethernet(dst, src ether.MAC, vlans []uint16, etherType uint16, payload []byte) []byte {
	b := make([]byte, 12, 14+4*len(vlans)+len(payload))
	dst.Put(b[0:6])
	src.Put(b[6:12])
	for i, v := range vlans {
		tag := uint16(0x8100)
		if i < len(vlans)-1 {
			tag = 0x88a8
		}
		b = binary.BigEndian.AppendUint16(b, tag)
		b = binary.BigEndian.AppendUint16(b, v)
	}
	return append(binary.BigEndian.AppendUint16(b, etherType), payload...)
}

// ends puts the default for an end that is not given, in the family of the other.
func ends(src, dst netip.AddrPort) (netip.AddrPort, netip.AddrPort) {
	v6 := src.Addr().Is6() || dst.Addr().Is6()
	if !src.IsValid() {
		src = DefaultSrc
		if v6 {
			src = DefaultSrc6
		}
	}
	if !dst.IsValid() {
		dst = DefaultDst
		if v6 {
			dst = DefaultDst6
		}
	}
	return src, dst
}
