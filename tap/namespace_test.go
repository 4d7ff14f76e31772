package tap

import (
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// TestNamespaceAt: one namespace is itself by every path, and no later one is.
func TestNamespaceAt(t *testing.T) {
	own, err := OwnNamespace()
	if err != nil || own.Inode == 0 || own.Boot == "" {
		t.Fatalf("OwnNamespace() = %+v, %v", own, err)
	}
	if again, err := NamespaceAt(fmt.Sprintf("/proc/%d/ns/net", os.Getpid())); err != nil || again != own {
		t.Errorf("by another path it is %+v, %v, want %+v", again, err, own)
	}
	seen := map[Namespace]bool{own: true}
	inodes := map[uint64]bool{}
	for range 20 {
		s := newSpace(t)
		ns, err := NamespaceAt(s.path())
		if err != nil {
			t.Fatal(err)
		}
		if seen[ns] && ns.Cookie != 0 {
			t.Errorf("%+v is a namespace that has ended", ns)
		}
		if again, err := NamespaceAt(s.path()); err != nil || again != ns {
			t.Errorf("asked again it is %+v, %v, want %+v", again, err, ns)
		}
		if inodes[ns.Inode] {
			t.Logf("inode %d is used again, cookie %d", ns.Inode, ns.Cookie)
		}
		seen[ns], inodes[ns.Inode] = true, true
		s.end()
	}
	if after, err := OwnNamespace(); err != nil || after != own {
		t.Errorf("the process is in another namespace afterwards: %+v, %v, want %+v", after, err, own)
	}
}

func TestNamespaceAtRefuses(t *testing.T) {
	dir := t.TempDir()
	file, pipe := filepath.Join(dir, "file"), filepath.Join(dir, "pipe")
	if err := errors.Join(os.WriteFile(file, nil, 0o600), unix.Mkfifo(pipe, 0o600)); err != nil {
		t.Fatal(err)
	}
	for path, absent := range map[string]bool{
		filepath.Join(dir, "none"): true, filepath.Join(file, "below"): true, "/proc/4194305/ns/net": true,
		file: false, pipe: false, dir: false, "/proc/self/ns/uts": false, "/dev/null": false,
	} {
		if ns, err := NamespaceAt(path); !errors.Is(err, ErrNoNamespace) || errors.Is(err, fs.ErrNotExist) != absent {
			t.Errorf("NamespaceAt(%s) = %+v, %v, want ErrNoNamespace, absent: %v", path, ns, err, absent)
		}
	}
}

// TestGateways: default routes of both families, kept over an MTU without IPv6; a
// second one is refused and leaves no device.
func TestGateways(t *testing.T) {
	everyDriver(t, func(t *testing.T, d Driver) {
		s := newSpace(t)
		cfg := Config{
			Name: "eth0", MTU: 1450, Driver: d, Netns: s.path(),
			Addresses: []netip.Prefix{netip.MustParsePrefix("10.32.0.2/16"), netip.MustParsePrefix("fd32::2/64")},
			Gateways:  []netip.Addr{netip.MustParseAddr("10.32.0.1"), netip.MustParseAddr("fd32::1")},
		}
		dev, err := Open(cfg)
		if err != nil {
			t.Fatal(err)
		}
		defer dev.Close()
		want := func(when string) {
			t.Helper()
			for family, gw := range map[int]string{unix.AF_INET: "10.32.0.1", unix.AF_INET6: "fd32::1"} {
				if got := s.defaults(family); len(got) != 1 || got[0] != gw {
					t.Errorf("%s: default routes through %v, want %s", when, got, gw)
				}
			}
		}
		want("opened")
		if err := errors.Join(dev.SetMTU(1200), dev.SetMTU(1400)); err != nil {
			t.Fatal(err)
		}
		want("after an MTU without IPv6")
		second := cfg
		second.Name, second.Addresses, second.Gateways = "eth1", []netip.Prefix{netip.MustParsePrefix("10.33.0.2/16")}, []netip.Addr{netip.MustParseAddr("10.33.0.1")}
		if dev, err := Open(second); !errors.Is(err, ErrRouteTaken) || errors.Is(err, fs.ErrExist) {
			t.Errorf("a second default route: %v, %v, want ErrRouteTaken", dev, err)
		}
		if _, there := s.links()["eth1"]; there {
			t.Error("a device is left of one that was refused")
		}
		second.Gateways = []netip.Addr{netip.MustParseAddr("10.34.0.1")}
		if _, err := Open(second); err == nil || errors.Is(err, ErrRouteTaken) {
			t.Errorf("a gateway out of reach: %v", err)
		}
	})
}

// defaults returns the gateways of the namespace's default routes.
func (s *space) defaults(family int) (list []string) {
	s.t.Helper()
	h, err := netlink.NewHandleAt(s.ns, unix.NETLINK_ROUTE)
	if err != nil {
		s.t.Fatal(err)
	}
	defer h.Close()
	routes, err := h.RouteList(nil, family)
	if err != nil {
		s.t.Fatal(err)
	}
	for _, r := range routes {
		if r.Gw != nil {
			list = append(list, r.Gw.String())
		}
	}
	return list
}
