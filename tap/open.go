package tap

import (
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/netip"
	"os"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

const (
	// maxName is IFNAMSIZ without its final zero.
	maxName = unix.IFNAMSIZ - 1
	// maxAlias is IFALIASZ without its final zero.
	maxAlias = 255
	// maxQueues is MAX_TAP_QUEUES of the kernel.
	maxQueues = 256
	// maxQueueLen bounds the memory that a queue's frames can take.
	maxQueueLen = 10000
	minMTU      = 68
	maxMTU      = 65535
	// minMTU6 is IPv6's least link MTU (RFC 8200, section 5). Linux switches
	// IPv6 off on a device with less.
	minMTU6 = 1280
)

// Open makes the device that cfg describes and brings it up. It vanishes with
// Close, or with the process. After an error nothing is left behind. The error
// is fs.ErrExist if the name is taken, fs.ErrPermission without CAP_NET_ADMIN,
// fs.ErrNotExist where there is no /dev/net/tun or no such namespace,
// ErrRouteTaken if the namespace has a route that Gateways or Routes asks for. Of
// Config.Handed none is left open then.
func Open(cfg Config) (Device, error) {
	if cfg.Queues == 0 {
		cfg.Queues = 1
	}
	if cfg.Driver == "" {
		cfg.Driver = DriverAuto
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if err := validate(cfg); err != nil {
		closeAll(cfg.Handed)
		return nil, fmt.Errorf("tap: open %s: %w", printable(cfg.Name), err)
	}
	dev, err := open(cfg)
	if err != nil {
		return nil, fmt.Errorf("tap: open %s: %w", cfg.Name, err)
	}
	return dev, nil
}

func open(cfg Config) (Device, error) {
	if dev := takeHanded(cfg); dev != nil {
		return dev, nil
	}
	if cfg.Reattach {
		if dev, err := reattach(cfg); dev != nil || err != nil {
			return dev, err
		}
	}
	if err := nameFree(cfg); err != nil {
		return nil, err
	}
	switch cfg.Driver {
	case DriverPlain:
		return openPlain(cfg) // never Inside: see validate
	case DriverOffload:
		return openOffload(cfg)
	case DriverTun:
		return openTunnel(cfg)
	}
	dev, err := openOffload(cfg)
	return fallBack(cfg, dev, err)
}

// fallBack is DriverAuto's answer to what openOffload returned.
func fallBack(cfg Config, dev Device, err error) (Device, error) {
	var refused *refusedError
	if !errors.As(err, &refused) || cfg.Inside {
		return dev, err
	}
	cfg.Log.Warn("this kernel refuses TAP offloads: falling back to a frame a call", "port", cfg.Name, "err", err)
	return openPlain(cfg)
}

// validate reports every fault of cfg.
func validate(cfg Config) error {
	var faults []error
	fault := func(format string, args ...any) { faults = append(faults, fmt.Errorf(format, args...)) }
	switch n := cfg.Name; {
	case n == "":
		fault("a device needs a name")
	case len(n) > maxName:
		fault("the name has %d bytes: choose one of at most %d", len(n), maxName)
	case n == "." || n == ".." || strings.ContainsFunc(n, forbidden):
		fault("choose a name without spaces, '/', ':' and '%%'")
	}
	if cfg.MAC != 0 && !cfg.MAC.IsValid() {
		fault("%v is no MAC of a device: choose a unicast one such as 02:54:0a:20:00:01", cfg.MAC)
	}
	if cfg.MTU < minMTU || cfg.MTU > maxMTU {
		fault("MTU %d: choose %d to %d", cfg.MTU, minMTU, maxMTU)
	}
	if cfg.Queues < 1 || cfg.Queues > maxQueues {
		fault("%d queues: choose 1 to %d", cfg.Queues, maxQueues)
	}
	if cfg.QueueLen < 0 || cfg.QueueLen > maxQueueLen {
		fault("queue of %d frames: choose 0 to %d", cfg.QueueLen, maxQueueLen)
	}
	if cfg.GSOMaxSize < 0 || cfg.GSOMaxSize > gsoLegacyMax {
		fault("GSO maximum size %d: choose 0 to %d bytes", cfg.GSOMaxSize, gsoLegacyMax)
	}
	for _, a := range cfg.Addresses {
		if !a.IsValid() || a.Addr().Is4In6() || a.Addr().IsUnspecified() || a.Addr().Zone() != "" {
			fault("address %v: want one with its prefix length such as 10.32.0.1/16", a)
		} else if a.Addr().Is6() && cfg.MTU < minMTU6 {
			fault("address %v: IPv6 needs an MTU of at least %d bytes, and this overlay's would be %d: "+
				"raise the MTU of the underlay, or give the overlay IPv4 addresses only", a, minMTU6, cfg.MTU)
		}
	}
	if len(cfg.Alias) > maxAlias {
		fault("the alias has %d bytes: choose one of at most %d", len(cfg.Alias), maxAlias)
	}
	for _, g := range cfg.Gateways {
		if !slices.ContainsFunc(cfg.Addresses, func(a netip.Prefix) bool { return a.Contains(g) && a.Addr() != g }) {
			fault("gateway %v: want one that the device's addresses reach", g)
		}
	}
	for _, r := range cfg.Routes {
		if r.Via.IsValid() && !slices.ContainsFunc(cfg.Addresses, func(a netip.Prefix) bool { return a.Contains(r.Via) && a.Addr() != r.Via }) {
			fault("route to %v through %v: want an address that the device's addresses reach", r.Dst, r.Via)
		}
	}
	switch {
	case cfg.Inside && cfg.Netns == "":
		fault("a device is made inside a namespace, and none is named")
	case cfg.Inside && (cfg.Driver == DriverPlain || cfg.Driver == DriverTun):
		fault("the driver %s makes devices in this process's own namespace only, where a rootless node can make none: choose %s or %s", cfg.Driver, DriverAuto, DriverOffload)
	}
	switch cfg.Driver {
	case DriverAuto, DriverOffload, DriverPlain, DriverTun:
	default:
		fault("driver %q: choose %s, %s, %s or %s", cfg.Driver, DriverAuto, DriverOffload, DriverPlain, DriverTun)
	}
	return errors.Join(faults...)
}

// forbidden reports whether r may not be in a device name. The kernel's
// dev_valid_name refuses most of it; it takes '%' for a pattern.
func forbidden(r rune) bool {
	return r == '/' || r == ':' || r == '%' || r <= ' ' || r == 0x7f || r == 0x85 || r == 0xa0
}

// printable quotes a name that is not fit for an error message.
func printable(name string) string {
	if name == "" || len(name) > maxName || strings.ContainsFunc(name, forbidden) {
		return fmt.Sprintf("%q", name)
	}
	return name
}

// temporaryName returns a device name that nobody else uses, for a device that
// gets its own when it is where it belongs.
func temporaryName() string {
	var b [5]byte
	_, _ = rand.Read(b[:]) // never fails
	return "tulle" + hex.EncodeToString(b[:])
}

const tunPath = "/dev/net/tun"

// openTun opens the clone device, close-on-exec and non-blocking.
func openTun() (int, error) {
	fd, err := unix.Open(tunPath, unix.O_RDWR|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, explainOpen(err)
	}
	return fd, nil
}

// explainOpen says what to do about an error of opening tunPath.
func explainOpen(err error) error {
	switch {
	case errors.Is(err, errEnter):
		return err
	case errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("there is no %s: load the module (modprobe tun), or give the container the device (--device %s): %w", tunPath, tunPath, err)
	case errors.Is(err, unix.ENODEV), errors.Is(err, unix.ENXIO):
		return fmt.Errorf("%s has no driver: load the module (modprobe tun) or use a kernel with CONFIG_TUN: %w", tunPath, err)
	case errors.Is(err, fs.ErrPermission):
		return fmt.Errorf("no permission for %s: run as root, or allow this user to open it (its mode, the container's device rules): %w", tunPath, err)
	}
	return os.NewSyscallError("open "+tunPath, err)
}

// explainCreate says what to do about an error of TUNSETIFF.
func explainCreate(err error) error {
	switch {
	case errors.Is(err, fs.ErrPermission):
		return fmt.Errorf("no permission to make a device: run as root or with CAP_NET_ADMIN: %w", err)
	case errors.Is(err, unix.EBUSY), errors.Is(err, fs.ErrExist):
		return errTaken
	}
	return fmt.Errorf("TUNSETIFF: %w", err)
}

// errTaken: the device exists. It may be somebody else's, so it is not taken over.
var errTaken = fmt.Errorf("a device of this name is there already: choose another name, or remove it (ip link delete NAME) if it is not in use: %w", fs.ErrExist)

// ErrRouteTaken: the namespace has the route that Config.Gateways or Routes asks for.
var ErrRouteTaken = errors.New("there is such a route already")

// refusedError is what DriverAuto falls back on: the kernel has no such offload.
type refusedError struct {
	what string
	err  error
}

func (e *refusedError) Error() string { return "the kernel refuses " + e.what + ": " + e.err.Error() }
func (e *refusedError) Unwrap() error { return e.err }
