package tap

import (
	"fmt"
	"net"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/tulle-net/tulle/ether"
)

// The functions in this file find a device that somebody else moves and names, as a
// container engine does.

// Whereabouts tells where the device is by now, what it is called there, and whether it
// is up. Before Linux 5.2, which does not tell, it is found only where it was put. The
// error is ErrClosed when it is gone.
func (l *link) Whereabouts() (ns Namespace, name string, up bool, err error) {
	h, dev, err := l.find()
	if err != nil {
		return Namespace{}, "", false, l.wrap(err)
	}
	h.Close()
	var nsfd int
	var nsErr error
	if l.file.Control(func(fd uintptr) { nsfd, nsErr = deviceNetns(fd) }) != nil {
		return Namespace{}, "", false, ErrClosed
	}
	path := "/proc/self/ns/net"
	if nsErr == nil {
		defer unix.Close(nsfd)
		path = fmt.Sprintf("/proc/self/fd/%d", nsfd)
	}
	if ns, err = NamespaceAt(path); err != nil {
		return Namespace{}, "", false, l.wrap(err)
	}
	return ns, dev.Attrs().Name, dev.Attrs().Flags&net.FlagUp != 0, nil
}

// FindLeft returns what the TAP with that alias and MAC, which an earlier run left in the
// namespace at path, is called there; "" where there is none.
func FindLeft(path, alias string, mac ether.MAC) (name string, err error) {
	h, err := handleIn(path)
	if err != nil {
		return "", err
	}
	defer h.Close()
	list, err := h.LinkList()
	if err != nil {
		return "", fmt.Errorf("tap: devices at %s: %w", path, err)
	}
	for _, dev := range list {
		t, is := dev.(*netlink.Tuntap)
		if is && t.Mode == netlink.TUNTAP_MODE_TAP && alias != "" && t.Alias == alias && ether.MACFrom(t.HardwareAddr) == mac {
			return t.Name, nil
		}
	}
	return "", nil
}
