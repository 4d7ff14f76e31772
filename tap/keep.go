package tap

import (
	"cmp"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync/atomic"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/tulle-net/tulle/ether"
	"github.com/tulle-net/tulle/internal/ready"
)

// The functions in this file are about devices that outlast the process that made them.
//
//	persistent   the kernel keeps the device without a descriptor; a later run attaches
//	             itself by name, for which it has to open tunPath inside the namespace
//	handed over  another process has duplicates of the descriptors

// kept is what a device remembers of this.
type kept struct {
	// inside is where queues are opened; nil: here.
	inside     *netns.NsHandle
	pinned     bool // the descriptors keep the namespace alive
	persistent atomic.Bool
	spared     atomic.Bool
}

// openTun opens the clone device where the device is attached to.
func (d *offloadDevice) openTun() (fd int, err error) {
	if d.kept.inside == nil {
		return openTun()
	}
	if fd, err = openIn(*d.kept.inside, openTunFile); err != nil {
		return -1, explainOpen(err)
	}
	return fd, nil
}

// packetSocket returns one where the device is, or will be tested.
func (d *offloadDevice) packetSocket() (int, error) {
	what := opening{domain: unix.AF_PACKET, kind: unix.SOCK_RAW | unix.SOCK_CLOEXEC | unix.SOCK_NONBLOCK}
	if d.kept.inside == nil {
		return what.here()
	}
	return openIn(*d.kept.inside, what)
}

func (d *offloadDevice) SetPersistent(on bool) error {
	value := 0
	if on {
		value = 1
	}
	var errno error
	if d.file.Control(func(fd uintptr) { errno = unix.IoctlSetInt(int(fd), unix.TUNSETPERSIST, value) }) != nil {
		return ErrClosed
	}
	if errno != nil {
		return d.wrap(deviceError("TUNSETPERSIST", errno))
	}
	d.kept.persistent.Store(on)
	return nil
}

func (d *offloadDevice) Pinned() bool { return d.kept.pinned }
func (d *offloadDevice) Spare()       { d.kept.spared.Store(true) }

func (d *offloadDevice) Delete() error {
	h, dev, err := d.find()
	switch {
	case errors.Is(err, ErrClosed):
		return nil
	case err != nil:
		return d.wrap(err)
	}
	defer h.Close()
	if err := h.LinkDel(dev); err != nil && !errors.Is(err, unix.ENODEV) {
		return d.wrap(fmt.Errorf("remove the device: %w", err))
	}
	return nil
}

// endPersistence has the device go with its last descriptor. One that is gone
// already is no error.
func (d *offloadDevice) endPersistence() error {
	if !d.kept.persistent.Load() || d.kept.spared.Load() {
		return nil
	}
	if err := d.SetPersistent(false); err != nil && !errors.Is(err, ErrClosed) {
		return err
	}
	return nil
}

func (d *offloadDevice) Descriptors() ([]*os.File, error) {
	var out []*os.File
	for _, f := range d.files {
		copied, errno := -1, error(nil)
		if f.Control(func(fd uintptr) { copied, errno = unix.FcntlInt(fd, unix.F_DUPFD_CLOEXEC, 3) }) != nil {
			errno = ErrClosed
		}
		if errno != nil {
			closeAll(out)
			return nil, d.wrap(errno)
		}
		out = append(out, os.NewFile(uintptr(copied), d.name))
	}
	return out, nil
}

func closeAll(files []*os.File) {
	for _, f := range files {
		_ = f.Close()
	}
}

// setAlias sets the text that the device is known again by.
func (d *offloadDevice) setAlias(alias string) error {
	if alias == "" {
		return nil
	}
	h, dev, err := d.find()
	if err != nil {
		return err
	}
	defer h.Close()
	if err := h.LinkSetAlias(dev, alias); err != nil {
		return fmt.Errorf("set the alias: %w", err)
	}
	return nil
}

// takeHanded returns the device of descriptors that another process handed over,
// or nil. What cannot be used is closed, and the device removed if it was of no
// use: its name is needed.
func takeHanded(cfg Config) Device {
	if len(cfg.Handed) == 0 {
		return nil
	}
	d := newOffloadDevice(cfg)
	err := d.takeHanded(cfg)
	if err == nil {
		return d
	}
	if len(d.files) > 0 && !errors.Is(err, ErrClosed) {
		cfg.Log.Warn("a device that was handed over is made anew", "port", cfg.Name, "err", err)
		if h, dev, err := d.find(); err == nil {
			_ = h.LinkDel(dev) // making the new one tells
			h.Close()
		}
	}
	_ = d.Close()
	return nil
}

func newOffloadDevice(cfg Config) *offloadDevice {
	d := &offloadDevice{log: cfg.Log}
	d.link.inside = cfg.Inside
	d.writers.New = func() any { return newWriter() }
	return d
}

// takeHanded makes the queues of the files that cfg has, all of which are closed or
// taken over.
func (d *offloadDevice) takeHanded(cfg Config) error {
	files := slices.Clone(cfg.Handed)
	defer func() { closeAll(files) }()
	for _, f := range files {
		fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 3)
		if err != nil {
			return os.NewSyscallError("dup", err)
		}
		var req unix.Ifreq
		if err := unix.IoctlIfreq(fd, unix.TUNGETIFF, &req); err != nil {
			_ = unix.Close(fd)
			return deviceError("TUNGETIFF", err)
		}
		const want = unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR
		if flags := req.Uint16(); flags&(want|unix.IFF_TUN) != want {
			_ = unix.Close(fd)
			return fmt.Errorf("its flags are %#x, want a TAP with offloads", flags)
		}
		if err := d.addQueue(fd); err != nil {
			return err
		}
		d.link.file = d.files[0]
	}
	if cfg.Driver == DriverPlain {
		return errors.New("the plain driver takes over no device")
	}
	d.kept.pinned = cfg.Netns != "" && madeInside(d.files[0])
	// Here this host's settings say what the device is; elsewhere the namespace's owner
	// may have changed it.
	return d.takeOver(cfg, cfg.Netns == "")
}

// madeInside reports whether the queue was opened in the namespace that its device is in.
func madeInside(f *ready.File) (inside bool) {
	_ = f.Control(func(fd uintptr) {
		of, err := deviceNetns(fd)
		if err != nil {
			return
		}
		defer unix.Close(of)
		n, _, errno := unix.Syscall(unix.SYS_IOCTL, fd, unix.SIOCGSKNS, 0)
		if errno != 0 {
			inside = true // nobody can tell: look after it
			return
		}
		defer unix.Close(int(n))
		inside = netns.NsHandle(of).Equal(netns.NsHandle(n))
	})
	return inside
}

// takeOver learns what the device is like and has it do what cfg says that is
// this program's affair: offloads, MTU, queue. exact: it must have the MAC and the addresses.
func (d *offloadDevice) takeOver(cfg Config, exact bool) error {
	h, dev, err := d.find()
	if err != nil {
		return err
	}
	defer h.Close()
	d.netns, d.name, d.gsoMaxSize = cfg.Netns, cfg.Name, cfg.GSOMaxSize
	d.addresses, d.gateways, d.routes = slices.Clone(cfg.Addresses), slices.Clone(cfg.Gateways), slices.Clone(cfg.Routes)
	d.mac = ether.MACFrom(dev.Attrs().HardwareAddr)
	d.kept.persistent.Store(isPersistent(dev))
	if exact {
		if cfg.MAC != 0 && d.mac != cfg.MAC { // in a container it may have been changed
			return fmt.Errorf("its MAC is %v, want %v", d.mac, cfg.MAC)
		}
		if err := hasAll(h, dev, cfg); err != nil {
			return err
		}
	}
	if err := d.negotiate(cfg); err != nil {
		return err
	}
	if err := d.useFindings(cfg); err != nil {
		return err
	}
	if err := h.LinkSetTxQLen(dev, cmp.Or(cfg.QueueLen, txQueueLen)); err != nil {
		return fmt.Errorf("set the queue's length: %w", err)
	}
	d.noIPv6 = dev.Attrs().MTU < minMTU6
	if err := d.applyMTU(h, dev, cfg.MTU); err != nil {
		return err
	}
	return d.restoreIPv6(h, dev, cfg.MTU)
}

func isPersistent(dev netlink.Link) bool {
	t, ok := dev.(*netlink.Tuntap)
	return ok && !t.NonPersist
}

// hasAll returns an error if the device is not the one that cfg describes.
func hasAll(h *netlink.Handle, dev netlink.Link, cfg Config) error {
	if dev.Attrs().Name != cfg.Name {
		return fmt.Errorf("its name is %s, want %s", dev.Attrs().Name, cfg.Name)
	}
	list, err := h.AddrList(dev, netlink.FAMILY_ALL)
	if err != nil {
		return fmt.Errorf("its addresses: %w", err)
	}
	for _, a := range cfg.Addresses {
		if !slices.ContainsFunc(list, func(x netlink.Addr) bool { return x.IPNet.String() == a.String() }) {
			return fmt.Errorf("it does not have the address %s", a)
		}
	}
	return nil
}

// useFindings puts into effect what a self-test found. It needs a device that is
// down, so where there was none yet another device is tested.
func (d *offloadDevice) useFindings(cfg Config) error {
	found.mu.Lock()
	known, reasons := found.known, found.reasons
	found.mu.Unlock()
	if !known {
		probe := newOffloadDevice(cfg)
		if cfg.Inside { // it may be the only place where one can be made
			ns, err := openNetns(cfg.Netns)
			if err != nil {
				return err
			}
			defer ns.Close()
			probe.kept.inside = &ns
		}
		err := probe.attach(temporaryName(), unix.IFF_TAP|unix.IFF_NO_PI|unix.IFF_VNET_HDR|unix.IFF_TUN_EXCL)
		if err == nil {
			probe.link.file = probe.files[0]
			if err = probe.negotiate(cfg); err == nil {
				err = probe.selfTest()
			}
		}
		reasons = probe.state.reasons
		_ = probe.Close()
		if err != nil {
			return fmt.Errorf("the self-test: %w", err)
		}
	}
	d.state.mu.Lock()
	defer d.state.mu.Unlock()
	d.state.fill(reasons)
	return d.apply()
}

// reattach returns the device that an earlier run left, or nil where there is none.
func reattach(cfg Config) (Device, error) {
	left, err := leftover(cfg)
	if left == nil || err != nil {
		return nil, err
	}
	multi := left.Flags&netlink.TUNTAP_MULTI_QUEUE != 0
	if cfg.Driver == DriverPlain || multi != (cfg.Queues > 1) {
		return nil, RemoveLeft(cfg.Netns, cfg.Name, cfg.Alias)
	}
	ns, err := openHere(cfg.Netns)
	if err != nil {
		return nil, err
	}
	defer ns.Close()
	d := newOffloadDevice(cfg)
	d.kept.inside, d.kept.pinned = &ns, cfg.Netns != ""
	d.kept.persistent.Store(true)
	d.link.name = cfg.Name
	err = d.reattach(cfg, multi)
	d.kept.inside = nil
	if err != nil {
		d.Spare() // it is as it was
		_ = d.Close()
		return nil, err
	}
	return d, nil
}

func (d *offloadDevice) reattach(cfg Config, multi bool) error {
	flags := uint16(unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
	if multi {
		flags |= unix.IFF_MULTI_QUEUE
	}
	if err := d.attach(cfg.Name, flags); err != nil {
		return err
	}
	d.link.file = d.files[0]
	if err := d.takeOver(cfg, false); err != nil {
		return err
	}
	if multi {
		return d.attachOthers(cfg.Queues-1, cfg.Name, flags)
	}
	return nil
}

// openHere opens the namespace at path, or the caller's.
func openHere(path string) (netns.NsHandle, error) {
	if path == "" {
		path = "/proc/thread-self/ns/net"
	}
	return openNetns(path)
}

// leftover returns the device that cfg would be attached to again; nil: there is
// no device of its name. The error is errTaken if that is another one.
func leftover(cfg Config) (*netlink.Tuntap, error) {
	h, err := handleIn(cfg.Netns)
	if err != nil {
		return nil, err
	}
	defer h.Close()
	dev, err := h.LinkByName(cfg.Name)
	switch {
	case errors.As(err, new(netlink.LinkNotFoundError)):
		return nil, nil
	case err != nil:
		return nil, fmt.Errorf("look up the name: %w", err)
	}
	t, is := dev.(*netlink.Tuntap)
	if !is || t.Mode != netlink.TUNTAP_MODE_TAP || cfg.Alias == "" || t.Alias != cfg.Alias ||
		cfg.MAC != 0 && ether.MACFrom(t.HardwareAddr) != cfg.MAC {
		return nil, errTaken
	}
	return t, nil
}

// RemoveLeft removes the TAP of that name, at the path of a namespace, which an
// earlier run left there: its alias begins so, and nobody holds it. Where there is no
// device it does nothing; another one, or one in use, is fs.ErrExist.
func RemoveLeft(path, name, alias string) error {
	h, err := handleIn(path)
	if err != nil {
		return err
	}
	defer h.Close()
	dev, err := h.LinkByName(name)
	switch {
	case errors.As(err, new(netlink.LinkNotFoundError)):
		return nil
	case err != nil:
		return fmt.Errorf("tap: look up %s: %w", name, err)
	}
	t, is := dev.(*netlink.Tuntap)
	if !is || t.Mode != netlink.TUNTAP_MODE_TAP || alias == "" || !strings.HasPrefix(t.Alias, alias) || t.Queues > 0 {
		return fmt.Errorf("tap: %s: %w", name, errTaken)
	}
	ns, err := openHere(path)
	if err != nil {
		return err
	}
	defer ns.Close()
	flags := uint16(unix.IFF_TAP | unix.IFF_NO_PI)
	if t.Flags&netlink.TUNTAP_MULTI_QUEUE != 0 {
		flags |= unix.IFF_MULTI_QUEUE
	}
	// Of one queue the kernel does not say whether somebody holds it, but refuses another.
	d := &offloadDevice{}
	d.kept.inside = &ns
	fd, err := d.openTun()
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if err := attachTo(fd, name, flags); err != nil {
		return fmt.Errorf("tap: remove %s: %w", name, err)
	}
	if err := unix.IoctlSetInt(fd, unix.TUNSETPERSIST, 0); err != nil {
		return fmt.Errorf("tap: remove %s: TUNSETPERSIST: %w", name, err)
	}
	return nil
}
