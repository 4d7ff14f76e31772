package crypto

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
)

// folder is the few operations that a Dir needs of a file system, so that a
// test can cut the power between any two. Names are of files in one folder.
type folder interface {
	// read returns a whole file of at most max bytes.
	read(name string, max int) ([]byte, error)
	// create makes or empties a file that only its owner may read.
	create(name string) (file, error)
	rename(from, to string) error
	remove(name string) error
	// list returns the names of the plain files.
	list() ([]string, error)
	// sync makes what create, rename and remove did durable.
	sync() error
}

// file is one that is being written.
type file interface {
	io.WriteCloser
	// Sync makes the content durable.
	Sync() error
}

// osFolder is a folder of the machine.
type osFolder string

func (d osFolder) read(name string, max int) ([]byte, error) {
	f, err := os.Open(filepath.Join(string(d), name))
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, int64(max)+1))
	if err == nil && len(b) > max {
		err = fmt.Errorf("%s is longer than %d bytes", f.Name(), max)
	}
	return b, err
}

func (d osFolder) create(name string) (file, error) {
	return os.OpenFile(filepath.Join(string(d), name), os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
}

func (d osFolder) rename(from, to string) error {
	return os.Rename(filepath.Join(string(d), from), filepath.Join(string(d), to))
}

func (d osFolder) remove(name string) error { return os.Remove(filepath.Join(string(d), name)) }

func (d osFolder) list() ([]string, error) {
	entries, err := os.ReadDir(string(d))
	var names []string
	for _, e := range entries {
		if e.Type().IsRegular() {
			names = append(names, e.Name())
		}
	}
	return names, err
}

func (d osFolder) sync() error {
	f, err := os.Open(string(d))
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}

// write makes name a durable file with the content b. It may be cut off anywhere.
func write(d folder, name string, b []byte) error {
	f, err := d.create(name)
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	if err == nil {
		err = f.Sync()
	}
	return errors.Join(err, f.Close())
}

// replace makes name a durable file with the content b, or leaves what it was.
func replace(d folder, name string, b []byte) error {
	err := write(d, name+temporary, b)
	if err == nil {
		err = d.rename(name+temporary, name)
	}
	if err != nil {
		_ = d.remove(name + temporary) // nothing refers to it
		return err
	}
	return d.sync()
}

// missing reports whether a read failed because there is no such file.
func missing(err error) bool { return errors.Is(err, fs.ErrNotExist) }
