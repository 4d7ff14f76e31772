// Package node assembles a node: it starts the parts in order, keeps them in step, and stops them in reverse.
//
//	place in the cluster → underlay sockets → tunnel → QUIC → gossip → overlays (bridge + TAPs) → sessions → local API
//
// It holds no protocol logic and no per-frame code. In an open cluster there is
// neither place nor QUIC nor session.
package node

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/tulle-net/tulle/bridge"
	"github.com/tulle-net/tulle/config"
	"github.com/tulle-net/tulle/discovery"
	"github.com/tulle-net/tulle/gateway"
	"github.com/tulle-net/tulle/handover"
	"github.com/tulle-net/tulle/underlay"
	"github.com/tulle-net/tulle/vxlan"
)

// resyncEvery bounds how long a missed notification can stay unnoticed.
const resyncEvery = 10 * time.Second

// Node is a running node. New opens everything, Run works until its context ends.
type Node struct {
	cfg     config.Config
	log     *slog.Logger
	started time.Time
	ready   chan struct{}
	// Bells: a path's MTU may have shrunk; a port's device has gone; a peer or
	// this node is elsewhere; there is news for this node's passport.
	tooBig, portLost, moved, news chan struct{}
	froze                         chan frozenMAC
	frozeLogged                   time.Time     // by Run's goroutine
	redefined                     chan struct{} // shared overlays are

	state  *stateDir
	conn   underlay.Conn
	tunnel *bridge.Tunnel
	disc   atomic.Pointer[discovery.Discovery]     // another one after a move
	leave  atomic.Pointer[context.CancelCauseFunc] // ends the one that runs
	secure *secure                                 // nil in an open cluster
	api    *apiServer

	// overlays is a snapshot; only New and Run's goroutine replace it.
	overlays  atomic.Pointer[[]*overlay]
	todo      chan func()   // what Run's goroutine does for others
	stopped   chan struct{} // closed when it does nothing any more
	endpoints *endpoints    // in shared overlays; nil in an open cluster
	tables    *tables
	gateways  *gateway.Gateway
	names     *names
	restoring bool                 // endpoints: gateways follow when all are there
	ports     map[*endpoint][]held // of the host, that lead to endpoints; New's and Run's goroutine's

	host    Host
	run     discovery.Run // that of the process before; zero: a new one
	handing atomic.Bool   // it stops because of ErrHandOver
	handed  *handover.Set // what Run kept
	follows bool          // a process that waits has handed it over

	// at is where this node is: the address that it advertises.
	at atomic.Pointer[netip.Addr]

	// Run's own.
	dev       underlay.Device                // that holds the address
	flood     map[vxlan.VNI][]netip.AddrPort // as of the last sync
	unplugged bool                           // that device has no carrier
	// missing is since when this host lacks the address; zero: it has it.
	missing time.Time
	// before are the members as of the last move, at movedAt.
	before  []discovery.Member
	movedAt time.Time
	revoked atomic.Bool // somebody was, since
	// reverifyAt is when passports are looked at because of the CA; 0: not.
	reverifyAt atomic.Int64

	mu        sync.Mutex
	conflicts []string
}

// New opens sockets and devices; nothing is left behind when it fails but, in a
// secure cluster, the state of a node that has one. cfg must be valid
// (config.Config.Validate). ctx bounds New alone: it ends the resolving of names. Of
// what was handed over (Host.Handed) nothing is open afterwards that the node does not
// use.
func New(ctx context.Context, cfg config.Config, log *slog.Logger, host Host) (_ *Node, err error) {
	defer host.Handed.Close()
	n := &Node{
		host: host, cfg: cfg, log: log, started: time.Now(), ready: make(chan struct{}),
		tooBig: make(chan struct{}, 1), portLost: make(chan struct{}, 1), froze: make(chan frozenMAC, 16), moved: make(chan struct{}, 1),
		news: make(chan struct{}, 1), redefined: make(chan struct{}, 1), todo: make(chan func()), stopped: make(chan struct{}),
	}
	n.overlays.Store(&[]*overlay{})
	defer func() {
		if err != nil {
			_ = n.close() // the first error is the one to tell
		}
	}()
	n.known(first(host.Handed.Take(handedMembers)))
	lock := first(host.Handed.Take(handedLock))
	n.follows = lock != nil
	if n.state, err = openStateDir(cfg.StateDir, lock); err != nil {
		return nil, err
	}
	if err = n.openTables(); err != nil {
		return nil, err
	}
	if n.secure, err = n.openPlace(ctx); err != nil {
		return nil, err
	}
	if n.secure != nil {
		if n.endpoints, err = n.openEndpoints(); err != nil {
			return nil, err
		}
	}
	if err := n.checkRootless(); err != nil {
		return nil, err
	}
	at, err := n.advertise(ctx)
	if err != nil {
		return nil, err
	}
	n.at.Store(&at)
	if n.dev, err = underlay.DeviceOf(at); err != nil {
		return nil, fmt.Errorf("node: %w", err)
	}
	if n.api, err = claimSocket(cfg.Socket, first(host.Handed.Take(handedAPI))); err != nil {
		return nil, err
	}
	if err = n.openUnderlay(ctx); err != nil {
		return nil, err
	}
	if err = n.openGossip(); err != nil {
		return nil, err
	}
	for _, o := range cfg.Overlays {
		if err := n.addStatic(o); err != nil {
			return nil, err
		}
	}
	if err := n.openGateways(); err != nil {
		return nil, err
	}
	if err := n.openNames(); err != nil {
		return nil, err
	}
	n.storeUnderlay()
	n.tellRootless()
	if n.endpoints != nil {
		n.restoring = true
		n.endpoints.restore()
		n.restoring = false
	}
	n.followGateways() // also without any: an earlier run may have been killed
	sweepNetnsFiles()
	n.names.follow()
	n.dropUnclaimed()
	return n, n.disc.Load().SetOverlays(n.carried())
}

// openUnderlay makes sockets and tunnel, and in a secure cluster QUIC on them.
func (n *Node) openUnderlay(ctx context.Context) (err error) {
	n.conn, err = underlay.Open(underlay.Config{
		Listen:      n.cfg.Listen,
		Source:      n.addr(),
		SourcePorts: n.cfg.SourcePorts,
		GroupTTL:    groupTTLs(n.cfg.Overlays),
		TooBig:      n.tooBig,
		NoGSO:       n.cfg.NoGSO,
		NoGRO:       n.cfg.NoGRO,
		Handed:      n.handedUnderlay(),
		Log:         n.log,
	})
	if err != nil {
		return err
	}
	tc := bridge.TunnelConfig{
		Conn:       n.conn,
		Self:       []netip.Addr{n.addr()},
		Port:       n.cfg.Listen.Port(),
		Unfinished: unfinishedChecksums(n.cfg.UnfinishedChecksums, n.addr()),
		Node:       n.cfg.Name,
		NoAQM:      n.cfg.NoAQM,
	}
	if n.secure != nil {
		if err := n.secure.listen(ctx, n); err != nil {
			return err
		}
		n.secure.hook(n, &tc)
	}
	n.tunnel = bridge.NewTunnel(tc)
	return nil
}

// addr is the address that this node advertises.
func (n *Node) addr() netip.Addr { return *n.at.Load() }

func (n *Node) vtep() netip.AddrPort {
	return netip.AddrPortFrom(n.addr(), n.cfg.Listen.Port())
}

// groupTTLs returns the TTL of each multicast group that an overlay floods to.
func groupTTLs(overlays []config.Overlay) map[netip.Addr]int {
	ttls := map[netip.Addr]int{}
	for _, o := range overlays {
		if o.Flood == "multicast" {
			ttls[o.Group] = o.GroupTTL
		}
	}
	return ttls
}

func unfinishedChecksums(mode string, underlayAddr netip.Addr) bool {
	switch mode {
	case "on":
		return true
	case "off":
		return false
	}
	return underlay.IsVirtual(underlayAddr)
}

func (n *Node) tellCarried() {
	if err := n.disc.Load().SetOverlays(n.carried()); err != nil {
		n.log.Error("cannot tell the others which overlays this node carries", "err", err)
	}
}

var errStopped = errors.New("node: it is stopping")

// do has Run's goroutine call f, and waits; an error if ctx ends before.
func (n *Node) do(ctx context.Context, f func() error) error {
	done := make(chan error, 1)
	select {
	case n.todo <- func() { done <- f() }:
		return <-done
	case <-n.stopped:
		return errStopped
	case <-ctx.Done():
		return ctx.Err()
	}
}

// Ready is closed when the local API answers.
func (n *Node) Ready() <-chan struct{} { return n.ready }

// ring rings a bell of capacity 1.
func ring(bell chan struct{}) {
	select {
	case bell <- struct{}{}:
	default:
	}
}

// Run works until ctx ends, then leaves the cluster and stops everything; with
// ErrHandOver as the cause it does not leave.
func (n *Node) Run(ctx context.Context) error {
	defer n.close()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	changes, err := underlay.Changes(ctx)
	if err != nil {
		return err
	}
	// The parts stop in reverse: the leave is told while frames still flow.
	lowerCtx, stopLower := context.WithCancel(context.WithoutCancel(ctx))
	var lower sync.WaitGroup
	lower.Go(func() { n.tunnel.Run(lowerCtx) })
	lower.Go(func() { n.tables.run(lowerCtx) })
	defer lower.Wait()
	defer stopLower()
	defer n.conn.Close()
	if n.secure != nil {
		defer n.secure.close()
		if err := n.secure.join(ctx, n); err != nil {
			if ctx.Err() != nil {
				return nil // stopped before it was a member
			}
			return err
		}
		n.wantKeys()
		lower.Go(func() { n.secure.run(lowerCtx) })
		lower.Go(func() { n.spread(lowerCtx) })
		lower.Go(func() { _ = n.endpoints.pool.Run(lowerCtx) }) // returns nil
		lower.Go(func() { n.watch(lowerCtx) })
	}
	defer close(n.stopped) // first: who is waited for must not wait for this goroutine
	gossip := make(chan error, 1)
	go func() { gossip <- n.runGossip(ctx) }()
	if err := n.api.serve(n); err != nil {
		cancel()
		return errors.Join(err, <-gossip)
	}
	n.log.Info("node is up", "name", n.cfg.Name, "vtep", n.vtep())
	if n.secure != nil && n.secure.created {
		n.log.Info("another machine joins with: " + invitation(n.addr(), n.cfg.Socket, n.cfg.Rootless))
	}
	close(n.ready)
	err = n.follow(ctx, changes, gossip)
	if errors.Is(context.Cause(ctx), ErrHandOver) {
		n.handing.Store(true)
		n.handed = n.keep()
		return err
	}
	if err == nil {
		n.log.Info("node has left", "name", n.cfg.Name)
	}
	return err
}

// follow keeps everything in step until gossip ends.
func (n *Node) follow(ctx context.Context, changes <-chan struct{}, gossip <-chan error) error {
	resync := time.NewTicker(resyncEvery)
	defer resync.Stop()
	n.sync()
	for {
		select {
		case err := <-gossip:
			return err
		case <-n.disc.Load().Changed():
			n.sync()
		case <-n.moved:
			n.followAddress(ctx)
			n.sync()
		case <-resync.C:
			n.mendPorts()
			if n.gateways != nil {
				n.gateways.Check()
			}
			n.checkExits()
			n.endpoints.follow()
			n.reverify()
			n.sync()
		case <-n.disc.Load().TablesChanged():
			n.tables.followVersions(n.disc.Load().NewTables())
		case <-n.tables.told:
			n.tables.settle()
		case <-n.redefined:
			n.endpoints.follow()
		case <-changes:
			n.followCarrier()
			n.followAddress(ctx)
			n.followDevice()
			n.followMTU()
		case <-n.tooBig:
			n.followMTU()
		case <-n.portLost:
			n.mendPorts()
		case f := <-n.froze:
			n.logFrozen(f)
		case f := <-n.todo:
			f()
		}
	}
}

// close stops what New opened, in reverse; it may be called twice.
func (n *Node) close() error {
	var errs []error
	handing := n.handing.Load() || n.follows && !n.isReady()
	if n.api != nil {
		errs = append(errs, n.api.close(handing))
	}
	n.names.close()
	n.spare()
	if n.gateways != nil && !handing { // else the next process takes them over, as after a crash
		errs = append(errs, n.gateways.Close())
	}
	for e := range n.ports {
		n.unreserve(e)
	}
	for _, o := range n.list() {
		errs = append(errs, o.br.Close())
	}
	n.overlays.Store(&[]*overlay{})
	if d := n.disc.Load(); d != nil {
		d.Close()
	}
	if n.secure != nil {
		errs = append(errs, n.secure.close())
	}
	if n.conn != nil {
		errs = append(errs, n.conn.Close())
	}
	if n.state != nil {
		errs = append(errs, n.state.close())
	}
	return errors.Join(errs...)
}

// isReady reports whether the local API has answered. Until then who has handed the
// node over takes it back if this process does not come up.
func (n *Node) isReady() bool {
	select {
	case <-n.ready:
		return true
	default:
		return false
	}
}

// carried is what this node tells others of its overlays: those with a device.
func (n *Node) carried() []discovery.Overlay {
	list := make([]discovery.Overlay, 0, len(n.list()))
	for _, o := range n.list() {
		if o.live() != nil {
			list = append(list, discovery.Overlay{VNI: o.cfg.VNI, Name: o.cfg.Name, Encryption: o.cfg.Encryption})
		}
	}
	return list
}
