package lab

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

// netnsDir is where iproute2 looks for named namespaces.
const netnsDir = "/run/netns"

// makeNamespace names a namespace, which enter puts the calling thread into, and returns
// a locked descriptor of it. The lock, taken before the name shows, tells Sweep that the
// owner lives.
func makeNamespace(name string, home int, enter func() error) (path string, fd int, err error) {
	if err := shareNetnsDir(); err != nil {
		return "", -1, err
	}
	path = filepath.Join(netnsDir, name)
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_RDONLY, 0o444)
	if err != nil {
		return "", -1, err
	}
	f.Close()
	onThread(home, func() { fd, err = mountNamespace(path, enter) })
	if err != nil {
		os.Remove(path)
		return "", -1, err
	}
	return path, fd, nil
}

// newNamespace leaves the calling thread in a new namespace.
func newNamespace() error {
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		return fmt.Errorf("unshare: %w (it needs root and a kernel with network namespaces)", err)
	}
	return nil
}

// namespaceOf leaves the calling thread in the namespace of a process.
func namespaceOf(pid int) func() error {
	return func() error {
		fd, err := unix.Open(fmt.Sprintf("/proc/%d/ns/net", pid), unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			return fmt.Errorf("process %d: %w", pid, err)
		}
		defer unix.Close(fd)
		if err := unix.Setns(fd, unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("enter process %d: %w", pid, err)
		}
		return nil
	}
}

// mountNamespace leaves the calling thread in the namespace.
func mountNamespace(path string, enter func() error) (int, error) {
	if err := enter(); err != nil {
		return -1, err
	}
	self := fmt.Sprintf("/proc/self/task/%d/ns/net", unix.Gettid())
	fd, err := unix.Open(self, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, fmt.Errorf("open %s: %w", self, err)
	}
	if err = unix.Flock(fd, unix.LOCK_EX|unix.LOCK_NB); err == nil {
		err = unix.Mount(self, path, "", unix.MS_BIND, "")
	}
	if err != nil {
		unix.Close(fd)
		return -1, fmt.Errorf("mount %s: %w", path, err)
	}
	return fd, nil
}

// shareNetnsDir makes /run/netns a shared mount point as iproute2 does, so that
// a namespace that is removed in one mount namespace vanishes from all.
func shareNetnsDir() error {
	if err := os.MkdirAll(netnsDir, 0o755); err != nil {
		return err
	}
	// Several processes may come here at once; iproute2 takes this lock too.
	dir, err := os.Open(netnsDir)
	if err != nil {
		return err
	}
	defer dir.Close()
	if err := unix.Flock(int(dir.Fd()), unix.LOCK_EX); err != nil {
		return fmt.Errorf("lock %s: %w", netnsDir, err)
	}
	err = unix.Mount("", netnsDir, "none", unix.MS_SHARED|unix.MS_REC, "")
	if errors.Is(err, unix.EINVAL) { // not a mount point yet
		if err = unix.Mount(netnsDir, netnsDir, "none", unix.MS_BIND|unix.MS_REC, ""); err == nil {
			err = unix.Mount("", netnsDir, "none", unix.MS_SHARED|unix.MS_REC, "")
		}
	}
	if err != nil {
		return fmt.Errorf("share %s: %w", netnsDir, err)
	}
	return nil
}

func unmountNamespace(path string) error {
	if err := unix.Unmount(path, unix.MNT_DETACH); err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("unmount %s: %w", path, err)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}

// isNamespace tells a mounted namespace from the plain file below it.
func isNamespace(fd int) bool {
	var st unix.Statfs_t
	return unix.Fstatfs(fd, &st) == nil && int64(st.Type) == unix.NSFS_MAGIC
}

// killInside kills every process whose namespace fd is, but this one, and
// waits until they are gone.
func killInside(fd int) error {
	var ns unix.Stat_t
	if err := unix.Fstat(fd, &ns); err != nil {
		return err
	}
	inside := func() (pids []int) {
		for _, e := range readDir("/proc") {
			var st unix.Stat_t
			pid, err := strconv.Atoi(e)
			if err != nil || pid == os.Getpid() || unix.Stat("/proc/"+e+"/ns/net", &st) != nil {
				continue // a zombie has no namespace any more
			}
			if st.Ino == ns.Ino && st.Dev == ns.Dev {
				pids = append(pids, pid)
			}
		}
		return pids
	}
	var left []int
	if !retry(3*time.Second, func() bool {
		left = inside()
		for _, pid := range left {
			unix.Kill(pid, unix.SIGKILL)
		}
		return len(left) == 0
	}) {
		return fmt.Errorf("processes %v do not end", left)
	}
	return nil
}

// onThread runs fn on a goroutine with a thread of its own, which fn may move
// to another namespace, and takes the thread home afterwards. A panic and
// runtime.Goexit in fn (a test's FailNow) go on in the caller.
func onThread(home int, fn func()) {
	done := make(chan any, 1)
	returned := false
	go func() {
		runtime.LockOSThread()
		defer func() {
			cause := recover()
			// A thread that cannot go home stays locked: the runtime then ends
			// it together with this goroutine instead of using it again.
			if unix.Setns(home, unix.CLONE_NEWNET) == nil {
				runtime.UnlockOSThread()
			}
			done <- cause
		}()
		fn()
		returned = true
	}()
	if cause := <-done; cause != nil {
		panic(cause)
	}
	if !returned {
		runtime.Goexit()
	}
}
