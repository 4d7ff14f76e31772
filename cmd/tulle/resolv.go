package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"

	"golang.org/x/sys/unix"

	"github.com/tulle-net/tulle/dns"
	"github.com/tulle-net/tulle/node"
)

const (
	resolvConf    = "/etc/resolv.conf"
	maxResolvConf = 32 << 10 // less than a pipe holds
)

// resolvConfOf is what a command of `tulle run` gets as its resolv.conf; nothing: it has
// the host's.
func resolvConfOf(e *node.Endpoint) []byte {
	if e.DNS == nil || e.DNS.Error != "" {
		return nil
	}
	host, err := os.ReadFile(resolvConf)
	if err != nil {
		host = nil // it has nothing to add
	}
	text := dns.ResolvConf(host, e.DNS.Address, e.DNS.Search)
	return text[:min(len(text), maxResolvConf)]
}

// mountResolvConf has this thread, and the command that it becomes, see another
// resolv.conf than everybody else.
func mountResolvConf(text []byte) error {
	if len(text) == 0 {
		return nil
	}
	if _, err := os.Stat(resolvConf); errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("there is no %s to mount another one over: make an empty one", resolvConf)
	}
	f, err := os.CreateTemp("", "tulle-resolv-")
	if err != nil {
		return fmt.Errorf("make a resolv.conf: %w", err)
	}
	defer os.Remove(f.Name()) // the mount keeps it
	_, err = f.Write(text)
	if err := errors.Join(err, f.Chmod(0o644), f.Close()); err != nil {
		return fmt.Errorf("make a resolv.conf: %w", err)
	}
	if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
		return fmt.Errorf("make a mount namespace: %w", err)
	}
	// What is mounted here is not to be seen elsewhere; what others mount is, here.
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_SLAVE, ""); err != nil {
		return fmt.Errorf("make a mount namespace: %w", err)
	}
	if err := unix.Mount(f.Name(), resolvConf, "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("mount a resolv.conf: %w", err)
	}
	return nil
}
