package doctor

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"

	"github.com/tulle-net/tulle/crypto"
	"github.com/tulle-net/tulle/tap"
	"github.com/tulle-net/tulle/underlay"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var (
	now  = time.Date(2026, 12, 1, 12, 0, 0, 0, time.UTC)
	taps = map[string]tap.Offloads{"blue0": {Driver: tap.DriverOffload, Checksum: "on", TSO4: "on", TSO6: "on", USO: "on", GRO: "on"}}
	good = underlay.Offloads{GSO: "on", GRO: "on", ReceiveBuffer: wantedBuffer, SendBuffer: wantedBuffer}
)

// validFor returns a certificate that ends after d and was made for 30 days.
func validFor(d time.Duration) *crypto.Certificate {
	end := now.Add(d)
	return &crypto.Certificate{Name: "n1", NotBefore: end.Add(-30*24*time.Hour - crypto.Skew), NotAfter: end}
}

// fakeNode is a node with everything to find; hang: nobody answers it.
type fakeNode struct {
	cert      *crypto.Certificate
	keeper    Keeper
	err       error
	probes    []Probe
	hang      bool
	conflicts []string
	mtus      []MTU
	store     *Store
	missing   []string
	gateways  *Gateways
	asked     int
}

func (n *fakeNode) Certificate() *crypto.Certificate { return n.cert }
func (n *fakeNode) Now() time.Time                   { return now }
func (n *fakeNode) AskKeeper(ctx context.Context) (Keeper, error) {
	n.asked++
	if n.hang {
		<-ctx.Done()
		return Keeper{}, ctx.Err()
	}
	return n.keeper, n.err
}
func (n *fakeNode) ProbeGossip(ctx context.Context) []Probe {
	if n.hang {
		<-ctx.Done()
		return []Probe{{Peer: "n2", UDP: ctx.Err(), TCP: ctx.Err()}}
	}
	return n.probes
}
func (n *fakeNode) Underlay() underlay.Offloads   { return good }
func (n *fakeNode) Taps() map[string]tap.Offloads { return taps }
func (n *fakeNode) Conflicts() []string           { return n.conflicts }
func (n *fakeNode) MTUs() []MTU                   { return n.mtus }
func (n *fakeNode) Store(context.Context) *Store  { return n.store }
func (n *fakeNode) Endpoints() []string           { return n.missing }
func (n *fakeNode) Gateways() *Gateways           { return n.gateways }

func names(checks []Check) (list []string) {
	for _, c := range checks {
		list = append(list, c.Name)
	}
	return list
}

func TestRunning(t *testing.T) {
	secure := &fakeNode{
		cert: validFor(20 * 24 * time.Hour), keeper: Keeper{"n1", now, time.Millisecond}, probes: []Probe{{Peer: "n2"}},
		mtus: []MTU{{"blue", 1418, 1418}}, store: &Store{Keepers: 3, Quorum: true}, gateways: &Gateways{Devices: []string{"tg-blue"}},
	}
	checks := Running(t.Context(), secure)
	if got, all := names(checks), []string{"certificate", "keeper", "clock_skew", "store", "gossip", "endpoints", "offloads", "receive_buffer", "conflicts", "mtu", "gateway"}; !slices.Equal(got, all) {
		t.Errorf("secure: %q, want %q", got, all)
	}
	for _, c := range checks {
		want(t, c, OK, "")
	}
	open := &fakeNode{}
	checks = Running(t.Context(), open)
	if got, all := names(checks), []string{"certificate", "gossip", "endpoints", "offloads", "receive_buffer", "conflicts", "mtu"}; !slices.Equal(got, all) || open.asked > 0 {
		t.Errorf("open: %q, want %q; %d keepers asked", got, all, open.asked)
	}
	for _, c := range checks {
		want(t, c, OK, "")
	}
	if bad := FailedNames(checks); bad != nil {
		t.Errorf("FailedNames = %q", bad)
	}
}

// TestRunningEnds: peers that never answer do not hang it.
func TestRunningEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		start := time.Now()
		checks := Running(t.Context(), &fakeNode{cert: validFor(time.Hour * 24 * 20), hang: true})
		if took := time.Since(start); took != probeTimeout {
			t.Errorf("took %s, want %s", took, probeTimeout)
		}
		if bad := FailedNames(checks); !slices.Equal(bad, []string{"keeper", "gossip"}) {
			t.Errorf("failed: %q", bad)
		}
	})
}

func TestCertificate(t *testing.T) {
	const day = 24 * time.Hour
	want(t, certificate(nil, now), OK, "an open cluster has none")
	want(t, certificate(validFor(20*day), now), OK, "valid until 2026-12-21 12:00:00 UTC, renewed from 2026-12-11 12:00:00 UTC on")
	want(t, certificate(validFor(10*day-time.Minute), now), OK, "valid until 2026-12-11 11:59:00 UTC, being renewed")
	want(t, certificate(validFor(9*day), now), Warn, "valid until 2026-12-10 12:00:00 UTC, and was to be renewed from 2026-11-30 12:00:00 UTC on")
	want(t, certificate(validFor(-time.Second), now), Failed, "expired at 2026-12-01 11:59:59 UTC")
	want(t, certificate(validFor(31*day), now), Failed, "not valid before 2026-12-02 11:50:00 UTC, and the node's time is 2026-12-01 12:00:00 UTC")
}

func TestKeeperAndClock(t *testing.T) {
	cert := validFor(20 * 24 * time.Hour)
	n := &fakeNode{cert: cert, err: errors.New("peer: no route\nto anyone")}
	checks := ask(t.Context(), n)
	if len(checks) != 1 {
		t.Errorf("checks = %v, want nothing about a clock that nobody told", checks)
	}
	want(t, checks[0], Failed, "no keeper answers: no route; to anyone; traffic goes on")
	// No firewall is to blame where a keeper answers, and says no.
	revoked := ask(t.Context(), &fakeNode{cert: cert, err: fmt.Errorf("%w: revoked", ErrNotBelieved)})
	want(t, revoked[0], Failed, "the keepers do not believe this node any more: revoked")
	if len(revoked) != 1 || !strings.Contains(revoked[0].Advice, "`tulle node rm n1`") {
		t.Errorf("checks of a node that is revoked: %+v, want the way back", revoked)
	}
	want(t, ask(t.Context(), &fakeNode{cert: cert, keeper: Keeper{Name: "n1", Time: now}})[0], OK, "this node is one")
	for _, tt := range []struct {
		time   time.Duration // the keeper's, from the node's
		trip   time.Duration
		result Result
		detail string
	}{
		{0, 0, OK, "the clock is 0s ahead of n2's"},
		{-time.Second, 2 * time.Second, OK, "the clock is 0s ahead of n2's"}, // it was said a second ago
		{-time.Minute, 0, OK, "the clock is 1m0s ahead of n2's"},
		{time.Minute + time.Second, 0, Warn, "the clock is 1m1s behind n2's"},
		{-crypto.Skew, 0, Warn, "the clock is 10m0s ahead of n2's"},
		{-crypto.Skew - time.Second, 0, Failed, "the clock is 10m1s ahead of n2's: certificates stand 10m0s"},
		{crypto.Skew + time.Second, 0, Failed, "the clock is 10m1s behind n2's"},
	} {
		n := &fakeNode{cert: cert, keeper: Keeper{"n2", now.Add(tt.time), tt.trip}}
		checks := ask(t.Context(), n)
		if len(checks) != 2 {
			t.Fatalf("checks = %v", checks)
		}
		want(t, checks[0], OK, "n2 answers in "+tt.trip.String())
		want(t, checks[1], tt.result, tt.detail)
	}
}

func TestReach(t *testing.T) {
	timeout, refused := errors.New("timeout"), errors.New("connection refused")
	at := netip.MustParseAddrPort
	want(t, reach(nil), OK, "no other node is alive")
	want(t, reach([]Probe{{Peer: "n2"}}), OK, "1 node answers over UDP and TCP")
	want(t, reach([]Probe{{Peer: "n2"}, {Peer: "n3"}}), OK, "2 nodes answer over UDP and TCP")
	c := reach([]Probe{{Peer: "n2", At: at("192.0.2.2:7946"), UDP: timeout}, {Peer: "n3", At: at("192.0.2.3:7947"), UDP: timeout, TCP: refused}, {Peer: "n4"}})
	want(t, c, Failed, "no answer from n2 at 192.0.2.2:7946 over UDP: timeout, n3 at 192.0.2.3:7947 over UDP: timeout, n3 at 192.0.2.3:7947 over TCP: connection refused")
	if !strings.Contains(c.Advice, "port 7946, 7947 through") {
		t.Errorf("advice = %s", c.Advice)
	}
	many := make([]Probe, 1000)
	for i := range many {
		many[i] = Probe{Peer: "n", At: at("192.0.2.2:7946"), TCP: timeout}
	}
	if c := reach(many); !strings.HasSuffix(c.Detail, " and 995 more") {
		t.Errorf("1000 faults: %s", c.Detail)
	}
}

func TestOffloads(t *testing.T) {
	with := func(change func(*tap.Offloads)) map[string]tap.Offloads {
		o := taps["blue0"]
		change(&o)
		return map[string]tap.Offloads{"blue0": o}
	}
	want(t, offloads(good, taps), OK, "all on")
	want(t, offloads(good, nil), OK, "all on")
	want(t, offloads(good, with(func(o *tap.Offloads) { o.TSO4, o.GRO = "off", "off" })), OK, "on, but as the settings say off: blue0's gro, blue0's tso4")
	want(t, offloads(good, with(func(o *tap.Offloads) { o.USO, o.GRO = "EINVAL", "off" })), Warn, "not available: blue0's uso: EINVAL")
	want(t, offloads(underlay.Offloads{GSO: "on", GRO: "no"}, taps), Warn, "not available: the underlay's gro: no")
	want(t, offloads(good, map[string]tap.Offloads{"red": {Driver: tap.DriverPlain, GRO: "none"}}), Warn, "not available: red has the plain driver, which has no offload")
}

func TestBufferConflictsMTUs(t *testing.T) {
	want(t, buffer(wantedBuffer), OK, "7340032 bytes")
	want(t, buffer(212992), Warn, "the kernel granted 212992 of 7340032 bytes")
	want(t, conflicts([]string{}), OK, "none")
	want(t, conflicts([]string{"a", "b"}), Failed, "a; b")
	want(t, mtus(nil), OK, "no overlay here")
	want(t, mtus([]MTU{{"blue", 1418, 1418}, {"red", 1400, 1418}}), OK, "blue 1418, red 1400")
	want(t, mtus([]MTU{{"blue", 1418, 1418}, {"red", 1279, 1418}}), Warn, "overlay red has 1279: below 1280")
	want(t, mtus([]MTU{{"blue", 1450, 1418}, {"red", 0, 1418}, {"x", 1000, 1418}}), Failed, "overlay blue has 1450 and the underlay carries 1418, overlay red has no device")
}

func TestStore(t *testing.T) {
	if c := store(nil); c != nil {
		t.Errorf("no keeper: %+v", c)
	}
	for _, c := range []struct {
		s      Store
		status Result
		detail string
	}{
		{Store{Keepers: 1, Quorum: true}, OK, "1 keeper has it, and can be changed"},
		{Store{Keepers: 3, Quorum: true}, OK, "3 keepers have it, and can be changed"},
		{Store{Quorum: true}, OK, "the etcd cluster answers"},
		{Store{Keepers: 2, Quorum: true}, Warn, "of 2 keepers neither may be lost: each is half of them"},
		{Store{Keepers: 3, Away: 1, Quorum: true}, Warn, "1 of 3 keepers are away"},
		{Store{Keepers: 3, Quorum: true, Fault: "NOSPACE"}, Warn, "NOSPACE"},
		{Store{Keepers: 3, Away: 2, Fault: "no leader"}, Failed, "the store does not answer, so nothing of the cluster can be changed: no leader"},
	} {
		want(t, store(&c.s)[0], c.status, c.detail)
	}
}

func TestEndpoints(t *testing.T) {
	want(t, endpoints(nil), OK, "all are there")
	want(t, endpoints([]string{"blue: its lease has run out"}), Failed, "blue: its lease has run out")
}
