package bridge

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/tulle-net/tulle/ether"
	"github.com/tulle-net/tulle/ether/ethertest"
	"github.com/tulle-net/tulle/tap"
	"github.com/tulle-net/tulle/tap/taptest"
	"github.com/tulle-net/tulle/underlay"
	"github.com/tulle-net/tulle/underlay/underlaytest"
)

var (
	group4 = netip.MustParseAddr("239.1.2.3")
	group6 = netip.MustParseAddr("ff15::42")
)

// igmpFrame is the frame of an IGMP message with one group; a type of 0x22 has a record.
func igmpFrame(mac ether.MAC, src string, kind, record byte, group netip.Addr) []byte {
	g := group.As4()
	m := []byte{kind, 0, 0, 0}
	if kind == 0x22 {
		m = append(m, 0, 0, 0, 1, record, 0, 0, 0)
	}
	m = append(m, g[:]...)
	binary.BigEndian.PutUint16(m[2:], ^ether.Sum(m, 0))
	to := netip.MustParseAddr("224.0.0.22")
	if kind != 0x22 {
		to = group
	}
	return ipFrame(mac, netip.MustParseAddr(src), to, 2, m)
}

// ipFrame is the frame of an IPv4 packet to a group.
func ipFrame(mac ether.MAC, src, to netip.Addr, proto byte, payload []byte) []byte {
	p := []byte{0x45, 0xc0, 0, byte(20 + len(payload)), 0, 0, 0, 0, 1, proto, 0, 0}
	s, d := src.As4(), to.As4()
	p = append(append(append(p, s[:]...), d[:]...), payload...)
	ether.IPv4(p).SetChecksum()
	return ethertest.Ethernet(ether.MulticastMAC(to), mac, nil, ether.EtherTypeIPv4, p)
}

func join4(mac ether.MAC, g netip.Addr) []byte  { return igmpFrame(mac, "10.32.0.1", 0x22, 4, g) }
func leave4(mac ether.MAC, g netip.Addr) []byte { return igmpFrame(mac, "10.32.0.1", 0x22, 3, g) }

// mldFrame is the frame of an MLDv1 message: 131 joins, 132 leaves, 130 asks.
func mldFrame(mac ether.MAC, kind byte, g netip.Addr) []byte {
	src, dst, a := ether.LinkLocal(mac).As16(), g.As16(), g.As16()
	if kind != 131 {
		dst = netip.MustParseAddr("ff02::2").As16()
	}
	p := []byte{0x60, 0, 0, 0, 0, 32, 0, 1}
	p = append(append(p, src[:]...), dst[:]...)
	p = append(p, 58, 0, 5, 2, 0, 0, 1, 0, kind, 0, 0, 0, 0, 0, 0, 0)
	p = append(p, a[:]...)
	binary.BigEndian.PutUint16(p[50:], ^ether.Sum(p[48:], ether.PseudoSum(58, src[:], dst[:], 24)))
	return ethertest.Ethernet(ether.MulticastMAC(netip.AddrFrom16(dst)), mac, nil, ether.EtherTypeIPv6, p)
}

// toGroup is a datagram to a group.
func toGroup(mac ether.MAC, g netip.Addr, text string) []byte {
	src := netip.MustParseAddrPort("10.32.0.9:5004")
	if g.Is6() {
		src = netip.MustParseAddrPort("[fd00::9]:5004")
	}
	return ethertest.UDP{SrcMAC: mac, DstMAC: ether.MulticastMAC(g), Src: src, Dst: netip.AddrPortFrom(g, 5004), Payload: []byte(text)}.Frame()
}

// castNet is a mesh with snooping and further devices at node 1.
type castNet struct {
	t    *testing.T
	n    []*testNode
	more []*taptest.Device
	rung atomic.Int32
}

func castMesh(t *testing.T, count, more int, cfg Config) *castNet {
	t.Helper()
	c := &castNet{t: t}
	cfg.Snooping = true
	cfg.GroupsChanged = func() { c.rung.Add(1) }
	c.n = mesh(t, underlaytest.NewNet(1), count, cfg)
	for i := range more {
		d := taptest.New(fmt.Sprintf("more%d", i), macOf(101+i), 1450, 1)
		if _, err := c.n[0].bridge.AddPort(d); err != nil {
			t.Fatal(err)
		}
		c.more = append(c.more, d)
	}
	c.quiet()
	return c
}

// quiet waits until the first queries were asked, and forgets them.
func (c *castNet) quiet() {
	time.Sleep(11 * time.Second)
	for i := range c.n {
		c.n[i].got()
	}
	for _, d := range c.more {
		drain(d)
	}
}

func drain(d *taptest.Device) (frames [][]byte) {
	synctest.Wait()
	for {
		f, ok := d.TryNext()
		if !ok {
			return frames
		}
		frames = append(frames, f.B)
	}
}

// reaches injects a frame at a device and says who got it: n1 …, m0 ….
func (c *castNet) reaches(at *taptest.Device, frame []byte) string {
	c.t.Helper()
	at.Inject(frame, ether.Meta{})
	var who []string
	note := func(name string, frames [][]byte) {
		for _, f := range frames {
			if ether.MACFrom(f[6:]) != querierMAC {
				who = append(who, name)
			}
		}
	}
	for i := range c.n {
		note(fmt.Sprintf("n%d", i+1), c.n[i].got())
	}
	for i, d := range c.more {
		note(fmt.Sprintf("m%d", i), drain(d))
	}
	return strings.Join(who, " ")
}

func (c *castNet) want(what, got, want string) {
	c.t.Helper()
	if got != want {
		c.t.Errorf("%s: %q, want %q", what, got, want)
	}
}

func groups(b *Bridge) string {
	list, router := b.Groups()
	return fmt.Sprint(list, router)
}

// TestSnoop: what goes where, at one node and from another, as stations join and leave.
func TestSnoop(t *testing.T) {
	for name, g := range map[string]netip.Addr{"IPv4": group4, "IPv6": group6} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				c := castMesh(t, 3, 2, Config{})
				defer end(c.n)
				data := toGroup(macOf(1), g, "data")
				joins, leaves := mldFrame(macOf(101), 131, g), mldFrame(macOf(101), 132, g)
				if g.Is4() {
					joins, leaves = join4(macOf(101), g), leave4(macOf(101), g)
				}
				c.want("nobody has joined", c.reaches(c.n[0].dev, data), "n2 n3 m0 m1")
				// Peers that do not tell are sent reports, as before; stations here are not.
				c.want("the report", c.reaches(c.more[0], joins), "")
				c.want("groups", groups(c.n[0].bridge), fmt.Sprintf("[%v] false", g))
				if c.rung.Load() != 1 {
					t.Errorf("GroupsChanged was called %d times, want once", c.rung.Load())
				}
				c.want("m0 has joined", c.reaches(c.n[0].dev, data), "n2 n3 m0")
				c.want("at the member itself", c.reaches(c.more[0], toGroup(macOf(101), g, "x")), "n2 n3")
				c.want("from another node", c.reaches(c.n[1].dev, toGroup(macOf(2), g, "y")), "n3 m0")
				c.want("another group of the same MAC", c.reaches(c.n[0].dev, toGroup(macOf(1), sameMAC(g), "z")), "n2 n3 m0 m1")

				c.n[0].bridge.SetSnooped([]Peer{{VTEP: vtepOf(2)}, {VTEP: vtepOf(3)}})
				c.want("peers tell, and have nobody", c.reaches(c.n[0].dev, data), "m0")
				c.n[0].bridge.SetGroups(map[netip.Addr][]Peer{g: {{VTEP: vtepOf(3)}}}, nil)
				c.want("a peer has members", c.reaches(c.n[0].dev, data), "n3 m0")
				c.n[0].bridge.SetGroups(map[netip.Addr][]Peer{g: {{VTEP: vtepOf(3)}}}, []Peer{{VTEP: vtepOf(2)}})
				c.want("another has a router", c.reaches(c.n[0].dev, data), "n2 n3 m0")
				c.n[0].bridge.SetGroups(map[netip.Addr][]Peer{g: {{VTEP: vtepOf(2)}}}, nil)

				c.want("m0 leaves", c.reaches(c.more[0], leaves), "")
				c.want("but may not be alone", c.reaches(c.n[0].dev, data), "n2 m0")
				time.Sleep(3 * time.Second)
				c.want("nobody else answered", c.reaches(c.n[0].dev, data), "n2")
				c.want("groups", groups(c.n[0].bridge), "[] false")
				c.n[0].bridge.SetGroups(nil, nil)
				c.want("unknown again", c.reaches(c.n[0].dev, data), "n2 n3 m0 m1")
				if n := c.n[0].bridge.snoop.groups.Size(); n != 0 {
					t.Errorf("%d groups are kept, want none", n)
				}
			})
		})
	}
}

// sameMAC returns another group that has the same MAC.
func sameMAC(g netip.Addr) netip.Addr {
	if g.Is4() {
		b := g.As4()
		b[1] ^= 0x80
		return netip.AddrFrom4(b)
	}
	b := g.As16()
	b[2] ^= 1
	return netip.AddrFrom16(b)
}

// A member that does not renew is forgotten after 260 s; one that answers is not. What
// the port hears are two kinds of queries each 125 s.
func TestMembershipTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := castMesh(t, 1, 2, Config{})
		defer end(c.n)
		c.reaches(c.more[0], join4(macOf(101), group4))
		c.reaches(c.more[1], join4(macOf(102), group4))
		start := time.Now()
		for asked := 0; time.Since(start) < 1000*time.Second; {
			time.Sleep(time.Second)
			for _, f := range drain(c.more[0]) {
				if ether.Frame(f).EtherType() == ether.EtherTypeIPv4 {
					asked++
					c.more[0].Inject(join4(macOf(101), group4), ether.Meta{})
				}
			}
			if want := int(time.Since(start) / (125 * time.Second)); asked < want-1 || asked > want+1 {
				t.Fatalf("%d queries after %v, want %d", asked, time.Since(start), want)
			}
			drain(c.more[1])
			ports, _ := c.n[0].bridge.snoop.groups.Load(group4)
			want := 2
			age := time.Since(start)
			if age > 260*time.Second {
				want = 1
			}
			if got := len(ports.members()); got != want && (age < 259*time.Second || age > 262*time.Second) {
				t.Fatalf("%d members after %v, want %d", got, time.Since(start), want)
			}
		}
		c.want("who answers", c.reaches(c.n[0].dev, toGroup(macOf(1), group4, "x")), "m0")
	})
}

// At a port with solicited-node groups alone, which are kept, one asks seldom.
func TestIdlePort(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := castMesh(t, 1, 1, Config{})
		defer end(c.n)
		mine := netip.MustParseAddr("fd00::1:2345")
		report := mldFrame(macOf(101), 131, ether.SolicitedNode(mine))
		c.reaches(c.more[0], report)
		asked := 0
		for range 7200 {
			time.Sleep(time.Second)
			for _, f := range drain(c.more[0]) {
				asked++
				if ether.Frame(f).EtherType() == ether.EtherTypeIPv6 {
					c.more[0].Inject(report, ether.Meta{})
				}
			}
		}
		if asked < 10 || asked > 12 {
			t.Errorf("%d queries in two hours, want two each 1,250 s", asked)
		}
		other := ether.SolicitedNode(netip.MustParseAddr("fd00::9:9999"))
		c.want("its own solicitations", c.reaches(c.n[0].dev, toGroup(macOf(1), ether.SolicitedNode(mine), "ns")), "m0")
		c.want("others'", c.reaches(c.n[0].dev, toGroup(macOf(1), other, "ns")), "")
		if got := groups(c.n[0].bridge); got != "[] false" || c.rung.Load() != 0 {
			t.Errorf("groups are %s, GroupsChanged was called %d times: nobody has to know of these", got, c.rung.Load())
		}
		// Behind a port with stations of whom nobody knows what they do, they are needed.
		c.reaches(c.more[0], frame(0x02aa_0000_0001, macOf(1), "a stranger"))
		c.want("with strangers", c.reaches(c.n[0].dev, toGroup(macOf(1), other, "ns")), "m0")
	})
}

// Neighbour discovery reaches ports that are new, or never tell.
func TestSolicitations(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := castMesh(t, 2, 1, Config{})
		defer end(c.n)
		ns := ether.AppendSolicitation(nil, 0, macOf(2), netip.MustParseAddr("fd00::2"), netip.MustParseAddr("fd00::77"))
		c.want("who never tells", c.reaches(c.n[1].dev, ns), "n1 m0")
		c.reaches(c.more[0], mldFrame(macOf(101), 131, ether.SolicitedNode(netip.MustParseAddr("fd00::5"))))
		c.want("who tells of another", c.reaches(c.n[1].dev, ns), "n1")
		d := taptest.New("fresh", macOf(50), 1450, 1)
		if _, err := c.n[0].bridge.AddPort(d); err != nil {
			t.Fatal(err)
		}
		c.more = append(c.more, d)
		c.reaches(d, mldFrame(macOf(50), 131, ether.SolicitedNode(netip.MustParseAddr("fd00::6"))))
		c.want("a new port", c.reaches(c.n[1].dev, ns), "n1 m1")
		c.n[1].bridge.SetSnooped([]Peer{{VTEP: vtepOf(1)}})
		c.want("into the tunnel", c.reaches(c.n[1].dev, ns), "n1 m1")
	})
}

// What goes everywhere whatever has been joined, and what is looked into in vain.
func TestNotPruned(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := castMesh(t, 2, 2, Config{UnknownMulticast: MulticastDrop})
		defer end(c.n)
		c.n[0].bridge.SetSnooped([]Peer{{VTEP: vtepOf(2)}})
		c.reaches(c.more[0], join4(macOf(101), group4))
		for name, f := range map[string][]byte{
			"broadcast":       frame(macOf(1), ether.Broadcast, "x"),
			"unknown unicast": frame(macOf(1), macOf(99), "x"),
			"224.0.0.251":     toGroup(macOf(1), netip.MustParseAddr("224.0.0.251"), "mdns"),
			"ff02::1":         toGroup(macOf(1), netip.MustParseAddr("ff02::1"), "x"),
			"ff01::5":         toGroup(macOf(1), netip.MustParseAddr("ff01::5"), "x"),
			"no IP":           ethertest.Ethernet(0x0180_c200_0000+0x20, macOf(1), nil, 0x88cc, make([]byte, 50)),
			"a VLAN tag":      ethertest.Ethernet(ether.MulticastMAC(group4), macOf(1), []uint16{7}, ether.EtherTypeIPv4, toGroup(macOf(1), group4, "x")[14:]),
			"cut short":       toGroup(macOf(1), group4, "x")[:30],
			"a unicast IP":    ethertest.Ethernet(ether.MulticastMAC(group4), macOf(1), nil, ether.EtherTypeIPv4, frame(macOf(1), macOf(2), "x")[14:]),
		} {
			c.want(name, c.reaches(c.n[0].dev, f), "n2 m0 m1")
		}
		// A report with a wrong checksum is not believed, and not kept from anybody.
		bad := join4(macOf(1), netip.MustParseAddr("239.9.9.9"))
		bad[len(bad)-1] ^= 1
		c.want("a bad report", c.reaches(c.n[0].dev, bad), "n2 m0 m1")
		c.want("groups", groups(c.n[0].bridge), fmt.Sprintf("[%v] false", group4))
	})
}

func TestUnknownMulticast(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := castMesh(t, 2, 1, Config{UnknownMulticast: MulticastDrop})
		defer end(c.n)
		data := toGroup(macOf(1), group4, "x")
		// A peer that does not tell may have members.
		c.want("an older peer", c.reaches(c.n[0].dev, data), "")
		c.n[1].dropped(t, DropUnknownMulticast, 1) // which sees for itself
		c.n[0].bridge.SetSnooped([]Peer{{VTEP: vtepOf(2)}})
		c.want("nobody", c.reaches(c.n[0].dev, data), "")
		c.n[0].dropped(t, DropUnknownMulticast, 1)
		c.n[1].dropped(t, DropUnknownMulticast, 1)
		c.n[0].bridge.SetUnknownMulticast(MulticastFlood)
		c.n[1].bridge.SetUnknownMulticast(MulticastFlood)
		c.want("flooded", c.reaches(c.n[0].dev, data), "n2 m0")
	})
}

// A router is found by what it asks, or by PIM; it hears reports, which others do not,
// and all data; while it asks, the node does not.
func TestRouterPort(t *testing.T) {
	general := ipFrame(macOf(101), netip.MustParseAddr("10.32.0.254"), netip.MustParseAddr("224.0.0.1"), 2, []byte{0x11, 0x64, 0xee, 0x9b, 0, 0, 0, 0})
	for name, c := range map[string]struct {
		hello  []byte
		silent bool // the node asks no more, over IPv4
	}{
		"IGMP": {general, true},
		"MLD":  {mldFrame(macOf(101), 130, netip.IPv6Unspecified()), false},
		"PIM":  {ipFrame(macOf(101), netip.MustParseAddr("10.32.0.254"), netip.MustParseAddr("224.0.0.13"), 103, []byte{0x20, 0, 0xdf, 0xff}), false},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				n := castMesh(t, 2, 2, Config{})
				defer end(n.n)
				n.n[0].bridge.SetSnooped([]Peer{{VTEP: vtepOf(2)}})
				n.n[1].bridge.SetSnooped([]Peer{{VTEP: vtepOf(1)}})
				n.want("what it says", n.reaches(n.more[0], c.hello), "n1 n2 m1")
				n.want("groups", groups(n.n[0].bridge), "[] true")
				n.n[1].bridge.SetGroups(nil, []Peer{{VTEP: vtepOf(1)}})
				n.want("a report here", n.reaches(n.n[0].dev, join4(macOf(1), group4)), "m0")
				n.want("a report there", n.reaches(n.n[1].dev, join4(macOf(2), group4)), "m0")
				n.want("data", n.reaches(n.more[1], toGroup(macOf(102), group4, "x")), "n1 m0")
				n.want("data from there", n.reaches(n.n[1].dev, toGroup(macOf(2), group4, "x")), "n1 m0")
				asked := func(i int) (v4 int) {
					for _, f := range n.n[i].got() {
						if ether.MACFrom(f[6:]) == querierMAC && ether.Frame(f).EtherType() == ether.EtherTypeIPv4 {
							v4++
						}
					}
					return v4
				}
				time.Sleep(250 * time.Second)
				for i := range n.n { // at the other node it is heard through the tunnel
					if got := asked(i); (got == 0) != c.silent {
						t.Errorf("node %d has asked %d times in 250 s", i+1, got)
					}
				}
				time.Sleep(15 * time.Second)
				n.want("it is gone", groups(n.n[0].bridge), "[] false")
				time.Sleep(125 * time.Second)
				if got := asked(0); got == 0 {
					t.Error("nobody asks, though the router is gone")
				}
			})
		})
	}
}

// A query without an address is of a switch, and one of another node's is of that: they
// ask for themselves.
func TestOtherSwitch(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := castMesh(t, 2, 1, Config{})
		defer end(c.n)
		for _, q := range [][]byte{
			ether.AppendIGMPQuery(nil, macOf(1), netip.Addr{}, time.Second, time.Minute),
			ether.AppendMLDQuery(nil, querierMAC, netip.Addr{}, time.Second, time.Minute),
		} {
			c.want("goes no further", c.reaches(c.n[0].dev, q), "")
		}
		c.want("is no router", groups(c.n[0].bridge), "[] false")
	})
}

// Beyond the bounds, a port gets everything, and peers are told to send it.
func TestGroupLimits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := castMesh(t, 1, 2, Config{})
		defer end(c.n)
		of := func(i int) netip.Addr { return netip.AddrFrom4([4]byte{239, 5, byte(i >> 8), byte(i)}) }
		for i := range MaxGroupsPerPort {
			c.more[0].Inject(join4(macOf(101), of(i)), ether.Meta{})
			synctest.Wait()
		}
		c.n[0].dropped(t, DropGroupLimit, 0)
		c.reaches(c.more[1], join4(macOf(102), of(999)))
		c.want("within", c.reaches(c.n[0].dev, toGroup(macOf(1), of(999), "x")), "m1")
		c.reaches(c.more[0], join4(macOf(101), of(999)))
		c.n[0].dropped(t, DropGroupLimit, 1)
		c.want("beyond", c.reaches(c.n[0].dev, toGroup(macOf(1), of(999), "x")), "m0 m1")
		list, all := c.n[0].bridge.Groups()
		if len(list) != MaxGroupsPerPort+1 || !all || !slices.IsSortedFunc(list, netip.Addr.Compare) {
			t.Errorf("%d groups, all %v, want %d, sorted", len(list), all, MaxGroupsPerPort+1)
		}
		if reports := c.reaches(c.more[1], join4(macOf(102), of(1))); reports != "" {
			t.Errorf("a report went to %q, which is no router", reports)
		}
		time.Sleep(300 * time.Second)
		if got := groups(c.n[0].bridge); got != "[] false" {
			t.Errorf("after 300 s of silence: %s", got)
		}
	})
}

// In all, an overlay has MaxGroups.
func TestGroupLimitOfOverlay(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := castMesh(t, 1, 17, Config{})
		defer end(c.n)
		for i := range MaxGroups + 1 {
			c.more[i/MaxGroupsPerPort].Inject(join4(macOf(101+i/MaxGroupsPerPort), netip.AddrFrom4([4]byte{239, 5, byte(i >> 8), byte(i)})), ether.Meta{})
			synctest.Wait()
		}
		c.n[0].dropped(t, DropGroupLimit, 1)
		// One that is known already is no more to keep.
		c.more[16].Inject(join4(macOf(117), netip.AddrFrom4([4]byte{239, 5, 0, 0})), ether.Meta{})
		c.n[0].dropped(t, DropGroupLimit, 1)
		if list, all := c.n[0].bridge.Groups(); len(list) != MaxGroups || !all {
			t.Errorf("%d groups, all %v", len(list), all)
		}
	})
}

// A device that is removed takes its memberships with it.
func TestRemovedMember(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := castMesh(t, 1, 2, Config{})
		defer end(c.n)
		c.reaches(c.more[0], join4(macOf(101), group4))
		if err := c.n[0].bridge.RemovePort((*c.n[0].bridge.ports.Load())[1]); err != nil {
			t.Fatal(err)
		}
		c.want("groups", groups(c.n[0].bridge), "[] false")
		if c.rung.Load() != 2 {
			t.Errorf("GroupsChanged was called %d times, want twice", c.rung.Load())
		}
		c.more = c.more[1:]
		c.want("unknown again", c.reaches(c.n[0].dev, toGroup(macOf(1), group4, "x")), "m0")
	})
}

// A gateway's device is its own node's: what it joins, nobody else has to know of.
func TestLocalMember(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := castMesh(t, 2, 1, Config{})
		defer end(c.n)
		gate := taptest.New("gate", macOf(200), 1450, 1)
		if _, err := c.n[0].bridge.AddLocalPort(gate); err != nil {
			t.Fatal(err)
		}
		time.Sleep(11 * time.Second)
		drain(gate)
		c.more = append(c.more, gate)
		c.want("its report", c.reaches(gate, join4(macOf(200), group4)), "")
		c.want("groups", groups(c.n[0].bridge), "[] false")
		c.want("data here", c.reaches(c.more[0], toGroup(macOf(101), group4, "x")), "n2 m1")
		c.want("data from there", c.reaches(c.n[1].dev, toGroup(macOf(2), group4, "x")), "")
		c.reaches(c.more[0], join4(macOf(101), netip.MustParseAddr("239.7.7.7")))
		c.want("its data", c.reaches(gate, toGroup(macOf(200), netip.MustParseAddr("239.7.7.7"), "x")), "m0")
	})
}

// Ports come and go, stations join and leave, peers tell, and frames pass, all at once.
func TestSnoopConcurrently(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := castMesh(t, 2, 3, Config{})
		defer end(c.n)
		b := c.n[0].bridge
		var wg sync.WaitGroup
		for i, d := range c.more {
			wg.Go(func() {
				for j := range 200 {
					g := netip.AddrFrom4([4]byte{239, 1, 1, byte(j % 7)})
					d.Inject(join4(macOf(101+i), g), ether.Meta{})
					d.Inject(toGroup(macOf(101+i), g, "x"), ether.Meta{})
					d.Inject(leave4(macOf(101+i), g), ether.Meta{})
					d.TryNext()
					time.Sleep(time.Duration(j%13) * 100 * time.Millisecond)
				}
			})
		}
		wg.Go(func() {
			for j := range 200 {
				g := netip.AddrFrom4([4]byte{239, 1, 1, byte(j % 7)})
				b.SetGroups(map[netip.Addr][]Peer{g: {{VTEP: vtepOf(2)}}}, nil)
				b.SetSnooped([]Peer{{VTEP: vtepOf(2)}}[:j%2])
				c.n[1].dev.Inject(toGroup(macOf(2), g, "y"), ether.Meta{})
				time.Sleep(500 * time.Millisecond)
			}
		})
		wg.Go(func() {
			for range 50 {
				d := taptest.New("brief", macOf(150), 1450, 1)
				p, err := b.AddPort(d)
				if err != nil {
					t.Error(err)
					return
				}
				d.Inject(join4(macOf(150), netip.AddrFrom4([4]byte{239, 1, 1, 3})), ether.Meta{})
				time.Sleep(time.Second)
				if err := b.RemovePort(p); err != nil {
					t.Error(err)
				}
			}
		})
		wg.Wait()
		b.SetGroups(nil, nil)
		time.Sleep(300 * time.Second)
		if n, count := b.snoop.groups.Size(), b.snoop.count; n != 0 || count != 0 {
			t.Errorf("%d groups are kept and %d counted after everybody left", n, count)
		}
	})
}

// The way of multicast to a peer with a member allocates nothing, nor does that from one.
func TestMulticastNoAllocs(t *testing.T) {
	tunnel, p, f := hotCast(t)
	l := &lane{tx: &nullSender{}}
	if n := testing.AllocsPerRun(200, func() { p.forward(l, &f) }); n != 0 {
		t.Errorf("forward: %v allocations, want 0", n)
	}
	in := newIngress(tunnel)
	b := slices.Clone(f.B)
	macOf(2).Put(b[6:])
	in.batch.Slots = []underlay.Slot{{Src: vtepOf(2), B: datagram(testVNI, b)}}
	in.handle()
	if n := testing.AllocsPerRun(200, in.handle); n != 0 {
		t.Errorf("deliver: %v allocations, want 0", n)
	}
}

// hotCast is a bridge with a port and a peer that have joined a group, and a frame to it.
func hotCast(tb testing.TB) (*Tunnel, *Port, tap.Frame) {
	tunnel, b, p := hotBridge(tb)
	b.snoop.on = true
	b.SetSnooped([]Peer{{VTEP: vtepOf(2)}})
	b.SetGroups(map[netip.Addr][]Peer{group4: {{VTEP: vtepOf(2)}}}, nil)
	b.snoop.mu.Lock()
	b.snoop.join(p, group4, 0)
	b.snoop.mu.Unlock()
	return tunnel, p, tap.Frame{B: toGroup(macOf(1), group4, strings.Repeat("x", 64))}
}

func BenchmarkForwardMulticast(b *testing.B) {
	_, p, f := hotCast(b)
	l := &lane{tx: &nullSender{}}
	b.SetBytes(int64(len(f.B)))
	b.ReportAllocs()
	for b.Loop() {
		p.forward(l, &f)
	}
}

// BenchmarkAttend is a round of 500 idle ports in which each is asked, which comes every
// 1,250 s, and one in which none is.
func BenchmarkAttend(b *testing.B) {
	_, br, _ := hotBridge(b)
	br.snoop.on = true
	for i := range 500 {
		if _, err := br.AddPort(&nullDevice{mac: macOf(1000 + i)}); err != nil {
			b.Fatal(err)
		}
	}
	now := int64(0)
	for range startupQueries {
		now += br.snoop.times.idle
		br.snoop.attend(now)
	}
	b.Run("asked", func(b *testing.B) {
		for b.Loop() {
			now += br.snoop.times.idle
			br.snoop.attend(now)
		}
	})
	b.Run("not", func(b *testing.B) {
		for b.Loop() {
			br.snoop.due.Store(now)
			br.snoop.attend(now)
		}
	})
}
