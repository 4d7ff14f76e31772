package discovery

import (
	"bytes"
	"context"
	"encoding/hex"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"testing/iotest"
	"time"

	"github.com/tulle-net/tulle/vxlan"
)

func TestListGolden(t *testing.T) {
	l, err := newList([]Overlay{{VNI: 0x0102ff, Name: "Red-2", Encryption: "required"}, {VNI: 100, Name: "blue", Encryption: "none"}})
	if err != nil {
		t.Fatal(err)
	}
	const want = "0000640004626c7565" + "0102ff01055265642d32"
	if got := hex.EncodeToString(l.encoded); got != want {
		t.Errorf("encoded %s, want %s", got, want)
	}
	if got := hex.EncodeToString(l.digest[:]); got != "ae20ce11e74bb3e1" {
		t.Errorf("digest %s", got)
	}
	back, err := parseList(l.encoded)
	if err != nil || !slices.Equal(back.overlays, l.overlays) || back.digest != l.digest {
		t.Errorf("parseList = %v, %v, want %v", back, err, l)
	}
	for n := 1; n < len(l.encoded); n++ {
		if n == 9 {
			continue // the first entry, whole
		}
		if got, err := parseList(l.encoded[:n]); err == nil {
			t.Errorf("parseList(%x) = %v, want an error", l.encoded[:n], got.overlays)
		}
	}
	empty, err := parseList(nil)
	if err != nil || empty.overlays == nil || len(empty.overlays) != 0 {
		t.Errorf("parseList of nothing = %v, %v, want an empty list", empty, err)
	}
	for _, bad := range []string{
		"0000640204626c7565", // encryption 2
		"0000640000",         // no name
		"000064000462206c65", // a name with a space
		"0000640004626c7565" + "00006400045265642d", // a VNI twice
		"0000650004626c7565" + "00006400045265642d", // VNIs descend
	} {
		b, err := hex.DecodeString(bad)
		if err != nil {
			t.Fatal(err)
		}
		if got, err := parseList(b); err == nil {
			t.Errorf("parseList(%s) = %v, want an error", bad, got.overlays)
		}
	}
}

func TestListRefuses(t *testing.T) {
	long := strings.Repeat("x", 63-5)
	tooLong := make([]Overlay, 20000)
	for i := range tooLong {
		tooLong[i] = Overlay{VNI: vxlan.VNI(i), Name: fmt.Sprintf("%s%05d", long, i), Encryption: "none"}
	}
	for what, o := range map[string][]Overlay{
		"VNI 16777216":  {{VNI: 1 << 24, Name: "a", Encryption: "none"}},
		"overlay name":  {{VNI: 1, Name: "a b", Encryption: "none"}},
		"encryption":    {{VNI: 1, Name: "a", Encryption: "perhaps"}},
		"one VNI":       {{VNI: 1, Name: "a", Encryption: "none"}, {VNI: 1, Name: "b", Encryption: "none"}},
		"two VNIs":      {{VNI: 1, Name: "a", Encryption: "none"}, {VNI: 2, Name: "a", Encryption: "none"}},
		"65537":         make([]Overlay, MaxOverlays+1),
		"shorter names": tooLong,
	} {
		if _, err := newList(o); err == nil || !strings.Contains(err.Error(), what) {
			t.Errorf("newList says %v, want %q in it", err, what)
		}
	}
}

func FuzzParseList(f *testing.F) {
	l, err := newList(manyOverlays(3, "required"))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(l.encoded)
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, b []byte) {
		l, err := parseList(b)
		if err != nil {
			return
		}
		again, err := newList(l.overlays)
		if err != nil {
			// Only a name that is there twice passes the one and not the other.
			if !strings.Contains(err.Error(), "two VNIs") {
				t.Fatalf("newList refuses what parseList(%x) gave: %v", b, err)
			}
			return
		}
		if !bytes.Equal(again.encoded, b) || again.digest != l.digest {
			t.Fatalf("parseList(%x) encodes to %x", b, again.encoded)
		}
	})
}

func TestTags(t *testing.T) {
	c := testConfig("a")
	c.VTEP = netip.MustParseAddrPort("[2001:db8:1111:2222:3333:4444:5555:6666]:65535")
	d := &Discovery{cfg: c}
	l, err := newList(manyOverlays(1000, "none"))
	if err != nil {
		t.Fatal(err)
	}
	tags := d.tags(l)
	got, err := parseTags(tags)
	if want := (card{vtep: c.VTEP, digest: l.digest, count: 1000}); err != nil || got != want {
		t.Errorf("parseTags(%v) = %v, %v, want %v", tags, got, err, want)
	}
	for key, values := range map[string][]string{
		tagVersion: {"", "2", "11", strings.Repeat("x", 500)},
		tagVTEP:    {"", "192.0.2.1", "0.0.0.0:4789", "[::]:4789", "224.0.0.1:4789", "192.0.2.1:0", "[fe80::1%eth0]:4789"},
		tagDigest:  {"", "00", "zz" + tags[tagDigest][2:], tags[tagDigest] + "00"},
		tagCount:   {"", "-1", "65537", "x"},
	} {
		for _, v := range values {
			bad := d.tags(l)
			bad[key] = v
			if got, err := parseTags(bad); err == nil || len(err.Error()) > 300 {
				t.Errorf("parseTags with %s=%q = %v, %v, want a short error", key, v, got, err)
			}
		}
	}
	if _, err := parseTags(nil); err == nil {
		t.Error("parseTags accepts no tags at all")
	}
}

func TestReadList(t *testing.T) {
	l, err := newList(manyOverlays(2, "none"))
	if err != nil {
		t.Fatal(err)
	}
	whole := append([]byte{listMagic, listVersion, 0, 0, 0, byte(len(l.encoded))}, l.encoded...)
	got, err := readList(iotest.OneByteReader(bytes.NewReader(whole)))
	if err != nil || !slices.Equal(got.overlays, l.overlays) {
		t.Errorf("readList = %v, %v", got, err)
	}
	for n := range whole {
		if _, err := readList(bytes.NewReader(whole[:n])); err == nil {
			t.Errorf("readList of the first %d bytes gave no error", n)
		}
	}
	for _, head := range [][]byte{
		{listMagic, listVersion, 0, 0x10, 0, 1},          // one byte above MaxListBytes
		{listMagic, listVersion, 0xff, 0xff, 0xff, 0xff}, //
		{listMagic, listVersion + 1, 0, 0, 0, 0},
		{'X', listVersion, 0, 0, 0, 0},
	} {
		r := io.MultiReader(bytes.NewReader(head), neverRead{t})
		if _, err := readList(r); err == nil {
			t.Errorf("readList accepts the header %x", head)
		}
	}
}

// neverRead fails the test if it is read.
type neverRead struct{ t *testing.T }

func (n neverRead) Read([]byte) (int, error) {
	n.t.Error("read after a bad header")
	return 0, io.EOF
}

// An owner that answers rubbish, half a list and an old one is asked again
// until it gives what its tags name.
func TestPullRetries(t *testing.T) {
	t.Parallel()
	d, err := New(testConfig("a"))
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	old, err := newList(manyOverlays(1, "none"))
	if err != nil {
		t.Fatal(err)
	}
	now, err := newList(manyOverlays(2, "none"))
	if err != nil {
		t.Fatal(err)
	}
	response := func(l *list) []byte {
		return append([]byte{listMagic, listVersion, 0, 0, 0, byte(len(l.encoded))}, l.encoded...)
	}
	answers := [][]byte{[]byte("HTTP/1.1 400 Bad Request\r\n"), response(now)[:9], response(old), response(now)}
	go func() {
		for _, a := range answers {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			_, _ = io.ReadFull(c, make([]byte, 2))
			_, _ = c.Write(a)
			_ = c.Close()
		}
	}()
	p := &peer{
		status: Alive, gossip: ln.Addr().(*net.TCPAddr).AddrPort(), pulling: true, wake: make(chan struct{}, 1),
		card: card{vtep: netip.MustParseAddrPort("192.0.2.9:4789"), digest: now.digest, count: 2},
	}
	d.mu.Lock()
	d.peers["b"] = p
	d.mu.Unlock()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	d.pull(ctx, "b", p)
	if p.list == nil || p.list.digest != now.digest || p.pulling {
		t.Fatalf("after the pull: list %v, pulling %v", p.list, p.pulling)
	}
	if s := d.Stats(); s.Pulls != 1 || s.PullsFailed != uint64(len(answers)-1) {
		t.Errorf("stats %+v, want 1 pull and %d failures", s, len(answers)-1)
	}
}

// A pull from an owner that says nothing ends by itself, and at once when the
// node ends.
func TestPullIsBounded(t *testing.T) {
	t.Parallel()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close() // it never accepts: the kernel does
	addr := ln.Addr().(*net.TCPAddr).AddrPort()
	begin := time.Now()
	if _, err := pullList(t.Context(), addr); err == nil || time.Since(begin) > listTimeout+time.Second {
		t.Errorf("pullList ended with %v after %v", err, time.Since(begin))
	}
	ctx, cancel := context.WithCancel(t.Context())
	time.AfterFunc(50*time.Millisecond, cancel)
	begin = time.Now()
	if _, err := pullList(ctx, addr); err == nil || time.Since(begin) > time.Second {
		t.Errorf("cancelled pullList ended with %v after %v", err, time.Since(begin))
	}
}

func TestSerfLevel(t *testing.T) {
	for _, tt := range []struct {
		line  string
		level slog.Level
		text  string
	}{
		{"[ERR] memberlist: no\n", slog.LevelWarn, "memberlist: no"},
		{"[ERROR] memberlist: no", slog.LevelWarn, "memberlist: no"},
		{"[WARN] serf: hm\n", slog.LevelInfo, "serf: hm"},
		{"[INFO] serf: x", slog.LevelDebug, "serf: x"},
		{"[DEBUG] serf: x", slog.LevelDebug, "serf: x"},
		{"Err: plain", slog.LevelDebug, "Err: plain"},
		{"[open", slog.LevelDebug, "[open"},
		{"", slog.LevelDebug, ""},
	} {
		if level, text := serfLevel(tt.line); level != tt.level || text != tt.text {
			t.Errorf("serfLevel(%q) = %v, %q, want %v, %q", tt.line, level, text, tt.level, tt.text)
		}
	}
	var b logBuffer
	l := serfLogger(slog.New(slog.NewTextHandler(&b, nil)))
	for range 1000 {
		l.Print("[ERR] memberlist: garbage")
	}
	if n := strings.Count(b.String(), "\n"); n < 1 || n > 6 {
		t.Errorf("%d of 1,000 equal errors were logged", n)
	}
}
