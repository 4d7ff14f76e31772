package tap

import (
	"errors"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/tulle-net/tulle/ether"
)

// keptConfig is that of an endpoint's device.
func keptConfig(target *space) Config {
	return Config{
		Name: "eth0", MAC: 0x02540a200001, Driver: DriverOffload, Netns: target.path(), Alias: "tulle test/blue",
		Addresses: []netip.Prefix{netip.MustParsePrefix("10.32.0.1/16"), netip.MustParsePrefix("fd32::1/64")},
	}
}

func (s *space) lasting(cfg Config) Lasting {
	s.t.Helper()
	return s.open(cfg).(Lasting)
}

// own adds what a container would add itself.
func (s *space) own(dev string) {
	s.t.Helper()
	s.do(func() error {
		l, err := netlink.LinkByName(dev)
		if err != nil {
			return err
		}
		_, to, _ := net.ParseCIDR("10.99.0.0/16")
		return errors.Join(
			netlink.AddrAdd(l, &netlink.Addr{IPNet: &net.IPNet{IP: net.IPv4(10, 32, 7, 7), Mask: net.CIDRMask(32, 32)}}),
			netlink.RouteAdd(&netlink.Route{LinkIndex: l.Attrs().Index, Dst: to, Gw: net.IPv4(10, 32, 0, 9)}))
	})
}

// hasOwn reports whether all of it is there.
func (s *space) hasOwn(dev string) (ok bool) {
	s.t.Helper()
	s.do(func() error {
		l, err := netlink.LinkByName(dev)
		if err != nil {
			return err
		}
		routes, err := netlink.RouteList(l, netlink.FAMILY_V4)
		for _, r := range routes {
			ok = ok || r.Dst != nil && r.Dst.String() == "10.99.0.0/16"
		}
		list, err2 := netlink.AddrList(l, netlink.FAMILY_ALL)
		ok = ok && len(list) >= 3
		return errors.Join(err, err2)
	})
	return ok
}

// TestPersistent: the device outlasts its descriptors with all that it has, is
// attached to again, passes frames, and goes with Close.
func TestPersistent(t *testing.T) {
	s, target := newSpace(t), newSpace(t)
	cfg := keptConfig(target)
	dev := s.lasting(cfg)
	if dev.Pinned() {
		t.Error("a device that was moved pins its namespace")
	}
	if err := dev.SetPersistent(true); err != nil {
		t.Fatal(err)
	}
	index := target.links()["eth0"].Attrs().Index
	target.own("eth0")
	dev.Spare()
	if err := dev.Close(); err != nil {
		t.Fatal(err)
	}
	for round := range 2 {
		l, there := target.links()["eth0"]
		if !there || l.Attrs().Index != index || !target.hasOwn("eth0") {
			t.Fatalf("round %d: after Close: %v %+v", round, there, l)
		}
		cfg := cfg
		cfg.Reattach, cfg.MTU, cfg.QueueLen = true, 1300+round, 70+round
		again := s.lasting(cfg)
		l = target.links()["eth0"]
		if l.Attrs().Index != index || l.Attrs().MTU != cfg.MTU || l.Attrs().TxQLen != cfg.QueueLen || again.MTU() != cfg.MTU || again.MAC() != cfg.MAC || !target.hasOwn("eth0") {
			t.Errorf("round %d: attached again it is %+v", round, l.Attrs())
		}
		if !again.Pinned() {
			t.Error("one that was attached to inside does not say that it pins its namespace")
		}
		if o := again.Offloads(); o.Checksum != "on" || o.TSO4 != "on" {
			t.Errorf("offloads are %+v", o)
		}
		// A frame out of the namespace, and one into it.
		reads := make(chan struct{}, 1)
		go func() {
			_ = pump(again.Queues()[0], func(Frame) {
				select {
				case reads <- struct{}{}:
				default:
				}
			})
		}()
		target.do(func() error {
			c, err := net.Dial("udp4", "10.32.0.77:9")
			if err == nil {
				_, err = c.Write([]byte("x"))
				_ = c.Close()
			}
			return err
		})
		select {
		case <-reads:
		case <-time.After(5 * time.Second):
			t.Fatal("no frame comes out of the device")
		}
		if err := again.Queues()[0].WriteFrame(ether.Meta{}, [][]byte{make([]byte, 60)}); err != nil {
			t.Errorf("WriteFrame = %v", err)
		}
		if _, err := s.tryOpen(cfg); err == nil {
			t.Error("a device that somebody holds is attached to")
		}
		if round == 0 {
			again.Spare()
		}
		if err := again.Close(); err != nil {
			t.Fatal(err)
		}
	}
	if _, there := target.links()["eth0"]; there {
		t.Error("Close leaves the device")
	}
}

// TestReattachRefuses: another device is not taken over, nor changed.
func TestReattachRefuses(t *testing.T) {
	for what, change := range map[string]func(*Config){
		"alias": func(c *Config) { c.Alias = "tulle test/red" },
		"MAC":   func(c *Config) { c.MAC++ },
		"name":  func(c *Config) { c.Name = "lo" },
	} {
		t.Run(what, func(t *testing.T) {
			s, target := newSpace(t), newSpace(t)
			cfg := keptConfig(target)
			dev := s.lasting(cfg)
			if err := dev.SetPersistent(true); err != nil {
				t.Fatal(err)
			}
			dev.Spare()
			_ = dev.Close()
			change(&cfg)
			cfg.Reattach = true
			if _, err := s.tryOpen(cfg); !errors.Is(err, fs.ErrExist) {
				t.Errorf("Open = %v, want fs.ErrExist", err)
			}
			if _, there := target.links()["eth0"]; !there {
				t.Error("the device is gone")
			}
		})
	}
	// Where there is none, one is made.
	s, target := newSpace(t), newSpace(t)
	cfg := keptConfig(target)
	cfg.Reattach = true
	if dev := s.lasting(cfg); dev.Pinned() || len(target.addresses("eth0")) < 2 {
		t.Errorf("made where there is none: pinned %v, %v", dev.Pinned(), target.addresses("eth0"))
	}
}

// TestReattachQueues: with as many queues as there were before, and with another number.
func TestReattachQueues(t *testing.T) {
	for _, queues := range []int{3, 1} {
		s, target := newSpace(t), newSpace(t)
		cfg := keptConfig(target)
		cfg.Queues = 3
		dev := s.lasting(cfg)
		if err := dev.SetPersistent(true); err != nil {
			t.Fatal(err)
		}
		index := target.links()["eth0"].Attrs().Index
		dev.Spare()
		_ = dev.Close()
		cfg.Queues, cfg.Reattach = queues, true
		again := s.lasting(cfg)
		if len(again.Queues()) != queues {
			t.Errorf("%d queues, want %d", len(again.Queues()), queues)
		}
		if same := target.links()["eth0"].Attrs().Index == index; same != (queues == 3) {
			t.Errorf("%d queues: the same device: %v", queues, same)
		}
	}
}

func TestRemoveLeft(t *testing.T) {
	s, target := newSpace(t), newSpace(t)
	cfg := keptConfig(target)
	dev := s.lasting(cfg)
	if err := dev.SetPersistent(true); err != nil {
		t.Fatal(err)
	}
	if err := RemoveLeft(target.path(), "eth0", "tulle test/"); !errors.Is(err, fs.ErrExist) {
		t.Errorf("in use: %v, want fs.ErrExist", err)
	}
	dev.Spare()
	_ = dev.Close()
	for _, alias := range []string{"tulle other/", ""} {
		if err := RemoveLeft(target.path(), "eth0", alias); !errors.Is(err, fs.ErrExist) {
			t.Errorf("alias %q: %v, want fs.ErrExist", alias, err)
		}
	}
	if err := RemoveLeft(target.path(), "lo", "tulle test/"); !errors.Is(err, fs.ErrExist) {
		t.Errorf("lo: %v, want fs.ErrExist", err)
	}
	if err := RemoveLeft(target.path(), "eth0", "tulle test/"); err != nil {
		t.Error(err)
	}
	if _, there := target.links()["eth0"]; there {
		t.Error("it is there still")
	}
	if err := RemoveLeft(target.path(), "eth0", "tulle test/"); err != nil {
		t.Errorf("none: %v", err)
	}
}

// TestHanded: who has duplicates of the descriptors has the device, which the end of
// the one before does not touch.
func TestHanded(t *testing.T) {
	for _, persistent := range []bool{false, true} {
		s, target := newSpace(t), newSpace(t)
		cfg := keptConfig(target)
		dev := s.lasting(cfg)
		if persistent {
			if err := dev.SetPersistent(true); err != nil {
				t.Fatal(err)
			}
		}
		index := target.links()["eth0"].Attrs().Index
		target.own("eth0")
		files, err := dev.Descriptors()
		if err != nil || len(files) != 1 {
			t.Fatalf("Descriptors() = %v, %v", files, err)
		}
		dev.Spare()
		_ = dev.Close()
		cfg.Handed, cfg.MTU = files, 1333
		again := s.lasting(cfg)
		if l := target.links()["eth0"]; l.Attrs().Index != index || l.Attrs().MTU != 1333 || !target.hasOwn("eth0") {
			t.Errorf("handed over it is %+v", l.Attrs())
		}
		if again.Pinned() {
			t.Error("a device that was made outside pins its namespace once it is handed over")
		}
		if _, err := files[0].Stat(); err == nil {
			t.Error("what was handed over is open still")
		}
		if err := again.Close(); err != nil {
			t.Fatal(err)
		}
		if _, there := target.links()["eth0"]; there {
			t.Error("Close leaves the device")
		}
	}
}

// TestHandedUseless: what is no queue of the device that is wanted is no obstacle.
func TestHandedUseless(t *testing.T) {
	for what, change := range map[string]func(*Config){
		"another MAC":     func(c *Config) { c.MAC++ },
		"another address": func(c *Config) { c.Addresses = []netip.Prefix{netip.MustParsePrefix("10.32.0.2/16")} },
	} {
		s := newSpace(t)
		cfg := Config{Name: unique(), MAC: 0x02540a200001, Driver: DriverOffload, Addresses: []netip.Prefix{netip.MustParsePrefix("10.32.0.1/16")}}
		dev := s.lasting(cfg)
		index := s.links()[cfg.Name].Attrs().Index
		files, err := dev.Descriptors()
		if err != nil {
			t.Fatal(err)
		}
		held, err := dev.Descriptors() // as a store would
		if err != nil {
			t.Fatal(err)
		}
		dev.Spare()
		_ = dev.Close()
		change(&cfg)
		cfg.Handed = files
		again := s.lasting(cfg)
		if l := s.links()[cfg.Name]; l == nil || l.Attrs().Index == index || again.MAC() != cfg.MAC {
			t.Errorf("%s: want another device, have %+v", what, l)
		}
		closeAll(held)
	}
	null, err := unix.Open("/dev/null", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	s := newSpace(t)
	s.open(Config{Name: unique(), Driver: DriverOffload, Handed: []*os.File{os.NewFile(uintptr(null), "null")}})
}

// TestPlainKeepsNothing: what the other driver makes goes with its descriptor.
func TestPlainKeepsNothing(t *testing.T) {
	s, target := newSpace(t), newSpace(t)
	cfg := keptConfig(target)
	cfg.Driver = DriverPlain
	plain := s.open(cfg)
	if _, is := plain.(Lasting); is {
		t.Error("the plain driver's device is said to outlast its process")
	}
	_ = plain.Close()
	if _, there := target.links()["eth0"]; there {
		t.Error("Close leaves the device")
	}
	// And one that the fast driver left it makes anew.
	cfg.Driver = DriverOffload
	dev := s.lasting(cfg)
	if err := dev.SetPersistent(true); err != nil {
		t.Fatal(err)
	}
	dev.Spare()
	_ = dev.Close()
	cfg.Driver, cfg.Reattach = DriverPlain, true
	if dev := s.open(cfg); dev.Offloads().Driver != DriverPlain {
		t.Errorf("driver %s, want plain", dev.Offloads().Driver)
	}
}
