package tap

import (
	"errors"
	"fmt"
	"os"
	"reflect"
	"runtime"
	"syscall"
	"time"
	"unsafe"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// The functions in this file open descriptors in namespaces that only the owner of
// their user namespace may enter: those of rootless containers.
//
// A thread of this process cannot enter a user namespace: setns(2) refuses it to who
// shares its process with other threads. A child can. It has a copy of this
// process's memory and shares its descriptors (CLONE_FILES), so it enters both
// namespaces, opens what is wanted, and ends; the descriptors are this process's. That
// suffices: who owns a user namespace has, from outside, every capability in it, and
// so may ask for more through such a descriptor: netlink changes the other namespace,
// TUNSETIFF makes a device there.

// errNewNamespaces: this user may make none.
var errNewNamespaces = errors.New("make a user and a network namespace")

// opening is what is opened in a namespace: a file, or if path is empty a socket.
type opening struct {
	path  string
	flags int

	domain, kind, proto int
}

var (
	openTunFile = opening{path: tunPath, flags: unix.O_RDWR | unix.O_NONBLOCK | unix.O_CLOEXEC}
	routeSocket = opening{domain: unix.AF_NETLINK, kind: unix.SOCK_RAW | unix.SOCK_CLOEXEC | unix.SOCK_NONBLOCK, proto: unix.NETLINK_ROUTE}
)

// here opens it in the thread's namespace.
func (o opening) here() (int, error) {
	if o.path != "" {
		return unix.Open(o.path, o.flags, 0)
	}
	return unix.Socket(o.domain, o.kind, o.proto)
}

// errEnter: this process may not enter the namespace.
var errEnter = errors.New("enter it (it takes CAP_SYS_ADMIN, or it has to be in a user namespace of this user's own, as a rootless container's is)")

// openIn opens something in ns, on a thread that may enter it, or as its owner.
func openIn(ns netns.NsHandle, o opening) (fd int, err error) {
	fd = -1
	err = inNamespace(ns, func() (e error) {
		fd, e = o.here()
		return e
	})
	if !errors.Is(err, errEnter) || !errors.Is(err, unix.EPERM) {
		return fd, err
	}
	user, e := unix.IoctlRetInt(int(ns), unix.NS_GET_USERNS)
	if e != nil {
		return -1, err // it is no descendant of this process's own
	}
	defer unix.Close(user)
	fd, e = openAsChild(0, user, int(ns), o)
	if errors.Is(e, errEnter) {
		return -1, err // EINVAL from the child: it is this process's own user namespace
	}
	return fd, e
}

// openNew opens something in a user and a network namespace that are made for it and
// last as long as the descriptor.
func openNew(o opening) (fd int, err error) {
	return openAsChild(unix.CLONE_NEWUSER|unix.CLONE_NEWNET, -1, -1, o)
}

// step is a system call of the child.
type step struct{ trap, a1, a2, a3 uintptr }

// outcome is how far the child came: it is in memory that both have.
type outcome struct {
	done  uintptr // steps
	errno uintptr // of the step after them
	fd    uintptr // what the last step returned
}

// openAsChild opens something in the namespaces of two descriptors, or, with flags of
// clone(2), in new ones.
func openAsChild(flags uintptr, user, net int, o opening) (int, error) {
	shared, err := unix.Mmap(-1, 0, os.Getpagesize(), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_ANONYMOUS)
	if err != nil {
		return -1, fmt.Errorf("memory for a child: %w", err)
	}
	defer func() { _ = unix.Munmap(shared) }()
	out := (*outcome)(unsafe.Pointer(&shared[0]))
	var steps [3]step
	list := steps[:0]
	if user >= 0 {
		list = append(list,
			step{unix.SYS_SETNS, uintptr(user), unix.CLONE_NEWUSER, 0},
			step{unix.SYS_SETNS, uintptr(net), unix.CLONE_NEWNET, 0})
	}
	last := step{unix.SYS_SOCKET, uintptr(o.domain), uintptr(o.kind), uintptr(o.proto)}
	var path *byte
	if o.path != "" {
		if path, err = unix.BytePtrFromString(o.path); err != nil {
			return -1, err
		}
		at := unix.AT_FDCWD
		last = step{unix.SYS_OPENAT, uintptr(at), uintptr(unsafe.Pointer(path)), uintptr(o.flags)}
	}
	list = append(list, last)
	err = runChild(flags, list, out)
	runtime.KeepAlive(path)
	switch {
	case err != nil && flags != 0:
		return -1, fmt.Errorf("%w: %w", errNewNamespaces, err)
	case err != nil:
		return -1, fmt.Errorf("start a child: %w", err)
	case int(out.done) == len(list):
		return int(out.fd), nil
	case out.errno == 0:
		return -1, errors.New("the child that opens it was killed")
	case int(out.done) == len(list)-1:
		return -1, syscall.Errno(out.errno)
	}
	return -1, fmt.Errorf("%w: %w", errEnter, syscall.Errno(out.errno))
}

// runChild has a child make the system calls, and waits for its end.
func runChild(flags uintptr, list []step, out *outcome) error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	// No signal may reach the child: the runtime's handlers are there for this process.
	var all, was unix.Sigset_t
	for i := range all.Val {
		all.Val[i] = ^all.Val[i]
	}
	if err := unix.PthreadSigmask(unix.SIG_SETMASK, &all, &was); err != nil {
		return err
	}
	pid, errno := fork(flags|unix.CLONE_FILES|uintptr(unix.SIGCHLD), &list[0], uintptr(len(list)), out)
	if err := unix.PthreadSigmask(unix.SIG_SETMASK, &was, nil); err != nil {
		return err // which cannot be
	}
	if errno != 0 {
		return errno
	}
	for {
		if _, err := unix.Wait4(int(pid), nil, unix.WALL, nil); err != unix.EINTR {
			return err
		}
	}
}

// fork starts the child. In it nothing of the runtime works but this function, which
// therefore calls no other, allocates nothing, and needs no more stack.
//
//go:nosplit
//go:norace
func fork(flags uintptr, list *step, n uintptr, out *outcome) (pid uintptr, errno syscall.Errno) {
	pid, _, errno = syscall.RawSyscall6(unix.SYS_CLONE, flags, 0, 0, 0, 0, 0)
	if errno != 0 || pid != 0 {
		return pid, errno
	}
	for i := uintptr(0); i < n; i++ {
		s := (*step)(unsafe.Add(unsafe.Pointer(list), i*unsafe.Sizeof(step{})))
		r, _, e := syscall.RawSyscall6(s.trap, s.a1, s.a2, s.a3, 0, 0, 0)
		if e != 0 {
			out.errno = uintptr(e)
			break
		}
		out.fd = r
		out.done = i + 1
	}
	for {
		_, _, _ = syscall.RawSyscall6(unix.SYS_EXIT_GROUP, 0, 0, 0, 0, 0, 0)
	}
}

// handleTimeout bounds the wait for an answer, which the kernel gives at once.
const handleTimeout = 5 * time.Second

// handleOn returns a handle that uses the netlink socket fd, and closes it. The library
// makes its sockets itself; the descriptor of the one that it made becomes another
// for fd.
func handleOn(fd int) (*netlink.Handle, error) {
	defer unix.Close(fd)
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return nil, err
	}
	own, ok := socketOf(h)
	if !ok {
		h.Close()
		return nil, errors.New("this netlink library hides its socket")
	}
	// The runtime's poller knows the old socket only, so a wait ends by its timeout.
	err = errors.Join(unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}), unix.Dup3(fd, own, unix.O_CLOEXEC), h.SetSocketTimeout(handleTimeout))
	if err != nil {
		h.Close()
		return nil, err
	}
	return h, nil
}

// socketOf returns the descriptor of a handle's socket.
func socketOf(h *netlink.Handle) (fd int, ok bool) {
	v := reflect.ValueOf(h).Elem().FieldByName("sockets")
	if v.Kind() != reflect.Map || v.Type().Key().Kind() != reflect.Int {
		return -1, false
	}
	v = v.MapIndex(reflect.ValueOf(unix.NETLINK_ROUTE))
	for _, field := range []string{"Socket", "fd"} {
		if v.Kind() != reflect.Pointer || v.Elem().Kind() != reflect.Struct {
			return -1, false
		}
		v = v.Elem().FieldByName(field)
	}
	if !v.IsValid() || !v.CanInt() {
		return -1, false
	}
	return int(v.Int()), true
}
