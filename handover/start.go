package handover

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// envLine names the descriptor of a child's end of the line.
const envLine = "TULLE_HANDOVER"

// patience bounds the waits for a new binary.
type patience struct {
	// hello: until it says who it is; on a small machine it is read from a card first.
	hello time.Duration
	// ready: until it is up; meanwhile nothing passes.
	ready time.Duration
}

var usual = patience{10 * time.Second, 20 * time.Second}

// Child is a new process of the node, from the parent's side.
type Child struct {
	binary string
	line   *line
	cmd    *exec.Cmd
	patience
	ended chan struct{} // closed when the process has
}

// Start starts a binary with this process's arguments, environment, folder and standard streams, and
// waits for its hello. After an error nothing of it is left; this process is as it was.
func Start(ctx context.Context, binary string) (_ *Child, version string, err error) {
	return start(ctx, binary, usual)
}

func start(ctx context.Context, binary string, p patience) (_ *Child, version string, err error) {
	l, other, err := newPair()
	if err != nil {
		return nil, "", err
	}
	c := &Child{binary: binary, line: l, patience: p, ended: make(chan struct{})}
	c.cmd = exec.Command(binary, os.Args[1:]...)
	c.cmd.Stdin, c.cmd.Stdout, c.cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	c.cmd.ExtraFiles = []*os.File{other}
	c.cmd.Env = append(os.Environ(), envLine+"=3")
	err = c.cmd.Start()
	_ = other.Close()
	if err != nil {
		l.close()
		return nil, "", fmt.Errorf("handover: %s cannot be started: %w", binary, explain(err))
	}
	go c.watch()
	m, err := c.expect(ctx, kindHello, p.hello)
	if err == nil && m.Protocol != protocol {
		err = fmt.Errorf("it speaks protocol %d, this version %d: stop the node and start it with the other binary", m.Protocol, protocol)
	}
	if err != nil {
		c.Kill()
		return nil, "", fmt.Errorf("handover: %s: %w", binary, err)
	}
	return c, m.Version, nil
}

// watch notices the end of the process, but does not take its status: once this process
// only waits (Wait), that is what it waits for.
func (c *Child) watch() {
	defer close(c.ended)
	for unix.Waitid(unix.P_PID, c.PID(), nil, unix.WEXITED|unix.WNOWAIT, nil) == unix.EINTR {
	}
}

// explain says more of an error of starting a binary.
func explain(err error) error {
	switch {
	case errors.Is(err, unix.ENOEXEC):
		return fmt.Errorf("%w: it is no program for this machine's architecture", unix.ENOEXEC)
	case errors.Is(err, unix.EACCES):
		return fmt.Errorf("%w: make it executable", unix.EACCES)
	}
	return err
}

// PID of the process.
func (c *Child) PID() int { return c.cmd.Process.Pid }

// Go hands s over, whose descriptors this process keeps as well, and waits until the
// child is up. After an error nothing is left of the child, but where ctx has ended:
// then it still has to be told to stop.
func (c *Child) Go(ctx context.Context, s *Set) error {
	c.line.setDeadline(time.Now().Add(c.ready))
	err := c.line.hand(s)
	if err == nil {
		_, err = c.expect(ctx, kindReady, c.ready)
	}
	if err != nil && ctx.Err() == nil {
		c.Kill()
	}
	if err != nil {
		return fmt.Errorf("handover: %s: %w", c.binary, err)
	}
	c.line.setDeadline(time.Time{})
	return nil
}

// expect waits for a message of the kind. Of a child that has ended its status says
// more than that the line is broken.
func (c *Child) expect(ctx context.Context, kind string, within time.Duration) (message, error) {
	c.line.setDeadline(time.Now().Add(within))
	stop := context.AfterFunc(ctx, func() { c.line.setDeadline(time.Now()) })
	defer stop()
	m, files, err := c.line.receive()
	closeAll(files)
	switch {
	case ctx.Err() != nil:
		return m, ctx.Err()
	case errors.Is(err, io.EOF):
		select {
		case <-c.ended:
			return m, fmt.Errorf("it ended at once: %s; its output is in the node's log", describe(c.cmd.Wait()))
		case <-time.After(time.Second):
			return m, errors.New("it does not go on: it closed the connection to this process")
		}
	case errors.Is(err, os.ErrDeadlineExceeded):
		what := "it did not say within %v that it is a Tulle"
		if kind == kindReady {
			what = "it was not up within %v"
		}
		return m, fmt.Errorf(what, within)
	case err != nil:
		return m, err
	case m.Kind != kind:
		return m, fmt.Errorf("it said %q instead of %q", m.Kind, kind)
	}
	return m, nil
}

func describe(err error) string {
	if err == nil {
		return "status 0"
	}
	return err.Error()
}

// Signal sends one to the child. One that has ended is no error.
func (c *Child) Signal(s os.Signal) { _ = c.cmd.Process.Signal(s) }

// Stop has the child stop as on a signal, and waits for its end; ctx bounds that.
func (c *Child) Stop(ctx context.Context) {
	_ = c.cmd.Process.Signal(unix.SIGTERM)
	select {
	case <-c.ended:
	case <-ctx.Done():
	}
	c.Kill()
}

// Kill ends the child and waits for its end.
func (c *Child) Kill() {
	_ = c.cmd.Process.Kill() // an error says that it has ended
	<-c.ended
	_ = c.cmd.Wait() // its status is known
	c.line.close()
}

// Parent is the process that this one follows, from the child's side.
type Parent struct{ line *line }

// FromParent returns the process that started this one to hand a node over; nil if
// nobody did. It hides that from what this process starts.
func FromParent() (*Parent, error) {
	text, is := os.LookupEnv(envLine)
	if !is {
		return nil, nil
	}
	_ = os.Unsetenv(envLine)
	fd, err := strconv.Atoi(text)
	if err != nil || fd < 3 {
		return nil, fmt.Errorf("handover: %s=%s is no descriptor: start the node without it", envLine, strings.ToValidUTF8(text, "?"))
	}
	unix.CloseOnExec(fd)
	l, err := newLine(os.NewFile(uintptr(fd), "line"))
	if err != nil {
		return nil, err
	}
	return &Parent{l}, nil
}

// Hello says who this process is, and waits until it is to go on. The error is io.EOF
// if the parent does not want it any more.
func (p *Parent) Hello(ctx context.Context, version string) (*Set, error) {
	if err := p.line.send(message{Kind: kindHello, Protocol: protocol, Version: version}); err != nil {
		return nil, err
	}
	stop := context.AfterFunc(ctx, func() { p.line.setDeadline(time.Now()) })
	defer stop()
	return p.line.take()
}

// Ready says that this process is up.
func (p *Parent) Ready() error { return p.line.send(message{Kind: kindReady}) }

// Gone returns when the process that waits for this one is there no more.
func (p *Parent) Gone() {
	for {
		_, files, err := p.line.receive()
		closeAll(files)
		if err != nil {
			return
		}
	}
}

// Succeed tells the process that waits for this one to wait for the child instead.
func (p *Parent) Succeed(c *Child) error {
	raw, err := c.line.conn.SyscallConn()
	if err != nil {
		return fmt.Errorf("handover: %w", err)
	}
	sent := error(nil)
	if err := raw.Control(func(fd uintptr) {
		sent = p.line.send(message{Kind: kindSuccessor, PID: c.PID()}, int(fd))
	}); err != nil {
		return fmt.Errorf("handover: %w", err)
	}
	return sent
}
