package bridge

import (
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/tulle-net/tulle/crypto"
)

// What a sealed overlay knows of its peers. A peer is told by its name, which its
// sessions prove, and never by an address: that only says where to send.

// Peer is a member that carries a sealed overlay.
type Peer struct {
	Name string
	// VTEP as the peer advertises it. Its address follows what the peer seals
	// (see TunnelConfig.Moved) until the peer advertises another.
	VTEP netip.AddrPort
}

// second in ticks.
const second = int64(time.Second / tick)

// remote is a peer of sealed overlays, one for all of them.
type remote struct {
	name string
	at   atomic.Pointer[netip.AddrPort] // where to send
	lost atomic.Int64                   // tick of the last call of TunnelConfig.Lost

	// Changed under Tunnel.mu.
	advertised netip.AddrPort
	overlays   int // bridges that have it as a peer

	waiting waiting
	path    path
	search  search
	acks    limiter // of the peer's probes
	moves   limiter // to where it does not advertise to be
}

// session is what is received under one index. It is never changed.
type session struct {
	b    *Bridge
	from *place
	rx   *crypto.Opener
}

// SetPeers says which members carry this overlay, which is sealed. Sessions with
// others end at once, and what they had taught is forgotten. A peer gets BUM
// frames from its first session on: before, it has not proven the overlay's key.
func (b *Bridge) SetPeers(peers []Peer) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.closed {
		return
	}
	keep := make(map[string]bool, len(peers))
	for _, p := range peers {
		keep[p.Name] = true
		r := b.tunnel.remote(p, b)
		if at, ok := b.peers.Load(p.Name); ok && at.peer == r {
			continue
		}
		at := &place{peer: r, path: &r.path, bridge: b, member: true}
		b.peers.Store(p.Name, at)
		b.arrived(whom{name: p.Name}, at)
	}
	b.peers.Range(func(name string, p *place) bool {
		if !keep[name] {
			b.dropPeer(name, p)
		}
		return true
	})
	b.setFlood()
}

// dropPeer ends what there is with a peer. b.mu is held.
func (b *Bridge) dropPeer(name string, p *place) {
	b.peers.Delete(name)
	p.gone.Store(true)
	p.tx.Store(nil)
	b.fdb.forget(p)
	b.departed(whom{name: name})
	b.tunnel.sessions.Range(func(index uint32, s *session) bool {
		if s.from == p {
			b.tunnel.sessions.Delete(index)
		}
		return true
	})
	p.peer.waiting.drop(p)
	b.tunnel.release(p.peer)
}

// remote returns the peer p, now also of b.
func (t *Tunnel) remote(p Peer, b *Bridge) *remote {
	t.mu.Lock()
	defer t.mu.Unlock()
	r := t.peers[p.Name]
	if r == nil {
		r = &remote{name: p.Name}
		r.lost.Store(-second)
		t.peers[p.Name] = r
	}
	if _, ok := b.peers.Load(p.Name); !ok {
		r.overlays++
	}
	if r.advertised != p.VTEP {
		r.advertised = p.VTEP
		t.place(r, p.VTEP)
	}
	return r
}

// release is called when a bridge no longer has r as a peer.
func (t *Tunnel) release(r *remote) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if r.overlays--; r.overlays == 0 {
		delete(t.peers, r.name)
		t.place(r, netip.AddrPort{})
	}
}

// place says where r is; an invalid address: nowhere. t.mu is held.
func (t *Tunnel) place(r *remote, at netip.AddrPort) {
	next := maps.Clone(*t.byAddr.Load())
	old := r.at.Load()
	if old != nil && next[old.Addr()] == r {
		delete(next, old.Addr())
	}
	if at.IsValid() {
		r.at.Store(&at)
		// What r seals moves r only: an address that another advertises stays the other's.
		if o := next[at.Addr()]; o == nil || at.Addr() == r.advertised.Addr() || at.Addr() != o.advertised.Addr() {
			next[at.Addr()] = r
		}
	}
	t.byAddr.Store(&next)
	if old != nil && at.IsValid() && old.Addr() != at.Addr() && r.startOver(at.Addr()) {
		t.pathChanged()
	}
}

// moved takes it that r is at another address: a datagram that it sealed, the
// newest so far, came from there. Its UDP port stays the advertised one. A peer
// that is somewhere else with each datagram is not followed each time; back to
// where it advertises to be it always is.
func (t *Tunnel) moved(r *remote, to netip.Addr, now int64) {
	t.mu.Lock()
	at := netip.AddrPortFrom(to, r.advertised.Port())
	if r.overlays == 0 || *r.at.Load() == at || at != r.advertised && !r.moves.take(now) {
		t.mu.Unlock()
		return
	}
	t.place(r, at)
	t.mu.Unlock()
	if t.cfg.Moved != nil {
		t.cfg.Moved(r.name, at)
	}
}

// unknown counts a datagram of a session that does not exist. If it comes from a
// peer's address, one of the two has restarted, or somebody wants it to look so:
// whoever agrees on sessions is told, at most once a second for a peer.
func (t *Tunnel) unknown(src netip.Addr, now int64) {
	t.drops.add(DropUnknownSession)
	r := (*t.byAddr.Load())[src]
	if r == nil || t.cfg.Lost == nil {
		return
	}
	if last := r.lost.Load(); now-last >= second && r.lost.CompareAndSwap(last, now) {
		t.cfg.Lost(r.name)
	}
}

var errNoPeer = errors.New("bridge: the overlay is not here, or not shared with this peer")

// peer returns the place of a peer in a sealed overlay.
func (t *Tunnel) peer(name, overlay string) (*Bridge, *place) {
	b := t.named(overlay)
	if b == nil {
		return nil, nil
	}
	p, _ := b.peers.Load(name)
	return b, p
}

// Index returns a random index that no session is received under.
func (t *Tunnel) Index() uint32 {
	for {
		i := rand.Uint32()
		if _, taken := t.sessions.Load(i); !taken {
			return i
		}
	}
}

// Receive takes what the peer seals for the overlay under rx, from now on. Errors:
// the peer does not share the overlay (SetPeers), or the index is taken.
func (t *Tunnel) Receive(peer, overlay string, rx *crypto.Opener) error {
	b, p := t.peer(peer, overlay)
	if p == nil {
		return errNoPeer
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if p.gone.Load() {
		return errNoPeer
	}
	if _, taken := t.sessions.LoadOrStore(rx.Index(), &session{b, p, rx}); taken {
		return fmt.Errorf("bridge: session index %08x is taken", rx.Index())
	}
	if !p.proved {
		p.proved = true
		b.setFlood()
	}
	return nil
}

// Forget ends Receive.
func (t *Tunnel) Forget(rx *crypto.Opener) {
	if s, ok := t.sessions.Load(rx.Index()); ok && s.rx == rx {
		t.sessions.Delete(rx.Index())
	}
}

// Send seals with tx, from now on, what goes to the peer in the overlay; first
// the frames that wait for it. With nil there is no session: frames wait, and
// TunnelConfig.Want is called.
func (t *Tunnel) Send(peer, overlay string, tx *crypto.Sealer) {
	_, p := t.peer(peer, overlay)
	switch {
	case p == nil:
	case tx == nil:
		p.tx.Store(nil)
	default:
		p.peer.waiting.flush(t, p, tx)
	}
}

// Leave takes it that the peer has to prove the overlay's key anew: it has no
// session, and gets no BUM frames and has none waiting until Receive.
func (t *Tunnel) Leave(peer, overlay string) {
	b, p := t.peer(peer, overlay)
	if p == nil {
		return
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	p.tx.Store(nil)
	p.proved = false
	b.setFlood()
	p.peer.waiting.drop(p)
}

// Sessions returns how many sessions are received under.
func (t *Tunnel) Sessions() int { return t.sessions.Size() }

// EachPeer calls f with each peer of the sealed overlay, how many datagrams of
// plaintext came from its address, and how many frames wait for a session.
func (b *Bridge) EachPeer(f func(peer string, plaintextRefused uint64, waiting int)) {
	b.peers.Range(func(name string, p *place) bool {
		f(name, p.plaintext.Load(), p.peer.waiting.count(p))
		return true
	})
}

// waiting holds frames for a peer with which there is no session yet, in the
// order in which they came.
type waiting struct {
	mu     sync.Mutex
	frames []heldFrame
	bytes  int
}
