package e2e

import (
	bin "encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"runtime"
	"strconv"
	"sync/atomic"
	"syscall"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/tulle-net/tulle/ether"
	"github.com/tulle-net/tulle/internal/lab"
	"github.com/tulle-net/tulle/vxlan"
)

// What the tests of the fast path play themselves: a foreign VTEP that is a UDP
// socket of the test, and a relay between two nodes that know only it.

// fastVTEP is a VTEP of the test: whatever it sends comes from a listed peer.
type fastVTEP struct {
	t    *testing.T
	conn *net.UDPConn
	oob  []byte
}

// playVTEP opens the VXLAN port on a host that runs no node.
func playVTEP(t *testing.T, h *lab.Host, addr netip.Addr) *fastVTEP {
	t.Helper()
	c, err := h.ListenPacket(netip.AddrPortFrom(addr, vxlan.Port).String())
	if err != nil {
		t.Fatal(err)
	}
	v := &fastVTEP{t: t, conn: c.(*net.UDPConn)}
	t.Cleanup(func() { _ = v.conn.Close() })
	forceBuffers(t, v.conn)
	v.oob = make([]byte, unix.CmsgSpace(2))
	segment := (*unix.Cmsghdr)(unsafe.Pointer(unsafe.SliceData(v.oob)))
	segment.Level, segment.Type = unix.SOL_UDP, unix.UDP_SEGMENT
	segment.SetLen(unix.CmsgLen(2))
	return v
}

// forceBuffers gives a socket room for what a busy machine is late to read.
func forceBuffers(t *testing.T, c syscall.Conn) {
	t.Helper()
	control(t, c, func(fd int) error {
		return errors.Join(unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 32<<20),
			unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, 16<<20))
	})
}

// control runs fn on a connection's descriptor.
func control(t *testing.T, c syscall.Conn, fn func(fd int) error) {
	t.Helper()
	raw, err := c.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	var failed error
	if err := raw.Control(func(fd uintptr) { failed = fn(int(fd)) }); err != nil || failed != nil {
		t.Fatal(err, failed)
	}
}

// encapsulated returns a datagram of the overlay's VNI around a frame.
func encapsulated(frame []byte) []byte {
	d := make([]byte, vxlan.HeaderLen+len(frame))
	vxlan.Put(d, 100)
	copy(d[vxlan.HeaderLen:], frame)
	return d
}

// send sends datagrams in order; neighbours of one size (the last may be
// shorter) leave as one train and so arrive in one receive.
func (v *fastVTEP) send(to netip.Addr, datagrams ...[]byte) {
	v.t.Helper()
	dst := netip.AddrPortFrom(to, vxlan.Port)
	for len(datagrams) > 0 {
		size, n, total := len(datagrams[0]), 1, len(datagrams[0])
		for n < len(datagrams) && n < 60 && len(datagrams[n]) <= size && total+size < 60_000 {
			total += len(datagrams[n])
			n++
			if len(datagrams[n-1]) < size {
				break
			}
		}
		var err error
		if n == 1 {
			_, err = v.conn.WriteToUDPAddrPort(datagrams[0], dst)
		} else {
			b := make([]byte, 0, total)
			for _, d := range datagrams[:n] {
				b = append(b, d...)
			}
			bin.NativeEndian.PutUint16(v.oob[unix.CmsgLen(0):], uint16(size))
			_, _, err = v.conn.WriteMsgUDPAddrPort(b, v.oob, dst)
		}
		if err != nil {
			v.t.Fatal(err)
		}
		datagrams = datagrams[n:]
	}
}

// inOrder keeps each node, and the calling test, on one core. A veth delivers
// through a queue of the core that sends (netif_rx), so the kernel itself
// reorders what a thread sends while it is moved from core to core on a busy
// machine; only without that is order the nodes' own doing.
func inOrder(t *testing.T, nodes ...*tulle) {
	t.Helper()
	runtime.LockOSThread() // and never unlocked: the thread ends with the test
	pinTo(t, unix.Gettid(), 0)
	for i, n := range nodes {
		for range 2 { // threads that started meanwhile
			tasks, err := os.ReadDir(fmt.Sprintf("/proc/%d/task", n.proc.Pid()))
			if err != nil {
				t.Fatal(err)
			}
			for _, task := range tasks {
				tid, err := strconv.Atoi(task.Name())
				if err != nil {
					t.Fatal(err)
				}
				pinTo(t, tid, i)
			}
		}
	}
}

// pinTo keeps a thread on one of the cores that it may use.
func pinTo(t *testing.T, tid, n int) {
	t.Helper()
	var may, one unix.CPUSet
	err := unix.SchedGetaffinity(tid, &may)
	for core, left := 0, n%max(may.Count(), 1); err == nil; core++ {
		if !may.IsSet(core) {
			continue
		}
		if left == 0 {
			one.Set(core)
			err = unix.SchedSetaffinity(tid, &one)
			break
		}
		left--
	}
	if err != nil && !errors.Is(err, unix.ESRCH) {
		t.Fatal(err)
	}
}

// fastRelay carries datagrams between two nodes that are no cluster: each has
// the relay as its one peer. The lab itself cannot lose, mark or hold a
// datagram, and not every machine has netem; the relay can.
type fastRelay struct {
	*fastVTEP
	sw   *lab.Switch
	ends [2]netip.Addr // nodes a and b
	// hook sees each datagram, may change it, and says whether it goes on.
	hook atomic.Pointer[func(fromA bool, d []byte) bool]
}

// relayed makes hosts a and b, each with a node, and a relay between them on host c.
func relayed(t *testing.T, u lab.Underlay, unfinished string, optionsA, optionsB []string) (*lab.Lab, *fastRelay, *tulle, *tulle) {
	t.Helper()
	l, sw, h := hosts(t, 3, u)
	conf := settings(t, l, "unfinished-checksums: "+unfinished, nothingShed)
	r := &fastRelay{fastVTEP: playVTEP(t, h[2], sw.Addr(h[2])), sw: sw, ends: [2]netip.Addr{sw.Addr(h[0]), sw.Addr(h[1])}}
	peer := "peer=" + sw.Addr(h[2]).String()
	a := up(t, l, h[0], "--config", conf, "--overlay", overlay(1, append(optionsA, peer)...))
	b := up(t, l, h[1], "--config", conf, "--overlay", overlay(2, append(optionsB, peer)...))
	go r.run()
	for i, n := range []*tulle{a, b} {
		if err := n.host.AddAddr("blue0", netip.PrefixFrom(addressV6(i+1), 64)); err != nil {
			t.Fatal(err)
		}
	}
	return l, r, a, b
}

func (r *fastRelay) run() {
	for b := make([]byte, 65536); ; {
		n, src, err := r.conn.ReadFromUDPAddrPort(b)
		if err != nil {
			return
		}
		fromA := src.Addr().Unmap() == r.ends[0]
		if hook := r.hook.Load(); hook != nil && !(*hook)(fromA, b[:n]) {
			continue
		}
		to := r.ends[0]
		if fromA {
			to = r.ends[1]
		}
		// What cannot be sent is lost, as on any relay.
		_, _ = r.conn.WriteToUDPAddrPort(b[:n], netip.AddrPortFrom(to, vxlan.Port))
	}
}

// through sets the hook, nil for none, until the test ends.
func (r *fastRelay) through(t *testing.T, hook func(fromA bool, d []byte) bool) {
	t.Helper()
	if hook == nil {
		r.hook.Store(nil)
		return
	}
	r.hook.Store(&hook)
	t.Cleanup(func() { r.hook.Store(nil) })
}

// innerTCP returns the TCP segment in a datagram, and where its IP packet begins.
func innerTCP(d []byte) (seg ether.TCP, ip []byte, ok bool) {
	_, frame, err := vxlan.Parse(d)
	if err != nil {
		return nil, nil, false
	}
	h, ok := ether.ParseHeaders(frame)
	if !ok || h.Proto != ether.ProtoTCP {
		return nil, nil, false
	}
	seg, err = ether.ParseTCP(frame[h.L4:h.End])
	return seg, frame[h.L3:h.End], err == nil
}

// tcpOption reports whether a segment has an option of the kind (RFC 9293, section 3.2).
func tcpOption(seg ether.TCP, kind byte) bool {
	for o := seg.Options(); len(o) > 0 && o[0] != 0; {
		switch {
		case o[0] == kind:
			return true
		case o[0] == 1:
			o = o[1:]
		case len(o) < 2 || o[1] < 2 || int(o[1]) > len(o):
			return false
		default:
			o = o[o[1]:]
		}
	}
	return false
}
