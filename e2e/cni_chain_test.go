package e2e

import (
	"context"
	"encoding/json"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/tulle-net/tulle/internal/lab"
	"github.com/tulle-net/tulle/node"
)

//	b ──[ul]── a ── blue: the host itself        a client on b asks for a port of a
//	           └── c: a container, by cnitool, with plugins behind and below ours
//
// The plugins of the CNI project: Debian's, which speak 1.0.0, and newer ones for what came with 1.1.0.

// libcni is cnitool with folders of the test's.
type libcni struct {
	t          *testing.T
	h          *lab.Host
	tool       string
	confs, bin string
}

// write writes a network configuration list.
func (c *libcni) write(name, version string, plugins ...object) {
	c.t.Helper()
	b, err := json.Marshal(object{"cniVersion": version, "name": name, "plugins": plugins})
	if err == nil {
		err = os.WriteFile(filepath.Join(c.confs, name+".conflist"), b, 0o644)
	}
	if err != nil {
		c.t.Fatal(err)
	}
}

func (c *libcni) try(command, network, netns string, env ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	return c.h.Run(ctx, "env", append(append([]string{"CNI_PATH=" + c.bin, "NETCONFPATH=" + c.confs}, env...), c.tool, command, network, netns)...)
}

func (c *libcni) run(command, network, netns string, env ...string) string {
	c.t.Helper()
	if command == "add" {
		// libcni keeps results outside our folders, until DEL.
		c.t.Cleanup(func() { _, _ = c.try("del", network, netns, env...) })
	}
	out, err := c.try(command, network, netns, env...)
	if err != nil {
		c.t.Fatalf("cnitool %s %s: %v", command, network, err)
	}
	return out
}

// TestCNIChain: our plugin before others, and with another that chooses the addresses.
func TestCNIChain(t *testing.T) {
	t.Parallel()
	l, sw, h := hosts(t, 2, lab.Underlay{Prefix4: underlay4})
	a := joined(t, l, h[:1], nil)[0]
	a.do("overlay", "create", "blue", "--subnet", "10.32.0.0/16", "--reserve", "10.32.128.0/24")
	host := a.exposed("blue")
	confs, bins := cniFolders(t, a, l.Dir())
	c := &libcni{t: t, h: h[0], tool: module(t, l.Dir(), "github.com/containernetworking/cni/cnitool"), confs: confs, bin: bins}
	ours := object{"type": "tulle", "overlay": "blue", "socket": a.sock, "capabilities": object{"ips": true, "mac": true}}
	left := func(t *testing.T) {
		t.Helper()
		if list := a.attached(func(e node.Endpoint) bool { return e.Netns != "" }); len(list) != 0 {
			t.Errorf("endpoints are left: %+v", list)
		}
	}

	part(t, "tuning", []*tulle{a}, func(t *testing.T) {
		c.t = t
		path := space(t, "tuning")
		c.write("tuned", "1.0.0", ours, object{"type": "tuning", "mac": "02:00:00:00:77:77", "mtu": 1300, "sysctl": object{"net.ipv4.conf.eth0.arp_filter": "1"}})
		out := c.run("add", "tuned", path)
		link := inNetns(t, path, "ip", "-o", "link", "show", "eth0")
		if !strings.Contains(out, "02:00:00:00:77:77") || !strings.Contains(link, "02:00:00:00:77:77") || !strings.Contains(link, "mtu 1300") ||
			inNetns(t, path, "sysctl", "-n", "net.ipv4.conf.eth0.arp_filter") != "1\n" {
			t.Errorf("the device is %s, the result %s", link, out)
		}
		inNetns(t, path, "ping", "-c", "1", "-W", "5", host.Addr().String())
		c.run("check", "tuned", path)
		c.run("del", "tuned", path)
		left(t)
	})

	part(t, "host-local", []*tulle{a}, func(t *testing.T) {
		c.t = t
		ranges := object{"type": "host-local", "dataDir": filepath.Join(t.TempDir(), "leases"), "ranges": [][]object{{{"subnet": "10.32.0.0/16", "rangeStart": "10.32.128.10", "rangeEnd": "10.32.128.11"}}},
			"routes": []object{{"dst": "198.51.100.0/24", "gw": host.Addr().String()}, {"dst": "0.0.0.0/0", "gw": host.Addr().String()}}}
		delegated := object{"ipam": ranges}
		for k, v := range ours {
			delegated[k] = v
		}
		c.write("local", "1.0.0", delegated)
		one, two, three := space(t, "one"), space(t, "two"), space(t, "three")
		out := c.run("add", "local", one)
		if !strings.Contains(out, `"address": "10.32.128.10/16"`) || !strings.Contains(out, `"dst": "198.51.100.0/24"`) {
			t.Errorf("the result is %s", out)
		}
		routes := inNetns(t, one, "ip", "route")
		if !strings.Contains(routes, "default via "+host.Addr().String()) || !strings.Contains(routes, "198.51.100.0/24 via "+host.Addr().String()) {
			t.Errorf("routes: %s", routes)
		}
		c.run("check", "local", one)
		c.run("add", "local", two)
		inNetns(t, one, "ping", "-c", "1", "-W", "5", "10.32.128.11")
		if out, err := c.try("add", "local", three); err == nil || !strings.Contains(out, "no IP addresses available") {
			t.Errorf("a third of two addresses: %v: %s", err, out)
		}
		// The address that is chosen is Tulle's as well: nobody else gets it.
		if out := a.attaches("blue", "--netns", three); out.Addr() == netip.MustParseAddr("10.32.128.10") {
			t.Errorf("Tulle gives %s out again", out)
		}
		a.refuses([]string{"10.32.128.10"}, "attach", "blue", "--netns", three, "--ifname", "eth1", "--ip", "10.32.128.10")
		a.do("detach", "blue", "--netns", three)
		// Taken by somebody else, it is freed by host-local again.
		c.run("del", "local", two)
		a.attaches("blue", "--netns", three, "--ifname", "own", "--ip", "10.32.128.11")
		if out, err := c.try("add", "local", two); err == nil || !strings.Contains(out, "10.32.128.11") {
			t.Errorf("an address that an endpoint has: %v: %s", err, out)
		}
		a.do("detach", "blue", "--netns", three)
		c.run("add", "local", two)
		// Routes and address outlive a restart of the node.
		untoken(a)
		a.proc.Kill()
		<-a.proc.Done()
		a.start()
		c.run("check", "local", one)
		c.run("del", "local", one)
		c.run("del", "local", two)
		left(t)
	})

	part(t, "a newer host-local in 1.1.0", []*tulle{a}, func(t *testing.T) {
		c.t = t
		newer := *c
		newer.bin = filepath.Join(l.Dir(), "newer")
		if err := os.Mkdir(newer.bin, 0o755); err != nil {
			t.Fatal(err)
		}
		module(t, newer.bin, "github.com/containernetworking/plugins/plugins/ipam/host-local")
		if err := os.Symlink(binary, filepath.Join(newer.bin, "tulle")); err != nil {
			t.Fatal(err)
		}
		newer.write("newer", "1.1.0", object{"type": "tulle", "overlay": "blue", "socket": a.sock, "ipam": object{
			"type": "host-local", "dataDir": filepath.Join(t.TempDir(), "leases"), "ranges": [][]object{{{"subnet": "10.32.0.0/16", "rangeStart": "10.32.128.20", "rangeEnd": "10.32.128.20"}}}}})
		path := space(t, "newer")
		newer.run("status", "newer", path)
		for range 2 { // the second finds the one address free again
			if out := newer.run("add", "newer", path); !strings.Contains(out, "10.32.128.20/16") || !strings.Contains(out, `"cniVersion": "1.1.0"`) {
				t.Errorf("the result is %s", out)
			}
			newer.run("check", "newer", path)
			newer.run("del", "newer", path)
		}
		newer.run("gc", "newer", path)
		left(t)
	})

	part(t, "portmap", []*tulle{a}, func(t *testing.T) {
		c.t = t
		if err := h[0].Sysctl("net/ipv4/ip_forward", "1"); err != nil {
			t.Fatal(err)
		}
		through := object{"ipam": object{"type": "host-local", "dataDir": filepath.Join(t.TempDir(), "leases"), "ranges": [][]object{{{"subnet": "10.32.0.0/16", "rangeStart": "10.32.128.30", "rangeEnd": "10.32.128.40"}}},
			"routes": []object{{"dst": "0.0.0.0/0", "gw": host.Addr().String()}}}}
		for k, v := range ours {
			through[k] = v
		}
		c.write("mapped", "1.0.0", through, object{"type": "portmap", "capabilities": object{"portMappings": true}})
		box := containers(t, l, "mapped")[0]
		path := box.Path()
		caps := `CAP_ARGS={"portMappings":[{"hostPort":8080,"containerPort":80,"protocol":"tcp"}]}`
		c.run("add", "mapped", path, caps)
		var server net.Listener
		if err := box.Do(func() (err error) {
			server, err = net.Listen("tcp", ":80")
			return err
		}); err != nil {
			t.Fatal(err)
		}
		defer server.Close()
		var client net.Conn
		if err := h[1].Do(func() (err error) {
			client, err = net.DialTimeout("tcp", sw.Addr(h[0]).String()+":8080", 5*time.Second)
			return err
		}); err != nil {
			t.Fatalf("the host's port: %v", err)
		}
		defer client.Close()
		served, err := server.Accept()
		if err != nil {
			t.Fatal(err)
		}
		defer served.Close()
		if served.RemoteAddr().String() != client.LocalAddr().String() {
			t.Errorf("the container sees the client as %s, want %s", served.RemoteAddr(), client.LocalAddr())
		}
		// No CHECK: this portmap looks for IPv6 rules that it has not made.
		c.run("del", "mapped", path, caps)
		if rules := runIn(t, h[0], "iptables", "-t", "nat", "-S"); strings.Contains(rules, "8080") {
			t.Errorf("rules are left: %s", rules)
		}
		left(t)
	})
}
