package underlay

import (
	"encoding/binary"
	"fmt"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/tulle-net/tulle/internal/ready"
)

const (
	// rxSlots is what one recvmmsg takes: 8 were measured 1.6 times slower, 64 the same.
	rxSlots = 32
	// rxStride keeps the slots off a 64 KiB stride, where the first bytes of
	// all of them would compete for the same sets of the cache.
	rxStride = 64<<10 + 17*64
	// rxControl holds UDP_GRO and SO_RXQ_OVFL.
	rxControl = 64
)

// rxMemory is Batch.Memory: what recvmmsg fills.
type rxMemory struct {
	buf   []byte
	used  int // slots that the last call wrote
	hdrs  [rxSlots]mmsghdr
	iovs  [rxSlots]unix.Iovec
	names [rxSlots]unix.RawSockaddrInet6
	ctl   [rxSlots][rxControl / 8]uint64 // of words: aligned for cmsghdr
}

func newRxMemory(slotLen int) *rxMemory {
	m := &rxMemory{buf: make([]byte, rxSlots*rxStride)}
	for i := range m.hdrs {
		m.iovs[i].Base = &m.buf[i*rxStride]
		m.iovs[i].SetLen(slotLen)
		h := &m.hdrs[i].hdr
		h.Iov = &m.iovs[i]
		h.SetIovlen(1)
		h.Name = (*byte)(unsafe.Pointer(&m.names[i]))
		h.Control = (*byte)(unsafe.Pointer(&m.ctl[i]))
	}
	m.used = rxSlots
	m.reset()
	return m
}

// reset gives back the lengths that the last call overwrote.
func (m *rxMemory) reset() {
	for i := range m.hdrs[:m.used] {
		h := &m.hdrs[i].hdr
		h.Namelen = unix.SizeofSockaddrInet6
		h.SetControllen(rxControl)
	}
	m.used = 0
}

// receiver is one listening socket.
type receiver struct {
	c     *conn
	file  *ready.File
	call  func(fd uintptr) // made once: a closure per call would allocate
	mem   *rxMemory        // call's memory
	n     int              // call's result
	errno unix.Errno
	drops uint32 // the socket's counter as last told
}

func newReceiver(c *conn, file *ready.File) *receiver {
	r := &receiver{c: c, file: file}
	r.call = func(fd uintptr) {
		// Raw: MSG_DONTWAIT cannot block, so the scheduler need not know.
		n, _, errno := unix.RawSyscall6(unix.SYS_RECVMMSG, fd, uintptr(unsafe.Pointer(&r.mem.hdrs)), rxSlots, unix.MSG_DONTWAIT, 0, 0)
		r.n, r.errno = int(n), unix.Errno(errno)
	}
	return r
}

func (r *receiver) Wait() error {
	if err := r.file.Wait(); err != nil {
		return ErrClosed
	}
	return nil
}

func (r *receiver) Rest(d time.Duration) { r.file.Rest(d) }

// maxReceiveRetries bounds the errors that one Receive consumes: the kernel
// reports an error that is pending on a socket once, before its datagrams.
const maxReceiveRetries = 4

func (r *receiver) Receive(b *Batch) error {
	m, ok := b.Memory.(*rxMemory)
	if !ok {
		m = newRxMemory(MaxDatagram)
		b.Memory, b.Slots = m, make([]Slot, 0, rxSlots)
	}
	b.Slots, b.More = b.Slots[:0], false
	m.reset()
	r.mem = m
	for try := 0; ; try++ {
		if err := r.file.Control(r.call); err != nil {
			return ErrClosed
		}
		switch {
		case r.errno == 0:
			r.slots(b, m)
			return nil
		case r.errno == unix.EAGAIN:
			return nil
		case r.errno != unix.EINTR && try >= maxReceiveRetries:
			return fmt.Errorf("underlay: receive: recvmmsg: %w", r.errno)
		}
	}
}

// slots turns what the call filled into b.Slots.
func (r *receiver) slots(b *Batch, m *rxMemory) {
	m.used, b.More = r.n, r.n == rxSlots
	var datagrams, bytes, truncated, drops uint64
	for i := range m.hdrs[:r.n] {
		h := &m.hdrs[i]
		segmentLen, dropped := m.control(i, r.drops)
		drops += uint64(dropped - r.drops) // modulo 2^32, as the kernel counts
		r.drops = dropped
		if h.hdr.Flags&unix.MSG_TRUNC != 0 {
			truncated++
			continue
		}
		n := int(h.n)
		s := Slot{Src: addrPortOf(&m.names[i]), B: m.buf[i*rxStride:][:n:n]}
		bytes += uint64(n)
		datagrams++
		if segmentLen > 0 && segmentLen < n {
			s.SegmentLen = segmentLen
			datagrams += uint64((n - 1) / segmentLen)
		}
		b.Slots = append(b.Slots, s)
	}
	st := &r.c.stats
	st.RxCalls.Add(1)
	st.RxSlots.Add(uint64(len(b.Slots)))
	st.RxDatagrams.Add(datagrams)
	st.RxBytes.Add(bytes)
	if truncated != 0 {
		st.RxTruncated.Add(truncated)
	}
	if drops != 0 {
		st.RxOverflow.Add(drops)
	}
}

// control returns the segment size of slot i (0: not told) and the socket's
// drop counter (the kernel tells it only once it is not zero).
func (m *rxMemory) control(i int, drops uint32) (segmentLen int, dropped uint32) {
	n := int(m.hdrs[i].hdr.Controllen)
	ctl := unsafe.Slice((*byte)(unsafe.Pointer(&m.ctl[i])), rxControl)[:min(n, rxControl)]
	for len(ctl) >= unix.CmsgLen(4) {
		h := (*unix.Cmsghdr)(unsafe.Pointer(&ctl[0]))
		if int(h.Len) < unix.CmsgLen(4) {
			break
		}
		v := binary.NativeEndian.Uint32(ctl[unix.CmsgLen(0):])
		switch {
		case h.Level == unix.SOL_UDP && h.Type == unix.UDP_GRO:
			segmentLen = int(int32(v))
		case h.Level == unix.SOL_SOCKET && h.Type == unix.SO_RXQ_OVFL:
			drops = v
		}
		ctl = ctl[min(unix.CmsgSpace(int(h.Len)-unix.CmsgLen(0)), len(ctl)):]
	}
	return segmentLen, drops
}
