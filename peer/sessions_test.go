package peer

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/tulle-net/tulle/crypto"
	"github.com/tulle-net/tulle/peer/peertest"
)

// sealedNode is a node with its sessions and the data path that uses them.
type sealedNode struct {
	t        *testing.T
	name     string
	e        *Endpoint
	s        *Sessions
	stop     func()
	mu       sync.Mutex
	keys     map[string]OverlayKey
	receives map[uint32]*crypto.Opener
	sends    map[pairName]*crypto.Sealer
	unknown  bool   // the data path knows no peer
	silent   func() // called with Send(nil)
	stale    atomic.Int32
	left     atomic.Int32
	sent     atomic.Uint64 // as the peer told
	lost     atomic.Uint64
	log      bytes.Buffer
}

func (n *sealedNode) Index() uint32 { return rand.Uint32() }

func (n *sealedNode) Receive(_, _ string, rx *crypto.Opener) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.receives[rx.Index()] != nil || n.unknown {
		return errors.New("taken, or unknown")
	}
	n.receives[rx.Index()] = rx
	return nil
}

func (n *sealedNode) Forget(rx *crypto.Opener) {
	n.mu.Lock()
	defer n.mu.Unlock()
	delete(n.receives, rx.Index())
}

func (n *sealedNode) Send(peer, overlay string, tx *crypto.Sealer) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if tx == nil && n.silent != nil {
		n.silent()
	}
	n.sends[pairName{peer, overlay}] = tx
}

func (n *sealedNode) Leave(peer, overlay string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	delete(n.sends, pairName{peer, overlay})
	n.left.Add(1)
}

func (n *sealedNode) tx(peer string) *crypto.Sealer {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.sends[pairName{peer, "blue"}]
}

func (n *sealedNode) open(d []byte) error {
	index, ok := crypto.ParseSealed(d)
	n.mu.Lock()
	rx := n.receives[index]
	n.mu.Unlock()
	if !ok || rx == nil {
		return errUnknownSession
	}
	_, _, _, err := rx.Open(new(crypto.Scratch), d)
	return err
}

var errUnknownSession = errors.New("unknown session")

// seal is a datagram to the peer, nil without a session.
func (n *sealedNode) seal(peer string) []byte {
	tx := n.tx(peer)
	if tx == nil {
		return nil
	}
	counter, ok := tx.Reserve(1)
	if !ok {
		return nil
	}
	d := make([]byte, 100)
	return d[:tx.Seal(new(crypto.Scratch), d, counter, 0, []byte("frame"))]
}

func (n *sealedNode) setKey(overlay string, k OverlayKey) {
	n.mu.Lock()
	n.keys[overlay] = k
	n.mu.Unlock()
	n.s.Rekeyed(overlay)
}

var blueKey = crypto.NewKey()

func blue(epoch uint32) OverlayKey {
	ciphers, _ := crypto.OfferCiphers(crypto.ChaCha20Poly1305.String())
	return OverlayKey{Key: crypto.OverlayKey(blueKey, "blue", epoch), Epoch: epoch, Ciphers: ciphers}
}

// sealed makes a node that has epoch 1 of blue's key.
func (c *cluster) sealed(t *testing.T, name string, r crypto.Rights) *sealedNode {
	t.Helper()
	return c.sealedAs(t, name, c.identity(name, r, time.Now()))
}

func (c *cluster) sealedAs(t *testing.T, name string, id *crypto.Identity) *sealedNode {
	n := &sealedNode{t: t, name: name, keys: map[string]OverlayKey{"blue": blue(1)}, receives: map[uint32]*crypto.Opener{}, sends: map[pairName]*crypto.Sealer{}}
	n.e = c.nodeAs(name, id)
	n.s = NewSessions(SessionsConfig{
		Endpoint: n.e, Table: n,
		Key: func(overlay string) (OverlayKey, bool) {
			n.mu.Lock()
			defer n.mu.Unlock()
			k, ok := n.keys[overlay]
			return k, ok
		},
		Stale:   func(string) { n.stale.Add(1) },
		Arrived: func(_ string, sent, lost uint64) { n.sent.Add(sent); n.lost.Add(lost) },
		KeyLog: func(line []byte) {
			n.mu.Lock()
			defer n.mu.Unlock()
			n.log.Write(line)
		},
	})
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { n.s.Run(ctx); close(done) }()
	n.stop = sync.OnceFunc(func() { cancel(); <-done })
	t.Cleanup(n.stop)
	return n
}

var all = crypto.Rights{Overlays: crypto.Grants{"*"}}

// meet makes two nodes share blue.
func meet(a, b *sealedNode) {
	a.s.SetPeers(map[string][]string{b.name: {"blue"}})
	b.s.SetPeers(map[string][]string{a.name: {"blue"}})
}

func (a *sealedNode) reaches(b *sealedNode) bool {
	d := a.seal(b.name)
	return d != nil && b.open(d) == nil
}

// talking returns n1 and n2, with a session of blue in both directions.
func talking(t *testing.T) (c *cluster, a, b *sealedNode) {
	c = newCluster(t, peertest.NewNet(1))
	a, b = c.sealed(t, "n1", all), c.sealed(t, "n2", all)
	meet(a, b)
	eventually(t, "both send", func() bool { return a.reaches(b) && b.reaches(a) })
	return c, a, b
}

func TestSessionsAgree(t *testing.T) {
	_, a, b := talking(t)
	for _, n := range []*sealedNode{a, b} {
		l := n.s.List()
		if len(l) != 1 || l[0].Overlay != "blue" || l[0].Cipher != crypto.ChaCha20Poly1305 || l[0].Epoch != 1 || l[0].Err != "" ||
			l[0].TxDatagrams == 0 || l[0].RxDatagrams == 0 || l[0].Since.IsZero() {
			t.Errorf("%s: List = %+v", n.name, l)
		}
		n.mu.Lock()
		if lines := strings.Count(n.log.String(), "TULLE_SESSION "); lines != 2 || len(n.receives) != 1 {
			t.Errorf("%s: %d lines in the key log, %d sessions received, want 2 and 1", n.name, lines, len(n.receives))
		}
		n.mu.Unlock()
	}
	if a.log.String() == "" || sortedLines(a.log.String()) != sortedLines(b.log.String()) {
		t.Error("the key logs of both ends differ")
	}
	// No longer shared: it ends at once, on both sides by itself.
	d := b.seal("n1")
	a.s.SetPeers(nil)
	if err := a.open(d); !errors.Is(err, errUnknownSession) {
		t.Errorf("after SetPeers(nil): %v, want an unknown session", err)
	}
}

func sortedLines(s string) string {
	l := strings.Split(strings.TrimSpace(s), "\n")
	if len(l) == 2 && l[0] > l[1] {
		l[0], l[1] = l[1], l[0]
	}
	return strings.Join(l, "\n")
}

// Who has another key, no grant or no common cipher gets no session, and is told why.
func TestSessionsRefused(t *testing.T) {
	aes := OverlayKey{Key: blue(1).Key, Epoch: 1, Ciphers: 2}
	other := OverlayKey{Key: crypto.OverlayKey(crypto.NewKey(), "blue", 1), Epoch: 1, Ciphers: blue(1).Ciphers}
	for name, x := range map[string]struct {
		rights crypto.Rights
		key    OverlayKey
		want   string
	}{
		"another key": {all, other, "refuses"},
		"no grant":    {crypto.Rights{Overlays: crypto.Grants{"red"}}, blue(1), "refuses"},
		"no cipher":   {all, aes, "cipher"},
	} {
		for _, small := range []bool{true, false} {
			t.Run(name, func(t *testing.T) {
				c := newCluster(t, peertest.NewNet(1))
				names := [2]string{"n1", "n2"}
				if !small {
					names = [2]string{"n2", "n1"}
				}
				good, bad := c.sealed(t, names[0], all), c.sealed(t, names[1], x.rights)
				bad.setKey("blue", x.key)
				meet(good, bad)
				eventually(t, "it is refused", func() bool {
					refused := good.s.Stats().Refused.Load() + bad.s.Stats().Refused.Load()
					l := append(good.s.List(), bad.s.List()...)
					return refused > 0 && len(l) == 2 && strings.Contains(l[0].Err+l[1].Err, x.want)
				})
				if good.tx(bad.name) != nil {
					t.Error("there is a session to send under")
				}
			})
		}
	}
}

// A renewal loses nothing, whatever the network does to it.
func TestSessionsRenew(t *testing.T) {
	n := peertest.NewNet(5)
	c := newCluster(t, n)
	a, b := c.sealed(t, "n1", all), c.sealed(t, "n2", all)
	meet(a, b)
	eventually(t, "both send", func() bool { return a.reaches(b) && b.reaches(a) })
	n.SetFaults(0.2, 0, 0.3)
	stop := make(chan struct{})
	var lost, passed atomic.Int32
	var wg sync.WaitGroup
	for _, way := range [][2]*sealedNode{{a, b}, {b, a}} {
		wg.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				if way[0].reaches(way[1]) {
					passed.Add(1)
				} else {
					lost.Add(1)
				}
				time.Sleep(50 * time.Microsecond)
			}
		})
	}
	for range 5 { // both ends look, and find that it is time
		was := a.s.Stats().Agreed.Load()
		eventually(t, "a renewal", func() bool {
			then := time.Now().Add(renewAfter + time.Second)
			a.s.look(then) // renews only what was used
			b.s.look(then)
			return a.s.Stats().Agreed.Load() > was
		})
	}
	close(stop)
	wg.Wait()
	if lost.Load() != 0 || passed.Load() < 100 {
		t.Errorf("%d of %d datagrams were lost", lost.Load(), lost.Load()+passed.Load())
	}
	if n.Lost.Load() == 0 {
		t.Error("the network lost nothing")
	}
	// What was replaced is kept for a while and then forgotten.
	n.SetFaults(0, 0, 0)
	eventually(t, "nothing is wanted", func() bool {
		a.s.mu.Lock()
		defer a.s.mu.Unlock()
		return len(a.s.partners["n2"].wanted()) == 0 && !a.s.partners["n2"].working
	})
	a.s.look(time.Now().Add(overlap + time.Second))
	b.s.look(time.Now().Add(overlap + time.Second))
	for _, n := range []*sealedNode{a, b} {
		n.mu.Lock()
		if len(n.receives) > 2 { // the last, and one whose ready was lost
			t.Errorf("%s receives under %d sessions", n.name, len(n.receives))
		}
		n.mu.Unlock()
	}
	if !a.reaches(b) || !b.reaches(a) {
		t.Error("after the overlap nothing passes")
	}
}

// A session that carries nothing is forgotten, the sending half first, and made again on demand, by either end.
func TestSessionsIdle(t *testing.T) {
	_, a, b := talking(t)
	for _, n := range []*sealedNode{a, b} {
		n.s.look(time.Now())
		n.s.look(time.Now().Add(idleSend + time.Second))
	}
	if a.tx("n2") != nil || b.tx("n1") != nil {
		t.Fatal("an idle session is still sent under")
	}
	a.mu.Lock()
	if len(a.receives) == 0 {
		t.Error("the receiving half went with the sending one")
	}
	a.mu.Unlock()
	a.s.look(time.Now().Add(idleSend + idleReceive + 2*time.Second))
	a.mu.Lock()
	if len(a.receives) != 0 {
		t.Error("the receiving half stays for ever")
	}
	a.mu.Unlock()
	b.s.Want("n1", "blue") // the larger name: it asks the other
	eventually(t, "a session again", func() bool { return b.reaches(a) && a.reaches(b) })
}

// A node that restarted is back, whichever of the two it is, also if only the datagrams of the other tell of it.
func TestSessionsRestart(t *testing.T) {
	for _, name := range []string{"n1", "n2"} {
		t.Run(name, func(t *testing.T) {
			c := newCluster(t, peertest.NewNet(1))
			id := c.identity(name, all, time.Now())
			other := map[string]string{"n1": "n2", "n2": "n1"}[name]
			a, b := c.sealedAs(t, name, id), c.sealed(t, other, all)
			meet(a, b)
			eventually(t, "both send", func() bool { return a.reaches(b) && b.reaches(a) })
			// Both dialled; the session may stand before the second handshake is
			// confirmed, and a peer that dies before that is known to be gone only
			// after probeTimeout.
			eventually(t, "all handshakes are done", func() bool {
				x, y := &a.e.stats, &b.e.stats
				return x.HandshakesDone.Load() == y.Dials.Load() && y.Conns.Load() == y.Dials.Load()+x.Dials.Load()
			})
			if _, err := b.e.Whoami(within(t, 5*time.Second), name); err != nil {
				t.Fatal(err)
			}
			a.stop()
			c.kill(name, a.e)
			a = c.sealedAs(t, name, id)
			if d := b.seal(name); a.open(d) == nil {
				t.Fatal("a new node opens what was sealed for the old one")
			}
			a.s.SetPeers(map[string][]string{other: {"blue"}})
			a.s.Lost(other)
			start := time.Now()
			eventually(t, "both send again", func() bool { return a.reaches(b) && b.reaches(a) })
			if took := time.Since(start); took > 2*time.Second {
				t.Errorf("it took %v", took)
			}
		})
	}
}

// A new epoch moves all sessions; who has no key of it stays behind.
func TestSessionsEpoch(t *testing.T) {
	_, a, b := talking(t)
	b.setKey("blue", blue(2))
	eventually(t, "the other learns of it", func() bool { return a.stale.Load() > 0 })
	if !a.reaches(b) || !b.reaches(a) {
		t.Error("meanwhile nothing passes")
	}
	b.s.look(time.Now())
	b.s.look(time.Now().Add(epochGrace + time.Second))
	if d := a.seal("n2"); b.tx("n1") != nil || b.open(d) == nil {
		t.Error("a session of the former epoch goes on for ever")
	}
	if b.left.Load() == 0 {
		t.Error("who stays behind counts as one who has proven the key")
	}
	a.setKey("blue", blue(2))
	eventually(t, "both send", func() bool { return a.reaches(b) && b.reaches(a) })
	if l := a.s.List(); len(l) != 1 || l[0].Epoch != 2 {
		t.Errorf("List = %+v, want epoch 2", l)
	}
}

// Who is left behind by a new epoch cannot go on under what it never made final:
// a session that it did not say ready to, or one whose ready it did not take.
func TestSessionsEpochEndsUnfinished(t *testing.T) {
	for _, small := range []bool{true, false} {
		c := newCluster(t, peertest.NewNet(1))
		names := [2]string{"n1", "n2"}
		if !small {
			names = [2]string{"n2", "n1"}
		}
		good, bad := c.sealed(t, names[0], all), c.sealed(t, names[1], all)
		meet(good, bad)
		eventually(t, "both send", func() bool { return good.reaches(bad) && bad.reaches(good) })
		good.s.mu.Lock()
		q := good.s.partners[bad.name].pairs["blue"]
		kept := &agreed{rx: q.rx, tx: q.tx, epoch: 1}
		if small { // the other took no ready: what was before may be sent under
			q.old, q.tx, q.rx = append(q.old, half{rx: q.rx, tx: q.tx, epoch: 1}), nil, nil
		} else { // the other sent none
			q.pending, q.tx, q.rx = kept, nil, nil
		}
		good.s.mu.Unlock()
		good.mu.Lock()
		good.keys["blue"] = blue(2)
		good.mu.Unlock()
		good.s.look(time.Now())
		if err := good.open(bad.seal(good.name)); err != nil {
			t.Errorf("within the grace: %v", err)
		}
		d := bad.seal(good.name)
		good.s.look(time.Now().Add(epochGrace + time.Second))
		if err := good.open(d); !errors.Is(err, errUnknownSession) {
			t.Errorf("%v: after the grace, what was sealed under the former epoch: %v, want an unknown session", names, err)
		}
	}
}

// The key goes with its grant, and the sessions with the key.
func TestSessionsEndWithKey(t *testing.T) {
	_, a, b := talking(t)
	d := b.seal("n1")
	a.mu.Lock()
	delete(a.keys, "blue")
	a.mu.Unlock()
	a.s.look(time.Now())
	if err := a.open(d); a.tx("n2") != nil || !errors.Is(err, errUnknownSession) {
		t.Errorf("without the key there is a session to send under: %v, to open with: %v", a.tx("n2") != nil, err)
	}
}

// The data path is never told that there is no session after it was told of one that stands.
func TestSessionsSilence(t *testing.T) {
	_, a, _ := talking(t)
	a.s.mu.Lock()
	p := a.s.partners["n2"]
	a.s.mu.Unlock()
	a.s.silence(pairName{"n2", "blue"}, false) // by now another was made
	if a.tx("n2") == nil {
		t.Error("the data path was told that there is no session")
	}
	silenced := false
	a.mu.Lock()
	a.silent = func() {
		if silenced = true; p.install.TryLock() {
			p.install.Unlock()
			t.Error("an agreement may tell of a session before this is told")
		}
	}
	a.mu.Unlock()
	a.s.look(time.Now())
	a.s.look(time.Now().Add(idleSend + time.Second))
	if !silenced {
		t.Error("an idle session is still sent under")
	}
}

// A datagram of a session that nobody knows may be anybody's: it costs no session.
func TestSessionsLostChangesNothing(t *testing.T) {
	_, a, b := talking(t)
	d := a.seal("n2")
	for range 100 {
		b.s.Lost("n1")
		b.s.Lost("nobody")
	}
	if err := b.open(d); err != nil {
		t.Errorf("a session that stood does not open: %v", err)
	}
}

// What is newly wanted of a peer does not wait for the pause that another overlay's
// failures have made, and a peer that asks on and on does not end it.
func TestSessionsWantedAtOnce(t *testing.T) {
	c := newCluster(t, peertest.NewNet(1))
	a := c.sealed(t, "n1", all)
	a.stop() // from here on nobody takes what is rung
	from := Peer{Certificate: &crypto.Certificate{Name: "n2"}}
	overlays := []string{"blue", "red"}
	a.s.SetPeers(map[string][]string{"n2": overlays})
	p := a.s.partners["n2"]
	woken := func() bool {
		select {
		case <-p.wake:
			return true
		default:
			return false
		}
	}
	woken()
	p.working = true // in a pause: red has no key
	p.pairs["blue"].wanted = false
	for what, tell := range map[string]func(){
		"a frame":            func() { a.s.Want("n2", "blue"); a.s.told() },
		"an unknown session": func() { a.s.Lost("n2"); a.s.told() },
		"a new overlay":      func() { overlays = append(overlays, "green"); a.s.SetPeers(map[string][]string{"n2": overlays}) },
		"a key":              func() { a.s.Rekeyed("red") },
		"the peer": func() {
			p.offered = time.Time{}
			_, _ = a.s.answerWanted(t.Context(), from, appendNames(nil, overlays))
		},
	} {
		p.pairs["blue"].wanted = false
		if tell(); !woken() {
			t.Errorf("%s: the pause goes on", what)
		}
	}
	a.s.Want("n2", "red")
	a.s.told()
	_, _ = a.s.answerWanted(t.Context(), from, appendNames(nil, overlays))
	if woken() {
		t.Error("what was wanted before ends the pause")
	}
}

// An offer that is not answered has the peer probed: nothing else may use the
// connection, and one that leads nowhere would stay for as long as idle ones do.
func TestSessionsOfferProbes(t *testing.T) {
	_, a, b := talking(t)
	b.s.mu.Lock()
	p := b.s.partners["n1"]
	b.s.mu.Unlock()
	p.install.Lock()
	before := b.e.Stats().RequestsIn.Load()
	start := time.Now()
	a.s.Rekeyed("blue")
	eventually(t, "the offer and a probe", func() bool { return b.e.Stats().RequestsIn.Load() >= before+2 })
	p.install.Unlock()
	if took := time.Since(start); took >= offerTimeout {
		t.Errorf("it took %v: that was another offer", took)
	}
}

// A peer that offers again and again fills no memory.
func TestSessionsOffersBounded(t *testing.T) {
	_, a, b := talking(t)
	a.s.mu.Lock()
	p := a.s.partners["n2"]
	a.s.mu.Unlock()
	for range 4 * maxOld {
		if err := a.s.offer(within(t, 5*time.Second), p, []string{"blue"}); err != nil {
			t.Fatal(err)
		}
	}
	b.mu.Lock()
	n := len(b.receives)
	b.mu.Unlock()
	if n > maxOld+2 {
		t.Errorf("%d sessions are received under, want %d at most", n, maxOld+2)
	}
	if !a.reaches(b) || !b.reaches(a) {
		t.Error("nothing passes any more")
	}
}

// A peer tells what arrived, and so what was lost.
func TestSessionsArrived(t *testing.T) {
	_, a, b := talking(t)
	ask := func() {
		a.s.mu.Lock()
		p := a.s.partners["n2"]
		p.asked = time.Time{}
		a.s.inquire(p, time.Now())
		a.s.mu.Unlock()
		eventually(t, "the answer", func() bool { a.s.mu.Lock(); defer a.s.mu.Unlock(); return !p.asking })
	}
	for range 2 {
		for range 100 {
			if !a.reaches(b) {
				t.Fatal("a datagram is not opened")
			}
		}
		ask() // the first time tells where to count from
	}
	if s, l := a.sent.Load(), a.lost.Load(); s != 100 || l != 0 {
		t.Errorf("%d sent, %d lost; want 100, 0", s, l)
	}
	for i := range 100 {
		if d := a.seal("n2"); i%4 != 0 {
			if err := b.open(d); err != nil {
				t.Fatal(err)
			}
		}
	}
	ask()
	if s, l := a.sent.Load(), a.lost.Load(); s != 200 || l != 25 {
		t.Errorf("%d sent, %d lost; want 200, 25", s, l)
	}
}

// What was sent while an answer was on its way, and had arrived when it was given,
// is not lost.
func TestSessionsArrivedLate(t *testing.T) {
	_, a, b := talking(t)
	a.s.mu.Lock()
	p := a.s.partners["n2"]
	a.s.mu.Unlock()
	tx := a.tx("n2")
	for i := range 4 {
		asked := []asking{{"blue", tx, tx.Sent()}}
		for range 100 {
			if !a.reaches(b) {
				t.Fatal("a datagram is not opened")
			}
		}
		if i%2 != 0 { // answered at once
			asked[0].sent = tx.Sent()
		}
		a.s.ask(t.Context(), p, asked)
	}
	if s, l := a.sent.Load(), a.lost.Load(); s != 200 || l != 0 {
		t.Errorf("%d sent, %d lost; want 200, 0", s, l)
	}
}

func TestOfferCodecs(t *testing.T) {
	offers := []offer{{overlay: "blue", epoch: 7, ciphers: 3, index: 0xdeadbeef, nonce: [16]byte{1}, proof: crypto.OverlayProof{2}}, {overlay: "r"}}
	b := appendOffers(nil, offers)
	got, err := parseOffers(b)
	if err != nil || len(got) != 2 || got[0] != offers[0] || got[1] != offers[1] {
		t.Errorf("parseOffers(%x) = %+v, %v, want %+v", b, got, err, offers)
	}
	accepts := []accept{{status: offerDone, epoch: 7, cipher: 2, index: 5, nonce: [16]byte{3}, proof: crypto.OverlayProof{4}}, {status: offerLater}}
	c := appendAccepts(nil, accepts)
	back, err := parseAccepts(c)
	if err != nil || len(back) != 2 || back[0] != accepts[0] || back[1] != accepts[1] {
		t.Errorf("parseAccepts(%x) = %+v, %v, want %+v", c, back, err, accepts)
	}
	i, n := appendIndexes(nil, []uint32{1, 0xffffffff}), appendNames(nil, []string{"blue", "red-2"})
	for name, x := range map[string]struct {
		b     []byte
		parse func([]byte) error
	}{
		"offers":  {b, func(b []byte) error { _, err := parseOffers(b); return err }},
		"accepts": {c, func(b []byte) error { _, err := parseAccepts(b); return err }},
		"indexes": {i, func(b []byte) error { _, err := parseIndexes(b); return err }},
		"arrived": {appendArrived(nil, []arrived{{1, 2}, {3, 1 << 40}}), func(b []byte) error { _, err := parseArrived(b); return err }},
		"names":   {n, func(b []byte) error { _, err := parseNames(b); return err }},
	} {
		if err := x.parse(x.b); err != nil {
			t.Errorf("%s %x: %v", name, x.b, err)
		}
		for cut := range len(x.b) {
			if err := x.parse(x.b[:cut]); !errors.Is(err, ErrMalformed) {
				t.Errorf("%s cut to %d bytes: %v, want malformed", name, cut, err)
			}
		}
		if err := x.parse(append(bytes.Clone(x.b), 0)); !errors.Is(err, ErrMalformed) {
			t.Errorf("%s with a byte behind: %v, want malformed", name, err)
		}
	}
}

// FuzzOffers reads what a granted or ungranted member may send before it proves anything.
func FuzzOffers(f *testing.F) {
	f.Add(appendOffers(nil, []offer{{overlay: "blue", epoch: 1}}))
	f.Add(appendAccepts(nil, []accept{{status: offerNewer, epoch: 2}}))
	f.Add(appendNames(nil, []string{"blue"}))
	f.Add(appendIndexes(nil, []uint32{1}))
	f.Fuzz(func(t *testing.T, b []byte) {
		if o, err := parseOffers(b); err == nil && !bytes.Equal(appendOffers(nil, o), b) {
			t.Errorf("offers %x do not come back", b)
		}
		if a, err := parseAccepts(b); err == nil && !bytes.Equal(appendAccepts(nil, a), b) {
			t.Errorf("accepts %x do not come back", b)
		}
		if i, err := parseIndexes(b); err == nil && !bytes.Equal(appendIndexes(nil, i), b) {
			t.Errorf("indexes %x do not come back", b)
		}
		if a, err := parseArrived(b); err == nil && !bytes.Equal(appendArrived(nil, a), b) {
			t.Errorf("arrived %x does not come back", b)
		}
		if n, err := parseNames(b); err == nil && !bytes.Equal(appendNames(nil, n), b) {
			t.Errorf("names %x do not come back", b)
		}
	})
}
