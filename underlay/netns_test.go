package underlay

import (
	"fmt"
	"net/netip"
	"os"
	"runtime"
	"sync/atomic"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// Privileged tests: namespaces without names, which vanish with their last
// descriptor, joined by veth pairs.

var deviceCount atomic.Uint32

// deviceName returns a name that no other run uses.
func deviceName() string {
	return fmt.Sprintf("tu%x-%x", os.Getpid()&0xfffff, deviceCount.Add(1))
}

// host is a network namespace.
type host struct {
	t  *testing.T
	ns netns.NsHandle
	nl *netlink.Handle
}

func newHost(t *testing.T) *host {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	h := &host{t: t}
	onThread(t, func() {
		var err error
		if h.ns, err = netns.New(); err != nil {
			t.Fatalf("new namespace: %v", err)
		}
	})
	t.Cleanup(func() { h.ns.Close() })
	var err error
	if h.nl, err = netlink.NewHandleAt(h.ns); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(h.nl.Close)
	// Addresses are usable at once: a router whose own is still tentative asks
	// for no neighbour, and the first datagram would be lost.
	if _, err := os.Stat("/proc/sys/net/ipv6"); err == nil {
		h.sysctl("ipv6/conf/default/accept_dad", "0")
		h.sysctl("ipv6/conf/default/dad_transmits", "0")
	}
	return h
}

// onThread runs fn, which may change the thread's namespace, and changes it back.
func onThread(t *testing.T, fn func()) {
	t.Helper()
	runtime.LockOSThread()
	home, err := netns.Get()
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		// A thread that does not come home stays locked, and so dies.
		if err := netns.Set(home); err == nil {
			runtime.UnlockOSThread()
		}
		home.Close()
	}()
	fn()
}

// do runs fn in h.
func (h *host) do(fn func()) {
	h.t.Helper()
	onThread(h.t, func() {
		if err := netns.Set(h.ns); err != nil {
			h.t.Fatal(err)
		}
		fn()
	})
}

func (h *host) open(cfg Config) (c *conn) {
	h.t.Helper()
	h.do(func() { c = open(h.t, cfg) })
	return c
}

// flush sends in h: the pool belongs to the namespace of its first use.
func (h *host) flush(s Sender) { h.t.Helper(); h.do(s.Flush) }

func (h *host) must(err error) {
	h.t.Helper()
	if err != nil {
		h.t.Fatal(err)
	}
}

func (h *host) link(name string) netlink.Link {
	h.t.Helper()
	l, err := h.nl.LinkByName(name)
	h.must(err)
	return l
}

// up brings a device up and gives it addresses, at once usable.
func (h *host) up(name string, prefixes ...string) {
	h.t.Helper()
	h.must(h.nl.LinkSetUp(h.link(name)))
	for _, p := range prefixes {
		a, err := netlink.ParseAddr(p)
		h.must(err)
		if a.IP.To4() == nil {
			a.Flags |= unix.IFA_F_NODAD
		}
		h.must(h.nl.AddrAdd(h.link(name), a))
	}
}

// carrier waits until the kernel, which does it on its own time, has let a
// device that has a carrier send: before, it drops everything.
func (h *host) carrier(name string) {
	h.t.Helper()
	waitFor(h.t, "the carrier of "+name, func() bool { return h.link(name).Attrs().OperState == netlink.OperUp })
}

// sysctl writes a setting of h.
func (h *host) sysctl(path, value string) {
	h.t.Helper()
	h.do(func() { h.must(os.WriteFile("/proc/sys/net/"+path, []byte(value), 0o644)) })
}

// cable joins two hosts and returns the names of its ends.
func cable(a, b *host) (string, string) {
	a.t.Helper()
	an, bn := deviceName(), deviceName()
	veth := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: an}, PeerName: bn, PeerNamespace: netlink.NsFd(b.ns)}
	a.must(a.nl.LinkAdd(veth))
	return an, bn
}

// pair returns two hosts on one cable: 10.9.0.1 and .2, fd09::1 and ::2.
func pair(t *testing.T) (a, b *host, an, bn string) {
	t.Helper()
	a, b = newHost(t), newHost(t)
	an, bn = cable(a, b)
	a.up("lo")
	b.up("lo")
	a.up(an, "10.9.0.1/24", "fd09::1/64")
	b.up(bn, "10.9.0.2/24", "fd09::2/64")
	a.carrier(an)
	b.carrier(bn)
	return a, b, an, bn
}

var (
	anyAddr = netip.MustParseAddrPort("[::]:0")
	a4, b4  = netip.MustParseAddr("10.9.0.1"), netip.MustParseAddr("10.9.0.2")
	a6, b6  = netip.MustParseAddr("fd09::1"), netip.MustParseAddr("fd09::2")
)

// receiverOf returns c's Receiver for the family of a.
func receiverOf(c *conn, a netip.Addr) Receiver { return c.Receivers()[familyOf(a)] }

// at returns address a with the port that c listens on.
func at(c *conn, a netip.Addr) netip.AddrPort { return netip.AddrPortFrom(a, c.local[0].Port()) }

func waitFor(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for start := time.Now(); !ok(); time.Sleep(time.Millisecond) {
		if time.Since(start) > 5*time.Second {
			t.Fatalf("%s did not come", what)
		}
	}
}

func pathMTU(h *host, c *conn, dst netip.Addr) (mtu int) {
	h.t.Helper()
	h.do(func() {
		var err error
		mtu, err = c.PathMTU(dst)
		h.must(err)
	})
	return mtu
}
