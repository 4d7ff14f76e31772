package doctor

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"

	"golang.org/x/sys/unix"
)

// ports looks whether a port is free in every protocol ("UDP", "TCP"), by
// binding it for a moment; where a node runs, it is that one's.
func ports(ctx context.Context, name string, at netip.AddrPort, running bool, protocols ...string) Check {
	what := strings.Join(protocols, " and ") + " " + at.String()
	if running {
		return ok(name, "%s: the running node's", what)
	}
	for _, protocol := range protocols {
		err := free(ctx, strings.ToLower(protocol), at)
		what := protocol + " " + at.String()
		switch {
		case err == nil:
		case errors.Is(err, unix.EADDRINUSE):
			return failed(name, what+" is held by something else",
				fmt.Sprintf("`ss -ln%sp sport = :%d` shows by what (a kernel's vxlan device shows no program: `ip -d link show type vxlan`); stop it, or give `tulle up --%s` another port",
					strings.ToLower(protocol[:1]), at.Port(), flagOf(name)))
		case errors.Is(err, unix.EADDRNOTAVAIL):
			return failed(name, fmt.Sprintf("this host has no address %s", at.Addr()), fmt.Sprintf("`ip -brief address` lists its; listen on all with `tulle up --%s :%d`", flagOf(name), at.Port()))
		case errors.Is(err, unix.EACCES):
			return failed(name, "no permission to listen on "+what, "run it as root, or take a port from 1024 on with `tulle up --"+flagOf(name)+"`")
		default:
			return failed(name, what+" cannot be opened: "+text(err), "give `tulle up --"+flagOf(name)+"` another address or port")
		}
	}
	return ok(name, "%s: free", what)
}

func flagOf(name string) string {
	if name == "data_port" {
		return "listen"
	}
	return "gossip"
}

// free binds a port and lets go of it. All addresses are two: IPv4's and, where
// there is IPv6, its.
func free(ctx context.Context, protocol string, at netip.AddrPort) error {
	if at.Addr() != netip.IPv6Unspecified() {
		return bind(ctx, protocol, at)
	}
	if err := bind(ctx, protocol+"4", netip.AddrPortFrom(netip.IPv4Unspecified(), at.Port())); err != nil {
		return err
	}
	err := bind(ctx, protocol+"6", at)
	if errors.Is(err, unix.EAFNOSUPPORT) || errors.Is(err, unix.EADDRNOTAVAIL) {
		return nil // IPv6 is off
	}
	return err
}

func bind(ctx context.Context, network string, at netip.AddrPort) error {
	var lc net.ListenConfig
	if strings.HasPrefix(network, "tcp") {
		ln, err := lc.Listen(ctx, network, at.String())
		if err != nil {
			return err
		}
		return ln.Close()
	}
	pc, err := lc.ListenPacket(ctx, network, at.String())
	if err != nil {
		return err
	}
	return pc.Close()
}
