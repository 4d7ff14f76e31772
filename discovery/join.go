package discovery

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/serf/serf"
)

const (
	// A node that knows nobody tries at once, and then after aloneRetryMin,
	// doubled up to aloneRetryMax.
	aloneRetryMin = 100 * time.Millisecond
	aloneRetryMax = 5 * time.Second
	// A node that lacks some members tries after splitRetryMin, doubled up to
	// rejoinEvery: Serf itself does not heal a long partition.
	splitRetryMin = time.Second
	rejoinEvery   = time.Minute
	// repeatAfter is when a node of a secure cluster that joined says once more
	// where it is. Of ten nodes that start at the same time about one in a
	// hundred pairs miss each other's record, which push/pull would show them
	// only after up to pushPullInterval; a node that moved should be found sooner.
	repeatAfter = 2 * time.Second
	// gatherFor is how long changes of the members are gathered.
	gatherFor = 200 * time.Millisecond
	// remindEvery is how often a join that still fails is logged again.
	remindEvery = time.Minute
	// knockTimeout and maxKnocks bound the look whether an address answers.
	knockTimeout = 2 * time.Second
	maxKnocks    = 16
	// resolveTimeout bounds one look-up of a seed's name.
	resolveTimeout = 3 * time.Second
)

// seed is the address of a node to join.
type seed struct {
	host string
	port uint16
	ip   netip.Addr // the host, if it is an address
}

// parseSeed splits HOST[:PORT]; an IPv6 address may be without brackets if it
// is without a port. What a host may be is the matter of who takes the setting.
func parseSeed(text string) (seed, error) {
	s := seed{host: strings.Trim(text, "[]"), port: DefaultPort}
	if _, err := netip.ParseAddr(s.host); err != nil && strings.Contains(text, ":") {
		host, number, err := net.SplitHostPort(text)
		n, portErr := strconv.ParseUint(number, 10, 16)
		if err != nil || portErr != nil || n == 0 {
			return seed{}, fmt.Errorf("discovery: cannot join %q: use HOST or HOST:PORT", text)
		}
		s.host, s.port = host, uint16(n)
	}
	if s.host == "" {
		return seed{}, fmt.Errorf("discovery: cannot join %q: use HOST or HOST:PORT", text)
	}
	if ip, err := netip.ParseAddr(s.host); err == nil {
		s.ip = ip.Unmap()
	}
	return s, nil
}

// need is how badly a node has to join.
type need int

const (
	settled need = iota
	split        // a seed or a known member is not among the alive
	alone        // nobody else is alive
)

// known is a member as the decision to join sees it.
type known struct {
	gossip netip.AddrPort
	status Status
}

// rejoin decides whom to join: the seeds that are not alive members and the
// last addresses of failed members; a node that is alone tries also those
// that it remembers from before its start. self is never among them.
func rejoin(self netip.AddrPort, seeds, remembered []netip.AddrPort, members []known) (need, []netip.AddrPort) {
	alive := map[netip.AddrPort]bool{self: true}
	others := false
	for _, m := range members {
		if m.status == Alive {
			alive[m.gossip] = true
			others = true
		}
	}
	var targets []netip.AddrPort
	add := func(a netip.AddrPort) {
		if !alive[a] && !slices.Contains(targets, a) {
			targets = append(targets, a)
		}
	}
	for _, a := range seeds {
		add(a)
	}
	for _, m := range members {
		if m.status == Failed {
			add(m.gossip)
		}
	}
	switch {
	case !others:
		for _, a := range remembered {
			add(a)
		}
		return alone, targets
	case len(targets) > 0:
		return split, targets
	}
	return settled, nil
}

// joiner is keepJoined's state.
type joiner struct {
	d     *Discovery
	s     *serf.Serf
	state memory
	seeds []netip.AddrPort // as last resolved
	was   need
	last  []netip.AddrPort // targets
	wait  backoff
	next  time.Time // of the next try
	since time.Time // when joining was last reported to fail; zero: it did not
	again time.Time // when to say once more where this node is; zero: no need
	hurry bool      // the network may be back
	begun bool      // it has looked once
}

// keepJoined joins at once, and whenever it is needed, until ctx ends.
func (d *Discovery) keepJoined(ctx context.Context, s *serf.Serf) {
	j := &joiner{d: d, s: s, was: settled, state: openMemory(d.cfg.StateDir, d.log)}
	for ctx.Err() == nil {
		if j.hurry = d.hurry.Swap(false); j.hurry {
			j.next, j.was = time.Now(), settled // and from the shortest pause on
		}
		j.step(ctx)
		j.reclaim()
		wake := j.next
		if !j.again.IsZero() && j.again.Before(wake) {
			wake = j.again
		}
		t := time.NewTimer(time.Until(wake))
		select {
		case <-t.C:
		case <-d.kick:
			j.gather(ctx)
		case <-ctx.Done():
		}
		t.Stop()
	}
}

// gather waits for more changes where nobody is missed: each look goes through all
// members, and when many start their changes come by the hundred.
func (j *joiner) gather(ctx context.Context) {
	if j.was != settled || j.d.hurry.Load() {
		return
	}
	t := time.NewTimer(gatherFor)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
}

// Rejoin has this node look for who it lacks now, because the network may be back, and
// pulls and joins that failed be tried again without a pause.
func (d *Discovery) Rejoin() {
	d.hurry.Store(true)
	ring(d.kick)
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, p := range d.peers {
		ring(p.wake)
	}
}

// step tries to join if it is time to.
func (j *joiner) step(ctx context.Context) {
	members := j.members()
	j.state.save(members)
	due := !time.Now().Before(j.next)
	var resolveErr error
	if due {
		resolveErr = j.resolve(ctx)
	}
	now, targets := rejoin(j.d.self, j.seeds, j.state.remembered, knownOf(members))
	if all := j.greet(now); len(all) > 0 {
		_ = j.try(ctx, all) // whom it does not reach is looked for as ever
	}
	if j.turn(now, targets) {
		return
	}
	if !due && time.Now().Before(j.next) {
		return
	}
	finds := now != settled && j.d.cfg.Secure != nil && j.d.cfg.Secure.Find != nil
	if finds {
		_, found := rejoin(j.d.self, append(j.d.find(ctx), j.seeds...), j.state.remembered, knownOf(members))
		targets = found
	}
	if len(targets) == 0 && resolveErr == nil {
		j.next = time.Now().Add(rejoinEvery)
		if finds {
			j.next = time.Now().Add(j.wait.next())
		}
		return
	}
	err := errors.Join(resolveErr, j.try(ctx, targets))
	j.next = time.Now().Add(j.wait.next())
	if now == alone && err != nil && ctx.Err() == nil {
		j.report(err)
	}
}

// greet returns whom a node joins with its first look although it is not alone. Somebody's
// gossip was faster than its first join, which tells of all: a node that was killed is
// still gossiped to, and would learn of the others at push/pull only.
func (j *joiner) greet(now need) (all []netip.AddrPort) {
	if !j.begun && now != alone {
		_, all = rejoin(j.d.self, j.seeds, j.state.remembered, nil)
	}
	j.begun = true
	return all
}

// reclaim says once more where this node is when it came back at another
// address: for the first reclaimAfter after they saw it fail, others do not
// take that in, and this node cannot know.
func (j *joiner) reclaim() {
	if j.d.names.reclaims.Swap(false) {
		j.again = time.Now().Add(reclaimAfter * 3 / 2)
	}
	if !j.again.IsZero() && !time.Now().Before(j.again) {
		j.again = time.Time{}
		if err := j.d.Announce(); err != nil {
			j.d.log.Warn("others hear later where this node is", "err", err)
		}
	}
}

// turn sets the pace where the need or the targets are new, and reports
// whether there is nothing to do until j.next.
func (j *joiner) turn(now need, targets []netip.AddrPort) bool {
	fresh := slices.ContainsFunc(targets, func(a netip.AddrPort) bool { return !slices.Contains(j.last, a) })
	was := j.was
	j.was, j.last = now, targets
	if now == was && !(now == split && fresh) {
		return false
	}
	switch now {
	case settled:
		j.next = time.Now().Add(rejoinEvery)
	case split:
		j.wait = backoff{min: splitRetryMin, max: rejoinEvery}
		j.next = time.Now()
		if !j.hurry {
			j.next = j.next.Add(j.wait.next())
		}
	case alone:
		j.wait = backoff{min: aloneRetryMin, max: aloneRetryMax}
		j.next = time.Now()
		return false
	}
	if was == alone {
		j.d.log.Info("joined the cluster")
		j.since = time.Time{}
	}
	return true
}

// try joins those of targets that answer. Its error says why it did not reach
// some of them, or is nil if it reached one.
func (j *joiner) try(ctx context.Context, targets []netip.AddrPort) error {
	answer, err := j.d.knock(ctx, targets)
	if len(answer) == 0 {
		return err
	}
	// Old events are ignored: they are frames of long ago.
	n, err := j.s.Join(answer, true)
	if n == 0 {
		if j.d.cfg.Secure != nil {
			err = errors.Join(err, j.d.unlike(ctx, answer))
		}
		return err
	}
	j.d.names.forget()
	if j.d.cfg.Secure != nil {
		j.again = time.Now().Add(repeatAfter)
	}
	j.d.log.Debug("joined", "peer", answer)
	return nil
}

// unlike asks those that did not let this node, a secure one, in whether that is
// because they are open.
func (d *Discovery) unlike(ctx context.Context, at []string) error {
	ctx, cancel := context.WithTimeout(ctx, 2*knockTimeout)
	defer cancel()
	var errs []error
	for _, s := range at[:min(len(at), maxKnocks)] {
		a, err := netip.ParseAddrPort(s)
		if err != nil {
			continue
		}
		if secure, err := probe(ctx, d.port.dial, a); err == nil && !secure {
			errs = append(errs, d.seen.note(d.otherKind(s)))
		}
	}
	return errors.Join(errs...)
}

// knock returns those addresses at which TCP connects, to a node that is not
// known to be of the other kind: Serf tries one after the other, and would wait
// long for each that is gone.
func (d *Discovery) knock(ctx context.Context, targets []netip.AddrPort) ([]string, error) {
	errs := make([]error, len(targets))
	slot := make(chan struct{}, maxKnocks)
	var wg sync.WaitGroup
	for i, a := range targets {
		slot <- struct{}{}
		wg.Go(func() {
			defer func() { <-slot }()
			connect, cancel := context.WithTimeout(ctx, knockTimeout)
			defer cancel()
			c, err := d.port.dial(connect, a.String())
			if err != nil {
				errs[i] = err
				return
			}
			// A secure node would not let this one in, and need not be bothered.
			if d.cfg.Secure == nil {
				ask, cancel := context.WithTimeout(ctx, knockTimeout)
				// What does not answer may be of a release of before.
				if secure, err := kindOf(ask, c, wantKind); err == nil && secure {
					errs[i] = d.seen.note(d.otherKind(a.String()))
				}
				cancel()
			}
			_ = c.Close()
		})
	}
	wg.Wait()
	var answer []string
	for i, a := range targets {
		if errs[i] == nil {
			answer = append(answer, a.String())
		}
	}
	return answer, errors.Join(errs...)
}

// report logs that this node is alone: at once and then now and then.
func (j *joiner) report(err error) {
	if !j.since.IsZero() && time.Since(j.since) < remindEvery {
		return
	}
	j.since = time.Now()
	// One line: joined errors have several.
	text := strings.Join(strings.Fields(err.Error()), " ")
	if len(j.d.seeds) == 0 {
		j.d.log.Info("no known member answers yet; trying on", "err", text)
		return
	}
	j.d.log.Warn("cannot join yet; trying on", "err", text)
}

// resolve looks the seeds up. A name that cannot be resolved now keeps nothing:
// its nodes are then reached as members, or later.
func (j *joiner) resolve(ctx context.Context) error {
	var errs []error
	var out []netip.AddrPort
	for _, s := range j.d.seeds {
		ips := []netip.Addr{s.ip}
		if !s.ip.IsValid() {
			lookup, cancel := context.WithTimeout(ctx, resolveTimeout)
			var err error
			ips, err = net.DefaultResolver.LookupNetIP(lookup, "ip", s.host)
			cancel()
			if err != nil {
				errs = append(errs, err)
			}
		}
		for _, ip := range ips {
			a := netip.AddrPortFrom(ip.Unmap(), s.port)
			if !j.d.isSelf(a) {
				out = append(out, a)
			}
		}
	}
	j.seeds = out
	return errors.Join(errs...)
}

// isSelf reports whether a is this node's own gossip port: all nodes of a
// cluster may have been given the same seeds.
func (d *Discovery) isSelf(a netip.AddrPort) bool {
	if a == d.self {
		return true
	}
	if a.Port() != d.self.Port() {
		return false
	}
	if l := d.cfg.Listen.Addr(); !l.IsUnspecified() {
		return a.Addr() == l
	}
	own, err := net.InterfaceAddrs()
	if err != nil {
		return false
	}
	for _, n := range own {
		if p, ok := n.(*net.IPNet); ok {
			if ip, ok := netip.AddrFromSlice(p.IP); ok && ip.Unmap() == a.Addr() {
				return true
			}
		}
	}
	return false
}

// members returns the other members.
func (j *joiner) members() []serf.Member { return j.d.others(j.s, nil) }

func knownOf(members []serf.Member) []known {
	out := make([]known, 0, len(members))
	for _, m := range members {
		k := known{gossip: gossipAddr(m.Addr, m.Port), status: Alive}
		switch m.Status {
		case serf.StatusFailed:
			k.status = Failed
		case serf.StatusLeft:
			k.status = Left
		}
		out = append(out, k)
	}
	return out
}

// backoff doubles from min to max, each with a quarter more or less.
type backoff struct {
	min, max time.Duration
	last     time.Duration
}

func (b *backoff) next() time.Duration {
	b.last = min(max(2*b.last, b.min), b.max)
	jitter := time.Duration(rand.Int64N(int64(b.last)/2 + 1))
	return min(b.last*3/4+jitter, b.max)
}

func (b *backoff) reset() { b.last = 0 }
