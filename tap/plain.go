package tap

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"sync/atomic"

	"github.com/songgao/water"
	"golang.org/x/sys/unix"

	"github.com/tulle-net/tulle/ether"
	"github.com/tulle-net/tulle/internal/ready"
)

// plainDevice is the driver on songgao/water: a frame a call, every frame
// finished. It has one queue, itself.
type plainDevice struct {
	link
	tun     *water.Interface
	cutters cutters
	closed  atomic.Bool
}

var (
	_ Device = (*plainDevice)(nil)
	_ Queue  = (*plainDevice)(nil)
)

func openPlain(cfg Config) (Device, error) {
	// water takes over a device of the name without asking, and it loses its
	// descriptor when it fails. So it gets a name that nobody else has, and
	// only when making a device is known to work.
	name := temporaryName()
	if err := tryTap(name); err != nil {
		return nil, err
	}
	wc := water.Config{DeviceType: water.TAP}
	wc.Name = name
	tun, err := water.New(wc)
	if err != nil {
		return nil, explainCreate(err)
	}
	d := &plainDevice{tun: tun}
	d.link.name = cfg.Name
	if err := d.setUpAll(cfg); err != nil {
		_ = d.Close()
		return nil, err
	}
	return d, nil
}

// tryTap makes a device and removes it.
func tryTap(name string) error {
	fd, err := openTun()
	if err != nil {
		return err
	}
	err = attachTo(fd, name, unix.IFF_TAP|unix.IFF_NO_PI|unix.IFF_TUN_EXCL)
	_ = unix.Close(fd)
	return err
}

func (d *plainDevice) setUpAll(cfg Config) error {
	file, ok := d.tun.ReadWriteCloser.(*os.File)
	if !ok {
		return fmt.Errorf("water's device is a %T, not a file", d.tun.ReadWriteCloser)
	}
	var err error
	if d.link.file, err = ready.FromFile(file); err != nil {
		return err
	}
	if err := d.link.file.Control(func(fd uintptr) { unix.CloseOnExec(int(fd)) }); err != nil {
		return ErrClosed
	}
	if err := d.move(cfg); err != nil {
		return err
	}
	return d.setUp(cfg)
}

func (d *plainDevice) Queues() []Queue { return []Queue{d} }

func (d *plainDevice) Offloads() Offloads {
	const none = "the plain driver has none"
	return Offloads{Driver: DriverPlain, Checksum: none, TSO4: none, TSO6: none, USO: none, GRO: none}
}

// SetOffload changes nothing: everything is off.
func (d *plainDevice) SetOffload(_, _, _ bool) error { return nil }

// Close removes the device.
func (d *plainDevice) Close() error {
	if d.closed.Swap(true) {
		return nil
	}
	var c io.Closer = d.tun
	if d.file != nil {
		c = d.file // closes the same descriptor, and wakes who waits
	}
	if err := c.Close(); err != nil {
		return fmt.Errorf("tap: close %s: %w", d.name, err)
	}
	return nil
}

func (d *plainDevice) Wait() error {
	if d.file.Wait() != nil || d.file.Failed() {
		return ErrClosed
	}
	return nil
}

// plainRoom is the room that a read needs, whatever comes.
const plainRoom = Headroom + ether.MaxFrame

// Read returns the frames that wait. It is this device's only reader, so what
// poll promised is still there for water, which would block.
func (d *plainDevice) Read(b *Batch) error {
	b.Frames = b.Frames[:0]
	for off := 0; len(b.Frames) < BatchFrames && len(b.buf)-off >= plainRoom && d.file.Readable(); {
		in := b.buf[off : off+plainRoom]
		n, err := d.tun.Read(in[Headroom:])
		if err != nil {
			if len(b.Frames) > 0 {
				return nil // the next Read tells
			}
			return plainError(err)
		}
		b.Frames = append(b.Frames, FrameAt(in, n))
		off += (Headroom + n + 63) &^ 63
	}
	if len(b.Frames) == 0 && d.closed.Load() {
		return ErrClosed
	}
	return nil
}

func (d *plainDevice) WriteFrame(m ether.Meta, parts [][]byte) error {
	return d.cutters.cut(m, parts, d)
}

func (d *plainDevice) writeFinished(frame []byte) error {
	if _, err := d.tun.Write(frame); err != nil {
		return plainError(err)
	}
	return nil
}

// plainError strips what os.File adds to an error.
func plainError(err error) error {
	var errno unix.Errno
	switch {
	case errors.Is(err, fs.ErrClosed), errors.Is(err, unix.EBADFD), errors.Is(err, unix.EFAULT):
		return ErrClosed
	case errors.As(err, &errno):
		return errno
	}
	return ErrClosed // the poller refuses a descriptor that has only errors left
}
