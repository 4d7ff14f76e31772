package tap

import (
	"errors"
	"io/fs"
	"net/netip"
	"slices"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// TestRoutes: what Open makes, Inspect finds; routes of IPv6 outlast an MTU without it.
func TestRoutes(t *testing.T) {
	eachDriver(t, func(t *testing.T, d Driver) {
		s := newSpace(t)
		addr, prefix := netip.MustParseAddr, netip.MustParsePrefix
		cfg := Config{
			Name: "eth0", MTU: 1450, MAC: 0x0254_0a20_0002, Driver: d, Netns: s.path(), QueueLen: 77,
			Addresses: []netip.Prefix{prefix("10.32.0.2/16"), prefix("fd32::2/64")}, Gateways: []netip.Addr{addr("10.32.0.1")},
			Routes: []Route{{prefix("192.0.2.0/24"), addr("10.32.0.9")}, {prefix("10.99.0.0/16"), netip.Addr{}}, {prefix("2001:db8::/32"), addr("fd32::9")}},
		}
		dev, err := Open(cfg)
		if err != nil {
			t.Fatal(err)
		}
		defer dev.Close()
		want := append([]Route{{prefix("0.0.0.0/0"), addr("10.32.0.1")}}, cfg.Routes...)
		look := func(when string) {
			t.Helper()
			got, err := Inspect(s.path(), "eth0")
			if err != nil || got.MAC != cfg.MAC || got.MTU != dev.MTU() || !got.Up {
				t.Fatalf("%s: %+v, %v", when, got, err)
			}
			for _, a := range cfg.Addresses {
				if !slices.Contains(got.Addresses, a) {
					t.Errorf("%s: addresses %v, want %s", when, got.Addresses, a)
				}
			}
			for _, r := range want {
				if !slices.Contains(got.Routes, r) {
					t.Errorf("%s: routes %v, want %v", when, got.Routes, r)
				}
			}
		}
		look("opened")
		if err := errors.Join(dev.SetMTU(1200), dev.SetMTU(1400)); err != nil {
			t.Fatal(err)
		}
		look("after an MTU without IPv6")
		if link := s.link("eth0"); link.Attrs().TxQLen != 77 {
			t.Errorf("the queue takes %d frames, want 77", link.Attrs().TxQLen)
		}

		second := cfg
		second.Name, second.Addresses, second.Gateways, second.MAC = "eth1", []netip.Prefix{prefix("10.33.0.2/16")}, nil, 0
		second.Routes = []Route{{prefix("192.0.2.0/24"), addr("10.33.0.9")}}
		if dev, err := Open(second); !errors.Is(err, ErrRouteTaken) || errors.Is(err, fs.ErrExist) {
			t.Errorf("a route that is there: %v, %v, want ErrRouteTaken", dev, err)
		}
		second.Routes[0].Via = addr("10.32.0.9")
		if dev, err := Open(second); err == nil || errors.Is(err, ErrRouteTaken) {
			t.Errorf("a route out of reach: %v, %v", dev, err)
		}
		if _, there := s.links()["eth1"]; there {
			t.Error("a device is left of one that was refused")
		}
	})
}

func TestInspectRefuses(t *testing.T) {
	if _, err := Inspect("", "no-such-device"); !errors.Is(err, ErrNoDevice) {
		t.Errorf("no such device: %v", err)
	}
	if _, err := Inspect("/run/netns/no-such-namespace", "lo"); !errors.Is(err, fs.ErrNotExist) || errors.Is(err, ErrNoDevice) {
		t.Errorf("no such namespace: %v", err)
	}
	if got, err := Inspect("", "lo"); err != nil || !slices.Contains(got.Addresses, netip.MustParsePrefix("127.0.0.1/8")) || got.MTU == 0 {
		t.Errorf("the loopback: %+v, %v", got, err)
	}
}

// link returns a device of the namespace.
func (s *space) link(name string) netlink.Link {
	s.t.Helper()
	h, err := netlink.NewHandleAt(s.ns, unix.NETLINK_ROUTE)
	if err != nil {
		s.t.Fatal(err)
	}
	defer h.Close()
	link, err := h.LinkByName(name)
	if err != nil {
		s.t.Fatal(err)
	}
	return link
}
