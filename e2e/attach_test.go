package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/tulle-net/tulle/internal/lab"
	"github.com/tulle-net/tulle/node"
)

//	a ──┬─[ul]─┬── b           each host has a node, and namespaces that stand for containers
//	    │      │
//	 a1 a2 p   b1 b2           eth0, eth1, …: TAPs that the host's node holds; no bridge, no veth
//
// Endpoints in network namespaces: a1, a2, b1 and b2 have a path, p is a process.

// attaches runs `tulle attach`, which prints its addresses and nothing else.
func (n *tulle) attaches(overlay string, args ...string) netip.Prefix {
	n.t.Helper()
	out := n.do(append([]string{"attach", overlay}, args...)...)
	p, err := netip.ParsePrefix(strings.TrimSuffix(out, "\n"))
	if err != nil || out != p.String()+"\n" {
		n.t.Fatalf("%s: tulle attach %s prints %q, want ADDRESS/PREFIX and a newline", n.name, overlay, out)
	}
	return p
}

// attached returns the node's endpoints that `want` says yes to.
func (n *tulle) attached(want func(e node.Endpoint) bool) []node.Endpoint {
	n.t.Helper()
	list := asked[node.Endpoints](n, "endpoints", "--local").Endpoints
	return slices.DeleteFunc(list, func(e node.Endpoint) bool { return !want(e) })
}

func isNamed(name string) func(node.Endpoint) bool {
	return func(e node.Endpoint) bool { return e.Name == name }
}

// used is how many addresses of an overlay the node's endpoints have.
func (n *tulle) used(overlay string) (used int) {
	n.t.Helper()
	for _, o := range get[node.IPAM](n, "/v1/ipam").Overlays {
		for _, b := range o.Blocks {
			if o.Overlay == overlay && b.Node == n.name {
				used += b.Used
			}
		}
	}
	return used
}

// inside starts a process in a network namespace of its own.
func inside(t *testing.T, h *lab.Host) *lab.Process {
	t.Helper()
	p, err := h.Start(exec.Command("unshare", "--net", "sleep", "600"))
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, 5*time.Second, "the process is in its namespace", func() bool {
		comm, _ := os.ReadFile(fmt.Sprintf("/proc/%d/comm", p.Pid()))
		return string(comm) == "sleep\n"
	})
	return p
}

// enter runs a command in the namespace of a process.
func enter(t *testing.T, h *lab.Host, pid int, args ...string) string {
	t.Helper()
	return runIn(t, h, "nsenter", append([]string{"-t", fmt.Sprint(pid), "-n"}, args...)...)
}

// netnsNamed makes a namespace with a name under /run/netns.
func netnsNamed(t *testing.T, name string) (path string, end func()) {
	t.Helper()
	ip := func(args ...string) error {
		if out, err := exec.Command("ip", append([]string{"netns"}, args...)...).CombinedOutput(); err != nil {
			return fmt.Errorf("ip netns %v: %w: %s", args, err, out)
		}
		return nil
	}
	if err := ip("add", name); err != nil {
		t.Fatal(err)
	}
	var once sync.Once
	end = func() {
		once.Do(func() {
			if err := ip("del", name); err != nil {
				t.Error(err)
			}
			_ = os.RemoveAll(filepath.Join("/etc/netns", name)) // its node may have been killed
		})
	}
	t.Cleanup(end)
	return filepath.Join("/run/netns", name), end
}

func unusedName(what string) string { return fmt.Sprintf("tulletest%d-%s", os.Getpid(), what) }

// containers makes namespaces with a path.
func containers(t *testing.T, l *lab.Lab, names ...string) (list []*lab.Host) {
	t.Helper()
	for _, name := range names {
		h, err := l.AddHost(name)
		if err != nil {
			t.Fatal(err)
		}
		list = append(list, h)
	}
	return list
}

func TestAttach(t *testing.T) {
	t.Parallel()
	l, _, h := hosts(t, 2, lab.Underlay{Prefix4: underlay4, Offloads: lab.Wire})
	nodes := joined(t, l, h, nil)
	a, b := nodes[0], nodes[1]
	c := containers(t, l, "a1", "a2", "b1", "b2")
	a1, a2, b1 := c[0], c[1], c[2]
	p := inside(t, h[0])
	pid := fmt.Sprint(p.Pid())
	a.do("overlay", "create", "blue", "--subnet", "10.32.0.0/16")
	a.do("overlay", "create", "dual", "--subnet", "10.40.0.0/16", "--subnet", "fd40::/64")
	a.do("overlay", "create", "red", "--subnet", "10.33.0.0/16")
	known(t, 5*time.Second, "red", true, nodes...)
	var at1, at2, atP, atB netip.Prefix

	part(t, "attach", nodes, func(t *testing.T) {
		at1 = a.attaches("blue", "--netns", a1.Path(), "--name", "one", "--no-dns")
		at2 = a.attaches("blue", "--netns", a2.Path(), "--ip", "10.32.0.99", "--mac", "02:00:00:00:00:99")
		atP = a.attaches("blue", "--pid", pid, "--ifname", "net0")
		atB = b.attaches("blue", "--netns", b1.Path())
		if at2.Addr() != netip.MustParseAddr("10.32.0.99") {
			t.Errorf("a2 has %s, want 10.32.0.99", at2)
		}
		for name, want := range map[string]node.Endpoint{
			"one":                    {Overlay: "blue", IPs: []netip.Prefix{at1}, Netns: a1.Path(), Tap: "eth0", NoDNS: true},
			filepath.Base(a2.Path()): {Overlay: "blue", IPs: []netip.Prefix{at2}, Netns: a2.Path(), Tap: "eth0", MAC: 0x020000000099},
			"pid-" + pid:             {Overlay: "blue", IPs: []netip.Prefix{atP}, Netns: "/proc/" + pid + "/ns/net", Tap: "net0"},
		} {
			list := a.attached(isNamed(name))
			if len(list) != 1 || list[0].Overlay != want.Overlay || !slices.Equal(list[0].IPs, want.IPs) || list[0].Netns != want.Netns || list[0].Tap != want.Tap || list[0].NoDNS != want.NoDNS ||
				want.MAC != 0 && list[0].MAC != want.MAC || !list[0].Up || list[0].Node != "a" {
				t.Errorf("endpoint %s: %+v, want %+v", name, list, want)
			}
		}
		link, there, err := a1.Link("eth0")
		if err != nil || !there || !link.Up || !slices.Contains(link.Addrs, at1) || link.MTU != 1418 {
			t.Errorf("eth0 of a1: %+v, %v, %v", link, there, err)
		}
		o, is := a.carries("blue")
		if !is || !o.Up || o.Tap != "" || o.Address != "" || o.MAC != 0 {
			t.Errorf("a carries %+v, want it without a device of the host's own", o)
		}
		if taps := a.status().Offloads.Taps; len(taps) != 3 || taps["one"].Driver == "" || taps["pid-"+pid].Driver == "" {
			t.Errorf("offloads: %+v, want those of three devices, by their endpoints", taps)
		}
		took := ping(t, a1, at2.Addr(), 5*time.Second)
		t.Logf("on one host the first ping is answered after %v", took)
		ping(t, a1, atP.Addr(), 5*time.Second)
		enter(t, h[0], p.Pid(), "ping", "-c", "1", "-W", "5", at2.Addr().String())
		took = ping(t, a1, atB.Addr(), 10*time.Second)
		t.Logf("on two hosts the first ping is answered after %v", took)
		ping(t, b1, atP.Addr(), 5*time.Second)
		transfer(t, l, a1, a2, at2.Addr(), 16<<20)
		transfer(t, l, a2, b1, atB.Addr(), 16<<20)
		transfer(t, l, b1, a1, at1.Addr(), 16<<20)
	})

	part(t, "the host and its namespaces", nodes, func(t *testing.T) {
		own := a.exposed("blue")
		ping(t, h[0], at1.Addr(), 5*time.Second)
		ping(t, b1, own.Addr(), 5*time.Second)
		if o, _ := a.carries("blue"); o.Tap != "blue" || o.Address != own.String() {
			t.Errorf("a carries %+v, want it with the host's own device", o)
		}
		a.do("unexpose", "blue")
		ping(t, a1, atB.Addr(), 5*time.Second)
		if taps := a.status().Offloads.Taps; len(taps) != 3 {
			t.Errorf("offloads: %+v, want those of three devices", taps)
		}
	})

	part(t, "refused", nodes, func(t *testing.T) {
		for _, r := range []struct {
			args  string
			words []string
		}{
			{"blue --netns /run/netns/no-such-namespace", []string{"no network namespace at /run/netns/no-such-namespace", "ip netns list"}},
			{"blue --pid 4194305", []string{"no process 4194305"}},
			{"blue --netns " + binary, []string{"is no network namespace"}},
			{"blue --netns " + h[0].Path(), []string{"own network namespace", "tulle expose blue"}},
			{"blue --netns " + a1.Path(), []string{"eth0", "attached to overlay blue already", at1.String(), "--ifname"}},
			{"red --netns " + a1.Path(), []string{"eth0", "attached to overlay blue already", "--ifname"}},
			{"blue --netns " + a1.Path() + " --ifname lo", []string{"there is a device lo in that namespace already", "--ifname"}},
			{"blue --netns " + a1.Path() + " --ifname eth1 --ip " + at2.Addr().String(), []string{at2.Addr().String()}},
			{"blue --netns " + a1.Path() + " --ifname eth1 --ip " + atB.Addr().String(), []string{atB.Addr().String(), "node b"}},
			{"blue --netns " + a1.Path() + " --ifname eth1 --ip 10.99.0.1", []string{"10.99.0.1 lies in no subnet of overlay blue"}},
			{"blue --netns " + a1.Path() + " --ifname eth1 --mac 02:00:00:00:00:99", []string{"MAC 02:00:00:00:00:99", "--mac"}},
			{"green --netns " + a1.Path() + " --ifname eth1", []string{"no shared overlay green"}},
		} {
			a.refuses(r.words, append([]string{"attach"}, strings.Fields(r.args)...)...)
		}
		a.refuses([]string{"nothing of", "attached to an overlay", "red"}, "detach", "red", "--netns", a1.Path())
		a.refuses([]string{"no network namespace"}, "detach", "blue", "--netns", "/run/netns/no-such-namespace")
		if list := a.attached(func(node.Endpoint) bool { return true }); len(list) != 3 {
			t.Errorf("a has %d endpoints after all of it, want 3: %+v", len(list), list)
		}
		if used := a.used("blue"); used != 2 { // and 10.32.0.99, which is in no block of a's
			t.Errorf("a uses %d addresses of its blocks of blue after all of it, want 2", used)
		}
		if _, there, _ := a1.Link("eth1"); there {
			t.Error("a1 has a device eth1 after all of it")
		}
	})

	part(t, "three overlays in one namespace", nodes, func(t *testing.T) {
		red := a.attaches("red", "--netns", a1.Path(), "--ifname", "eth1", "--default-route", "--name", "one")
		out := a.do("attach", "dual", "--netns", a1.Path(), "--ifname", "eth2", "--name", "one")
		if lines := strings.Fields(out); len(lines) != 2 || !strings.HasPrefix(lines[0], "10.40.") || !strings.HasPrefix(lines[1], "fd40:") {
			t.Errorf("attach in an overlay of both families prints %q", out)
		}
		atRed := b.attaches("red", "--netns", b1.Path(), "--ifname", "eth1")
		ping(t, a1, atRed.Addr(), 10*time.Second)
		ping(t, a1, atB.Addr(), 5*time.Second)
		if routes := runIn(t, a1, "ip", "route"); !strings.Contains(routes, "default via 10.33.0.1 dev eth1") || red.Bits() != 16 {
			t.Errorf("routes of a1: %s", routes)
		}
		taps := a.status().Offloads.Taps
		for _, name := range []string{"one", "one@red", "one@dual"} {
			if _, is := taps[name]; !is {
				t.Errorf("offloads have no %s: %+v", name, taps)
			}
		}
		a.refuses([]string{"default route already", "--default-route"}, "attach", "blue", "--netns", a1.Path(), "--ifname", "eth3", "--default-route")
		a.do("detach", "red", "--netns", a1.Path())
		a.do("detach", "dual", "--netns", a1.Path(), "--ifname", "eth2")
		b.do("detach", "red", "--netns", b1.Path())
		for _, dev := range []string{"eth1", "eth2", "eth3"} {
			if _, there, _ := a1.Link(dev); there {
				t.Errorf("a1 has %s still", dev)
			}
		}
		if _, is := a.carries("red"); is {
			t.Error("a carries red still")
		}
		if used := a.used("red"); used != 0 {
			t.Errorf("a uses %d addresses of red still", used)
		}
		ping(t, a1, atB.Addr(), 5*time.Second)
	})

	part(t, "a device that somebody deletes", nodes, func(t *testing.T) {
		if err := a1.DelLink("eth0"); err != nil {
			t.Fatal(err)
		}
		a.eventually(2*time.Second, "the device is made again", func() bool { link, there, err := a1.Link("eth0"); return err == nil && there && link.Up })
		ping(t, a1, atB.Addr(), 5*time.Second)
	})

	part(t, "a namespace that loses its path", nodes, func(t *testing.T) {
		path, end := netnsNamed(t, unusedName("lost"))
		q, err := h[0].Start(exec.Command("nsenter", "--net="+path, "sleep", "600"))
		if err != nil {
			t.Fatal(err)
		}
		eventually(t, 5*time.Second, "the process is in the namespace", func() bool {
			comm, _ := os.ReadFile(fmt.Sprintf("/proc/%d/comm", q.Pid()))
			return string(comm) == "sleep\n"
		})
		addr := a.attaches("blue", "--netns", path, "--name", "lost")
		end()
		ping(t, b1, addr.Addr(), 5*time.Second)
		enter(t, h[0], q.Pid(), "ip", "link", "del", "eth0")
		ping(t, b1, addr.Addr(), 5*time.Second)
		q.Kill()
		a.eventually(time.Second, "the endpoint is gone", func() bool {
			return !slices.ContainsFunc(get[node.Endpoints](a, "/v1/endpoints?local=true").Endpoints, isNamed("lost"))
		})
	})

	part(t, "killed", nodes, func(t *testing.T) {
		untoken(a)
		before := a.attached(func(node.Endpoint) bool { return true })
		path, end := netnsNamed(t, unusedName("again"))
		a.attaches("blue", "--netns", path)
		used := a.used("blue")
		a.proc.Kill()
		<-a.proc.Done()
		// Another namespace at the same path, with the same inode as a rule.
		end()
		_, end = netnsNamed(t, filepath.Base(path))
		defer end()
		start := time.Now()
		a.start()
		ping(t, a1, atB.Addr(), 10*time.Second)
		t.Logf("killed with three endpoints, a1 answers again %v after the start", time.Since(start).Round(time.Millisecond))
		after := a.attached(func(node.Endpoint) bool { return true })
		if !reflect.DeepEqual(after, before) {
			t.Errorf("after the kill a has\n%+v\nand before\n%+v", after, before)
		}
		if got := a.used("blue"); got != used-1 {
			t.Errorf("a uses %d addresses of blue, want %d", got, used-1)
		}
		if out, err := exec.Command("ip", "-n", filepath.Base(path), "link", "show", "eth0").CombinedOutput(); err == nil {
			t.Errorf("a namespace that took the place of one that has ended is attached: %s", out)
		}
		enter(t, h[0], p.Pid(), "ping", "-c", "1", "-W", "5", at2.Addr().String())
	})

	part(t, "the namespace ends", nodes, func(t *testing.T) {
		used := a.used("blue")
		q := inside(t, h[0])
		addr := a.attaches("blue", "--pid", fmt.Sprint(q.Pid()), "--name", "brief")
		ping(t, b1, addr.Addr(), 5*time.Second)
		path, end := netnsNamed(t, unusedName("brief"))
		a.attaches("blue", "--netns", path, "--name", "file")
		if got := a.used("blue"); got != used+2 {
			t.Errorf("a uses %d addresses of blue, want %d", got, used+2)
		}
		for name, stop := range map[string]func(){"brief": q.Kill, "file": end} {
			start := time.Now()
			stop()
			a.eventually(2*time.Second, "the endpoint is gone", func() bool {
				return !slices.ContainsFunc(get[node.Endpoints](a, "/v1/endpoints?local=true").Endpoints, isNamed(name))
			})
			took := time.Since(start)
			t.Logf("the endpoint is gone %v after its namespace began to end", took.Round(time.Millisecond))
			if took > time.Second {
				t.Errorf("it takes %v, want 1 s at most", took)
			}
		}
		a.eventually(time.Second, "the addresses are free", func() bool { return a.used("blue") == used })
		if got := a.attaches("blue", "--netns", a1.Path(), "--ifname", "eth7", "--ip", addr.Addr().String()); got != addr {
			t.Errorf("asked for the address of the endpoint that is gone: %s", got)
		}
		a.do("detach", "blue", "--netns", a1.Path(), "--ifname", "eth7")
	})

	part(t, "overlay rm --force", nodes, func(t *testing.T) {
		a.refuses([]string{"blue"}, "overlay", "rm", "blue")
		a.do("overlay", "rm", "blue", "--force")
		for _, n := range nodes {
			n.eventually(5*time.Second, "its endpoints are gone", func() bool { return len(get[node.Endpoints](n, "/v1/endpoints?local=true").Endpoints) == 0 })
		}
		for _, h := range []*lab.Host{a1, a2, b1} {
			eventually(t, 2*time.Second, "eth0 is gone", func() bool { _, there, err := h.Link("eth0"); return err == nil && !there })
		}
	})
}

// TestRun: `tulle run` on one host.
func TestRun(t *testing.T) {
	t.Parallel()
	l, _, h := hosts(t, 1, lab.Underlay{Prefix4: underlay4})
	a := joined(t, l, h, nil)[0]
	a.do("overlay", "create", "blue", "--subnet", "10.32.0.0/16")
	c := containers(t, l, "c")[0]
	at := a.attaches("blue", "--netns", c.Path())
	run := func(args ...string) (status int, stdout, stderr string) {
		t.Helper()
		return a.command(append([]string{"run", "blue"}, args...)...)
	}
	left := func(what string) {
		t.Helper()
		a.eventually(2*time.Second, what+": nothing is left", func() bool {
			return len(get[node.Endpoints](a, "/v1/endpoints?local=true").Endpoints) == 1 && a.used("blue") == 1
		})
	}

	for _, tt := range []struct {
		args   []string
		status int
	}{
		{[]string{"--", "true"}, 0},
		{[]string{"--", "sh", "-c", "exit 42"}, 42},
		{[]string{"--", "sh", "-c", "kill -9 $$"}, 137},
		{[]string{"--", "no-such-command-at-all"}, 127},
		{[]string{"--", "/dev/null"}, 126},
		{[]string{"--name", "web", "--ip", "10.32.0.50", "--default-route", "--", "sh", "-c",
			"ip -o addr show eth0 | grep -q 10.32.0.50/16 && ip route | grep -q 'default via 10.32.0.1' && ip -o link show lo | grep -q LOOPBACK,UP && ping -c 1 -W 5 " + at.Addr().String()}, 0},
		{[]string{"--", "sh", "-c", "test \"$1\" = --help -a \"$2\" = 'a b'", "sh", "--help", "a b"}, 0},
	} {
		status, stdout, stderr := run(tt.args...)
		if status != tt.status {
			t.Errorf("tulle run %v: status %d, want %d: %s%s", tt.args, status, tt.status, stdout, stderr)
		}
		left(fmt.Sprint(tt.args))
	}
	if status, _, stderr := run("--ip", at.Addr().String(), "--", "true"); status != 1 || !strings.Contains(stderr, at.Addr().String()) {
		t.Errorf("an address that is taken: status %d, %s", status, stderr)
	}
	if status, _, stderr := a.command("run", "green", "--", "true"); status != 1 || !strings.Contains(stderr, "no shared overlay green") {
		t.Errorf("an overlay that there is not: status %d, %s", status, stderr)
	}
	if status, _, stderr := runTulle(t, h[0], "--socket", a.sock+"x", "run", "blue", "--", "true"); status != 1 || !strings.Contains(stderr, "no node is running here") {
		t.Errorf("no node: status %d, %s", status, stderr)
	}
	left("refused")

	t.Run("stdin and stdout", func(t *testing.T) {
		text := bytes.Repeat([]byte("all of it\n"), 100_000)
		var out, errs bytes.Buffer
		cmd := exec.Command(binary, "--socket", a.sock, "run", "blue", "--", "sh", "-c", "cat; echo to stderr >&2")
		cmd.Stdin, cmd.Stdout, cmd.Stderr = bytes.NewReader(text), &out, &errs
		p, err := h[0].Start(cmd)
		if err != nil {
			t.Fatal(err)
		}
		if err := p.Wait(); err != nil || !bytes.Equal(out.Bytes(), text) || errs.String() != "to stderr\n" {
			t.Errorf("%v: %d bytes back of %d, stderr %q", err, out.Len(), len(text), errs.String())
		}
	})

	t.Run("signals", func(t *testing.T) {
		for _, sig := range []syscall.Signal{syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP, syscall.SIGUSR1, syscall.SIGQUIT} {
			for _, caught := range []bool{true, false} {
				script, want := "echo ready; sleep 60 & wait", 128+int(sig)
				if caught {
					script, want = fmt.Sprintf("trap 'exit 7' %d; ", sig)+script, 7
				}
				out := &heard{}
				// A shell cannot trap what was ignored when it began, as SIGHUP is under nohup.
				cmd := exec.Command("env", "--default-signal", binary, "--socket", a.sock, "run", "blue", "--", "sh", "-c", script)
				cmd.Stdout, cmd.Stderr = out, out
				p, err := h[0].Start(cmd)
				if err != nil {
					t.Fatal(err)
				}
				eventually(t, 10*time.Second, "the command runs", func() bool { return strings.Contains(out.String(), "ready") })
				if err := p.Signal(sig); err != nil {
					t.Fatal(err)
				}
				err = p.Wait()
				if exit, ok := errors.AsType[*exec.ExitError](err); !ok || exit.ExitCode() != want {
					t.Errorf("%v, caught %v: %v, want status %d: %s", sig, caught, err, want, out)
				}
			}
		}
		left("signals")
	})

	t.Run("killed", func(t *testing.T) {
		out := &heard{}
		cmd := exec.Command(binary, "--socket", a.sock, "run", "blue", "--", "sh", "-c", "echo $$; exec sleep 600")
		cmd.Stdout = out
		p, err := h[0].Start(cmd)
		if err != nil {
			t.Fatal(err)
		}
		eventually(t, 10*time.Second, "the command runs", func() bool { return strings.HasSuffix(out.String(), "\n") })
		if err := p.Signal(syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		<-p.Done()
		left("killed")
		if _, err := os.Stat("/proc/" + strings.TrimSpace(out.String()) + "/ns/net"); err == nil {
			t.Error("the command goes on")
		}
	})

	t.Run("terminal", func(t *testing.T) {
		// script makes a terminal; what is typed arrives, and Ctrl-C ends the command, once.
		// It runs a shell, which would hear Ctrl-C too.
		in, keys := io.Pipe()
		out := &heard{}
		cmd := exec.Command("script", "-qec", "exec "+binary+" --socket "+a.sock+` run blue -- sh -c 'trap "echo interrupted; exit 5" INT; tty; read x; echo got $x; read x'`, "/dev/null")
		cmd.Stdin, cmd.Stdout, cmd.Stderr = in, out, out
		p, err := h[0].Start(cmd)
		if err != nil {
			t.Fatal(err)
		}
		defer keys.Close()
		eventually(t, 10*time.Second, "the command has a terminal", func() bool { return strings.Contains(out.String(), "/dev/pts/") })
		_, _ = keys.Write([]byte("word\n"))
		eventually(t, 5*time.Second, "it reads what is typed", func() bool { return strings.Contains(out.String(), "got word") })
		_, _ = keys.Write([]byte{3})
		eventually(t, 5*time.Second, "Ctrl-C reaches it", func() bool { return strings.Contains(out.String(), "interrupted") })
		_ = keys.Close()
		err = p.Wait()
		if exit, ok := errors.AsType[*exec.ExitError](err); !ok || exit.ExitCode() != 5 || strings.Count(out.String(), "interrupted") != 1 {
			t.Errorf("%v, want status 5 and one interruption: %s", err, out)
		}
		left("terminal")
	})
}

// heard is a buffer that may be read while it is written.
type heard struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *heard) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *heard) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// request makes a request of the API and returns the body of a good answer.
func (n *tulle) request(method, path string, body any) ([]byte, error) {
	b, err := json.Marshal(body)
	if err != nil {
		return nil, err
	}
	r, err := http.NewRequestWithContext(context.Background(), method, "http://tulle"+path, bytes.NewReader(b))
	if err != nil {
		return nil, err
	}
	answer, err := n.http.Do(r)
	if err != nil {
		return nil, err
	}
	defer answer.Body.Close()
	got, err := io.ReadAll(answer.Body)
	if err == nil && answer.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s %s: %s: %s", method, path, answer.Status, got)
	}
	return got, err
}

// TestAttachChurn: whatever the order, nothing is left of what was detached.
func TestAttachChurn(t *testing.T) {
	t.Parallel()
	const rounds, spaces = 50, 10
	l, _, h := hosts(t, 1, lab.Underlay{Prefix4: underlay4})
	a := joined(t, l, h, nil)[0]
	overlays := []string{"blue", "red"}
	for i, o := range overlays {
		a.do("overlay", "create", o, "--subnet", fmt.Sprintf("10.%d.0.0/16", 32+i))
	}
	paths := make([]string, spaces)
	for i := range paths {
		paths[i], _ = netnsNamed(t, unusedName(fmt.Sprintf("churn%d", i)))
	}
	fds := func() int {
		list, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", a.proc.Pid()))
		if err != nil {
			t.Fatal(err)
		}
		return len(list)
	}
	type where struct{ overlay, path string }
	attach := func(w where) time.Duration {
		start := time.Now()
		_, err := a.request(http.MethodPost, "/v1/endpoints", node.AttachRequest{Overlay: w.overlay, Netns: w.path, Ifname: w.overlay})
		if err != nil {
			t.Error(err)
		}
		return time.Since(start)
	}
	detach := func(w where) {
		if _, err := a.request(http.MethodDelete, "/v1/endpoints?"+url.Values{"overlay": {w.overlay}, "netns": {w.path}}.Encode(), nil); err != nil {
			t.Error(err)
		}
	}
	// The first makes what stays: a block, the kept connections.
	for _, o := range overlays {
		attach(where{o, paths[0]})
		detach(where{o, paths[0]})
	}
	before := fds()
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewPCG(seed, 0))
	var there []where
	var took []time.Duration
	for len(took) < rounds || len(there) > 0 {
		free := where{overlays[r.IntN(len(overlays))], paths[r.IntN(spaces)]}
		if len(took) < rounds && !slices.Contains(there, free) && r.IntN(3) > 0 {
			took, there = append(took, attach(free)), append(there, free)
		} else if len(there) > 0 {
			i := r.IntN(len(there))
			detach(there[i])
			there = slices.Delete(there, i, i+1)
		}
	}
	slices.Sort(took)
	t.Logf("an attach takes %v (median of %d; fastest %v, slowest %v)", took[rounds/2], rounds, took[0], took[rounds-1])
	// And several at once, each with its namespace.
	var wg sync.WaitGroup
	for _, path := range paths {
		wg.Go(func() {
			for range 3 {
				attach(where{"blue", path})
				detach(where{"blue", path})
			}
		})
	}
	wg.Wait()
	if list := get[node.Endpoints](a, "/v1/endpoints?local=true").Endpoints; len(list) != 0 {
		t.Errorf("endpoints are left: %+v", list)
	}
	for _, o := range overlays {
		if used := a.used(o); used != 0 {
			t.Errorf("%d addresses of %s are in use", used, o)
		}
	}
	for _, path := range paths {
		out, err := exec.Command("ip", "-n", filepath.Base(path), "-o", "link").CombinedOutput()
		if err != nil || strings.Count(string(out), "\n") != 1 {
			t.Errorf("%s has more than its loopback (%v): %s", path, err, out)
		}
	}
	if out := runIn(t, h[0], "ip", "-o", "link"); strings.Count(out, "\n") != 2 {
		t.Errorf("the host has more than its loopback and ul: %s", out)
	}
	a.eventually(5*time.Second, "no descriptor is left", func() bool { return fds() <= before })
	// The runtime lists its goroutines as it dies.
	if err := a.proc.Signal(syscall.SIGQUIT); err != nil {
		t.Fatal(err)
	}
	<-a.proc.Done()
	log := a.proc.Log()
	for _, f := range []string{"bridge.(*Port).run", "node.(*endpoints)", "tap.cookieOf"} {
		if strings.Contains(log, f) {
			t.Errorf("a goroutine of %s is left", f)
		}
	}
	if !strings.Contains(log, "goroutine ") {
		t.Error("the node lists no goroutines")
	}
}
