package e2e

import (
	"context"
	"encoding/hex"
	"errors"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/tulle-net/tulle/crypto"
	"github.com/tulle-net/tulle/internal/lab"
	"github.com/tulle-net/tulle/keeper"
	"github.com/tulle-net/tulle/peer"
)

// insider is an attacker that has the whole identity of a node, and does with it
// what no node does.
type insider struct {
	*peer.Endpoint
	keeper keeper.Client
	again  func() *insider // another one of the same
}

// infiltrate takes the identity from a node's state folder and speaks QUIC from a
// port of its own on that node's host. at says where the nodes are; the first of
// keepers is asked.
func infiltrate(t *testing.T, h *lab.Host, dir string, at map[string]netip.Addr, keepers ...string) *insider {
	t.Helper()
	id, err := stateIn(t, dir).Identity(time.Now())
	if err != nil {
		t.Fatal(err)
	}
	conn, err := h.ListenPacket("0.0.0.0:0")
	if err != nil {
		t.Fatal(err)
	}
	e, err := peer.New(peer.Config{
		Identity: id, Version: "attacker", ResetKey: [32]byte{1}, TokenKey: [32]byte{2},
		Send: func(to netip.AddrPort, d []byte) error {
			_, err := conn.WriteTo(d, net.UDPAddrFromAddrPort(to))
			return err
		},
		Resolve: func(name string) []netip.AddrPort {
			if a, ok := at[name]; ok {
				return []netip.AddrPort{netip.AddrPortFrom(a, 4789)}
			}
			return nil
		},
		Keepers: func() []string { return keepers },
	})
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for b := make([]byte, 65536); ; {
			n, from, err := conn.ReadFrom(b)
			if err != nil {
				return
			}
			e.Deliver(from.(*net.UDPAddr).AddrPort(), b[:n])
		}
	}()
	t.Cleanup(func() {
		err := errors.Join(e.Close(), conn.Close())
		<-done
		if err != nil {
			t.Error(err)
		}
	})
	return &insider{Endpoint: e, keeper: keeper.Client{Ask: e.Ask}, again: func() *insider { return infiltrate(t, h, dir, at, keepers...) }}
}

func stateIn(t *testing.T, dir string) *crypto.State {
	t.Helper()
	d, err := crypto.OpenDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	s, err := d.Load()
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// booty is a peer.SessionTable that keeps what an attacker came to.
type booty struct {
	mu       sync.Mutex
	receives map[string]int // overlays for which a session was agreed
}

func (b *booty) Index() uint32 { return rand.Uint32() }

func (b *booty) Receive(_, overlay string, _ *crypto.Opener) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.receives[overlay]++
	return nil
}

func (b *booty) Forget(*crypto.Opener) {}
func (b *booty) Leave(string, string)  {}

func (b *booty) Send(_, _ string, _ *crypto.Sealer) {}

// agree tries for some time to agree with a peer on sessions for overlays, whose
// keys it believes to be these, and returns what it came to.
func (x *insider) agree(t *testing.T, with string, keys map[string]peer.OverlayKey, limit time.Duration) map[string]peer.SessionInfo {
	t.Helper()
	ciphers, err := crypto.OfferCiphers("auto")
	if err != nil {
		t.Fatal(err)
	}
	s := peer.NewSessions(peer.SessionsConfig{ // one an endpoint
		Endpoint: x.again().Endpoint, Table: &booty{receives: map[string]int{}},
		Key: func(overlay string) (peer.OverlayKey, bool) {
			k, ok := keys[overlay]
			k.Ciphers = ciphers
			return k, ok
		},
	})
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { defer close(done); s.Run(ctx) }()
	defer func() { cancel(); <-done }()
	var overlays []string
	for o := range keys {
		overlays = append(overlays, o)
	}
	s.SetPeers(map[string][]string{with: overlays})
	list := map[string]peer.SessionInfo{}
	for end := time.Now().Add(limit); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		all := 0
		for _, i := range s.List() {
			list[i.Overlay] = i
			if i.Cipher != 0 || i.Err != "" {
				all++
			}
		}
		if all == len(keys) {
			break
		}
	}
	return list
}

// loggedKey is one line of a key log.
type loggedKey struct {
	cipher crypto.Cipher
	key    crypto.Key
}

// keysIn reads a key log, by session.
func keysIn(t *testing.T, file string) map[uint32]loggedKey {
	t.Helper()
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	keys := map[uint32]loggedKey{}
	for line := range strings.Lines(string(text)) {
		f := strings.Fields(line)
		if len(f) != 4 || f[0] != "TULLE_SESSION" {
			t.Fatalf("a line of the key log is %d fields, want 4", len(f))
		}
		index, err := strconv.ParseUint(f[1], 16, 32)
		if err != nil {
			t.Fatal(err)
		}
		raw, err := hex.DecodeString(f[3])
		if err != nil {
			t.Fatal(err)
		}
		k, err := crypto.KeyFrom(raw)
		if err != nil {
			t.Fatal(err)
		}
		c := crypto.ChaCha20Poly1305
		if f[2] == "aes-256-gcm" {
			c = crypto.AES256GCM
		}
		keys[uint32(index)] = loggedKey{c, k}
	}
	return keys
}
