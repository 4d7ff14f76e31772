package discovery

import (
	"bytes"
	"io"
	"net"
	"testing"
	"time"
)

func dial(t *testing.T, n *testNode) net.Conn {
	t.Helper()
	c, err := net.Dial("tcp", n.self.String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	_ = c.SetDeadline(time.Now().Add(10 * time.Second))
	return c
}

// Silent, curt, rude and truncated clients change nothing for the others.
func TestBadStreams(t *testing.T) {
	t.Parallel()
	a := start(t, testConfig("a"))
	if err := a.SetOverlays(manyOverlays(1000, "none")); err != nil {
		t.Fatal(err)
	}
	var silent, half []net.Conn
	for range 6 {
		silent = append(silent, dial(t, a))
		c := dial(t, a)
		if _, err := c.Write([]byte{exchangeMagic}); err != nil {
			t.Fatal(err)
		}
		half = append(half, c)
	}
	for _, rude := range [][]byte{{0xff}, {244}, {244, 0xff, 1}, {6}, {9}, {10}, bytes.Repeat([]byte{6, 0xde, 0xff}, 5000), []byte("GET / HTTP/1.1\r\n\r\n")} {
		c := dial(t, a)
		_, _ = c.Write(rude)
		_ = c.Close()
	}
	// One that asks and does not read.
	deaf := dial(t, a)
	_, _ = deaf.Write([]byte{exchangeMagic, exchangeVersion, wantList})

	begin := time.Now()
	b := start(t, testConfig("b", a))
	meet(t, a, b)
	b.await(3*time.Second, "a's overlays", func() bool { return len(b.member("a").Overlays) == 1000 })
	if took := time.Since(begin); took > 2*time.Second {
		t.Errorf("joining and pulling took %v", took)
	}
	for _, c := range append(silent, half...) {
		if n, err := c.Read(make([]byte, 1)); err != io.EOF {
			t.Errorf("a silent client read %d bytes, %v, want it hung up on", n, err)
		}
	}
	a.await(5*time.Second, "all streams closed", func() bool {
		a.port.mu.Lock()
		defer a.port.mu.Unlock()
		return len(a.port.open) <= 1 && len(a.port.perPeer) <= 1 // one may be b's
	})
}

func TestStreamsAreBounded(t *testing.T) {
	t.Parallel()
	a := start(t, testConfig("a"))
	var streams []net.Conn
	for range maxStreamsPerPeer + 8 {
		streams = append(streams, dial(t, a))
	}
	a.await(2*time.Second, "8 streams refused", func() bool { return a.Stats().StreamsRefused == 8 })
	// As they go there is room again.
	for _, c := range streams {
		_ = c.Close()
	}
	b := start(t, testConfig("b", a))
	meet(t, a, b)
}

// The exchange, byte by byte, of any version that is asked for.
func TestServeList(t *testing.T) {
	t.Parallel()
	a := start(t, testConfig("a"))
	if err := a.SetOverlays([]Overlay{{VNI: 100, Name: "blue", Encryption: "none"}}); err != nil {
		t.Fatal(err)
	}
	l := a.carried.Load()
	want := answer{name: "a", vtep: a.cfg.VTEP, boot: a.boot, digest: l.digest}
	for _, tt := range []struct {
		req  []byte
		list []byte
	}{
		{[]byte{'T', 1, 1}, l.encoded},
		{[]byte{'T', 1, 0}, nil},
		{[]byte{'T', 77}, nil},
	} {
		c := dial(t, a)
		if _, err := c.Write(tt.req); err != nil {
			t.Fatal(err)
		}
		got, err := io.ReadAll(c)
		if err != nil || len(got) < answerFixed {
			t.Errorf("to %x: %x, %v", tt.req, got, err)
			continue
		}
		want.length, want.clock = uint32(len(tt.list)), clockOf(got[6:])
		if whole := append(want.append(nil), tt.list...); !bytes.Equal(got, whole) {
			t.Errorf("to %x: %x, want %x", tt.req, got, whole)
		}
		if now := a.clock(); want.clock > now || ticks(now-want.clock) > exchangeTimeout {
			t.Errorf("to %x: the clock says %d, and is %d", tt.req, want.clock, now)
		}
	}
}
