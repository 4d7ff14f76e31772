package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/tulle-net/tulle/internal/lab"
)

const underlayDev = "ul"

// side is one of the two hosts.
type side struct {
	*lab.Host
	under netip.Addr
	over  netip.Prefix // for the tunnel to use
}

// rig is two hosts with one peer between them.
type rig struct {
	lab   *lab.Lab
	sides [2]side
	tun   tunnel
	secs  int
}

func newRig(u underlay, secs int) (*rig, error) {
	l, err := lab.New(labPrefix)
	if err != nil {
		return nil, err
	}
	r := &rig{lab: l, secs: secs}
	for i, name := range []string{"a", "b"} {
		if r.sides[i].Host, err = l.AddHost(name); err != nil {
			return nil, errors.Join(err, l.Close())
		}
		r.sides[i].over = netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 88, 0, byte(i + 1)}), 24)
	}
	sw, err := l.AddSwitch(underlayDev, lab.Underlay{Prefix4: netip.MustParsePrefix("10.99.0.0/24"), MTU: 1500,
		DisableIPv6: true, Offloads: u.offloads, Cable: true}, r.sides[0].Host, r.sides[1].Host)
	if err != nil {
		return nil, errors.Join(err, l.Close())
	}
	for i := range r.sides {
		r.sides[i].under = sw.Addr(r.sides[i].Host)
	}
	return r, nil
}

// tunnel is one on a device that has the hosts' tunnel addresses.
func (r *rig) tunnel(dev string) tunnel {
	return tunnel{addrs: [2]netip.Addr{r.sides[0].over.Addr(), r.sides[1].over.Addr()}, dev: dev}
}

// end is where the tests run.
func (r *rig) end(i int) *lab.Host {
	if h := r.tun.ends[i]; h != nil {
		return h
	}
	return r.sides[i].Host
}

// tunnelDevice is that of the first end.
func (r *rig) tunnelDevice() (lab.Link, error) {
	dev, ok, err := r.end(0).Link(r.tun.dev)
	if err == nil && !ok {
		err = errors.New("there is none")
	}
	if err != nil {
		return dev, fmt.Errorf("bench: device %s: %w", r.tun.dev, err)
	}
	return dev, nil
}

// died says which of the peer's processes has ended, nil if none.
func (r *rig) died() error {
	for _, p := range r.tun.procs {
		select {
		case <-p.Done():
			return fmt.Errorf("bench: %s ended by itself: %v: %s", p.Name(), p.Wait(), tail(p.Log()))
		default:
		}
	}
	return nil
}

// values are what a test measured, by the metric's key: the test's name, an
// underscore, what it is.
type values map[string]float64

// sample is one peer's pass through all tests.
type sample struct {
	Round    int               `json:"round"`
	Underlay string            `json:"underlay"`
	Peer     string            `json:"peer"`
	Values   values            `json:"values"`
	Foreign  values            `json:"foreign_cores"` // by test
	Errors   map[string]string `json:"errors,omitempty"`
}

// test measures one thing.
type test struct {
	name  string
	lasts func(secs int) time.Duration
	run   func(context.Context, *rig) (values, error)
}

func tcpSecs(secs int) time.Duration { return time.Duration(secs+1) * time.Second }
func udpSecs(secs int) time.Duration { return time.Duration(half(secs)) * time.Second }
func half(secs int) int              { return max(1, secs/2) }

// tests is the table, in the order in which they run.
var tests = []test{
	{"idle", udpSecs, func(ctx context.Context, r *rig) (values, error) { return r.roundTrips(ctx, "idle", half(r.secs), 0) }},
	{"tcp1", tcpSecs, func(ctx context.Context, r *rig) (values, error) { return r.tcp(ctx, "tcp1") }},
	{"tcp4", tcpSecs, func(ctx context.Context, r *rig) (values, error) { return r.tcp(ctx, "tcp4", "-P", "4") }},
	{"tcpr", tcpSecs, func(ctx context.Context, r *rig) (values, error) { return r.tcp(ctx, "tcpr", "-R") }},
	{"udp64", udpSecs, func(ctx context.Context, r *rig) (values, error) { return r.udp(ctx, "udp64", 64) }},
	{"udp1400", udpSecs, func(ctx context.Context, r *rig) (values, error) { return r.udp(ctx, "udp1400", 1400) }},
	{"load", tcpSecs, func(ctx context.Context, r *rig) (values, error) { return r.loaded(ctx) }},
}

// measure brings a peer up, runs the tests and takes it down.
func (b *bench) measure(ctx context.Context, u underlay, p peer, round int) *sample {
	s := &sample{Round: round, Underlay: u.name, Peer: p.name, Values: values{}, Foreign: values{}, Errors: map[string]string{}}
	r, err := newRig(u, b.secs)
	if err == nil {
		err = b.measureOn(ctx, r, p, s)
		if r.tun.down != nil {
			r.tun.down()
		}
		err = errors.Join(err, r.lab.Close())
	}
	if err != nil {
		s.Errors["up"] = err.Error()
	}
	return s
}

// measureOn fails when the peer does; a test that fails is noted in the sample.
func (b *bench) measureOn(ctx context.Context, r *rig, p peer, s *sample) error {
	before := r.usage()
	tun, err := p.up(ctx, r)
	r.tun = tun
	if err != nil {
		return errors.Join(err, r.died())
	}
	if err := r.firstPing(ctx, 15*time.Second); err != nil {
		return errors.Join(err, r.died())
	}
	after := r.usage()
	for i := range 2 { // the host's default may be another, and a namespace has no choice
		if err := r.end(i).SetCongestionControl(r.tun.addrs[1-i], "cubic"); err != nil {
			return err
		}
	}
	dev, err := r.tunnelDevice()
	if err != nil {
		return err
	}
	s.Values["mtu_bytes"] = float64(dev.MTU)
	s.Values["up_ping_s"] = after.at.Sub(before.at).Seconds()
	s.Foreign["up"] = after.foreignSince(before)
	if err := r.serve(ctx); err != nil {
		return err
	}
	for i, t := range b.tests {
		for again := range 2 {
			switch late := b.late(time.Now(), b.tests[i:]); {
			case !late:
				r.quiet(ctx, b.foreign, b.patience)
			case again > 0 && s.Foreign[t.name] < failed:
				continue // the first try counts as it is
			}
			line := lineTime()
			before := r.usage()
			v, err := t.run(ctx, r)
			if ctx.Err() != nil {
				return ctx.Err()
			}
			foreign := r.usage().foreignSince(before)
			if err == nil {
				v[t.name+"_line_ns"] = (line + lineTime()) / 2
			}
			if s.add(t.name, again > 0, v, foreign, errors.Join(err, r.died())) <= b.foreign {
				break
			}
		}
	}
	if len(r.tun.procs) > 0 {
		s.Values["rss_mb"] = peakMB(r.tun.procs)
	}
	return nil
}

// failed stands for the foreign use of a test that failed: more than any.
const failed = 1e6

// add takes a test's result over and returns its foreign use. Of two tries the
// less disturbed one counts.
func (s *sample) add(test string, again bool, v values, foreign float64, err error) float64 {
	if err != nil {
		foreign = failed
	}
	if again && foreign >= s.Foreign[test] {
		return foreign
	}
	s.Foreign[test] = foreign
	delete(s.Errors, test)
	if err != nil {
		s.Errors[test] = err.Error()
	}
	maps.Copy(s.Values, v)
	return foreign
}

// String is the line of progress.
func (s *sample) String() string {
	var out []string
	for _, m := range slices.Concat(metrics, dnsMetrics) {
		if v, ok := s.Values[m.key]; ok && m.progress {
			out = append(out, m.key+" "+number(v))
		}
	}
	for t, err := range s.Errors {
		out = append(out, "FAILED "+t+": "+err)
	}
	return strings.Join(out, ", ")
}

// firstPing pings until a reply comes.
func (r *rig) firstPing(ctx context.Context, limit time.Duration) error {
	p, err := r.end(0).NewPinger(r.tun.addrs[1], lab.PingOptions{})
	if err != nil {
		return err
	}
	defer p.Close()
	return until(ctx, limit, func() error {
		try, cancel := context.WithTimeout(ctx, 20*time.Millisecond)
		defer cancel()
		_, err := p.Ping(try)
		return err
	})
}

// serve starts iperf3's server at the second end.
func (r *rig) serve(ctx context.Context) error {
	p, err := r.end(1).Start(exec.Command("iperf3", "-s", "-4"))
	if err != nil {
		return err
	}
	const listening = ":1451 00000000:0000 0A" // port 5201, TCP_LISTEN
	return until(ctx, 5*time.Second, func() error {
		sockets, err := r.end(1).ReadProcNet("tcp")
		if err == nil && !strings.Contains(sockets, listening) {
			err = fmt.Errorf("bench: iperf3 does not listen: %s", tail(p.Log()))
		}
		return err
	})
}

// iperfSum is the sum over all streams in iperf3's JSON.
type iperfSum struct {
	Seconds       float64
	Bytes         float64
	BitsPerSecond float64 `json:"bits_per_second"`
	Retransmits   float64
}

type iperfReport struct {
	Error     string
	Intervals []struct{ Sum iperfSum }
	End       struct {
		Sent     iperfSum  `json:"sum_sent"`
		Received *iperfSum `json:"sum_received"`
	}
}

// iperf runs a client at the first end.
func (r *rig) iperf(ctx context.Context, secs int, args ...string) (rep iperfReport, err error) {
	ctx, cancel := context.WithTimeout(ctx, time.Duration(secs+15)*time.Second)
	defer cancel()
	p, out, err := r.startIperf(secs, args...)
	if err != nil {
		return rep, err
	}
	stop := context.AfterFunc(ctx, p.Kill)
	defer stop()
	ended := p.Wait()
	err = json.Unmarshal(out.Bytes(), &rep)
	switch {
	case err != nil:
		return rep, fmt.Errorf("bench: iperf3: %w: %s", errors.Join(ended, ctx.Err(), err), tail(out.String()))
	case rep.Error != "":
		return rep, fmt.Errorf("bench: iperf3: %s", rep.Error)
	case rep.End.Received == nil:
		return rep, errors.New("bench: iperf3 does not report what arrived: take 3.12 or newer")
	}
	return rep, nil
}

func (r *rig) startIperf(secs int, args ...string) (*lab.Process, *bytes.Buffer, error) {
	var out bytes.Buffer
	cmd := exec.Command("iperf3", append([]string{"-c", r.tun.addrs[1].String(), "-J", "-t", strconv.Itoa(secs)}, args...)...)
	cmd.Stdout = &out // to be read when it has ended
	p, err := r.end(0).Start(cmd)
	return p, &out, err
}

// tcp measures throughput, retransmits and CPU time per GB of payload.
func (r *rig) tcp(ctx context.Context, name string, args ...string) (values, error) {
	before := r.usage()
	rep, err := r.iperf(ctx, r.secs, append([]string{"-O", "1"}, args...)...)
	if err != nil {
		return nil, err
	}
	spent := r.usage().since(before)
	gb := 0.0 // with the omitted second, for its CPU time is counted too
	for _, i := range rep.Intervals {
		gb += i.Sum.Bytes / 1e9
	}
	if gb == 0 {
		return nil, errors.New("bench: iperf3 moved nothing")
	}
	return values{
		name + "_gbps":        rep.End.Received.BitsPerSecond / 1e9,
		name + "_retransmits": rep.End.Sent.Retransmits,
		name + "_peer_cpu":    spent.peer / gb,
		name + "_machine_cpu": min(spent.machine, spent.ours) / gb, // without the others'
	}, nil
}

// udp counts what arrives of datagrams sent as fast as one thread can.
func (r *rig) udp(ctx context.Context, name string, size int) (values, error) {
	dev, err := r.tunnelDevice()
	if err != nil {
		return nil, err
	}
	size = min(size, dev.MTU-28) // IP and UDP headers: whole datagrams only
	rep, err := r.iperf(ctx, half(r.secs), "-u", "-b", "0", "-w", "2M", "-l", strconv.Itoa(size))
	if err != nil {
		return nil, err
	}
	// The client's own "packets less lost" counts what was lost at the end.
	got := *rep.End.Received
	return values{
		name + "_kpps": got.Bytes / float64(size) / got.Seconds / 1e3,
		name + "_gbps": got.Bytes * 8 / got.Seconds / 1e9,
	}, nil
}

// sent returns the bytes that the tunnel's device at the first end has sent.
func (r *rig) sent() (uint64, error) {
	text, err := r.end(0).ReadProcNet("dev")
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(text) {
		if name, counters, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(name) == r.tun.dev {
			return strconv.ParseUint(strings.Fields(counters)[8], 10, 64)
		}
	}
	return 0, fmt.Errorf("bench: no counters of device %s", r.tun.dev)
}

// loaded measures round trips beside one TCP stream, and how fast that is meanwhile.
func (r *rig) loaded(ctx context.Context) (values, error) {
	p, out, err := r.startIperf(r.secs + 3)
	if err != nil {
		return nil, err
	}
	defer p.Stop(2 * time.Second)
	if err := pause(ctx, 800*time.Millisecond); err != nil {
		return nil, err
	}
	before, err := r.sent()
	if err != nil {
		return nil, err
	}
	began := time.Now()
	v, err := r.roundTrips(ctx, "load", r.secs, 2*time.Millisecond)
	if err == nil {
		var after uint64
		if after, err = r.sent(); err == nil {
			v["load_gbps"] = float64(after-before) * 8 / 1e9 / time.Since(began).Seconds()
		}
	}
	select {
	case <-p.Done():
		return nil, fmt.Errorf("bench: the load ended early: %s", tail(out.String()))
	default:
		return v, err
	}
}
