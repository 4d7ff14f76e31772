package underlay

import (
	"bytes"
	"context"
	"errors"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

func TestPrivilegedVeth(t *testing.T) {
	ha, hb, _, _ := pair(t)
	sizes := []int{1450, 1450, 1450, 700, 64, 64, 64, 1450, 1000, 1000, 1000, 1000, 1000}
	for _, tc := range []struct {
		name         string
		noGSO, noGRO bool
	}{{"gso gro", false, false}, {"gso", false, true}, {"gro", true, false}, {"neither", true, true}} {
		for _, ips := range [][2]netip.Addr{{a4, b4}, {a6, b6}} {
			t.Run(tc.name+" "+ips[1].String(), func(t *testing.T) {
				ca := ha.open(Config{Listen: anyAddr, Source: ips[0], NoGSO: tc.noGSO})
				cb := hb.open(Config{Listen: anyAddr, NoGRO: tc.noGRO})
				s := ca.NewSender()
				for i, n := range sizes {
					put(s, at(cb, ips[1]), 3, pattern(i, n))
				}
				ha.flush(s)
				for i, g := range receive(t, receiverOf(cb, ips[1]), len(sizes)) {
					if !bytes.Equal(g.b, pattern(i, sizes[i])) {
						t.Fatalf("datagram %d of %d bytes is wrong", i, sizes[i])
					}
					if g.src.Addr() != ips[0] {
						t.Fatalf("source = %s, want %s", g.src, ips[0])
					}
				}
				ca.Close()
				cb.Close()
			})
		}
	}
}

func TestPrivilegedIPv6Disabled(t *testing.T) {
	h := newHost(t)
	h.up("lo")
	if _, err := os.Stat("/proc/sys/net/ipv6"); err == nil {
		h.sysctl("ipv6/conf/all/disable_ipv6", "1")
	}
	c := h.open(Config{Listen: anyAddr})
	s := c.NewSender()
	put(s, at(c, netip.IPv6Loopback()), 0, []byte("nowhere"))
	put(s, at(c, loopback4), 0, []byte("there"))
	h.flush(s)
	if g := receive(t, c.Receivers()[0], 1)[0]; string(g.b) != "there" {
		t.Errorf("got %q", g.b)
	}
	if n := c.Stats().TxUnreachable.Load(); n != 1 {
		t.Errorf("TxUnreachable = %d, want 1", n)
	}
	h.do(func() {
		if _, err := Open(Config{Listen: netip.MustParseAddrPort("[::1]:0")}); !noFamily(err) {
			t.Errorf("Open on [::1]: %v", err)
		}
	})
}

// A namespace whose loopback is down cannot test the offloads, and has them.
func TestPrivilegedLoopbackDown(t *testing.T) {
	h := newHost(t)
	start := time.Now()
	if o := h.open(Config{Listen: anyAddr}).Offloads(); o.GSO != "on" || o.GRO != "on" {
		t.Errorf("Offloads = %+v", o)
	}
	if d := time.Since(start); d > 2*time.Second {
		t.Errorf("Open took %v", d)
	}
}

func TestPrivilegedMTUChange(t *testing.T) {
	ha, hb, an, _ := pair(t)
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	var changes <-chan struct{}
	ha.do(func() {
		var err error
		changes, err = Changes(ctx)
		ha.must(err)
	})
	tooBig := make(chan struct{}, 1)
	ca := ha.open(Config{Listen: anyAddr, TooBig: tooBig})
	cb := hb.open(Config{Listen: anyAddr})
	s := ca.NewSender()
	for _, dst := range []netip.Addr{b4, b6} {
		if mtu := pathMTU(ha, ca, dst); mtu != 1500 {
			t.Errorf("PathMTU(%s) = %d, want 1500", dst, mtu)
		}
	}
	ha.must(ha.nl.LinkSetMTU(ha.link(an), 1400))
	select {
	case <-changes:
	case <-time.After(5 * time.Second):
		t.Fatal("the bell did not ring after a change of MTU")
	}
	for _, dst := range []netip.Addr{b4, b6} {
		if mtu := pathMTU(ha, ca, dst); mtu != 1400 {
			t.Errorf("PathMTU(%s) = %d, want 1400", dst, mtu)
		}
		before := ca.Stats().TxTooBig.Load()
		for range 5 {
			put(s, at(cb, dst), 0, pattern(1, 1450)) // a train whose datagrams are too big
		}
		put(s, at(cb, dst), 0, pattern(2, 60)) // its tail is not
		ha.flush(s)
		if g := receive(t, receiverOf(cb, dst), 1)[0]; !bytes.Equal(g.b, pattern(2, 60)) {
			t.Errorf("%s: got %d bytes, want the 60 that fit", dst, len(g.b))
		}
		if n := ca.Stats().TxTooBig.Load() - before; n != 5 {
			t.Errorf("%s: TxTooBig = %d, want 5", dst, n)
		}
		select {
		case <-tooBig:
		default:
			t.Errorf("%s: the bell TooBig did not ring", dst)
		}
	}
	if gso := ca.Offloads().GSO; gso != "on" {
		t.Errorf("GSO = %q after datagrams that were too big, want on", gso)
	}
}

// The bell rings for a link, an address and a route, and not without a cause.
func TestPrivilegedChanges(t *testing.T) {
	h := newHost(t)
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	var changes <-chan struct{}
	h.do(func() {
		var err error
		changes, err = Changes(ctx)
		h.must(err)
	})
	name := deviceName()
	for what, change := range map[string]func() error{
		"link":    func() error { return h.nl.LinkAdd(&netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: name}}) },
		"address": func() error { h.up("lo", "10.8.0.1/32"); return nil },
	} {
		h.must(change())
		select {
		case <-changes:
		case <-time.After(5 * time.Second):
			t.Errorf("the bell did not ring for a change of %s", what)
		}
	}
}

// A router between them whose far side is narrower: ICMP tells.
func TestPrivilegedICMPTooBig(t *testing.T) {
	ha, hr, hb := newHost(t), newHost(t), newHost(t)
	for _, h := range []*host{ha, hr, hb} {
		h.up("lo")
	}
	an, ra := cable(ha, hr)
	rb, bn := cable(hr, hb)
	ha.up(an, "10.1.0.1/24", "fd01::1/64")
	hr.up(ra, "10.1.0.254/24", "fd01::254/64")
	hr.up(rb, "10.2.0.254/24", "fd02::254/64")
	hb.up(bn, "10.2.0.1/24", "fd02::1/64")
	for name, h := range map[string]*host{an: ha, ra: hr, rb: hr, bn: hb} {
		h.carrier(name)
	}
	hr.must(hr.nl.LinkSetMTU(hr.link(rb), 1300))
	hr.sysctl("ipv4/ip_forward", "1")
	hr.sysctl("ipv6/conf/all/forwarding", "1")
	route := func(h *host, name, gw string) {
		ip := netip.MustParseAddr(gw)
		h.must(h.nl.RouteAdd(&netlink.Route{LinkIndex: h.link(name).Attrs().Index, Gw: ip.AsSlice()}))
	}
	route(ha, an, "10.1.0.254")
	route(ha, an, "fd01::254")
	route(hb, bn, "10.2.0.254")
	route(hb, bn, "fd02::254")

	for _, dst := range []netip.Addr{netip.MustParseAddr("10.2.0.1"), netip.MustParseAddr("fd02::1")} {
		tooBig := make(chan struct{}, 1)
		ca := ha.open(Config{Listen: anyAddr, TooBig: tooBig, SourcePorts: 1})
		cb := hb.open(Config{Listen: anyAddr})
		s := ca.NewSender()
		// Warm the neighbour caches, so that what follows is answered at once.
		put(s, at(cb, dst), 0, pattern(0, 100))
		ha.flush(s)
		receive(t, receiverOf(cb, dst), 1)
		put(s, at(cb, dst), 0, pattern(1, 1400))
		ha.flush(s) // leaves; the router answers
		// The error waits on the socket; the next datagram, which fits, finds
		// it and goes all the same.
		waitFor(t, "the ICMP error", func() bool { return pathMTU(ha, ca, dst) == 1300 })
		put(s, at(cb, dst), 0, pattern(2, 100))
		ha.flush(s)
		if g := receive(t, receiverOf(cb, dst), 1)[0]; !bytes.Equal(g.b, pattern(2, 100)) {
			t.Errorf("%s: got %d bytes", dst, len(g.b))
		}
		st := ca.Stats()
		if st.ICMPTooBig.Load() != 1 || st.ICMPErrors.Load() != 1 || st.TxTooBig.Load() != 0 || st.TxDatagrams.Load() != 3 {
			t.Errorf("%s: ICMP too big %d, ICMP errors %d, too big %d, sent %d; want 1, 1, 0, 3", dst,
				st.ICMPTooBig.Load(), st.ICMPErrors.Load(), st.TxTooBig.Load(), st.TxDatagrams.Load())
		}
		select {
		case <-tooBig:
		default:
			t.Errorf("%s: the bell TooBig did not ring", dst)
		}
		put(s, at(cb, dst), 0, pattern(3, 1400))
		ha.flush(s) // now this host knows
		if n := st.TxTooBig.Load(); n != 1 {
			t.Errorf("%s: TxTooBig = %d, want 1", dst, n)
		}
	}
}

func TestPrivilegedMulticast(t *testing.T) {
	ha, hb, _, _ := pair(t)
	far, near := netip.MustParseAddr("239.1.2.3"), netip.MustParseAddr("239.1.2.4")
	far6, near6 := netip.MustParseAddr("ff05::1:2:3"), netip.MustParseAddr("ff05::1:2:4")
	for _, tc := range []struct{ source, far, near netip.Addr }{{a4, far, near}, {a6, far6, near6}} {
		ca := ha.open(Config{Listen: anyAddr, Source: tc.source, GroupTTL: map[netip.Addr]int{tc.far: 9}})
		cb := hb.open(Config{Listen: netip.AddrPortFrom(netip.IPv6Unspecified(), ca.local[0].Port()), Source: map[bool]netip.Addr{true: b4, false: b6}[tc.source.Is4()]})
		for _, g := range []netip.Addr{tc.far, tc.near} {
			ha.do(func() { ha.must(ca.JoinGroup(g)) })
			hb.do(func() { hb.must(cb.JoinGroup(g)) })
		}
		ttls := ttlSocket(hb, tc.far, tc.near)
		s := ca.NewSender()
		put(s, at(cb, tc.far), 0, []byte("far"))
		put(s, at(cb, tc.near), 0, []byte("near"))
		put(s, netip.AddrPortFrom(tc.far, ttls.port), 0, []byte("far"))
		put(s, netip.AddrPortFrom(tc.near, ttls.port), 0, []byte("near"))
		ha.flush(s)
		var got []string
		for _, d := range receive(t, receiverOf(cb, tc.source), 2) {
			got = append(got, string(d.b))
			if d.src.Addr() != tc.source {
				t.Errorf("source = %s, want %s", d.src, tc.source)
			}
		}
		if !slices.Equal(got, []string{"far", "near"}) {
			t.Errorf("got %q", got)
		}
		if far, near := ttls.next(t), ttls.next(t); far != 9 || near != 1 {
			t.Errorf("TTLs are %d and %d, want 9 and 1", far, near)
		}
		hb.do(func() { hb.must(cb.LeaveGroup(tc.far)) })
		put(s, at(cb, tc.far), 0, []byte("left"))
		put(s, at(cb, tc.near), 0, []byte("still in"))
		ha.flush(s)
		if d := receive(t, receiverOf(cb, tc.source), 1)[0]; string(d.b) != "still in" {
			t.Errorf("got %q", d.b)
		}
		var b Batch
		if err := receiverOf(ca, tc.source).Receive(&b); err != nil || len(b.Slots) != 0 {
			t.Errorf("the sender got %d of its own datagrams", len(b.Slots))
		}
		ca.Close()
		cb.Close()
	}
}

// ttls is a socket that tells the TTL of what it receives.
type ttls struct {
	fd   int
	port uint16
}

func ttlSocket(h *host, groups ...netip.Addr) (s ttls) {
	h.t.Helper()
	h.do(func() {
		f := familyOf(groups[0])
		var err error
		s.fd, err = udpSocket(f)
		h.must(err)
		h.t.Cleanup(func() { unix.Close(s.fd) })
		if f == v4 {
			h.must(unix.SetsockoptInt(s.fd, unix.SOL_IP, unix.IP_RECVTTL, 1))
		} else {
			h.must(unix.SetsockoptInt(s.fd, unix.SOL_IPV6, unix.IPV6_RECVHOPLIMIT, 1))
		}
		h.must(unix.Bind(s.fd, sockaddr(netip.AddrPortFrom(f.unspecified(), 0))))
		local, err := localAddr(s.fd)
		h.must(err)
		s.port = local.Port()
		source := b4
		if f == v6 {
			source = b6
		}
		for _, g := range groups {
			h.must(setMembership(s.fd, g, indexOf(source), true))
		}
	})
	return s
}

func (s ttls) next(t *testing.T) int {
	t.Helper()
	if n, err := unix.Poll([]unix.PollFd{{Fd: int32(s.fd), Events: unix.POLLIN}}, 5000); n != 1 {
		t.Fatalf("poll: %d, %v", n, err)
	}
	control := make([]byte, 64)
	_, n, _, _, err := unix.Recvmsg(s.fd, make([]byte, 64), control, 0)
	if err != nil {
		t.Fatal(err)
	}
	msgs, err := unix.ParseSocketControlMessage(control[:n])
	if err != nil || len(msgs) != 1 {
		t.Fatalf("control messages: %v, %v", msgs, err)
	}
	return int(msgs[0].Data[0]) | int(msgs[0].Data[3]) // in either byte order
}

// A neighbour that never answers holds datagrams until the send buffer is full.
func TestPrivilegedSendBufferFull(t *testing.T) {
	ha, _, _, _ := pair(t)
	c := ha.open(Config{Listen: anyAddr, SendBuffer: 8 << 10, SourcePorts: 1, NoGSO: true})
	s := c.NewSender()
	const sent = 50
	for i := range sent {
		put(s, netip.MustParseAddrPort("10.9.0.77:4789"), 0, pattern(i, 1000))
	}
	start := time.Now()
	ha.flush(s)
	if d := time.Since(start); d > time.Second {
		t.Errorf("Flush took %v", d)
	}
	st := c.Stats()
	if full, ok := st.TxFull.Load(), st.TxDatagrams.Load(); full == 0 || full+ok != sent {
		t.Errorf("TxFull = %d, TxDatagrams = %d, want together %d and TxFull not 0", full, ok, sent)
	}
}

func TestPrivilegedKernelVXLANHoldsPort(t *testing.T) {
	h := newHost(t)
	h.up("lo")
	name := deviceName()
	err := h.nl.LinkAdd(&netlink.Vxlan{LinkAttrs: netlink.LinkAttrs{Name: name}, VxlanId: 7, Port: 4789})
	if errors.Is(err, unix.EOPNOTSUPP) {
		// Without a vxlan module: another socket holds it.
		h.open(Config{Listen: netip.MustParseAddrPort("0.0.0.0:4789")})
		name = "kernel vxlan device"
	} else {
		h.must(err)
		h.up(name)
	}
	h.do(func() {
		_, err := Open(Config{Listen: netip.MustParseAddrPort("[::]:4789")})
		if !errors.Is(err, unix.EADDRINUSE) {
			t.Fatalf("Open = %v, want EADDRINUSE", err)
		}
		for _, want := range []string{name, "Docker Swarm", "--listen [::]:4790"} {
			if !strings.Contains(err.Error(), want) {
				t.Errorf("error %q does not say %q", err, want)
			}
		}
		if c, err := Open(Config{Listen: netip.MustParseAddrPort("[::]:4790")}); err != nil {
			t.Errorf("Open on port 4790: %v", err)
		} else {
			c.Close()
		}
	})
}

func TestPrivilegedSources(t *testing.T) {
	h := newHost(t)
	h.up("lo")
	h.do(func() {
		if _, err := DefaultSource(); err == nil || !strings.Contains(err.Error(), "--advertise") {
			t.Errorf("DefaultSource of a host without addresses: %v", err)
		}
		if _, err := SourceFor(netip.MustParseAddr("192.0.2.1")); !errors.Is(err, unix.ENETUNREACH) {
			t.Errorf("SourceFor without a route: %v", err)
		}
	})
	name := deviceName()
	h.must(h.nl.LinkAdd(&netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: name}}))
	h.up(name, "fd08::1/64", "10.8.0.1/24")
	want := func(what string, got netip.Addr, err error, want string) {
		t.Helper()
		if err != nil || got != netip.MustParseAddr(want) {
			t.Errorf("%s = %s, %v; want %s", what, got, err, want)
		}
	}
	h.do(func() {
		a, err := DefaultSource()
		want("DefaultSource without a default route", a, err, "10.8.0.1")
		a, err = SourceFor(netip.MustParseAddr("fd08::9"))
		want("SourceFor(fd08::9)", a, err, "fd08::1")
	})
	h.up(name, "10.7.0.1/24")
	h.must(h.nl.RouteAdd(&netlink.Route{LinkIndex: h.link(name).Attrs().Index, Gw: netip.MustParseAddr("10.7.0.254").AsSlice()}))
	h.do(func() {
		a, err := DefaultSource()
		want("DefaultSource", a, err, "10.7.0.1")
	})
}

func TestPrivilegedIsVirtual(t *testing.T) {
	ha, _, an, _ := pair(t)
	br := deviceName()
	ha.must(ha.nl.LinkAdd(&netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: br}}))
	ha.up(br, "10.6.0.1/24")
	want := map[string]bool{"10.9.0.1": true, "fd09::1": true, "10.6.0.1": true, "10.9.0.2": false}
	vlan := deviceName()
	err := ha.nl.LinkAdd(&netlink.Vlan{LinkAttrs: netlink.LinkAttrs{Name: vlan, ParentIndex: ha.link(an).Attrs().Index}, VlanId: 5})
	if err == nil {
		ha.up(vlan, "10.5.0.1/24")
		want["10.5.0.1"] = true
		ha.do(func() {
			fd, err := udpSocket(v4)
			ha.must(err)
			defer unix.Close(fd)
			if real, ok := realDevice(fd, vlan); !ok || real != an {
				t.Errorf("realDevice(%s) = %q, %v; want %q", vlan, real, ok, an)
			}
		})
	} else if !errors.Is(err, unix.EOPNOTSUPP) {
		t.Fatal(err)
	}
	ha.do(func() {
		for a, w := range want {
			if got := IsVirtual(netip.MustParseAddr(a)); got != w {
				t.Errorf("IsVirtual(%s) = %v, want %v", a, got, w)
			}
		}
	})
}
