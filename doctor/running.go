package doctor

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/tulle-net/tulle/crypto"
	"github.com/tulle-net/tulle/tap"
	"github.com/tulle-net/tulle/underlay"
)

const (
	// probeTimeout bounds what is asked of other nodes, all together.
	probeTimeout = 3 * time.Second
	// renewGrace is how long a renewal may be late before it is worth a word:
	// the nearest keeper may be restarting.
	renewGrace = time.Hour
	// smallSkew between two clocks is worth a word, crypto.Skew breaks things.
	smallSkew = time.Minute
	// wantedBuffer is what underlay asks the kernel for by default, in bytes.
	wantedBuffer = 7 << 20
)

// Node is the running node. Its methods are safe for concurrent use, and return
// when their context ends.
type Node interface {
	// Certificate returns the node's own; nil in an open cluster.
	Certificate() *crypto.Certificate
	// Now is the time that the node goes by.
	Now() time.Time
	// AskKeeper asks the nearest keeper for its time; a keeper may answer
	// itself. It is not called in an open cluster. Errors wrap ErrNotBelieved
	// where a keeper is there, and does not take this node for a member.
	AskKeeper(context.Context) (Keeper, error)
	// ProbeGossip tries the gossip port of each other node that is alive.
	ProbeGossip(context.Context) []Probe
	// Underlay and Taps are the offloads of the sockets and, by name, of the devices.
	Underlay() underlay.Offloads
	Taps() map[string]tap.Offloads
	// Conflicts are one sentence each.
	Conflicts() []string
	// MTUs has one entry an overlay.
	MTUs() []MTU
	// Store looks at the store of a keeper; nil: this node is none.
	Store(context.Context) *Store
	// Endpoints that this node should have and has not, one sentence each.
	Endpoints() []string
	// Gateways: nil, this node is none.
	Gateways() *Gateways
}

// Store is a keeper's view of the store.
type Store struct {
	// Keepers that have a vote in it, and how many of them are out of reach; 0
	// where it is an etcd of its own.
	Keepers, Away int
	// Quorum: it can be changed. Fault says why not, or what etcd warns of.
	Quorum bool
	Fault  string
}

// ErrNotBelieved: the node was revoked or removed, or its certificate is not of
// this cluster.
var ErrNotBelieved = errors.New("the keepers do not believe this node any more")

// Keeper is a keeper's answer.
type Keeper struct {
	Name string
	// Time that it said, and how long it took to say it.
	Time      time.Time
	RoundTrip time.Duration
}

// Probe is what came of trying one node's gossip port; a nil error: it answered.
type Probe struct {
	Peer     string
	At       netip.AddrPort
	TCP, UDP error
}

// MTU is one overlay's, in bytes.
type MTU struct {
	Overlay string
	// Device is that of the overlay's device; 0: there is none at the moment.
	Device int
	// Fits is the largest that underlay and paths to peers carry whole.
	Fits int
}

// Running checks the node that runs here. It takes at most 3 s, or until ctx ends.
func Running(ctx context.Context, n Node) []Check {
	ctx, cancel := context.WithTimeout(ctx, probeTimeout)
	defer cancel()
	var gossip, keeper, kept []Check
	var asked sync.WaitGroup
	asked.Go(func() { gossip = []Check{reach(n.ProbeGossip(ctx))} })
	cert := n.Certificate()
	if cert != nil {
		asked.Go(func() { keeper = ask(ctx, n) })
		asked.Go(func() { kept = store(n.Store(ctx)) })
	}
	asked.Wait()
	return slices.Concat(
		[]Check{certificate(cert, n.Now())}, keeper, kept, gossip,
		[]Check{endpoints(n.Endpoints()), offloads(n.Underlay(), n.Taps()), buffer(n.Underlay().ReceiveBuffer), conflicts(n.Conflicts()), mtus(n.MTUs())},
		gateways(n.Gateways()),
	)
}

func certificate(c *crypto.Certificate, now time.Time) Check {
	const name = "certificate"
	if c == nil {
		return ok(name, "an open cluster has none")
	}
	late := now.Sub(c.RenewAt())
	switch {
	case now.After(c.NotAfter):
		return failed(name, fmt.Sprintf("expired at %s: other nodes refuse this one", stamp(c.NotAfter)),
			"`tulle token create` on a node that works, then here `tulle up --token TOKEN`, with the state as it is")
	case now.Before(c.NotBefore):
		return failed(name, fmt.Sprintf("not valid before %s, and the node's time is %s", stamp(c.NotBefore), stamp(now)), "`timedatectl set-ntp true`")
	case late > renewGrace:
		return warn(name, fmt.Sprintf("valid until %s, and was to be renewed from %s on: no keeper did", stamp(c.NotAfter), stamp(c.RenewAt())),
			"`tulle node ls` shows the keepers: start one, and let UDP through to its VTEP")
	case late > 0:
		return ok(name, "valid until %s, being renewed", stamp(c.NotAfter))
	}
	return ok(name, "valid until %s, renewed from %s on", stamp(c.NotAfter), stamp(c.RenewAt()))
}

// ask returns what the keeper check found and, if a keeper answered, how far
// the clocks are apart.
func ask(ctx context.Context, n Node) []Check {
	k, err := n.AskKeeper(ctx)
	self := n.Certificate().Name
	if errors.Is(err, ErrNotBelieved) {
		return []Check{failed("keeper", text(err), fmt.Sprintf(
			"if it is to be a member: `tulle node rm %s` and `tulle token create` on another node, then here `tulle up --token TOKEN`", self))}
	}
	if err != nil {
		return []Check{failed("keeper", "no keeper answers: "+text(err)+"; traffic goes on, and nothing new is granted, renewed or revoked here",
			"`tulle node ls` on another node shows the keepers: start one, and let UDP through to its VTEP")}
	}
	// The answer was made about half the round trip ago.
	skew := n.Now().Sub(k.Time.Add(k.RoundTrip / 2))
	answers := ok("keeper", "%s answers in %s", k.Name, k.RoundTrip.Round(10*time.Microsecond))
	if k.Name == self {
		answers = ok("keeper", "this node is one")
	}
	return []Check{answers, clockSkew(k.Name, skew)}
}

// store is about a keeper's store.
func store(s *Store) []Check {
	const name = "store"
	switch {
	case s == nil:
		return nil
	case !s.Quorum:
		return []Check{failed(name, "the store does not answer, so nothing of the cluster can be changed: "+s.Fault,
			"`tulle store status` shows its members: start the keepers that are away, and let TCP through to their store")}
	case s.Fault != "":
		return []Check{warn(name, s.Fault, "`tulle store status` says more")}
	case s.Away > 0:
		return []Check{warn(name, fmt.Sprintf("%d of %d keepers are away", s.Away, s.Keepers), "start them, or `tulle node promote NEW --replace LOST`")}
	case s.Keepers == 2:
		return []Check{warn(name, "of 2 keepers neither may be lost: each is half of them", "`tulle node promote` a third one, or demote one")}
	case s.Keepers == 0:
		return []Check{ok(name, "the etcd cluster answers")}
	}
	return []Check{ok(name, "%s, and can be changed", countOf(s.Keepers, "keeper has it", "keepers have it"))}
}

// endpoints is about what this node should have in overlays and has not.
func endpoints(faults []string) Check {
	const name = "endpoints"
	if len(faults) == 0 {
		return ok(name, "all are there")
	}
	return failed(name, join(faults), "`tulle endpoints` shows them; `tulle unexpose OVERLAY` gives one up")
}

func clockSkew(keeper string, skew time.Duration) Check {
	const name, advice = "clock_skew", "`timedatectl set-ntp true` on both, or `date -s 'YYYY-MM-DD hh:mm:ss'`"
	far, side := skew.Abs(), "ahead of"
	if skew < 0 {
		side = "behind"
	}
	detail := fmt.Sprintf("the clock is %s %s %s's", far.Round(time.Millisecond), side, keeper)
	switch {
	case far > crypto.Skew:
		return failed(name, detail+fmt.Sprintf(": certificates stand %s", crypto.Skew), advice)
	case far > smallSkew:
		return warn(name, detail, advice)
	}
	return ok(name, "%s", detail)
}

// reach sums the probes up.
func reach(probes []Probe) Check {
	const name = "gossip"
	if len(probes) == 0 {
		return ok(name, "no other node is alive")
	}
	var faults []string
	ports := map[int]bool{}
	bad := func(p *Probe, protocol string, err error) {
		if err != nil {
			faults = append(faults, fmt.Sprintf("%s at %s over %s: %s", p.Peer, p.At, protocol, text(err)))
			ports[int(p.At.Port())] = true
		}
	}
	for i := range probes {
		bad(&probes[i], "UDP", probes[i].UDP)
		bad(&probes[i], "TCP", probes[i].TCP)
	}
	if len(faults) == 0 {
		return ok(name, "%s over UDP and TCP", countOf(len(probes), "node answers", "nodes answer"))
	}
	var numbers []string
	for _, p := range slices.Sorted(maps.Keys(ports)) {
		numbers = append(numbers, strconv.Itoa(p))
	}
	return failed(name, "no answer from "+join(faults),
		"let both UDP and TCP port "+join(numbers)+" through between the nodes, here and there; `nft list ruleset` shows what the firewall does")
}

func countOf(n int, one, many string) string {
	if n == 1 {
		return "1 " + one
	}
	return fmt.Sprintf("%d %s", n, many)
}

// offloads finds those that are not available; what was switched off is as the
// settings want it.
func offloads(u underlay.Offloads, taps map[string]tap.Offloads) Check {
	const name = "offloads"
	off, missing := map[string]bool{}, []string{}
	look := func(device string, kinds ...string) {
		for i := 0; i < len(kinds); i += 2 {
			switch what := device + "'s " + kinds[i]; kinds[i+1] {
			case "on":
			case "off":
				off[what] = true
			default:
				missing = append(missing, what+": "+kinds[i+1])
			}
		}
	}
	look("the underlay", "gso", u.GSO, "gro", u.GRO)
	for _, dev := range slices.Sorted(maps.Keys(taps)) {
		o := taps[dev]
		if o.Driver == tap.DriverPlain {
			missing = append(missing, dev+" has the plain driver, which has no offload")
			continue
		}
		look(dev, "checksum", o.Checksum, "tso4", o.TSO4, "tso6", o.TSO6, "uso", o.USO, "gro", o.GRO)
	}
	switch {
	case len(missing) > 0:
		return warn(name, "not available: "+join(missing),
			"it works as it is, slower; `uname -r`: USO comes with Linux 6.2, the underlay's GSO with 4.18, its GRO with 5.0; an overlay's driver is auto unless its settings say otherwise")
	case len(off) > 0:
		return ok(name, "on, but as the settings say off: %s", join(slices.Sorted(maps.Keys(off))))
	}
	return ok(name, "all on")
}

// buffer judges the receive buffer that the kernel granted, in bytes.
func buffer(granted int) Check {
	const name = "receive_buffer"
	if granted < wantedBuffer {
		return warn(name, fmt.Sprintf("the kernel granted %d of %d bytes: bursts are dropped (rx_overflow)", granted, wantedBuffer),
			fmt.Sprintf("`sysctl -w net.core.rmem_max=%d`, and restart the node; or run it with CAP_NET_ADMIN in the first user namespace", wantedBuffer))
	}
	return ok(name, "%d bytes", granted)
}

func conflicts(sentences []string) Check {
	const name = "conflicts"
	if len(sentences) == 0 {
		return ok(name, "none")
	}
	return failed(name, strings.Join(sentences, "; "), "do what it says and restart that node with `tulle up`; `tulle status` shows when it is gone")
}

func mtus(all []MTU) Check {
	const name = "mtu"
	var fine, small, wrong []string
	for _, m := range all {
		switch {
		case m.Device == 0:
			wrong = append(wrong, fmt.Sprintf("overlay %s has no device", m.Overlay))
		case m.Device > m.Fits:
			wrong = append(wrong, fmt.Sprintf("overlay %s has %d and the underlay carries %d", m.Overlay, m.Device, m.Fits))
		case m.Device < minIPv6MTU:
			small = append(small, fmt.Sprintf("overlay %s has %d", m.Overlay, m.Device))
		default:
			fine = append(fine, fmt.Sprintf("%s %d", m.Overlay, m.Device))
		}
	}
	switch {
	case len(wrong) > 0:
		return failed(name, join(wrong), "leave mtu out of the overlay's settings, then it follows the underlay; a device that is gone comes back by itself when nothing else holds its name (`ip link`)")
	case len(small) > 0:
		return warn(name, fmt.Sprintf("%s: below %d the kernel switches IPv6 off", join(small), minIPv6MTU), "raise the underlay's, as in `ip link set dev eth0 mtu 1500`, and leave mtu out of the overlay's settings")
	case len(fine) == 0:
		return ok(name, "no overlay here")
	}
	return ok(name, "%s", join(fine))
}
