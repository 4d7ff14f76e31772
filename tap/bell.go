package tap

import (
	"encoding/binary"
	"errors"
	"os"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/tulle-net/tulle/internal/ready"
)

// bell wakes a worker that waits for a device, for something that is not in it.
type bell struct {
	fd     int // an eventfd
	rung   atomic.Bool
	closed bool
}

func newBell() (*bell, error) {
	fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		return nil, os.NewSyscallError("eventfd", err)
	}
	return &bell{fd: fd}, nil
}

// join returns what can be read when the device can, or when the bell rings.
func (b *bell) join(device *ready.File) (*ready.File, error) {
	epfd, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return nil, os.NewSyscallError("epoll_create1", err)
	}
	add := func(fd int) error {
		return os.NewSyscallError("epoll_ctl", unix.EpollCtl(epfd, unix.EPOLL_CTL_ADD, fd, &unix.EpollEvent{Events: unix.EPOLLIN}))
	}
	closed := device.Control(func(fd uintptr) { err = add(int(fd)) })
	if err = errors.Join(closed, err, add(b.fd)); err != nil {
		_ = unix.Close(epfd)
		return nil, err
	}
	return ready.New(epfd, "epoll")
}

// ring has the worker look.
func (b *bell) ring() {
	if b.closed || b.rung.Swap(true) {
		return
	}
	var one [8]byte
	binary.NativeEndian.PutUint64(one[:], 1)
	_, _ = unix.Write(b.fd, one[:])
}

// clear is for the worker, when it has looked.
func (b *bell) clear() {
	var count [8]byte
	_, _ = unix.Read(b.fd, count[:])
	b.rung.Store(false)
}

// close is for who knows that nobody rings any more.
func (b *bell) close() error {
	b.closed = true
	return unix.Close(b.fd)
}
