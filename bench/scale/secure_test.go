package scale

import (
	"bytes"
	"context"
	"sync"
	"sync/atomic"
	"time"

	"github.com/tulle-net/tulle/crypto"
	"github.com/tulle-net/tulle/discovery"
)

// authority is what the keepers and the connections of a secure cluster would be:
// real identities and passports, and calls in the place of QUIC.
type authority struct {
	ca    *crypto.CA
	roots *crypto.Roots
	delay time.Duration
	seq   atomic.Uint64
	bytes atomic.Uint64 // that went over those calls
	calls atomic.Uint64

	mu    sync.RWMutex
	nodes map[string]*node
}

func newAuthority(delay time.Duration) (*authority, error) {
	ca, err := crypto.NewCA(crypto.NewCluster(), time.Now().Add(-time.Hour))
	if err != nil {
		return nil, err
	}
	roots, err := crypto.NewRoots(ca.DER())
	if err != nil {
		return nil, err
	}
	return &authority{ca: ca, roots: roots, delay: delay, nodes: map[string]*node{}}, nil
}

// member lets a node in.
func (a *authority) member(n *node) (*discovery.Secure, error) {
	key := crypto.NewPrivateKey()
	grants, err := crypto.ParseGrants("*")
	if err != nil {
		return nil, err
	}
	request, err := crypto.NewRequest(key, n.name)
	if err != nil {
		return nil, err
	}
	issued, err := a.ca.Issue(request, crypto.Rights{Overlays: grants}, time.Now())
	if err != nil {
		return nil, err
	}
	id, err := crypto.NewIdentity(key, issued, a.roots, time.Now())
	if err != nil {
		return nil, err
	}
	a.mu.Lock()
	a.nodes[n.name] = n
	a.mu.Unlock()
	var revoked *crypto.Revocations
	return &discovery.Secure{
		Keys: [][]byte{bytes.Repeat([]byte{7}, discovery.KeyBytes)},
		Sign: func(s crypto.Statement) ([]byte, error) {
			s.Sequence = a.seq.Add(1)
			return id.Passport(s)
		},
		Verify: func(p *crypto.Passport) error { return p.Verify(a.roots, time.Now(), revoked) },
		Pull: func(ctx context.Context, from string) ([]byte, func(string) bool, error) {
			b, err := a.call(ctx, from, 16, func(o *node) ([]byte, error) { return o.disc.EncodeList(func(string) bool { return true }) })
			return b, func(string) bool { return true }, err
		},
	}, nil
}

func (a *authority) ask(ctx context.Context, _ *node, name string, request []byte) ([]byte, error) {
	return a.call(ctx, name, len(request), func(o *node) ([]byte, error) {
		return o.dir.Answer(request, func(string) bool { return true })
	})
}

// call takes one round trip, as a stream of a connection that is there does.
func (a *authority) call(ctx context.Context, name string, requestBytes int, f func(*node) ([]byte, error)) ([]byte, error) {
	a.mu.RLock()
	o := a.nodes[name]
	a.mu.RUnlock()
	if o == nil {
		return nil, errUnknown
	}
	b, err := f(o)
	a.calls.Add(1)
	a.bytes.Add(uint64(requestBytes + len(b)))
	t := time.NewTimer(2 * a.delay)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	return b, err
}
