package ethertest

import (
	"encoding/binary"
	"fmt"
	"net/netip"

	"github.com/tulle-net/tulle/ether"
)

// noSum for packet.sumAt: the body is final.
const noSum = -1

// packet is an IP packet around a transport body.
type packet struct {
	src, dst       netip.Addr
	srcMAC, dstMAC ether.MAC
	vlans          []uint16
	tos, ttl       uint8
	id             uint16
	df             bool
	options        []byte
	label          uint32
	exts           []Extension
	proto          uint8
	sumAt          int // of the checksum in body
	body           []byte
	partial        bool
	padding        int
}

func (p packet) frame() []byte {
	if p.src.Is4() != p.dst.Is4() {
		panic(fmt.Sprintf("ethertest: %v and %v are of two families", p.src, p.dst))
	}
	if p.ttl == 0 {
		p.ttl = 64
	}
	if p.srcMAC == 0 {
		p.srcMAC = macOf(p.src)
	}
	if p.dstMAC == 0 {
		p.dstMAC = macOf(p.dst)
	}
	p.sumBody()
	etherType, b := uint16(0x0800), []byte(nil)
	if p.src.Is4() {
		b = p.ipv4()
	} else {
		etherType, b = 0x86dd, p.ipv6()
	}
	b = append(b, make([]byte, p.padding)...)
	f := Ethernet(p.dstMAC, p.srcMAC, p.vlans, etherType, b)
	return f[:len(f):len(f)]
}

// sumBody fills the checksum of the body.
func (p *packet) sumBody() {
	if p.sumAt == noSum {
		return
	}
	// ICMP alone has no pseudo-header.
	var pseudo []byte
	if p.proto != 1 {
		pseudo = pseudoHeader(p.src.AsSlice(), p.dst.AsSlice(), p.proto, len(p.body))
	}
	p.body[p.sumAt], p.body[p.sumAt+1] = 0, 0
	sum := sum16(pseudo)
	if !p.partial {
		sum = ^sum16(append(pseudo, p.body...)) // a pseudo-header has even length
		if sum == 0 && p.proto == 17 {
			sum = 0xffff
		}
	}
	binary.BigEndian.PutUint16(p.body[p.sumAt:], sum)
}

func (p packet) ipv4() []byte {
	if len(p.options)%4 != 0 || len(p.options) > 40 || p.exts != nil {
		panic(fmt.Sprintf("ethertest: IPv4 with %d bytes of options, %d extension headers", len(p.options), len(p.exts)))
	}
	n := 20 + len(p.options)
	if n+len(p.body) > 65535 {
		panic(fmt.Sprintf("ethertest: IPv4 packet of %d bytes", n+len(p.body)))
	}
	b := make([]byte, n, n+len(p.body)+p.padding)
	b[0] = 0x40 | byte(n/4)
	b[1] = p.tos
	binary.BigEndian.PutUint16(b[2:], uint16(n+len(p.body)))
	binary.BigEndian.PutUint16(b[4:], p.id)
	if p.df {
		b[6] = 0x40
	}
	b[8], b[9] = p.ttl, p.proto
	copy(b[12:], p.src.AsSlice())
	copy(b[16:], p.dst.AsSlice())
	copy(b[20:], p.options)
	binary.BigEndian.PutUint16(b[10:], ^sum16(b))
	return append(b, p.body...)
}

func (p packet) ipv6() []byte {
	var exts []byte
	next := p.proto
	for i := len(p.exts) - 1; i >= 0; i-- {
		e := p.exts[i]
		if len(e.Body)%8 != 7 {
			panic(fmt.Sprintf("ethertest: extension header of %d bytes", len(e.Body)+1))
		}
		exts = append(append([]byte{next}, e.Body...), exts...)
		next = e.Proto
	}
	n := len(exts) + len(p.body)
	if n > 65535 {
		panic(fmt.Sprintf("ethertest: IPv6 payload of %d bytes", n))
	}
	b := make([]byte, 40, 40+n+p.padding)
	binary.BigEndian.PutUint32(b, 6<<28|uint32(p.tos)<<20|p.label&0xfffff)
	binary.BigEndian.PutUint16(b[4:], uint16(n))
	b[6], b[7] = next, p.ttl
	copy(b[8:], p.src.AsSlice())
	copy(b[24:], p.dst.AsSlice())
	return append(append(b, exts...), p.body...)
}

// macOf returns ether.MACOf(a), or the group's MAC: RFC 1112, section 6.4, and
// RFC 2464, section 7.
func macOf(a netip.Addr) ether.MAC {
	switch b := a.AsSlice(); {
	case a == netip.AddrFrom4([4]byte{255, 255, 255, 255}):
		return ether.Broadcast
	case a.IsMulticast() && a.Is4():
		return 0x01005e_000000 | ether.MAC(binary.BigEndian.Uint32(b)&0x7fffff)
	case a.IsMulticast():
		return 0x3333_00000000 | ether.MAC(binary.BigEndian.Uint32(b[12:]))
	}
	return ether.MACOf(a)
}

// pseudoHeader returns the pseudo-header in full, in IPv6's form for both.
func pseudoHeader(src, dst []byte, proto uint8, n int) []byte {
	b := append(append([]byte(nil), src...), dst...)
	b = binary.BigEndian.AppendUint32(b, uint32(n))
	return append(b, 0, 0, 0, proto)
}

// sum16 is the ones' complement sum as RFC 1071 defines it: one word after the
// other, each carry put back at once.
func sum16(b []byte) uint16 {
	var sum uint32
	for i, c := range b {
		if i%2 == 0 {
			sum += uint32(c) << 8
		} else {
			sum += uint32(c)
		}
		sum = sum>>16 + sum&0xffff
	}
	return uint16(sum)
}
