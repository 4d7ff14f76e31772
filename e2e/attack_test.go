package e2e

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"reflect"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/net/ipv4"
	"golang.org/x/sys/unix"

	"github.com/tulle-net/tulle/crypto"
	"github.com/tulle-net/tulle/ether"
	"github.com/tulle-net/tulle/ether/ethertest"
	"github.com/tulle-net/tulle/internal/lab"
	"github.com/tulle-net/tulle/node"
	"github.com/tulle-net/tulle/vxlan"
)

//	a (tulle) ──┐
//	b (tulle) ──┼─[ul]── c sends to a's UDP 4789, as itself or with the address of b
//	c         ──┘
//
// The underlay has no offloads: a's kernel counts each datagram that it loses.

var (
	macA = ether.MACOf(address(1))
	macB = ether.MACOf(address(2))
)

// victims starts a and b, lets them resolve each other, and returns c too.
func victims(t *testing.T) (a, b *tulle, c *lab.Host, at netip.AddrPort) {
	t.Helper()
	l, sw, h := hosts(t, 3, lab.Underlay{Prefix4: underlay4, Offloads: lab.Wire})
	a = up(t, l, h[0], "--overlay", overlay(1))
	b = up(t, l, h[1], "--join", seed(sw.Addr(h[0])), "--overlay", overlay(2))
	ping(t, h[0], address(2), 5*time.Second)
	ping(t, h[1], address(1), 5*time.Second)
	ping(t, h[2], sw.Addr(h[0]), 5*time.Second) // c knows a's MAC
	return a, b, h[2], netip.AddrPortFrom(sw.Addr(h[0]), 4789)
}

// TestFirstByte sends every first byte there is, from a stranger.
func TestFirstByte(t *testing.T) {
	t.Parallel()
	a, b, c, at := victims(t)
	x := attack(t, c, netip.Addr{}, at)
	before := account(a, b)
	var ds [][]byte
	for first := range 256 {
		d := datagram(100, ethertest.ARPRequest(macB, address(2), address(1)))
		d[0] = byte(first)
		ds = append(ds, d)
	}
	x.send(ds)
	// 0x08 is VXLAN, 0x04 sealed; bit 6 says QUIC (RFC 9443).
	before.expect(t, a, b, map[string]uint64{"unknown_vtep": 1, "unknown_session": 1, "control_refused": 128, "unknown_type": 126})
}

// TestTruncated sends a datagram cut at every length, from a member's address.
func TestTruncated(t *testing.T) {
	t.Parallel()
	a, b, c, at := victims(t)
	x := attack(t, c, b.status().Node.VTEP.Addr(), at)
	before := account(a, b)
	whole := datagram(100, ethertest.Echo{SrcMAC: macB, DstMAC: macA, Src: address(2), Dst: address(1), Payload: make([]byte, 100)}.Frame())
	var ds [][]byte
	for n := range len(whole) {
		ds = append(ds, whole[:n])
	}
	x.send(ds)
	// What has an Ethernet header is a frame: it is the host's to judge.
	before.expect(t, a, b, map[string]uint64{"short": 8, "short_frame": 14, accepted: uint64(len(whole) - 22)})
	ping(t, a.host, address(2), time.Second)
}

// TestSpoof: plaintext of a stranger becomes neither an FDB entry nor a target,
// whatever address it claims that is not a member's.
func TestSpoof(t *testing.T) {
	t.Parallel()
	a, b, c, at := victims(t)
	before, fdb, flood := account(a, b), places(a), a.status().Overlays[0].FloodList
	spoofed := [][]byte{
		datagram(100, ethertest.ARPRequest(0x0254deadbeef, netip.MustParseAddr("10.32.0.66"), address(1))), // a new MAC
		datagram(100, ethertest.ARPReply(0x0254deadbeef, address(2), macA, address(1))),                    // b's address
		datagram(100, ethertest.ARPRequest(macB, address(2), address(1))),                                  // b's MAC
		datagram(100, ethertest.Echo{SrcMAC: macB, DstMAC: macA, Src: address(2), Dst: address(1)}.Frame()),
	}
	strangers := []netip.Addr{{}} // c's own
	for i := range 100 {
		strangers = append(strangers, netip.AddrFrom4([4]byte{192, 168, 77, byte(100 + i)}))
	}
	vtepB := b.status().Node.VTEP.Addr()
	answered := watch(t, a.host, "ul", func(f []byte) bool {
		dst, _, ok := inner(f)
		return ok && dst != at.Addr() && dst != vtepB
	})
	for _, as := range strangers {
		attack(t, c, as, at).send(spoofed)
	}
	before.expect(t, a, b, map[string]uint64{"unknown_vtep": uint64(len(strangers) * len(spoofed))})
	if got := places(a); !reflect.DeepEqual(got, fdb) {
		t.Errorf("a's FDB was %v and is %v", fdb, got)
	}
	// A broadcast goes where it went before.
	broadcast(t, a.host, netip.MustParseAddr("10.32.255.255"), 100)
	ping(t, a.host, address(2), time.Second)
	if f := answered(0); f != nil {
		t.Errorf("a sent to a stranger: %x", f)
	}
	if got := a.status().Overlays[0].FloodList; !reflect.DeepEqual(got, flood) {
		t.Errorf("a's flood list was %v and is %v", flood, got)
	}
	if mac, err := a.host.Neighbour("blue0", address(2)); mac != macB.String() {
		t.Errorf("a has 10.32.0.2 at %q (%v), want %s", mac, err, macB)
	}
}

// TestMalformed: 2,000 random datagrams and a million malformed ones change
// counters and nothing else.
func TestMalformed(t *testing.T) {
	t.Parallel()
	a, b, c, at := victims(t)
	fdb, flood, rss := places(a), a.status().Overlays[0].FloodList, resident(t, a)
	stop := keepPinging(t, a.host)
	r := rand.New(rand.NewPCG(1, 2)) // the same in each run
	stranger, member := attack(t, c, netip.Addr{}, at), attack(t, c, b.status().Node.VTEP.Addr(), at)

	before := account(a, b)
	for _, x := range []*attacker{stranger, member} {
		var ds [][]byte
		for range 1000 {
			ds = append(ds, random(r, make([]byte, r.IntN(1473))))
		}
		x.send(ds)
	}
	before.settle(t, a, b, 2000)

	const each = 400_000
	start := time.Now()
	for name, x := range map[string]*attacker{"stranger": stranger, "member": member} {
		before := account(a, b)
		want := x.storm(t, r, a, b, each, name == "member")
		// In step with the counters: each datagram is under its own reason.
		before.expect(t, a, b, want)
	}
	// And as fast as c can, where a's receive buffer may run over.
	before = account(a, b)
	const unpaced = 1_000_000 - 2*each
	shapes := malformed(false)
	ds := make([][]byte, 128)
	for sent := 0; sent < unpaced; sent += len(ds) {
		for i := range ds {
			ds[i] = shapes[(sent+i)%len(shapes)].make(r)
		}
		stranger.send(ds[:min(len(ds), unpaced-sent)])
	}
	lost := before.settle(t, a, b, unpaced)
	t.Logf("a million malformed datagrams in %v; the last %d unpaced, of which %d did not fit a's receive buffer", time.Since(start).Round(time.Millisecond), unpaced, lost)

	if pings := stop(); pings == 0 {
		t.Error("no ping was answered during the attack")
	} else {
		t.Logf("%d pings answered meanwhile", pings)
	}
	ping(t, a.host, address(2), time.Second)
	ping(t, b.host, address(1), time.Second)
	select {
	case <-a.proc.Done():
		t.Fatal("a ended")
	default:
	}
	if got := places(a); !reflect.DeepEqual(got, fdb) {
		t.Errorf("a's FDB was %v and is %v", fdb, got)
	}
	if got := a.status().Overlays[0].FloodList; !reflect.DeepEqual(got, flood) {
		t.Errorf("a's flood list was %v and is %v", flood, got)
	}
	now := resident(t, a)
	t.Logf("a's resident memory: %d MiB before, %d MiB now", rss>>20, now>>20)
	if now > rss+32<<20 {
		t.Errorf("a's resident memory grew from %d to %d MiB, want at most 32 more", rss>>20, now>>20)
	}
	if log := a.proc.Log(); len(log) > 16<<10 {
		t.Errorf("a wrote %d bytes of log about it", len(log))
	}
}

// shape is one way to be malformed, and how a counts it.
type shape struct {
	reason string
	make   func(r *rand.Rand) []byte
}

// accepted is no drop: the frame went to the host.
const accepted = "accepted"

// malformed returns all shapes, from a member's address or a stranger's.
func malformed(member bool) []shape {
	junk := func(r *rand.Rand, least int) []byte { return random(r, make([]byte, least+r.IntN(200))) }
	opening := func(first byte) func(r *rand.Rand) []byte {
		return func(r *rand.Rand) []byte {
			d := junk(r, 1)
			d[0] = first
			return d
		}
	}
	// A frame from src, of which nothing behind the Ethernet header is right.
	frame := func(r *rand.Rand, dst, src ether.MAC, etherType uint16) []byte {
		return datagram(100, ethertest.Ethernet(dst, src, nil, etherType, junk(r, 0)))
	}
	shapes := []shape{
		{"unknown_type", opening(0x00)}, {"unknown_type", opening(0x88)}, {"unknown_type", opening(0x0c)}, {"unknown_type", opening(0x80)},
		{"unknown_session", func(r *rand.Rand) []byte {
			d := junk(r, crypto.SealedOverhead)
			copy(d, []byte{crypto.SealedByte, 0, 0, 0})
			return d
		}},
		{"sealed_malformed", func(r *rand.Rand) []byte {
			d := junk(r, 2)
			d[0], d[1] = crypto.SealedByte, 0x80|byte(r.Uint32())
			return d
		}},
		{"control_refused", opening(0x40)}, {"control_refused", opening(0xff)},
		{"short", func(r *rand.Rand) []byte { return datagram(100, nil)[:r.IntN(8)] }},
		{"unknown_vni", func(r *rand.Rand) []byte { return datagram(vxlan.VNI(101+r.IntN(1<<23)), junk(r, 0)) }},
	}
	if !member {
		return append(shapes, shape{"unknown_vtep", func(r *rand.Rand) []byte { return datagram(100, junk(r, 0)) }})
	}
	return append(shapes,
		shape{"short_frame", func(r *rand.Rand) []byte { return datagram(100, random(r, make([]byte, r.IntN(14)))) }},
		shape{"bad_source", func(r *rand.Rand) []byte { return frame(r, macA, 0, 0x0800) }},
		shape{"bad_source", func(r *rand.Rand) []byte { return frame(r, macA, 0x0100_0000_0000|ether.MAC(r.Uint32()), 0x0800) }},
		shape{"own_frame", func(r *rand.Rand) []byte { return frame(r, ether.Broadcast, macA, 0x0800) }},
		shape{accepted, func(r *rand.Rand) []byte { return frame(r, macA, macB, 0x0800) }},
		shape{accepted, func(r *rand.Rand) []byte { return frame(r, macA, macB, 0x86dd) }},
		shape{accepted, func(r *rand.Rand) []byte { return frame(r, ether.Broadcast, macB, 0x0806) }},
		// Right up to the TCP header, which is junk: what a coalescer may stumble over.
		shape{accepted, func(r *rand.Rand) []byte {
			d := datagram(100, ethertest.TCP{SrcMAC: macB, DstMAC: macA, Payload: make([]byte, r.IntN(100))}.Frame())
			random(r, d[8+14+20:])
			return d
		}},
	)
}

// storm sends n malformed datagrams, a window at a time, so that nothing
// overflows, and returns how many there were for each reason.
func (x *attacker) storm(t *testing.T, r *rand.Rand, a, b *tulle, n int, member bool) map[string]uint64 {
	t.Helper()
	const window = 4096 // datagrams; a's receive buffer holds twice that and more
	shapes, want := malformed(member), map[string]uint64{}
	start := account(a, b)
	ds := make([][]byte, 128)
	for sent := 0; sent < n; {
		for end := min(sent+window, n); sent < end; {
			k := min(len(ds), end-sent)
			for i := range k {
				s := shapes[(sent+i)%len(shapes)]
				ds[i] = s.make(r)
				want[s.reason]++
			}
			x.send(ds[:k])
			sent += k
		}
		start.settle(t, a, b, uint64(sent))
	}
	return want
}

// datagram is what comes in UDP. It has no spare capacity that others share.
func datagram(vni vxlan.VNI, frame []byte) []byte {
	d := make([]byte, vxlan.HeaderLen+len(frame))
	vxlan.Put(d, vni)
	copy(d[vxlan.HeaderLen:], frame)
	return d
}

func random(r *rand.Rand, b []byte) []byte {
	for i := range b {
		b[i] = byte(r.Uint32())
	}
	return b
}

// attacker sends from one address.
type attacker struct {
	t    *testing.T
	conn *ipv4.PacketConn
	to   net.Addr
	msgs []ipv4.Message
}

// attack opens a socket on host c; as is the source address that it claims,
// c's own if it is none.
func attack(t *testing.T, c *lab.Host, as netip.Addr, to netip.AddrPort) *attacker {
	t.Helper()
	var conn net.PacketConn
	err := c.Do(func() error {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
		if err != nil {
			return os.NewSyscallError("socket", err)
		}
		f := os.NewFile(uintptr(fd), "attacker")
		defer f.Close() // FilePacketConn makes a copy
		if as.IsValid() {
			// Binding to an address that the host does not have, and sending from it.
			err = errors.Join(unix.SetsockoptInt(fd, unix.SOL_IP, unix.IP_TRANSPARENT, 1),
				unix.Bind(fd, &unix.SockaddrInet4{Addr: as.As4()}))
			if err != nil {
				return err
			}
		}
		conn, err = net.FilePacketConn(f)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return &attacker{t: t, conn: ipv4.NewPacketConn(conn), to: net.UDPAddrFromAddrPort(to)}
}

// send sends all datagrams, in order.
func (x *attacker) send(ds [][]byte) {
	x.t.Helper()
	x.msgs = x.msgs[:0]
	for _, d := range ds {
		x.msgs = append(x.msgs, ipv4.Message{Buffers: [][]byte{d}, Addr: x.to})
	}
	for rest := x.msgs; len(rest) > 0; {
		n, err := x.conn.WriteBatch(rest, 0)
		if err != nil {
			x.t.Fatal(err)
		}
		rest = rest[n:]
	}
}

// places is a node's FDB without what changes by itself.
func places(n *tulle) map[string]node.FDBEntry {
	n.t.Helper()
	m := map[string]node.FDBEntry{}
	for _, e := range n.fdb("blue").Entries {
		e.AgeSeconds = 0
		m[e.MAC.String()] = e
	}
	return m
}

// resident returns a node's resident memory in bytes.
func resident(t *testing.T, n *tulle) uint64 {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", n.proc.Pid()))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); len(f) == 3 && f[0] == "VmRSS:" {
			kib, err := strconv.ParseUint(f[1], 10, 64)
			if err != nil {
				t.Fatal(err)
			}
			return kib << 10
		}
	}
	t.Fatal("no VmRSS")
	return 0
}

// keepPinging pings host 2 until it is stopped; each reply may take 5 s.
func keepPinging(t *testing.T, h *lab.Host) (stop func() (answered int)) {
	t.Helper()
	end, done := make(chan struct{}), make(chan int)
	go func() {
		n := 0
		defer func() { done <- n }()
		for {
			select {
			case <-end:
				return
			case <-time.After(20 * time.Millisecond):
			}
			ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
			_, err := h.WaitPing(ctx, address(2))
			cancel()
			if err != nil {
				t.Errorf("ping during the attack: %v", err)
				return
			}
			n++
		}
	}()
	return func() int { close(end); return <-done }
}
