package tap

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"
)

// TestListenInside: sockets are in the namespace, at an address that comes and goes with
// them; a path that leads elsewhere is refused.
func TestListenInside(t *testing.T) {
	s := newSpace(t)
	ns, err := NamespaceAt(s.path())
	if err != nil {
		t.Fatal(err)
	}
	at := netip.MustParseAddrPort("169.254.53.53:53")
	seen := strings.Replace(s.path(), "self", fmt.Sprint(os.Getpid()), 1) // by other processes
	addresses := func() string {
		t.Helper()
		out, err := exec.Command("nsenter", "--net="+seen, "ip", "-o", "addr", "show", "dev", "lo").CombinedOutput()
		if err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		return string(out)
	}
	other := newSpace(t)
	if _, _, err := ListenInside(other.path(), ns, at); !errors.Is(err, ErrNoNamespace) {
		t.Errorf("another namespace: %v", err)
	}
	for range 2 { // what an earlier run has left does no harm
		udp, tcp, err := ListenInside(s.path(), ns, at)
		if err != nil {
			t.Fatal(err)
		}
		if got := addresses(); !strings.Contains(got, "169.254.53.53/32") || !strings.Contains(got, "host") {
			t.Errorf("lo has %s", got)
		}
		sent := exec.Command("nsenter", "--net="+seen, "sh", "-c", "exec bash -c 'echo hello > /dev/udp/169.254.53.53/53; exec 3<>/dev/tcp/169.254.53.53/53'")
		if out, err := sent.CombinedOutput(); err != nil {
			t.Errorf("%v: %s", err, out)
		}
		_ = udp.SetReadDeadline(time.Now().Add(5 * time.Second))
		b := make([]byte, 16)
		if n, from, err := udp.ReadFromUDPAddrPort(b); err != nil || string(b[:n]) != "hello\n" || from.Addr() != at.Addr() {
			t.Errorf("%q from %v, %v", b[:n], from, err)
		}
		_ = tcp.SetDeadline(time.Now().Add(5 * time.Second))
		if c, err := tcp.Accept(); err != nil {
			t.Error(err)
		} else {
			_ = c.Close()
		}
		if _, _, err := ListenInside(s.path(), ns, at); err == nil {
			t.Error("a second resolver at one place")
		}
		_, _ = udp.Close(), tcp.Close()
	}
	udp, tcp, err := ListenInside(s.path(), ns, at)
	if err != nil {
		t.Fatal(err)
	}
	for range 2 { // somebody may have taken it away already
		if err := LeaveInside(udp); err != nil {
			t.Error(err)
		}
	}
	if got := addresses(); strings.Contains(got, "169.254.53.53") {
		t.Errorf("after leaving, lo has %s", got)
	}
	_, _ = udp.Close(), tcp.Close()
	if l, err := net.InterfaceByName("lo"); err != nil {
		t.Fatal(err)
	} else if list, _ := l.Addrs(); strings.Contains(strings.Join(texts(list), " "), "169.254.53.53") {
		t.Errorf("this host's own lo has %v", list)
	}
}

func texts(list []net.Addr) (out []string) {
	for _, a := range list {
		out = append(out, a.String())
	}
	return out
}
