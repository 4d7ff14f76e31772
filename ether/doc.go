// Package ether handles Ethernet frames as bytes, from header to checksum.
//
// It has MAC addresses, checked views of headers (Ethernet with IEEE 802.1Q
// tags, IPv4 RFC 791, IPv6 RFC 8200, TCP RFC 9293, UDP RFC 768, ARP RFC 826,
// neighbour discovery RFC 4861), the Internet checksum (RFC 1071), a hash of
// the inner flow (RFC 7348, section 5), and it cuts super-frames into segments
// and joins segments to super-frames. For paths that are narrower than a sender
// thinks it lowers the MSS of a SYN (RFC 9293, section 3.7.1) and makes the ICMP
// answer to a packet that is too big (RFC 1191, RFC 4443). For hosts without Ethernet
// it makes the messages of ARP and neighbour discovery, and the ICMP answer to a packet
// for nobody. Of the protocols by which hosts join multicast groups (IGMP RFC 3376, MLD
// RFC 3810, and their older versions) it reads what is told and makes queries; source
// filters are left out.
//
//	      6     6     0, 4 or 8     2
//	+-----+-----+---------------+------+----------+-------------+---------+
//	| Dst | Src | VLAN tags     | Type | IP       | TCP or UDP  | payload |
//	+-----+-----+---------------+------+----------+-------------+---------+
//	                                   ^ L3       ^ L4          ^ Payload ^ End
//
// It does no I/O, keeps no state beyond a caller's batch, reassembles no
// fragments and knows nothing of VXLAN or overlays. Frames are borrowed; views
// share their bytes. It imports the standard library alone, apart from
// golang.org/x/sys/cpu to choose a checksum.
package ether
