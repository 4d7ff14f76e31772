package peer

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/tulle-net/tulle/peer/peertest"
)

// Bytes of both headers, as the package comment draws them.
func TestWire(t *testing.T) {
	req := appendRequest(nil, KindOverlays, 1500*time.Millisecond, 0x0102030405060708, []byte("abc"))
	want := []byte{1, 0, 0, 2, 0, 0, 5, 0xdc, 1, 2, 3, 4, 5, 6, 7, 8, 0, 0, 0, 3, 'a', 'b', 'c'}
	if !bytes.Equal(req, want) {
		t.Errorf("appendRequest = %x, want %x", req, want)
	}
	h, err := readRequest(bytes.NewReader(req))
	if err != nil || h != (request{KindOverlays, 1500 * time.Millisecond, 0x0102030405060708, 3}) {
		t.Errorf("readRequest(%x) = %+v, %v", req, h, err)
	}
	if got, err := readPayload(bytes.NewReader(req[requestHeader:]), 3); err != nil || string(got) != "abc" {
		t.Errorf("readPayload = %q, %v", got, err)
	}
	for i := range req {
		r := bytes.NewReader(req[:i])
		h, err := readRequest(r)
		if err == nil {
			_, err = readPayload(r, h.length)
		}
		if !errors.Is(err, ErrMalformed) {
			t.Errorf("request truncated to %d bytes: %v", i, err)
		}
	}
	for b, want := range map[string]error{
		"\x02":                                  ErrVersion,
		"\x01\x01" + strings.Repeat("\x00", 18): ErrMalformed,
		"\x01\x00" + strings.Repeat("\xff", 18): ErrTooLarge,
	} {
		if _, err := readRequest(strings.NewReader(b)); !errors.Is(err, want) {
			t.Errorf("readRequest(%x) = %v, want %v", b, err, want)
		}
	}
	if _, err := readPayload(strings.NewReader("abcd"), 3); !errors.Is(err, ErrMalformed) {
		t.Errorf("bytes behind a payload: %v", err)
	}

	done := appendResponse(nil, []byte("yes"), nil)
	if want := []byte{1, 0, 0, 0, 0, 0, 0, 3, 'y', 'e', 's'}; !bytes.Equal(done, want) {
		t.Errorf("appendResponse = %x, want %x", done, want)
	}
	failed := appendResponse(nil, nil, ErrNotKeeper)
	if want := append([]byte{1, 1, 0, 7, 0, 0, 0, byte(len(ErrNotKeeper.Text))}, ErrNotKeeper.Text...); !bytes.Equal(failed, want) {
		t.Errorf("appendResponse = %x, want %x", failed, want)
	}
	if got, err := readResponse(bytes.NewReader(done), 3); err != nil || string(got) != "yes" {
		t.Errorf("readResponse(%x) = %q, %v", done, got, err)
	}
	if _, err := readResponse(bytes.NewReader(failed), 100); !errors.Is(err, ErrNotKeeper) || errors.Is(err, ErrBusy) {
		t.Errorf("readResponse(%x) = %v", failed, err)
	}
	for _, whole := range [][]byte{done, failed} {
		for i := range whole {
			_, err := readResponse(bytes.NewReader(whole[:i]), 100)
			if _, told := errors.AsType[*Error](err); err == nil || told {
				t.Errorf("response truncated to %d bytes: %v", i, err)
			}
		}
	}
	if _, err := readResponse(bytes.NewReader(done), 2); err == nil {
		t.Error("a response over its limit is read")
	}
	if _, err := readResponse(strings.NewReader("\x01\x01\x00\x00\x00\x00\x00\x05a\x1b[2J"), 100); err == nil || strings.Contains(err.Error(), "\x1b") {
		t.Errorf("text with an escape: %q", err)
	}
}

func TestErrorText(t *testing.T) {
	long := asError(fmt.Errorf("%s%s", strings.Repeat("a", maxErrorText-1), "ää"))
	if long.Code != CodeFailed || long.Text != strings.Repeat("a", maxErrorText-1) {
		t.Errorf("cut to %d bytes: %q", len(long.Text), long.Text[maxErrorText-4:])
	}
	if e := asError(fmt.Errorf("x: %w", ErrDenied)); e.Code != CodeDenied {
		t.Errorf("code %d", e.Code)
	}
}

// FuzzRequest reads what a peer may send; FuzzResponse what it may answer.
func FuzzRequest(f *testing.F) {
	f.Add(appendRequest(nil, KindWhoami, time.Second, 1, nil))
	f.Add(appendRequest(nil, KindKeeper, time.Second, 1, []byte("abcdef")))
	f.Add([]byte{2})
	f.Fuzz(func(t *testing.T, b []byte) {
		r := bytes.NewReader(b)
		h, err := readRequest(r)
		if err != nil || h.length > 1<<16 {
			return
		}
		payload, err := readPayload(r, h.length)
		if err != nil {
			return
		}
		if again := appendRequest(nil, h.kind, h.patience, h.id, payload); h.patience >= time.Millisecond && h.patience <= 1<<31*time.Millisecond && !bytes.Equal(again, b) {
			t.Fatalf("%x was read as %x", b, again)
		}
	})
}

func FuzzResponse(f *testing.F) {
	f.Add(appendResponse(nil, []byte("abc"), nil))
	f.Add(appendResponse(nil, nil, ErrBusy))
	f.Fuzz(func(t *testing.T, b []byte) {
		payload, err := readResponse(bytes.NewReader(b), 1<<16)
		if err == nil && !bytes.Equal(appendResponse(nil, payload, nil)[4:], b[4:]) {
			t.Fatalf("%x was read as %x", b, payload)
		}
	})
}

// rawStream opens a stream to the peer, to write what Request would not.
func rawStream(t *testing.T, e *Endpoint, name string) interface {
	io.ReadWriteCloser
	SetDeadline(time.Time) error
} {
	t.Helper()
	c, err := e.conn(within(t, 5*time.Second), name)
	if err != nil {
		t.Fatal(err)
	}
	s, err := c.q.OpenStreamSync(within(t, 5*time.Second))
	if err != nil {
		t.Fatal(err)
	}
	_ = s.SetDeadline(time.Now().Add(10 * time.Second))
	return s
}

// Requests that are not what they should be get an answer that says so, cost a
// stream, and leave the connection alone.
func TestBadRequests(t *testing.T) {
	c := newCluster(t, peertest.NewNet(20))
	a := c.node("a")
	b := c.node("b", func(cfg *Config) { cfg.Limits.ReadTimeout = 200 * time.Millisecond })
	b.Handle(kindEcho, 100, echo)
	whole := appendRequest(nil, kindEcho, time.Second, 1, []byte("0123456789"))
	big := bytes.Clone(whole)
	binary.BigEndian.PutUint32(big[16:], 101)
	huge := bytes.Clone(whole)
	binary.BigEndian.PutUint32(huge[16:], 1<<31)
	kind := bytes.Clone(whole)
	kind[2] = 0x7f
	version := bytes.Clone(whole)
	version[0] = 9
	s := b.Stats()
	for _, x := range []struct {
		name  string
		bytes []byte
		open  bool // the stream is left open
		want  error
		count func() uint64
	}{
		{"too large", big, false, ErrTooLarge, s.TooLarge.Load},
		{"far too large", huge, false, ErrTooLarge, s.TooLarge.Load},
		{"too large, and more to come", big, true, ErrTooLarge, s.TooLarge.Load},
		{"truncated", whole[:len(whole)-1], false, ErrMalformed, s.Malformed.Load},
		{"truncated header", whole[:5], false, ErrMalformed, s.Malformed.Load},
		{"empty", nil, false, ErrMalformed, s.Malformed.Load},
		{"more than it says", append(bytes.Clone(whole), 'x'), false, ErrMalformed, s.Malformed.Load},
		{"unknown kind", kind, false, ErrKind, s.BadKind.Load},
		{"join among nodes", appendRequest(nil, kindJoin, time.Second, 1, nil), false, ErrKind, s.BadKind.Load},
		{"unknown version", version, false, ErrVersion, s.BadVersion.Load},
		{"slow", whole[:len(whole)-1], true, ErrTimeout, s.Slow.Load},
		{"slow header", whole[:1], true, ErrTimeout, s.Slow.Load},
		{"no end", whole, true, ErrTimeout, s.Slow.Load},
	} {
		t.Run(x.name, func(t *testing.T) {
			before := x.count()
			s := rawStream(t, a, "b")
			if _, err := s.Write(x.bytes); err != nil {
				t.Fatal(err)
			}
			if !x.open {
				_ = s.Close()
			}
			_, err := readResponse(s, 1000)
			if !errors.Is(err, x.want) {
				t.Errorf("answer: %v, want %v", err, x.want)
			}
			if n := x.count() - before; n != 1 {
				t.Errorf("counted %d times", n)
			}
		})
	}
	if got, err := a.Request(within(t, 5*time.Second), "b", kindEcho, []byte("still here")); err != nil || string(got) != "a says still here" {
		t.Errorf("afterwards: %q, %v", got, err)
	}
	if n := len(b.Conns()); n != 1 || a.Stats().Dials.Load() != 1 {
		t.Errorf("%d connections, %d dials", n, a.Stats().Dials.Load())
	}
}

// Errors of handlers travel as code and text; deadlines and cancels reach them.
func TestHandlers(t *testing.T) {
	c := newCluster(t, peertest.NewNet(21))
	a, b := c.node("a"), c.node("b", func(cfg *Config) { cfg.Limits.RequestTimeout = 300 * time.Millisecond })
	ctx := within(t, 20*time.Second)
	b.Handle(400, 0, func(context.Context, Peer, []byte) ([]byte, error) { return nil, Errorf(1234, "no %s today", "tea") })
	b.Handle(401, 0, func(context.Context, Peer, []byte) ([]byte, error) { return nil, errors.New("plain") })
	b.Handle(402, 0, func(context.Context, Peer, []byte) ([]byte, error) { return make([]byte, maxResponse+1), nil })
	ended := make(chan error, 2)
	b.Handle(403, 0, func(ctx context.Context, _ Peer, _ []byte) ([]byte, error) {
		<-ctx.Done()
		ended <- ctx.Err()
		return nil, ctx.Err()
	})
	b.Handle(404, 0, func(_ context.Context, p Peer, _ []byte) ([]byte, error) {
		return p.Export("EXPORTER-test", []byte(p.Name), 32)
	})
	for k, want := range map[Kind]*Error{400: {1234, ""}, 401: {CodeFailed, ""}, 402: {CodeTooLarge, ""}} {
		_, err := a.Request(ctx, "b", k, nil)
		if !errors.Is(err, want) {
			t.Errorf("kind %d: %v", k, err)
		}
		if k == 400 && !strings.Contains(err.Error(), "node b: no tea today") {
			t.Errorf("kind %d: %v", k, err)
		}
	}
	// The server's own limit.
	if _, err := a.Request(ctx, "b", 403, nil); err == nil {
		t.Error("a request without end was answered")
	}
	if err := <-ended; !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("the handler ended with %v", err)
	}
	// The client gives up.
	short, cancel := context.WithCancel(ctx)
	time.AfterFunc(50*time.Millisecond, cancel)
	if _, err := a.Request(short, "b", 403, nil); !errors.Is(err, context.Canceled) {
		t.Errorf("a cancelled request: %v", err)
	}
	if err := <-ended; !errors.Is(err, context.Canceled) {
		t.Errorf("the handler ended with %v", err)
	}
	key, err := a.Request(ctx, "b", 404, nil)
	if err != nil {
		t.Fatal(err)
	}
	state := a.open()[0].q.ConnectionState().TLS
	if mine, err := state.ExportKeyingMaterial("EXPORTER-test", []byte("a"), 32); err != nil || !bytes.Equal(mine, key) {
		t.Errorf("exported keys differ: %x, %x, %v", mine, key, err)
	}
}

// One peer has no more than its share of requests at once, all together no more
// than all.
func TestRequestLimits(t *testing.T) {
	c := newCluster(t, peertest.NewNet(22))
	hub := c.node("hub", func(cfg *Config) { cfg.Limits.Streams, cfg.Limits.Requests = 4, 6 })
	release := make(chan struct{})
	var mu sync.Mutex
	running, most := map[string]int{}, 0
	hub.Handle(kindEcho, 10, func(_ context.Context, p Peer, _ []byte) ([]byte, error) {
		mu.Lock()
		running[p.Name]++
		most = max(most, running[p.Name])
		mu.Unlock()
		<-release
		mu.Lock()
		running[p.Name]--
		mu.Unlock()
		return nil, nil
	})
	ctx := within(t, 20*time.Second)
	var wg sync.WaitGroup
	var busy int
	ask := func(e *Endpoint) {
		if _, err := e.Request(ctx, "hub", kindEcho, nil); errors.Is(err, ErrBusy) {
			mu.Lock()
			busy++
			mu.Unlock()
		} else if err != nil {
			t.Error(err)
		}
	}
	all := func() (n int) {
		mu.Lock()
		defer mu.Unlock()
		for _, r := range running {
			n += r
		}
		return n
	}
	a, b := c.node("a"), c.node("b")
	for range 8 {
		wg.Go(func() { ask(a) })
	}
	eventually(t, "a has its four", func() bool { return all() == 4 })
	for range 4 {
		wg.Go(func() { ask(b) })
	}
	eventually(t, "six in all, two refused", func() bool { return all() == 6 && hub.Stats().Busy.Load() == 2 })
	close(release)
	wg.Wait()
	if most != 4 || busy != 2 {
		t.Errorf("at most %d at once of one peer, want 4; %d refused, want 2", most, busy)
	}
}

// A keeper that cannot answer is passed over; what one tells is final.
func TestAsk(t *testing.T) {
	c := newCluster(t, peertest.NewNet(23))
	a := c.node("a", func(cfg *Config) { cfg.Keepers = func() []string { return []string{"gone", "k1", "k2"} } })
	k1, k2 := c.node("k1"), c.node("k2")
	k1.HandleKeeper(10, func(context.Context, Peer, uint16, []byte) ([]byte, error) { return nil, ErrNotKeeper })
	k2.HandleKeeper(10, func(_ context.Context, p Peer, sub uint16, body []byte) ([]byte, error) {
		if sub == 9 {
			return nil, ErrDenied
		}
		return fmt.Appendf(nil, "%s %d %s %v", p.Name, sub, body, p.Rights.Overlays.Allow("blue")), nil
	})
	ctx := within(t, 20*time.Second)
	if got, err := a.Ask(ctx, 7, []byte("x")); err != nil || string(got) != "a 7 x true" {
		t.Errorf("Ask = %q, %v", got, err)
	}
	if _, err := a.Ask(ctx, 9, nil); !errors.Is(err, ErrDenied) {
		t.Errorf("denied: %v", err)
	}
	if _, err := k2.Ask(ctx, 7, nil); !errors.Is(err, ErrNoKeeper) {
		t.Errorf("without a keeper: %v", err)
	}
	if _, err := a.Request(ctx, "k2", KindKeeper, []byte{1}); !errors.Is(err, ErrMalformed) {
		t.Errorf("without a sub-kind: %v", err)
	}
}

func TestHandleTwicePanics(t *testing.T) {
	e := newCluster(t, peertest.NewNet(24)).node("a")
	defer func() {
		if recover() == nil {
			t.Error("a second handler was taken")
		}
	}()
	e.Handle(KindWhoami, 0, echo)
}

func TestClosed(t *testing.T) {
	c := newCluster(t, peertest.NewNet(25))
	a, b := c.node("a"), c.node("b")
	ctx := within(t, 5*time.Second)
	if _, err := a.Whoami(ctx, "b"); err != nil {
		t.Fatal(err)
	}
	if err := b.Close(); err != nil {
		t.Fatal(err)
	}
	eventually(t, "a was told", func() bool { return len(a.Conns()) == 0 })
	if _, err := b.Whoami(ctx, "a"); !errors.Is(err, ErrClosed) {
		t.Errorf("after Close: %v", err)
	}
	b.Deliver(c.addrs["a"], make([]byte, 1200))
	if err := b.Close(); err != nil {
		t.Errorf("second Close: %v", err)
	}
}
