package e2e

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/tulle-net/tulle/ether"
	"github.com/tulle-net/tulle/internal/lab"
	"github.com/tulle-net/tulle/node"
)

//	a (first node, keeper) ──┐
//	b ───────────────────────┤
//	c ───────────────────────┼─[ul]── each has the static overlay still, VNI 100, and whatever it is exposed in
//	d ───────────────────────┤
//	e ───────────────────────┤        and e the static overlay high, VNI 65537
//	f (a token for red* only)┘
//
// Shared overlays, from `overlay create` to `overlay rm`, as scripts use them.

func stillAddress(i int) netip.Addr { return netip.AddrFrom4([4]byte{10, 50, 0, byte(i)}) }

// still is a static overlay's --overlay on host number i.
func still(i int) string {
	return fmt.Sprintf("name=still,vni=100,tap=still0,address=%s/16", stillAddress(i))
}

func TestSharedOverlay(t *testing.T) {
	t.Parallel()
	l, sw, h := hosts(t, 6, lab.Underlay{Prefix4: underlay4, Offloads: lab.Wire})
	nodes := joined(t, l, h[:5], func(i int) []string {
		own := []string{"--overlay", still(i + 1)}
		if i == 4 { // where shared ones get theirs
			own = append(own, "--overlay", "name=high,vni=65537,tap=high0,address=10.51.0.5/16")
		}
		return own
	})
	a, b, c, d, e := nodes[0], nodes[1], nodes[2], nodes[3], nodes[4]
	var blue []place

	part(t, "create", nodes, func(t *testing.T) {
		start := time.Now()
		c.do("overlay", "create", "blue")
		took := time.Since(start)
		took += known(t, 2*time.Second, "blue", true, nodes...)
		t.Logf("every node knows the overlay %v after the command began", took.Round(time.Millisecond))
		for _, n := range nodes {
			var raw struct{ Overlays []map[string]json.RawMessage }
			if err := json.Unmarshal([]byte(n.do("overlay", "ls", "-o", "json")), &raw); err != nil {
				t.Fatal(err)
			}
			at := slices.IndexFunc(raw.Overlays, func(o map[string]json.RawMessage) bool { return string(o["name"]) == `"blue"` })
			if at < 0 {
				t.Fatalf("%s: overlay ls: %v", n.name, raw)
			}
			for field, want := range map[string]string{"vni": "65536", "subnets": `["10.32.0.0/16"]`, "encryption": `"required"`, "shared": "true", "by": `"c"`, "joined": "false"} {
				var got bytes.Buffer
				if err := json.Compact(&got, raw.Overlays[at][field]); err != nil || got.String() != want {
					t.Errorf("%s: overlay ls: %s is %s, want %s", n.name, field, got.String(), want)
				}
			}
		}
		d.refuses([]string{"blue already", "made by c"}, "overlay", "create", "blue")
	})

	part(t, "expose", nodes, func(t *testing.T) {
		subnet, seen := netip.MustParsePrefix("10.32.0.0/16"), map[netip.Addr]string{}
		for _, n := range nodes {
			p := n.exposed("blue")
			blue = append(blue, place{n, p.Addr()})
			if p.Bits() != 16 || !subnet.Contains(p.Addr()) || p.Addr() == subnet.Addr() || p.Addr() == subnet.Addr().Next() {
				t.Errorf("%s has %s, want an address of %s that is not its gateway's", n.name, p, subnet)
			}
			if other, taken := seen[p.Addr()]; taken {
				t.Errorf("%s and %s both have %s", other, n.name, p)
			}
			seen[p.Addr()] = n.name
			n.device("blue", p)
			link, _, _ := n.host.Link("blue") // device has looked
			a4 := p.Addr().As4()
			if want := fmt.Sprintf("02:54:%02x:%02x:%02x:%02x", a4[0], a4[1], a4[2], a4[3]); link.MAC != want {
				t.Errorf("%s: MAC %s, want %s", n.name, link.MAC, want)
			}
			if link.MTU != 1418 {
				t.Errorf("%s: MTU %d, want 1418", n.name, link.MTU)
			}
		}
		t.Logf("all ten pairs ping, both ways, after %v", mesh(t, 10*time.Second, blue...).Round(time.Millisecond))
		for i, n := range nodes {
			list := asked[struct{ Endpoints []map[string]any }](n, "endpoints", "--local").Endpoints
			want := map[string]any{
				"name": n.name, "node": n.name, "overlay": "blue", "tap": "blue", "up": true, "mtu": 1418,
				"ips": []any{blue[i].addr.String() + "/16"}, "mac": ether.MACOf(blue[i].addr).String(),
			}
			if len(list) != 1 || fmt.Sprint(list[0]) != fmt.Sprint(want) {
				t.Errorf("%s: endpoints: %v, want one: %v", n.name, list, want)
			}
		}
		if o := asked[node.SharedOverlay](d, "overlay", "inspect", "blue"); strings.Join(o.Nodes, " ") != "a b c d e" || !o.Joined {
			t.Errorf("overlay inspect: %+v, want all nodes in it", o)
		}
	})

	part(t, "again", nodes, func(t *testing.T) {
		if p := a.exposed("blue"); p.Addr() != blue[0].addr {
			t.Errorf("exposed again a has %s, and it had %s", p, blue[0].addr)
		}
		if p := a.exposed("blue", "--ip", blue[0].addr.String(), "--tap", "blue"); p.Addr() != blue[0].addr {
			t.Errorf("exposed again a has %s, and it had %s", p, blue[0].addr)
		}
		a.refuses([]string{"in overlay blue already", "tulle unexpose blue"}, "expose", "blue", "--ip", "10.32.9.9")
		a.refuses([]string{"in overlay blue already", "tulle unexpose blue"}, "expose", "blue", "--tap", "other")
		if list := get[node.Endpoints](a, "/v1/endpoints?local=true").Endpoints; len(list) != 1 {
			t.Errorf("a has %d endpoints, want 1: %+v", len(list), list)
		}
		a.refuses([]string{"no shared overlay green", "tulle overlay ls"}, "expose", "green")
		a.refuses([]string{"no endpoint", "green"}, "unexpose", "green")
	})

	part(t, "dual stack", nodes, func(t *testing.T) {
		b.do("overlay", "create", "dual", "--subnet", "10.40.0.0/16", "--subnet", "fd40::/48")
		if o, _ := b.knows("dual"); o.VNI != 65538 {
			t.Errorf("overlay dual has VNI %d, want 65538: 65537 is a static overlay's", o.VNI)
		}
		var at4, at6 []place
		for _, n := range []*tulle{a, d, e} {
			p := n.exposes("dual")
			if len(p) != 2 || !p[0].Addr().Is4() || !p[1].Addr().Is6() || p[0].Bits() != 16 || p[1].Bits() != 48 {
				t.Fatalf("%s: expose prints %v, want an address of 10.40.0.0/16 and then one of fd40::/48", n.name, p)
			}
			n.device("dual", p...)
			at4, at6 = append(at4, place{n, p[0].Addr()}), append(at6, place{n, p[1].Addr()})
		}
		mesh(t, 10*time.Second, at4...)
		mesh(t, 10*time.Second, at6...)
	})

	part(t, "fixed address", nodes, func(t *testing.T) {
		e.do("overlay", "create", "fix", "--subnet", "10.41.0.0/16", "--gateway", "10.41.0.7", "--reserve", "10.41.200.0/24")
		pa := a.exposed("fix")
		blocks := a.blocks("fix")
		if len(blocks) != 1 || !blocks[0].Contains(pa.Addr()) {
			t.Fatalf("a has blocks %v and address %s", blocks, pa)
		}
		last := lastOf(blocks[0])
		// In a's block, asked for by b.
		if p := b.exposed("fix", "--ip", last.String()); p.Addr() != last {
			t.Errorf("b has %s, want %s", p, last)
		}
		// In its own block: c's own.
		pc := c.exposed("fix")
		c.do("unexpose", "fix")
		own := lastOf(netip.PrefixFrom(pc.Addr(), 26).Masked())
		if p := c.exposed("fix", "--ip", own.String()); p.Addr() != own {
			t.Errorf("c has %s, want %s", p, own)
		}
		// Reserved, and asked for; nobody's block.
		reserved := netip.MustParseAddr("10.41.200.9")
		if p := e.exposed("fix", "--ip", reserved.String()); p.Addr() != reserved {
			t.Errorf("e has %s, want %s", p, reserved)
		}
		mesh(t, 10*time.Second, place{a, pa.Addr()}, place{b, last}, place{c, own}, place{e, reserved})
		for _, taken := range []struct {
			addr netip.Addr
			by   string
		}{{pa.Addr(), "a"}, {last, "b"}, {own, "c"}, {reserved, "e"}} {
			d.refuses([]string{taken.addr.String(), "node " + taken.by}, "expose", "fix", "--ip", taken.addr.String())
		}
		d.refuses([]string{"10.42.0.9", "no subnet of overlay fix", "10.41.0.0/16"}, "expose", "fix", "--ip", "10.42.0.9")
		d.refuses([]string{"10.41.0.7", "gateway"}, "expose", "fix", "--ip", "10.41.0.7")
		d.refuses([]string{"10.41.255.255"}, "expose", "fix", "--ip", "10.41.255.255")
		if e, there := d.endpoint("fix"); there {
			t.Errorf("d has an endpoint after all of it: %+v", e)
		}
		if _, there, err := d.host.Link("fix"); there || err != nil {
			t.Errorf("d has a device fix (%v)", err)
		}
		// What was refused stands in nobody's way: d gets an address, and b's is free when b leaves.
		d.exposed("fix")
		b.do("unexpose", "fix")
		d.do("unexpose", "fix")
		if p := d.exposed("fix", "--ip", last.String()); p.Addr() != last {
			t.Errorf("d has %s, want %s, which b has left", p, last)
		}
		mesh(t, 10*time.Second, place{a, pa.Addr()}, place{c, own}, place{d, last})
	})

	part(t, "one subnet, two overlays", nodes, func(t *testing.T) {
		e.do("overlay", "create", "east", "--subnet", "10.42.0.0/16")
		e.do("overlay", "create", "west", "--subnet", "10.42.0.0/16")
		one, two := netip.MustParseAddr("10.42.0.21"), netip.MustParseAddr("10.42.0.22")
		for n, o := range map[*tulle]string{a: "east", c: "west"} {
			n.exposed(o, "--ip", one.String())
		}
		for n, o := range map[*tulle]string{b: "east", d: "west"} {
			n.exposed(o, "--ip", two.String())
		}
		mesh(t, 10*time.Second, place{a, one}, place{b, two})
		mesh(t, 10*time.Second, place{c, one}, place{d, two})
		// The same MACs and addresses on both: with b away nobody answers a, though d is there.
		b.do("unexpose", "east")
		noPing(t, a.host, two, time.Second)
		ping(t, c.host, two, 5*time.Second)
		a.refuses([]string{"10.42.0.0/16", "by east", "overlay west"}, "expose", "west")
	})

	part(t, "routes and devices in the way", nodes, func(t *testing.T) {
		if err := a.host.AddRoute(netip.MustParsePrefix("10.43.128.0/17"), sw.Addr(b.host)); err != nil {
			t.Fatal(err)
		}
		a.refuses([]string{"10.43.0.0/16", "10.43.128.0/17", "by ul", "--subnet"}, "overlay", "create", "wide", "--subnet", "10.43.0.0/16")
		c.do("overlay", "create", "wide", "--subnet", "10.43.0.0/16")
		a.refuses([]string{"10.43.128.0/17", "by ul", "overlay wide"}, "expose", "wide")
		c.exposed("wide") // c has no such route
		c.refuses([]string{"blue", "--tap"}, "expose", "dual", "--tap", "blue")
		c.refuses([]string{"device ul", "--tap"}, "expose", "dual", "--tap", "ul")
		if e, there := c.endpoint("dual"); there {
			t.Errorf("c has an endpoint after all of it: %+v", e)
		}
		p := c.exposes("dual", "--tap", "mine")
		c.device("dual", p...)
		if _, there, err := c.host.Link("mine"); !there || err != nil {
			t.Errorf("there is no device mine on c (%v)", err)
		}
	})

	part(t, "static beside shared", nodes, func(t *testing.T) {
		for i := range nodes {
			ping(t, nodes[i].host, stillAddress((i+1)%len(nodes)+1), 5*time.Second)
		}
		c.refuses([]string{"static overlay still", "node "}, "overlay", "create", "still")
		c.refuses([]string{"VNI 100", "overlay still", "node "}, "overlay", "create", "other", "--vni", "100")
		c.refuses([]string{"VNI 65536", "blue"}, "overlay", "create", "other", "--vni", "65536")
		c.refuses([]string{"still is a static one"}, "expose", "still")
		for _, n := range nodes {
			if conflicts := n.status().Node.Conflicts; len(conflicts) > 0 {
				t.Errorf("%s: conflicts %v", n.name, conflicts)
			}
		}
	})

	part(t, "set", nodes, func(t *testing.T) {
		syn := func(from, to place) (mss int) {
			t.Helper()
			runIn(t, from.n.host, "ip", "route", "replace", to.addr.String()+"/32", "dev", "blue", "advmss", "1400")
			seen := watch(t, to.n.host, "blue", func(f []byte) bool { _, is := synMSS(f); return is })
			if c, err := from.n.host.Dial(t.Context(), "tcp", netip.AddrPortFrom(to.addr, 9).String()); err == nil {
				c.Close()
				t.Fatal("somebody listens on port 9")
			}
			f := seen(5 * time.Second)
			if f == nil {
				t.Fatal("no SYN came")
			}
			mss, _ = synMSS(f)
			return mss
		}
		began := time.Now()
		d.do("overlay", "set", "blue", "--mtu", "1300")
		for i, n := range nodes {
			n.eventually(5*time.Second, "MTU of its device", func() bool { link, _, err := n.host.Link("blue"); return err == nil && link.MTU == 1300 })
			n.device("blue", netip.PrefixFrom(blue[i].addr, 16))
			if o, _ := n.knows("blue"); o.MTU != 1300 {
				t.Errorf("%s: overlay ls: MTU %d, want 1300", n.name, o.MTU)
			}
		}
		mesh(t, 10*time.Second, blue...)
		if mss := syn(blue[0], blue[1]); mss != 1400 {
			t.Errorf("MSS %d arrives, want the 1400 that was sent", mss)
		}
		d.do("overlay", "set", "blue", "--unknown-unicast", "flood", "--unknown-multicast", "drop", "--bum-limit", "0")
		for _, n := range nodes {
			n.eventually(5*time.Second, "knows what is flooded", func() bool {
				o, _ := n.knows("blue")
				return o.UnknownUnicast == "flood" && o.UnknownMulticast == "drop" && o.BUMLimit == 0
			})
		}
		d.do("overlay", "set", "blue", "--unknown-unicast", "auto", "--unknown-multicast", "flood", "--bum-limit", "2000")
		d.do("overlay", "set", "blue", "--mss-clamp")
		for _, n := range nodes {
			n.eventually(5*time.Second, "knows of the clamp", func() bool { o, _ := n.knows("blue"); return o.ClampMSS })
		}
		mesh(t, 10*time.Second, blue...)
		if mss := syn(blue[0], blue[1]); mss != 1260 {
			t.Errorf("MSS %d arrives, want 1260", mss)
		}
		d.do("overlay", "set", "blue", "--mss-clamp=false", "--mtu", "0")
		for _, n := range nodes {
			n.eventually(5*time.Second, "MTU of its device", func() bool { link, _, err := n.host.Link("blue"); return err == nil && link.MTU == 1418 })
		}
		mesh(t, 10*time.Second, blue...)
		if mss := syn(blue[0], blue[1]); mss != 1400 {
			t.Errorf("MSS %d arrives, want the 1400 that was sent", mss)
		}
		for _, n := range nodes {
			if s, is := n.session(other(n, a, b).name, "blue"); !is || s.AgeSeconds < time.Since(began).Seconds() {
				t.Errorf("%s: session %+v, want the one of before the changes", n.name, s)
			}
		}
		d.do("overlay", "set", "blue", "--cipher", "chacha20-poly1305")
		start := time.Now()
		for _, n := range nodes {
			n.eventually(20*time.Second, "the new cipher is used", func() bool { s, _ := n.session(other(n, a, b).name, "blue"); return s.Cipher == "chacha20-poly1305" })
		}
		mesh(t, 10*time.Second, blue...)
		t.Logf("another cipher is used after %v", time.Since(start).Round(time.Millisecond))
		d.refuses([]string{"no shared overlay", "green"}, "overlay", "set", "green", "--mtu", "1300")
	})

	part(t, "unexpose", nodes, func(t *testing.T) {
		e.do("unexpose", "blue")
		if _, there, err := e.host.Link("blue"); there || err != nil {
			t.Errorf("device blue is still there (%v)", err)
		}
		if _, is := e.carries("blue"); is {
			t.Error("e still carries blue")
		}
		if ep, there := e.endpoint("blue"); there {
			t.Errorf("e still has the endpoint %+v", ep)
		}
		for _, n := range nodes[:4] {
			n.eventually(3*time.Second, "floods to e no more", func() bool { return !n.floodsTo("blue", sw.Addr(e.host)) })
		}
		noPing(t, a.host, blue[4].addr, 500*time.Millisecond)
		mesh(t, 5*time.Second, blue[:4]...)
		e.refuses([]string{"no endpoint", "blue"}, "unexpose", "blue")
		if p := e.exposed("blue"); p.Addr() == blue[4].addr {
			t.Logf("e has its address %s again", p)
		} else {
			blue[4].addr = p.Addr()
		}
		mesh(t, 10*time.Second, blue...)
	})

	part(t, "rm", nodes, func(t *testing.T) {
		b.do("overlay", "create", "brief", "--subnet", "10.44.0.0/16")
		a.exposed("brief")
		d.exposed("brief")
		b.refuses([]string{"brief has endpoints on a, d", "tulle unexpose brief", "--force"}, "overlay", "rm", "brief")
		d.do("unexpose", "brief")
		b.eventually(3*time.Second, "the refusal names a alone", func() bool {
			_, _, stderr := b.command("overlay", "rm", "brief")
			return strings.Contains(stderr, "brief has endpoints on a:")
		})
		a.do("unexpose", "brief")
		took := b.eventually(3*time.Second, "brief goes", func() bool { status, _, _ := b.command("overlay", "rm", "brief"); return status == 0 })
		t.Logf("the overlay can go %v after its last endpoint", took.Round(time.Millisecond))
		known(t, 2*time.Second, "brief", false, nodes...)
		b.refuses([]string{"no shared overlay", "brief"}, "overlay", "rm", "brief")
	})

	part(t, "rm --force", nodes, func(t *testing.T) {
		start := time.Now()
		b.do("overlay", "rm", "blue", "--force")
		eventually(t, 5*time.Second, "blue is gone from all nodes", func() bool {
			for _, n := range nodes {
				_, ep := n.endpoint("blue")
				_, carried := n.carries("blue")
				_, link, err := n.host.Link("blue")
				if ep || carried || link || err != nil {
					return false
				}
			}
			return true
		})
		t.Logf("by force it is gone from all nodes after %v", time.Since(start).Round(time.Millisecond))
		known(t, 2*time.Second, "blue", false, nodes...)
		// The name is free, and the new overlay is another one.
		a.do("overlay", "create", "blue")
		known(t, 2*time.Second, "blue", true, nodes...)
		var again []place
		for _, n := range nodes[:3] {
			again = append(again, place{n, n.exposed("blue").Addr()})
		}
		mesh(t, 10*time.Second, again...)
	})

	part(t, "grants", nodes, func(t *testing.T) {
		f := up(t, l, h[5], "--token", a.token("--overlays", "red*"))
		meet(t, 10*time.Second, append(slices.Clone(nodes), f)...)
		if o, there := f.knows("blue"); there {
			t.Errorf("f knows of %+v", o)
		}
		f.refuses([]string{"certificate does not grant overlay blue", "tulle token create --overlays blue"}, "expose", "blue")
		f.refuses([]string{"create overlays"}, "overlay", "create", "red1")
		f.refuses([]string{"remove overlays"}, "overlay", "rm", "blue", "--force")
		f.refuses([]string{"change overlays"}, "overlay", "set", "blue", "--mtu", "1300")
		f.refuses([]string{"no overlay", "blue"}, "overlay", "inspect", "blue")
		a.do("overlay", "create", "red1")
		known(t, 2*time.Second, "red1", true, f)
		if list := asked[node.SharedOverlays](f, "overlay", "ls").Overlays; len(list) != 1 {
			t.Errorf("f sees %+v, want red1 alone", list)
		}
		if list := asked[node.IPAM](f, "ipam").Overlays; len(list) != 1 || list[0].Overlay != "red1" {
			t.Errorf("f sees addresses of %+v, want red1 alone", list)
		}
		mesh(t, 10*time.Second, place{f, f.exposed("red1").Addr()}, place{a, a.exposed("red1").Addr()})
	})
}

// other is the first of two nodes that is not n.
func other(n, a, b *tulle) *tulle {
	if n == a {
		return b
	}
	return a
}

// blocks are what n has of an overlay's addresses, by the keepers' books.
func (n *tulle) blocks(overlay string) (list []netip.Prefix) {
	n.t.Helper()
	for _, o := range get[node.IPAM](n, "/v1/ipam").Overlays {
		for _, b := range o.Blocks {
			if o.Overlay == overlay && b.Node == n.name {
				list = append(list, b.Prefix)
			}
		}
	}
	return list
}

// lastOf is the last address of a block of IPv4 but one.
func lastOf(p netip.Prefix) netip.Addr {
	b := p.Masked().Addr().As4()
	b[3] += byte(1<<(32-p.Bits())) - 2
	return netip.AddrFrom4(b)
}

// synMSS returns the MSS of a TCP SYN over IPv4, and false for anything else.
func synMSS(frame []byte) (mss int, is bool) {
	h, ok := ether.ParseHeaders(frame)
	if !ok || h.Proto != ether.ProtoTCP {
		return 0, false
	}
	seg := frame[h.L4:h.End]
	if len(seg) < 24 || seg[13]&0x12 != 0x02 {
		return 0, false
	}
	for o := seg[20:min(len(seg), int(seg[12]>>4)*4)]; len(o) >= 4; o = o[1:] {
		if o[0] == 2 && o[1] == 4 { // the first option of Linux's SYNs
			return int(o[2])<<8 | int(o[3]), true
		}
	}
	return 0, false
}

// TestSharedOpen: an open cluster has no store, and says so.
func TestSharedOpen(t *testing.T) {
	t.Parallel()
	l, _, h := hosts(t, 1, lab.Underlay{Prefix4: underlay4})
	a := up(t, l, h[0], "--overlay", overlay(1))
	for _, args := range [][]string{
		{"overlay", "create", "green"}, {"overlay", "inspect", "green"}, {"overlay", "set", "green", "--mtu", "1300"}, {"overlay", "rm", "green"},
		{"expose", "green"}, {"unexpose", "green"}, {"ipam"}, {"ipam", "check"}, {"store", "status"},
		{"store", "snapshot", l.Dir() + "/snapshot"}, {"node", "promote", "a"}, {"node", "demote", "a"}, {"token", "create"},
	} {
		a.refuses([]string{"open cluster"}, args...)
	}
	if list := asked[node.SharedOverlays](a, "overlay", "ls").Overlays; len(list) != 1 || list[0].Name != "blue" || list[0].Shared {
		t.Errorf("overlay ls: %+v, want the static overlay alone", list)
	}
	if list := asked[node.Endpoints](a, "endpoints", "--local").Endpoints; len(list) != 0 {
		t.Errorf("endpoints: %+v, want none", list)
	}
	if list := asked[node.Endpoints](a, "endpoints").Endpoints; len(list) != 1 || list[0].Name != "a" || list[0].Overlay != "blue" || list[0].IPs[0].Addr() != address(1) {
		t.Errorf("endpoints: %+v, want the host's", list)
	}
}

// TestSharedIPv6Only is a cluster, its store included, on an underlay without IPv4.
func TestSharedIPv6Only(t *testing.T) {
	t.Parallel()
	l, _, h := hosts(t, 3, lab.Underlay{Prefix6: underlay6, Offloads: lab.Wire})
	nodes := joined(t, l, h, nil)
	nodes[1].do("overlay", "create", "blue")
	known(t, 2*time.Second, "blue", true, nodes...)
	var at []place
	for _, n := range nodes {
		at = append(at, place{n, n.exposed("blue").Addr()})
	}
	mesh(t, 10*time.Second, at...)
	if link, _, err := h[0].Link("blue"); err != nil || link.MTU != 1398 {
		t.Errorf("MTU %d (%v), want 1398", link.MTU, err)
	}
	for _, n := range nodes[1:] {
		start := time.Now()
		nodes[0].do("node", "promote", n.name)
		t.Logf("%s is a keeper after %v", n.name, time.Since(start).Round(time.Millisecond))
	}
	s := asked[node.StoreStatus](nodes[2], "store", "status")
	if !s.Quorum || len(s.Members) != 3 {
		t.Errorf("store status: %+v, want a majority of 3", s)
	}
	for _, m := range s.Members {
		if !m.Healthy || !strings.Contains(m.Address, "[fd77::") {
			t.Errorf("member %+v, want it healthy on IPv6", m)
		}
	}
	nodes[0].kill()
	took := eventually(t, 15*time.Second, "an overlay is made without the first keeper", func() bool {
		status, _, _ := nodes[1].command("overlay", "create", "green")
		return status == 0
	})
	t.Logf("an overlay is made %v after the first keeper died", took.Round(time.Millisecond))
	mesh(t, 5*time.Second, at[1:]...)
}
