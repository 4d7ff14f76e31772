package e2e

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/tulle-net/tulle/ether"
	"github.com/tulle-net/tulle/internal/lab"
	"github.com/tulle-net/tulle/node"
)

//	a ──┬─[ul]─┬── b      x            a and b have nodes; x has none and stands for the Internet:
//	    │      │      └── on ul too    it knows the hosts' addresses and none of the overlays'
//	 c1 c2 r1  c3
//
// c1, c2, c3 are in blue (plain, both families), r1 in red (sealed): tenants.
// tg-blue and tg-red are devices of a, with the same address and MAC on b.

// blueGateway is the MAC of 10.32.0.1.
const blueGateway ether.MAC = 0x0254_0a20_0001

// forged is what an endpoint sends as VXLAN: a frame that nobody would miss.
var forged = []byte("\xff\xff\xff\xff\xff\xff\x02\x00\x00\x00\x66\x66forged by an endpoint")

// telling answers each TCP connection and each UDP datagram on a port of a host
// with the address that it came from.
func telling(t *testing.T, h *lab.Host, port uint16) {
	t.Helper()
	ln, err := h.Listen(fmt.Sprintf(":%d", port))
	if err != nil {
		t.Fatal(err)
	}
	pc, err := h.ListenPacket(fmt.Sprintf(":%d", port))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = ln.Close(); _ = pc.Close() })
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			_, _ = io.WriteString(c, c.RemoteAddr().String())
			_ = c.Close()
		}
	}()
	go func() {
		b := make([]byte, 64)
		for {
			_, from, err := pc.ReadFrom(b)
			if err != nil {
				return
			}
			_, _ = pc.WriteTo([]byte(from.String()), from)
		}
	}()
}

// told returns the address that a telling host saw a caller come from.
func told(h *lab.Host, network string, to netip.AddrPort, within time.Duration) (netip.Addr, error) {
	ctx, cancel := context.WithTimeout(context.Background(), within)
	defer cancel()
	c, err := h.Dial(ctx, network, to.String())
	if err != nil {
		return netip.Addr{}, err
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(within))
	if network == "udp" {
		if _, err := c.Write([]byte("who am I?")); err != nil {
			return netip.Addr{}, err
		}
	}
	b := make([]byte, 128)
	n, err := c.Read(b)
	if err != nil {
		return netip.Addr{}, err
	}
	at, err := netip.ParseAddrPort(string(b[:n]))
	return at.Addr().Unmap(), err
}

// wantTold fails unless a caller is seen as want; the first try may wait for a neighbour.
func wantTold(t *testing.T, h *lab.Host, network string, to netip.AddrPort, want netip.Addr) {
	t.Helper()
	got, err := told(h, network, to, 5*time.Second)
	if err != nil || got != want {
		t.Errorf("%s calls %s over %s and is seen as %v (%v), want %s", h.Name(), to, network, got, err, want)
	}
}

// wantSilence fails if a call is answered.
func wantSilence(t *testing.T, h *lab.Host, network string, to netip.AddrPort) {
	t.Helper()
	if got, err := told(h, network, to, 300*time.Millisecond); err == nil {
		t.Errorf("%s reaches %s over %s, and is seen as %s", h.Name(), to, network, got)
	}
}

// ruleset is what nft shows of a host's rules; empty: there are none.
func ruleset(t *testing.T, h *lab.Host) string { return runIn(t, h, "nft", "list", "ruleset") }

func forwards(t *testing.T, h *lab.Host) string {
	return strings.Join(strings.Fields(runIn(t, h, "cat", "/proc/sys/net/ipv4/ip_forward", "/proc/sys/net/ipv6/conf/all/forwarding")), "")
}

// gateway is what the node says of itself as an overlay's gateway.
func (n *tulle) gateway(overlay string) *node.GatewayStatus {
	n.t.Helper()
	o, _ := n.carries(overlay)
	return o.Gateway
}

func port(a netip.Addr, p uint16) netip.AddrPort { return netip.AddrPortFrom(a, p) }

func TestGateway(t *testing.T) {
	t.Parallel()
	l, sw, h := hosts(t, 3, lab.Underlay{Prefix4: underlay4, Prefix6: underlay6, Offloads: lab.NIC})
	nodes := joined(t, l, h[:2], nil)
	a, b, x := nodes[0], nodes[1], h[2]
	c := containers(t, l, "c1", "c2", "r1", "c3")
	c1, c2, r1, c3 := c[0], c[1], c[2], c[3]
	at4, at6 := sw.Addr(x), sw.Addr6(x)
	a.do("overlay", "create", "blue", "--subnet", "10.32.0.0/16", "--subnet", "fd32::/64", "--encryption", "none", "--gateway", "true")
	a.do("overlay", "create", "red", "--subnet", "10.33.0.0/16", "--gateway", "true")
	known(t, 5*time.Second, "red", true, nodes...)
	telling(t, x, 7000)
	wire := []*fastCapture{captureTAP(t, h[0], sw.Dev()), captureTAP(t, h[1], sw.Dev())}

	addr := map[*lab.Host][]netip.Addr{}
	attach := func(n *tulle, h *lab.Host, overlay string, more ...string) {
		t.Helper()
		for _, s := range strings.Fields(n.do(append([]string{"attach", overlay, "--netns", h.Path()}, more...)...)) {
			addr[h] = append(addr[h], netip.MustParsePrefix(s).Addr())
		}
	}
	attach(a, c1, "blue", "--publish", "8080:7000", "-p", "8080:7000/udp", "-p", "8082:8000", "-p", sw.Addr(h[0]).String()+":8081:7000")
	attach(a, c2, "blue")
	attach(a, r1, "red")
	attach(b, c3, "blue")
	for _, h := range c {
		telling(t, h, 7000)
	}

	part(t, "out", nodes, func(t *testing.T) {
		for _, network := range []string{"tcp", "udp"} {
			for _, c := range []*lab.Host{c1, c2, r1} {
				wantTold(t, c, network, port(at4, 7000), sw.Addr(h[0]))
			}
			wantTold(t, c1, network, port(at6, 7000), sw.Addr6(h[0]))
			// Each through its own node.
			wantTold(t, c3, network, port(at4, 7000), sw.Addr(h[1]))
			wantTold(t, c3, network, port(at6, 7000), sw.Addr6(h[1]))
		}
		for _, n := range nodes {
			if g := n.gateway("blue"); g == nil || !g.Up || g.Device != "tg-blue" {
				t.Errorf("%s: gateway of blue: %+v", n.name, g)
			}
		}
		if forwards(t, h[0]) != "11" {
			t.Error("a does not forward")
		}
		if off := runIn(t, h[0], "cat", "/proc/sys/net/ipv6/conf/tg-red/disable_ipv6"); off != "1\n" {
			t.Errorf("red has no IPv6, and its gateway has: %s", off)
		}
		// In the overlay the endpoints see each other, not the gateways.
		wantTold(t, c1, "tcp", port(addr[c3][0], 7000), addr[c1][0])
		wantTold(t, c3, "tcp", port(addr[c1][1], 7000), addr[c3][1])
	})

	part(t, "super-frames", nodes, func(t *testing.T) {
		const bytes = 64 << 20
		before := packetsFrom(t, h[0], "tg-blue")
		got := transfer(t, l, c1, x, at4, bytes)
		packets := packetsFrom(t, h[0], "tg-blue") - before
		t.Logf("%d MB from an endpoint to the outside: %.0f Mbit/s, %d packets on the gateway's device", bytes>>20, got.BitsPerSecond()/1e6, packets)
		if segments := bytes / 1366; packets > uint64(segments/4) {
			t.Errorf("%d packets for %d segments: super-frames do not pass whole", packets, segments)
		}
		transfer(t, l, c1, x, at6, 16<<20)
	})

	part(t, "tenants", nodes, func(t *testing.T) {
		red := a.exposed("red")
		for _, network := range []string{"tcp", "udp"} {
			wantSilence(t, r1, network, port(addr[c1][0], 7000))
			wantSilence(t, c1, network, port(addr[r1][0], 7000))
			wantSilence(t, x, network, port(addr[c1][0], 7000))
		}
		telling(t, h[0], 7001)
		// The host is there at its addresses of the overlay and at those outside of
		// all, and for another tenant not at the overlay's.
		wantTold(t, r1, "tcp", port(red.Addr(), 7001), addr[r1][0])
		wantTold(t, c1, "tcp", port(netip.MustParseAddr("10.32.0.1"), 7001), addr[c1][0])
		wantTold(t, c1, "tcp", port(sw.Addr(h[0]), 7001), addr[c1][0])
		wantSilence(t, c1, "tcp", port(red.Addr(), 7001))
		wantSilence(t, c1, "tcp", port(netip.MustParseAddr("10.33.0.1"), 7001))
		wantSilence(t, r1, "tcp", port(netip.MustParseAddr("10.32.0.1"), 7001))
		// Nothing enters from outside, also from who knows where the overlays are.
		for _, to := range []string{"10.32.0.0/16", "10.33.0.0/16"} {
			if err := x.AddRoute(netip.MustParsePrefix(to), sw.Addr(h[0])); err != nil {
				t.Fatal(err)
			}
		}
		wantSilence(t, x, "tcp", port(addr[c1][0], 7000))
		wantSilence(t, x, "udp", port(addr[c1][0], 7000))
		wantSilence(t, x, "tcp", port(addr[r1][0], 7000))
		if dropsIn(t, h[0], "forward") == 0 || dropsIn(t, h[0], "input") == 0 {
			t.Errorf("nothing was dropped on the way through the host, or to it:\n%s", ruleset(t, h[0]))
		}
		// An endpoint that takes another tenant's address is not heard, nor does the
		// host's loopback answer endpoints, which would have to lose their own.
		before := dropsIn(t, h[0], "arriving")
		runIn(t, c1, "ip", "addr", "add", "10.33.7.7/32", "dev", "lo")
		if out, err := c1.Run(t.Context(), "ping", "-c", "1", "-W", "1", "-I", "10.33.7.7", at4.String()); err == nil {
			t.Errorf("another tenant's address is let out: %s", out)
		}
		// Nor one that takes another node's, or sends what would be taken for this
		// node's frames: plain VXLAN is told by the address that it comes from.
		runIn(t, c1, "ip", "addr", "add", sw.Addr(h[1]).String()+"/32", "dev", "lo")
		if out, err := c1.Run(t.Context(), "ping", "-c", "1", "-W", "1", "-I", sw.Addr(h[1]).String(), sw.Addr(h[0]).String()); err == nil {
			t.Errorf("another node's address is let in: %s", out)
		}
		runIn(t, c1, "ip", "addr", "del", sw.Addr(h[1]).String()+"/32", "dev", "lo")
		forge, err := c1.Dial(t.Context(), "udp", port(sw.Addr(h[1]), 4789).String())
		if err != nil {
			t.Fatal(err)
		}
		blue, _ := a.carries("blue")
		_, _ = forge.Write(slices.Concat([]byte{8, 0, 0, 0, byte(blue.VNI >> 16), byte(blue.VNI >> 8), byte(blue.VNI), 0}, forged))
		_ = forge.Close()
		spoofed := dropsIn(t, h[0], "arriving")
		runIn(t, c1, "ip", "addr", "add", "10.32.250.1/16", "dev", "eth0")
		if out, err := c1.Run(t.Context(), "ping", "-c", "1", "-W", "1", "-I", "10.32.250.1", at4.String()); err == nil {
			t.Errorf("an address that the endpoint took by itself is answered: %s", out)
		}
		runIn(t, c1, "ip", "route", "del", "local", "127.0.0.0/8", "dev", "lo", "table", "local")
		runIn(t, c1, "ip", "route", "add", "127.5.0.0/16", "via", "10.32.0.1", "src", addr[c1][0].String())
		if err := c1.Sysctl("net/ipv4/conf/all/route_localnet", "1"); err != nil {
			t.Fatal(err)
		}
		wantSilence(t, c1, "udp", netip.MustParseAddrPort("127.5.0.1:7001"))
		if n := dropsIn(t, h[0], "arriving"); n == spoofed || spoofed == before {
			t.Errorf("dropped %d, then %d with another tenant's address, then %d to the host's loopback: want more each time", before, spoofed, n)
		}
		a.do("unexpose", "red")
	})

	part(t, "the host in the overlay too", nodes, func(t *testing.T) {
		own := a.exposes("blue")
		theirs := b.exposes("blue")
		telling(t, h[0], 7001)
		telling(t, h[1], 7002)
		wantTold(t, h[0], "tcp", port(theirs[0].Addr(), 7002), own[0].Addr())
		wantTold(t, c3, "tcp", port(own[0].Addr(), 7001), addr[c3][0])
		wantTold(t, c3, "tcp", port(own[1].Addr(), 7001), addr[c3][1])
		wantTold(t, c1, "tcp", port(own[0].Addr(), 7001), addr[c1][0])
		wantTold(t, c1, "tcp", port(own[1].Addr(), 7001), addr[c1][1])
		wantTold(t, c1, "tcp", port(theirs[0].Addr(), 7002), addr[c1][0])
		wantTold(t, h[0], "tcp", port(addr[c3][0], 7000), own[0].Addr())
		wantTold(t, h[0], "tcp", port(addr[c1][0], 7000), netip.MustParseAddr("10.32.0.1"))
		// Only the own gateway answers who asks for it, whoever hears the question.
		for range 20 {
			for _, c := range []*lab.Host{c1, c3} {
				runIn(t, c, "ip", "neigh", "flush", "dev", "eth0")
				wantTold(t, c, "udp", port(at4, 7000), map[*lab.Host]netip.Addr{c1: sw.Addr(h[0]), c3: sw.Addr(h[1])}[c])
				if mac, err := c.Neighbour("eth0", netip.MustParseAddr("10.32.0.1")); err != nil || mac != blueGateway.String() {
					t.Fatalf("%s: 10.32.0.1 is at %q, %v, want %s", c.Name(), mac, err, blueGateway)
				}
			}
		}
		wantTold(t, x, "tcp", port(sw.Addr(h[0]), 8080), at4)
		a.do("unexpose", "blue")
		b.do("unexpose", "blue")
		wantTold(t, c1, "tcp", port(at4, 7000), sw.Addr(h[0]))
	})

	published := func(t *testing.T) {
		t.Helper()
		for _, network := range []string{"tcp", "udp"} {
			wantTold(t, x, network, port(sw.Addr(h[0]), 8080), at4)
			wantTold(t, x, network, port(sw.Addr6(h[0]), 8080), at6)
			wantTold(t, h[0], network, port(sw.Addr(h[0]), 8080), sw.Addr(h[0]))
			wantTold(t, h[0], network, netip.MustParseAddrPort("127.0.0.1:8080"), netip.MustParseAddr("10.32.0.1"))
			// Of the same overlay by the host: only then is it somebody else who calls.
			wantTold(t, c2, network, port(sw.Addr(h[0]), 8080), netip.MustParseAddr("10.32.0.1"))
			wantTold(t, c1, network, port(sw.Addr(h[0]), 8080), netip.MustParseAddr("10.32.0.1"))
			wantTold(t, c2, network, port(sw.Addr6(h[0]), 8080), netip.MustParseAddr("fd32::1"))
			// Of another tenant, as anybody may, and of another node.
			wantTold(t, r1, network, port(sw.Addr(h[0]), 8080), addr[r1][0])
			wantTold(t, c3, network, port(sw.Addr(h[0]), 8080), sw.Addr(h[1]))
		}
		wantTold(t, x, "tcp", port(sw.Addr(h[0]), 8081), at4)
		wantSilence(t, h[0], "tcp", netip.MustParseAddrPort("127.0.0.1:8081"))
		wantSilence(t, x, "tcp", port(sw.Addr6(h[0]), 8081))
	}
	part(t, "published", nodes, func(t *testing.T) {
		published(t)
		list := a.attached(isNamed(filepath.Base(c1.Path())))
		if len(list) != 1 || len(list[0].Publish) != 4 || list[0].PublishError != "" || list[0].Publish[1].String() != "8080:7000/udp" {
			t.Errorf("c1: %+v", list)
		}
		if table := a.do("endpoints"); !strings.Contains(table, "8080:7000/tcp,8080:7000/udp,8082:8000/tcp,192.168.77.1:8081:7000/tcp") {
			t.Errorf("tulle endpoints does not show what is published:\n%s", table)
		}
		// The host's name for itself, as people use it.
		ln, err := c1.Listen(":8000")
		if err != nil {
			t.Fatal(err)
		}
		server := http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { _, _ = io.WriteString(w, r.RemoteAddr) })}
		defer server.Close()
		go func() { _ = server.Serve(ln) }()
		if out := runIn(t, h[0], "curl", "-s", "--max-time", "5", "http://localhost:8082/"); !strings.HasPrefix(out, "10.32.0.1:") {
			t.Errorf("curl localhost:8082: %q", out)
		}
	})

	part(t, "refused", nodes, func(t *testing.T) {
		ln, err := h[0].Listen(":8090")
		if err != nil {
			t.Fatal(err)
		}
		defer ln.Close()
		pc, err := h[0].ListenPacket("127.0.0.1:8091")
		if err != nil {
			t.Fatal(err)
		}
		defer pc.Close()
		a.do("overlay", "create", "closed", "--subnet", "10.34.0.0/16")
		a.do("overlay", "create", "twin", "--subnet", "10.32.128.0/17", "--gateway", "true")
		a.do("overlay", "create", "under", "--subnet", "10.77.0.0/16", "--gateway", "true")
		runIn(t, h[0], "ip", "route", "add", "10.77.1.0/24", "via", at4.String())
		before := ruleset(t, h[0])
		for _, r := range []struct {
			args  string
			words []string
		}{
			{"blue --publish 8080:80", []string{"8080:80/tcp", "endpoint " + filepath.Base(c1.Path()) + " has published 8080:7000/tcp"}},
			{"blue --publish 192.168.77.1:8080:80/udp", []string{"has published 8080:7000/udp"}},
			{"blue --publish 8090:80", []string{"8090:80/tcp", "a program on this host has the port"}},
			{"blue --publish 8091:80/udp", []string{"8091:80/udp", "a program on this host has the port"}},
			{"blue --publish 8092:80 --publish 8092:81", []string{"8092:81/tcp", "asked for twice"}},
			{"blue --publish 192.0.2.200:8092:80", []string{"192.0.2.200 is no address of this host"}},
			{"red --publish [fd77::1]:8092:80", []string{"none is of that family"}},
			{"blue --publish 8092:80 --default-route=false", []string{"default route"}},
			{"closed --publish 8092:80", []string{"overlay closed has no gateway", "tulle overlay set closed --gateway true"}},
			{"twin", []string{"overlay twin", "overlay blue", "10.32.128.0/17 ", "10.32.0.0/16"}},
			{"under", []string{"10.77.1.0/24", "overlay under"}},
		} {
			args := strings.Fields(r.args)
			a.refuses(r.words, append([]string{"attach", args[0], "--netns", c2.Path(), "--ifname", "eth1"}, args[1:]...)...)
		}
		if len(a.attached(func(node.Endpoint) bool { return true })) != 3 || ruleset(t, h[0]) != before {
			t.Error("something is left of what was refused")
		}
		// What is published is taken on the host.
		if ln, err := h[0].Listen(":8080"); err == nil {
			_ = ln.Close()
			t.Error("a program of the host takes a published port")
		}
		// Without a default route there is an endpoint in the twin.
		a.do("attach", "twin", "--netns", c2.Path(), "--ifname", "eth1", "--default-route=false")
		if g := a.gateway("twin"); g == nil || g.Up || !strings.Contains(g.Error, "overlay blue") {
			t.Errorf("gateway of twin: %+v", g)
		}
		if out := a.do("overlays"); !strings.Contains(out, "overlay twin has no gateway here: ") {
			t.Errorf("tulle overlays does not say that twin has none:\n%s", out)
		}
		a.do("detach", "twin", "--netns", c2.Path(), "--ifname", "eth1")
		runIn(t, h[0], "ip", "route", "del", "10.77.1.0/24")
	})

	part(t, "run", nodes, func(t *testing.T) {
		out := &heard{}
		cmd := exec.Command(binary, "--socket", a.sock, "run", "blue", "--publish", "8084:5201", "--", "iperf3", "-s", "-1", "--forceflush")
		cmd.Stdout, cmd.Stderr = out, out
		p, err := h[0].Start(cmd)
		if err != nil {
			t.Fatal(err)
		}
		eventually(t, 10*time.Second, "the server listens", func() bool { return strings.Contains(out.String(), "Server listening") })
		runIn(t, x, "iperf3", "-c", sw.Addr(h[0]).String(), "-p", "8084", "-n", "16M")
		if err := p.Wait(); err != nil || !strings.Contains(out.String(), "Accepted connection from "+at4.String()) {
			t.Errorf("tulle run --publish: %v: %s", err, out)
		}
		a.eventually(2*time.Second, "the port is free again", func() bool {
			ln, err := h[0].Listen(":8084")
			if err == nil {
				_ = ln.Close()
			}
			return err == nil
		})
	})

	part(t, "the wire", nodes, func(t *testing.T) {
		var mac [6]byte
		blueGateway.Put(mac[:])
		frames := 0
		for _, c := range wire {
			for _, d := range c.datagrams() {
				if len(d.payload) < 22 || d.payload[0] != 0x08 {
					continue
				}
				frames++
				if bytes.Contains(d.payload, forged) {
					t.Fatalf("%s → %s: an endpoint sends VXLAN as if it were its node", d.src, d.dst)
				}
				if bytes.Equal(d.payload[8:14], mac[:]) || bytes.Equal(d.payload[14:20], mac[:]) {
					t.Fatalf("%s → %s: a frame of the gateway's on the wire: %x", d.src, d.dst, d.payload[8:])
				}
			}
		}
		if frames == 0 {
			t.Fatal("no frame of blue was seen on the wire")
		}
		t.Logf("%d frames of blue on the wire, none from or to the gateway", frames)
		for _, n := range nodes {
			if d := n.status().Drops["local_only"]; d != 0 {
				t.Errorf("%s: %d frames between a gateway and the tunnel", n.name, d)
			}
		}
	})

	part(t, "killed", nodes, func(t *testing.T) {
		untoken(a)
		c4 := containers(t, l, "c4")[0]
		attach(a, c4, "blue")
		if routes := runIn(t, c4, "ip", "route"); !strings.Contains(routes, "default via 10.32.0.1") {
			t.Errorf("an endpoint without another default route has not got one: %s", routes)
		}
		a.proc.Kill()
		<-a.proc.Done()
		if !strings.Contains(ruleset(t, h[0]), "table ip tulle-a-") {
			t.Error("the kernel has lost the rules by itself: this part tests nothing")
		}
		// A program that takes a port meanwhile has it, until it ends.
		ln, err := h[0].Listen(":8082")
		if err != nil {
			t.Fatal(err)
		}
		// A namespace that has got another default route meanwhile keeps that.
		runIn(t, c4, "ip", "route", "replace", "default", "dev", "lo")
		a.start()
		if routes := runIn(t, c4, "ip", "route"); !strings.Contains(routes, "default dev lo") || !strings.Contains(routes, "10.32.0.0/16 dev eth0") {
			t.Errorf("routes of c4: %s", routes)
		}
		a.do("detach", "blue", "--netns", c4.Path())
		wantTold(t, c1, "tcp", port(at4, 7000), sw.Addr(h[0]))
		list := a.attached(isNamed(filepath.Base(c1.Path())))
		if len(list) != 1 || !list[0].Up || !strings.Contains(list[0].PublishError, "8082:8000/tcp: a program on this host has the port") {
			t.Errorf("c1 with a port that is taken: %+v", list)
		}
		wantSilence(t, x, "tcp", port(sw.Addr(h[0]), 8080)) // all or none
		_ = ln.Close()
		a.do("overlay", "set", "blue", "--reserve", "10.32.0.0/24") // or within 10 s
		a.eventually(5*time.Second, "c1's ports are published again", func() bool {
			list := get[node.Endpoints](a, "/v1/endpoints?local=true").Endpoints
			return !slices.ContainsFunc(list, func(e node.Endpoint) bool { return e.PublishError != "" })
		})
		published(t)
		wantTold(t, c1, "tcp", port(at4, 7000), sw.Addr(h[0]))
		wantTold(t, c1, "tcp", port(at6, 7000), sw.Addr6(h[0]))
		if rules := ruleset(t, h[0]); strings.Count(rules, "table ip tulle-") != 1 || strings.Count(rules, "table ip6 tulle-") != 1 {
			t.Errorf("not one table a family:\n%s", rules)
		}
	})

	part(t, "detached", nodes, func(t *testing.T) {
		a.do("detach", "blue", "--netns", c1.Path())
		wantSilence(t, x, "tcp", port(sw.Addr(h[0]), 8080))
		wantTold(t, c2, "tcp", port(at4, 7000), sw.Addr(h[0]))
		if strings.Contains(ruleset(t, h[0]), "8080") {
			t.Error("a rule for a port of an endpoint that is gone")
		}
		ln, err := h[0].Listen(":8080")
		if err != nil {
			t.Errorf("the port is not free again: %v", err)
		} else {
			_ = ln.Close()
		}
		a.do("overlay", "set", "red", "--gateway", "false")
		a.eventually(5*time.Second, "red has no gateway", func() bool { return a.gateway("red") == nil })
		wantSilence(t, r1, "tcp", port(at4, 7000))
		a.do("overlay", "set", "red", "--gateway", "true")
		a.eventually(5*time.Second, "red has a gateway again", func() bool { g := a.gateway("red"); return g != nil && g.Up })
		wantTold(t, r1, "tcp", port(at4, 7000), sw.Addr(h[0]))
	})

	part(t, "stopped", nodes, func(t *testing.T) {
		for i, n := range nodes {
			n.stop()
			if rules := ruleset(t, h[i]); rules != "" {
				t.Errorf("%s: left after the stop:\n%s", n.name, rules)
			}
			if f := forwards(t, h[i]); f != "00" {
				t.Errorf("%s forwards still: %s", n.name, f)
			}
			if _, err := os.Stat(filepath.Join(l.Dir(), "state-"+n.name, "gateway.json")); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("%s: gateway.json is left: %v", n.name, err)
			}
			if _, there, _ := h[i].Link("tg-blue"); there {
				t.Errorf("%s: tg-blue is left", n.name)
			}
		}
	})
}

// packetsFrom returns how many packets a device has handed to its host.
func packetsFrom(t *testing.T, h *lab.Host, dev string) (n uint64) {
	t.Helper()
	text, err := h.ReadProcNet("dev")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(text) {
		name, rest, _ := strings.Cut(strings.TrimSpace(line), ":")
		if f := strings.Fields(rest); name == dev && len(f) > 1 {
			if _, err := fmt.Sscan(f[1], &n); err != nil {
				t.Fatal(err)
			}
			return n
		}
	}
	t.Fatalf("%s has no device %s", h.Name(), dev)
	return 0
}

// dropsIn sums the packets that the rules of a chain have dropped.
func dropsIn(t *testing.T, h *lab.Host, chain string) (sum uint64) {
	t.Helper()
	in := false
	for line := range strings.Lines(ruleset(t, h)) {
		f := strings.Fields(line)
		switch {
		case len(f) > 1 && f[0] == "chain":
			in = f[1] == chain
		case in && slices.Contains(f, "drop"):
			var n uint64
			if i := slices.Index(f, "packets"); i > 0 {
				_, _ = fmt.Sscan(f[i+1], &n)
			}
			sum += n
		}
	}
	return sum
}
