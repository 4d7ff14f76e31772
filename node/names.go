package node

import (
	"net"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/tulle-net/tulle/config"
	"github.com/tulle-net/tulle/dns"
	"github.com/tulle-net/tulle/gateway"
	"github.com/tulle-net/tulle/store"
	"github.com/tulle-net/tulle/tap"
)

// The functions in this file have names answered: in each namespace that is on a shared
// overlay, and on the host where its settings say so.

// ownAddressesFor is how long it is believed which addresses this host has.
const ownAddressesFor = 2 * time.Second

// names is what answers for names, and where.
type names struct {
	n      *Node
	server *dns.Server
	at     netip.AddrPort // in each namespace; invalid: nowhere

	zones sync.Map // of shared overlays, by name: definedZone

	paused bool // New's and Run's goroutine's: much changes, and follow comes

	undiverted string // why an engine's resolver is not diverted, as it was last told; New's and Run's goroutine's

	mu     sync.Mutex
	inside map[tap.Namespace]*resolver
	own    []netip.Prefix // this host's addresses, as of asked
	asked  time.Time
}

// resolver is where one namespace asks.
type resolver struct {
	listener *dns.Listener // nil: it cannot be there, because of fault
	view     atomic.Pointer[dns.View]
	fault    string
	// diverted leads what an engine's resolver asks of asked to the listener; New's and
	// Run's goroutine's, as asked.
	diverted *gateway.Diversion
	asked    []netip.Addr
	// files are what its namespaces' names have under /etc/netns.
	files netnsFile
}

// openNames makes the server, and listens on the host if that is asked for.
func (n *Node) openNames() error {
	s := &names{n: n, inside: map[tap.Namespace]*resolver{}}
	if !n.cfg.NoDNS {
		s.at = netip.AddrPortFrom(n.cfg.DNSAddress, config.DNSPort)
	}
	s.server = dns.New(dns.Config{Source: s, Log: n.log})
	n.names = s
	if !n.cfg.DNS.IsValid() {
		return nil
	}
	_, err := s.server.ListenAt(n.cfg.DNS, s.seenByHost)
	return err
}

// close ends all listeners. What is in namespaces stays for the next process: address
// and files.
func (s *names) close() {
	if s == nil {
		return
	}
	s.mu.Lock()
	for _, r := range s.inside {
		s.undivert(r)
	}
	s.mu.Unlock()
	s.server.Close()
}

// pause has follow do nothing until the function that it returns is called, which
// follows.
func (s *names) pause() (resume func()) {
	s.paused = true
	return func() {
		s.paused = false
		s.follow()
	}
}

// follow brings the resolvers in step with the devices that there are. Called by
// New's and Run's goroutine.
func (s *names) follow() {
	if s == nil || s.paused || s.n.restoring {
		return
	}
	s.zones.Range(func(name, z any) bool {
		if s.n.secure.place.SharedOverlay(name.(string)) != z.(definedZone).def {
			s.zones.Delete(name)
		}
		return true
	})
	want := s.wanted()
	s.mu.Lock()
	gone := map[tap.Namespace]*resolver{}
	for ns, r := range s.inside {
		if want[ns] == nil {
			gone[ns] = r
			delete(s.inside, ns)
		}
	}
	s.mu.Unlock()
	for _, r := range gone {
		s.end(r)
	}
	for ns, list := range want {
		s.serve(ns, list, len(gone) > 0)
	}
}

// wanted returns the endpoints of each namespace that is to be answered, in the order
// in which they were attached.
func (s *names) wanted() map[tap.Namespace][]*endpoint {
	want := map[tap.Namespace][]*endpoint{}
	if !s.at.IsValid() || s.n.endpoints == nil {
		return want
	}
	order := map[*endpoint]int{}
	for i, e := range s.n.endpoints.all() {
		order[e] = i + 1
	}
	for _, ov := range s.n.list() {
		for _, d := range ov.list() {
			if d.of != nil && !d.of.host() && !d.of.NoDNS && d.of.placed() {
				want[d.of.Namespace] = append(want[d.of.Namespace], d.of)
			}
		}
	}
	place := func(e *endpoint) int {
		if i := order[e]; i > 0 {
			return i
		}
		return len(order) + 1 // it is being attached
	}
	for _, list := range want {
		slices.SortStableFunc(list, func(a, b *endpoint) int { return place(a) - place(b) })
	}
	return want
}

// serve has the endpoints of a namespace answered there. again: its files may have been
// taken away, with those of an earlier namespace of its name.
func (s *names) serve(ns tap.Namespace, list []*endpoint, again bool) {
	var view dns.View
	for _, e := range list {
		if !slices.Contains(view, e.Overlay) {
			view = append(view, e.Overlay)
		}
	}
	s.mu.Lock()
	r := s.inside[ns]
	if r == nil {
		r = &resolver{}
		s.inside[ns] = r
	}
	s.mu.Unlock()
	if old := r.view.Load(); old == nil || !slices.Equal(*old, view) {
		r.view.Store(&view)
		again = true
	}
	if r.listener == nil {
		s.open(r, ns, list)
		again = true
	}
	s.divert(r, list)
	if r.listener == nil || !again {
		return
	}
	for _, e := range list {
		if err := r.files.write(e.Netns, s.at.Addr(), view.Search()); err != nil {
			s.n.log.Warn("the namespace's programs do not find the resolver by themselves", "port", e.Name, "err", err)
		}
	}
}

// open opens a namespace's resolver.
func (s *names) open(r *resolver, ns tap.Namespace, list []*endpoint) {
	path, there := list[0].find(sync.OnceValue(tap.FindHolders))
	if !there {
		return // its endpoints end in a moment
	}
	udp, tcp, err := tap.ListenInside(path, ns, s.at)
	s.mu.Lock()
	defer s.mu.Unlock()
	if err != nil {
		if text := oneLine(err); text != r.fault {
			r.fault = text
			s.n.log.Warn("names are not answered in a namespace: "+text, "port", list[0].Name)
		}
		return
	}
	r.fault = ""
	r.listener = s.server.Listen(udp, tcp, func(netip.Addr) (dns.View, bool) { return *r.view.Load(), true }, false)
}

// end closes a namespace's resolver, and takes away what it had there.
func (s *names) end(r *resolver) {
	r.files.remove()
	s.undivert(r)
	if r.listener == nil {
		return
	}
	if err := tap.LeaveInside(r.listener.UDP()); err != nil {
		s.n.log.Debug("the resolver's address is left in a namespace", "err", err)
	}
	r.listener.Close()
}

// pins reports whether a resolver keeps a namespace alive.
func (s *names) pins(ns tap.Namespace) bool {
	if s == nil {
		return false
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	r := s.inside[ns]
	return r != nil && r.listener != nil
}

// statusOf returns where an endpoint's namespace asks for names; nil: nowhere.
func (s *names) statusOf(e *endpoint) *EndpointDNS {
	if s == nil || e.host() || e.NoDNS {
		return nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	r := s.inside[e.Namespace]
	if r == nil || r.view.Load() == nil {
		return nil
	}
	return &EndpointDNS{Address: s.at.Addr(), Search: r.view.Load().Search(), Error: r.fault}
}

// seenByHost returns what somebody sees who asks on the host: a program of the host
// the overlays that the host is in; who has an address of one of those, that one.
func (s *names) seenByHost(from netip.Addr) (dns.View, bool) {
	var view, of dns.View
	for _, ov := range s.n.list() {
		if ov.own() == nil {
			continue
		}
		view = append(view, ov.cfg.Name)
		if slices.ContainsFunc(ov.subnets(), func(p netip.Prefix) bool { return p.Contains(from) }) {
			of = append(of, ov.cfg.Name)
		}
	}
	switch {
	case s.isOwn(from):
		return view, true
	case len(of) == 1:
		return of, true
	}
	return nil, false // also where overlays overlap, because nobody can tell whose it is
}

// isOwn reports whether an address is this host's.
func (s *names) isOwn(a netip.Addr) bool {
	if a.IsLoopback() {
		return true
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if time.Since(s.asked) > ownAddressesFor {
		s.asked, s.own = time.Now(), nil
		list, _ := net.InterfaceAddrs() // none: only the loopback is known
		for _, i := range list {
			if p, err := netip.ParsePrefix(i.String()); err == nil {
				s.own = append(s.own, p)
			}
		}
	}
	return slices.ContainsFunc(s.own, func(p netip.Prefix) bool { return p.Addr().Unmap() == a })
}

// definedZone is an overlay's zone, and what it was made of.
type definedZone struct {
	def  *store.Overlay
	zone *dns.Zone
}

// Zone implements dns.Source.
func (s *names) Zone(overlay string) *dns.Zone {
	if s.n.secure != nil {
		if def := s.n.secure.place.SharedOverlay(overlay); def != nil {
			return s.zoneOf(def)
		}
	}
	for _, ov := range s.n.list() {
		if ov.cfg.Name == overlay {
			return dns.NewZone(ov.subnets(), nil)
		}
	}
	return nil
}

// zoneOf returns a shared overlay's zone, which is made once of each definition: a
// change makes another one.
func (s *names) zoneOf(def *store.Overlay) *dns.Zone {
	if z, ok := s.zones.Load(def.Name); ok && z.(definedZone).def == def {
		return z.(definedZone).zone
	}
	var records []dns.Record
	for _, r := range def.Records {
		records = append(records, dns.Record(r))
	}
	z := definedZone{def, dns.NewZone(def.Subnets, records)}
	s.zones.Store(def.Name, z)
	return z.zone
}

// Lookup implements dns.Source. Of an address that several claim it knows one owner.
func (s *names) Lookup(overlay, name string) (list []dns.Endpoint) {
	for _, e := range s.n.tables.dir.ByName(overlay, name) {
		out := dns.Endpoint{Name: e.Name}
		for _, ip := range e.IPs {
			if s.n.tables.dir.Holds(e, ip) {
				out.IPs = append(out.IPs, ip)
			}
		}
		for _, v := range e.Services {
			out.Services = append(out.Services, dns.Service(v))
		}
		list = append(list, out)
	}
	return list
}

// Reverse implements dns.Source.
func (s *names) Reverse(overlay string, ip netip.Addr) []string {
	if e := s.n.tables.dir.ByIP(overlay, ip); e != nil && e.Name != "" {
		return []string{e.Name}
	}
	return nil
}

// Within implements dns.Source.
func (s *names) Within(ip netip.Addr) bool {
	if s.n.secure != nil {
		defs, _ := s.n.secure.place.Shared()
		if slices.ContainsFunc(defs, func(d *store.Overlay) bool { return d.Within(ip).IsValid() }) {
			return true
		}
	}
	return slices.ContainsFunc(s.n.list(), func(ov *overlay) bool {
		return slices.ContainsFunc(ov.subnets(), func(p netip.Prefix) bool { return p.Contains(ip) })
	})
}
