package e2e

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tulle-net/tulle/internal/lab"
)

//	a ──[ul]        one host; a start that fails says why in one line and leaves nothing behind

// attempt is a start that must fail.
type attempt struct {
	t     *testing.T
	l     *lab.Lab
	h     *lab.Host
	at    netip.Addr
	state string
	sock  string
}

func newAttempt(t *testing.T) *attempt {
	t.Helper()
	l, sw, h := hosts(t, 1, lab.Underlay{})
	return &attempt{t: t, l: l, h: h[0], at: sw.Addr(h[0]), state: filepath.Join(l.Dir(), "state"), sock: filepath.Join(l.Dir(), "sock")}
}

// up runs `tulle up` to its end.
func (x *attempt) up(args ...string) (status int, stderr string) {
	x.t.Helper()
	return x.run(append([]string{binary, "up", "--name", "a", "--state-dir", x.state, "--socket", x.sock}, args...)...)
}

// run runs a command on the host to its end and returns its status and what it
// wrote to stderr; it must write nothing to stdout and leave no device behind.
func (x *attempt) run(command ...string) (status int, stderr string) {
	x.t.Helper()
	devices := x.devices()
	var out, errs bytes.Buffer
	cmd := exec.Command(command[0], command[1:]...)
	cmd.Stdout, cmd.Stderr = &out, &errs
	p, err := x.h.Start(cmd)
	if err != nil {
		x.t.Fatal(err)
	}
	select {
	case <-p.Done():
	case <-time.After(20 * time.Second):
		p.Kill()
		<-p.Done()
		x.t.Fatalf("%s goes on, and should have failed:\n%s", command, errs.String())
	}
	if err := p.Wait(); err != nil {
		exit, ok := errors.AsType[*exec.ExitError](err)
		if !ok || !exit.Exited() {
			x.t.Fatalf("%s: %v\n%s", command, err, errs.String())
		}
		status = exit.ExitCode()
	}
	if out.Len() > 0 {
		x.t.Errorf("stdout is %q, want nothing", out.String())
	}
	if got := x.devices(); got != devices {
		x.t.Errorf("the devices were\n%sand are\n%s", devices, got)
	}
	return status, errs.String()
}

// devices lists names, settings and addresses.
func (x *attempt) devices() string {
	x.t.Helper()
	var b strings.Builder
	err := x.h.Do(func() error {
		all, err := net.Interfaces()
		if err != nil {
			return err
		}
		for i := range all {
			addrs, err := all[i].Addrs()
			if err != nil {
				return err
			}
			fmt.Fprintln(&b, all[i].Index, all[i].Name, all[i].HardwareAddr, all[i].MTU, all[i].Flags, addrs)
		}
		return nil
	})
	if err != nil {
		x.t.Fatal(err)
	}
	return b.String()
}

// fails checks status and message, one line with all the words, and that
// neither socket nor lock stayed.
func (x *attempt) fails(status, want int, stderr string, words ...string) {
	x.t.Helper()
	if status != want {
		x.t.Errorf("status %d, want %d", status, want)
	}
	if !strings.HasPrefix(stderr, "tulle: ") || strings.Count(stderr, "\n") != 1 || len(stderr) > 500 {
		x.t.Errorf("stderr is %q, want one line", stderr)
	}
	for _, w := range words {
		if !strings.Contains(stderr, w) {
			x.t.Errorf("stderr is %q, want %q in it", stderr, w)
		}
	}
	x.clean()
}

func (x *attempt) clean() {
	x.t.Helper()
	for _, f := range []string{x.sock, x.sock + ".new"} {
		if _, err := os.Lstat(f); !errors.Is(err, os.ErrNotExist) {
			x.t.Errorf("%s is there after the failure (%v)", f, err)
		}
	}
	lock, err := os.OpenFile(filepath.Join(x.state, "lock"), os.O_RDWR, 0)
	if errors.Is(err, os.ErrNotExist) {
		return
	}
	if err != nil {
		x.t.Fatal(err)
	}
	defer lock.Close()
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		x.t.Errorf("the state directory is locked after the failure: %v", err)
	}
}

func TestPortTaken(t *testing.T) {
	t.Parallel()
	t.Run("kernel vxlan", func(t *testing.T) {
		x := newAttempt(t)
		if err := x.h.AddVXLAN("vx7", lab.VXLAN{VNI: 7, Local: x.at, Dev: "ul"}); err != nil {
			t.Fatal(err)
		}
		status, stderr := x.up("--overlay", overlay(1))
		x.fails(status, 1, stderr, "4789", "kernel vxlan device vx7", "--listen [::]:4790")
		// The advice helps.
		a := up(t, x.l, x.h, "--listen", "[::]:4790", "--overlay", overlay(1))
		if got := a.status().Node.VTEP.Port(); got != 4790 {
			t.Errorf("VTEP port %d, want 4790", got)
		}
	})
	for _, c := range []struct {
		name, network, at string
		args, words       []string
	}{
		{"data IPv4", "udp", "0.0.0.0:4789", nil, []string{"4789", "in use", "Docker Swarm", "--listen [::]:4790"}},
		{"data IPv6", "udp", "[::]:4789", nil, []string{"4789", "in use", "--listen [::]:4790"}},
		{"data, another port", "udp", "0.0.0.0:5555", []string{"--listen", ":5555"}, []string{"5555", "in use", "--listen"}},
		{"gossip UDP", "udp", "0.0.0.0:7946", nil, []string{"7946", "in use", "--gossip"}},
		{"gossip TCP", "tcp", "0.0.0.0:7946", nil, []string{"7946", "in use", "--gossip"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			x := newAttempt(t)
			occupy(t, x.h, c.network, c.at)
			status, stderr := x.up(append(c.args, "--overlay", overlay(1))...)
			x.fails(status, 1, stderr, c.words...)
		})
	}
}

// occupy takes a port of a host until the test ends.
func occupy(t *testing.T, h *lab.Host, network, at string) {
	t.Helper()
	var closer interface{ Close() error }
	var err error
	if network == "tcp" {
		closer, err = h.Listen(at)
	} else {
		closer, err = h.ListenPacket(at)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { closer.Close() })
}

// TestNoTun: the machine, or the container, has no /dev/net/tun.
func TestNoTun(t *testing.T) {
	t.Parallel()
	x := newAttempt(t)
	status, stderr := x.run("unshare", "--mount", "sh", "-c", `mount -t tmpfs none /dev/net && exec "$0" "$@"`,
		binary, "up", "--name", "a", "--state-dir", x.state, "--socket", x.sock, "--overlay", overlay(1))
	x.fails(status, 1, stderr, "/dev/net/tun", "modprobe tun")
}

// TestNoPrivilege starts as nobody, with ever more allowed.
func TestNoPrivilege(t *testing.T) {
	t.Parallel()
	x := newAttempt(t)
	// A place where nobody may read, write and execute.
	dir := t.TempDir()
	program := filepath.Join(dir, "tulle")
	b, err := os.ReadFile(binary)
	if err == nil {
		err = errors.Join(os.WriteFile(program, b, 0o755), os.Chmod(filepath.Dir(dir), 0o755), os.Chown(dir, 65534, 65534))
	}
	if err != nil {
		t.Fatal(err)
	}
	nobody := []string{"setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups"}
	inDir := []string{"--state-dir", filepath.Join(dir, "state"), "--socket", filepath.Join(dir, "sock")}
	x.state, x.sock = filepath.Join(dir, "state"), filepath.Join(dir, "sock")

	// With the defaults.
	locked := filepath.Join(x.l.Dir(), "locked") // stands for /var/lib, which a test does not touch
	status, stderr := x.run(append(nobody, program, "up", "--name", "a", "--state-dir", locked, "--socket", x.sock, "--overlay", overlay(1))...)
	x.fails(status, 1, stderr, "state directory", "permission denied", "run as root")
	status, stderr = x.run(append(nobody, program, "up", "--name", "a", "--state-dir", x.state, "--socket", locked, "--overlay", overlay(1))...)
	x.fails(status, 1, stderr, "socket", "permission denied", "run as root")
	// With a state and a socket of its own.
	command := append(append(nobody, program, "up", "--name", "a", "--overlay", overlay(1)), inDir...)
	if i, err := os.Stat("/dev/net/tun"); err == nil && i.Mode().Perm()&0o006 == 0 {
		status, stderr = x.run(command...)
		x.fails(status, 1, stderr, "/dev/net/tun", "run as root")
	}
	// And with a /dev/net/tun for everybody, as Debian's udev makes it.
	tun := filepath.Join(dir, "tun")
	if err := errors.Join(unix.Mknod(tun, unix.S_IFCHR|0o666, int(unix.Mkdev(10, 200))), os.Chmod(tun, 0o666)); err != nil {
		t.Fatal(err)
	}
	bind := []string{"unshare", "--mount", "sh", "-c", `mount --bind ` + tun + ` /dev/net/tun && exec "$0" "$@"`}
	status, stderr = x.run(append(bind, command...)...)
	x.fails(status, 1, stderr, "CAP_NET_ADMIN", "root")
}

// TestSettingsRefused: what is wrong with flags and files is said before
// anything is opened.
func TestSettingsRefused(t *testing.T) {
	t.Parallel()
	x := newAttempt(t)
	file := filepath.Join(x.l.Dir(), "tulle.yaml")
	const blue = "name=blue,vni=100,encryption=none,tap=blue0"
	for _, c := range []struct {
		name, file string
		args       []string
		status     int
		words      []string
	}{
		{"bad CIDR", "", []string{"--overlay", blue + ",address=10.32.0.1/33"}, 2, []string{"address", "10.32.0.1/33", "10.32.0.1/16"}},
		{"no CIDR", "", []string{"--overlay", blue + ",address=10.32.0.1"}, 2, []string{"address", "10.32.0.1", "prefix"}},
		{"bad CIDR in the file", "overlays:\n  - name: blue\n    vni: 100\n    encryption: none\n    address: 10.32.0.300/16\n", nil, 1, []string{file + ":5:", "10.32.0.300/16"}},
		{"duplicate VNI", "", []string{"--overlay", blue, "--overlay", "name=red,vni=100,encryption=none"}, 1, []string{"blue", "red", "vni 100"}},
		{"duplicate name", "", []string{"--overlay", blue, "--overlay", "name=blue,vni=101,encryption=none"}, 1, []string{"overlay blue", "twice"}},
		{"wrong key in the file", "name: a\noverlays:\n  - name: blue\n    vni: 100\n    encryption: none\n    adress: 10.32.0.1/16\n", nil, 1, []string{file + ":6:", `"adress"`, `"address"`}},
		{"wrong key at the top", "lisen: '[::]:4789'\noverlays: [{name: blue, vni: 100, encryption: none}]\n", nil, 1, []string{file + ":1:", `"lisen"`, `"listen"`}},
		{"wrong key in a flag", "", []string{"--overlay", blue + ",adress=10.32.0.1/16"}, 2, []string{`"adress"`, `"address"`}},
		{"wrong flag", "", []string{"--overlays", blue}, 2, []string{"--overlays", "tulle up --help"}},
		{"wrong command", "", []string{"extra"}, 2, []string{"extra"}},
		{"no file", "", []string{"--config", "/nonexistent/tulle.yaml"}, 1, []string{"/nonexistent/tulle.yaml"}},
		{"sealed, and a foreign VTEP", "", []string{"--overlay", "name=blue,vni=100,tap=blue0,peer=192.0.2.9"}, 1, []string{"overlay blue", "peers", "encryption=none"}},
		{"sealed, and a multicast group", "", []string{"--overlay", "name=blue,vni=100,tap=blue0,flood=multicast,group=239.1.1.1"}, 1, []string{"overlay blue", "multicast", "encryption=none"}},
		{"no token", "", []string{"--join", "192.0.2.1"}, 1, []string{"--join", "--token", "tulle token create"}},
		{"no token that is one", "", []string{"--token", "secret-word"}, 1, []string{"token", "tulle1."}},
		{"address of another host", "", []string{"--advertise", "192.0.2.77", "--overlay", blue}, 1, []string{"192.0.2.77", "--advertise"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			x.t = t
			args := c.args
			if c.file != "" {
				if err := os.WriteFile(file, []byte(c.file), 0o600); err != nil {
					t.Fatal(err)
				}
				args = append(args, "--config", file)
			}
			status, stderr := x.up(args...)
			x.fails(status, c.status, stderr, c.words...)
			if strings.Contains(stderr, "secret-word") {
				t.Error("stderr shows the token")
			}
		})
	}
	// Two faults, two lines.
	x.t = t
	status, stderr := x.up("--overlay", "name=blue,vni=100,encryption=none,address=10.32.0.1/33,flod=gossip")
	if status != 2 || strings.Count(stderr, "\n") != 2 || strings.Count(stderr, "tulle: ") != 2 {
		t.Errorf("status %d and %q, want 2 and a line a fault", status, stderr)
	}
	x.clean()
}

// TestSecondStart: one state directory, one socket, one node.
func TestSecondStart(t *testing.T) {
	t.Parallel()
	x := newAttempt(t)
	a := up(t, x.l, x.h, "--overlay", overlay(1))
	state := filepath.Join(x.l.Dir(), "state-a")
	ports := []string{"--listen", ":4790", "--gossip", ":7947", "--overlay", "name=red,vni=101,encryption=none,tap=red0"}

	status, stderr := x.run(append([]string{binary, "up", "--name", "b", "--state-dir", state, "--socket", x.sock}, ports...)...)
	x.fails(status, 1, stderr, state, "another node uses", "--state-dir")
	status, stderr = x.run(append([]string{binary, "up", "--name", "b", "--state-dir", x.state, "--socket", a.sock}, ports...)...)
	x.fails(status, 1, stderr, a.sock, "running already", "--socket")
	if got := a.status().Node.Name; got != "a" {
		t.Errorf("the first node's socket answers for %q", got)
	}
	// A file that is no socket is not the node's to replace.
	if err := os.WriteFile(x.sock, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	status, stderr = x.up(ports...)
	if b, err := os.ReadFile(x.sock); string(b) != "precious" {
		t.Errorf("%s was replaced (%v)", x.sock, err)
	}
	if err := os.Remove(x.sock); err != nil {
		t.Fatal(err)
	}
	x.fails(status, 1, stderr, x.sock, "no socket")
}

// TestTapTaken: a device that is there is not stolen, be it even a TAP that
// nobody holds.
func TestTapTaken(t *testing.T) {
	t.Parallel()
	for name, add := range map[string][]string{
		"persistent TAP": {"tuntap", "add", "dev", "blue0", "mode", "tap"},
		"multi-queue":    {"tuntap", "add", "dev", "blue0", "mode", "tap", "multi_queue", "vnet_hdr"},
		"veth":           {"link", "add", "blue0", "type", "veth", "peer", "name", "other"},
	} {
		for _, driver := range []string{"offload", "plain"} {
			t.Run(name+" "+driver, func(t *testing.T) {
				x := newAttempt(t)
				runIn(t, x.h, "ip", add...)
				runIn(t, x.h, "ip", "address", "add", "192.0.2.1/24", "dev", "blue0")
				// run compares the devices before and after.
				status, stderr := x.up("--advertise", x.at.String(), "--overlay", overlay(1, "driver="+driver))
				x.fails(status, 1, stderr, "blue0", "there already", "another name")
			})
		}
	}
	t.Run("second overlay", func(t *testing.T) {
		x := newAttempt(t)
		runIn(t, x.h, "ip", "link", "add", "red0", "type", "veth", "peer", "name", "other")
		// blue0 was made before red0 was refused, and must go.
		status, stderr := x.up("--log-level", "error", "--overlay", overlay(1), "--overlay", "name=red,vni=101,encryption=none,tap=red0")
		x.fails(status, 1, stderr, "red0", "there already")
	})
}

// TestUnreachableSeed: a node without its seed goes on and says so, now and then.
func TestUnreachableSeed(t *testing.T) {
	t.Parallel()
	x := newAttempt(t)
	dead := seed(x.at.Next())
	a := up(t, x.l, x.h, "--join", dead, "--join", "nowhere.invalid", "--overlay", overlay(1))
	a.eventually(10*time.Second, "says that no seed answers", func() bool {
		return strings.Contains(a.proc.Log(), x.at.Next().String()) && strings.Contains(a.proc.Log(), "nowhere.invalid")
	})
	if n := strings.Count(a.proc.Log(), "\n"); n > 20 {
		t.Errorf("%d lines of log:\n%s", n, a.proc.Log())
	}
	start := time.Now()
	if err := a.proc.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if err := a.proc.Wait(); err != nil {
		t.Errorf("it ended with %v, want status 0:\n%s", err, a.proc.Log())
	}
	if took := time.Since(start); took > 5*time.Second {
		t.Errorf("the end took %v", took)
	}
}

// TestNoAddress: a host without a network cannot tell others where it is.
func TestNoAddress(t *testing.T) {
	t.Parallel()
	x := newAttempt(t)
	if err := x.h.DelAddr("ul", netip.PrefixFrom(x.at, underlay4.Bits())); err != nil {
		t.Fatal(err)
	}
	status, stderr := x.up("--overlay", overlay(1))
	x.fails(status, 1, stderr, "no address", "--advertise")
}

// TestClientErrors: the commands that ask a node, when there is none.
func TestClientErrors(t *testing.T) {
	t.Parallel()
	x := newAttempt(t)
	stale := filepath.Join(x.l.Dir(), "stale")
	ln, err := net.ListenUnix("unix", &net.UnixAddr{Name: stale, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	ln.SetUnlinkOnClose(false)
	ln.Close()
	for _, sock := range []string{x.sock, stale} {
		for _, command := range []string{"status", "peers", "overlays"} {
			status, stderr := x.run(binary, command, "--socket", sock)
			x.fails(status, 1, stderr, sock, "tulle up")
		}
	}
	a := up(t, x.l, x.h, "--overlay", overlay(1))
	status, stderr := x.run(binary, "fdb", "red", "--socket", a.sock)
	x.fails(status, 1, stderr, `"red"`, "tulle overlays")
	status, stderr = x.run(binary, "fdb", "--socket", a.sock)
	x.fails(status, 2, stderr, "tulle fdb")
	status, stderr = x.run(binary, "status", "-o", "xml", "--socket", a.sock)
	x.fails(status, 2, stderr, "table", "json", "yaml")
}
