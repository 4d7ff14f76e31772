package e2e

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/tulle-net/tulle/internal/lab"
)

//	a (first node, keeper) ──┐
//	b (joins by token) ──────┼─[ul]
//	c (joins by token) ──────┘
//
// A secure cluster from nothing: it forms, and comes back after whatever stops
// its nodes.

// secured is overlay, encrypted.
func secured(i int, more ...string) string {
	return strings.Join(append([]string{"name=blue,vni=100,tap=blue0", fmt.Sprintf("address=10.32.0.%d/16", i)}, more...), ",")
}

// command runs a subcommand of tulle against the node to its end.
func (n *tulle) command(args ...string) (status int, stdout, stderr string) {
	n.t.Helper()
	return runTulle(n.t, n.host, append([]string{"--socket", n.sock}, args...)...)
}

// do is command; it must succeed.
func (n *tulle) do(args ...string) (stdout string) {
	n.t.Helper()
	status, stdout, stderr := n.command(args...)
	if status != 0 {
		n.t.Fatalf("%s: tulle %s: status %d: %s", n.name, strings.Join(args, " "), status, stderr)
	}
	return stdout
}

// runTulle runs tulle on a host to its end, which must come by itself.
func runTulle(t *testing.T, h *lab.Host, args ...string) (status int, stdout, stderr string) {
	t.Helper()
	var out, errs bytes.Buffer
	cmd := exec.Command(binary, args...)
	cmd.Stdout, cmd.Stderr = &out, &errs
	p, err := h.Start(cmd)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 40*time.Second)
	defer cancel()
	defer context.AfterFunc(ctx, p.Kill)()
	err = p.Wait()
	if ctx.Err() != nil {
		t.Fatalf("%s: tulle %s goes on:\n%s", h.Name(), strings.Join(args, " "), errs.String())
	}
	if err != nil {
		exit, ok := errors.AsType[*exec.ExitError](err)
		if !ok || !exit.Exited() {
			t.Fatalf("%s: tulle %s: %v\n%s", h.Name(), strings.Join(args, " "), err, errs.String())
		}
		status = exit.ExitCode()
	}
	return status, out.String(), errs.String()
}

// token has the node make one.
func (n *tulle) token(args ...string) string {
	n.t.Helper()
	out := n.do(append([]string{"token", "create"}, args...)...)
	token, ended := strings.CutSuffix(out, "\n")
	if !ended || token == "" || strings.ContainsAny(token, " \n") {
		n.t.Fatalf("token create prints %q, want a token and a newline", out)
	}
	return token
}

// stop ends a node as SIGTERM does.
func (n *tulle) stop() {
	n.t.Helper()
	if err := n.proc.Stop(15 * time.Second); err != nil {
		n.t.Fatalf("%s: %v", n.name, err)
	}
}

// kill ends a node as kill -9 does.
func (n *tulle) kill() {
	n.proc.Kill()
	<-n.proc.Done()
}

// stateDir is where n keeps what it is.
func (n *tulle) stateDir() string {
	return n.args[slices.Index(n.args, "--state-dir")+1]
}

// meet waits until all nodes see each other alive.
func meet(t *testing.T, within time.Duration, nodes ...*tulle) time.Duration {
	t.Helper()
	return eventually(t, within, "all nodes see each other", func() bool {
		for _, n := range nodes {
			for _, m := range nodes {
				if n != m && n.sees(m.name) != "alive" {
					return false
				}
			}
		}
		return true
	})
}

// reachable waits until every sealed address answers from every host; node i
// has address(i+1).
func reachable(t *testing.T, within time.Duration, nodes ...*tulle) {
	t.Helper()
	for i, n := range nodes {
		for j := range nodes {
			if i != j {
				ping(t, n.host, address(j+1), within)
			}
		}
	}
}

// secureCluster makes a cluster of n nodes on n hosts, each with the sealed
// overlay, and some hosts without a node.
func secureCluster(t *testing.T, n, spare int) (*lab.Lab, *lab.Switch, []*tulle, []*lab.Host) {
	t.Helper()
	l, sw, h := hosts(t, n+spare, lab.Underlay{Prefix4: underlay4, Offloads: lab.Wire})
	nodes := []*tulle{up(t, l, h[0], "--overlay", secured(1))}
	if n > 1 {
		token := nodes[0].token("--uses", fmt.Sprint(n-1))
		for i := 1; i < n; i++ {
			nodes = append(nodes, up(t, l, h[i], "--token", token, "--overlay", secured(i+1)))
		}
	}
	meet(t, 10*time.Second, nodes...)
	return l, sw, nodes, h[n:]
}

// TestSecureJoin: three nodes, with nothing static on any of them; each that
// joins is a member within 2 s.
func TestSecureJoin(t *testing.T) {
	t.Parallel()
	l, _, h := hosts(t, 4, lab.Underlay{Prefix4: underlay4})
	start := time.Now()
	a := up(t, l, h[0])
	t.Logf("the first node is up after %v", time.Since(start).Round(time.Millisecond))
	if !strings.Contains(a.proc.Log(), "tulle token create") {
		t.Error("the first node does not say which command another machine needs")
	}
	nodes := []*tulle{a}
	for i := 1; i < len(h); i++ {
		token := nodes[len(nodes)-1].token() // any node makes one
		start := time.Now()
		n := up(t, l, h[i], "--token", token)
		joined := time.Since(start)
		nodes = append(nodes, n)
		seen := meet(t, 10*time.Second, nodes...) + joined
		t.Logf("%s joined after %v, and all saw each other after %v", n.name, joined.Round(time.Millisecond), seen.Round(time.Millisecond))
		if seen > 2*time.Second {
			t.Errorf("%s took %v to join, want 2s or less", n.name, seen)
		}
		if got, want := n.status().Node.Cluster, a.status().Node.Cluster; got != want || len(want) == 0 {
			t.Errorf("%s is in cluster %q, want %q", n.name, got, want)
		}
	}
	for i, n := range nodes {
		if n.status().Node.Keeper != (i == 0) {
			t.Errorf("%s: keeper is %v", n.name, !(i == 0))
		}
		private(t, n.stateDir())
		if strings.Contains(n.proc.Log(), n.args[len(n.args)-1]) && i > 0 {
			t.Errorf("%s has its token in its log", n.name)
		}
	}
}

// private fails if anybody but the owner may read what is in the folder.
func private(t *testing.T, dir string) {
	t.Helper()
	err := filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
		var info os.FileInfo
		if err == nil {
			info, err = d.Info()
		}
		if errors.Is(err, os.ErrNotExist) && path != dir {
			return nil // renamed meanwhile: the node is at work
		}
		if err == nil && info.Mode().Perm()&0o077 != 0 {
			t.Errorf("%s has mode %v", path, info.Mode())
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}

// TestSecureRestart stops and kills each node, the keeper too, and then all of
// them; the sealed overlay works each time.
func TestSecureRestart(t *testing.T) {
	t.Parallel()
	_, _, nodes, _ := secureCluster(t, 3, 0)
	reachable(t, 10*time.Second, nodes...)
	for _, how := range []string{"SIGTERM", "kill -9"} {
		for _, n := range nodes {
			if how == "SIGTERM" {
				n.stop()
			} else {
				n.kill()
			}
			n.start()
			took := meet(t, 20*time.Second, nodes...)
			reachable(t, 10*time.Second, nodes...)
			t.Logf("%s after %s: all see each other after %v", n.name, how, took.Round(time.Millisecond))
		}
	}
	// All, the keeper last: members know each other and their overlay's key.
	a, b, c := nodes[0], nodes[1], nodes[2]
	for _, n := range nodes {
		n.kill()
	}
	b.start()
	c.start()
	took := meet(t, 20*time.Second, b, c)
	ping(t, b.host, address(3), 10*time.Second)
	t.Logf("without a keeper: b and c see each other after %v, and their overlay works", took.Round(time.Millisecond))
	a.start()
	took = meet(t, 20*time.Second, nodes...)
	reachable(t, 10*time.Second, nodes...)
	t.Logf("with the keeper: after %v", took.Round(time.Millisecond))
	if got, want := c.status().Node.Cluster, a.status().Node.Cluster; got != want {
		t.Errorf("c is in %s, a in %s", got, want)
	}
}

// TestSecureFirstGetsOverlay: the first node, started with nothing, has an
// overlay after a restart; a second start on a running node's state is refused.
func TestSecureFirstGetsOverlay(t *testing.T) {
	t.Parallel()
	l, _, h := hosts(t, 2, lab.Underlay{Prefix4: underlay4})
	a := up(t, l, h[0])
	cluster := a.status().Node.Cluster
	status, _, stderr := runTulle(t, h[0], append(slices.Clone(a.args), "--listen", "[::]:5789", "--gossip", ":5946", "--socket", a.sock+"2")...)
	wantRefusal(t, status, stderr, "state")
	a.stop()
	a.args = append(a.args, "--overlay", secured(1))
	a.start()
	if got := a.status().Node.Cluster; got != cluster {
		t.Errorf("a is in cluster %s, and was in %s", got, cluster)
	}
	b := up(t, l, h[1], "--token", a.token(), "--overlay", secured(2))
	meet(t, 10*time.Second, a, b)
	reachable(t, 10*time.Second, a, b)
}

// wantRefusal checks that a command failed with one line that has all the words.
func wantRefusal(t *testing.T, status int, stderr string, words ...string) {
	t.Helper()
	if status != 1 {
		t.Errorf("status %d, want 1", status)
	}
	var lines []string
	for line := range strings.Lines(stderr) {
		if strings.HasPrefix(line, "tulle: ") {
			lines = append(lines, line)
		}
	}
	if len(lines) != 1 || !strings.HasSuffix(stderr, lines[0]) {
		t.Errorf("stderr is %q, want it to end in one line", stderr)
		return
	}
	for _, w := range words {
		if !strings.Contains(lines[0], w) {
			t.Errorf("the error is %q, want %q in it", lines[0], w)
		}
	}
	t.Logf("%s", strings.TrimSpace(lines[0]))
}
