package handover

import (
	"cmp"
	"fmt"
	"net"
	"os"
	"strconv"
	"time"

	"github.com/coreos/go-systemd/v22/activation"
	"golang.org/x/sys/unix"
)

// Service is the manager that runs this process as a service, as systemd speaks with
// one (sd_notify(3)): it hears how the node is, and stores descriptors over a restart
// (FileDescriptorStoreMax=). nil is none, for all methods.
type Service struct {
	path   string
	stores bool
}

// notifyTime bounds one message: a manager that does not read must not stop the node.
const notifyTime = time.Second

// FromService returns the manager, or nil, and what it stored for this process; the
// environment does not tell of that any more.
func FromService() (*Service, *Set) {
	stored := &Set{}
	for _, f := range activation.Files(true) {
		stored.Add(f.Name(), f)
	}
	path := os.Getenv("NOTIFY_SOCKET")
	if path == "" {
		return nil, stored
	}
	// Since version 254 systemd says how many it stores; before, the unit has to.
	n, _ := strconv.Atoi(os.Getenv("FDSTORE"))
	return &Service{path: path, stores: n > 0}, stored
}

// Stores reports whether the manager stores descriptors.
func (s *Service) Stores() bool { return s != nil && s.stores }

// Notify tells the manager of a change.
func (s *Service) Notify(state string) error { return s.tell(state, nil) }

// Put has the manager store files under a name, instead of those that it had under it.
// They stay the caller's.
func (s *Service) Put(name string, files []*os.File) error {
	if !s.Stores() || len(files) == 0 {
		return nil
	}
	if err := s.Remove(name); err != nil {
		return err
	}
	for len(files) > 0 {
		n := min(len(files), maxRights)
		// It drops what has an error to tell, as a socket may that goes on all the same.
		if err := s.tell("FDSTORE=1\nFDPOLL=0\nFDNAME="+name, files[:n]); err != nil {
			return err
		}
		files = files[n:]
	}
	return nil
}

// Remove has the manager forget what it has under a name.
func (s *Service) Remove(name string) error {
	if !s.Stores() {
		return nil
	}
	return s.tell("FDSTOREREMOVE=1\nFDNAME="+name, nil)
}

func (s *Service) tell(text string, files []*os.File) (err error) {
	if s == nil {
		return nil
	}
	// net takes the leading @ of an abstract socket as systemd means it.
	c, err := net.DialUnix("unixgram", nil, &net.UnixAddr{Name: s.path, Net: "unixgram"})
	if err != nil {
		return fmt.Errorf("handover: the service manager: %w", err)
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(notifyTime))
	var rights []byte
	if len(files) > 0 {
		fds := make([]int, len(files))
		for i, f := range files {
			fds[i] = int(f.Fd())
		}
		rights = unix.UnixRights(fds...)
	}
	raw, err := c.SyscallConn()
	if err != nil {
		return fmt.Errorf("handover: the service manager: %w", err)
	}
	// WriteMsgUnix takes no socket that is connected.
	var sent error
	err = raw.Write(func(fd uintptr) bool {
		sent = unix.Sendmsg(int(fd), []byte(text), rights, nil, unix.MSG_NOSIGNAL)
		return sent != unix.EAGAIN
	})
	if err = cmp.Or(err, sent); err != nil {
		return fmt.Errorf("handover: the service manager: %w", err)
	}
	return nil
}

// Watchdog returns how often the manager wants to hear WATCHDOG=1; 0: never. follows:
// this process goes on for the one that the manager started.
func (s *Service) Watchdog(follows bool) time.Duration {
	if s == nil {
		return 0
	}
	us, err := strconv.ParseInt(os.Getenv("WATCHDOG_USEC"), 10, 64)
	pid, of := os.LookupEnv("WATCHDOG_PID")
	if err != nil || us <= 0 || of && pid != strconv.Itoa(os.Getpid()) && !follows {
		return 0
	}
	return time.Duration(us) * time.Microsecond / 3
}
