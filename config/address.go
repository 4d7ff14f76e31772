package config

import (
	"errors"
	"net/netip"
	"strconv"
	"strings"
)

var (
	errZone   = errors.New("an address with a zone is not supported: take one that is not link-local")
	errPort   = errors.New("want a port from 1 to 65535")
	errListen = errors.New("want ADDRESS:PORT, ADDRESS or :PORT, as in [::]:4789")
	errPeer   = errors.New("want IP or IP:PORT, as in 192.0.2.9 or [2001:db8::9]:4789")
	errHost   = errors.New("want HOST or HOST:PORT, as in 192.0.2.1, node1.example.net:7946 or [2001:db8::1]:7946")
)

// ParseListen parses "[::]:4789", "10.0.0.1:4789", ":4789" (all addresses of
// both families) or "10.0.0.1" (with the given port). An IPv4-mapped address
// becomes IPv4.
func ParseListen(s string, port uint16) (netip.AddrPort, error) {
	if strings.HasPrefix(s, ":") && !strings.HasPrefix(s, "::") {
		p, err := parsePort(s[1:])
		return netip.AddrPortFrom(netip.IPv6Unspecified(), p), err
	}
	ap, err := parseIPPort(s, port)
	if errors.Is(err, errNoIP) {
		return netip.AddrPort{}, errListen
	}
	return ap, err
}

// ParseHostPort splits HOST[:PORT], where HOST is a name or an IP address; an
// IPv6 address with a port stands in brackets. Nothing is resolved.
func ParseHostPort(s string, port uint16) (host string, hostPort uint16, err error) {
	ap, err := parseIPPort(s, port)
	if err == nil {
		if ap.Addr().IsUnspecified() || ap.Addr().IsMulticast() {
			return "", 0, errors.New("want the address of one host")
		}
		return ap.Addr().String(), ap.Port(), nil
	}
	if !errors.Is(err, errNoIP) {
		return "", 0, err
	}
	host, portText, hasPort := strings.Cut(s, ":")
	if !isHostname(host) {
		return "", 0, errHost
	}
	if hasPort {
		if port, err = parsePort(portText); err != nil {
			return "", 0, err
		}
	}
	return host, port, nil
}

// parsePeer parses a foreign VTEP.
func parsePeer(s string, port uint16) (netip.AddrPort, error) {
	ap, err := parseIPPort(s, port)
	if errors.Is(err, errNoIP) {
		return netip.AddrPort{}, errPeer
	}
	return ap, err
}

var errNoIP = errors.New("not an IP address")

// parseIPPort parses IP, IP:PORT, [IPv6] or [IPv6]:PORT; errNoIP says that s
// may still be something else.
func parseIPPort(s string, port uint16) (netip.AddrPort, error) {
	addrText, portText := s, ""
	switch colons := strings.Count(s, ":"); {
	case strings.HasPrefix(s, "["):
		end := strings.IndexByte(s, ']')
		if end < 0 {
			return netip.AddrPort{}, errNoIP
		}
		addrText, portText = s[1:end], s[end+1:]
		if portText != "" && portText[0] != ':' {
			return netip.AddrPort{}, errNoIP
		}
	case colons == 1:
		i := strings.IndexByte(s, ':')
		addrText, portText = s[:i], s[i:]
	}
	a, err := netip.ParseAddr(addrText)
	if err != nil || s[0] == '[' && !a.Is6() {
		return netip.AddrPort{}, errNoIP
	}
	if a.Zone() != "" {
		return netip.AddrPort{}, errZone
	}
	if portText != "" {
		if port, err = parsePort(portText[1:]); err != nil {
			return netip.AddrPort{}, err
		}
	}
	return netip.AddrPortFrom(a.Unmap(), port), nil
}

func parsePort(s string) (uint16, error) {
	p, err := strconv.ParseUint(s, 10, 16)
	if err != nil || p == 0 || s[0] == '+' {
		return 0, errPort
	}
	return uint16(p), nil
}

// isHostname reports whether s can be a DNS name (RFC 1123, section 2.1, and
// underscores, which resolvers take). A name whose last label is a number
// would be an address that was misspelt.
func isHostname(s string) bool {
	s = strings.TrimSuffix(s, ".")
	if len(s) > 253 {
		return false
	}
	var label string
	for label = range strings.SplitSeq(s, ".") {
		if label == "" || len(label) > 63 || label[0] == '-' || label[len(label)-1] == '-' {
			return false
		}
		for _, c := range []byte(label) {
			if !isAlphanumeric(c) && c != '-' && c != '_' {
				return false
			}
		}
	}
	return strings.Trim(label, "0123456789") != ""
}

func isAlphanumeric(c byte) bool {
	return c >= '0' && c <= '9' || c|0x20 >= 'a' && c|0x20 <= 'z'
}

// broadcast returns the last address of p.
func broadcast(p netip.Prefix) netip.Addr {
	b := p.Addr().AsSlice()
	for i := p.Bits(); i < len(b)*8; i++ {
		b[i/8] |= 0x80 >> (i % 8)
	}
	a, _ := netip.AddrFromSlice(b)
	return a
}

// reaches reports whether a socket bound to listen can send to a: [::] takes
// both families, any other address its own.
func reaches(listen, a netip.Addr) bool {
	return listen == netip.IPv6Unspecified() || listen.Is4() == a.Is4()
}
