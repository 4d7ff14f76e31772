// Package dns answers for the names of overlays; other names it asks the resolvers of the host for.
//
//	NAME.OVERLAY.tulle.                  A, AAAA   each endpoint of the name, in random order
//	_SERVICE._tcp.NAME.OVERLAY.tulle.    SRV       a port of an endpoint that has a name
//	REVERSED.in-addr.arpa., .ip6.arpa.   PTR       within the subnets of overlays
//
// Who asks sees the overlays of its View: of others there is no name (RFC 8020), not
// by address either. It keeps no cache and is no recursive resolver.
package dns

import (
	"log/slog"
	"net/netip"
	"strings"
	"sync"
	"time"
)

// Domain is what the names of all overlays are below.
const Domain = "tulle"

const (
	zone = Domain + "."
	// ttl of what is known of endpoints, negativeTTL of that there is none, in seconds:
	// an endpoint may move at any time.
	ttl         = 5
	negativeTTL = 1
	// maxAnswers of endpoints of one name; of more, each answer has others.
	maxAnswers = 1000
	// maxChase CNAMEs lead to an answer.
	maxChase = 8
	// udpSize is the longest UDP answer in bytes, whatever the asker takes: no answer
	// leaves this host, so that none is fragmented.
	udpSize = 4096
)

// Endpoint is what has a name in an overlay.
type Endpoint struct {
	Name     string
	IPs      []netip.Addr
	Services []Service
}

// Service is a port that has a name.
type Service struct {
	Name     string
	Port     uint16
	Protocol string // tcp or udp
}

// Source knows the overlays. Its methods are called for each query, concurrently.
type Source interface {
	// Zone returns what is defined of an overlay; nil: there is none of that name.
	Zone(overlay string) *Zone
	// Lookup returns the endpoints of a name, which is in lower case.
	Lookup(overlay, name string) []Endpoint
	// Reverse returns the names of who has an address.
	Reverse(overlay string, ip netip.Addr) []string
	// Within reports whether an address lies in a subnet of an overlay, of whichever.
	Within(ip netip.Addr) bool
}

// View is the overlays that somebody who asks may know of, in order. Case does not
// count in names, so of two overlays that differ in nothing else the first counts.
type View []string

// find returns the overlay of a label in lower case.
func (v View) find(label string) (string, bool) {
	for _, o := range v {
		if strings.EqualFold(o, label) {
			return o, true
		}
	}
	return "", false
}

// Search is the list for resolv.conf of who has this view.
func (v View) Search() []string {
	var list []string
	for _, o := range v {
		list = append(list, strings.ToLower(o)+"."+Domain)
	}
	return append(list, Domain)
}

// Config of a Server.
type Config struct {
	Source Source
	// ResolvConf is the path of the host's resolv.conf; default /etc/resolv.conf.
	ResolvConf string
	// Patience is how long the host's resolvers have to answer, default 5 s; Next after
	// which time the next one is asked as well, default 1.5 s.
	Patience, Next time.Duration
	Log            *slog.Logger
}

// Server answers on any number of listeners.
type Server struct {
	cfg     Config
	forward *forwarder
	Stats   Stats

	mu        sync.Mutex
	listeners map[*Listener]struct{}
	tcp       int // connections
}

// New makes a server that listens nowhere yet.
func New(cfg Config) *Server {
	if cfg.ResolvConf == "" {
		cfg.ResolvConf = "/etc/resolv.conf"
	}
	if cfg.Patience == 0 {
		cfg.Patience = 5 * time.Second
	}
	if cfg.Next == 0 {
		cfg.Next = 1500 * time.Millisecond
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	s := &Server{cfg: cfg, listeners: map[*Listener]struct{}{}}
	s.forward = &forwarder{cfg: cfg, stats: &s.Stats, room: make(chan struct{}, maxForwards), isOwn: s.isOwn}
	return s
}

// isOwn reports whether a resolver of the host is this server.
func (s *Server) isOwn(at netip.AddrPort) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	for l := range s.listeners {
		if l.onHost && l.at == at {
			return true
		}
	}
	return false
}

// Close ends all listeners, and waits for what they do.
func (s *Server) Close() {
	s.mu.Lock()
	var list []*Listener
	for l := range s.listeners {
		list = append(list, l)
	}
	s.mu.Unlock()
	for _, l := range list {
		l.Close()
	}
}
