package underlay

import (
	"encoding/binary"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

const (
	// maxMmsg is the most messages of one call.
	maxMmsg = 64
	// txControl holds UDP_SEGMENT and a TTL.
	txControl = 64
	// txWait is how long one Flush waits for room in send buffers.
	txWait = 5 * time.Millisecond
	// txPause is the wait for a device's queue, which no poll tells of.
	txPause = 100 * time.Microsecond
	// icmpTries bounds how often one message is tried again because an error
	// of an earlier datagram was reported in its place.
	icmpTries = 4
)

// outbox is the memory of the calls that send, and what they came to.
type outbox struct {
	hdrs    []mmsghdr
	iovs    []unix.Iovec
	names   []unix.RawSockaddrInet6
	ctl     [][txControl / 8]uint64 // of words: aligned for cmsghdr
	message [maxMmsg]int32          // the sender's message of each header
	iovUsed int

	// singleHdr sends one datagram of a train.
	singleHdr unix.Msghdr
	singleIov unix.Iovec

	errors   errorReader
	deadline time.Time // of waits; zero before the first
	pollFd   unix.PollFd
	pollTime unix.Timespec

	datagrams, bytes, trains, calls        uint64
	tooBig, unreachable, full, other, icmp uint64
	icmpTooBig                             uint64
}

func (o *outbox) init() {
	o.hdrs = make([]mmsghdr, maxMmsg)
	o.iovs = make([]unix.Iovec, maxPieces)
	o.names = make([]unix.RawSockaddrInet6, maxMmsg)
	o.ctl = make([][txControl / 8]uint64, maxMmsg)
	for i := range o.hdrs {
		o.hdrs[i].hdr.Name = (*byte)(unsafe.Pointer(&o.names[i]))
	}
}

// begin starts a Flush.
func (o *outbox) begin() {
	o.deadline = time.Time{}
	o.datagrams, o.bytes, o.trains, o.calls = 0, 0, 0, 0
	o.tooBig, o.unreachable, o.full, o.other, o.icmp, o.icmpTooBig = 0, 0, 0, 0, 0, 0
}

// count adds what the Flush came to.
func (o *outbox) count(st *Stats) {
	st.TxDatagrams.Add(o.datagrams)
	st.TxBytes.Add(o.bytes)
	st.TxTrains.Add(o.trains)
	st.TxCalls.Add(o.calls)
	if o.tooBig|o.unreachable|o.full|o.other|o.icmp == 0 {
		return
	}
	st.TxTooBig.Add(o.tooBig)
	st.TxUnreachable.Add(o.unreachable)
	st.TxFull.Add(o.full)
	st.TxError.Add(o.other)
	st.ICMPErrors.Add(o.icmp)
	st.ICMPTooBig.Add(o.icmpTooBig)
}

// control writes header n's control messages: the train's segment size and the
// TTL, each unless it is 0.
func (o *outbox) control(n, segmentLen, ttl int, is4 bool) {
	h := &o.hdrs[n].hdr
	b := unsafe.Slice((*byte)(unsafe.Pointer(&o.ctl[n])), txControl)
	used := 0
	if segmentLen != 0 {
		used = putSegmentLen(b, segmentLen)
	}
	if ttl != 0 {
		level, option := int32(unix.SOL_IPV6), int32(unix.IPV6_HOPLIMIT)
		if is4 {
			level, option = unix.SOL_IP, unix.IP_TTL
		}
		binary.NativeEndian.PutUint32(putCmsg(b[used:], level, option, 4), uint32(ttl))
		used += unix.CmsgSpace(4)
	}
	h.SetControllen(used)
	h.Control = nil
	if used != 0 {
		h.Control = &b[0]
	}
}

// putSegmentLen writes the control message UDP_SEGMENT to b, which is aligned
// for cmsghdr, and returns the space that it takes.
func putSegmentLen(b []byte, segmentLen int) int {
	binary.NativeEndian.PutUint16(putCmsg(b, unix.SOL_UDP, unix.UDP_SEGMENT, 2), uint16(segmentLen))
	return unix.CmsgSpace(2)
}

// putCmsg writes a control message's header to b and returns the room for its
// n bytes.
func putCmsg(b []byte, level, option int32, n int) []byte {
	c := (*unix.Cmsghdr)(unsafe.Pointer(&b[0]))
	c.Level, c.Type = level, option
	c.SetLen(unix.CmsgLen(n))
	return b[unix.CmsgLen(0):][:n]
}

// call sends headers i to n-1 and returns how many went. Raw: MSG_DONTWAIT
// cannot block, so the scheduler need not know.
func (o *outbox) call(fd, i, n int) (sent int, errno unix.Errno) {
	o.calls++
	if n-i == 1 {
		_, _, errno = unix.RawSyscall(unix.SYS_SENDMSG, uintptr(fd), uintptr(unsafe.Pointer(&o.hdrs[i].hdr)), unix.MSG_DONTWAIT)
		return 1, errno
	}
	r, _, errno := unix.RawSyscall6(unix.SYS_SENDMMSG, uintptr(fd), uintptr(unsafe.Pointer(&o.hdrs[i])), uintptr(n-i), unix.MSG_DONTWAIT, 0, 0)
	return int(r), errno
}

// single prepares callSingle for datagrams of header i's message.
func (o *outbox) single(i int) {
	h := &o.hdrs[i].hdr
	o.singleHdr = unix.Msghdr{Name: h.Name, Namelen: h.Namelen, Iov: &o.singleIov}
	o.singleHdr.SetIovlen(1)
}

// callSingle sends what singleIov holds, waiting and trying again as sendAll does.
func (o *outbox) callSingle(c *conn, fd int) unix.Errno {
	tries := 0
	for {
		o.calls++
		_, _, errno := unix.RawSyscall(unix.SYS_SENDMSG, uintptr(fd), uintptr(unsafe.Pointer(&o.singleHdr)), unix.MSG_DONTWAIT)
		if errno == 0 || !o.again(c, fd, errno, &tries) {
			return errno
		}
	}
}

// again reports whether a send that failed with errno is worth another try.
func (o *outbox) again(c *conn, fd int, errno unix.Errno, tries *int) bool {
	switch errno {
	case unix.EINTR:
		return true
	case unix.EAGAIN, unix.ENOBUFS:
		return o.wait(fd, errno)
	}
	// The error may be one that an ICMP message brought for an earlier
	// datagram, perhaps to another destination: once it is told, it is gone.
	icmp, tooBig := o.errors.drain(fd)
	o.icmp += uint64(icmp)
	o.icmpTooBig += uint64(tooBig)
	if tooBig > 0 {
		c.noteTooBig(unix.EMSGSIZE)
	}
	*tries++
	return *tries == 1 || icmp > 0 && *tries < icmpTries
}

// wait waits until fd may take more; false: this Flush has waited enough.
func (o *outbox) wait(fd int, errno unix.Errno) bool {
	now := time.Now()
	if o.deadline.IsZero() {
		o.deadline = now.Add(txWait)
	}
	left := o.deadline.Sub(now)
	if left <= 0 {
		return false
	}
	o.pollFd = unix.PollFd{Fd: int32(fd), Events: unix.POLLOUT}
	fds := uintptr(1)
	if errno == unix.ENOBUFS {
		// A device's queue is full, not the socket's buffer.
		fds, left = 0, min(left, txPause)
	}
	o.pollTime = unix.NsecToTimespec(int64(left))
	_, _, _ = unix.Syscall6(unix.SYS_PPOLL, uintptr(unsafe.Pointer(&o.pollFd)), fds, uintptr(unsafe.Pointer(&o.pollTime)), 0, 0, 0)
	return true
}

// sent counts one message or datagram that went.
func (o *outbox) sent(datagrams, bytes uint64) {
	o.trains++
	o.datagrams += datagrams
	o.bytes += bytes
}

// failed counts datagrams under their reason.
func (o *outbox) failed(errno unix.Errno, datagrams uint64) {
	switch errno {
	case unix.EMSGSIZE:
		o.tooBig += datagrams
	case unix.EAGAIN, unix.ENOBUFS:
		o.full += datagrams
	case unix.ENETUNREACH, unix.EHOSTUNREACH, unix.ENETDOWN, unix.EHOSTDOWN, unix.ECONNREFUSED,
		unix.EPERM, unix.EACCES, unix.EADDRNOTAVAIL:
		o.unreachable += datagrams
	default:
		o.other += datagrams
	}
}
