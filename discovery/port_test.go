package discovery

import (
	"bytes"
	"encoding/binary"
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
		if _, err := c.Write([]byte{listMagic}); err != nil {
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
	_, _ = deaf.Write([]byte{listMagic, listVersion})

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
	for _, version := range []byte{listVersion, 77} {
		c := dial(t, a)
		if _, err := c.Write([]byte{listMagic, version}); err != nil {
			t.Fatal(err)
		}
		got, err := io.ReadAll(c)
		want := binary.BigEndian.AppendUint32([]byte{'T', 1}, 9)
		want = append(want, 0, 0, 100, 0, 4, 'b', 'l', 'u', 'e')
		if err != nil || !bytes.Equal(got, want) {
			t.Errorf("request of version %d: %x, %v, want %x", version, got, err, want)
		}
	}
}
