package tap

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"runtime"
	"strings"

	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// Namespace identifies a network namespace for as long as the machine is up. The
// kernel gives the inode of one that has ended to the next, so a path that leads
// to the same inode proves nothing: the cookie (Linux 5.14) is never given again.
// Before 5.14 it is 0, and only device and inode are compared.
type Namespace struct {
	Boot   string `json:"boot"` // of the kernel's random/boot_id
	Device uint64 `json:"device"`
	Inode  uint64 `json:"inode"`
	Cookie uint64 `json:"cookie,omitempty"`
}

const bootID = "/proc/sys/kernel/random/boot_id"

// ErrNoNamespace: what is at the path is no network namespace, or nothing.
var ErrNoNamespace = errors.New("no network namespace")

// NamespaceAt returns the identity of the namespace at path. It keeps nothing open.
// The error is ErrNoNamespace, and fs.ErrNotExist where there is nothing.
func NamespaceAt(path string) (Namespace, error) {
	// Not blocking: the path may be that of a pipe.
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	switch {
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ENOTDIR), errors.Is(err, unix.ESRCH), errors.Is(err, unix.EINVAL):
		return Namespace{}, fmt.Errorf("%w at %s: %w", ErrNoNamespace, path, fs.ErrNotExist)
	case err != nil:
		return Namespace{}, fmt.Errorf("open network namespace %s: %w", path, err)
	}
	defer unix.Close(fd)
	if !isNetwork(fd) {
		return Namespace{}, fmt.Errorf("%w at %s, but something else", ErrNoNamespace, path)
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return Namespace{}, fmt.Errorf("network namespace %s: %w", path, err)
	}
	boot, err := os.ReadFile(bootID)
	if err != nil {
		return Namespace{}, fmt.Errorf("network namespace %s: %w", path, err)
	}
	cookie, err := cookieOf(netns.NsHandle(fd))
	if err != nil {
		return Namespace{}, fmt.Errorf("network namespace %s: %w", path, err)
	}
	return Namespace{Boot: strings.TrimSpace(string(boot)), Device: st.Dev, Inode: st.Ino, Cookie: cookie}, nil
}

// isNetwork reports whether fd is a network namespace; an emulated kernel may tell
// no more than that it is one of some kind.
func isNetwork(fd int) bool {
	var fs unix.Statfs_t
	if unix.Fstatfs(fd, &fs) != nil || int64(fs.Type) != unix.NSFS_MAGIC {
		return false
	}
	kind, err := unix.IoctlRetInt(fd, unix.NS_GET_NSTYPE)
	return err != nil || kind == unix.CLONE_NEWNET
}

// OwnNamespace returns the identity of the caller's namespace.
func OwnNamespace() (Namespace, error) { return NamespaceAt("/proc/self/ns/net") }

// cookieOf returns what SO_NETNS_COOKIE says in ns; 0 before Linux 5.14.
func cookieOf(ns netns.NsHandle) (cookie uint64, err error) {
	fd, err := openIn(ns, opening{domain: unix.AF_UNIX, kind: unix.SOCK_DGRAM | unix.SOCK_CLOEXEC})
	if err != nil {
		return 0, fmt.Errorf("a socket in it: %w", err)
	}
	defer unix.Close(fd)
	cookie, err = unix.GetsockoptUint64(fd, unix.SOL_SOCKET, unix.SO_NETNS_COOKIE)
	if errors.Is(err, unix.ENOPROTOOPT) {
		return 0, nil
	}
	return cookie, err
}

// inNamespace calls f on a thread that is in ns. One that cannot return is given up.
func inNamespace(ns netns.NsHandle, f func() error) (err error) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread()
		home, e := netns.Get()
		if e != nil {
			err = fmt.Errorf("own network namespace: %w", e)
			runtime.UnlockOSThread()
			return
		}
		defer home.Close()
		if !home.Equal(ns) {
			if e := netns.Set(ns); e != nil {
				err = fmt.Errorf("%w: %w", errEnter, e)
				runtime.UnlockOSThread()
				return
			}
		}
		err = f()
		if home.Equal(ns) || netns.Set(home) == nil {
			runtime.UnlockOSThread()
		} // else the thread ends with this goroutine
	}()
	<-done
	return err
}
