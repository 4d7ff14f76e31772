package main

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/iotest"
	"testing/synctest"
	"time"

	"github.com/tulle-net/tulle/node"
)

func TestStoreRecover(t *testing.T) {
	for _, tt := range []struct {
		answer   any
		out, err string
		status   int
	}{
		{node.StoreStatus{Quorum: true, Revision: 42}, "this keeper is the only one now, with revision 42 of the store; `tulle node promote NAME` makes another\n", "", exitDone},
		{node.StoreStatus{Error: "still\nstarting"}, "", "tulle: the store is not back yet: still?starting; `tulle store status` says when it is\n", exitFailed},
		{node.StoreStatus{}, "", "tulle: the store is not back yet: no reason is given; `tulle store status` says when it is\n", exitFailed},
	} {
		api := &recorder{answer: tt.answer}
		out, errOut, status := tulle(t, "store", "recover", "--yes", "--socket", serve(t, api))
		if status != tt.status || out != tt.out || errOut != tt.err {
			t.Errorf("store recover, %+v = %d, %q, stderr %q, want %d, %q, %q", tt.answer, status, out, errOut, tt.status, tt.out, tt.err)
		}
		if len(api.asked) != 1 || api.asked[0] != "POST /v1/store/recover" {
			t.Errorf("store recover asked %q", api.asked)
		}
	}
}

// snapshotOf answers with the parts of a snapshot, then calls end.
func snapshotOf(parts []string, end func(http.ResponseWriter)) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method != http.MethodGet || r.URL.Path != snapshotPath {
			http.NotFound(w, r)
			return
		}
		w.Header().Set("Content-Type", "application/octet-stream")
		for _, part := range parts {
			_, _ = io.WriteString(w, part)
			w.(http.Flusher).Flush()
		}
		if end != nil {
			end(w)
		}
	})
}

// namesIn lists what is in dir, the hidden too.
func namesIn(t *testing.T, dir string) string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var list []string
	for _, e := range entries {
		list = append(list, e.Name())
	}
	return strings.Join(list, " ")
}

func TestSnapshot(t *testing.T) {
	big := strings.Repeat("0123456789abcdef", 1<<16)
	socket := serve(t, snapshotOf([]string{"\x00\xff", big}, nil))
	dir := t.TempDir()
	path := filepath.Join(dir, "snap")
	out, errOut, status := tulle(t, "store", "snapshot", path, "--socket", socket)
	if want := "1.0MB in " + path + "; it holds the cluster's secrets: keep it where nobody else can read it\n"; status != exitDone || out != "" || errOut != want {
		t.Fatalf("snapshot = %d, %q, stderr %q, want %q", status, out, errOut, want)
	}
	got, err := os.ReadFile(path)
	if err != nil || string(got) != "\x00\xff"+big {
		t.Errorf("the file holds %d bytes, %v, want what was sent", len(got), err)
	}
	if info, err := os.Stat(path); err != nil || info.Mode() != 0o600 {
		t.Errorf("mode %v, %v, want 0600", info.Mode(), err)
	}
	if have := namesIn(t, dir); have != "snap" {
		t.Errorf("the folder holds %s", have)
	}

	other := serve(t, snapshotOf([]string{"new"}, nil))
	if err := os.Chmod(path, 0o644); err != nil {
		t.Fatal(err)
	}
	out, errOut, status = tulle(t, "store", "snapshot", path, "--socket", other)
	if status != exitFailed || out != "" || errOut != "tulle: "+path+" is there already: give another name, or --force to replace it\n" {
		t.Errorf("snapshot over a file = %d, %q, stderr %q", status, out, errOut)
	}
	if got, _ := os.ReadFile(path); string(got) != "\x00\xff"+big {
		t.Error("a snapshot replaced a file without --force")
	}
	if _, errOut, status = tulle(t, "store", "snapshot", path, "--force", "--socket", other); status != exitDone {
		t.Errorf("snapshot --force = %d, %s", status, errOut)
	}
	got, _ = os.ReadFile(path)
	if info, err := os.Stat(path); string(got) != "new" || err != nil || info.Mode() != 0o600 {
		t.Errorf("after --force: %q, %v, want the new one, of mode 0600", got, info.Mode())
	}
	if have := namesIn(t, dir); have != "snap" {
		t.Errorf("the folder holds %s", have)
	}

	out, errOut, status = tulle(t, "store", "snapshot", "-", "--socket", other)
	if status != exitDone || out != "new" || errOut != "3B; it holds the cluster's secrets: keep it where nobody else can read it\n" {
		t.Errorf("snapshot - = %d, %q, stderr %q", status, out, errOut)
	}
}

// TestSnapshotFails: whatever goes wrong, no file is there, and one that was is
// as it was.
func TestSnapshotFails(t *testing.T) {
	abort := func(http.ResponseWriter) { panic(http.ErrAbortHandler) }
	short := func(w http.ResponseWriter) { // says more than it sends
		conn, _, err := w.(http.Hijacker).Hijack()
		if err == nil {
			conn.Close()
		}
	}
	unbounded := http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { // an end that may be a cut
		conn, rw, err := w.(http.Hijacker).Hijack()
		if err != nil {
			return
		}
		_, _ = rw.WriteString("HTTP/1.0 200 OK\r\nContent-Type: application/octet-stream\r\n\r\nhalf")
		_ = rw.Flush()
		conn.Close()
	})
	for _, tt := range []struct {
		name string
		api  http.Handler
		want string
	}{
		{"half", snapshotOf([]string{"half of", "it"}, abort), "is not written: ask the node at "},
		{"cut", snapshotOf([]string{"half of", "it"}, short), "is not written: ask the node at "},
		{"no end", unbounded, "answers with something else: is it a Tulle of this version?"},
		{"empty", snapshotOf(nil, nil), "the node's answer is empty"},
		{"open cluster", fakeAPI{snapshotPath: node.Error{}}, "is not written: this is an open cluster: it has no keys\n"},
		{"old", http.NotFoundHandler(), "answers 404 Not Found: is it a Tulle of this version?"},
		{"other", fakeAPI{snapshotPath: "hello"}, "answers with something else"},
	} {
		socket := serve(t, tt.api)
		dir := t.TempDir()
		path := filepath.Join(dir, "snap")
		out, errOut, status := tulle(t, "store", "snapshot", path, "--socket", socket)
		if status != exitFailed || out != "" || !strings.HasPrefix(errOut, "tulle: "+path) || !strings.Contains(errOut, tt.want) || strings.Count(errOut, "\n") != 1 {
			t.Errorf("%s: snapshot = %d, %q, stderr %q, want %q", tt.name, status, out, errOut, tt.want)
		}
		if have := namesIn(t, dir); have != "" {
			t.Errorf("%s: it left %s", tt.name, have)
		}
		if err := os.WriteFile(path, []byte("before"), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, errOut, status := tulle(t, "store", "snapshot", path, "--force", "--socket", socket); status != exitFailed {
			t.Errorf("%s: snapshot --force = %d, %s", tt.name, status, errOut)
		}
		if got, _ := os.ReadFile(path); string(got) != "before" || namesIn(t, dir) != "snap" {
			t.Errorf("%s: with --force %q is there, in %s", tt.name, got, namesIn(t, dir))
		}
		if _, errOut, status := tulle(t, "store", "snapshot", "-", "--socket", socket); status != exitFailed || !strings.HasPrefix(errOut, "tulle: what is written is no snapshot: ") {
			t.Errorf("%s: snapshot - = %d, %q", tt.name, status, errOut)
		}
	}
}

// TestSnapshotTargets: what cannot be written to is found before the node is asked.
func TestSnapshotTargets(t *testing.T) {
	api := &recorder{}
	socket := serve(t, api)
	dir := t.TempDir()
	link, old := filepath.Join(dir, "link"), filepath.Join(dir, "old")
	if err := os.WriteFile(old, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("nowhere", link); err != nil {
		t.Fatal(err)
	}
	if _, errOut, status := tulle(t, "store", "snapshot", old, "--socket", socket); status != exitFailed || errOut != "tulle: "+taken(old).Error()+"\n" {
		t.Errorf("snapshot %s = %d, %q", old, status, errOut)
	}
	for _, tt := range []struct{ path, want string }{
		{dir, dir + " is there, and is no file: give another name"},
		{link, link + " is there, and is no file: give another name"},
		{filepath.Join(dir, "no", "snap"), "make a file beside " + dir + "/no/snap: "},
		{filepath.Join(link, "snap"), "make a file beside "},
	} {
		_, errOut, status := tulle(t, "store", "snapshot", tt.path, "--force", "--socket", socket)
		if status != exitFailed || !strings.HasPrefix(errOut, "tulle: "+tt.want) {
			t.Errorf("snapshot %s = %d, %q, want %q", tt.path, status, errOut, tt.want)
		}
	}
	if len(api.asked) > 0 {
		t.Errorf("the node was asked %q", api.asked)
	}
	if have := namesIn(t, dir); have != "link old" {
		t.Errorf("the folder holds %s", have)
	}
}

// TestSnapshotInterrupted: Ctrl-C in the middle leaves nothing.
func TestSnapshotInterrupted(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	gone := make(chan struct{})
	socket := serve(t, snapshotOf([]string{"half"}, func(http.ResponseWriter) { cancel(); <-gone }))
	defer close(gone)
	dir := t.TempDir()
	path := filepath.Join(dir, "snap")
	var out, errOut bytes.Buffer
	status := execute(ctx, []string{"store", "snapshot", path, "--socket", socket}, &out, &errOut)
	if status != exitFailed || errOut.String() != "tulle: "+path+" is not written: interrupted\n" {
		t.Errorf("snapshot, interrupted = %d, %q", status, &errOut)
	}
	if have := namesIn(t, dir); have != "" {
		t.Errorf("it left %s", have)
	}
}

func TestSnapshotNotToTerminal(t *testing.T) {
	tty, err := os.OpenFile("/dev/ptmx", os.O_RDWR, 0)
	if err != nil {
		t.Skip("no terminal can be made here: ", err)
	}
	defer tty.Close()
	api := &recorder{}
	var errOut bytes.Buffer
	status := execute(t.Context(), []string{"store", "snapshot", "-", "--socket", serve(t, api)}, tty, &errOut)
	if status != exitUsage || !strings.HasPrefix(errOut.String(), "tulle: standard output is a terminal") || len(api.asked) > 0 {
		t.Errorf("snapshot - on a terminal = %d, %q, asked %q", status, &errOut, api.asked)
	}
}

// TestWriteWhole: a name that is taken meanwhile stays whose it is.
func TestWriteWhole(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "f")
	err := writeWhole(path, false, func(w io.Writer) error {
		_, _ = io.WriteString(w, "mine")
		return os.WriteFile(path, []byte("theirs"), 0o600)
	})
	if err == nil || !strings.Contains(err.Error(), "is there already") {
		t.Errorf("writeWhole over a file that came meanwhile = %v", err)
	}
	if got, _ := os.ReadFile(path); string(got) != "theirs" || namesIn(t, dir) != "f" {
		t.Errorf("%q is there, in %s", got, namesIn(t, dir))
	}
}

// full is a disk that is.
type full struct{ after int }

var errFull = errors.New("no space left on device")

func (f *full) Write(b []byte) (int, error) {
	n := min(len(b), f.after)
	f.after -= n
	if n < len(b) {
		return n, errFull
	}
	return n, nil
}

// slow takes an hour for a write.
type slow struct{ got []byte }

func (s *slow) Write(b []byte) (int, error) {
	time.Sleep(time.Hour)
	s.got = append(s.got, b...)
	return len(b), nil
}

// TestPatient: only waiting for the node is bounded, not what is done with its answer.
func TestPatient(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		wait := time.AfterFunc(time.Second, func() { t.Error("a slow reader counts as a slow node") })
		var to slow
		body := &patient{r: iotest.OneByteReader(strings.NewReader("one")), wait: wait, atMost: time.Second}
		if n, err := io.Copy(&to, body); n != 3 || err != nil || body.err != nil || string(to.got) != "one" {
			t.Errorf("copied %d, %q, %v, %v", n, to.got, err, body.err)
		}
	})
	synctest.Test(t, func(t *testing.T) {
		end := make(chan struct{})
		wait := time.AfterFunc(time.Hour, func() { close(end) })
		body := &patient{r: readerFunc(func([]byte) (int, error) { <-end; return 0, io.ErrClosedPipe }), wait: wait, atMost: time.Second}
		before := time.Now()
		if _, err := body.Read(nil); err != io.ErrClosedPipe || body.err != err || time.Since(before) != time.Second {
			t.Errorf("Read = %v after %v, and keeps %v", err, time.Since(before), body.err)
		}
	})
}

type readerFunc func([]byte) (int, error)

func (f readerFunc) Read(b []byte) (int, error) { return f(b) }

// TestStream: a node that hangs is given up, and each fault is told as whose it is.
func TestStream(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	defer time.AfterFunc(10*time.Second, cancel).Stop() // a client that does not give up fails, and does not hang
	hang := make(chan struct{})
	defer close(hang)
	socket := serve(t, snapshotOf([]string{"one", "two"}, func(http.ResponseWriter) { <-hang }))
	c := newClient(socket)
	c.http.Timeout = 50 * time.Millisecond
	var out bytes.Buffer
	if n, err := c.stream(ctx, snapshotPath, &out); err == nil || !strings.Contains(err.Error(), "did not answer within 50ms") || n != 6 {
		t.Errorf("stream of a node that hangs = %d, %v", n, err)
	}
	mute := newClient(serve(t, http.HandlerFunc(func(http.ResponseWriter, *http.Request) { <-hang })))
	mute.http.Timeout = 50 * time.Millisecond
	if _, err := mute.stream(ctx, snapshotPath, &out); err == nil || !strings.Contains(err.Error(), "did not answer within 50ms") {
		t.Errorf("stream of a node that never answers = %v", err)
	}

	c = newClient(serve(t, snapshotOf([]string{"one", "two"}, nil)))
	if n, err := c.stream(t.Context(), snapshotPath, &full{after: 2}); err != errFull || n != 2 {
		t.Errorf("stream to a disk that is full = %d, %v", n, err)
	}
	none := newClient(filepath.Join(t.TempDir(), "none"))
	if _, err := none.stream(t.Context(), snapshotPath, &out); !errors.Is(err, errNoNode) {
		t.Errorf("stream without a node = %v", err)
	}
}

func TestProgress(t *testing.T) {
	var out, show bytes.Buffer
	p := &progress{w: &out, show: &show, next: time.Now().Add(time.Hour)}
	_, _ = p.Write([]byte("one"))
	p.next = time.Time{}
	_, _ = p.Write([]byte("two"))
	_, _ = p.Write([]byte("three")) // too soon
	if out.String() != "onetwothree" || show.String() != eraseLine+"6B" {
		t.Errorf("progress passed %q and showed %q", &out, &show)
	}
}
