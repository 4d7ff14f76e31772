package e2e

import (
	"context"
	"fmt"
	"io"
	"log"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/memberlist"

	"github.com/tulle-net/tulle/crypto"
	"github.com/tulle-net/tulle/internal/lab"
)

//	a (keeper) ──┐
//	b ───────────┼─[ul]── x has the real gossip key, and gossips whatever it likes
//	x, d ────────┘        d joins meanwhile
//
// Whoever holds the gossip key takes part in the gossip; these tests show that
// it makes nobody a member, and moves nobody.

// hostTransport is memberlist's own, but it dials from inside a lab's host.
type hostTransport struct {
	*memberlist.NetTransport
	h *lab.Host
}

func (tr *hostTransport) DialTimeout(addr string, d time.Duration) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(context.Background(), d)
	defer cancel()
	return tr.h.Dial(ctx, "tcp", addr)
}

func (tr *hostTransport) DialAddressTimeout(a memberlist.Address, d time.Duration) (net.Conn, error) {
	return tr.DialTimeout(a.Addr, d)
}

// said is what a gossip record holds.
type said struct{ meta []byte }

func (s said) NodeMeta(int) []byte           { return s.meta }
func (said) NotifyMsg([]byte)                {}
func (said) GetBroadcasts(int, int) [][]byte { return nil }
func (said) LocalState(bool) []byte          { return nil }
func (said) MergeRemoteState([]byte, bool)   {}

// gossiper joins the gossip from a host with the cluster's keys and a record of
// its choice.
func gossiper(t *testing.T, h *lab.Host, at netip.AddrPort, keys [][]byte, name string, meta []byte) *memberlist.Memberlist {
	t.Helper()
	quiet := log.New(io.Discard, "", 0)
	var tr *memberlist.NetTransport
	err := h.Do(func() (err error) {
		tr, err = memberlist.NewNetTransport(&memberlist.NetTransportConfig{BindAddrs: []string{at.Addr().String()}, BindPort: int(at.Port()), Logger: quiet})
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	ring, err := memberlist.NewKeyring(keys, keys[0])
	if err != nil {
		t.Fatal(err)
	}
	c := memberlist.DefaultLANConfig()
	c.Name, c.BindAddr, c.BindPort, c.AdvertiseAddr, c.AdvertisePort = name, at.Addr().String(), int(at.Port()), at.Addr().String(), int(at.Port())
	c.Transport, c.Keyring, c.Delegate, c.Logger = &hostTransport{tr, h}, ring, said{meta}, quiet
	c.ProtocolVersion, c.DelegateProtocolMin, c.DelegateProtocolMax, c.DelegateProtocolVersion = 2, 2, 5, 5 // as Serf's
	list, err := memberlist.Create(c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { list.Shutdown() })
	return list
}

// metaOf wraps a passport as discovery does.
func metaOf(passport []byte) []byte {
	return slices.Concat([]byte("\xff\x81\xa1p\xda"), []byte{byte(len(passport) >> 8), byte(len(passport))}, passport)
}

// statement is what a node at an address says of itself.
func statement(sequence uint64, vtep, gossip netip.AddrPort) crypto.Statement {
	return crypto.Statement{Sequence: sequence, Wire: 2, VTEPs: []netip.AddrPort{vtep}, Gossip: gossip, Extra: []byte{1, 2, 3, 4, 11: 0}}
}

// TestSecureForgedPassports: forged, stolen and revoked passports, injected with
// the real gossip key.
func TestSecureForgedPassports(t *testing.T) {
	t.Parallel()
	l, sw, nodes, spare := secureCluster(t, 3, 2)
	a, b, c := nodes[0], nodes[1], nodes[2]
	x := spare[0]
	cluster, vtepB := a.status().Node.Cluster, b.status().Node.VTEP
	revoked := identityOf(t, c)
	c.stop()
	b.do("node", "revoke", "c")
	ring, err := stateOf(t, b).Gossip()
	if err != nil {
		t.Fatal(err)
	}
	at := func(port uint16) netip.AddrPort { return netip.AddrPortFrom(sw.Addr(x), port) }
	sign := func(id *crypto.Identity, s crypto.Statement) []byte {
		t.Helper()
		p, err := id.Passport(s)
		if err != nil {
			t.Fatal(err)
		}
		return metaOf(p)
	}
	far := uint64(time.Now().UnixNano()) // ahead of what the nodes count
	listener := gossiper(t, x, at(7940), ring.Keys(), "listener@"+at(7940).String(), nil)
	if n, err := listener.Join([]string{netip.AddrPortFrom(sw.Addr(a.host), 7946).String()}); err != nil {
		t.Fatalf("the gossip key is not the cluster's: %d, %v", n, err)
	}
	var stolen []byte // b's true passport, as it goes round
	eventually(t, 10*time.Second, "b's record is heard", func() bool {
		for _, m := range listener.Members() {
			if strings.HasPrefix(m.Name, "b@") {
				stolen = m.Meta
			}
		}
		return stolen != nil
	})

	forgeries := []struct {
		name string
		meta func(self netip.AddrPort) []byte
	}{
		{"evil", func(self netip.AddrPort) []byte { return nil }},
		{"evil", func(self netip.AddrPort) []byte { return []byte("junk") }},
		{"evil", func(self netip.AddrPort) []byte {
			return sign(forger(t, cluster, "evil"), statement(far, netip.AddrPortFrom(self.Addr(), 4789), self))
		}},
		{"evil", func(self netip.AddrPort) []byte { return stolen }},
		{"b", func(self netip.AddrPort) []byte { return stolen }}, // b's own, at another address
		{"b", func(self netip.AddrPort) []byte {
			return sign(forger(t, cluster, "b"), statement(far, netip.AddrPortFrom(self.Addr(), 4789), self))
		}},
		{"b", func(self netip.AddrPort) []byte {
			return sign(forger(t, cluster, "b"), statement(far, vtepB, self)) // leads b's frames to nowhere
		}},
		{"c", func(self netip.AddrPort) []byte {
			return sign(revoked, statement(far, netip.AddrPortFrom(self.Addr(), 4789), self))
		}},
	}
	for i, f := range forgeries {
		self := at(uint16(7950 + i))
		g := gossiper(t, x, self, ring.Keys(), fmt.Sprintf("%s@%s", f.name, self), f.meta(self))
		_, err := g.Join([]string{netip.AddrPortFrom(sw.Addr(a.host), 7946).String(), netip.AddrPortFrom(sw.Addr(b.host), 7946).String()})
		t.Logf("forgery %d, %s: %v", i, f.name, err)
	}
	token := a.token()
	start := time.Now()
	d := up(t, l, spare[1], "--token", token, "--overlay", secured(5))
	meet(t, 10*time.Second, a, b, d)
	t.Logf("a node joins beside %d forgeries in %v", len(forgeries), time.Since(start).Round(time.Millisecond))
	for end := time.Now().Add(4 * time.Second); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
		for _, n := range []*tulle{a, b, d} {
			for _, name := range []string{"evil", "c", "listener"} {
				if s := n.sees(name); s != "" {
					t.Fatalf("%s lists %s, %s", n.name, name, s)
				}
			}
			if n != b && (n.sees("b") != "alive" || n.vtepOf("b") != vtepB) {
				t.Fatalf("%s has b %s at %s", n.name, n.sees("b"), n.vtepOf("b"))
			}
		}
		for _, f := range a.status().Overlays[0].FloodList {
			if f.Addr() == sw.Addr(x) {
				t.Fatalf("a floods to x")
			}
		}
	}
	ping(t, b.host, address(1), 5*time.Second)
	ping(t, d.host, address(2), 5*time.Second)
	if !strings.Contains(a.proc.Log(), "ignoring alive message for 'evil@") {
		t.Error("a's log does not say that it refused a record")
	}
	// Even what the CA signed is not listed before the node itself has answered
	// over QUIC, as what it says it is.
	self := at(7970)
	g := gossiper(t, x, self, ring.Keys(), "ghost@"+self.String(), sign(issuedBy(t, a, "ghost"), statement(far, netip.AddrPortFrom(self.Addr(), 4789), self)))
	if _, err := g.Join([]string{netip.AddrPortFrom(sw.Addr(a.host), 7946).String()}); err != nil {
		t.Fatal(err)
	}
	for end := time.Now().Add(time.Second); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
		if s := a.sees("ghost"); s != "" {
			t.Fatalf("a lists ghost, %s, which never answered", s)
		}
	}
	if err := whoami(t, x, a.status().Node.VTEP, revoked.TLS()); err == nil {
		t.Error("c is answered")
	}
}

// issuedBy makes an identity with a keeper's CA.
func issuedBy(t *testing.T, keeper *tulle, name string) *crypto.Identity {
	t.Helper()
	state := stateOf(t, keeper)
	ca, err := state.CA()
	if err != nil {
		t.Fatal(err)
	}
	roots, err := state.Roots()
	if err != nil {
		t.Fatal(err)
	}
	return issue(t, ca, roots, name)
}
