package ready

import (
	"io"
	"os"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// descriptor lends a descriptor out; after Close, Control fails.
type descriptor interface {
	Control(fn func(fd uintptr)) error
	io.Closer
}

// unwatched is a descriptor of which the runtime's poller knows nothing. (An
// os.File that is non-blocking is always in it.)
type unwatched struct {
	mu sync.RWMutex // held for reading while fd is in use
	fd int          // -1 after Close
}

func (u *unwatched) Control(fn func(fd uintptr)) error {
	u.mu.RLock()
	if u.fd < 0 {
		u.mu.RUnlock()
		return os.ErrClosed
	}
	fn(uintptr(u.fd))
	u.mu.RUnlock()
	return nil
}

func (u *unwatched) Close() error {
	u.mu.Lock() // nobody uses fd any more
	fd := u.fd
	u.fd = -1
	u.mu.Unlock()
	if fd < 0 {
		return os.ErrClosed
	}
	return os.NewSyscallError("close", unix.Close(fd))
}

// bell is what the runtime's poller watches in place of a descriptor: an
// epoll(7) in which that descriptor is only while a worker is parked.
//
// The runtime's poller itself cannot look away for a while. It woke its thread
// for each datagram that a polling worker had long seen: a third to a half of a
// busy node's context switches. A descriptor that is in an epoll, without any
// event that counts, still has the kernel call that for each datagram.
type bell struct {
	file   *os.File
	raw    syscall.RawConn
	d      descriptor
	set    func(fd uintptr)   // does op with d's fd, made once
	change func(epfd uintptr) // set's inner half
	fd     int                // set's
	op     int
	event  unix.EpollEvent
	err    error
}

func newBell(d descriptor) (*bell, error) {
	epfd, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return nil, os.NewSyscallError("epoll_create1", err)
	}
	_ = unix.SetNonblock(epfd, true) // tells NewFile to have it watched
	b := &bell{file: os.NewFile(uintptr(epfd), "epoll"), d: d, event: unix.EpollEvent{Events: unix.EPOLLIN}}
	b.change = func(epfd uintptr) { b.err = unix.EpollCtl(int(epfd), b.op, b.fd, &b.event) }
	b.set = func(fd uintptr) {
		b.fd = int(fd)
		if err := b.raw.Control(b.change); err != nil {
			b.err = err
		}
	}
	if b.raw, err = b.file.SyscallConn(); err == nil {
		err = b.try()
	}
	if err != nil {
		_ = b.file.Close()
		return nil, err
	}
	return b, nil
}

// try reports whether an epoll can watch the descriptor at all.
func (b *bell) try() error {
	if err := b.arm(); err != nil {
		return err
	}
	return b.disarm()
}

// arm has the bell ring for what comes from now on.
func (b *bell) arm() error { return b.ctl(unix.EPOLL_CTL_ADD) }

// disarm silences the bell.
func (b *bell) disarm() error { return b.ctl(unix.EPOLL_CTL_DEL) }

func (b *bell) ctl(op int) error {
	b.op, b.err = op, nil
	if err := b.d.Control(b.set); err != nil {
		return err
	}
	return os.NewSyscallError("epoll_ctl", b.err)
}
