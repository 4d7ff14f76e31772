// Package tap opens TAP devices: the edge where Ethernet frames enter and leave a node.
//
// A device is handed out as queues. Reading a queue yields either one
// super-frame (a TCP or UDP train that the kernel left uncut) or all the small
// frames that wait; writing takes a frame as parts, uncut as well. Drivers:
//
//	offload  TUNSETIFF with IFF_VNET_HDR, multi-queue, TUNSETOFFLOAD (the default)
//	plain    github.com/songgao/water, a frame a call: where offloads are refused, and the oracle for offload
//	tun      golang.zx2c4.com/wireguard/tun: a layer 3 device, for a host that wants no Ethernet
//
// The package does not look into frames beyond what finishing them in software
// needs, but for tun, which is a host's Ethernet for it (RFC 826, RFC 4861). It
// does not know overlays.
package tap

import (
	"errors"
	"log/slog"
	"net/netip"
	"os"

	"github.com/tulle-net/tulle/ether"
)

// Driver names an implementation.
type Driver string

const (
	// DriverAuto is offload, or plain where the kernel refuses offload.
	DriverAuto    Driver = "auto"
	DriverOffload Driver = "offload"
	DriverPlain   Driver = "plain"
	// DriverTun makes no TAP but a TUN: see tunDevice.
	DriverTun Driver = "tun"
)

// Config describes one device.
type Config struct {
	// Name of the network device, 1 to 15 bytes. A device of this name that
	// exists already is refused, never taken over.
	Name string
	// MAC of the device; zero lets the kernel choose.
	MAC ether.MAC
	// MTU in bytes, 68 to 65535.
	MTU int
	// Addresses to assign; may be empty. IPv6 ones need an MTU of 1280.
	Addresses []netip.Prefix
	// Queues is the number of queues, 1 to 256; default 1. DriverPlain and DriverTun
	// have one.
	Queues int
	// Driver; default DriverAuto.
	Driver Driver
	// Netns is the path of the network namespace that the device is moved to
	// after it was created in the caller's; empty: it stays.
	Netns string
	// Inside makes the device in Netns instead, which takes no rights where that is in
	// a user namespace of this user's own: a rootless container. It keeps Netns alive: see
	// Lasting.Pinned. For DriverAuto, which falls back on nothing then, and DriverOffload.
	Inside bool
	// Gateways get the default routes of the device's namespace, one a family, each
	// inside one of Addresses. DriverTun sends them what is for none of its subnets.
	Gateways []netip.Addr
	// NoSolicit has the kernel ask for no IPv6 routers on the device, which each
	// does for hours after it came up, of everybody; what they announce by
	// themselves is heard. Without effect where /proc/sys cannot be written.
	NoSolicit bool
	// Routes are further ones of that namespace, through the device; with DriverTun
	// each through an address.
	Routes []Route
	// QueueLen is how many frames may wait for a reader, a queue; default 1,000.
	QueueLen int
	// GSOMaxSize bounds the super-frames that the kernel hands out, in bytes;
	// 0: such that the train fits one UDP send (see DefaultGSOMaxSize). The
	// kernel's own bound is 65,536.
	GSOMaxSize int
	// NoTSO, NoUSO and NoGRO switch off an offload: super-frames of TCP, of UDP
	// on the way out of the kernel, super-frames on the way into it.
	NoTSO, NoUSO, NoGRO bool
	// Down leaves the device here and down, without addresses and routes: who moves it to
	// where it belongs does the rest.
	Down bool
	// Log takes warnings about offloads that failed their self-test.
	Log *slog.Logger

	// Alias is a text on the device (IFLA_IFALIAS, 255 bytes at most), by which it is
	// known again; may be empty.
	Alias string
	// Reattach takes over the device with this Name, MAC and Alias that an earlier run
	// left in Netns (Lasting.SetPersistent), as it is: with what addresses and routes it
	// has by now. If there is none, one is made. It keeps Netns alive: see Lasting.Pinned.
	// DriverPlain removes such a device and makes another.
	Reattach bool
	// Handed are the queues of the device, from Lasting.Descriptors: Open takes them
	// over, closes those that are of no use, and then goes on without. The number of
	// queues is theirs. It does not need Reattach, nor keep Netns alive if the device
	// was made outside of it.
	Handed []*os.File
}

// Route is a route through a device. A Via is inside one of the device's addresses;
// without one, Dst is on the device's segment.
type Route struct {
	Dst netip.Prefix
	Via netip.Addr
}

// Offloads is the state of a device's offloads, for `tulle status`.
type Offloads struct {
	Driver Driver `json:"driver"`
	// Each is "on", "off" (switched off) or the reason why it is not available.
	Checksum string `json:"checksum"`
	TSO4     string `json:"tso4"`
	TSO6     string `json:"tso6"`
	USO      string `json:"uso"`
	GRO      string `json:"gro"`
}

// Device is one TAP. Its methods are safe for concurrent use.
type Device interface {
	Name() string
	MAC() ether.MAC
	Queues() []Queue
	MTU() int
	// SetMTU changes the MTU, also when the device was moved to another
	// namespace. Below 1280 bytes the kernel switches IPv6 off on the device;
	// its configured addresses come back with an MTU that is large enough.
	SetMTU(bytes int) error
	Offloads() Offloads
	// SetOffload switches offloads off, or on again where the kernel has them,
	// while the device runs; the arguments are those of Config.
	SetOffload(noTSO, noUSO, noGRO bool) error
	// Dropped returns how many frames found no room in the queues, because they
	// were read too slowly, since the device was made.
	Dropped() uint64
	// Close ends all queues (their Wait returns ErrClosed) and removes the device.
	Close() error
}

// Lasting is a Device that can outlast its descriptors, or its process: DriverOffload's.
// DriverPlain makes devices and takes over none.
type Lasting interface {
	Device
	// SetPersistent says whether the device stays where it is when its last descriptor
	// is closed, by the end of the process above all. Close ends it all the same.
	SetPersistent(on bool) error
	// Descriptors returns duplicates of the queues' descriptors, the caller's to close:
	// while there is one, the device stays.
	Descriptors() ([]*os.File, error)
	// Pinned reports whether the device's descriptors keep the namespace alive that the
	// device was moved to or found in: whoever holds it has to find out when nobody else
	// does.
	Pinned() bool
	// Spare has Close leave a device that is persistent.
	Spare()
	// Delete removes the device, whoever holds it; Close is still due. One that is gone
	// already is no error.
	Delete() error
}

// Queue is one queue of a device. Wait and Read belong to one worker;
// WriteFrame is safe for concurrent use.
type Queue interface {
	// Wait returns nil when Read may find a frame, ErrClosed after Close or
	// when the device is gone.
	Wait() error
	// Read fills b with the small frames that wait, or with one super-frame
	// (there may be small frames before it, never one behind it), and never
	// blocks: no frames means that none wait. After an error other than
	// ErrClosed, which counts one lost frame, b is empty and Read may be
	// called again.
	Read(b *Batch) error
	// WriteFrame hands one frame, given as parts that follow each other, to
	// the kernel. parts are borrowed until it returns. A super-frame that the
	// driver cannot hand over whole is cut, a partial checksum finished. An
	// error other than ErrClosed concerns this frame alone: EIO while the link
	// is down, EINVAL for what is no Ethernet frame. It does not allocate.
	WriteFrame(m ether.Meta, parts [][]byte) error
}

// ErrClosed: the device was closed, here or by the end of its namespace.
var ErrClosed = errors.New("tap: device closed")

const (
	// BatchFrames is the most frames of one Read.
	BatchFrames = 64
	// batchBytes holds a super-frame behind the largest run of small ones.
	batchBytes = 128 << 10
)

// Headroom is the bytes before a frame that its reader may use: the room of a
// VXLAN header (RFC 7348, section 5), which thus stands before the frame without
// a copy. The offload driver has had the kernel's header there, of 10 bytes.
const Headroom = 8

// Frame is one frame that was read. B and Head are valid until the next Read
// into its Batch, and until then the reader's to change.
type Frame struct {
	B    []byte
	Meta ether.Meta
	// Head is B with Headroom bytes before it that mean nothing: Head[Headroom:]
	// is B, the same memory. No other frame of the Batch is in it.
	Head []byte
}

// FrameAt returns the Frame whose n bytes stand in buf behind Headroom bytes, for
// drivers and their fakes. It has no Meta.
func FrameAt(buf []byte, n int) Frame {
	head := buf[: Headroom+n : Headroom+n]
	return Frame{B: head[Headroom:], Head: head}
}

// Batch is the memory of one worker's reads: it is given to Read again and again.
type Batch struct {
	Frames []Frame
	buf    []byte
	wide   []byte // of the tun driver, when it reads
}

// NewBatch returns a Batch with its own memory.
func NewBatch() *Batch {
	return &Batch{Frames: make([]Frame, 0, BatchFrames), buf: make([]byte, batchBytes)}
}

// Buffer returns the memory behind the frames, for drivers and their fakes.
func (b *Batch) Buffer() []byte { return b.buf }
