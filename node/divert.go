package node

import (
	"errors"
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

const hostResolvConf = "/etc/resolv.conf"

// askedByEngine are the resolvers that a container engine asks from inside a namespace
// that it makes now: those of IPv4. One on the host's loopback it asks from the host's.
func askedByEngine() []netip.Addr {
	b, _ := os.ReadFile(hostResolvConf) // none: nobody is asked
	return slices.DeleteFunc(dns.Resolvers(b), func(a netip.Addr) bool { return !a.Is4() || a.IsLoopback() || a.IsUnspecified() })
}

// divert has an engine's resolver in a namespace ask that of the node. What it asks is
// as it was when its endpoint came there: the engine keeps to it.
func (s *names) divert(r *resolver, list []*endpoint) {
	if r.listener == nil || s.n.cfg.Rootless {
		return
	}
	var asked []netip.Addr
	engine := false
	for _, e := range list {
		engine = engine || e.Sandbox
		for _, a := range e.Resolvers {
			if a != s.at.Addr() && !slices.Contains(asked, a) {
				asked = append(asked, a)
			}
		}
	}
	if engine && len(asked) == 0 {
		s.tellUndiverted(list[0], errors.New("when the container came, the host's resolv.conf had no address that Docker asks from inside it: one of IPv4 that is not loopback"))
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
		s.tellUndiverted(list[0], err)
		return
	}
	r.asked = asked
}

// tellUndiverted tells of a reason once.
func (s *names) tellUndiverted(e *endpoint, err error) {
	if text := oneLine(err); text != s.undiverted {
		s.undiverted = text
		s.n.log.Info("Docker's resolver does not ask the node's for names of overlays: give containers --dns "+s.at.Addr().String(), "port", e.Name, "err", err)
	}
}

// undivert has an engine's resolver ask whom it would.
func (s *names) undivert(r *resolver) {
	if err := r.diverted.Close(); err != nil {
		s.n.log.Debug("a diversion is left in a namespace", "err", err)
	}
	r.diverted, r.asked = nil, nil
}
