package e2e

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/tulle-net/tulle/internal/lab"
	"github.com/tulle-net/tulle/node"
)

//	a ── a node, containerd (its ctr, and CRI as a kubelet speaks it) and Podman 4 with its CNI backend
//	└── p: a namespace on the same overlay, which the containers ping
//
// Each runtime is started by the test, with folders of its own, and calls the plugin that
// `tulle cni install` installs.

const busybox = "/bin/busybox"

// writeImage writes an image that is busybox, as `docker save` would.
func writeImage(t *testing.T, to, name string) {
	t.Helper()
	links := map[string]string{}
	for _, applet := range []string{"sh", "ip", "ping", "sleep", "cat"} {
		links["bin/"+applet] = "busybox"
	}
	writeImageOf(t, to, name, "bin/busybox", busybox, links, object{"Cmd": []string{"/bin/sleep", "60"}, "Env": []string{"PATH=/bin"}})
}

// writeImageOf writes an image of one program, with links beside it.
func writeImageOf(t *testing.T, to, name, at, program string, links map[string]string, config object) {
	t.Helper()
	pack := func(files map[string][]byte, links map[string]string) []byte {
		var b bytes.Buffer
		w := tar.NewWriter(&b)
		add := func(h *tar.Header, data []byte) {
			if err := w.WriteHeader(h); err != nil {
				t.Fatal(err)
			}
			if _, err := w.Write(data); err != nil {
				t.Fatal(err)
			}
		}
		for name, data := range files {
			add(&tar.Header{Name: name, Mode: 0o755, Size: int64(len(data)), Typeflag: tar.TypeReg}, data)
		}
		for name, target := range links {
			add(&tar.Header{Name: name, Linkname: target, Typeflag: tar.TypeSymlink}, nil)
		}
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
		return b.Bytes()
	}
	data, err := os.ReadFile(program)
	if err != nil {
		t.Fatal(err)
	}
	layer := pack(map[string][]byte{at: data}, links)
	whole, err := json.Marshal(object{
		"architecture": runtime.GOARCH, "os": "linux", "config": config,
		"rootfs": object{"type": "layers", "diff_ids": []string{fmt.Sprintf("sha256:%x", sha256.Sum256(layer))}}, "history": []object{{}},
	})
	if err != nil {
		t.Fatal(err)
	}
	manifest, err := json.Marshal([]object{{"Config": "config.json", "RepoTags": []string{name}, "Layers": []string{"layer.tar"}}})
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(to, pack(map[string][]byte{"manifest.json": manifest, "config.json": whole, "layer.tar": layer}, nil), 0o644); err != nil {
		t.Fatal(err)
	}
}

// cniFolders installs the plugin into folders of the test, beside Debian's plugins.
func cniFolders(t *testing.T, a *tulle, dir string, args ...string) (confs, bins string) {
	t.Helper()
	confs, bins = filepath.Join(dir, "net.d"), filepath.Join(dir, "plugins")
	for _, d := range []string{confs, bins} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for _, name := range []string{"loopback", "host-local", "tuning", "portmap"} {
		if err := os.Symlink(filepath.Join(debianPlugins, name), filepath.Join(bins, name)); err != nil {
			t.Fatal(err)
		}
	}
	a.do(append([]string{"cni", "install", "--overlay", "blue", "--conf-dir", confs, "--bin-dir", bins}, args...)...)
	return confs, bins
}

// containerd is one that runs.
type containerd struct {
	t      *testing.T
	h      *lab.Host
	proc   *lab.Process
	socket string
}

const containerdConfig = `version = 2
root = "DIR/root"
state = "DIR/state"
[grpc]
  address = "DIR/c.sock"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "lab.test/bb:1"
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "DIR/plugins"
    conf_dir = "DIR/net.d"
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
`

// startContainerd starts one whose /opt/cni/bin and /etc/cni/net.d, which ctr has built
// in, are the test's: in a mount namespace where those are hidden, and where
// /run/netns is not, for the node has to find there what the runtime mounts.
func startContainerd(t *testing.T, h *lab.Host, dir string) *containerd {
	t.Helper()
	config := filepath.Join(dir, "config.toml")
	if err := os.WriteFile(config, []byte(strings.ReplaceAll(containerdConfig, "DIR", dir)), 0o644); err != nil {
		t.Fatal(err)
	}
	script := `mount --make-private / && mount -t tmpfs none /opt && mkdir -p /opt/cni/bin && mount --bind "$0/plugins" /opt/cni/bin &&
		mkdir -p /etc/cni && mount -t tmpfs none /etc/cni && mkdir /etc/cni/net.d && mount --bind "$0/net.d" /etc/cni/net.d && exec containerd -c "$0/config.toml"`
	p, err := h.Start(exec.Command("unshare", "--mount", "--propagation", "unchanged", "sh", "-c", script, dir))
	if err != nil {
		t.Fatal(err)
	}
	c := &containerd{t: t, h: h, proc: p, socket: filepath.Join(dir, "c.sock")}
	eventually(t, 20*time.Second, "containerd answers", func() bool {
		select {
		case <-p.Done():
			t.Fatalf("containerd ended: %s", p.Log())
		default:
		}
		_, err := c.try("version")
		return err == nil
	})
	t.Cleanup(c.stop)
	return c
}

// stop ends what a failed test has left running, and containerd.
func (c *containerd) stop() {
	for _, ns := range []string{"default", "k8s.io"} {
		out, _ := c.try("-n", ns, "task", "ls", "-q")
		for _, task := range strings.Fields(out) {
			_, _ = c.try("-n", ns, "task", "kill", "-s", "SIGKILL", task)
			_, _ = c.try("-n", ns, "task", "delete", "-f", task)
		}
	}
	if err := c.proc.Stop(10 * time.Second); err != nil {
		c.t.Logf("containerd: %v", err)
	}
}

// inside runs a tool in containerd's mount namespace.
func (c *containerd) inside(args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 40*time.Second)
	defer cancel()
	return c.h.Run(ctx, "nsenter", append([]string{"--target", fmt.Sprint(c.proc.Pid()), "--mount"}, args...)...)
}

func (c *containerd) try(args ...string) (string, error) {
	return c.inside(append([]string{"ctr", "-a", c.socket}, args...)...)
}

func (c *containerd) ctr(args ...string) string {
	c.t.Helper()
	out, err := c.try(args...)
	if err != nil {
		c.t.Fatalf("ctr %s: %v", strings.Join(args, " "), err)
	}
	return out
}

// TestCNIContainerd: `ctr run --cni`, and a pod as a kubelet asks for it.
func TestCNIContainerd(t *testing.T) {
	t.Parallel()
	l, a := cniHost(t, "blue")
	h := a.host
	a.do("overlay", "set", "blue", "--gateway", "true")
	peer := space(t, "containerd")
	at := a.attaches("blue", "--netns", peer)
	cniFolders(t, a, l.Dir())
	image := filepath.Join(l.Dir(), "bb.tar")
	writeImage(t, image, "lab.test/bb:1")
	client := module(t, l.Dir(), "./cripod")
	c := startContainerd(t, h, l.Dir())
	for _, ns := range []string{"default", "k8s.io"} {
		c.ctr("-n", ns, "images", "import", image)
	}
	alone := func() bool { return len(get[node.Endpoints](a, "/v1/endpoints?local=true").Endpoints) == 1 }

	part(t, "ctr", []*tulle{a}, func(t *testing.T) {
		out := c.ctr("run", "--rm", "--cni", "lab.test/bb:1", "one", "sh", "-c", "ip -o -4 addr show eth0 && ping -c 1 -W 5 "+at.Addr().String())
		if !strings.Contains(out, "inet 10.32.") || !strings.Contains(out, "1 packets received") {
			t.Errorf("the container says %s", out)
		}
		a.eventually(2*time.Second, "its endpoint is gone", alone)
	})

	part(t, "a pod", []*tulle{a}, func(t *testing.T) {
		var seen atomic.Pointer[node.Endpoint]
		ended := make(chan struct{})
		var watch sync.WaitGroup
		watch.Go(func() {
			for {
				var list node.Endpoints
				if a.try("/v1/endpoints?local=true", &list) == nil {
					if i := slices.IndexFunc(list.Endpoints, isNamed("web-0")); i >= 0 {
						seen.Store(&list.Endpoints[i])
						return
					}
				}
				select {
				case <-ended:
					return
				case <-time.After(10 * time.Millisecond):
				}
			}
		})
		out, err := c.inside(client, c.socket, "lab.test/bb:1", "sh", "-c", "ip -o -4 addr show eth0 && ping -c 1 -W 5 "+at.Addr().String())
		if err != nil {
			t.Error(err)
		}
		ip, rest, _ := strings.Cut(out, "\n")
		addr, err := netip.ParseAddr(ip)
		if err != nil || !netip.MustParsePrefix("10.32.0.0/16").Contains(addr) || !strings.Contains(rest, ip+"/16") || !strings.Contains(rest, "1 packets received") {
			t.Errorf("the pod says %s", out)
		}
		close(ended)
		watch.Wait()
		// A kubelet's annotations, which containerd reads, leave bursts to the plugin.
		if e := seen.Load(); e == nil || e.Limits == nil || e.Limits.EgressRate != 100e6 || e.Limits.IngressRate != 100e6 || !strings.HasPrefix(e.Container, "tulle/") {
			t.Errorf("the node has no endpoint with the pod's name and limits, but %+v", e)
		}
		if e := seen.Load(); e != nil && (len(e.Publish) != 1 || e.Publish[0].String() != "8090:80/tcp" || e.PublishError != "" || !e.DefaultRoute) {
			t.Errorf("the pod's hostPort leads to it by %v (%q), default route %v", e.Publish, e.PublishError, e.DefaultRoute)
		}
		a.eventually(2*time.Second, "its endpoint is gone", alone)
		free(t, h, 8090)
	})
}

// TestCNIPodman: Podman as root, with its CNI backend.
func TestCNIPodman(t *testing.T) {
	t.Parallel()
	l, a := cniHost(t, "blue")
	h, dir := a.host, l.Dir()
	peer := space(t, "podman")
	at := a.attaches("blue", "--netns", peer)
	confs, bins := cniFolders(t, a, dir, "--name", "blue-net")
	image := filepath.Join(dir, "bb.tar")
	writeImage(t, image, "lab.test/bb:1")
	config := filepath.Join(dir, "containers.conf")
	// What root may not raise here, or there is none of: limits, systemd.
	text := fmt.Sprintf(`[containers]
default_ulimits = ["nofile=1024:1024", "nproc=1000:1000"]
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "file"
lock_type = "file"
enable_port_reservation = false
[network]
cni_plugin_dirs = [%q]
`, bins)
	if err := os.WriteFile(config, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	try := func(args ...string) (string, error) {
		ctx, cancel := context.WithTimeout(context.Background(), 40*time.Second)
		defer cancel()
		return h.Run(ctx, "env", append([]string{"CONTAINERS_CONF=" + config, "podman", "--network-backend", "cni", "--network-config-dir", confs,
			"--root", dir + "/storage", "--runroot", dir + "/run", "--tmpdir", dir + "/tmp", "--storage-driver", "vfs", "--log-level", "error"}, args...)...)
	}
	podman := func(args ...string) string {
		t.Helper()
		out, err := try(args...)
		if err != nil {
			t.Fatalf("podman %s: %v", strings.Join(args, " "), err)
		}
		return out
	}
	t.Cleanup(func() {
		if out, err := try("rm", "--all", "--force", "--time", "0"); err != nil {
			t.Errorf("podman rm: %v: %s", err, out)
		}
	})
	podman("load", "--quiet", "--input", image)
	if out := podman("network", "ls"); !strings.Contains(out, "blue-net") {
		t.Errorf("podman does not know the network: %s", out)
	}
	podman("run", "--detach", "--name", "aa", "--network", "blue-net", "--ip", "10.32.5.5", "--mac-address", "02:00:00:00:05:05", "lab.test/bb:1", "sleep", "60")
	if out := podman("inspect", "--format", `{{(index .NetworkSettings.Networks "blue-net").IPAddress}} {{(index .NetworkSettings.Networks "blue-net").MacAddress}}`, "aa"); out != "10.32.5.5 02:00:00:00:05:05\n" {
		t.Errorf("podman says of its container: %s", out)
	}
	inNetns(t, peer, "ping", "-c", "1", "-W", "5", "10.32.5.5")
	out := podman("run", "--rm", "--network", "blue-net", "lab.test/bb:1", "sh", "-c", "ping -c 1 -W 5 10.32.5.5 && ping -c 1 -W 5 "+at.Addr().String())
	if strings.Count(out, "1 packets received") != 2 {
		t.Errorf("the container says %s", out)
	}
	if out := podman("exec", "aa", "cat", "/etc/resolv.conf"); !strings.Contains(out, "nameserver 169.254.53.53\n") || !strings.Contains(out, "search blue.tulle tulle") {
		t.Errorf("the container's resolv.conf is %s", out)
	}
	podman("network", "disconnect", "blue-net", "aa")
	if len(a.attached(isNamed("aa"))) != 0 {
		t.Error("the node has an endpoint of a container that was disconnected")
	}
	podman("rm", "--force", "--time", "0", "aa")
	a.eventually(2*time.Second, "no endpoint is left", func() bool { return len(get[node.Endpoints](a, "/v1/endpoints?local=true").Endpoints) == 1 })
	if out, err := try("run", "--rm", "--network", "blue-net", "--publish", "8080:80", "lab.test/bb:1", "true"); err == nil || !strings.Contains(out, "tulle overlay set blue --gateway true") {
		t.Errorf("a port that cannot be published: %v: %s", err, out)
	}
	a.do("overlay", "set", "blue", "--gateway", "true")
	known(t, 5*time.Second, "blue", true, a)
	podman("run", "--detach", "--name", "pp", "--network", "blue-net", "--publish", "8080:80", "lab.test/bb:1", "sh", "-c", "busybox nc -l -p 80 -e echo hello")
	a.eventually(5*time.Second, "the container answers at the host's port", func() bool {
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		c, err := h.Dial(ctx, "tcp", "192.168.77.1:8080")
		if err != nil {
			return false
		}
		defer c.Close()
		_ = c.SetDeadline(time.Now().Add(time.Second))
		b, _ := io.ReadAll(c)
		return string(b) == "hello\n"
	})
	podman("rm", "--force", "--time", "0", "pp")
	free(t, h, 8080)
}
