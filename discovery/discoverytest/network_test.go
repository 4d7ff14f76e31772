package discoverytest

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"testing"
	"testing/synctest"
	"time"
)

const delay = 3 * time.Millisecond

var (
	portA = netip.MustParseAddrPort("192.0.2.1:7946")
	portB = netip.MustParseAddrPort("192.0.2.2:7946")
)

func TestDatagrams(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := NewNetwork(delay)
		a, err := n.Host(portA.Addr()).ListenPacket(portA)
		if err != nil {
			t.Fatal(err)
		}
		b, err := n.Host(portB.Addr()).ListenPacket(portB)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := n.Host(portB.Addr()).ListenPacket(portB); err == nil {
			t.Error("a port was opened twice")
		}
		begin := time.Now()
		if _, err := a.WriteTo([]byte("hello"), net.UDPAddrFromAddrPort(portB)); err != nil {
			t.Fatal(err)
		}
		buf := make([]byte, 100)
		got, from, err := b.ReadFrom(buf)
		if err != nil || string(buf[:got]) != "hello" || from.String() != portA.String() || time.Since(begin) != delay {
			t.Errorf("read %q from %v, %v, after %v", buf[:got], from, err, time.Since(begin))
		}
		n.SetLoss(0.5)
		for range 1000 {
			if _, err := a.WriteTo([]byte("x"), net.UDPAddrFromAddrPort(portB)); err != nil {
				t.Fatal(err)
			}
		}
		time.Sleep(2 * delay)
		c := n.Counts()
		if c.Datagrams != 1001 || c.DatagramBytes != 1005 || c.Lost < 350 || c.Lost > 650 {
			t.Errorf("%+v", c)
		}
		if waiting := uint64(len(b.(*packetConn).in)); waiting+c.Lost+c.Overflows != 1000 {
			t.Errorf("%d wait, of %+v", waiting, c)
		}
		if err := errors.Join(a.Close(), b.Close()); err != nil {
			t.Error(err)
		}
		if _, _, err := b.ReadFrom(buf); !errors.Is(err, net.ErrClosed) {
			t.Errorf("read of a closed port: %v", err)
		}
	})
}

func TestStreams(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := NewNetwork(delay)
		from := n.Host(portA.Addr())
		if _, err := from.Dial(t.Context(), portB); err == nil {
			t.Error("a stream to nobody")
		}
		l, err := n.Host(portB.Addr()).Listen(portB)
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		begin := time.Now()
		c, err := from.Dial(t.Context(), portB)
		if err != nil || time.Since(begin) != 2*delay {
			t.Fatalf("dialled: %v after %v", err, time.Since(begin))
		}
		s, err := l.Accept()
		if err != nil || s.RemoteAddr().(*net.TCPAddr).AddrPort().Addr() != portA.Addr() {
			t.Fatalf("accepted: %v, %v", s, err)
		}
		long := bytes.Repeat([]byte("0123456789"), 100<<10)
		go func() {
			for rest := long; len(rest) > 0; rest = rest[min(len(rest), 5000):] {
				_, _ = c.Write(rest[:min(len(rest), 5000)])
			}
			_ = c.Close()
		}()
		begin = time.Now()
		got, err := io.ReadAll(s)
		if err != nil || !bytes.Equal(got, long) || time.Since(begin) != delay {
			t.Errorf("read %d bytes, %v, after %v", len(got), err, time.Since(begin))
		}
		if _, err := s.Write([]byte("x")); err == nil {
			t.Error("a write to who reads no more")
		}
		_ = s.Close()
	})
}

func TestStreamsEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := NewNetwork(delay)
		l, err := n.Host(portB.Addr()).Listen(portB)
		if err != nil {
			t.Fatal(err)
		}
		c, err := n.Host(portA.Addr()).Dial(t.Context(), portB)
		if err != nil {
			t.Fatal(err)
		}
		begin := time.Now()
		_ = c.SetDeadline(begin.Add(time.Second))
		if _, err := c.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) || time.Since(begin) != time.Second {
			t.Errorf("deadline: %v after %v", err, time.Since(begin))
		}
		_ = c.SetDeadline(time.Time{})
		time.AfterFunc(time.Second, func() { _ = c.Close() })
		if _, err := c.Read(make([]byte, 1)); !errors.Is(err, net.ErrClosed) {
			t.Errorf("closed under a read: %v", err)
		}
		if err := l.Close(); err != nil {
			t.Error(err)
		}
		if _, err := l.Accept(); !errors.Is(err, net.ErrClosed) {
			t.Errorf("accept of a closed listener: %v", err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if _, err := n.Host(portA.Addr()).Dial(ctx, portB); !errors.Is(err, context.Canceled) {
			t.Errorf("dial, cancelled: %v", err)
		}
	})
}
