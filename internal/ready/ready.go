// Package ready waits until a descriptor can be read.
//
// A File that was busy a moment ago waits in ppoll(2) with a bound, which wakes
// faster than the runtime's poller, or rests; an idle one parks its goroutine
// there and costs nothing. The runtime's poller hears of a File only while it is
// parked. It does not read or write.
package ready

import (
	"fmt"
	"io"
	"os"
	"runtime"
	"sync/atomic"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// File is a non-blocking descriptor. Control is safe for concurrent use; Wait
// belongs to one worker.
type File struct {
	d      descriptor
	bell   *bell
	hot    time.Time // until when Wait polls
	parked bool      // the last waitCold did not find something at once
	spin   func(fd uintptr)
	look   func(fd uintptr)
	park   func(fd uintptr) bool
	found  int16 // the last poll's events
}

const (
	// hotFor is how long after it last found something Wait still polls.
	hotFor = 2 * time.Millisecond
	// pollBound is the longest single ppoll: a stop-the-world may wait that long.
	pollBound = 200 * time.Microsecond
)

// New takes over fd, which epoll(7) must be able to watch (a TAP: only after
// TUNSETIFF); after an error fd is closed. name appears in errors.
func New(fd int, name string) (*File, error) {
	if err := unix.SetNonblock(fd, true); err != nil {
		_ = unix.Close(fd)
		return nil, fmt.Errorf("ready: %s: fcntl: %w", name, err)
	}
	d := &unwatched{fd: fd}
	f, err := newFile(d)
	if err != nil {
		_ = d.Close()
		return nil, fmt.Errorf("ready: %s: %w", name, err)
	}
	return f, nil
}

// FromFile takes over an os.File whose descriptor is non-blocking; after an
// error it is still the caller's. Reads through file and Wait belong to the
// same worker.
func FromFile(file *os.File) (*File, error) {
	raw, err := file.SyscallConn()
	if err != nil {
		return nil, err
	}
	f, err := newFile(struct {
		syscall.RawConn
		io.Closer
	}{raw, file})
	if err != nil {
		return nil, fmt.Errorf("ready: %s: %w", file.Name(), err)
	}
	return f, nil
}

func newFile(d descriptor) (*File, error) {
	b, err := newBell(d)
	if err != nil {
		return nil, err
	}
	f := &File{d: d, bell: b}
	// Made once: a closure per call would allocate.
	f.spin = func(fd uintptr) { f.found = poll(fd, pollBound) }
	f.look = func(fd uintptr) { f.found = poll(fd, 0) }
	f.park = func(uintptr) bool {
		if f.d.Control(f.look) != nil {
			return true // closed
		}
		f.parked = f.parked || f.found == 0
		return f.found != 0
	}
	return f, nil
}

// Control calls fn with the descriptor, which stays open until fn returns. The
// error is os.ErrClosed after Close. fn must not block without bound, nor use f.
func (f *File) Control(fn func(fd uintptr)) error {
	if f.d.Control(fn) != nil { // internal/poll has an error of its own for this
		return os.ErrClosed
	}
	return nil
}

// Wait blocks until a read would not block, be it for data, an error or a
// hang-up. The error is os.ErrClosed after Close.
func (f *File) Wait() error {
	if found, err := f.waitHot(); found || err != nil {
		return err
	}
	return f.waitCold()
}

// waitCold parks the goroutine in the runtime's poller, unless there is
// something already.
func (f *File) waitCold() error {
	if f.d.Control(f.look) != nil {
		return os.ErrClosed
	}
	f.parked = false
	for f.found == 0 {
		// Armed first, then looked at once more: what comes in between rings.
		if f.bell.arm() == nil {
			err := f.bell.raw.Read(f.park)
			if f.bell.disarm() != nil || err != nil {
				return os.ErrClosed
			}
			continue
		}
		// The kernel has no room for it (epoll(7), max_user_watches).
		f.parked = true
		time.Sleep(hotFor)
		if f.d.Control(f.look) != nil {
			return os.ErrClosed
		}
	}
	f.hot = time.Now().Add(hotFor)
	if f.parked {
		go wake()
	}
	return nil
}

// waitHot polls until f has been idle for hotFor.
func (f *File) waitHot() (found bool, err error) {
	now := time.Now()
	if !now.Before(f.hot) {
		return false, nil
	}
	defer spinning.Add(-1)
	if spinning.Add(1) > maxSpinning() {
		return false, nil
	}
	for ; now.Before(f.hot); now = time.Now() {
		if f.d.Control(f.spin) != nil {
			return false, os.ErrClosed
		}
		if f.found != 0 {
			f.hot = now.Add(hotFor)
			return true, nil
		}
	}
	return false, nil
}

// Rest sleeps for d, but for pollBound at most, and not at all where Wait would park,
// for want of a processor: what comes meanwhile wakes nobody. Like Wait it belongs to
// the worker.
func (f *File) Rest(d time.Duration) {
	if spinning.Add(1) <= maxSpinning() {
		ts := unix.NsecToTimespec(int64(min(d, pollBound)))
		// Raw, as in poll. A signal ends it, which is as well.
		_, _, _ = unix.RawSyscall(unix.SYS_NANOSLEEP, uintptr(unsafe.Pointer(&ts)), 0, 0)
	}
	spinning.Add(-1)
}

// Yield lets another thread that waits for this one's processor (a CPU) have it, if there is
// one (sched_yield(2)).
func Yield() {
	// Raw: who waits mostly belongs to another process, and the scheduler of this one need not know.
	_, _, _ = unix.RawSyscall(unix.SYS_SCHED_YIELD, 0, 0, 0)
}

// spinning counts the Files that poll or rest at this moment, in the whole process:
// each keeps a processor (a P) of the Go scheduler, of which there are few.
var spinning atomic.Int32

// maxSpinning leaves two of them to everything else: one to run what is ready,
// one to take up what the runtime's poller finds.
func maxSpinning() int32 { return int32(runtime.GOMAXPROCS(0)) - 2 }

// wake does nothing: starting it has the scheduler wake another thread, which
// finds nothing else to run and sits down in the runtime's poller. Without that
// the thread that has just left the poller would poll(2) for one File while
// nobody waits for all the others.
func wake() {}

// Readable reports whether a read would not block now; like Wait it belongs to
// the worker. After Close it is false.
func (f *File) Readable() bool { return f.d.Control(f.look) == nil && f.found != 0 }

// Failed reports whether the last Wait or Readable found an error or a hang-up
// and nothing to read: for a TAP, that the device is gone. (A socket with a
// message in its error queue reports it too.)
func (f *File) Failed() bool {
	return f.found&unix.POLLIN == 0 && f.found&(unix.POLLERR|unix.POLLHUP|unix.POLLNVAL) != 0
}

// Close closes the descriptor once no Control call uses it; Wait returns.
func (f *File) Close() error {
	err := f.d.Close()
	_ = f.bell.file.Close() // wakes a parked Wait
	return err
}

// poll returns the events of fd, waiting for at most d. An interrupted or
// failed poll counts as readable: the read will tell.
func poll(fd uintptr, d time.Duration) int16 {
	p := unix.PollFd{Fd: int32(fd), Events: unix.POLLIN}
	ts := unix.NsecToTimespec(int64(d))
	// Raw: a call that is bounded by pollBound need not tell the scheduler,
	// which saves the hand-over of the processor and the way back.
	n, _, errno := unix.RawSyscall6(unix.SYS_PPOLL, uintptr(unsafe.Pointer(&p)), 1, uintptr(unsafe.Pointer(&ts)), 0, 0, 0)
	switch {
	case errno != 0:
		return unix.POLLIN
	case n == 0:
		return 0
	}
	return p.Revents
}
