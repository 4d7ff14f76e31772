package e2e

import (
	"bytes"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tulle-net/tulle/ether"
	"github.com/tulle-net/tulle/ether/ethertest"
	"github.com/tulle-net/tulle/internal/lab"
	"github.com/tulle-net/tulle/vxlan"
)

//	b (tulle) ──[ul]── c (relay: catches real datagrams, damages and replays them) ──[ul]── a (tulle, the victim)
//
// Each byte of a plain datagram is damaged in turn, alone and within a train of
// ten that merges. What must never happen: a socket on a is given content that
// nobody sent. It is not required that every damaged datagram is dropped. These
// bytes have no checksum, and damage to them leaves the content alone:
//   - VXLAN's reserved bytes (ignored on receipt, RFC 7348 section 5) and its VNI
//     and flags (dropped as unknown, or ignored);
//   - both MACs and the EtherType (another host's frame, or no IP packet);
//   - in IPv6 traffic class, flow label and hop limit; in TCP and UDP nothing.
//
// Damage that the Internet checksum cannot see (two 16-bit words swapped, say)
// is out of anybody's reach here; one byte is always seen.
//
// With unfinished-checksums on (auto, on a veth) a foreign VTEP's frame whose
// checksum field equals the pseudo-header's sum is finished instead of dropped.
// One damaged byte does that only where it makes the two equal: where the damage
// is in the checksum field itself (then the content is whole), or, once in
// 65,536, in an address or length. See TestUnfinishedIsTheSendersWord.

// damages are what is done to each byte.
var damages = []byte{0x01, 0x80, 0xff}

const caught = 10 // datagrams of a train

func TestCorrupt(t *testing.T) {
	t.Parallel()
	for _, unfinished := range []string{"off", "auto"} {
		t.Run("unfinished "+unfinished, func(t *testing.T) {
			_, r, a, b := relayed(t, lab.Underlay{}, unfinished, nil, nil)
			for _, v6 := range []bool{false, true} {
				to := address(1)
				if v6 {
					to = addressV6(1)
				}
				ping(t, b.host, to, 5*time.Second)
				t.Run(fmt.Sprintf("UDP v6=%v", v6), func(t *testing.T) { corruptUDP(t, r, a.host, b.host, to) })
				t.Run(fmt.Sprintf("TCP v6=%v", v6), func(t *testing.T) { corruptTCP(t, r, a.host, b.host, to) })
			}
			for reason, n := range a.status().Drops {
				if n != 0 {
					t.Logf("drop %s = %d", reason, n)
				}
			}
			if a.status().Drops["rx_overflow"] != 0 {
				t.Error("some damaged datagrams were lost on the way: they tested nothing")
			}
		})
	}
}

// catch keeps from a the datagrams that want accepts, and returns the first n
// of them, each once.
func catch(t *testing.T, r *fastRelay, n int, want func(frame []byte, h ether.Headers) bool) (get func() [][]byte) {
	t.Helper()
	var mu sync.Mutex
	var kept [][]byte
	seen := map[string]bool{}
	r.through(t, func(fromA bool, d []byte) bool {
		_, frame, err := vxlan.Parse(d)
		if err != nil || fromA {
			return true
		}
		h, ok := ether.ParseHeaders(frame)
		if !ok || !want(frame, h) {
			return true
		}
		mu.Lock()
		defer mu.Unlock()
		// A segment that is sent again differs in its timestamps, not in content.
		if content := string(frame[h.Payload:h.End]); !seen[content] && len(kept) < n {
			seen[content] = true
			kept = append(kept, bytes.Clone(d))
		}
		return false
	})
	return func() [][]byte {
		t.Helper()
		eventually(t, 10*time.Second, fmt.Sprintf("%d datagrams of b are caught", n), func() bool {
			mu.Lock()
			defer mu.Unlock()
			return len(kept) == n
		})
		mu.Lock()
		defer mu.Unlock()
		return kept
	}
}

// sweep sends train with each byte of its datagram k damaged in turn, from the
// inner IP header on first: what may be delivered whole comes last. after is
// called now and then, to let a catch up.
func sweep(r *fastRelay, train [][]byte, k int, damages []byte, after func()) (payloads int) {
	const ip = vxlan.HeaderLen + 14
	d := train[k]
	h, _ := ether.ParseHeaders(d[vxlan.HeaderLen:])
	damaged := make([][]byte, len(train))
	copy(damaged, train)
	n := 0
	for i := range d {
		at := (i + ip) % len(d)
		for _, x := range damages {
			bad := bytes.Clone(d)
			bad[at] ^= x
			damaged[k] = bad
			r.send(r.ends[0], damaged...)
			if at >= vxlan.HeaderLen+int(h.Payload) {
				payloads++
			}
			if n++; n%64 == 0 {
				after()
			}
		}
	}
	after()
	return payloads
}

func corruptUDP(t *testing.T, r *fastRelay, a, b *lab.Host, to netip.Addr) {
	c, err := a.ListenPacket(netip.AddrPortFrom(to, 9000).String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	forceBuffers(t, c.(*net.UDPConn))
	tapped := captureTAP(t, a, "blue0")
	for _, size := range []int{200, 1392} {
		get := catch(t, r, caught, func(_ []byte, h ether.Headers) bool { return h.Proto == ether.ProtoUDP })
		content := randomBytes(size * caught)
		sendTrain(t, b, netip.AddrPortFrom(to, 9000), content, size)
		train := get()
		good := map[string]int{}
		for off := 0; off < len(content); off += size {
			good[string(content[off:off+size])] = 0
		}
		// Only what was sent may come, and after each round the mark does.
		buf := make([]byte, 65536)
		mark := encapsulated(ethertest.UDP{Src: netip.AddrPortFrom(otherOf(to), 9001), Dst: netip.AddrPortFrom(to, 9000), SrcMAC: generatedMAC,
			DstMAC: ether.MACOf(address(1)), Payload: []byte("mark")}.Frame())
		drain := func() {
			t.Helper()
			r.send(r.ends[0], mark)
			for {
				_ = c.SetReadDeadline(time.Now().Add(5 * time.Second))
				n, _, err := c.ReadFrom(buf)
				if err != nil {
					t.Fatalf("the mark did not come: %v", err)
				}
				if string(buf[:n]) == "mark" {
					return
				}
				if _, ok := good[string(buf[:n])]; !ok {
					t.Fatalf("a socket was given %d bytes that nobody sent: %x", n, buf[:n])
				}
				good[string(buf[:n])]++
			}
		}
		wrong := kernelCount(t, a, "InCsumErrors")
		payloads := sweep(r, train[:1], 0, damages, drain)
		for _, k := range []int{0, 4, 9} {
			if size > 1000 && k != 4 {
				continue // long ones once: the time goes into the train
			}
			payloads += sweep(r, train, k, damages[2:], drain)
		}
		if n := int(kernelCount(t, a, "InCsumErrors") - wrong); n < payloads {
			t.Errorf("the kernel saw %d wrong checksums, want at least the %d of damaged content: this tested less than it should", n, payloads)
		}
		r.send(r.ends[0], train...)
		drain()
		for content, n := range good {
			if n == 0 {
				t.Errorf("the datagram with %x… never came, not even whole", content[:8])
			}
		}
		r.through(t, nil)
	}
	tapped.merged()
}

// generatedMAC is a source that no host has.
const generatedMAC = genMACs | 0xff

// otherOf returns b's address of the family.
func otherOf(a netip.Addr) netip.Addr {
	if a.Is4() {
		return address(2)
	}
	return addressV6(2)
}

// sendTrain sends content as datagrams of size bytes in one call.
func sendTrain(t *testing.T, h *lab.Host, to netip.AddrPort, content []byte, size int) {
	t.Helper()
	c, err := h.Dial(t.Context(), "udp", to.String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	control(t, c.(*net.UDPConn), func(fd int) error { return unix.SetsockoptInt(fd, unix.SOL_UDP, unix.UDP_SEGMENT, size) })
	if _, err := c.Write(content); err != nil {
		t.Fatal(err)
	}
}

// corruptTCP takes a connection for each segment that is damaged: the window of one that
// has lost a train may be smaller than the next.
func corruptTCP(t *testing.T, r *fastRelay, a, b *lab.Host, to netip.Addr) {
	tapped := captureTAP(t, a, "blue0")
	for i, k := range []int{0, 0, 4, 9} {
		corruptSegment(t, r, a, b, to, k, i == 0)
	}
	tapped.merged()
}

// corruptSegment damages segment k of a train, or, alone, one that has no others beside it.
func corruptSegment(t *testing.T, r *fastRelay, a, b *lab.Host, to netip.Addr, k int, alone bool) {
	t.Helper()
	// An MSS of 212 leaves 200 bytes beside the timestamps.
	ln, client := listenAndDial(t, a, b, to, 212)
	server, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer server.Close()
	defer client.Close()
	var mu sync.Mutex
	var got []byte
	go func() {
		for buf := make([]byte, 65536); ; {
			n, err := server.Read(buf)
			mu.Lock()
			got = append(got, buf[:n]...)
			mu.Unlock()
			if err != nil {
				return
			}
		}
	}()
	content := randomBytes(caught * 200)
	wrong := kernelCount(t, a, "InCsumErrors")
	get := catch(t, r, caught, func(_ []byte, h ether.Headers) bool { return h.Proto == ether.ProtoTCP && int(h.Payload) < int(h.End) })
	if _, err := client.Write(content); err != nil {
		t.Fatal(err)
	}
	train := get()
	part := train
	if alone {
		part = train[:1]
	}
	// The segment before the damaged one is in order, and it itself is what a
	// waits for: whatever passes as right is given to the socket.
	payloads := sweep(r, part, k, damages, func() {
		before := kernelCount(t, a, "InCsumErrors")
		bad := bytes.Clone(train[k])
		bad[len(bad)-1] ^= 0xff
		r.send(r.ends[0], bad)
		eventually(t, 5*time.Second, "a has seen all", func() bool { return kernelCount(t, a, "InCsumErrors") > before })
	})
	r.send(r.ends[0], train...)
	r.through(t, nil) // b hears of it, or sends again
	eventually(t, 10*time.Second, "all arrives", func() bool {
		mu.Lock()
		defer mu.Unlock()
		return len(got) >= len(content)
	})
	mu.Lock()
	defer mu.Unlock()
	if !bytes.Equal(got, content) {
		at := 0
		for at < min(len(got), len(content)) && got[at] == content[at] {
			at++
		}
		t.Errorf("a socket was given what nobody sent: %d bytes, want %d; they differ from byte %d on", len(got), len(content), at)
	}
	// All may have arrived before the last of the damage: a hop limit, say, is nobody's checksum.
	eventually(t, 5*time.Second, "the kernel has seen as many wrong checksums as content was damaged", func() bool {
		return int(kernelCount(t, a, "InCsumErrors")-wrong) >= payloads
	})
}

// listenAndDial connects b to a with a small MSS.
func listenAndDial(t *testing.T, a, b *lab.Host, to netip.Addr, mss int) (net.Listener, net.Conn) {
	t.Helper()
	ln, err := a.Listen(netip.AddrPortFrom(to, 0).String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = ln.Close() })
	return ln, dialTCP(t, b, ln.Addr().String(), func(fd int) error { return unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_MAXSEG, mss) })
}

// TestUnfinishedIsTheSendersWord pins down the price of unfinished-checksums:
// a frame whose checksum field holds the pseudo-header's sum is taken for one
// that its sender's kernel has not finished, so nobody can tell whether its
// content is whole. With the setting off, no such frame reaches a socket.
func TestUnfinishedIsTheSendersWord(t *testing.T) {
	t.Parallel()
	for _, unfinished := range []string{"off", "on"} {
		t.Run(unfinished, func(t *testing.T) {
			_, r, a, _ := relayed(t, lab.Underlay{}, unfinished, nil, nil)
			c, err := a.host.ListenPacket(netip.AddrPortFrom(address(1), 9000).String())
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			frame := ethertest.UDP{Src: netip.AddrPortFrom(address(9), 9001), Dst: netip.AddrPortFrom(address(1), 9000), SrcMAC: generatedMAC, Payload: []byte("content")}
			finished, bare := frame, frame
			finished.Payload, bare.Partial = []byte("mark"), true
			whole := encapsulated(bare.Frame())
			damaged := bytes.Clone(whole)
			damaged[len(damaged)-1] ^= 1
			r.send(r.ends[0], whole)
			r.send(r.ends[0], damaged)
			r.send(r.ends[0], encapsulated(finished.Frame()))
			var got []string
			for buf := make([]byte, 100); len(got) == 0 || got[len(got)-1] != "mark"; {
				_ = c.SetReadDeadline(time.Now().Add(5 * time.Second))
				n, _, err := c.ReadFrom(buf)
				if err != nil {
					t.Fatal(err)
				}
				got = append(got, string(buf[:n]))
			}
			want := map[string]string{"off": "[mark]", "on": "[content contenu mark]"}[unfinished]
			if fmt.Sprint(got) != want {
				t.Errorf("the socket was given %v, want %s", got, want)
			}
		})
	}
}
