package tap

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tulle-net/tulle/ether"
)

// asUserEnv has the test binary, started again as an ordinary user, run the tests that
// need to be one.
const asUserEnv = "TAP_TEST_AS_USER"

// asUser runs the test that calls it again, as a user without any right; true: this is
// that user. mode is that of the only /dev/net/tun that the user sees.
func asUser(t *testing.T, mode string) bool {
	t.Helper()
	if os.Getenv(asUserEnv) != "" {
		return true
	}
	needRoot(t)
	dir := t.TempDir()
	tun, uid := filepath.Join(dir, "tun"), fmt.Sprint(2_000_000_000+os.Getpid())
	// A device node of another mode, in a mount namespace that ends with the process.
	const script = `mknod -m "$1" "$2" c 10 200 && mount --bind "$2" /dev/net/tun && cd / &&
		exec setpriv --reuid "$3" --regid "$3" --clear-groups --bounding-set=-all --inh-caps=-all "$4" -test.run "^$5\$" -test.v`
	bin := filepath.Join(dir, "test")
	self, err := os.Open("/proc/self/exe")
	if err == nil {
		err = copyTo(bin, self)
	}
	if err = errors.Join(err, openUp(dir)); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("unshare", "--mount", "sh", "-c", script, "sh", mode, tun, uid, bin, t.Name())
	cmd.Env = append(os.Environ(), asUserEnv+"=1", "TMPDIR=/tmp")
	out, err := cmd.CombinedOutput()
	t.Logf("as user %s:\n%s", uid, out)
	if err != nil || !strings.Contains(string(out), "--- PASS: "+t.Name()) {
		t.Fatalf("as an ordinary user: %v", err)
	}
	return false
}

func copyTo(path string, from *os.File) error {
	defer from.Close()
	to, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY, 0o755)
	if err != nil {
		return err
	}
	_, err = to.ReadFrom(from)
	return errors.Join(err, to.Close())
}

// openUp lets everybody into a test's folder.
func openUp(dir string) error {
	for d := dir; d != os.TempDir() && d != "/"; d = filepath.Dir(d) {
		if err := os.Chmod(d, 0o755); err != nil {
			return err
		}
	}
	return nil
}

// container starts a process in a user and a network namespace of its own.
func container(t *testing.T) (path string, end func()) {
	t.Helper()
	cmd := exec.Command("cat") // it ends with this process, which holds its input
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	id := []syscall.SysProcIDMap{{HostID: os.Getuid(), Size: 1}}
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: unix.CLONE_NEWUSER | unix.CLONE_NEWNET, UidMappings: id, GidMappings: []syscall.SysProcIDMap{{HostID: os.Getgid(), Size: 1}},
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := false
	end = func() {
		if !ended {
			ended = true
			_ = in.Close()
			_ = cmd.Process.Kill()
			_ = cmd.Wait()
		}
	}
	t.Cleanup(end)
	return fmt.Sprintf("/proc/%d/ns/net", cmd.Process.Pid), end
}

// TestInside: an ordinary user has a device in the namespace of a container of his own.
func TestInside(t *testing.T) {
	if !asUser(t, "0666") {
		return
	}
	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	if err := CheckInside(log); err != nil {
		t.Fatal(err)
	}
	path, end := container(t)
	ns, err := NamespaceAt(path)
	if err != nil || ns.Cookie == 0 {
		t.Fatalf("NamespaceAt = %+v, %v", ns, err)
	}
	cfg := Config{
		Name: "eth0", MAC: 0x02540a200001, MTU: 1400, Netns: path, Inside: true, NoSolicit: true, Alias: "tulle test/blue", Log: log,
		Addresses: []netip.Prefix{netip.MustParsePrefix("10.32.0.1/16"), netip.MustParsePrefix("fd32::1/64")},
		Gateways:  []netip.Addr{netip.MustParseAddr("10.32.0.9")},
	}
	dev, err := Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer dev.Close()
	d := dev.(Lasting)
	if !d.Pinned() {
		t.Error("a device that was made inside does not say that it keeps the namespace alive")
	}
	if o := dev.Offloads(); o.Driver != DriverOffload || o.Checksum != "on" || o.TSO4 != "on" || o.TSO6 != "on" || !strings.HasPrefix(o.GRO, "on") && !strings.HasPrefix(o.GRO, "TCPv4: on") {
		t.Errorf("offloads: %+v", o)
	}
	if !found.known {
		t.Error("the offloads are the kernel's word only: they were not tried")
	}
	if err := dev.SetMTU(1300); err != nil {
		t.Error(err)
	}
	s, err := Inspect(path, "eth0")
	if err != nil || s.MAC != cfg.MAC || s.MTU != 1300 || !s.Up || !slices.Contains(s.Addresses, cfg.Addresses[0]) || !slices.Contains(s.Addresses, cfg.Addresses[1]) ||
		!slices.Contains(s.Routes, Route{netip.MustParsePrefix("0.0.0.0/0"), cfg.Gateways[0]}) {
		t.Errorf("Inspect = %+v, %v", s, err)
	}
	answersARP(t, dev)
	for range 2 { // the second one by the handle that was kept
		if n := dev.Dropped(); n != 0 {
			t.Errorf("%d frames dropped", n)
		}
	}
	if err := d.SetPersistent(true); err != nil {
		t.Fatal(err)
	}
	d.Spare()
	if err := dev.Close(); err != nil {
		t.Fatal(err)
	}
	cfg.Reattach, cfg.MTU = true, 1350
	if dev, err = Open(cfg); err != nil {
		t.Fatalf("attach to it again: %v", err)
	}
	defer dev.Close()
	answersARP(t, dev)
	if dev.MTU() != 1350 || !dev.(Lasting).Pinned() {
		t.Errorf("attached to again: MTU %d, pinned %v", dev.MTU(), dev.(Lasting).Pinned())
	}
	if FindHolders()[ns.Inode] == "" {
		t.Error("the container's process is not found as a holder of its namespace")
	}
	end()
	if path := FindHolders()[ns.Inode]; path != "" {
		t.Errorf("the namespace is held by %s after its process has ended", path)
	}
	if err := dev.Close(); err != nil {
		t.Error(err)
	}
}

// answersARP checks that the device's host hears and is heard.
func answersARP(t *testing.T, dev Device) {
	t.Helper()
	q := dev.Queues()[0]
	b := NewBatch()
	ask := arpFor(0x025400000007, netip.MustParseAddr("10.32.0.7"), netip.MustParseAddr("10.32.0.1"))
	if err := q.WriteFrame(ether.Meta{}, [][]byte{ask}); err != nil {
		t.Fatal(err)
	}
	got := make(chan error, 1)
	go func() {
		for {
			if err := q.Wait(); err != nil {
				got <- err
				return
			}
			if err := q.Read(b); err != nil {
				got <- err
				return
			}
			for _, f := range b.Frames {
				if f.B[12] == 8 && f.B[13] == 6 && f.B[21] == 2 { // an ARP answer
					got <- nil
					return
				}
			}
		}
	}()
	select {
	case err := <-got:
		if err != nil {
			t.Fatal(err)
		}
	case <-time.After(5 * time.Second):
		dev.Close()
		<-got
		t.Fatal("no answer to an ARP request")
	}
}

// arpFor is a request for the MAC of an address.
func arpFor(mac ether.MAC, from, to netip.Addr) []byte {
	b := make([]byte, 42)
	copy(b, "\xff\xff\xff\xff\xff\xff")
	mac.Put(b[6:])
	copy(b[12:], "\x08\x06\x00\x01\x08\x00\x06\x04\x00\x01")
	mac.Put(b[22:])
	copy(b[28:], from.AsSlice())
	copy(b[38:], to.AsSlice())
	return b
}

// TestInsideRefused: what an ordinary user may not have is refused, and said.
func TestInsideRefused(t *testing.T) {
	if !asUser(t, "0600") {
		return
	}
	var lack *Lack
	if err := CheckInside(nil); !errors.As(err, &lack) || lack.What != LackTun || !errors.Is(err, fs.ErrPermission) || !strings.Contains(lack.Detail, "its mode is 0600") || !strings.Contains(lack.Advice, "setfacl") {
		t.Errorf("CheckInside = %+v", lack)
	}
	path, _ := container(t)
	_, err := Open(Config{Name: "eth0", MTU: 1400, Netns: path, Inside: true})
	if !errors.Is(err, fs.ErrPermission) || !strings.Contains(err.Error(), tunPath) {
		t.Errorf("Open = %v, want that %s does not open", err, tunPath)
	}
	// The namespace that this process is in belongs to somebody else.
	_, err = Open(Config{Name: unique(), MTU: 1400, Netns: "/proc/self/ns/net", Inside: true})
	if !errors.Is(err, fs.ErrPermission) {
		t.Errorf("in a namespace of root: %v", err)
	}
	before := openFiles(t)
	for range 3 {
		_, _ = Open(Config{Name: "eth0", MTU: 1400, Netns: path, Inside: true})
	}
	if after := openFiles(t); after != before {
		t.Errorf("%d descriptors are open, %d before", after, before)
	}
}

func openFiles(t *testing.T) int {
	t.Helper()
	list, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(list)
}

func TestLackNamespaces(t *testing.T) {
	for _, x := range []struct {
		setting, value string
		err            error
		want           []string
	}{
		{"kernel/unprivileged_userns_clone", "0", unix.EPERM, []string{"off for ordinary users", "sudo sysctl -w kernel.unprivileged_userns_clone=1"}},
		{"user/max_user_namespaces", "0", unix.ENOSPC, []string{"user namespaces are off", "sudo sysctl -w user.max_user_namespaces=10000"}},
		{"user/max_net_namespaces", "0", unix.ENOSPC, []string{"network namespaces are off", "user.max_net_namespaces=10000"}},
		{"kernel/apparmor_restrict_unprivileged_userns", "1", unix.EACCES, []string{"AppArmor", "kernel.apparmor_restrict_unprivileged_userns=0"}},
		{"user/max_user_namespaces", "9", unix.ENOSPC, []string{"no further"}},
		{"kernel/other", "1", unix.EPERM, []string{"may have no user namespace", "unshare --user --net"}},
	} {
		dir := t.TempDir()
		path := filepath.Join(dir, x.setting)
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(x.value+"\n"), 0o644)); err != nil {
			t.Fatal(err)
		}
		l := lackNamespaces(dir, x.err)
		for _, want := range x.want {
			if !strings.Contains(l.Error(), want) || l.What != LackNamespaces || !errors.Is(l, x.err) {
				t.Errorf("%s=%s, %v: %q, want %q", x.setting, x.value, x.err, l, want)
			}
		}
	}
}

// TestInsideOften: children come and go while the runtime works.
func TestInsideOften(t *testing.T) {
	if !asUser(t, "0666") {
		return
	}
	path, _ := container(t)
	want, err := NamespaceAt(path)
	if err != nil {
		t.Fatal(err)
	}
	before := openFiles(t)
	done := make(chan error)
	const workers, each = 4, 50
	for range workers {
		go func() {
			var garbage []byte
			for i := range each {
				garbage = append(garbage, make([]byte, 64<<10)...)
				if i%10 == 0 {
					garbage = garbage[:0:0]
					runtime.GC()
				}
				if ns, err := NamespaceAt(path); err != nil || ns != want {
					done <- fmt.Errorf("NamespaceAt = %+v, %w", ns, err)
					return
				}
			}
			done <- nil
		}()
	}
	for range workers {
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
	if after := openFiles(t); after != before {
		t.Errorf("%d descriptors are open, %d before", after, before)
	}
}

// BenchmarkOpenIn is what a descriptor of another's namespace costs. It needs to be an
// ordinary user.
func BenchmarkOpenIn(b *testing.B) {
	if os.Geteuid() == 0 {
		b.Skip("for an ordinary user")
	}
	for b.Loop() {
		fd, err := openNew(opening{domain: unix.AF_UNIX, kind: unix.SOCK_DGRAM | unix.SOCK_CLOEXEC})
		if err != nil {
			b.Fatal(err)
		}
		_ = unix.Close(fd)
	}
}
