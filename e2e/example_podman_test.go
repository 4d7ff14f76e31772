package e2e

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/tulle-net/tulle/internal/lab"
	"github.com/tulle-net/tulle/node"
)

//	a ──[ul]── b      a node and a Podman on each; a web server in a container of a, who asks it in one of b

// podmanHost is a host with /etc/containers, /etc/cni, /opt and a storage of its own.
type podmanHost struct {
	t    *testing.T
	node *tulle
	dir  string
}

// podmanHere is what root may not raise on the tests' machine, or there is none of: limits, systemd.
const podmanHere = `[containers]
default_ulimits = ["nofile=1024:1024", "nproc=1000:1000"]
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "file"
lock_type = "file"
`

func newPodmanHost(t *testing.T, l *lab.Lab, n *tulle) *podmanHost {
	t.Helper()
	p := &podmanHost{t, n, filepath.Join(l.Dir(), "podman-"+n.name)}
	for _, d := range []string{"cni/net.d", "opt/cni/bin", "containers", "storage", "run", "libpod"} {
		if err := os.MkdirAll(filepath.Join(p.dir, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	storage := fmt.Sprintf("[storage]\ndriver = \"vfs\"\ngraphroot = %q\nrunroot = %q\n", p.dir+"/storage", p.dir+"/run")
	config := podmanHere + fmt.Sprintf("static_dir = %q\ntmp_dir = %q\n", p.dir+"/storage/libpod", p.dir+"/libpod")
	for name, text := range map[string]string{"containers.conf": config, "storage.conf": storage, "policy.json": `{"default":[{"type":"insecureAcceptAnything"}]}`} {
		if err := os.WriteFile(filepath.Join(p.dir, "containers", name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(func() {
		if out, err := p.tries("podman rm --all --force --time 0"); err != nil {
			t.Errorf("podman rm: %v: %s", err, out)
		}
	})
	return p
}

func (p *podmanHost) tries(line string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	const own = `mount --make-private / && mount --bind "$0/cni" /etc/cni && mount --bind "$0/opt" /opt && mount --bind "$0/containers" /etc/containers && exec sh -ec "$1"`
	return p.node.host.Run(ctx, "env", "PATH="+filepath.Dir(binary)+":"+os.Getenv("PATH"), "TULLE_SOCKET="+p.node.sock,
		"unshare", "--mount", "--propagation", "unchanged", "sh", "-c", own, p.dir, "cd ../examples/podman && "+line)
}

func (p *podmanHost) do(line string) string {
	p.t.Helper()
	out, err := p.tries(line)
	if err != nil {
		p.t.Fatalf("%s: %s: %v: %s", p.node.name, line, err, out)
	}
	return out
}

// TestExamplePodman types what the example's README says.
func TestExamplePodman(t *testing.T) {
	t.Parallel()
	text, err := os.ReadFile("../examples/podman/README.md")
	if err != nil {
		t.Fatal(err)
	}
	blocks := regexp.MustCompile("(?s)```sh\n(.*?)```").FindAllStringSubmatch(string(text), -1)
	if len(blocks) != 4 {
		t.Fatalf("the example has %d blocks of commands, want 4: overlay, settings, a server, who asks it", len(blocks))
	}
	l, sw, h := hosts(t, 2, lab.Underlay{Prefix4: underlay4})
	nodes := joined(t, l, h, nil)
	a, b := newPodmanHost(t, l, nodes[0]), newPodmanHost(t, l, nodes[1])
	image := filepath.Join(l.Dir(), "busybox.tar")
	writeImage(t, image, "docker.io/library/busybox:latest")

	a.do(blocks[0][1])
	known(t, 10*time.Second, "blue", true, nodes...)
	for _, p := range []*podmanHost{a, b} {
		p.do(blocks[1][1])
		p.do("podman load --quiet --input " + image)
	}
	a.do(blocks[2][1])
	eventually(t, 10*time.Second, "the server answers at its host's port", func() bool {
		client := http.Client{Timeout: time.Second, Transport: &http.Transport{DialContext: h[1].Dial, DisableKeepAlives: true}}
		r, err := client.Get("http://" + sw.Addr(h[0]).String() + ":8080/")
		if err != nil {
			return false
		}
		defer r.Body.Close()
		body, _ := io.ReadAll(r.Body)
		return string(body) == "hello\n"
	})
	if out := b.do(blocks[3][1]); !strings.HasSuffix(out, "hello\n") {
		t.Errorf("the other host's container gets %q", out)
	}
	a.do("podman rm --force --time 0 web")
	for _, n := range nodes {
		n.eventually(5*time.Second, "no endpoint is left", func() bool { return len(get[node.Endpoints](n, "/v1/endpoints?local=true").Endpoints) == 0 })
	}
}
