package e2e

import (
	"archive/tar"
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/tulle-net/tulle/internal/lab"
	"github.com/tulle-net/tulle/node"
)

// What the tests with Docker share.

// dockerHost is a host with a dockerd of its own. Where plugins are is a fixed path, so
// each has a mount namespace, which holder keeps.
type dockerHost struct {
	t      *testing.T
	host   *lab.Host
	holder *lab.Process
	daemon *lab.Process
	dir    string
	resolv string // is its /etc/resolv.conf
	flags  []string
}

// dockerCLI is that of the package, beside which a machine may have another one.
const dockerCLI = "/usr/bin/docker"

// dockerMounts has an argument: what resolv.conf is there.
const dockerMounts = `mkdir -p /run/docker && mount -t tmpfs t /run/docker && mkdir /run/docker/plugins && mount --bind "$0" /etc/resolv.conf && exec sleep 600`

// dockerUpstream is the resolver that the first host with Docker asks, and each second
// one after it, whether there is one or not. Others have one on their loopback.
const dockerUpstream = "192.168.77.1"

// dockers starts a dockerd on each host, with an image "bb" of busybox.
func dockers(t *testing.T, l *lab.Lab, hosts []*lab.Host, flags ...string) []*dockerHost {
	t.Helper()
	image := filepath.Join(l.Dir(), "bb.tar")
	if err := writeRootfs(image); err != nil {
		t.Fatal(err)
	}
	var list []*dockerHost
	for i, h := range hosts {
		d := &dockerHost{t: t, host: h, dir: filepath.Join(l.Dir(), "docker-"+h.Name()), flags: flags}
		if err := os.Mkdir(d.dir, 0o755); err != nil {
			t.Fatal(err)
		}
		d.resolv = filepath.Join(d.dir, "resolv.conf")
		d.asks([]string{dockerUpstream, "127.0.0.53"}[i%2])
		p, err := h.Start(exec.Command("unshare", "--mount", "--propagation", "slave", "sh", "-c", dockerMounts, d.resolv))
		if err != nil {
			t.Fatal(err)
		}
		d.holder = p
		eventually(t, 5*time.Second, "the mount namespace is made", func() bool {
			comm, _ := os.ReadFile(fmt.Sprintf("/proc/%d/comm", p.Pid()))
			return string(comm) == "sleep\n"
		})
		d.start()
		t.Cleanup(d.end)
		list = append(list, d)
	}
	var wg sync.WaitGroup
	for _, d := range list {
		wg.Go(func() {
			if d.answers() {
				if out, err := d.try("import", "-c", "ENV PATH=/bin", image, "bb"); err != nil {
					t.Errorf("docker import: %v: %s", err, out)
				}
			}
		})
	}
	if wg.Wait(); t.Failed() {
		t.FailNow()
	}
	return list
}

// writeRootfs writes the file system of an image: busybox, and names for it.
func writeRootfs(path string) error {
	busybox, err := os.ReadFile("/bin/busybox")
	if err != nil {
		return fmt.Errorf("%w: `make tools` installs it", err)
	}
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	if err := w.WriteHeader(&tar.Header{Name: "bin/busybox", Mode: 0o755, Size: int64(len(busybox))}); err != nil {
		return err
	}
	if _, err := w.Write(busybox); err != nil {
		return err
	}
	for _, name := range []string{"sh", "ip", "ping", "sleep", "httpd", "wget", "md5sum", "dd", "nslookup"} {
		if err := w.WriteHeader(&tar.Header{Name: "bin/" + name, Typeflag: tar.TypeSymlink, Linkname: "busybox"}); err != nil {
			return err
		}
	}
	if err := w.Close(); err != nil {
		return err
	}
	return os.WriteFile(path, b.Bytes(), 0o600)
}

// asks has the host ask a resolver, and containers that start from now on.
func (d *dockerHost) asks(resolver string) {
	d.t.Helper()
	// Written in place: it is mounted.
	if err := os.WriteFile(d.resolv, []byte("nameserver "+resolver+"\n"), 0o644); err != nil {
		d.t.Fatal(err)
	}
}

// inMounts is a command in the host's mount namespace.
func (d *dockerHost) inMounts(args ...string) []string {
	return append([]string{"nsenter", "-t", fmt.Sprint(d.holder.Pid()), "-m", "--wd=/", "--"}, args...)
}

// engine is DOCKER_HOST.
func (d *dockerHost) engine() string { return "unix://" + d.dir + "/sock" }

// start starts dockerd (again).
func (d *dockerHost) start() {
	d.t.Helper()
	args := d.inMounts(append([]string{"dockerd", "--data-root", d.dir + "/data", "--exec-root", d.dir + "/exec", "--pidfile", d.dir + "/pid", "-H", d.engine(),
		"--shutdown-timeout", "2", "--log-level", "warn"}, d.flags...)...)
	p, err := d.host.Start(exec.Command(args[0], args[1:]...))
	if err != nil {
		d.t.Fatal(err)
	}
	d.daemon = p
}

// answers waits until dockerd answers.
func (d *dockerHost) answers() bool {
	d.t.Helper()
	for until := time.Now().Add(40 * time.Second); time.Now().Before(until); time.Sleep(50 * time.Millisecond) {
		select {
		case <-d.daemon.Done():
			d.t.Errorf("dockerd of %s has ended", d.host.Name())
			return false
		default:
		}
		if _, err := d.try("version"); err == nil {
			return true
		}
	}
	d.t.Errorf("dockerd of %s does not answer", d.host.Name())
	return false
}

// restart ends dockerd by a signal and starts it again.
func (d *dockerHost) restart(sig syscall.Signal) {
	d.t.Helper()
	ended := d.contained()
	if err := d.daemon.Signal(sig); err != nil {
		d.t.Fatal(err)
	}
	<-d.daemon.Done()
	ended()
	d.start()
	if !d.answers() {
		d.t.FailNow()
	}
}

// contained returns what waits for the end of the containerd that dockerd has started: it
// ends with it, and must not be taken for one that runs.
func (d *dockerHost) contained() (ended func()) {
	d.t.Helper()
	pid, err := os.ReadFile(d.dir + "/exec/containerd/containerd.pid")
	if err != nil {
		d.t.Fatal(err)
	}
	return func() {
		d.t.Helper()
		eventually(d.t, 5*time.Second, "containerd has ended", func() bool {
			_, err := os.Stat("/proc/" + strings.TrimSpace(string(pid)))
			return err != nil
		})
	}
}

// end removes all containers, and ends dockerd.
func (d *dockerHost) end() {
	if out, err := d.try("ps", "-aq"); err == nil && strings.TrimSpace(out) != "" {
		_, _ = d.try(append([]string{"rm", "-f"}, strings.Fields(out)...)...)
	}
	if d.daemon.Signal(syscall.SIGTERM) == nil {
		<-d.daemon.Done()
	}
}

func (d *dockerHost) try(args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 40*time.Second)
	defer cancel()
	out, err := exec.CommandContext(ctx, dockerCLI, append([]string{"-H", d.engine()}, args...)...).CombinedOutput()
	return strings.TrimSpace(string(out)), err
}

// do runs `docker …`, which must succeed.
func (d *dockerHost) do(args ...string) string {
	d.t.Helper()
	out, err := d.try(args...)
	if err != nil {
		d.t.Fatalf("%s: docker %s: %v: %s", d.host.Name(), strings.Join(args, " "), err, out)
	}
	return out
}

// refuses runs `docker …`, which must fail and say all words.
func (d *dockerHost) refuses(words []string, args ...string) {
	d.t.Helper()
	out, err := d.try(args...)
	if err == nil {
		d.t.Errorf("%s: docker %s: want it refused: %s", d.host.Name(), strings.Join(args, " "), out)
		return
	}
	for _, w := range words {
		if !strings.Contains(out, w) {
			d.t.Errorf("%s: docker %s: %q does not say %q", d.host.Name(), strings.Join(args, " "), out, w)
		}
	}
}

// compose runs docker-compose on all hosts, each with a project of its own, of the
// example and a file that is merged into it.
func compose(t *testing.T, hosts []*dockerHost, file string, args ...string) {
	t.Helper()
	var wg sync.WaitGroup
	for i, d := range hosts {
		wg.Go(func() {
			if err := d.compose(fmt.Sprintf("shop%d", i), file, args...); err != nil {
				t.Errorf("%s: docker-compose %v: %v", d.host.Name(), args, err)
			}
		})
	}
	if wg.Wait(); t.Failed() {
		t.FailNow()
	}
}

func (d *dockerHost) compose(project, file string, args ...string) error {
	ctx, cancel := context.WithTimeout(d.t.Context(), 40*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, "docker-compose", append([]string{"-p", project, "-f", "../examples/compose/compose.yaml", "-f", file}, args...)...)
	cmd.Env = append(os.Environ(), "DOCKER_HOST="+d.engine())
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%w: %s", err, out)
	}
	return nil
}

// network creates a network on an overlay.
func (d *dockerHost) network(name, overlay string, more ...string) {
	d.t.Helper()
	d.do(append(append([]string{"network", "create", "-d", "tulle", "--ipam-driver", "tulle", "--ipam-opt", "overlay=" + overlay, "-o", "overlay=" + overlay}, more...), name)...)
}

// runs starts a container that sleeps.
func (d *dockerHost) runs(name string, more ...string) {
	d.t.Helper()
	d.do(append(append([]string{"run", "-d", "--init", "--name", name}, more...), "bb", "sleep", "600")...)
}

// address is what Docker says a container has on a network.
func (d *dockerHost) address(container, network string) string {
	d.t.Helper()
	return d.do("inspect", "-f", `{{(index .NetworkSettings.Networks "`+network+`").IPAddress}}`, container)
}

// resolves waits until a container is told an address of a name.
func (d *dockerHost) resolves(container, name, address string) {
	d.t.Helper()
	var said string
	for until := time.Now().Add(15 * time.Second); time.Now().Before(until); time.Sleep(50 * time.Millisecond) {
		out, err := d.try("exec", container, "nslookup", "-type=a", name)
		if err == nil && strings.Contains(out, "Address: "+address) {
			return
		}
		said = out
	}
	state := runIn(d.t, d.host, "nsenter", "-t", d.do("inspect", "-f", "{{.State.Pid}}", container), "-n", "sh", "-c", "nft list ruleset; ip route show table all; ss -nulp")
	d.t.Fatalf("%s of %s is not told that %s is %s: %s\n%s", container, d.host.Name(), name, address, said, state)
}

// pings waits until an address answers to a container.
func (d *dockerHost) pings(container, address string) {
	d.t.Helper()
	var said string
	for until := time.Now().Add(15 * time.Second); time.Now().Before(until); {
		out, err := d.try("exec", container, "ping", "-c", "1", "-W", "1", "-q", address)
		if err == nil {
			return
		}
		said = out
	}
	state := runIn(d.t, d.host, "nsenter", "-t", d.do("inspect", "-f", "{{.State.Pid}}", container), "-n", "sh", "-c", "ip -s addr; ip route; ip neigh")
	d.t.Fatalf("%s of %s does not reach %s: %s\n%s", container, d.host.Name(), address, said, state)
}

// upDocker starts the node of a host with Docker, in the mount namespace of its dockerd.
func upDocker(t *testing.T, l *lab.Lab, d *dockerHost, args ...string) *tulle {
	t.Helper()
	return upAs(t, l, d.host, d.inMounts("env", "DOCKER_HOST="+d.engine(), binary), args...)
}

// upDriver starts `tulle docker` beside a node that does not serve Docker itself.
func (d *dockerHost) upDriver(n *tulle, args ...string) *lab.Process {
	d.t.Helper()
	args = d.inMounts(append([]string{"env", "DOCKER_HOST=" + d.engine(), binary, "--socket", n.sock, "docker", "--state-dir", d.dir}, args...)...)
	p, err := d.host.Start(exec.Command(args[0], args[1:]...))
	if err != nil {
		d.t.Fatal(err)
	}
	return p
}

// served waits until the plugin's socket is there.
func (d *dockerHost) served() {
	d.t.Helper()
	eventually(d.t, 10*time.Second, "the driver is served", func() bool {
		i, err := os.Stat(fmt.Sprintf("/proc/%d/root/run/docker/plugins/tulle.sock", d.holder.Pid()))
		return err == nil && i.Mode()&os.ModeSocket != 0
	})
}

// named waits until the node has an endpoint of a name, in its container.
func (n *tulle) named(name string) (e node.Endpoint) {
	n.t.Helper()
	n.eventually(10*time.Second, "an endpoint "+name, func() bool {
		list := n.attached(isNamed(name))
		if len(list) != 1 {
			return false
		}
		e = list[0]
		return e.Up && strings.HasPrefix(e.Tap, "eth")
	})
	return e
}

// returned are devices of the node's that are in the host's own namespace.
func (d *dockerHost) returned() (list []string) {
	d.t.Helper()
	for line := range strings.Lines(runIn(d.t, d.host, "ip", "-o", "link")) {
		if strings.Contains(line, ": tulle") {
			list = append(list, line)
		}
	}
	return list
}
