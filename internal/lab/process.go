package lab

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// starter runs functions on one thread that lives as long as the lab.
//
// The kernel ties Pdeathsig to the thread that made the child, not to the
// process: a child of a thread that the Go runtime ends would be killed.
type starter struct {
	jobs chan func()
	done chan struct{}
}

func (s *starter) run() {
	s.jobs, s.done = make(chan func()), make(chan struct{})
	go func() {
		runtime.LockOSThread() // for good: the thread ends with the goroutine
		defer close(s.done)
		for job := range s.jobs {
			job()
		}
	}()
}

func (s *starter) stop() {
	close(s.jobs)
	<-s.done
}

// Process runs in a host's namespace, in a process group of its own. It dies
// with the lab's owner, even when that is killed.
type Process struct {
	name string
	cmd  *exec.Cmd
	log  string
	done chan struct{} // closed after err is set
	err  error

	mu     sync.Mutex
	reaped bool // its pid may belong to another process from now on
}

// Start starts a command in the host's namespace; cmd must not be started yet.
// Without Stdout and Stderr both go to a log, see Process.Log. Pipes of cmd
// (StdoutPipe) are closed when it ends; use an io.Writer instead. When the
// process ends, what is left of its process group is killed.
func (h *Host) Start(cmd *exec.Cmd) (*Process, error) {
	l := h.lab
	l.mu.Lock()
	defer l.mu.Unlock()
	p := &Process{name: h.name + " " + filepath.Base(cmd.Path), cmd: cmd, done: make(chan struct{})}
	if l.closed {
		return nil, fmt.Errorf("lab: start %s: closed", p.name)
	}
	if cmd.Stdout == nil && cmd.Stderr == nil {
		p.log = filepath.Join(l.dir, fmt.Sprintf("%s-%d.log", h.name, len(l.procs)))
		f, err := os.OpenFile(p.log, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
		if err != nil {
			return nil, fmt.Errorf("lab: start %s: %w", p.name, err)
		}
		defer f.Close() // the child has its own descriptor
		cmd.Stdout, cmd.Stderr = f, f
	}
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{}
	}
	cmd.SysProcAttr.Setpgid, cmd.SysProcAttr.Pdeathsig = true, syscall.SIGKILL
	errc := make(chan error, 1)
	l.start.jobs <- func() {
		err := unix.Setns(h.ns, unix.CLONE_NEWNET)
		if err == nil {
			err = cmd.Start()
		}
		// If this fails, the next job enters its namespace all the same.
		errc <- errors.Join(err, unix.Setns(l.home, unix.CLONE_NEWNET))
	}
	if err := <-errc; err != nil {
		return nil, fmt.Errorf("lab: start %s: %w", p.name, err)
	}
	go p.reap()
	l.procs = append(l.procs, p)
	return p, nil
}

// reap waits for the end. Until the process is waited for, its pid (and so its
// group's id) cannot be given to another, so its group is killed before that.
func (p *Process) reap() {
	for unix.Waitid(unix.P_PID, p.cmd.Process.Pid, nil, unix.WEXITED|unix.WNOWAIT, nil) == unix.EINTR {
	}
	p.mu.Lock()
	unix.Kill(-p.cmd.Process.Pid, unix.SIGKILL)
	p.reaped = true
	p.mu.Unlock()
	p.err = p.cmd.Wait()
	close(p.done)
}

// Run runs a command in the host's namespace to its end and returns what it
// wrote to stdout and stderr; when ctx is done first, it is killed. The error
// holds the end of the output.
func (h *Host) Run(ctx context.Context, name string, args ...string) (string, error) {
	var out bytes.Buffer
	cmd := exec.Command(name, args...)
	cmd.Stdout, cmd.Stderr = &out, &out
	cmd.WaitDelay = 2 * time.Second // a daemon that it left behind may hold the pipe
	p, err := h.Start(cmd)
	if err != nil {
		return "", err
	}
	stop := context.AfterFunc(ctx, p.Kill)
	defer stop()
	if err = p.Wait(); err == nil {
		return out.String(), nil
	}
	if ctx.Err() != nil {
		err = ctx.Err()
	}
	text := strings.TrimSpace(out.String())
	if len(text) > 500 {
		text = "…" + text[len(text)-500:]
	}
	return out.String(), fmt.Errorf("lab: %s: %s: %w: %s", h.name, strings.Join(cmd.Args, " "), err, text)
}

// Name is host and program.
func (p *Process) Name() string { return p.name }

// Pid of the process; after Done is closed it may be another's.
func (p *Process) Pid() int { return p.cmd.Process.Pid }

// Done is closed when the process has ended.
func (p *Process) Done() <-chan struct{} { return p.done }

// Wait waits for the end; the error is nil for status 0, else *exec.ExitError.
func (p *Process) Wait() error {
	<-p.done
	return p.err
}

// Signal sends a signal to the process itself, not to its group. One that has
// ended is no error.
func (p *Process) Signal(sig syscall.Signal) error { return p.signal(p.cmd.Process.Pid, sig) }

// Kill kills the process and its group.
func (p *Process) Kill() { p.signal(-p.cmd.Process.Pid, unix.SIGKILL) }

func (p *Process) signal(pid int, sig syscall.Signal) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.reaped {
		return nil
	}
	if err := unix.Kill(pid, sig); err != nil {
		return fmt.Errorf("lab: signal %s: %w", p.name, err)
	}
	return nil
}

// Stop asks the process to end with SIGTERM, and kills it when it has not done
// so after patience. The error is Wait's, or says that it had to be killed.
func (p *Process) Stop(patience time.Duration) error {
	if err := p.Signal(unix.SIGTERM); err != nil {
		return err
	}
	select {
	case <-p.done:
		return p.err
	case <-time.After(patience):
		p.Kill()
		<-p.done
		return fmt.Errorf("lab: %s did not end within %s of SIGTERM", p.name, patience)
	}
}

// Log is what the process has written so far; empty when its output goes
// elsewhere, and after the lab is closed.
func (p *Process) Log() string {
	if p.log == "" {
		return ""
	}
	b, _ := os.ReadFile(p.log)
	return string(b)
}
