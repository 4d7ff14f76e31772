package outward

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"testing"
	"time"

	"go.uber.org/goleak"
	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/link/channel"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv6"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/udp"

	"github.com/tulle-net/tulle/ether"
	"github.com/tulle-net/tulle/tap"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var (
	gateway4, gateway6 = netip.MustParseAddr("10.32.0.1"), netip.MustParseAddr("fd32::1")
	inside4, inside6   = netip.MustParseAddr("10.32.0.7"), netip.MustParseAddr("fd32::7")
	insideMAC          = ether.MACOf(inside4)
)

func newWay(t *testing.T) *Way {
	t.Helper()
	w, err := New(Config{
		Name: "tg-blue", MAC: ether.MACOf(gateway4), Gateways: []netip.Addr{gateway4, gateway6}, MTU: 1418, Log: slog.New(slog.DiscardHandler),
		Subnets: []netip.Prefix{netip.MustParsePrefix("10.32.0.0/16"), netip.MustParsePrefix("fd32::/64")},
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = w.Close() })
	w.Serve([]Endpoint{{inside4, insideMAC}, {inside6, insideMAC}}, []uint16{4789})
	return w
}

// endpoint is an endpoint's host: another stack, behind the bridge's side of a Way.
type endpoint struct {
	stack *stack.Stack
	link  *channel.Endpoint
}

func newEndpoint(t *testing.T, w *Way) *endpoint {
	t.Helper()
	e := &endpoint{link: channel.New(256, 1418, "")}
	e.stack = stack.New(stack.Options{
		NetworkProtocols:   []stack.NetworkProtocolFactory{ipv4.NewProtocol, ipv6.NewProtocol},
		TransportProtocols: []stack.TransportProtocolFactory{tcp.NewProtocol, udp.NewProtocol},
	})
	if err := e.stack.CreateNIC(nic, e.link); err != nil {
		t.Fatal(err)
	}
	if err := tune(e.stack); err != nil {
		t.Fatal(err)
	}
	for _, a := range []netip.Addr{inside4, inside6} {
		proto := ipv4.ProtocolNumber
		if a.Is6() {
			proto = ipv6.ProtocolNumber
		}
		at := tcpip.ProtocolAddress{Protocol: proto, AddressWithPrefix: addressOf(a).WithPrefix()}
		if err := e.stack.AddProtocolAddress(nic, at, stack.AddressProperties{}); err != nil {
			t.Fatal(err)
		}
	}
	e.stack.SetRouteTable([]tcpip.Route{{Destination: header.IPv4EmptySubnet, NIC: nic}, {Destination: header.IPv6EmptySubnet, NIC: nic}})
	ctx, cancel := context.WithCancel(context.Background())
	out, in := make(chan struct{}), make(chan struct{})
	go func() { // to the Way
		defer close(out)
		for pkt := e.link.ReadContext(ctx); pkt != nil; pkt = e.link.ReadContext(ctx) {
			frame := frameOf(w.MAC(), insideMAC, uint16(pkt.NetworkProtocolNumber))
			for _, part := range pkt.AsSlices() {
				frame = append(frame, part...)
			}
			pkt.DecRef()
			_ = w.WriteFrame(ether.Meta{}, [][]byte{frame[:20], frame[20:]})
		}
	}()
	go func() { // from it
		defer close(in)
		b := tap.NewBatch()
		for w.Wait() == nil && w.Read(b) == nil {
			for _, f := range b.Frames {
				e.take(t, f)
			}
		}
	}()
	t.Cleanup(func() {
		cancel()
		_ = w.Close()
		<-out
		<-in
		e.stack.Destroy()
	})
	return e
}

// take gives the endpoint's stack a frame, cut and finished as a wire would have it.
func (e *endpoint) take(t *testing.T, f tap.Frame) {
	frames := [][]byte{append([]byte(nil), f.B...)}
	if f.Meta.GSO != ether.GSONone {
		var seg ether.Segmenter
		if err := seg.Reset(frames[0], f.Meta); err != nil {
			t.Errorf("a super-frame cannot be cut: %v, %+v", err, f.Meta)
			return
		}
		frames = nil
		for b := make([]byte, seg.MaxLen()); ; b = make([]byte, seg.MaxLen()) {
			n := seg.Next(b)
			if n == 0 {
				break
			}
			frames = append(frames, b[:n])
		}
	} else if !ether.FinishChecksum(frames[0], f.Meta) {
		t.Errorf("a checksum cannot be finished: %+v", f.Meta)
		return
	}
	for _, b := range frames {
		eth, err := ether.ParseEthernet(b)
		if err != nil || eth.Dst() != insideMAC {
			t.Errorf("a frame to %v: %v", eth.Dst(), err)
			continue
		}
		pkt := stack.NewPacketBuffer(stack.PacketBufferOptions{Payload: buffer.MakeWithData(eth.Payload())})
		e.link.InjectInbound(tcpip.NetworkProtocolNumber(eth.EtherType()), pkt)
		pkt.DecRef()
	}
}

func frameOf(dst, src ether.MAC, kind uint16) []byte {
	b := make([]byte, etherLen, 2048)
	dst.Put(b)
	src.Put(b[6:])
	b[12], b[13] = byte(kind>>8), byte(kind)
	return b
}

// TestPublish: calls to ports of this host end at the endpoint, and what both say arrives.
func TestPublish(t *testing.T) {
	for _, c := range []struct {
		host, inside, gateway netip.Addr
	}{{netip.MustParseAddr("127.0.0.1"), inside4, gateway4}, {netip.MustParseAddr("127.0.0.1"), inside6, gateway6}} {
		t.Run("tcp "+c.inside.String(), func(t *testing.T) {
			w := newWay(t)
			e := newEndpoint(t, w)
			proto := ipv4.ProtocolNumber
			if c.inside.Is6() {
				proto = ipv6.ProtocolNumber
			}
			ln, err := gonet.ListenTCP(e.stack, tcpip.FullAddress{NIC: nic, Addr: addressOf(c.inside), Port: 80}, proto)
			if err != nil {
				t.Fatal(err)
			}
			defer ln.Close()
			p, err := Listen(netip.AddrPortFrom(c.host, 0), "tcp")
			if err != nil {
				t.Fatal(err)
			}
			defer p.Close()
			p.Lead(w, netip.AddrPortFrom(c.inside, 80))
			got := make(chan error, 1)
			go func() { got <- echoOnce(ln, c.gateway) }()
			conn, err := net.Dial("tcp", p.tcp.Addr().String())
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			const size = 4 << 20
			sent := make(chan error, 1)
			go func() {
				for i := range size / 1024 {
					if _, err := conn.Write(slices.Repeat([]byte{byte(i)}, 1024)); err != nil {
						sent <- err
						return
					}
				}
				sent <- conn.(*net.TCPConn).CloseWrite()
			}()
			b, err := io.ReadAll(conn)
			if err = errors.Join(err, <-sent, <-got); err != nil || len(b) != size {
				t.Fatalf("%d bytes come back of %d: %v", len(b), size, err)
			}
			for i, x := range b {
				if x != byte(i/1024) {
					t.Fatalf("byte %d is %d, want %d", i, x, byte(i/1024))
				}
			}
		})
	}
	t.Run("udp", func(t *testing.T) {
		w := newWay(t)
		e := newEndpoint(t, w)
		laddr := tcpip.FullAddress{NIC: nic, Addr: addressOf(inside4), Port: 53}
		server, err := gonet.DialUDP(e.stack, &laddr, nil, ipv4.ProtocolNumber)
		if err != nil {
			t.Fatal(err)
		}
		defer server.Close()
		p, err := Listen(netip.MustParseAddrPort("127.0.0.1:0"), "udp")
		if err != nil {
			t.Fatal(err)
		}
		defer p.Close()
		p.Lead(w, netip.AddrPortFrom(inside4, 53))
		for i := range 2 { // two clients are two flows
			conn, err := net.Dial("udp", p.udp.LocalAddr().String())
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			if _, err := fmt.Fprintf(conn, "question %d", i); err != nil {
				t.Fatal(err)
			}
			b := make([]byte, 100)
			n, from, err := server.ReadFrom(b)
			if err != nil || string(b[:n]) != fmt.Sprintf("question %d", i) || from.(*net.UDPAddr).IP.String() != gateway4.String() {
				t.Fatalf("%q from %v: %v", b[:n], from, err)
			}
			if _, err := server.WriteTo([]byte("answer"), from); err != nil {
				t.Fatal(err)
			}
			if n, err := conn.Read(b); err != nil || string(b[:n]) != "answer" {
				t.Fatalf("%q: %v", b[:n], err)
			}
		}
		if len(w.udp) != 2 {
			t.Errorf("%d flows, want 2", len(w.udp))
		}
		w.Serve(nil, nil) // the endpoint has ended
		for range 200 {
			if len(w.udp) == 0 {
				return
			}
			time.Sleep(10 * time.Millisecond)
		}
		t.Errorf("%d flows are left of an endpoint that has ended", len(w.udp))
	})
}

// echoOnce takes one connection and returns what it says.
func echoOnce(ln net.Listener, from netip.Addr) error {
	conn, err := ln.Accept()
	if err != nil {
		return err
	}
	defer conn.Close()
	if ip := conn.RemoteAddr().(*net.TCPAddr).IP.String(); ip != from.String() {
		return fmt.Errorf("called by %s, want %s", ip, from)
	}
	if _, err := io.Copy(conn, conn); err != nil {
		return err
	}
	return conn.(*gonet.TCPConn).CloseWrite()
}

// TestRefused: what an endpoint must not reach it does not, and is told.
func TestRefused(t *testing.T) {
	w := newWay(t)
	e := newEndpoint(t, w)
	for _, to := range []string{"10.32.0.1:80", "10.32.0.9:80", "169.254.1.1:80", "[fd32::9]:80"} {
		at := netip.MustParseAddrPort(to)
		proto := ipv4.ProtocolNumber
		if at.Addr().Is6() {
			proto = ipv6.ProtocolNumber
		}
		was := w.drops[dropRefused].Load()
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		conn, err := gonet.DialContextTCP(ctx, e.stack, tcpip.FullAddress{NIC: nic, Addr: addressOf(at.Addr()), Port: at.Port()}, proto)
		cancel()
		if err == nil {
			conn.Close()
		}
		if err == nil || errors.Is(err, context.DeadlineExceeded) || w.drops[dropRefused].Load() != was+1 {
			t.Errorf("%s: %v, %d refused, want a refusal at once", to, err, w.drops[dropRefused].Load()-was)
		}
	}
}

func TestMayReach(t *testing.T) {
	w := newWay(t)
	for a, want := range map[string]bool{
		"192.0.2.1": true, "2001:db8::1": true, "10.33.0.1": true,
		"127.0.0.1": false, "::1": false, "::ffff:127.0.0.1": false, "0.0.0.0": false, "::": false, "224.0.0.1": false, "ff02::1": false,
		"255.255.255.255": false, "169.254.169.254": false, "fe80::1": false, "10.32.0.1": false, "10.32.9.9": false, "::ffff:10.32.9.9": false,
	} {
		if got := w.mayReach(netip.MustParseAddr(a)); got != want {
			t.Errorf("mayReach(%s) = %v", a, got)
		}
	}
}

// TestFrames: what is not the gateway's it leaves alone, what it cannot use it counts.
func TestFrames(t *testing.T) {
	mac := ether.MACOf(gateway4)
	ip := func(src, dst netip.Addr, proto byte) []byte {
		b := append(frameOf(mac, insideMAC, ether.EtherTypeIPv4), 0x45, 0, 0, 28, 0, 0, 0, 0, 64, proto, 0, 0)
		b = append(append(b, src.AsSlice()...), dst.AsSlice()...)
		ether.IPv4(b[etherLen:]).SetChecksum()
		return append(b, make([]byte, 8)...)
	}
	from := func(mac ether.MAC, b []byte) []byte { mac.Put(b[6:]); return b }
	to := func(mac ether.MAC, b []byte) []byte { mac.Put(b); return b }
	outside := netip.MustParseAddr("192.0.2.1")
	for _, c := range []struct {
		name  string
		frame []byte
		drop  drop // dropCount: none
		sends bool
	}{
		{"ARP for the gateway", ether.AppendARP(nil, ether.Broadcast, 1, insideMAC, inside4, 0, gateway4), dropCount, true},
		{"ARP for another", ether.AppendARP(nil, ether.Broadcast, 1, insideMAC, inside4, 0, outside), dropCount, false},
		{"solicitation of the gateway", ether.AppendSolicitation(nil, 0, insideMAC, inside6, gateway6), dropCount, true},
		{"solicitation of another", ether.AppendSolicitation(nil, 0, insideMAC, inside6, netip.MustParseAddr("fd32::9")), dropCount, false},
		{"another's address", ip(netip.MustParseAddr("10.32.0.8"), outside, 17), dropSource, false},
		{"another's MAC", from(0x025400000001, ip(inside4, outside, 17)), dropSource, false},
		{"flooded", to(0x025400000002, ip(inside4, outside, 17)), dropCount, false},
		{"multicast", to(0x01005e000001, ip(inside4, netip.MustParseAddr("224.0.0.1"), 17)), dropCount, false},
		{"multicast by unicast", ip(inside4, netip.MustParseAddr("224.0.0.1"), 17), dropGroup, false},
		{"SCTP", ip(inside4, outside, 132), dropProtocol, false},
		{"ICMP of another kind", ip(inside4, outside, 1), dropEcho, false},
		{"cut", ip(inside4, outside, 17)[:20], dropMalformed, false},
		{"another protocol", append(frameOf(mac, insideMAC, 0x88cc), make([]byte, 50)...), dropProtocol, false},
	} {
		w := newWay(t)
		if err := w.WriteFrame(ether.Meta{}, [][]byte{c.frame}); err != nil {
			t.Errorf("%s: %v", c.name, err)
		}
		EachDrop(w, func(name string, count uint64) {
			want := uint64(0)
			if c.drop < dropCount && name == dropNames[c.drop] {
				want = 1
			}
			if count != want {
				t.Errorf("%s: %s = %d, want %d", c.name, name, count, want)
			}
		})
		if got := len(w.out) == 1; got != c.sends {
			t.Errorf("%s: sends %d frames", c.name, len(w.out))
		}
	}
}

// TestQueueBound: what nobody reads is dropped, and counted.
func TestQueueBound(t *testing.T) {
	w := newWay(t)
	ask := ether.AppendARP(nil, ether.Broadcast, 1, insideMAC, inside4, 0, gateway4)
	for range depth + 3 {
		_ = w.WriteFrame(ether.Meta{}, [][]byte{ask})
	}
	if w.Dropped() != 3 {
		t.Errorf("%d dropped, want 3", w.Dropped())
	}
	b := tap.NewBatch()
	read := 0
	for len(w.out) > 0 {
		if err := w.Wait(); err != nil {
			t.Fatal(err)
		}
		if err := w.Read(b); err != nil {
			t.Fatal(err)
		}
		read += len(b.Frames)
	}
	if read != depth {
		t.Errorf("%d frames read, want %d", read, depth)
	}
	_ = w.Close()
	if err := w.Wait(); err != tap.ErrClosed {
		t.Errorf("Wait after Close: %v", err)
	}
	if err := w.WriteFrame(ether.Meta{}, [][]byte{ask}); err != tap.ErrClosed {
		t.Errorf("WriteFrame after Close: %v", err)
	}
}
