package gateway

import (
	"net"
	"net/netip"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// The functions in this file return what rules consist of. Register 1 is for what
// is compared, which is used up at once.

// ifname is a device's name as the kernel compares it.
func ifname(name string) []byte {
	b := make([]byte, unix.IFNAMSIZ)
	copy(b, name)
	return b
}

func compare(equal bool, data []byte) *expr.Cmp {
	op := expr.CmpOpNeq
	if equal {
		op = expr.CmpOpEq
	}
	return &expr.Cmp{Op: op, Register: 1, Data: data}
}

func iif(name string, is bool) []expr.Any {
	return []expr.Any{&expr.Meta{Key: expr.MetaKeyIIFNAME, Register: 1}, compare(is, ifname(name))}
}

func oif(name string, is bool) []expr.Any {
	return []expr.Any{&expr.Meta{Key: expr.MetaKeyOIFNAME, Register: 1}, compare(is, ifname(name))}
}

func iifIn(s *nftables.Set) []expr.Any {
	return []expr.Any{&expr.Meta{Key: expr.MetaKeyIIFNAME, Register: 1}, &expr.Lookup{SourceRegister: 1, SetName: s.Name, SetID: s.ID}}
}

func oifIn(s *nftables.Set) []expr.Any {
	return []expr.Any{&expr.Meta{Key: expr.MetaKeyOIFNAME, Register: 1}, &expr.Lookup{SourceRegister: 1, SetName: s.Name, SetID: s.ID}}
}

func (b *table) source(p netip.Prefix, is bool) []expr.Any {
	if b.v6 {
		return prefix(8, p, is)
	}
	return prefix(12, p, is)
}

func (b *table) destination(p netip.Prefix, is bool) []expr.Any {
	if b.v6 {
		return prefix(24, p, is)
	}
	return prefix(16, p, is)
}

// prefix compares the address at an offset of the IP header.
func prefix(offset uint32, p netip.Prefix, is bool) []expr.Any {
	n := p.Addr().BitLen() / 8
	return []expr.Any{
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: uint32(n)},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: uint32(n), Mask: net.CIDRMask(p.Bits(), 8*n), Xor: make([]byte, n)},
		compare(is, p.Masked().Addr().AsSlice()),
	}
}

// state matches connections in one of the states.
func state(bits uint32) []expr.Any { return conntrack(expr.CtKeySTATE, bits) }

// changedByDNAT matches connections whose destination was changed (IPS_DST_NAT).
func changedByDNAT() []expr.Any { return conntrack(expr.CtKeySTATUS, 1<<5) }

func conntrack(key expr.CtKey, bits uint32) []expr.Any {
	return []expr.Any{
		&expr.Ct{Key: key, Register: 1},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 4, Mask: binaryutil.NativeEndian.PutUint32(bits), Xor: make([]byte, 4)},
		compare(false, make([]byte, 4)),
	}
}

// local matches what is for an address of this host.
func local() []expr.Any {
	return []expr.Any{
		&expr.Fib{Register: 1, ResultADDRTYPE: true, FlagDADDR: true},
		compare(true, binaryutil.NativeEndian.PutUint32(unix.RTN_LOCAL)),
	}
}

func protocol(name string) []expr.Any {
	if name == "udp" {
		return l4proto(unix.IPPROTO_UDP)
	}
	return l4proto(unix.IPPROTO_TCP)
}

func l4proto(number byte) []expr.Any {
	return []expr.Any{&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1}, compare(true, []byte{number})}
}

func dport(number uint16) []expr.Any {
	return []expr.Any{
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2},
		compare(true, binaryutil.BigEndian.PutUint16(number)),
	}
}

func icmpType(number byte) []expr.Any {
	return []expr.Any{
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 0, Len: 1},
		compare(true, []byte{number}),
	}
}

func (b *table) dnat(to netip.AddrPort) []expr.Any {
	family := uint32(unix.NFPROTO_IPV4)
	if b.v6 {
		family = unix.NFPROTO_IPV6
	}
	return []expr.Any{
		&expr.Immediate{Register: 1, Data: to.Addr().AsSlice()},
		&expr.Immediate{Register: 2, Data: binaryutil.BigEndian.PutUint16(to.Port())},
		&expr.NAT{Type: expr.NATTypeDestNAT, Family: family, RegAddrMin: 1, RegProtoMin: 2, Specified: true},
	}
}

func masquerade() []expr.Any { return []expr.Any{&expr.Counter{}, &expr.Masq{}} }
func drop() []expr.Any       { return []expr.Any{&expr.Counter{}, &expr.Verdict{Kind: expr.VerdictDrop}} }
func accept() []expr.Any     { return []expr.Any{&expr.Verdict{Kind: expr.VerdictAccept}} }
func jump(to string) []expr.Any {
	return []expr.Any{&expr.Verdict{Kind: expr.VerdictJump, Chain: to}}
}
