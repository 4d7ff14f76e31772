package e2e

import (
	"context"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/tulle-net/tulle/internal/lab"
)

//	a (tulle, peer=b) ──[ul]── b: br-phy ─ Open vSwitch, userspace ─ br-int 10.32.0.2
//
// br-phy takes over the underlay's device and address; vx0 on br-int is the
// tunnel. OVS sends a VXLAN datagram per frame, with its own entropy port.

// TestOpenVSwitch: the userspace datapath of Open vSwitch as the other VTEP.
func TestOpenVSwitch(t *testing.T) {
	t.Parallel()
	l, sw, h := hosts(t, 2, lab.Underlay{Prefix4: underlay4, Offloads: lab.Wire})
	b := h[1]
	startOVS(t, l, b, sw.Addr(b), sw.Addr(h[0]))
	a := up(t, l, h[0], "--overlay", overlay(1, "peer="+sw.Addr(b).String()))
	ping(t, h[0], address(2), 10*time.Second)
	ping(t, b, address(1), 10*time.Second)
	// What the TAPs of OVS take from and give to the kernel is finished frames only.
	transfer(t, l, h[0], b, address(2), 8<<20)
	transfer(t, l, b, h[0], address(1), 8<<20)
	if err := dfPing(t, h[0], address(2), 1450); err != nil {
		t.Error(err)
	}
	if err := dfPing(t, b, address(1), 1450); err != nil {
		t.Error(err)
	}
	intact(t, h[0], b)
	for reason, n := range a.status().Drops {
		if n != 0 && reason != "rx_overflow" && reason != "tap_overflow" && reason != "aqm" && reason != "aqm_marked" { // TCP finds the rate by losing
			t.Errorf("drop %s = %d, want 0", reason, n)
		}
	}
}

// startOVS runs Open vSwitch on h without the system's service, bridges and all.
func startOVS(t *testing.T, l *lab.Lab, h *lab.Host, local, remote netip.Addr) {
	t.Helper()
	dir := filepath.Join(l.Dir(), "ovs")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	env := append(os.Environ(), "OVS_RUNDIR="+dir, "OVS_LOGDIR="+dir, "OVS_DBDIR="+dir)
	db, sock := filepath.Join(dir, "conf.db"), filepath.Join(dir, "db.sock")
	if out, err := exec.Command("ovsdb-tool", "create", db, "/usr/share/openvswitch/vswitch.ovsschema").CombinedOutput(); err != nil {
		t.Fatalf("needs openvswitch-switch: %v\n%s", err, out)
	}
	daemon := func(name string, args ...string) {
		t.Helper()
		cmd := exec.Command(name, args...)
		cmd.Env = env
		if _, err := h.Start(cmd); err != nil {
			t.Fatal(err)
		}
	}
	vsctl := func(args ...string) {
		t.Helper()
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		defer cancel()
		if out, err := h.Run(ctx, "ovs-vsctl", append([]string{"--db=unix:" + sock}, args...)...); err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
	}
	daemon("ovsdb-server", db, "--remote=punix:"+sock, "--unixctl="+filepath.Join(dir, "dbctl"))
	eventually(t, 10*time.Second, "ovsdb-server listens", func() bool { _, err := os.Stat(sock); return err == nil })
	vsctl("--no-wait", "init")
	daemon("ovs-vswitchd", "unix:"+sock, "--unixctl="+filepath.Join(dir, "ctl"))
	ul, _, err := h.Link("ul")
	if err != nil {
		t.Fatal(err)
	}
	if err := h.DelAddr("ul", netip.PrefixFrom(local, underlay4.Bits())); err != nil {
		t.Fatal(err)
	}
	vsctl("add-br", "br-phy", "--", "set", "bridge", "br-phy", "datapath_type=netdev", "other-config:hwaddr="+ul.MAC, "--", "add-port", "br-phy", "ul")
	vsctl("add-br", "br-int", "--", "set", "bridge", "br-int", "datapath_type=netdev",
		"--", "add-port", "br-int", "vx0", "--", "set", "interface", "vx0", "type=vxlan", "options:remote_ip="+remote.String(), "options:key=100")
	if err := h.SetMTU("br-int", 1450); err != nil {
		t.Fatal(err)
	}
	for dev, p := range map[string]netip.Prefix{"br-phy": netip.PrefixFrom(local, underlay4.Bits()), "br-int": netip.PrefixFrom(address(2), 16)} {
		if err := h.AddAddr(dev, p); err != nil {
			t.Fatal(err)
		}
		if err := h.SetUp(dev, true); err != nil {
			t.Fatal(err)
		}
	}
}
