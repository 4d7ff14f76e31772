package demo

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"time"

	"github.com/tulle-net/tulle/internal/lab"
)

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
	d.why("The same command again on host3, without the token: its certificate and its keys are\nin its state folder. Its MAC comes from its address, so the ARP entries that the others\nstill have stay right.")
	took, err := d.bringBack(ctx, d.nodes[2])
	if err != nil {
		return err
	}
	d.show("A host that comes back is in again without a token: pings pass %.1f s after its start.", took.Seconds())
	return nil
}

// bringBack starts a node of a host other than host1 again, and waits until the
// others see it and a ping from host1 reaches it.
func (d *demo) bringBack(ctx context.Context, n *node) (time.Duration, error) {
	first, name := d.nodes[0], n.host.Name()
	cached, err := first.host.Neighbour(dev, n.overlay)
	if err != nil {
		return 0, err
	}
	start := time.Now()
	if err := n.start(d.Exe); err != nil {
		return 0, err
	}
	for _, o := range d.nodes {
		if o == n {
			continue
		}
		err := n.await(ctx, 15*time.Second, o.host.Name()+" sees "+name+" again", func() (bool, error) {
			s, err := o.sees(ctx, name)
			return s == "alive", err
		})
		if err != nil {
			return 0, err
		}
		d.fact("%s: %s is alive", o.host.Name(), name)
	}
	if _, err := first.host.WaitPing(within(ctx, 10*time.Second), n.overlay); err != nil {
		return 0, err
	}
	took := time.Since(start)
	d.fact("host1 -> %s: a ping passes again", name)
	link, _, err := n.host.Link(dev)
	if err != nil {
		return 0, err
	}
	if cached != "" && cached != link.MAC {
		return 0, fmt.Errorf("%s's MAC was %s and is now %s", name, cached, link.MAC)
	}
	return took, nil
}

// leave stops host2 politely, and starts it again.
func (d *demo) leave(ctx context.Context) error {
	d.why("SIGTERM, as systemd sends it: now host2 says goodbye, and nobody has to guess.\nThen it is started again, for the last chapter.")
	n := d.nodes[1]
	start := time.Now()
	stopped := make(chan error, 1)
	go func() { stopped <- n.proc.Stop(10 * time.Second) }()
	var slowest time.Duration
	for _, o := range []*node{d.nodes[0], d.nodes[2]} {
		err := o.await(ctx, 10*time.Second, o.host.Name()+" knows", func() (bool, error) {
			s, err := o.sees(ctx, n.host.Name())
			return err == nil && s != "alive", err
		})
		if err != nil {
			return errors.Join(err, <-stopped)
		}
		slowest = time.Since(start)
		d.fact("%s: host2 has left (%.2f s after SIGTERM)", o.host.Name(), slowest.Seconds())
	}
	if err := <-stopped; err != nil {
		return fmt.Errorf("host2's tulle: %w", err)
	}
	if slowest > time.Second {
		return fmt.Errorf("the others knew only after %.1f s", slowest.Seconds())
	}
	d.show("A host that is stopped says goodbye: the others knew %.2f s after SIGTERM.", slowest.Seconds())
	_, err := d.bringBack(ctx, n)
	return err
}

// silence is how long nothing of a revoked node may come through.
const silence = time.Second

// revoke throws host3 out while it runs.
func (d *demo) revoke(ctx context.Context) error {
	d.why("host3 was stolen. host1 takes its certificate back: every node closes its sessions with\nhost3, and gossip goes on under a new key. host3's tulle runs on, and pings host1.")
	a, b, victim := d.nodes[0], d.nodes[1], d.nodes[2]
	name := victim.host.Name()
	if _, err := victim.host.WaitPing(within(ctx, 5*time.Second), a.overlay); err != nil {
		return fmt.Errorf("before: %w", err)
	}
	start := time.Now()
	if _, err := a.tulle(ctx, d.Exe, "node", "revoke", name); err != nil {
		return err
	}
	d.fact("host1$ tulle node revoke host3    (done after %.2f s)", time.Since(start).Seconds())
	for _, o := range []*node{a, b} {
		err := o.await(ctx, 5*time.Second, o.host.Name()+" drops "+name, func() (bool, error) {
			s, err := o.sees(ctx, name)
			return err == nil && s != "alive", err
		})
		if err != nil {
			return err
		}
	}
	took := time.Since(start)
	d.fact("host1, host2: host3 is no member any more (%.2f s after the command began)", took.Seconds())
	lostTo := make(chan error, 2)
	for _, o := range []*node{a, b} {
		go func() { lostTo <- unanswered(ctx, victim.host, o.overlay) }()
	}
	rtts, lost, err := pings(ctx, a.host, b.overlay, 20)
	if err = errors.Join(err, <-lostTo, <-lostTo); err != nil {
		return err
	}
	if took > 5*time.Second {
		return fmt.Errorf("it took %.1f s, more than 5", took.Seconds())
	}
	if lost > 0 {
		return fmt.Errorf("of %d pings between host1 and host2 meanwhile, %d were lost", len(rtts)+lost, lost)
	}
	d.fact("host3 -> host1, host2: no ping is answered for %s; host1 -> host2: %d of %d are", silence, len(rtts), len(rtts))
	d.show("A node that is revoked is cut off: %.1f s later nothing of it came through; the others went on.", took.Seconds())
	return nil
}

// unanswered pings for the time of silence, and fails when a reply comes.
func unanswered(ctx context.Context, from *lab.Host, to netip.Addr) error {
	p, err := from.NewPinger(to, lab.PingOptions{})
	if err != nil {
		return err
	}
	defer p.Close()
	for end := time.Now().Add(silence); time.Now().Before(end); {
		_, err := p.Ping(within(ctx, silence/4))
		switch {
		case err == nil:
			return fmt.Errorf("%s still answers %s", to, from.Name())
		case ctx.Err() != nil:
			return ctx.Err()
		case !isLoss(err):
			return err
		}
	}
	return nil
}
