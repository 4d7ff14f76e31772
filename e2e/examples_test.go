package e2e

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/tulle-net/tulle/config"
	"github.com/tulle-net/tulle/internal/lab"
)

//	a (192.0.2.1) ──[ul]── b (192.0.2.2)        what examples/ holds, run as it stands

var exampleNet = netip.MustParsePrefix("192.0.2.0/24")

// TestExampleKernelVTEP runs the script, which makes namespaces of its own.
func TestExampleKernelVTEP(t *testing.T) {
	t.Parallel()
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	ctx, cancel := context.WithTimeout(t.Context(), 40*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, "../examples/kernel-vtep/kernel-vtep.sh", binary)
	// It removes what it made when it is asked to end.
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = 5 * time.Second
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	for _, want := range []string{"3 received, 0% packet loss", "192.0.2.2:4789"} {
		if !strings.Contains(string(out), want) {
			t.Errorf("the script does not print %q:\n%s", want, out)
		}
	}
	left, err := filepath.Glob("/run/netns/kvtep" + strconv.Itoa(cmd.Process.Pid) + "*")
	if err != nil || len(left) > 0 {
		t.Errorf("the script left %v behind (%v)", left, err)
	}
}

// TestExampleTwoHosts starts the two hosts as systemd would: the unit's command
// with the unit's capabilities and its word that it is ready.
func TestExampleTwoHosts(t *testing.T) {
	t.Parallel()
	l, sw, h := hosts(t, 2, lab.Underlay{Prefix4: exampleNet})
	unit := readUnit(t, "../examples/two-hosts/tulle.service")
	text, err := os.ReadFile("../examples/two-hosts/tulle.yaml")
	if err != nil {
		t.Fatal(err)
	}
	token := "TOKEN"
	for i, host := range h {
		yaml := string(text)
		if i == 1 { // the second host's file, edited as its comments say
			yaml = strings.NewReplacer("name: one", "name: two", "# token: TOKEN", "token: "+token, "10.32.0.1/16 ", "10.32.0.2/16 ").Replace(yaml)
		}
		file := filepath.Join(l.Dir(), host.Name()+".yaml")
		if err := os.WriteFile(file, []byte(yaml), 0o600); err != nil {
			t.Fatal(err)
		}
		c, err := config.Load(file)
		if err == nil {
			err = c.Validate()
		}
		if err != nil || len(c.Overlays) != 1 || c.Overlays[0].Address.Addr() != address(i+1) || c.Overlays[0].Encryption != "required" || (c.Token != "") != (i == 1) {
			t.Fatalf("%s: %v, %+v; the example's comments and this test disagree\n%s", file, err, c, yaml)
		}
		startUnit(t, l, host, unit, file)
		if i == 0 {
			out, err := exec.CommandContext(t.Context(), binary, "--socket", filepath.Join(l.Dir(), host.Name()+".sock"), "token", "create").Output()
			if err != nil {
				t.Fatal(err)
			}
			token = strings.TrimSpace(string(out))
		}
	}
	ping(t, h[1], address(1), 5*time.Second)
	transfer(t, l, h[0], h[1], address(2), 16<<20)
	if got, err := h[1].Neighbour("ul", sw.Addr(h[0])); got == "" {
		t.Errorf("nothing went over the underlay (%v)", err)
	}
}

// startUnit starts a service and waits until it says READY=1.
func startUnit(t *testing.T, l *lab.Lab, h *lab.Host, unit map[string]string, file string) {
	t.Helper()
	notify := filepath.Join(l.Dir(), h.Name()+".notify")
	ready, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: notify, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ready.Close() })
	line, ok := strings.CutPrefix(unit["Service.ExecStart"], "/usr/local/bin/tulle ")
	if !ok || !strings.Contains(line, "--config /etc/tulle/tulle.yaml") || unit["Service.Type"] != "notify" || unit["Service.NoNewPrivileges"] != "yes" {
		t.Fatalf("the unit is not what its README installs: %v", unit)
	}
	caps := func(key string) string {
		set := "-all"
		for _, c := range strings.Fields(unit["Service."+key]) {
			set += ",+" + strings.ToLower(strings.TrimPrefix(c, "CAP_"))
		}
		return set
	}
	args := []string{"--bounding-set", caps("CapabilityBoundingSet"), "--inh-caps", caps("AmbientCapabilities"), "--ambient-caps", caps("AmbientCapabilities"), "--no-new-privs", binary}
	args = append(args, strings.Fields(strings.Replace(line, "/etc/tulle/tulle.yaml", file, 1))...)
	// Two hosts of one machine cannot share the default path.
	cmd := exec.Command("setpriv", append(args, "--state-dir", filepath.Join(l.Dir(), h.Name()+".state"))...)
	cmd.Env = append(os.Environ(), "NOTIFY_SOCKET="+notify, "TULLE_SOCKET="+filepath.Join(l.Dir(), h.Name()+".sock"))
	p, err := h.Start(cmd)
	if err != nil {
		t.Fatal(err)
	}
	ready.SetReadDeadline(time.Now().Add(10 * time.Second))
	word := make([]byte, 64)
	n, err := ready.Read(word)
	if err != nil || string(word[:n]) != "READY=1" {
		t.Fatalf("%s: systemd is told %q (%v), want READY=1\n%s", h.Name(), word[:n], err, p.Log())
	}
	t.Cleanup(func() {
		if err := p.Stop(10 * time.Second); err != nil {
			t.Errorf("%s ended with %v, want status 0", h.Name(), err)
		}
	})
}

// readUnit reads a systemd unit (systemd.syntax(7)) and knows the keys that the
// example has, for systemd only warns of one that is misspelt.
func readUnit(t *testing.T, path string) map[string]string {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	known := map[string]string{
		"Unit": "Description Wants After",
		"Service": "Type ExecStart Restart RestartSec StateDirectory StateDirectoryMode RuntimeDirectory CapabilityBoundingSet AmbientCapabilities " +
			"DeviceAllow NoNewPrivileges ProtectSystem ProtectHome PrivateTmp LimitNOFILE",
		"Install": "WantedBy",
	}
	unit, section := map[string]string{}, ""
	for line := range strings.Lines(string(b)) {
		line = strings.TrimSpace(line)
		if line == "" || line[0] == '#' {
			continue
		}
		if line[0] == '[' {
			section = strings.Trim(line, "[]")
			continue
		}
		key, value, ok := strings.Cut(line, "=")
		if !ok || !strings.Contains(" "+known[section]+" ", " "+key+" ") || value == "" {
			t.Errorf("%s: [%s] has %q", path, section, line)
		}
		unit[section+"."+key] = value
	}
	return unit
}

// TestExampleEmbed has two programs that embed the library talk to each other.
func TestExampleEmbed(t *testing.T) {
	t.Parallel()
	l, sw, h := hosts(t, 2, lab.Underlay{Prefix4: exampleNet})
	program := filepath.Join(l.Dir(), "embed")
	if err := build(program, "../examples/embed"); err != nil {
		t.Fatal(err)
	}
	var ps []*lab.Process
	for i, peer := range []int{1, 0} {
		p, err := h[i].Start(exec.Command(program, sw.Addr(h[i]).String(), sw.Addr(h[peer]).String(), netip.PrefixFrom(address(i+1), 16).String()))
		if err != nil {
			t.Fatal(err)
		}
		ps = append(ps, p)
	}
	ping(t, h[0], address(2), 10*time.Second)
	transfer(t, l, h[0], h[1], address(2), 16<<20)
	transfer(t, l, h[1], h[0], address(1), 16<<20)
	intact(t, h...)
	for i, p := range ps {
		if err := errors.Join(p.Signal(syscall.SIGINT), p.Wait()); err != nil {
			t.Errorf("%s ended with %v, want status 0:\n%s", h[i].Name(), err, p.Log())
		}
	}
}
