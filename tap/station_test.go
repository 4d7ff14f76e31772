package tap

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"net/netip"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/tulle-net/tulle/ether"
)

const (
	stationMAC = ether.MAC(0x0254_0a20_0001)
	otherMAC   = ether.MAC(0x0254_0a20_0007)
	thirdMAC   = ether.MAC(0x0254_0a20_0008)
)

var (
	own4, own6     = netip.MustParseAddr("10.32.0.1"), netip.MustParseAddr("fd00:32::1")
	other4, other6 = netip.MustParseAddr("10.32.0.7"), netip.MustParseAddr("fd00:32::7")
)

// stand is a station without a device: the test is the host and the overlay.
type stand struct {
	t testing.TB
	*station
	rung int
	told [][]byte // packets
	b    *Batch
}

func newStand(t testing.TB) *stand {
	s := &stand{t: t, b: NewBatch()}
	s.station = newStation(stationMAC, []netip.Prefix{
		netip.PrefixFrom(own4, 16), netip.PrefixFrom(own6, 64), netip.PrefixFrom(ether.LinkLocal(stationMAC), 64),
	}, []netip.Addr{netip.MustParseAddr("10.32.0.9")}, func() { s.rung++ }, func(f []byte) { s.told = append(s.told, bytes.Clone(f[etherLen:])) })
	t.Cleanup(s.close)
	return s
}

// packet returns a packet of the host behind an empty Ethernet header; tag tells it
// from others.
func packet(src, dst netip.Addr, tag byte) []byte {
	f := make([]byte, etherLen)
	if dst.Is4() {
		f = append(f, 0x45, 0, 0, 21, 0, 0, 0, 0, 64, 253, 0, 0)
	} else {
		f = append(f, 0x60, 0, 0, 0, 0, 1, 253, 64)
	}
	f = append(append(append(f, src.AsSlice()...), dst.AsSlice()...), tag)
	if dst.Is4() {
		binary.BigEndian.PutUint16(f[24:], ^ether.Sum(f[14:34], 0))
	}
	return f
}

// out has the station address a packet, and returns where it goes, 0 if not now.
func (s *stand) out(f []byte) ether.MAC {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.address(f, time.Now()) {
		return 0
	}
	return ether.MACFrom(f)
}

// taken returns what the station has for the worker.
func (s *stand) taken() (frames [][]byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.queue) > 0 && s.rung == 0 {
		s.t.Error("the worker was not woken")
	}
	s.rung = 0
	for done := false; !done; {
		s.b.Frames = s.b.Frames[:0]
		done = s.take(s.b)
		for _, f := range s.b.Frames {
			if len(f.Head) != Headroom+len(f.B) || &f.Head[Headroom] != &f.B[0] {
				s.t.Error("a frame without headroom")
			}
			frames = append(frames, f.B)
		}
	}
	if s.packets != 0 {
		s.t.Errorf("%d packets are still counted", s.packets)
	}
	return frames
}

// tells returns what the host was told.
func (s *stand) tells() [][]byte {
	s.mu.Lock()
	defer s.mu.Unlock()
	told := s.told
	s.told = nil
	return told
}

// want compares what the station has for the worker.
func (s *stand) want(what string, frames ...[]byte) {
	s.t.Helper()
	if got := s.taken(); !slices.EqualFunc(got, frames, bytes.Equal) {
		s.t.Errorf("%s: sent %x, want %x", what, got, frames)
	}
}

// hears gives the station a message of the overlay's.
func (s *stand) hears(frame []byte) {
	s.t.Helper()
	if v := s.admit(frame); v != message {
		s.t.Errorf("admit(%x) = %d, want a message", frame, v)
	}
	s.heard(frame, time.Now())
}

func (s *stand) size() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.table)
}

func (s *stand) entry(a netip.Addr) *neighbour {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.table[a]
}

func (s *stand) held() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.heldBytes
}

// next returns when the timer is due.
func (s *stand) next() time.Time {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.due
}

func (s *stand) count(why stationDrop) uint64 { return s.drops[why].Load() }

// family has the messages about the neighbour with which ARP and ND do the same.
type family struct {
	own, other                      netip.Addr
	ask, askOne                     []byte // of the station
	reply, moved, request, answered []byte
}

func families() map[string]family {
	group := ether.AppendAdvertisement(nil, 0, thirdMAC, netip.Addr{}, other6)
	return map[string]family{
		"arp": {
			own4, other4,
			ether.AppendARP(nil, ether.Broadcast, ether.ARPRequest, stationMAC, own4, 0, other4),
			ether.AppendARP(nil, otherMAC, ether.ARPRequest, stationMAC, own4, 0, other4),
			ether.AppendARP(nil, stationMAC, ether.ARPReply, otherMAC, other4, stationMAC, own4),
			ether.AppendARP(nil, ether.Broadcast, ether.ARPRequest, thirdMAC, other4, 0, other4),
			ether.AppendARP(nil, ether.Broadcast, ether.ARPRequest, otherMAC, other4, 0, own4),
			ether.AppendARP(nil, otherMAC, ether.ARPReply, stationMAC, own4, otherMAC, other4),
		},
		"nd": {
			own6, other6,
			ether.AppendSolicitation(nil, 0, stationMAC, own6, other6),
			ether.AppendSolicitation(nil, otherMAC, stationMAC, own6, other6),
			ether.AppendAdvertisement(nil, stationMAC, otherMAC, own6, other6),
			group,
			ether.AppendSolicitation(nil, 0, otherMAC, other6, own6),
			ether.AppendAdvertisement(nil, otherMAC, stationMAC, other6, own6),
		},
	}
}

// eachFamily runs a test against time, for ARP and for ND.
func eachFamily(t *testing.T, fn func(t *testing.T, s *stand, f family)) {
	for name, f := range families() {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) { fn(t, newStand(t), f) })
		})
	}
}

// addressed is a packet with the header that it gets.
func addressed(f family, to ether.MAC, tag byte) []byte {
	p := packet(f.own, f.other, tag)
	to.Put(p)
	stationMAC.Put(p[6:])
	binary.BigEndian.PutUint16(p[12:], ether.EtherTypeIPv4)
	if f.own.Is6() {
		binary.BigEndian.PutUint16(p[12:], ether.EtherTypeIPv6)
	}
	return p
}

// TestResolve: packets wait in their order, one question is asked for all of them,
// and none that comes between the answer and the worker overtakes.
func TestResolve(t *testing.T) {
	eachFamily(t, func(t *testing.T, s *stand, f family) {
		for tag := range byte(3) {
			if to := s.out(packet(f.own, f.other, tag)); to != 0 {
				t.Errorf("packet %d went to %v, which nobody knows", tag, to)
			}
		}
		s.want("at first", f.ask)
		s.hears(f.reply)
		if to := s.out(packet(f.own, f.other, 3)); to != 0 {
			t.Error("a packet has overtaken those that waited")
		}
		s.want("resolved", addressed(f, otherMAC, 0), addressed(f, otherMAC, 1), addressed(f, otherMAC, 2), addressed(f, otherMAC, 3))
		if to := s.out(packet(f.own, f.other, 4)); to != otherMAC {
			t.Errorf("the next went to %v, want %v", to, otherMAC)
		}
		if s.held() != 0 {
			t.Errorf("%d bytes are held, by nobody", s.held())
		}
	})
}

// TestUnreachable: three questions in three seconds, then packets are dropped for
// one, then it begins anew.
func TestUnreachable(t *testing.T) {
	eachFamily(t, func(t *testing.T, s *stand, f family) {
		start := time.Now()
		s.out(packet(f.own, f.other, 0))
		s.want("at once", f.ask)
		for i := range 2 {
			time.Sleep(retransmit - time.Millisecond)
			synctest.Wait()
			s.want(fmt.Sprintf("before retransmission %d", i))
			time.Sleep(time.Millisecond)
			synctest.Wait()
			s.want(fmt.Sprintf("retransmission %d", i), f.ask)
		}
		time.Sleep(retransmit)
		synctest.Wait()
		if n := s.count(dropUnreachable); n != 1 || time.Since(start) != 3*time.Second {
			t.Errorf("%d packets dropped after %v, want 1 after 3 s", n, time.Since(start))
		}
		want, _ := ether.Unreachable(nil, addressed(f, 0, 0)[etherLen:])
		if told := s.tells(); len(told) != 1 || len(want) == 0 || !bytes.Equal(told[0], want) {
			t.Errorf("the host was told %x, want %x", told, want)
		}
		s.out(packet(f.own, f.other, 1))
		if n := s.count(dropUnreachable); n != 2 {
			t.Errorf("%d packets dropped, want 2", n)
		}
		s.want("while it is known not to answer")
		for range 2 * maxTold {
			s.out(packet(f.own, f.other, 1))
		}
		if told := s.tells(); len(told) != maxTold-1 {
			t.Errorf("the host was told %d times in a second, want %d at most", 1+len(told), maxTold)
		}
		time.Sleep(failedFor)
		synctest.Wait()
		if s.size() != 0 || !s.next().IsZero() {
			t.Errorf("%d neighbours, the timer is due %v: want it all forgotten", s.size(), s.next())
		}
		s.out(packet(f.own, f.other, 2))
		s.want("anew", f.ask)
		s.hears(f.reply)
		s.want("it is there", addressed(f, otherMAC, 2))
	})
}

// TestFailedAnswersLater: who is known not to answer and is heard of is used at once.
func TestFailedAnswersLater(t *testing.T) {
	eachFamily(t, func(t *testing.T, s *stand, f family) {
		s.out(packet(f.own, f.other, 0))
		time.Sleep(maxAsked*retransmit + failedFor/2)
		synctest.Wait()
		s.taken()
		s.hears(f.request)
		s.want("asked", f.answered)
		if to := s.out(packet(f.own, f.other, 1)); to != otherMAC {
			t.Errorf("the packet went to %v, want %v", to, otherMAC)
		}
	})
}

// TestProbe: a neighbour that was confirmed long ago is used and asked, itself first;
// one that does not answer that is looked for anew. Who is not used is not asked.
func TestProbe(t *testing.T) {
	eachFamily(t, func(t *testing.T, s *stand, f family) {
		s.out(packet(f.own, f.other, 0))
		s.hears(f.reply)
		s.taken()
		time.Sleep(reachableFor / 2) // the least that jitter makes of it
		if s.out(packet(f.own, f.other, 1)); !s.next().IsZero() && s.next().After(time.Now().Add(delayFor-1)) {
			t.Error("a neighbour that was confirmed just now is to be asked")
		}
		time.Sleep(time.Hour)
		synctest.Wait()
		s.want("idle")
		if to := s.out(packet(f.own, f.other, 2)); to != otherMAC {
			t.Errorf("stale: the packet went to %v, want %v", to, otherMAC)
		}
		time.Sleep(delayFor - time.Millisecond)
		synctest.Wait()
		s.want("delayed")
		time.Sleep(time.Millisecond)
		synctest.Wait()
		s.want("probe", f.askOne)
		s.hears(f.reply)
		time.Sleep(time.Minute)
		synctest.Wait()
		s.want("answered")

		s.out(packet(f.own, f.other, 3))
		time.Sleep(delayFor)
		for i := range maxAsked {
			synctest.Wait()
			s.want(fmt.Sprintf("probe %d", i), f.askOne)
			if to := s.out(packet(f.own, f.other, 4)); to != otherMAC {
				t.Errorf("probed: the packet went to %v, want %v", to, otherMAC)
			}
			time.Sleep(retransmit)
		}
		synctest.Wait()
		s.want("it is gone")
		s.out(packet(f.own, f.other, 5))
		s.want("looked for", f.ask)
	})
}

// TestMoved: a neighbour with another MAC, by its own word.
func TestMoved(t *testing.T) {
	eachFamily(t, func(t *testing.T, s *stand, f family) {
		s.hears(f.moved) // of nobody that is known
		if s.size() != 0 {
			t.Error("an entry was made for who was not asked for")
		}
		s.out(packet(f.own, f.other, 0))
		s.hears(f.reply)
		s.taken()
		if to := s.out(packet(f.own, f.other, 1)); to != otherMAC {
			t.Fatalf("the packet went to %v", to)
		}
		s.hears(f.moved)
		if to := s.out(packet(f.own, f.other, 1)); to != thirdMAC {
			t.Errorf("moved: the packet went to %v, want %v", to, thirdMAC)
		}
		// It is not confirmed, so it is asked.
		time.Sleep(delayFor)
		synctest.Wait()
		if got := s.taken(); len(got) != 1 || ether.MACFrom(got[0]) != thirdMAC {
			t.Errorf("asked %x, want the new one", got)
		}
	})
}

// TestAsked: the host is found, and who asks is known.
func TestAsked(t *testing.T) {
	eachFamily(t, func(t *testing.T, s *stand, f family) {
		s.hears(f.request)
		s.want("asked", f.answered)
		if to := s.out(packet(f.own, f.other, 0)); to != otherMAC {
			t.Errorf("the packet went to %v, want to who asked", to)
		}
	})
}

// TestDuplicate: who looks for duplicates of the host's addresses hears of it, and
// who has one is told so, once in ten seconds.
func TestDuplicate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newStand(t)
		zero := netip.IPv4Unspecified()
		s.hears(ether.AppendARP(nil, ether.Broadcast, ether.ARPRequest, thirdMAC, zero, 0, own4))
		s.want("ARP probe", ether.AppendARP(nil, thirdMAC, ether.ARPReply, stationMAC, own4, thirdMAC, zero))
		s.hears(ether.AppendARP(nil, ether.Broadcast, ether.ARPRequest, thirdMAC, zero, 0, other4))
		s.want("ARP probe for another")

		dad := func(target netip.Addr) []byte {
			return ether.AppendSolicitation(nil, 0, thirdMAC, netip.IPv6Unspecified(), target)
		}
		ll := ether.LinkLocal(stationMAC)
		s.hears(dad(own6))
		s.hears(dad(ll))
		s.want("ND probes", ether.AppendAdvertisement(nil, 0, stationMAC, netip.Addr{}, own6), ether.AppendAdvertisement(nil, 0, stationMAC, netip.Addr{}, ll))

		claims := [][]byte{
			ether.AppendARP(nil, ether.Broadcast, ether.ARPRequest, thirdMAC, own4, 0, own4),
			ether.AppendARP(nil, stationMAC, ether.ARPReply, thirdMAC, own4, stationMAC, other4),
			ether.AppendAdvertisement(nil, 0, thirdMAC, netip.Addr{}, own6),
		}
		for range 2 {
			for _, c := range claims {
				s.hears(c)
			}
			s.want("claims", ether.AppendARP(nil, ether.Broadcast, ether.ARPRequest, stationMAC, own4, 0, own4))
			time.Sleep(defendEvery)
		}
		s.hears(claims[2])
		s.want("a claim by ND", ether.AppendAdvertisement(nil, 0, stationMAC, netip.Addr{}, own6))
		if n := s.count(dropConflict); n != 7 || s.size() != 0 {
			t.Errorf("%d conflicts and %d neighbours, want 7 and none", n, s.size())
		}
	})
}

// TestDestinations: where packets go that are for no single neighbour.
func TestDestinations(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newStand(t)
		for dst, want := range map[string]ether.MAC{
			"255.255.255.255": ether.Broadcast, "10.32.255.255": ether.Broadcast, "224.0.0.251": 0x0100_5e00_00fb,
			"239.255.1.2": 0x0100_5e7f_0102, "ff02::1": 0x3333_0000_0001, "ff02::1:ff00:7": 0x3333_ff00_0007,
		} {
			to, src := netip.MustParseAddr(dst), own4
			if to.Is6() {
				src = own6
			}
			if got := s.out(packet(src, to, 0)); got != want {
				t.Errorf("%s goes to %v, want %v", dst, got, want)
			}
		}
		s.want("no questions")
		s.out(packet(own4, netip.MustParseAddr("192.0.2.1"), 0))
		s.want("by the gateway", ether.AppendARP(nil, ether.Broadcast, ether.ARPRequest, stationMAC, own4, 0, netip.MustParseAddr("10.32.0.9")))
		s.out(packet(own6, netip.MustParseAddr("2001:db8::1"), 0)) // no gateway of its family
		if n := s.count(dropNoRoute); n != 1 {
			t.Errorf("%d without a route, want 1", n)
		}
		s.routes = []Route{{netip.MustParsePrefix("192.0.2.0/24"), netip.MustParseAddr("10.32.0.8")}, {netip.MustParsePrefix("192.0.2.128/25"), netip.MustParseAddr("10.32.0.7")},
			{netip.MustParsePrefix("10.0.0.0/8"), netip.MustParseAddr("10.32.0.6")}, {netip.MustParsePrefix("2001:db8::/32"), netip.MustParseAddr("fd32::8")}}
		for dst, via := range map[string]string{"192.0.2.1": "10.32.0.8", "192.0.2.129": "10.32.0.7", "10.9.0.1": "10.32.0.6", "10.32.0.5": "10.32.0.5", "2001:db8::1": "fd32::8"} {
			if next := s.nextHop(netip.MustParseAddr(dst)); next != netip.MustParseAddr(via) {
				t.Errorf("%s leads to %v, want %s", dst, next, via)
			}
		}
		ll := netip.MustParseAddr("fe80::7")
		s.out(packet(ether.LinkLocal(stationMAC), ll, 0))
		s.want("a link-local one", ether.AppendSolicitation(nil, 0, stationMAC, ether.LinkLocal(stationMAC), ll))
		for _, p := range [][]byte{nil, {0x45}, make([]byte, 40), append([]byte{0x60}, make([]byte, 38)...), append([]byte{0x45}, make([]byte, 18)...)} {
			if to := s.out(append(make([]byte, etherLen), p...)); to != 0 {
				t.Errorf("%x goes to %v", p, to)
			}
		}
		if n := s.count(dropMalformed); n != 5 {
			t.Errorf("%d malformed, want 5", n)
		}
	})
}

// TestAdmit: what the host gets of what is on the overlay.
func TestAdmit(t *testing.T) {
	s := newStand(t)
	frame := func(dst ether.MAC, etherType uint16, to netip.Addr) []byte {
		f := packet(other4, to, 1)
		if to.Is6() {
			f = packet(other6, to, 1)
		}
		dst.Put(f)
		otherMAC.Put(f[6:])
		binary.BigEndian.PutUint16(f[12:], etherType)
		return f
	}
	const v4, v6 = ether.EtherTypeIPv4, ether.EtherTypeIPv6
	all6 := netip.MustParseAddr("ff02::1")
	for i, c := range []struct {
		frame []byte
		want  verdict
		why   stationDrop
	}{
		{frame(stationMAC, v4, own4), pass, 0},
		{frame(stationMAC, v4, other4), pass, 0}, // the host's routing decides
		{frame(stationMAC, v6, own6), pass, 0},
		{frame(ether.Broadcast, v4, netip.MustParseAddr("10.32.255.255")), pass, 0},
		{frame(ether.Broadcast, v4, netip.MustParseAddr("255.255.255.255")), pass, 0},
		{frame(0x0100_5e00_0001, v4, netip.MustParseAddr("224.0.0.1")), pass, 0},
		{frame(0x3333_0000_0001, v6, all6), pass, 0},
		{frame(ether.Broadcast, v4, own4), unwanted, dropOtherHost},
		{frame(0x3333_0000_0001, v6, own6), unwanted, dropOtherHost},
		{frame(otherMAC, v4, own4), unwanted, dropOtherHost},
		{frame(stationMAC, ether.EtherTypeVLAN, own4), unwanted, dropNotIP},
		{frame(ether.Broadcast, 0x88cc, own4), unwanted, dropNotIP},
		{frame(stationMAC, v6, own4), unwanted, dropMalformed},
		{frame(stationMAC, v4, own6), unwanted, dropMalformed},
		{frame(stationMAC, v4, own4)[:33], unwanted, dropMalformed},
		{frame(stationMAC, v6, own6)[:53], unwanted, dropMalformed},
		{ether.AppendARP(nil, ether.Broadcast, ether.ARPRequest, otherMAC, other4, 0, own4), message, 0},
		{ether.AppendSolicitation(nil, 0, otherMAC, other6, own6), message, 0},
		{ether.AppendAdvertisement(nil, 0, otherMAC, netip.Addr{}, other6), message, 0},
	} {
		before := s.count(c.why)
		if got := s.admit(c.frame); got != c.want || got == unwanted && s.count(c.why) != before+1 {
			t.Errorf("%d: admit(%x) = %d (counted %d), want %d", i, c.frame, got, s.count(c.why)-before, c.want)
		}
	}
}

// TestUnsound: messages that contradict themselves change nothing.
func TestUnsound(t *testing.T) {
	s := newStand(t)
	arp := ether.AppendARP(nil, ether.Broadcast, ether.ARPRequest, otherMAC, other4, 0, own4)
	nd := ether.AppendSolicitation(nil, 0, otherMAC, other6, own6)
	change := func(b []byte, at int, to ...byte) []byte {
		b = bytes.Clone(b)
		copy(b[at:], to)
		return b
	}
	bad := [][]byte{
		arp[:41], change(arp, 14, 0, 6), change(arp, 16, 0x86, 0xdd), change(arp, 21, 3), change(arp, 22, 1), change(arp, 22, 0, 0, 0, 0, 0, 0),
		nd[:len(nd)-1], change(nd, 21, 254), change(nd, 60, 1), change(nd, len(nd)-8, 1, 0),
	}
	for _, b := range bad {
		s.hears(b)
	}
	if n := s.count(dropMalformed); int(n) != len(bad) || s.size() != 0 {
		t.Errorf("%d of %d refused, %d neighbours", n, len(bad), s.size())
	}
	s.want("no answer")
	// Somebody off the subnet is answered, and is no neighbour.
	s.hears(ether.AppendARP(nil, ether.Broadcast, ether.ARPRequest, otherMAC, netip.MustParseAddr("192.0.2.7"), 0, own4))
	if len(s.taken()) != 1 || s.size() != 0 {
		t.Errorf("%d neighbours, want none", s.size())
	}
}

// TestStationBounds: nothing grows without end, and what makes room is counted.
func TestStationBounds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newStand(t)
		for tag := range byte(maxWaiting + 5) {
			s.out(packet(own4, other4, tag))
		}
		if n := s.count(dropNeighbourQueue); n != 5 {
			t.Errorf("%d made room, want 5", n)
		}
		s.taken()
		s.hears(families()["arp"].reply)
		if got := s.taken(); len(got) != maxWaiting || got[0][len(got[0])-1] != 5 {
			t.Errorf("%d packets waited, want the last %d", len(got), maxWaiting)
		}
		if s.held() != 0 {
			t.Errorf("%d bytes are held, by nobody", s.held())
		}
		// A host that looks through its subnet: the table is full, then a known one makes room.
		at := func(i int) netip.Addr { return netip.AddrFrom4([4]byte{10, 32, byte(1 + i>>8), byte(i)}) }
		for i := range maxNeighbours + 5 {
			s.out(packet(own4, at(i), 0))
		}
		if s.size() != maxNeighbours || s.entry(other4) != nil || s.count(dropNeighbourLimit) != 5 {
			t.Errorf("%d neighbours, %d refused; want %d, 5, and the one that was known to make room", s.size(), s.count(dropNeighbourLimit), maxNeighbours)
		}
		if got, lost := len(s.taken()), s.count(dropAnswerLimit); got != maxQueue || lost != maxNeighbours-maxQueue {
			t.Errorf("%d questions are sent and %d not, want %d and %d", got, lost, maxQueue, maxNeighbours-maxQueue)
		}
		// Nobody makes room for who only asks.
		s.hears(ether.AppendARP(nil, ether.Broadcast, ether.ARPRequest, otherMAC, other4, 0, own4))
		if s.size() != maxNeighbours || s.entry(other4) != nil {
			t.Errorf("%d neighbours, want %d without who asked", s.size(), maxNeighbours)
		}
		time.Sleep(7 * time.Second)
		synctest.Wait()
		if s.size() != 0 || s.held() != 0 {
			t.Errorf("%d neighbours and %d bytes are left", s.size(), s.held())
		}
		big := append(packet(own4, other4, 0), make([]byte, 60_000)...)
		for range 20 {
			s.out(bytes.Clone(big))
		}
		if s.held() > maxHeldBytes || s.held() < maxHeldBytes-70_000 {
			t.Errorf("%d bytes are held, want nearly %d", s.held(), maxHeldBytes)
		}
	})
}

// FuzzStation: whatever is on the overlay or comes from the host, nothing panics,
// what is sent is sound, and the bounds hold.
func FuzzStation(f *testing.F) {
	for _, c := range families() {
		for _, b := range [][]byte{c.ask, c.askOne, c.reply, c.moved, c.request, c.answered} {
			f.Add(b)
		}
		f.Add(packet(c.own, c.other, 1))
	}
	for _, s := range []string{"", "ffffffffffff", "0254" + "0a200001" + "020000000001" + "86dd" + "60000000"} {
		b, err := hex.DecodeString(s)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, frame []byte) {
		s := newStand(t)
		now := time.Now()
		if len(frame) >= etherLen {
			if s.admit(frame) == message {
				s.heard(frame, now)
			}
			s.mu.Lock()
			s.address(bytes.Clone(frame), now)
			s.mu.Unlock()
			s.admit(frame)
		}
		if s.size() > 2 || s.held() > 2*(Headroom+len(frame)) {
			t.Errorf("%d neighbours, %d bytes held", s.size(), s.held())
		}
		for _, out := range s.taken() {
			if len(out) < etherLen || ether.MACFrom(out[6:]) != stationMAC {
				t.Errorf("sent %x", out)
			}
		}
	})
}

// BenchmarkAddress is what a packet pays for its Ethernet header.
func BenchmarkAddress(b *testing.B) {
	s := newStation(stationMAC, []netip.Prefix{netip.PrefixFrom(own4, 16)}, nil, func() {}, nil)
	f := append(packet(own4, other4, 0), make([]byte, 1400)...)
	now := time.Now()
	s.address(f, now)
	s.heard(ether.AppendARP(nil, stationMAC, ether.ARPReply, otherMAC, other4, stationMAC, own4), now)
	s.take(NewBatch())
	b.SetBytes(int64(len(f)))
	b.ReportAllocs()
	for b.Loop() {
		if !s.address(f, now) {
			b.Fatal("not addressed")
		}
	}
}
