package demo

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/tulle-net/tulle/internal/lab"
)

// found builds the lab and starts the cluster's first node.
func (d *demo) found(ctx context.Context) error {
	d.why("Each host is a network namespace with one cable to a switch, and no other way\nto the others. In each runs a real `tulle up`, a process of its own. The first one\nmakes a cluster: a CA, keys, and a certificate for itself. Encryption is the default.")
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
		d.nodes = append(d.nodes, newNode(d.lab, d.sw, h, i+1))
	}
	first := d.nodes[0]
	if err := first.start(d.Exe); err != nil {
		return err
	}
	d.fact("host1$ tulle %s", strings.Join(shorten(first.args), " "))
	if err := d.started(ctx, first); err != nil {
		return err
	}
	s, err := first.status(ctx)
	if err != nil {
		return err
	}
	if !s.Node.Keeper || s.Node.Cluster == "open" {
		return fmt.Errorf("host1 is in cluster %q, keeper %v: want a secure one, and its keeper", s.Node.Cluster, s.Node.Keeper)
	}
	d.fact("host1 is the keeper of cluster %s: it lets others in", s.Node.Cluster)
	return nil
}

// started waits until a node answers, and checks its device.
func (d *demo) started(ctx context.Context, n *node) error {
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
	if link.MTU != mtu {
		return fmt.Errorf("%s's %s has MTU %d, want %d", n.host.Name(), dev, link.MTU, mtu)
	}
	d.fact("%s has the device %s: %s, MTU %d (1500 less 50 bytes of VXLAN and 32 of sealing)", n.host.Name(), dev, n.overlay, link.MTU)
	return nil
}

// admit has host1 make a token, and the other two join with it.
func (d *demo) admit(ctx context.Context) error {
	d.why("A token says whom to talk to and proves that a machine was invited. host2 and host3\nget a certificate for it, by QUIC (TLS 1.3, post-quantum key exchange). From here on a\nsniffer on host1's cable keeps count; its result comes in chapter 5.")
	var err error
	if d.cable, err = watch(d.nodes[0].host, d.sw.Dev()); err != nil {
		return err
	}
	token, err := d.nodes[0].tulle(ctx, d.Exe, "token", "create", "--uses", "2")
	if err != nil {
		return err
	}
	token = strings.TrimSpace(token)
	d.fact("host1$ tulle token create --uses 2")
	d.fact("%s", token)
	for i, n := range d.nodes[1:] {
		if err := n.start(d.Exe, "--token", token); err != nil {
			return err
		}
		if i == 0 {
			d.fact("%s$ tulle %s --token …", n.host.Name(), strings.Join(shorten(n.args), " "))
		} else {
			d.fact("%s$ the same", n.host.Name())
		}
	}
	for _, n := range d.nodes[1:] {
		if err := d.started(ctx, n); err != nil {
			return err
		}
	}
	d.show("One command made a secure cluster, and a token let two more nodes in.")
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
	d.why("The token named host1; nobody was told the rest. By gossip, encrypted, each learns\nwho is there. Each node signs what it says of itself, and shows its overlays to those\nwhose certificate allows to see them.")
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
	d.show("Three nodes, of which two knew only a token, found each other, %.1f s after the demo began.", time.Since(d.narrator.start).Seconds())
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
	d.show("ARP works over the sealed overlay: host1 resolved %s to host2's %s.", b.overlay, mac)
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

// fdb checks what host1's bridge has learnt.
func (d *demo) fdb(ctx context.Context) error {
	d.why("Only a frame to an unknown MAC goes to all hosts. From what arrives, each tulle learns\nwhich MAC lives on which host: its forwarding database, `tulle fdb blue`. For each pair of\nnodes and each overlay there are keys of their own, new ones every two minutes.")
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
	return d.ciphers(ctx)
}

// ciphers checks that host1 has a session with each of the others, and shows
// `tulle peers`.
func (d *demo) ciphers(ctx context.Context) error {
	a := d.nodes[0]
	peers, err := a.peers(ctx)
	if err != nil {
		return err
	}
	var used []string
	for _, other := range d.nodes[1:] {
		p := peers[other.host.Name()]
		if len(p.Sessions) != 1 || p.Sessions[0].Overlay != overlayName || p.Sessions[0].Cipher == "" {
			return fmt.Errorf("host1 has sessions %+v with %s, want one of %s", p.Sessions, other.host.Name(), overlayName)
		}
		used = append(used, p.Sessions[0].Cipher)
	}
	table, err := a.tulle(ctx, d.Exe, "peers")
	if err != nil {
		return err
	}
	d.fact("host1$ tulle peers")
	d.line("%s", indent(strings.TrimSpace(table)))
	slices.Sort(used)
	d.show("host1 has a sealed session of its own with each of the others: %s.", strings.Join(slices.Compact(used), " and "))
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
