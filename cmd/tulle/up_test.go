package main

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/tulle-net/tulle/config"
	"github.com/tulle-net/tulle/handover"
)

// settingsOf returns what `tulle up` would run with.
func settingsOf(t *testing.T, args ...string) (config.Config, error) {
	t.Helper()
	root := newRoot()
	cmd, rest, err := root.Find(append([]string{"up"}, args...))
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.ParseFlags(rest); err != nil {
		t.Fatal(err)
	}
	return settings(cmd)
}

func TestFlagsWinOverTheFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "tulle.yaml")
	const file = `{name: file, gossip: ":7000", join: [192.0.2.1], socket: /tmp/file.sock, overlays: [{name: blue, vni: 1, encryption: none}]}`
	if err := os.WriteFile(path, []byte(file), 0o600); err != nil {
		t.Fatal(err)
	}
	c, err := settingsOf(t, "--config", path)
	if err != nil {
		t.Fatal(err)
	}
	if c.Name != "file" || c.Gossip.Port() != 7000 || c.Socket != "/tmp/file.sock" || len(c.Overlays) != 1 || c.StateDir != config.DefaultStateDir {
		t.Errorf("from the file: %+v", c)
	}
	c, err = settingsOf(t, "--config", path, "--name", "flag", "--listen", ":8472", "--advertise", "192.0.2.7", "--gossip", ":7001", "--state-dir", "/tmp/s",
		"--join", "a,b:1", "--join", "c", "--socket", "/tmp/flag.sock", "--overlay", "name=red,vni=2,encryption=none,peer=192.0.2.9,peer=192.0.2.10")
	if err != nil {
		t.Fatal(err)
	}
	if c.Name != "flag" || c.Listen.Port() != 8472 || c.Advertise.String() != "192.0.2.7" || c.Gossip.Port() != 7001 || c.StateDir != "/tmp/s" ||
		strings.Join(c.Join, " ") != "a b:1 c" || c.Socket != "/tmp/flag.sock" {
		t.Errorf("flags do not win: %+v", c)
	}
	if len(c.Overlays) != 2 || c.Overlays[1].Name != "red" || len(c.Overlays[1].Peers) != 2 {
		t.Errorf("--overlay does not add: %+v", c.Overlays)
	}
	t.Setenv("TULLE_SOCKET", "/tmp/env.sock")
	if c, err = settingsOf(t, "--config", path); err != nil || c.Socket != "/tmp/env.sock" {
		t.Errorf("TULLE_SOCKET does not win over the file: %s, %v", c.Socket, err)
	}
	t.Setenv("TULLE_TOKEN", "of-the-environment")
	if c, err = settingsOf(t, "--config", path); err != nil || string(c.Token) != "of-the-environment" {
		t.Errorf("TULLE_TOKEN is not the token: %v", err)
	}
	if c, err = settingsOf(t, "--config", path, "--token", "of-the-flag"); err != nil || string(c.Token) != "of-the-flag" {
		t.Errorf("--token does not win over TULLE_TOKEN: %v", err)
	}
}

func TestTokenIsNotShown(t *testing.T) {
	_, errOut, status := tulle(t, "up", "--name", "n_1", "--token", "hunter2")
	if status != exitFailed || strings.Contains(errOut, "hunter2") || !strings.Contains(errOut, "config: name \"n_1\"") {
		t.Errorf("up --token = %d, %s", status, errOut)
	}
}

func TestUntilSignal(t *testing.T) {
	boom := errors.New("boom")
	for _, tt := range []struct {
		name    string
		signals int
		run     func(context.Context) error
		want    string
	}{
		{"ends by itself", 0, func(context.Context) error { return boom }, "boom"},
		{"graceful", 1, func(ctx context.Context) error { <-ctx.Done(); return nil }, ""},
		{"graceful, failing", 1, func(ctx context.Context) error { <-ctx.Done(); return boom }, "boom"},
	} {
		sigs := make(chan os.Signal, 2)
		for range tt.signals {
			sigs <- syscall.SIGTERM
		}
		if err := untilSignal(t.Context(), sigs, tt.run); (err == nil) != (tt.want == "") || err != nil && err.Error() != tt.want {
			t.Errorf("%s: %v, want %q", tt.name, err, tt.want)
		}
	}
}

func TestSecondSignalDoesNotWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		hang := make(chan struct{})
		defer close(hang)
		sigs := make(chan os.Signal)
		go func() {
			sigs <- syscall.SIGTERM
			sigs <- syscall.SIGTERM // as timeout(1) does: once to the process, once to its group
			time.Sleep(2 * onePress)
			sigs <- syscall.SIGINT
		}()
		start := time.Now()
		err := untilSignal(t.Context(), sigs, func(context.Context) error { <-hang; return nil })
		if err == nil || !strings.Contains(err.Error(), "ended at once by a second signal (interrupt)") {
			t.Errorf("untilSignal = %v", err)
		}
		if took := time.Since(start); took != 2*onePress {
			t.Errorf("ended after %v, want %v: two signals at once are one", took, 2*onePress)
		}
	})
}

func TestNotify(t *testing.T) {
	var out bytes.Buffer
	log := slog.New(slog.NewTextHandler(&out, nil))
	l := life{log: log}
	l.notify("READY=1") // nobody waits
	path := filepath.Join(t.TempDir(), "notify")
	c, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	t.Setenv("NOTIFY_SOCKET", path)
	l.service, _ = handover.FromService()
	l.notify("READY=1")
	b := make([]byte, 64)
	n, err := c.Read(b)
	if err != nil || string(b[:n]) != "READY=1" || out.Len() > 0 {
		t.Errorf("notify = %q, %v, log %q", b[:n], err, &out)
	}
	c.Close()
	l.notify("STOPPING=1")
	if !strings.Contains(out.String(), "systemd was not told") {
		t.Errorf("a socket that is gone: log %q", &out)
	}
}

func TestNewLog(t *testing.T) {
	var out bytes.Buffer
	log := newLog(&out, "warn", "json")
	log.Info("hidden")
	log.Warn("shown", "peer", "n2")
	if s := out.String(); !strings.HasPrefix(s, "{") || strings.Contains(s, "hidden") || !strings.Contains(s, `"peer":"n2"`) {
		t.Errorf("log = %q", s)
	}
	out.Reset()
	newLog(&out, "debug", "text").Debug("shown")
	if !strings.Contains(out.String(), "level=DEBUG msg=shown") {
		t.Errorf("log = %q", &out)
	}
}
