package e2e

import (
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/tulle-net/tulle/internal/lab"
	"github.com/tulle-net/tulle/node"
)

//	a ──┬─[ul]─┬── b        a is the keeper; b is stopped, killed and started again
//	    │      │
//	    a1     b1 b2 p …    namespaces
//
// What a container has of its device while its node is away, and whether its endpoint
// ends with it although the node had to open the device inside.

// index is the number of a device, which another device never has.
func index(t *testing.T, h *lab.Host, dev string) string {
	t.Helper()
	number, _, _ := strings.Cut(runIn(t, h, "ip", "-o", "link", "show", dev), ":")
	return number
}

// gone waits until a node has no endpoint of the name, and reports how long it took.
func (n *tulle) gone(name string) time.Duration {
	n.t.Helper()
	return n.eventually(5*time.Second, "endpoint "+name+" is gone", func() bool {
		return !slices.ContainsFunc(get[node.Endpoints](n, "/v1/endpoints?local=true").Endpoints, isNamed(name))
	})
}

// taps is how many queues of TAPs the node holds.
func (n *tulle) taps() (held int) {
	n.t.Helper()
	fds, err := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", n.process()))
	if err != nil {
		n.t.Fatal(err)
	}
	for _, f := range fds {
		if to, _ := os.Readlink(f); to == "/dev/net/tun" {
			held++
		}
	}
	return held
}

func TestPersist(t *testing.T) {
	t.Parallel()
	l, _, h := hosts(t, 2, lab.Underlay{Prefix4: underlay4})
	nodes := joined(t, l, h, nil)
	a, b := nodes[0], nodes[1]
	untoken(b)
	c := containers(t, l, "a1", "b1", "b2", "b3")
	a1, b1, b2, b3 := c[0], c[1], c[2], c[3]
	a.do("overlay", "create", "blue", "--subnet", "10.32.0.0/16", "--subnet", "fd32::/64")
	known(t, 5*time.Second, "blue", true, nodes...)
	a.do("attach", "blue", "--netns", a1.Path(), "--ip", "10.32.0.200", "--ip", "fd32::200")
	b.do("attach", "blue", "--netns", b1.Path(), "--ip", "10.32.0.201", "--ip", "fd32::201")
	at1, at6 := netip.MustParseAddr("10.32.0.201"), netip.MustParseAddr("fd32::201")
	ping(t, a1, at1, 10*time.Second)
	runIn(t, b1, "ip", "addr", "add", "10.32.77.1/32", "dev", "eth0")
	runIn(t, b1, "ip", "route", "add", "10.99.0.0/16", "via", "10.32.0.200")
	runIn(t, b1, "ip", "-6", "route", "add", "fd99::/64", "via", "fd32::200")
	first := index(t, b1, "eth0")
	same := func(when string) {
		t.Helper()
		if now := index(t, b1, "eth0"); now != first {
			t.Errorf("%s: eth0 is device %s, and was %s", when, now, first)
		}
		all := runIn(t, b1, "ip", "addr", "show", "eth0") + runIn(t, b1, "ip", "route") + runIn(t, b1, "ip", "-6", "route")
		for _, want := range []string{"10.32.0.201/16", "fd32::201/64", "10.32.77.1/32", "10.99.0.0/16 via 10.32.0.200", "fd99::/64 via fd32::200", "mtu 1418"} {
			if !strings.Contains(all, want) {
				t.Errorf("%s: eth0 has no %q: %s", when, want, all)
			}
		}
	}
	stop := func(kill bool) {
		t.Helper()
		if kill {
			b.proc.Kill()
			<-b.proc.Done()
		} else if err := b.proc.Stop(10 * time.Second); err != nil {
			t.Fatal(err)
		}
	}

	for _, kill := range []bool{false, true} {
		part(t, map[bool]string{false: "stopped", true: "killed"}[kill], nodes, func(t *testing.T) {
			stop(kill)
			same("without its node")
			start := time.Now()
			b.start()
			ping(t, a1, at1, 10*time.Second)
			t.Logf("b1 answers again %v after the start of its node", time.Since(start).Round(time.Millisecond))
			ping(t, a1, at6, 5*time.Second)
			same("with its node")
			if e := b.attached(isNamed(filepath.Base(b1.Path()))); len(e) != 1 || !e[0].Up || e[0].Error != "" {
				t.Errorf("endpoints: %+v", e)
			}
			transfer(t, l, a1, b1, at1, 8<<20)
			transfer(t, l, b1, a1, netip.MustParseAddr("fd32::200"), 8<<20)
		})
	}

	part(t, "the namespace ends after a restart", nodes, func(t *testing.T) {
		// p is held by a process, by path by a file, fd by a descriptor, and mount in a
		// mount namespace of its own, once their first holders have let go of them.
		used := b.used("blue")
		p := inside(t, h[1])
		b.do("attach", "blue", "--pid", fmt.Sprint(p.Pid()), "--name", "p")
		_, endPath := attachFile(t, b, "path")
		_, endFd := attachFile(t, b, "fd")
		mountPath, endMount := attachFile(t, b, "mount")
		fd, err := os.Open("/run/netns/" + unusedName("fd"))
		if err != nil {
			t.Fatal(err)
		}
		holder := exec.Command("sleep", "600")
		holder.ExtraFiles = []*os.File{fd}
		held, err := h[1].Start(holder)
		fd.Close()
		if err != nil {
			t.Fatal(err)
		}
		at := filepath.Join(t.TempDir(), "mount")
		if err := os.WriteFile(at, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		mounted, err := h[1].Start(exec.Command("unshare", "--mount", "sh", "-c", `mount --bind "$0" "$1" && exec sleep 600`, mountPath, at))
		if err != nil {
			t.Fatal(err)
		}
		eventually(t, 5*time.Second, "the mount is in a namespace of its own", func() bool {
			comm, _ := os.ReadFile(fmt.Sprintf("/proc/%d/comm", mounted.Pid()))
			return string(comm) == "sleep\n"
		})
		stop(true)
		b.start()
		if status, out, errs := b.tries(); status != 0 { // what holds a namespace is handed over, and still looked after
			t.Fatalf("upgrade: status %d: %s%s", status, out, errs)
		}
		endFd()
		endMount()
		time.Sleep(1500 * time.Millisecond) // the node has looked twice
		for _, name := range []string{"p", "path", "fd", "mount"} {
			if len(b.attached(isNamed(name))) != 1 {
				t.Fatalf("%s is gone while it is held", name)
			}
		}
		for name, end := range map[string]func(){"p": p.Kill, "path": endPath, "fd": held.Kill, "mount": mounted.Kill} {
			end()
			took := b.gone(name)
			t.Logf("%s is gone after %v", name, took.Round(time.Millisecond))
			if took > time.Second {
				t.Errorf("%s is gone after %v, want 1 s at most", name, took)
			}
		}
		b.eventually(time.Second, "its addresses are free", func() bool { return b.used("blue") == used })
		b.eventually(time.Second, "one TAP is held, b1's", func() bool { return b.taps() == 1 })
	})

	part(t, "detach after a restart", nodes, func(t *testing.T) {
		b.do("detach", "blue", "--netns", b1.Path())
		if _, there, _ := b1.Link("eth0"); there {
			t.Error("b1 has its device still")
		}
		b.do("attach", "blue", "--netns", b1.Path(), "--ip", "10.32.0.201", "--ip", "fd32::201")
		ping(t, a1, at1, 5*time.Second)
	})

	part(t, "a foreign device of the name", nodes, func(t *testing.T) {
		b.do("attach", "blue", "--netns", b2.Path(), "--name", "two")
		stop(false)
		runIn(t, b2, "ip", "link", "del", "eth0")
		runIn(t, b2, "ip", "tuntap", "add", "eth0", "mode", "tap")
		foreign := index(t, b2, "eth0")
		b.start()
		if e := b.attached(isNamed("two")); len(e) != 1 || e[0].Up || !strings.Contains(e[0].Error, "there is a device eth0 in that namespace already") {
			t.Errorf("endpoint: %+v", e)
		}
		b.do("detach", "blue", "--netns", b2.Path())
		if now := index(t, b2, "eth0"); now != foreign {
			t.Errorf("the foreign device is %s, and was %s", now, foreign)
		}
		runIn(t, b2, "ip", "link", "del", "eth0")
	})

	part(t, "a device of which nothing is remembered", nodes, func(t *testing.T) {
		b.do("attach", "blue", "--netns", b2.Path(), "--name", "two")
		stop(true)
		if err := os.Remove(filepath.Join(l.Dir(), "state-b", "endpoints.json")); err != nil {
			t.Fatal(err)
		}
		if _, there, _ := b2.Link("eth0"); !there {
			t.Fatal("b2 has no device without its node")
		}
		b.start()
		addr := b.do("attach", "blue", "--netns", b2.Path(), "--name", "two", "--ip", "10.32.0.150", "--ip", "fd32::150")
		ping(t, a1, netip.MustParsePrefix(strings.Fields(addr)[0]).Addr(), 5*time.Second)
		b.do("attach", "blue", "--netns", b1.Path(), "--ip", "10.32.0.201", "--ip", "fd32::201")
		ping(t, a1, at1, 5*time.Second)
	})

	part(t, "overlay rm while the node is away", nodes, func(t *testing.T) {
		b.do("attach", "blue", "--netns", b3.Path())
		stop(false)
		a.do("overlay", "rm", "blue", "--force")
		b.start()
		for _, c := range []*lab.Host{b1, b2, b3} {
			eventually(t, 15*time.Second, "its device is gone", func() bool { _, there, err := c.Link("eth0"); return err == nil && !there })
		}
		b.eventually(5*time.Second, "it has no endpoint", func() bool { return len(get[node.Endpoints](b, "/v1/endpoints?local=true").Endpoints) == 0 })
	})
}

// attachFile attaches a namespace with a file.
func attachFile(t *testing.T, n *tulle, name string) (path string, end func()) {
	t.Helper()
	path, end = netnsNamed(t, unusedName(name))
	n.do("attach", "blue", "--netns", path, "--name", name)
	return path, end
}
