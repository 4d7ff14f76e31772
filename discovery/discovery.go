// Package discovery finds the other nodes by Serf gossip: who is there, at
// which VTEP, with which overlays.
//
// A node's Serf tags hold its wire version, its VTEP and a digest of the list
// of overlays that it carries. The list itself is pulled from its owner over
// TCP on the gossip port (docs/design/0001-overlay-list-pull.md), which also
// shows that it is there: what only gossip says, one forged datagram can say.
// Small frames can be flooded to all members as Serf user events.
//
// In an open cluster nothing here is authenticated: who reaches the gossip
// port, and answers at the address that he names, can take part. In a secure
// one (Config.Secure, docs/design/0003-secure-gossip.md) gossip is sealed, the
// tags hold a passport that the cluster's CA signed, and the list is pulled over
// an authenticated connection that somebody else makes. Whoever has a gossip
// key can still disturb who is seen alive; he can be nobody else.
package discovery

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/serf/serf"
	"golang.org/x/time/rate"

	"github.com/tulle-net/tulle/crypto"
	"github.com/tulle-net/tulle/vxlan"
)

// Config of a node's membership.
type Config struct {
	// Name is the node's name, unique in the cluster: [A-Za-z0-9][A-Za-z0-9-]{0,62}.
	Name string
	// Listen is the gossip address and port, TCP and UDP; an unspecified
	// address listens on all, of both families where the host has both. Port 0
	// lets the kernel choose.
	Listen netip.AddrPort
	// Advertise is the address that others reach this node at.
	Advertise netip.Addr
	// VTEP is this node's tunnel endpoint; its address is Advertise.
	VTEP netip.AddrPort
	// Seeds are the gossip addresses, HOST[:PORT], of nodes to join; default
	// port 7946. Names are resolved anew at each try.
	Seeds []string
	// StateDir keeps the known members over a restart; empty: nothing is kept.
	// It is created if it is not there.
	StateDir string
	// OnFlood is called with each frame that another member flooded by gossip;
	// frame is owned by the callee. It holds up gossip and must not block.
	OnFlood func(from netip.AddrPort, vni vxlan.VNI, frame []byte)
	// OnTables answers who asks this node for its tables (AskTables), in an open cluster;
	// nil or empty: it does not tell.
	OnTables func(request []byte) []byte
	// Secure makes the node one of a secure cluster; nil: of an open one.
	Secure *Secure
	// Run is that of the Discovery that this one follows, which must have ended without
	// leaving; zero: a new one. To others the node has then not restarted.
	Run Run
	// Network is what gossip goes over; nil: the host's UDP and TCP. Listen then names
	// an address and a port.
	Network Network
	// Log; default none.
	Log *slog.Logger
}

// Run tells one run of a node from others.
type Run struct {
	Number uint32        `json:"number"`
	Age    time.Duration `json:"age"`
}

// Overlay is what a node tells others of an overlay that it carries.
type Overlay struct {
	VNI        vxlan.VNI
	Name       string
	Encryption string // none | required
}

// Status of a member.
type Status string

const (
	Alive  Status = "alive"
	Failed Status = "failed"
	Left   Status = "left"
)

// Member is another node, or this one.
type Member struct {
	Name string
	// Self marks this node.
	Self   bool
	Status Status
	// Confirmed: the node itself said over TCP, at the address of Gossip, that
	// it has this name and VTEP, and it is Alive; in a secure cluster
	// Secure.Pull from it succeeded. Nothing may be sent to a VTEP that is not
	// confirmed, nor taken from it: gossip alone may be forged. It ends when the
	// node fails, leaves, restarts or moves, until it has answered again.
	Confirmed bool
	VTEP      netip.AddrPort
	Gossip    netip.AddrPort
	// Overlays that the member carries, by VNI; nil while it is alive and not
	// confirmed, and the list before while a changed one is being pulled.
	// Shared: not to be modified.
	Overlays []Overlay
	// Passport is the last one that verified; nil in an open cluster, and of
	// this node before Run. Shared: not to be modified.
	Passport *crypto.Passport
	// Keeper: its passport says that it may be asked as one.
	Keeper bool
	// Extra is what its Secure.Extra returned for Passport. (Passport.Extra has
	// the boot number and Tables before it.) Shared: not to be modified.
	Extra []byte
	// Tables is the version of what it has to tell on being asked, see SetTables.
	Tables uint64
}

// Stats counts since New.
type Stats struct {
	FloodsSent     uint64 // frames that Flood took
	FloodsReceived uint64 // frames given to OnFlood
	FloodsRefused  uint64 // received floods that were malformed, older than maxFloodAge, or not from a confirmed member that carries the VNI
	Pulls          uint64 // overlay lists pulled from their owners
	PullsFailed    uint64 // exchanges with members that failed
	StreamsRefused uint64 // incoming streams closed because too many were open

	PassportsRefused  uint64 // gossip records dropped because they are not the node's that they name, or not believed
	PassportsStale    uint64 // gossip records dropped because a newer passport is known
	PassportsVerified uint64 // calls of Secure.Verify but for Reverify's
}

type counters struct {
	floodsSent, floodsReceived, floodsRefused, pulls, pullsFailed atomic.Uint64
}

// Discovery is this node's membership. Its methods are safe for concurrent use.
type Discovery struct {
	cfg   Config
	seeds []seed
	log   *slog.Logger
	self  netip.AddrPort // advertised gossip address
	port  *port
	names *nameGuard // of an open cluster
	seen  *sightings
	count counters

	// passports and keys are nil in an open cluster. own is this node's
	// passport; nil before Run.
	passports *passports
	keys      *keyring
	own       atomic.Pointer[crypto.Passport]

	floodRate *rate.Limiter

	// boot tells this run of the node from others, and born is the zero of its
	// clock.
	boot    uint32
	born    time.Time
	stamped atomic.Uint64 // by stamp

	events  chan serf.Event
	changed chan struct{}
	newer   chan struct{} // tells that Members' Tables changed
	moved   chan struct{} // tells follow that Serf's members changed
	sighted sighted       // which ones
	kick    chan struct{} // tells keepJoined that the peers changed
	hurry   atomic.Bool   // the next kick is to join at once
	crash   chan struct{} // tests: end without leaving
	ran     atomic.Bool

	// publish serialises what this node says of itself; serf is set under it.
	publish turn
	again   *time.Timer       // says it once more; nil: nothing was said yet
	said    map[string]string // the tags that were said last
	serf    atomic.Pointer[serf.Serf]
	leaving func() // has Serf wait for longer
	carried atomic.Pointer[list]
	// mark names carried in the passports: each change of it draws another.
	mark   digest
	tables atomic.Uint64

	mu    sync.Mutex // guards peers, and members' making
	peers map[string]*peer
	// members is what Members shows; nil after each change, until somebody asks.
	members atomic.Pointer[[]Member]
	newest  map[string]uint64 // what NewTables returns

	pulls    sync.WaitGroup
	pullSlot chan struct{}
}

// New checks cfg and opens the gossip sockets. It joins nobody yet: that is
// Run. Without a Run, Close frees the sockets.
func New(cfg Config) (*Discovery, error) {
	cfg, seeds, err := cfg.validated()
	if err != nil {
		return nil, err
	}
	d := &Discovery{
		cfg: cfg, seeds: seeds, log: cfg.Log,
		floodRate: rate.NewLimiter(FloodsPerSecond, FloodBurst),
		events:    make(chan serf.Event, eventBacklog),
		changed:   make(chan struct{}, 1),
		newer:     make(chan struct{}, 1),
		moved:     make(chan struct{}, 1),
		kick:      make(chan struct{}, 1),
		crash:     make(chan struct{}),
		publish:   make(turn, 1),
		peers:     make(map[string]*peer),
		newest:    make(map[string]uint64),
		pullSlot:  make(chan struct{}, maxPulls),
		boot:      rand.Uint32(),
		born:      time.Now(),
	}
	if cfg.Run != (Run{}) {
		d.boot, d.born = cfg.Run.Number, d.born.Add(-cfg.Run.Age)
	}
	empty, err := newList(nil)
	if err != nil {
		return nil, err
	}
	d.carried.Store(empty)
	d.mark = newMark()
	d.seen = newSightings(d.log)
	if cfg.Secure != nil {
		if d.keys, err = newKeyring(cfg.Secure.Keys); err != nil {
			return nil, err
		}
	}
	d.port, err = openPort(&cfg, d.serveExchange)
	if err != nil {
		return nil, err
	}
	d.self = netip.AddrPortFrom(cfg.Advertise, d.port.number())
	d.names = newNameGuard(cfg.Name, d.self, d.log)
	if cfg.Secure != nil {
		d.passports = newPassports(cfg.Name, d.self, cfg.Secure.Verify, d.own.Load, d.seen)
	}
	d.mu.Lock()
	d.renew()
	d.mu.Unlock()
	return d, nil
}

// validated returns c with its defaults and its parsed seeds, or all its faults.
func (c Config) validated() (Config, []seed, error) {
	var faults []error
	fault := func(format string, a ...any) {
		faults = append(faults, fmt.Errorf("discovery: "+format, a...))
	}
	if !validName(c.Name) {
		fault("node name %q: use letters, digits and hyphens, at most 63, with no hyphen first", c.Name)
	}
	c.Advertise = c.Advertise.Unmap()
	c.Listen = netip.AddrPortFrom(c.Listen.Addr().Unmap(), c.Listen.Port())
	c.VTEP = netip.AddrPortFrom(c.VTEP.Addr().Unmap(), c.VTEP.Port())
	switch a := c.Advertise; {
	case !a.IsValid() || a.IsUnspecified() || a.IsMulticast():
		fault("advertised address %s is no address of a host: set --advertise", a)
	case a.Zone() != "":
		fault("advertised address %s means something on this host only: set --advertise to one without a zone", a)
	}
	switch l := c.Listen.Addr(); {
	case !l.IsValid():
		fault("gossip address is missing: use [::]:%d", DefaultPort)
	case l.Zone() != "":
		fault("gossip address %s: a zone is not supported; use [::]:%d", l, DefaultPort)
	case !l.IsUnspecified() && c.Advertise.IsValid() && l.Is4() != c.Advertise.Is4():
		fault("gossip listens on %s, which %s does not reach: set --gossip or --advertise to one family", l, c.Advertise)
	}
	switch {
	case !validVTEP(c.VTEP):
		fault("VTEP %s is no address and port of a host", c.VTEP)
	case c.VTEP.Addr() != c.Advertise:
		fault("VTEP %s is not at the advertised address %s, which is the one that others confirm", c.VTEP, c.Advertise)
	}
	seeds := make([]seed, 0, len(c.Seeds))
	for _, s := range c.Seeds {
		sd, err := parseSeed(s)
		if err != nil {
			faults = append(faults, err)
			continue
		}
		seeds = append(seeds, sd)
	}
	if c.Secure != nil {
		if err := c.Secure.validate(); err != nil {
			faults = append(faults, err)
		}
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	return c, seeds, errors.Join(faults...)
}

// Gossip returns the address and port that others reach this node's gossip at.
func (d *Discovery) Gossip() netip.AddrPort { return d.self }

// Incarnation returns what the next Discovery goes on with, once this one's Run has returned.
func (d *Discovery) Incarnation() Run { return Run{d.boot, time.Since(d.born)} }

// Close frees the sockets of a Discovery that was never run; after Run it does
// nothing.
func (d *Discovery) Close() {
	if d.ran.CompareAndSwap(false, true) {
		_ = d.port.Shutdown()
	}
}

// Members returns all members, this one too, by name.
func (d *Discovery) Members() []Member {
	if m := d.members.Load(); m != nil {
		return slices.Clone(*m)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.members.Load() == nil {
		m := d.list()
		d.members.Store(&m)
	}
	return slices.Clone(*d.members.Load())
}

// Member returns another member; false if there is none of that name.
func (d *Discovery) Member(name string) (Member, bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if p := d.peers[name]; p != nil && p.refused == "" {
		return p.member(name), true
	}
	return Member{}, false
}

// NewTables returns the Member.Tables of those of whom they changed since the last call.
func (d *Discovery) NewTables() map[string]uint64 {
	d.mu.Lock()
	defer d.mu.Unlock()
	out := d.newest
	d.newest = make(map[string]uint64)
	return out
}

// Changed is rung when Members may have changed, but for Tables alone. One bell, for
// one listener.
func (d *Discovery) Changed() <-chan struct{} { return d.changed }

// TablesChanged is rung when NewTables has some. One bell, for one listener.
func (d *Discovery) TablesChanged() <-chan struct{} { return d.newer }

// Conflicts says in a sentence each which other nodes lately claimed this
// node's name, or are in a cluster of the other kind; empty is well.
func (d *Discovery) Conflicts() []string { return append(d.names.conflicts(), d.seen.all()...) }

// Stats returns the counters.
func (d *Discovery) Stats() Stats {
	s := Stats{
		FloodsSent:     d.count.floodsSent.Load(),
		FloodsReceived: d.count.floodsReceived.Load(),
		FloodsRefused:  d.count.floodsRefused.Load(),
		Pulls:          d.count.pulls.Load(),
		PullsFailed:    d.count.pullsFailed.Load(),
		StreamsRefused: d.port.refused.Load(),
	}
	if g := d.passports; g != nil {
		s.PassportsRefused, s.PassportsStale, s.PassportsVerified = g.count.refused.Load(), g.count.stale.Load(), g.count.verified.Load()
	}
	return s
}

// SetOverlays says what this node carries from now on, at most MaxOverlays and
// MaxListBytes when encoded, names and VNIs unique. It may be called before
// Run; while running the news is on its way with the next round of gossip. In
// a secure cluster the error may also be that no passport could be made: the
// overlays are set then, and not announced.
func (d *Discovery) SetOverlays(overlays []Overlay) error {
	l, err := newList(overlays)
	if err != nil {
		return err
	}
	d.publish.Lock()
	defer d.publish.Unlock()
	old := d.carried.Swap(l)
	if old.digest == l.digest {
		return nil
	}
	d.mark = newMark()
	d.mu.Lock()
	d.renew()
	d.mu.Unlock()
	ring(d.changed)
	if s := d.serf.Load(); s != nil {
		return d.gossip(s)
	}
	return nil
}

// gossip spreads what this node says of itself, and says it once more a while
// later: datagrams get lost, and push/pull would mend that after pushPullInterval or
// longer. What memberlist itself would lose, bolt keeps. d.publish is held. The error
// is that no passport was made.
func (d *Discovery) gossip(s *serf.Serf) error {
	tags, err := d.tagsNow()
	if err != nil {
		return err
	}
	if d.again != nil {
		d.again.Stop()
	}
	d.said = tags
	// Not all at one time again.
	d.again = time.AfterFunc(sayAgain/2+rand.N(sayAgain), func() {
		d.publish.Lock()
		defer d.publish.Unlock()
		if s := d.serf.Load(); s != nil {
			d.say(s)
		}
	})
	d.say(s)
	return nil
}

// say has Serf spread what was said last, which may be another by now than what it is
// called for: an older passport than they have the others refuse, and with it that this
// node is alive. Serf's errors are that others have not taken in tagsTimeout what is
// queued for them, and that there is more than it takes, which passport and tags never
// are. d.publish is held.
func (d *Discovery) say(s *serf.Serf) { _ = s.SetTags(d.said) }

// sayAgain is about when what this node says of itself is said once more: soon enough
// that others know within half a second also what was lost.
const sayAgain = 250 * time.Millisecond

// tagsNow returns this node's tags, in a secure cluster with a new passport.
// d.publish is held.
func (d *Discovery) tagsNow() (map[string]string, error) {
	if d.cfg.Secure == nil {
		return d.tags(d.carried.Load()), nil
	}
	return d.passport(d.carried.Load())
}

// Run joins and stays joined until ctx ends. Then it leaves, which peers know
// within a second, and closes the sockets; with ErrMoved as the context's cause
// it does not leave. The error is nil after a clean end. A Discovery runs once.
func (d *Discovery) Run(ctx context.Context) error {
	if !d.ran.CompareAndSwap(false, true) {
		return errors.New("discovery: it has run already, or was closed")
	}
	s, err := d.start()
	if err != nil {
		_ = d.port.Shutdown()
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stop := make(chan struct{})
	var joins, loop sync.WaitGroup
	joins.Go(func() { d.keepJoined(ctx, s) })
	loop.Go(func() { d.takeEvents(stop) })
	loop.Go(func() { d.follow(ctx, s, stop) })

	leave := true
	select {
	case <-ctx.Done():
		leave = !errors.Is(context.Cause(ctx), ErrMoved)
	case <-d.crash:
		leave = false
	}
	cancel()
	d.port.hangUp()
	joins.Wait()
	var left error
	if leave {
		d.publish.Lock()
		d.leaving()
		d.publish.Unlock()
		left = s.Leave()
	}
	d.publish.Lock()
	d.serf.Store(nil) // from here Flood would wait for somebody to take its event
	if d.again != nil {
		d.again.Stop()
	}
	d.publish.Unlock()
	err = errors.Join(left, s.Shutdown())
	close(stop) // not before: Serf blocks when nobody takes its events
	loop.Wait()
	d.pulls.Wait()
	if err != nil {
		return fmt.Errorf("discovery: leave: %w", err)
	}
	return nil
}

// start makes this node a cluster of one.
func (d *Discovery) start() (*serf.Serf, error) {
	d.publish.Lock()
	defer d.publish.Unlock()
	tags, err := d.tagsNow()
	if err != nil {
		return nil, err
	}
	c := d.serfConfig(tags)
	s, err := serf.Create(c)
	if err != nil {
		return nil, fmt.Errorf("discovery: start gossip: %w", err)
	}
	queue, err := queueOf(s)
	if err != nil {
		return nil, errors.Join(err, s.Shutdown())
	}
	queue.QueueBroadcast(bolt{})
	if d.keys != nil {
		// Serf would let any member install a key of its own at all others, and
		// list theirs, by a query. memberlist has its own pointer to what it was
		// made from; Serf looks for the ring in what it finds here, and only when
		// a query has arrived, which is after begin.
		blind := *c.MemberlistConfig
		blind.Keyring = nil
		c.MemberlistConfig = &blind
	}
	// Serf has one time for both. Nothing of it reads this at another moment.
	d.leaving = func() { c.BroadcastTimeout = broadcastTimeout }
	d.port.begin()
	d.serf.Store(s)
	return s, nil
}

// turn is a lock of capacity 1 whose holder may wait for time to pass: in a
// synctest bubble it would not, while somebody waited for a sync.Mutex.
type turn chan struct{}

func (t turn) Lock()   { t <- struct{}{} }
func (t turn) Unlock() { <-t }

// ring fills a bell of capacity 1.
func ring(bell chan struct{}) {
	select {
	case bell <- struct{}{}:
	default:
	}
}
