package e2e

import (
	"fmt"
	"net"
	"net/netip"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/tulle-net/tulle/internal/lab"
)

//	c ── a ──[ul]── b        a: an ordinary user's node, the gateway of its container c by that user's sockets
//	                         b: somebody on the network, without a node

// serve starts iperf3 on a host, or in the namespace of a process there.
func serve(t *testing.T, h *lab.Host, pid int) {
	t.Helper()
	argv := []string{"iperf3", "-s"}
	if pid != 0 {
		argv = append([]string{"nsenter", "-t", fmt.Sprint(pid), "-n"}, argv...)
	}
	p, err := h.Start(exec.Command(argv[0], argv[1:]...))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.Kill)
}

func TestRootlessOutward(t *testing.T) {
	t.Parallel()
	_, _, h := hosts(t, 2, lab.Underlay{Prefix4: underlay4, Prefix6: underlay6, Offloads: lab.Wire})
	u := ordinaryUser(t, h[0], "", "0666")
	a := u.up()
	u.does(u.tulle(), "overlay", "create", "blue", "--subnet", "10.32.0.0/16", "--subnet", "fd32::/64", "--gateway", "true")
	c := u.container()
	pid := c.Pid()
	attach := []string{u.tulle(), "attach", "blue", "--pid", fmt.Sprint(pid)}
	u.fails([]string{"publish port 80", "ip_unprivileged_port_start"}, append(attach[1:], "--publish", "80:5201")...)
	u.does(append(attach, "--publish", "18080:5201", "--publish", "18080:5201/udp")...)
	in := func(args ...string) string { t.Helper(); return enter(t, h[0], pid, args...) }
	drops := func(name string) uint64 { t.Helper(); return a.status().Drops[name] }
	b4, b6 := "192.168.77.2", "fd77::2"

	serve(t, h[1], 0)
	for _, args := range [][]string{
		{"-c", b4, "-n", "16M"}, {"-c", b4, "-n", "16M", "-R"}, {"-c", b6, "-n", "4M"}, {"-c", b6, "-n", "4M", "-R"},
		{"-c", b4, "-u", "-b", "20M", "-n", "1M"}, {"-c", b4, "-u", "-b", "20M", "-n", "1M", "-R"},
	} {
		listens(t, h[1], 0)
		out := in(append([]string{"iperf3", "--connect-timeout", "5000"}, args...)...)
		if strings.Contains(strings.Join(args, " "), "16M") {
			for line := range strings.Lines(out) {
				if strings.Contains(line, "receiver") {
					t.Logf("TCP by the user's sockets, %v: %s", args, strings.Join(strings.Fields(line)[4:8], " "))
				}
			}
		}
	}

	// Who is called sees the host.
	ln := listenAt(t, h[1], netip.MustParseAddrPort(b4+":7007"))
	seen := make(chan string, 1)
	go func() {
		conn, err := ln.Accept()
		if err != nil {
			seen <- err.Error()
			return
		}
		defer conn.Close()
		seen <- conn.RemoteAddr().(*net.TCPAddr).IP.String()
	}()
	in("bash", "-c", "exec 3<>/dev/tcp/"+b4+"/7007")
	if got := <-seen; got != "192.168.77.1" {
		t.Errorf("who is called sees %s, want the host's address", got)
	}
	ln.Close()

	// Pings: the gateway answers itself; others if the user may have ping sockets.
	in("ping", "-c", "1", "-W", "5", "10.32.0.1")
	in("ping", "-c", "1", "-W", "5", "fd32::1")
	was := drops("outward_echo")
	if out, err := h[0].Run(t.Context(), "nsenter", "-t", fmt.Sprint(pid), "-n", "ping", "-c", "1", "-W", "1", b4); err == nil {
		t.Errorf("a ping without ping sockets is answered: %s", out)
	}
	if drops("outward_echo") == was || !strings.Contains(a.proc.Log(), "ping_group_range") {
		t.Error("a ping without ping sockets is neither counted nor told of")
	}
	if err := h[0].Sysctl("net/ipv4/ping_group_range", "0 2147483647"); err != nil {
		t.Fatal(err)
	}
	in("ping", "-c", "2", "-i", "0.2", "-W", "5", "-s", "1000", b4)
	in("ping", "-c", "2", "-i", "0.2", "-W", "5", b6)

	// What is refused: VXLAN's port, a port where nobody listens, and the host's loopback.
	was = drops("outward_refused")
	in("bash", "-c", "echo vxlan > /dev/udp/"+b4+"/4789")
	a.eventually(2*time.Second, "a datagram to VXLAN's port is refused", func() bool { return drops("outward_refused") > was })
	was = drops("outward_failed")
	if out, err := h[0].Run(t.Context(), "nsenter", "-t", fmt.Sprint(pid), "-n", "bash", "-c", "exec 3<>/dev/tcp/"+b4+"/9"); err == nil || !strings.Contains(out, "refused") {
		t.Errorf("a port where nobody listens: %v: %s", err, out)
	}
	if drops("outward_failed") == was {
		t.Error("a connection that nobody took is not counted")
	}
	// From inside with another's address.
	was = drops("outward_source")
	in("ip", "addr", "add", "10.32.200.200/32", "dev", "eth0")
	if out, err := h[0].Run(t.Context(), "nsenter", "-t", fmt.Sprint(pid), "-n", "ping", "-c", "1", "-W", "1", "-I", "10.32.200.200", b4); err == nil {
		t.Errorf("a ping from an address that the endpoint was not given is answered: %s", out)
	}
	if drops("outward_source") == was {
		t.Error("a frame from an address that the endpoint was not given is not counted")
	}

	// In by published ports.
	serve(t, h[0], pid)
	for _, x := range []struct {
		from *lab.Host
		args []string
	}{
		{h[1], []string{"-c", "192.168.77.1", "-n", "8M"}}, {h[1], []string{"-c", "192.168.77.1", "-n", "8M", "-R"}},
		{h[1], []string{"-c", "192.168.77.1", "-u", "-b", "20M", "-n", "1M"}}, {h[1], []string{"-c", "192.168.77.1", "-u", "-b", "20M", "-n", "1M", "-R"}},
		{h[1], []string{"-c", "fd77::1", "-n", "4M"}}, {h[0], []string{"-c", "127.0.0.1", "-n", "4M"}},
	} {
		listens(t, h[0], pid)
		runIn(t, x.from, "iperf3", append([]string{"--connect-timeout", "5000", "-p", "18080"}, x.args...)...)
	}

	if list := a.has(); len(list) != 1 || list[0].PublishError != "" || len(list[0].Publish) != 2 {
		t.Errorf("endpoints: %+v", list)
	}

	// Without a gateway nothing leads out or in; with one again, and after a crash, all does.
	out := func() error {
		_, err := h[0].Run(t.Context(), "nsenter", "-t", fmt.Sprint(pid), "-n", "timeout", "2", "bash", "-c", "exec 3<>/dev/tcp/"+b4+"/5201")
		return err
	}
	listens(t, h[1], 0)
	u.does(u.tulle(), "overlay", "set", "blue", "--gateway", "false")
	a.eventually(10*time.Second, "the overlay has no gateway", func() bool { return out() != nil })
	u.does(u.tulle(), "overlay", "set", "blue", "--gateway", "true")
	a.eventually(10*time.Second, "the overlay has a gateway again", func() bool { return out() == nil })
	a.proc.Kill()
	_ = a.proc.Wait()
	a.start()
	a.eventually(10*time.Second, "the gateway is there after kill -9 and a start", func() bool { return out() == nil })
	listens(t, h[0], pid)
	runIn(t, h[1], "iperf3", "--connect-timeout", "5000", "-c", "192.168.77.1", "-p", "18080", "-n", "1M")

	c.Kill()
	_ = c.Wait()
	a.eventually(3*time.Second, "its ports are free again", func() bool { return !strings.Contains(runIn(t, h[0], "ss", "-Hltun"), ":18080") })
}

// listenAt listens on a host.
func listenAt(t *testing.T, h *lab.Host, at netip.AddrPort) (ln net.Listener) {
	t.Helper()
	err := h.Do(func() (err error) {
		ln, err = net.Listen("tcp", at.String())
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ln.Close() })
	return ln
}
