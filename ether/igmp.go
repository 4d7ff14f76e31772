package ether

import (
	"encoding/binary"
	"net/netip"
	"time"
)

// Types of IGMP messages (RFC 3376, section 4; RFC 2236, section 2).
const (
	igmpQuery    = 0x11
	igmpReportV1 = 0x12
	igmpReportV2 = 0x16
	igmpLeave    = 0x17
	igmpReportV3 = 0x22

	igmpLen        = 8
	igmpQueryV3Len = 12
	protoIGMP      = 2
)

// Types of group records, the same in IGMPv3 and MLDv2 (RFC 3376, section 4.2.12).
const (
	recordIsInclude = 1 + iota
	recordIsExclude
	recordToInclude
	recordToExclude
	recordAllow
	recordBlock
)

// Robustness is the number of times that what may be lost is sent (RFC 3376, section 8.1).
const Robustness = 2

// IGMP is a message of IGMPv1, v2 or v3 (RFC 1112, RFC 2236, RFC 3376). It is had from
// ParseIGMP; its bytes are shared.
type IGMP []byte

// ParseIGMP returns the message that p carries, if its checksum is right and all of
// its records are there. The error is ErrShort or ErrMalformed, the latter also for a
// packet that is something else, a fragment, or a type that is no query, report nor leave.
func ParseIGMP(p IPv4) (IGMP, error) {
	if p.Proto() != protoIGMP || p.IsFragment() {
		return nil, ErrMalformed
	}
	m := IGMP(p.Payload())
	if len(m) < igmpLen {
		return nil, ErrShort
	}
	if Sum(m, 0) != 0xffff {
		return nil, ErrMalformed
	}
	switch m[0] {
	case igmpQuery, igmpReportV1, igmpReportV2, igmpLeave:
		return m, nil
	case igmpReportV3:
		if !recordsFit(m, 4) {
			return nil, ErrShort
		}
		return m, nil
	}
	return nil, ErrMalformed
}

// IsQuery reports whether m asks who has joined what; all else tells.
func (m IGMP) IsQuery() bool { return m[0] == igmpQuery }

// Group returns the group that a query asks for; 0.0.0.0: for all.
func (m IGMP) Group() netip.Addr { return netip.AddrFrom4([4]byte(m[4:8])) }

// Each calls f with each group that a report or leave tells of: joined, or left by at
// least one of its members. Source filters are not told: a member of any source of a
// group is one of the group, and one that gives up some of the sources may have left.
func (m IGMP) Each(f func(group netip.Addr, joined bool)) {
	switch m[0] {
	case igmpReportV1, igmpReportV2:
		f(m.Group(), true)
	case igmpLeave:
		f(m.Group(), false)
	case igmpReportV3:
		eachRecord(m, 4, f)
	}
}

// recordsFit reports whether an IGMPv3 or MLDv2 report, with addresses of addrLen
// bytes, has all of the records that it says.
func recordsFit(m []byte, addrLen int) bool {
	n := int(binary.BigEndian.Uint16(m[6:8]))
	for rest := m[8:]; n > 0; n-- {
		if len(rest) < 4+addrLen {
			return false
		}
		l := recordLen(rest, addrLen)
		if l > len(rest) {
			return false
		}
		rest = rest[l:]
	}
	return true
}

// recordLen is the length of a record with its sources and auxiliary data.
func recordLen(r []byte, addrLen int) int {
	return 4 + addrLen + int(binary.BigEndian.Uint16(r[2:4]))*addrLen + int(r[1])*4
}

// eachRecord calls f with each record of a report that recordsFit has looked at.
func eachRecord(m []byte, addrLen int, f func(group netip.Addr, joined bool)) {
	n := int(binary.BigEndian.Uint16(m[6:8]))
	for rest := m[8:]; n > 0; n-- {
		group, _ := netip.AddrFromSlice(rest[4 : 4+addrLen])
		sources := binary.BigEndian.Uint16(rest[2:4]) > 0
		switch kind := rest[0]; {
		case kind == recordIsExclude, kind == recordToExclude:
			f(group, true)
		case sources && (kind == recordIsInclude || kind == recordToInclude || kind == recordAllow):
			f(group, true)
		case kind == recordToInclude, kind == recordBlock:
			f(group, false)
		}
		rest = rest[recordLen(rest, addrLen):]
	}
}

// AppendIGMPQuery appends to b the frame of an IGMPv3 query (RFC 3376, section 4.1),
// which older hosts take for one of their own version, from the station mac without an
// address, as a switch asks that is no router (RFC 4541, section 2.1.1). An invalid
// group asks for all. within is how long hosts may take to answer, 0.1 s to 3,174 s;
// every is how often all are asked.
func AppendIGMPQuery(b []byte, mac MAC, group netip.Addr, within, every time.Duration) []byte {
	to := group
	if !group.IsValid() {
		to, group = netip.AddrFrom4([4]byte{224, 0, 0, 1}), netip.IPv4Unspecified()
	}
	b = appendEthernet(b, MulticastMAC(to), mac, EtherTypeIPv4)
	at := len(b)
	dst, g := to.As4(), group.As4()
	const header = ipv4Len + 4 // with the router alert option (RFC 2113)
	b = append(b, 0x40|header/4, 0xc0, 0, header+igmpQueryV3Len, 0, 0, 0, 0, 1, protoIGMP, 0, 0, 0, 0, 0, 0)
	b = append(b, dst[:]...)
	b = append(b, 0x94, 4, 0, 0)
	IPv4(b[at:]).SetChecksum()
	igmp := len(b)
	b = append(b, igmpQuery, byte(floatCode(within/(100*time.Millisecond), 4)), 0, 0)
	b = append(b, g[:]...)
	b = append(b, Robustness, byte(floatCode(every/time.Second, 4)), 0, 0)
	binary.BigEndian.PutUint16(b[igmp+2:], ^Sum(b[igmp:], 0))
	return b
}

// floatCode is n as it is, or, from 1<<(mantissa+3) on, with an exponent of three bits
// and a mantissa of that many behind a one (RFC 3376, section 4.1.1; RFC 3810, section
// 5.1.3); rounded down, and at least 1.
func floatCode[T ~int64](n T, mantissa int) uint16 {
	top := T(1) << (mantissa + 3)
	if n < top {
		return uint16(max(n, 1))
	}
	exp := 0
	for n>>(exp+3) >= 2<<mantissa && exp < 7 {
		exp++
	}
	m := min(n>>(exp+3), 2<<mantissa-1) // with its leading one
	return uint16(top) | uint16(exp)<<mantissa | uint16(m)&(1<<mantissa-1)
}
