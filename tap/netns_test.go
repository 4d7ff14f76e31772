package tap

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"runtime"
	"slices"
	"sync/atomic"
	"testing"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/tulle-net/tulle/ether"
)

// The main thread stays the main goroutine's. Another goroutine that spoilt it by
// entering a namespace would not end it: the runtime parks it for ever, and it would
// keep that namespace alive.
func init() { runtime.LockOSThread() }

func TestMain(m *testing.M) {
	if name := os.Getenv("TAP_TEST_HOLD"); name != "" {
		hold(name)
	}
	goleak.VerifyTestMain(m)
}

var counter atomic.Uint32

// unique returns a name that no other test or run uses, of at most 15 bytes.
func unique() string { return fmt.Sprintf("tt%d-%d", os.Getpid()%10_000_000, counter.Add(1)) }

func needRoot(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
}

// space is a network namespace of a test.
type space struct {
	t  testing.TB
	ns netns.NsHandle
}

// newSpace makes a namespace without a name: it lives as long as its
// descriptor, so nothing is left behind, whatever happens to the test.
func newSpace(t testing.TB) *space {
	t.Helper()
	needRoot(t)
	s := &space{t: t, ns: netns.None()}
	made := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // the thread ends with its goroutine: its namespace is spoilt
		var err error
		s.ns, err = netns.New()
		made <- err
	}()
	if err := <-made; err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.end)
	return s
}

func (s *space) end() {
	if s.ns.IsOpen() {
		_ = s.ns.Close()
	}
}

func (s *space) path() string { return fmt.Sprintf("/proc/self/fd/%d", int(s.ns)) }

// do runs fn in the namespace, on a thread that ends with it.
func (s *space) do(fn func() error) {
	s.t.Helper()
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		if err := netns.Set(s.ns); err != nil {
			done <- err
			return
		}
		done <- fn()
	}()
	if err := <-done; err != nil {
		s.t.Fatal(err)
	}
}

// open opens a device in the namespace, with a name of its own if cfg has none.
func (s *space) open(cfg Config) Device {
	s.t.Helper()
	var dev Device
	s.do(func() (err error) { dev, err = s.tryOpen(cfg); return err })
	return dev
}

// tryOpen is for use in do.
func (s *space) tryOpen(cfg Config) (Device, error) {
	if cfg.Name == "" {
		cfg.Name = unique()
	}
	if cfg.MTU == 0 {
		cfg.MTU = 1450
	}
	dev, err := Open(cfg)
	if err != nil {
		return nil, err
	}
	s.t.Cleanup(func() { _ = dev.Close() })
	return dev, nil
}

// links returns the devices of the namespace by name.
func (s *space) links() map[string]netlink.Link {
	s.t.Helper()
	h, err := netlink.NewHandleAt(s.ns, unix.NETLINK_ROUTE)
	if err != nil {
		s.t.Fatal(err)
	}
	defer h.Close()
	var all []netlink.Link
	for { // a dump that a change interrupts is taken again
		if all, err = h.LinkList(); !errors.Is(err, netlink.ErrDumpInterrupted) {
			break
		}
	}
	if err != nil {
		s.t.Fatal(err)
	}
	m := make(map[string]netlink.Link)
	for _, l := range all {
		m[l.Attrs().Name] = l
	}
	return m
}

// addresses returns the addresses of the device.
func (s *space) addresses(name string) []netip.Prefix {
	s.t.Helper()
	h, err := netlink.NewHandleAt(s.ns, unix.NETLINK_ROUTE)
	if err != nil {
		s.t.Fatal(err)
	}
	defer h.Close()
	addrs, err := h.AddrList(s.links()[name], unix.AF_UNSPEC)
	if err != nil {
		s.t.Fatal(err)
	}
	var out []netip.Prefix
	for _, a := range addrs {
		ip, _ := netip.AddrFromSlice(a.IP)
		bits, _ := a.Mask.Size()
		out = append(out, netip.PrefixFrom(ip.Unmap(), bits))
	}
	return out
}

// station opens a device with an address and the MAC that follows from it, so
// that peers need no ARP table of their own.
func (s *space) station(driver Driver, address string, cfg Config) Device {
	s.t.Helper()
	p := netip.MustParsePrefix(address)
	cfg.Driver, cfg.Addresses, cfg.MAC = driver, append(cfg.Addresses, p), ether.MACOf(p.Addr())
	return s.open(cfg)
}

var drivers = []Driver{DriverOffload, DriverPlain}

// allDrivers are those of TAPs, and the one that makes a TUN.
var allDrivers = append(slices.Clip(drivers), DriverTun)

// everyDriver runs a test with all of them.
func everyDriver(t *testing.T, fn func(t *testing.T, d Driver)) {
	for _, d := range allDrivers {
		t.Run(string(d), func(t *testing.T) { fn(t, d) })
	}
}

// eachDriver runs a test with both that make a TAP.
func eachDriver(t *testing.T, fn func(t *testing.T, d Driver)) {
	for _, d := range drivers {
		t.Run(string(d), func(t *testing.T) { fn(t, d) })
	}
}
