package node

import (
	"fmt"
	"net/netip"
	"os"
	"slices"

	"github.com/tulle-net/tulle/dns"
	"github.com/tulle-net/tulle/gateway"
	"github.com/tulle-net/tulle/tap"
)

// The functions in this file have a container engine's own resolver ask ours. What it
// does not know it asks of the host's resolvers, from inside the container's namespace;
// there such a question is led to the resolver of the node, which asks the same ones for
// what it does not know.

const (
	hostResolvConf = "/etc/resolv.conf"
	// systemdResolvConf is what Docker reads where the host's asks only systemdStub.
	systemdResolvConf = "/run/systemd/resolve/resolv.conf"
)

var systemdStub = netip.MustParseAddr("127.0.0.53")

// askedByEngine are the resolvers that a container engine asks from inside a namespace
// that it makes now: those of IPv4, but not the host's loopback, which it asks from there.
func askedByEngine() []netip.Addr {
	b, _ := os.ReadFile(hostResolvConf) // none: nobody is asked
	list := dns.Resolvers(b)
	if len(list) == 1 && list[0] == systemdStub {
		b, _ = os.ReadFile(systemdResolvConf)
		list = dns.Resolvers(b)
	}
	return slices.DeleteFunc(list, func(a netip.Addr) bool { return !a.Is4() || a.IsLoopback() || a.IsUnspecified() })
}

// divert has an engine's resolver in a namespace ask that of the node. What it asks is
// as it was when its endpoint came there: the engine keeps to it.
func (s *names) divert(r *resolver, list []*endpoint) {
	if r.listener == nil || s.n.cfg.Rootless {
		return
	}
	var asked []netip.Addr
	for _, e := range list {
		if !e.Sandbox {
			continue
		}
		for _, a := range e.Resolvers {
			if a != s.at.Addr() && !slices.Contains(asked, a) {
				asked = append(asked, a)
			}
		}
	}
	if slices.Equal(asked, r.asked) {
		return
	}
	s.undivert(r)
	if len(asked) == 0 {
		return
	}
	ns, err := tap.NamespaceOf(r.listener.UDP())
	if err == nil {
		defer ns.Close()
		// By the process too: at an upgrade the one before may not have ended.
		r.diverted, err = gateway.Divert(int(ns.Fd()), fmt.Sprintf("%s-dns-%d", s.n.tableName(), os.Getpid()), asked, s.at)
	}
	if err != nil {
		if text := oneLine(err); text != s.undiverted {
			s.undiverted = text
			s.n.log.Warn("Docker's resolver does not ask the node's: give containers --dns "+s.at.Addr().String(), "port", list[0].Name, "err", err)
		}
		return
	}
	r.asked = asked
}

// undivert has an engine's resolver ask whom it would.
func (s *names) undivert(r *resolver) {
	if err := r.diverted.Close(); err != nil {
		s.n.log.Debug("a diversion is left in a namespace", "err", err)
	}
	r.diverted, r.asked = nil, nil
}
