package e2e

import (
	"bytes"
	"context"
	stdbinary "encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/tulle-net/tulle/internal/lab"
	"github.com/tulle-net/tulle/node"
)

//	a ──┬─[ul]─┬── b ── c       a is the keeper
//	    │      │      │
//	    a1     b1     c1        namespaces, on a sealed overlay; TCP between them
//
// `tulle upgrade`: what goes on, and for how long it stands still.

// stream is one TCP connection that carries something all the time.
type stream struct {
	t      *testing.T
	conn   net.Conn
	got    atomic.Int64 // bytes at the receiver
	gap    atomic.Int64 // the longest time between two reads there, in nanoseconds
	failed atomic.Pointer[error]
	stop   chan struct{}
	done   chan struct{}
}

// streams starts a connection from one namespace to an address of another.
func streams(t *testing.T, from, to *lab.Host, at netip.Addr) *stream {
	t.Helper()
	s := &stream{t: t, stop: make(chan struct{}), done: make(chan struct{})}
	ln, err := to.Listen(netip.AddrPortFrom(at, 0).String())
	if err != nil {
		t.Fatal(err)
	}
	accepted := make(chan net.Conn, 1)
	go func() {
		c, _ := ln.Accept()
		ln.Close()
		accepted <- c
	}()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	s.conn, err = from.Dial(ctx, "tcp", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	go s.receive(<-accepted)
	go s.send()
	t.Cleanup(func() { s.end() })
	return s
}

// send writes 4 KiB every 5 ms, numbered: what is lost or doubled would show.
func (s *stream) send() {
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	b := make([]byte, 4096)
	for n := uint64(0); ; n++ {
		select {
		case <-s.stop:
			s.conn.Close()
			return
		case <-tick.C:
		}
		for i := 0; i < len(b); i += 8 {
			stdbinary.BigEndian.PutUint64(b[i:], n)
		}
		if _, err := s.conn.Write(b); err != nil {
			s.fail(err)
			return
		}
	}
}

func (s *stream) fail(err error) { s.failed.CompareAndSwap(nil, &err) }

func (s *stream) receive(c net.Conn) {
	defer close(s.done)
	if c == nil {
		s.fail(errors.New("nothing was accepted"))
		return
	}
	defer c.Close()
	last, word, n := time.Now(), make([]byte, 0, 8), int64(0)
	b := make([]byte, 64<<10)
	for {
		k, err := c.Read(b)
		if err != nil {
			return
		}
		now := time.Now()
		if gap := int64(now.Sub(last)); gap > s.gap.Load() {
			s.gap.Store(gap)
		}
		last = now
		for _, x := range b[:k] {
			if word = append(word, x); len(word) == 8 {
				if got, want := stdbinary.BigEndian.Uint64(word), uint64(n/512); got != want {
					s.fail(fmt.Errorf("word %d is %d, want %d", n, got, want))
					return
				}
				word, n = word[:0], n+1
			}
		}
		s.got.Add(int64(k))
	}
}

// longest returns the longest time that nothing arrived, since the last call.
func (s *stream) longest() time.Duration {
	s.t.Helper()
	// What has stood still until now counts too.
	was := s.got.Load()
	eventually(s.t, 10*time.Second, "the connection goes on", func() bool { return s.got.Load() > was+64<<10 })
	if err := s.failed.Load(); err != nil {
		s.t.Fatal(*err)
	}
	return time.Duration(s.gap.Swap(0))
}

func (s *stream) end() {
	select {
	case <-s.stop:
	default:
		close(s.stop)
	}
	<-s.done
}

// tries runs `tulle upgrade` and returns what it says.
func (n *tulle) tries(args ...string) (status int, stdout, stderr string) {
	n.t.Helper()
	return n.command(append([]string{"upgrade"}, args...)...)
}

// versions builds the binary with another version's name.
func versionNamed(t *testing.T, version string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "tulle-"+version)
	cmd := exec.Command("go", "build", "-trimpath", "-ldflags", "-s -w -X github.com/tulle-net/tulle/internal/version.number="+version, "-o", path, "../cmd/tulle")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	return path
}

// children are the processes whose parent is pid.
func children(t *testing.T, pid int) (list []int) {
	t.Helper()
	stats, err := filepath.Glob("/proc/[0-9]*/stat")
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range stats {
		b, err := os.ReadFile(path)
		if err != nil {
			continue // it has ended
		}
		// The name, in parentheses, may have any in it.
		fields := strings.Fields(string(b[bytes.LastIndexByte(b, ')')+1:]))
		if len(fields) > 1 && fields[1] == fmt.Sprint(pid) {
			var child int
			fmt.Sscan(string(b), &child)
			list = append(list, child)
		}
	}
	return list
}

func TestUpgrade(t *testing.T) {
	t.Parallel()
	l, _, h := hosts(t, 3, lab.Underlay{Prefix4: underlay4, Offloads: lab.Wire})
	nodes := joined(t, l, h, nil)
	a, b, c := nodes[0], nodes[1], nodes[2]
	spaces := containers(t, l, "a1", "b1", "c1")
	a1, b1, c1 := spaces[0], spaces[1], spaces[2]
	a.do("overlay", "create", "blue", "--subnet", "10.32.0.0/16")
	known(t, 5*time.Second, "blue", true, nodes...)
	atA := a.attaches("blue", "--netns", a1.Path())
	atB := b.attaches("blue", "--netns", b1.Path())
	atC := c.attaches("blue", "--netns", c1.Path())
	own := b.exposed("blue")
	ping(t, a1, atB.Addr(), 10*time.Second)
	ping(t, c1, atB.Addr(), 10*time.Second)
	ping(t, a1, own.Addr(), 10*time.Second)
	ping(t, a1, atC.Addr(), 10*time.Second)
	toB, fromB := streams(t, c1, b1, atB.Addr()), streams(t, b1, a1, atA.Addr())
	host := streams(t, c1, h[1], own.Addr())
	pid := b.proc.Pid()
	first := index(t, b1, "eth0")
	next := versionNamed(t, "next")

	part(t, "one after the other", nodes, func(t *testing.T) {
		for i := range 4 {
			pause()
			toB.longest()
			fromB.longest()
			host.longest()
			to := []string{"next", "devel"}[i%2]
			file := map[string]string{"next": next, "devel": binary}[to]
			status, out, errs := b.tries("--binary", file)
			if status != 0 || !strings.Contains(out, "to "+to) {
				t.Fatalf("upgrade: status %d: %s%s", status, out, errs)
			}
			gaps := []time.Duration{toB.longest(), fromB.longest(), host.longest()}
			t.Logf("%s; the longest gaps of three connections: %v", strings.TrimSpace(out), gaps)
			for _, gap := range gaps {
				if gap >= time.Second {
					t.Errorf("a connection stood still for %v, want less than 1 s", gap)
				}
			}
			if kids := children(t, pid); len(kids) != 1 || len(children(t, kids[0])) != 0 {
				t.Errorf("the processes below %d are %v, want one", pid, kids)
			}
			if now := index(t, b1, "eth0"); now != first {
				t.Errorf("eth0 is device %s, and was %s", now, first)
			}
		}
	})

	t.Logf("the process that waits has %d KiB of its own, the node %d KiB", ownMemory(t, pid), ownMemory(t, b.process()))

	part(t, "the keeper", nodes, func(t *testing.T) {
		toA, fromA := streams(t, c1, a1, atA.Addr()), streams(t, a1, b1, atB.Addr())
		toA.longest()
		fromA.longest()
		status, out, errs := a.tries("--binary", next)
		if status != 0 {
			t.Fatalf("upgrade: status %d: %s%s", status, out, errs)
		}
		gaps := []time.Duration{toA.longest(), fromA.longest()}
		t.Logf("%s; the longest gaps of two connections: %v", strings.TrimSpace(out), gaps)
		for _, gap := range gaps {
			if gap >= time.Second {
				t.Errorf("a connection stood still for %v, want less than 1 s", gap)
			}
		}
		// It keeps the cluster.
		a.do("overlay", "create", "red")
		a.do("overlay", "rm", "red")
	})

	part(t, "who asks meanwhile waits", nodes, func(t *testing.T) {
		pause()
		stop, asked := make(chan struct{}), make(chan int, 1)
		go func() {
			n := 0
			defer func() { asked <- n }()
			for {
				select {
				case <-stop:
					return
				default:
				}
				if err := b.try("/v1/status", &node.Status{}); err != nil {
					t.Errorf("after %d answers: %v", n, err)
					return
				}
				n++
			}
		}()
		if status, out, errs := b.tries(); status != 0 {
			t.Errorf("upgrade: status %d: %s%s", status, out, errs)
		}
		close(stop)
		// Of two at once one is refused, or both are done, one after the other.
		pause()
		second := make(chan string, 1)
		go func() {
			_, _, errs := b.command("upgrade")
			second <- errs
		}()
		_, _, errs := b.tries()
		for _, errs := range []string{errs, <-second} {
			if errs != "" && !strings.Contains(errs, "another upgrade is under way") {
				t.Errorf("of two at once: %s", errs)
			}
		}
		t.Logf("%d requests were answered meanwhile", <-asked)
	})
}

// TestUpgradeFails: what goes wrong, or is stopped, half-way.
func TestUpgradeFails(t *testing.T) {
	t.Parallel()
	l, _, h := hosts(t, 2, lab.Underlay{Prefix4: underlay4})
	nodes := joined(t, l, h, nil)
	a, b := nodes[0], nodes[1]
	untoken(b)
	spaces := containers(t, l, "a1", "b1")
	a1, b1 := spaces[0], spaces[1]
	a.do("overlay", "create", "blue", "--subnet", "10.32.0.0/16")
	known(t, 5*time.Second, "blue", true, nodes...)
	a.attaches("blue", "--netns", a1.Path())
	atB := b.attaches("blue", "--netns", b1.Path())
	ping(t, a1, atB.Addr(), 10*time.Second)
	toB := streams(t, a1, b1, atB.Addr())
	first := index(t, b1, "eth0")
	next := versionNamed(t, "next")
	if status, out, errs := b.tries("--binary", next); status != 0 {
		t.Fatalf("upgrade: status %d: %s%s", status, out, errs)
	}

	part(t, "a binary that does not work", nodes, func(t *testing.T) {
		dir := t.TempDir()
		script := func(name, text string) string {
			path := filepath.Join(dir, name)
			if err := os.WriteFile(path, []byte(text), 0o755); err != nil {
				t.Fatal(err)
			}
			return path
		}
		crash := filepath.Join(dir, "crash")
		if err := build(crash, "./testdata/crash"); err != nil {
			t.Fatal(err)
		}
		elf, err := os.ReadFile(binary)
		if err != nil {
			t.Fatal(err)
		}
		elf = elf[:4096]
		elf[18], elf[19] = 22, 0 // e_machine: S/390
		running := b.process()
		for _, x := range []struct {
			binary string
			words  []string
		}{
			{script("exits", "#!/bin/sh\nexit 3\n"), []string{"exits", "it ended at once: exit status 3", "the old version goes on"}},
			{"/bin/false", []string{"/bin/false", "it ended at once: exit status 1", "the old version goes on"}},
			{script("machine", string(elf)), []string{"machine", "for this machine's architecture", "the old version goes on"}},
			{script("empty", ""), []string{"cannot be started", "the old version goes on"}},
			{crash, []string{"crash", "it ended at once: signal: killed", "the old version goes on"}},
		} {
			pause()
			toB.longest()
			status, out, errs := b.tries("--binary", x.binary)
			gap := toB.longest()
			if status != 1 || out != "" {
				t.Errorf("%s: status %d, %s", x.binary, status, out)
			}
			for _, w := range x.words {
				if !strings.Contains(errs, w) {
					t.Errorf("%s: %q, want %q in it", x.binary, errs, w)
				}
			}
			if now := b.process(); now != running {
				t.Errorf("%s: the node is process %d, and was %d", x.binary, now, running)
			}
			if kids := children(t, running); len(kids) != 0 {
				t.Errorf("%s: processes are left: %v", x.binary, kids)
			}
			t.Logf("%s: a connection stood still for %v", filepath.Base(x.binary), gap)
			if gap >= time.Second {
				t.Errorf("%s: a connection stood still for %v, want less than 1 s", x.binary, gap)
			}
		}
		b.refuses([]string{"no such file"}, "upgrade", "--binary", filepath.Join(dir, "none"))
		// And after all of it another one works.
		pause()
		if status, out, errs := b.tries("--binary", next); status != 0 {
			t.Errorf("upgrade: status %d: %s%s", status, out, errs)
		}
	})

	part(t, "signals", nodes, func(t *testing.T) {
		node := b.process()
		if out, err := runSecond(b); err == nil || !strings.Contains(out, "another node uses the state directory") {
			t.Errorf("a second one: %v: %s", err, out)
		}
		toB.end()
		if err := b.proc.Signal(syscall.SIGTERM); err != nil {
			t.Fatal(err)
		}
		if err := b.proc.Wait(); err != nil {
			t.Errorf("SIGTERM: %v, want status 0", err)
		}
		if err := syscall.Kill(node, 0); err == nil {
			t.Error("the node's process is there still")
		}
		if !strings.Contains(b.proc.Log(), "node has left") {
			t.Error("the node has not left")
		}
		a.eventually(2*time.Second, "b has left", func() bool { return a.sees("b") == "left" })
		if index(t, b1, "eth0") != first {
			t.Error("b1 has another device")
		}
		b.start()
		ping(t, a1, atB.Addr(), 10*time.Second)
		// Stopped while it is handed over: it ends, and starts again.
		for _, after := range []time.Duration{0, 50 * time.Millisecond, 150 * time.Millisecond, 200 * time.Millisecond, 250 * time.Millisecond} {
			done := make(chan struct{})
			go func() {
				defer close(done)
				b.tries("--binary", next)
			}()
			time.Sleep(after)
			if err := b.proc.Signal(syscall.SIGTERM); err != nil {
				t.Fatal(err)
			}
			select {
			case <-b.proc.Done():
			case <-time.After(20 * time.Second):
				t.Fatalf("stopped %v after an upgrade began, it goes on", after)
			}
			<-done
			b.start()
			ping(t, a1, atB.Addr(), 10*time.Second)
		}
		// Killed, the process that waits takes the node with it.
		if status, out, errs := b.tries("--binary", next); status != 0 {
			t.Errorf("upgrade: status %d: %s%s", status, out, errs)
		}
		node = b.process()
		if err := syscall.Kill(b.proc.Pid(), syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		b.eventually(10*time.Second, "the node has stopped", func() bool { return syscall.Kill(node, 0) != nil })
		b.start()
		ping(t, a1, atB.Addr(), 10*time.Second)
	})
}

// TestUpgradeOpen: static overlays in an open cluster, with each driver.
func TestUpgradeOpen(t *testing.T) {
	t.Parallel()
	l, _, h := hosts(t, 2, lab.Underlay{Prefix4: underlay4})
	a := up(t, l, h[0], "--overlay", overlay(1))
	b := up(t, l, h[1], "--overlay", overlay(2), "--overlay", "name=red,vni=101,encryption=none,tap=red0,address=10.33.0.2/16,driver=plain", "--join", "192.168.77.1")
	ping(t, h[0], address(2), 10*time.Second)
	ab := streams(t, h[0], h[1], address(2))
	for _, n := range []*tulle{b, a} {
		first := index(t, n.host, "blue0")
		ab.longest()
		status, out, errs := n.tries()
		if status != 0 {
			t.Fatalf("upgrade: status %d: %s%s", status, out, errs)
		}
		gap := ab.longest()
		t.Logf("%s: %s; the longest gap: %v", n.name, strings.TrimSpace(out), gap)
		if gap >= time.Second {
			t.Errorf("%s: a connection stood still for %v, want less than 1 s", n.name, gap)
		}
		if now := index(t, n.host, "blue0"); now != first {
			t.Errorf("%s: blue0 is device %s, and was %s", n.name, now, first)
		}
	}
	// The plain driver's is another one, and there.
	if link, there, err := h[1].Link("red0"); err != nil || !there || !link.Up {
		t.Errorf("red0: %+v, %v, %v", link, there, err)
	}
}

// ownMemory is the memory in KiB that a process shares with nobody.
func ownMemory(t *testing.T, pid int) (kib int) {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", pid))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		var n int
		if rest, is := strings.CutPrefix(line, "Private_"); is {
			_, text, _ := strings.Cut(rest, ":")
			fmt.Sscan(text, &n)
			kib += n
		}
	}
	return kib
}

// pause lets a second go by: within one a peer makes new sessions once only.
func pause() { time.Sleep(1100 * time.Millisecond) }

// process is the one that runs the node: the one that was started, or its child.
func (n *tulle) process() int {
	n.t.Helper()
	if kids := children(n.t, n.proc.Pid()); len(kids) == 1 {
		return kids[0]
	}
	return n.proc.Pid()
}

// runSecond starts a second node with the state directory of the first.
func runSecond(n *tulle) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	return n.host.Run(ctx, n.program[0], n.args...)
}
