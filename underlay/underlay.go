// Package underlay moves trains of datagrams between this node and others over UDP.
//
//	send     Sender.Reserve, Commit … Flush   one sendmsg(UDP_SEGMENT) a train, from a pool of source ports
//	control  Conn.SendControl                 one datagram, from the listening socket
//	receive  Receiver.Wait, Receive           recvmmsg, UDP_GRO; a slot may hold a whole train
//
// It knows addresses, ports and sizes; it does not look into datagrams.
package underlay

import (
	"errors"
	"net/netip"
	"sync/atomic"
	"time"
)

// Conn is the UDP side of a node.
type Conn interface {
	// Receivers returns one Receiver per listening socket. Each belongs to one worker.
	Receivers() []Receiver
	// NewSender returns a Sender for one worker.
	NewSender() Sender
	// SendControl sends one datagram from the listening socket of dst's family,
	// so that its source port is the listening one (a Sender's is not); where
	// that socket listens on all addresses, from the source address as long as
	// this host has it. d is borrowed, 0 to 65,507 bytes, and is never fragmented
	// (RFC 9000, section 14). It never blocks and is safe for concurrent use.
	// The error is ErrClosed after Close or else the errno alone: EMSGSIZE when d
	// is larger than the device's MTU allows, EAFNOSUPPORT when nothing listens
	// for the family, EAGAIN when the send buffer is full. What ICMP says later
	// is told to nobody: whoever sends control finds out by itself whether it
	// arrives.
	SendControl(dst netip.AddrPort, d []byte) error
	// LocalAddrs returns the addresses that the listening sockets are bound to.
	LocalAddrs() []netip.AddrPort
	// JoinGroup and LeaveGroup change the membership of a multicast group on
	// the device that holds the source address (RFC 7348, section 4.2). Joins
	// of one group are counted, and the last LeaveGroup leaves: overlays may
	// share a group. A socket is in at most net.ipv4.igmp_max_memberships
	// groups (default 20); the error of one more says so.
	JoinGroup(group netip.Addr) error
	LeaveGroup(group netip.Addr) error
	// Rebind is for when the underlay's device was made anew or its address
	// moved to another: it joins all groups again on the device that holds the
	// source address now, and the next Flush sends from new source ports. It
	// fails, with nothing changed, while no device holds the source address;
	// a group that could not be joined is tried again by the next Rebind.
	// Groups are left for a moment: don't call it without a cause.
	Rebind() error
	// SetSource is for when the node's address changed: source takes the place
	// of Config.Source, for control at once, and then it does what Rebind does.
	// It fails, with nothing changed, if source is no address of a host or no
	// device holds it; the zero Addr leaves the choice to the kernel.
	SetSource(source netip.Addr) error
	// PathMTU returns the MTU in bytes of the route to dst.
	PathMTU(dst netip.Addr) (int, error)
	Stats() *Stats
	Offloads() Offloads
	// SetOffload switches trains off, on the way out and on the way in, or on
	// again where they are available; it takes effect at once.
	SetOffload(noGSO, noGRO bool) error
	// NoteLoss takes a peer's word on how many of the datagrams that were sent to
	// it lately did not arrive. Where many do not, and fewer are lost on the way to
	// that peer without trains, trains are switched off, to all: some devices say
	// that they send them, and send garbage.
	NoteLoss(peer string, sent, lost uint64)
	// Close ends all Receivers: their Wait returns ErrClosed.
	Close() error
}

// Sender collects datagrams and sends them as trains: neighbours with one
// destination, one flow and one size (the last may be shorter) leave in one
// system call. It belongs to one worker.
type Sender interface {
	// Reserve returns room for a datagram of up to n bytes, 1 to 65,507. It is
	// valid until the next Reserve or Flush; a Reserve without Commit is void.
	Reserve(n int) []byte
	// Commit queues the first n reserved bytes for dst. flow chooses the
	// source port: one flow keeps one port and its order.
	Commit(dst netip.AddrPort, flow uint32, n int)
	// Flush sends what was committed. What cannot be sent is counted in Stats.
	Flush()
}

// Receiver is one listening socket.
type Receiver interface {
	// Wait returns nil when Receive may find a datagram, ErrClosed after Close.
	Wait() error
	// Receive fills b with what waits and never blocks: none means that none wait.
	// The error is ErrClosed after Close. Any other is of this call alone (the
	// kernel was short of memory, errors were pending on the socket): b is
	// empty, no datagram is lost by it, and Wait and Receive may be called again.
	Receive(b *Batch) error
	// Rest sleeps for d, or less: what comes meanwhile wakes nobody. It is for d of
	// some 100 µs, between two batches of a worker that is busy.
	Rest(d time.Duration)
}

// ErrClosed: the Conn was closed.
var ErrClosed = errors.New("underlay: closed")

// MaxDatagram is the most bytes that one received slot holds.
const MaxDatagram = 65535

// MaxSend is the most bytes of one datagram, and of one train: the payload of the
// largest IPv4 packet without options.
const MaxSend = 65507

// Slot is what one receive delivered: a datagram, or a train of them.
type Slot struct {
	// Src is the sender; IPv4 addresses are never IPv4-mapped.
	Src netip.AddrPort
	// B holds the datagrams behind each other, valid until the next Receive
	// into its Batch.
	B []byte
	// SegmentLen is the size of each datagram but the last, or 0: B is one datagram.
	SegmentLen int
}

// Batch is the memory of one worker's receives.
type Batch struct {
	Slots []Slot
	// More: the batch is full, and more may wait.
	More bool
	// Memory belongs to the Conn that fills the Batch; it is made on the first Receive.
	Memory any
}

// Stats counts what the sockets did and could not do; every field only grows.
// What could not be sent or received is counted in datagrams.
type Stats struct {
	// TxTrains and RxSlots: what the datagrams travelled in, be it a train or
	// one datagram alone. Bytes are without UDP and IP headers.
	TxDatagrams, TxBytes, TxTrains, TxCalls atomic.Uint64
	RxDatagrams, RxBytes, RxSlots, RxCalls  atomic.Uint64
	// RxOverflow: what the kernel dropped because the receive buffer was full
	// (SO_RXQ_OVFL). It is told with the next datagram that fits, and a train
	// that the kernel had already merged counts once.
	RxOverflow atomic.Uint64
	// RxTruncated: datagrams longer than a slot.
	RxTruncated atomic.Uint64
	// TxTooBig: datagrams larger than the path's MTU (EMSGSIZE).
	TxTooBig atomic.Uint64
	// TxUnreachable: no route, network or host unreachable, or refused by a firewall.
	TxUnreachable atomic.Uint64
	// TxFull: the send buffer was full.
	TxFull atomic.Uint64
	// TxError: any other error.
	TxError atomic.Uint64
	// TxControl and TxControlError: what SendControl sent, and what it returned
	// an error for, a probe that was larger than the MTU among them. The Tx
	// fields above do not count it.
	TxControl, TxControlError atomic.Uint64
	// ICMPErrors and ICMPTooBig: errors that came back for datagrams that were
	// sent before, and those among them that tell of a smaller path MTU.
	ICMPErrors, ICMPTooBig atomic.Uint64
}

// Offloads is the state of the sockets' offloads, for `tulle status`: each is
// "on", "off" (switched off) or the reason why it is not available.
type Offloads struct {
	GSO string `json:"gso"`
	GRO string `json:"gro"`
	// ReceiveBuffer and SendBuffer are the granted sizes in bytes of each
	// socket, without what the kernel adds for its own bookkeeping.
	ReceiveBuffer int `json:"receive_buffer"`
	SendBuffer    int `json:"send_buffer"`
}
