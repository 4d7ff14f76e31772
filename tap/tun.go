package tap

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
	"golang.zx2c4.com/wireguard/tun"

	"github.com/tulle-net/tulle/ether"
	"github.com/tulle-net/tulle/internal/ready"
)

// tunDevice is the driver for layer 3, on wireguard/tun: the host has a TUN, the
// overlay a port with a MAC like any other. A station stands between them. It has
// one queue, itself.
//
// The library's Read cuts the kernel's super-frames and finishes their checksums; they
// are put together again, as one write is cheaper than forty. Its Write takes ordinary packets only and looks for what it can merge, while here
// they come merged: so super-frames go past it, to the descriptor, and what it
// writes is for kernels without virtio headers.
type tunDevice struct {
	link
	tun  tun.Device
	wait *ready.File // an epoll of the device and bell
	bell *bell
	st   *station

	grid  [][]byte // where Read has the library put packets, in grid's Batch
	of    *byte    // whose memory that is
	gap   int      // between the begins of two
	sizes [BatchFrames]int
	whole gather // what was cut, put together

	vnet    bool // the descriptor has virtio headers
	uso     bool // and the kernel UDP super-frames
	writers sync.Pool
	cutters cutters
	writing sync.Mutex  // of one
	one     [1][]byte   // the library's Write takes slices of slices
	passes  atomic.Bool // super-frames into the kernel
	closed  atomic.Bool
	lost    atomic.Bool // the worker has found that the device is gone

	mu           sync.Mutex // of the switches
	noTSO, noUSO bool
}

var (
	_ Device = (*tunDevice)(nil)
	_ Queue  = (*tunDevice)(nil)
)

const (
	// tunOffset is what stands before a packet that was read.
	tunOffset = Headroom + etherLen
	// tunTail is the memory behind the begin of each packet's place, so that no
	// segment that the library makes ends behind it, whoever changed the MTU.
	tunTail = 65536 + tunOffset
	// tunBytes is the memory of a Batch that reads a TUN. What is not used of it is
	// never touched.
	tunBytes = 256 << 10
	// tunSegments bounds the segments of a super-frame, so that some packets fit
	// into a Batch before it.
	tunSegments = 44
)

// tunSegmentsAt returns how many segments a super-frame may have at an MTU, and how
// far apart they are put.
func tunSegmentsAt(mtu int) (segments, gap int) {
	gap = (tunOffset + mtu + 63) &^ 63
	return min(tunSegments, 1+(tunBytes-tunTail)/gap), gap
}

func openTunnel(cfg Config) (Device, error) {
	d, err := openTunnelWith(cfg, unix.IFF_VNET_HDR)
	var refused *refusedError
	if errors.As(err, &refused) {
		cfg.Log.Warn("this kernel refuses TUN offloads: falling back to a packet a call", "port", cfg.Name, "err", err)
		d, err = openTunnelWith(cfg, 0)
	}
	if err != nil {
		return nil, err
	}
	return d, nil
}

func openTunnelWith(cfg Config, vnet uint16) (*tunDevice, error) {
	if cfg.MAC == 0 {
		cfg.MAC = someMAC(cfg.Addresses)
	}
	d := &tunDevice{vnet: vnet != 0, noTSO: cfg.NoTSO, noUSO: cfg.NoUSO}
	d.writers.New = func() any { return newWriter() }
	d.whole.c = ether.NewCoalescer(maxIPv4)
	d.passes.Store(!cfg.NoGRO)
	d.link = link{name: cfg.Name, mac: cfg.MAC, layer3: true}
	if err := d.setUpAll(cfg, vnet); err != nil {
		_ = d.Close()
		return nil, err
	}
	return d, nil
}

// someMAC is the MAC of who is given none: by the address, or any.
func someMAC(addresses []netip.Prefix) ether.MAC {
	if len(addresses) > 0 {
		return ether.MACOf(addresses[0].Addr())
	}
	return ether.MAC(rand.Uint64())&0xfcff_ffff_ffff | 2<<40
}

func (d *tunDevice) setUpAll(cfg Config, vnet uint16) error {
	if err := d.create(vnet); err != nil {
		return err
	}
	file, err := ready.FromFile(d.tun.File())
	if err != nil {
		return err
	}
	d.link.file = file
	if err := d.apply(); err != nil {
		return err
	}
	if d.bell, err = newBell(); err != nil {
		return err
	}
	if d.wait, err = d.bell.join(file); err != nil {
		return err
	}
	prefixes := append(slices.Clone(cfg.Addresses), netip.PrefixFrom(ether.LinkLocal(cfg.MAC), 64))
	d.whole.lost = func() { d.st.drop(dropMalformed) }
	d.st = newStation(cfg.MAC, prefixes, cfg.Gateways, d.bell.ring, d.tell)
	d.st.routes = cfg.Routes
	if err := d.move(cfg); err != nil {
		return err
	}
	return d.setUp(cfg)
}

// create makes the device under a name that nobody else has.
func (d *tunDevice) create(vnet uint16) error {
	fd, err := openTun()
	if err != nil {
		return err
	}
	if err := attachTo(fd, temporaryName(), unix.IFF_TUN|unix.IFF_NO_PI|unix.IFF_TUN_EXCL|vnet); err != nil {
		_ = unix.Close(fd)
		return err
	}
	// Unmonitored: else it had two goroutines, one of which wakes every second, and a
	// netlink socket, to tell what the node finds out by itself.
	dev, _, err := tun.CreateUnmonitoredTUNFromFD(fd)
	if err != nil {
		_ = unix.Close(fd)
		if vnet != 0 && errors.Is(err, unix.EINVAL) {
			return &refusedError{"segmentation offload (TUNSETOFFLOAD)", err}
		}
		return fmt.Errorf("wireguard/tun: %w", err)
	}
	d.tun = dev
	return nil
}

func (d *tunDevice) Queues() []Queue { return []Queue{d} }

// apply puts the switches into effect. The library asked for all that there is.
func (d *tunDevice) apply() error {
	if !d.vnet {
		return nil
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	flags := unix.TUN_F_CSUM
	if !d.noTSO {
		flags |= tunTSO
	}
	ioctl := func(flags int) (errno error) {
		if d.file.Control(func(fd uintptr) { errno = unix.IoctlSetInt(int(fd), unix.TUNSETOFFLOAD, flags) }) != nil {
			return ErrClosed
		}
		return errno
	}
	err := ioctl(flags | tunUSO)
	d.uso = err == nil
	if d.uso && !d.noUSO {
		return nil
	}
	if err = ioctl(flags); err != nil {
		return deviceError("TUNSETOFFLOAD", err)
	}
	return nil
}

func (d *tunDevice) SetOffload(noTSO, noUSO, noGRO bool) error {
	d.mu.Lock()
	d.noTSO, d.noUSO = noTSO, noUSO
	d.mu.Unlock()
	d.passes.Store(!noGRO)
	return d.wrap(d.apply())
}

func (d *tunDevice) Offloads() Offloads {
	if !d.vnet {
		const none = "the kernel refuses it for TUN devices"
		return Offloads{Driver: DriverTun, Checksum: none, TSO4: none, TSO6: none, USO: none, GRO: none}
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	uso := ""
	if !d.uso {
		uso = "the kernel refuses it (Linux 6.2 has it)"
	}
	return Offloads{
		Driver: DriverTun, Checksum: "on", TSO4: onOff(d.noTSO, ""), TSO6: onOff(d.noTSO, ""),
		USO: onOff(d.noUSO, uso), GRO: onOff(!d.passes.Load(), ""),
	}
}

// Close removes the device.
func (d *tunDevice) Close() error {
	if d.closed.Swap(true) {
		return nil
	}
	if d.st != nil {
		d.st.close() // nobody rings any more
	}
	var errs []error
	if d.wait != nil {
		errs = append(errs, d.wait.Close())
	}
	if d.file != nil {
		errs = append(errs, d.file.Close()) // the library's descriptor, and wakes who waits
	}
	if d.bell != nil {
		errs = append(errs, d.bell.close())
	}
	if d.tun != nil {
		if err := d.tun.Close(); !errors.Is(err, fs.ErrClosed) {
			errs = append(errs, err)
		}
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("tap: close %s: %w", d.name, err)
	}
	return nil
}

func (d *tunDevice) Wait() error {
	if d.wait.Wait() != nil {
		return ErrClosed
	}
	if !d.file.Readable() && d.closed.Load() || d.file.Failed() {
		d.lost.Store(true)
		return ErrClosed
	}
	return nil
}

// Read returns what the station has to send, and the packets that wait. It is this
// device's only reader, so what poll promised is still there for the library, which
// would block.
func (d *tunDevice) Read(b *Batch) error {
	b.Frames = b.Frames[:0]
	d.st.mu.Lock()
	if len(d.st.queue) > 0 && d.st.take(b) {
		d.bell.clear()
	}
	d.st.mu.Unlock()
	own, cut := len(b.Frames), -1
	segments := d.places(b)
	for n := 0; n+segments <= len(d.grid) && len(b.Frames)+segments <= BatchFrames && d.file.Readable(); {
		got, err := d.tun.Read(d.grid[n:n+segments], d.sizes[:segments], tunOffset)
		if err != nil {
			if err = libraryError(err); err == ErrClosed && len(b.Frames) == 0 {
				d.lost.Store(true)
				return ErrClosed
			}
			d.st.drop(dropMalformed) // the library has no use for it
			break
		}
		if got > 1 {
			cut = len(b.Frames)
		}
		for i, size := range d.sizes[:got] {
			if size > d.gap-tunOffset {
				d.st.drop(dropMalformed) // longer than the MTU: who changed that one?
				continue
			}
			b.Frames = append(b.Frames, FrameAt(d.grid[n+i], etherLen+size))
		}
		n += got
		if got > 1 {
			break // a super-frame is sent at once
		}
	}
	if len(b.Frames) == 0 && d.closed.Load() {
		return ErrClosed
	}
	if cut < 0 {
		d.address(b, own)
		return nil
	}
	segs := b.Frames[cut:]
	b.Frames = b.Frames[:cut]
	d.address(b, own)
	first := len(b.Frames)
	b.Frames = append(b.Frames, segs...)
	d.address(b, first)
	d.whole.merge(b, first)
	return nil
}

// places divides a Batch's memory, and returns how many places a read needs.
func (d *tunDevice) places(b *Batch) int {
	if b.wide == nil {
		b.wide = make([]byte, tunBytes)
	}
	segments, gap := tunSegmentsAt(d.MTU())
	if d.of == &b.wide[0] && d.gap == gap {
		return segments
	}
	d.of, d.gap = &b.wide[0], gap
	d.grid = d.grid[:0]
	for at := 0; at+tunTail <= len(b.wide) && len(d.grid) < BatchFrames; at += gap {
		d.grid = append(d.grid, b.wide[at:at+gap])
	}
	return segments
}

// address has the station address the packets in b behind the first of the frames,
// which are addressed; those that have to wait are taken out.
func (d *tunDevice) address(b *Batch, first int) {
	if len(b.Frames) == first {
		return
	}
	now := time.Now()
	kept := b.Frames[:first]
	d.st.mu.Lock()
	for _, f := range b.Frames[first:] {
		if d.st.address(f.B, now) {
			kept = append(kept, f)
		}
	}
	d.st.mu.Unlock()
	b.Frames = kept
}

// libraryError is ErrClosed where the device is gone.
func libraryError(err error) error {
	var errno unix.Errno
	switch {
	case errors.Is(err, fs.ErrClosed), errors.Is(err, unix.EBADFD), errors.Is(err, unix.EFAULT):
		return ErrClosed
	case errors.As(err, &errno):
		return errno
	case errors.As(err, new(*fs.PathError)), errors.Is(err, io.EOF):
		return ErrClosed // the poller refuses a descriptor that has only errors left
	}
	return err // of a packet
}

// EachDrop calls f for each reason why a layer 3 device has passed something on no
// further, with what dev counted: nothing if it is of another driver, or nil.
func EachDrop(dev Device, f func(name string, count uint64)) {
	d, _ := dev.(*tunDevice)
	for i, name := range stationDropNames {
		count := uint64(0)
		if d != nil {
			count = d.st.drops[i].Load()
		}
		f(name, count)
	}
}
