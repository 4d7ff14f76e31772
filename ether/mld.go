package ether

import (
	"encoding/binary"
	"net/netip"
	"time"
)

// Types of MLD messages, which are ICMPv6's (RFC 3810, section 5; RFC 2710, section 3).
const (
	mldQuery    = 130
	mldReportV1 = 131
	mldDone     = 132
	mldReportV2 = 143

	mldLen        = 24 // of all but the v2 report
	mldQueryV2Len = 28
	mldReportLen  = 8 // up to the records
	mldHopLimit   = 1
)

// MLD is a message of MLDv1 or v2 (RFC 2710, RFC 3810), from its ICMPv6 header on. It
// is had from ParseMLD; its bytes are shared.
type MLD []byte

// ParseMLD returns the message that p carries, if it has the hop limit, the source and
// the checksum that it must (RFC 3810, sections 5.1.14 and 5.2.13), and all of its
// records. The error is ErrShort or ErrMalformed, the
// latter also for a packet that is something else or a fragment.
func ParseMLD(p IPv6) (MLD, error) {
	proto, off, ok := p.Transport()
	if !ok || proto != ProtoICMPv6 || p.HopLimit() != mldHopLimit {
		return nil, ErrMalformed
	}
	m := MLD(p[off:])
	if len(m) < mldReportLen {
		return nil, ErrShort
	}
	switch m[0] {
	case mldQuery, mldReportV1, mldDone:
		if len(m) < mldLen {
			return nil, ErrShort
		}
	case mldReportV2:
		if !recordsFit(m, 16) {
			return nil, ErrShort
		}
	default:
		return nil, ErrMalformed
	}
	if src := p.Src(); !src.IsLinkLocalUnicast() && (m.IsQuery() || !src.IsUnspecified()) {
		return nil, ErrMalformed
	}
	if Sum(m, PseudoSum(ProtoICMPv6, p[8:24], p[24:40], len(m))) != 0xffff {
		return nil, ErrMalformed
	}
	return m, nil
}

// IsQuery reports whether m asks who has joined what; all else tells.
func (m MLD) IsQuery() bool { return m[0] == mldQuery }

// Group returns the group that a query asks for, :: for all, or that a message of v1
// tells of; of a v2 report it is ::.
func (m MLD) Group() netip.Addr {
	if m[0] == mldReportV2 {
		return netip.IPv6Unspecified()
	}
	return netip.AddrFrom16([16]byte(m[8:24]))
}

// Each is IGMP.Each.
func (m MLD) Each(f func(group netip.Addr, joined bool)) {
	switch m[0] {
	case mldReportV1:
		f(m.Group(), true)
	case mldDone:
		f(m.Group(), false)
	case mldReportV2:
		eachRecord(m, 16, f)
	}
}

// AppendMLDQuery appends to b the frame of an MLDv2 query (RFC 3810, section 5.1),
// which hosts of v1 take for one of theirs, from the station mac and its link-local
// address. An invalid group asks for all. within is how long hosts may take to answer,
// every how often all are asked.
func AppendMLDQuery(b []byte, mac MAC, group netip.Addr, within, every time.Duration) []byte {
	to := group
	if !group.IsValid() {
		to, group = netip.IPv6LinkLocalAllNodes(), netip.IPv6Unspecified()
	}
	b = appendEthernet(b, MulticastMAC(to), mac, EtherTypeIPv6)
	src, dst, g := LinkLocal(mac).As16(), to.As16(), group.As16()
	const options = 8
	b = append(b, 0x60, 0, 0, 0, 0, options+mldQueryV2Len, 0, mldHopLimit)
	b = append(b, src[:]...)
	b = append(b, dst[:]...)
	b = append(b, ProtoICMPv6, 0, 5, 2, 0, 0, 1, 0) // router alert (RFC 2711), PadN
	at := len(b)
	code := floatCode(within/time.Millisecond, 12)
	b = append(b, mldQuery, 0, 0, 0, byte(code>>8), byte(code), 0, 0)
	b = append(b, g[:]...)
	b = append(b, Robustness, byte(floatCode(every/time.Second, 4)), 0, 0)
	m := b[at:]
	binary.BigEndian.PutUint16(m[2:4], ^Sum(m, PseudoSum(ProtoICMPv6, src[:], dst[:], len(m))))
	return b
}
