package node

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// stateDir is the node's state directory, locked while the node runs.
type stateDir struct{ lock *os.File }

// openStateDir makes and locks dir; a second node on it is refused. handed, if there is
// one, is the lock of the process before.
func openStateDir(dir string, handed *os.File) (*stateDir, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("node: state directory: %w (run as root, or give --state-dir)", err)
	}
	f, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fmt.Errorf("node: state directory: %w (run as root, or give --state-dir)", err)
	}
	if same(f, handed) {
		f.Close()
		f = handed
	} else if handed != nil {
		handed.Close()
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, fmt.Errorf("node: another node uses the state directory %s: stop it, or give this one another --state-dir", dir)
		}
		return nil, fmt.Errorf("node: lock %s: %w", dir, err)
	}
	return &stateDir{lock: f}, nil
}

// same reports whether two descriptors are of one file.
func same(a, b *os.File) bool {
	if a == nil || b == nil {
		return false
	}
	x, err := a.Stat()
	y, err2 := b.Stat()
	return err == nil && err2 == nil && os.SameFile(x, y)
}

func (s *stateDir) close() error {
	err := s.lock.Close()
	if errors.Is(err, os.ErrClosed) {
		return nil
	}
	return err
}

// writeFile replaces a file of the state directory: it has the old content or
// the new one, also after a power cut.
func writeFile(path string, b []byte) error {
	tmp := path + ".new"
	f, err := os.OpenFile(tmp, os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o600)
	if err != nil {
		return fmt.Errorf("node: %w", err)
	}
	_, err = f.Write(b)
	err = errors.Join(err, f.Sync(), f.Close())
	if err == nil {
		err = os.Rename(tmp, path)
	}
	if err != nil {
		os.Remove(tmp)
		return fmt.Errorf("node: write %s: %w", path, err)
	}
	dir, err := os.Open(filepath.Dir(path))
	if err != nil {
		return fmt.Errorf("node: %w", err)
	}
	defer dir.Close()
	if err := dir.Sync(); err != nil {
		return fmt.Errorf("node: write %s: %w", path, err)
	}
	return nil
}
