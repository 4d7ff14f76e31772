package tap

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"strconv"
	"strings"

	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// Lack is what keeps an ordinary user from having devices inside the namespaces of
// containers, and how to grant it.
type Lack struct {
	// What is LackTun or LackNamespaces.
	What string
	// Detail says what was found, Advice what to do, a line each.
	Detail, Advice string
	cause          error
}

// What may be lacking.
const (
	LackTun        = "tun"
	LackNamespaces = "user_namespaces"
)

func (l *Lack) Error() string { return l.Detail + ": " + l.Advice }
func (l *Lack) Unwrap() error { return l.cause }

// CheckInside makes a device in namespaces that are made for it, as this user, tries
// its offloads, and removes all of it. The error is a *Lack where the machine's owner
// has not granted something. What it finds out about the kernel's offloads Open knows
// from then on.
func CheckInside(log *slog.Logger) error {
	fd, err := openNew(openTunFile)
	switch {
	case errors.Is(err, errNewNamespaces):
		return lackNamespaces("/proc/sys", err)
	case err != nil:
		return lackTun(tunPath, err)
	}
	d := newOffloadDevice(Config{Inside: true, Log: log})
	if err := attachTo(fd, temporaryName(), unix.IFF_TAP|unix.IFF_NO_PI|unix.IFF_VNET_HDR|unix.IFF_TUN_EXCL); err != nil {
		_ = unix.Close(fd)
		if errors.Is(err, fs.ErrPermission) {
			return lackNamespaces("/proc/sys", err)
		}
		return fmt.Errorf("tap: a device inside a new namespace: %w", err)
	}
	ns, err := deviceNetns(uintptr(fd))
	if err != nil {
		_ = unix.Close(fd)
		return fmt.Errorf("tap: the namespace of a device (TUNGETDEVNETNS, Linux 5.2): %w", err)
	}
	defer unix.Close(ns)
	if err := d.addQueue(fd); err != nil {
		return err
	}
	defer d.Close()
	h := netns.NsHandle(ns)
	d.kept.inside, d.link.file = &h, d.files[0]
	if err := d.negotiate(Config{}); err != nil {
		return fmt.Errorf("tap: a device inside a new namespace: %w", err)
	}
	if err := d.selfTest(); err != nil {
		return fmt.Errorf("tap: a device inside a new namespace: %w", err)
	}
	return nil
}

// lackTun says what is wrong with the clone device.
func lackTun(path string, err error) *Lack {
	l := &Lack{What: LackTun, Detail: fmt.Sprintf("%s does not open: %v", path, err), Advice: "`ls -l " + path + "`: want a character device 10, 200", cause: err}
	var st unix.Stat_t
	switch {
	case errors.Is(err, fs.ErrNotExist):
		l.Detail = path + " is not there"
		l.Advice = "`sudo modprobe tun`; in a container: start it with `--device " + path + "`"
	case errors.Is(err, unix.ENODEV), errors.Is(err, unix.ENXIO):
		l.Detail = path + " is there, and the kernel has no tun"
		l.Advice = "`sudo modprobe tun`; a kernel without it needs CONFIG_TUN"
	case errors.Is(err, fs.ErrPermission) && unix.Stat(path, &st) == nil:
		l.Detail = fmt.Sprintf("%s is not readable and writable for user %d: its mode is %04o, its owner %d:%d", path, os.Geteuid(), st.Mode&0o7777, st.Uid, st.Gid)
		l.Advice = fmt.Sprintf("`sudo setfacl -m u:%d:rw %s` grants it until the next boot; for good: `echo 'KERNEL==\"tun\", MODE=\"0666\"' | sudo tee /etc/udev/rules.d/60-tun.rules` and `sudo udevadm trigger /dev/net/tun`", os.Geteuid(), path)
	}
	return l
}

// lackNamespaces says why a user may have no user namespace with rights in it.
func lackNamespaces(sysctls string, err error) *Lack {
	setting := func(name string) string {
		b, err := os.ReadFile(sysctls + "/" + strings.ReplaceAll(name, ".", "/"))
		if err != nil {
			return ""
		}
		return strings.TrimSpace(string(b))
	}
	l := &Lack{What: LackNamespaces, cause: err}
	const debian, ubuntu = "kernel.unprivileged_userns_clone", "kernel.apparmor_restrict_unprivileged_userns"
	switch {
	case setting(debian) == "0":
		l.Detail = "user namespaces are off for ordinary users (" + debian + " is 0)"
		l.Advice = keepSetting(debian, 1)
	case setting("user.max_user_namespaces") == "0":
		l.Detail = "user namespaces are off (user.max_user_namespaces is 0)"
		l.Advice = keepSetting("user.max_user_namespaces", 10000)
	case setting("user.max_net_namespaces") == "0":
		l.Detail = "network namespaces are off (user.max_net_namespaces is 0)"
		l.Advice = keepSetting("user.max_net_namespaces", 10000)
	case setting(ubuntu) == "1":
		l.Detail = "AppArmor gives ordinary users no rights in their user namespaces (" + ubuntu + " is 1)"
		l.Advice = "give the binary a profile with `userns,` as /etc/apparmor.d has them for podman and others; or for all programs: " + keepSetting(ubuntu, 0)
	case errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EUSERS):
		l.Detail = "no further user or network namespace may be made: " + err.Error()
		l.Advice = "end some, or raise user.max_user_namespaces and user.max_net_namespaces (`sysctl user` shows them)"
	default:
		l.Detail = "this user may have no user namespace with rights in it: " + err.Error()
		l.Advice = "a container's seccomp profile or a security module may forbid it: `unshare --user --net true` tells as much, and `dmesg` may tell which"
	}
	return l
}

// keepSetting is how to change a setting of the kernel for good.
func keepSetting(name string, value int) string {
	set := name + "=" + strconv.Itoa(value)
	return "`sudo sysctl -w " + set + "`, and the line `" + set + "` in /etc/sysctl.d/60-tulle.conf for good"
}
