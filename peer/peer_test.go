package peer

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"math/big"
	"net"
	"net/url"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/quic-go/quic-go"

	"github.com/tulle-net/tulle/crypto"
	"github.com/tulle-net/tulle/peer/peertest"
)

// Two nodes meet, see who the other is, and use post-quantum keys.
func TestMeet(t *testing.T) {
	c := newCluster(t, peertest.NewNet(1))
	a, b := c.node("n1"), c.node("n2")
	ctx := within(t, 5*time.Second)
	w, err := a.Whoami(ctx, "n2")
	if err != nil {
		t.Fatal(err)
	}
	if w.Name != "n2" || w.You != "n1" || w.From != c.addrs["n1"] || w.Version != "test" || time.Since(w.Time).Abs() > time.Minute {
		t.Errorf("Whoami = %+v", w)
	}
	for _, e := range []*Endpoint{a, b} {
		for _, conn := range e.open() {
			s := conn.q.ConnectionState()
			if s.TLS.CurveID != tls.X25519MLKEM768 || s.TLS.Version != tls.VersionTLS13 || s.TLS.DidResume || s.Used0RTT || s.TLS.NegotiatedProtocol != protoNode {
				t.Errorf("connection: %s, version %x, resumed %v, 0-RTT %v, %q", s.TLS.CurveID, s.TLS.Version, s.TLS.DidResume, s.Used0RTT, s.TLS.NegotiatedProtocol)
			}
			if len(s.TLS.PeerCertificates) != 1 {
				t.Errorf("%d certificates between nodes that know the CA", len(s.TLS.PeerCertificates))
			}
		}
	}
	if _, err := b.Whoami(ctx, "n1"); err != nil { // over the same connection
		t.Fatal(err)
	}
	if n := b.Stats().Dials.Load(); n != 0 {
		t.Errorf("n2 dialled %d times though it was connected", n)
	}
	if _, err := a.Whoami(ctx, "n9"); !errors.Is(err, ErrUnknown) {
		t.Errorf("unknown node: %v", err)
	}
	if _, err := a.Whoami(ctx, "n1"); err == nil {
		t.Error("a node talks to itself")
	}
}

// Many callers share one dial, over a network that does what networks do.
func TestBadNetwork(t *testing.T) {
	n := peertest.NewNet(2)
	n.Loss, n.Twice, n.Late = 0.05, 0.05, 0.2
	c := newCluster(t, n)
	a, b := c.node("n1"), c.node("n2")
	b.Handle(kindEcho, 300<<10, func(_ context.Context, _ Peer, p []byte) ([]byte, error) { return p, nil })
	ctx := within(t, 30*time.Second)
	var wg sync.WaitGroup
	for i := range 20 {
		wg.Go(func() {
			want := bytes.Repeat([]byte{byte(i)}, i*5000)
			got, err := a.Request(ctx, "n2", kindEcho, want)
			if err != nil || !bytes.Equal(got, want) {
				t.Errorf("request of %d bytes: %d bytes, %v", len(want), len(got), err)
			}
		})
	}
	wg.Wait()
	if n := a.Stats().Dials.Load(); n != 1 {
		t.Errorf("%d dials for 20 callers", n)
	}
	if n.Lost.Load() == 0 {
		t.Error("the network lost nothing")
	}
}

// A path that takes no datagrams of 1,280 bytes.
func TestSmallPath(t *testing.T) {
	n := peertest.NewNet(3)
	n.MTU = 1200
	c := newCluster(t, n)
	a := c.node("n1")
	c.node("n2")
	if _, err := a.Whoami(within(t, 5*time.Second), "n2"); err != nil {
		t.Fatal(err)
	}
}

// Both ends dial at the same time, a hundred times: one connection remains,
// the one whose client has the smaller name, and no request is lost.
func TestSimultaneousDial(t *testing.T) {
	n := peertest.NewNet(4)
	n.Late = 0.3
	c := newCluster(t, n)
	var wg sync.WaitGroup
	places := make(chan struct{}, 10)
	var both int
	var mu sync.Mutex
	for i := range 100 {
		small, big := fmt.Sprintf("a%d", i), fmt.Sprintf("b%d", i)
		a, b := c.node(small), c.node(big)
		a.Handle(kindEcho, 100, echo)
		b.Handle(kindEcho, 100, echo)
		wg.Go(func() {
			places <- struct{}{} // so that no pair waits for a processor until it looks dead
			defer func() { <-places }()
			ctx := within(t, 30*time.Second)
			start := make(chan struct{})
			var pair sync.WaitGroup
			for range 3 {
				pair.Go(func() {
					<-start
					if got, err := a.Request(ctx, big, kindEcho, []byte("x")); err != nil || string(got) != small+" says x" {
						t.Errorf("%s: %q, %v", small, got, err)
					}
				})
				pair.Go(func() {
					<-start
					if got, err := b.Request(ctx, small, kindEcho, []byte("y")); err != nil || string(got) != big+" says y" {
						t.Errorf("%s: %q, %v", big, got, err)
					}
				})
			}
			close(start)
			pair.Wait()
			if a.Stats().Dials.Load()+b.Stats().Dials.Load() == 2 {
				mu.Lock()
				both++
				mu.Unlock()
			}
			eventually(t, small+" and "+big+" have one connection, the same", func() bool {
				x, y := a.Conns(), b.Conns()
				return dialling(a)+dialling(b) == 0 && len(x) == 1 && len(y) == 1 && x[0].Outgoing != y[0].Outgoing
			})
			if out := a.Conns()[0].Outgoing; a.Stats().Dials.Load() == 1 && !out {
				t.Errorf("%s dialled, and yet its connection did not win; %d dials failed, %d dead, %d duplicates, %d connections",
					small, a.Stats().DialsFailed.Load(), a.Stats().ClosedDead.Load(), a.Stats().ClosedDuplicate.Load(), a.Stats().Conns.Load())
			}
		})
	}
	wg.Wait()
	if both < 50 {
		t.Errorf("both ends dialled in %d of 100 pairs: too few to show anything", both)
	}
}

func dialling(e *Endpoint) int {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.dials
}

// A node that was killed and is back is reached at once, whoever dialled
// before, by the stateless reset.
func TestRestart(t *testing.T) {
	for _, first := range []string{"a", "b"} {
		t.Run(first+" dialled", func(t *testing.T) {
			c := newCluster(t, peertest.NewNet(5))
			a, b := c.node("a"), c.node("b")
			ctx := within(t, 20*time.Second)
			var err error
			if first == "a" {
				_, err = a.Whoami(ctx, "b")
			} else {
				_, err = b.Whoami(ctx, "a")
			}
			if err != nil {
				t.Fatal(err)
			}
			c.kill("b", b)
			b = c.node("b")
			begin := time.Now()
			if _, err := a.Whoami(ctx, "b"); err != nil {
				t.Fatal(err)
			}
			if d := time.Since(begin); d > 2*time.Second {
				t.Errorf("back after %v", d)
			}
			c.kill("b", b)
			b = c.node("b")
			if _, err := b.Whoami(ctx, "a"); err != nil { // the other one dials
				t.Fatal(err)
			}
			eventually(t, "one connection", func() bool { return len(a.Conns()) == 1 && len(b.Conns()) == 1 })
			if _, err := a.Whoami(ctx, "b"); err != nil {
				t.Fatal(err)
			}
		})
	}
}

// A peer that fell silent is found out long before the idle timeout, and a
// request outlives that if the peer is back.
func TestSilence(t *testing.T) {
	t.Parallel()
	c := newCluster(t, peertest.NewNet(6))
	a, b := c.node("a"), c.node("b")
	ctx := within(t, 20*time.Second)
	if _, err := a.Whoami(ctx, "b"); err != nil {
		t.Fatal(err)
	}
	c.kill("b", b)
	short, cancel := context.WithTimeout(ctx, 300*time.Millisecond)
	defer cancel()
	if _, err := a.Whoami(short, "b"); !errors.Is(err, ErrTimeout) {
		t.Errorf("a silent peer: %v", err)
	}
	time.AfterFunc(time.Second, func() {
		// Other keys, as after a lost state folder: no stateless reset.
		c.node("b", func(cfg *Config) { cfg.ResetKey[31]++ })
	})
	if _, err := a.Whoami(ctx, "b"); err != nil {
		t.Errorf("the peer is back: %v", err)
	}
}

// A revoked node is cut off while it is connected, and stays out.
func TestRevoked(t *testing.T) {
	c := newCluster(t, peertest.NewNet(7))
	a, b, other := c.node("a"), c.node("b"), c.node("c")
	ctx := within(t, 20*time.Second)
	started := make(chan struct{})
	a.Handle(kindEcho, 10, func(ctx context.Context, _ Peer, _ []byte) ([]byte, error) {
		close(started)
		<-ctx.Done()
		return nil, ctx.Err()
	})
	if _, err := a.Whoami(ctx, "c"); err != nil {
		t.Fatal(err)
	}
	hangs := make(chan error, 1)
	go func() {
		_, err := b.Request(ctx, "a", kindEcho, nil)
		hangs <- err
	}()
	<-started
	c.revoke("b")
	if n := a.Recheck(); n != 1 {
		t.Errorf("Recheck closed %d connections, want 1", n)
	}
	if err := <-hangs; err == nil {
		t.Error("a revoked node got its answer")
	}
	if _, err := b.Whoami(ctx, "a"); err == nil || !strings.Contains(err.Error(), "does not believe") {
		t.Errorf("a revoked node dials: %v", err)
	}
	if _, err := a.Whoami(ctx, "b"); !errors.Is(err, crypto.ErrRevoked) {
		t.Errorf("dialling a revoked node: %v", err)
	}
	a.Disconnect("c")
	eventually(t, "disconnected", func() bool { return len(a.Conns()) == 0 && len(other.Conns()) == 0 })
	if got := a.Stats().ClosedRevoked.Load(); got != 2 {
		t.Errorf("ClosedRevoked = %d, want 2", got)
	}
}

// A connection ends when its peer's certificate does.
func TestExpiresWhileConnected(t *testing.T) {
	t.Parallel()
	c := newCluster(t, peertest.NewNet(8))
	a := c.node("a")
	old := c.identity("b", crypto.Rights{}, time.Now().Add(-crypto.Lifetime-crypto.Skew+2*time.Second))
	b := c.nodeAs("b", old)
	if _, err := b.Whoami(within(t, 5*time.Second), "a"); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the connection is closed", func() bool { return len(a.Conns()) == 0 })
	if a.Stats().ClosedRevoked.Load() == 0 {
		t.Error("not counted")
	}
}

// What shows no certificate of this cluster, as client and as server.
func TestNotBelieved(t *testing.T) {
	n := peertest.NewNet(9)
	c, foreign := newCluster(t, n), newCluster(t, n)
	good := c.node("good")
	cases := []struct {
		name string
		e    *Endpoint
		want error
	}{
		{"other", foreign.node("other"), crypto.ErrOtherCluster},
		{"late", c.nodeAs("late", c.identity("late", crypto.Rights{}, time.Now().Add(-crypto.Lifetime-time.Hour))), crypto.ErrExpired},
		{"early", c.nodeAs("early", c.identity("early", crypto.Rights{}, time.Now().Add(time.Hour))), crypto.ErrClock},
	}
	for _, x := range cases {
		t.Run(x.name, func(t *testing.T) {
			x.e.cfg.Resolve = c.resolve
			c.mu.Lock()
			if a, ok := foreign.addrs[x.name]; ok {
				c.addrs[x.name] = a
			}
			c.mu.Unlock()
			ctx := within(t, 5*time.Second)
			if _, err := good.Whoami(ctx, x.name); !errors.Is(err, x.want) {
				t.Errorf("as server: %v, want %v", err, x.want)
			}
			if _, err := x.e.Whoami(ctx, "good"); err == nil {
				t.Error("as client it was let in")
			}
		})
	}
	// A node at another's address, and one with the name of this.
	c.node("b")
	c.addrs["a"] = c.addrs["b"]
	if _, err := good.Whoami(within(t, 5*time.Second), "a"); err == nil || !strings.Contains(err.Error(), "not of a") {
		t.Errorf("b instead of a: %v", err)
	}
	c.addrs["twin"] = newAddr()
	twin := c.nodeAs("twin", c.identity("good", crypto.Rights{}, time.Now()))
	if _, err := twin.Whoami(within(t, 5*time.Second), "b"); err != nil {
		t.Errorf("twin: %v", err)
	}
	if _, err := good.Whoami(within(t, 5*time.Second), "twin"); !errors.Is(err, errOwnName) {
		t.Errorf("a node with this one's name: %v", err)
	}
	if good.Stats().NotBelieved.Load() < 6 || good.Stats().Conns.Load() != 0 {
		t.Errorf("NotBelieved %d, Conns %d", good.Stats().NotBelieved.Load(), good.Stats().Conns.Load())
	}
}

// rawDial connects to a node with TLS of the test's own.
func rawDial(t *testing.T, c *cluster, name string, conf *tls.Config) (*quic.Conn, error) {
	t.Helper()
	e := c.node("raw" + fmt.Sprint(lastHost.Load())) // for its transport
	conf.InsecureSkipVerify = true
	conf.ServerName = "x"
	q, err := e.tr.Dial(within(t, 5*time.Second), net.UDPAddrFromAddrPort(c.addrs[name]), conf, e.quicConfig())
	if err != nil {
		return nil, err
	}
	// The client has finished before the server has looked at its certificate.
	s, err := q.OpenStreamSync(within(t, 5*time.Second))
	if err == nil {
		_, err = s.Write(appendRequest(nil, KindWhoami, time.Second, 7, nil))
	}
	if err == nil {
		_ = s.Close()
		_, err = readResponse(s, 1000)
	}
	return q, err
}

// tickets counts the session tickets that a server sent.
type tickets struct{ n atomic.Int32 }

func (k *tickets) Get(string) (*tls.ClientSessionState, bool)  { return nil, false }
func (k *tickets) Put(_ string, state *tls.ClientSessionState) { k.n.Add(1) }

// TLS that is not what nodes speak.
func TestRefusedTLS(t *testing.T) {
	c := newCluster(t, peertest.NewNet(10))
	target := c.node("target")
	id := c.identity("x", crypto.Rights{}, time.Now())
	pub, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "x"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		URIs: []*url.URL{{Scheme: "spiffe", Host: c.ca.Cluster(), Path: "/node/x"}},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, pub, key)
	if err != nil {
		t.Fatal(err)
	}
	self := tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
	stolen := tls.Certificate{Certificate: id.TLS().Certificate, PrivateKey: key} // another's certificate, without its key
	pq := []tls.CurveID{tls.X25519MLKEM768}
	for name, conf := range map[string]*tls.Config{
		"no certificate":              {NextProtos: []string{protoNode}, CurvePreferences: pq},
		"self-signed":                 {NextProtos: []string{protoNode}, CurvePreferences: pq, Certificates: []tls.Certificate{self}},
		"without its key":             {NextProtos: []string{protoNode}, CurvePreferences: pq, Certificates: []tls.Certificate{stolen}},
		"X25519":                      {NextProtos: []string{protoNode}, CurvePreferences: []tls.CurveID{tls.X25519}, Certificates: []tls.Certificate{id.TLS()}},
		"P-256":                       {NextProtos: []string{protoNode}, CurvePreferences: []tls.CurveID{tls.CurveP256}, Certificates: []tls.Certificate{id.TLS()}},
		"another protocol":            {NextProtos: []string{"h3"}, CurvePreferences: pq, Certificates: []tls.Certificate{id.TLS()}},
		"no protocol":                 {CurvePreferences: pq, Certificates: []tls.Certificate{id.TLS()}},
		"joins at no keeper":          {NextProtos: []string{protoJoin}, CurvePreferences: pq},
		"both, without a certificate": {NextProtos: []string{protoJoin, protoNode}, CurvePreferences: pq},
	} {
		t.Run(name, func(t *testing.T) {
			if q, err := rawDial(t, c, "target", conf); err == nil {
				t.Errorf("was let in: %+v", q.ConnectionState().TLS)
			}
		})
	}
	if n := target.Stats().Conns.Load(); n != 0 {
		t.Errorf("%d connections", n)
	}
	// The same way, with what it takes.
	kept := &tickets{}
	good := &tls.Config{NextProtos: []string{protoNode}, CurvePreferences: pq, Certificates: []tls.Certificate{id.TLS()}, ClientSessionCache: kept}
	if _, err := rawDial(t, c, "target", good); err != nil {
		t.Errorf("a good client: %v", err)
	}
	if n := kept.n.Load(); n != 0 {
		t.Errorf("%d session tickets", n)
	}
}

// A client that makes connection after connection has one, and the table has a bound.
func TestBounds(t *testing.T) {
	c := newCluster(t, peertest.NewNet(11))
	hub := c.node("hub", func(cfg *Config) { cfg.Limits.Conns = 5 })
	ctx := within(t, 20*time.Second)
	for i := range 12 {
		e := c.node(fmt.Sprintf("n%d", i))
		if _, err := e.Whoami(ctx, "hub"); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, "5 connections", func() bool { return len(hub.Conns()) == 5 })
	if got := hub.Stats().ClosedEvicted.Load(); got != 7 {
		t.Errorf("ClosedEvicted = %d, want 7", got)
	}
	id := c.identity("many", crypto.Rights{}, time.Now())
	for range 3 {
		conf := &tls.Config{NextProtos: []string{protoNode}, CurvePreferences: []tls.CurveID{tls.X25519MLKEM768}, Certificates: []tls.Certificate{id.TLS()}}
		if _, err := rawDial(t, c, "hub", conf); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, "one of many", func() bool {
		n := 0
		for _, x := range hub.Conns() {
			if x.Peer == "many" {
				n++
			}
		}
		return n == 1
	})
	eventually(t, "two were replaced", func() bool { return hub.Stats().ClosedReplaced.Load() == 2 })
}

// Who makes room already is in the table until it has ended, and makes none again.
func TestVictimOnce(t *testing.T) {
	c := newCluster(t, peertest.NewNet(64))
	hub := c.node("hub")
	for i := range 3 {
		if _, err := c.node(fmt.Sprintf("n%d", i)).Whoami(within(t, 20*time.Second), "hub"); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, "3 connections, and nothing under way", func() bool {
		list := hub.Conns()
		return len(list) == 3 && !slices.ContainsFunc(list, func(x Conn) bool { return x.Active > 0 })
	})
	hub.mu.Lock()
	defer hub.mu.Unlock()
	hub.cfg.Conns = 2
	newest := hub.peers["n2"].in
	if v := hub.victim(newest); v == nil || v == newest {
		t.Errorf("the first to make room is %v, want another than the newest", v)
	}
	if v := hub.victim(newest); v != nil {
		t.Errorf("with two left %s makes room, want nobody", v.node.Name)
	}
}

// Idle connections go, at both ends.
func TestIdle(t *testing.T) {
	t.Parallel()
	c := newCluster(t, peertest.NewNet(12))
	short := func(cfg *Config) { cfg.Limits.IdleTimeout = 5 * time.Second }
	a, b := c.node("a", short), c.node("b", short)
	if _, err := a.Whoami(within(t, 5*time.Second), "b"); err != nil {
		t.Fatal(err)
	}
	if len(a.Conns()) != 1 || len(b.Conns()) != 1 {
		t.Fatal("not connected")
	}
	eventually(t, "idle connections are gone", func() bool { return len(a.Conns())+len(b.Conns()) == 0 })
	if len(a.peers)+len(b.peers) != 0 || len(a.windows.grown) != 0 {
		t.Errorf("something is kept of peers that are gone: %v %v", a.peers, b.peers)
	}
}

func TestConfig(t *testing.T) {
	if _, err := New(Config{}); err == nil || !strings.Contains(err.Error(), "send") || !strings.Contains(err.Error(), "stateless-reset") {
		t.Errorf("New of nothing: %v", err)
	}
	_, err := Limits{Conns: -1, IdleTimeout: time.Millisecond}.validated()
	if err == nil || !strings.Contains(err.Error(), "connections") || !strings.Contains(err.Error(), "idle") {
		t.Errorf("bad limits: %v", err)
	}
}
