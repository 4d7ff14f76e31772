package main

import (
	"errors"
	"net/netip"
	"strconv"
	"strings"

	"github.com/tulle-net/tulle/node"
)

var errPublish = errors.New("want [HOSTIP:]HOSTPORT:PORT[/tcp|udp], as in 8080:80, 192.0.2.1:53:53/udp or [2001:db8::1]:8080:80")

// parsePublish reads a value of --publish.
func parsePublish(s string) (p node.Publish, err error) {
	rest, protocol, given := strings.Cut(s, "/")
	p.Protocol = "tcp"
	if given {
		p.Protocol = protocol
	}
	if p.Protocol != "tcp" && p.Protocol != "udp" {
		return p, errPublish
	}
	host, port, ok := cutLast(rest)
	if !ok {
		return p, errPublish
	}
	at, hostPort, ok := cutLast(host)
	if !ok {
		at, hostPort = "", host
	}
	if p.HostPort, err = portNumber(hostPort); err != nil {
		return p, errPublish
	}
	if p.Port, err = portNumber(port); err != nil {
		return p, errPublish
	}
	if !ok {
		return p, nil
	}
	if bare, is := strings.CutPrefix(at, "["); is {
		if at, is = strings.CutSuffix(bare, "]"); !is {
			return p, errPublish
		}
	}
	if p.HostIP, err = netip.ParseAddr(at); err != nil || p.HostIP.Zone() != "" {
		return p, errPublish
	}
	return p, nil
}

// cutLast cuts at the last colon.
func cutLast(s string) (before, after string, ok bool) {
	i := strings.LastIndexByte(s, ':')
	if i < 0 {
		return "", s, false
	}
	return s[:i], s[i+1:], true
}

func portNumber(s string) (uint16, error) {
	n, err := strconv.ParseUint(s, 10, 16)
	if err == nil && n == 0 {
		err = errPublish
	}
	return uint16(n), err
}
