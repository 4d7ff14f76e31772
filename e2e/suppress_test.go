package e2e

import (
	"context"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/tulle-net/tulle/bridge"
	"github.com/tulle-net/tulle/ether"
	"github.com/tulle-net/tulle/internal/lab"
	"github.com/tulle-net/tulle/tap"
	"github.com/tulle-net/tulle/underlay"
	"github.com/tulle-net/tulle/vxlan"
)

// Two bridges of this process, each in a namespace of its own with a real underlay
// between them; behind them are kernels, which know nothing of tables:
//
//	c1, c3 ── TAPs ── bridge (a) ═══ ul ═══ bridge (b) ── TAPs ── c2, c4
//
// What the tables of a node would say is told to the bridges by the test.

// tabled is a bridge with its tunnel.
type tabled struct {
	t  *testing.T
	at netip.AddrPort
	h  *lab.Host
	*bridge.Bridge
	tunnel *bridge.Tunnel
}

func startTabled(t *testing.T, sw *lab.Switch, h *lab.Host) *tabled {
	t.Helper()
	n := &tabled{t: t, h: h, at: netip.AddrPortFrom(sw.Addr(h), vxlan.Port)}
	var conn underlay.Conn
	err := h.Do(func() (err error) {
		if conn, err = underlay.Open(underlay.Config{Listen: n.at, Source: n.at.Addr()}); err != nil {
			return err
		}
		// It makes the sockets that it sends from with its first datagram, which so has
		// to leave from here; to the port of the protocol that discards.
		s := conn.NewSender()
		s.Reserve(1)
		s.Commit(netip.AddrPortFrom(n.at.Addr(), 9), 0, 1)
		s.Flush()
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	n.tunnel = bridge.NewTunnel(bridge.TunnelConfig{Conn: conn, Self: []netip.Addr{n.at.Addr()}})
	if n.Bridge, err = n.tunnel.Add(bridge.Config{Name: "blue", VNI: 100}); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { _ = n.tunnel.Run(ctx); close(done) }()
	t.Cleanup(func() {
		cancel()
		_ = conn.Close()
		<-done
		if err := n.Close(); err != nil {
			t.Error(err)
		}
	})
	return n
}

// explain logs what a bridge knows and dropped.
func (n *tabled) explain() {
	for _, e := range n.FDB() {
		n.t.Logf("%s: %+v", n.h.Name(), e)
	}
	n.tunnel.Drops().Each(func(name string, count uint64) {
		if count > 0 {
			n.t.Logf("%s: drop %s: %d", n.h.Name(), name, count)
		}
	})
	n.t.Logf("%s: %d answered, %d flooded, %d sent, %d received", n.h.Name(), n.Answered.Load(), n.Flooded.Load(), n.TxFrames.Load(), n.RxFrames.Load())
}

// plug gives a container a device with the addresses of number i, and returns what a
// table would say of it.
func (n *tabled) plug(c *lab.Host, i int) bridge.Endpoint {
	n.t.Helper()
	ip4, ip6 := address(i), ownAddress6(i)
	e := bridge.Endpoint{MAC: ether.MACOf(ip4), IPs: []netip.Addr{ip4, ip6}, Peer: n.h.Name(), VTEP: n.at}
	var dev tap.Device
	err := n.h.Do(func() (err error) {
		dev, err = tap.Open(tap.Config{Name: "eth0", MAC: e.MAC, MTU: 1450, Netns: c.Path(), NoSolicit: true,
			Addresses: []netip.Prefix{netip.PrefixFrom(ip4, 16), netip.PrefixFrom(ip6, 64)}})
		return err
	})
	if err != nil {
		n.t.Fatal(err)
	}
	if _, err := n.AddPort(dev); err != nil {
		n.t.Fatal(err)
	}
	// By default a kernel asks again whom it knows after 15 s, and alone that one: on a
	// slow machine that would be taken for a question that was not suppressed.
	for _, family := range []string{"ipv4", "ipv6"} {
		if err := c.Sysctl("net/"+family+"/neigh/eth0/base_reachable_time_ms", "3600000"); err != nil {
			n.t.Fatal(err)
		}
	}
	return e
}

func ownAddress6(i int) netip.Addr {
	return netip.AddrFrom16([16]byte{0: 0xfd, 14: 0, 15: byte(i)})
}

// neighbourly returns how many ARP and group-addressed ND frames, and how many others,
// are among the datagrams of captures.
func neighbourly(captures ...*fastCapture) (asking, others int) {
	for _, c := range captures {
		for _, d := range c.datagrams() {
			_, frame, err := vxlan.Parse(d.payload)
			if err != nil {
				continue
			}
			f, err := ether.ParseEthernet(frame)
			if err != nil {
				continue
			}
			ip, err := ether.ParseIPv6(f.Payload())
			if err == nil {
				_, err = ether.ParseND(ip)
			}
			if f.EtherType() == ether.EtherTypeARP || f.EtherType() == ether.EtherTypeIPv6 && err == nil && f.Dst().IsMulticast() {
				asking++
			} else {
				others++
			}
		}
	}
	return asking, others
}

// resolves fails unless the host has this MAC for the address.
func resolves(t *testing.T, h *lab.Host, a netip.Addr, want ether.MAC) {
	t.Helper()
	if got, err := h.Neighbour("eth0", a); err != nil || got != want.String() {
		t.Errorf("%s has %s at %q, %v; want %s", h.Name(), a, got, err, want)
	}
}

// TestSuppression: kernels find each other without a question on the underlay, and what
// they do to find duplicates has the outcome that it has on a cable.
func TestSuppression(t *testing.T) {
	t.Parallel()
	l, sw, hs := hosts(t, 2, lab.Underlay{})
	c := containers(t, l, "c1", "c2", "c3", "c4")
	a, b := startTabled(t, sw, hs[0]), startTabled(t, sw, hs[1])
	for _, n := range [][2]*tabled{{a, b}, {b, a}} {
		peer := []netip.AddrPort{n[1].at}
		n[0].tunnel.SetMembers(peer)
		n[0].SetMembers(peer, nil)
		n[0].SetComplete([]bridge.Peer{{Name: n[1].h.Name(), VTEP: n[1].at}})
	}
	e1, e3, e2, e4 := a.plug(c[0], 1), a.plug(c[2], 3), b.plug(c[1], 2), b.plug(c[3], 4)
	tell := func(e bridge.Endpoint) {
		for _, n := range []*tabled{a, b} {
			if said := e; said.Peer == n.h.Name() {
				said.Peer = ""
				n.SetEndpoint(said)
			} else {
				n.SetEndpoint(said)
			}
		}
	}
	for _, e := range []bridge.Endpoint{e1, e2, e3} {
		tell(e)
	}
	t.Cleanup(func() {
		if t.Failed() {
			a.explain()
			b.explain()
		}
	})
	atA, atB := captureTAP(t, hs[0], sw.Dev()), captureTAP(t, hs[1], sw.Dev())

	for _, dst := range []netip.Addr{address(2), ownAddress6(2), address(3), ownAddress6(3)} {
		ping(t, c[0], dst, 5*time.Second)
	}
	resolves(t, c[0], address(2), e2.MAC)
	resolves(t, c[0], ownAddress6(2), e2.MAC)
	resolves(t, c[0], address(3), e3.MAC)

	// Duplicates, as iputils looks for them: it fails where somebody answers.
	arping := func(h *lab.Host, args ...string) (out string, err error) {
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		defer cancel()
		return h.Run(ctx, "arping", append([]string{"-I", "eth0"}, args...)...)
	}
	if out, err := arping(c[0], "-D", "-c", "2", "-w", "3", address(2).String()); err == nil || !strings.Contains(strings.ToLower(out), e2.MAC.String()) {
		t.Errorf("arping -D of a taken address: %v, and says\n%s\nwant it to find %s", err, out, e2.MAC)
	}
	if out, err := arping(c[0], "-c", "1", "-w", "3", address(2).String()); err != nil || !strings.Contains(strings.ToLower(out), e2.MAC.String()) {
		t.Errorf("arping of another's address: %v, and says\n%s", err, out)
	}
	// It tells everybody of an address of its own: no harm, and no frame.
	if out, err := arping(c[0], "-U", "-c", "1", address(1).String()); err != nil && !strings.Contains(out, "Sent 1 probes") {
		t.Errorf("arping -U: %v\n%s", err, out)
	}
	ping(t, c[1], address(1), 5*time.Second)
	if asking, others := neighbourly(atA, atB); asking != 0 || others == 0 {
		t.Errorf("%d ARP and ND frames on the underlay among %d others, want none among some", asking, others)
	}
	if a.Answered.Load() < 5 || b.Answered.Load() < 2 {
		t.Errorf("%d and %d answers by the bridges", a.Answered.Load(), b.Answered.Load())
	}

	// A free address is nobody's; that question everybody hears.
	if out, err := arping(c[0], "-D", "-c", "1", "-w", "2", address(99).String()); err != nil {
		t.Errorf("arping -D of a free address: %v\n%s", err, out)
	}
	if asking, _ := neighbourly(atB); asking == 0 {
		t.Error("a question that the tables cannot answer is not on the underlay")
	}

	// Who claims another's address is not heard, by the neighbour beside it neither.
	ping(t, c[2], address(2), 5*time.Second)
	if err := c[0].AddAddr("eth0", netip.PrefixFrom(address(2), 32)); err != nil {
		t.Fatal(err)
	}
	_, _ = arping(c[0], "-U", "-c", "1", address(2).String())
	eventually(t, 5*time.Second, "the claim is counted", func() bool { return a.tunnel.Drops().Count(bridge.DropSpoofedNeighbour) > 0 })
	resolves(t, c[2], address(2), e2.MAC)
	if err := c[0].DelAddr("eth0", netip.PrefixFrom(address(2), 32)); err != nil {
		t.Fatal(err)
	}

	duplicateDetection6(t, c[0])

	// The address goes to another MAC, on the other node: hosts that have the old one
	// cached hear of it at once.
	ping(t, c[0], address(2), 5*time.Second)
	e4.IPs = append(e4.IPs, address(2), ownAddress6(2))
	tell(e4)
	eventually(t, 5*time.Second, "the kernel corrects what it had cached", func() bool {
		mac4, _ := c[0].Neighbour("eth0", address(2))
		mac6, _ := c[0].Neighbour("eth0", ownAddress6(2))
		return mac4 == e4.MAC.String() && mac6 == e4.MAC.String()
	})
}

// duplicateDetection6 has the kernel of c1 look for duplicates (RFC 4862, section 5.4).
func duplicateDetection6(t *testing.T, h *lab.Host) {
	t.Helper()
	for _, which := range []string{"all", "eth0"} {
		if err := h.Sysctl("net/ipv6/conf/"+which+"/accept_dad", "1"); err != nil {
			t.Fatal(err)
		}
	}
	state := func(a netip.Addr) string {
		for line := range strings.Lines(runIn(t, h, "ip", "-6", "-o", "address", "show", "dev", "eth0")) {
			if strings.Contains(line, " "+a.String()+"/") {
				return line
			}
		}
		return "gone"
	}
	for _, i := range []int{2, 3, 77} { // at the other node, at this one, free
		runIn(t, h, "ip", "-6", "address", "add", netip.PrefixFrom(ownAddress6(i), 64).String(), "dev", "eth0")
	}
	for _, i := range []int{2, 3} {
		eventually(t, 10*time.Second, "a duplicate is found", func() bool { return strings.Contains(state(ownAddress6(i)), "dadfailed") })
	}
	eventually(t, 10*time.Second, "an address that is free is the host's", func() bool { return !strings.Contains(state(ownAddress6(77)), "tentative") })
	if s := state(ownAddress6(77)); strings.Contains(s, "dadfailed") || s == "gone" {
		t.Errorf("the free address: %s", s)
	}
	for _, i := range []int{2, 3} {
		runIn(t, h, "ip", "-6", "address", "del", netip.PrefixFrom(ownAddress6(i), 64).String(), "dev", "eth0")
	}
}
