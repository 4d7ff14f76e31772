package node

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/tulle-net/tulle/dns"
)

// The functions in this file are about what `ip netns exec NAME` mounts over
// /etc/resolv.conf: /etc/netns/NAME/resolv.conf.

const (
	netnsDir     = "/etc/netns"
	hostResolv   = "/etc/resolv.conf"
	netnsMark    = "# made by tulle, which removes it when the namespace is detached\n"
	netnsMarkDir = "# made by tulle with its folder, which removes both when the namespace is detached\n"
)

// netnsNamed are the folders in which a namespace's file has its name.
var netnsNamed = []string{"/run/netns", "/var/run/netns"}

// netnsFile is the files of one namespace, which may have several names.
type netnsFile struct{ paths []string }

// write makes the file of a namespace that is at a path of ip netns, unless it is
// somebody else's.
func (f *netnsFile) write(netns string, at netip.Addr, search []string) error {
	dir, name := filepath.Split(netns)
	if !slices.Contains(netnsNamed, filepath.Clean(dir)) {
		return nil
	}
	folder := filepath.Join(netnsDir, name)
	path := filepath.Join(folder, "resolv.conf")
	old, err := os.ReadFile(path)
	mark := markOf(old)
	switch {
	case err == nil && mark == "":
		return nil // somebody else's
	case errors.Is(err, fs.ErrNotExist):
		mark = netnsMark
		if err := os.MkdirAll(netnsDir, 0o755); err != nil {
			return fmt.Errorf("node: %s: %w", path, err)
		}
		switch err := os.Mkdir(folder, 0o755); {
		case err == nil:
			mark = netnsMarkDir
		case !errors.Is(err, fs.ErrExist):
			return fmt.Errorf("node: %s: %w", path, err)
		}
	case err != nil:
		return fmt.Errorf("node: %s: %w", path, err)
	}
	if !slices.Contains(f.paths, path) {
		f.paths = append(f.paths, path)
	}
	host, _ := os.ReadFile(hostResolv) // none: it has nothing to add
	text := append([]byte(mark), dns.ResolvConf(host, at, search)...)
	if bytes.Equal(text, old) {
		return nil
	}
	// Not by another file's name: `ip netns exec` may have mounted this one.
	if err := os.WriteFile(path, text, 0o644); err != nil {
		return fmt.Errorf("node: %s: %w", path, err)
	}
	return nil
}

// markOf returns the mark that a file of ours begins with, or "".
func markOf(text []byte) string {
	for _, m := range []string{netnsMark, netnsMarkDir} {
		if bytes.HasPrefix(text, []byte(m)) {
			return m
		}
	}
	return ""
}

// remove removes the files.
func (f *netnsFile) remove() {
	for _, path := range f.paths {
		removeNetnsFile(path)
	}
	f.paths = nil
}

// removeNetnsFile removes one that is this program's still.
func removeNetnsFile(path string) {
	text, err := os.ReadFile(path)
	mark := markOf(text)
	if err != nil || mark == "" {
		return
	}
	_ = os.Remove(path)
	if mark == netnsMarkDir {
		_ = os.Remove(filepath.Dir(path)) // unless something else has come to be in it
	}
}

// sweepNetnsFiles removes those whose namespaces have no such name any more: they ended
// while no node ran.
func sweepNetnsFiles() {
	list, _ := filepath.Glob(filepath.Join(netnsDir, "*", "resolv.conf"))
	for _, path := range list {
		name := filepath.Base(filepath.Dir(path))
		if !slices.ContainsFunc(netnsNamed, func(dir string) bool {
			_, err := os.Lstat(filepath.Join(dir, name))
			return err == nil
		}) && !strings.HasPrefix(name, ".") {
			removeNetnsFile(path)
		}
	}
}
