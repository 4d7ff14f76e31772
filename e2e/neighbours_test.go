package e2e

import (
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/tulle-net/tulle/internal/lab"
)

//	a ──┬─[ul]─┬── b
//	    │      │
//	 a1 a2    b1        arping, ndisc6, DHCP between them, in an overlay whose endpoints are all known

// TestNeighbourTools: what people look at a network with, and what gives addresses out
// without Tulle, work as on a wire.
func TestNeighbourTools(t *testing.T) {
	t.Parallel()
	l, _, h := hosts(t, 2, lab.Underlay{Prefix4: underlay4, Offloads: lab.Wire})
	nodes := joined(t, l, h, nil)
	a, b := nodes[0], nodes[1]
	a.do("overlay", "create", "blue", "--subnet", "10.32.0.0/16", "--subnet", "fd32::/64")
	known(t, 5*time.Second, "blue", true, nodes...)
	cs := containers(t, l, "a1", "a2", "b1")
	addrs := func(n *tulle, c *lab.Host) (v4, v6 netip.Addr) {
		for _, line := range strings.Fields(n.do("attach", "blue", "--netns", c.Path(), "--name", c.Name())) {
			p := netip.MustParsePrefix(line)
			if p.Addr().Is4() {
				v4 = p.Addr()
			} else {
				v6 = p.Addr()
			}
		}
		return v4, v6
	}
	a1, _ := addrs(a, cs[0])
	addrs(a, cs[1])
	b1, b1v6 := addrs(b, cs[2])
	settled(t, "blue", nodes...)
	link, _, err := cs[2].Link("eth0")
	if err != nil {
		t.Fatal(err)
	}
	tool := func(c *lab.Host, name string, args ...string) (string, error) {
		out, err := c.Run(t.Context(), name, args...)
		return strings.ToLower(string(out)), err
	}

	// Who has it?
	out, err := tool(cs[0], "arping", "-c", "2", "-w", "5", "-I", "eth0", b1.String())
	if err != nil || !strings.Contains(out, "received 2 response") || !strings.Contains(out, link.MAC) {
		t.Errorf("arping: %v\n%s", err, out)
	}
	out, err = tool(cs[0], "ndisc6", "-1", b1v6.String(), "eth0")
	if err != nil || !strings.Contains(out, link.MAC) {
		t.Errorf("ndisc6: %v\n%s", err, out)
	}
	// May I have it? arping -D ends with 0 if nobody answers.
	if out, err := tool(cs[0], "arping", "-D", "-c", "2", "-w", "5", "-I", "eth0", b1.String()); err == nil {
		t.Errorf("arping -D finds that %s is free\n%s", b1, out)
	}
	if out, err := tool(cs[0], "arping", "-D", "-c", "2", "-w", "5", "-I", "eth0", "10.32.250.250"); err != nil {
		t.Errorf("arping -D finds that a free address is taken: %v\n%s", err, out)
	}
	// It is mine: harmless.
	if out, err := tool(cs[0], "arping", "-U", "-c", "1", "-I", "eth0", "-s", a1.String(), a1.String()); err != nil && !strings.Contains(out, "sent 1 probe") {
		t.Errorf("arping -U: %v\n%s", err, out)
	}
	ping(t, cs[2], a1, 5*time.Second)

	dhcp(t, l, cs[1], cs[2])
	leased := netip.MustParseAddr("10.32.200.10")
	ping(t, cs[0], leased, 5*time.Second)
	if b.flooded("blue") == 0 {
		t.Error("DHCP is broadcast, and b flooded nothing")
	}
}

// dhcp has a client ask a server for an address, and take 10.32.200.10.
func dhcp(t *testing.T, l *lab.Lab, server, client *lab.Host) {
	t.Helper()
	dir := l.Dir()
	conf := filepath.Join(dir, "udhcpd.conf")
	lease := filepath.Join(dir, "udhcpd.leases")
	text := fmt.Sprintf("start 10.32.200.10\nend 10.32.200.10\ninterface eth0\nlease_file %s\npidfile %s.pid\nopt subnet 255.255.0.0\nopt lease 600\n", lease, lease)
	script := filepath.Join(dir, "udhcpc.sh")
	for name, content := range map[string]string{
		conf: text, lease: "",
		script: "#!/bin/sh\n[ \"$1\" = bound ] && ip addr add \"$ip\"/16 dev \"$interface\"\nexit 0\n",
	} {
		if err := os.WriteFile(name, []byte(content), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := server.Start(exec.Command("busybox", "udhcpd", "-f", conf)); err != nil {
		t.Fatal(err)
	}
	out, err := client.Run(t.Context(), "busybox", "udhcpc", "-i", "eth0", "-n", "-q", "-f", "-t", "10", "-T", "1", "-s", script)
	if err != nil || !strings.Contains(string(out), "lease of 10.32.200.10 obtained") {
		t.Fatalf("DHCP: %v\n%s", err, out)
	}
}
