package doctor

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/tulle-net/tulle/underlay"
)

// want compares a check with its result and the beginning of its detail; what
// is not ok has an advice that can be typed.
func want(t *testing.T, c Check, result Result, detail string) {
	t.Helper()
	if c.Result != result || !strings.HasPrefix(c.Detail, detail) {
		t.Errorf("check = %+v, want %s, %s", c, result, detail)
	}
	wellFormed(t, c)
}

func wellFormed(t *testing.T, c Check) {
	t.Helper()
	if (c.Result == OK) != (c.Advice == "") || c.Result != OK && !strings.Contains(c.Advice, "`") {
		t.Errorf("%+v: want an advice with a command in backquotes exactly if it is not ok", c)
	}
	if !regexp.MustCompile(`^[a-z0-9_]+$`).MatchString(c.Name) || c.Detail == "" || strings.ContainsAny(c.Detail+c.Advice, "\n") {
		t.Errorf("%+v: want a name of [a-z0-9_]+ and a detail of one line", c)
	}
}

// TestLocal: on whatever machine this runs, every check has its name, once, and
// nothing is left behind.
func TestLocal(t *testing.T) {
	dir := t.TempDir()
	at := netip.MustParseAddrPort("127.0.0.1:47893")
	checks := Local(t.Context(), Settings{Listen: at, Gossip: netip.MustParseAddrPort("127.0.0.1:47894"), Advertise: at.Addr(), Seeds: []string{"127.0.0.1"}, StateDir: dir + "/state"})
	var names []string
	for _, c := range checks {
		wellFormed(t, c)
		names = append(names, c.Name)
	}
	if all := []string{"tun", "net_admin", "kernel", "ipv6", "address", "route", "data_port", "gossip_port", "clock", "state_dir"}; !slices.Equal(names, all) {
		t.Errorf("names = %q, want %q", names, all)
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) != 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
}

func TestTun(t *testing.T) {
	dir := t.TempDir()
	want(t, tun(dir+"/none"), Failed, dir+"/none is not there")
	want(t, tun("/dev/null"), OK, "/dev/null opens")
	want(t, tun(dir), Failed, dir+" does not open: is a directory")
}

func TestNetAdmin(t *testing.T) {
	want(t, netAdmin(1<<12), OK, "CAP_NET_ADMIN is there")
	want(t, netAdmin(^uint32(1<<12)), Failed, "this process has no CAP_NET_ADMIN")
}

func TestKernel(t *testing.T) {
	for _, tt := range []struct {
		release string
		result  Result
		detail  string
	}{
		{"6.12.9-amd64", OK, "Linux 6.12.9-amd64"},
		{"6.2.0", OK, "Linux 6.2.0"},
		{"6.1.21-v8+", OK, "Linux 6.1.21-v8+; super-frames of UDP"},
		{"5.0", OK, "Linux 5.0; super"},
		{"4.19.0-rpi", Warn, "Linux 4.19.0-rpi has no UDP_GRO"},
		{"4.17.1", Warn, "Linux 4.17.1 has neither"},
		{"3.10.0-1160.el7", Warn, "Linux 3.10.0-1160.el7 has neither"},
		{"", Warn, `cannot read the kernel's version ""`},
		{"new", Warn, `cannot read the kernel's version "new"`},
	} {
		want(t, kernel(tt.release), tt.result, tt.detail)
	}
}

func TestIPv6(t *testing.T) {
	proc := t.TempDir()
	want(t, ipv6(proc), OK, "off: IPv4 alone")
	conf := filepath.Join(proc, "sys/net/ipv6/conf/all")
	if err := os.MkdirAll(conf, 0o700); err != nil {
		t.Fatal(err)
	}
	for text, detail := range map[string]string{"0\n": "on", "1\n": "off"} {
		if err := os.WriteFile(filepath.Join(conf, "disable_ipv6"), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		want(t, ipv6(proc), OK, detail)
	}
}

func TestAddress(t *testing.T) {
	want(t, address(netip.MustParseAddr("127.0.0.1")), OK, "127.0.0.1 on lo, MTU ")
	want(t, address(netip.MustParseAddr("203.0.113.199")), Failed, "no network device has the address 203.0.113.199")
	at := netip.MustParseAddr("192.0.2.1")
	want(t, device(at, underlay.Device{Name: "eth0", MTU: 1382}), OK, "192.0.2.1 on eth0, MTU 1382")
	want(t, device(at, underlay.Device{Name: "eth0", MTU: 1381}), Warn, "192.0.2.1 on eth0 has an MTU of 1381")
}

func TestRoute(t *testing.T) {
	c, source := route(t.Context(), []string{"127.0.0.1", "127.0.0.2"})
	want(t, c, OK, "to 127.0.0.1 from 127.0.0.1, to 127.0.0.2 from ")
	if source != netip.MustParseAddr("127.0.0.1") {
		t.Errorf("source = %s, want the first seed's", source)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel() // nobody is asked
	c, _ = route(ctx, []string{"127.0.0.1", "nowhere.invalid"})
	want(t, c, Failed, "the name nowhere.invalid does not resolve: ")
	// A broadcast address is no host's: the kernel refuses to connect to it.
	c, _ = route(t.Context(), []string{"255.255.255.255"})
	want(t, c, Failed, "there is no way to 255.255.255.255: ")
	c, _ = route(t.Context(), nil)
	wellFormed(t, c) // whatever this machine's routes are
}

func TestPorts(t *testing.T) {
	ctx := t.Context()
	pc, err := net.ListenPacket("udp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer pc.Close()
	udp := pc.LocalAddr().(*net.UDPAddr).AddrPort()
	ln := listenWhereUDPIsFree(t)
	defer ln.Close()
	tcp := ln.Addr().(*net.TCPAddr).AddrPort()
	everywhere := func(at netip.AddrPort) netip.AddrPort { return netip.AddrPortFrom(netip.IPv6Unspecified(), at.Port()) }

	c := ports(ctx, "data_port", udp, false, "UDP")
	want(t, c, Failed, "UDP "+udp.String()+" is held by something else")
	if !strings.Contains(c.Advice, "`ss -lnup sport = :") || !strings.Contains(c.Advice, "--listen") {
		t.Errorf("advice = %s", c.Advice)
	}
	want(t, ports(ctx, "data_port", everywhere(udp), false, "UDP"), Failed, "UDP "+everywhere(udp).String()+" is held")
	want(t, ports(ctx, "data_port", udp, true, "UDP"), OK, "UDP "+udp.String()+": the running node's")
	c = ports(ctx, "gossip_port", tcp, false, "UDP", "TCP")
	want(t, c, Failed, "TCP "+tcp.String()+" is held by something else")
	if !strings.Contains(c.Advice, "`ss -lntp sport = :") || !strings.Contains(c.Advice, "--gossip") {
		t.Errorf("advice = %s", c.Advice)
	}
	want(t, ports(ctx, "gossip_port", netip.MustParseAddrPort("203.0.113.199:4789"), false, "UDP", "TCP"), Failed, "this host has no address 203.0.113.199")

	ln.Close()
	want(t, ports(ctx, "gossip_port", tcp, false, "UDP", "TCP"), OK, "UDP and TCP "+tcp.String()+": free")
	want(t, ports(ctx, "gossip_port", everywhere(tcp), false, "UDP", "TCP"), OK, "UDP and TCP "+everywhere(tcp).String()+": free")
	// It let go of them.
	want(t, ports(ctx, "gossip_port", tcp, false, "UDP", "TCP"), OK, "")
}

// listenWhereUDPIsFree takes a TCP port whose UDP twin nobody has.
func listenWhereUDPIsFree(t *testing.T) net.Listener {
	t.Helper()
	for range 100 {
		ln, err := net.Listen("tcp4", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		pc, err := net.ListenPacket("udp", fmt.Sprintf(":%d", ln.Addr().(*net.TCPAddr).Port))
		if err == nil {
			pc.Close()
			return ln
		}
		ln.Close()
	}
	t.Fatal("no port is free in both protocols")
	return nil
}

func TestClock(t *testing.T) {
	built := time.Date(2026, 11, 22, 0, 0, 0, 0, time.UTC)
	want(t, clock(built, built), OK, "2026-11-22 00:00:00 UTC")
	want(t, clock(built.Add(-time.Second), built), Failed, "the clock says 2026-11-21 23:59:59 UTC, and this binary was built later")
	want(t, clock(time.Unix(0, 0), built), Failed, "the clock says 1970-01-01 00:00:00 UTC")
	want(t, clock(built.AddDate(30, 0, 0), built), Warn, "the clock says 2056-11-22")
}

func TestStateDir(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	want(t, stateDir(file), Failed, file+" is no directory")
	want(t, stateDir(file+"/below"), Failed, "stat "+file+"/below: not a directory")
	want(t, stateDir("/proc/self"), Failed, "")
	for _, tt := range []struct {
		free   uint64
		made   bool
		result Result
		detail string
	}{
		{0, true, Failed, "/at is full"},
		{leastFree - 1, false, Failed, "/at is full"},
		{leastFree, true, Warn, "/at has only 1 MB left"},
		{lowFree, true, OK, "/at/dir can be written to, 67 MB are free"},
		{lowFree, false, OK, "/at/dir is not there yet and can be made"},
	} {
		want(t, room("/at/dir", "/at", tt.free, tt.made), tt.result, tt.detail)
	}
	if c := stateDir(dir + "/a/b"); c.Result == OK {
		want(t, c, OK, dir+"/a/b is not there yet and can be made")
	}
	if c := stateDir(dir); c.Result == OK { // unless the disk is full
		want(t, c, OK, dir+" can be written to")
	}
}
