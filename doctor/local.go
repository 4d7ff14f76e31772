package doctor

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tulle-net/tulle/crypto"
	"github.com/tulle-net/tulle/underlay"
)

const (
	tunPath = "/dev/net/tun"
	// plausibleAge of a binary: a clock that is further ahead is wrong.
	plausibleAge = 10 * 365 * 24 * time.Hour
	// sealedOverhead is what a sealed datagram adds on IPv6, the most that any has.
	sealedOverhead = 102
	// minIPv6MTU: below it the kernel switches IPv6 off on a device (RFC 8200, section 5).
	minIPv6MTU = 1280
	// leastFree is what a new state needs while the old one is still there;
	// lowFree is where to look before it comes to that.
	leastFree = 1 << 20
	lowFree   = 64 << 20
	// resolveTimeout bounds the resolving of one seed's name.
	resolveTimeout = 3 * time.Second
)

// Settings are what a node would run with, or does.
type Settings struct {
	// Listen is where data arrives, UDP; Gossip where Serf listens, TCP and UDP.
	Listen, Gossip netip.AddrPort
	// Advertise is the underlay address; none: that of the route to the first
	// seed, else of the default route.
	Advertise netip.Addr
	// Seeds are hosts to be reached, names or addresses without a port.
	Seeds []string
	// StateDir may not exist yet.
	StateDir string
	// Rootless: the node is, or would be, an ordinary user's.
	Rootless bool
	// Running: a node runs with these settings, so it is the one that holds the ports.
	Running bool
}

// Local checks this machine, in the namespace that it is called in. ctx bounds
// the resolving of seeds' names. Nothing is left behind.
func Local(ctx context.Context, s Settings) []Check {
	way, source := route(ctx, s.Seeds)
	if !s.Advertise.IsValid() && !source.IsLoopback() {
		s.Advertise = source // as the node does
	}
	var allowed []Check
	if s.Rootless {
		allowed = rootless()
	} else {
		allowed = []Check{tun(tunPath), rights()}
	}
	return append(allowed,
		kernel(release()),
		ipv6("/proc"),
		address(s.Advertise),
		way,
		ports(ctx, "data_port", s.Listen, s.Running, "UDP"),
		ports(ctx, "gossip_port", s.Gossip, s.Running, "UDP", "TCP"),
		clock(time.Now(), crypto.BuildTime()),
		stateDir(s.StateDir),
	)
}

// tun opens the device that TAPs are made with. Opened alone it makes none.
func tun(path string) Check {
	const name = "tun"
	fd, err := unix.Open(path, unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	switch {
	case err == nil:
		unix.Close(fd)
		return ok(name, "%s opens", path)
	case errors.Is(err, unix.ENOENT):
		return failed(name, path+" is not there",
			"`modprobe tun`, and if it stays away `mkdir -p /dev/net && mknod /dev/net/tun c 10 200`; in a container: start it with `--device /dev/net/tun`")
	case errors.Is(err, unix.ENODEV), errors.Is(err, unix.ENXIO):
		return failed(name, path+" is there, and the kernel has no tun", "`modprobe tun`; a kernel without it needs CONFIG_TUN")
	case errors.Is(err, unix.EACCES), errors.Is(err, unix.EPERM):
		return failed(name, "no permission to open "+path, "run it as root, as in `sudo tulle doctor`; in a container: start it with `--device /dev/net/tun`")
	}
	return failed(name, fmt.Sprintf("%s does not open: %v", path, err), "`ls -l "+path+"`: want a character device 10, 200")
}

func rights() Check {
	const name = "net_admin"
	head := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&head, &data[0]); err != nil {
		return warn(name, fmt.Sprintf("cannot tell whether this process has CAP_NET_ADMIN: %v", err), "run it as root, as in `sudo tulle doctor`")
	}
	return netAdmin(data[0].Effective)
}

func netAdmin(effective uint32) Check {
	const name = "net_admin"
	if effective&(1<<unix.CAP_NET_ADMIN) == 0 {
		return failed(name, "this process has no CAP_NET_ADMIN, which devices and addresses need",
			"run it as root, as in `sudo tulle up`; in a container: start it with `--cap-add NET_ADMIN`")
	}
	return ok(name, "CAP_NET_ADMIN is there")
}

func release() string {
	var u unix.Utsname
	if unix.Uname(&u) != nil {
		return ""
	}
	return unix.ByteSliceToString(u.Release[:])
}

// kernel judges a release as uname -r prints it.
func kernel(release string) Check {
	const name, newer = "kernel", "it works as it is; for speed install a newer kernel, 6.2 or later (`uname -r` shows which one runs)"
	var major, minor int
	if n, _ := fmt.Sscanf(release, "%d.%d", &major, &minor); n != 2 {
		return warn(name, fmt.Sprintf("cannot read the kernel's version %q", release), "`uname -r`: from 5.0 on all is well")
	}
	has := func(m, n int) bool { return major > m || major == m && minor >= n }
	switch {
	case !has(4, 18):
		return warn(name, "Linux "+release+" has neither UDP_SEGMENT (4.18) nor UDP_GRO (5.0): a system call a datagram", newer)
	case !has(5, 0):
		return warn(name, "Linux "+release+" has no UDP_GRO (5.0): a slot a datagram on the way in", newer)
	case !has(6, 2):
		return ok(name, "Linux %s; super-frames of UDP on a TAP (USO) come with 6.2", release)
	}
	return ok(name, "Linux %s", release)
}

// ipv6 notes whether it is on. Off is fine: everything works over IPv4.
func ipv6(proc string) Check {
	const name = "ipv6"
	off, err := os.ReadFile(filepath.Join(proc, "sys/net/ipv6/conf/all/disable_ipv6"))
	if err != nil || strings.TrimSpace(string(off)) == "1" {
		return ok(name, "off: IPv4 alone, which is enough")
	}
	return ok(name, "on")
}

func address(advertise netip.Addr) Check {
	const name = "address"
	const advice = "`ip -brief address` lists this host's: name one that others reach with `tulle up --advertise IP`"
	if !advertise.IsValid() {
		var err error
		if advertise, err = underlay.DefaultSource(); err != nil {
			return failed(name, text(err), advice)
		}
	}
	dev, err := underlay.DeviceOf(advertise)
	if err != nil {
		return failed(name, fmt.Sprintf("no network device has the address %s", advertise), advice)
	}
	return device(advertise, dev)
}

func device(at netip.Addr, dev underlay.Device) Check {
	const name = "address"
	if dev.MTU < minIPv6MTU+sealedOverhead {
		return warn(name, fmt.Sprintf("%s on %s has an MTU of %d: overlays on it are below %d, where the kernel switches their IPv6 off", at, dev.Name, dev.MTU, minIPv6MTU),
			fmt.Sprintf("`ip link set dev %s mtu 1500`, if what is below it carries that", dev.Name))
	}
	return ok(name, "%s on %s, MTU %d", at, dev.Name, dev.MTU)
}

// far are root name servers: only a default route leads there. Nothing is sent.
var far = []netip.Addr{netip.MustParseAddr("198.41.0.4"), netip.MustParseAddr("2001:503:ba3e::2:30")}

// route looks for a way to the seeds, or without seeds to anywhere, and returns
// the address that the first one leaves from.
func route(ctx context.Context, seeds []string) (_ Check, source netip.Addr) {
	const name = "route"
	if len(seeds) == 0 {
		for _, dst := range far {
			if source, err := underlay.SourceFor(dst); err == nil {
				return ok(name, "the default route leaves from %s", source), source
			}
		}
		return warn(name, "there is no default route: only nodes on this host's own networks can be reached",
			"`ip route` lists the routes; if others are further away: `ip route add default via GATEWAY`"), source
	}
	var ways []string
	for i, host := range seeds {
		from, fault := sourceFor(ctx, host)
		if fault != nil {
			return *fault, source
		}
		if i == 0 {
			source = from
		}
		ways = append(ways, fmt.Sprintf("to %s from %s", host, from))
	}
	return ok(name, "%s", join(ways)), source
}

// sourceFor returns where datagrams to host leave from, or what is in the way.
func sourceFor(ctx context.Context, host string) (netip.Addr, *Check) {
	ctx, cancel := context.WithTimeout(ctx, resolveTimeout)
	defer cancel()
	ips, err := net.DefaultResolver.LookupNetIP(ctx, "ip", host)
	if err != nil {
		c := failed("route", fmt.Sprintf("the name %s does not resolve: %s", host, text(err)), "`getent hosts "+host+"`; or --join its address")
		return netip.Addr{}, &c
	}
	var faults []error
	for _, ip := range ips {
		source, err := underlay.SourceFor(ip.Unmap())
		if err == nil {
			return source, nil
		}
		faults = append(faults, err)
	}
	c := failed("route", fmt.Sprintf("there is no way to %s: %s", host, text(errors.Join(faults...))),
		"`ip route get "+ips[0].Unmap().String()+"`; add the route that is missing, or --join another node")
	return netip.Addr{}, &c
}

// clock finds boards that start in 1970.
func clock(now, built time.Time) Check {
	const name, advice = "clock", "`timedatectl set-ntp true`, or `date -s 'YYYY-MM-DD hh:mm:ss'`; certificates need a clock that is right to 10 minutes"
	switch {
	case now.Before(built):
		return failed(name, fmt.Sprintf("the clock says %s, and this binary was built later, at %s", stamp(now), stamp(built)), advice)
	case now.After(built.Add(plausibleAge)):
		return warn(name, fmt.Sprintf("the clock says %s, years after this binary was built, at %s", stamp(now), stamp(built)), advice)
	}
	return ok(name, "%s", stamp(now))
}

// stateDir looks whether dir, or where it is not there yet its nearest parent,
// can be written to, without writing.
func stateDir(dir string) Check {
	const name = "state_dir"
	const other = "or give `tulle up --state-dir DIR`"
	at, made := dir, true
	for {
		i, err := os.Stat(at)
		if err == nil {
			if !i.IsDir() {
				return failed(name, at+" is no directory", "move it away, "+other)
			}
			break
		}
		parent := filepath.Dir(at)
		if !errors.Is(err, fs.ErrNotExist) || parent == at {
			return failed(name, text(err), "run it as root, as in `sudo tulle doctor`, "+other)
		}
		at, made = parent, false
	}
	if err := unix.Faccessat(unix.AT_FDCWD, at, unix.W_OK|unix.X_OK, unix.AT_EACCESS); err != nil {
		if errors.Is(err, unix.EROFS) {
			return failed(name, at+" is on a file system that is mounted read-only", "`mount -o remount,rw \"$(findmnt -no TARGET -T "+at+")\"`, "+other)
		}
		return failed(name, fmt.Sprintf("cannot write to %s: %v", at, err), "run it as root, as in `sudo tulle doctor`, "+other)
	}
	var s unix.Statfs_t
	if err := unix.Statfs(at, &s); err != nil {
		return warn(name, fmt.Sprintf("cannot tell how much room is at %s: %v", at, err), "`df -h "+at+"`")
	}
	free := uint64(s.Bavail) * uint64(s.Bsize)
	if s.Files > 0 && s.Ffree == 0 {
		free = 0 // no inodes
	}
	return room(dir, at, free, made)
}

// room judges the free bytes at a path that holds dir, or will.
func room(dir, at string, free uint64, made bool) Check {
	const name = "state_dir"
	advice := "`df -h " + at + "` and `df -i " + at + "`: remove something, or give `tulle up --state-dir DIR`"
	switch {
	case free < leastFree:
		return failed(name, fmt.Sprintf("%s is full", at), advice)
	case free < lowFree:
		return warn(name, fmt.Sprintf("%s has only %d MB left", at, free/1e6), advice)
	case !made:
		return ok(name, "%s is not there yet and can be made", dir)
	}
	return ok(name, "%s can be written to, %d MB are free", dir, free/1e6)
}
