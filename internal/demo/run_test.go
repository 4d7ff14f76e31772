package demo_test

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// build makes the real binary, in a folder that nobody (65534) can enter too.
func build(t *testing.T) string {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	dir, err := os.MkdirTemp("", "tulledemotest")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	exe := filepath.Join(dir, "tulle")
	cmd := exec.Command("go", "build", "-o", exe, "../../cmd/tulle")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("go build: %v\n%s", err, out)
	}
	return exe
}

// play runs `tulle demo args`, sends sig when a line contains at, and returns
// the exit status and what it wrote.
func play(t *testing.T, exe string, sig syscall.Signal, at string, args ...string) (status int, output string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, exe, append([]string{"demo"}, args...)...)
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	var all bytes.Buffer
	cmd.Stderr = &all
	pipe, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewScanner(pipe)
	var said []string
	for lines.Scan() {
		said = append(said, lines.Text())
		if at != "" && strings.Contains(lines.Text(), at) {
			cmd.Process.Signal(sig)
		}
	}
	var exit *exec.ExitError
	if err := cmd.Wait(); err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	return cmd.ProcessState.ExitCode(), strings.Join(said, "\n") + "\n" + all.String() + leftBy(t, cmd.Process.Pid)
}

// leftBy is empty when nothing is left of a process's demo.
func leftBy(t *testing.T, pid int) string {
	t.Helper()
	var left []string
	for _, dir := range []string{"/run/netns", os.TempDir()} {
		found, err := filepath.Glob(filepath.Join(dir, "tulledemo"+strconv.Itoa(pid)+"-*"))
		if err != nil {
			t.Fatal(err)
		}
		left = append(left, found...)
	}
	if len(left) == 0 {
		return ""
	}
	return "\nLEFT BEHIND: " + strings.Join(left, " ")
}

// TestPrivilegedDemo plays the whole demo and ends --keep by Ctrl-C.
func TestPrivilegedDemo(t *testing.T) {
	exe := build(t)
	status, out := play(t, exe, syscall.SIGINT, "Ctrl-C here", "--keep")
	const claims = 15
	if status != 0 || strings.Count(out, "\n  ok  ") != claims-1 || !strings.Contains(out, "\nNothing is left") ||
		strings.Contains(out, "FAILED") || strings.Contains(out, "LEFT BEHIND") {
		t.Errorf("status %d, want 0 and %d claims:\n%s", status, claims, out)
	}
}

// TestPrivilegedDemoEndsEarly interrupts it, kills it, and takes its rights.
func TestPrivilegedDemoEndsEarly(t *testing.T) {
	exe := build(t)
	status, out := play(t, exe, syscall.SIGTERM, "[3/12]")
	if status != 1 || !strings.Contains(out, "demo: interrupted") || strings.Contains(out, "LEFT BEHIND") {
		t.Errorf("SIGTERM: status %d, want 1 and nothing left:\n%s", status, out)
	}
	// What SIGKILL leaves, the next run removes.
	if _, out = play(t, exe, syscall.SIGKILL, "[2/12]"); !strings.Contains(out, "LEFT BEHIND: /run/netns/") {
		t.Errorf("SIGKILL: nothing was left to sweep:\n%s", out)
	}
	_, rest, _ := strings.Cut(out, "LEFT BEHIND: ")
	status, out = play(t, exe, syscall.SIGINT, "[2/12]")
	if status != 1 || !strings.Contains(out, "removed 4 namespaces") {
		t.Errorf("after SIGKILL: status %d, want 1 and 4 namespaces swept:\n%s", status, out)
	}
	for _, path := range strings.Fields(rest) {
		if _, err := os.Lstat(path); err == nil {
			t.Errorf("%s was not swept", path)
		}
	}
	cmd := exec.Command(exe, "demo")
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	b, err := cmd.CombinedOutput()
	if err == nil || strings.Count(string(b), "\n") != 1 || !strings.Contains(string(b), "sudo tulle demo") {
		t.Errorf("without root: %v, want one line that says how:\n%s", err, b)
	}
}
