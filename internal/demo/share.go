package demo

import (
	"context"
	"fmt"
	"net/netip"
	"strings"
	"time"
)

// sharedName is the overlay that the demo makes while the cluster runs.
const sharedName = "green"

// share makes a shared overlay on one node and puts all hosts on it.
func (d *demo) share(ctx context.Context) error {
	d.why("Until here each host was told its overlay and its address. A shared overlay is made\nonce, on any node: its definition is in the keepers' store, and each node leases a block\nof addresses, from which it gives out its own without asking anybody.")
	start := time.Now()
	if _, err := d.nodes[1].tulle(ctx, d.Exe, "overlay", "create", sharedName); err != nil {
		return err
	}
	d.fact("host2$ tulle overlay create %s", sharedName)
	var addrs []netip.Addr
	for _, n := range d.nodes {
		out, err := n.tulle(ctx, d.Exe, "expose", sharedName)
		if err != nil {
			return err
		}
		p, err := netip.ParsePrefix(strings.TrimSpace(out))
		if err != nil {
			return fmt.Errorf("tulle expose on %s prints %q, want an address with its prefix length", n.host.Name(), out)
		}
		d.fact("%s$ tulle expose %s", n.host.Name(), sharedName)
		d.fact("%s", p)
		addrs = append(addrs, p.Addr())
	}
	for i, from := range d.nodes {
		for j, to := range addrs {
			if i == j {
				continue
			}
			if _, err := from.host.WaitPing(within(ctx, 5*time.Second), to); err != nil {
				return fmt.Errorf("%s to %s: %w", from.host.Name(), to, err)
			}
		}
	}
	took := time.Since(start)
	table, err := d.nodes[0].tulle(ctx, d.Exe, "ipam")
	if err != nil {
		return err
	}
	d.fact("host1$ tulle ipam")
	d.line("%s", indent(strings.TrimSpace(table)))
	d.show("An overlay made once, on host2, had all three hosts on it and reaching each other after %.1f s, with addresses that Tulle chose.", took.Seconds())
	return nil
}
