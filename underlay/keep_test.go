package underlay

import (
	"errors"
	"net/netip"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// ports returns the addresses that the pool of a family sends from.
func ports(t *testing.T, c Conn, f family) (list []netip.AddrPort) {
	t.Helper()
	p := c.(*conn).pools[f].Load()
	if p == nil {
		return nil
	}
	for _, fd := range p.fds {
		at, err := localAddr(fd)
		if err != nil {
			t.Fatal(err)
		}
		list = append(list, at)
	}
	return list
}

// TestHanded: the next Conn has the ports of the one before, and gets what arrived in
// between.
func TestHanded(t *testing.T) {
	local := netip.MustParseAddr("127.0.0.1")
	cfg := Config{Listen: netip.AddrPortFrom(local, 0), Source: local, SourcePorts: 3}
	first, err := Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	at := first.LocalAddrs()[0]
	c := first.(*conn)
	c.closing.RLock()
	_, err = c.pool(v4)
	c.closing.RUnlock()
	if err != nil {
		t.Fatal(err)
	}
	from := ports(t, first, v4)
	h, err := first.(Lasting).Descriptors()
	if err != nil || len(h.Listening) != 1 || len(h.Pools[v4]) != 3 || len(h.Pools[v6]) != 0 {
		t.Fatalf("Descriptors() = %+v, %v", h, err)
	}
	first.Close()
	if _, err := first.(Lasting).Descriptors(); !errors.Is(err, ErrClosed) {
		t.Errorf("Descriptors() after Close = %v, want ErrClosed", err)
	}
	fd, err := udpSocket(v4)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if err := unix.Sendto(fd, []byte("meanwhile"), 0, sockaddr(at)); err != nil {
		t.Fatal(err)
	}
	cfg.Handed = h
	next, err := Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer next.Close()
	if got := next.LocalAddrs()[0]; got != at {
		t.Errorf("it listens on %v, want %v", got, at)
	}
	got := ports(t, next, v4)
	if len(got) != 3 || got[0] != from[0] || got[1] != from[1] || got[2] != from[2] {
		t.Errorf("it sends from %v, want %v", got, from)
	}
	r := next.Receivers()[0]
	b := new(Batch)
	done := make(chan error, 1)
	go func() {
		err := r.Wait()
		if err == nil {
			err = r.Receive(b)
		}
		done <- err
	}()
	select {
	case err := <-done:
		if err != nil || len(b.Slots) != 1 || string(b.Slots[0].B) != "meanwhile" {
			t.Errorf("received %+v, %v", b.Slots, err)
		}
	case <-time.After(5 * time.Second):
		t.Error("what arrived meanwhile is lost")
	}
	for _, f := range append(h.Listening, h.Pools[v4]...) {
		if f != nil {
			if _, err := f.Stat(); err == nil {
				t.Error("what was handed over is open still")
			}
		}
	}
}

// TestHandedUseless: what is not wanted is closed, and new sockets are made.
func TestHandedUseless(t *testing.T) {
	local := netip.MustParseAddr("127.0.0.1")
	cfg := Config{Listen: netip.AddrPortFrom(local, 0), Source: local, SourcePorts: 3}
	first, err := Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer first.Close()
	c := first.(*conn)
	c.closing.RLock()
	_, err = c.pool(v4)
	c.closing.RUnlock()
	if err != nil {
		t.Fatal(err)
	}
	h, err := first.(Lasting).Descriptors()
	if err != nil {
		t.Fatal(err)
	}
	null, err := os.Open("/dev/null")
	if err != nil {
		t.Fatal(err)
	}
	h.Listening = append(h.Listening, null)
	other := cfg
	other.Listen, other.SourcePorts, other.Handed = netip.MustParseAddrPort("127.0.0.2:0"), 2, h
	next, err := Open(other)
	if err != nil {
		t.Fatal(err)
	}
	defer next.Close()
	if got := next.LocalAddrs()[0]; got.Addr() != other.Listen.Addr() {
		t.Errorf("it listens on %v", got)
	}
	if got := ports(t, next, v4); got != nil {
		t.Errorf("it sends from %v, want no pool yet", got)
	}
	if _, err := null.Stat(); err == nil {
		t.Error("what was of no use is open still")
	}
	if _, err := Open(Config{Handed: Handed{Listening: []*os.File{null}}}); err == nil {
		t.Error("a Config without Listen is taken")
	}
}

// TestHandedGroups: the groups of a socket that was handed over are joined, left and
// joined again as those of a new one.
func TestHandedGroups(t *testing.T) {
	cfg := Config{Listen: netip.MustParseAddrPort("0.0.0.0:0"), Source: loopback4}
	group := netip.MustParseAddr("239.255.47.90")
	first := open(t, cfg)
	if err := first.JoinGroup(group); err != nil {
		skipEmulated(t) // qemu-user garbles the interface index on 64 bits
		t.Fatal(err)
	}
	h, err := first.Descriptors()
	if err != nil {
		t.Fatal(err)
	}
	first.Close()
	cfg.Handed = h
	next := open(t, cfg)
	for range 2 {
		if err := next.JoinGroup(group); err != nil {
			t.Fatal(err)
		}
		if err := next.Rebind(); err != nil {
			t.Fatal(err)
		}
		if err := next.LeaveGroup(group); err != nil {
			t.Fatal(err)
		}
	}
}
