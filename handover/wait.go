package handover

import (
	"fmt"
	"os"
	"os/signal"
	"runtime"
	"strconv"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The functions in this file make the first process of a node one that only waits, so
// that its number, which a supervisor or a terminal knows, stays that of the node.
//
//	first process ─── line ─── node, its child; from the next one on an orphan, which
//	the kernel gives to the first process (PR_SET_CHILD_SUBREAPER)

// waitSignals are handed on to the node.
var waitSignals = []os.Signal{unix.SIGTERM, unix.SIGINT, unix.SIGHUP, unix.SIGQUIT, unix.SIGUSR1, unix.SIGUSR2}

// Become turns this process into one that waits for the child: it executes itself
// as `command PID LINE`, which calls Wait. It returns only with an error. late has a
// signal that nobody has taken: it is the child's. Those that come from here on wait for
// Wait: over an exec they stay blocked, and pending.
func Become(c *Child, command string, late <-chan os.Signal) error {
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("handover: %w", os.NewSyscallError("PR_SET_CHILD_SUBREAPER", err))
	}
	fd, err := c.duplicateLine()
	if err != nil {
		return err
	}
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	var before unix.Sigset_t
	blocked := sigset(waitSignals)
	if err := unix.PthreadSigmask(unix.SIG_BLOCK, &blocked, &before); err != nil {
		return fmt.Errorf("handover: %w", os.NewSyscallError("sigmask", err))
	}
	select {
	case <-late:
		c.Signal(unix.SIGTERM)
	default:
	}
	err = unix.Exec("/proc/self/exe", []string{os.Args[0], command, strconv.Itoa(c.PID()), strconv.Itoa(fd)}, os.Environ())
	_ = unix.PthreadSigmask(unix.SIG_SETMASK, &before, nil)
	_ = unix.Close(fd)
	return fmt.Errorf("handover: %w", os.NewSyscallError("exec", err))
}

// duplicateLine returns a descriptor of the line that stays open over an exec.
func (c *Child) duplicateLine() (fd int, err error) {
	raw, err := c.line.conn.SyscallConn()
	if err != nil {
		return -1, fmt.Errorf("handover: %w", err)
	}
	var errno error
	if err := raw.Control(func(f uintptr) { fd, errno = unix.FcntlInt(f, unix.F_DUPFD, 3) }); err != nil {
		return -1, fmt.Errorf("handover: %w", err)
	}
	if errno != nil {
		return -1, fmt.Errorf("handover: %w", os.NewSyscallError("dup", errno))
	}
	return fd, nil
}

// Wait is the function Wait for the child, in a process that could not Become.
func (c *Child) Wait() (unix.WaitStatus, error) {
	fd, err := c.duplicateLine()
	if err != nil {
		return 0, err
	}
	return Wait(c.PID(), fd)
}

// sigset has these signals.
func sigset(list []os.Signal) (set unix.Sigset_t) {
	const word = 8 * unsafe.Sizeof(set.Val[0])
	for _, s := range list {
		n := uintptr(s.(unix.Signal)) - 1
		set.Val[n/word] |= 1 << (n % word)
	}
	return set
}

// end is the end of a process.
type end struct {
	pid    int
	status unix.WaitStatus
}

// Wait waits for the node, which is process pid at the other end of line, and for
// those that follow it, and returns the status of the last one. Whatever other orphan
// this process gets it waits for as well, and forgets.
func Wait(pid, lineFD int) (unix.WaitStatus, error) {
	var node atomic.Int64
	node.Store(int64(pid))
	signals := make(chan os.Signal, 16)
	signal.Notify(signals, waitSignals...)
	defer signal.Stop(signals)
	go func() {
		for s := range signals {
			_ = unix.Kill(int(node.Load()), s.(unix.Signal)) // an error says that it has ended
		}
	}()
	unix.CloseOnExec(lineFD)
	l, err := newLine(os.NewFile(uintptr(lineFD), "line"))
	if err != nil {
		return 0, err
	}
	ends := make(chan end, 16)
	go reap(ends)
	type news struct {
		pid  int
		line *line
	}
	calls := make(chan *news)
	listen := func(l *line) {
		for {
			m, files, err := l.receive()
			if err != nil {
				calls <- nil
				return
			}
			if m.Kind == kindSuccessor && len(files) == 1 {
				next, err := newLine(files[0])
				if err == nil {
					calls <- &news{m.PID, next}
					return // what comes now is the end of that process
				}
				continue
			}
			closeAll(files)
		}
	}
	go listen(l)
	ended, gone := map[int]unix.WaitStatus{}, false
	for {
		select {
		case n := <-calls:
			if gone = n == nil; !gone {
				l.close()
				l = n.line
				node.Store(int64(n.pid))
				go listen(l)
			}
		case e, more := <-ends:
			if more {
				ended[e.pid] = e.status
			} else {
				ends = nil
			}
		}
		// Its last words have been heard, and it has ended.
		status, is := ended[int(node.Load())]
		switch {
		case gone && is:
			return status, nil
		case gone && ends == nil:
			return 0, fmt.Errorf("handover: process %d is no child of this one", node.Load())
		}
	}
}

// reap waits for each child that ends.
func reap(ends chan<- end) {
	defer close(ends)
	for {
		var status unix.WaitStatus
		pid, err := unix.Wait4(-1, &status, 0, nil)
		switch {
		case err == unix.EINTR:
		case err != nil:
			return // there are none any more
		default:
			ends <- end{pid, status}
		}
	}
}
