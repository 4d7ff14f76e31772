package outward

import (
	"encoding/binary"
	"net"
	"net/netip"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tulle-net/tulle/ether"
)

// The functions in this file send echo requests on, each by an unprivileged ping socket
// of its own. The kernel gives it an identifier, and checks who answers.

const (
	echoRequest4, echoReply4 = 8, 0
	echoRequest6, echoReply6 = 128, 129
	echoLen                  = 8
	echoTime                 = 5 * time.Second
	replyTTL                 = 64
)

func (w *Way) echo4(p ether.IPv4) {
	b := p.Payload()
	if len(b) < echoLen || b[0] != echoRequest4 || b[1] != 0 {
		w.drop(dropEcho)
		return
	}
	w.echo(p.Src(), p.Dst(), b)
}

func (w *Way) echo6(p ether.IPv6, b []byte) {
	if len(b) < echoLen || b[0] != echoRequest6 || b[1] != 0 {
		w.drop(dropEcho)
		return
	}
	w.echo(p.Src(), p.Dst(), b)
}

// echo sends a request, which is its own, to where it is for.
func (w *Way) echo(from, to netip.Addr, request []byte) {
	if !w.mayReach(to) {
		w.drop(dropRefused)
		return
	}
	ctx, over := w.begin(w.echoes, from)
	if ctx == nil {
		return
	}
	go func() {
		defer over()
		conn, err := pingSocket(to)
		if err != nil {
			w.drop(dropEcho)
			w.noPing.Do(func() {
				w.cfg.Log.Warn("endpoints cannot ping what is outside of their overlay: this user has no ping sockets: `sudo sysctl -w net.ipv4.ping_group_range='0 2147483647'`",
					"port", w.cfg.Name, "err", err)
			})
			return
		}
		defer conn.Close()
		_ = conn.SetDeadline(time.Now().Add(echoTime))
		go func() { // it ends with the flow
			<-ctx.Done()
			_ = conn.SetDeadline(time.Unix(1, 0))
		}()
		answer := make([]byte, maxDatagram)
		if _, err = conn.Write(request); err == nil {
			var n int
			if n, err = conn.Read(answer); err == nil {
				w.answer(from, to, request, answer[:n])
				return
			}
		}
		if ctx.Err() == nil {
			w.drop(dropFailed)
		}
	}()
}

// pingSocket returns a socket for echo requests to an address.
func pingSocket(to netip.Addr) (net.Conn, error) {
	family, proto := unix.AF_INET, unix.IPPROTO_ICMP
	var at unix.Sockaddr = &unix.SockaddrInet4{Addr: [4]byte{}}
	if to.Is6() {
		family, proto, at = unix.AF_INET6, unix.IPPROTO_ICMPV6, &unix.SockaddrInet6{Addr: to.As16()}
	} else {
		at = &unix.SockaddrInet4{Addr: to.As4()}
	}
	fd, err := unix.Socket(family, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, proto)
	if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(fd), "ping")
	defer f.Close()
	if err := unix.Connect(fd, at); err != nil {
		return nil, err
	}
	return net.FileConn(f)
}

// answer sends the endpoint the answer that came, with the identifier of its request.
func (w *Way) answer(endpoint, from netip.Addr, request, got []byte) {
	mac, there := (*w.serves.Load())[endpoint]
	if len(got) < echoLen || !there {
		w.drop(dropNobody)
		return
	}
	copy(got[4:6], request[4:6])
	got[2], got[3] = 0, 0
	frame := make([]byte, etherLen, etherLen+40+len(got))
	mac.Put(frame)
	w.cfg.MAC.Put(frame[6:])
	if endpoint.Is4() {
		got[0] = echoReply4
		binary.BigEndian.PutUint16(got[2:], ^ether.Sum(got, 0))
		binary.BigEndian.PutUint16(frame[12:], ether.EtherTypeIPv4)
		frame = append(frame, 0x45, 0, 0, 0, 0, 0, 0, 0, replyTTL, ether.ProtoICMP, 0, 0)
		frame = append(append(frame, from.AsSlice()...), endpoint.AsSlice()...)
		ip := frame[etherLen:]
		binary.BigEndian.PutUint16(ip[2:], uint16(20+len(got)))
		binary.BigEndian.PutUint16(ip[10:], ^ether.Sum(ip, 0))
	} else {
		got[0] = echoReply6
		binary.BigEndian.PutUint16(got[2:], ^ether.Sum(got, ether.PseudoSum(ether.ProtoICMPv6, from.AsSlice(), endpoint.AsSlice(), len(got))))
		binary.BigEndian.PutUint16(frame[12:], ether.EtherTypeIPv6)
		frame = append(frame, 0x60, 0, 0, 0, byte(len(got)>>8), byte(len(got)), ether.ProtoICMPv6, replyTTL)
		frame = append(append(frame, from.AsSlice()...), endpoint.AsSlice()...)
	}
	frame = append(frame, got...)
	if len(frame)-etherLen > w.MTU() {
		w.drop(dropEcho) // it came in fragments
		return
	}
	w.send(packet{frame: frame})
}
