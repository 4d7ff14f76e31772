package e2e

import (
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	bin "encoding/binary"
	"io"
	"math/big"
	"net"
	"net/netip"
	"sync"
	"testing"
	"time"

	"github.com/quic-go/quic-go"

	"github.com/tulle-net/tulle/crypto"
	"github.com/tulle-net/tulle/internal/lab"
	"github.com/tulle-net/tulle/peer"
)

//	a (keeper) ──┐
//	b ───────────┼─[ul]── x speaks QUIC to a, with whatever certificate, key or bytes it has
//	c (revoked) ─┤
//	x ───────────┘

// stateOf reads what a node keeps, as whoever stole its disk does.
func stateOf(t *testing.T, n *tulle) *crypto.State {
	t.Helper()
	dir, err := crypto.OpenDir(n.stateDir())
	if err != nil {
		t.Fatal(err)
	}
	s, err := dir.Load()
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func identityOf(t *testing.T, n *tulle) *crypto.Identity {
	t.Helper()
	id, err := stateOf(t, n).Identity(time.Now())
	if err != nil {
		t.Fatal(err)
	}
	return id
}

// forger makes identities of the name, by a CA of its own that says that it is
// of the cluster.
func forger(t *testing.T, cluster, name string) *crypto.Identity {
	t.Helper()
	ca, err := crypto.NewCA(cluster, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	roots, err := crypto.NewRoots(ca.DER())
	if err != nil {
		t.Fatal(err)
	}
	return issue(t, ca, roots, name)
}

// issue has a CA make the identity of a keeper.
func issue(t *testing.T, ca *crypto.CA, roots *crypto.Roots, name string) *crypto.Identity {
	t.Helper()
	key := crypto.NewPrivateKey()
	csr, err := crypto.NewRequest(key, name)
	if err != nil {
		t.Fatal(err)
	}
	issued, err := ca.Issue(csr, crypto.Rights{Overlays: crypto.Grants{"*"}, Keeper: true}, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	id, err := crypto.NewIdentity(key, issued, roots, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	return id
}

// selfSigned is a certificate that anybody can make.
func selfSigned(t *testing.T) tls.Certificate {
	t.Helper()
	pub, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	now := time.Now()
	der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
		SerialNumber: big.NewInt(1), NotBefore: now.Add(-time.Hour), NotAfter: now.Add(time.Hour),
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth},
	}, &x509.Certificate{SerialNumber: big.NewInt(1)}, pub, key)
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

// quicTo connects from a host and believes whoever answers.
func quicTo(t *testing.T, h *lab.Host, to netip.AddrPort, proto string, certs ...tls.Certificate) (*quic.Conn, error) {
	t.Helper()
	sock, err := h.ListenPacket(":0")
	if err != nil {
		t.Fatal(err)
	}
	tr := &quic.Transport{Conn: sock}
	t.Cleanup(func() { tr.Close(); sock.Close() })
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	return tr.Dial(ctx, net.UDPAddrFromAddrPort(to), &tls.Config{
		MinVersion: tls.VersionTLS13, InsecureSkipVerify: true, NextProtos: []string{proto}, Certificates: certs,
	}, &quic.Config{HandshakeIdleTimeout: 5 * time.Second})
}

// request is the head of one as package peer sends it, and a payload.
func request(kind peer.Kind, length uint32, payload []byte) []byte {
	b := []byte{1, 0}
	b = bin.BigEndian.AppendUint16(b, uint16(kind))
	b = bin.BigEndian.AppendUint32(b, 5000)
	b = bin.BigEndian.AppendUint64(b, 0x1122334455667788)
	b = bin.BigEndian.AppendUint32(b, length)
	return append(b, payload...)
}

// whoami makes the one request that every node answers to a member.
func whoami(t *testing.T, h *lab.Host, to netip.AddrPort, certs ...tls.Certificate) error {
	t.Helper()
	q, err := quicTo(t, h, to, "tulle/1", certs...)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	s, err := q.OpenStreamSync(ctx)
	if err != nil {
		return err
	}
	if _, err := s.Write(request(peer.KindWhoami, 0, nil)); err != nil {
		return err
	}
	if err := s.Close(); err != nil {
		return err
	}
	_ = s.SetReadDeadline(time.Now().Add(5 * time.Second))
	answer, err := io.ReadAll(s)
	if err == nil && (len(answer) < 2 || answer[1] != 0) {
		err = io.ErrUnexpectedEOF
	}
	return err
}

// TestSecureStrangers: nobody but a member gets an answer, and none of them is
// ever listed.
func TestSecureStrangers(t *testing.T) {
	t.Parallel()
	_, _, nodes, spare := secureCluster(t, 3, 1)
	a, b, c := nodes[0], nodes[1], nodes[2]
	x, at := spare[0], a.status().Node.VTEP
	cluster := a.status().Node.Cluster
	revoked := identityOf(t, c) // its disk is copied
	b.do("node", "revoke", "c")

	// The same code with a member's certificate is answered: the others fail
	// because of what they are.
	if err := whoami(t, x, at, identityOf(t, b).TLS()); err != nil {
		t.Fatalf("a member is not answered: %v", err)
	}
	for name, cert := range map[string]tls.Certificate{
		"a self-signed certificate":      selfSigned(t),
		"a CA of the same cluster's id":  forger(t, cluster, "b").TLS(),
		"another cluster":                forger(t, crypto.NewCluster(), "b").TLS(),
		"a keeper of another cluster":    forger(t, crypto.NewCluster(), "a").TLSWithRoots(),
		"a revoked node's key and state": revoked.TLS(),
	} {
		if err := whoami(t, x, at, cert); err == nil {
			t.Errorf("%s: it is answered", name)
		} else {
			t.Logf("%s: %v", name, err)
		}
	}
	if err := whoami(t, x, at); err == nil {
		t.Error("no certificate at all: it is answered")
	}
	for _, n := range []*tulle{a, b} {
		if got := n.names(); got != 1 {
			t.Errorf("%s lists %d peers, want 1", n.name, got)
		}
	}
	ping(t, b.host, address(1), 5*time.Second)
}

// TestSecureBadRequests: requests that are too long, cut off or slow, of a
// member and of a stranger that wants to join, cost nobody else an answer.
func TestSecureBadRequests(t *testing.T) {
	t.Parallel()
	l, _, nodes, spare := secureCluster(t, 3, 2)
	a, b, c := nodes[0], nodes[1], nodes[2]
	x, at := spare[0], a.status().Node.VTEP
	member := identityOf(t, c)
	c.stop()
	token, rss := a.token(), resident(t, a)

	var wg sync.WaitGroup
	defer wg.Wait()
	open := func(q *quic.Conn, write func(*quic.Stream)) {
		ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
		defer cancel()
		if s, err := q.OpenStreamSync(ctx); err == nil { // else a has closed, or has as many as it takes
			write(s)
		}
	}
	hostile := func(q *quic.Conn, kind peer.Kind) {
		whole := request(kind, 100, make([]byte, 100))
		open(q, func(s *quic.Stream) { s.Write(request(kind, 0xffffffff, make([]byte, 4096))); s.Close() })
		open(q, func(s *quic.Stream) { s.Write(make([]byte, 64<<10)); s.Close() })
		for n := 0; n < len(whole); n += 7 {
			open(q, func(s *quic.Stream) { s.Write(whole[:n]); s.Close(); io.Copy(io.Discard, s) })
		}
		for range 16 { // as many as one may have: they never end
			open(q, func(s *quic.Stream) {
				wg.Go(func() {
					for i := range whole {
						s.SetWriteDeadline(time.Now().Add(time.Second))
						if _, err := s.Write(whole[i : i+1]); err != nil {
							return
						}
						select {
						case <-time.After(200 * time.Millisecond):
						case <-q.Context().Done():
							return
						case <-t.Context().Done():
							return
						}
					}
				})
			})
		}
	}
	q, err := quicTo(t, x, at, "tulle/1", member.TLS())
	if err != nil {
		t.Fatal(err)
	}
	wg.Go(func() { hostile(q, peer.KindKeeper) })
	for range 8 {
		j, err := quicTo(t, x, at, "tulle-join/1")
		if err != nil {
			t.Logf("a stranger is refused already: %v", err)
			break
		}
		wg.Go(func() { hostile(j, 4) })
		defer j.CloseWithError(0, "")
	}
	defer q.CloseWithError(0, "")

	var longest time.Duration
	for end := time.Now().Add(3 * time.Second); time.Now().Before(end); {
		start := time.Now()
		b.do("node", "ls") // asks a
		longest = max(longest, time.Since(start))
	}
	start := time.Now()
	d := up(t, l, spare[1], "--token", token, "--overlay", secured(5))
	joined := time.Since(start)
	meet(t, 10*time.Second, a, b, d)
	now := resident(t, a)
	t.Logf("meanwhile b's requests took at most %v, a join %v, and a has %d MiB after %d", longest.Round(time.Millisecond), joined.Round(time.Millisecond), now>>20, rss>>20)
	if longest > 2*time.Second || joined > 5*time.Second {
		t.Errorf("requests took %v, a join %v", longest, joined)
	}
	if now > rss+64<<20 {
		t.Errorf("a has %d MiB after %d", now>>20, rss>>20)
	}
}
