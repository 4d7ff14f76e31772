package e2e

import (
	"bytes"
	bin "encoding/binary"
	"fmt"
	"net/netip"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/tulle-net/tulle/crypto"
	"github.com/tulle-net/tulle/ether"
	"github.com/tulle-net/tulle/internal/lab"
	"github.com/tulle-net/tulle/node"
	"github.com/tulle-net/tulle/vxlan"
)

// What the tests of sealed overlays share: a secure cluster, its sessions as a
// node tells them, and what passes on the underlay.

// sealedName is the overlay of a sealedCluster: long enough not to come up in
// random bytes by chance.
const sealedName = "tenant-blue"

// sealed is a secure cluster whose nodes carry the overlay sealedName, VNI 100.
type sealed struct {
	t     *testing.T
	l     *lab.Lab
	sw    *lab.Switch
	nodes []*tulle
}

// sealedOverlay returns the --overlay value for host number i.
func sealedOverlay(i int, more ...string) string {
	return strings.Join(append([]string{"name=" + sealedName + ",vni=100,tap=blue0", fmt.Sprintf("address=10.32.0.%d/16", i)}, more...), ",")
}

// sealedCluster starts a secure cluster on n hosts; the first node makes it.
func sealedCluster(t *testing.T, n int, u lab.Underlay, more ...string) *sealed {
	t.Helper()
	l, sw, h := hosts(t, n, u)
	s := &sealed{t: t, l: l, sw: sw}
	for i := range h {
		s.start(h[i], sealedOverlay(i+1, more...))
	}
	return s
}

// start adds a node with these overlays and further arguments.
func (s *sealed) start(h *lab.Host, overlay string, args ...string) *tulle {
	s.t.Helper()
	args = append(args, "--overlay", overlay)
	if len(s.nodes) > 0 {
		args = append(args, "--token", s.nodes[0].sealedToken())
	}
	n := up(s.t, s.l, h, args...)
	s.nodes = append(s.nodes, n)
	return n
}

// tulle runs a command of the binary against the node and returns its stdout.
func (n *tulle) tulle(args ...string) string {
	n.t.Helper()
	var out, errs bytes.Buffer
	cmd := exec.Command(binary, append(args, "--socket", n.sock)...)
	cmd.Stdout, cmd.Stderr = &out, &errs
	p, err := n.host.Start(cmd)
	if err != nil {
		n.t.Fatal(err)
	}
	if err := p.Wait(); err != nil {
		n.t.Fatalf("%s: tulle %s: %v\n%s", n.name, strings.Join(args, " "), err, errs.String())
	}
	return out.String()
}

// sealedToken makes a token; overlays are what it grants, all if there are none.
func (n *tulle) sealedToken(overlays ...string) string {
	n.t.Helper()
	args := []string{"token", "create", "--uses", "10"}
	if len(overlays) > 0 {
		args = append(args, "--overlays", strings.Join(overlays, ","))
	}
	return strings.TrimSpace(n.tulle(args...))
}

// session returns what n says of its session with a peer; false: there is none.
func (n *tulle) session(peer, overlay string) (node.SessionStatus, bool) {
	n.t.Helper()
	var p node.Peers
	if err := n.try("/v1/peers", &p); err != nil {
		n.t.Fatal(err)
	}
	for _, m := range p.Peers {
		for _, s := range m.Sessions {
			if m.Name == peer && s.Overlay == overlay {
				return s, s.Cipher != ""
			}
		}
	}
	return node.SessionStatus{}, false
}

// meet waits until all nodes have sessions with all others.
func (s *sealed) meet() {
	s.t.Helper()
	for _, n := range s.nodes {
		for _, m := range s.nodes {
			if n != m {
				n.eventually(20*time.Second, "a session with "+m.name, func() bool { _, ok := n.session(m.name, sealedName); return ok })
			}
		}
	}
}

// dropped returns one of a node's drop counters.
func (n *tulle) dropped(reason string) uint64 {
	n.t.Helper()
	count, ok := n.status().Drops[reason]
	if !ok {
		n.t.Fatalf("%s: there is no drop %s", n.name, reason)
	}
	return count
}

// undisturbed fails the test where a node has dropped something other than what
// TCP loses by itself, and the plaintext or the sessions that a start may leave.
func (s *sealed) undisturbed() {
	s.t.Helper()
	for _, n := range s.nodes {
		for reason, count := range n.status().Drops {
			if count != 0 && !expected(reason, count) {
				s.t.Errorf("%s: drop %s = %d, want 0", n.name, reason, count)
			}
		}
	}
}

// onWire is a UDP datagram on the underlay.
type onWire struct {
	src, dst netip.AddrPort
	payload  []byte
}

// outerUDP returns the datagram in a frame of the underlay, which may have IPv4
// or IPv6 without options.
func outerUDP(frame []byte) (d onWire, ok bool) {
	h, ok := ether.ParseHeaders(frame)
	if !ok || h.Proto != ether.ProtoUDP {
		return d, false
	}
	udp := frame[h.L4:h.End]
	if len(udp) < 8 {
		return d, false
	}
	ip := frame[h.L3:]
	src, dst := ip[12:16], ip[16:20]
	if ip[0]>>4 == 6 {
		src, dst = ip[8:24], ip[24:40]
	}
	from, _ := netip.AddrFromSlice(src)
	to, _ := netip.AddrFromSlice(dst)
	return onWire{
		netip.AddrPortFrom(from, bin.BigEndian.Uint16(udp)), netip.AddrPortFrom(to, bin.BigEndian.Uint16(udp[2:])), udp[8:],
	}, true
}

// datagrams returns what a capture of the underlay has of the data port so far.
func (c *fastCapture) datagrams() []onWire {
	c.mu.Lock()
	defer c.mu.Unlock()
	var ds []onWire
	for _, f := range c.frames {
		if d, ok := outerUDP(f); ok && d.dst.Port() == vxlan.Port {
			ds = append(ds, d)
		}
	}
	return ds
}

// sealedOnly returns the sealed ones, and fails the test when there is anything
// but these and QUIC.
func (c *fastCapture) sealedOnly() (ds []onWire) {
	c.t.Helper()
	quic := 0
	c.settled()
	for _, d := range c.datagrams() {
		switch {
		case len(d.payload) >= crypto.SealedOverhead && d.payload[0] == crypto.SealedByte:
			ds = append(ds, d)
		case len(d.payload) > 0 && d.payload[0]&0x40 != 0:
			quic++
		default:
			c.t.Errorf("%s → %s: neither sealed nor QUIC: %x", d.src, d.dst, d.payload[:min(len(d.payload), 64)])
		}
	}
	c.t.Logf("on the underlay: %d sealed datagrams, %d of QUIC", len(ds), quic)
	return ds
}

// hides fails the test when one of the secrets is in any frame of the capture,
// whatever port it is for.
func (c *fastCapture) hides(secrets ...[]byte) {
	c.t.Helper()
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err != nil {
		c.t.Error(c.err)
	}
	for _, f := range c.frames {
		for _, s := range secrets {
			if at := bytes.Index(f, s); at >= 0 {
				c.t.Errorf("%x stands in clear at %d of a frame of %d bytes on the underlay: %x", s, at, len(f), f[:min(len(f), 128)])
				return
			}
		}
	}
}

// settled waits until the capture has what has passed so far.
func (c *fastCapture) settled() {
	for was := -1; ; time.Sleep(50 * time.Millisecond) {
		c.mu.Lock()
		now := len(c.frames)
		c.mu.Unlock()
		if now == was {
			return
		}
		was = now
	}
}

// has reports whether any frame of the capture has these bytes.
func (c *fastCapture) has(b []byte) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, f := range c.frames {
		if bytes.Contains(f, b) {
			return true
		}
	}
	return false
}

// innerSecrets are the bytes of the hosts' inner frames that no underlay may
// show: their MACs, their addresses two and two, and the overlay's name. (Four
// bytes alone come up in random ones.)
func innerSecrets(n int) (out [][]byte) {
	for i := 1; i <= n; i++ {
		mac := make([]byte, 6)
		ether.MACOf(address(i)).Put(mac)
		out = append(out, mac)
		for j := 1; j <= n; j++ {
			a, b := address(i).As4(), address(j).As4()
			out = append(out, append(a[:], b[:]...))
		}
	}
	return append(out, []byte(sealedName))
}
