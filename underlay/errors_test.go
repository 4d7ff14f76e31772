package underlay

import (
	"bytes"
	"errors"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestPortInUse(t *testing.T) {
	c := open(t, Config{})
	_, err := Open(Config{Listen: c.LocalAddrs()[0]})
	if !errors.Is(err, unix.EADDRINUSE) || !strings.Contains(err.Error(), "--listen") {
		t.Errorf("Open of a port in use: %v", err)
	}
	err = listenError(netip.MustParseAddrPort("[::]:4789"), unix.EADDRINUSE)
	for _, want := range []string{"4789", "kernel vxlan", "Docker Swarm", "--listen [::]:4790"} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("error %q does not say %q", err, want)
		}
	}
	if _, err = Open(Config{Listen: netip.MustParseAddrPort("203.0.113.7:0")}); !errors.Is(err, unix.EADDRNOTAVAIL) || !strings.Contains(err.Error(), "does not have the address") {
		t.Errorf("Open of a foreign address: %v", err)
	}
}

func TestNoFamily(t *testing.T) {
	for err, want := range map[error]bool{unix.EAFNOSUPPORT: true, unix.EADDRNOTAVAIL: true, unix.EADDRINUSE: false, unix.EACCES: false} {
		if got := noFamily(listenError(netip.MustParseAddrPort("[::]:1"), err)); got != want {
			t.Errorf("noFamily(%v) = %v, want %v", err, got, want)
		}
	}
}

func TestConfigFaults(t *testing.T) {
	for name, tc := range map[string]struct {
		cfg  Config
		want string
	}{
		"no listen":    {Config{}, "listen"},
		"ports":        {Config{Listen: netip.MustParseAddrPort("[::]:1"), SourcePorts: 65}, "1 to 64"},
		"ports < 0":    {Config{Listen: netip.MustParseAddrPort("[::]:1"), SourcePorts: -1}, "1 to 64"},
		"group":        {Config{Listen: netip.MustParseAddrPort("[::]:1"), GroupTTL: map[netip.Addr]int{loopback4: 1}}, "not a multicast"},
		"ttl":          {Config{Listen: netip.MustParseAddrPort("[::]:1"), GroupTTL: map[netip.Addr]int{netip.MustParseAddr("239.1.1.1"): 256}}, "1 to 255"},
		"buffer":       {Config{Listen: netip.MustParseAddrPort("[::]:1"), SendBuffer: -1}, "buffer"},
		"source":       {Config{Listen: netip.MustParseAddrPort("[::]:1"), Source: netip.IPv6Unspecified()}, "no address"},
		"more than 1":  {Config{SourcePorts: 99}, "\n"},
		"rcv too long": {Config{Listen: netip.MustParseAddrPort("[::]:1"), ReceiveBuffer: maxBuffer + 1}, "buffer"},
	} {
		if _, err := Open(tc.cfg); err == nil || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%s: Open = %v, want an error with %q", name, err, tc.want)
		}
	}
}

func TestTooBigIsCounted(t *testing.T) {
	bell := make(chan struct{}, 1)
	c := open(t, Config{TooBig: bell})
	s := c.NewSender()
	// Past Reserve's bound, because the loopback's MTU takes all that it allows.
	s.(*sender).grow()
	s.(*sender).reserved = MaxSend + 1
	s.Commit(c.LocalAddrs()[0], 0, MaxSend+1)
	put(s, c.LocalAddrs()[0], 0, []byte("small"))
	s.Flush()
	if g := receive(t, c.Receivers()[0], 1)[0]; string(g.b) != "small" {
		t.Errorf("got %q, want the small datagram", g.b)
	}
	if n := c.Stats().TxTooBig.Load(); n != 1 {
		t.Errorf("TxTooBig = %d, want 1", n)
	}
	select {
	case <-bell:
	default:
		t.Error("the bell TooBig did not ring")
	}
}

func TestUnreachableIsCounted(t *testing.T) {
	c := open(t, Config{})
	s := c.NewSender()
	put(s, netip.MustParseAddrPort("255.255.255.255:4789"), 0, []byte("broadcast is not permitted"))
	put(s, c.LocalAddrs()[0], 0, []byte("x"))
	s.Flush()
	receive(t, c.Receivers()[0], 1)
	if st := c.Stats(); st.TxUnreachable.Load() != 1 || st.TxDatagrams.Load() != 1 {
		t.Errorf("unreachable %d, sent %d; want 1 and 1", st.TxUnreachable.Load(), st.TxDatagrams.Load())
	}
}

// An ICMP error that an earlier datagram caused does not cost a later one.
func TestPendingErrorDoesNotFailTheNext(t *testing.T) {
	skipEmulated(t)
	c := open(t, Config{SourcePorts: 1})
	dead := open(t, Config{})
	deadAddr := dead.LocalAddrs()[0]
	dead.Close()
	s := c.NewSender()
	const rounds = 20
	for i := range rounds {
		put(s, deadAddr, 0, []byte("refused"))
		s.Flush()
		put(s, c.LocalAddrs()[0], 0, pattern(i, 50)) // a train
		put(s, c.LocalAddrs()[0], 0, pattern(i, 50))
		s.Flush()
	}
	receive(t, c.Receivers()[0], 2*rounds)
	st := c.Stats()
	if st.TxDatagrams.Load() != 3*rounds || st.TxUnreachable.Load()+st.TxError.Load() != 0 {
		t.Errorf("sent %d of %d, unreachable %d, error %d", st.TxDatagrams.Load(), 3*rounds, st.TxUnreachable.Load(), st.TxError.Load())
	}
	if st.ICMPErrors.Load() == 0 {
		t.Error("no ICMP error was counted, so nothing was tested")
	}
	if c.Offloads().GSO != "on" {
		t.Errorf("GSO = %q", c.Offloads().GSO)
	}
}

func TestWaitIsBounded(t *testing.T) {
	c := open(t, Config{})
	s := newSender(c)
	s.grow()
	fds := make([]int, 2)
	if err := unix.Pipe2(fds, unix.O_NONBLOCK|unix.O_CLOEXEC); err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fds[0])
	defer unix.Close(fds[1])
	for { // a full pipe is never ready for POLLOUT
		if _, err := unix.Write(fds[1], make([]byte, 4096)); err != nil {
			break
		}
	}
	for _, errno := range []unix.Errno{unix.EAGAIN, unix.ENOBUFS} {
		s.out.begin()
		start, waits := time.Now(), 0
		for s.out.wait(fds[1], errno) {
			waits++
		}
		if d := time.Since(start); d < txWait || d > 100*txWait || waits == 0 {
			t.Errorf("%v: %d waits of together %v, want %v", errno, waits, d, txWait)
		}
	}
}

// Errors of recvmmsg end one Receive, whatever their order, and no other.
func TestReceiveErrors(t *testing.T) {
	c := open(t, Config{})
	r := c.receivers[0]
	call := r.call
	for _, errnos := range [][]unix.Errno{
		{unix.ENOMEM, unix.ENOMEM, unix.ENOMEM, unix.ENOMEM, unix.ENOMEM, unix.ENOMEM},
		{unix.ENOMEM, unix.ENOMEM, unix.ENOMEM, unix.ENOMEM, unix.EINTR, unix.ENOMEM}, // where the bound is
	} {
		calls := 0
		r.call = func(uintptr) {
			r.n, r.errno = 0, errnos[min(calls, len(errnos)-1)]
			if calls++; calls > 100 {
				r.errno = unix.EAGAIN
			}
		}
		var b Batch
		if err := r.Receive(&b); !errors.Is(err, unix.ENOMEM) || errors.Is(err, ErrClosed) || len(b.Slots) != 0 {
			t.Errorf("%v: Receive = %v with %d slots after %d calls, want ENOMEM", errnos, err, len(b.Slots), calls)
		}
	}
	r.call = call
	s := c.NewSender()
	put(s, c.local[0], 0, []byte("later"))
	s.Flush()
	if d := receive(t, r, 1)[0]; string(d.b) != "later" {
		t.Errorf("got %q", d.b)
	}
	c.Close()
	if err := r.Receive(&Batch{}); err != ErrClosed {
		t.Errorf("Receive after Close = %v, want ErrClosed", err)
	}
}

func TestOverflowIsCounted(t *testing.T) {
	skipEmulated(t)
	c := open(t, Config{ReceiveBuffer: 8 << 10, NoGSO: true, NoGRO: true})
	s, r := c.NewSender(), c.Receivers()[0]
	const sent = 200
	for i := range sent {
		put(s, c.LocalAddrs()[0], 0, pattern(i, 1000))
	}
	s.Flush()
	// What was dropped is told with a datagram that came later and fitted.
	tells, got := 0, 0
	var b Batch
	for start := time.Now(); ; {
		if err := r.Receive(&b); err != nil {
			t.Fatal(err)
		}
		got += len(b.Slots)
		n := int(c.Stats().RxOverflow.Load())
		if n > 0 && n+got == sent+tells {
			break
		}
		if time.Since(start) > 5*time.Second {
			t.Fatalf("RxOverflow = %d and %d received, want together %d", n, got, sent+tells)
		}
		if len(b.Slots) == 0 {
			put(s, c.LocalAddrs()[0], 0, []byte("tells of the drops"))
			s.Flush()
			tells++
		}
	}
	if got == sent+tells {
		t.Error("nothing was dropped, so nothing was tested")
	}
}

func TestTruncatedIsCounted(t *testing.T) {
	c := open(t, Config{NoGRO: true})
	s := c.NewSender()
	for _, n := range []int{100, 101, 99} {
		put(s, c.LocalAddrs()[0], 0, pattern(n, n))
	}
	s.Flush()
	b := Batch{Memory: newRxMemory(100), Slots: make([]Slot, 0, rxSlots)}
	var lens []int
	for len(lens) < 2 {
		if err := c.Receivers()[0].Wait(); err != nil {
			t.Fatal(err)
		}
		if err := c.Receivers()[0].Receive(&b); err != nil {
			t.Fatal(err)
		}
		for _, slot := range b.Slots {
			lens = append(lens, len(slot.B))
		}
	}
	if !slices.Equal(lens, []int{100, 99}) || c.Stats().RxTruncated.Load() != 1 {
		t.Errorf("lengths %v, truncated %d; want [100 99] and 1", lens, c.Stats().RxTruncated.Load())
	}
}

// A kernel that refuses trains: those of its datagrams go one by one, in order,
// and no more trains are made.
func TestSplitSwitchesGSOOff(t *testing.T) {
	for _, tc := range []struct {
		cause unix.Errno
		off   bool
	}{{unix.EIO, true}, {unix.EINVAL, true}, {unix.EOPNOTSUPP, true}, {unix.EMSGSIZE, false}} {
		t.Run(tc.cause.Error(), func(t *testing.T) {
			c := open(t, Config{})
			s := newSender(c)
			s.grow()
			sizes := []int{500, 500, 500, 20}
			for i, n := range sizes {
				put(s, c.LocalAddrs()[0], 0, pattern(i, n))
				put(s, c.LocalAddrs()[0], 1, []byte("between")) // so that a message has several pieces
			}
			c.closing.RLock()
			p, err := c.pool(v4)
			if err != nil {
				t.Fatal(err)
			}
			s.out.begin()
			s.put(0, 0)
			s.split(p.fds[0], 0, tc.cause)
			c.closing.RUnlock()
			for i, g := range receive(t, c.Receivers()[0], len(sizes)) {
				if !bytes.Equal(g.b, pattern(i, sizes[i])) {
					t.Errorf("datagram %d: %d bytes", i, len(g.b))
				}
			}
			if off := c.Offloads().GSO != "on"; off != tc.off {
				t.Errorf("GSO = %q", c.Offloads().GSO)
			}
			if tc.off && !strings.Contains(c.Offloads().GSO, tc.cause.Error()) {
				t.Errorf("GSO = %q does not give the reason %q", c.Offloads().GSO, tc.cause)
			}
		})
	}
}

func TestMisusePanics(t *testing.T) {
	c := open(t, Config{})
	for name, f := range map[string]func(Sender){
		"Reserve(0)":        func(s Sender) { s.Reserve(0) },
		"Reserve(65508)":    func(s Sender) { s.Reserve(65508) },
		"Commit of more":    func(s Sender) { s.Reserve(1); s.Commit(c.LocalAddrs()[0], 0, 2) },
		"Commit of nothing": func(s Sender) { s.Reserve(1); s.Commit(c.LocalAddrs()[0], 0, 0) },
		"second Commit": func(s Sender) {
			s.Reserve(1)
			s.Commit(c.LocalAddrs()[0], 0, 1)
			s.Commit(c.LocalAddrs()[0], 0, 1)
		},
	} {
		func() {
			defer func() {
				if recover() == nil {
					t.Errorf("%s did not panic", name)
				}
			}()
			f(c.NewSender())
		}()
	}
}
