// Package bridge switches Ethernet frames between a node's TAPs and its tunnel.
//
// One Bridge is one overlay: a learning switch with an FDB, local ports and a
// flood list (head-end replication, RFC 7348 section 4.2 in its unicast form).
// The Tunnel is the node's side towards the underlay, shared by all bridges.
//
//	egress   tap.Queue.Read → Bridge.forward → ether.Segmenter → vxlan.Put → underlay.Sender
//	ingress  underlay.Receiver → demultiplex → vxlan.Parse → Bridge.deliver → ether.Coalescer → tap.Queue.WriteFrame
//
// A worker runs each way to completion: no queue and no hand-over between a TAP
// and a socket. What comes from the tunnel never goes back into it (split
// horizon). The package knows neither gossip nor settings: whoever owns it says
// which VTEPs are members and which of them carry an overlay.
package bridge

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/puzpuzpuz/xsync/v4"

	"github.com/tulle-net/tulle/crypto"
	"github.com/tulle-net/tulle/ether"
	"github.com/tulle-net/tulle/tap"
	"github.com/tulle-net/tulle/vxlan"
)

// MaxVTEPs bounds the remote VTEPs that one overlay keeps.
const MaxVTEPs = 16384

// Config of one overlay's bridge.
type Config struct {
	Name string
	VNI  vxlan.VNI
	// Peers are foreign VTEPs that may send and get BUM frames.
	Peers []netip.AddrPort
	// Group, if valid, gets BUM frames in place of the members (RFC 7348,
	// section 4.2), which are then learnt as VTEPs like everybody else.
	Group netip.AddrPort
	// LearnVTEPs accepts frames from any source address. A learnt VTEP is never
	// on the flood list.
	LearnVTEPs bool
	// Sealed: the overlay requires encryption. Frames leave it and enter it under
	// sessions only (SetPeers, Tunnel.Receive, Tunnel.Send); Peers, Group and
	// LearnVTEPs are not for it.
	Sealed bool
	// ClampMSS lowers the segment size that TCP announces through the tunnel, in
	// both directions, to what fits the devices and the way to the peer: for hosts
	// that do not hear of a smaller path (see SetPathMTU), or too late.
	ClampMSS bool
	// FloodGossip, if set, is offered each BUM frame first; it returns false
	// when the flood list must take it. The frame is borrowed.
	FloodGossip func(vni vxlan.VNI, frame []byte) bool
	// Snooping has multicast go to members only (Groups, SetGroups), and has the node
	// ask for them at its ports. Without it, multicast goes where broadcasts go.
	Snooping bool
	// UnknownMulticast says what becomes of frames for a group that nobody is known to
	// have joined.
	UnknownMulticast UnknownMulticast
	// QueryInterval is between two questions to a port where a group is joined, from
	// which the other times of the protocol follow; default 125 s (RFC 3376, section 8.2).
	QueryInterval time.Duration
	// GroupsChanged, if set, is called when what Groups returns has changed. It must
	// not block.
	GroupsChanged func()
	// Loop, if set, is told when a port is blocked because of a loop, and when it is
	// tried again; without it nobody looks for loops. It must not block, nor call the
	// Bridge.
	Loop func(LoopEvent)
	// PortLost, if set, is called when a port's device has gone by itself (see
	// Port.Lost). It must not block, nor call the Bridge.
	PortLost func()
	// UnknownUnicast: unknown unicast goes to all, whatever SetComplete says.
	UnknownUnicast bool
	// Storm bounds what is flooded.
	Storm Storm
	// Stranger, if set, is called when a port has learnt a MAC that is neither its
	// device's own nor an Endpoint of this node, Froze when a learnt MAC has moved too
	// often and stays where it is (RFC 7432, section 15.1), and Contradicted, at most once
	// a second for a peer, when frames came from it whose source is an Endpoint elsewhere.
	// In a plain overlay it gets the VTEP of a peer of which neither SetEndpoint nor
	// SetComplete has told the name. They must not block, nor call the Bridge.
	Stranger func()
	// Readdressed, if set, is called when the station of a port says that an address
	// which the tables say is the port's is at another MAC than they say: it has changed
	// its MAC. At most once a second a port; it must not block, nor call the Bridge.
	Readdressed  func(was, is ether.MAC)
	Froze        func(mac ether.MAC)
	Contradicted func(peer string)
	// AgeAfter is how long a MAC stays without being seen; default 300 s.
	AgeAfter time.Duration
	// MaxMACs bounds the FDB; default 65,536.
	MaxMACs int
	// MaxMACsPerPort bounds what one port or VTEP may fill; default 16,384.
	MaxMACsPerPort int
}

// Bridge is one overlay on this node. Its methods are safe for concurrent use.
type Bridge struct {
	cfg    Config
	clamp  atomic.Bool // cfg.ClampMSS, which may change
	tunnel *Tunnel
	fdb    *fdb

	ports   atomic.Pointer[[]*Port]  // read by workers
	flood   atomic.Pointer[[]*place] // read by workers
	refused atomic.Pointer[map[netip.Addr]struct{}]
	remotes *xsync.Map[netip.Addr, *place] // by source address; of a sealed overlay none
	peers   *xsync.Map[string, *place]     // by name; of a sealed overlay only
	gossip  atomic.Pointer[floodKeys]
	early   early
	dir     directory
	storm   atomic.Pointer[Storm]
	bum     meter // of all ports
	snoop   *snoop
	loops   *loops
	names   atomic.Pointer[[]string] // of peers, in an overlay that is not sealed

	mu      sync.Mutex // serialises changes of the above
	members []netip.AddrPort
	closed  bool
	ageAt   atomic.Int64 // tick of the next sweep

	answers limiter // ICMP errors to local senders

	Counters
	// Flooded counts frames that went to the flood list.
	Flooded atomic.Uint64
	// Answered counts ARP and ND questions that were answered here.
	Answered atomic.Uint64
}

// Counters count inner frames and their bytes, by direction; super-frames
// count as what they stand for.
type Counters struct {
	TxFrames, TxBytes, RxFrames, RxBytes atomic.Uint64
}

func (c *Counters) sent(frames, bytes int) {
	c.TxFrames.Add(uint64(frames))
	c.TxBytes.Add(uint64(bytes))
}

func (c *Counters) received(frames, bytes int) {
	c.RxFrames.Add(uint64(frames))
	c.RxBytes.Add(uint64(bytes))
}

// place is where a MAC lives: a local port or a remote VTEP. There is one for
// each, so "has it moved" compares pointers.
type place struct {
	port *Port          // local; nil for a VTEP
	vtep netip.AddrPort // remote: where to send
	path *path          // remote: how large that may be
	// member: the VTEP is another Tulle node, whose frames are finished.
	member bool
	// listed: in Config.Peers; it stays when members come and go.
	listed bool
	macs   atomic.Int64 // FDB entries
	// strangers are those of them that are strangers' (Bridge.Strangers).
	strangers atomic.Int64
	// complete: the peer's tables name all its stations.
	complete    atomic.Bool
	contradicts atomic.Int64 // tick from which Config.Contradicted may be called again
	bum         meter
	gone        atomic.Bool
	Counters

	// Of a sealed overlay: whose place it is, in which bridge, the session to
	// send under, whether the peer has proven the overlay's key (changed under
	// Bridge.mu), and plaintext that came from its address.
	peer      *remote
	bridge    *Bridge
	tx        atomic.Pointer[crypto.Sealer]
	proved    bool
	plaintext atomic.Uint64
}

// address returns where to send to a remote place.
func (p *place) address() netip.AddrPort {
	if p.peer != nil {
		return *p.peer.at.Load()
	}
	return p.vtep
}

// ErrClosed: the bridge was removed.
var ErrClosed = errors.New("bridge: overlay was removed")

func newBridge(t *Tunnel, cfg Config) *Bridge {
	if cfg.AgeAfter == 0 {
		cfg.AgeAfter = 300 * time.Second
	}
	if cfg.MaxMACs == 0 {
		cfg.MaxMACs = 65536
	}
	if cfg.MaxMACsPerPort == 0 {
		cfg.MaxMACsPerPort = 16384
	}
	b := &Bridge{
		cfg:     cfg,
		tunnel:  t,
		fdb:     newFDB(cfg.MaxMACs, cfg.MaxMACsPerPort),
		remotes: xsync.NewMap[netip.Addr, *place](),
		peers:   xsync.NewMap[string, *place](),
	}
	b.fdb.strange, b.fdb.froze = cfg.Stranger, cfg.Froze
	b.dir = newDirectory(cfg.UnknownUnicast)
	b.storm.Store(&cfg.Storm)
	b.snoop, b.loops = newSnoop(b, cfg), newLoops(b)
	b.clamp.Store(cfg.ClampMSS)
	b.ports.Store(&[]*Port{})
	b.refused.Store(&map[netip.Addr]struct{}{})
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, a := range cfg.Peers {
		b.addPeer(a)
	}
	b.setFlood()
	return b
}

// Name returns the overlay's name.
func (b *Bridge) Name() string { return b.cfg.Name }

// VNI returns the overlay's network identifier.
func (b *Bridge) VNI() vxlan.VNI { return b.cfg.VNI }

// Port is a TAP that is attached to a bridge.
type Port struct {
	bridge *Bridge
	dev    tap.Device
	queues []tap.Queue
	at     *place
	done   sync.WaitGroup
	lost   atomic.Bool
	watch  atomic.Pointer[watch] // nil: nobody looks at what is written
	gone   chan struct{}         // closed by RemovePort
	// local: nothing passes between this port and the tunnel, either way.
	local      bool
	limits     *portLimits  // nil: none
	neighbours meter        // ARP and ND that the tables do not answer
	readdress  atomic.Int64 // tick from which Config.Readdressed may be called again
	// blocked: there is a loop, and nothing passes, either way.
	blocked atomic.Bool
	loop    portLoop
	cast    portCast
}

// AddPort attaches a device and starts a worker per queue. The bridge closes
// the device with RemovePort or Close.
func (b *Bridge) AddPort(dev tap.Device) (*Port, error) { return b.addPort(dev, false, Limits{}) }

// AddLocalPort is AddPort for a device that has to do with this node's ports alone:
// its frames never go into the tunnel, and none from there reach it. So each node
// may have a device with the same MAC (the anycast gateway of RFC 9135, section 4.1).
func (b *Bridge) AddLocalPort(dev tap.Device) (*Port, error) { return b.addPort(dev, true, Limits{}) }

// AddLimitedPort is AddPort with a bound on what the port carries.
func (b *Bridge) AddLimitedPort(dev tap.Device, l Limits) (*Port, error) {
	return b.addPort(dev, false, l)
}

func (b *Bridge) addPort(dev tap.Device, local bool, l Limits) (*Port, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.closed {
		return nil, ErrClosed
	}
	p := &Port{bridge: b, dev: dev, queues: dev.Queues(), local: local, gone: make(chan struct{})}
	p.limits = newPortLimits(l, p.gone)
	p.loop.number = b.tunnel.prover.ports.Add(1)
	p.loop.probed.Store(-probeEvery)
	p.at = &place{port: p}
	if mac := dev.MAC(); mac.IsValid() {
		if e, ok := b.fdb.entries.Load(mac); ok && e.static {
			return nil, fmt.Errorf("bridge: %s: %s has the MAC %s already: give one of the two another", dev.Name(), e.at.port.dev.Name(), mac)
		}
		b.fdb.pin(mac, p.at)
	}
	ports := append(slices.Clone(*b.ports.Load()), p)
	b.ports.Store(&ports)
	b.snoop.addPort(p)
	for _, q := range p.queues {
		p.done.Add(1)
		go p.run(q)
	}
	if p.limits != nil && p.limits.to != nil {
		p.done.Add(1)
		go p.limits.to.run(p)
	}
	return p, nil
}

// RemovePort detaches p, closes its device and waits for its workers.
func (b *Bridge) RemovePort(p *Port) error {
	b.mu.Lock()
	ports := slices.DeleteFunc(slices.Clone(*b.ports.Load()), func(q *Port) bool { return q == p })
	b.ports.Store(&ports)
	if !p.at.gone.Swap(true) {
		close(p.gone)
	}
	b.fdb.forget(p.at)
	b.unpinned(p.dev.MAC())
	b.mu.Unlock()
	b.snoop.removePort(p)
	err := p.dev.Close()
	p.done.Wait()
	return err
}

// Lost reports whether the device has gone without RemovePort: somebody deleted
// it, or its network namespace has ended. RemovePort still has to be called.
func (p *Port) Lost() bool { return p.lost.Load() }

// ended is called by each worker as it ends.
func (p *Port) ended() {
	if !p.at.gone.Load() && !p.lost.Swap(true) && p.bridge.cfg.PortLost != nil {
		p.bridge.cfg.PortLost()
	}
}

// SetClampMSS changes Config.ClampMSS.
func (b *Bridge) SetClampMSS(on bool) { b.clamp.Store(on) }

// mtu returns the MTU in bytes of the overlay's devices, 0 if it has none.
func (b *Bridge) mtu() int {
	if ports := *b.ports.Load(); len(ports) > 0 {
		return ports[0].dev.MTU()
	}
	return 0
}

// Device returns the port's TAP.
func (p *Port) Device() tap.Device { return p.dev }

// WriteFrame hands a frame to the port's device: the Port is an ether.Sink.
func (p *Port) WriteFrame(m ether.Meta, parts [][]byte) {
	if p.blocked.Load() {
		p.bridge.tunnel.drops.add(DropPortBlocked)
		return
	}
	if w := p.watch.Load(); w != nil {
		w.see(parts[0])
	}
	if p.limits != nil && p.limits.to != nil {
		p.limits.to.pass(p, m, parts)
		return
	}
	p.write(m, parts)
}

func (p *Port) write(m ether.Meta, parts [][]byte) {
	q := p.queues[0]
	if len(p.queues) > 1 {
		// One flow, one queue: what is written by one keeps its order.
		q = p.queues[ether.FlowHash(parts[0])%uint32(len(p.queues))]
	}
	if q.WriteFrame(m, parts) != nil {
		p.bridge.tunnel.drops.add(DropTapWrite)
	}
}

// Close removes the bridge from its tunnel and closes its devices.
func (b *Bridge) Close() error {
	b.tunnel.remove(b)
	b.mu.Lock()
	b.closed = true
	ports := *b.ports.Load()
	b.mu.Unlock()
	var errs []error
	b.mu.Lock()
	b.peers.Range(func(name string, p *place) bool {
		b.dropPeer(name, p)
		return true
	})
	b.setFlood()
	b.mu.Unlock()
	for _, p := range ports {
		errs = append(errs, b.RemovePort(p))
	}
	return errors.Join(errs...)
}

// SetMembers says which nodes carry this overlay (they get BUM frames) and
// from which source addresses it is refused because of a conflict of names.
// What a VTEP that is gone had taught is forgotten at once.
func (b *Bridge) SetMembers(vteps []netip.AddrPort, refused []netip.Addr) {
	b.mu.Lock()
	defer b.mu.Unlock()
	no := make(map[netip.Addr]struct{}, len(refused))
	for _, a := range refused {
		no[a] = struct{}{}
	}
	b.refused.Store(&no)
	b.members = slices.Clone(vteps)
	for _, a := range vteps {
		b.remote(a.Addr(), a, true)
	}
	b.prune()
	b.setFlood()
}

// prune drops the places of VTEPs that may no longer send. b.mu is held.
func (b *Bridge) prune() {
	known := *b.tunnel.members.Load()
	b.remotes.Range(func(src netip.Addr, p *place) bool {
		vtep, isMember := known[src]
		_, refused := (*b.refused.Load())[src]
		stays := p.listed || (p.member && isMember && vtep == p.vtep) || (!p.member && !isMember && b.cfg.LearnVTEPs)
		if !stays || refused {
			b.dropPlace(src, p)
		}
		return true
	})
	// A listed peer whose refusal has ended is back.
	for _, a := range b.cfg.Peers {
		if _, refused := (*b.refused.Load())[a.Addr()]; !refused {
			b.addPeer(a)
		}
	}
}

// addPeer makes the place of a listed peer, if there is none. b.mu is held.
func (b *Bridge) addPeer(a netip.AddrPort) {
	if p, ok := b.remotes.Load(a.Addr()); !ok || !p.listed {
		if ok {
			b.dropPlace(a.Addr(), p)
		}
		p = &place{vtep: a, path: &path{}, listed: true}
		b.remotes.Store(a.Addr(), p)
		b.arrived(whom{at: a.Addr()}, p)
	}
}

func (b *Bridge) dropPlace(src netip.Addr, p *place) {
	b.remotes.Delete(src)
	p.gone.Store(true)
	b.fdb.forget(p)
	b.departed(whom{at: src})
}

// remote returns the place of the VTEP behind source address src, making it if
// need be. b.mu is held.
func (b *Bridge) remote(src netip.Addr, vtep netip.AddrPort, member bool) *place {
	if p, ok := b.remotes.Load(src); ok {
		if p.listed || (p.vtep == vtep && p.member == member) {
			return p
		}
		b.dropPlace(src, p) // another port, or it has become a member
	}
	p := &place{vtep: vtep, path: &path{}, member: member}
	b.remotes.Store(src, p)
	b.arrived(whom{at: src}, p)
	return p
}

// setFlood derives the flood list. b.mu is held.
func (b *Bridge) setFlood() {
	var list []*place
	add := func(a netip.AddrPort) {
		p, ok := b.remotes.Load(a.Addr())
		if ok && !slices.Contains(list, p) {
			list = append(list, p)
		}
	}
	for _, a := range b.cfg.Peers {
		add(a)
	}
	b.peers.Range(func(_ string, p *place) bool {
		if p.proved {
			list = append(list, p)
		}
		return true
	})
	if b.cfg.Group.IsValid() {
		list = append(list, b.group())
	} else {
		for _, a := range b.members {
			add(a)
		}
	}
	old := b.flood.Swap(&list)
	if old == nil || b.cfg.Group.IsValid() {
		return // it begins; or a group has no beginners
	}
	b.catchUp(slices.DeleteFunc(slices.Clone(list), func(p *place) bool { return slices.Contains(*old, p) }))
}

// group returns the place that stands for the multicast group; no MAC lives there.
func (b *Bridge) group() *place {
	if old := b.flood.Load(); old != nil {
		for _, p := range *old {
			if p.vtep == b.cfg.Group {
				return p
			}
		}
	}
	return &place{vtep: b.cfg.Group, path: &path{}}
}

// admit decides about the first datagram from src: it returns the sender's
// place, or nil and the reason why it may not send.
func (b *Bridge) admit(src netip.AddrPort) (*place, Drop) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if p, ok := b.remotes.Load(src.Addr()); ok {
		return p, 0
	}
	if b.closed {
		return nil, DropUnknownVNI
	}
	if _, no := (*b.refused.Load())[src.Addr()]; no {
		return nil, DropOverlayConflict
	}
	if vtep, ok := (*b.tunnel.members.Load())[src.Addr()]; ok {
		return b.remote(src.Addr(), vtep, true), 0
	}
	if !b.cfg.LearnVTEPs {
		return nil, DropUnknownVTEP
	}
	if b.remotes.Size() >= MaxVTEPs {
		return nil, DropVTEPLimit
	}
	// Its source port is entropy (RFC 7348, section 5): it listens where we do.
	return b.remote(src.Addr(), netip.AddrPortFrom(src.Addr(), b.tunnel.cfg.Port), false), 0
}

// age forgets what was not seen for AgeAfter; it is called about once a tick.
func (b *Bridge) age(now int64) {
	after := int64(b.cfg.AgeAfter / tick)
	if now < b.ageAt.Load() {
		return
	}
	b.ageAt.Store(now + max(after/16, 1))
	b.fdb.age(now - after)
	// A learnt VTEP goes with its last MAC, or forged sources would fill the table.
	b.mu.Lock()
	defer b.mu.Unlock()
	b.remotes.Range(func(src netip.Addr, p *place) bool {
		if !p.listed && !p.member && p.macs.Load() == 0 {
			b.dropPlace(src, p)
		}
		return true
	})
}
