package lab_test

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/tulle-net/tulle/internal/lab"
	"github.com/tulle-net/tulle/internal/lab/labtest"
)

// TestMain plays a role when it is started by one of the tests.
func TestMain(m *testing.M) {
	switch role, arg, _ := strings.Cut(os.Getenv("LAB_TEST_ROLE"), "="); role {
	case "wait": // a process in a host
		fmt.Println("waiting")
		time.Sleep(time.Minute)
	case "owner": // makes a lab, says so, and is killed
		ownLab(arg)
	default:
		goleak.VerifyTestMain(m)
	}
}

var underlay = lab.Underlay{
	Prefix4: netip.MustParsePrefix("192.0.2.0/24"),
	Prefix6: netip.MustParsePrefix("2001:db8::/64"),
}

func soon(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	t.Cleanup(cancel)
	return ctx
}

// role is a command that runs this test binary as something else.
func role(t *testing.T, what string) *exec.Cmd {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(self, "-test.run=^$")
	cmd.Env = append(os.Environ(), "LAB_TEST_ROLE="+what)
	return cmd
}

// left lists what is there of labs whose names match.
func left(t *testing.T, pattern string) []string {
	t.Helper()
	a, err := filepath.Glob("/run/netns/" + pattern)
	if err != nil {
		t.Fatal(err)
	}
	b, err := filepath.Glob(filepath.Join(os.TempDir(), pattern))
	if err != nil {
		t.Fatal(err)
	}
	return append(a, b...)
}

func TestPrivilegedPing(t *testing.T) {
	s, hosts := labtest.Hosts(t, labtest.New(t), 3, underlay)
	for _, tt := range []struct {
		name string
		dst  netip.Addr
		o    lab.PingOptions
		err  error
	}{
		{"v4", s.Addr(hosts[1]), lab.PingOptions{}, nil},
		{"v6", s.Addr6(hosts[2]), lab.PingOptions{}, nil},
		{"v4 empty", s.Addr(hosts[1]), lab.PingOptions{Size: -1}, nil},
		{"v4 fits", s.Addr(hosts[1]), lab.PingOptions{Size: 1472, DontFragment: true}, nil},
		{"v4 too big", s.Addr(hosts[1]), lab.PingOptions{Size: 1473, DontFragment: true}, syscall.EMSGSIZE},
		{"v4 in fragments", s.Addr(hosts[1]), lab.PingOptions{Size: 9001}, nil},
		{"v6 fits", s.Addr6(hosts[1]), lab.PingOptions{Size: 1452, DontFragment: true}, nil},
		{"v6 too big", s.Addr6(hosts[1]), lab.PingOptions{Size: 1453, DontFragment: true}, syscall.EMSGSIZE},
		{"own address", s.Addr(hosts[0]), lab.PingOptions{}, nil},
		{"no route", netip.MustParseAddr("203.0.113.1"), lab.PingOptions{}, syscall.ENETUNREACH},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p, err := hosts[0].NewPinger(tt.dst, tt.o)
			if err != nil {
				t.Fatal(err)
			}
			defer p.Close()
			for range 3 {
				if rtt, err := p.Ping(soon(t)); !errors.Is(err, tt.err) || err == nil && rtt <= 0 {
					t.Fatalf("Ping(%s, %+v) = %s, %v, want error %v", tt.dst, tt.o, rtt, err, tt.err)
				}
			}
		})
	}
	// Nobody has this address: it is the context that ends it, and the next
	// ping is not disturbed.
	p, err := hosts[0].NewPinger(netip.MustParseAddr("192.0.2.99"), lab.PingOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	for range 3 {
		ctx, cancel := context.WithTimeout(context.Background(), 20*time.Millisecond)
		if _, err := p.Ping(ctx); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("Ping of nobody = %v, want deadline exceeded", err)
		}
		cancel()
	}
}

func TestPrivilegedCut(t *testing.T) {
	s, hosts := labtest.Hosts(t, labtest.New(t), 2, underlay)
	checkCut(t, s, hosts)
}

// checkCut wants a ping to fail while the cable is out and to come back after.
func checkCut(t *testing.T, s *lab.Switch, hosts []*lab.Host) {
	t.Helper()
	for _, dst := range []netip.Addr{s.Addr(hosts[1]), s.Addr6(hosts[1])} {
		if _, err := hosts[0].WaitPing(soon(t), dst); err != nil {
			t.Fatal(err)
		}
		if err := s.Cut(hosts[1]); err != nil {
			t.Fatal(err)
		}
		if l, _, err := hosts[1].Link(s.Dev()); err != nil || l.Carrier {
			t.Errorf("after Cut: %+v, %v", l, err)
		}
		ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
		if _, err := hosts[0].Ping(ctx, dst); err == nil {
			t.Errorf("a ping to %s passes a cable that is pulled", dst)
		}
		cancel()
		if err := s.Mend(hosts[1]); err != nil {
			t.Fatal(err)
		}
		if _, err := hosts[0].WaitPing(soon(t), dst); err != nil {
			t.Fatal(err)
		}
	}
}

func TestPrivilegedTransfer(t *testing.T) {
	for _, o := range []lab.Offloads{lab.Virtual, lab.Wire, lab.NIC} {
		t.Run("offloads "+string(o), func(t *testing.T) {
			u := underlay
			u.Offloads = o
			l := labtest.New(t)
			s, hosts := labtest.Hosts(t, l, 2, u)
			for _, dst := range []netip.Addr{s.Addr(hosts[1]), s.Addr6(hosts[1])} {
				const want = 5<<20 + 3
				got, err := l.Transfer(soon(t), hosts[0], hosts[1], netip.AddrPortFrom(dst, 0), lab.Amount{Bytes: want})
				if err != nil || got.Bytes != want || got.Took <= 0 {
					t.Fatalf("Transfer = %+v, %v, want %d bytes", got, err, want)
				}
			}
			big, err := biggestFrame(t, l, s, hosts)
			if err != nil {
				t.Fatal(err)
			}
			if o == lab.Virtual && big <= 1514 || o != lab.Virtual && big > 1514 {
				t.Errorf("offloads %q: the largest frame on the cable has %d bytes", o, big)
			}
		})
	}
}

// biggestFrame watches the receiver's device while 5 MB pass from a to b.
// What NIC mode's GRO merges is seen there too, so it looks at the sender's.
func biggestFrame(t *testing.T, l *lab.Lab, s *lab.Switch, hosts []*lab.Host) (int, error) {
	ctx, cancel := context.WithCancel(soon(t))
	defer cancel()
	own, big, ready, done := mac(t, hosts[0], s.Dev()), 0, make(chan struct{}), make(chan error, 1)
	go func() {
		_, err := hosts[0].Sniff(ctx, s.Dev(), func() { close(ready) }, func(f []byte) bool {
			if [6]byte(f[6:12]) != own {
				return false
			}
			big = max(big, len(f))
			return len(f) > 47 && f[12] == 8 && f[13] == 0 && f[23] == 6 && f[47]&1 != 0 // TCP's FIN
		})
		done <- err
	}()
	<-ready
	_, err := l.Transfer(ctx, hosts[0], hosts[1], netip.AddrPortFrom(s.Addr(hosts[1]), 0), lab.Amount{Bytes: 5 << 20})
	// It may look later than they pass, and the FIN may not have fitted its buffer.
	late := time.AfterFunc(time.Second, cancel)
	defer late.Stop()
	if e := <-done; e != nil && !errors.Is(e, context.Canceled) {
		return 0, e
	}
	return big, err
}

func mac(t *testing.T, h *lab.Host, dev string) (m [6]byte) {
	l, _, err := h.Link(dev)
	if err != nil {
		t.Error(err)
	}
	fmt.Sscanf(l.MAC, "%02x:%02x:%02x:%02x:%02x:%02x", &m[0], &m[1], &m[2], &m[3], &m[4], &m[5])
	return m
}

func TestPrivilegedTransferEnds(t *testing.T) {
	l := labtest.New(t)
	s, hosts := labtest.Hosts(t, l, 2, underlay)
	to := netip.AddrPortFrom(s.Addr(hosts[1]), 0)
	got, err := l.Transfer(soon(t), hosts[0], hosts[1], to, lab.Amount{For: 50 * time.Millisecond})
	if err != nil || got.Bytes == 0 || got.Took > 5*time.Second {
		t.Errorf("Transfer for 50ms = %+v, %v", got, err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
	defer cancel()
	if got, err := l.Transfer(ctx, hosts[0], hosts[1], to, lab.Amount{For: time.Minute}); err == nil {
		t.Errorf("Transfer with a context that ends = %+v, want an error", got)
	}
	if _, err := l.Transfer(soon(t), hosts[0], hosts[1], to, lab.Amount{}); err == nil {
		t.Error("Transfer of no amount: want an error")
	}
}

func TestPrivilegedUDP(t *testing.T) {
	s, hosts := labtest.Hosts(t, labtest.New(t), 2, underlay)
	ln, err := hosts[1].ListenPacket(s.Addr(hosts[1]).String() + ":0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	c, err := hosts[0].Dial(soon(t), "udp", ln.LocalAddr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := c.Write([]byte("hello")); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 100)
	ln.SetReadDeadline(time.Now().Add(5 * time.Second))
	n, from, err := ln.ReadFrom(buf)
	if err != nil || string(buf[:n]) != "hello" || from.String() != c.LocalAddr().String() {
		t.Errorf("ReadFrom = %q from %v, %v", buf[:n], from, err)
	}
	if mac, err := hosts[0].Neighbour(s.Dev(), s.Addr(hosts[1])); err != nil || mac == "" {
		t.Errorf("Neighbour = %q, %v, want the MAC of b", mac, err)
	}
	for range 2 { // the second time there is nothing
		if err := hosts[0].ForgetNeighbour(s.Dev(), s.Addr(hosts[1])); err != nil {
			t.Error(err)
		}
	}
	if mac, err := hosts[0].Neighbour(s.Dev(), s.Addr(hosts[1])); err != nil || mac != "" {
		t.Errorf("Neighbour = %q, %v after ForgetNeighbour", mac, err)
	}
}

// TestPrivilegedCongestionControl: a connection begins with what was set for the other
// end's address, and only that.
func TestPrivilegedCongestionControl(t *testing.T) {
	s, hosts := labtest.Hosts(t, labtest.New(t), 2, underlay)
	ln, err := hosts[1].Listen(s.Addr(hosts[1]).String() + ":0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	got := func() string {
		t.Helper()
		c, err := hosts[0].Dial(soon(t), "tcp", ln.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		raw, err := c.(syscall.Conn).SyscallConn()
		if err != nil {
			t.Fatal(err)
		}
		name := ""
		if e := raw.Control(func(fd uintptr) { name, err = unix.GetsockoptString(int(fd), unix.IPPROTO_TCP, unix.TCP_CONGESTION) }); e != nil || err != nil {
			t.Fatal(e, err)
		}
		return strings.TrimRight(name, "\x00")
	}
	for _, name := range []string{"cubic", "reno"} {
		if err := hosts[0].SetCongestionControl(s.Addr(hosts[1]), name); err != nil {
			t.Fatal(err)
		}
		if got := got(); got != name {
			t.Errorf("the connection has %s, want %s", got, name)
		}
	}
	if err := hosts[0].SetCongestionControl(netip.MustParseAddr("203.0.113.1"), "cubic"); !errors.Is(err, syscall.ENETUNREACH) {
		t.Errorf("SetCongestionControl to nowhere = %v, want %v", err, syscall.ENETUNREACH)
	}
}

func TestPrivilegedDisableIPv6(t *testing.T) {
	u := underlay
	u.Prefix6, u.DisableIPv6, u.MTU = netip.Prefix{}, true, 1400
	s, hosts := labtest.Hosts(t, labtest.New(t), 2, u)
	l, ok, err := hosts[0].Link(s.Dev())
	if want := netip.MustParsePrefix("192.0.2.1/24"); err != nil || !ok || l.MTU != 1400 || l.Kind != "veth" || len(l.Addrs) != 1 || l.Addrs[0] != want {
		t.Errorf("Link = %+v, %v, %v, want MTU 1400 with %s alone", l, ok, err, want)
	}
	if _, err := hosts[0].Dial(soon(t), "tcp", "[::1]:1"); !errors.Is(err, syscall.EADDRNOTAVAIL) {
		t.Errorf("Dial [::1] = %v, want %v", err, syscall.EADDRNOTAVAIL)
	}
	if _, ok, err := hosts[0].Link("nothing"); ok || err != nil {
		t.Errorf("Link(nothing) = %v, %v, want false, nil", ok, err)
	}
}

func TestPrivilegedVXLAN(t *testing.T) {
	s, hosts := labtest.Hosts(t, labtest.New(t), 2, underlay)
	for i, h := range hosts {
		err := h.AddVXLAN("vx", lab.VXLAN{VNI: 7, Dev: s.Dev(), Local: s.Addr(h), Remote: s.Addr(hosts[1-i]),
			Addr: netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 9, 0, byte(i + 1)}), 24)})
		if errors.Is(err, syscall.EOPNOTSUPP) {
			t.Skip("this kernel has no vxlan")
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	seen, ready := make(chan error, 1), make(chan struct{})
	go func() {
		f, err := hosts[1].Sniff(soon(t), s.Dev(), func() { close(ready) }, func(f []byte) bool {
			return len(f) > 50 && f[23] == 17 && f[36] == 4789>>8 && f[37] == 4789&0xff
		})
		if err == nil && string(f[42:50]) != "\x08\x00\x00\x00\x00\x00\x07\x00" {
			err = fmt.Errorf("VXLAN header %x", f[42:50])
		}
		seen <- err
	}()
	<-ready
	if _, err := hosts[0].WaitPing(soon(t), netip.MustParseAddr("10.9.0.2")); err != nil {
		t.Error(err)
	}
	if err := <-seen; err != nil {
		t.Error(err)
	}
}

func TestPrivilegedDo(t *testing.T) {
	h, err := labtest.New(t).AddHost("a")
	if err != nil {
		t.Fatal(err)
	}
	ns := func() string {
		s, err := os.Readlink("/proc/thread-self/ns/net")
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	outside := ns()
	var inside string
	if err := h.Do(func() error { inside = ns(); return os.ErrClosed }); err != os.ErrClosed {
		t.Errorf("Do = %v, want fn's error", err)
	}
	if inside == outside {
		t.Error("Do ran fn outside")
	}
	func() {
		defer func() {
			if r := recover(); r != "oh" {
				t.Errorf("recovered %v, want fn's panic", r)
			}
		}()
		h.Do(func() error { panic("oh") })
	}()
	// What FailNow does in fn ends the caller too.
	after, ended := false, make(chan struct{})
	go func() {
		defer close(ended)
		h.Do(func() error { runtime.Goexit(); return nil })
		after = true
	}()
	<-ended
	if after {
		t.Error("the caller went on after Goexit in fn")
	}
	for range 100 {
		if now := ns(); now != outside {
			t.Fatalf("a thread was left in %s", now)
		}
	}
}

func TestPrivilegedProcess(t *testing.T) {
	l := labtest.New(t)
	_, hosts := labtest.Hosts(t, l, 2, underlay)
	p, err := hosts[0].Start(role(t, "wait"))
	if err != nil {
		t.Fatal(err)
	}
	inside, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/net", p.Pid()))
	if err != nil {
		t.Fatal(err)
	}
	var want string
	hosts[0].Do(func() error { want, err = os.Readlink("/proc/thread-self/ns/net"); return err })
	if inside != want {
		t.Errorf("the process is in %s, want %s", inside, want)
	}
	waitFor(t, "its log", func() bool { return strings.Contains(p.Log(), "waiting") })
	if err := p.Stop(5 * time.Second); err == nil || !strings.Contains(err.Error(), "terminated") {
		t.Errorf("Stop = %v, want: terminated", err)
	}
	if err := p.Signal(syscall.SIGTERM); err != nil {
		t.Errorf("Signal after the end = %v, want nil", err)
	}
	out, err := hosts[1].Run(soon(t), "sh", "-c", "echo out; echo err >&2; exit 3")
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() != 3 || out != "out\nerr\n" {
		t.Errorf("Run = %q, %v, want both outputs and status 3", out, err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
	defer cancel()
	if _, err := hosts[1].Run(ctx, "sleep", "60"); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Run with a context that ends = %v, want deadline exceeded", err)
	}
	if _, err := hosts[1].Run(soon(t), "/nonexistent"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("Run(/nonexistent) = %v, want not exist", err)
	}
	if !strings.Contains(p.Name(), "a ") || len(l.Processes()) != 3 {
		t.Errorf("processes %v, want 3", l.Processes())
	}
}

func waitFor(t *testing.T, what string, fn func() bool) {
	t.Helper()
	for end := time.Now().Add(10 * time.Second); !fn(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("no %s in 10 s", what)
		}
	}
}
