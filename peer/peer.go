// Package peer connects nodes with each other over QUIC (RFC 9000, RFC 9001), on the port that carries the data.
//
//	Deliver → lanes → quic.Transport → connection → stream: one request, one response
//	Request, Ask, Join → dial on demand → stream → Send
//	Sessions → offers, accepts, ready → crypto.Sealer and Opener for the data path
//
// There is at most one connection a pair of nodes, made when somebody asks for it and gone when it was idle for ten minutes.
// Both ends show a certificate (ALPN tulle/1); a node that has none yet joins with a token (ALPN tulle-join/1).
// TLS 1.3 with X25519MLKEM768 and nothing else: no tickets, no 0-RTT, no weaker key exchange.
//
// A request, and its response, are a header, a payload and the end of the stream; integers are big-endian:
//
//	request   version (8) | 0 (8) | kind (16) | milliseconds that the asker waits (32) | id (64) | length (32) | payload
//	response  version (8) | status (8): 0 done, 1 failed | code (16) | length (32) | payload, or the error's text
//
// The id is random, and the same when a request is made again because a connection was lost. It also makes each request
// long enough for a stateless reset in answer (RFC 9000, section 10.3.3), by which a restarted peer is noticed.
//
// The package does not know what is in a payload or who is a member; what a certificate must look like is crypto's.
// It opens no socket: datagrams come in by Deliver and leave by Config.Send.
package peer

import (
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"time"

	"github.com/tulle-net/tulle/crypto"
)

// ALPN protocols (RFC 7301).
const (
	protoNode = "tulle/1"
	protoJoin = "tulle-join/1"
)

// Config of New.
type Config struct {
	// Identity is who this node is, and by its roots whom it believes. It may
	// be nil until the node has joined: see SetIdentity.
	Identity *crypto.Identity
	// Revoked returns the list of those who are believed no longer; nil: none are.
	Revoked func() *crypto.Revocations
	// Send sends one datagram of at most 1,452 bytes, borrowed until it
	// returns; it must not block. It is called from many goroutines. An error
	// is counted and the datagram lost, as datagrams may be; EMSGSIZE in a
	// handshake makes the next ones smaller.
	Send func(to netip.AddrPort, datagram []byte) error
	// Resolve returns the addresses of a node, best first; none: not known.
	Resolve func(name string) []netip.AddrPort
	// Keepers returns the names of the keepers, best first.
	Keepers func() []string
	// Met is told of a keeper that answered where another node was expected; nil:
	// nobody wants to know.
	Met func(Member)
	// Known says whether an address is a member's: a flood from elsewhere does
	// not hold up its handshakes. It is called on the data path; nil: none is.
	Known func(netip.Addr) bool
	// ResetKey makes stateless resets (RFC 9000, section 10.3). It must
	// outlive a restart: by it peers notice at once that this node restarted.
	ResetKey [32]byte
	// TokenKey protects Retry tokens (RFC 9000, section 8.1); it should outlive a restart.
	TokenKey [32]byte
	// Joiner admits nodes, on keepers; nil: this node is none.
	Joiner Joiner
	// Version is this program's, for whoami.
	Version string
	// Now is the time that is believed; default time.Now.
	Now func() time.Time
	// Log takes what an operator should know, rate-limited; default none.
	Log *slog.Logger
	Limits
}

// Limits bound what others can make this node spend. Zero means the default.
type Limits struct {
	// IdleTimeout ends a connection without traffic; default 10 minutes, 5 s to 1 hour.
	IdleTimeout time.Duration
	// HandshakeTimeout is how long a handshake may stand still; twice that it
	// may take in all. Default 4 s, 100 ms to 30 s.
	HandshakeTimeout time.Duration
	// RequestTimeout bounds a request without a deadline of its own, and what
	// a handler may take; default 10 s, up to 5 minutes.
	RequestTimeout time.Duration
	// ReadTimeout is how long a request may take to arrive whole; default 5 s.
	ReadTimeout time.Duration
	// Conns is the most connections; the one unused for longest makes room. Default 4,096.
	Conns int
	// Dials is the most dials under way; default 256.
	Dials int
	// Streams is the most requests at the same time that one peer may make; default 16.
	Streams int
	// Requests is the most requests from all peers served at the same time; default 512.
	Requests int
	// Handshakes is the most handshakes from others under way; beyond it they
	// are refused. Default 512.
	Handshakes int
	// HandshakesPerSource is the same for one IPv4 address or IPv6 /64; default 64.
	HandshakesPerSource int
	// HandshakeRate is the most handshakes from others that are begun in a
	// second, on average; default 200.
	HandshakeRate int
	// RetryAbove is the number of handshakes under way from addresses that
	// have not shown that they receive: beyond it they must, by a Retry.
	// Default 64.
	RetryAbove int
	// InitialRate is the most datagrams a second that belong to no connection
	// and are looked at, on average, for each of: handshakes of strangers, of
	// strangers who answer a Retry, of members; anything else. Default 2,000.
	InitialRate int
	// Joins is the most nodes that join at the same time; default 32.
	Joins int
	// JoinsPerPrefix (IPv4 /24, IPv6 /48) and JoinsTotal are the most failed
	// attempts to join in a burst; one is forgiven every 2 s, or 20 a second in
	// all. Default 64 and 256.
	JoinsPerPrefix, JoinsTotal int
}

func orDefault[T int | time.Duration](v *T, def, least, most T, name string) error {
	if *v == 0 {
		*v = def
	}
	if *v < least || *v > most {
		return fmt.Errorf("peer: %s is %v, want %v to %v", name, *v, least, most)
	}
	return nil
}

// validated returns l with its defaults, or all its faults.
func (l Limits) validated() (Limits, error) {
	err := errors.Join(
		orDefault(&l.IdleTimeout, 10*time.Minute, 5*time.Second, time.Hour, "idle timeout"),
		orDefault(&l.HandshakeTimeout, 4*time.Second, 100*time.Millisecond, 30*time.Second, "handshake timeout"),
		orDefault(&l.RequestTimeout, 10*time.Second, 10*time.Millisecond, 5*time.Minute, "request timeout"),
		orDefault(&l.ReadTimeout, 5*time.Second, 10*time.Millisecond, time.Minute, "read timeout"),
		orDefault(&l.Conns, 4096, 2, 1<<20, "limit of connections"),
		orDefault(&l.Dials, 256, 1, 1<<16, "limit of dials"),
		orDefault(&l.Streams, 16, 1, 1024, "limit of requests a peer"),
		orDefault(&l.Requests, 512, 1, 1<<16, "limit of requests"),
		orDefault(&l.Handshakes, 512, 1, 1<<16, "limit of handshakes"),
		orDefault(&l.HandshakesPerSource, 64, 1, 1<<16, "limit of handshakes a source"),
		orDefault(&l.HandshakeRate, 200, 1, 1<<20, "rate of handshakes"),
		orDefault(&l.RetryAbove, 64, 1, 1<<16, "limit of unverified handshakes"),
		orDefault(&l.InitialRate, 2000, 1, 1<<20, "rate of initial datagrams"),
		orDefault(&l.Joins, 32, 1, 1<<16, "limit of joining nodes"),
		orDefault(&l.JoinsPerPrefix, 64, 1, 1<<16, "limit of failed joins a prefix"),
		orDefault(&l.JoinsTotal, 256, 1, 1<<20, "limit of failed joins"),
	)
	return l, err
}

// validated returns c with its defaults, or all its faults.
func (c Config) validated() (Config, error) {
	var faults []error
	if c.Send == nil {
		faults = append(faults, errors.New("peer: no function to send datagrams with"))
	}
	if c.Resolve == nil {
		c.Resolve = func(string) []netip.AddrPort { return nil }
	}
	if c.Keepers == nil {
		c.Keepers = func() []string { return nil }
	}
	if c.Known == nil {
		c.Known = func(netip.Addr) bool { return false }
	}
	if c.ResetKey == [32]byte{} || c.TokenKey == [32]byte{} {
		faults = append(faults, errors.New("peer: the stateless-reset key and the token key must be given"))
	}
	if c.Revoked == nil {
		c.Revoked = func() *crypto.Revocations { return nil }
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	var err error
	if c.Limits, err = c.Limits.validated(); err != nil {
		faults = append(faults, err)
	}
	return c, errors.Join(faults...)
}
