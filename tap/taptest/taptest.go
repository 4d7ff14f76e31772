// Package taptest is a TAP device in memory, for tests: the test plays the
// kernel.
//
//	Inject  test → Queue.Read         a frame as if the kernel had sent it
//	Next    Queue.WriteFrame → test   what was handed to the kernel
//
// It makes no system calls and starts no goroutine, waits on channels alone (so
// it works under testing/synctest), and passes super-frames whole, as the
// offload driver does.
package taptest

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"syscall"

	"github.com/tulle-net/tulle/ether"
	"github.com/tulle-net/tulle/tap"
)

// Depth is how many frames wait in each direction: for one queue's Read, and
// for Next. More are dropped, as by a kernel, and counted.
const Depth = 1024

// Device is a tap.Device in memory. Its methods are safe for concurrent use.
type Device struct {
	name    string
	mac     ether.MAC
	mtu     atomic.Int64
	queues  []tap.Queue
	written chan tap.Frame
	done    chan struct{}
	close   sync.Once
	dropped atomic.Uint64
	down    atomic.Bool

	mu       sync.Mutex
	offloads tap.Offloads
}

// queue is one queue of a Device.
type queue struct {
	dev  *Device
	in   chan tap.Frame
	held *tap.Frame // what Wait took from in
}

var (
	_ tap.Device = (*Device)(nil)
	_ tap.Queue  = (*queue)(nil)
)

// errFull: nobody takes what was written.
var errFull error = syscall.ENOBUFS

// errDown is what a TAP gives while its link is down.
var errDown error = syscall.EIO

// New returns a device of n queues (at least one) that is up.
func New(name string, mac ether.MAC, mtu, n int) *Device {
	d := &Device{
		name: name, mac: mac,
		written:  make(chan tap.Frame, Depth),
		done:     make(chan struct{}),
		offloads: tap.Offloads{Driver: "taptest", Checksum: "on", TSO4: "on", TSO6: "on", USO: "on", GRO: "on"},
	}
	d.mtu.Store(int64(mtu))
	for range max(n, 1) {
		d.queues = append(d.queues, &queue{dev: d, in: make(chan tap.Frame, Depth)})
	}
	return d
}

func (d *Device) Name() string        { return d.name }
func (d *Device) MAC() ether.MAC      { return d.mac }
func (d *Device) MTU() int            { return int(d.mtu.Load()) }
func (d *Device) Queues() []tap.Queue { return d.queues }

// Dropped returns how many frames found no room, in both directions.
func (d *Device) Dropped() uint64 { return d.dropped.Load() }

// Done is closed by Close.
func (d *Device) Done() <-chan struct{} { return d.done }

// SetMTU changes what MTU returns.
func (d *Device) SetMTU(bytes int) error {
	if bytes < 68 || bytes > 65535 {
		return fmt.Errorf("taptest: %s: MTU %d: choose 68 to 65535", d.name, bytes)
	}
	if d.isClosed() {
		return tap.ErrClosed
	}
	d.mtu.Store(int64(bytes))
	return nil
}

// SetDown takes the link down, or up again: WriteFrame is EIO while it is down.
func (d *Device) SetDown(down bool) { d.down.Store(down) }

// SetOffload changes what Offloads returns; frames pass as before.
func (d *Device) SetOffload(noTSO, noUSO, noGRO bool) error {
	state := func(off bool) string {
		if off {
			return "off"
		}
		return "on"
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.offloads.TSO4, d.offloads.TSO6 = state(noTSO), state(noTSO)
	d.offloads.USO, d.offloads.GRO = state(noUSO), state(noGRO)
	return nil
}

func (d *Device) Offloads() tap.Offloads {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.offloads
}

// Close ends the queues. Next still returns what was written before.
func (d *Device) Close() error {
	d.close.Do(func() { close(d.done) })
	return nil
}

func (d *Device) isClosed() bool {
	select {
	case <-d.done:
		return true
	default:
		return false
	}
}

// Inject has the first queue read a copy of frame. It is false if the frame
// was dropped: no room, or closed.
func (d *Device) Inject(frame []byte, m ether.Meta) bool { return d.InjectAt(0, frame, m) }

// InjectAt is Inject for one queue.
func (d *Device) InjectAt(n int, frame []byte, m ether.Meta) bool {
	if d.isClosed() || len(frame) > ether.MaxFrame {
		return false
	}
	select {
	case d.queues[n].(*queue).in <- tap.Frame{B: append([]byte(nil), frame...), Meta: m}:
		return true
	default:
		d.dropped.Add(1)
		return false
	}
}

// Next returns the next frame that was written, in one piece and the caller's
// own, without Head. It waits for one until ctx ends or the device is closed.
func (d *Device) Next(ctx context.Context) (tap.Frame, error) {
	if f, ok := d.TryNext(); ok {
		return f, nil
	}
	select {
	case f := <-d.written:
		return f, nil
	case <-d.done:
		if f, ok := d.TryNext(); ok {
			return f, nil
		}
		return tap.Frame{}, tap.ErrClosed
	case <-ctx.Done():
		return tap.Frame{}, fmt.Errorf("taptest: %s: no frame was written: %w", d.name, context.Cause(ctx))
	}
}

// TryNext is Next without waiting.
func (d *Device) TryNext() (tap.Frame, bool) {
	select {
	case f := <-d.written:
		return f, true
	default:
		return tap.Frame{}, false
	}
}

// Wait blocks until a frame was injected; it is ErrClosed after Close.
func (q *queue) Wait() error {
	if q.dev.isClosed() {
		return tap.ErrClosed
	}
	if q.held != nil {
		return nil
	}
	select {
	case f := <-q.in:
		q.held = &f
		return nil
	case <-q.dev.done:
		return tap.ErrClosed
	}
}

// Read batches as the offload driver does: a super-frame is the last. The
// headroom is full of what nobody wrote, as it is there.
func (q *queue) Read(b *tap.Batch) error {
	b.Frames = b.Frames[:0]
	if q.dev.isClosed() {
		return tap.ErrClosed
	}
	buf := b.Buffer()
	for off := 0; len(b.Frames) < tap.BatchFrames && len(buf)-off >= tap.Headroom+ether.MaxFrame; {
		f, ok := q.take()
		if !ok {
			return nil
		}
		for i := range tap.Headroom {
			buf[off+i] = 0xee
		}
		read := tap.FrameAt(buf[off:], copy(buf[off+tap.Headroom:], f.B))
		read.Meta = f.Meta
		b.Frames = append(b.Frames, read)
		if f.Meta.GSO != ether.GSONone {
			return nil
		}
		off += len(read.Head)
	}
	return nil
}

func (q *queue) take() (tap.Frame, bool) {
	if f := q.held; f != nil {
		q.held = nil
		return *f, true
	}
	select {
	case f := <-q.in:
		return f, true
	default:
		return tap.Frame{}, false
	}
}

// WriteFrame keeps a copy for Next.
func (q *queue) WriteFrame(m ether.Meta, parts [][]byte) error {
	d := q.dev
	if d.isClosed() {
		return tap.ErrClosed
	}
	if d.down.Load() {
		return errDown
	}
	var b []byte
	for _, p := range parts {
		b = append(b, p...)
	}
	if len(b) < 14 || len(b) > ether.MaxFrame {
		return syscall.EINVAL
	}
	select {
	case d.written <- tap.Frame{B: b, Meta: m}:
		return nil
	default:
		d.dropped.Add(1)
		return errFull
	}
}

// IsFull reports whether err is WriteFrame's for want of room.
func IsFull(err error) bool { return errors.Is(err, errFull) }
