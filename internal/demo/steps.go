package demo

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/tulle-net/tulle/internal/lab"
)

// startAll builds the lab and starts a node in each host.
func (d *demo) startAll(ctx context.Context) error {
	d.why("Each host is a network namespace with one cable to a switch, and no other way\nto the others. In each runs a real `tulle up`, a process of its own.")
	var hosts []*lab.Host
	for i := range 3 {
		h, err := d.lab.AddHost(fmt.Sprintf("host%d", i+1))
		if err != nil {
			return err
		}
		hosts = append(hosts, h)
	}
	var err error
	if d.sw, err = d.lab.AddSwitch("ul", lab.Underlay{Prefix4: underlayNet}, hosts...); err != nil {
		return err
	}
	for i, h := range hosts {
		seed := ""
		if i > 0 {
			seed = d.nodes[0].underlay.String()
		}
		n := newNode(d.lab, d.sw, h, i+1, seed)
		d.nodes = append(d.nodes, n)
		if err := n.start(d.Exe); err != nil {
			return err
		}
		if i == 0 {
			d.fact("host1$ tulle %s", strings.Join(shorten(n.args), " "))
		} else {
			d.fact("%s$ the same, and --join %s", h.Name(), seed)
		}
	}
	for _, n := range d.nodes {
		err := n.await(ctx, 10*time.Second, n.host.Name()+" answers on its socket", func() (bool, error) {
			_, err := n.peers(ctx)
			return err == nil, err
		})
		if err != nil {
			return err
		}
		link, ok, err := n.host.Link(dev)
		if err != nil {
			return err
		}
		if !ok {
			return fmt.Errorf("%s has no device %s", n.host.Name(), dev)
		}
		if link.MTU != 1450 {
			return fmt.Errorf("%s's %s has MTU %d, want 1450", n.host.Name(), dev, link.MTU)
		}
		d.fact("%s has the device %s: %s, MTU %d (1500 less VXLAN's 50 bytes)", n.host.Name(), dev, n.overlay, link.MTU)
	}
	return nil
}

// shorten leaves out what only the demo needs.
func shorten(args []string) (out []string) {
	for i := 0; i < len(args); i++ {
		if args[i] == "--state-dir" || args[i] == "--socket" {
			i++
			continue
		}
		out = append(out, args[i])
	}
	return out
}

// discover waits until each node sees both others with their overlay.
func (d *demo) discover(ctx context.Context) error {
	d.why("host2 and host3 were told host1's address; nobody was told the rest. By gossip\neach learns who is there, at which address, and with which overlays.")
	for _, n := range d.nodes {
		for _, other := range d.nodes {
			if n == other {
				continue
			}
			name := other.host.Name()
			var p peer
			err := n.await(ctx, 15*time.Second, n.host.Name()+" sees "+name, func() (bool, error) {
				peers, err := n.peers(ctx)
				p = peers[name]
				return p.Status == "alive" && slices.Contains(p.Overlays, overlayName), err
			})
			if err != nil {
				return err
			}
			if want := netip.AddrPortFrom(other.underlay, udpPort).String(); p.VTEP != want {
				return fmt.Errorf("%s sees %s at %s, want %s", n.host.Name(), name, p.VTEP, want)
			}
			d.fact("%s sees %s: %s, at %s, overlays %v", n.host.Name(), name, p.Status, p.VTEP, p.Overlays)
		}
	}
	d.show("Three nodes that knew one address found each other, %.1f s after the demo began.", time.Since(d.narrator.start).Seconds())
	return nil
}

// ping checks ARP and the round trip between all pairs.
func (d *demo) ping(ctx context.Context) error {
	d.why("host1 wants to reach 10.32.0.2 and asks \"who has it?\" (ARP), a broadcast: tulle\nsends it to every host of the overlay. host2 answers; then the ping goes straight there.")
	a, b := d.nodes[0], d.nodes[1]
	first, err := a.host.WaitPing(within(ctx, 5*time.Second), b.overlay)
	if err != nil {
		return err
	}
	link, _, err := b.host.Link(dev)
	if err != nil {
		return err
	}
	mac, err := a.host.Neighbour(dev, b.overlay)
	if err != nil {
		return err
	}
	if mac == "" || mac != link.MAC {
		return fmt.Errorf("host1 resolved %s to %q, but host2's %s has %s", b.overlay, mac, dev, link.MAC)
	}
	d.fact("host1: %s is at %s, which is the MAC of host2's %s", b.overlay, mac, dev)
	d.fact("host1: first ping, with the ARP question: %s", ms(first))
	d.show("ARP works over the overlay: host1 resolved %s to host2's %s.", b.overlay, mac)
	var all []time.Duration
	for i, from := range d.nodes {
		for _, to := range d.nodes[i+1:] {
			rtts, lost, err := pings(ctx, from.host, to.overlay, 20)
			if err != nil {
				return err
			}
			if lost > 0 {
				return fmt.Errorf("%s to %s: %d of 20 pings lost", from.host.Name(), to.host.Name(), lost)
			}
			d.fact("%s -> %s: 20 pings, 20 replies, median %s", from.host.Name(), to.host.Name(), ms(median(rtts)))
			all = append(all, rtts...)
		}
	}
	plain, _, err := pings(ctx, a.host, b.underlay, 20)
	if err != nil {
		return err
	}
	d.fact("for comparison, over the bare underlay: median %s", ms(median(plain)))
	d.show("Ping works between all three, none of %d lost, median %s.", len(all), ms(median(all)))
	return d.bigPing(ctx, a, b)
}

// bigPing sends a packet that just fits the overlay's MTU, unfragmented.
func (d *demo) bigPing(ctx context.Context, a, b *node) error {
	link, _, err := a.host.Link(dev)
	if err != nil {
		return err
	}
	p, err := a.host.NewPinger(b.overlay, lab.PingOptions{Size: link.MTU - 28, DontFragment: true})
	if err != nil {
		return err
	}
	defer p.Close()
	rtt, err := p.Ping(within(ctx, 2*time.Second))
	if err != nil {
		return fmt.Errorf("a packet of the full %d bytes: %w", link.MTU, err)
	}
	d.fact("host1 -> host2: a packet of the full %d bytes, not to be fragmented: %s", link.MTU, ms(rtt))
	return nil
}

// wire looks at one datagram on host1's cable.
func (d *demo) wire(ctx context.Context) error {
	d.why("A ping's frame, as a sniffer on host1's cable sees it: inside a UDP datagram\nbetween the two hosts, behind the 8 bytes of VXLAN (RFC 7348).")
	a, b := d.nodes[0], d.nodes[1]
	ctx = within(ctx, 5*time.Second)
	var sniffed vxlanDatagram
	result, sniffing := make(chan error, 1), make(chan struct{})
	var once sync.Once
	go func() {
		_, err := a.host.Sniff(ctx, d.sw.Dev(), func() { once.Do(func() { close(sniffing) }) }, func(f []byte) bool {
			var ok bool
			sniffed, ok = parseDatagram(f)
			return ok && sniffed.src == a.underlay && sniffed.innerDst == b.overlay
		})
		once.Do(func() { close(sniffing) })
		result <- err
	}()
	<-sniffing
	if _, err := a.host.Ping(ctx, b.overlay); err != nil {
		return errors.Join(err, <-result)
	}
	if err := <-result; err != nil {
		return err
	}
	s := sniffed
	d.fact("IP     %s -> %s", s.src, s.dst)
	d.fact("UDP    port %d -> %d", s.srcPort, s.dstPort)
	d.fact("VXLAN  % x    flags 08, VNI 0x%06x = %d", s.header, s.vni, s.vni)
	d.fact("frame  %d bytes: %s -> %s", s.innerLen, s.innerSrc, s.innerDst)
	if s.dst != b.underlay || s.header != [8]byte{8, 0, 0, 0, 0, 0, vni, 0} {
		return fmt.Errorf("want VXLAN header 08 00 00 00 00 00 %02x 00 and destination %s", vni, b.underlay)
	}
	d.show("The wire is plain RFC 7348 VXLAN: VNI %d, UDP port %d.", s.vni, s.dstPort)
	return nil
}

// vxlanDatagram is what the demo tells of one.
type vxlanDatagram struct {
	src, dst           netip.Addr
	srcPort, dstPort   uint16
	header             [8]byte
	vni                uint32
	innerSrc, innerDst netip.Addr
	innerLen           int
}

// parseDatagram reads Ethernet, IPv4 without options, UDP to port 4789, VXLAN,
// and in it Ethernet and IPv4.
func parseDatagram(f []byte) (v vxlanDatagram, ok bool) {
	const inner = 14 + 20 + 8 + 8
	if len(f) < inner+14+20 || string(f[12:15]) != "\x08\x00\x45" || f[23] != 17 || string(f[inner+12:inner+14]) != "\x08\x00" {
		return v, false
	}
	v.src, v.dst = netip.AddrFrom4([4]byte(f[26:30])), netip.AddrFrom4([4]byte(f[30:34]))
	v.srcPort, v.dstPort = binary.BigEndian.Uint16(f[34:]), binary.BigEndian.Uint16(f[36:])
	v.header = [8]byte(f[42:50])
	v.vni = binary.BigEndian.Uint32(f[46:]) >> 8
	v.innerSrc, v.innerDst = netip.AddrFrom4([4]byte(f[inner+26:inner+30])), netip.AddrFrom4([4]byte(f[inner+30:inner+34]))
	v.innerLen = len(f) - inner
	return v, v.dstPort == udpPort
}

// fdb checks what host1's bridge has learnt.
func (d *demo) fdb(ctx context.Context) error {
	d.why("Only a frame to an unknown MAC goes to all hosts. From what arrives, each tulle learns\nwhich MAC lives on which host: its forwarding database, `tulle fdb blue`.")
	a := d.nodes[0]
	for _, other := range d.nodes[1:] {
		link, _, err := other.host.Link(dev)
		if err != nil {
			return err
		}
		var e fdbEntry
		want := netip.AddrPortFrom(other.underlay, udpPort).String()
		err = a.await(ctx, 2*time.Second, "host1 knows "+link.MAC, func() (bool, error) {
			table, err := a.fdb(ctx)
			e = table[link.MAC]
			return e.VTEP == want, err
		})
		if err != nil {
			return err
		}
		d.fact("host1: %s is behind %s, which is %s", e.MAC, e.VTEP, e.Peer)
	}
	d.show("host1 learnt behind which host each MAC is.")
	return nil
}

// transfer sends for two seconds.
func (d *demo) transfer(ctx context.Context) error {
	d.why("Random bytes for two seconds from host1 to host2 over one TCP connection; both\nends compute a hash of what they sent and got.")
	a, b := d.nodes[0], d.nodes[1]
	t, err := d.lab.Transfer(within(ctx, 15*time.Second), a.host, b.host, netip.AddrPortFrom(b.overlay, 0), lab.Amount{For: 2 * time.Second})
	if err != nil {
		return err
	}
	mb := float64(t.Bytes) / 1e6
	rate := t.BitsPerSecond()
	d.fact("%.0f MB in %.2f s: %s", mb, t.Took.Seconds(), bits(rate))
	d.fact("hash at both ends: %016x", t.Hash)
	d.show("TCP: %.0f MB at %s, every byte intact.", mb, bits(rate))
	return nil
}

// kill ends host3 the hard way while host1 pings host2.
func (d *demo) kill(ctx context.Context) error {
	d.why("kill -9: host3 cannot say goodbye. The others probe each other all the time and\nmust notice by themselves. Meanwhile host1 pings host2 fifty times a second.")
	a, b, victim := d.nodes[0], d.nodes[1], d.nodes[2]
	stop, stopPings := context.WithCancel(ctx)
	defer stopPings()
	type count struct {
		sent, lost int
		err        error
	}
	counted := make(chan count, 1)
	go func() {
		var c count
		c.sent, c.lost, c.err = pingUntil(stop, a.host, b.overlay, 20*time.Millisecond)
		counted <- c
	}()
	start := time.Now()
	victim.proc.Kill()
	<-victim.proc.Done()
	d.fact("host3's tulle is dead")
	if _, there, err := victim.host.Link(dev); err != nil {
		return err
	} else if there {
		return fmt.Errorf("host3's %s is still there", dev)
	}
	d.fact("host3's device %s went with it", dev)
	var slowest time.Duration
	for _, n := range []*node{a, b} {
		err := n.await(ctx, 15*time.Second, n.host.Name()+" notices", func() (bool, error) {
			s, err := n.sees(ctx, victim.host.Name())
			return err == nil && s != "alive", err
		})
		if err != nil {
			return err
		}
		slowest = time.Since(start)
		d.fact("%s: host3 has failed (%.1f s after the kill)", n.host.Name(), slowest.Seconds())
	}
	stopPings()
	c := <-counted
	if c.err != nil {
		return c.err
	}
	if slowest > 10*time.Second {
		return fmt.Errorf("it took %.1f s, more than 10", slowest.Seconds())
	}
	d.show("A host that dies is noticed by all others: %.1f s after kill -9.", slowest.Seconds())
	d.fact("host1 -> host2 meanwhile: %d pings, %d lost", c.sent, c.lost)
	if c.lost > 0 || c.sent < 10 {
		return fmt.Errorf("of %d pings between the living, %d were lost", c.sent, c.lost)
	}
	d.show("The others go on: %d pings from host1 to host2 meanwhile, none lost.", c.sent)
	return nil
}

// restart brings host3 back.
func (d *demo) restart(ctx context.Context) error {
	d.why("The same command again on host3. Its MAC comes from its address, so the ARP\nentries that the others still have stay right.")
	took, err := d.bringBack(ctx)
	if err != nil {
		return err
	}
	d.show("A host that comes back is in again: pings pass %.1f s after its start.", took.Seconds())
	return nil
}

// bringBack starts host3 again and waits until a ping reaches it.
func (d *demo) bringBack(ctx context.Context) (time.Duration, error) {
	a, b, n := d.nodes[0], d.nodes[1], d.nodes[2]
	cached, err := a.host.Neighbour(dev, n.overlay)
	if err != nil {
		return 0, err
	}
	start := time.Now()
	if err := n.start(d.Exe); err != nil {
		return 0, err
	}
	for _, other := range []*node{a, b} {
		err := n.await(ctx, 15*time.Second, other.host.Name()+" sees host3 again", func() (bool, error) {
			s, err := other.sees(ctx, n.host.Name())
			return s == "alive", err
		})
		if err != nil {
			return 0, err
		}
		d.fact("%s: host3 is alive", other.host.Name())
	}
	if _, err := a.host.WaitPing(within(ctx, 10*time.Second), n.overlay); err != nil {
		return 0, err
	}
	took := time.Since(start)
	d.fact("host1 -> host3: a ping passes again")
	link, _, err := n.host.Link(dev)
	if err != nil {
		return 0, err
	}
	if cached != "" && cached != link.MAC {
		return 0, fmt.Errorf("host3's MAC was %s and is now %s", cached, link.MAC)
	}
	return took, nil
}

// leave stops host3 politely.
func (d *demo) leave(ctx context.Context) error {
	d.why("SIGTERM, as systemd sends it: now host3 says goodbye, and nobody has to guess.")
	n := d.nodes[2]
	start := time.Now()
	stopped := make(chan error, 1)
	go func() { stopped <- n.proc.Stop(10 * time.Second) }()
	var slowest time.Duration
	for _, other := range d.nodes[:2] {
		err := other.await(ctx, 10*time.Second, other.host.Name()+" knows", func() (bool, error) {
			s, err := other.sees(ctx, n.host.Name())
			return err == nil && s != "alive", err
		})
		if err != nil {
			return errors.Join(err, <-stopped)
		}
		slowest = time.Since(start)
		d.fact("%s: host3 has left (%.2f s after SIGTERM)", other.host.Name(), slowest.Seconds())
	}
	if err := <-stopped; err != nil {
		return fmt.Errorf("host3's tulle: %w", err)
	}
	if slowest > time.Second {
		return fmt.Errorf("the others knew only after %.1f s", slowest.Seconds())
	}
	d.show("A host that is stopped says goodbye: the others knew %.2f s after SIGTERM.", slowest.Seconds())
	if !d.Keep {
		return nil
	}
	_, err := d.bringBack(ctx) // for those who want to look around
	return err
}
