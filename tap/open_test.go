package tap

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/tulle-net/tulle/ether"
)

func TestOpenClose(t *testing.T) {
	s := newSpace(t)
	everyDriver(t, func(t *testing.T, d Driver) {
		var log bytes.Buffer
		cfg := Config{
			Name: unique(), MTU: 1418, MAC: 0x0254_0a20_0001, Driver: d,
			Addresses: []netip.Prefix{netip.MustParsePrefix("10.32.0.1/16"), netip.MustParsePrefix("fd00:32::1/64")},
			Log:       slog.New(slog.NewTextHandler(&log, nil)),
		}
		dev := s.open(cfg)
		if dev.Name() != cfg.Name || dev.MAC() != cfg.MAC || dev.MTU() != cfg.MTU || len(dev.Queues()) != 1 {
			t.Errorf("device is %s %v %d with %d queues", dev.Name(), dev.MAC(), dev.MTU(), len(dev.Queues()))
		}
		l := s.links()[cfg.Name]
		if l == nil {
			t.Fatal("no such device")
		}
		a := l.Attrs()
		if a.MTU != cfg.MTU || d != DriverTun && a.HardwareAddr.String() != cfg.MAC.String() || a.Flags&1 == 0 || a.TxQLen != txQueueLen {
			t.Errorf("kernel has MTU %d, MAC %v, flags %v, queue %d", a.MTU, a.HardwareAddr, a.Flags, a.TxQLen)
		}
		segs := gsoMaxSegs
		if d == DriverTun {
			segs = tunSegments
		}
		if want := DefaultGSOMaxSize(cfg.MTU); int(a.GSOMaxSize) != want || int(a.GSOMaxSegs) != segs {
			t.Errorf("kernel has gso_max_size %d, gso_max_segs %d, want %d, %d", a.GSOMaxSize, a.GSOMaxSegs, want, segs)
		}
		for _, want := range cfg.Addresses {
			if got := s.addresses(cfg.Name); !slices.Contains(got, want) {
				t.Errorf("addresses %v, want %v among them", got, want)
			}
		}
		if o := dev.Offloads(); o.Driver != d {
			t.Errorf("Offloads = %+v, want driver %s", o, d)
		} else if d != DriverPlain && o != (Offloads{d, "on", "on", "on", "on", "on"}) {
			t.Errorf("Offloads = %+v, want all on with this kernel", o)
		}
		if log.Len() > 0 {
			t.Errorf("logged %s", &log)
		}
		if err := errors.Join(dev.Close(), dev.Close()); err != nil {
			t.Errorf("Close = %v", err)
		}
		if s.links()[cfg.Name] != nil {
			t.Error("the device is still there after Close")
		}
		q, b := dev.Queues()[0], NewBatch()
		for what, err := range map[string]error{
			"Wait": q.Wait(), "Read": q.Read(b), "SetMTU": dev.SetMTU(1400),
			"WriteFrame": q.WriteFrame(ether.Meta{}, [][]byte{make([]byte, 60)}),
		} {
			if !errors.Is(err, ErrClosed) {
				t.Errorf("%s after Close = %v, want ErrClosed", what, err)
			}
		}
	})
}

func TestDefaults(t *testing.T) {
	s := newSpace(t)
	dev := s.open(Config{})
	if !dev.MAC().IsValid() || dev.Offloads().Driver != DriverOffload {
		t.Errorf("MAC %v, offloads %+v, want one of the kernel's and the offload driver", dev.MAC(), dev.Offloads())
	}
}

func TestQueues(t *testing.T) {
	s := newSpace(t)
	dev := s.open(Config{Queues: 4, Driver: DriverOffload})
	if n := len(dev.Queues()); n != 4 {
		t.Fatalf("%d queues, want 4", n)
	}
	if got := s.links()[dev.Name()].Attrs().NumTxQueues; got < 4 {
		t.Errorf("kernel has %d queues, want 4 or more", got)
	}
	for i, q := range dev.Queues() {
		if err := q.WriteFrame(ether.Meta{}, [][]byte{arpRequest(dev.MAC() ^ 1)}); err != nil {
			t.Errorf("queue %d: WriteFrame = %v", i, err)
		}
	}
	name := dev.Name()
	if err := dev.Close(); err != nil || s.links()[name] != nil {
		t.Errorf("Close = %v, device there: %v", err, s.links()[name] != nil)
	}
}

func TestNameTaken(t *testing.T) {
	everyDriver(t, func(t *testing.T, d Driver) {
		s, target := newSpace(t), newSpace(t)
		for _, kind := range []string{"persistent tun", "persistent tap", "moved"} {
			name := unique()
			taken := &netlink.Tuntap{LinkAttrs: netlink.LinkAttrs{Name: name}, Mode: netlink.TUNTAP_MODE_TAP}
			if kind == "persistent tun" {
				taken.Mode = netlink.TUNTAP_MODE_TUN
			}
			cfg, in := Config{Name: name, MTU: 1450, Driver: d}, s
			if kind == "moved" {
				in, cfg.Netns = target, target.path()
			}
			in.do(func() error { return netlink.LinkAdd(taken) })
			before := len(s.links())
			s.do(func() error {
				_, err := Open(cfg)
				if !errors.Is(err, fs.ErrExist) || !strings.Contains(err.Error(), name) || !strings.Contains(err.Error(), "choose another") {
					t.Errorf("%s: Open = %v, want a helpful fs.ErrExist", kind, err)
				}
				return nil
			})
			if len(s.links()) != before || in.links()[name] == nil {
				t.Errorf("%s: devices %v after the refusal", kind, s.links())
			}
		}
	})
}

// TestFallBack: auto is plain where the kernel refuses offloads, and only there.
func TestFallBack(t *testing.T) {
	s := newSpace(t)
	fd, err := openTun()
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	// Neither TUN nor TAP is EINVAL, as IFF_VNET_HDR is where it is unknown.
	refusal := attachTo(fd, unique(), unix.IFF_VNET_HDR)
	var log bytes.Buffer
	cfg := Config{Name: unique(), MTU: 1450, Queues: 4, Driver: DriverAuto, Log: slog.New(slog.NewTextHandler(&log, nil))}
	s.do(func() error {
		dev, err := fallBack(cfg, nil, fmt.Errorf("wrapped: %w", refusal))
		if err != nil {
			return err
		}
		defer dev.Close()
		if dev.Offloads().Driver != DriverPlain || len(dev.Queues()) != 1 || !strings.Contains(log.String(), "level=WARN") {
			t.Errorf("%+v, %d queues, log %q, want plain and a warning", dev.Offloads(), len(dev.Queues()), &log)
		}
		return nil
	})
	if dev, err := fallBack(cfg, nil, errTaken); dev != nil || err != errTaken {
		t.Errorf("fallBack = %v, %v, want the other error as it is", dev, err)
	}
}

// TestTakenMeanwhile: the name is taken between the look and the creation.
func TestTakenMeanwhile(t *testing.T) {
	everyDriver(t, func(t *testing.T, d Driver) {
		s := newSpace(t)
		name := unique()
		s.do(func() error {
			if err := netlink.LinkAdd(&netlink.Tuntap{LinkAttrs: netlink.LinkAttrs{Name: name}, Mode: netlink.TUNTAP_MODE_TAP}); err != nil {
				return err
			}
			openDriver := map[Driver]func(Config) (Device, error){DriverOffload: openOffload, DriverPlain: openPlain, DriverTun: openTunnel}[d]
			if _, err := openDriver(Config{Name: name, MTU: 1450, Queues: 1, Log: slog.New(slog.DiscardHandler)}); !errors.Is(err, fs.ErrExist) {
				t.Errorf("open = %v, want fs.ErrExist", err)
			}
			return nil
		})
		if n := len(s.links()); n != 2 { // lo and the other's
			t.Errorf("%d devices, want 2", n)
		}
	})
}

// TestNothingLeft fails the last step before up and looks for remains.
func TestNothingLeft(t *testing.T) {
	everyDriver(t, func(t *testing.T, d Driver) {
		s, target := newSpace(t), newSpace(t)
		twice := netip.MustParsePrefix("10.1.0.1/24")
		fds := countFDs(t)
		for _, cfg := range []Config{
			{Addresses: []netip.Prefix{twice, twice}},
			{Addresses: []netip.Prefix{twice, twice}, Netns: target.path()},
			{Netns: "/nonexistent/ns"},
			{Netns: os.DevNull},
		} {
			cfg.Driver, cfg.Queues = d, 1
			s.do(func() error {
				if _, err := s.tryOpen(cfg); err == nil {
					t.Errorf("Open(%+v) = nil, want an error", cfg)
				}
				return nil
			})
		}
		if a, b := len(s.links()), len(target.links()); a != 1 || b != 1 {
			t.Errorf("%d and %d devices are left, want lo alone", a, b)
		}
		if n := countFDs(t); n > fds {
			t.Errorf("%d descriptors, %d before", n, fds)
		}
	})
}

func countFDs(t *testing.T) int {
	t.Helper()
	fds, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(fds)
}

// TestNoPrivilege opens on a thread without CAP_NET_ADMIN.
func TestNoPrivilege(t *testing.T) {
	needRoot(t)
	for _, d := range append(allDrivers, DriverAuto) {
		fds := countFDs(t)
		done := make(chan error, 1)
		go func() {
			runtime.LockOSThread() // for good: the thread ends
			hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
			var none [2]unix.CapUserData
			if err := unix.Capset(&hdr, &none[0]); err != nil {
				t.Error(err)
			}
			_, err := Open(Config{Name: unique(), MTU: 1450, Driver: d})
			done <- err
		}()
		err := <-done
		if !errors.Is(err, fs.ErrPermission) || !strings.Contains(err.Error(), "CAP_NET_ADMIN") {
			t.Errorf("%s: Open = %v, want fs.ErrPermission that names CAP_NET_ADMIN", d, err)
		}
		if n := countFDs(t); n > fds {
			t.Errorf("%s: %d descriptors, %d before", d, n, fds)
		}
	}
}

func TestSetMTUAndMove(t *testing.T) {
	everyDriver(t, func(t *testing.T, d Driver) {
		s, target := newSpace(t), newSpace(t)
		cfg := Config{Name: "eth0", Driver: d, MAC: 0x0254_0a20_0002, Netns: target.path(), Addresses: []netip.Prefix{netip.MustParsePrefix("10.32.0.2/16")}}
		if d == DriverOffload {
			cfg.Queues = 2
		}
		s.do(func() error {
			return netlink.LinkAdd(&netlink.Tuntap{LinkAttrs: netlink.LinkAttrs{Name: "eth0"}, Mode: netlink.TUNTAP_MODE_TAP})
		})
		dev := s.open(cfg) // the name is in use here, which does not matter there
		if n := len(s.links()); n != 2 {
			t.Errorf("%d devices stayed, want lo and eth0", n)
		}
		l := target.links()["eth0"]
		if l == nil || d != DriverTun && l.Attrs().HardwareAddr.String() != cfg.MAC.String() || l.Attrs().Flags&1 == 0 {
			t.Fatalf("device there: %+v", l)
		}
		if got := target.addresses("eth0"); !slices.Contains(got, cfg.Addresses[0]) {
			t.Errorf("addresses there %v, want %v", got, cfg.Addresses)
		}
		if err := dev.SetMTU(1300); err != nil || dev.MTU() != 1300 {
			t.Fatalf("SetMTU = %v, MTU %d", err, dev.MTU())
		}
		a := target.links()["eth0"].Attrs()
		if a.MTU != 1300 || int(a.GSOMaxSize) != DefaultGSOMaxSize(1300) {
			t.Errorf("kernel has MTU %d, gso_max_size %d", a.MTU, a.GSOMaxSize)
		}
		for _, bad := range []int{0, 67, 65536} {
			if err := dev.SetMTU(bad); err == nil || dev.MTU() != 1300 {
				t.Errorf("SetMTU(%d) = %v, MTU %d, want an error, 1300", bad, err, dev.MTU())
			}
		}
		if err := dev.Close(); err != nil || target.links()["eth0"] != nil {
			t.Errorf("Close = %v, device there: %v", err, target.links()["eth0"] != nil)
		}
	})
}

// TestSetMTUBelowIPv6: the kernel forgets IPv6 addresses below 1280 bytes.
func TestSetMTUBelowIPv6(t *testing.T) {
	everyDriver(t, func(t *testing.T, d Driver) {
		s := newSpace(t)
		four, six, removed := netip.MustParsePrefix("10.32.0.1/16"), netip.MustParsePrefix("fd00:32::1/64"), netip.MustParsePrefix("fd00:33::1/64")
		dev := s.open(Config{Driver: d, Addresses: []netip.Prefix{four, six, removed}})
		step := func(mtu int, want ...netip.Prefix) {
			t.Helper()
			if err := dev.SetMTU(mtu); err != nil {
				t.Fatalf("SetMTU(%d): %v", mtu, err)
			}
			got := slices.DeleteFunc(s.addresses(dev.Name()), func(p netip.Prefix) bool { return p.Addr().IsLinkLocalUnicast() })
			if slices.SortFunc(got, netip.Prefix.Compare); !slices.Equal(got, want) {
				t.Errorf("MTU %d: addresses %v, want %v", mtu, got, want)
			}
		}
		step(1450, four, six, removed)
		s.do(func() error {
			return netlink.AddrDel(s.links()[dev.Name()], &netlink.Addr{IPNet: &net.IPNet{IP: removed.Addr().AsSlice(), Mask: net.CIDRMask(64, 128)}})
		})
		step(1400, four, six) // what an operator removed is not added again
		step(1250, four)
		step(1260, four)
		step(1280, four, six, removed)
		step(1279, four)
		step(1450, four, six, removed)
		// Somebody else may have set it too low.
		s.do(func() error { return netlink.LinkSetMTU(s.links()[dev.Name()], 1200) })
		step(1450, four, six, removed)
	})
}

func TestValidate(t *testing.T) {
	good := Config{Name: "blue0", MTU: 1450, Queues: 1, Driver: DriverAuto}
	if err := validate(good); err != nil {
		t.Fatalf("validate(%+v) = %v, want nil", good, err)
	}
	for _, c := range []struct {
		change func(*Config)
		want   string // part of the message
	}{
		{func(c *Config) { c.Name = "" }, "needs a name"},
		{func(c *Config) { c.Name = "a234567890123456" }, "at most 15"},
		{func(c *Config) { c.Name = "a/b" }, "without spaces"},
		{func(c *Config) { c.Name = "a b" }, "without spaces"},
		{func(c *Config) { c.Name = "tap%d" }, "without spaces"},
		{func(c *Config) { c.Name = "a:1" }, "without spaces"},
		{func(c *Config) { c.Name = ".." }, "without spaces"},
		{func(c *Config) { c.Name = "a\n" }, "without spaces"},
		{func(c *Config) { c.MTU = 67 }, "MTU 67: choose 68"},
		{func(c *Config) { c.MTU = 65536 }, "65535"},
		{func(c *Config) { c.MAC = ether.Broadcast }, "unicast"},
		{func(c *Config) { c.Queues = 257 }, "1 to 256"},
		{func(c *Config) { c.Queues = -1 }, "1 to 256"},
		{func(c *Config) { c.GSOMaxSize = 1 << 17 }, "65536"},
		{func(c *Config) { c.Driver = "fast" }, "auto, offload, plain or tun"},
		{func(c *Config) { c.Addresses = make([]netip.Prefix, 1) }, "10.32.0.1/16"},
		{func(c *Config) { c.MTU, c.Addresses = 1279, []netip.Prefix{netip.MustParsePrefix("fd00:32::1/64")} },
			"fd00:32::1/64: IPv6 needs an MTU of at least 1280 bytes, and this overlay's would be 1279"},
	} {
		cfg := good
		c.change(&cfg)
		if err := validate(cfg); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("validate(%+v) = %v, want %q in it", cfg, err, c.want)
		}
	}
	if _, err := Open(Config{Name: "no good", MTU: 1, Driver: DriverPlain}); err == nil ||
		!strings.HasPrefix(err.Error(), `tap: open "no good": `) || !strings.Contains(err.Error(), "MTU 1") {
		t.Errorf("Open = %v, want both faults and the name quoted", err)
	}
}

func TestExplain(t *testing.T) {
	for _, c := range []struct {
		explain func(error) error
		err, is error
		want    string
	}{
		{explainOpen, unix.ENOENT, fs.ErrNotExist, "modprobe tun"},
		{explainOpen, unix.ENODEV, unix.ENODEV, "CONFIG_TUN"},
		{explainOpen, unix.ENXIO, unix.ENXIO, "CONFIG_TUN"},
		{explainOpen, unix.EACCES, fs.ErrPermission, "root"},
		{explainOpen, unix.EPERM, fs.ErrPermission, "root"},
		{explainOpen, unix.EMFILE, unix.EMFILE, tunPath},
		{explainCreate, unix.EPERM, fs.ErrPermission, "CAP_NET_ADMIN"},
		{explainCreate, unix.EBUSY, fs.ErrExist, "choose another name"},
		{explainCreate, unix.EEXIST, fs.ErrExist, "choose another name"},
		{explainCreate, unix.ENOMEM, unix.ENOMEM, "TUNSETIFF"},
	} {
		if err := c.explain(c.err); !errors.Is(err, c.is) || !strings.Contains(err.Error(), c.want) {
			t.Errorf("explain(%v) = %v, want %v with %q", c.err, err, c.is, c.want)
		}
	}
}

func TestDefaultGSOMaxSize(t *testing.T) {
	for mtu := minMTU; mtu <= maxMTU; mtu++ {
		size := DefaultGSOMaxSize(mtu)
		if size < 4096 || size >= gsoLegacyMax {
			t.Fatalf("DefaultGSOMaxSize(%d) = %d, out of bounds", mtu, size)
		}
		if mtu < 576 || mtu > 16000 {
			continue // bounded by other things than the train
		}
		for _, hdr := range []int{40, 52, 60, 72} { // IPv4 and 6, without and with timestamps
			segs := min(gsoMaxSegs, (size-tcpReserve)/(mtu-hdr))
			if train := segs * (mtu + trainOverhead); train > udpMax {
				t.Fatalf("MTU %d, headers %d: %d segments are %d bytes, more than %d", mtu, hdr, segs, train, udpMax)
			}
		}
	}
	if got := DefaultGSOMaxSize(1450); got < 60_000 {
		t.Errorf("DefaultGSOMaxSize(1450) = %d, want about 61 K", got)
	}
}
