package handover

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// protocol is the first thing that a child says: one of another protocol is refused
// before anything is stopped.
const protocol = 1

// Kinds of a message.
const (
	kindHello     = "hello"     // child: its version
	kindHand      = "hand"      // parent: descriptors and their names
	kindGo        = "go"        // parent: that was all
	kindReady     = "ready"     // child: it is up
	kindSuccessor = "successor" // node to its waiter: another process, and the line to it
)

// message is one packet on a line.
type message struct {
	Kind     string   `json:"kind"`
	Protocol int      `json:"protocol,omitempty"`
	Version  string   `json:"version,omitempty"`
	Names    []string `json:"names,omitempty"` // one for each descriptor
	PID      int      `json:"pid,omitempty"`
}

const (
	// maxRights is SCM_MAX_FD: descriptors in one packet.
	maxRights  = 253
	maxMessage = 64 << 10
	// maxDescriptors bounds what a child takes.
	maxDescriptors = 65536
)

// line is one end of a socket pair between two processes of a node.
type line struct{ conn *net.UnixConn }

// newPair returns a line, and its other end for a child.
func newPair() (*line, *os.File, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("handover: %w", os.NewSyscallError("socketpair", err))
	}
	other := os.NewFile(uintptr(fds[1]), "line")
	l, err := newLine(os.NewFile(uintptr(fds[0]), "line"))
	if err != nil {
		_ = other.Close()
		return nil, nil, err
	}
	return l, other, nil
}

// newLine takes over f.
func newLine(f *os.File) (*line, error) {
	defer f.Close() // FileConn duplicates it
	c, err := net.FileConn(f)
	if err != nil {
		return nil, fmt.Errorf("handover: %w", err)
	}
	u, ok := c.(*net.UnixConn)
	if !ok {
		_ = c.Close()
		return nil, errors.New("handover: what was inherited is no socket of the other process")
	}
	return &line{u}, nil
}

func (l *line) close() { _ = l.conn.Close() }

// send writes a message with descriptors, which stay the caller's.
func (l *line) send(m message, fds ...int) error {
	b, err := json.Marshal(m)
	if err != nil {
		return fmt.Errorf("handover: %w", err)
	}
	var rights []byte
	if len(fds) > 0 {
		rights = unix.UnixRights(fds...)
	}
	if _, _, err := l.conn.WriteMsgUnix(b, rights, nil); err != nil {
		return fmt.Errorf("handover: %w", err)
	}
	return nil
}

// receive reads a message and its descriptors, until the deadline that is set. The
// error is io.EOF when the other end is gone.
func (l *line) receive() (message, []*os.File, error) {
	var m message
	b, rights := make([]byte, maxMessage), make([]byte, unix.CmsgSpace(4*maxRights))
	n, rn, flags, _, err := l.conn.ReadMsgUnix(b, rights)
	switch {
	case errors.Is(err, unix.ECONNRESET):
		return m, nil, io.EOF
	case err != nil:
		return m, nil, err
	case n == 0:
		return m, nil, io.EOF
	}
	files, err := filesOf(rights[:rn])
	if err == nil && flags&(unix.MSG_TRUNC|unix.MSG_CTRUNC) != 0 {
		err = errors.New("cut short")
	}
	if err == nil {
		err = json.Unmarshal(b[:n], &m)
	}
	if err != nil {
		closeAll(files)
		return m, nil, fmt.Errorf("handover: a message of the other process: %w", err)
	}
	return m, files, nil
}

// filesOf returns the descriptors of control messages.
func filesOf(b []byte) (files []*os.File, err error) {
	msgs, err := unix.ParseSocketControlMessage(b)
	if err != nil {
		return nil, err
	}
	for i := range msgs {
		fds, err := unix.ParseUnixRights(&msgs[i])
		if err != nil {
			continue // of another kind
		}
		for _, fd := range fds {
			unix.CloseOnExec(fd)
			files = append(files, os.NewFile(uintptr(fd), "handed over"))
		}
	}
	return files, nil
}

func closeAll(files []*os.File) {
	for _, f := range files {
		_ = f.Close()
	}
}

// hand sends all of s, which keeps its descriptors, and says go.
func (l *line) hand(s *Set) error {
	names, fds := s.flat()
	for len(fds) > 0 {
		n := min(len(fds), maxRights)
		if err := l.send(message{Kind: kindHand, Names: names[:n]}, fds[:n]...); err != nil {
			return err
		}
		names, fds = names[n:], fds[n:]
	}
	return l.send(message{Kind: kindGo})
}

// take receives what hand sends.
func (l *line) take() (*Set, error) {
	s := &Set{}
	for count := 0; ; {
		m, files, err := l.receive()
		if err == nil && m.Kind == kindHand && len(m.Names) == len(files) && count+len(files) <= maxDescriptors {
			for i, f := range files {
				s.Add(m.Names[i], f)
			}
			count += len(files)
			continue
		}
		closeAll(files)
		if err == nil && m.Kind == kindGo {
			return s, nil
		}
		s.Close()
		if err == nil {
			err = fmt.Errorf("handover: unexpected %q", m.Kind)
		}
		return nil, err
	}
}

// setDeadline bounds what follows on the line; the zero time does not.
func (l *line) setDeadline(t time.Time) { _ = l.conn.SetDeadline(t) }
