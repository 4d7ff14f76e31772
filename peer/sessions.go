package peer

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/tulle-net/tulle/crypto"
)

const (
	// renewAfter is how old a session that is used gets before the next replaces it.
	renewAfter = 120 * time.Second
	// renewSent is how many datagrams one may have carried by then: half of what it can.
	renewSent = crypto.SessionDatagrams / 2
	// overlap is how long the receiving half of a replaced session is kept.
	overlap = 10 * time.Second
	// A session that carried nothing is forgotten: first by who sends, so that
	// what it still sends finds the receiver's half.
	idleSend    = 180 * time.Second
	idleReceive = 240 * time.Second
	// epochGrace is how long sessions of an overlay's former epoch go on. Who has
	// no key of the new one by then stays behind.
	epochGrace = 30 * time.Second
	// noteEvery is how often the log is told of one peer.
	noteEvery = 10 * time.Second
	// sessionTick is how often sessions are looked at.
	sessionTick = time.Second
	// lostAfter is how long nothing may have been opened under a session before
	// datagrams of an unknown one have it made anew.
	lostAfter = 5 * time.Second
	// maxOld bounds what is kept of one peer's one overlay: a peer may offer as often as it likes.
	maxOld = 16
	// wantedEvery is how often one peer may make this node offer anew.
	wantedEvery = time.Second

	offerRetryMin = 100 * time.Millisecond
	offerRetryMax = 5 * time.Second
	offerTimeout  = 5 * time.Second
)

// OverlayKey is what a node that was granted an overlay has of it.
type OverlayKey struct {
	crypto.Key
	Epoch uint32
	// Ciphers that the overlay's definition and this machine allow.
	Ciphers crypto.Ciphers
}

// SessionTable is where sessions are used: the data path. Its methods may be
// called from many goroutines, but of one peer's overlay one at a time.
type SessionTable interface {
	// Index returns a random index that no session is received under.
	Index() uint32
	// Receive opens what the peer seals under rx, from now on. It fails if the
	// index is taken, or the table does not (or no longer) know that the peer
	// shares the overlay.
	Receive(peer, overlay string, rx *crypto.Opener) error
	// Forget ends Receive.
	Forget(rx *crypto.Opener)
	// Send seals with tx what goes to the peer, first what waits for it. With
	// nil there is no session: frames wait, and Sessions.Want is called.
	Send(peer, overlay string, tx *crypto.Sealer)
	// Leave is Send with nil for a peer that has yet to prove the overlay's key of
	// now: until Receive, it is as if it did not share the overlay.
	Leave(peer, overlay string)
}

// SessionsConfig of NewSessions.
type SessionsConfig struct {
	Endpoint *Endpoint
	Table    SessionTable
	// Key returns the key of an overlay; false: this node does not have it (yet).
	Key func(overlay string) (OverlayKey, bool)
	// Stale is called when a peer has a newer key of an overlay than this node.
	// It must not block.
	Stale func(overlay string)
	// Arrived, if not nil, is told what a peer says of the datagrams that were sent
	// to it lately, while there is traffic. It must not block, nor call Sessions.
	Arrived func(peer string, sent, lost uint64)
	// KeyLog, if not nil, gets a line of crypto.AppendKeyLog for each session: whoever has it can read everything.
	KeyLog func(line []byte)
	// Log takes what an operator should know, rate-limited; default none.
	Log *slog.Logger
}

// Sessions agrees with peers on the sessions under which overlays are sealed: two
// for each overlay that a pair of nodes shares, one a direction.
//
//	smaller name                                 larger name
//	    offers: index, nonce, proof of the key ──▶   check the proof, install the receiving half
//	    check the proof, install both halves  ◀── accepts: index, nonce, proof
//	    ready ──▶                                    install the sending half
//
// The node with the smaller name always offers, so no two agreements cross; the
// other one asks it to. Both keys of a session follow from the overlay's key,
// the exporter of the connection's TLS, and what both ends chose at random, so
// no two sessions have one key. A receiving half is installed before its index
// is told, and nobody sends under a session that the other end has not
// installed: a renewal loses nothing. A session is renewed when it is two
// minutes old and used, and forgotten when it carried nothing for some minutes;
// the next frame makes another.
//
// A peer that cannot prove that it has the overlay's key, or whose certificate
// does not grant the overlay, gets no session.
type Sessions struct {
	cfg   SessionsConfig
	stats SessionStats

	mu       sync.Mutex
	ctx      context.Context // Run's; nil before and after
	partners map[string]*partner
	wg       sync.WaitGroup

	// What the data path tells, under a lock of its own that is held for moments only.
	bellMu sync.Mutex
	bell   chan struct{}
	wants  map[pairName]struct{}
	losts  map[string]struct{}
}

// SessionStats counts agreements; every field only grows.
type SessionStats struct {
	// Agreed: sessions made, renewals too; Failed: offers that came to nothing, of either end.
	Agreed, Failed atomic.Uint64
	// Refused: offers of peers that did not prove the key or are not granted the overlay.
	Refused atomic.Uint64
}

type pairName struct{ peer, overlay string }

// partner is a peer with which overlays are shared.
type partner struct {
	name  string
	pairs map[string]*pair // by overlay

	// install is held while the data path is told, so that it hears of one
	// thing after the other. It is taken before Sessions.mu.
	install sync.Mutex
	working bool
	wake    chan struct{}
	offered time.Time // when it last made this node offer anew

	noted  time.Time // when the log was last told of it
	asking bool      // what arrived
	asked  time.Time
}

// NewSessions answers offers from now on, and makes them once Run runs.
func NewSessions(cfg SessionsConfig) *Sessions {
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.Stale == nil {
		cfg.Stale = func(string) {}
	}
	s := &Sessions{
		cfg: cfg, partners: map[string]*partner{}, bell: make(chan struct{}, 1),
		wants: map[pairName]struct{}{}, losts: map[string]struct{}{},
	}
	cfg.Endpoint.Handle(kindOffer, maxOffersBytes, s.answerOffers)
	cfg.Endpoint.Handle(kindReady, 2+4*maxOffers, s.answerReady)
	cfg.Endpoint.Handle(kindArrived, 2+maxOffers*(1+maxOverlayName), s.answerArrived)
	cfg.Endpoint.Handle(kindWanted, 2+maxOffers*(1+maxOverlayName), s.answerWanted)
	return s
}

// Stats returns the counters.
func (s *Sessions) Stats() *SessionStats { return &s.stats }

// SetPeers says with whom this node shares which sealed overlays: peer →
// overlays. Sessions with others end at once; those that are new are made.
func (s *Sessions) SetPeers(shared map[string][]string) {
	s.mu.Lock()
	var gone []half
	for name, p := range s.partners {
		for overlay, q := range p.pairs {
			if !slices.Contains(shared[name], overlay) {
				gone = append(gone, q.halves()...)
				delete(p.pairs, overlay)
			}
		}
		if len(p.pairs) == 0 {
			delete(s.partners, name)
			ring(p.wake)
		}
	}
	for name, overlays := range shared {
		p := s.partners[name]
		if p == nil && len(overlays) > 0 {
			p = &partner{name: name, pairs: map[string]*pair{}, wake: make(chan struct{}, 1)}
			s.partners[name] = p
		}
		for _, overlay := range overlays {
			if p.pairs[overlay] == nil {
				p.pairs[overlay] = &pair{}
				s.want(p, p.pairs[overlay])
			}
		}
	}
	s.mu.Unlock()
	// The data path has dropped them already, or is about to: it knows the same peers.
	s.end(gone)
}

// end ends receiving halves and wipes both.
func (s *Sessions) end(halves []half) {
	for _, h := range halves {
		if h.rx != nil {
			s.cfg.Table.Forget(h.rx)
			h.rx.Zero()
		}
		if h.tx != nil {
			h.tx.Zero()
		}
	}
}

// Want is for the data path: frames wait for a session. It does not block.
func (s *Sessions) Want(peer, overlay string) {
	s.bellMu.Lock()
	s.wants[pairName{peer, overlay}] = struct{}{}
	s.bellMu.Unlock()
	ring(s.bell)
}

// Lost is for the data path: a datagram of a session that nobody knows came from
// the peer's address: one of the two has restarted. It does not block; call it
// at most once a second for a peer. What is there is not touched: the datagram
// may be anybody's.
func (s *Sessions) Lost(peer string) {
	s.bellMu.Lock()
	s.losts[peer] = struct{}{}
	s.bellMu.Unlock()
	ring(s.bell)
}

// Rekeyed tells that the key of an overlay is there, or is of a newer epoch.
func (s *Sessions) Rekeyed(overlay string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, p := range s.partners {
		if q := p.pairs[overlay]; q != nil {
			q.wanted = false // the pause was for want of this key
			s.want(p, q)
		}
	}
}

// want has a session of q agreed on, and if that is news at once: a pause may be
// under way because another overlay's does not succeed. Called with mu held.
func (s *Sessions) want(p *partner, q *pair) {
	if q.wanted {
		return
	}
	q.wanted = true
	if p.working {
		ring(p.wake)
	}
	s.start(p)
}

func ring(bell chan struct{}) {
	select {
	case bell <- struct{}{}:
	default:
	}
}

// Run makes and renews sessions until ctx ends; then all of them end.
func (s *Sessions) Run(ctx context.Context) {
	s.mu.Lock()
	s.ctx = ctx
	for _, p := range s.partners {
		s.start(p)
	}
	s.mu.Unlock()
	tick := time.NewTicker(sessionTick)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			s.mu.Lock()
			s.ctx = nil
			s.mu.Unlock()
			s.wg.Wait()
			s.SetPeers(nil)
			return
		case <-s.bell:
			s.told()
		case now := <-tick.C:
			s.look(now)
		}
	}
}

// told takes what the data path told.
func (s *Sessions) told() {
	s.bellMu.Lock()
	wants, losts := s.wants, s.losts
	s.wants, s.losts = map[pairName]struct{}{}, map[string]struct{}{}
	s.bellMu.Unlock()
	s.mu.Lock()
	defer s.mu.Unlock()
	for w := range wants {
		if p := s.partners[w.peer]; p != nil && p.pairs[w.overlay] != nil && p.pairs[w.overlay].spent() {
			s.want(p, p.pairs[w.overlay])
		}
	}
	for name := range losts {
		p := s.partners[name]
		if p == nil {
			continue
		}
		for _, q := range p.pairs {
			// Where the peer's datagrams are opened, the one that is not is of
			// another session, or anybody's.
			if q.rx == nil || time.Since(q.receivedAt) > lostAfter {
				s.want(p, q)
			}
		}
	}
}

// look renews and forgets.
func (s *Sessions) look(now time.Time) {
	s.mu.Lock()
	var over []half
	silent := map[pairName]bool{} // and whether the peer has to prove itself anew
	for name, p := range s.partners {
		for overlay, q := range p.pairs {
			q.count(now)
			key, ok := s.cfg.Key(overlay)
			q.wanted = q.wanted || ok && q.tx != nil && q.epoch < key.Epoch
			switch {
			case q.leave(key.Epoch, ok, now):
				silent[pairName{name, overlay}] = true
			case q.tx != nil && now.Sub(q.sentAt) > idleSend:
				silent[pairName{name, overlay}] = false
				q.retire(now.Add(idleReceive - idleSend))
			case q.tx != nil && now.Sub(q.since) > renewAfter && (q.sentAt.After(q.since) || q.receivedAt.After(q.since)),
				q.tx != nil && q.sent > renewSent:
				q.wanted = q.wanted || s.offers(name)
			}
			over = append(over, q.expired(now)...)
		}
		s.start(p)
		s.inquire(p, now)
	}
	s.mu.Unlock()
	for n, leave := range silent {
		s.silence(n, leave)
	}
	s.end(over)
}

// silence tells the data path that there is no session, unless there is one again;
// leave: nor anything that the peer has proven.
func (s *Sessions) silence(n pairName, leave bool) {
	s.mu.Lock()
	p := s.partners[n.peer]
	s.mu.Unlock()
	if p == nil {
		return
	}
	p.install.Lock()
	defer p.install.Unlock()
	s.mu.Lock()
	q := p.pairs[n.overlay]
	none := q != nil && q.tx == nil
	s.mu.Unlock()
	switch {
	case !none:
	case leave:
		s.cfg.Table.Leave(n.peer, n.overlay)
	default:
		s.cfg.Table.Send(n.peer, n.overlay, nil)
	}
}

// offers says whether this node is the one that offers to the peer.
func (s *Sessions) offers(peer string) bool {
	id := s.cfg.Endpoint.identity.Load()
	return id != nil && id.Name() < peer
}

// start has a goroutine do what p wants, if there is none. Called with mu held.
func (s *Sessions) start(p *partner) {
	if s.ctx == nil || p.working || len(p.wanted()) == 0 {
		return
	}
	p.working = true
	ctx := s.ctx
	s.wg.Go(func() { s.work(ctx, p) })
}

// wanted returns the overlays that need an agreement. Called with mu held.
func (p *partner) wanted() []string {
	var list []string
	for overlay, q := range p.pairs {
		if q.wanted {
			list = append(list, overlay)
		}
	}
	slices.Sort(list)
	return list
}

// work agrees until nothing is wanted of p, with pauses where that fails.
func (s *Sessions) work(ctx context.Context, p *partner) {
	wait := offerRetryMin
	for {
		s.mu.Lock()
		want := p.wanted()
		if len(want) == 0 || ctx.Err() != nil {
			p.working = false
			s.mu.Unlock()
			return
		}
		s.mu.Unlock()
		err := s.try(ctx, p, want)
		if err != nil && ctx.Err() == nil {
			s.stats.Failed.Add(1)
			s.cfg.Log.Debug("no session yet", "peer", p.name, "err", err)
		}
		s.mu.Lock()
		left := len(p.wanted())
		s.mu.Unlock()
		if left == 0 {
			continue
		}
		t := time.NewTimer(wait)
		select {
		case <-t.C:
			wait = min(2*wait, offerRetryMax)
		case <-p.wake:
			wait = offerRetryMin
		case <-ctx.Done():
		}
		t.Stop()
	}
}

// try offers the overlays to p, or asks it to offer them.
func (s *Sessions) try(ctx context.Context, p *partner, overlays []string) error {
	ctx, cancel := context.WithTimeout(ctx, offerTimeout)
	defer cancel()
	// Without a key there is nothing to talk about: Rekeyed tells when it is there.
	overlays = slices.DeleteFunc(overlays, func(overlay string) bool { _, ok := s.cfg.Key(overlay); return !ok })
	for _, chunk := range chunks(overlays) {
		if !s.offers(p.name) {
			if _, err := s.cfg.Endpoint.Request(ctx, p.name, kindWanted, appendNames(nil, chunk)); err != nil {
				return err
			}
			continue
		}
		if err := s.offer(ctx, p, chunk); err != nil {
			return err
		}
	}
	return nil
}

// note remembers why an overlay has no session, and tells once. Called with mu held.
func (s *Sessions) note(p *partner, overlay string, q *pair, text string) {
	if q.err != text {
		q.err = text
		now := time.Now()
		if now.Sub(p.noted) < noteEvery { // it may change its mind as often as it likes
			return
		}
		p.noted = now
		s.cfg.Log.Warn("no session", "overlay", overlay, "peer", p.name, "err", text)
	}
}

// SessionTotals count datagrams of one peer's one overlay, over all sessions.
type SessionTotals struct {
	TxDatagrams, RxDatagrams uint64
	Replays, Forgeries       uint64
}

func (t *SessionTotals) add(tx *crypto.Sealer, rx *crypto.Opener) {
	if tx != nil {
		t.TxDatagrams += tx.Sent()
	}
	if rx != nil {
		t.RxDatagrams += rx.Received()
		t.Replays += rx.Replays()
		t.Forgeries += rx.Forgeries()
	}
}

// SessionInfo describes what there is with one peer in one overlay.
type SessionInfo struct {
	Peer, Overlay string
	Cipher        crypto.Cipher // 0: no session now
	Epoch         uint32
	Since         time.Time
	SessionTotals
	// Err says why there is no session, or no newer one; empty is well.
	Err string
}

// List returns all pairs, by peer and overlay.
func (s *Sessions) List() []SessionInfo {
	s.mu.Lock()
	defer s.mu.Unlock()
	var list []SessionInfo
	for name, p := range s.partners {
		for overlay, q := range p.pairs {
			i := SessionInfo{Peer: name, Overlay: overlay, SessionTotals: q.past, Err: q.err}
			for _, h := range q.halves() {
				i.add(h.tx, h.rx)
			}
			if q.tx != nil {
				i.Cipher, i.Epoch, i.Since = q.tx.Cipher(), q.epoch, q.since
			}
			list = append(list, i)
		}
	}
	slices.SortFunc(list, func(a, b SessionInfo) int {
		if a.Peer != b.Peer {
			return compare(a.Peer, b.Peer)
		}
		return compare(a.Overlay, b.Overlay)
	})
	return list
}

func compare(a, b string) int {
	switch {
	case a < b:
		return -1
	case a > b:
		return 1
	}
	return 0
}

var errNoOffer = errors.New("peer: an answer to offers that were not made")

// channel is one connection with a peer: what is proven on it holds nowhere else.
type channel struct{ c *conn }

func (e *Endpoint) channel(ctx context.Context, name string) (channel, error) {
	c, err := e.conn(ctx, name)
	if err != nil {
		return channel{}, fmt.Errorf("peer: node %s: %w", name, timedOut(ctx, err))
	}
	return channel{c}, nil
}

// export is Peer.Export for the end that dialled or was dialled.
func (ch channel) export(label string, n int) ([]byte, error) {
	return Peer{conn: ch.c}.Export(label, nil, n)
}
