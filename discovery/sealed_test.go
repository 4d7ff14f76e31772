package discovery

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"slices"
	"strings"
	"testing"
	"time"
)

// Nothing in a secure cluster is told over TCP, and nobody without a key sees
// anything.
func TestOtherGossipKeySeesNothing(t *testing.T) {
	t.Parallel()
	c := newTestCluster(t)
	a := c.start(c.secureConfig("a", nil))
	cfg := c.secureConfig("b", nil, a)
	cfg.Secure.Keys = [][]byte{gossipKey(2)}
	b := c.start(cfg)
	b.await(3*time.Second, "a warning", func() bool { return strings.Contains(b.log.String(), "cannot join yet") })
	if m := append(b.Members(), a.Members()...); len(m) != 2 {
		t.Errorf("they see each other: %v", m)
	}
	if got := append(a.Conflicts(), b.Conflicts()...); len(got) != 0 {
		t.Errorf("conflicts %q: both are secure", got)
	}
	conn := dial(t, a)
	_, _ = conn.Write([]byte{exchangeMagic, exchangeVersion, wantKindSecure})
	var answer bytes.Buffer
	if _, err := answer.ReadFrom(conn); err != nil || answer.String() != "TS" {
		t.Errorf("a answers %x, %v", answer.Bytes(), err)
	}
	for _, text := range []string{a.log.String(), b.log.String()} {
		if strings.Contains(text, string(gossipKey(1))) || strings.Contains(text, string(gossipKey(2))) {
			t.Error("a gossip key is in a log")
		}
	}
}

// The key changes in three steps; floods go through all the time.
func TestSetKeys(t *testing.T) {
	t.Parallel()
	c := newTestCluster(t)
	var nodes []*testNode
	var got [3]floods
	for i := range got {
		cfg := c.secureConfig(fmt.Sprintf("n%d", i), nil, nodes...)
		cfg.OnFlood = got[i].take
		n := c.start(cfg)
		if err := n.SetOverlays([]Overlay{{7, "x", "required"}}); err != nil {
			t.Fatal(err)
		}
		nodes = append(nodes, n)
	}
	meet(t, nodes...)
	for _, n := range nodes {
		n.await(3*time.Second, "the lists", func() bool {
			return !slices.ContainsFunc(n.Members(), func(m Member) bool { return len(m.Overlays) != 1 })
		})
	}
	var want [3]int
	for step, keys := range [][][]byte{
		{gossipKey(1), gossipKey(2)},
		{gossipKey(2), gossipKey(1)},
		{gossipKey(2)},
	} {
		for i, n := range nodes {
			if err := n.SetKeys(keys); err != nil {
				t.Fatal(err)
			}
			if !n.Flood(7, []byte{byte(step), byte(i)}) {
				t.Fatal("Flood was refused")
			}
			// It arrives at those that are a step behind, and at those that are not.
			for k, other := range nodes {
				if k != i {
					want[k]++
				}
				other.await(3*time.Second, "the flood", func() bool { return got[k].count() == want[k] })
			}
		}
	}
	for _, n := range nodes {
		for _, m := range n.Members() {
			if m.Status != Alive {
				t.Errorf("%s lost %+v", n.cfg.Name, m)
			}
		}
		if text := n.log.String(); strings.Contains(text, "Decrypt packet failed") || strings.Contains(text, "suspect") {
			t.Errorf("%s lost messages", n.cfg.Name)
		}
	}
	// Who knows only the former key is out.
	out := c.start(c.secureConfig("out", nil, nodes[0]))
	out.await(3*time.Second, "a warning", func() bool { return strings.Contains(out.log.String(), "cannot join yet") })
	if err := out.SetKeys([][]byte{gossipKey(2)}); err != nil {
		t.Fatal(err)
	}
	meet(t, out, nodes[0])
	for _, bad := range [][][]byte{nil, {gossipKey(1)[1:]}, slices.Repeat([][]byte{gossipKey(1)}, MaxKeys+1)} {
		if out.SetKeys(bad) == nil {
			t.Errorf("SetKeys takes %d keys that are wrong", len(bad))
		}
	}
}

// No member can change the keys of the others by Serf's own queries.
func TestNoKeyQueries(t *testing.T) {
	t.Parallel()
	c := newTestCluster(t)
	a := c.start(c.secureConfig("a", nil))
	b := c.start(c.secureConfig("b", nil, a))
	meet(t, a, b)
	// b's Serf is told to install a key everywhere.
	r, err := b.serf.Load().KeyManager().InstallKey("AgICAgICAgICAgICAgICAgICAgICAgICAgICAgICAgI=")
	if err == nil || r == nil || r.NumErr == 0 {
		t.Errorf("installing a key by query: %+v, %v", r, err)
	}
	if n := len(a.keys.ring.GetKeys()); n != 1 {
		t.Errorf("a has %d keys", n)
	}
	if r, err := b.serf.Load().KeyManager().ListKeys(); err == nil || len(r.Keys) != 0 {
		t.Errorf("keys are listed: %v, %v", r.Keys, err)
	}
}

// sealed is what a holder of the key makes of message.
func sealed(t *testing.T, key []byte, version byte, message, data []byte) []byte {
	t.Helper()
	block, err := aes.NewCipher(key)
	if err != nil {
		t.Fatal(err)
	}
	gcm, err := cipher.NewGCM(block)
	if err != nil {
		t.Fatal(err)
	}
	nonce := make([]byte, gcm.NonceSize())
	return gcm.Seal(append([]byte{version}, nonce...), nonce, message, data)
}

// Who holds a gossip key cannot end the others' processes with it: not by what
// memberlist 0.7 panics at.
func TestHostileKeyHolder(t *testing.T) {
	t.Parallel()
	c := newTestCluster(t)
	a := c.start(c.secureConfig("a", nil))
	b := c.start(c.secureConfig("b", nil, a))
	meet(t, a, b)
	for _, message := range [][]byte{nil, {0xff}, make([]byte, 15), bytes.Repeat([]byte{0xff}, 64)} {
		for version := range byte(3) {
			a.hit(sealed(t, gossipKey(1), version, message, nil))
			head := binary.BigEndian.AppendUint32([]byte{sealMessage}, uint32(sealOverhead+len(message)))
			conn := dial(t, a)
			_, _ = conn.Write(append(head, sealed(t, gossipKey(1), version, message, head)...))
			_ = conn.(*net.TCPConn).CloseWrite()
			_, _ = io.Copy(io.Discard, conn) // until a hangs up
		}
	}
	third := c.start(c.secureConfig("c", nil, a))
	meet(t, a, b, third)
}

func TestSealedConn(t *testing.T) {
	head := func(kind byte, n uint32, version byte) []byte {
		return append(binary.BigEndian.AppendUint32([]byte{kind}, n), version, 1, 2, 3)
	}
	for _, tt := range []struct {
		b    []byte
		fine bool
	}{
		{head(sealMessage, sealOverhead+1, 1), true},
		{head(sealMessage, sealOverhead, 1), false},
		{head(sealMessage, sealOverhead+1, 0), false},
		{head(sealMessage, sealOverhead+1, 2), false},
		{head(6, sealOverhead+1, 1), false},
		{[]byte{6}, false},
	} {
		for _, chunk := range []int{1, 4, 100} {
			near, far := net.Pipe()
			go func() {
				_, _ = far.Write(tt.b)
				_ = far.Close()
			}()
			var got []byte
			var err error
			for c := (&sealedConn{Conn: near}); err == nil; {
				b := make([]byte, chunk)
				var n int
				n, err = c.Read(b)
				got = append(got, b[:n]...)
			}
			_ = near.Close()
			if fine := err == io.EOF && bytes.Equal(got, tt.b); fine != tt.fine {
				t.Errorf("read %x of %x, %v", got, tt.b, err)
			}
		}
	}
}
