package underlay

import (
	"errors"
	"net/netip"
	"os"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

func TestDeviceOf(t *testing.T) {
	if d, err := DeviceOf(loopback4); err != nil || d.Name != "lo" || d.Index <= 0 || d.MTU < 1500 {
		t.Errorf("DeviceOf(127.0.0.1) = %+v, %v", d, err)
	}
	if d, err := DeviceOf(netip.MustParseAddr("::ffff:127.0.0.1")); err != nil || d.Name != "lo" {
		t.Errorf("DeviceOf(::ffff:127.0.0.1) = %+v, %v", d, err)
	}
	_, err := DeviceOf(netip.MustParseAddr("203.0.113.7"))
	const want = "underlay: no network device has the address 203.0.113.7: give --advertise one of this host's addresses"
	if err == nil || err.Error() != want {
		t.Errorf("DeviceOf(203.0.113.7) = %v, want %s", err, want)
	}
	if _, err := DeviceOf(netip.Addr{}); err == nil {
		t.Error("DeviceOf of nothing: no error")
	}
}

func TestPrivilegedDeviceOf(t *testing.T) {
	ha, _, an, _ := pair(t)
	ha.must(ha.nl.LinkSetMTU(ha.link(an), 1400))
	br := deviceName()
	ha.must(ha.nl.LinkAdd(&netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: br}}))
	ha.up(br, "10.6.0.1/24", "fe80::77/64")
	p, err := netlink.ParseAddr("10.4.0.1/32")
	ha.must(err)
	p.Peer, err = netlink.ParseIPNet("10.4.0.2/32")
	ha.must(err)
	ha.must(ha.nl.AddrAdd(ha.link(br), p))
	ha.do(func() {
		for a, want := range map[string]Device{
			"10.9.0.1":        {an, ha.link(an).Attrs().Index, 1400},
			"fd09::1":         {an, ha.link(an).Attrs().Index, 1400},
			"10.6.0.1":        {br, ha.link(br).Attrs().Index, 1500},
			"10.4.0.1":        {br, ha.link(br).Attrs().Index, 1500},
			"fe80::77":        {br, ha.link(br).Attrs().Index, 1500},
			"fe80::77%" + br:  {br, ha.link(br).Attrs().Index, 1500},
			"fe80::77%" + an:  {},
			"10.4.0.2":        {}, // the peer's
			"10.9.0.2":        {},
			"::ffff:10.9.0.1": {an, ha.link(an).Attrs().Index, 1400},
		} {
			if got, err := DeviceOf(netip.MustParseAddr(a)); got != want || (err == nil) != (want.Index != 0) {
				t.Errorf("DeviceOf(%s) = %+v, %v; want %+v", a, got, err, want)
			}
		}
	})
}

func TestGroups(t *testing.T) {
	c := open(t, Config{Listen: netip.MustParseAddrPort("0.0.0.0:0"), Source: loopback4})
	group := netip.MustParseAddr("239.255.47.89")
	if err := c.JoinGroup(group); err != nil {
		skipEmulated(t) // qemu-user garbles the interface index on 64 bits
		t.Fatal(err)
	}
	if err := c.LeaveGroup(group); err != nil {
		t.Fatal(err)
	}
	if err := c.LeaveGroup(group); err == nil {
		t.Error("LeaveGroup of a group that was not joined: no error")
	}
	if err := c.JoinGroup(loopback4); err == nil || !strings.Contains(err.Error(), "not a multicast") {
		t.Errorf("JoinGroup(127.0.0.1) = %v", err)
	}
	if err := c.JoinGroup(netip.MustParseAddr("ff02::4789")); err == nil || !strings.Contains(err.Error(), "--listen") {
		t.Errorf("JoinGroup of IPv6 = %v", err)
	}
	one := open(t, Config{})
	if err := one.JoinGroup(group); err == nil || !strings.Contains(err.Error(), "--listen [::]") {
		t.Errorf("JoinGroup on 127.0.0.1 = %v", err)
	}
}

// Two overlays share a group: it is left with the last one.
func TestGroupsAreCounted(t *testing.T) {
	c := open(t, Config{Listen: netip.MustParseAddrPort("0.0.0.0:0"), Source: loopback4})
	group := netip.MustParseAddr("239.255.47.90")
	for range 2 {
		if err := c.JoinGroup(group); err != nil {
			skipEmulated(t) // qemu-user garbles the interface index on 64 bits
			t.Fatal(err)
		}
	}
	// A second join in the kernel tells whether the socket is in.
	in := func() (err error) {
		_ = c.receivers[0].file.Control(func(fd uintptr) { err = setMembership(int(fd), group, indexOf(loopback4), true) })
		return err
	}
	if err := c.LeaveGroup(group); err != nil {
		t.Fatal(err)
	}
	if err := in(); err != unix.EADDRINUSE {
		t.Errorf("after one of two left, a join of the kernel's is %v, want EADDRINUSE", err)
	}
	if err := c.LeaveGroup(group); err != nil {
		t.Fatal(err)
	}
	if err := in(); err != nil {
		t.Errorf("after both left, a join of the kernel's is %v, want none", err)
	}
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	for what, err := range map[string]error{"JoinGroup": c.JoinGroup(group), "Rebind": c.Rebind()} {
		if !errors.Is(err, ErrClosed) {
			t.Errorf("%s after Close = %v, want ErrClosed", what, err)
		}
	}
}

func TestPrivilegedGroupLimit(t *testing.T) {
	_, hb, _, _ := pair(t)
	hb.sysctl("ipv4/igmp_max_memberships", "2")
	c := hb.open(Config{Listen: anyAddr, Source: b4})
	var err error
	for _, g := range []string{"239.1.0.1", "239.1.0.2", "239.1.0.3"} {
		if err != nil {
			t.Fatalf("join before %s: %v", g, err)
		}
		hb.do(func() { err = c.JoinGroup(netip.MustParseAddr(g)) })
	}
	if !errors.Is(err, unix.ENOBUFS) || !strings.Contains(err.Error(), "net.ipv4.igmp_max_memberships") || !strings.Contains(err.Error(), "share a group") {
		t.Errorf("one group too many: %v", err)
	}
	hb.do(func() {
		hb.must(c.LeaveGroup(netip.MustParseAddr("239.1.0.1")))
		hb.must(c.JoinGroup(netip.MustParseAddr("239.1.0.3")))
	})
}

// The cable is pulled with its devices, and others come in their place: groups
// and source ports follow, and no membership of the old ones is left.
func TestPrivilegedRebind(t *testing.T) {
	for _, tc := range []struct {
		a, b, group netip.Addr
	}{{a4, b4, netip.MustParseAddr("239.1.2.3")}, {a6, b6, netip.MustParseAddr("ff05::1:2:3")}} {
		ha, hb, an, _ := pair(t)
		hb.sysctl("ipv4/igmp_max_memberships", "1")
		ca := ha.open(Config{Listen: anyAddr, Source: tc.a, SourcePorts: 2})
		cb := hb.open(Config{Listen: netip.AddrPortFrom(netip.IPv6Unspecified(), ca.local[0].Port()), Source: tc.b})
		hb.do(func() { hb.must(cb.JoinGroup(tc.group)); hb.must(cb.JoinGroup(tc.group)) })
		s := ca.NewSender()
		send := func(what string) {
			t.Helper()
			put(s, at(cb, tc.group), 0, []byte(what))
			ha.flush(s)
			if d := receive(t, receiverOf(cb, tc.b), 1)[0]; string(d.b) != what || d.src.Addr() != tc.a {
				t.Fatalf("got %q from %s, want %q from %s", d.b, d.src, what, tc.a)
			}
		}
		send("before")
		for range 2 {
			ha.must(ha.nl.LinkDel(ha.link(an)))
			for h, c := range map[*host]*conn{ha: ca, hb: cb} {
				h.do(func() {
					if err := c.Rebind(); err == nil || !strings.Contains(err.Error(), "no network device has the address") {
						t.Errorf("Rebind without a device = %v", err)
					}
				})
			}
			var bn string
			an, bn = cable(ha, hb)
			ha.up(an, "10.9.0.1/24", "fd09::1/64")
			hb.up(bn, "10.9.0.2/24", "fd09::2/64")
			ha.carrier(an)
			hb.carrier(bn)
			ha.do(func() { ha.must(ca.Rebind()) })
			hb.do(func() { hb.must(cb.Rebind()) })
			send("after")
		}
		hb.do(func() {
			hb.must(cb.LeaveGroup(tc.group))
			hb.must(cb.LeaveGroup(tc.group))
			if err := cb.LeaveGroup(tc.group); err == nil {
				t.Error("LeaveGroup more often than JoinGroup: no error")
			}
		})
	}
}

// The address moves to another device while the first one stays.
func TestPrivilegedRebindMoved(t *testing.T) {
	ha, hb, an, bn := pair(t)
	group := netip.MustParseAddr("239.1.2.3")
	ca := ha.open(Config{Listen: anyAddr, Source: a4})
	cb := hb.open(Config{Listen: netip.AddrPortFrom(netip.IPv6Unspecified(), ca.local[0].Port()), Source: b4})
	hb.do(func() { hb.must(cb.JoinGroup(group)) })
	s := ca.NewSender()
	put(s, at(cb, group), 0, []byte("first"))
	ha.flush(s)
	receive(t, receiverOf(cb, b4), 1)

	an2, bn2 := cable(ha, hb)
	for _, m := range []struct {
		h        *host
		from, to string
		addr     string
	}{{ha, an, an2, "10.9.0.1/24"}, {hb, bn, bn2, "10.9.0.2/24"}} {
		a, err := netlink.ParseAddr(m.addr)
		m.h.must(err)
		m.h.must(m.h.nl.AddrDel(m.h.link(m.from), a))
		m.h.up(m.to, m.addr)
	}
	ha.carrier(an2)
	hb.carrier(bn2)
	ha.do(func() { ha.must(ca.Rebind()) })
	hb.do(func() { hb.must(cb.Rebind()) })
	put(s, at(cb, group), 0, []byte("second"))
	ha.flush(s)
	if d := receive(t, receiverOf(cb, b4), 1)[0]; string(d.b) != "second" {
		t.Errorf("got %q", d.b)
	}
	member := func(name string) (in bool) {
		hb.do(func() { in = inGroup(t, name, "030201EF") })
		return in
	}
	if member(bn) || !member(bn2) {
		t.Errorf("in the group: old device %v, new device %v; want the new one alone", member(bn), member(bn2))
	}
}

// inGroup reports whether a device of this thread's namespace is in a group,
// whose bytes are given from the last to the first.
func inGroup(t *testing.T, device, group string) bool {
	t.Helper()
	b, err := os.ReadFile("/proc/thread-self/net/igmp")
	if err != nil {
		t.Fatal(err)
	}
	at := ""
	for line := range strings.Lines(string(b)) {
		f := strings.Fields(line)
		if line[0] != '\t' {
			at = f[1]
		} else if at == device && f[0] == group {
			return true
		}
	}
	return false
}
