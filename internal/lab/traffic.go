package lab

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/maphash"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// Dial connects from the host; address must hold an IP, not a name.
func (h *Host) Dial(ctx context.Context, network, address string) (net.Conn, error) {
	var c net.Conn
	err := h.Do(func() (err error) {
		var d net.Dialer
		c, err = d.DialContext(ctx, network, address)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("lab: %s: %w", h.name, err)
	}
	return c, nil
}

// Listen listens for TCP connections in the host.
func (h *Host) Listen(address string) (net.Listener, error) {
	var ln net.Listener
	err := h.Do(func() (err error) {
		ln, err = net.Listen("tcp", address)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("lab: %s: %w", h.name, err)
	}
	return ln, nil
}

// ListenPacket opens a UDP socket in the host.
func (h *Host) ListenPacket(address string) (net.PacketConn, error) {
	var c net.PacketConn
	err := h.Do(func() (err error) {
		c, err = net.ListenPacket("udp", address)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("lab: %s: %w", h.name, err)
	}
	return c, nil
}

// Transferred is what a transfer came to.
type Transferred struct {
	Bytes int64
	Took  time.Duration // at the receiver, from the first byte to the last
	// Hash of the content, the same at both ends; it holds for this process only.
	Hash uint64
}

// BitsPerSecond is the rate of the payload.
func (t Transferred) BitsPerSecond() float64 { return float64(t.Bytes) * 8 / t.Took.Seconds() }

// Amount says when a transfer is over: at the first limit that is reached.
// Zero is no limit; one must be set.
type Amount struct {
	Bytes int64
	For   time.Duration
}

// blockLen is what one write takes. Each block holds random bytes and its own
// number, so that a block that is lost, doubled or misplaced changes the hash.
const blockLen = 256 << 10

// Transfer sends random bytes over TCP to an address of `to`, whose port may be
// 0, and compares a 64-bit hash of what was sent and received: a difference is
// an error. (Not SHA-256: it would be slower than the network.)
func (l *Lab) Transfer(ctx context.Context, from, to *Host, addr netip.AddrPort, much Amount) (Transferred, error) {
	fail := func(err error) (Transferred, error) {
		return Transferred{}, fmt.Errorf("lab: transfer %s to %s: %w", from.name, to.name, err)
	}
	if much.Bytes <= 0 && much.For <= 0 {
		return fail(errors.New("no amount"))
	}
	ln, err := to.Listen(addr.String())
	if err != nil {
		return fail(err)
	}
	defer ln.Close()
	seed := maphash.MakeSeed()
	type result struct {
		Transferred
		err error
	}
	received := make(chan result, 1)
	// Closing all that is open ends both sides, whatever they wait for.
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	go func() {
		defer context.AfterFunc(ctx, func() { ln.Close() })()
		c, err := ln.Accept()
		if err != nil {
			received <- result{err: err}
			return
		}
		defer c.Close()
		defer context.AfterFunc(ctx, func() { c.Close() })()
		r, err := receive(c, seed)
		received <- result{r, err}
	}()
	sent, err := dialAndSend(ctx, from, ln.Addr().String(), seed, much)
	if err != nil {
		cancel()
		<-received
		return fail(err)
	}
	r := <-received
	switch {
	case ctx.Err() != nil:
		return fail(ctx.Err())
	case r.err != nil:
		return fail(r.err)
	case r.Bytes != sent.Bytes || r.Hash != sent.Hash:
		return fail(fmt.Errorf("sent %d bytes with hash %016x, received %d with %016x", sent.Bytes, sent.Hash, r.Bytes, r.Hash))
	}
	return r.Transferred, nil
}

func dialAndSend(ctx context.Context, from *Host, address string, seed maphash.Seed, much Amount) (Transferred, error) {
	c, err := from.Dial(ctx, "tcp", address)
	if err != nil {
		return Transferred{}, err
	}
	defer c.Close()
	defer context.AfterFunc(ctx, func() { c.Close() })()
	var t Transferred
	var h maphash.Hash
	h.SetSeed(seed)
	block := make([]byte, blockLen)
	for i := 0; i < len(block); i += 8 {
		binary.NativeEndian.PutUint64(block[i:], rand.Uint64())
	}
	for start := time.Now(); much.For <= 0 || time.Since(start) < much.For; {
		binary.NativeEndian.PutUint64(block, uint64(t.Bytes))
		b := block
		if much.Bytes > 0 {
			b = b[:min(int64(len(b)), much.Bytes-t.Bytes)]
		}
		if len(b) == 0 {
			break
		}
		if _, err := c.Write(b); err != nil {
			return t, err
		}
		h.Write(b)
		t.Bytes += int64(len(b))
	}
	t.Hash = h.Sum64()
	return t, c.Close() // what is buffered is still sent
}

func receive(c net.Conn, seed maphash.Seed) (Transferred, error) {
	var t Transferred
	var h maphash.Hash
	var start time.Time
	h.SetSeed(seed)
	for buf := make([]byte, blockLen); ; {
		n, err := c.Read(buf)
		if start.IsZero() {
			start = time.Now()
		}
		h.Write(buf[:n])
		t.Bytes += int64(n)
		if err != nil {
			t.Took, t.Hash = max(time.Since(start), 1), h.Sum64()
			if err == io.EOF {
				err = nil
			}
			return t, err
		}
	}
}

// Sniff returns the first Ethernet frame on a device, in or out, that match
// accepts; match borrows it. It is ready to see frames when it calls ready.
func (h *Host) Sniff(ctx context.Context, dev string, ready func(), match func(frame []byte) bool) ([]byte, error) {
	link, err := h.link(dev)
	if err != nil {
		return nil, err
	}
	var f *os.File
	err = h.Do(func() error {
		const all = unix.ETH_P_ALL<<8&0xff00 | unix.ETH_P_ALL>>8 // network order, on little-endian machines
		fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
		if err != nil {
			return os.NewSyscallError("socket", err)
		}
		f = os.NewFile(uintptr(fd), "packet")
		return os.NewSyscallError("bind", unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: all, Ifindex: link.Attrs().Index}))
	})
	if f != nil {
		defer f.Close()
	}
	if err != nil {
		return nil, fmt.Errorf("lab: %s: sniff %s: %w", h.name, dev, err)
	}
	defer context.AfterFunc(ctx, func() { f.SetReadDeadline(time.Unix(1, 0)) })()
	ready()
	for buf := make([]byte, 65536); ; {
		n, err := f.Read(buf)
		if ctx.Err() != nil {
			err = ctx.Err()
		}
		if err != nil {
			return nil, fmt.Errorf("lab: %s: sniff %s: %w", h.name, dev, err)
		}
		if match(buf[:n]) {
			return buf[:n:n], nil
		}
	}
}
