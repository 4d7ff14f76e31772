package e2e

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/tulle-net/tulle/internal/lab"
)

//	a ── a dockerd that is a Swarm of one, a node, and the managed plugin, whose root is the binary
//
// The only kind of plugin that a Swarm takes. Its services cannot start here, for want of
// ip_vs; containers on an attachable network can.

func TestDockerPlugin(t *testing.T) {
	t.Parallel()
	l, _, h := hosts(t, 1, lab.Underlay{Prefix4: underlay4})
	runIn(t, h[0], "ip", "route", "add", "default", "dev", "ul")
	d := dockers(t, l, h)[0]
	sockets := filepath.Join(l.Dir(), "node")
	if err := os.Mkdir(sockets, 0o755); err != nil {
		t.Fatal(err)
	}
	a := upDocker(t, l, d, "--docker", "off", "--gossip", "[::]:7956") // 7946 is the Swarm's
	if err := os.Link(a.sock, filepath.Join(sockets, "tulle.sock")); err != nil {
		t.Fatal(err)
	}

	folder := filepath.Join(l.Dir(), "plugin")
	for _, dir := range []string{"rootfs/run/docker/plugins", "rootfs/run/tulle", "rootfs/var/lib/tulle", "rootfs/var/run"} {
		if err := os.MkdirAll(filepath.Join(folder, dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for from, to := range map[string]string{binary: "rootfs/tulle", "../docker/plugin/config.json": "config.json"} {
		if out, err := exec.Command("cp", from, filepath.Join(folder, to)).CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
	}
	const name = "tulle/net:1"
	d.do("plugin", "create", name, folder)
	d.do("plugin", "set", name, "node.source="+sockets, "docker.source="+d.dir+"/sock")
	d.do("plugin", "enable", name)
	defer d.do("plugin", "disable", "-f", name)

	d.do("swarm", "init", "--advertise-addr", "192.168.77.1")
	d.do("network", "create", "-d", name, "--attachable", "--subnet", "10.79.0.0/24", "-o", "overlay=blue", "net")
	if out := d.do("network", "inspect", "-f", "{{.Scope}}", "net"); out != "swarm" {
		t.Errorf("the network's scope is %s", out)
	}
	o, there := a.knows("blue")
	if !there || o.Subnets[0].String() != "10.79.0.0/24" {
		t.Errorf("overlay blue is %+v, %v", o, there)
	}
	d.runs("one", "--network", "net")
	d.runs("two", "--network", "net")
	d.pings("one", d.address("two", "net"))
	if e := a.named("one"); e.IPs[0].Addr().String() != d.address("one", "net") {
		t.Errorf("the endpoint of one: %+v, Docker says %s", e, d.address("one", "net"))
	}
	d.do("rm", "-f", "one", "two")
	d.do("network", "rm", "net")
	a.eventually(10*time.Second, "its addresses are free", func() bool { return a.used("blue") == 0 })
}
