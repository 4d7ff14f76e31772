package peer

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"sync"
	"time"

	"github.com/quic-go/quic-go"
)

// guard bounds the handshakes that others begin. Nothing is known about them
// yet, not even that the address is theirs.
type guard struct {
	limits *Limits
	stats  *Stats
	begun  rate

	mu                sync.Mutex
	unverified, total int
	// sources counts those that showed that they receive.
	sources map[netip.Prefix]int
}

func newGuard(l *Limits, stats *Stats) *guard {
	g := &guard{limits: l, stats: stats, sources: map[netip.Prefix]int{}}
	g.begun.every = time.Second / time.Duration(l.HandshakeRate)
	g.begun.burst = time.Duration(l.HandshakeRate+l.Handshakes) * g.begun.every
	return g
}

// prefix is an address without what its holder can choose freely.
func prefix(a netip.Addr, v4, v6 int) netip.Prefix {
	a = a.Unmap().WithZone("")
	bits := v6
	if a.Is4() {
		bits = v4
	}
	p, _ := a.Prefix(bits) // fails only for an invalid address, which is one source then
	return p
}

func sourceOf(addr net.Addr) netip.Prefix {
	u, ok := addr.(*net.UDPAddr)
	if !ok {
		return netip.Prefix{}
	}
	return prefix(u.AddrPort().Addr(), 32, 64)
}

// verify says whether a source must first show that it receives (Transport.VerifySourceAddress).
func (g *guard) verify(net.Addr) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.unverified < g.limits.RetryAbove {
		return false
	}
	g.stats.Retries.Add(1)
	return true
}

var errTooMany = errors.New("peer: too many handshakes")

// handshake is one that is under way.
type handshake struct {
	g        *guard
	source   netip.Prefix
	verified bool
	once     sync.Once
}

type handshakeKey struct{}

// begin admits a handshake (Transport.ConnContext).
func (g *guard) begin(ctx context.Context, info *quic.ClientInfo) (context.Context, error) {
	h := &handshake{g: g, source: sourceOf(info.RemoteAddr), verified: info.AddrVerified}
	g.mu.Lock()
	ok := g.total < g.limits.Handshakes && g.sources[h.source] < g.limits.HandshakesPerSource &&
		g.begun.allow(time.Now().UnixNano())
	if ok {
		g.total++
		if h.verified {
			g.sources[h.source]++
		} else {
			// Not on the account of the source: somebody else may claim it.
			g.unverified++
		}
	}
	g.mu.Unlock()
	if !ok {
		g.stats.HandshakesRefused.Add(1)
		return nil, errTooMany
	}
	g.stats.HandshakesBegun.Add(1)
	context.AfterFunc(ctx, func() { h.end(false) })
	return context.WithValue(ctx, handshakeKey{}, h), nil
}

// end frees the handshake's place.
func (h *handshake) end(done bool) {
	h.once.Do(func() {
		if done {
			h.g.stats.HandshakesDone.Add(1)
		} else {
			h.g.stats.HandshakesFailed.Add(1)
		}
		h.g.mu.Lock()
		defer h.g.mu.Unlock()
		h.g.total--
		if !h.verified {
			h.g.unverified--
		} else if h.g.sources[h.source]--; h.g.sources[h.source] == 0 {
			delete(h.g.sources, h.source)
		}
	})
}

// penalties forget failed attempts over time: per prefix and in total.
type penalties struct {
	perPrefix, total   int
	forgive, forgiveIn time.Duration // one of a prefix, one in total

	mu       sync.Mutex
	all      penalty
	prefixes map[netip.Prefix]penalty
}

// penalty is an amount that shrinks by one every so often since at.
type penalty struct {
	amount int
	at     time.Time
}

// maxPrefixes bounds the memory; beyond it, all that is forgiven goes, and if
// there is nothing, new prefixes share one penalty.
const maxPrefixes = 4096

func newPenalties(l *Limits) *penalties {
	return &penalties{
		perPrefix: l.JoinsPerPrefix, total: l.JoinsTotal,
		forgive: 2 * time.Second, forgiveIn: 50 * time.Millisecond,
		prefixes: map[netip.Prefix]penalty{},
	}
}

func (p penalty) after(now time.Time, every time.Duration) penalty {
	if n := int(max(now.Sub(p.at), 0) / every); n < p.amount {
		return penalty{p.amount - n, p.at.Add(time.Duration(n) * every)}
	}
	return penalty{0, now}
}

// charge takes one attempt, or says that there were too many.
func (p *penalties) charge(a netip.Addr, now time.Time) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	key := p.key(a, now)
	mine, all := p.prefixes[key].after(now, p.forgive), p.all.after(now, p.forgiveIn)
	if mine.amount >= p.perPrefix || all.amount >= p.total {
		return false
	}
	mine.amount++
	all.amount++
	p.prefixes[key], p.all = mine, all
	return true
}

// refund gives back what a successful attempt was charged.
func (p *penalties) refund(a netip.Addr) {
	p.mu.Lock()
	defer p.mu.Unlock()
	key := prefix(a, 24, 48)
	if mine, ok := p.prefixes[key]; ok {
		if mine.amount--; mine.amount <= 0 {
			delete(p.prefixes, key)
		} else {
			p.prefixes[key] = mine
		}
	}
	p.all.amount = max(p.all.amount-1, 0)
}

// key makes room for a prefix. Called with mu held.
func (p *penalties) key(a netip.Addr, now time.Time) netip.Prefix {
	key := prefix(a, 24, 48)
	if _, ok := p.prefixes[key]; ok || len(p.prefixes) < maxPrefixes {
		return key
	}
	for k, v := range p.prefixes {
		if v.after(now, p.forgive).amount == 0 {
			delete(p.prefixes, k)
		}
	}
	if len(p.prefixes) < maxPrefixes {
		return key
	}
	return netip.Prefix{}
}
