// Package e2e runs the built binary on real namespaces, real TAPs and real foreign software.
//
// Each file draws its topology at the head. Most of these tests need root; they
// skip without it, and CI fails when one was skipped.
package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/tulle-net/tulle/internal/lab"
	"github.com/tulle-net/tulle/internal/lab/labtest"
	"github.com/tulle-net/tulle/node"
)

// binary is the tulle that all tests run.
var binary string

// The main thread stays the main goroutine's: the runtime ends every thread that was
// spoilt by entering a namespace but this one, which it parks there for ever.
func init() { runtime.LockOSThread() }

func TestMain(m *testing.M) { os.Exit(run(m)) }

func run(m *testing.M) int {
	if os.Geteuid() != 0 {
		return m.Run() // every test skips
	}
	dir, err := os.MkdirTemp("", "tulle-e2e-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	binary = filepath.Join(dir, "tulle")
	if err := build(binary, "../cmd/tulle"); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return m.Run()
}

// build compiles a command of ours, as the Makefile does.
func build(to, pkg string, env ...string) error {
	cmd := exec.Command("go", "build", "-trimpath", "-o", to, pkg)
	cmd.Env = append(append(os.Environ(), "CGO_ENABLED=0"), env...)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("go build %s: %w\n%s", pkg, err, out)
	}
	return nil
}

var (
	underlay4 = netip.MustParsePrefix("192.168.77.0/24")
	underlay6 = netip.MustParsePrefix("fd77::/64")
)

// hosts makes n hosts a, b, c … on one switch.
func hosts(t *testing.T, n int, u lab.Underlay) (*lab.Lab, *lab.Switch, []*lab.Host) {
	t.Helper()
	l := labtest.New(t)
	if !u.Prefix4.IsValid() && !u.Prefix6.IsValid() {
		u.Prefix4 = underlay4
	}
	sw, hs := labtest.Hosts(t, l, n, u)
	return l, sw, hs
}

// tulle is a `tulle up` that runs on a host.
type tulle struct {
	t       *testing.T
	host    *lab.Host
	name    string
	proc    *lab.Process
	sock    string
	http    http.Client
	args    []string
	program []string
}

// overlay returns the --overlay value of the tests' usual overlay on host number i.
func overlay(i int, more ...string) string {
	return strings.Join(append([]string{"name=blue,vni=100,encryption=none,tap=blue0", fmt.Sprintf("address=10.32.0.%d/16", i)}, more...), ",")
}

// address is what overlay gives host number i.
func address(i int) netip.Addr { return netip.AddrFrom4([4]byte{10, 32, 0, byte(i)}) }

// up starts a node and waits until its API answers.
func up(t *testing.T, l *lab.Lab, h *lab.Host, args ...string) *tulle {
	t.Helper()
	return upAs(t, l, h, []string{binary}, args...)
}

// upAs is up with another program, such as an emulator with its argument.
func upAs(t *testing.T, l *lab.Lab, h *lab.Host, program []string, args ...string) *tulle {
	t.Helper()
	n := &tulle{t: t, host: h, name: h.Name(), program: program, sock: filepath.Join(l.Dir(), h.Name()+".sock")}
	n.args = append([]string{"up", "--name", n.name, "--state-dir", filepath.Join(l.Dir(), "state-"+n.name), "--socket", n.sock}, args...)
	n.http = http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", n.sock)
		},
	}}
	t.Cleanup(n.explain)
	n.start()
	return n
}

// settings returns a file of them, a line each.
func settings(t *testing.T, l *lab.Lab, lines ...string) (file string) {
	t.Helper()
	f, err := os.CreateTemp(l.Dir(), "settings-*.yaml")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteString(strings.Join(lines, "\n") + "\n"); err != nil {
		t.Fatal(err)
	}
	return f.Name()
}

// nothingShed are settings with which nothing is left out, for tests that compare each frame.
const nothingShed = "aqm: off"

// explain logs what a node that still runs knows, where its test has failed.
func (n *tulle) explain() {
	if !n.t.Failed() {
		return
	}
	for _, path := range []string{"/v1/peers", "/v1/status"} {
		var what any
		if n.try(path, &what) != nil {
			return
		}
		if b, err := json.Marshal(what); err == nil {
			n.t.Logf("%s: %s: %s", n.name, path, b)
		}
	}
}

// start starts the node's process (again).
func (n *tulle) start() {
	n.t.Helper()
	p, err := n.host.Start(exec.Command(n.program[0], slices.Concat(n.program[1:], n.args)...))
	if err != nil {
		n.t.Fatal(err)
	}
	n.proc = p
	n.eventually(30*time.Second, "its API answers", func() bool {
		select {
		case <-p.Done():
			n.t.Fatalf("node %s ended:\n%s", n.name, p.Log())
		default:
		}
		return n.try("/v1/status", &node.Status{}) == nil
	})
}

func (n *tulle) try(path string, body any) error {
	r, err := n.http.Get("http://tulle" + path)
	if err != nil {
		return err
	}
	defer r.Body.Close()
	if r.StatusCode != http.StatusOK {
		return fmt.Errorf("%s: %s", path, r.Status)
	}
	return json.NewDecoder(r.Body).Decode(body)
}

func (n *tulle) status() (s node.Status) {
	n.t.Helper()
	if err := n.try("/v1/status", &s); err != nil {
		n.t.Fatal(err)
	}
	return s
}

func (n *tulle) fdb(overlay string) (f node.FDB) {
	n.t.Helper()
	if err := n.try("/v1/overlays/"+overlay+"/fdb", &f); err != nil {
		n.t.Fatal(err)
	}
	return f
}

// sees reports the status that n gives to a peer, "" when it has none.
func (n *tulle) sees(peer string) string {
	n.t.Helper()
	var p node.Peers
	if err := n.try("/v1/peers", &p); err != nil {
		n.t.Fatal(err)
	}
	for _, m := range p.Peers {
		if m.Name == peer {
			return string(m.Status)
		}
	}
	return ""
}

// floods reports whether n sends BUM frames of its first overlay to vtep.
func (n *tulle) floods(vtep netip.Addr) bool {
	for _, a := range n.status().Overlays[0].FloodList {
		if a.Addr() == vtep {
			return true
		}
	}
	return false
}

// eventually polls until ok, and fails the test after limit. It returns how long it took.
func (n *tulle) eventually(limit time.Duration, what string, ok func() bool) time.Duration {
	n.t.Helper()
	return eventually(n.t, limit, n.name+": "+what, ok)
}

func eventually(t *testing.T, limit time.Duration, what string, ok func() bool) time.Duration {
	t.Helper()
	start := time.Now()
	for !ok() {
		if time.Since(start) > limit {
			t.Fatalf("not within %v: %s", limit, what)
		}
		time.Sleep(10 * time.Millisecond)
	}
	return time.Since(start)
}

// ping waits until dst answers from h.
func ping(t *testing.T, h *lab.Host, dst netip.Addr, within time.Duration) time.Duration {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), within)
	defer cancel()
	took, err := h.WaitPing(ctx, dst)
	if err != nil {
		t.Fatalf("%s: ping %s: no answer within %v: %v", h.Name(), dst, within, err)
	}
	return took
}

// noPing fails when dst answers from h within the time.
func noPing(t *testing.T, h *lab.Host, dst netip.Addr, within time.Duration) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), within)
	defer cancel()
	if _, err := h.WaitPing(ctx, dst); err == nil {
		t.Fatalf("%s: %s answers a ping and should not", h.Name(), dst)
	}
}

// transfer moves bytes over TCP and has their content compared.
func transfer(t *testing.T, l *lab.Lab, from, to *lab.Host, dst netip.Addr, bytes int64) lab.Transferred {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	got, err := l.Transfer(ctx, from, to, netip.AddrPortFrom(dst, 0), lab.Amount{Bytes: bytes})
	if err != nil {
		t.Fatalf("TCP %s → %s: %v", from.Name(), dst, err)
	}
	if got.Bytes != bytes {
		t.Fatalf("TCP %s → %s: %d bytes arrived, want %d", from.Name(), dst, got.Bytes, bytes)
	}
	return got
}

// runIn runs a tool on a host and fails the test when it fails.
func runIn(t *testing.T, h *lab.Host, name string, args ...string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
	defer cancel()
	out, err := h.Run(ctx, name, args...)
	if err != nil {
		t.Fatalf("%s: %s %s: %v\n%s", h.Name(), name, strings.Join(args, " "), err, out)
	}
	return out
}

// expected reports whether a drop is no fault between two nodes: TCP finds the
// rate by losing, and gives way to others; of two nodes that meet one is sure of the other first.
func expected(reason string, count uint64) bool {
	switch reason {
	case "rx_overflow", "tap_overflow", "aqm", "aqm_marked":
		return true
	case "unknown_vtep":
		return count <= 10
	}
	return false
}
