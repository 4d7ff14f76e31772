package node

import (
	"context"
	"net"
	"net/http"
	"path/filepath"
	"testing"
	"time"
)

// TestLockHandedOver: who has the lock of the process before goes on with the state
// directory while that process is there; nobody else does.
func TestLockHandedOver(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "state")
	before, err := openStateDir(dir, nil)
	if err != nil {
		t.Fatal(err)
	}
	files, err := duplicate(before.lock)
	if err != nil {
		t.Fatal(err)
	}
	after, err := openStateDir(dir, first(files))
	if err != nil {
		t.Fatal(err)
	}
	if err := before.close(); err != nil {
		t.Fatal(err)
	}
	if s, err := openStateDir(dir, nil); err == nil {
		s.close()
		t.Error("a third one has the state directory")
	}
	if err := after.close(); err != nil {
		t.Fatal(err)
	}
	// Another directory's lock is no lock of this one.
	elsewhere, err := openStateDir(filepath.Join(t.TempDir(), "other"), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer elsewhere.close()
	if files, err = duplicate(elsewhere.lock); err != nil {
		t.Fatal(err)
	}
	s, err := openStateDir(dir, first(files))
	if err != nil {
		t.Fatal(err)
	}
	defer s.close()
	if _, err := openStateDir(dir, nil); err == nil {
		t.Error("the directory is not locked by the lock of another")
	}
}

// TestSocketHandedOver: a request that comes between two processes is answered by the second.
func TestSocketHandedOver(t *testing.T) {
	path := filepath.Join(t.TempDir(), "api")
	before, err := claimSocket(path, nil)
	if err != nil {
		t.Fatal(err)
	}
	if files, _ := before.descriptor(); files != nil {
		t.Error("a socket that does not answer yet is handed over")
	}
	if err := before.serve(&Node{}); err != nil {
		t.Fatal(err)
	}
	files, err := before.descriptor()
	if err != nil || len(files) != 1 {
		t.Fatalf("descriptor() = %v, %v", files, err)
	}
	before.close(true)
	c, err := net.DialTimeout("unix", path, time.Second)
	if err != nil {
		t.Fatalf("between two processes: %v", err)
	}
	defer c.Close()
	after, err := claimSocket(path, first(files))
	if err != nil {
		t.Fatal(err)
	}
	defer after.close(false)
	if err := after.serve(&Node{}); err != nil {
		t.Fatal(err)
	}
	client := http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(context.Context, string, string) (net.Conn, error) { return c, nil }}}
	r, err := client.Get("http://tulle/v1/none")
	if err != nil {
		t.Fatal(err)
	}
	r.Body.Close()
	if r.StatusCode != http.StatusNotFound {
		t.Errorf("status %d, want 404", r.StatusCode)
	}
	after.close(false)
	if _, err := net.DialTimeout("unix", path, time.Second); err == nil {
		t.Error("the socket is there after the second one's end")
	}
}
