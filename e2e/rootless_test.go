package e2e

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/tulle-net/tulle/internal/lab"
	"github.com/tulle-net/tulle/node"
)

//	a ──[ul]── b      on each host an ordinary user has a node, and containers in user
//	│          │      namespaces: nobody has any right on a host
//	c1 c2      d1
//
// Who runs a test is root, and makes the hosts; /dev/net/tun is 0666 for the users alone,
// in a mount namespace.

// ordinary is a user without any right on a host.
type ordinary struct {
	t    *testing.T
	host *lab.Host
	id   string   // uid and gid
	dir  string   // the user's home
	env  []string // all of the environment
	enter,
	drop []string // the commands that lead to the user's mount namespace, and to the user
}

var ordinaries atomic.Int64

// ordinaryUser returns a user of the host with a /dev/net/tun of a mode, who has no name unless
// one is given.
func ordinaryUser(t *testing.T, h *lab.Host, name, mode string) *ordinary {
	t.Helper()
	u := &ordinary{t: t, host: h, id: fmt.Sprint(1_900_000_000 + int64(os.Getpid())*16 + ordinaries.Add(1))}
	dir, err := os.MkdirTemp("/tmp", "tulletest-user-") // short: it holds sockets
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	u.dir = dir
	u.drop = []string{"setpriv", "--reuid", u.id, "--regid", u.id, "--clear-groups", "--bounding-set=-all", "--inh-caps=-all"}
	if name != "" {
		u.id = strings.TrimSpace(command(t, "id", "-u", name))
		u.drop = []string{"setpriv", "--reuid", name, "--regid", name, "--init-groups"}
	}
	u.env = []string{"HOME=" + dir, "XDG_RUNTIME_DIR=" + dir + "/run", "PATH=" + os.Getenv("PATH"), "USER=" + name}
	own := dir + "/bin"
	command(t, "mkdir", "-p", dir+"/run", own)
	command(t, "cp", binary, own+"/tulle")
	command(t, "chown", "-R", u.id+":"+u.id, dir)
	tun := dir + "/tun"
	command(t, "mknod", "-m", mode, tun, "c", "10", "200")
	p, err := h.Start(exec.Command("unshare", "--mount", "--propagation", "slave", "sh", "-c", "mount --bind "+tun+" /dev/net/tun && exec sleep 600"))
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, 5*time.Second, "the user's /dev/net/tun is there", func() bool {
		comm, _ := os.ReadFile(fmt.Sprintf("/proc/%d/comm", p.Pid()))
		return string(comm) == "sleep\n"
	})
	u.enter = []string{"nsenter", "-t", fmt.Sprint(p.Pid()), "-m", "--wd=" + dir}
	return u
}

// command runs a tool that must succeed.
func command(t *testing.T, args ...string) string {
	t.Helper()
	out, err := exec.Command(args[0], args[1:]...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v: %s", strings.Join(args, " "), err, out)
	}
	return string(out)
}

// argv is how the test starts a command as the user.
func (u *ordinary) argv(args ...string) []string {
	return slices.Concat(u.enter, u.drop, []string{"env", "-i"}, u.env, args)
}

func (u *ordinary) tulle() string { return u.dir + "/bin/tulle" }

// start starts a command.
func (u *ordinary) start(args ...string) *lab.Process {
	u.t.Helper()
	argv := u.argv(args...)
	p, err := u.host.Start(exec.Command(argv[0], argv[1:]...))
	if err != nil {
		u.t.Fatal(err)
	}
	return p
}

// run runs a command to its end.
func (u *ordinary) run(args ...string) (status int, stdout, stderr string) {
	u.t.Helper()
	var out, errs bytes.Buffer
	argv := u.argv(args...)
	cmd := exec.Command(argv[0], argv[1:]...)
	cmd.Stdout, cmd.Stderr = &out, &errs
	p, err := u.host.Start(cmd)
	if err != nil {
		u.t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 60*time.Second) // also for what cleans up
	defer cancel()
	defer context.AfterFunc(ctx, p.Kill)()
	_ = p.Wait() // the status says it
	if ctx.Err() != nil {
		u.t.Fatalf("%s: %s goes on:\n%s", u.host.Name(), strings.Join(args, " "), errs.String())
	}
	return cmd.ProcessState.ExitCode(), out.String(), errs.String()
}

// does runs a command that must succeed.
func (u *ordinary) does(args ...string) (stdout string) {
	u.t.Helper()
	status, stdout, stderr := u.run(args...)
	if status != 0 {
		u.t.Fatalf("%s: %s: status %d: %s%s", u.host.Name(), strings.Join(args, " "), status, stdout, stderr)
	}
	return stdout
}

// up starts the user's node, with state and socket where they are by default.
func (u *ordinary) up(args ...string) *tulle {
	u.t.Helper()
	n := &tulle{t: u.t, host: u.host, name: u.host.Name(), program: u.argv(u.tulle()), sock: u.dir + "/run/tulle/tulle.sock"}
	n.args = append([]string{"up", "--rootless", "--name", n.name}, args...)
	n.http = http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", n.sock)
		},
	}}
	u.t.Cleanup(n.explain)
	n.start()
	return n
}

// container starts a process in a user and a network namespace of its own, as a
// rootless container is.
func (u *ordinary) container() *lab.Process {
	u.t.Helper()
	p := u.start("unshare", "--user", "--map-root-user", "--net", "sleep", "600")
	eventually(u.t, 5*time.Second, "the container runs", func() bool {
		comm, _ := os.ReadFile(fmt.Sprintf("/proc/%d/comm", p.Pid()))
		return string(comm) == "sleep\n"
	})
	return p
}

// attaches puts a process on an overlay and returns its address.
func (u *ordinary) attaches(overlay string, pid int, args ...string) netip.Addr {
	u.t.Helper()
	out := u.does(append([]string{u.tulle(), "attach", overlay, "--pid", fmt.Sprint(pid)}, args...)...)
	p, err := netip.ParsePrefix(strings.TrimSuffix(out, "\n"))
	if err != nil {
		u.t.Fatalf("tulle attach prints %q", out)
	}
	return p.Addr()
}

// fails runs tulle, which must fail with one line that has the words.
func (u *ordinary) fails(words []string, args ...string) {
	u.t.Helper()
	status, stdout, stderr := u.run(append([]string{u.tulle()}, args...)...)
	if status == 0 || stdout != "" {
		u.t.Errorf("tulle %s: status %d, prints %q: want it refused", strings.Join(args, " "), status, stdout)
		return
	}
	wantRefusal(u.t, status, stderr, words...)
}

// has returns the node's own endpoints.
func (n *tulle) has() []node.Endpoint {
	n.t.Helper()
	list := get[node.Endpoints](n, "/v1/endpoints").Endpoints
	return slices.DeleteFunc(list, func(e node.Endpoint) bool { return e.Node != n.name })
}

func pings(t *testing.T, h *lab.Host, pid int, to netip.Addr) {
	t.Helper()
	enter(t, h, pid, "ping", "-c", "1", "-W", "10", "-w", "10", to.String())
}

// listens waits for iperf3, which listens anew after each client.
func listens(t *testing.T, h *lab.Host, pid int) {
	t.Helper()
	eventually(t, 10*time.Second, "iperf3 listens", func() bool {
		if pid != 0 {
			return strings.Contains(enter(t, h, pid, "ss", "-Hltn"), ":5201")
		}
		return strings.Contains(runIn(t, h, "ss", "-Hltn"), ":5201")
	})
}

// rates has a process's container send to another's and take from it by TCP.
func rates(t *testing.T, from *lab.Host, pid int, to *lab.Host, toPID int, at netip.Addr) {
	t.Helper()
	server, err := to.Start(exec.Command("nsenter", "-t", fmt.Sprint(toPID), "-n", "iperf3", "-s"))
	if err != nil {
		t.Fatal(err)
	}
	defer server.Kill()
	for _, way := range [][]string{nil, {"-R"}} {
		listens(t, to, toPID)
		enter(t, from, pid, append([]string{"iperf3", "-c", at.String(), "-n", "8M"}, way...)...)
	}
}

func TestRootless(t *testing.T) {
	t.Parallel()
	_, _, h := hosts(t, 2, lab.Underlay{Prefix4: underlay4, Offloads: lab.Wire})
	ua, ub := ordinaryUser(t, h[0], "", "0666"), ordinaryUser(t, h[1], "", "0666")
	a := ua.up()
	token := strings.TrimSpace(ua.does(ua.tulle(), "token", "create"))
	b := ub.up("--token", token)
	meet(t, 15*time.Second, a, b)
	if !a.status().Node.Rootless {
		t.Error("the node does not say that it is rootless")
	}
	if b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", a.proc.Pid())); err != nil || !strings.Contains(string(b), "CapEff:\t0000000000000000") || !strings.Contains(string(b), "Uid:\t"+ua.id+"\t") {
		t.Fatalf("the node is no ordinary user's: %v\n%s", err, b)
	}
	if _, err := os.Stat(ua.dir + "/.local/state/tulle/lock"); err != nil {
		t.Error(err)
	}
	ua.does(ua.tulle(), "overlay", "create", "blue", "--subnet", "10.32.0.0/16", "--subnet", "fd32::/64")
	known(t, 10*time.Second, "blue", true, a, b)
	c1, c2, d1 := ua.container(), ua.container(), ub.container()
	out := strings.Fields(ua.does(ua.tulle(), "attach", "blue", "--pid", fmt.Sprint(c1.Pid()), "--name", "web"))
	if len(out) != 2 {
		t.Fatalf("tulle attach prints %q", out)
	}
	at1, at16 := netip.MustParsePrefix(out[0]).Addr(), netip.MustParsePrefix(out[1]).Addr()
	out = strings.Fields(ub.does(ub.tulle(), "attach", "blue", "--pid", fmt.Sprint(d1.Pid())))
	at3, at36 := netip.MustParsePrefix(out[0]).Addr(), netip.MustParsePrefix(out[1]).Addr()
	out = strings.Fields(ua.does(ua.tulle(), "attach", "blue", "--pid", fmt.Sprint(c2.Pid())))
	at2 := netip.MustParsePrefix(out[0]).Addr()

	both := func(what string) {
		t.Helper()
		for _, x := range []struct {
			h   *lab.Host
			pid int
			to  netip.Addr
		}{{h[0], c1.Pid(), at3}, {h[1], d1.Pid(), at1}, {h[0], c1.Pid(), at2}, {h[0], c2.Pid(), at3}, {h[0], c1.Pid(), at36}, {h[1], d1.Pid(), at16}} {
			pings(t, x.h, x.pid, x.to)
		}
		for _, pid := range []int{c1.Pid(), d1.Pid()} { // names too, on both hosts
			h := h[0]
			if pid == d1.Pid() {
				h = b.host
			}
			b.eventually(5*time.Second, "the container's name is answered", func() bool {
				out, err := h.Run(t.Context(), "nsenter", "-t", fmt.Sprint(pid), "-n", "dig", "+short", "+time=2", "+tries=1", "@169.254.53.53", "web.blue.tulle")
				return err == nil && strings.TrimSpace(string(out)) == at1.String()
			})
		}
		t.Log(what + ": all answer")
	}
	both("attached")
	rates(t, h[0], c1.Pid(), h[1], d1.Pid(), at3)
	st := a.status()
	if o := st.Offloads.Taps["web"]; o.Driver != "offload" || o.Checksum != "on" || o.TSO4 != "on" || o.TSO6 != "on" || o.GRO != "on" || !strings.HasPrefix(o.USO, "on") {
		t.Errorf("offloads of an endpoint: %+v", o)
	}
	if o := st.Overlays[0]; o.Encryption != "required" {
		t.Errorf("overlay: %+v", o)
	}

	t.Run("refused", func(t *testing.T) {
		ua.t = t
		ua.fails([]string{"rootless", "host's network namespace"}, "expose", "blue")
		ua.fails([]string{"not in a user namespace of this user's own"}, "attach", "blue", "--netns", h[1].Path())
		ua.fails([]string{"driver tun"}, "attach", "blue", "--pid", fmt.Sprint(c1.Pid()), "--ifname", "eth7", "--driver", "tun")
		ua.fails([]string{"static", "overlay create red"}, "up", "--rootless", "--state-dir", ua.dir+"/other", "--overlay", "name=red,vni=7")
		ua.fails([]string{"tulle up --rootless"}, "--socket", ua.dir+"/other.sock", "up", "--state-dir", "/var/lib/other")
		foreign := filepath.Join(t.TempDir(), "sock")
		ln, err := net.Listen("unix", foreign)
		if err != nil {
			t.Fatal(err)
		}
		defer ln.Close()
		command(t, "chown", "77", foreign)
		command(t, "chmod", "777", foreign, filepath.Dir(foreign), filepath.Dir(filepath.Dir(foreign)))
		ua.fails([]string{"the socket of user 77", "neither yours nor root's"}, "--socket", foreign, "status")
		status, _, stderr := ub.run(ub.tulle(), "--socket", a.sock, "status")
		if status != 1 || !strings.Contains(stderr, "no permission to ask the node") {
			t.Errorf("another user asks: status %d, %s", status, stderr)
		}
	})
	ua.t = t

	t.Run("restart", func(t *testing.T) {
		a.proc.Kill()
		_ = a.proc.Wait()
		a.start()
		a.eventually(10*time.Second, "its endpoints are there again", func() bool {
			list := a.has()
			return len(list) == 2 && list[0].Up && list[1].Up
		})
		meet(t, 15*time.Second, a, b)
		both("after kill -9 and a start")
	})

	t.Run("upgrade", func(t *testing.T) {
		ua.t = t
		ua.does(ua.tulle(), "upgrade")
		a.eventually(10*time.Second, "its endpoints are there still", func() bool {
			list := a.has()
			return len(list) == 2 && list[0].Up && list[1].Up
		})
		both("after an upgrade")
	})
	ua.t = t

	t.Run("end", func(t *testing.T) {
		for _, x := range []struct {
			n *tulle
			p *lab.Process
		}{{a, c1}, {b, d1}} { // attached to again, and made by this run
			before := len(x.n.has())
			x.p.Kill()
			_ = x.p.Wait()
			took := x.n.eventually(3*time.Second, "the endpoint of a container that has ended is gone", func() bool {
				return len(x.n.has()) == before-1
			})
			t.Logf("%s: gone after %v", x.n.name, took.Round(time.Millisecond))
		}
	})

	t.Run("detach", func(t *testing.T) {
		ua.t = t
		ua.does(ua.tulle(), "detach", "blue", "--pid", fmt.Sprint(c2.Pid()))
		if out := enter(t, h[0], c2.Pid(), "ip", "-o", "link"); strings.Contains(out, "eth0") {
			t.Errorf("the device is still there: %s", out)
		}
	})
	ua.t = t
}

func TestRootlessRun(t *testing.T) {
	t.Parallel()
	_, _, h := hosts(t, 1, lab.Underlay{Prefix4: underlay4})
	u := ordinaryUser(t, h[0], "", "0666")
	a := u.up()
	u.does(u.tulle(), "overlay", "create", "blue", "--subnet", "10.32.0.0/16")
	c := u.container()
	at := u.attaches("blue", c.Pid())
	left := func(what string) {
		t.Helper()
		a.eventually(3*time.Second, what+": nothing is left", func() bool { return len(a.has()) == 1 })
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
		{[]string{"--ip", "10.32.0.50", "--", "sh", "-c",
			"test $(id -u) = 0 && ip -o addr show eth0 | grep -q 10.32.0.50/16 && ip -o link show lo | grep -q LOOPBACK,UP && ip link set eth0 mtu 1300 && ping -c 1 -W 5 " + at.String()}, 0},
		{[]string{"--", "sh", "-c", "grep -q '^nameserver 169.254.53.53$' /etc/resolv.conf && grep -q '^search blue.tulle' /etc/resolv.conf"}, 0},
	} {
		status, stdout, stderr := u.run(append([]string{u.tulle(), "run", "blue"}, tt.args...)...)
		if status != tt.status {
			t.Errorf("tulle run %v: status %d, want %d: %s%s", tt.args, status, tt.status, stdout, stderr)
		}
		left(fmt.Sprint(tt.args))
	}
	t.Run("signals", func(t *testing.T) {
		mark := filepath.Join(u.dir, "marked")
		p := u.start(u.tulle(), "run", "blue", "--", "sh", "-c", "trap 'exit 7' TERM; echo $$ > "+mark+"; while :; do sleep 0.05; done")
		eventually(t, 10*time.Second, "the command runs", func() bool { _, err := os.Stat(mark); return err == nil })
		p.Signal(15)
		if err := p.Wait(); err == nil || !strings.Contains(err.Error(), "exit status 7") {
			t.Errorf("after SIGTERM: %v, want status 7", err)
		}
		left("a signal")
	})
	t.Run("killed", func(t *testing.T) {
		mark := filepath.Join(u.dir, "runs")
		p := u.start(u.tulle(), "run", "blue", "--", "sh", "-c", "echo $$ > "+mark+"; exec sleep 600")
		pid := ""
		eventually(t, 10*time.Second, "the command runs", func() bool {
			b, _ := os.ReadFile(mark)
			pid = strings.TrimSpace(string(b))
			return pid != ""
		})
		p.Kill()
		_ = p.Wait()
		eventually(t, 3*time.Second, "the command has ended with its parent", func() bool { _, err := os.Stat("/proc/" + pid); return err != nil })
		left("kill -9 of tulle run")
	})
}

func TestRootlessLacks(t *testing.T) {
	t.Parallel()
	_, _, h := hosts(t, 1, lab.Underlay{Prefix4: underlay4})
	u := ordinaryUser(t, h[0], "", "0600")
	words := []string{"/dev/net/tun is not readable and writable for user " + u.id, "mode is 0600", "setfacl -m u:" + u.id + ":rw /dev/net/tun", "udev"}
	u.fails(words, "up", "--rootless", "--name", "a")
	status, stdout, _ := u.run(u.tulle(), "doctor", "--rootless")
	for _, word := range append(words, "user_namespaces") {
		if status != 1 || !strings.Contains(strings.Join(strings.Fields(stdout), " "), word) {
			t.Errorf("tulle doctor --rootless: status %d, want %q:\n%s", status, word, stdout)
		}
	}
}

// TestExampleRootless runs the script as an ordinary user.
func TestExampleRootless(t *testing.T) {
	t.Parallel()
	_, _, h := hosts(t, 1, lab.Underlay{Prefix4: underlay4})
	u := ordinaryUser(t, h[0], "", "0666")
	command(t, "cp", "../examples/rootless/rootless.sh", u.dir+"/bin/rootless.sh")
	out := u.does("env", "ADVERTISE=192.168.77.1", u.dir+"/bin/rootless.sh", u.tulle())
	for _, want := range []string{"0\n", "10.32.", "3 received, 0% packet loss"} {
		if !strings.Contains(out, want) {
			t.Errorf("the script does not print %q:\n%s", want, out)
		}
	}
	status, _, stderr := runScript(t, "../examples/rootless/rootless.sh", binary)
	if status != 1 || !strings.Contains(stderr, "as an ordinary user") {
		t.Errorf("run by root: status %d, %s", status, stderr)
	}
}

func runScript(t *testing.T, path string, args ...string) (status int, stdout, stderr string) {
	t.Helper()
	var out, errs bytes.Buffer
	cmd := exec.CommandContext(t.Context(), path, args...)
	cmd.Stdout, cmd.Stderr = &out, &errs
	_ = cmd.Run() // the status says it
	return cmd.ProcessState.ExitCode(), out.String(), errs.String()
}
