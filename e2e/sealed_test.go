package e2e

import (
	"bytes"
	"encoding/json"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/tulle-net/tulle/crypto"
	"github.com/tulle-net/tulle/ether"
	"github.com/tulle-net/tulle/ether/ethertest"
	"github.com/tulle-net/tulle/internal/lab"
	"github.com/tulle-net/tulle/node"
	"github.com/tulle-net/tulle/vxlan"
)

//	a, b(, c) ──[ul]── secure cluster; overlay tenant-blue is sealed

// marked is content that is easy to find where it stands in clear.
var marked = []byte("MARK-of-what-nobody-else-may-read")

// TestSealed: everything that hosts do goes through a sealed overlay, whatever
// the underlay, driver and cipher, and nothing of it is seen on the way.
func TestSealed(t *testing.T) {
	t.Parallel()
	v4, v6 := lab.Underlay{Prefix4: underlay4}, lab.Underlay{Prefix6: underlay6}
	with := func(u lab.Underlay, o lab.Offloads) lab.Underlay {
		u.Offloads = o
		return u
	}
	for _, tt := range []struct {
		name    string
		n, mtu  int
		u       lab.Underlay
		options []string
		cipher  string
	}{
		{"virtual, auto", 2, 1418, v4, []string{"driver=offload"}, bestCipher()},
		{"wire, plain, chacha, three", 3, 1418, with(v4, lab.Wire), []string{"driver=plain", "cipher=chacha20-poly1305"}, "chacha20-poly1305"},
		{"nic, offload, chacha", 2, 1418, with(v4, lab.NIC), []string{"driver=offload", "cipher=chacha20-poly1305"}, "chacha20-poly1305"},
		{"IPv6, wire, offload, AES, three", 3, 1398, with(v6, lab.Wire), []string{"driver=offload", "cipher=aes-256-gcm"}, "aes-256-gcm"},
		{"IPv6, virtual, plain", 2, 1398, v6, []string{"driver=plain"}, bestCipher()},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if tt.cipher == "aes-256-gcm" && bestCipher() != tt.cipher {
				t.Skip("this machine has no instructions for AES")
			}
			s := sealedCluster(t, tt.n, tt.u, tt.options...)
			var wires []*fastCapture
			for _, n := range s.nodes {
				wires = append(wires, captureTAP(t, n.host, "ul"))
			}
			inside := captureTAP(t, s.nodes[1].host, "blue0")
			for i, n := range s.nodes {
				for j := range s.nodes {
					if i != j {
						ping(t, n.host, address(j+1), 20*time.Second)
					}
				}
				if got := n.status().Overlays[0].MTU; got != tt.mtu {
					t.Errorf("%s: the MTU is %d, want %d", n.name, got, tt.mtu)
				}
			}
			for i, n := range s.nodes {
				j := (i + 1) % len(s.nodes)
				m := s.nodes[j]
				if err := dfPing(t, n.host, address(j+1), tt.mtu); err != nil {
					t.Errorf("%s: a packet of the MTU %d with DF: %v", n.name, tt.mtu, err)
				}
				if err := dfPing(t, n.host, address(j+1), tt.mtu+1); err == nil || !strings.Contains(err.Error(), "too long") {
					t.Errorf("%s: a packet of %d bytes with DF: %v, want the error that it is too long", n.name, tt.mtu+1, err)
				}
				transfer(t, s.l, n.host, m.host, address(j+1), 4<<20)
				for _, size := range []int{0, 1, 1000, 5000} { // the last leaves in fragments
					talk(t, n.host, m.host, netip.AddrPortFrom(address(j+1), 7000), size, 5)
				}
				st, ok := n.session(m.name, sealedName)
				if !ok || st.Cipher != tt.cipher {
					t.Errorf("%s: the session with %s is %+v, want one with %s", n.name, m.name, st, tt.cipher)
				}
			}
			// Content that can be recognised, in trains.
			w := &tcpWorld{a: s.nodes[0].host, b: s.nodes[1].host}
			c, srv := w.connect(t, nil)
			carries(t, c, srv, bytes.Repeat(marked, 1<<20/len(marked)), nil)
			carries(t, srv, c, bytes.Repeat(marked, 1<<20/len(marked)), nil)
			if !inside.has(marked) {
				t.Error("the mark is not even inside the overlay: this tested nothing")
			}
			for i, c := range wires {
				if ds := c.sealedOnly(); len(ds) < 500 {
					t.Errorf("%s: %d sealed datagrams came by, want some hundreds", s.nodes[i].name, len(ds))
				}
				c.hides(append(innerSecrets(tt.n), marked)...)
			}
			s.undisturbed()
			for _, n := range s.nodes {
				unharmed(t, n.host)
			}
		})
	}
}

// bestCipher is what auto comes to on this machine.
func bestCipher() string {
	if _, err := crypto.OfferCiphers("aes-256-gcm"); err == nil {
		return "aes-256-gcm"
	}
	return "chacha20-poly1305"
}

// TestSealedCiphersDiffer: what is pinned to different ciphers does not meet, and says so.
func TestSealedCiphersDiffer(t *testing.T) {
	t.Parallel()
	if bestCipher() != "aes-256-gcm" {
		t.Skip("this machine has no instructions for AES")
	}
	l, sw, h := hosts(t, 2, lab.Underlay{})
	s := &sealed{t: t, l: l, sw: sw}
	a := s.start(h[0], sealedOverlay(1, "cipher=aes-256-gcm"))
	b := s.start(h[1], sealedOverlay(2, "cipher=chacha20-poly1305"))
	wire := captureTAP(t, h[0], "ul")
	eventually(t, 10*time.Second, "one of them says why", func() bool {
		return strings.Contains(a.proc.Log()+b.proc.Log(), "same cipher on both")
	})
	noPing(t, h[0], address(2), time.Second)
	if ds := wire.sealedOnly(); len(ds) > 0 {
		t.Errorf("%d sealed datagrams without a session", len(ds))
	}
}

// TestSealedPeers: `tulle peers` tells cipher, age and counters of each session.
func TestSealedPeers(t *testing.T) {
	t.Parallel()
	s := sealedCluster(t, 2, lab.Underlay{})
	a, b := s.nodes[0], s.nodes[1]
	ping(t, a.host, address(2), 20*time.Second)
	before, _ := a.session("b", sealedName)
	talk(t, a.host, b.host, netip.AddrPortFrom(address(2), 7000), 100, 50)
	var raw struct {
		Peers []struct {
			Name     string
			Status   string
			Overlays []string
			Sessions []map[string]any
		}
	}
	if err := json.Unmarshal([]byte(a.tulle("peers", "-o", "json")), &raw); err != nil {
		t.Fatal(err)
	}
	if len(raw.Peers) != 1 || raw.Peers[0].Name != "b" || raw.Peers[0].Status != "alive" || len(raw.Peers[0].Sessions) != 1 {
		t.Fatalf("peers -o json is %+v, want b with one session", raw)
	}
	got := raw.Peers[0].Sessions[0]
	for _, key := range []string{"overlay", "cipher", "age_seconds", "tx_datagrams", "rx_datagrams", "replays", "forgeries", "plaintext_refused", "queued"} {
		if _, ok := got[key]; !ok {
			t.Errorf("a session has no %q: %v", key, got)
		}
	}
	after, ok := a.session("b", sealedName)
	want := node.SessionStatus{Overlay: sealedName, Cipher: bestCipher(), AgeSeconds: after.AgeSeconds, TxDatagrams: after.TxDatagrams, RxDatagrams: after.RxDatagrams}
	if !ok || after != want || after.AgeSeconds <= before.AgeSeconds || after.AgeSeconds > 60 || after.TxDatagrams < before.TxDatagrams+50 {
		t.Errorf("the session was %+v and is %+v", before, after)
	}
	table := a.tulle("peers")
	for _, word := range []string{sealedName, bestCipher()} {
		if !strings.Contains(table, word) {
			t.Errorf("`tulle peers` does not say %s:\n%s", word, table)
		}
	}
}

// TestSealedGossipFlood: what gossip floods of a sealed overlay arrives, and is
// not seen on the way.
func TestSealedGossipFlood(t *testing.T) {
	t.Parallel()
	s := sealedCluster(t, 3, lab.Underlay{}, "flood=gossip")
	var wires []*fastCapture
	for _, n := range s.nodes {
		wires = append(wires, captureTAP(t, n.host, "ul"))
		n.eventually(20*time.Second, "floods to the two others", func() bool { return len(n.status().Overlays[0].FloodList) == 2 })
	}
	for j := 1; j < 3; j++ {
		unlisted := netip.AddrFrom4([4]byte{10, 32, 1, byte(j)}) // no table answers for it
		if err := s.nodes[j].host.AddAddr("blue0", netip.PrefixFrom(unlisted, 16)); err != nil {
			t.Fatal(err)
		}
		asked := watch(t, s.nodes[j].host, "blue0", func(f []byte) bool { return f[0]&1 != 0 && asksFor(unlisted)(f) })
		flooded := s.nodes[0].status().Overlays[0].TxFrames
		took := ping(t, s.nodes[0].host, unlisted, 10*time.Second)
		t.Logf("first ping of %s after %v, %d datagrams", unlisted, took.Round(time.Millisecond), s.nodes[0].status().Overlays[0].TxFrames-flooded)
		if asked(time.Second) == nil {
			t.Errorf("no ARP request arrived on %s", s.nodes[j].name)
		}
	}
	// A small broadcast of the test's own travels the same way: not as VXLAN.
	arrived := watch(t, s.nodes[2].host, "blue0", func(f []byte) bool { return bytes.Contains(f, marked) })
	frame := ethertest.Ethernet(ether.Broadcast, genMACs, nil, 0x88b5, marked)
	injectTAP(t, s.nodes[0].host, "blue0").send(frame, ether.Meta{})
	if arrived(5*time.Second) == nil {
		t.Error("a broadcast did not arrive")
	}
	for _, c := range wires {
		for _, d := range c.sealedOnly() {
			if len(d.payload) == crypto.SealedOverhead+vxlan.HeaderLen+len(frame) {
				t.Errorf("%s → %s: the broadcast went by VXLAN, want by gossip", d.src, d.dst)
			}
		}
		c.hides(append(innerSecrets(3), marked)...)
	}
	for _, n := range s.nodes {
		if f := n.dropped("floods_refused"); f != 0 {
			t.Errorf("%s refused %d floods", n.name, f)
		}
	}
}

// TestSealedSettings: what cannot be sealed is refused before anything starts.
func TestSealedSettings(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		option string
		words  []string
	}{
		"foreign peers": {"peer=192.168.77.9", []string{"encryption=none", "peers"}},
		"multicast":     {"flood=multicast,group=239.1.1.1", []string{"encryption=none", "flood"}},
		"cipher":        {"cipher=rot13", []string{"cipher", "chacha20-poly1305"}},
	} {
		t.Run(name, func(t *testing.T) {
			x := newAttempt(t)
			status, stderr := x.up("--overlay", sealedOverlay(1, strings.Split(tt.option, ",")...))
			x.fails(status, 1, stderr, append(tt.words, sealedName)...)
		})
	}
	x := newAttempt(t)
	status, stderr := x.up("--overlay", overlay(1, "cipher=aes-256-gcm"))
	x.fails(status, 1, stderr, "cipher", "encryption=none")
}
