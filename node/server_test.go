package node

import (
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestClaimSocket(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "run", "s")
	s, err := claimSocket(path, nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(path); err == nil {
		t.Error("the socket is there before the API is ready")
	}
	if err := s.serve(&Node{}); err != nil {
		t.Fatal(err)
	}
	i, err := os.Stat(path)
	if err != nil || i.Mode() != os.ModeSocket|0o600 {
		t.Fatalf("socket: %v, %v; want mode 0600", i, err)
	}
	if _, err := claimSocket(path, nil); err == nil || !strings.Contains(err.Error(), "running already") {
		t.Errorf("a second claim: %v, want that a node is running already", err)
	}
	if err := s.close(false); err != nil {
		t.Fatal(err)
	}
	if left, _ := os.ReadDir(filepath.Dir(path)); len(left) != 0 {
		t.Errorf("left behind: %v", left)
	}

	// A node that was killed leaves its socket: it is replaced.
	stale, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	stale.SetUnlinkOnClose(false)
	stale.Close()
	s, err = claimSocket(path, nil)
	if err != nil {
		t.Fatalf("with a stale socket: %v", err)
	}
	if err := s.serve(&Node{}); err != nil {
		t.Fatal(err)
	}
	s.close(false)

	// What is no socket is not touched.
	if err := os.WriteFile(path, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := claimSocket(path, nil); err == nil {
		t.Error("a file at the socket's path: want an error")
	}
	if b, _ := os.ReadFile(path); string(b) != "precious" {
		t.Error("a file at the socket's path was changed")
	}
	if _, err := claimSocket(filepath.Join(dir, strings.Repeat("x", 120)), nil); err == nil {
		t.Error("a path of more than 107 bytes: want an error")
	}
}

func TestStateDirLock(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "state")
	s, err := openStateDir(dir, nil)
	if err != nil {
		t.Fatal(err)
	}
	if i, err := os.Stat(dir); err != nil || i.Mode().Perm() != 0o700 {
		t.Errorf("state directory: %v, %v; want mode 0700", i, err)
	}
	if _, err := openStateDir(dir, nil); err == nil || !strings.Contains(err.Error(), "--state-dir") {
		t.Errorf("a second node on it: %v, want an error that names --state-dir", err)
	}
	if err := s.close(); err != nil {
		t.Fatal(err)
	}
	if s, err = openStateDir(dir, nil); err != nil {
		t.Errorf("after the first has gone: %v", err)
	} else {
		s.close()
	}
}
