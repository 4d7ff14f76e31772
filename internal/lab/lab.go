// Package lab builds small networks of namespaces for tests and the demo.
//
//	host a          host b          host c       each a named network namespace
//	 [ul]            [ul]            [ul]        veth, addresses .1 .2 .3
//	   \______________|_______________/
//	              [bridge]                       in a namespace of its own
//
// It speaks netlink itself, so the machine needs no ip, ping or ethtool; it
// needs root, and a kernel with veth and bridge (veth alone for two hosts).
// Nothing is made in the caller's own namespace. All names carry the owner's
// pid and a counter; Close removes everything, and Sweep what a killed run left.
//
// It does not shape, delay or drop traffic, and a child sees the caller's /sys.
package lab

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Lab is one network of hosts. Its methods are safe for concurrent use.
type Lab struct {
	name  string
	dir   string
	lock  *os.File // held on dir: who has it is alive
	home  int      // the namespace that threads return to
	start starter

	mu     sync.Mutex
	closed bool
	hosts  []*Host // switches' namespaces too
	procs  []*Process
}

// labs counts the labs of this process, for unique names.
var labs atomic.Int64

var (
	validPrefix = regexp.MustCompile(`^[a-z]{1,12}$`)
	validName   = regexp.MustCompile(`^[a-z0-9]{1,10}$`)
)

// New makes an empty lab. prefix is 1 to 12 letters a-z; namespaces and the
// lab's folder are named prefix, pid, counter. The caller must Close it.
func New(prefix string) (*Lab, error) {
	if !validPrefix.MatchString(prefix) {
		return nil, fmt.Errorf("lab: prefix %q is not 1 to 12 letters a-z", prefix)
	}
	if os.Geteuid() != 0 {
		return nil, errors.New("lab: making network namespaces needs root")
	}
	l := &Lab{name: fmt.Sprintf("%s%d-%d", prefix, os.Getpid(), labs.Add(1))}
	l.dir = filepath.Join(tmpDir(), l.name)
	if err := os.Mkdir(l.dir, 0o700); err != nil {
		return nil, fmt.Errorf("lab: %w", err)
	}
	var err error
	if l.lock, err = os.Open(l.dir); err == nil {
		err = unix.Flock(int(l.lock.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	}
	if err == nil {
		l.home, err = unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	}
	if err != nil {
		l.lock.Close()
		os.Remove(l.dir)
		return nil, fmt.Errorf("lab: %w", err)
	}
	l.start.run()
	return l, nil
}

// tmpDir is short enough for the path of a unix socket, which ends at 107 bytes.
func tmpDir() string {
	if d := os.TempDir(); len(d) <= 48 {
		return d
	}
	return "/tmp"
}

// Name is the prefix of the lab's namespaces under /run/netns.
func (l *Lab) Name() string { return l.name }

// Dir is a folder of mode 0700 for logs, state and sockets; Close removes it.
func (l *Lab) Dir() string { return l.dir }

// AddHost makes a host: a namespace /run/netns/LAB-name with lo up. name is 1
// to 10 of a-z and 0-9, unique in the lab.
func (l *Lab) AddHost(name string) (*Host, error) { return l.addHost(name, newNamespace) }

// AddHostOf is AddHost with a namespace that is there: that of a process, such as a
// container's first one. Close kills what is in it, too.
func (l *Lab) AddHostOf(name string, pid int) (*Host, error) {
	return l.addHost(name, namespaceOf(pid))
}

func (l *Lab) addHost(name string, enter func() error) (*Host, error) {
	if !validName.MatchString(name) {
		return nil, fmt.Errorf("lab: host name %q is not 1 to 10 of a-z and 0-9", name)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return nil, errors.New("lab: closed")
	}
	h, err := newHost(l, name, enter)
	if err != nil {
		return nil, fmt.Errorf("lab: host %s: %w", name, err)
	}
	l.hosts = append(l.hosts, h)
	return h, nil
}

// Processes are all that were started so far, ended ones too, in order.
func (l *Lab) Processes() []*Process {
	l.mu.Lock()
	defer l.mu.Unlock()
	return append([]*Process(nil), l.procs...)
}

// Close kills what runs in the lab, removes its namespaces with all that is in
// them, and its folder. It goes on after an error and returns all of them; a
// second call does nothing.
func (l *Lab) Close() error {
	l.mu.Lock()
	if l.closed {
		l.mu.Unlock()
		return nil
	}
	l.closed = true
	hosts, procs := l.hosts, l.procs
	l.mu.Unlock()

	var errs []error
	for _, p := range procs {
		p.Kill()
	}
	for _, p := range procs {
		<-p.done
	}
	l.start.stop()
	for i := len(hosts) - 1; i >= 0; i-- {
		errs = append(errs, hosts[i].remove())
	}
	errs = append(errs, unix.Close(l.home), os.RemoveAll(l.dir), l.lock.Close())
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("lab: close: %w", err)
	}
	return nil
}

// Sweep removes the namespaces and folders of labs with this prefix whose
// owner is dead, kills what still runs in those namespaces, and returns how
// many namespaces it removed. Living labs are not touched.
func Sweep(prefix string) (int, error) {
	if !validPrefix.MatchString(prefix) {
		return 0, fmt.Errorf("lab: prefix %q is not 1 to 12 letters a-z", prefix)
	}
	var errs []error
	mine := regexp.MustCompile(`^` + prefix + `(\d+)-\d+(-[a-z0-9]+)?$`)
	removed := 0
	for _, e := range readDir(netnsDir) {
		if m := mine.FindStringSubmatch(e); m != nil {
			ok, err := sweepNamespace(filepath.Join(netnsDir, e), m[1])
			if ok {
				removed++
			}
			errs = append(errs, err)
		}
	}
	for _, e := range readDir(tmpDir()) {
		if m := mine.FindStringSubmatch(e); m != nil {
			errs = append(errs, sweepDir(filepath.Join(tmpDir(), e), m[1]))
		}
	}
	if err := errors.Join(errs...); err != nil {
		return removed, fmt.Errorf("lab: sweep: %w", err)
	}
	return removed, nil
}

func sweepNamespace(path, pid string) (bool, error) {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0)
	if err != nil {
		return false, nil // another sweep was faster
	}
	defer unix.Close(fd)
	if unix.Flock(fd, unix.LOCK_EX|unix.LOCK_NB) != nil {
		return false, nil // its owner lives
	}
	if isNamespace(fd) {
		if err := killInside(fd); err != nil {
			return false, err
		}
	} else if alive(pid) {
		return false, nil // being made: the file is there before the mount
	}
	return true, unmountNamespace(path)
}

func sweepDir(path, pid string) error {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0)
	if err != nil {
		return nil // gone, or not a folder
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if unix.Fstat(fd, &st) != nil || int(st.Uid) != os.Geteuid() || alive(pid) ||
		unix.Flock(fd, unix.LOCK_EX|unix.LOCK_NB) != nil {
		return nil
	}
	return os.RemoveAll(path)
}

func alive(pid string) bool {
	n, err := strconv.Atoi(pid)
	return err == nil && syscall.Kill(n, 0) != syscall.ESRCH
}

// readDir returns the names in a folder; none when it cannot be read.
func readDir(path string) []string {
	f, err := os.Open(path)
	if err != nil {
		return nil
	}
	defer f.Close()
	names, _ := f.Readdirnames(-1)
	return names
}

// retry calls fn until it says that it is done, with short waits in between,
// for at most d.
func retry(d time.Duration, fn func() bool) bool {
	for end := time.Now().Add(d); ; time.Sleep(5 * time.Millisecond) {
		if fn() {
			return true
		}
		if time.Now().After(end) {
			return false
		}
	}
}
