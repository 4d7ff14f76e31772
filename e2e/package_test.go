package e2e

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/tulle-net/tulle/internal/lab"
	"github.com/tulle-net/tulle/node"
)

//	a ──[ul]── b        a: the keeper; b: a machine with systemd, where the package is installed
//	           ├── c1   a namespace with a path
//	           └── c2   one that a descriptor of an ordinary user's process holds
//
// Packages are made as `make deb` and `make image` make them.

// machine is systemd as the first process of its own namespaces, and a root of its own.
type machine struct {
	t    *testing.T
	host *lab.Host
	pid  string // of systemd
}

func boot(t *testing.T, l *lab.Lab, h *lab.Host) *machine {
	t.Helper()
	dir, group := filepath.Join(l.Dir(), "machine"), unusedName("systemd")
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	p, err := h.Start(exec.Command("unshare", "--mount", "sh", "testdata/systemd/boot.sh", dir, group))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		p.Kill()
		<-p.Done()
		// Its processes end one by one.
		const remove = `mount -t cgroup2 none "$0" && for i in $(seq 200); do find "$0/$1" -depth -type d -exec rmdir {} + 2>/dev/null; [ -d "$0/$1" ] || exit 0; sleep .05; done; exit 1`
		if out, err := exec.Command("unshare", "--mount", "sh", "-c", remove, dir, group).CombinedOutput(); err != nil {
			t.Errorf("cgroup %s stays: %v: %s", group, err, out)
		}
	})
	m := &machine{t: t, host: h}
	eventually(t, 60*time.Second, "systemd has started everything", func() bool {
		select {
		case <-p.Done():
			t.Fatalf("systemd ended: %s", p.Log())
		default:
		}
		children, _ := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", p.Pid(), p.Pid()))
		m.pid = strings.TrimSpace(string(children))
		if m.pid == "" {
			return false
		}
		out, _ := m.tries("systemctl", "is-system-running")
		return out == "running\n" || out == "degraded\n" // by a unit of this machine
	})
	return m
}

// at is a path on the machine, for this process.
func (m *machine) at(path string) string { return "/proc/" + m.pid + "/root" + path }

func (m *machine) command(args ...string) *exec.Cmd {
	return exec.Command("nsenter", append([]string{"--target", m.pid, "--mount", "--pid", "--ipc", "--uts", "--cgroup", "--root", "--wd"}, args...)...)
}

func (m *machine) tries(args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	cmd := m.command(args...)
	return m.host.Run(ctx, cmd.Args[0], cmd.Args[1:]...)
}

func (m *machine) do(args ...string) string {
	m.t.Helper()
	out, err := m.tries(args...)
	if err != nil {
		m.t.Fatalf("%s: %v: %s", strings.Join(args, " "), err, out)
	}
	return out
}

func (m *machine) write(path, text string) {
	m.t.Helper()
	if err := os.WriteFile(m.at(path), []byte(text), 0o600); err != nil {
		m.t.Fatal(err)
	}
}

func (m *machine) has(path string) bool {
	_, err := os.Lstat(m.at(path))
	return err == nil
}

// node is the one that the machine's service runs.
func (m *machine) node(name string) *tulle {
	sock := m.at("/run/tulle/tulle.sock")
	return &tulle{t: m.t, host: m.host, name: name, sock: sock, http: http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", sock)
		},
	}}}
}

// script runs one of packaging/.
func script(t *testing.T, env []string, args ...string) string {
	t.Helper()
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Env = append(os.Environ(), env...)
	var errs strings.Builder
	cmd.Stderr = &errs
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%s: %v: %s%s", strings.Join(args, " "), err, out, &errs)
	}
	return strings.TrimSpace(string(out))
}

func TestPackageVersion(t *testing.T) {
	t.Parallel()
	if _, err := exec.LookPath("dpkg"); err != nil {
		t.Skip("needs dpkg")
	}
	for version, want := range map[string]string{
		"v1.2.3": "1.2.3", "1.2.3": "1.2.3", "v1.2.3-4-gabcdef0": "1.2.3+4.gabcdef0", "v1.2.3-dirty": "1.2.3+dirty",
		"abcdef0": "0~20260102.abcdef0", "1234567-dirty": "0~20260102.1234567.dirty",
	} {
		got := script(t, []string{"VERSION=" + version, "SOURCE_DATE_EPOCH=1767312000"}, "../packaging/version")
		if got != want {
			t.Errorf("%s: %s, want %s", version, got, want)
		}
		if out, err := exec.Command("dpkg", "--validate-version", got).CombinedOutput(); err != nil {
			t.Errorf("dpkg of %s: %v: %s", got, err, out)
		}
	}
}

// TestPackageDebian installs the package on a machine with systemd, and uses, upgrades and removes it.
func TestPackageDebian(t *testing.T) {
	t.Parallel()
	l, _, h := hosts(t, 2, lab.Underlay{Prefix4: underlay4})
	share := filepath.Join(l.Dir(), "share")
	script(t, []string{"TULLE_SOCKET=/nowhere"}, "../packaging/share", share)
	pages, err := filepath.Glob(share + "/man/man1/*")
	if err != nil || len(pages) < 50 {
		t.Fatalf("%d manual pages (%v)", len(pages), err)
	}
	lint := exec.Command("man", append([]string{"--warnings", "--local-file", "--encoding=UTF-8", "--troff-device=utf8", "--ditroff"}, pages...)...)
	lint.Env = append(os.Environ(), "LC_ALL=C.UTF-8")
	var faults strings.Builder
	lint.Stderr = &faults
	if out, err := lint.Output(); err != nil || faults.Len() > 0 || !strings.Contains(string(out), "FileDescriptorStoreMax") || strings.Contains(string(out), "/nowhere") {
		t.Errorf("man: %v, %d bytes: %s", err, len(out), &faults)
	}
	arch := script(t, nil, "dpkg", "--print-architecture")
	deb := script(t, nil, "../packaging/deb", arch, binary, share, l.Dir())

	a := joined(t, l, h[:1], nil)[0]
	m := boot(t, l, h[1])
	debian{t, m, a}.run(deb)
}

// debian is a machine that the package is for, and a keeper.
type debian struct {
	t *testing.T
	m *machine
	a *tulle
}

func (d debian) run(deb string) {
	t, m, a := d.t, d.m, d.a
	b := m.node("b")
	d.install(deb)
	for _, unit := range []string{"is-active", "is-enabled"} {
		if out, err := m.tries("systemctl", unit, "tulle"); err == nil || m.has("/var/lib/tulle") {
			t.Errorf("installed, systemctl %s tulle: %s", unit, out)
		}
	}
	if out := m.do("tulle", "version"); !strings.HasPrefix(out, "tulle ") {
		t.Errorf("tulle version: %s", out)
	}
	const unit = "/usr/lib/systemd/system/tulle.service"
	if out := m.do("systemd-analyze", "verify", unit); out != "" {
		t.Errorf("systemd-analyze verify: %s", out)
	}
	m.do("systemd-analyze", "security", "--no-pager", "--offline=true", "--threshold=40", unit)
	for _, file := range []string{"/usr/share/man/man1/tulle-up.1.gz", "/usr/share/bash-completion/completions/tulle", "/usr/share/doc/tulle/copyright"} {
		if !m.has(file) {
			t.Errorf("no %s", file)
		}
	}

	const settings = "# edited\nname: b\ndocker: on\n"
	m.write("/etc/tulle/tulle.yaml", settings)
	m.write("/etc/tulle/tulle.env", "TULLE_TOKEN="+a.token()+"\n")
	m.do("systemctl", "enable", "--now", "tulle")
	a.eventually(20*time.Second, "b is there", func() bool { return a.sees("b") == "alive" })
	a.eventually(10*time.Second, "b serves Docker", func() bool { return m.has("/run/docker/plugins/tulle.sock") })
	a.do("overlay", "create", "blue", "--subnet", "10.32.0.0/16", "--gateway", "true")
	known(t, 10*time.Second, "blue", true, a, b)
	d.use(b, deb)
	if text, err := os.ReadFile(m.at("/etc/tulle/tulle.yaml")); err != nil || string(text) != settings {
		t.Errorf("%v: the settings are now %s", err, text)
	}
	log := m.do("journalctl", "--unit", "tulle", "--output", "cat", "--no-pager")
	for line := range strings.Lines(log) {
		for _, word := range []string{"not permitted", "denied", "read-only", "level=ERROR"} {
			if strings.Contains(line, word) {
				t.Errorf("the service lacks something: %s", line)
			}
		}
	}
	if t.Failed() {
		t.Logf("the service's log:\n%s", log)
	}

	m.do("dpkg", "--remove", "--no-triggers", "tulle")
	a.eventually(5*time.Second, "b has left", func() bool { return a.sees("b") == "left" })
	if keys, _ := filepath.Glob(m.at("/var/lib/tulle/node.key.*")); len(keys) == 0 || m.has("/usr/bin/tulle") || !m.has("/etc/tulle/tulle.yaml") {
		t.Errorf("removed: keys %v; binary there: %v; settings there: %v", keys, m.has("/usr/bin/tulle"), m.has("/etc/tulle/tulle.yaml"))
	}
	m.do("dpkg", "--purge", "--no-triggers", "tulle")
	for _, path := range []string{"/var/lib/tulle", "/etc/tulle", "/etc/systemd/system/multi-user.target.wants/tulle.service"} {
		if m.has(path) {
			t.Errorf("purged, there is %s", path)
		}
	}
}

func (d debian) install(deb string) {
	d.t.Helper()
	file, err := os.ReadFile(deb)
	if err != nil {
		d.t.Fatal(err)
	}
	d.m.write("/root/tulle.deb", string(file))
	d.m.do("dpkg", "--install", "--no-triggers", "/root/tulle.deb")
}

// use tries all that the unit must allow, and that containers keep what they have
// whatever happens to the service.
func (d debian) use(b *tulle, deb string) {
	t, m, a := d.t, d.m, d.a
	from := a.exposed("blue")
	own := b.exposed("blue")
	m.do("ip", "netns", "add", "c1")
	m.do("ip", "netns", "add", "c2")
	// A port that only root may have.
	c1 := b.attaches("blue", "--netns", "/run/netns/c1", "--publish", "80:80")
	holder, err := m.host.Start(m.command("sh", "-c", "exec 9</run/netns/c2; touch /run/held; exec setpriv --reuid=65534 --regid=65534 --clear-groups sleep 600"))
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, 5*time.Second, "c2 is held", func() bool { return m.has("/run/held") })
	c2 := b.attaches("blue", "--netns", "/run/netns/c2", "--name", "c2")
	m.do("ip", "netns", "del", "c2")

	device := m.do("ip", "-n", "c1", "-o", "link", "show", "eth0")
	pid := m.do("systemctl", "show", "tulle", "--property", "MainPID")
	works := func(t *testing.T, want bool) {
		t.Helper()
		b.eventually(10*time.Second, "its endpoints are up", func() bool {
			var list node.Endpoints
			if b.try("/v1/endpoints?local=true", &list) != nil {
				return false
			}
			up := 0
			for _, e := range list.Endpoints {
				if e.Up && e.Error+e.PublishError == "" {
					up++
				}
			}
			return up == 3
		})
		ping(t, d.a.host, own.Addr(), 10*time.Second)
		ping(t, d.a.host, c1.Addr(), 10*time.Second)
		ping(t, d.a.host, c2.Addr(), 10*time.Second)
		m.do("ip", "netns", "exec", "c1", "ping", "-c", "1", "-W", "5", from.Addr().String())
		// Out by the gateway.
		m.do("ip", "netns", "exec", "c1", "ping", "-c", "1", "-W", "5", m.hostAddress())
		index, _, _ := strings.Cut(device, ":")
		if now := m.do("ip", "-n", "c1", "-o", "link", "show", "eth0"); !strings.HasPrefix(now, index+":") {
			t.Errorf("c1 has another device: %s, and had %s", now, device)
		}
		if now := m.do("systemctl", "show", "tulle", "--property", "MainPID"); (now == pid) != want {
			t.Errorf("the main process is %s, and was %s", now, pid)
		} else {
			pid = now
		}
	}
	works(t, true)
	for _, how := range []struct {
		name string
		same bool // the main process
		do   func()
	}{
		{"reloaded", true, func() { m.do("systemctl", "reload", "tulle") }},
		{"restarted", false, func() { m.do("systemctl", "restart", "tulle") }},
		{"killed", false, func() {
			m.do("systemctl", "kill", "--signal", "KILL", "tulle")
			b.eventually(20*time.Second, "it runs again", func() bool {
				now, err := m.tries("systemctl", "show", "tulle", "--property", "MainPID,SubState")
				return err == nil && strings.Contains(now, "SubState=running") && !strings.Contains(now, pid)
			})
		}},
		{"another package", true, func() { d.install(deb) }},
	} {
		part(t, how.name, []*tulle{a, b}, func(t *testing.T) {
			how.do()
			works(t, how.same)
		})
	}
	// The node is a child of the main process now, and systemd listens to it.
	before := m.stored()
	m.do("ip", "netns", "add", "c3")
	b.attaches("blue", "--netns", "/run/netns/c3")
	b.eventually(5*time.Second, "systemd stores the new device", func() bool { return m.stored() > before })
	if text := m.do("ip", "netns", "exec", "c3", "setpriv", "--reuid=65534", "--clear-groups", "cat", "/etc/resolv.conf"); !strings.Contains(text, "nameserver ") || !m.has("/etc/netns/c3/resolv.conf") {
		t.Errorf("c3 has no resolver: %s", text)
	}
	// Whom it sees by the holder's descriptor it also sees go.
	holder.Kill()
	if took := b.gone("c2"); took > 2*time.Second {
		t.Errorf("c2 has no holder and stays for %v", took)
	}
}

// stored is how many descriptors systemd has of the service.
func (m *machine) stored() int {
	m.t.Helper()
	out := m.do("systemctl", "show", "tulle", "--property", "NFileDescriptorStore", "--value")
	n, err := strconv.Atoi(strings.TrimSpace(out))
	if err != nil {
		m.t.Fatalf("%v: %s", err, out)
	}
	return n
}

// hostAddress is the machine's own in the underlay.
func (m *machine) hostAddress() string {
	m.t.Helper()
	fields := strings.Fields(m.do("ip", "-4", "-o", "address", "show", "dev", "ul"))
	if len(fields) < 4 {
		m.t.Fatalf("ul has no address: %v", fields)
	}
	address, _, _ := strings.Cut(fields[3], "/")
	return address
}

// TestPackageImage runs the container image in containerd: a node in it, and one beside it.
func TestPackageImage(t *testing.T) {
	t.Parallel()
	l, _, h := hosts(t, 2, lab.Underlay{Prefix4: underlay4})
	dir := l.Dir()
	for _, d := range []string{"net.d", "plugins"} {
		if err := os.Mkdir(filepath.Join(dir, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	image := filepath.Join(dir, "tulle-image.tar")
	arch := script(t, nil, "go", "env", "GOARCH")
	script(t, nil, "go", "run", "../packaging/image", "-arch", arch, "-version", "1.2", "-o", image, binary)
	again := image + ".again"
	script(t, nil, "go", "run", "../packaging/image", "-arch", arch, "-version", "1.2", "-o", again, binary)
	one, err := os.ReadFile(image)
	two, err2 := os.ReadFile(again)
	if err != nil || err2 != nil || !bytes.Equal(one, two) {
		t.Errorf("the same binary makes images of %d and %d bytes that differ (%v, %v)", len(one), len(two), err, err2)
	}
	a := up(t, l, h[0], "--overlay", overlay(1))
	c := startContainerd(t, h[1], dir)
	if out := c.ctr("images", "import", image); !strings.Contains(out, "docker.io/library/tulle:latest") || !strings.Contains(out, "docker.io/library/tulle:1.2") {
		t.Errorf("imported: %s", out)
	}
	if out := c.ctr("run", "--rm", "docker.io/library/tulle:1.2", "version", "/tulle", "version"); !strings.HasPrefix(out, "tulle ") {
		t.Errorf("tulle version: %s", out)
	}
	// Without arguments the entrypoint is what runs.
	if out := c.ctr("run", "--rm", "docker.io/library/tulle:1.2", "help"); !strings.Contains(out, "tulle up") {
		t.Errorf("the image as it is: %s", out)
	}
	joins, err := h[0].Run(t.Context(), "ip", "-4", "-o", "address", "show", "dev", "ul")
	fields := strings.Fields(joins)
	if err != nil || len(fields) < 4 {
		t.Fatalf("%v: %s", err, joins)
	}
	seed, _, _ := strings.Cut(fields[3], "/")
	c.ctr("run", "--detach", "--net-host", "--device", "/dev/net/tun", "--cap-add", "CAP_NET_ADMIN", "docker.io/library/tulle:latest", "node",
		"/tulle", "up", "--name", "b", "--overlay", overlay(2), "--join", seed)
	a.eventually(20*time.Second, "the container's node is there", func() bool { return a.sees("b") == "alive" })
	ping(t, h[0], address(2), 10*time.Second)
	ping(t, h[1], address(1), 10*time.Second)
	if out := c.ctr("task", "exec", "--exec-id", "peers", "node", "tulle", "peers"); !strings.Contains(out, "a ") {
		t.Errorf("tulle peers, inside: %s", out)
	}
}
