package ethertest

import (
	"encoding/binary"
	"net/netip"

	"github.com/tulle-net/tulle/ether"
)

// ARP is an ARP packet (RFC 826).
type ARP struct {
	Op                   uint16 // ether.ARPRequest
	SenderMAC, TargetMAC ether.MAC
	SenderIP, TargetIP   netip.Addr
	// SrcMAC is SenderMAC, DstMAC is Broadcast in a request, TargetMAC in a
	// reply, unless given.
	SrcMAC, DstMAC ether.MAC
	VLANs          []uint16
	Padding        int
}

// ARPRequest asks, from (mac, ip), who has target.
func ARPRequest(mac ether.MAC, ip, target netip.Addr) []byte {
	return ARP{Op: 1, SenderMAC: mac, SenderIP: ip, TargetIP: target}.Frame()
}

// ARPReply tells (toMAC, to) that ip is at mac.
func ARPReply(mac ether.MAC, ip netip.Addr, toMAC ether.MAC, to netip.Addr) []byte {
	return ARP{Op: 2, SenderMAC: mac, SenderIP: ip, TargetMAC: toMAC, TargetIP: to}.Frame()
}

// Frame returns the frame.
func (a ARP) Frame() []byte {
	if a.Op == 0 {
		a.Op = 1
	}
	if a.SrcMAC == 0 {
		a.SrcMAC = a.SenderMAC
	}
	if a.DstMAC == 0 {
		a.DstMAC = a.TargetMAC
		if a.Op == 1 {
			a.DstMAC = ether.Broadcast
		}
	}
	b := make([]byte, 28+a.Padding)
	copy(b, []byte{0, 1, 8, 0, 6, 4})
	binary.BigEndian.PutUint16(b[6:], a.Op)
	a.SenderMAC.Put(b[8:14])
	copy(b[14:18], a.SenderIP.AsSlice())
	a.TargetMAC.Put(b[18:24])
	copy(b[24:28], a.TargetIP.AsSlice())
	return Ethernet(a.DstMAC, a.SrcMAC, a.VLANs, 0x0806, b)
}

// NS is a neighbour solicitation (RFC 4861, section 4.3).
type NS struct {
	Src, Dst       netip.Addr // Dst is Target's solicited-node group; Src must be given
	SrcMAC, DstMAC ether.MAC
	VLANs          []uint16
	Target         netip.Addr
	// LinkLayer is the source link-layer address option; left out if zero.
	LinkLayer ether.MAC
}

// Solicit asks, from (mac, ip), who has target.
func Solicit(mac ether.MAC, ip, target netip.Addr) []byte {
	return NS{Src: ip, SrcMAC: mac, Target: target, LinkLayer: mac}.Frame()
}

// Frame returns the frame.
func (n NS) Frame() []byte {
	if !n.Dst.IsValid() {
		t := n.Target.As16()
		n.Dst = netip.AddrFrom16([16]byte{0: 0xff, 1: 2, 11: 1, 12: 0xff, 13: t[13], 14: t[14], 15: t[15]})
	}
	return nd{
		src: n.Src, dst: n.Dst, srcMAC: n.SrcMAC, dstMAC: n.DstMAC, vlans: n.VLANs,
		kind: 135, target: n.Target, option: 1, linkLayer: n.LinkLayer,
	}.frame()
}

// NA is a neighbour advertisement (RFC 4861, section 4.4).
type NA struct {
	Src, Dst                    netip.Addr // Src is Target; Dst is all nodes
	SrcMAC, DstMAC              ether.MAC
	VLANs                       []uint16
	Router, Solicited, Override bool
	Target                      netip.Addr
	// LinkLayer is the target link-layer address option; left out if zero.
	LinkLayer ether.MAC
}

// Advertise tells (toMAC, to), who has asked, that ip is at mac.
func Advertise(mac ether.MAC, ip netip.Addr, toMAC ether.MAC, to netip.Addr) []byte {
	return NA{
		Dst: to, SrcMAC: mac, DstMAC: toMAC, Target: ip, LinkLayer: mac, Solicited: true, Override: true,
	}.Frame()
}

// Frame returns the frame.
func (n NA) Frame() []byte {
	if !n.Src.IsValid() {
		n.Src = n.Target
	}
	if !n.Dst.IsValid() {
		n.Dst = netip.IPv6LinkLocalAllNodes()
	}
	var flags byte
	for i, f := range []bool{n.Router, n.Solicited, n.Override} {
		if f {
			flags |= 0x80 >> i
		}
	}
	return nd{
		src: n.Src, dst: n.Dst, srcMAC: n.SrcMAC, dstMAC: n.DstMAC, vlans: n.VLANs,
		kind: 136, flags: flags, target: n.Target, option: 2, linkLayer: n.LinkLayer,
	}.frame()
}

type nd struct {
	src, dst       netip.Addr
	srcMAC, dstMAC ether.MAC
	vlans          []uint16
	kind, flags    byte
	target         netip.Addr
	option         byte
	linkLayer      ether.MAC
}

func (n nd) frame() []byte {
	b := append([]byte{n.kind, 0, 0, 0, n.flags, 0, 0, 0}, n.target.AsSlice()...)
	if n.linkLayer != 0 {
		b = append(b, n.option, 1, 0, 0, 0, 0, 0, 0)
		n.linkLayer.Put(b[len(b)-6:])
	}
	return packet{
		src: n.src, dst: n.dst, srcMAC: n.srcMAC, dstMAC: n.dstMAC, vlans: n.vlans, ttl: 255,
		proto: 58, sumAt: 2, body: b,
	}.frame()
}
