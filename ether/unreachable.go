package ether

// MaxUnreachable is the most bytes that Unreachable appends.
const MaxUnreachable = minIPv6MTU

// Unreachable appends to dst the packet that tells the sender of packet that there
// is nobody who has its destination: ICMP host unreachable (RFC 792) or ICMPv6
// address unreachable (RFC 4443, section 3.1). Its source is that destination, as of
// TooBig, and what it does not answer is what TooBig does not, packets that may be
// fragmented apart. packet is borrowed and does not overlap dst. How often one
// sender is told is for the caller to limit.
func Unreachable(dst, packet []byte) ([]byte, bool) {
	if p, err := ParseIPv4(packet); err == nil {
		if !answerable4(p) {
			return dst, false
		}
		return appendUnreachable4(dst, p, icmpHostUnreachable, 0), true
	}
	p, err := ParseIPv6(packet)
	if err != nil || !answerable6(p) {
		return dst, false
	}
	return appendError6(dst, p, icmp6Unreachable, icmp6AddressUnreachable, 0), true
}
