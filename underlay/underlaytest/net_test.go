package underlaytest

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"syscall"
	"testing"
	"testing/synctest"

	"github.com/tulle-net/tulle/underlay"
)

var (
	addrA = netip.MustParseAddrPort("10.0.0.1:4789")
	addrB = netip.MustParseAddrPort("10.0.0.2:4789")
	addrC = netip.MustParseAddrPort("10.0.0.3:4789")
)

// number returns a datagram that holds i, n bytes long.
func number(i, n int) []byte {
	b := make([]byte, n)
	binary.BigEndian.PutUint32(b, uint32(i))
	return b
}

func put(s underlay.Sender, dst netip.AddrPort, flow uint32, b []byte) {
	copy(s.Reserve(len(b)), b)
	s.Commit(dst, flow, len(b))
}

// drain returns the numbers of all datagrams that wait, and their sources.
func drain(t *testing.T, c underlay.Conn) (ids []int, srcs []netip.AddrPort) {
	t.Helper()
	var b underlay.Batch
	for {
		if err := c.Receivers()[0].Receive(&b); err != nil {
			t.Fatal(err)
		}
		if len(b.Slots) == 0 {
			return ids, srcs
		}
		for _, s := range b.Slots {
			for rest := s.B; len(rest) > 0; {
				n := len(rest)
				if s.SegmentLen > 0 {
					n = min(n, s.SegmentLen)
				}
				ids, srcs = append(ids, int(binary.BigEndian.Uint32(rest))), append(srcs, s.Src)
				rest = rest[n:]
			}
		}
	}
}

func upTo(n int) []int {
	ids := make([]int, n)
	for i := range ids {
		ids[i] = i
	}
	return ids
}

func TestDelivery(t *testing.T) {
	n := NewNet(1)
	a, b := n.Conn(addrA), n.Conn(addrB)
	s := a.NewSender()
	for i := range 1000 {
		put(s, addrB, uint32(i/100), number(i, 100+i%3))
	}
	s.Flush()
	ids, srcs := drain(t, b)
	if !slices.Equal(ids, upTo(1000)) {
		t.Errorf("%d datagrams arrived, or not in order", len(ids))
	}
	for i, src := range srcs {
		if src.Addr() != addrA.Addr() || src.Port() < 49152 || src != srcs[i/100*100] {
			t.Fatalf("datagram %d of flow %d came from %s", i, i/100, src)
		}
	}
	if st := a.Stats(); st.TxDatagrams.Load() != 1000 || b.Stats().RxDatagrams.Load() != 1000 {
		t.Errorf("sent %d, received %d", st.TxDatagrams.Load(), b.Stats().RxDatagrams.Load())
	}
}

func TestTrains(t *testing.T) {
	n := NewNet(1)
	a, b := n.Conn(addrA), n.Conn(addrB)
	s := a.NewSender()
	for i, size := range []int{1000, 1000, 400, 1000, 1200} {
		put(s, addrB, 0, number(i, size))
	}
	s.Flush()
	var batch underlay.Batch
	if err := b.Receivers()[0].Receive(&batch); err != nil {
		t.Fatal(err)
	}
	var got [][2]int
	for _, s := range batch.Slots {
		got = append(got, [2]int{len(s.B), s.SegmentLen})
	}
	if want := [][2]int{{2400, 1000}, {1000, 0}, {1200, 0}}; !slices.Equal(got, want) {
		t.Errorf("slots (bytes, segment) = %v, want %v", got, want)
	}
}

// run sends 2,000 datagrams over a bad link and returns what came.
func run(t *testing.T, seed uint64) []int {
	n := NewNet(seed)
	n.SetDefault(Link{Loss: 0.1, Duplicate: 0.05, Reorder: 0.05})
	a, b := n.Conn(addrA), n.Conn(addrB)
	s := a.NewSender()
	for i := range 2000 {
		put(s, addrB, 0, number(i, 100))
	}
	s.Flush()
	n.Step()
	ids, _ := drain(t, b)
	return ids
}

func TestBadLinkIsDeterministic(t *testing.T) {
	ids := run(t, 42)
	if again := run(t, 42); !slices.Equal(ids, again) {
		t.Error("the same seed gave another run")
	}
	if slices.Equal(ids, run(t, 43)) {
		t.Error("another seed gave the same run")
	}
	seen, dups, reordered := map[int]bool{}, 0, 0
	for i, id := range ids {
		if seen[id] {
			dups++
		}
		seen[id] = true
		if i > 0 && id < ids[i-1] {
			reordered++
		}
	}
	lost := 2000 - len(seen)
	if lost < 120 || lost > 280 || dups < 50 || dups > 150 || reordered < 40 || reordered > 160 {
		t.Errorf("lost %d (want about 200), twice %d (about 95), behind a later one %d (about 90)", lost, dups, reordered)
	}
}

func TestDelayIsInSteps(t *testing.T) {
	n := NewNet(1)
	n.SetLink(addrA.Addr(), addrB.Addr(), Link{Delay: 2})
	a, b := n.Conn(addrA), n.Conn(addrB)
	s := a.NewSender()
	put(s, addrB, 0, number(0, 10))
	s.Flush()
	for step, want := range []int{0, 0, 1} {
		if ids, _ := drain(t, b); len(ids) != want {
			t.Errorf("after %d steps: %d datagrams, want %d", step, len(ids), want)
		}
		n.Step()
	}
	if n.Waiting() != 0 {
		t.Errorf("%d datagrams wait", n.Waiting())
	}
}

func TestPartitionAndHeal(t *testing.T) {
	n := NewNet(1)
	a, b, c := n.Conn(addrA), n.Conn(addrB), n.Conn(addrC)
	s := a.NewSender()
	send := func() (toB, toC int) {
		put(s, addrB, 0, number(0, 10))
		put(s, addrC, 0, number(0, 10))
		s.Flush()
		ids, _ := drain(t, b)
		idsC, _ := drain(t, c)
		return len(ids), len(idsC)
	}
	n.Partition([]netip.Addr{addrA.Addr(), addrC.Addr()}, []netip.Addr{addrB.Addr()})
	if b, c := send(); b != 0 || c != 1 {
		t.Errorf("cut: %d and %d arrived, want 0 and 1", b, c)
	}
	n.Heal()
	if b, c := send(); b != 1 || c != 1 {
		t.Errorf("healed: %d and %d arrived, want 1 and 1", b, c)
	}
}

func TestMTU(t *testing.T) {
	n := NewNet(1)
	n.SetLink(addrA.Addr(), addrB.Addr(), Link{MTU: 1000})
	a, b := n.Conn(addrA), n.Conn(addrB)
	if m, _ := a.PathMTU(addrB.Addr()); m != 1000 {
		t.Errorf("PathMTU = %d, want 1000", m)
	}
	if m, _ := b.PathMTU(addrA.Addr()); m != DefaultMTU {
		t.Errorf("PathMTU = %d, want %d", m, DefaultMTU)
	}
	s := a.NewSender()
	put(s, addrB, 0, number(0, 972))
	put(s, addrB, 0, number(1, 973))
	s.Flush()
	if ids, _ := drain(t, b); !slices.Equal(ids, []int{0}) || a.Stats().TxTooBig.Load() != 1 {
		t.Errorf("got %v, too big %d", ids, a.Stats().TxTooBig.Load())
	}
}

func TestTapSeesAll(t *testing.T) {
	n := NewNet(1)
	a := n.Conn(addrA)
	n.Conn(addrB)
	n.SetLink(addrA.Addr(), addrB.Addr(), Link{Loss: 1})
	n.Conn(addrC)
	var seen []string
	n.Tap(func(d Datagram) { seen = append(seen, fmt.Sprintf("%s %d %v", d.Dst, len(d.B), d.Lost)) })
	s := a.NewSender()
	put(s, addrB, 0, number(0, 10))
	put(s, addrC, 0, number(1, 20))
	put(s, netip.MustParseAddrPort("10.9.9.9:1"), 0, number(2, 30))
	s.Flush()
	if want := []string{"10.0.0.2:4789 10 true", "10.0.0.3:4789 20 false", "10.9.9.9:1 30 true"}; !slices.Equal(seen, want) {
		t.Errorf("tap saw %q, want %q", seen, want)
	}
}

func TestGroups(t *testing.T) {
	n := NewNet(1)
	a, b, c := n.Conn(addrA), n.Conn(addrB), n.Conn(addrC)
	group := netip.MustParseAddr("239.1.1.1")
	for _, conn := range []underlay.Conn{a, b, c} {
		if err := conn.JoinGroup(group); err != nil {
			t.Fatal(err)
		}
	}
	if err := c.LeaveGroup(group); err != nil {
		t.Fatal(err)
	}
	// b has two overlays with this group, of which one ends.
	if err := errors.Join(b.JoinGroup(group), b.LeaveGroup(group), b.Rebind()); err != nil {
		t.Fatal(err)
	}
	if n := b.(*Conn).Rebinds(); n != 1 {
		t.Errorf("Rebinds = %d, want 1", n)
	}
	if c.LeaveGroup(group) == nil || a.JoinGroup(addrB.Addr()) == nil {
		t.Error("leaving twice, or joining a unicast address: no error")
	}
	s := a.NewSender()
	put(s, netip.AddrPortFrom(group, 4789), 0, number(7, 10))
	s.Flush()
	for conn, want := range map[underlay.Conn][]int{a: nil, b: {7}, c: nil} {
		if ids, _ := drain(t, conn); !slices.Equal(ids, want) {
			t.Errorf("%v got %v, want %v", conn.LocalAddrs(), ids, want)
		}
	}
}

func TestControl(t *testing.T) {
	n := NewNet(1)
	n.SetLink(addrA.Addr(), addrB.Addr(), Link{MTU: 1000})
	a, b := n.Conn(addrA), n.Conn(addrB)
	mapped := netip.AddrPortFrom(netip.AddrFrom16(addrB.Addr().As16()), addrB.Port())
	if err := errors.Join(a.SendControl(addrB, number(0, 972)), a.SendControl(mapped, number(1, 4))); err != nil {
		t.Fatal(err)
	}
	for dst, want := range map[netip.AddrPort]error{
		addrB:                              syscall.EMSGSIZE,
		netip.MustParseAddrPort("[::1]:1"): syscall.EAFNOSUPPORT,
		{}:                                 syscall.EAFNOSUPPORT,
	} {
		if err := a.SendControl(dst, number(2, 973)); !errors.Is(err, want) {
			t.Errorf("SendControl(%s) = %v, want %v", dst, err, want)
		}
	}
	ids, srcs := drain(t, b)
	if !slices.Equal(ids, []int{0, 1}) || srcs[0] != addrA || srcs[1] != addrA {
		t.Errorf("got %v from %v, want 0 and 1 from %s", ids, srcs, addrA)
	}
	if st := a.Stats(); st.TxControl.Load() != 2 || st.TxControlError.Load() != 3 || st.TxDatagrams.Load() != 0 {
		t.Errorf("sent %d, errors %d, data %d, want 2, 3, 0", st.TxControl.Load(), st.TxControlError.Load(), st.TxDatagrams.Load())
	}
	a.Close()
	if err := a.SendControl(addrB, number(3, 4)); err != underlay.ErrClosed {
		t.Errorf("SendControl after Close = %v, want ErrClosed", err)
	}
}

func TestSetSource(t *testing.T) {
	n := NewNet(1)
	a, b := n.Conn(addrA), n.Conn(addrB)
	if err := a.SetSource(addrB.Addr()); err == nil {
		t.Error("SetSource to the address of another Conn: no error")
	}
	if err := a.SetSource(netip.MustParseAddr("239.1.1.1")); err == nil {
		t.Error("SetSource to a group: no error")
	}
	if err := errors.Join(a.SetSource(addrC.Addr()), a.SetSource(addrC.Addr()), a.SetSource(netip.Addr{})); err != nil {
		t.Fatal(err)
	}
	if at := a.LocalAddrs()[0]; at != addrC || a.(*Conn).Rebinds() != 3 {
		t.Errorf("at %s after %d rebinds, want %s, 3", at, a.(*Conn).Rebinds(), addrC)
	}
	s := a.NewSender()
	put(s, addrB, 0, number(0, 10))
	s.Flush()
	if err := errors.Join(a.SendControl(addrB, number(1, 10)), b.SendControl(addrA, number(2, 10)), b.SendControl(addrC, number(3, 10))); err != nil {
		t.Fatal(err)
	}
	ids, srcs := drain(t, b)
	if !slices.Equal(ids, []int{0, 1}) || srcs[0].Addr() != addrC.Addr() || srcs[1] != addrC {
		t.Errorf("b got %v from %v, want both from the new address", ids, srcs)
	}
	if ids, _ := drain(t, a); !slices.Equal(ids, []int{3}) {
		t.Errorf("a got %v, want what went to its new address", ids)
	}
	n.Conn(addrA) // its old one is free
	a.Close()
	n.Conn(addrC)
	if err := a.SetSource(addrA.Addr()); err != underlay.ErrClosed {
		t.Errorf("SetSource after Close = %v, want ErrClosed", err)
	}
}

func TestQueueIsBounded(t *testing.T) {
	n := NewNet(1)
	a, b := n.Conn(addrA), n.Conn(addrB)
	s := a.NewSender()
	for i := range MaxQueue + 10 {
		put(s, addrB, 0, number(i, 4))
	}
	s.Flush()
	if ids, _ := drain(t, b); !slices.Equal(ids, upTo(MaxQueue)) || b.Stats().RxOverflow.Load() != 10 {
		t.Errorf("%d datagrams, overflow %d", len(ids), b.Stats().RxOverflow.Load())
	}
}

// Workers that wait on channels only: time in the bubble can go on.
func TestSynctest(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := NewNet(1)
		a, b := n.Conn(addrA), n.Conn(addrB)
		echo := make(chan error)
		go func() { // b sends back what it gets
			r, s := b.Receivers()[0], b.NewSender()
			var batch underlay.Batch
			for {
				if err := r.Wait(); err != nil {
					echo <- err
					return
				}
				if err := r.Receive(&batch); err != nil {
					echo <- err
					return
				}
				for _, slot := range batch.Slots {
					put(s, addrA, 0, slot.B)
				}
				s.Flush()
			}
		}()
		s := a.NewSender()
		put(s, addrB, 0, []byte("hello"))
		s.Flush()
		synctest.Wait()
		var batch underlay.Batch
		if err := a.Receivers()[0].Wait(); err != nil {
			t.Fatal(err)
		}
		if err := a.Receivers()[0].Receive(&batch); err != nil || len(batch.Slots) != 1 || !bytes.Equal(batch.Slots[0].B, []byte("hello")) {
			t.Errorf("Receive = %v, %v", batch.Slots, err)
		}
		b.Close()
		if err := <-echo; err != underlay.ErrClosed {
			t.Errorf("the worker ended with %v, want ErrClosed", err)
		}
		n.Conn(addrB) // the address is free again
	})
}
