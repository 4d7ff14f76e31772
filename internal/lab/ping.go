package lab

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// PingOptions configures a Pinger.
type PingOptions struct {
	// Size of the payload in bytes, 0 to 65,507; default 56, as ping has it;
	// negative: none.
	Size int
	// DontFragment makes a packet that is too big for the path an error.
	DontFragment bool
}

// Pinger sends ICMP or ICMPv6 echo requests (RFC 792, RFC 4443). It is not
// safe for concurrent use.
type Pinger struct {
	conn net.PacketConn
	dst  netip.Addr
	msg  []byte
	buf  []byte
	seq  uint16
}

// pingers counts this process's, for the identifiers of the requests.
var pingers atomic.Uint32

// NewPinger opens a raw socket in the host; the caller must Close it.
func (h *Host) NewPinger(dst netip.Addr, o PingOptions) (*Pinger, error) {
	if o.Size == 0 {
		o.Size = 56
	}
	size := max(o.Size, 0)
	p := &Pinger{dst: dst.Unmap(), msg: make([]byte, 8+size), buf: make([]byte, 65536)}
	p.msg[0] = 8
	if p.dst.Is6() {
		p.msg[0] = 128
	}
	id := uint32(os.Getpid())<<4 + pingers.Add(1)
	binary.BigEndian.PutUint16(p.msg[4:], uint16(id))
	for i := range size {
		p.msg[8+i] = byte(i)
	}
	err := h.Do(func() (err error) {
		p.conn, err = openICMP(p.dst.Is6(), o.DontFragment)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("lab: %s: ping %s: %w", h.name, dst, err)
	}
	return p, nil
}

func openICMP(v6, dontFragment bool) (net.PacketConn, error) {
	family, proto, level, opt, val := unix.AF_INET, unix.IPPROTO_ICMP, unix.IPPROTO_IP, unix.IP_MTU_DISCOVER, unix.IP_PMTUDISC_DO
	if v6 {
		family, proto, level, opt, val = unix.AF_INET6, unix.IPPROTO_ICMPV6, unix.IPPROTO_IPV6, unix.IPV6_MTU_DISCOVER, unix.IPV6_PMTUDISC_DO
	}
	if !dontFragment {
		val = 0 // IP_PMTUDISC_DONT, the same number for both
	}
	fd, err := unix.Socket(family, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, proto)
	if err != nil {
		return nil, os.NewSyscallError("socket", err)
	}
	f := os.NewFile(uintptr(fd), "icmp")
	defer f.Close() // FilePacketConn makes a copy
	if err := unix.SetsockoptInt(fd, level, opt, val); err != nil {
		return nil, os.NewSyscallError("setsockopt", err)
	}
	return net.FilePacketConn(f)
}

// Ping sends one request and waits for its reply, at most until ctx is done.
// It returns the round trip's time. Replies to earlier requests are ignored.
func (p *Pinger) Ping(ctx context.Context) (time.Duration, error) {
	p.seq++
	binary.BigEndian.PutUint16(p.msg[6:], p.seq)
	if !p.dst.Is6() { // for ICMPv6 the kernel does it
		p.msg[2], p.msg[3] = 0, 0
		binary.BigEndian.PutUint16(p.msg[2:], checksum(p.msg))
	}
	if err := p.conn.SetReadDeadline(time.Time{}); err != nil {
		return 0, fmt.Errorf("lab: ping %s: %w", p.dst, err)
	}
	stopped := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		p.conn.SetReadDeadline(time.Unix(1, 0))
		close(stopped)
	})
	defer func() {
		if !stop() {
			<-stopped // or it would end the next Ping
		}
	}()
	start := time.Now()
	if _, err := p.conn.WriteTo(p.msg, &net.IPAddr{IP: p.dst.AsSlice()}); err != nil {
		return 0, fmt.Errorf("lab: ping %s: %w", p.dst, err)
	}
	for {
		n, from, err := p.conn.ReadFrom(p.buf)
		if err != nil {
			if errors.Is(err, os.ErrDeadlineExceeded) {
				err = fmt.Errorf("no reply in %s: %w", time.Since(start).Round(time.Millisecond), context.Cause(ctx))
			}
			return 0, fmt.Errorf("lab: ping %s: %w", p.dst, err)
		}
		if p.isReply(p.buf[:n], from) {
			return time.Since(start), nil
		}
	}
}

// isReply reports whether b answers the last request, payload and all.
func (p *Pinger) isReply(b []byte, from net.Addr) bool {
	want := byte(0)
	if p.dst.Is6() {
		want = 129
	}
	ip, ok := from.(*net.IPAddr)
	if !ok || len(b) != len(p.msg) || b[0] != want {
		return false
	}
	addr, _ := netip.AddrFromSlice(ip.IP)
	return addr.Unmap() == p.dst.WithZone("") && string(b[4:]) == string(p.msg[4:])
}

// Close closes the socket.
func (p *Pinger) Close() error { return p.conn.Close() }

// Ping sends one request with 56 bytes, and is over when ctx is.
func (h *Host) Ping(ctx context.Context, dst netip.Addr) (time.Duration, error) {
	p, err := h.NewPinger(dst, PingOptions{})
	if err != nil {
		return 0, err
	}
	defer p.Close()
	return p.Ping(ctx)
}

// WaitPing pings until a reply comes and returns how long that took in all; it
// gives up when ctx is done.
func (h *Host) WaitPing(ctx context.Context, dst netip.Addr) (time.Duration, error) {
	start := time.Now()
	p, err := h.NewPinger(dst, PingOptions{})
	if err != nil {
		return 0, err
	}
	defer p.Close()
	for {
		try, cancel := context.WithTimeout(ctx, 100*time.Millisecond)
		_, err := p.Ping(try)
		if err != nil {
			<-try.Done() // "network is unreachable" comes at once
		}
		cancel()
		if err == nil {
			return time.Since(start), nil
		}
		if ctx.Err() != nil {
			return 0, fmt.Errorf("lab: %s: ping %s: no reply in %s: %w", h.name, dst, time.Since(start).Round(time.Millisecond), ctx.Err())
		}
	}
}

// checksum is the Internet checksum (RFC 1071).
func checksum(b []byte) uint16 {
	var sum uint32
	for ; len(b) > 1; b = b[2:] {
		sum += uint32(b[0])<<8 | uint32(b[1])
	}
	if len(b) == 1 {
		sum += uint32(b[0]) << 8
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	return ^uint16(sum)
}
