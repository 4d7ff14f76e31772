package tap

import (
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/tulle-net/tulle/ether"
	"github.com/tulle-net/tulle/internal/ready"
)

// offloadDevice is the driver that passes super-frames whole.
type offloadDevice struct {
	link
	files   []*ready.File // one a queue
	queues  []Queue
	log     *slog.Logger
	writers sync.Pool // of *writer
	cutters cutters
	state   offloadState
	// whole has a bit (1 << ether.GSO) for each kind of super-frame that the
	// kernel takes; WriteFrame cuts the others.
	whole  atomic.Uint32
	closed atomic.Bool
	kept   kept
}

// offloadQueue is one descriptor of an offloadDevice.
type offloadQueue struct {
	dev  *offloadDevice
	file *ready.File
	fill func(fd uintptr) // read, made once
	b    *Batch           // of the Read that runs
	err  error            // what ended it
}

var (
	_ Lasting = (*offloadDevice)(nil)
	_ Queue   = (*offloadQueue)(nil)
)

const (
	// maxParts is the most parts that a frame is gathered from without a copy.
	maxParts = 130
	// frameRoom is the room that a read needs, whatever comes.
	frameRoom = virtioLen + ether.MaxFrame
	// bigFrame: an ordinary frame longer than this ends the batch as well.
	bigFrame = 4096
)

// errInvalid: what was to be written is no frame (EINVAL).
var errInvalid error = unix.EINVAL

func openOffload(cfg Config) (Device, error) {
	name := cfg.Name
	if cfg.Netns != "" && !cfg.Inside {
		name = temporaryName() // the wanted one may be in use here
	}
	flags := uint16(unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
	if cfg.Queues > 1 {
		flags |= unix.IFF_MULTI_QUEUE
	}
	d := newOffloadDevice(cfg)
	if cfg.Inside {
		ns, err := openNetns(cfg.Netns)
		if err != nil {
			return nil, err
		}
		defer ns.Close()
		d.kept.inside, d.kept.pinned = &ns, true
	}
	err := d.setUpAll(cfg, name, flags)
	d.kept.inside = nil
	if err != nil {
		_ = d.Close()
		return nil, err
	}
	return d, nil
}

// setUpAll makes the device with all queues and brings it up where it belongs.
// The other queues come after the self-test, which reads the first one, and
// before the move: a queue is attached by name, in this namespace.
func (d *offloadDevice) setUpAll(cfg Config, name string, flags uint16) error {
	if err := d.attach(name, flags|unix.IFF_TUN_EXCL); err != nil {
		return err
	}
	d.link.file = d.files[0]
	d.link.name = cfg.Name
	if err := d.negotiate(cfg); err != nil {
		return err
	}
	if err := d.selfTest(); err != nil {
		return err
	}
	if cfg.Queues > 1 {
		if err := d.attachOthers(cfg.Queues-1, name, flags); err != nil {
			return err
		}
	}
	if err := d.move(cfg); err != nil {
		return err
	}
	if err := d.setUp(cfg); err != nil {
		return err
	}
	return d.setAlias(cfg.Alias)
}

// attachOthers adds n queues. Where the kernel lets no program choose among them
// the device keeps one: by its own choice flows would be reordered.
func (d *offloadDevice) attachOthers(n int, name string, flags uint16) error {
	var err error
	if d.files[0].Control(func(fd uintptr) { err = steer(int(fd)) }) != nil {
		return ErrClosed
	}
	if err != nil {
		d.log.Warn("one queue instead of several: the kernel takes no program to choose by (it needs CAP_BPF)", "port", d.name, "err", err)
		return nil
	}
	for range n {
		if err := d.attach(name, flags); err != nil {
			return err
		}
	}
	return nil
}

// attach adds a queue to the device of that name, which it makes if flags has
// IFF_TUN_EXCL.
func (d *offloadDevice) attach(name string, flags uint16) error {
	fd, err := d.openTun()
	if err != nil {
		return err
	}
	if err := attachTo(fd, name, flags); err != nil {
		_ = unix.Close(fd)
		return err
	}
	return d.addQueue(fd)
}

// addQueue takes over the descriptor of a queue; after an error it is closed.
func (d *offloadDevice) addQueue(fd int) error {
	// Only now: the runtime's poller takes a descriptor without a device for broken.
	file, err := ready.New(fd, tunPath)
	if err != nil {
		return err
	}
	d.files = append(d.files, file)
	d.queues = append(d.queues, newOffloadQueue(d, file))
	return nil
}

func newOffloadQueue(d *offloadDevice, file *ready.File) *offloadQueue {
	q := &offloadQueue{dev: d, file: file}
	q.fill = q.read
	return q
}

// attachTo makes fd a queue of the device.
func attachTo(fd int, name string, flags uint16) error {
	req, err := unix.NewIfreq(name)
	if err != nil {
		return err
	}
	req.SetUint16(flags)
	err = unix.IoctlIfreq(fd, unix.TUNSETIFF, req)
	if err == unix.EINVAL && flags&unix.IFF_VNET_HDR != 0 {
		return &refusedError{"IFF_VNET_HDR (TUNSETIFF)", err}
	}
	if err != nil {
		return explainCreate(err)
	}
	if flags&unix.IFF_VNET_HDR == 0 {
		return nil
	}
	if err := unix.IoctlSetPointerInt(fd, unix.TUNSETVNETHDRSZ, virtioLen); err != nil {
		return &refusedError{"a virtio header of 10 bytes (TUNSETVNETHDRSZ)", err}
	}
	return nil
}

func (d *offloadDevice) Queues() []Queue { return d.queues }

// Close removes the device: it goes with its last queue, unless it is persistent.
func (d *offloadDevice) Close() error {
	if d.closed.Swap(true) {
		return nil
	}
	d.mu.Lock()
	d.letGo()
	d.mu.Unlock()
	first := d.endPersistence()
	for _, f := range d.files {
		if err := f.Close(); err != nil && first == nil {
			first = fmt.Errorf("tap: close %s: %w", d.name, err)
		}
	}
	return first
}

func (q *offloadQueue) Wait() error {
	if q.file.Wait() != nil || q.file.Failed() {
		return ErrClosed
	}
	return nil
}

func (q *offloadQueue) Read(b *Batch) error {
	b.Frames = b.Frames[:0]
	if err := q.err; err != nil {
		if err != ErrClosed {
			q.err = nil // told now; the next Read goes on
		}
		return err
	}
	q.b = b
	err := q.file.Control(q.fill)
	q.b = nil
	if err != nil {
		return ErrClosed
	}
	if len(b.Frames) == 0 && q.err != nil {
		err = q.err
		if err != ErrClosed {
			q.err = nil
		}
	}
	return err
}

// read fills q.b, a read(2) a frame. It stops at a super-frame, which is sent
// at once, and where the next frame might not fit.
func (q *offloadQueue) read(fd uintptr) {
	b, buf := q.b, q.b.buf
	for off := 0; len(b.Frames) < BatchFrames && len(buf)-off >= frameRoom; {
		in := buf[off : off+frameRoom]
		// Raw: the descriptor is non-blocking, so the scheduler need not know.
		n, _, errno := unix.RawSyscall(unix.SYS_READ, fd, uintptr(unsafe.Pointer(&in[0])), frameRoom)
		switch {
		case errno == unix.EAGAIN:
			return
		case errno == unix.EINTR:
			continue
		case errno == unix.EBADFD, errno == unix.EFAULT: // its namespace ended
			q.err = ErrClosed
			return
		case errno != 0:
			q.err = errno
			return
		case n < virtioLen:
			q.err = errHeader
			return
		}
		frame := in[virtioLen:n:n]
		m, err := decodeVirtio(in, frame)
		if err != nil {
			q.err = err
			return
		}
		f := FrameAt(in[virtioLen-Headroom:], len(frame)) // the header is read
		f.Meta = m
		b.Frames = append(b.Frames, f)
		if m.GSO != ether.GSONone || len(frame) > bigFrame {
			return
		}
		off += (int(n) + 63) &^ 63 // the next one starts a cache line
	}
}

func (q *offloadQueue) WriteFrame(m ether.Meta, parts [][]byte) error {
	if m.GSO != ether.GSONone && q.dev.whole.Load()&(1<<m.GSO) == 0 {
		return q.cut(m, parts)
	}
	if len(parts) > maxParts {
		return q.joined(m, parts)
	}
	err := q.write(m, parts)
	if err == errInvalid && m.GSO != ether.GSONone {
		return q.refused(m, parts)
	}
	return err
}

// writer is what one WriteFrame needs: it is pooled because a closure cannot
// take arguments without allocating.
type writer struct {
	hdr      [virtioLen]byte
	iov      [1 + maxParts]unix.Iovec
	n        int // used in iov
	lenBytes int // of the frame
	errno    syscall.Errno
	call     func(fd uintptr)
}

func newWriter() *writer {
	w := new(writer)
	w.call = func(fd uintptr) {
		// Raw: a write to a TAP runs the kernel's receive path and does not block.
		_, _, w.errno = unix.RawSyscall(unix.SYS_WRITEV, fd, uintptr(unsafe.Pointer(&w.iov[0])), uintptr(w.n))
	}
	return w
}

// begin starts a frame.
func (w *writer) begin(m ether.Meta) {
	encodeVirtio(w.hdr[:], m)
	w.iov[0].Base = &w.hdr[0]
	w.iov[0].SetLen(virtioLen)
	w.n, w.lenBytes = 1, 0
}

// add appends a part, of at most maxParts.
func (w *writer) add(p []byte) {
	if len(p) == 0 {
		return
	}
	w.iov[w.n].Base = &p[0]
	w.iov[w.n].SetLen(len(p))
	w.n++
	w.lenBytes += len(p)
}

// write hands over the frame as it is, in up to maxParts parts.
func (q *offloadQueue) write(m ether.Meta, parts [][]byte) error {
	w := q.dev.writers.Get().(*writer)
	w.begin(m)
	for _, p := range parts {
		w.add(p)
	}
	return q.send(w)
}

// writeFinished writes a frame that needs nothing from the kernel.
func (q *offloadQueue) writeFinished(frame []byte) error {
	w := q.dev.writers.Get().(*writer)
	w.begin(ether.Meta{})
	w.add(frame)
	return q.send(w)
}

// send writes what w holds and gives w back.
func (q *offloadQueue) send(w *writer) error {
	if w.lenBytes > ether.MaxFrame {
		clear(w.iov[:w.n])
		q.dev.writers.Put(w)
		return errInvalid
	}
	err := q.file.Control(w.call)
	errno := w.errno
	clear(w.iov[:w.n]) // the parts are borrowed
	q.dev.writers.Put(w)
	switch {
	case err != nil, errno == unix.EBADFD:
		return ErrClosed
	case errno != 0:
		return errno
	}
	return nil
}

// joined writes a frame of too many parts.
func (q *offloadQueue) joined(m ether.Meta, parts [][]byte) error {
	k := q.dev.cutters.get()
	frame, err := k.join(parts)
	if err == nil {
		k.whole[0] = frame
		err = q.WriteFrame(m, k.whole[:])
	}
	q.dev.cutters.put(k)
	return err
}

// cut writes a super-frame as the frames that it stands for.
func (q *offloadQueue) cut(m ether.Meta, parts [][]byte) error {
	return q.dev.cutters.cut(m, parts, q)
}

// refused deals with a super-frame that the kernel finds invalid: either it
// is, or the kernel is one of those that refuse sound ones (6.1.103, 6.6.44,
// 6.10.3). A sound one tells. Whatever it is, this frame is cut.
func (q *offloadQueue) refused(m ether.Meta, parts [][]byte) error {
	if err := q.cut(m, parts); err != nil {
		return err
	}
	if err := q.probeWrite(m.GSO); err == errInvalid {
		q.dev.giveUpWhole(m.GSO, err)
	}
	return nil
}
