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
	d := &Discovery{cfg: c, boot: 0xa}
	l, err := newList(manyOverlays(1000, "none"))
	if err != nil {
		t.Fatal(err)
	}
	tags := d.tags(l)
	got, err := parseTags(tags)
	if want := (card{vtep: c.VTEP, boot: 0xa, digest: l.digest, count: 1000}); err != nil || got != want {
		t.Errorf("parseTags(%v) = %v, %v, want %v", tags, got, err, want)
	}
	for key, values := range map[string][]string{
		tagVersion: {"", "2", "11", strings.Repeat("x", 500)},
		tagVTEP:    {"", "192.0.2.1", "0.0.0.0:4789", "[::]:4789", "224.0.0.1:4789", "192.0.2.1:0", "[fe80::1%eth0]:4789"},
		tagBoot:    {"", "a", "0000000g", "000000000a", "+000000a"},
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

func TestReadAnswer(t *testing.T) {
	l, err := newList(manyOverlays(2, "none"))
	if err != nil {
		t.Fatal(err)
	}
	for _, vtep := range addrs("192.0.2.1:4789", "[2001:db8::1]:4789") {
		want := answer{name: "pi4", vtep: vtep, boot: 7, clock: 1<<48 - 1, digest: l.digest, length: uint32(len(l.encoded))}
		head := want.append(nil)
		whole := append(slices.Clip(head), l.encoded...)
		r := iotest.OneByteReader(bytes.NewReader(whole))
		if got, err := readAnswer(r); err != nil || got != want {
			t.Errorf("readAnswer(%x) = %+v, %v, want %+v", head, got, err, want)
		}
		if got, err := readList(r, want.length); err != nil || !slices.Equal(got.overlays, l.overlays) {
			t.Errorf("readList = %v, %v", got, err)
		}
		for n := range head {
			if got, err := readAnswer(bytes.NewReader(head[:n])); err == nil {
				t.Errorf("readAnswer(%x) = %+v, want an error", head[:n], got)
			}
		}
		for n := range l.encoded {
			if _, err := readList(bytes.NewReader(l.encoded[:n]), want.length); err == nil {
				t.Errorf("readList of the first %d bytes gave no error", n)
			}
		}
		at := len(head) - 4 // the length of the list
		for i, v := range map[int]byte{0: 'X', 1: 2, answerFixed - 1: 5, at - 1: ' ', at: 1, at + 1: 0x11} {
			bad := bytes.Clone(head)
			bad[i] = v
			if got, err := readAnswer(io.MultiReader(bytes.NewReader(bad), neverRead{t})); err == nil {
				t.Errorf("readAnswer(%x) = %+v, want an error", bad, got)
			}
		}
	}
}

func FuzzReadAnswer(f *testing.F) {
	for _, vtep := range addrs("192.0.2.1:4789", "[2001:db8::1]:4789") {
		a := answer{name: "pi4", vtep: vtep, boot: 1, clock: 2, length: 3}
		f.Add(a.append(nil))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		r := bytes.NewReader(b)
		a, err := readAnswer(r)
		if err != nil {
			return
		}
		if again := a.append(nil); !bytes.Equal(again, b[:len(b)-r.Len()]) {
			t.Fatalf("readAnswer(%x) encodes to %x", b, again)
		}
	})
}

// neverRead fails the test if it is read.
type neverRead struct{ t *testing.T }

func (n neverRead) Read([]byte) (int, error) {
	n.t.Error("read after a bad header")
	return 0, io.EOF
}

// A node that answers rubbish, half a list, an old one, or as another node, is
// asked again until it says what its tags say.
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
	c := card{vtep: netip.MustParseAddrPort("192.0.2.9:4789"), boot: 7, digest: now.digest, count: 2}
	response := func(l *list, change func(*answer)) []byte {
		a := answer{name: "b", vtep: c.vtep, boot: c.boot, digest: l.digest, length: uint32(len(l.encoded))}
		change(&a)
		return append(a.append(nil), l.encoded...)
	}
	fine := func(*answer) {}
	good := response(now, fine)
	answers := [][]byte{
		[]byte("HTTP/1.1 400 Bad Request\r\n"), good[:len(good)-1], response(old, fine),
		response(old, func(a *answer) { a.digest = now.digest }),
		response(now, func(a *answer) { a.name = "c" }),
		response(now, func(a *answer) { a.vtep = netip.MustParseAddrPort("192.0.2.9:4790") }),
		response(now, func(a *answer) { a.boot++ }),
		good,
	}
	go func() {
		for _, a := range answers {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			_, _ = io.ReadFull(c, make([]byte, 3))
			_, _ = c.Write(a)
			_ = c.Close()
		}
	}()
	p := &peer{status: Alive, gossip: ln.Addr().(*net.TCPAddr).AddrPort(), pulling: true, wake: make(chan struct{}, 1), card: c}
	d.mu.Lock()
	d.peers["b"] = p
	d.mu.Unlock()
	ctx, cancel := context.WithTimeout(t.Context(), 40*time.Second)
	defer cancel()
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		d.pull(ctx, "b", p)
	}()
	for hurry := true; hurry; { // no need to wait for the backoff
		select {
		case <-ended:
			hurry = false
		case <-time.After(10 * time.Millisecond):
			ring(p.wake)
		}
	}
	if !p.confirmed || p.list == nil || p.list.digest != now.digest || p.pulling {
		t.Fatalf("after the pull: confirmed %v, list %v, pulling %v", p.confirmed, p.list, p.pulling)
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
	if _, err := ask(t.Context(), dialHost, question{at: addr}); err == nil || time.Since(begin) > exchangeTimeout+time.Second {
		t.Errorf("ask ended with %v after %v", err, time.Since(begin))
	}
	ctx, cancel := context.WithCancel(t.Context())
	time.AfterFunc(50*time.Millisecond, cancel)
	begin = time.Now()
	if _, err := ask(ctx, dialHost, question{at: addr}); err == nil || time.Since(begin) > time.Second {
		t.Errorf("cancelled ask ended with %v after %v", err, time.Since(begin))
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
