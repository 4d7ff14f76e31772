package discovery

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net"
	"net/netip"
	"slices"
	"sync"
	"time"

	"golang.org/x/time/rate"
)

// Open and secure clusters refuse each other, and say so. Before an open node
// joins another, and after a secure one failed to, it asks there over the
// exchange with wantKind or wantKindSecure. An open node answers with its card,
// as one of the former release does; a secure one answers every request with
//
//	magic (1) | 'S' (1)
const (
	wantKind       = 2 // an open node asks
	wantKindSecure = 3 // a secure one

	secureMark = 'S'
)

// Probe asks the node whose gossip is at addr whether its cluster is secure; one
// of the former release, which had no such, is open. The error says that nobody
// is there, or no tulle.
func Probe(ctx context.Context, addr netip.AddrPort) (secure bool, err error) {
	ctx, cancel := context.WithTimeout(ctx, knockTimeout)
	defer cancel()
	c, err := new(net.Dialer).DialContext(ctx, "tcp", addr.String())
	if err != nil {
		return false, fmt.Errorf("discovery: probe %s: %w", addr, err)
	}
	defer c.Close()
	if secure, err = kindOf(ctx, c, wantKindSecure); err != nil {
		return false, fmt.Errorf("discovery: probe %s: %w", addr, err)
	}
	return secure, nil
}

// kindOf asks what answers at c, until ctx ends, whether its cluster is secure.
func kindOf(ctx context.Context, c net.Conn, want byte) (secure bool, err error) {
	defer context.AfterFunc(ctx, func() { _ = c.Close() })()
	if _, err := c.Write([]byte{exchangeMagic, exchangeVersion, want}); err != nil {
		return false, err
	}
	var b [2]byte
	if _, err := io.ReadFull(c, b[:]); err != nil {
		return false, err
	}
	if b[0] != exchangeMagic {
		return false, errAnswer
	}
	return b[1] == secureMark, nil
}

// serveExchange answers one request, whose magic was read.
func (d *Discovery) serveExchange(c net.Conn) {
	_ = c.SetDeadline(time.Now().Add(exchangeTimeout))
	var req [2]byte
	if _, err := io.ReadFull(c, req[:1]); err != nil {
		return
	}
	// Who asks in another version, of whatever length, learns ours.
	if req[0] == exchangeVersion {
		if _, err := io.ReadFull(c, req[1:]); err != nil {
			return
		}
	}
	secure := d.cfg.Secure != nil
	if req[0] == exchangeVersion && (secure && req[1] != wantKindSecure || !secure && req[1] == wantKindSecure) {
		if a, ok := c.RemoteAddr().(*net.TCPAddr); ok {
			_ = d.seen.note(d.otherKind(a.AddrPort().Addr().Unmap().String()))
		}
	}
	if secure {
		_, _ = c.Write([]byte{exchangeMagic, secureMark})
		return
	}
	if req[1] == wantTables {
		d.serveTables(c)
		return
	}
	d.serveList(c, req[1])
}

// otherKind says that the node there is in a cluster of the other kind.
func (d *Discovery) otherKind(where string) string {
	if d.cfg.Secure == nil {
		return where + " is in a secure cluster, this node's is open: get a token there (tulle token create) and start with --token"
	}
	return where + " is in an open cluster, this node's is secure: get a token here (tulle token create) and start that node with --token"
}

// sightings are sentences about other nodes that should not be as they are,
// kept for conflictFor: whoever is there tries again every few seconds. Bounded,
// and safe for concurrent use.
type sightings struct {
	log  *slog.Logger
	warn *rate.Limiter

	mu   sync.Mutex
	seen map[string]time.Time
}

func newSightings(l *slog.Logger) *sightings {
	return &sightings{log: l, warn: rate.NewLimiter(rate.Every(time.Minute), 3), seen: make(map[string]time.Time)}
}

// note keeps text, and returns it as an error. It logs what is new, at a
// limited rate.
func (s *sightings) note(text string) error {
	s.mu.Lock()
	last, known := s.seen[text]
	if !known && len(s.seen) >= maxConflicts {
		s.expire()
	}
	if known || len(s.seen) < maxConflicts {
		s.seen[text] = time.Now()
	}
	s.mu.Unlock()
	if (!known || time.Since(last) > conflictFor) && s.warn.Allow() {
		s.log.Warn(text)
	}
	return errors.New(text)
}

// all returns those of late.
func (s *sightings) all() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.expire()
	return slices.Sorted(maps.Keys(s.seen))
}

// expire drops the old ones. s.mu is held.
func (s *sightings) expire() {
	maps.DeleteFunc(s.seen, func(_ string, when time.Time) bool { return time.Since(when) > conflictFor })
}
